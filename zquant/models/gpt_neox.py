"""GPT-NeoX and Pythia (Black et al., arXiv 2204.06745): attention and feed-forward side by side, partly rotated heads.

The rows of ``query_key_value`` lie head by head: q, k and v of head 0, then of head 1.
"""
from __future__ import annotations

from .decoder_family import Architecture, DecoderFamily, Settings, register_decoder
from .rope import read_rope


def _read(s: Settings) -> Architecture:
    hidden, layers, heads = s.integer("hidden_size"), s.integer("num_hidden_layers"), s.integer("num_attention_heads")
    if hidden % heads:
        raise ValueError(f"config.json: {hidden} hidden units do not divide into {heads} heads")
    rope = read_rope(s.config, hidden // heads, theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25)
    biased = {"up", "down"} | ({"qkv", "attention"} if s.flag("attention_bias", True) else set())
    return Architecture(
        hidden=hidden, layers=layers, heads=heads, kv_heads=heads, head_dim=hidden // heads,
        intermediate=s.integer("intermediate_size"), vocabulary=s.integer("vocab_size"),
        max_positions=max(s.integer("max_position_embeddings", 2048), rope.max_positions),
        eps=s.number("layer_norm_eps", 1e-5), activation=s.activation("hidden_act", "gelu"),
        tied=s.flag("tie_word_embeddings", False), rope=rope, scales=((hidden // heads)**-0.5,) * layers,
        windows=(0,) * layers, norm="layer", order="parallel" if s.flag("use_parallel_residual", True) else "pre",
        qkv="heads", gated=False, biased=frozenset(biased))


GPT_NEOX = register_decoder(
    DecoderFamily(
        name="GPT-NeoX",
        model_types=("gpt_neox",),
        read=_read,
        prefixes=("gpt_neox.", ""),
        embeddings=dict(word="embed_in.weight"),
        layer="layers.{}.",
        block=dict(
            attention_norm="input_layernorm",
            qkv="attention.query_key_value",
            attention="attention.dense",
            mlp_norm="post_attention_layernorm",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
        outer=dict(final_norm="final_layer_norm"),
        head="embed_out",
    )
)
