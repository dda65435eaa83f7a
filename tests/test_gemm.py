"""Linear layers and integer products: every kernel at every level against the layer below, bit for bit."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import zquant as zq
from zquant import _core, ops
from zquant.reference import gemm as reference

LEVELS = _core.levels()
SIZES = [(1, 1, 1), (2, 3, 5), (3, 31, 8), (5, 33, 17), (7, 64, 31), (11, 65, 64), (12, 32, 65), (13, 37, 127), (25, 96, 128),
         (37, 61, 193), (61, 128, 96), (131, 40, 72), (16, 48, 256), (17, 16, 320), (33, 80, 511), (64, 33, 640)]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]


@pytest.fixture(autouse=True)
def restore_threads():
    before = _core.threads()
    yield
    _core.set_threads(before)


def same_bits(a, b):
    """Equal to the last bit, NaN payloads and signed zeros included; tuples element by element."""
    if isinstance(a, tuple):
        return all(same_bits(x, y) for x, y in zip(a, b))
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@contextmanager
def as_on(choice):
    """AVX-512's groups in low tiles and memory fetched to L1, as on AMD's CPUs (0); tall ones and L2, as on Intel's (1)."""
    _core.use_cpu_choices(choice, choice)
    try:
        yield
    finally:
        _core.use_cpu_choices(-1, -1)


def everywhere(run):
    """run() at every level, with either maker's choices, with 1 and 2 threads; all must agree with ref on one thread. Returns
    that result."""
    want = None
    for level in LEVELS:
        for choice in (0, 1) if level != "ref" else (-1,):
            with zq.cpu.use(level), as_on(choice):
                for threads in (1, 2):
                    _core.set_threads(threads)
                    got = run()
                    want = got if want is None else want
                    assert same_bits(got, want), f"{level}, choice {choice}, {threads} threads"
    return want


def make(m, n, k, group=None, bits=8, seed=0):
    rng = np.random.default_rng(seed * 1000003 + m * 10007 + n * 101 + k)
    top = 2 ** (bits - 1) - 1
    groups = -(-k // group) if group else 1
    return {
        "q": rng.integers(0, 256, (m, k)).astype(np.uint8),
        "sx": (rng.random(m) + 0.1).astype(np.float32),
        "zx": rng.integers(0, 256, m).astype(np.int32),
        "codes": rng.integers(-top, top + 1, (n, k)).astype(np.int8),
        "scales": (rng.random((n, groups)) + 0.1).astype(np.float32),
        "bias": rng.standard_normal(n).astype(np.float32),
        "x": rng.standard_normal((m, k)).astype(np.float32),
        "w": rng.standard_normal((n, k)).astype(np.float32),
        "residual": rng.standard_normal((m, n)).astype(np.float32),
    }


# What the activations are off by themselves, absolute (tests/test_nn.py measures it).
OFF = {"gelu": 2.4e-6, "gelu_tanh": 1e-5}


def close(got, want, tolerance, activation=None):
    scale = max(1.0, float(np.abs(want).max(initial=0.0)))
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(got - want).max(initial=0.0) <= tolerance * scale + OFF.get(activation, 0.0)


def test_the_comparator_sees_a_planted_fault():
    a = np.zeros((3, 4), np.float32)
    b = a.copy()
    b[2, 3] = np.float32(1e-45)
    assert same_bits(a, a.copy()) and not same_bits(a, b)
    assert not same_bits(a, -a)
    with pytest.raises(AssertionError):
        results = iter([a, b])
        everywhere(lambda: next(results, b))


@pytest.mark.parametrize("m,n,k", SIZES)
def test_integer_product_is_exact(m, n, k):
    d = make(m, n, k)
    want = (d["q"].astype(np.int64) - d["zx"][:, None]) @ d["codes"].astype(np.int64).T
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], None)
    got = everywhere(lambda: _core.gemm_s32(d["q"], handle, d["zx"]))
    assert np.array_equal(got, want)


@pytest.mark.parametrize("k", [1, 31, 4096, 16384, 66000])
@pytest.mark.parametrize("a,w,zero", [(255, 127, 0), (255, -127, 0), (0, 127, 255), (255, 127, 255), (0, -127, 255)])
def test_extreme_codes_do_not_saturate_or_overflow(a, w, zero, k):
    q = np.full((3, k), a, np.uint8)
    codes = np.full((33, k), w, np.int8)
    handle = _core.linear_pack_s8(codes, np.ones(33, np.float32), None)
    got = everywhere(lambda: _core.gemm_s32(q, handle, np.full(3, zero, np.int32)))
    assert (got == (a - zero) * w * k).all()


@pytest.mark.parametrize("k", [8, 100, 1023, 1024, 1025, 5000])
def test_signs_and_extremes_in_every_combination(k):
    """Neighbours from {0, 127, 128, 129, 255} x {-127, -1, 0, 1, 127}: sums of two products reach both ends of int16."""
    rng = np.random.default_rng(k)
    q = rng.choice(np.array([0, 0, 127, 128, 129, 255], np.uint8), (7, k))
    codes = rng.choice(np.array([-127, -127, -1, 0, 1, 127, 127], np.int8), (35, k))
    zero = rng.integers(0, 256, 7).astype(np.int32)
    handle = _core.linear_pack_s8(codes, np.ones(35, np.float32), None)
    got = everywhere(lambda: _core.gemm_s32(q, handle, zero))
    assert np.array_equal(got, (q.astype(np.int64) - zero[:, None]) @ codes.astype(np.int64).T)


def test_int8_activations_are_shifted_by_128():
    rng = np.random.default_rng(5)
    a = rng.integers(-128, 128, (9, 77)).astype(np.int8)
    d = make(9, 40, 77)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], None)
    got = everywhere(lambda: _core.gemm_s32(a, handle, None))
    assert np.array_equal(got, a.astype(np.int64) @ d["codes"].astype(np.int64).T)


