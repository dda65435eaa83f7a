"""Which norm or linear layer can take over a scale of what the linear layers behind it read: one table for every family.

    y = x W^T + b = x' (W diag(s))^T + (b + W z),     x' = (x - z) / s

computes the same for any s > 0 and z. x' costs nothing where what produces x can be changed to produce x' instead:

    norm -> layers        gain / s, (bias - z) / s                      where nothing else reads the norm's output
    value -> attention    rows of value / s, (bias - z) / s             attention is linear in v and its weights sum to 1
    up -> down            rows of up / s                                behind a gate (act(g) * u), or a ReLU: relu(u) / s

Elsewhere an explicit (x - z) / s before the layers is needed: :class:`zquant.extras.Branch`.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..extras import Branch, Extras
from ..linear import Linear
from ..qtensor import QTensor
from .decoder_blocks import per_head_rows
from .decoder_family import Architecture

__all__ = ["STAGES", "Folding", "fold", "foldings"]

#: What the layers that read the same rows are called, in the order of the forward; "head" comes once, behind the blocks.
STAGES = ("qkv", "attention", "mlp", "down", "head")

_SHARED = "the residual connection reads the same rows"


@dataclass(frozen=True)
class Folding:
    """Layers that read the same rows, and what can absorb a scale of these rows.

    Attributes
    ----------
    stage : one of STAGES
    consumers : names of the linear layers that read the rows; statistics are found under each of them
    kind : "norm", "linear" or "none": nothing can, for the ``reason`` given
    source : module name of the norm or linear layer; "" for none
    rows : (k,) the source's output row that each of the k channels comes from; None where they are the same
    heads : query heads that share a source row (grouped-query attention): their scales must be equal, see :meth:`tied`
    shift : whether the source and the consumers have the biases that a shift needs
    """

    stage: str
    consumers: tuple[str, ...]
    kind: str
    source: str = ""
    rows: np.ndarray | None = field(default=None, compare=False, repr=False)
    heads: int = 1
    shift: bool = False
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether a scale can be absorbed."""
        return self.kind != "none"

    def tied(self, values: np.ndarray, reduce: Any = np.maximum) -> np.ndarray:
        """(k,) values, those of channels that come from the same source row made equal: their maximum, or what the ufunc
        ``reduce`` makes of them.

        >>> Folding("attention", ("o",), "linear", "v", rows=np.array([0, 1, 0, 1]), heads=2).tied(np.array([1., 2, 5, 0]))
        array([5., 2., 5., 2.])
        """
        if self.heads == 1:
            return values
        assert self.rows is not None
        first, index = np.unique(self.rows, return_inverse=True)
        order = np.argsort(index, kind="stable").reshape(len(first), self.heads)
        return reduce.reduce(values[order], axis=1)[index]


def foldings(model: Any) -> list[Folding]:
    """The foldings of a float model, in the order of the forward; those that nothing can absorb are among them.

    Of an encoder, the layers behind its blocks (pooler and head) are not; nor is a head that is the embedding table.

    Parameters
    ----------
    model
        A Model or a CausalLM.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> for f in foldings(zq.load(find_minilm()))[:4]: print(f.stage, f.kind, f.source or f.reason)
    qkv none the residual connection reads the same rows
    attention linear encoder.layer.0.attention.self.value
    mlp none the residual connection reads the same rows
    down none gelu lies between, and gelu(x / s) is not gelu(x) / s
    """
    blocks = (_in_block(model, model.prefix + model.family.layer.format(i)) for i in range(model.dims.layers))
    found = [folding for block in blocks for folding in block]
    return found + list(_behind_blocks(model)) if isinstance(model.dims, Architecture) else found


