"""Transformer operators: every kernel at every level and thread count, against the reference and against each other."""
from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from onnx_reader import nodes, tensors

import zquant.reference as ref
from zquant import _core, cpu, ops
from zquant.reference import nn as ref_nn

SIZES = [*range(1, 66), 67, 79, 97, 127, 128, 131, 191, 192, 193, 257, 383, 384, 1009]
EPS32 = float(np.finfo(np.float32).eps)
ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
HUGE = np.float32(1e30)


def make(*shape, scale=1.0, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def flat(result):
    """All arrays of a result, in order."""
    if result is None:
        return []
    return [result] if isinstance(result, np.ndarray) else [a for part in result for a in flat(part)]


def same_bits(a, b):
    a, b = flat(a), flat(b)
    return len(a) == len(b) and all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
                                    for x, y in zip(a, b))


def everywhere(run, *args, **kwargs):
    """run(...) at every level with 1 and 2 threads: all bits equal. Returns the result."""
    before, want = _core.threads(), None
    try:
        for level in _core.levels():
            with cpu.use(level):
                for threads in (1, 2):
                    _core.set_threads(threads)
                    got = run(*args, **kwargs)
                    want = got if want is None else want
                    assert same_bits(got, want), f"{level} with {threads} threads differs from {_core.levels()[0]} with 1"
    finally:
        _core.set_threads(before)
    return want


def assert_close(got, want, atol=0.0, rtol=0.0):
    error = np.abs(np.asarray(got, np.float64) - want)
    bound = atol + rtol * np.abs(want)
    assert (error <= bound).all(), (f"error {np.nanmax(error - bound)} beyond the bound at "
                                    f"{np.unravel_index(np.argmax(error - bound), error.shape)}")


def test_the_comparators_see_a_planted_fault():
    a = make(3, 5)
    b = a.copy()
    b[1, 2] = np.nextafter(b[1, 2], np.float32(9))
    assert same_bits((a, None), (a.copy(), None)) and not same_bits(a, b) and not same_bits(a, (a, a))
    assert not same_bits(np.float32([0.0]), np.float32([-0.0]))
    results = iter([a, a, b, a, a, a])
    with pytest.raises(AssertionError):
        everywhere(lambda: next(results))
    with pytest.raises(AssertionError):
        assert_close(np.float32([1.0, np.nan]), np.array([1.0, 1.0]), atol=1)
    with pytest.raises(AssertionError):
        assert_close(np.float32([1.1]), np.array([1.0]), rtol=0.05)


# ---- activations -----------------------------------------------------------------------------------------------


def floats(n=40000):
    """Every exponent, both signs, and the ranges where the functions bend."""
    bits = np.random.default_rng(1).integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    edges = np.array([0.0, -0.0, 5.625, -5.625, 6.0625, -6.0625, 89.5, -89.5, 86.98, 87.0, -86.98, -87.0, 88.7,
                      1e-45, -1e-45, 3.4e38, -3.4e38], np.float32)
    ramps = [np.linspace(-8, 8, n).astype(np.float32), np.linspace(-100, 100, n).astype(np.float32)]
    return np.concatenate([bits[np.isfinite(bits)], *ramps, np.nextafter(edges, np.float32(0)), edges])[None]


def exact_gelu_tanh(x):
    """Through the sigmoid, which keeps its digits where 1 + tanh does not."""
    z = 2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    e = np.exp(-np.abs(z))
    return x * np.where(z < 0, e, 1) / (1 + e)