@pytest.mark.parametrize("m,n,k", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_w8a8_from_codes(m, n, k, activation):
    d = make(m, n, k)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], d["bias"])
    act = ops.ACTIVATIONS[activation]
    x = (d["q"], d["sx"], d["zx"])
    got = everywhere(lambda: _core.linear_forward(handle, x, 0, act, d["residual"], 0))
    want = reference.linear_w8a8(*x, d["codes"], d["scales"][:, 0], d["bias"], activation, d["residual"])
    close(got, want, 4e-6, activation)


@pytest.mark.parametrize("m,n,k", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [8, 32, 64, 128, 1000])
def test_groups_from_codes(m, n, k, bits, group):
    d = make(m, n, k, min(group, k), bits)
    handle = _core.linear_pack_group(d["codes"], d["scales"], group, bits, d["bias"]) if group % 8 == 0 or group >= k else None
    if d["scales"].shape[1] != -(-k // group):
        pytest.fail("test is wrong about the number of groups")
    x = (d["q"], d["sx"], d["zx"])
    got = everywhere(lambda: _core.linear_forward(handle, x, 0, 0, None, 0))
    want = reference.linear_grouped(*x, d["codes"], d["scales"], group, d["bias"])
    close(got, want, 4e-6)


@pytest.mark.parametrize("m", [24, 25, 31, 96, 97, 131, 200])
@pytest.mark.parametrize("group", [8, 40, 136, 1000])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_in_tiles_of_many_rows(m, bits, group):
    """Level avx2 unpacks codes of four bits once for up to 96 rows, 128 features at a time: heights on both sides of its
    limits, groups of one part and of several, rows in pairs, and what the epilogue adds."""
    n, k = 49, 300
    d = make(m, n, k, min(group, k), bits)
    handle = _core.linear_pack_group(d["codes"], d["scales"], group, bits, d["bias"])
    x = (d["q"], d["sx"], d["zx"])
    got = everywhere(lambda: _core.linear_forward(handle, x, 0, 0, None, 0))
    close(got, reference.linear_grouped(*x, d["codes"], d["scales"], group, d["bias"]), 4e-6)
    got = everywhere(lambda: _core.linear_forward(handle, x, 0, ops.ACTIVATIONS["relu"], d["residual"], 0))
    close(got, reference.linear_grouped(*x, d["codes"], d["scales"], group, d["bias"], "relu", d["residual"]), 4e-6)
    everywhere(lambda: _core.linear_forward(handle, d["x"], 3, ops.ACTIVATIONS["gelu"], d["residual"], 0))


@pytest.mark.skipif("avx512vnni" not in LEVELS, reason="the tiles to choose from are AVX-512's")
def test_what_is_chosen_by_the_maker_of_the_cpu():
    """Tall tiles and L2 on Intel; the comparisons above are of both."""
    own = (12, 1) if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else (4, 0)
    with zq.cpu.use("avx512vnni"):
        assert [_core.use_cpu_choices(*c) for c in ((1, 0), (0, 1), (-1, -1))] == [(12, 0), (4, 1), own]
        with pytest.raises(ValueError, match="tall_groups"):
            _core.use_cpu_choices(2, 0)
        with pytest.raises(TypeError, match="fetch_to_l2"):
            _core.use_cpu_choices(0, "L2")


def int16_layers(d, n, k, group):
    """Packed weights of every integer kind with the (n, k) float64 values that they stand for."""
    columns = np.arange(k) // min(group, k)
    nibbles = np.clip(d["codes"], -8, 7)
    for codes, scales, handle in (
        (d["codes"], d["scales"][:, :1], _core.linear_pack_s8(d["codes"], np.ascontiguousarray(d["scales"][:, 0]), d["bias"])),
        (d["codes"], d["scales"], _core.linear_pack_group(d["codes"], d["scales"], group, 8, d["bias"])),
        (nibbles, d["scales"], _core.linear_pack_group(nibbles, d["scales"], group, 4, d["bias"])),
    ):
        spread = scales[:, columns] if scales.shape[1] > 1 else scales
        yield handle, codes.astype(np.float64) * spread


@pytest.mark.parametrize("m,n,k", [*SIZES, (1, 33, 4096), (2, 40, 200), (4, 65, 129), (16, 70, 64)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_int16_activations(m, n, k, activation):
    """Against float64 of the same int16 codes, and of the float rows themselves."""
    d = make(m, n, k, 32)
    act = ops.ACTIVATIONS[activation]
    q, scale = reference.quantize_int16(d["x"])
    for handle, w in int16_layers(d, n, k, 32 if k > 32 else max(k, 8)):
        got = everywhere(lambda: _core.linear_forward(handle, d["x"], 3, act, d["residual"], 0))
        x = q * scale.astype(np.float64)[:, None]
        want = reference.activate(x @ w.T + d["bias"], activation) + d["residual"]
        size = np.abs(x) @ np.abs(w).T + np.abs(d["bias"]) + np.abs(d["residual"])  # what cancellation leaves of
        assert (np.abs(got - want) <= 1e-6 * size + 1e-6).all()
        if activation is None:
            exact = d["x"].astype(np.float64) @ w.T + d["bias"] + d["residual"]
            half_steps = 0.51 * scale[:, None] * np.abs(w).sum(1)
            assert (np.abs(got - exact) <= half_steps + 1e-6 * size + 1e-6).all()


@pytest.mark.parametrize("quant_out", [1, 2])
def test_int16_activations_with_requantized_outputs(quant_out):
    for m, n, k in ((1, 40, 64), (5, 33, 40), (23, 96, 128), (64, 48, 72)):
        d = make(m, n, k, 8)
        for handle, _ in int16_layers(d, n, k, 8):
            fused = everywhere(lambda: _core.linear_forward(handle, d["x"], 3, 2, d["residual"], quant_out))
            y = _core.linear_forward(handle, d["x"], 3, 2, d["residual"], 0)
            assert same_bits(fused, _core.quantize_tokens(y, quant_out, True))


def test_int16_rows_of_zeros_of_tiny_and_of_huge_values():
    d = make(4, 33, 40)
    x = np.zeros((6, 40), np.float32)
    x[1], x[2, 3], x[3] = 1e-38, 1e-45, 3e33
    x[4, 0], x[5] = -1e36, np.float32(32767) * np.arange(-20, 20) / 20
    codes, scale = d["codes"], np.full(33, 1e-6, np.float32)
    handle = _core.linear_pack_s8(codes, scale, None)
    got = everywhere(lambda: _core.linear_forward(handle, x, 3, 0, None, 0))
    assert np.isfinite(got).all() and not got[:3].any()
    q, s = reference.quantize_int16(x)
    want = (q.astype(np.int64) @ codes.astype(np.int64).T) * s.astype(np.float64)[:, None] * scale
    assert (np.abs(got - want) <= 1e-6 * np.abs(q * s.astype(np.float64)[:, None]).sum(1, keepdims=True) * 127e-6).all()


@pytest.mark.parametrize("k", [4096, 66000])
def test_int16_sums_are_exact_at_the_largest_codes(k):
    """All codes at their ends: the sums of the high and the low bytes stay inside int32."""
    for bits, top in ((8, 127), (4, -8)):
        codes = np.full((3, k), top, np.int8)
        handle = _core.linear_pack_group(codes, np.ones((3, 1), np.float32), k, bits, None)
        for value in (32767.0, -32767.0):
            x = np.full((2, k), value, np.float32)
            got = everywhere(lambda: _core.linear_forward(handle, x, 3, 0, None, 0))
            assert np.abs(got / (value * top * k) - 1).max() < 1e-6


@pytest.mark.parametrize("axis,size", [(axis, size) for axis in "mnk" for size in (*range(1, 36), 63, 65, 97, 131)])
def test_int16_at_every_size(axis, size, guarded):
    shape = {"m": 3, "n": 17, "k": 21, axis: size}
    d = {name: guarded(a) for name, a in make(shape["m"], shape["n"], shape["k"], 8).items()}
    for handle, _ in int16_layers(d, shape["n"], shape["k"], 8):
        everywhere(lambda: _core.linear_forward(handle, d["x"], 3, 1, d["residual"], 0))


def test_int16_by_name_and_in_every_batch():
    d = make(70, 96, 128, 32)
    for bits in (4, 8):
        codes = np.clip(d["codes"], -7, 7)
        whole = ops.linear_grouped(d["x"], codes, d["scales"], 32, bits, d["bias"], "silu", activations="int16")
        for lo, hi in ((0, 1), (1, 3), (8, 24), (69, 70)):
            part = ops.linear_grouped(d["x"][lo:hi].copy(), codes, d["scales"], 32, bits, d["bias"], "silu",
                                      activations="int16")
            assert same_bits(part, whole[lo:hi].copy())
    scale = np.ascontiguousarray(d["scales"][:, 0])
    y = ops.linear_w8a8(d["x"], d["codes"], scale, d["bias"], activations="int16")
    want = reference.linear(d["x"], d["codes"] * scale[:, None], d["bias"])
    close(y, want, 1e-4)
    worse = ops.linear_w8a8(d["x"], d["codes"], scale, d["bias"])
    assert np.abs(y - want).max() < 0.02 * np.abs(worse - want).max()


def test_int4_takes_minus_eight_and_extreme_activations():
    k = 4096
    codes = np.full((5, k), -8, np.int8)
    handle = _core.linear_pack_group(codes, np.ones((5, 1), np.float32), k, 4, None)
    for a, zero in ((255, 0), (0, 255), (255, 255)):
        x = (np.full((7, k), a, np.uint8), np.ones(7, np.float32), np.full(7, zero, np.int32))
        got = everywhere(lambda: _core.linear_forward(handle, x, 0, 0, None, 0))
        assert (got == (a - zero) * -8 * k).all()


@pytest.mark.parametrize("m,n,k", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32(m, n, k, activation):
    d = make(m, n, k)
    got = everywhere(lambda: ops.linear(d["x"], d["w"], d["bias"], activation, d["residual"]))
    close(got, reference.linear(d["x"], d["w"], d["bias"], activation, d["residual"]), 2e-6, activation)


@pytest.mark.parametrize("m,n,k", SIZES)
@pytest.mark.parametrize("mode", [1, 2])
def test_float_rows_are_quantized_on_the_way_in_and_out(m, n, k, mode):
    """Fused quantization gives the bits of the separate steps."""
    d = make(m, n, k)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], d["bias"])
    fused = everywhere(lambda: _core.linear_forward(handle, d["x"], mode, 2, d["residual"], mode))
    codes = _core.quantize_tokens(d["x"], mode, True)
    y = _core.linear_forward(handle, codes, 0, 2, d["residual"], 0)
    assert same_bits(fused, _core.quantize_tokens(y, mode, True))


@pytest.mark.parametrize("m,n,k", SIZES)
def test_outputs_on_a_static_grid(m, n, k):
    """Per tensor and per feature: the bits of QuantizeLinear applied to the float output."""
    d = make(m, n, k)
    rng = np.random.default_rng(n)
    y = ops.linear_w8a8(d["x"], d["codes"], d["scales"][:, 0], d["bias"], "silu")
    for scale, zero in ((np.float32(0.7), np.int32(100)),
                        ((rng.random(n) * 3 + 0.1).astype(np.float32), rng.integers(0, 256, n).astype(np.int32))):
        got = everywhere(lambda: ops.linear_w8a8(d["x"], d["codes"], d["scales"][:, 0], d["bias"], "silu",
                                                 quantize=(scale, zero)))
        want = np.clip(np.rint(y / scale) + zero, 0, 255).astype(np.uint8)
        assert got.dtype == np.uint8 and np.array_equal(got, want)


def test_requantized_outputs_by_name():
    d = make(5, 33, 40)
    y = ops.linear(d["x"], d["w"], d["bias"])
    q, scale, zero = ops.linear(d["x"], d["w"], d["bias"], quantize="symmetric")
    assert q.dtype == np.int8 and zero is None
    assert np.abs(q * scale[:, None] - y).max() <= scale.max() * 0.5001
    q, scale, zero = ops.linear(d["x"], d["w"], d["bias"], quantize="asymmetric")
    assert q.dtype == np.uint8
    assert np.abs((q.astype(np.int32) - zero[:, None]) * scale[:, None] - y).max() <= scale.max() * 0.5001
    for bad in ("int8", (np.float32(0), 0), (np.float32(1), 256), (np.ones(3, np.float32), np.zeros(3)),
                (np.float32(np.nan), 0)):
        with pytest.raises(ValueError, match="quantize|scale"):
            ops.linear(d["x"], d["w"], quantize=bad)


def test_rows_do_not_depend_on_the_batch():
    d = make(300, 96, 200)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], d["bias"])
    grouped = _core.linear_pack_group(d["codes"], np.ones((96, 4), np.float32), 56, 8, None)
    dense = _core.linear_pack_f32(d["w"], d["bias"])
    for run in (lambda x: _core.linear_forward(handle, x, 2, 2, None, 0),
                lambda x: _core.linear_forward(grouped, x, 1, 0, None, 0),
                lambda x: _core.linear_forward(handle, x, 3, 2, None, 0),
                lambda x: _core.linear_forward(grouped, x, 3, 0, None, 0),
                lambda x: _core.linear_forward(dense, x, 0, 3, None, 0)):
        whole = run(d["x"])
        for lo, hi in ((0, 1), (3, 8), (100, 141), (299, 300)):
            assert same_bits(run(d["x"][lo:hi].copy()), whole[lo:hi].copy())


