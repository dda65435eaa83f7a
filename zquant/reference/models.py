"""The encoders in plain NumPy, padded and with an additive mask, as their papers describe them: the oracle for zquant.models.

Slow and independent of it: tensors come by their Hugging Face names, every sequence is computed to its full width, and
everything is in ``dtype`` (float64 by default).
"""
from __future__ import annotations

import math

import numpy as np

__all__ = ["classify", "encode"]

_BERT = ("encoder.layer.{}.", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
_DISTILBERT = ("transformer.layer.{}.", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
               "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
_erf = np.frompyfunc(math.erf, 1, 1)

_ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2)).astype(x.dtype)),
    "gelu_new": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


class _Tensors:
    """Tensors in one dtype by their names without the family's prefix."""

    def __init__(self, tensors, prefix, dtype):
        self.tensors, self.prefix, self.dtype = tensors, prefix, dtype

    def __getitem__(self, name):
        name = name if name in self.tensors else self.prefix + name
        return np.asarray(self.tensors[name]).astype(self.dtype)

    def linear(self, name, x):
        return x @ self[name + ".weight"].T + self[name + ".bias"]

    def norm(self, name, x, eps):
        """(x - mean) / sqrt(var + eps) * gamma + beta over the last axis."""
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return x * self[name + ".weight"] + self[name + ".bias"]


def _attend(q, k, v, heads, visible):
    """softmax(q k^T / sqrt(d)) v per head on (B, T, heads * d); visible (B, T) says which keys exist."""
    batch, time, width = q.shape

    def split(x):
        return x.reshape(batch, time, heads, width // heads).transpose(0, 2, 1, 3)

    scores = split(q) @ split(k).swapaxes(-1, -2) / math.sqrt(width // heads)
    scores = np.where(visible[:, None, None, :], scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    return (scores @ split(v)).transpose(0, 2, 1, 3).reshape(batch, time, width)


def _embed(t, config, ids, types, eps):
    x = t["embeddings.word_embeddings.weight"][ids]
    if config["model_type"] in ("roberta", "xlm-roberta"):
        pad = config.get("pad_token_id", 1)
        present = (ids != pad).astype(int)
        positions = np.cumsum(present, 1) * present + pad
    else:
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    if config["model_type"] != "distilbert":
        x = x + t["embeddings.token_type_embeddings.weight"][types]
    return t.norm("embeddings.LayerNorm", x + t["embeddings.position_embeddings.weight"][positions], eps)


def encode(tensors, config, input_ids=None, attention_mask=None, token_type_ids=None, dtype=np.float64, embeddings=None):
    """Last hidden states (B, T, d) of a BERT, RoBERTa or DistilBERT checkpoint; masked positions are zeros.

    Parameters
    ----------
    tensors : mapping of str to ndarray, by checkpoint name, with or without the family's prefix
    config : dict, as in config.json
    input_ids, attention_mask, token_type_ids : (B, T) integers; the mask defaults to ones, the types to zeros
    embeddings : (B, T, d), the embedding layer's output, instead of ids
    """
    distil = config["model_type"] == "distilbert"
    prefix = "distilbert." if distil else "roberta." if "roberta" in config["model_type"] else "bert."
    layer, query, key, value, attention, attention_norm, up, down, output_norm = _DISTILBERT if distil else _BERT
    heads, layers = (config["n_heads"], config["n_layers"]) if distil else (
        config["num_attention_heads"], config["num_hidden_layers"])
    eps = 1e-12 if distil else config["layer_norm_eps"]
    act = _ACTIVATIONS[config["activation" if distil else "hidden_act"]]
    t = _Tensors(tensors, prefix, dtype)
    if embeddings is None:
        ids = np.asarray(input_ids)
        types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
        x = _embed(t, config, ids, types, eps)
    else:
        x = np.asarray(embeddings, dtype)
    visible = np.ones(x.shape[:2], bool) if attention_mask is None else np.asarray(attention_mask) != 0
    for i in range(layers):
        p = layer.format(i)
        q, k, v = (t.linear(p + name, x) for name in (query, key, value))
        x = t.norm(p + attention_norm, x + t.linear(p + attention, _attend(q, k, v, heads, visible)), eps)
        x = t.norm(p + output_norm, x + t.linear(p + down, act(t.linear(p + up, x))), eps)
    return x * visible[..., None]


def classify(tensors, config, *args, dtype=np.float64, **kwargs):
    """Logits (B, labels) of a sequence classification checkpoint; arguments as for :func:`encode`."""
    first = encode(tensors, config, *args, dtype=dtype, **kwargs)[:, 0]
    prefix = {"bert": "bert.", "distilbert": "distilbert."}.get(config["model_type"], "roberta.")
    t = _Tensors(tensors, prefix, dtype)
    if config["model_type"] == "bert":
        return t.linear("classifier", np.tanh(t.linear("pooler.dense", first)))
    if config["model_type"] == "distilbert":
        return t.linear("classifier", np.maximum(t.linear("pre_classifier", first), 0))
    return t.linear("classifier.out_proj", np.tanh(t.linear("classifier.dense", first)))