@pytest.mark.parametrize("name,bound", [
    # the bound of the polynomial, and half an ulp of the result
    ("relu", lambda y: 0.0),
    ("gelu", lambda y: 2.4e-6 + EPS32 / 2 * np.abs(y)),
    ("silu", lambda y: 1e-6 * np.abs(y) + 3e-37),
    ("gelu_tanh", lambda y: 1e-5 + EPS32 / 2 * np.abs(y)),
])
def test_activations_hold_their_error_bounds_over_all_floats(name, bound):
    x = floats()
    got = everywhere(_core.activation, x, ACTIVATIONS[name], 0)
    d = x.astype(np.float64)
    want = exact_gelu_tanh(d) if name == "gelu_tanh" else ref.gated(d, 1.0, name)
    assert np.isfinite(got).all()
    assert (np.abs(got - want) <= bound(want)).all()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_between_the_tails(name):
    """Every 1,009th float32 of (-12, 12), of both signs: the largest error is that of the fit, not only below the bound."""
    limit = int(np.float32(12).view(np.int32))
    x = np.arange(0, limit, 1009, dtype=np.int32).view(np.float32)
    x = np.concatenate([x, -x])[None]
    got = _core.activation(x, ACTIVATIONS[name], 0).astype(np.float64)
    d = x.astype(np.float64)
    want = exact_gelu_tanh(d) if name == "gelu_tanh" else ref.gelu(d)
    worst = np.abs(got - want).max()
    assert (2e-6 < worst < 2.4e-6) if name == "gelu" else (9e-6 < worst < 1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_tails_are_exact(approximate):
    x = np.float32([[6.0625, 6.1, 100, 1e30, 3e38]])
    assert same_bits(ops.gelu(x, approximate), x)
    assert not ops.gelu(-x, approximate).any()


def test_exp_and_gelu_repeat_the_documented_float32_algorithm():
    x = np.linspace(-90, 0, 20001).astype(np.float32)[None]
    want = ref_nn.exp_f32(x)
    exact = np.exp(x.astype(np.float64))
    normal = x >= -86.9
    assert (np.abs(want / exact - 1)[normal] <= 5e-7).all() and not want[x < -87].any()
    y = ops.softmax(x)  # the maximum is 0, so y = exp(x) / sum
    assert_close(y, want / want.astype(np.float64).sum(), rtol=2e-6, atol=3e-45)
    g = np.linspace(-7, 7, 20001).astype(np.float32)[None]
    for approximate in ("none", "tanh"):
        assert_close(ops.gelu(g, approximate), ref_nn.gelu_f32(g, approximate), atol=2e-7, rtol=EPS32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_every_size(name):
    for n in SIZES:
        x, up = make(3, n, scale=3), make(3, n, seed=1)
        y = everywhere(_core.activation, x, ACTIVATIONS[name], 0)
        g = everywhere(_core.gated, x, up, ACTIVATIONS[name], 0)
        assert_close(y, ref.gated(x, np.ones_like(up), name), atol=1e-5 if name == "gelu_tanh" else 3e-6)
        assert same_bits(g, y * up)


# ---- normalisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale,shift", [(1, 0), (1e-3, 1), (100, -50)])
def test_norms_at_every_size(residual, scale, shift):
    for n in SIZES:
        x = make(4, n, scale=scale) + np.float32(shift)
        r = make(4, n, scale=scale, seed=1) if residual else None
        w, b = make(n, seed=2), make(n, seed=3)
        y = everywhere(_core.layer_norm, x, r, w, b, 1e-5, 0)[0]
        z = everywhere(_core.rms_norm, x, r, w, 1e-5, 0)[0]
        h = x + r if residual else x  # the sum is rounded to float32 in both
        # a rounded deviation is off by an ulp of h, and sqrt(var + eps) divides that
        spread = np.sqrt(h.astype(np.float64).var(-1, keepdims=True) + 1e-5)
        bound = 4 * EPS32 * (np.abs(h).max(-1, keepdims=True) / spread + np.sqrt(n)) * np.abs(w)
        want = ref.layer_norm(h, w, b, 1e-5)
        assert (np.abs(y - want) <= bound + 2 * EPS32 * np.abs(want)).all()
        assert_close(z, ref.rms_norm(h, w, 1e-5), rtol=8 * EPS32)


@pytest.mark.parametrize("ratio", [0, 0.99, 1.01, 30, 1e4])
def test_layer_norm_is_exact_to_rounding_whatever_the_mean(ratio):
    """Means on both sides of the deviation: one pass over a row takes its sums, or a second one corrects them."""
    for n in (2, 5, 64, 384, 3072):
        x = make(20, n).astype(np.float64)
        x -= x.mean(-1, keepdims=True)
        x = (x / x.std(-1, keepdims=True) + ratio).astype(np.float32)
        w, b = np.ones(n, np.float32), np.zeros(n, np.float32)
        want = ref.layer_norm(x, w, b)
        bound = 2 * EPS32 * (1 + ratio) * (1 + np.abs(want))
        assert (np.abs(everywhere(_core.layer_norm, x, None, w, b, 1e-12, 0)[0] - want) <= bound).all()


@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e4, 3e38, 1e-40, 1e-20, 9e-10, -1e-9])
def test_a_constant_row_normalises_to_the_bias(value, eps):
    for n in (1, 5, 16, 63, 384, 1009):
        x = np.full((2, n), value, np.float32)
        w, b = make(n), make(n, seed=1)
        assert same_bits(everywhere(_core.layer_norm, x, None, w, b, eps, 0)[0], np.stack([b, b]))
        assert np.isfinite(everywhere(_core.rms_norm, x, None, w, eps, 0)[0]).all()


@pytest.mark.parametrize("scale", [1e30, 3e37, 1e-20, 1e-40])
def test_norms_of_extreme_rows(scale):
    for n in (2, 17, 64, 100, 384):
        x = make(3, n, scale=scale)
        w, b = make(n), make(n, seed=1)
        y = everywhere(_core.layer_norm, x, None, w, b, 1e-12, 0)[0]
        z = everywhere(_core.rms_norm, x, None, w, 1e-12, 0)[0]
        assert_close(y, ref.layer_norm(x, w, b), atol=2e-4)
        assert_close(z, ref.rms_norm(x, w, 1e-12), atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-42, 1e-36, 1e-30])
@pytest.mark.parametrize("scale", [1e-12, 1e-16, 1e-18, 1e-20, 1e-25, 1e-30, 1e-38])
def test_squares_that_underflow(scale, eps):
    """An eps that hides that is nearly always there: these are too small to."""
    eps = float(np.float32(eps))
    for n in (2, 17, 64, 100, 384, 3000):
        for mean in (0, 3):  # in one pass over the row, or two
            x = make(3, n, scale=scale) + np.float32(mean * scale)
            r = make(3, n, scale=scale, seed=5)
            w, b = make(n), make(n, seed=1)
            y = everywhere(_core.layer_norm, x, None, w, b, eps, 0)[0]
            z = everywhere(_core.rms_norm, x, None, w, eps, 0)[0]
            np.testing.assert_allclose(y, ref.layer_norm(x, w, b, eps), rtol=1e-5, atol=2e-5)
            np.testing.assert_allclose(z, ref.rms_norm(x, w, eps), rtol=1e-5, atol=1e-6)
            y = everywhere(_core.rms_norm, x, r, w, eps, 2)[0]
            np.testing.assert_allclose(y, ref.rms_norm(x + r, w, eps), rtol=1e-5, atol=1e-6)
            y = everywhere(_core.layer_norm, x, r, w, b, eps, 2)[0]
            np.testing.assert_allclose(y, ref.layer_norm(x + r, w, b, eps), rtol=1e-5, atol=2e-5)


