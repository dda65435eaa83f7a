"""The pieces of a decoder on packed tokens. Between integer layers activations travel as token codes."""
from __future__ import annotations

from collections.abc import Generator, Sequence
from operator import getitem
from typing import Any

import numpy as np

from .. import _core
from ..formats.safetensors import Stored
from ..linear import ACTIVATIONS, Linear
from ..qtensor import QTensor
from ..spec import QuantSpec
from .blocks import BoundLinear, Table, Tap, last_value, rows
from .decoder_family import Architecture
from .sequence import Calls, Register

__all__ = ["DecoderBlock", "Head", "Norm", "Projection", "add_rows", "per_head_rows"]

HEAD_BYTES = 256 << 20  # a float head up to this size is held packed in float32; a larger one is unpacked block by block
HEAD_ROWS = 4096


class Projection:
    """One or several linear layers that read the same rows, outputs side by side: one product if they are alike.

    Attributes
    ----------
    mode : how to quantize what goes in, as in ``_core.layer_norm``; 0 for float32
    """

    def __init__(self, layers: Sequence[Linear], rows: np.ndarray | None = None) -> None:
        self.names = [layer.name for layer in layers]
        self.cuts = np.cumsum([layer.out_features for layer in layers])[:-1]
        self.order = None if rows is None else np.argsort(rows)  # back to the checkpoint's order, for taps
        self.bound = BoundLinear.joined(layers if rows is None else [layer.take(rows) for layer in layers])
        self.mode = self.bound.mode
        for layer in layers:  # those that others were taken from
            layer.release()

    def __call__(self, x: np.ndarray, tap: Tap | None = None, act: int = 0, residual: np.ndarray | None = None) -> np.ndarray:
        """act(x W^T + b) + residual; the tap sees what comes before the activation."""
        if tap is not None:
            self._show(tap, x, self.bound(x))
        return self.bound(x, act, residual)

    def add(self, calls: Calls, x: Register, act: int = 0, residual: Register | None = None, quant: int = 0) -> Register:
        """A call that does what __call__ does without a tap; x may also be codes, and with ``quant`` the result is."""
        return self.bound.add(calls, x, act, residual, quant)

    def _show(self, tap: Tap, x: np.ndarray, y: np.ndarray) -> None:
        y = y if self.order is None else y[:, self.order]
        for name, part in zip(self.names, np.split(y, self.cuts, axis=1)):
            tap(name, x, part)


class Norm:
    """LayerNorm, or RMSNorm where there is no bias."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The normalised rows."""
        if self.bias is None:
            return _core.rms_norm(x, None, self.weight, self.eps, 0)[0]
        return _core.layer_norm(x, None, self.weight, self.bias, self.eps, 0)[0]

    def add(self, calls: Calls, x: Register, quant: int) -> Register:
        """A call that gives what a projection reads: the codes if ``quant`` asks for them, else the float32 rows."""
        which = int(quant != 0)
        if self.bias is None:
            return calls.add(_core.rms_norm, x, None, self.weight, self.eps, quant, True, item=which)
        return calls.add(_core.layer_norm, x, None, self.weight, self.bias, self.eps, quant, True, item=which)


def add_rows(calls: Calls, table: Table, index: Register) -> Register:
    """Calls that do what :func:`rows` does, where that is possible without the interpreter."""
    if isinstance(table, Stored):
        return calls.add(rows, table, index)
    if isinstance(table, np.ndarray):
        return calls.add(np.asarray, calls.add(table.take, index, 0), np.float32)
    codes, scales = table.row_parts()
    return calls.add(_core.dequantize_rows, calls.add(codes.take, index, 0), calls.add(scales.take, index), None)


