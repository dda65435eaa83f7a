"""Training of one Transformer block with fake-quantized weights and activations: what layer-by-layer knowledge distillation
(ZeroQuant, Yao et al., arXiv 2206.01861) does to each block. The C core does the work (csrc/algo/lkd.h has the conventions);
:mod:`zquant.reference.lkd` is the same in plain NumPy.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .. import _core
from ..checks import as_count
from .linear import _activation
from .quantize import Array, _array

__all__ = ["TENSORS", "BlockShape", "LinearSpec", "TrainedBlock"]

#: Linear layers and then all tensors, in the core's order.
LINEARS = ("qkv", "o", "gate", "up", "down")
TENSORS = (*LINEARS, *(name + "_bias" for name in LINEARS), "norm1", "norm1_bias", "norm2", "norm2_bias",
           "q_norm", "k_norm")
_ORDERS = ("post", "pre", "parallel")
_NORMS = ("layer", "rms")
_ACTIVATIONS = (None, "symmetric", "asymmetric")
_KINDS = {"value": 0, "gradient": 1, "first": 2, "second": 3}


@dataclass(frozen=True)
class BlockShape:
    """The shape of a Transformer block, encoder or decoder.

    Attributes
    ----------
    width, inner : features of a token, and between the two halves of the feed-forward network
    heads, kv_heads, head_dim : of attention; kv_heads divides heads
    order
        "post" (BERT): h = norm1(x + attention(x)), y = norm2(h + ffn(h)); "pre" (GPT-2, Llama): h = x + attention(norm1(x)),
        y = h + ffn(norm2(h)); "parallel" (GPT-NeoX): y = x + attention(norm1(x)) + ffn(norm2(x)).
    norm : "layer" or "rms"
    activation : "relu", "gelu", "gelu_tanh" or "silu"
    gated : the feed-forward network is down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    causal, window : which keys a query sees; window counts them from the query backwards, 0 for all
    scale : of the scores; default 1 / sqrt(head_dim)
    eps : of the norms
    qk_norm : an RMSNorm of every head of the queries and of the keys, before the rotary embedding (Qwen3)
    interleaved : the rotary embedding turns features 2 i and 2 i + 1 of a head (GPT-J) instead of i and i + half

    >>> BlockShape(width=8, heads=2, inner=16).scale == 4**-0.5
    True
    """

    width: int
    heads: int
    inner: int
    kv_heads: int = 0
    head_dim: int = 0
    order: str = "post"
    norm: str = "layer"
    activation: str = "gelu"
    gated: bool = False
    causal: bool = False
    window: int = 0
    scale: float = 0.0
    eps: float = 1e-12
    qk_norm: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        for name, known in (("order", _ORDERS), ("norm", _NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.heads < 1:
            raise ValueError(f"heads: expected at least 1, got {self.heads}")
        defaults = {"kv_heads": self.heads, "head_dim": self.width // self.heads}
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "scale", self.scale or 1 / math.sqrt(max(self.head_dim, 1)))

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the tensor ``qkv`` that make q, k and v, in this order."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


@dataclass(frozen=True)
class LinearSpec:
    """How one linear layer of a block is quantized.

    Attributes
    ----------
    bits : of the weight, 2 to 8, symmetric; 0 leaves it in float32
    group_size : inputs per scale, a multiple of 8; None for one scale per row
    row_block
        Output rows that share a scale (ZeroQuant's grouping), more than one only with group_size None. Of "qkv" it may be three
        numbers, of q, k and v, as where these are layers of different heights that have equally many blocks.
    activations : None, "symmetric" or "asymmetric": 8-bit codes of what the layer reads, one scale per token
    """

    bits: int = 0
    group_size: int | None = None
    row_block: int | tuple[int, int, int] = 1
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.activations not in _ACTIVATIONS:
            raise ValueError(f"activations: expected None, 'symmetric' or 'asymmetric', got {self.activations!r}")
        for rows in self.row_block if isinstance(self.row_block, tuple) else (self.row_block,):
            as_count("row_block", rows, 1)
        if isinstance(self.row_block, tuple) and len(self.row_block) != 3:
            raise ValueError(f"row_block: expected one number or three, of q, k and v; got {self.row_block}")


_FLOAT = LinearSpec()


@dataclass(eq=False)
class TrainedBlock:
    """A block whose parameters are trained so that, quantized, it gives what a target says.

    Every tensor of :data:`TENSORS` that the block has is there by name in :attr:`values`; these are views of the core's memory,
    so that reading them gives the parameters as they are now and writing them sets them. Weights are (out, in).

    Parameters
    ----------
    shape : BlockShape
    tensors : parameters by name, float32. "qkv" is (all of q, then k, then v, in). Biases that are not given do not exist.
    specs : how each linear layer is quantized, by name; float32 where none is given
    rotary : cos and sin (positions, half) float32 of a rotary embedding of the first 2 * half features of every head, or None
    scales
        float32 (out, groups) by linear layer: scales that stay, as those of GPTQ's codes, instead of such as fit the weight at
        each step. Such a weight is held within +-(2^(bits - 1) - 1) * scale: each pass sets what lies beyond to the border.

    Raises
    ------
    TypeError, ValueError
        A tensor is missing, unknown, not float32 or has another shape; a spec does not fit the layer.

    Notes
    -----
    Ctrl-C, or any signal whose handler raises, ends :meth:`forward`, :meth:`gradients` and :meth:`step` early, where they were
    called on the main thread. Gradients are anything then; parameters, moments and the step count are those before the call,
    but for weights beyond the border of their given scales, which may have been set to it, as the next pass would. Once a step
    has begun to change parameters it goes on to its end (0.2 s for 200 million of them), before the exception: ``state()``
    says how many steps were made.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> shape = BlockShape(width=16, heads=2, inner=32, order="pre", norm="rms", gated=True, activation="silu", causal=True)
    >>> def random(*dims): return rng.standard_normal(dims, np.float32) / 4
    >>> tensors = {"qkv": random(48, 16), "o": random(16, 16), "gate": random(32, 16), "up": random(32, 16),
    ...            "down": random(16, 32), "norm1": np.ones(16, np.float32), "norm2": np.ones(16, np.float32)}
    >>> x, offsets = random(12, 16), np.array([0, 5, 12])
    >>> target = TrainedBlock(shape, tensors).forward(x, offsets)
    >>> block = TrainedBlock(shape, tensors, dict.fromkeys(("qkv", "o", "gate", "up", "down"), LinearSpec(4)))
    >>> losses = [block.step(x, target, offsets, lr=1e-3) for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    """

    shape: BlockShape
    tensors: Mapping[str, Array] = field(repr=False)
    specs: Mapping[str, LinearSpec] = field(default_factory=dict)
    rotary: tuple[Array, Array] | None = field(default=None, repr=False)
    scales: Mapping[str, Array] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        given, self.tensors = self.tensors, {}  # the core has its own copy
        s = self.shape
        unknown = sorted(set(given) - set(TENSORS)) + sorted(set(self.specs) - set(LINEARS))
        if unknown:
            raise ValueError(f"tensors: no block has {', '.join(unknown)}")
        sizes = [s.width, s.heads, s.kv_heads, s.head_dim, s.inner, _ORDERS.index(s.order), _NORMS.index(s.norm),
                 _activation(s.activation), s.gated, s.causal, s.window, s.qk_norm, s.interleaved]
        cos, sin = self.rotary if self.rotary is not None else (None, None)
        self._block = _core.lkd_new(np.array(sizes, np.int64), s.scale, s.eps, cos, sin, self._linears(given))
        self.values = self._views("value")
        if set(given) != set(self.values):
            wrong = sorted(set(given) ^ set(self.values))
            raise ValueError(f"tensors: expected {', '.join(self.values)}; missing or too many: {', '.join(wrong)}")
        for name, value in self.values.items():
            array = _array(given[name], name, "float32")
            if array.shape != value.shape:
                raise ValueError(f"{name}: expected shape {value.shape}, got {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: NaN or Inf")
            value[...] = array
        for name, scales in self.scales.items():
            _core.lkd_fix_scales(self._block, self._linear(name), _array(scales, f"scales of {name}", "float32"))

    def _linear(self, name: str) -> int:
        """The number of a linear layer that the block has."""
        if name not in LINEARS or name not in self.values:
            raise ValueError(f"name: expected one of {', '.join(n for n in LINEARS if n in self.values)}, got {name!r}")
        return LINEARS.index(name)

    def _linears(self, given: Mapping[str, Array]) -> Array:
        rows = []
        for name in LINEARS:
            spec = self.specs.get(name, _FLOAT)
            group = 2**30 if spec.group_size is None else spec.group_size
            blocks = spec.row_block if isinstance(spec.row_block, tuple) else (spec.row_block, 0, 0)
            rows.append([spec.bits, group, *blocks, _ACTIVATIONS.index(spec.activations), name + "_bias" in given])
        return np.array(rows, np.int64)

    def _views(self, kind: str) -> dict[str, Array]:
        views = {name: _core.lkd_tensor(self._block, _KINDS[kind], i) for i, name in enumerate(TENSORS)}
        return {name: view for name, view in views.items() if view is not None}

    def forward(self, x: Array, offsets: Array) -> Array:
        """The output (tokens, width) for packed sequences x; sequence i is rows ``offsets[i]`` to ``offsets[i + 1] - 1``."""
        return _core.lkd_forward(self._block, _array(x, "x", "float32"), np.asarray(offsets, np.int64))

    def gradients(self, x: Array, offsets: Array, dy: Array) -> dict[str, Array]:
        """Gradients of ``sum(dy * forward(x))`` by every tensor, as views that the next step overwrites, and by x as "x"."""
        dx = _core.lkd_gradients(self._block, _array(x, "x", "float32"), np.asarray(offsets, np.int64),
                                 _array(dy, "dy", "float32"))
        return {**self._views("gradient"), "x": dx}

    def step(self, x: Array, target: Array, offsets: Array, lr: float, *, beta1: float = 0.9, beta2: float = 0.999,
             eps: float = 1e-8, weight_decay: float = 0.0, kl: float = 0.0) -> float:
        """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), and the loss before it.

        The loss is mean (forward(x) - target)^2, plus ``kl`` times the mean over tokens of the Kullback-Leibler divergence of
        the softmax of the output from that of the target. Decay acts on the weights of linear layers alone. Where the loss or a
        gradient is not finite the parameters stay as they are and ValueError is raised.
        """
        return _core.lkd_step(self._block, _array(x, "x", "float32"), np.asarray(offsets, np.int64),
                              _array(target, "target", "float32"), lr, beta1, beta2, eps, weight_decay, kl)

    def codes(self, name: str) -> tuple[Array, Array] | None:
        """int8 codes (out, in) and scales (out, groups) of a linear layer's weight as it is now; None if it is in float32."""
        return _core.lkd_codes(self._block, self._linear(name))

    def state(self) -> dict[str, Array | int]:
        """Copies of all values ("value.qkv"), AdamW's moments ("first.qkv", "second.qkv") and its step count ("steps")."""
        arrays = {f"{kind}.{name}": view.copy() for kind in ("value", "first", "second")
                  for name, view in self._views(kind).items()}
        return {**arrays, "steps": _core.lkd_steps(self._block, None)}

    def restore(self, state: Mapping[str, Array | int]) -> None:
        """Go back to what :meth:`state` returned: the next steps have the same bits as they had then."""
        for kind in ("value", "first", "second"):
            for name, view in self._views(kind).items():
                view[...] = state[f"{kind}.{name}"]
        _core.lkd_steps(self._block, int(state["steps"]))

    @property
    def nbytes(self) -> int:
        """Memory of the parameters, their codes, gradients and moments, and of the largest batch so far."""
        return _core.lkd_bytes(self._block)