def test_the_smallest_rows():
    """One element of 2^-149; 0 stays 0; and rows around a mean that differ by an ulp of it."""
    w, b = np.ones(64, np.float32), np.zeros(64, np.float32)
    x = np.zeros((3, 64), np.float32)
    x[0, 5] = x[2, 9] = 1e-45
    np.testing.assert_array_equal(everywhere(_core.rms_norm, x, None, w, 0.0, 0)[0], np.where(x > 0, np.float32(8), 0))
    y = everywhere(_core.layer_norm, x, None, w, b, 0.0, 0)[0]
    np.testing.assert_allclose(y, ref.layer_norm((x > 0).astype(np.float32), w, b, 1e-30), rtol=1e-6)
    for mean in np.float32([2.0**-40, 2.0**-31, 2.0**-30, 2.0**-29, 2.0**-20, 1, 1e20]):
        x = np.full((2, 64), mean, np.float32)
        x[1, 7] = np.nextafter(mean, np.float32(np.inf))
        y = everywhere(_core.layer_norm, x, None, w, b, 0.0, 0)[0]
        assert not y[0].any() and abs(y[1, 7] - 8) < 0.1 and np.abs(np.delete(y[1], 7)).max() < 0.13  # the mean is rounded


@pytest.mark.parametrize("m", [1, 7, 130, 257])
def test_rows_do_not_depend_on_how_they_are_shared_out(m):
    n = 384
    x, w = make(m, n), make(n, seed=1)
    for run in (lambda a: _core.layer_norm(a, None, w, w, 1e-5, 2)[0], lambda a: _core.activation(a, ACTIVATIONS["gelu"], 0),
                lambda a: _core.softmax(a, 0), lambda a: _core.softmax(a, 2)[0],
                lambda a: _core.quantize_tokens(a, 2, False)[0]):
        alone = np.concatenate([run(row[None]) for row in x])
        before = _core.threads()
        try:
            for threads in (1, 2, 3, 5):
                _core.set_threads(threads)
                assert same_bits(run(x), alone)
        finally:
            _core.set_threads(before)


def floats_behind_a_line(values, offset):
    """A copy that begins `offset` elements behind the start of a cache line."""
    room = np.zeros(values.size + 32, np.float32)
    start = -room.ctypes.data // 4 % 16 + offset
    room[start:start + values.size] = values
    return room[start:start + values.size]


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_norms_of_many_rows_are_those_of_each_wherever_the_parameters_lie(offset):
    for n in (1, 16, 33, 384):
        x = make(40, n)
        w, b = (floats_behind_a_line(make(n, seed=seed), offset) for seed in (1, 2))
        y = everywhere(_core.layer_norm, x, None, w, b, 1e-5, 0)[0]
        z = everywhere(_core.rms_norm, x, None, w, 1e-5, 0)[0]
        assert same_bits(y, np.concatenate([_core.layer_norm(row[None], None, w, b, 1e-5, 0)[0] for row in x]))
        assert same_bits(z, np.concatenate([_core.rms_norm(row[None], None, w, 1e-5, 0)[0] for row in x]))


# ---- quantized outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode,name", [(1, "symmetric"), (2, "asymmetric")])
def test_codes_are_those_of_the_float_result(mode, name):
    for n in (1, 7, 8, 64, 65, 127, 384, 1000):
        x, r, w, b = make(5, n), make(5, n, seed=1), make(n, seed=2), make(n, seed=3)
        x[3] = 0
        y, codes = everywhere(_core.layer_norm, x, r, w, b, 1e-5, mode)
        assert same_bits(y, ops.layer_norm(x, w, b, 1e-5, r))
        assert same_bits(codes, _core.quantize_tokens(y, mode, False))
        none, only = _core.layer_norm(x, r, w, b, 1e-5, mode, True)
        assert none is None and same_bits(only, codes)
        y, codes = everywhere(_core.rms_norm, x, r, w, 1e-5, mode)
        assert same_bits(codes, _core.quantize_tokens(y, mode, False))
        none, only = _core.rms_norm(x, r, w, 1e-5, mode, True)
        assert none is None and same_bits(only, codes)
        for act in ACTIVATIONS.values():
            assert same_bits(everywhere(_core.activation, x, act, mode),
                             _core.quantize_tokens(_core.activation(x, act, 0), mode, False))
        assert same_bits(everywhere(_core.gated, x, r, 4, mode), _core.quantize_tokens(_core.gated(x, r, 4, 0), mode, False))
        y, public = ops.layer_norm(x.reshape(5, 1, n), w, b, 1e-5, r.reshape(5, 1, n), name)
        assert same_bits(public, ops.quantize_per_token(y, mode == 1)) and y.shape == (5, 1, n)
        assert same_bits(ops.gelu(x, quantize=name), ops.quantize_per_token(ops.gelu(x), mode == 1))


