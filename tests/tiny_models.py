"""Small random checkpoints of every family, with their names spelled out (not taken from zquant's tables)."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

HIDDEN, LAYERS, HEADS, WIDE, VOCAB, POSITIONS, LABELS = 48, 2, 3, 80, 61, 24, 3
BLOCKS = {
    "bert": ("encoder.layer.{}.", ["attention.self.query", "attention.self.key", "attention.self.value",
                                   "attention.output.dense"], "attention.output.LayerNorm", "intermediate.dense",
             "output.dense", "output.LayerNorm"),
    "distilbert": ("transformer.layer.{}.", ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"],
                   "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
}
BLOCKS["roberta"] = BLOCKS["xlm-roberta"] = BLOCKS["bert"]
CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
PREFIX = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "distilbert": "distilbert."}
FAMILIES = list(BLOCKS)


def config_of(kind: str, head: bool = False, act: str = "gelu") -> dict:
    common = dict(model_type=kind, vocab_size=VOCAB, max_position_embeddings=POSITIONS,
                  architectures=[CLASSES[kind] + ("ForSequenceClassification" if head else "Model")])
    if head:
        common["id2label"] = {str(i): f"LABEL_{i}" for i in range(LABELS)}
    if kind == "distilbert":
        return dict(common, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=WIDE, activation=act, pad_token_id=0)
    return dict(common, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=WIDE,
                hidden_act=act, layer_norm_eps=1e-5 if "roberta" in kind else 1e-12,
                type_vocab_size=1 if "roberta" in kind else 2, pad_token_id=1 if "roberta" in kind else 0)


def tensors_of(kind: str, head: bool = False, prefix: bool | None = None, pooler: bool = True, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    p = PREFIX[kind] if (head if prefix is None else prefix) else ""
    out: dict[str, np.ndarray] = {}

    def linear(name: str, n: int, k: int) -> None:
        out[name + ".weight"] = rng.normal(0, 1.2 / np.sqrt(k), (n, k)).astype(np.float32)
        out[name + ".bias"] = rng.normal(0, 0.2, n).astype(np.float32)

    def norm(name: str) -> None:
        out[name + ".weight"] = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        out[name + ".bias"] = rng.normal(0, 0.2, HIDDEN).astype(np.float32)

    def table(name: str, n: int) -> None:
        out[name] = rng.normal(0, 1, (n, HIDDEN)).astype(np.float32)

    table(p + "embeddings.word_embeddings.weight", VOCAB)
    table(p + "embeddings.position_embeddings.weight", POSITIONS)
    if kind != "distilbert":
        table(p + "embeddings.token_type_embeddings.weight", 1 if "roberta" in kind else 2)
    norm(p + "embeddings.LayerNorm")
    layer, attention, norm1, up, down, norm2 = BLOCKS[kind]
    for i in range(LAYERS):
        for name in attention:
            linear(p + layer.format(i) + name, HIDDEN, HIDDEN)
        linear(p + layer.format(i) + up, WIDE, HIDDEN)
        linear(p + layer.format(i) + down, HIDDEN, WIDE)
        norm(p + layer.format(i) + norm1)
        norm(p + layer.format(i) + norm2)
    if kind == "bert" and pooler or kind in ("roberta", "xlm-roberta") and pooler and not head:
        linear(p + "pooler.dense", HIDDEN, HIDDEN)
    if head:
        dense = {"bert": None, "distilbert": "pre_classifier"}.get(kind, "classifier.dense")
        if dense:
            linear(dense, HIDDEN, HIDDEN)
        linear("classifier.out_proj" if "roberta" in kind else "classifier", LABELS, HIDDEN)
    return out


def write(directory: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """A Hugging Face directory, written with the safetensors library's own writer."""
    save_file = pytest.importorskip("safetensors.numpy").save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, directory / file)
        weight_map.update(dict.fromkeys(names[i::shards], file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def batch(kind: str, rows: int = 5, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (B, T) and masks with padding at the end; the first row has no padding, one row has a single token."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[13, 1], rng.integers(2, 13, rows - 2)])
    pad = 1 if "roberta" in kind else 0
    mask = (np.arange(13) < lengths[:, None]).astype(np.int64)
    return np.where(mask, rng.integers(4, VOCAB, mask.shape), pad), mask