@pytest.mark.parametrize("kind", ["s8", "s8 group", "s4 group", "f32"])
def test_weights_beyond_the_second_level_cache(kind):
    """More than 1 MiB of weights: prefetching tiles, runs of panels, every schedule; odd n, k and last groups."""
    n, k = (1037, 2061) if kind != "f32" else (517, 523)
    d = make(17, n, k, 64, 4 if kind == "s4 group" else 8)
    pack = {"s8": lambda: _core.linear_pack_s8(d["codes"], np.ascontiguousarray(d["scales"][:, 0]), d["bias"]),
            "s8 group": lambda: _core.linear_pack_group(d["codes"], d["scales"], 64, 8, d["bias"]),
            "s4 group": lambda: _core.linear_pack_group(d["codes"], d["scales"], 64, 4, d["bias"]),
            "f32": lambda: _core.linear_pack_f32(d["w"], d["bias"])}[kind]
    handle = pack()
    assert _core.linear_bytes(handle) > 1 << 20
    for quant in (2, 3) if kind != "f32" else (0,):
        new = pack()  # the first product reads its weights from memory, for all it knows
        first, again = (_core.linear_forward(new, d["x"], quant, 2, d["residual"], 0) for _ in range(2))
        assert same_bits(first, again)
        whole = everywhere(lambda: _core.linear_forward(handle, d["x"], quant, 2, d["residual"], 0))
        for level in LEVELS[1:]:
            with zq.cpu.use(level):
                for threads, m in ((t, m) for t in (1, 2, 3) for m in range(1, 17)):
                    _core.set_threads(threads)
                    part = _core.linear_forward(handle, d["x"][:m].copy(), quant, 2, d["residual"][:m].copy(), 0)
                    assert same_bits(part, whole[:m].copy()), f"{level}, {threads} threads, {m} rows"


