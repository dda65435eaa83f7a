"""Quantizers and bit packing: every kernel at every level against plain NumPy, bit for bit, and the laws they obey."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import guard

from zquant import _core, ops, reference

ROOT = str(Path(__file__).parents[1])
FLT_MAX = float(np.finfo(np.float32).max)
FLT_MIN = float(np.finfo(np.float32).tiny)
SIZES = [*range(1, 66), 127, 128, 129, 191, 251, 383, 509, 1009]
PRIMES = [1, 2, 3, 5, 7, 11, 13, 17, 31, 61, 127, 251, 509, 1009]
BITS = range(2, 9)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(seed: int, *shape: int) -> np.ndarray:
    return rng(seed).standard_normal(shape).astype(np.float32)


def same(got, want) -> None:
    """The same types, shapes and bits, for arrays and for tuples of arrays and None."""
    if isinstance(got, tuple):
        assert len(got) == len(want)
        for g, w in zip(got, want):
            same(g, w)
        return
    if want is None:
        assert got is None
        return
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    wrong = np.flatnonzero(np.frombuffer(got.tobytes(), np.uint8) != np.frombuffer(want.tobytes(), np.uint8))
    assert wrong.size == 0, f"{wrong.size} bytes differ, first in item {wrong[0] // got.itemsize}"


def test_the_comparison_can_fail():
    q = ops.quantize_per_token(normal(0, 5, 33), False)
    same(q, tuple(a.copy() for a in q))
    for part in range(3):
        fault = [a.copy() for a in q]
        fault[part].view(np.uint8).reshape(-1)[-1] ^= 1  # the least bit that a kernel can get wrong
        with pytest.raises(AssertionError):
            same(tuple(fault), q)
    with pytest.raises(AssertionError):
        same(np.float32([0.0]), np.float32([-0.0]))
    with pytest.raises(AssertionError):
        same(q[0].view(np.int8), q[0])
    with pytest.raises(AssertionError):
        same(q[0][:, :-1], q[0])
    with pytest.raises(AssertionError):
        same((q[0], q[1], None), q)


def test_the_guard_page_stops_reads_behind_the_end():
    """The last byte can be read; the next one ends the process."""
    code = ("import conftest, ctypes, numpy as np; a = conftest.guard(np.zeros(5, np.int8)); "
            "ctypes.string_at(a.ctypes.data + {}, 1)")
    ran = [
        subprocess.run([sys.executable, "-c", code.format(i)], cwd=Path(__file__).parent,
                       env={**os.environ, "PYTHONPATH": ROOT})
        for i in (4, 5)
    ]
    assert ran[0].returncode == 0 and ran[1].returncode != 0


def extremes() -> dict[str, np.ndarray]:
    """Rows that are hard on scales: nothing of them may become NaN or Inf. (Except "greatest" with a zero point:
    half a step beyond FLT_MAX is Inf.)"""
    tiny = np.float32(1e-45)
    k = 67
    rows = {
        "zeros": np.zeros(k),
        "minus zeros": np.full(k, -0.0),
        "greatest": np.where(np.arange(k) % 2, FLT_MAX, -FLT_MAX),
        "huge": np.where(np.arange(k) % 2, 2e38, -2e38),
        "huge, one sign": np.full(k, 1e38),
        "huge among small": np.r_[1e38, np.full(k - 1, 1.0)],
        "denormal": np.full(k, tiny),
        "denormal, both signs": tiny * (np.arange(k) - 30),
        "just below a normal scale": np.full(k, np.nextafter(np.float32(FLT_MIN * 127), np.float32(0))),
        "just a normal scale": np.full(k, np.float32(FLT_MIN) * np.float32(127)),
        "just a normal asymmetric scale": np.full(k, np.float32(FLT_MIN) * np.float32(255)),
        "positive": np.linspace(1, 2, k),
        "negative": np.linspace(-5, -3, k),
        "constant": np.full(k, 0.3),
        "negative constant": np.full(k, -0.7),
        "ties": (np.arange(k) - 33) * 0.5,
        "one value": np.r_[np.zeros(k - 1), 3.0],
    }
    return {name: row.astype(np.float32)[None] for name, row in rows.items()}


# ---- tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_of_every_size(isa, symmetric):
    for k in SIZES:
        x = guard(normal(k, 3, k) * np.float32(2.0) ** rng(k).integers(-20, 20, (3, 1)).astype(np.float32))
        same(ops.quantize_per_token(x, symmetric), reference.quantize_per_token(x, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_of_extreme_values(isa, symmetric):
    for name, x in extremes().items():
        q, scale, zero = ops.quantize_per_token(x, symmetric)
        same((q, scale, zero), reference.quantize_per_token(x, symmetric))
        assert np.isfinite(scale).all() and (scale >= FLT_MIN).all(), name
        back = ops.dequantize_per_token(q, scale, zero)
        assert not np.isnan(back).any(), name
        if name == "greatest" and not symmetric:
            continue
        assert np.isfinite(back).all(), name
        if scale[0] == 1 and np.abs(x).max() < FLT_MIN * 255:
            assert not back.any(), name
        else:
            assert (np.abs(back.astype(np.float64) - x) <= 0.5001 * scale[0]).all(), name


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_by_any_number_of_threads(isa, threads, symmetric):
    x = normal(7, 301, 257)
    same(ops.quantize_per_token(x, symmetric), reference.quantize_per_token(x, symmetric))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (4,), (2, 3, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_of_any_shape(shape, symmetric):
    x = normal(1, *shape)
    got = ops.quantize_per_token(x, symmetric)
    same(got, reference.quantize_per_token(x, symmetric))
    assert got[0].shape == shape and got[1].shape == shape[:-1]
    same(ops.dequantize_per_token(*got), reference.dequantize_per_token(*got))


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("k", [1, 15, 64, 79, 130, 3073])
def test_each_row_is_coded_as_if_alone(isa, mode, k):
    x = guard(normal(k, 7, k) * np.float32([[1], [50], [0], [1e-3], [7], [7], [1e30]]))
    alone = [_core.quantize_tokens(row[None], mode, False) for row in x]
    same(_core.quantize_tokens(x, mode, False), tuple(map(np.concatenate, zip(*alone))))


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("k", [1, 7, 8, 63, 64, 65, 130])
def test_padded_tokens_have_zeroed_slack(isa, mode, k):
    x = normal(k, 5, k)
    plain, padded = _core.quantize_tokens(x, mode, False), _core.quantize_tokens(x, mode, True)
    same(np.ascontiguousarray(padded[0]), plain[0])
    same(padded[1:], plain[1:])
    q = padded[0]
    ld = q.strides[0]
    assert ld >= k and ld % 64 == 0 and q.strides[1] == 1 and q.ctypes.data % 64 == 0
    rows = np.lib.stride_tricks.as_strided(q, (5, ld), (ld, 1))
    assert not rows[:, k:].any()


def test_symmetric_codes_are_stored_with_zero_point_128():
    q, scale, zero = _core.quantize_tokens(np.float32([[1, -1, 0.5]]), 1, False)
    assert q.tolist() == [[255, 1, 192]] and zero.tolist() == [128]


def test_tokens_asymmetric_golden_row():
    """The INT8 row of ZeroQuant-FP's figure of number formats (arXiv 2307.09782), to its three decimals."""
    x = np.float32([-0.4, -0.3, -0.2, -0.1, -0.001, 0, 0.001, 0.1, 0.2, 0.3, 0.4, 0.5, 1, 10, 100])
    q, scale, zero = ops.quantize_per_token(x, symmetric=False)
    want = [-0.394] * 3 + [0] * 5 + [0.394] * 4 + [1.181, 9.843, 100.006]
    assert zero == 1
    assert ops.dequantize_per_token(q, scale, zero).round(3).tolist() == np.float32(want).tolist()


