"""Number formats as data: QuantSpec says how one tensor is coded, Scheme what is done to a whole model."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from dataclasses import replace as _replace
from fnmatch import fnmatchcase
from typing import Any

from .checks import as_count

__all__ = ["QuantSpec", "Scheme", "DEFAULT_GROUP_SIZE"]

FORMATS = ("int",)
GRANULARITIES = ("tensor", "token", "channel", "group", "row_block")
DEFAULT_GROUP_SIZE = 64

# ZeroQuant (section 4.1 and its BERT configuration) leaves what comes after the encoder in floating point.
HEADS = ("*pooler*", "*classifier*", "*lm_head*", "*embed_out*", "*qa_outputs*", "cls.*", "*vocab_*", "*score")


class _Data:
    """Frozen dataclasses that print what differs from the defaults and travel as JSON-ready dicts."""

    def __repr__(self) -> str:
        every = fields(self)  # type: ignore[arg-type]
        shown = [f for f in every if f.default is MISSING or getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @classmethod
    def _checked_fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if not isinstance(data, Mapping):
            raise ValueError(f"{cls.__name__}: expected a mapping, got {type(data).__name__}")
        if unknown := sorted(set(data) - set(known)):
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; known: {known}")
        return dict(data)


@dataclass(frozen=True, repr=False)
class QuantSpec(_Data):
    """How one tensor is turned into integer codes: x_hat = (q - zero) * scale.

    Parameters
    ----------
    bits
        2 to 8.
    format
        "int".
    granularity
        What shares one scale: "tensor" (all of it; activations may be dynamic); "token" (a row of activations, dynamic);
        "channel" (a row of weights, or of an embedding table); "group" (``group_size`` consecutive inputs of a row);
        "row_block" (one of ``blocks`` blocks of whole consecutive rows: the grouping of ZeroQuant's own code).
    group_size, blocks
        For "group" and "row_block" only; at least 1.
    symmetric
        True: codes in +-(2^(bits-1)-1), no zero point. False: codes 0..2^bits-1 with a zero point.
    dynamic
        Scales are computed from the data at run time (activations).

    >>> QuantSpec(4, granularity="group", group_size=64)
    QuantSpec(bits=4, granularity='group', group_size=64)
    >>> print(_)
    int4, groups of 64
    """

    bits: int = 8
    format: str = "int"
    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    blocks: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", as_count("QuantSpec: bits", self.bits, 2, 8))
        if self.format not in FORMATS:
            raise ValueError(f"QuantSpec: unknown format {self.format!r}; known: {', '.join(FORMATS)}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"QuantSpec: unknown granularity {self.granularity!r}; known: {', '.join(GRANULARITIES)}")
        for name, owner in (("group_size", "group"), ("blocks", "row_block")):
            value = getattr(self, name)
            if self.granularity == owner:
                object.__setattr__(self, name, as_count(f"QuantSpec: {name}", value, 1))
            elif value is not None:
                raise ValueError(f"QuantSpec: {name}={value!r} needs granularity={owner!r}, not {self.granularity!r}")
        for name in ("symmetric", "dynamic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"QuantSpec: {name} must be True or False, got {getattr(self, name)!r}")
        if self.granularity != "tensor" and self.dynamic != (self.granularity == "token"):
            raise ValueError("QuantSpec: granularity 'token' is dynamic, 'tensor' may be, and no other is; "
                             f"got {self.granularity!r} with dynamic={self.dynamic}")
        if not self.symmetric and self.granularity == "row_block":
            raise ValueError("QuantSpec: granularity 'row_block' is symmetric only")

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def __str__(self) -> str:
        sharing = {"tensor": "per tensor" if self.dynamic else "one scale", "token": "per token", "channel": "per channel",
                   "group": f"groups of {self.group_size}", "row_block": f"{self.blocks} row blocks"}[self.granularity]
        return f"{'' if self.symmetric else 'u'}{self.format}{self.bits}, {sharing}"

    def replace(self, **changes: Any) -> QuantSpec:
        """A copy with some fields changed.

        >>> QuantSpec().replace(bits=4)
        QuantSpec(bits=4)
        """
        return _replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The inverse of :meth:`to_dict`; ValueError on unknown fields or values.

        >>> QuantSpec.from_dict({"bits": 8, "group_sizes": 3})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: QuantSpec: unknown fields ['group_sizes']; known: ['bits', 'format', ...]
        """
        return cls(**cls._checked_fields(data))


INT8_ROWS = QuantSpec()
TOKEN_ASYMMETRIC = QuantSpec(8, granularity="token", symmetric=False, dynamic=True)
TOKEN_SYMMETRIC = QuantSpec(8, granularity="token", dynamic=True)
# Suffix of a scheme's name -> how its activations share scales.
SHARING = {"token": {"granularity": "token", "dynamic": True}, "tensor": {"granularity": "tensor", "dynamic": True},
           "static": {"granularity": "tensor"}}


def _weights(bits: int) -> QuantSpec:
    """The usual weight format for a number of bits: per channel at 8, in groups below."""
    bits = as_count("QuantSpec: bits", bits, 2, 8)
    return INT8_ROWS if bits == 8 else QuantSpec(bits, granularity="group", group_size=DEFAULT_GROUP_SIZE)


def _as_spec(value: object, what: str) -> QuantSpec | None:
    """None, "float", a QuantSpec, a dict of one, a number of bits, or "int<bits>"."""
    if value is None or value == "float":
        return None
    if isinstance(value, QuantSpec):
        return value
    if isinstance(value, Mapping):
        return QuantSpec.from_dict(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _weights(value)
    if isinstance(value, str) and re.fullmatch(r"int\d+", value):
        return _weights(int(value[3:]))
    raise ValueError(f"Scheme: {what}: expected 'float', a number of bits, 'int8' or a QuantSpec; got {value!r}")


def _rows(value: object, what: str) -> QuantSpec | None:
    spec = _as_spec(value, what)
    if spec is not None and not (spec.granularity == "channel" and spec.symmetric and spec.bits == 8):
        raise ValueError(f"Scheme: {what}: int8 per row or 'float', not {spec}")
    return spec


@dataclass(frozen=True, repr=False)
class Scheme(_Data):
    """What is quantized in a model, and how. Usually made by name: :meth:`parse`.

    Parameters
    ----------
    name
        Any text; what reports print.
    weights
        Format of the linear layers' weights; None leaves them float.
    activations
        Format of what goes into the quantized linear layers: 8 bits, per token or per tensor; None (weight-only) keeps
        float32, which symmetric weights multiply at int16 precision (see :class:`zquant.linear.Linear`). Per tensor and
        dynamic, one scale comes from all tokens of a call, so that a result depends on what else is in the batch; static,
        it is known from calibration.
    embeddings
        Format of the word-embedding table: int8 per row, or None for float.
    overrides
        Pairs of a glob on layer names and a weight format or None (float). The last one that matches a name wins.
    skip
        Globs of layers that stay float unless an override says otherwise: pooler and heads, as in ZeroQuant.
    int8_attention
        Encoders: the two products of attention run on 8-bit codes too (:func:`zquant.ops.attention` with ``int8``), in
        sequences of 48 tokens or more: shorter ones gain nothing by it.
    activation_overrides
        Pairs of a glob on layer names and a format of activations or None. The last one that matches a name wins.

    >>> Scheme.parse("w4/8a8-g128").weights_for("encoder.layer.0.output.dense")
    QuantSpec(bits=4, granularity='group', group_size=128)
    """

    name: str
    weights: QuantSpec | None = None
    activations: QuantSpec | None = None
    embeddings: QuantSpec | None = None
    overrides: tuple[tuple[str, QuantSpec | None], ...] = ()
    skip: tuple[str, ...] = HEADS
    int8_attention: bool = False
    activation_overrides: tuple[tuple[str, QuantSpec | None], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Scheme: name must be a non-empty string, got {self.name!r}")
        change = object.__setattr__
        change(self, "weights", _weight_format(self.weights, "weights"))
        change(self, "activations", _activation_format(self.activations, "activations"))
        change(self, "embeddings", _rows(self.embeddings, "embeddings"))
        change(self, "overrides", _pairs(self.overrides, "override", _weight_format))
        change(self, "activation_overrides", _pairs(self.activation_overrides, "activation override", _activation_format))
        change(self, "skip", tuple(_glob(g) for g in self.skip))
        if not isinstance(self.int8_attention, bool):
            raise ValueError(f"Scheme: int8_attention must be True or False, got {self.int8_attention!r}")

    @classmethod
    def parse(cls, scheme: str | Scheme) -> Scheme:
        """A scheme by name; a Scheme is returned as it is.

        ``w<bits>a8``, ``w<bits>a16`` (weights only) or ``w<bits>/<bits>a8`` (feed-forward / attention: ZeroQuant's
        mixed precision), then any of ``-sym`` (symmetric int8 activations; else asymmetric uint8), ``-tensor`` or ``-static``
        (activations with one scale per tensor, dynamic or from calibration; else per token), ``-g<size>`` (weights in groups
        along the input), ``-row`` (one scale per row, which is an output channel), ``-b<blocks>`` (blocks of whole rows),
        ``-wt`` (weights with one scale per tensor), ``+e32`` (float word embeddings; else int8 per row, as in ZeroQuant;
        ``+e8`` says so explicitly), ``+attn8`` (encoders: int8 attention). 8-bit weights have one scale per channel, fewer bits
        one per 64 inputs unless a suffix says otherwise; in mixed schemes the suffix is for the feed-forward layers.

        >>> Scheme.parse("w8a8-sym").activations
        QuantSpec(granularity='token', dynamic=True)
        >>> Scheme.parse("w4a16-row").weights
        QuantSpec(bits=4)
        >>> Scheme.parse("w8b8")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: unknown scheme 'w8b8'; known: w8a8, w4a8, w4/8a8, w8a16, w4a16 (2 to 8 weight bits), with suffixes ...
        """
        if isinstance(scheme, Scheme):
            return scheme
        match = re.fullmatch(r"w(\d+)(?:/(\d+))?a(8|16)((?:-sym|-tensor|-static|-wt|-row|-g\d+|-b\d+)*)(?:\+e(8|32))?"
                             r"(\+attn8)?", scheme) if isinstance(scheme, str) else None
        if match is None:
            raise ValueError(f"unknown scheme {scheme!r}; known: w8a8, w4a8, w4/8a8, w8a16, w4a16 (2 to 8 weight bits), "
                             "with suffixes -sym, -tensor, -static, -row, -g<group size>, -b<row blocks>, -wt, +e8, +e32, "
                             "+attn8")
        bits, attention, act_bits, suffixes, embeddings, attn8 = match.groups()
        weights, symmetric, sharing = _weights(int(bits)), False, "token"
        found = suffixes.split("-")[1:]
        _no_contradiction(scheme, found)
        for suffix in found:
            if suffix == "sym":
                symmetric = True
            elif suffix in SHARING:
                sharing = suffix
            elif suffix == "wt":
                weights = QuantSpec(weights.bits, granularity="tensor")
            elif suffix == "row":
                weights = QuantSpec(weights.bits)
            elif suffix[0] == "g":
                weights = QuantSpec(weights.bits, granularity="group", group_size=int(suffix[1:]))
            else:
                weights = QuantSpec(weights.bits, granularity="row_block", blocks=int(suffix[1:]))
        named = [suffix for suffix in found if suffix == "sym" or suffix in SHARING]
        if act_bits == "16" and named:
            raise ValueError(f"scheme {scheme!r}: activations of 16 bits have no scale that -{named[0]} could be about")
        activations = None
        if act_bits == "8":
            activations = QuantSpec(8, symmetric=symmetric, **SHARING[sharing])  # type: ignore[arg-type]
        mixed = [("*attention*", _weights(int(attention))), ("*attn*", _weights(int(attention)))] if attention else []
        return cls(scheme, weights, activations, None if embeddings == "32" else INT8_ROWS, tuple(mixed),
                   int8_attention=bool(attn8))

    def weights_for(self, name: str) -> QuantSpec | None:
        """The weight format of the linear layer of that name; None is float.

        >>> Scheme.parse("w8a8").weights_for("pooler.dense") is None
        True
        """
        for glob, spec in reversed(self.overrides):
            if fnmatchcase(name, glob):
                return spec
        return None if any(fnmatchcase(name, glob) for glob in self.skip) else self.weights

    def activations_for(self, name: str) -> QuantSpec | None:
        """The format of what goes into the linear layer of that name; None is float32.

        >>> static = QuantSpec(8, granularity="tensor")
        >>> scheme = Scheme.parse("w8a8").replace(activation_overrides={"*.query": static})
        >>> scheme.activations_for("encoder.layer.0.attention.self.query") == static
        True
        """
        for glob, spec in reversed(self.activation_overrides):
            if fnmatchcase(name, glob):
                return spec
        return self.activations

    def with_overrides(self, overrides: Mapping[str, QuantSpec | int | str | None]) -> Scheme:
        """A copy with overrides appended: glob -> "float" (or None), a number of bits, or a QuantSpec.

        >>> Scheme.parse("w8a8").with_overrides({"encoder.layer.0.*": "float", "*.output.dense": 4}).overrides
        (('encoder.layer.0.*', None), ('*.output.dense', QuantSpec(bits=4, granularity='group', group_size=64)))
        """
        return self.replace(overrides=self.overrides + tuple(overrides.items()))

    def replace(self, **changes: Any) -> Scheme:
        """A copy with some fields changed; ``embeddings`` also takes "int8" and "float".

        >>> Scheme.parse("w8a8").replace(embeddings="float") == Scheme.parse("w8a8+e32").replace(name="w8a8")
        True
        """
        return _replace(self, **changes)

    def __str__(self) -> str:
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        def plain(spec: QuantSpec | None) -> dict[str, Any] | None:
            return spec if spec is None else spec.to_dict()

        return {"name": self.name, "weights": plain(self.weights), "activations": plain(self.activations),
                "embeddings": plain(self.embeddings), "overrides": [[g, plain(s)] for g, s in self.overrides],
                "skip": list(self.skip), "int8_attention": self.int8_attention,
                "activation_overrides": [[g, plain(s)] for g, s in self.activation_overrides]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """The inverse of :meth:`to_dict`; ValueError on unknown fields or values."""
        return cls(**cls._checked_fields(data))


def _no_contradiction(scheme: str, suffixes: list[str]) -> None:
    """ValueError where suffixes of a scheme's name say one thing twice, be it the same or not."""
    sharing = [suffix for suffix in suffixes if suffix in SHARING]
    weights = [suffix for suffix in suffixes if suffix != "sym" and suffix not in SHARING]
    for what, named in (("weight groupings", weights), ("ways to share the activations' scales", sharing)):
        if len(named) > 1:
            raise ValueError(f"scheme {scheme!r} names two {what}: {', '.join('-' + suffix for suffix in named)}; expected one")
    if suffixes.count("sym") > 1:
        raise ValueError(f"scheme {scheme!r} says -sym twice; expected it once")


def _glob(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"Scheme: a layer pattern must be a non-empty string, got {value!r}")
    return value


def _pairs(value: Any, what: str, read: Callable[[object, str], QuantSpec | None]) -> tuple[tuple[str, QuantSpec | None], ...]:
    """(glob, format) pairs of a mapping or a sequence."""
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple((_glob(g), read(s, f"{what} {g!r}")) for g, s in pairs)


def _weight_format(value: object, what: str) -> QuantSpec | None:
    spec = _as_spec(value, what)
    if spec is not None and (spec.dynamic or (spec.granularity == "tensor" and not spec.symmetric)):
        raise ValueError(f"Scheme: {what}: weights are not dynamic, and with one scale per tensor symmetric; got {spec!r}")
    return spec


def _activation_format(value: object, what: str) -> QuantSpec | None:
    spec = _as_spec(value, what)
    if spec is not None and not (spec.granularity in ("token", "tensor") and spec.bits == 8):
        raise ValueError(f"Scheme: {what}: 8 bits per token or per tensor, or None; not {spec}")
    return spec