@pytest.mark.parametrize("m", [31, 32, 33, 100, 256, 257])
def test_new_weights_with_any_number_of_rows(m):
    """Weights that no cache can have yet are read once by all threads together up to some number of rows, which the level says,
    and by every thread beyond it; codes in, floats in, codes out."""
    d = make(m, 300, 520, group=64, seed=3)
    x = (d["q"], d["sx"], d["zx"])
    floats = [(d["x"], 2, quant_out) for quant_out in (0, 2)]
    for pack, calls in ((lambda: _core.linear_pack_s8(d["codes"], d["scales"][:, 0].copy(), d["bias"]), [(x, 0, 0), *floats]),
                        (lambda: _core.linear_pack_group(d["codes"], d["scales"], 64, 8, d["bias"]), [(x, 0, 0), *floats]),
                        (lambda: _core.linear_pack_f32(d["w"], d["bias"]), floats)):
        assert _core.linear_bytes(pack()) > 64 << 10
        for rows, quant_in, quant_out in calls:
            everywhere(lambda pack=pack, rows=rows, quant_in=quant_in, quant_out=quant_out: _core.linear_forward(
                pack(), rows, quant_in, 2, d["residual"], quant_out))


@pytest.mark.parametrize("m,n,k", [(60, 300, 2561), (64, 33, 3072), (171, 40, 3100), (97, 257, 4099)])
@pytest.mark.parametrize("activation,quant_out", [(None, 0), ("gelu", 0), (None, 2)])
def test_long_float_rows_in_blocks_of_input_features(m, n, k, activation, quant_out):
    """More of them than L2 keeps go block by block, and have the bits of rows that come alone and go in one piece. Two to seven
    blocks, panels on both sides of the eight that meet one, last panels of 1, 8 and 12 columns."""
    d = make(m, n, k)
    assert m * k * 4 > 512 * 1024, "these rows fit into L2: no blocks"
    handle, act = _core.linear_pack_f32(d["w"], d["bias"]), ops.ACTIVATIONS[activation]
    residual = None if quant_out else d["residual"]

    def rows(a, b):
        y = _core.linear_forward(handle, d["x"][a:b], 0, act, None if residual is None else residual[a:b], quant_out)
        return y if quant_out else (y,)

    whole = everywhere(lambda: rows(0, m))
    for i in (0, 1, 11, 12, m // 2, m - 2, m - 1):
        assert same_bits(rows(i, i + 1), tuple(part[i:i + 1].copy() for part in whole)), f"row {i}"
    if not quant_out:
        close(whole[0], reference.linear(d["x"], d["w"], d["bias"], activation, residual), 4e-6, activation)


@pytest.mark.parametrize("kind", ["s8", "f32"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_outputs_beyond_the_caches(kind, with_residual):
    """From 6 MiB on, whole lines of outputs are not left in the caches."""
    d = make(800, 2048, 5)
    x, residual = (d["q"], d["sx"], d["zx"]), d["residual"] if with_residual else None
    if kind == "f32":
        got = everywhere(lambda: ops.linear(d["x"], d["w"], d["bias"], None, residual))
        want = reference.linear(d["x"], d["w"], d["bias"], None, residual)
    else:
        handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], d["bias"])
        got = everywhere(lambda: _core.linear_forward(handle, x, 0, 0, residual, 0))
        want = reference.linear_w8a8(*x, d["codes"], d["scales"][:, 0], d["bias"], None, residual)
    assert got.nbytes >= 6 << 20
    close(got, want, 4e-6)


def test_no_rows():
    d = make(1, 40, 24)
    for handle, quant in ((_core.linear_pack_f32(d["w"], None), 0),
                          (_core.linear_pack_s8(d["codes"], d["scales"][:, 0], None), 2)):
        assert _core.linear_forward(handle, np.zeros((0, 24), np.float32), quant, 0, None, 0).shape == (0, 40)
        q, scale, zero = _core.linear_forward(handle, np.zeros((0, 24), np.float32), quant, 0, None, 1)
        assert q.shape == (0, 40) and scale.shape == zero.shape == (0,)


def test_strided_unaligned_and_swapped_inputs():
    d = make(9, 33, 40)
    want = ops.linear(d["x"], d["w"], d["bias"])
    wide = np.zeros((9, 80), np.float32)
    wide[:, ::2] = d["x"]
    raw = np.zeros(d["x"].nbytes + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(d["x"].shape)
    unaligned[:] = d["x"]
    frozen = d["x"].copy()
    frozen.flags.writeable = False
    record = np.zeros((9, 40), np.dtype([("pad", "u1"), ("v", "<f4")]))
    record["v"] = d["x"]
    for x in (wide[:, ::2], np.asfortranarray(d["x"]), unaligned, d["x"].astype(">f4"), frozen, record["v"]):
        assert same_bits(ops.linear(x, d["w"], d["bias"]), want)
        assert same_bits(ops.linear_w8a8(x, d["codes"], d["scales"][:, 0]),
                         ops.linear_w8a8(d["x"], d["codes"], d["scales"][:, 0]))
    q = np.zeros((9, 100), np.uint8)[:, 5:45]
    q[:] = d["q"]
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], None)
    x = (d["q"], d["sx"], d["zx"])
    assert same_bits(_core.linear_forward(handle, (q, *x[1:]), 0, 0, None, 0), _core.linear_forward(handle, x, 0, 0, None, 0))


