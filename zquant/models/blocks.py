"""The pieces of an encoder on packed tokens: sequences end to end in one (tokens, d) matrix, no padding computed."""
from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .. import _core
from ..formats.safetensors import Stored
from ..linear import ACTIVATIONS, QUANT, Codes, Linear
from ..qtensor import QTensor
from .sequence import Calls, Register

__all__ = ["CHUNK", "Block", "BoundLinear", "Embeddings", "Packed", "Table", "last_value", "pack", "rows"]

Result = TypeVar("Result")

# Tokens per micro-batch and thread: most activations of one block then stay in the second-level caches. Whole sequences only.
CHUNK = 256
INT8_ROWS = 48  # tokens from which on attention gains by 8-bit codes: measured on 12 heads of 32 and of 64

Tap = Callable[[str, np.ndarray, np.ndarray], None]
# An embedding table: float32 or float16, possibly mapped; bfloat16 as stored; or quantized rows.
Table = np.ndarray | Stored | QTensor


def rows(table: Table, index: np.ndarray) -> np.ndarray:
    """Rows of an embedding table as a new float32 array of shape (len(index), d); only those rows are read.

    >>> rows(np.arange(6, dtype=np.float16).reshape(3, 2), np.array([2, 0])).tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    """
    if isinstance(table, QTensor):
        return table.rows(index)
    if isinstance(table, Stored):
        return Stored(table.array.take(index, axis=0), table.dtype).float32()
    return table.take(index, axis=0).astype(np.float32, copy=False)


