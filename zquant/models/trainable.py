"""The blocks of a model as :class:`zquant.ops.lkd.TrainedBlock` wants them."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from ..linear import Linear
from ..ops.lkd import LINEARS, BlockShape, LinearSpec
from ..qtensor import QTensor
from ..spec import QuantSpec, Scheme
from .decoder_blocks import per_head_rows
from .decoder_family import Architecture

__all__ = ["FloatBlock", "block_of", "given_scales", "linear_specs"]

Array = np.ndarray

_NAMES = {"qkv": ("attention.qkv",), "o": ("attention.o",), "gate": ("mlp.gate",), "up": ("mlp.up",), "down": ("mlp.down",)}


@dataclass(frozen=True, eq=False)
class FloatBlock:
    """A Transformer block in float32. It pickles.

    Attributes
    ----------
    shape : BlockShape
    tensors : by the names of :data:`zquant.ops.lkd.TENSORS`
    rotary : cos and sin (positions, half) float32, or None
    names
        The model's names of the layers that make up each linear layer, which the patterns of a scheme are about: of "qkv" one
        name or three.
    norms : the model's names of the norms' tensors
    order : (rows,) rows of the model's qkv layer in the order of this block's; None where it is the same

    >>> tensors = {"qkv": np.zeros((24, 8), np.float32), "o": np.zeros((8, 8), np.float32), "up": np.zeros((16, 8), np.float32),
    ...            "down": np.zeros((8, 16), np.float32)}
    >>> block = FloatBlock(BlockShape(width=8, heads=2, inner=16), tensors)
    >>> block.linears, block.cuts("qkv")
    (('qkv', 'o', 'up', 'down'), {'attention.qkv': slice(0, 24, None)})
    """

    shape: BlockShape
    tensors: Mapping[str, Array] = field(repr=False)
    rotary: tuple[Array, Array] | None = field(default=None, repr=False)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(_NAMES), repr=False)
    norms: Mapping[str, str] = field(default_factory=dict, repr=False)
    order: Array | None = field(default=None, repr=False)

    @property
    def linears(self) -> tuple[str, ...]:
        """Those of LINEARS that the block has."""
        return tuple(name for name in LINEARS if name in self.tensors)

    def cuts(self, linear: str) -> dict[str, slice]:
        """Which rows of a linear layer belong to which of the model's layers."""
        names, rows = self.names[linear], len(self.tensors[linear])
        sizes = self.shape.qkv_rows if len(names) == 3 else (rows,)
        ends = np.cumsum(sizes)
        return {name: slice(int(end - size), int(end)) for name, end, size in zip(names, ends, sizes)}

    def parts(self, linear: str, value: Array) -> dict[str, Array]:
        """Rows of one of this block's tensors by the model's layers, in the model's order."""
        if linear == "qkv" and self.order is not None:
            value = value[np.argsort(self.order)]
        return {name: np.ascontiguousarray(value[rows]) for name, rows in self.cuts(linear).items()}


def block_of(model: Any, index: int, positions: int) -> FloatBlock:
    """Block ``index`` of a float Model or CausalLM, for sequences of up to ``positions`` tokens.

    Raises
    ------
    ValueError
        A block that cannot be trained: frequencies that depend on a sequence's length, layers that scale their input; each
        error names the block or layer.
    """
    a, prefix, names = model.dims, model.prefix + model.family.layer.format(index), model.family.block
    decoder = isinstance(a, Architecture)
    if decoder:
        _check_decoder(prefix.rstrip("."), a, positions)
    up, down, mlp_norm = ("up", "down", "mlp_norm") if decoder else ("intermediate", "output", "output_norm")
    inputs = ("query", "key", "value") if not decoder or a.qkv == "split" else ("qkv",)
    gate = {"gate": ("gate",)} if decoder and a.gated else {}
    roles = {"qkv": inputs, "o": ("attention",), **gate, "up": (up,), "down": (down,)}
    modules = {linear: tuple(prefix + names[role] for role in found) for linear, found in roles.items()}
    order = per_head_rows(a) if decoder and a.qkv == "heads" else None
    norms = {f"norm{i}{end}": prefix + names[role] + part for i, role in ((1, "attention_norm"), (2, mlp_norm))
             for end, part in (("", ".weight"), ("_bias", ".bias")) if prefix + names[role] + part in model.tensors}
    if decoder and a.qk_norm:
        norms.update({role: prefix + names[role] + ".weight" for role in ("q_norm", "k_norm")})
    tensors = {key: np.asarray(model.tensors[name], np.float32) for key, name in norms.items()}
    for linear, found in modules.items():
        tensors.update(_joined(linear, [model.linears[name] for name in found], order if linear == "qkv" else None))
    shape = _decoder_shape(a, index) if decoder else BlockShape(
        a.hidden, a.heads, tensors["up"].shape[0], activation=a.activation, eps=a.eps)
    rotary = None
    if decoder and a.rope is not None:
        cos, sin = a.rope.tables(positions, positions)
        rotary = cos[:positions].copy(), sin[:positions].copy()
    return FloatBlock(shape, tensors, rotary, modules, norms, order)


