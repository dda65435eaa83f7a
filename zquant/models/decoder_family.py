"""What distinguishes one family of decoders from another: names in the checkpoint, and sizes and switches in config.json."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .family import ACTIVATION_NAMES
from .rope import Rope

__all__ = ["DECODERS", "Architecture", "DecoderFamily", "Settings", "register_decoder"]

DECODERS: dict[str, DecoderFamily] = {}
_NO_DEFAULT: Any = object()


def register_decoder(family: DecoderFamily) -> DecoderFamily:
    """Make ``load`` find the family by each of its ``model_type`` names."""
    DECODERS.update(dict.fromkeys(family.model_types, family))
    return family


class Settings:
    """config.json, read with checks: every error names the key. null counts as absent where there is a default."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        if value is not None:
            return value
        if default is _NO_DEFAULT:
            raise ValueError(f"config.json: {key} is missing")
        return default

    def integer(self, key: str, default: Any = _NO_DEFAULT, least: int = 1) -> Any:
        """A whole number, at least ``least``."""
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"config.json: {key} is {value!r}; expected an integer, at least {least}")
        return value

    def number(self, key: str, default: Any = _NO_DEFAULT) -> float:
        """A positive number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"config.json: {key} is {value!r}; expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {key} is {value!r}; expected true or false")
        return value

    def activation(self, key: str, default: Any = _NO_DEFAULT) -> str:
        """An activation function, by zquant's name for it."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in ACTIVATION_NAMES:
            raise ValueError(f"config.json: {key} is {value!r}; known: {', '.join(ACTIVATION_NAMES)}")
        return ACTIVATION_NAMES[value]

    def refuse(self, key: str, expected: Any = False) -> None:
        """A switch that is not supported in another position."""
        if self.config.get(key, expected) != expected:
            raise ValueError(f"config.json: {key} is {self.config[key]!r}; only {expected!r} is supported")


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder.

    Attributes
    ----------
    embedding : width of the word table, where it differs from ``hidden`` there are projections
    norm : "rms" or "layer"
    order : "pre" (x + f(norm(x))), "post" (norm(x + f(x))) or "parallel" (x + attention(norm(x)) + mlp(norm'(x)))
    qkv : "split" (three layers), "fused" (one, q then k then v) or "heads" (one, q, k, v of head 0, then of head 1...)
    biased : roles of the linear layers with a bias
    scales : of the scores, per block
    windows : keys that a query sees at most, itself included, per block; 0 for all before it
    position_rows, position_offset : learned positions: rows of the table, and the row of position 0
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    max_positions: int
    eps: float
    activation: str
    tied: bool
    scales: tuple[float, ...]
    windows: tuple[int, ...]
    norm: str = "rms"
    order: str = "pre"
    qkv: str = "split"
    gated: bool = True
    biased: frozenset[str] = frozenset()
    qk_norm: bool = False
    rope: Rope | None = None
    position_rows: int = 0
    position_offset: int = 0
    embedding: int = 0
    final_norm: bool = True

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"config.json: {self.heads} heads do not divide into {self.kv_heads} key-value heads")
        if not self.embedding:
            object.__setattr__(self, "embedding", self.hidden)

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """role -> (out, in) of the linear layers of a block, in the order of the forward."""
        d, wide, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        inputs = dict(query=(q, d), key=(kv, d), value=(kv, d)) if self.qkv == "split" else dict(qkv=(q + 2 * kv, d))
        gate = dict(gate=(wide, d)) if self.gated else {}
        return {**inputs, "attention": (d, q), **gate, "up": (wide, d), "down": (d, wide)}


@dataclass(frozen=True)
class DecoderFamily:
    """One family of decoders; adding a family is one file that registers one of these.

    Attributes
    ----------
    read : config.json -> Architecture
    prefixes : what may stand before the names below, tried in order
    embeddings : "word" and, with learned positions, "position" -> tensor name
    layer, block : role -> module name (``block`` inside ``layer``)
    outer : "final_norm", "project_in", "project_out" -> module name
    head : module name of an untied head, without prefix
    conv1d : the blocks' weights are stored (in, out)
    unused : globs of tensors that are buffers of other implementations
    """

    name: str
    model_types: tuple[str, ...]
    read: Callable[[Settings], Architecture]
    prefixes: tuple[str, ...]
    embeddings: Mapping[str, str]
    layer: str
    block: Mapping[str, str]
    outer: Mapping[str, str]
    head: str = "lm_head"
    conv1d: bool = False
    unused: tuple[str, ...] = field(
        default=("*.attn.bias", "*.attn.masked_bias", "*.attention.bias", "*.attention.masked_bias", "*.inv_freq"), repr=False)

    def dims(self, config: Mapping[str, Any]) -> Architecture:
        """Sizes and switches; ValueError names a key that is missing, of a wrong type or not supported."""
        return self.read(Settings(config))

    def linears(self, a: Architecture, prefix: str) -> dict[str, tuple[int, int]]:
        """Module names of the linear layers, in the order of the forward, with (out, in)."""
        found = {prefix + self.layer.format(i) + self.block[role]: size
                 for i in range(a.layers) for role, size in a.block_linears().items()}
        if a.embedding != a.hidden:
            found = {prefix + self.outer["project_in"]: (a.hidden, a.embedding), **found,
                     prefix + self.outer["project_out"]: (a.embedding, a.hidden)}
        return found if a.tied else {**found, self.head: (a.vocabulary, a.embedding)}

    def transposed(self, a: Architecture, prefix: str) -> frozenset[str]:
        """Module names of the linear layers whose float weights are stored (in, out)."""
        layers = (prefix + self.layer.format(i) for i in range(a.layers if self.conv1d else 0))
        return frozenset(layer + self.block[role] for layer in layers for role in a.block_linears())

    def biases(self, a: Architecture, prefix: str) -> list[str]:
        """Module names of the linear layers with a bias."""
        return [prefix + self.layer.format(i) + self.block[role]
                for i in range(a.layers) for role in a.block_linears() if role in a.biased]

    def tables(self, a: Architecture, prefix: str) -> dict[str, tuple[int, int]]:
        """Tensor names of the embedding tables with their shapes."""
        tables = {prefix + self.embeddings["word"]: (a.vocabulary, a.embedding)}
        if a.position_rows:
            tables[prefix + self.embeddings["position"]] = (a.position_rows, a.hidden)
        return tables

    def norms(self, a: Architecture, prefix: str) -> dict[str, tuple[int]]:
        """Tensor names of the norms' weights with their shapes."""
        modules = [prefix + self.layer.format(i) + self.block[role]
                   for i in range(a.layers) for role in ("attention_norm", "mlp_norm")]
        if a.final_norm:
            modules.append(prefix + self.outer["final_norm"])
        parts = ("weight", "bias") if a.norm == "layer" else ("weight",)
        found = {f"{module}.{part}": (a.hidden,) for module in modules for part in parts}
        if a.qk_norm:
            found.update({f"{prefix}{self.layer.format(i)}{self.block[role]}.weight": (a.head_dim,)
                          for i in range(a.layers) for role in ("q_norm", "k_norm")})
        return found

    def is_unused(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self.unused)