@dataclass(frozen=True, eq=False)
class Packed:
    """Tokens of a batch, end to end; made by :func:`pack`.

    Attributes
    ----------
    ids : (n,) int64, or None when embeddings were given
    positions : (n,) int64
    types : (n,) int64 token types, or None for all zeros
    embedded : (n, d) float32, the embedding layer's output, or None
    offsets : (B + 1,) int64; sequence s is tokens offsets[s] to offsets[s + 1] - 1
    slots : (n,) int64 index of each token in the flattened (B, T) batch, or None when every slot holds a token
    shape : (B, T)
    """

    ids: np.ndarray | None
    positions: np.ndarray
    types: np.ndarray | None
    embedded: np.ndarray | None
    offsets: np.ndarray
    slots: np.ndarray | None
    shape: tuple[int, int]

    def chunks(self, limit: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of sequences of at most ``limit`` tokens together (or one longer sequence), covering the batch; default
        ``CHUNK`` for each thread."""
        limit = CHUNK * _core.threads() if limit is None else limit
        start, offsets = 0, self.offsets
        while start < len(offsets) - 1:
            stop = int(np.searchsorted(offsets, offsets[start] + limit, side="right")) - 1
            stop = max(stop, start + 1)
            yield start, stop
            start = stop

    def scatter(self, hidden: np.ndarray) -> np.ndarray:
        """(n, d) of the tokens as (B, T, d), zeros where there is no token."""
        if self.slots is None:
            return hidden.reshape(*self.shape, hidden.shape[1])
        out = np.zeros((self.shape[0] * self.shape[1], hidden.shape[1]), np.float32)
        out[self.slots] = hidden
        return out.reshape(*self.shape, hidden.shape[1])


def _integers(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind in "bi" or not array.size or (array.dtype.kind == "u" and array.max() < 2**63):
        return array.astype(np.int64, copy=False)
    # uint64 would wrap around, and Python's large integers become float64 or objects: name the number that was given.
    for number in np.asarray(value, object).flat:
        if isinstance(number, (int, np.integer)) and not -2**63 <= number < 2**63:
            raise ValueError(f"{name}: {number} is out of range; expected integers of at most 64 bits, with sign")
    raise ValueError(f"{name}: expected integers, got {array.dtype}")


def _flatten(name: str, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """A (B, T) array or a list of sequences as one flat int64 array and the lengths (B,)."""
    if not isinstance(value, np.ndarray):
        parts = [_integers(f"{name}[{i}]", row) for i, row in enumerate(value)]
        for i, part in enumerate(parts):
            if part.ndim != 1:
                raise ValueError(f"{name}[{i}]: expected a sequence of token ids, got shape {part.shape}")
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.concatenate(parts) if parts else np.empty(0, np.int64), lengths
    if value.ndim != 2:
        raise ValueError(f"{name}: expected shape (B, T), got {value.shape}")
    return _integers(name, value).ravel(), np.full(value.shape[0], value.shape[1], np.int64)


def _same_layout(name: str, value: Any, lengths: np.ndarray) -> np.ndarray:
    flat, got = _flatten(name, value)
    if not np.array_equal(got, lengths):
        raise ValueError(f"{name}: expected the shape of the input, lengths {_brief(lengths)}; got {_brief(got)}")
    return flat


def _brief(lengths: np.ndarray) -> str:
    return str(lengths.tolist()) if len(lengths) <= 8 else f"{lengths[:8].tolist()[:-1]}... ({len(lengths)})"


def _starts(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _embedded(value: Any) -> tuple[np.ndarray, np.ndarray]:
    array = np.asarray(value)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(f"embeddings: expected floats of shape (B, T, d), got {array.dtype} of shape {array.shape}")
    flat = np.ascontiguousarray(array.reshape(-1, array.shape[2]), np.float32)
    return flat, np.full(array.shape[0], array.shape[1], np.int64)


def pack(input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, *, positions: Callable, pad: int,
         embeddings: Any = None) -> Packed:
    """Lay the tokens whose mask is 1 end to end; each keeps the position that it had in the padded batch.

    Parameters
    ----------
    input_ids : (B, T) integers, or a list of B sequences of any lengths
    attention_mask, token_type_ids : laid out as ``input_ids``; default ones and zeros
    positions, pad : the family's numbering, see ``Family.positions``
    embeddings : (B, T, d) floats in place of ``input_ids``
    """
    if (input_ids is None) == (embeddings is None):
        raise ValueError("give input_ids or embeddings, one of them")
    ids = embedded = types = None
    if embeddings is None:
        ids, lengths = _flatten("input_ids", input_ids)
    else:
        embedded, lengths = _embedded(embeddings)
    offsets = _starts(lengths)
    starts = np.repeat(offsets[:-1], lengths)
    columns = np.arange(offsets[-1]) - starts
    where = positions(ids, columns, starts, pad)
    if token_type_ids is not None:
        types = _same_layout("token_type_ids", token_type_ids, lengths)
    given = input_ids if embeddings is None else np.asarray(embeddings)
    width = given.shape[1] if isinstance(given, np.ndarray) else int(lengths.max(initial=0))
    slots = None if len(columns) == width * len(lengths) else np.repeat(np.arange(len(lengths)) * width, lengths) + columns
    packed = Packed(ids, where, types, embedded, offsets, slots, (len(lengths), width))
    return packed if attention_mask is None else _masked(packed, _same_layout("attention_mask", attention_mask, lengths))


def _masked(packed: Packed, mask: np.ndarray) -> Packed:
    if mask.size and (mask.min() < 0 or mask.max() > 1):
        raise ValueError(f"attention_mask: expected zeros and ones, got values from {mask.min()} to {mask.max()}")
    if mask.all():
        return packed
    keep = np.flatnonzero(mask)

    def take(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[keep]

    kept = np.concatenate([[0], np.cumsum(mask)])
    slots = keep if packed.slots is None else packed.slots[keep]
    return Packed(take(packed.ids), packed.positions[keep], take(packed.types), take(packed.embedded),
                  kept[packed.offsets], slots, packed.shape)


class Embeddings:
    """layer_norm(word + type + position), gathered row by row."""

    def __init__(self, names: Mapping[str, str], tables: Mapping[str, Table], norm: tuple[np.ndarray, np.ndarray],
                 eps: float) -> None:
        self.names = dict(names)
        self.word, self.position = tables["word"], tables["position"]
        self.type = tables.get("type")
        self.norm, self.eps = norm, eps
        self.first_type = None if self.type is None else rows(self.type, np.zeros(1, np.int64))

    def check(self, packed: Packed) -> None:
        """ValueError on ids, token types or positions outside their tables."""
        assert packed.ids is not None
        self._range("input_ids", packed.ids, self.word)
        self._range("position", packed.positions, self.position)
        if packed.types is not None:
            if self.type is None:
                if packed.types.any():
                    raise ValueError("token_type_ids: this model has no token types; expected zeros")
            else:
                self._range("token_type_ids", packed.types, self.type)

    def _range(self, name: str, index: np.ndarray, table: Table) -> None:
        count = table.shape[0]
        if len(index) == 0 or (0 <= index.min() and index.max() < count):
            return
        if name == "position":
            raise ValueError(f"a sequence needs position {index.max()}; the model has {count} positions")
        bad = index.min() if index.min() < 0 else index.max()
        raise ValueError(f"{name}: {bad} is outside 0..{count - 1}")

    def __call__(self, packed: Packed, start: int, stop: int, quant: int) -> tuple[np.ndarray, Codes | None]:
        """Tokens start..stop-1 as float32 (stop - start, d) and, with quant, as token codes."""
        assert packed.ids is not None
        x = rows(self.word, packed.ids[start:stop])
        if self.type is not None:
            x += self.first_type if packed.types is None else rows(self.type, packed.types[start:stop])
        try:
            return _core.layer_norm(x, rows(self.position, packed.positions[start:stop]), *self.norm, self.eps, quant)
        except ValueError as error:
            bad = packed.ids[start:stop][~np.isfinite(x).all(1)]
            where = f"{self.names['word']}, row {bad[0]}: NaN or Inf" if len(bad) else f"embeddings: {error}"
            raise ValueError(where) from None


_ACTIVATION_NAMES, _QUANT_NAMES = list(ACTIVATIONS), list(QUANT)


def last_value(steps: Generator[Any, None, Result]) -> Result:
    """What a generator returns, whatever it yields before."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class BoundLinear(NamedTuple):
    """A linear layer for a block to call, with numbers in place of the names of activations and forms.

    Attributes
    ----------
    run : f(x, activation, residual, quantize); it holds no more of the layer than it needs, so that the concatenated copy of a
        fused layer can go
    mode : which codes the layer takes for x; 0 for float32
    direct : packed weights and mode of ``_core.linear_forward``, where ``run`` is only that
    """

    run: Callable
    mode: int
    direct: tuple[Any, int] | None

    @staticmethod
    def of(linear: Linear) -> BoundLinear:
        """One layer."""
        handle, mode, forward, quant_in = linear._packed(), QUANT[linear.quant], _core.linear_forward, linear._quant_in

        def direct(x: Any, act: int = 0, residual: np.ndarray | None = None, quant: int = 0) -> Any:
            return forward(handle, x, quant_in, act, residual, quant)

        def by_names(x: Any, act: int = 0, residual: np.ndarray | None = None, quant: int = 0) -> Any:
            return linear(x, _ACTIVATION_NAMES[act], residual, _QUANT_NAMES[quant])

        if linear.activations is None or linear._integer:
            return BoundLinear(direct, mode, (handle, quant_in))
        return BoundLinear(by_names, mode, None)

    @staticmethod
    def joined(layers: Sequence[Linear]) -> BoundLinear:
        """Layers that read the same rows, outputs side by side: one product unless an override gave them different formats.
        They let go of their packed weights."""
        try:
            bound = BoundLinear.of(Linear.fuse(layers) if len(layers) > 1 else layers[0])
        except ValueError:
            if len(layers) == 1:
                raise
            parts = [BoundLinear.of(layer) for layer in layers]
            modes = {part.mode for part in parts}
            bound = BoundLinear(lambda x, *_: np.concatenate([part.run(x) for part in parts], axis=1),
                                modes.pop() if len(modes) == 1 else 0, None)
        for layer in layers:
            layer.release()
        return bound

    def __call__(self, *args: Any) -> np.ndarray:
        """``run``."""
        return self.run(*args)

    def add(self, calls: Calls, x: Register, act: int = 0, residual: Register | None = None, quant: int = 0) -> Register:
        """A call of ``run``, past the interpreter where ``direct`` says how."""
        if self.direct is None:
            return calls.add(self.run, x, act, residual, quant)
        handle, quant_in = self.direct
        return calls.add(_core.linear_forward, handle, x, quant_in, act, residual, quant)


class Block:
    """One encoder block, post-norm (BERT): seven kernel calls, activations handed on as codes between integer layers.

    Parameters
    ----------
    names : role -> module name, for taps and errors
    linears : role -> Linear; roles query, key, value, attention, intermediate, output
    norms : role -> (gamma, beta); roles attention_norm, output_norm
    int8_attention : see :class:`zquant.Scheme`
    """

    def __init__(self, names: Mapping[str, str], linears: Mapping[str, Linear],
                 norms: Mapping[str, tuple[np.ndarray, np.ndarray]], heads: int, activation: str, eps: float,
                 int8_attention: bool = False) -> None:
        self.names, self.int8_rows = dict(names), INT8_ROWS if int8_attention else 0
        self.heads, self.eps, self.activation = heads, eps, ACTIVATIONS[activation]
        self.scale = 1.0 / np.sqrt(linears["query"].out_features / heads).item()
        self.attention_norm, self.output_norm = norms["attention_norm"], norms["output_norm"]
        self.qkv = BoundLinear.joined([linears[role] for role in ("query", "key", "value")])
        self.quant_in = self.qkv.mode
        self.attention, self.intermediate, self.output = (
            BoundLinear.of(linears[role]) for role in ("attention", "intermediate", "output"))

    def add(self, calls: Calls, x: Register, given: Register, offsets: Register, quant_out: int) -> tuple[Register, Register]:
        """Calls from x (tokens, d) and what a layer is given for it (codes, or x itself) to the same of the block's output;
        quant_out as in ``_core.layer_norm``."""
        calls.part = self.names["block"]
        context = calls.add(_core.attention_fused, self.qkv.add(calls, given), offsets, self.heads, self.scale, None,
                            self.attention.mode, self.int8_rows)
        y = self.attention.add(calls, context, 0, x)
        y, given = self._add_norm(calls, y, self.attention_norm, self.intermediate.mode)
        wide = self.intermediate.add(calls, given, self.activation, None, self.output.mode)
        y = self.output.add(calls, wide, 0, y)
        return self._add_norm(calls, y, self.output_norm, quant_out)

    def _add_norm(self, calls: Calls, x: Register, norm: tuple[np.ndarray, np.ndarray],
                  quant: int) -> tuple[Register, Register]:
        """Calls that normalise x: the float32 rows, and what a layer is given for them."""
        if not quant:
            y = calls.add(_core.layer_norm, x, None, *norm, self.eps, 0, item=0)
            return y, y
        both = calls.add(_core.layer_norm, x, None, *norm, self.eps, quant)
        return calls.add(getitem, both, 0), calls.add(getitem, both, 1)

    def tapped(self, x: np.ndarray, codes: Codes | None, offsets: np.ndarray, quant_out: int,
               tap: Tap) -> tuple[np.ndarray, Codes | None]:
        """x (tokens, d) and its codes (or None) to the same of the block's output, the numbers that :meth:`add` gives, with
        ``tap(name, input, output)`` for every linear layer (output before the activation and without the residual): what is
        fused away is computed a second time for the tap."""
        norm, names = _core.layer_norm, self.names
        qkv = self.qkv(x if codes is None else codes)
        for role, part in zip(("query", "key", "value"), np.split(qkv, 3, axis=1)):
            tap(names[role], x, part)
        context = _core.attention_fused(qkv, offsets, self.heads, self.scale, None, 0, self.int8_rows)
        tap(names["attention"], context, self.attention(context))
        y, _ = norm(self.attention(context, 0, x), None, *self.attention_norm, self.eps, 0)
        tap(names["intermediate"], y, self.intermediate(y))
        wide = self.intermediate(y, self.activation)
        tap(names["output"], wide, self.output(wide))
        return norm(self.output(wide, 0, y), None, *self.output_norm, self.eps, quant_out)

    def steps(self, x: np.ndarray, offsets: np.ndarray) -> Generator[np.ndarray, None, np.ndarray]:
        """The same numbers, stopping before each product to yield its float32 input: that of query, key and
        value, of attention, of intermediate, of output. Returns the block's output; whoever stops earlier computes less."""
        norm = _core.layer_norm
        yield x
        context = _core.attention_fused(self.qkv(x), offsets, self.heads, self.scale, None, 0, self.int8_rows)
        yield context
        y, _ = norm(self.attention(context, 0, x), None, *self.attention_norm, self.eps, 0)
        yield y
        wide = self.intermediate(y, self.activation)
        yield wide
        return norm(self.output(wide, 0, y), None, *self.output_norm, self.eps, 0)[0]