def _check_decoder(where: str, a: Architecture, positions: int) -> None:
    if a.rope is not None and a.rope.depends_on_length(positions):
        raise ValueError(f"{where}: {positions} tokens, but rotary frequencies depend on the length beyond {a.rope.trained}; "
                         "train on shorter sequences")


def _decoder_shape(a: Architecture, index: int) -> BlockShape:
    return BlockShape(a.hidden, a.heads, a.intermediate, a.kv_heads, a.head_dim, a.order, a.norm, a.activation, a.gated, True,
                      a.windows[index], a.scales[index], a.eps, a.qk_norm)


def _joined(linear: str, layers: list[Linear], order: Array | None) -> dict[str, Array]:
    for layer in layers:
        if isinstance(layer._weight, QTensor):
            raise ValueError(f"{layer.name}: is quantized already ({layer.spec}); train the float model instead")
        if layer.extras.branch is not None:
            raise ValueError(f"{layer.name}: layers that scale their input at run time cannot be trained")
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases and len(biases) < len(layers):
        raise ValueError(f"{layers[0].name}: query, key and value need biases all three, or none of them")
    found = {linear: np.concatenate([layer.dense() for layer in layers])}
    if biases:
        found[linear + "_bias"] = np.concatenate(biases)
    return {name: np.ascontiguousarray(value if order is None else value[order], np.float32) for name, value in found.items()}


def linear_specs(block: FloatBlock, scheme: Scheme) -> dict[str, LinearSpec]:
    """How ``scheme`` quantizes each linear layer of a block.

    Raises
    ------
    ValueError
        Formats that blocks are not trained for, naming the layer.

    >>> shape = BlockShape(width=8, heads=2, inner=16)
    >>> block = FloatBlock(shape, {"qkv": np.zeros((24, 8)), "up": np.zeros((16, 8))})
    >>> linear_specs(block, Scheme.parse("w4/8a8-g8"))["up"]
    LinearSpec(bits=4, group_size=8, row_block=1, activations='asymmetric')
    """
    found = {}
    for linear in block.linears:
        cuts = block.cuts(linear)
        every = {name: _linear_spec(name, scheme, rows.stop - rows.start) for name, rows in cuts.items()}
        first = next(iter(cuts))
        for name, spec in every.items():
            if replace(spec, row_block=1) != replace(every[first], row_block=1):
                raise ValueError(f"{name}: layers that read the same rows are trained in the same format; {first} has another")
        if block.order is not None and linear == "qkv" and every[first].row_block != 1:
            raise ValueError(f"{first}: rows of q, k and v take turns here and cannot share scales in blocks")
        found[linear] = _joined_spec(list(every.values()))
    return found


def _joined_spec(specs: list[LinearSpec]) -> LinearSpec:
    """Of layers that are trained as one: only the rows that share a scale may differ."""
    blocks = [spec.row_block for spec in specs]
    return specs[0] if len(set(blocks)) == 1 else replace(specs[0], row_block=cast(tuple[int, int, int], tuple(blocks)))


def _linear_spec(name: str, scheme: Scheme, rows: int) -> LinearSpec:
    weights, act = scheme.weights_for(name), scheme.activations_for(name)
    if weights is None:
        return LinearSpec()
    if not weights.symmetric:
        raise ValueError(f"{name}: blocks are trained for symmetric weights, not {weights}")
    if act is not None and act.granularity != "token":
        raise ValueError(f"{name}: blocks are trained for activations with a scale per token, not {act}")
    activations = None if act is None else "symmetric" if act.symmetric else "asymmetric"
    return LinearSpec(weights.bits, weights.group_size, _row_block(name, weights, rows), activations)


def _row_block(name: str, weights: QuantSpec, rows: int) -> int:
    """Rows that share a scale."""
    blocks = {"tensor": 1, "row_block": weights.blocks}.get(weights.granularity)
    if blocks is None:
        return 1
    if rows % blocks:
        raise ValueError(f"{name}: {rows} rows do not divide into {blocks} blocks")
    return rows // blocks


def given_scales(block: FloatBlock, linears: Mapping[str, Linear]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights and scales, by linear layer, of layers that another solver has quantized: where training starts."""
    weights, scales = {}, {}
    for linear in block.linears:
        layers = [linears[name]._weight for name in block.names[linear] if name in linears]
        found = [weight for weight in layers if isinstance(weight, QTensor)]
        if len(found) < len(block.names[linear]):
            continue
        order = slice(None) if block.order is None or linear != "qkv" else block.order
        weights[linear] = np.ascontiguousarray(np.concatenate([tensor.dequantize() for tensor in found])[order])
        scales[linear] = np.ascontiguousarray(np.concatenate([tensor.scales for tensor in found])[order])
    return weights, scales