def _in_block(model: Any, prefix: str) -> Iterator[Folding]:
    a, names = model.dims, model.family.block
    up, down = ("up", "down") if isinstance(a, Architecture) else ("intermediate", "output")
    qkv = ("qkv",) if "qkv" in names else ("query", "key", "value")
    value, rows, heads = _value_rows(a)
    gated = isinstance(a, Architecture) and a.gated
    shared = "" if isinstance(a, Architecture) and a.order != "post" else _SHARED
    between = "" if gated or a.activation == "relu" else \
        f"{a.activation} lies between, and {a.activation}(x / s) is not {a.activation}(x) / s"

    def one(stage: str, readers: tuple[str, ...], kind: str, source: str, reason: str = "", **options: Any) -> Folding:
        consumers = tuple(prefix + names[role] for role in readers)
        return _folding(model, stage, consumers, kind, "" if reason else prefix + names[source], reason, **options)

    yield one("qkv", qkv, "norm", "attention_norm", shared)
    yield one("attention", ("attention",), "linear", value, rows=rows, heads=heads)
    yield one("mlp", ("gate", up) if gated else (up,), "norm", "mlp_norm", shared)
    yield one("down", (down,), "linear", up, between)


def _value_rows(a: Any) -> tuple[str, np.ndarray | None, int]:
    """The role of the layer that computes v, the row of it behind each channel of attention's output, and how often a
    row is used."""
    if not isinstance(a, Architecture) or (a.qkv == "split" and a.heads == a.kv_heads):
        return "value", None, 1
    width = a.heads * a.head_dim
    if a.qkv == "fused":
        return "qkv", np.arange(2 * width, 3 * width), 1
    if a.qkv == "heads":
        return "qkv", per_head_rows(a)[2 * width:], 1
    repeat = a.heads // a.kv_heads
    rows = np.arange(a.kv_heads * a.head_dim).reshape(a.kv_heads, 1, a.head_dim)
    return "value", np.repeat(rows, repeat, axis=1).ravel(), repeat


def _behind_blocks(model: Any) -> Iterator[Folding]:
    """What reads the last norm."""
    a, outer = model.dims, model.family.outer
    reader = model.prefix + outer["project_out"] if a.embedding != a.hidden else model.family.head
    if a.final_norm and reader in model.linears:
        yield _folding(model, "head", (reader,), "norm", model.prefix + outer["final_norm"])


def _folding(model: Any, stage: str, consumers: tuple[str, ...], kind: str, source: str, reason: str = "",
             **options: Any) -> Folding:
    shift = all(model.linears[name].bias is not None for name in consumers)
    if not reason:
        has_bias = model.linears[source].bias is not None if kind == "linear" else f"{source}.bias" in model.tensors
        shift = shift and has_bias and stage != "down"
    return Folding(stage, consumers, "none" if reason else kind, source, shift=shift, reason=reason, **options)


def fold(model: Any, folding: Folding, scale: np.ndarray, shift: np.ndarray | None = None, *, branch: bool = False) -> Any:
    """A model that computes the same, whose layers ``folding.consumers`` read (x - shift) / scale in place of x.

    Parameters
    ----------
    model
        A float Model or CausalLM. It is not changed; the new one shares what stays the same.
    folding
        One of :func:`foldings` of this model.
    scale
        (k,) positive.
    shift
        (k,), or None for 0.
    branch
        Where nothing absorbs them, let the layers themselves compute (x - shift) / scale at run time.

    Raises
    ------
    ValueError
        A scale or shift that the source cannot take, or of another shape; layers that are quantized already.
    """
    scale = _checked(model, folding, scale, shift, branch)
    if not folding.exact:
        scale = scale.astype(np.float32).astype(np.float64)  # as the branch holds it
        explicit = _branch(model.linears[folding.consumers[0]], scale, shift)
        return model.replace(linears={name: _reading(model.linears[name], scale, shift, explicit)
                                      for name in folding.consumers})
    linears = {name: _reading(model.linears[name], scale, shift) for name in folding.consumers}
    if folding.kind == "norm":
        return model.replace(linears=linears, norms=_scaled_norm(model, folding.source, scale, shift))
    source = linears.get(folding.source, model.linears[folding.source])
    return model.replace(linears={**linears, folding.source: _scaled_rows(source, folding, scale, shift)})