def per_head_rows(a: Architecture) -> np.ndarray:
    """Rows of a matrix that holds q, k, v of head 0, then of head 1..., in the order all q, all k, all v.

    >>> from types import SimpleNamespace
    >>> per_head_rows(SimpleNamespace(heads=2, head_dim=1)).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return np.arange(3 * a.heads * a.head_dim).reshape(a.heads, 3, a.head_dim).transpose(1, 0, 2).ravel()


class DecoderBlock:
    """Attention and feed-forward of one layer, in the order that the architecture says.

    Parameters
    ----------
    name : of the block, for errors
    linears, norms : by role
    index : of the layer
    """

    def __init__(self, name: str, a: Architecture, index: int, linears: dict[str, Linear], norms: dict[str, Norm]) -> None:
        self.name, self.a, self.index = name, a, index
        inputs = [linears[role] for role in (("query", "key", "value") if a.qkv == "split" else ("qkv",))]
        self.qkv = Projection(inputs, per_head_rows(a) if a.qkv == "heads" else None)
        self.attention, self.up, self.down = (Projection([linears[role]]) for role in ("attention", "up", "down"))
        self.gate = Projection([linears["gate"]]) if a.gated else None
        self.attention_norm, self.mlp_norm = norms["attention_norm"], norms["mlp_norm"]
        self.q_norm, self.k_norm = (norms[role].weight if a.qk_norm else None for role in ("q_norm", "k_norm"))
        same = self.gate is None or self.gate.mode == self.up.mode
        self.mlp_mode = self.up.mode if same else 0
        self.act = ACTIVATIONS[a.activation]

    def add(self, calls: Calls, x: Register, cache: Register, offsets: Register, rotation: tuple[Register, Register],
            wanted: Register | None = None) -> Register:
        """Calls that give what __call__ gives: of all tokens, or of the wanted rows alone. The other rows then get keys and
        values, which later tokens see, and nothing else."""
        a, i, post = self.a, self.index, self.a.order == "post"
        calls.part = self.name
        qkv = self.qkv.add(calls, x if post else self.attention_norm.add(calls, x, self.qkv.mode))
        context = calls.add(_core.kv_attend, cache, i, qkv, offsets, wanted, a.heads, *rotation, False, self.q_norm,
                            self.k_norm, a.eps, a.scales[i], a.windows[i], self.attention.mode)
        x = x if wanted is None else calls.add(getitem, x, wanted)
        y = self.attention.add(calls, context, 0, x)
        if post:
            y = inner = self.attention_norm.add(calls, y, 0)
        else:
            inner = self.mlp_norm.add(calls, y if a.order == "pre" else x, self.mlp_mode)
        if self.gate is None:
            wide = self.up.add(calls, inner, self.act, None, self.down.mode)
        else:
            wide = calls.add(_core.gated, self.gate.add(calls, inner), self.up.add(calls, inner), self.act, self.down.mode)
        out = self.down.add(calls, wide, 0, y)
        return self.mlp_norm.add(calls, out, 0) if post else out

    def __call__(self, x: np.ndarray, cache: Any, offsets: np.ndarray, rotation: tuple[Any, Any], tap: Tap) -> np.ndarray:
        """x (tokens, hidden) to the block's output; keys and values are appended to the cache. Taps want float32: the layers
        quantize for themselves, to the same codes."""
        return last_value(self._walk(x, cache, self.index, offsets, rotation, tap))

    def steps(self, x: np.ndarray, cache: Any, offsets: np.ndarray,
              rotation: tuple[Any, Any]) -> Generator[np.ndarray, None, np.ndarray]:
        """The same numbers as __call__'s, stopping before each product to yield its float32 input: that of query, key and
        value, of attention, of gate and up, of down. Returns the block's output; whoever stops earlier computes less.

        ``cache`` is one of a single layer, this one.
        """
        return self._walk(x, cache, 0, offsets, rotation, None)

    def _walk(self, x: np.ndarray, cache: Any, layer: int, offsets: np.ndarray, rotation: tuple[Any, Any],
              tap: Tap | None) -> Generator[np.ndarray, None, np.ndarray]:
        a, i, order = self.a, self.index, self.a.order
        inner = x if order == "post" else self.attention_norm(x)
        yield inner
        context = _core.kv_attend(cache, layer, self.qkv(inner, tap), offsets, None, a.heads, *rotation, False, self.q_norm,
                                  self.k_norm, a.eps, a.scales[i], a.windows[i], 0)
        yield context
        y = self.attention(context, tap, 0, x)
        if order == "post":
            y = inner = self.attention_norm(y)
        else:
            inner = self.mlp_norm(y if order == "pre" else x)
        yield inner
        if self.gate is None:
            wide = self.up(inner, tap, self.act)
        else:
            wide = _core.gated(self.gate(inner, tap), self.up(inner, tap), self.act, 0)
        yield wide
        out = self.down(wide, tap, 0, y)
        return self.mlp_norm(out) if order == "post" else out


class Head:
    """Logits: a product with the embedding table, or with a matrix of its own.

    A float table that would take more than ``HEAD_BYTES`` as float32 is converted ``HEAD_ROWS`` rows at a time in every
    call; the numbers are the same.
    """

    def __init__(self, name: str, weight: Table | Linear, activations: QuantSpec | None) -> None:
        if isinstance(weight, np.ndarray) and weight.dtype == np.float16:
            weight = Stored(weight, "F16")
        layer = weight if isinstance(weight, Linear) else Linear(
            name, weight, None, activations if isinstance(weight, QTensor) else None)
        self.layer, self.mode, self.product = layer, 0, None
        if layer.spec is not None or 4 * layer.shape[0] * layer.shape[1] <= HEAD_BYTES:
            self.product = Projection([layer])
            self.mode = self.product.mode

    def __call__(self, x: np.ndarray, tap: Tap | None = None) -> np.ndarray:
        """(m, k) rows to (m, vocabulary) float32; ValueError if a logit is not finite."""
        if self.product is not None:
            logits = self.product(x, tap)
        else:
            logits = self._streamed(x)
        try:
            _core.check_finite(logits, "logits")
        except ValueError as error:
            raise ValueError(f"{self.layer.name}: {error}") from None
        return logits

    def add(self, calls: Calls, x: Register) -> Register:
        """Calls that do what __call__ does without a tap; x is what a norm gives for ``mode``."""
        calls.part = self.layer.name
        logits = calls.add(self._streamed, x) if self.product is None else self.product.add(calls, x)
        return calls.add(_core.check_finite, logits, "logits")

    def _streamed(self, x: np.ndarray) -> np.ndarray:
        stored: Any = self.layer._weight
        logits = np.empty((len(x), self.layer.out_features), np.float32)
        for start in range(0, self.layer.out_features, HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            block = Stored(stored.array[part], stored.dtype) if isinstance(stored, Stored) else stored[part]
            logits[:, part] = Linear(self.layer.name, block)(x)
        self.layer.release()
        return logits