def run_all(d, group=None):
    """Every kind of linear layer once, on codes and on float rows."""
    x = (d["q"], d["sx"], d["zx"])
    s8 = _core.linear_pack_s8(d["codes"], np.ascontiguousarray(d["scales"][:, 0]), d["bias"])
    s4 = _core.linear_pack_group(np.clip(d["codes"], -8, 7), d["scales"], group or max(d["x"].shape[1], 8), 4, d["bias"])
    f32 = _core.linear_pack_f32(d["w"], d["bias"])
    return (_core.linear_forward(s8, x, 0, 2, d["residual"], 0), _core.gemm_s32(d["q"], s8, d["zx"]),
            _core.linear_forward(s4, x, 0, 1, d["residual"], 2), _core.linear_forward(s8, d["x"], 2, 4, None, 1),
            _core.linear_forward(f32, d["x"], 0, 3, d["residual"], 0))


@pytest.mark.parametrize("size", [*range(1, 66), 67, 97, 131, 257])
@pytest.mark.parametrize("axis", ["m", "n", "k"])
def test_every_size(axis, size):
    shape = {"m": 3, "n": 17, "k": 21, axis: size}
    everywhere(lambda d=make(shape["m"], shape["n"], shape["k"]): run_all(d))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 48, 49])
def test_every_tile_height_with_last_panels_of_every_kind(n, guarded):
    """At most 16 columns, more, all 32: stored from the registers, or after the activation; an odd and an even number of
    steps over k. The exact product by NumPy is the truth, the levels agree on the rest."""
    for k in (20, 24):
        d = {name: guarded(a) for name, a in make(26, n, k).items()}
        handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0].copy(), d["bias"])
        for m in range(1, 27):
            x = (d["q"][:m].copy(), d["sx"][:m].copy(), d["zx"][:m].copy())
            for act, residual in ((0, None), (1, d["residual"][:m].copy())):
                got = everywhere(lambda x=x, act=act, residual=residual: _core.linear_forward(handle, x, 0, act, residual, 0))
                real = (x[0].astype(np.float64) - x[2][:, None]) * x[1][:, None]
                want = real @ (d["codes"] * d["scales"][:, :1].astype(np.float64)).T + d["bias"]
                want = want if residual is None else np.maximum(want, 0) + residual
                assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("m,n,k", SIZES)
