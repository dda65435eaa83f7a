"""OPT (Zhang et al., arXiv 2205.01068): learned positions that start at row 2, ReLU, LayerNorm before or after each half.

OPT-350M is the odd one: it normalises after, and its word table is narrower than the model, with projections between.
"""
from __future__ import annotations

from .decoder_family import Architecture, DecoderFamily, Settings, register_decoder

_OFFSET = 2


def _read(s: Settings) -> Architecture:
    hidden, layers, heads = s.integer("hidden_size"), s.integer("num_hidden_layers"), s.integer("num_attention_heads")
    if hidden % heads:
        raise ValueError(f"config.json: {hidden} hidden units do not divide into {heads} heads")
    s.refuse("layer_norm_elementwise_affine", True)
    before, positions = s.flag("do_layer_norm_before", True), s.integer("max_position_embeddings", 2048)
    roles = ("query", "key", "value", "attention", "up", "down")
    return Architecture(
        hidden=hidden, layers=layers, heads=heads, kv_heads=heads, head_dim=hidden // heads, intermediate=s.integer("ffn_dim"),
        vocabulary=s.integer("vocab_size"), max_positions=positions, eps=1e-5,
        activation=s.activation("activation_function", "relu"), tied=s.flag("tie_word_embeddings", True),
        scales=((hidden // heads)**-0.5,) * layers, windows=(0,) * layers, norm="layer", order="pre" if before else "post",
        gated=False, biased=frozenset(roles if s.flag("enable_bias", True) else ()), position_rows=positions + _OFFSET,
        position_offset=_OFFSET, embedding=s.integer("word_embed_proj_dim", hidden),
        final_norm=before and not s.flag("_remove_final_layer_norm", False))


OPT = register_decoder(
    DecoderFamily(
        name="OPT",
        model_types=("opt",),
        read=_read,
        prefixes=("model.decoder.", "decoder.", ""),
        embeddings=dict(word="embed_tokens.weight", position="embed_positions.weight"),
        layer="layers.{}.",
        block=dict(
            attention_norm="self_attn_layer_norm",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            attention="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            up="fc1",
            down="fc2",
        ),
        outer=dict(final_norm="final_layer_norm", project_in="project_in", project_out="project_out"),
    )
)