def test_norms_without_codes_give_their_rows_even_where_only_codes_are_wanted():
    x, w = make(3, 13), make(13)
    assert same_bits(_core.layer_norm(x, None, w, w, 1e-5, 0, True)[0], _core.layer_norm(x, None, w, w, 1e-5, 0)[0])
    assert same_bits(_core.rms_norm(x, None, w, 1e-5, 0, True)[0], _core.rms_norm(x, None, w, 1e-5, 0)[0])
    with pytest.raises(ValueError, match="codes_only"):
        _core.rms_norm(x, None, w, 1e-5, 1, 2)


def test_codes_have_zeroed_slack_for_the_matrix_product():
    _, (q, _, _) = _core.layer_norm(make(3, 13), None, make(13), make(13, seed=1), 1e-5, 2)
    padded = np.lib.stride_tricks.as_strided(q, (3, 16), q.strides)
    assert not padded[:, 13:].any() and q.strides[0] >= 16


def test_rows_without_features_and_no_rows():
    empty = np.zeros((2, 0), np.float32)
    none = np.zeros((0, 5), np.float32)
    w = np.ones(5, np.float32)
    assert ops.gelu(empty).shape == (2, 0) and ops.softmax(none).shape == (0, 5)
    q, scale, zero = ops.gelu(empty, quantize="asymmetric")
    assert q.shape == (2, 0) and scale.tolist() == [1, 1] and zero.tolist() == [0, 0]
    y, (q, scale, zero) = ops.layer_norm(none, w, w, quantize="symmetric")
    assert y.shape == (0, 5) and q.shape == (0, 5) and scale.shape == (0,) and zero is None
    assert ops.attention(np.zeros((2, 0, 4), np.float32), *[np.zeros((2, 0, 4), np.float32)] * 2, 2).shape == (2, 0, 4)
    assert ops.attention(np.zeros((0, 3, 4), np.float32), *[np.zeros((0, 3, 4), np.float32)] * 2, 2).shape == (0, 3, 4)


# ---- softmax ---------------------------------------------------------------------------------------------------


def test_softmax_at_every_size():
    for n in SIZES:
        x = make(3, n, scale=5)
        y = everywhere(_core.softmax, x, 0)
        assert_close(y, ref.softmax(x), rtol=3e-6, atol=1e-36)  # x - max is rounded: up to half an ulp of 35
        assert_close(y.astype(np.float64).sum(-1), np.ones(3), atol=1e-6)


def test_softmax_extremes():
    inf = np.inf
    x = np.float32([[1e30, -1e30, 0, 1e30], [-inf, 0, -inf, 0], [-inf] * 4, [-3e38, -3e38, 3e38, -inf], [1e-45] * 4])
    want = [[0.5, 0, 0, 0.5], [0, 0.5, 0, 0.5], [0] * 4, [0, 0, 1, 0], [0.25] * 4]
    assert everywhere(_core.softmax, x, 0).tolist() == want


@pytest.mark.parametrize("quantize", ["symmetric", "asymmetric"])
def test_softmax_in_codes(quantize):
    """At every level; scales come from the sums, so that rows of nothing and of one element count too. The float result in
    codes is the same but for its own rounding before."""
    levels = 127 if quantize == "symmetric" else 255
    for m, n in [(1, 1), (3, 7), (17, 33), (9, 384), (5, 1000), (3, 5000)]:
        x = make(m, n, scale=5)
        x[0] = -np.inf
        x[-1, ::2] = -np.inf
        q, scale, zero = everywhere(lambda a: ops.softmax(a, quantize=quantize), x)
        want = ops.quantize_per_token(ops.softmax(x), symmetric=quantize == "symmetric")
        assert same_bits(scale, want[1]) and (zero is want[2] is None or same_bits(zero, want[2]))
        exact = ref.softmax_codes(x, levels)
        assert np.abs(q - exact).max() <= 0.5 + 1e-3
        differ = q != want[0]
        assert (np.abs(exact % 1 - 0.5)[differ] < 1e-3).all() and differ.mean() < 1e-3
    with pytest.raises(ValueError, match="x: NaN or .Inf in row 1"):
        ops.softmax(np.float32([[0, 1], [0, np.inf]]), quantize=quantize)
    with pytest.raises(ValueError, match="quantize: expected"):
        ops.softmax(x, quantize="int8")


# ---- attention -------------------------------------------------------------------------------------------------


def make_qkv(rows, heads, d, scale=1.0):
    return make(rows, 3 * heads * d, scale=scale)


def run_fused(x, lengths, heads, scale=None, mask=None, quant=0):
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    d = x.shape[1] // 3 // heads
    return _core.attention_fused(x, offsets, heads, d**-0.5 if scale is None else scale, mask, quant)