def test_nothing_is_read_or_written_outside(m, n, k, guarded):
    """All operands end at a page that cannot be read."""
    d = make(m, n, k)
    want = run_all(d)
    flush = {name: guarded(a) for name, a in d.items()}
    assert same_bits(everywhere(lambda: run_all(flush)), want)


def test_inputs_may_overlap_one_another():
    d = make(6, 32, 32)
    square = np.ascontiguousarray(d["x"][:, :32])
    want = ops.linear(square.copy(), d["w"], residual=square.copy())
    assert same_bits(ops.linear(square, d["w"], residual=square), want)
    one_row = np.broadcast_to(square[:1], (6, 32))  # rows at a distance of 0
    assert same_bits(ops.linear(one_row, d["w"]), ops.linear(one_row.copy(), d["w"]))
    windows = np.lib.stride_tricks.as_strided(square.ravel(), (6, 32), (4, 4))  # rows that share 31 elements
    for call in (lambda x: ops.linear(x, d["w"]), lambda x: ops.linear_w8a8(x, d["codes"], d["scales"][:, 0].copy())):
        assert same_bits(call(windows), call(windows.copy()))


def test_codes_of_somebody_else():
    """Only rows over the core's own memory are known to be readable behind their end; all others are copied."""
    d = make(6, 32, 72)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0].copy(), None)
    q, scale, zero = _core.quantize_tokens(d["x"], 2, True)
    want = _core.linear_forward(handle, (q, scale, zero), 0, 0, None, 0)
    shared = np.from_dlpack(q)  # the same memory, which a capsule of NumPy's owns
    assert type(shared.base).__name__ == "PyCapsule" and shared.strides == q.strides
    for other in (shared, q[:], q.copy()):
        assert same_bits(_core.linear_forward(handle, (other, scale, zero), 0, 0, None, 0), want)


def test_inputs_are_not_modified_and_outputs_do_not_alias():
    d = make(30, 40, 50)
    before = {name: a.copy() for name, a in d.items()}
    y = ops.linear_w8a8(d["x"], d["codes"], d["scales"][:, 0], d["bias"], "gelu", d["residual"])
    assert all(same_bits(d[name], before[name]) for name in d)
    assert not any(np.shares_memory(y, a) for a in d.values())


