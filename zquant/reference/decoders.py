"""The decoders in plain NumPy, one sequence at a time with the whole (T, T) matrix of scores: the oracle for zquant.models.

Slow and independent of it: tensors come by their Hugging Face names, configurations as they are in config.json, everything
is computed in ``dtype`` (float64 by default), and there is no cache.
"""
from __future__ import annotations

import math

import numpy as np

from .models import _ACTIVATIONS, _Tensors

__all__ = ["inverse_frequencies", "logits", "rotate"]


class _Weights(_Tensors):
    """Linear layers with or without a bias, RMSNorm."""

    def has(self, name):
        return name in self.tensors or self.prefix + name in self.tensors

    def linear(self, name, x):
        y = x @ self[name + ".weight"].T
        return y + self[name + ".bias"] if self.has(name + ".bias") else y

    def conv1d(self, name, x):
        """GPT-2 stores (in, out)."""
        return x @ self[name + ".weight"] + self[name + ".bias"]

    def rms(self, name, x, eps):
        """x / sqrt(mean x^2 + eps) * weight over the last axis."""
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * self[name + ".weight"]


def attend(q, k, v, heads, scale, window=0):
    """Causal softmax(scale q k^T) v of (T, heads * d) and (T, kv_heads * d); query p sees keys j with p - window < j <= p."""
    time, d = len(q), q.shape[1] // heads
    q, k, v = (x.reshape(time, -1, d).transpose(1, 0, 2) for x in (q, k, v))
    k, v = (np.repeat(x, heads // len(x), axis=0) for x in (k, v))
    behind = np.arange(time)[:, None] - np.arange(time)
    visible = (behind >= 0) & ((behind < window) if window else True)
    scores = np.where(visible, q @ k.transpose(0, 2, 1) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(time, heads * d)


# ---- rotary positions ------------------------------------------------------------------------------------------------
def inverse_frequencies(config, dim, length, theta):
    """(frequencies (dim / 2,), factor of cos and sin) of a sequence of ``length`` tokens."""
    s = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind, factor = s.get("rope_type", s.get("type", "default")), s.get("factor")
    positions = config["max_position_embeddings"]
    original = s.get("original_max_position_embeddings", positions)
    if kind == "dynamic" and length > positions:
        theta = theta * (factor * length / positions - (factor - 1)) ** (dim / (dim - 2))
    f = np.array([1 / theta ** (i / dim) for i in range(0, dim, 2)])
    if kind == "linear":
        return f / factor, 1.0
    if kind == "llama3":
        return np.array([_llama3(x, s, original) for x in f]), 1.0
    if kind == "yarn":
        return _yarn(f, s, dim, theta, original)
    return f, 1.0


def _llama3(f, s, original):
    wavelength = 2 * math.pi / f
    if wavelength < original / s["high_freq_factor"]:
        return f
    if wavelength > original / s["low_freq_factor"]:
        return f / s["factor"]
    smooth = (original / wavelength - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    return (1 - smooth) * f / s["factor"] + smooth * f


def _yarn(f, s, dim, theta, original):
    def pair(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(s.get("beta_fast", 32)), pair(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    keep = 1 - np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    factor = s.get("attention_factor")
    if factor is None:
        def mscale(weight):
            return 0.1 * weight * math.log(s["factor"]) + 1 if s["factor"] > 1 else 1.0

        both = s.get("mscale") and s.get("mscale_all_dim")
        factor = mscale(s["mscale"]) / mscale(s["mscale_all_dim"]) if both else mscale(1)
    return f * keep + f / s["factor"] * (1 - keep), factor


def rotate(x, frequencies, factor=1.0, first=0):
    """Rotary embedding of (T, heads, d) at positions first, first + 1, ...: feature i with feature i + r / 2 of the first r."""
    half = len(frequencies)
    angles = (first + np.arange(len(x)))[:, None, None] * frequencies
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    a, b = x[..., :half], x[..., half:2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half:]], axis=-1)


# ---- families --------------------------------------------------------------------------------------------------------
def _gpt2(t, config, ids):
    eps, heads = config["layer_norm_epsilon"], config["n_head"]
    x = t["wte.weight"][ids] + t["wpe.weight"][:len(ids)]
    for i in range(config["n_layer"]):
        p = f"h.{i}."
        scale = (config["n_embd"] // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0
        scale /= i + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1
        q, k, v = np.split(t.conv1d(p + "attn.c_attn", t.norm(p + "ln_1", x, eps)), 3, axis=1)
        x = x + t.conv1d(p + "attn.c_proj", attend(q, k, v, heads, scale))
        inner = _ACTIVATIONS[config["activation_function"]](t.conv1d(p + "mlp.c_fc", t.norm(p + "ln_2", x, eps)))
        x = x + t.conv1d(p + "mlp.c_proj", inner)
    return t.norm("ln_f", x, eps), "wte.weight"


def _opt(t, config, ids):
    eps, heads, before = 1e-5, config["num_attention_heads"], config.get("do_layer_norm_before", True)
    x = t["embed_tokens.weight"][ids]
    x = t.linear("project_in", x) if t.has("project_in.weight") else x
    x = x + t["embed_positions.weight"][2:2 + len(ids)]
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        y = t.norm(p + "self_attn_layer_norm", x, eps) if before else x
        q, k, v = (t.linear(f"{p}self_attn.{name}_proj", y) for name in "qkv")
        x = x + t.linear(p + "self_attn.out_proj", attend(q, k, v, heads, (config["hidden_size"] // heads) ** -0.5))
        x = x if before else t.norm(p + "self_attn_layer_norm", x, eps)
        y = t.norm(p + "final_layer_norm", x, eps) if before else x
        x = x + t.linear(p + "fc2", _ACTIVATIONS[config["activation_function"]](t.linear(p + "fc1", y)))
        x = x if before else t.norm(p + "final_layer_norm", x, eps)
    x = t.norm("final_layer_norm", x, eps) if before else x
    return (t.linear("project_out", x) if t.has("project_out.weight") else x), "embed_tokens.weight"


def _gpt_neox(t, config, ids):
    eps, heads, d = config["layer_norm_eps"], config["num_attention_heads"], config["hidden_size"]
    s = config.get("rope_parameters") or {}
    dim = int(d // heads * s.get("partial_rotary_factor", config.get("rotary_pct", 0.25)))
    theta = s.get("rope_theta", config.get("rotary_emb_base", 10000))
    f, factor = inverse_frequencies(config, dim, len(ids), theta)
    x = t["embed_in.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        qkv = t.linear(p + "attention.query_key_value", t.norm(p + "input_layernorm", x, eps)).reshape(len(ids), heads, 3, -1)
        q, k = (rotate(qkv[:, :, j], f, factor).reshape(len(ids), d) for j in (0, 1))
        y = t.linear(p + "attention.dense", attend(q, k, qkv[:, :, 2].reshape(len(ids), d), heads, (d // heads) ** -0.5))
        z = t.norm(p + "post_attention_layernorm", x if config.get("use_parallel_residual", True) else x + y, eps)
        wide = _ACTIVATIONS[config["hidden_act"]](t.linear(p + "mlp.dense_h_to_4h", z))
        x = x + y + t.linear(p + "mlp.dense_4h_to_h", wide)
    return t.norm("final_layer_norm", x, eps), "embed_in.weight"


def _llama(t, config, ids):
    eps, heads, time = config["rms_norm_eps"], config["num_attention_heads"], len(ids)
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10000.0))
    f, factor = inverse_frequencies(config, dim, time, theta)
    x = t["embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        y = t.rms(p + "input_layernorm", x, eps)
        q, k, v = (t.linear(f"{p}self_attn.{name}_proj", y) for name in "qkv")
        q, k = q.reshape(time, heads, dim), k.reshape(time, kv_heads, dim)
        if config["model_type"] == "qwen3":
            q, k = t.rms(p + "self_attn.q_norm", q, eps), t.rms(p + "self_attn.k_norm", k, eps)
        q, k = (rotate(h, f, factor).reshape(time, -1) for h in (q, k))
        x = x + t.linear(p + "self_attn.o_proj", attend(q, k, v, heads, dim**-0.5, _window(config, i)))
        y = t.rms(p + "post_attention_layernorm", x, eps)
        gate = _ACTIVATIONS[config.get("hidden_act", "silu")](t.linear(p + "mlp.gate_proj", y))
        x = x + t.linear(p + "mlp.down_proj", gate * t.linear(p + "mlp.up_proj", y))
    return t.rms("norm", x, eps), "embed_tokens.weight"


def _window(config, layer):
    """Keys that a query of that layer sees at most; 0 for all."""
    kind, window = config["model_type"], config.get("sliding_window") or 0
    if kind == "llama" or (kind != "mistral" and not config.get("use_sliding_window")):
        return 0
    if config.get("layer_types"):
        return window if config["layer_types"][layer] == "sliding_attention" else 0
    return window if layer >= (0 if kind == "mistral" else config.get("max_window_layers", 28)) else 0


_FAMILIES = {"gpt2": (_gpt2, "transformer."), "opt": (_opt, "model.decoder."), "gpt_neox": (_gpt_neox, "gpt_neox."),
             **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), (_llama, "model."))}


def logits(tensors, config, ids, dtype=np.float64):
    """Logits (T, V) of one sequence.

    Parameters
    ----------
    tensors : mapping of str to ndarray, by checkpoint name, with or without the family's prefix
    config : dict, as in config.json
    ids : (T,) integers
    """
    forward, prefix = _FAMILIES[config["model_type"]]
    t = _Weights(tensors, prefix, dtype)
    hidden, table = forward(t, config, np.asarray(ids))
    head = {"gpt_neox": "embed_out.weight"}.get(config["model_type"], "lm_head.weight")
    tied = config.get("tie_word_embeddings", config["model_type"] in ("gpt2", "opt"))
    return hidden @ t[table if tied else head].T