def reference_fused(x, lengths, heads, mask=None):
    out, at = np.zeros((len(x), x.shape[1] // 3)), 0
    for n in lengths:
        part = slice(at, at + n)
        q, k, v = np.split(x[None, part], 3, -1)
        out[part] = ref.attention(q, k, v, heads, None if mask is None else mask[None, part])[0] if n else 0
        at += n
    return out


@pytest.mark.parametrize("heads,d", [(1, 1), (2, 3), (3, 8), (2, 17), (12, 32), (1, 33), (2, 64), (1, 80), (1, 128)])
def test_attention_against_the_reference(heads, d):
    lengths = [1, 0, 2, 13, 31, 33, 64, 5]
    x = make_qkv(sum(lengths), heads, d)
    mask = (np.random.default_rng(5).random(len(x)) < 0.7).astype(np.uint8)
    for m in (None, mask, mask.astype(bool)):
        got = everywhere(run_fused, x, lengths, heads, mask=m)
        assert_close(got, reference_fused(x, lengths, heads, m), atol=4e-6)


@pytest.mark.parametrize("tokens", [255, 256, 257, 300, 520])
def test_attention_over_more_than_one_tile_of_keys(tokens):
    lengths = [tokens, 3]
    x = make_qkv(sum(lengths), 2, 16, scale=2)
    got = everywhere(run_fused, x, lengths, 2)
    assert_close(got, reference_fused(x, lengths, 2), atol=2e-5)


def test_rising_scores_rescale_what_was_summed_before():
    tokens, d = 700, 16
    x = make_qkv(tokens, 1, d)
    x[:, d] = np.arange(tokens) * np.float32(0.3)  # first feature of k grows along the keys
    x[:, 0] = 4
    got = everywhere(run_fused, x, [tokens], 1, scale=1.0)
    q, k, v = np.split(x[None], 3, -1)
    # scores reach 900 and carry an ulp of 6e-5 each, which exp turns into relative errors
    assert_close(got[None], ref.attention(q, k, v, 1, scale=1.0), atol=1e-3)


def test_a_sequence_does_not_see_the_others():
    heads, d, lengths = 3, 20, [40, 7, 300, 1]
    x = make_qkv(sum(lengths), heads, d)
    whole = run_fused(x, lengths, heads)
    at = 0
    for n in lengths:
        assert same_bits(run_fused(x[at:at + n].copy(), [n], heads), whole[at:at + n].copy())
        at += n
    # and a query row does not see the other query rows: any few of them give the same bits
    q, k, v = (np.ascontiguousarray(a) for a in np.split(x[:300], 3, -1))
    offsets = np.int64([0, 300])
    base = _core.attention(q, k, v, offsets, heads, 0.2, None)
    q2 = make(*q.shape, seed=9)
    q2[[5, 100, 299]] = q[[5, 100, 299]]
    assert same_bits(_core.attention(q2, k, v, offsets, heads, 0.2, None)[[5, 100, 299]], base[[5, 100, 299]])


def test_hidden_keys_are_as_if_they_were_not_there():
    tokens, heads, d = 290, 2, 24
    q, k, v = (make(tokens, heads * d, seed=s) for s in range(3))
    mask = (np.random.default_rng(2).random(tokens) < 0.6).astype(np.uint8)
    offsets = np.int64([0, tokens])
    got = everywhere(_core.attention, q, k, v, offsets, heads, 0.3, mask)
    k2, v2 = k.copy(), v.copy()
    k2[mask == 0], v2[mask == 0] = HUGE, -HUGE
    assert same_bits(_core.attention(q, k2, v2, offsets, heads, 0.3, mask), got)
    seen = np.flatnonzero(mask)
    few = _core.attention(q[seen], k[seen], v[seen], np.int64([0, len(seen)]), heads, 0.3, None)
    assert same_bits(got[seen], few)


@pytest.mark.parametrize("d", [16, 32, 48, 128, 144])
@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 47, 49, 63, 64, 65])
def test_short_sequences_have_the_bits_of_tiles(tokens, d):
    """Sequences of up to 64 tokens have a kernel of their own, for which nothing may be hidden: a mask goes to the tiles."""
    x = make_qkv(tokens, 2, d, scale=3)
    seen = np.ones(tokens, np.uint8)
    assert same_bits(everywhere(run_fused, x, [tokens], 2), everywhere(run_fused, x, [tokens], 2, mask=seen))


@pytest.mark.parametrize("tokens", [4, 20, 64])
@pytest.mark.parametrize("what", ["nan in v", "scores", "values"])
def test_a_short_sequence_names_its_bad_row(isa, tokens, what):
    x = make_qkv(2 * tokens, 2, 16)
    if what == "nan in v":
        x[-1, 64] = np.nan
    elif what == "scores":  # of the last query alone, beyond float32
        x[-1, 0] = x[tokens:, 32] = 1e25
    else:  # sums of several values beyond float32, though each is within: every query of the second sequence
        x[tokens:, :64] = 0
        x[tokens:, 64] = 3e38
    row = tokens if what == "values" else 2 * tokens - 1
    with pytest.raises(ValueError, match=rf"row {row}\b"):
        run_fused(x, [tokens, tokens], 2)


def test_all_keys_hidden_gives_zeros():
    x = make_qkv(12, 2, 8)
    mask = np.repeat(np.uint8([1, 0, 1]), 4)
    got = everywhere(run_fused, x, [4, 4, 4], 2, mask=mask)
    assert not got[4:8].any() and got[:4].all() and got[8:].all()


def test_attention_codes_are_those_of_the_float_result():
    x = make_qkv(37, 3, 11)
    for mode in (1, 2):
        got = everywhere(run_fused, x, [30, 7], 3, quant=mode)
        assert same_bits(got, _core.quantize_tokens(run_fused(x, [30, 7], 3), mode, False))


