"""What distinguishes one model family from another: names in the checkpoint, keys in config.json, position numbering."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

__all__ = ["FAMILIES", "Dims", "Family", "Head", "column_positions", "counted_positions", "register"]

FAMILIES: dict[str, Family] = {}
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def register(family: Family) -> Family:
    """Make ``load`` find the family by each of its ``model_type`` names."""
    FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def column_positions(ids, columns, starts, pad):
    """BERT: the position of a token is its column, padding or not."""
    return columns


def counted_positions(ids, columns, starts, pad):
    """RoBERTa: pad + the number of tokens up to here that are not padding; padding itself has position ``pad``.

    Parameters
    ----------
    ids : (n,) int64, the sequences end to end, padding included; None numbers every token
    columns : (n,) int64
    starts : (n,) int64, per token the index at which its sequence starts
    pad : int, the padding token's id
    """
    if ids is None:
        return columns + (pad + 1)
    present = ids != pad
    count = np.concatenate([[0], np.cumsum(present)])
    return (count[1:] - count[starts]) * present + pad


@dataclass(frozen=True)
class Head:
    """Sequence classification: ``out(activation(dense(first token)))``."""

    dense: str
    activation: str
    out: str
    dense_in_base: bool = False
    """The dense layer's name takes the family's prefix (BERT: it is the pooler)."""


@dataclass(frozen=True)
class Dims:
    """The sizes of one model, read from config.json by :meth:`Family.dims`."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    max_positions: int
    types: int
    pad: int
    eps: float
    activation: str
    labels: int


@dataclass(frozen=True)
class Family:
    """One family of encoders; adding a family is one file that registers one of these.

    Attributes
    ----------
    prefix : what the checkpoint of a model with a head puts before the encoder's names
    config : role -> key in config.json
    defaults : role -> value where config.json has no such key
    embeddings, block : role -> name (``block`` inside ``layer``)
    positions : see :func:`counted_positions`
    unused : globs of tensors that other heads leave in a checkpoint and an encoder does not use
    """

    name: str
    model_types: tuple[str, ...]
    prefix: str
    config: Mapping[str, str]
    defaults: Mapping[str, Any]
    embeddings: Mapping[str, str]
    layer: str
    block: Mapping[str, str]
    pooler: str | None
    head: Head
    positions: Callable
    default_pad: int = 0
    unused: tuple[str, ...] = field(
        default=("*embeddings.position_ids", "*embeddings.token_type_ids", "cls.*", "lm_head.*", "vocab_*"), repr=False)

    def dims(self, config: Mapping[str, Any]) -> Dims:
        """Sizes from a config.json; ValueError names a key that is missing, of a wrong type or not supported."""
        values = {role: self._read(config, role, key) for role, key in self.config.items()}
        values = {**self.defaults, **values}
        activation = values["activation"]
        if activation not in ACTIVATION_NAMES:
            raise ValueError(f"config.json: {self.config['activation']} is {activation!r}; "
                             f"known: {', '.join(ACTIVATION_NAMES)}")
        if values["hidden"] % values["heads"]:
            raise ValueError(f"config.json: {values['hidden']} hidden units do not divide into {values['heads']} heads")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"config.json: position_embedding_type {config['position_embedding_type']!r} is not supported; "
                             "expected 'absolute'")
        if config.get("is_decoder"):
            raise ValueError(f"config.json: is_decoder is set; {self.name} is supported as an encoder")
        pad = config.get("pad_token_id")
        labels = len(config.get("id2label") or ()) or config.get("num_labels", 2)
        values.update(activation=ACTIVATION_NAMES[activation], pad=self.default_pad if pad is None else pad, labels=labels)
        return Dims(**values)

    def _read(self, config, role, key):
        if key not in config:
            if role in self.defaults:
                return self.defaults[role]
            raise ValueError(f"config.json: {key} is missing")
        value = config[key]
        if role == "activation":
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (role != "eps" and not isinstance(value, int)):
            raise ValueError(f"config.json: {key} is {value!r}; expected a number")
        if value < 0 or (value == 0 and role not in ("layers", "types")):
            raise ValueError(f"config.json: {key} is {value!r}; expected a positive number")
        return value

    def linears(self, dims: Dims, prefix: str, head: bool, pooler: bool) -> dict[str, tuple[int, int]]:
        """Module names of the linear layers, in the order of the forward, with (out, in)."""
        d, wide = dims.hidden, dims.intermediate
        sizes = dict(query=(d, d), key=(d, d), value=(d, d), attention=(d, d), intermediate=(wide, d), output=(d, wide))
        found = {prefix + self.layer.format(i) + self.block[role]: size
                 for i in range(dims.layers) for role, size in sizes.items()}
        if head:
            found[(prefix if self.head.dense_in_base else "") + self.head.dense] = (d, d)
            found[self.head.out] = (dims.labels, d)
        elif pooler and self.pooler:
            found[prefix + self.pooler] = (d, d)
        return found

    def tables(self, dims: Dims, prefix: str) -> dict[str, tuple[int, int]]:
        """Tensor names of the embedding tables with their shapes."""
        rows = dict(word=dims.vocabulary, position=dims.max_positions, type=dims.types)
        return {prefix + self.embeddings[role]: (n, dims.hidden) for role, n in rows.items() if role in self.embeddings}

    def norms(self, dims: Dims, prefix: str, embeddings: bool) -> dict[str, tuple[int]]:
        """Tensor names of the layer norms with their shapes."""
        modules = [prefix + self.embeddings["norm"]] if embeddings else []
        modules += [prefix + self.layer.format(i) + self.block[role]
                    for i in range(dims.layers) for role in ("attention_norm", "output_norm")]
        return {f"{module}.{part}": (dims.hidden,) for module in modules for part in ("weight", "bias")}

    def is_unused(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self.unused)
