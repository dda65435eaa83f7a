"""Llama (Touvron et al., arXiv 2302.13971; Llama 2 and 3): RMSNorm, rotary positions, grouped-query heads, SwiGLU.

Mistral and Qwen are the same forward with other switches: :func:`read_llama` reads what they share.
"""
from __future__ import annotations

from typing import Any

from .decoder_family import Architecture, DecoderFamily, Settings, register_decoder
from .rope import read_rope

NAMES: dict[str, Any] = dict(
    prefixes=("model.", ""),
    embeddings=dict(word="embed_tokens.weight"),
    layer="layers.{}.",
    block=dict(
        attention_norm="input_layernorm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        attention="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    ),
    outer=dict(final_norm="norm"),
)


def read_llama(s: Settings, default_head_dim: int | None = None, **switches: Any) -> Architecture:
    """What the Llama-like families have in common; ``switches`` are fields of Architecture."""
    hidden, layers, heads = s.integer("hidden_size"), s.integer("num_hidden_layers"), s.integer("num_attention_heads")
    head_dim = s.integer("head_dim", default_head_dim)
    if head_dim is None:
        if hidden % heads:
            raise ValueError(f"config.json: {hidden} hidden units do not divide into {heads} heads")
        head_dim = hidden // heads
    rope = read_rope(s.config, head_dim)
    common: dict[str, Any] = dict(
        hidden=hidden, layers=layers, heads=heads, kv_heads=s.integer("num_key_value_heads", heads), head_dim=head_dim,
        intermediate=s.integer("intermediate_size"), vocabulary=s.integer("vocab_size"),
        max_positions=max(s.integer("max_position_embeddings", 2048), rope.max_positions),
        eps=s.number("rms_norm_eps", 1e-6), activation=s.activation("hidden_act", "silu"),
        tied=s.flag("tie_word_embeddings", False), rope=rope, scales=(head_dim**-0.5,) * layers, windows=(0,) * layers)
    return Architecture(**{**common, **switches})


def window_per_layer(s: Settings, window: int | None, first: int = 0) -> tuple[int, ...]:
    """The sliding window of each block: as ``layer_types`` says, else from block ``first`` on."""
    layers, types = s.integer("num_hidden_layers"), s.config.get("layer_types")
    if window is None:
        return (0,) * layers
    if types is None:
        return tuple(window if i >= first else 0 for i in range(layers))
    known = {"full_attention": 0, "sliding_attention": window}
    if len(types) != layers or not set(types) <= known.keys():
        raise ValueError(f"config.json: layer_types must name one of {', '.join(known)} for each of {layers} layers; "
                         f"got {types}")
    return tuple(known[kind] for kind in types)


def _read(s: Settings) -> Architecture:
    attention, mlp = s.flag("attention_bias", False), s.flag("mlp_bias", False)
    biased = {"query", "key", "value", "attention"} if attention else set()
    return read_llama(s, biased=frozenset(biased | ({"gate", "up", "down"} if mlp else set())))


LLAMA = register_decoder(DecoderFamily(name="Llama", model_types=("llama",), read=_read, **NAMES))