def test_public_attention_with_lengths_and_mask():
    q, k, v = (make(3, 9, 10, seed=s) for s in range(3))
    mask = np.random.default_rng(0).random((3, 9)) < 0.7
    lengths = [9, 0, 4]
    for arguments in ({}, {"key_mask": mask}, {"lengths": lengths}, {"key_mask": mask, "lengths": lengths}, {"scale": 0.7}):
        got = everywhere(ops.attention, q, k, v, 5, **arguments)
        assert_close(got, ref.attention(q, k, v, 5, **arguments), atol=2e-6)
    padded = ops.attention(q, k, v, 5, lengths=lengths)
    assert not padded[1].any() and not padded[2, 4:].any()
    assert same_bits(padded[2, :4].copy(), ops.attention(q[2:, :4].copy(), k[2:, :4].copy(), v[2:, :4].copy(), 5)[0])


def test_attention_of_extreme_values_is_finite_or_refused():
    q, k, v = make(1, 20, 8, scale=1e-30), make(1, 20, 8, scale=1e30, seed=1), make(1, 20, 8, scale=1e30, seed=2)
    got = everywhere(ops.attention, q, k, v, 2)
    assert np.isfinite(got).all()
    tiny = everywhere(ops.attention, q, q, q * np.float32(1e-10), 2)
    assert np.isfinite(tiny).all()
    with pytest.raises(ValueError, match="overflows float32 in row 0"):
        ops.attention(k, k, v, 2)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 16), (40, 69)])
def test_values_that_are_not_finite_are_refused_with_their_row(isa, threads, bad, place):
    x = make(41, 70)
    poisoned = x.copy()
    poisoned[place] = bad
    w = np.ones(70, np.float32)
    row = f"in row {place[0]}$"
    for quantize in (None, "symmetric", "asymmetric"):
        for name, f, *arguments in [
            ("x", ops.layer_norm, poisoned, w, w), ("x", ops.rms_norm, poisoned, w), ("x", ops.gelu, poisoned),
            ("x", ops.gelu, poisoned, "tanh"), ("x", ops.silu, poisoned), ("x", ops.relu, poisoned),
            ("gate", ops.gated, poisoned, x), ("up", ops.gated, x, poisoned),
            ("residual", ops.layer_norm, x, w, w, 1e-5, poisoned),
        ]:
            with pytest.raises(ValueError, match=f"^{name}: NaN or Inf " + row):
                f(*arguments, quantize=quantize)
    q = x[None]
    for i, name in enumerate("qkv"):
        operands = [q, q, q]
        operands[i] = poisoned[None]
        with pytest.raises(ValueError, match=f"^{name}: NaN or Inf " + row):
            ops.attention(*operands, 2)
    if bad > 0 or np.isnan(bad):
        with pytest.raises(ValueError, match="^x: NaN or .Inf " + row):
            ops.softmax(poisoned)
    with pytest.raises(ValueError, match="^weight: NaN or Inf in row 0$"):
        ops.layer_norm(x, poisoned[place[0]], w)


@pytest.mark.parametrize("m,n", [(1, 7), (7, 16), (9, 130), (17, 384), (10, 1000), (3, 3100)])
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, m, n):
    """Kernels take several rows at once; every third one here is so large that the norms have to rescale it."""
    x, r, w, b = make(m, n), make(m, n, seed=1), make(n, seed=2), make(n, seed=3)
    x[1::3] *= HUGE
    calls = []
    for mode in (0, 1, 2):
        calls.append(lambda a, c, mode=mode: _core.softmax(a, mode))
        calls += [lambda a, c, mode=mode: _core.layer_norm(a, None, w, b, 1e-5, mode),
                  lambda a, c, mode=mode: _core.layer_norm(a, c, w, b, 1e-5, mode),
                  lambda a, c, mode=mode: _core.rms_norm(a, None, w, 1e-5, mode),
                  lambda a, c, mode=mode: _core.rms_norm(a, c, w, 1e-5, mode),
                  lambda a, c, mode=mode: _core.activation(a, 4, mode), lambda a, c, mode=mode: _core.gated(a, c, 2, mode)]
    for call in calls:
        together = flat(call(x, r))
        alone = [flat(call(x[i:i + 1], r[i:i + 1])) for i in range(m)]
        assert same_bits(together, [np.concatenate(parts) for parts in zip(*alone)])


@pytest.mark.parametrize("place", range(0, 19, 2))
def test_the_first_bad_row_is_named_wherever_it_is_in_a_batch(isa, place):
    x, w = make(19, 64), np.ones(64, np.float32)
    x[place, 5] = x[18, 0] = np.nan
    for mode in (0, 2):
        for call in (lambda m: _core.layer_norm(x, None, w, w, 1e-5, m), lambda m: _core.rms_norm(x, None, w, 1e-5, m),
                     lambda m: _core.activation(x, 2, m)):
            with pytest.raises(ValueError, match=f"x: NaN or Inf in row {place}$"):
                call(mode)