def test_bad_arguments_are_named():
    d = make(4, 6, 16)
    scale = d["scales"][:, 0]
    cases = [
        (TypeError, "x: expected float32, got float64", lambda: ops.linear(d["x"].astype(np.float64), d["w"])),
        (TypeError, "x: expected a NumPy array, got list", lambda: ops.linear([[1.0]], d["w"])),
        (TypeError, "w: expected float32, got float16", lambda: ops.linear(d["x"], d["w"].astype(np.float16))),
        (ValueError, r"w: expected 2 dimensions, got 1", lambda: ops.linear(d["x"], d["w"][0])),
        (ValueError, "x: expected 16 features, got 15", lambda: ops.linear(d["x"][:, :15], d["w"])),
        (ValueError, r"bias: expected shape \(6,\), got \(5,\)", lambda: ops.linear(d["x"], d["w"], d["bias"][:5])),
        (ValueError, r"residual: expected shape \(4, 6\), got \(3, 6\)",
         lambda: ops.linear(d["x"], d["w"], residual=d["residual"][:3])),
        (ValueError, "activation: expected one of", lambda: ops.linear(d["x"], d["w"], activation="swish")),
        (ValueError, r"scale: expected shape \(6,\)", lambda: ops.linear_w8a8(d["x"], d["codes"], scale[:4])),
        (ValueError, "codes: -128 is not allowed", lambda: ops.linear_w8a8(d["x"], np.full((6, 16), -128, np.int8), scale)),
        (ValueError, "activations: expected", lambda: ops.linear_w8a8(d["x"], d["codes"], scale, activations="int8")),
        (ValueError, "group: expected a multiple of 8", lambda: ops.linear_grouped(d["x"], d["codes"], d["scales"], 12, 8)),
        (ValueError, "group: expected at least 1, got 0", lambda: ops.linear_grouped(d["x"], d["codes"], d["scales"], 0, 8)),
        (ValueError, "bits: expected 4 or 8, got 5", lambda: ops.linear_grouped(d["x"], d["codes"], d["scales"], 16, 5)),
        (ValueError, "codes: outside -8..7",
         lambda: ops.linear_grouped(d["x"], np.full((6, 16), 8, np.int8), d["scales"], 16, 4)),
        (ValueError, "codes: 66001 input features", lambda: ops.linear_w8a8(
            np.zeros((1, 66001), np.float32), np.zeros((1, 66001), np.int8), np.ones(1, np.float32))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("residual", [False, True])
def test_large_outputs_behind_an_activation_have_the_bits_of_small_ones(isa, residual):
    if isa == "ref":
        pytest.skip("streaming stores are of the vector levels")
    rng = np.random.default_rng(3)
    m, n, k = 1024, 1600, 16  # 6.5 MB of float32 come out
    handle = _core.linear_pack_s8(rng.integers(-127, 128, (n, k), np.int8), np.full(n, 1e-2, np.float32), None)
    x, added = rng.standard_normal((m, k), np.float32), rng.standard_normal((m, n), np.float32) if residual else None

    def rows(a, b):
        return _core.linear_forward(handle, x[a:b], 2, 2, added[a:b] if residual else None, 0)

    assert np.array_equal(rows(0, m), np.concatenate([rows(0, m // 2), rows(m // 2, m)]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 30])
def test_groups_of_no_input_features(m, bits):
    """Nothing times nothing is the bias, with groups as without."""
    bias = np.arange(3, dtype=np.float32)
    handle = _core.linear_pack_group(np.zeros((3, 0), np.int8), np.zeros((3, 0), np.float32), 8, bits, bias)
    got = everywhere(lambda: _core.linear_forward(handle, np.zeros((m, 0), np.float32), 2, 0, None, 0))
    assert np.array_equal(got, np.broadcast_to(bias, (m, 3)))


@pytest.mark.parametrize("quantize", ["symmetric", "asymmetric"])
def test_codes_of_no_output_channels_have_the_scale_of_zeros(quantize):
    codes, scale = np.zeros((0, 8), np.int8), np.zeros(0, np.float32)
    q, scales, zeros = ops.linear_w8a8(np.ones((4, 8), np.float32), codes, scale, quantize=quantize)
    assert q.shape == (4, 0) and scales.tolist() == [1.0] * 4
    assert zeros is None if quantize == "symmetric" else zeros.tolist() == [0] * 4


@pytest.mark.parametrize("m", [3, 70])
def test_nothing_that_is_not_finite_becomes_static_codes(m):
    """NaN of a float32 weight's input, and of a residual: an error as with codes per token, not code 0."""
    d = make(m, 40, 16)
    x = d["x"].copy()
    x[2, 1] = np.nan
    residual = d["residual"].copy()
    residual[1, 39] = -np.inf
    plain, packed = _core.linear_pack_f32(d["w"], None), _core.linear_pack_s8(d["codes"], d["scales"][:, 0].copy(), None)
    for scale, zero in ((np.float32([0.1]), np.int32([7])), (np.full(40, 0.1, np.float32), np.full(40, 7, np.int32))):
        for level in LEVELS:
            with zq.cpu.use(level):
                with pytest.raises(ValueError, match="NaN or Inf in row 2"):
                    _core.linear_forward(plain, x, 0, 0, None, (scale, zero))
                with pytest.raises(ValueError, match="residual: NaN or Inf in row 1"):
                    _core.linear_forward(packed, d["x"], 2, 0, residual, (scale, zero))


def test_zero_points_are_codes():
    handle = _core.linear_pack_s8(np.ones((1, 1), np.int8), np.ones(1, np.float32), None)
    for dtype, low, high in ((np.uint8, 0, 255), (np.int8, -128, 127)):
        a = np.ones((2, 1), dtype)
        for zero in (low, high):
            assert _core.gemm_s32(a, handle, np.int32([0, zero])).tolist() == [[1], [1 - zero]]
        for zero in (low - 1, high + 1, 2**31 - 1, -(2**31)):
            with pytest.raises(ValueError, match=f"zero: expected {low} to {high}, got {zero} in row 1"):
                _core.gemm_s32(a, handle, np.int32([0, zero]))


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")
def test_workers_leave_signals_to_the_program():
    """Blocked in the main thread after the pool has started, a signal waits there; no worker takes it."""
    code = ("import os, signal, numpy as np\nfrom zquant import _core\n_core.set_threads(2)\n"
            "w = _core.linear_pack_f32(np.ones((512, 512), np.float32), None)\n"
            "_core.linear_forward(w, np.ones((512, 512), np.float32), 0, 0, None, 0)\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\nos.kill(os.getpid(), signal.SIGUSR1)\n"
            "assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, timeout=60)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_with_the_row(bad):
    d = make(40, 6, 16)
    x = d["x"].copy()
    x[31, 7] = bad
    w = d["w"].copy()
    w[4, 2] = bad
    scale = d["scales"][:, 0].copy()
    for call in (lambda: ops.linear(x, d["w"]), lambda: ops.linear_w8a8(x, d["codes"], scale)):
        with pytest.raises(ValueError, match="x: NaN or Inf in row 31"):
            call()
    handle = _core.linear_pack_s8(d["codes"], scale, None)
    for threads in (1, 2):
        _core.set_threads(threads)
        with pytest.raises(ValueError, match="x: NaN or Inf in row 31"):
            _core.linear_forward(handle, x, 2, 0, None, 0)
        with pytest.raises(ValueError, match="x: NaN or Inf in row 31"):
            _core.linear_forward(handle, x, 3, 0, None, 0)
    with pytest.raises(ValueError, match="w: NaN or Inf in row 4"):
        ops.linear(d["x"], w)
    scale[3] = bad
    with pytest.raises(ValueError, match="scale: NaN or Inf"):
        ops.linear_w8a8(d["x"], d["codes"], scale)


@pytest.mark.parametrize("quant_in", range(1, 7))
def test_float_weights_multiply_float_rows_whatever_quant_in_says(quant_in):
    d = make(5, 70, 96)
    handle = _core.linear_pack_f32(d["w"], None)
    want = _core.linear_forward(handle, d["x"], 0, 0, None, 0)
    assert same_bits(everywhere(lambda: _core.linear_forward(handle, d["x"], quant_in, 0, None, 0)), want)


def test_outputs_that_cannot_be_quantized_say_why():
    d = make(5, 6, 16)
    handle = _core.linear_pack_f32(d["w"], None)
    x, residual = d["x"].copy(), d["residual"].copy()
    x[3] = 3e38 * np.sign(d["w"][0])
    with pytest.raises(ValueError, match="x: finite, but the result overflows float32 in row 3"):
        _core.linear_forward(handle, x, 0, 0, None, 1)
    residual[2, 1] = np.nan
    with pytest.raises(ValueError, match="residual: NaN or Inf in row 2"):
        _core.linear_forward(handle, d["x"], 0, 0, residual, 1)


def test_private_functions_survive_nonsense():
    d = make(4, 6, 16)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], None)
    nonsense = [None, 4, "x", (), (1, 2, 3), (d["q"],), (d["q"], d["sx"], None), (d["q"], d["sx"][:2], d["zx"]), object(),
                d["q"], (d["q"], d["sx"], d["zx"] + 300), np.zeros((2, 2, 2), np.float32)]
    for value in nonsense:
        with pytest.raises((TypeError, ValueError)):
            _core.linear_forward(handle, value, 0, 0, None, 0)
        with pytest.raises((TypeError, ValueError)):
            _core.linear_forward(value, d["x"], 2, 0, None, 0)
        with pytest.raises((TypeError, ValueError)):
            _core.linear_forward(handle, d["x"], value, 0, None, 0)
    with pytest.raises(TypeError, match="linear_forward: expected 6 arguments, got 2"):
        _core.linear_forward(handle, d["x"])
    with pytest.raises(ValueError, match="quant_in"):
        _core.linear_forward(handle, d["x"], 0, 0, None, 0)
    with pytest.raises(TypeError, match="float32 weights take float32 rows"):
        _core.linear_forward(_core.linear_pack_f32(d["w"], None), (d["q"], d["sx"], d["zx"]), 0, 0, None, 0)


def test_many_python_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    d = make(200, 96, 128)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], d["bias"])
    want = _core.linear_forward(handle, d["x"], 2, 2, None, 0)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: _core.linear_forward(handle, d["x"], 2, 2, None, 0), range(64)):
            assert same_bits(got, want)


@pytest.mark.parametrize("threads", [2, 3, 7, 40])
@pytest.mark.parametrize("kind", ["codes", "rows", "int8-out", "g32"])
def test_shares_of_panels(kind, threads):
    """Few rows, panels in numbers that threads do not divide: more threads than panels, small jobs or none, rows that each
    thread prepares for itself or all of them together."""
    for m, n, k in [(1, 33, 64), (8, 33, 64), (3, 224, 320), (8, 1000, 1024), (9, 480, 4096)]:
        d = make(m, n, k, group=32 if kind == "g32" else None)
        if kind == "g32":
            handle = _core.linear_pack_group(np.clip(d["codes"], -8, 7), d["scales"], 32, 4, d["bias"])
        else:
            handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], d["bias"])
        x = (d["q"], d["sx"], d["zx"]) if kind == "codes" else d["x"]
        results = []
        for count in (1, threads, threads):
            _core.set_threads(count)
            results.append(_core.linear_forward(handle, x, 0 if kind == "codes" else 2, 0, None, 2 * (kind == "int8-out")))
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2]), (m, n, k)


