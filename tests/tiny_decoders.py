"""Small random decoders of every family, with their names spelled out (not taken from zquant's tables)."""
from __future__ import annotations

import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDE, VOCAB, POSITIONS = 48, 3, 4, 2, 12, 80, 61, 40
FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"]
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
# name -> (family, changes to config.json)
VARIANTS: dict[str, tuple[str, dict]] = {
    **{family: (family, {}) for family in FAMILIES},
    "gpt2, untied": ("gpt2", dict(tie_word_embeddings=False)),
    "gpt2, scale by layer": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, n_inner=64, activation_function="relu")),
    "gpt2, no scale": ("gpt2", dict(scale_attn_weights=False)),
    "opt, norm after, projections": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=24)),
    "opt, no bias": ("opt", dict(enable_bias=False, word_embed_proj_dim=32)),
    "gpt_neox, sequential": ("gpt_neox", dict(use_parallel_residual=False, rotary_pct=1.0)),
    "gpt_neox, no attention bias": ("gpt_neox", dict(attention_bias=False, rotary_pct=0.5)),
    "llama, all heads": ("llama", dict(num_key_value_heads=None, tie_word_embeddings=True)),
    "llama, one kv head": ("llama", dict(num_key_value_heads=1)),
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True, head_dim=16)),
    "llama, linear": ("llama", dict(rope_scaling=dict(type="linear", factor=2.5))),
    "llama, dynamic": ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=3.0), max_position_embeddings=16)),
    "llama, llama3": ("llama", dict(rope_scaling=LLAMA3, rope_theta=500.0)),
    "llama, llama3, new keys": ("llama", dict(rope_parameters=dict(LLAMA3, rope_theta=500.0))),
    "llama, yarn": ("llama", dict(rope_scaling=YARN)),
    "llama, yarn, own factor": ("llama", dict(rope_parameters=dict(YARN, attention_factor=1.3, rope_theta=100.0, beta_fast=8,
                                                                   beta_slow=2))),
    "llama, yarn, mscale": ("llama", dict(rope_scaling=dict(YARN, mscale=0.7, mscale_all_dim=0.4, truncate=False))),
    "mistral, no window": ("mistral", dict(sliding_window=None)),
    "qwen2, window": ("qwen2", dict(use_sliding_window=True, max_window_layers=1)),
    "qwen3, layer types": ("qwen3", dict(use_sliding_window=True, layer_types=["sliding_attention", "full_attention",
                                                                               "sliding_attention"])),
    "qwen3, bias, tied": ("qwen3", dict(attention_bias=True, tie_word_embeddings=True)),
}