def test_overflow_of_a_finite_input_is_an_error_and_never_nan():
    x, w = np.full((2, 8), 3e38, np.float32), np.ones(8, np.float32)
    with pytest.raises(ValueError, match="x: finite, but the result overflows"):
        ops.layer_norm(x, w, w, residual=x)
    assert np.isinf(ops.gated(x, x, "relu")).all()
    with pytest.raises(ValueError, match="gate: finite, but the result overflows"):
        ops.gated(x, x, "relu", quantize="symmetric")


X = np.zeros((2, 4), np.float32)
W = np.ones(4, np.float32)
T = np.zeros((1, 2, 4), np.float32)


@pytest.mark.parametrize("error,message,call", [
    (TypeError, "x: expected a NumPy array", lambda: ops.gelu([1.0])),
    (TypeError, "x: expected float32, got float64", lambda: ops.softmax(X.astype(np.float64))),
    (TypeError, "weight: expected float32, got int32", lambda: ops.rms_norm(X, W.astype(np.int32))),
    (TypeError, "residual: expected float32, got float16", lambda: ops.layer_norm(X, W, W, residual=X.astype(np.float16))),
    (ValueError, "x: expected at least 1 dimension", lambda: ops.relu(np.array(1, np.float32))),
    (ValueError, r"weight: expected shape \(4,\), got \(3,\)", lambda: ops.layer_norm(X, W[:3], W)),
    (ValueError, r"bias: expected shape \(4,\), got \(3,\)", lambda: ops.layer_norm(X, W, W[:3])),
    (ValueError, "weight: expected 1 dimension, got 2", lambda: ops.layer_norm(X, X, W)),
    (ValueError, r"residual: expected shape \(2, 4\)", lambda: ops.layer_norm(X, W, W, residual=X[:1])),
    (ValueError, r"up: expected shape \(2, 4\)", lambda: ops.gated(X, X[:, :2])),
    (ValueError, "eps: expected a finite number >= 0", lambda: ops.layer_norm(X, W, W, eps=-1.0)),
    (ValueError, "eps: expected a finite number >= 0", lambda: ops.rms_norm(X, W, eps=float("nan"))),
    (TypeError, "eps: expected a number", lambda: ops.rms_norm(X, W, eps="small")),
    (ValueError, "quantize: expected None", lambda: ops.layer_norm(X, W, W, quantize="int8")),
    (ValueError, "approximate: expected", lambda: ops.gelu(X, "erf")),
    (ValueError, "activation: expected", lambda: ops.gated(X, X, "swish")),
    (ValueError, "q: expected 3 dimensions", lambda: ops.attention(X, X, X, 2)),
    (ValueError, r"k: expected shape \(1, 2, 4\)", lambda: ops.attention(T, T[:, :1], T, 2)),
    (ValueError, r"v: expected shape \(1, 2, 4\)", lambda: ops.attention(T, T, T[:, :, :2], 2)),
    (ValueError, "heads: 4 columns cannot be shared out to 3 heads", lambda: ops.attention(T, T, T, 3)),
    (ValueError, "heads: expected 1 to", lambda: ops.attention(T, T, T, 0)),
    (ValueError, "scale: expected a finite number > 0", lambda: ops.attention(T, T, T, 2, scale=0.0)),
    (ValueError, "scale: expected a finite number > 0", lambda: ops.attention(T, T, T, 2, scale=float("inf"))),
    (TypeError, "key_mask: expected bool or uint8, got float32", lambda: ops.attention(T, T, T, 2, key_mask=T[:, :, 0])),
    (ValueError, r"key_mask: expected shape \(1, 2\)", lambda: ops.attention(T, T, T, 2, key_mask=np.ones((2, 2), bool))),
    (ValueError, "lengths: expected 1 integers", lambda: ops.attention(T, T, T, 2, lengths=[1, 1])),
    (ValueError, "lengths: expected 0 to 2, got 3 to 3", lambda: ops.attention(T, T, T, 2, lengths=[3])),
    (ValueError, "offsets: expected 0 = ", lambda: _core.attention(X, X, X, np.int64([0, 3]), 2, 1.0, None)),
    (ValueError, "offsets: expected 0 = ", lambda: _core.attention(X, X, X, np.int64([0, 5, 2]), 2, 1.0, None)),
    (ValueError, "offsets: expected 0 = ", lambda: _core.attention(X, X, X, np.int64([]), 2, 1.0, None)),
    (ValueError, "offsets: expected 0 = ", lambda: _core.attention(X, X, X, np.int64([-1, 2]), 2, 1.0, None)),
    (ValueError, "qkv: expected 3", lambda: _core.attention_fused(X, np.int64([0, 2]), 2, 1.0, None, 0)),
    (ValueError, "quant: expected 0 to 2", lambda: _core.activation(X, 1, 3)),
    (ValueError, "act: expected 0 to 4", lambda: _core.activation(X, 5, 0)),
    (TypeError, "activation: expected 3 arguments, got 2", lambda: _core.activation(X, 5)),
])
def test_wrong_arguments_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


# ---- the boundary ----------------------------------------------------------------------------------------------