def _checked(model: Any, folding: Folding, scale: np.ndarray, shift: np.ndarray | None, branch: bool) -> np.ndarray:
    where = ", ".join(folding.consumers)
    if not folding.exact and not branch:
        raise ValueError(f"{where}: a scale of the input cannot be absorbed: {folding.reason}")
    if shift is not None and not folding.shift:
        raise ValueError(f"{where}: a shift of the input needs biases that these layers, or what is before them, do not have")
    k = model.linears[folding.consumers[0]].in_features
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None and (np.shape(value) != (k,) or not np.isfinite(value).all()):
            raise ValueError(f"{where}: {name} must be finite and of shape ({k},), got shape {np.shape(value)}")
    scale = np.asarray(scale, np.float64)
    if not (scale > 0).all():
        raise ValueError(f"{where}: scale must be positive; the least is {scale.min()}")
    return scale


def _changed(layer: Linear, weight: np.ndarray, bias: np.ndarray | None, extras: Extras) -> Linear:
    return Linear(layer.name, weight.astype(np.float32), None if bias is None else bias.astype(np.float32), extras=extras)


def _branch(layer: Linear, scale: np.ndarray, shift: np.ndarray | None) -> Branch:
    """What the layer does to its input once it reads (x' - shift) / scale, x' being what it reads now."""
    before = layer.extras.branch
    if before is None:
        return Branch(scale.astype(np.float32), None if shift is None else shift.astype(np.float32))
    minus = np.zeros(len(scale)) if before.shift is None else before.shift
    if shift is not None:
        minus = minus + before.scale * shift
    return Branch((before.scale * scale).astype(np.float32), minus.astype(np.float32))


def _dense(layer: Linear) -> np.ndarray:
    if isinstance(layer._weight, QTensor):
        raise ValueError(f"{layer.name}: is quantized already ({layer.spec}); change the float model instead")
    return layer.weight  # type: ignore[return-value]


def _reading(layer: Linear, scale: np.ndarray, shift: np.ndarray | None, branch: Branch | None = None) -> Linear:
    """The layer for inputs (x - shift) / scale: the bias takes the shift by the weights as they were."""
    weight = _dense(layer)
    bias = layer.bias if shift is None else layer.bias + weight.astype(np.float64) @ shift  # type: ignore[operator]
    extras = layer.extras if branch is None else replace(layer.extras, branch=branch)
    return _changed(layer, weight * scale, bias, extras)


def _scaled_norm(model: Any, module: str, scale: np.ndarray, shift: np.ndarray | None) -> dict[str, np.ndarray]:
    """The norm's tensors such that it gives (x - shift) / scale."""
    weight, bias = model.tensors[f"{module}.weight"], model.tensors.get(f"{module}.bias")
    found = {f"{module}.weight": weight / scale}
    if bias is not None:
        found[f"{module}.bias"] = (bias if shift is None else bias - shift) / scale
    return {name: value.astype(np.float32) for name, value in found.items()}


def _scaled_rows(layer: Linear, folding: Folding, scale: np.ndarray, shift: np.ndarray | None) -> Linear:
    """The source layer such that its outputs are (x - shift) / scale."""
    index = np.arange(layer.out_features) if folding.rows is None else folding.rows
    by_row, minus = np.ones(layer.out_features), np.zeros(layer.out_features)
    by_row[index], minus[index] = scale, 0 if shift is None else shift
    if not np.array_equal(by_row[index], scale) or (shift is not None and not np.array_equal(minus[index], shift)):
        raise ValueError(f"{layer.name}: {folding.heads} heads share each row and need the same scale and shift; "
                         "Folding.tied makes them equal")
    bias = None if layer.bias is None else (layer.bias - minus) / by_row
    return _changed(layer, _dense(layer) / by_row[:, None], bias, layer.extras)