@pytest.mark.parametrize("k", [1, 17, 300])
def test_symmetric_is_idempotent(isa, k):
    q, scale, _ = ops.quantize_per_token(normal(k, 50, k))
    again, scale2, _ = ops.quantize_per_token(ops.dequantize_per_token(q, scale))
    same(again, q)
    np.testing.assert_array_max_ulp(scale2, scale, 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power", [-40, -1, 3, 60])
def test_tokens_are_covariant_with_powers_of_two(isa, symmetric, power):
    x, factor = normal(2, 20, 100), np.float32(2.0**power)
    q, scale, zero = ops.quantize_per_token(x, symmetric)
    same(ops.quantize_per_token(x * factor, symmetric), (q, scale * factor, zero))


def test_symmetric_negates():
    x = normal(3, 10, 99)
    same(ops.quantize_per_token(-x)[0], -ops.quantize_per_token(x)[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_err_by_half_a_step(symmetric):
    x = normal(4, 40, 200)
    q, scale, zero = ops.quantize_per_token(x, symmetric)
    error = np.abs(ops.dequantize_per_token(q, scale, zero).astype(np.float64) - x)
    assert (error <= 0.5 * scale[:, None] * (1 + 1e-4)).all()
    assert error.max() > 0.4 * scale.min()  # and not by much less: the bound is about something


def test_minmax_of_every_size(isa, threads):
    for k in PRIMES:
        x = guard(normal(k, 40, k))
        lo, hi = _core.minmax_rows(x)
        same((lo, hi), (np.minimum(x.min(1), 0) + np.float32(0), np.maximum(x.max(1), 0) + np.float32(0)))


def test_minmax_has_no_negative_zero(isa):
    for k in (1, 16, 70):
        same(_core.minmax_rows(np.full((1, k), -0.0, np.float32)), (np.zeros(1, np.float32),) * 2)


@pytest.mark.parametrize("sign", [1, -1])
def test_minmax_of_one_sign(isa, sign):
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    for k in (1, 15, 16, 70, 200):
        x = sign * np.abs(normal(k, 4, k))
        x[1] = np.copysign(np.float32(0), -sign)
        x[1, -1] = sign * tiny
        x[2, 0], x[3, k // 2] = sign * huge, np.copysign(np.float32(0), -sign)
        ends = np.zeros(4, np.float32), sign * np.abs(x).max(1) + np.float32(0)
        same(_core.minmax_rows(x), ends[::sign])


def test_tokens_of_short_and_long_rows_do_not_depend_on_their_neighbours(isa):
    for k, rows in [(16, 1), (70, 2), (2048, 3), (2049, 2), (2100, 5)]:
        x = normal(k, rows, k) * np.float32(10) ** np.arange(rows, dtype=np.float32)[:, None]
        q, scale, zero = ops.quantize_per_token(x, False)
        for i in range(rows):
            same(ops.quantize_per_token(x[i : i + 1], False), (q[i : i + 1], scale[i : i + 1], zero[i : i + 1]))


# ---- NaN and Inf -----------------------------------------------------------------------------------------------

REFUSING = {
    "symmetric tokens": (lambda x: ops.quantize_per_token(x, True), "x"),
    "asymmetric tokens": (lambda x: ops.quantize_per_token(x, False), "x"),
    "minmax": (_core.minmax_rows, "x"),
    "one scale": (lambda x: _core.quantize_static(x, np.ones(1, np.float32), np.zeros(1, np.int32), 0, 255, False), "x"),
    "a scale per feature": (lambda x: ops.quantize_linear(x, np.ones(x.shape[1], np.float32), axis=1), "x"),
    "16-bit codes": (lambda x: ops.quantize_linear(x, np.ones(x.shape[1], np.float32), dtype="int16", axis=1), "x"),
    "symmetric groups": (lambda x: ops.quantize_weight(x, 4, 16), "w"),
    "asymmetric groups": (lambda x: ops.quantize_weight(x, 4, 16, False), "w"),
    "row blocks": (lambda x: ops.quantize_weight_blocks(x, 2), "w"),
}


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_wherever_they_are(isa, bad):
    for row, column, k in [(0, 0, 1), (3, 0, 17), (2, 16, 17), (1, 40, 65), (5, 69, 70), (0, 500, 1009), (4, 1007, 1009)]:
        x = normal(k, 6, k)
        x[row, column] = bad
        for quantize, argument in REFUSING.values():
            with pytest.raises(ValueError, match=f"^{argument}: NaN or Inf in row {row}$"):
                quantize(x)


def test_the_first_bad_row_is_named_for_any_number_of_threads(threads):
    x = normal(0, 4000, 64)
    x[[77, 1500, 3999], 5] = np.nan
    for quantize, argument in REFUSING.values():
        with pytest.raises(ValueError, match=f"^{argument}: NaN or Inf in row 77$"):
            quantize(x)


def test_dynamic_quantize_linear_refuses_nan():
    with pytest.raises(ValueError, match="^x: NaN or Inf"):
        ops.dynamic_quantize_linear(np.float32([1, np.nan]))


# ---- given scales ----------------------------------------------------------------------------------------------

DTYPES = ["int8", "uint8", "int4", "uint4", "int2", "uint2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_of_every_size(isa, dtype):
    lo, hi = ops.quantize.CODE_RANGES[dtype]
    for k in SIZES:
        x = guard(normal(k, 2, k) * np.float32(4))
        scale = guard(rng(k).uniform(0.01, 2, k).astype(np.float32))
        zero = guard(rng(k).integers(lo, hi + 1, k).astype(np.int32))
        q = ops.quantize_linear(x, scale[:1], zero[:1], dtype)
        same(q, reference.quantize_linear(x, scale[:1], zero[:1], dtype))
        same(
            ops.dequantize_linear(guard(q), scale[:1], zero[:1]), reference.dequantize_linear(q, scale[:1], zero[:1])
        )
        q = ops.quantize_linear(x, scale, zero, dtype, axis=1)
        same(q, reference.quantize_linear(x, scale, zero, dtype, axis=1))
        same(ops.dequantize_linear(guard(q), scale, zero, axis=1), reference.dequantize_linear(q, scale, zero, axis=1))


@pytest.mark.parametrize("k", [1, 3, 16384, 16385])
def test_static_by_any_number_of_threads(isa, threads, k):
    """Jobs are cut by elements, not by rows: boundaries fall inside rows."""
    x, scale = normal(k, 40000 // k + 1, k), rng(k).uniform(0.01, 1, k).astype(np.float32)
    zero = rng(k).integers(-128, 128, k).astype(np.int32)
    same(ops.quantize_linear(x, 0.02, 3), reference.quantize_linear(x, np.float32(0.02), 3))
    q = ops.quantize_linear(x, scale, zero, axis=1)
    same(q, reference.quantize_linear(x, scale, zero, axis=1))
    same(ops.dequantize_linear(q, scale, zero, axis=1), reference.dequantize_linear(q, scale, zero, axis=1))
    same(ops.dequantize_linear(q, 0.02, 3), reference.dequantize_linear(q, np.float32(0.02), 3))
    row_scale, row_zero = np.abs(normal(1, len(x))), rng(0).integers(-9, 9, len(x))
    same(ops.dequantize_per_token(q, row_scale, row_zero), reference.dequantize_per_token(q, row_scale, row_zero))


@pytest.mark.parametrize("scale", [1e-45, FLT_MIN, 1e-3, 0.5, 1.0, FLT_MAX])
def test_static_of_extreme_values_saturates(isa, scale):
    x = np.concatenate(list(extremes().values()))
    for dtype, zero in [("int8", 0), ("int8", -128), ("uint8", 255), ("uint8", 7), ("int16", -32768), ("uint16", 65535)]:
        scales = np.full(x.shape[1], scale, np.float32)
        zeros = np.full(x.shape[1], zero, np.int32)
        same(ops.quantize_linear(x, scale, zero, dtype), reference.quantize_linear(x, np.float32(scale), zero, dtype))
        same(
            ops.quantize_linear(x, scales, zeros, dtype, axis=1),
            reference.quantize_linear(x, scales, zeros, dtype, axis=1),
        )


def test_static_rounds_half_to_even(isa):
    x = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert ops.quantize_linear(x, 1.0).tolist() == [-2, -2, 0, 0, 2, 2]
    # the quotient is rounded before an odd zero point is added
    assert ops.quantize_linear(x, 1.0, 1).tolist() == [-1, -1, 1, 1, 3, 3]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_static_per_axis(axis, dtype):
    x = normal(0, 4, 5, 6)
    n = x.shape[axis]
    scale, zero = np.linspace(0.01, 0.1, n).astype(np.float32), np.arange(n)
    q = ops.quantize_linear(x, scale, zero, dtype, axis)
    same(q, reference.quantize_linear(x, scale, zero, dtype, axis))
    same(ops.dequantize_linear(q, scale, zero, axis), reference.dequantize_linear(q, scale, zero, axis))
    assert q.flags.c_contiguous


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("dtype", ["int4", "uint8", "uint16"])
def test_static_blocked_with_a_short_tail(axis, block, dtype):
    x = normal(0, 5, 7, 3)
    shape = [-(-n // block) if i == axis % 3 else n for i, n in enumerate(x.shape)]
    scale = rng(1).uniform(0.01, 1, shape).astype(np.float32)
    zero = rng(2).integers(0, 8, shape)
    q = ops.quantize_linear(x, scale, zero, dtype, axis, block)
    same(q, reference.quantize_linear(x, scale, zero, dtype, axis, block))
    same(ops.dequantize_linear(q, scale, zero, axis, block), reference.dequantize_linear(q, scale, zero, axis, block))


def test_static_of_nothing():
    for shape in [(0,), (0, 4), (4, 0), (3, 0, 2)]:
        x = np.zeros(shape, np.float32)
        assert ops.quantize_linear(x, 1.0).shape == shape
        assert ops.dequantize_linear(x.astype(np.int8), 1.0).shape == shape
        n = shape[-1]
        assert ops.quantize_linear(x, np.ones(n, np.float32), axis=-1).shape == shape
    assert ops.quantize_linear(np.array(3, np.float32), 1.0).shape == ()


def test_dynamic_quantize_linear(isa):
    for k in SIZES:
        x = guard(normal(k, k) * np.float32(3))
        same(ops.dynamic_quantize_linear(x), reference.dynamic_quantize_linear(x))
    for x in extremes().values():
        got = ops.dynamic_quantize_linear(x)
        same(got, reference.dynamic_quantize_linear(x))
        assert np.isfinite(got[1]) and got[1] > 0
    same(ops.dynamic_quantize_linear(np.zeros((2, 0), np.float32))[0], np.zeros((2, 0), np.uint8))


# ---- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_every_size(isa, bits, symmetric):
    for k in PRIMES:
        w = guard(normal(k, 3, k))
        for group in (1, 3, 16, 32, 37, 128, k, k + 5, None):
            got = ops.quantize_weight(w, bits, group, symmetric)
            same(got, reference.quantize_weight(w, bits, group, symmetric))
            assert got[1].shape == (3, 1 if group is None else -(-k // group))
            same(ops.dequantize_weight(*got, group), reference.dequantize_weight(*got, group))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_extreme_values(isa, bits, symmetric):
    for name, w in extremes().items():
        codes, scales, zeros = ops.quantize_weight(w, bits, 32, symmetric)
        same((codes, scales, zeros), reference.quantize_weight(w, bits, 32, symmetric))
        assert np.isfinite(scales).all() and (scales >= FLT_MIN).all(), name
        back = ops.dequantize_weight(codes, scales, zeros, 32)
        assert np.isfinite(back).all() or (name == "greatest" and not symmetric and not np.isnan(back).any()), name
        lo, hi = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        assert lo <= codes.min() and codes.max() <= hi, name


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_by_any_number_of_threads(isa, threads, symmetric):
    w = normal(9, 501, 130)
    got = ops.quantize_weight(w, 4, 64, symmetric)
    same(got, reference.quantize_weight(w, 4, 64, symmetric))
    same(ops.dequantize_weight(*got, 64), reference.dequantize_weight(*got, 64))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_err_by_half_a_step(bits, symmetric):
    w = normal(bits, 30, 100) + np.float32(0.3)
    codes, scales, zeros = ops.quantize_weight(w, bits, 32, symmetric)
    error = np.abs(ops.dequantize_weight(codes, scales, zeros, 32).astype(np.float64) - w)
    bound = 0.5 * np.repeat(scales, 32, 1)[:, :100] * (1 + 1e-4)
    assert (error <= bound).all()
    assert (error > 0.9 * bound).any()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_groups_are_idempotent_and_covariant(bits):
    w = normal(bits, 30, 100)
    codes, scales, _ = ops.quantize_weight(w, bits, 32)
    again, scales2, _ = ops.quantize_weight(ops.dequantize_weight(codes, scales, group_size=32), bits, 32)
    same(again, codes)
    np.testing.assert_array_max_ulp(scales2, scales, 1)
    for symmetric in (True, False):
        codes, scales, zeros = ops.quantize_weight(w, bits, 32, symmetric)
        factor = np.float32(2.0**-30)
        same(ops.quantize_weight(w * factor, bits, 32, symmetric), (codes, scales * factor, zeros))


def test_groups_of_nothing():
    for shape in [(0, 8), (3, 0), (0, 0)]:
        for symmetric in (True, False):
            w = np.zeros(shape, np.float32)
            got = ops.quantize_weight(w, 4, 4, symmetric)
            same(got, reference.quantize_weight(w, 4, 4, symmetric))
            assert ops.dequantize_weight(*got, 4).shape == shape


@pytest.mark.parametrize("bits", BITS)
def test_row_blocks(isa, threads, bits):
    for n, k, blocks in [(12, 7, 3), (48, 64, 48), (96, 33, 8), (10, 1009, 1), (1, 1, 1), (6, 0, 2), (0, 4, 2)]:
        w = guard(normal(n, n, k))
        codes, scales = ops.quantize_weight_blocks(w, blocks, bits)
        same((codes, scales), reference.quantize_weight_blocks(w, blocks, bits))
        assert scales.shape == (n, 1)
        if n and k:
            want = np.repeat(np.abs(w).reshape(blocks, -1).max(1), n // blocks) / np.float32(2 ** (bits - 1) - 1)
            same(scales[:, 0], want)
            same(ops.dequantize_weight(codes, scales), ops.dequantize_weight(codes, scales[:, 0]))


# ---- bit streams -----------------------------------------------------------------------------------------------


def test_int4_golden_word():
    """Codes 0..7 in one little-endian word: the order of GPTQ and compressed-tensors."""
    assert ops.pack(np.arange(8, dtype=np.uint8), 4).view("<u4").tolist() == [0x76543210]


def test_3_bit_golden_words():
    packed = ops.pack((np.arange(32) % 8).astype(np.uint8), 3)
    assert packed.view("<u4").tolist() == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_packing_of_every_size(isa, bits, signed):
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    dtype = np.int8 if signed else np.uint8
    for n in [0, *SIZES]:
        codes = guard(rng(n).integers(lo, hi, n).astype(dtype))
        packed = ops.pack(codes, bits)
        same(packed, reference.pack(codes, bits))
        same(ops.unpack(guard(packed), bits, n, signed), codes)
        same(reference.unpack(packed, bits, n, signed), codes)
        rows = rng(n).integers(lo, hi, (3, n)).astype(dtype)
        packed = ops.pack(rows, bits)
        same(packed, reference.pack(rows, bits))
        same(ops.unpack(guard(packed), bits, n, signed), rows)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_unpacks(isa, bits):
    """Any bytes are a stream: unpacking them and packing again gives them back."""
    stream = np.tile(np.arange(256, dtype=np.uint8), bits)
    for signed in (True, False):
        codes = ops.unpack(stream, bits, 256 * 8, signed)
        same(codes, reference.unpack(stream, bits, 256 * 8, signed))
        same(ops.pack(codes, bits), stream)


@pytest.mark.parametrize("bits", BITS)
def test_bits_above_the_code_are_ignored_by_the_kernel(isa, bits):
    codes = rng(bits).integers(0, 256, 77).astype(np.uint8)
    same(_core.pack_bits(codes, bits), ops.pack(codes & np.uint8(2**bits - 1), bits))


def test_codes_that_do_not_fit_are_refused():
    for codes, bits, text in [
        (np.int8([-9, 0]), 4, "-8 to 7 for 4 bits, got -9 to 0"),
        (np.uint8([4]), 2, "0 to 3 for 2 bits, got 4 to 4"),
        (np.uint8([[16]]), 4, "0 to 15 for 4 bits, got 16 to 16"),
    ]:
        with pytest.raises(ValueError, match=f"^codes: expected {text}$"):
            ops.pack(codes, bits)


def test_packing_round_trip_of_anything():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.data(), st.integers(2, 8), st.booleans(), st.sampled_from(_core.levels()))
    def round_trip(data, bits, signed, level):
        from zquant import cpu

        lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        codes = np.array(data.draw(st.lists(st.integers(lo, hi), max_size=300)), np.int8 if signed else np.uint8)
        with cpu.use(level):
            packed = ops.pack(codes, bits)
            assert packed.size == -(-codes.size * bits // 8)
            same(ops.unpack(packed, bits, codes.size, signed), codes)

    round_trip()


# ---- the boundary ----------------------------------------------------------------------------------------------

SCALE3, ZERO3 = np.float32([0.1, 0.2, 0.3]), np.int32([1, 2, 3])
FUNCTIONS = {
    "quantize_per_token symmetric": (lambda x: ops.quantize_per_token(x), np.float32, "x"),
    "quantize_per_token asymmetric": (lambda x: ops.quantize_per_token(x, False), np.float32, "x"),
    "quantize_linear": (lambda x: ops.quantize_linear(x, 0.1), np.float32, "x"),
    "quantize_linear per axis": (lambda x: ops.quantize_linear(x, SCALE3, axis=0), np.float32, "x"),
    "dynamic_quantize_linear": (ops.dynamic_quantize_linear, np.float32, "x"),
    "quantize_weight": (lambda x: ops.quantize_weight(x, 4, 2), np.float32, "w"),
    "quantize_weight_blocks": (lambda x: ops.quantize_weight_blocks(x, 3), np.float32, "w"),
    "dequantize_per_token": (lambda q: ops.dequantize_per_token(q, SCALE3, ZERO3), np.int8, "q"),
    "dequantize_linear": (lambda q: ops.dequantize_linear(q, 0.1), np.uint8, "q"),
    "dequantize_linear 16 bits": (lambda q: ops.dequantize_linear(q, 0.1), np.uint16, "q"),
    "dequantize_weight": (lambda q: ops.dequantize_weight(q, SCALE3), np.int8, "codes"),
    "pack": (lambda q: ops.pack(q, 7), np.int8, "codes"),
    "unpack": (lambda q: ops.unpack(q, 3, 13, True), np.uint8, "packed"),
    "minmax_rows": (_core.minmax_rows, np.float32, "x"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_that_lie_awkwardly_are_read_right(name, nasty_arrays):
    function, dtype, _ = FUNCTIONS[name]
    x = (normal(0, 3, 5) * np.float32(10)).clip(-60, 60).astype(dtype)
    want = function(x)
    for why, awkward in nasty_arrays(x).items():
        assert np.array_equal(awkward, x), why
        before = awkward.tobytes()
        same(function(awkward), want)
        assert awkward.tobytes() == before, f"{why}: the input was changed"


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bad", ["float64", "int32", "list", "None", "string"])
def test_other_types_are_refused_by_name(name, bad):
    function, _, argument = FUNCTIONS[name]
    x = {"float64": np.zeros((3, 5)), "int32": np.zeros((3, 5), np.int32), "list": [[0.0] * 5] * 3, "None": None, "string": "x"}
    with pytest.raises(TypeError, match=f"^{argument}: expected .*, got "):
        function(x[bad])


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda x: ops.quantize_per_token(x[0, 0]), TypeError, "x: expected a NumPy array of float32, got float32"),
        (lambda x: ops.quantize_per_token(np.array(1, np.float32)), ValueError, "x: expected at least 1 dimension, got 0"),
        (lambda x: ops.quantize_weight(x[0]), ValueError, "w: expected 2 dimensions, got 1"),
        (lambda x: ops.quantize_weight(x[None]), ValueError, "w: expected 2 dimensions, got 3"),
        (lambda x: ops.quantize_weight(x, 9), ValueError, "bits: expected 2 to 8, got 9"),
        (lambda x: ops.quantize_weight(x, 1), ValueError, "bits: expected 2 to 8, got 1"),
        (lambda x: ops.quantize_weight(x, 4, 0), ValueError, "group_size: expected at least 1, got 0"),
        (lambda x: ops.quantize_weight(x, 4, -3), ValueError, "group_size: expected at least 1, got -3"),
        (lambda x: ops.quantize_weight_blocks(x, 2), ValueError, "blocks: 2 blocks do not divide the 3 rows of w"),
        (lambda x: ops.quantize_weight_blocks(x, 0), ValueError, "blocks: expected at least 1, got 0"),
        (lambda x: ops.quantize_linear(x, 0.0), ValueError, "scale: expected finite positive values"),
        (lambda x: ops.quantize_linear(x, -1.0), ValueError, "scale: expected finite positive values"),
        (lambda x: ops.quantize_linear(x, np.nan), ValueError, "scale: expected finite positive values"),
        (lambda x: ops.quantize_linear(x, 1e39), ValueError, "scale: expected finite positive values"),
        (lambda x: ops.quantize_linear(x, SCALE3), ValueError, "scale: one value expected without an axis, got 3"),
        (lambda x: ops.quantize_linear(x, SCALE3, axis=1), ValueError, r"scale: expected shape \(5,\), got \(3,\)"),
        (lambda x: ops.quantize_linear(x, SCALE3, axis=2), ValueError, "axis: expected -2 to 1, got 2"),
        (lambda x: ops.quantize_linear(x, SCALE3.astype(float), axis=0), TypeError, "scale: expected .*float32, got float64"),
        (lambda x: ops.quantize_linear(x, SCALE3, axis=0, block_size=2),
         ValueError, "scale: blocks need an axis and a scale of 2"),
        (lambda x: ops.quantize_linear(x, 1.0, 128), ValueError, "zero_point: expected -128 to 127, got 128 to 128"),
        (lambda x: ops.quantize_linear(x, 1.0, 0.5), TypeError, "zero_point: expected integers, got float64"),
        (lambda x: ops.quantize_linear(x, 1.0, ZERO3), ValueError, r"zero_point: expected shape \(\), got \(3,\)"),
        (lambda x: ops.quantize_linear(x, 1.0, dtype="int3"), ValueError, "dtype: expected one of int2, .*, got int3"),
        (lambda x: ops.quantize_linear(x, 1.0, block_size=-1), ValueError, "block_size: expected at least 0, got -1"),
        (lambda x: ops.dequantize_per_token(x.astype(np.int8), SCALE3[:2]),
         ValueError, r"scale: expected shape \(3,\), got \(2,\)"),
        (lambda x: ops.dequantize_weight(x.astype(np.int8), SCALE3[:2]),
         ValueError, r"scales: expected shape \(3, 1\), got \(2, 1\)"),
        (lambda x: ops.dequantize_weight(x.astype(np.uint8), SCALE3), TypeError, "codes: expected int8, got uint8"),
        (lambda x: ops.pack(x.astype(np.int8), 9), ValueError, "bits: expected 2 to 8, got 9"),
        (lambda x: ops.pack(x.astype(np.int8)[None], 4), ValueError, "codes: expected 1 to 2 dimensions, got 3"),
        (lambda x: ops.unpack(x.astype(np.uint8), 4, 11, True), ValueError, r"packed: expected shape \(any, 6\), got \(3, 5\)"),
        (lambda x: ops.unpack(x.astype(np.uint8), 4, 8, True), ValueError, r"packed: expected shape \(any, 4\), got \(3, 5\)"),
        (lambda x: ops.unpack(x.astype(np.uint8), 4, -1, True), ValueError, "n: expected 0 to "),
        (lambda x: ops.unpack(x.astype(np.uint8), 4, 2**62, True), ValueError, "n: expected 0 to "),
        (lambda x: _core.quantize_tokens(x[0], 1, False), ValueError, "x: expected 2 dimensions, got 1"),
        (lambda x: _core.quantize_tokens(x, 3, False), ValueError, "mode: expected 1 to 2, got 3"),
        (lambda x: _core.quantize_tokens(x, 1), TypeError, "quantize_tokens: expected 3 arguments, got 2"),
        (lambda x: _core.quantize_static(x, SCALE3[:1], np.int32([9]), -8, 7, True),
         ValueError, "zero_point: expected -8 to 7, got 9"),
        (lambda x: _core.quantize_static(x, SCALE3[:1], np.int32([0]), 0, 256, False), ValueError, "qmax: expected 0 to 255"),
        (lambda x: _core.quantize_static(x, SCALE3, ZERO3, 0, 255, False),
         ValueError, r"scale: expected shape \(5,\), got \(3,\)"),
    ],
)
def test_refusals_say_what_and_why(call, error, text):
    with pytest.raises(error, match=f"^{text}"):
        call(normal(0, 3, 5))
