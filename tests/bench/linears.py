"""Linear layers with random weights: their shapes, the packed weights of a kind, and one call to time.

A kind is the weights' type and what is fused: ``w8a8`` (codes with zero points in, scales, bias, float32 out),
``w4a8 g64`` and ``w4a16 g64`` (groups of 64), ``f32``; then ``+gelu``, ``int8-out`` (re-quantized per token) and ``f32-in``
(float32 rows quantized on the way in).
"""
from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BERT = ((768, 768), (3072, 768), (768, 3072))  # (n, k)
LLAMA = ((4096, 4096), (11008, 4096), (4096, 11008))
MINILM = ((384, 384), (1152, 384), (1536, 384), (384, 1536))
RAGGED = ((384, 1536), (500, 1000), (172, 64))
GELU, TOKEN_ASYM, TOKEN_16 = 2, 2, 3
BLOCK = 1048573  # random numbers are repeated from here on; a prime, so that no row is another one


def weight_of(kind: str) -> str:
    """The part of a kind that its packed weights depend on."""
    words = kind.split("+")[0].split()
    return " ".join(words[:2] if words[1:] and words[1][0] == "g" else words[:1])


def ragged_rows(n: int, k: int, ops: float) -> tuple[int, int]:
    """The fewest rows of a product of at least so many operations: any number, and an odd one."""
    rows = int(-(-ops // (2 * n * k)))
    return rows, rows | 1


def group_of(kind: str) -> int:
    return int(weight_of(kind).rpartition(" g")[2])


def random_floats(shape: tuple[int, int], seed: int = 5) -> np.ndarray:
    return np.resize(np.random.default_rng(seed).standard_normal(BLOCK, np.float32), shape)


def random_codes(shape: tuple[int, int], largest: int) -> np.ndarray:
    return np.resize(np.random.default_rng(6).integers(-largest, largest + 1, BLOCK, dtype=np.int8), shape)


def pack(kind: str, n: int, k: int) -> Callable[[], Any]:
    """A function that packs a random weight of a kind anew at every call."""
    from zquant import _core

    bias = random_floats((1, n))[0]
    if kind.startswith("f32"):
        w = random_floats((n, k))
        return lambda: _core.linear_pack_f32(w, bias)
    if kind.startswith("w8"):
        codes, scale = random_codes((n, k), 127), np.full(n, 1e-3, np.float32)
        return lambda: _core.linear_pack_s8(codes, scale, bias)
    group = group_of(kind)
    codes, scales = random_codes((n, k), 7), np.full((n, -(-k // group)), 1e-2, np.float32)
    return lambda: _core.linear_pack_group(codes, scales, group, 4, bias)


def handles(kind: str, n: int, k: int, rotate: int = 0) -> list[Any]:
    """Packed copies of a weight, at least ``rotate`` bytes together."""
    from zquant import _core

    make = pack(kind, n, k)
    made = [make()]
    while len(made) * _core.linear_bytes(made[0]) < rotate:
        made.append(make())
    return made


def arguments(kind: str, m: int, k: int) -> tuple[Any, ...]:
    """What ``linear_forward`` takes after the weights: m rows, how they are quantized, activation, residual, output."""
    from zquant import _core

    x: Any = random_floats((m, k))
    quant = TOKEN_16 if "a16" in kind else TOKEN_ASYM if "f32-in" in kind else 0
    if quant == 0 and not kind.startswith("f32"):
        x = _core.quantize_tokens(x, TOKEN_ASYM, True)
    return x, quant, GELU if "+gelu" in kind else 0, None, TOKEN_ASYM if "int8-out" in kind else 0


def call(kind: str, m: int, k: int, weights: list[Any]) -> Callable[[], Any]:
    """One linear layer of m rows, on the next copy of the weights each time."""
    from zquant import _core

    args = arguments(kind, m, k)
    forward, turn = _core.linear_forward, itertools.cycle(weights)
    if len(weights) == 1:
        only = weights[0]
        return lambda: forward(only, *args)
    return lambda: forward(next(turn), *args)


def is_plain(kind: str) -> bool:
    """Whether a kind takes codes and gives float32, with nothing fused."""
    return kind == weight_of(kind) and "a8" in kind


class Loop:
    """``times`` products of the same m rows of codes, on the copies of the weights in turn, called from C: nothing but the
    library's own function is timed.

    Attributes
    ----------
    y : float32 (m, n), the last product
    """

    def __init__(self, kind: str, m: int, k: int, weights: list[Any], times: int) -> None:
        from zquant import _core

        if not is_plain(kind):
            raise ValueError(f"{kind}: expected codes in and float32 out, nothing fused")
        self.weights, given = weights, arguments(kind, m, k)
        self.rows, n = given[0], _core.linear_forward(weights[0], *given).shape[1]
        q, scale, zero = self.rows
        self.y = np.zeros((m, n), np.float32)
        self.run = native.library("calls.c", "zq.h").zqb_forward
        pointer, int64 = ctypes.c_void_p, ctypes.c_int64
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = pointer, (ctypes.py_object, ctypes.c_char_p)
        handles = (pointer * len(weights))(*(get(w, b"zquant.linear") for w in weights))
        self.run.argtypes = (pointer, pointer, int64, pointer, int64, pointer, pointer, int64, pointer, int64)
        self.arguments = (get(_core.linear_forward_c(), b"zquant.linear_forward"), handles, len(weights), q.ctypes.data,
                          q.strides[0], scale.ctypes.data, zero.ctypes.data, m, self.y.ctypes.data, times)

    def __call__(self) -> None:
        status = self.run(*self.arguments)
        if status:
            raise RuntimeError(f"zq_linear_forward: status {status}")


def sequence(kind: str, m: int, k: int, weights: list[Any], times: int) -> Callable[[], Any]:
    """``times`` such layers on the same rows, as models run theirs: one call of the extension, no interpreter in between."""
    from zquant import _core
    from zquant.models.sequence import Calls

    rows, *more = arguments(kind, m, k)
    calls = Calls()
    x = calls.input()
    for weight in itertools.islice(itertools.cycle(weights), times):
        calls.add(_core.linear_forward, weight, x, *more)
    run = calls.bind()
    return lambda: run(rows)
