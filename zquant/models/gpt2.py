"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm before each half, GELU, a tied head.

The blocks' weights are those of a ``Conv1D``: stored (in, out), one matrix for q, k and v. They are transposed on the way in
and, as floats, on the way out.
"""
from __future__ import annotations

from .decoder_family import Architecture, DecoderFamily, Settings, register_decoder


def _read(s: Settings) -> Architecture:
    hidden, layers, heads = s.integer("n_embd"), s.integer("n_layer"), s.integer("n_head")
    if hidden % heads:
        raise ValueError(f"config.json: {hidden} hidden units do not divide into {heads} heads")
    s.refuse("add_cross_attention")
    positions, head_dim = s.integer("n_positions"), hidden // heads
    scale = head_dim**-0.5 if s.flag("scale_attn_weights", True) else 1.0
    by_layer = s.flag("scale_attn_by_inverse_layer_idx", False)
    return Architecture(
        hidden=hidden, layers=layers, heads=heads, kv_heads=heads, head_dim=head_dim,
        intermediate=s.integer("n_inner", 4 * hidden), vocabulary=s.integer("vocab_size"), max_positions=positions,
        eps=s.number("layer_norm_epsilon", 1e-5), activation=s.activation("activation_function", "gelu_new"),
        tied=s.flag("tie_word_embeddings", True), scales=tuple(scale / (i + 1 if by_layer else 1) for i in range(layers)),
        windows=(0,) * layers, norm="layer", qkv="fused", gated=False, position_rows=positions,
        biased=frozenset(("qkv", "attention", "up", "down")))


GPT2 = register_decoder(
    DecoderFamily(
        name="GPT-2",
        model_types=("gpt2",),
        read=_read,
        prefixes=("transformer.", ""),
        embeddings=dict(word="wte.weight", position="wpe.weight"),
        layer="h.{}.",
        block=dict(
            attention_norm="ln_1",
            qkv="attn.c_attn",
            attention="attn.c_proj",
            mlp_norm="ln_2",
            up="mlp.c_fc",
            down="mlp.c_proj",
        ),
        outer=dict(final_norm="ln_f"),
        conv1d=True,
    )
)