@pytest.mark.parametrize("quant_out", [0, 1, 2])
@pytest.mark.parametrize("m, n, k", [(61, 100, 1030), (200, 96, 2112), (131, 700, 1024)])
def test_long_float_rows_into_codes_and_out_of_them(m, n, k, quant_out):
    """Codes of the rows that are made beforehand give the same bits."""
    d = make(m, n, k)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], d["bias"])
    codes = _core.quantize_tokens(d["x"], 2, True)
    want = everywhere(lambda: _core.linear_forward(handle, codes, 0, 1, None, quant_out))
    for _ in range(2):
        assert same_bits(everywhere(lambda: _core.linear_forward(handle, d["x"], 2, 1, None, quant_out)), want)
    x = d["x"].copy()
    x[[m - 2, m // 2], k - 1] = np.nan
    with pytest.raises(ValueError, match=f"x: NaN or Inf in row {m // 2}$"):
        _core.linear_forward(handle, x, 2, 1, None, quant_out)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs the scheduler's statistics")
def test_workers_that_sleep_wake_up():
    d = make(2048, 256, 512)
    handle = _core.linear_pack_s8(d["codes"], d["scales"][:, 0], d["bias"])

    def others():
        me, tasks = str(threading.get_native_id()), Path("/proc/self/task").iterdir()
        return {t.name: int((t / "schedstat").read_text().split()[0]) for t in tasks if t.name != me}

    with zq.cpu.use("ref"):  # slow enough for a worker on a busy machine
        _core.set_threads(2)
        _core.linear_forward(handle, d["x"][:64], 2, 0, None, 0)
        time.sleep(0.05)
        before = others()
        _core.linear_forward(handle, d["x"], 2, 0, None, 0)
    assert max(ran - before.get(tid, 0) for tid, ran in others().items()) > 5e6


def test_works_in_a_forked_child():
    d = make(200, 96, 128)
    _core.set_threads(2)
    want = ops.linear(d["x"], d["w"])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if same_bits(ops.linear(d["x"], d["w"]), want) else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_leading_dimensions(lead):
    d = make(1, 7, 12)
    x = np.random.default_rng(1).standard_normal((*lead, 12)).astype(np.float32)
    assert ops.linear(x, d["w"]).shape == (*lead, 7)
    if lead:
        assert same_bits(ops.linear(x, d["w"]), ops.linear(x.reshape(-1, 12), d["w"]).reshape(*lead, 7))


def test_matmul_integer_against_int64():
    rng = np.random.default_rng(3)
    for a_type in (np.int8, np.uint8):
        for b_type in (np.int8, np.uint8):
            ia, ib = np.iinfo(a_type), np.iinfo(b_type)
            a = rng.integers(ia.min, ia.max + 1, (3, 7, 33)).astype(a_type)
            b = rng.integers(ib.min, ib.max + 1, (33, 35)).astype(b_type)
            za, zb = rng.integers(ia.min, ia.max + 1, 7).astype(a_type), rng.integers(ib.min, ib.max + 1, 35).astype(b_type)
            want = (a.astype(np.int64) - za[:, None]) @ (b.astype(np.int64) - zb)
            got = ops.matmul_integer(a, b, za, zb)
            assert got.dtype == np.int32 and np.array_equal(got, want)