def test_kernels_do_not_read_behind_the_end(isa, guarded):
    for n in [*range(1, 36), 63, 64, 65, 127, 129]:
        x, r, w, b = guarded(make(2, n)), guarded(make(2, n, seed=1)), guarded(make(n)), guarded(make(n, seed=1))
        for mode in (0, 1, 2):
            _core.layer_norm(x, r, w, b, 1e-5, mode)
            _core.rms_norm(x, r, w, 1e-5, mode)
            _core.gated(x, r, 4, mode)
            _core.activation(x, 2, mode)
            _core.softmax(x, mode)
    for tokens, heads, d in [(1, 1, 1), (3, 2, 5), (33, 1, 16), (47, 2, 9), (64, 1, 32), (270, 1, 7)]:
        qkv = guarded(make_qkv(tokens, heads, d))
        _core.attention_fused(qkv, guarded(np.int64([0, tokens])), heads, 0.5, guarded(np.ones(tokens, np.uint8)), 2)
        q = [guarded(make(tokens, heads * d, seed=s)) for s in range(3)]
        _core.attention(*q, np.int64([0, tokens]), heads, 0.5, None)


def test_awkward_arrays_give_the_same_bits(isa, nasty_arrays):
    x, w = make(5, 33), make(33, seed=1)
    before = zlib.crc32(x.tobytes())
    calls = {
        "layer_norm": lambda a: ops.layer_norm(a, w, w, residual=a, quantize="asymmetric"),
        "gelu": ops.gelu,
        "gated": lambda a: ops.gated(a, a),
        "softmax": ops.softmax,
        "softmax in codes": lambda a: ops.softmax(a, quantize="asymmetric"),
        "attention": lambda a: ops.attention(a[None], a[None], a[None], 3),
    }
    for name, call in calls.items():
        want = call(x)
        for what, a in nasty_arrays(x).items():
            assert same_bits(call(a), want), f"{name} of {what}"
    for what, a in nasty_arrays(w).items():
        assert same_bits(ops.layer_norm(x, a, a), ops.layer_norm(x, w, w)), what
    assert zlib.crc32(x.tobytes()) == before


# ---- ONNX ------------------------------------------------------------------------------------------------------


def onnx_cases(shared, *patterns):
    """(name, node, inputs, outputs) of the node tests that match."""
    root = shared / "data" / "onnx-node-tests-ops"
    for folder in sorted(found for pattern in patterns for found in root.glob(pattern)):
        (node,) = nodes(folder / "model.onnx")
        data = folder / "test_data_set_0"
        yield folder.name, node, [t.data for t in tensors(data, "input")], [t.data for t in tensors(data, "output")]


def last_axes(x, axis):
    """The normalised axes of ONNX's operators, from `axis` to the end, as one."""
    axis %= x.ndim
    return np.ascontiguousarray(x.reshape(*x.shape[:axis], -1))


def test_onnx_normalization(shared):
    seen = 0
    for name, node, inputs, outputs in onnx_cases(shared, "test_layer_normalization_*", "test_rms_normalization_*"):
        x = last_axes(inputs[0], node.attributes.get("axis", -1))
        rest = [a.reshape(-1) for a in inputs[1:]]
        norm = ops.layer_norm if node.op == "LayerNormalization" else ops.rms_norm
        y = norm(x, *rest, eps=node.attributes.get("epsilon", 1e-5))
        assert_close(y.reshape(outputs[0].shape), outputs[0], atol=2e-6, rtol=1e-6)
        seen += 1
    assert seen >= 30


def test_onnx_activations(shared):
    seen = 0
    for name, node, (x,), (want,) in onnx_cases(shared, "test_gelu_*", "test_swish"):
        if node.op == "Swish":
            alpha = np.float32(node.attributes.get("alpha", 1.0))
            got = ops.silu(x * alpha) / alpha
        else:
            got = ops.gelu(x, node.attributes.get("approximate", "none"))
        assert_close(got, want, atol=1e-5 if node.attributes.get("approximate") == "tanh" else 3e-6, rtol=1e-6)
        seen += 1
    assert seen >= 5


def test_onnx_softmax(shared):
    seen = 0
    for name, node, (x,), (want,) in onnx_cases(shared, "test_softmax_*"):
        axis = node.attributes.get("axis", -1)
        got = np.moveaxis(ops.softmax(np.moveaxis(x, axis, -1)), -1, axis)
        assert_close(got, want, atol=1e-7, rtol=1e-6)
        seen += 1
    assert seen >= 7


#: Attention's node tests that self-attention without a cache covers: 3-D or 4-D, any scale, no mask, no causality.
ATTENTION = ["test_attention_3d", "test_attention_3d_scaled", "test_attention_3d_transpose_verification", "test_attention_4d",
             "test_attention_4d_scaled"]


def test_onnx_attention(shared):
    seen = []
    for name, node, inputs, outputs in onnx_cases(shared, *ATTENTION):
        heads = inputs[0].shape[1] if inputs[0].ndim == 4 else node.attributes["q_num_heads"]
        q, k, v = (a.transpose(0, 2, 1, 3).reshape(a.shape[0], a.shape[2], -1) if a.ndim == 4 else a for a in inputs)
        # ONNX has more keys than queries: queries are filled up, and what they give is dropped
        filled = np.zeros(k.shape, np.float32)
        filled[:, :q.shape[1]] = q
        got = ops.attention(filled, k, v, heads, scale=node.attributes.get("scale"))[:, :q.shape[1]]
        want = outputs[0].transpose(0, 2, 1, 3).reshape(q.shape) if inputs[0].ndim == 4 else outputs[0]
        assert_close(got, want, atol=2e-6)
        seen.append(name)
    assert seen == ATTENTION