def config_of(variant: str, **changes) -> dict:
    kind, own = VARIANTS[variant]
    common = dict(model_type=kind, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
    if kind == "gpt2":
        config = dict(common, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, layer_norm_epsilon=1e-5,
                      activation_function="gelu_new", tie_word_embeddings=True)
    else:
        config = dict(common, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                      max_position_embeddings=POSITIONS, tie_word_embeddings=kind == "opt")
    if kind == "opt":
        config.update(ffn_dim=WIDE, word_embed_proj_dim=HIDDEN, do_layer_norm_before=True, activation_function="relu",
                      pad_token_id=1)
    elif kind == "gpt_neox":
        config.update(intermediate_size=WIDE, layer_norm_eps=1e-5, hidden_act="gelu", rotary_pct=0.34, rotary_emb_base=1000)
    elif kind != "gpt2":
        config.update(intermediate_size=WIDE, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-6, hidden_act="silu",
                      head_dim=HEAD_DIM, rope_theta=1000.0, sliding_window=7)
    return {**config, **own, **changes}


def tensors_of(config: dict, prefix: bool = True, seed: int = 0) -> dict:
    """Tensors by their names in a checkpoint of ...ForCausalLM."""
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    c = {"hidden_size": HIDDEN, **config}
    kind = c["model_type"]
    p = {"gpt2": "transformer.", "opt": "model.decoder.", "gpt_neox": "gpt_neox."}.get(kind, "model.") if prefix else ""

    def linear(name: str, n: int, k: int, bias: bool) -> None:
        weight = rng.normal(0, 1.2 / np.sqrt(k), (n, k)).astype(np.float32)
        out[name + ".weight"] = np.ascontiguousarray(weight.T) if kind == "gpt2" and name != "lm_head" else weight
        if bias:
            out[name + ".bias"] = rng.normal(0, 0.2, n).astype(np.float32)

    def norm(name: str, n: int = HIDDEN) -> None:
        out[name + ".weight"] = rng.uniform(0.5, 1.5, n).astype(np.float32)
        if kind in ("gpt2", "opt", "gpt_neox"):
            out[name + ".bias"] = rng.normal(0, 0.2, n).astype(np.float32)

    def table(name: str, n: int, width: int = HIDDEN) -> None:
        out[name + ".weight"] = rng.normal(0, 1, (n, width)).astype(np.float32)

    width = c.get("word_embed_proj_dim", HIDDEN)
    if kind == "gpt2":
        table(p + "wte", VOCAB)
        table(p + "wpe", POSITIONS)
        for i in range(LAYERS):
            layer, wide = f"{p}h.{i}.", c.get("n_inner") or 4 * HIDDEN
            norm(layer + "ln_1")
            linear(layer + "attn.c_attn", 3 * HIDDEN, HIDDEN, True)
            linear(layer + "attn.c_proj", HIDDEN, HIDDEN, True)
            norm(layer + "ln_2")
            linear(layer + "mlp.c_fc", wide, HIDDEN, True)
            linear(layer + "mlp.c_proj", HIDDEN, wide, True)
        norm(p + "ln_f")
    elif kind == "opt":
        bias = c.get("enable_bias", True)
        table(p + "embed_tokens", VOCAB, width)
        table(p + "embed_positions", POSITIONS + 2)
        if width != HIDDEN:
            linear(p + "project_in", HIDDEN, width, False)
            linear(p + "project_out", width, HIDDEN, False)
        for i in range(LAYERS):
            layer = f"{p}layers.{i}."
            norm(layer + "self_attn_layer_norm")
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{layer}self_attn.{name}", HIDDEN, HIDDEN, bias)
            norm(layer + "final_layer_norm")
            linear(layer + "fc1", WIDE, HIDDEN, bias)
            linear(layer + "fc2", HIDDEN, WIDE, bias)
        if c["do_layer_norm_before"]:
            norm(p + "final_layer_norm")
    elif kind == "gpt_neox":
        bias = c.get("attention_bias", True)
        table(p + "embed_in", VOCAB)
        for i in range(LAYERS):
            layer = f"{p}layers.{i}."
            norm(layer + "input_layernorm")
            norm(layer + "post_attention_layernorm")
            linear(layer + "attention.query_key_value", 3 * HIDDEN, HIDDEN, bias)
            linear(layer + "attention.dense", HIDDEN, HIDDEN, bias)
            linear(layer + "mlp.dense_h_to_4h", WIDE, HIDDEN, True)
            linear(layer + "mlp.dense_4h_to_h", HIDDEN, WIDE, True)
        norm(p + "final_layer_norm")
    else:
        dim, q_bias = c["head_dim"], c.get("attention_bias", False) or kind == "qwen2"
        q, kv = HEADS * dim, (c["num_key_value_heads"] or HEADS) * dim
        table(p + "embed_tokens", VOCAB)
        for i in range(LAYERS):
            layer = f"{p}layers.{i}."
            norm(layer + "input_layernorm")
            for name, n in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                linear(f"{layer}self_attn.{name}", n, HIDDEN, q_bias)
            linear(layer + "self_attn.o_proj", HIDDEN, q, c.get("attention_bias", False))
            if kind == "qwen3":
                norm(layer + "self_attn.q_norm", dim)
                norm(layer + "self_attn.k_norm", dim)
            norm(layer + "post_attention_layernorm")
            for name, n, k in (("gate_proj", WIDE, HIDDEN), ("up_proj", WIDE, HIDDEN), ("down_proj", HIDDEN, WIDE)):
                linear(f"{layer}mlp.{name}", n, k, c.get("mlp_bias", False))
        norm(p + "norm")
    if not c["tie_word_embeddings"]:
        linear("embed_out" if kind == "gpt_neox" else "lm_head", VOCAB, HIDDEN, False)
    return out


def prompts(lengths=(33, 1, 12, 20), seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, n).tolist() for n in lengths]
