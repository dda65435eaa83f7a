"""What layers add to their products in float32: LoRC's corrections, and the outlier columns of LLM.int8()."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_gemm import everywhere

import zquant as zq
from zquant import _core, ops
from zquant.extras import Branch, LowRank, Outliers, StaticRange
from zquant.methods import RTN, LLMInt8, LoRC
from zquant.methods import lorc as lorc_module
from zquant.reference import activate, llm_int8
from zquant.spec import QuantSpec

# (m, n, k, rank): panels and tiles whole and cut, more than one panel of v
SIZES = [(1, 1, 1, 1), (3, 31, 8, 1), (7, 33, 17, 5), (13, 65, 127, 8), (37, 96, 130, 33), (130, 40, 64, 70)]
NONE, SYMMETRIC, ASYMMETRIC, INT16 = 0, 1, 2, 3
F = np.float32


def layer(m, n, k, rank, seed=0):
    rng = np.random.default_rng([seed, m, n, k, rank])
    w = rng.standard_normal((n, k)).astype(np.float32)
    return (rng.standard_normal((m, k)).astype(np.float32), w, rng.standard_normal(n).astype(np.float32),
            rng.standard_normal((n, rank)).astype(np.float32), rng.standard_normal((rank, k)).astype(np.float32))


def handles(w, bias):
    """The same weights in every packed form: name -> (new handle, modes of float rows)."""
    rows, groups = RTN().quantize(w, QuantSpec(8)), RTN().quantize(w, QuantSpec(4, granularity="group", group_size=8))
    token = (SYMMETRIC, ASYMMETRIC, INT16)
    return {"f32": (lambda: _core.linear_pack_f32(w, bias), (NONE,)),
            "s8": (lambda: _core.linear_pack_s8(rows.codes, rows.scales[:, 0], bias), token),
            "s8 group": (lambda: _core.linear_pack_group(groups.codes, groups.scales, 8, 8, bias), token),
            "s4 group": (lambda: _core.linear_pack_group(groups.codes, groups.scales, 8, 4, bias), token)}


def values(x, mode):
    """What the codes of x stand for."""
    return _core.dequantize_rows(*_core.quantize_tokens(x, mode, False)) if mode in (SYMMETRIC, ASYMMETRIC) else x


@pytest.mark.parametrize("kind", ["f32", "s8", "s8 group", "s4 group"])
@pytest.mark.parametrize("m,n,k,rank", SIZES)
def test_a_correction_is_added_before_the_activation(m, n, k, rank, kind):
    x, w, bias, u, v = layer(m, n, k, rank)
    residual = np.random.default_rng(1).standard_normal((m, n)).astype(np.float32)
    make, modes = handles(w, bias)[kind]
    for mode in modes:
        corrected, plain = make(), make()
        _core.linear_correct(corrected, u, v)
        base = _core.linear_forward(plain, x, mode, 0, None, 0).astype(np.float64)
        want = base + (values(x, mode).astype(np.float64) @ v.T) @ u.T
        scale = max(1.0, np.abs(want).max(), (np.abs(x) @ np.abs(v.T) @ np.abs(u.T)).max())
        got = everywhere(lambda: _core.linear_forward(corrected, x, mode, 0, None, 0))
        assert np.abs(got - want).max() <= 2e-6 * scale
        got = everywhere(lambda: _core.linear_forward(corrected, x, mode, 2, residual, 0))
        assert np.abs(got - (activate(want, "gelu") + residual)).max() <= 4e-6 * scale


@pytest.mark.parametrize("mode", [SYMMETRIC, ASYMMETRIC])
def test_codes_give_what_the_float_rows_they_came_from_give(mode):
    x, w, bias, u, v = layer(37, 70, 133, 8)
    for kind in ("s8", "s4 group"):
        handle = handles(w, bias)[kind][0]()
        _core.linear_correct(handle, u, v)
        codes = _core.quantize_tokens(x, mode, False)
        from_rows = everywhere(lambda: _core.linear_forward(handle, x, mode, 3, None, 2))
        from_codes = everywhere(lambda: _core.linear_forward(handle, codes, mode, 3, None, 2))
        assert all(np.array_equal(a, b) for a, b in zip(from_rows, from_codes))


def test_rows_of_a_corrected_layer_do_not_depend_on_the_batch():
    x, w, bias, u, v = layer(41, 70, 64, 8)
    handle = handles(w, bias)["s8"][0]()
    _core.linear_correct(handle, u, v)
    whole = _core.linear_forward(handle, x, ASYMMETRIC, 0, None, 0)
    for rows in (slice(0, 1), slice(3, 20), slice(40, 41)):
        assert np.array_equal(_core.linear_forward(handle, x[rows], ASYMMETRIC, 0, None, 0), whole[rows])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (1, 40, 64), (7, 33, 17), (30, 70, 259), (130, 40, 600)])
@pytest.mark.parametrize("outliers", [0, 1, 4])
def test_llm_int8_equals_its_definition(m, n, k, symmetric, outliers):
    x, w, bias, _, _ = layer(m, n, k, 1)
    x = np.clip(x, -3, 3)
    columns = np.random.default_rng(0).permutation(k)[:outliers]
    x[m // 2, columns] = 60
    want = llm_int8(x, w, 6.0, bias, symmetric)
    got = everywhere(lambda: zq.llm_int8_matmul(x, w, 6.0, bias, symmetric=symmetric))
    assert np.abs(got - want).max() <= 3e-6 * max(1.0, np.abs(x).max() * np.abs(w).sum(1).max())


def test_llm_int8_without_outliers_is_the_plain_product():
    x, w, bias, _, _ = layer(9, 33, 64, 1)
    codes, scales, _ = ops.quantize_weight(w, 8)
    plain = _core.linear_forward(_core.linear_pack_s8(codes, scales[:, 0], bias), x, SYMMETRIC, 0, None, 0)
    assert np.array_equal(zq.llm_int8_matmul(x, w, np.inf, bias), plain)


def test_llm_int8_with_nothing_but_outliers_is_the_float_product():
    x, w, bias, _, _ = layer(9, 33, 64, 1)
    x[x == 0] = 1
    got = everywhere(lambda: zq.llm_int8_matmul(x, w, 1e-30, bias))
    assert np.abs(got - (x.astype(np.float64) @ w.T + bias)).max() <= 1e-5


def test_a_column_of_exactly_the_threshold_is_an_outlier():
    x, w = np.zeros((2, 8), np.float32), np.ones((1, 8), np.float32) / 3
    x[0, 3], x[1, 5] = 6, np.nextafter(np.float32(6), np.float32(0))
    # 6 / 3 comes from float32 weights; the other from codes, whose scale makes both factors exact as well: so look at what
    # is left for the codes instead
    want = llm_int8(x, w, 6.0)
    assert np.allclose(zq.llm_int8_matmul(x, w, 6.0), want, rtol=1e-6)
    handle = _core.linear_pack_s8(np.full((1, 8), 127, np.int8), np.float32([1 / 381]), None)
    _core.linear_outliers(handle, 6.0, np.array([3, 5]), np.zeros((1, 2), np.float32))
    got = _core.linear_forward(handle, x, SYMMETRIC, 0, None, 0)[:, 0]
    assert got[0] == 0 and got[1] > 1.9  # column 3 is multiplied by the float weight, which is 0 here; column 5 is not


def test_permuted_columns_give_the_same_outputs():
    x, w, bias, _, _ = layer(9, 33, 64, 1)
    x[3, [7, 50]] = 100
    order = np.random.default_rng(0).permutation(64)
    got = zq.llm_int8_matmul(np.ascontiguousarray(x[:, order]), np.ascontiguousarray(w[:, order]), 6.0, bias)
    assert np.allclose(got, zq.llm_int8_matmul(x, w, 6.0, bias), atol=2e-5)


def test_columns_unknown_before_use_the_quantized_weights():
    x, w, _, _, _ = layer(5, 70, 40, 1)
    x = np.clip(x, -3, 3)
    x[2, [4, 30]] = 50, -80
    q = RTN().quantize(w, QuantSpec(8))
    handle = _core.linear_pack_s8(q.codes, q.scales[:, 0], None)
    _core.linear_outliers(handle, 6.0, np.array([30]), np.ascontiguousarray(w[:, [30]]))
    got = everywhere(lambda: _core.linear_forward(handle, x, SYMMETRIC, 0, None, 0))
    mixed = w.copy()
    mixed[:, 4] = q.dequantize()[:, 4]
    rest = x.copy()
    rest[:, [4, 30]] = 0
    want = _core.linear_forward(_core.linear_pack_s8(q.codes, q.scales[:, 0], None), rest, SYMMETRIC, 0, None, 0)
    assert np.abs(got - (want + x[:, [4, 30]] @ mixed[:, [4, 30]].T)).max() <= 1e-4


def test_planted_outliers_cost_nothing_with_llm_int8():
    x, w, _, _, _ = layer(64, 96, 256, 1)
    x = np.clip(x, -4, 4)
    clean = np.abs(zq.llm_int8_matmul(x, w, 6.0) - x @ w.T).mean()
    x[:, [3, 77]] *= 100
    exact = x.astype(np.float64) @ w.T
    assert np.abs(zq.llm_int8_matmul(x, w, 6.0) - exact).mean() <= 1.1 * clean
    assert np.abs(zq.llm_int8_matmul(x, w, np.inf) - exact).mean() >= 10 * clean


@pytest.mark.parametrize("column", [0, 9])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_llm_int8_refuses_what_is_not_finite(column, value):
    x, w, _, _, _ = layer(5, 33, 10, 1)
    x[3, column] = value
    with pytest.raises(ValueError, match="x.*row 3"):
        zq.llm_int8_matmul(x, w)


# -- LoRC

@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (1, 7), (64, 64)])
def test_what_is_left_are_the_other_singular_values(shape):
    rng = np.random.default_rng(0)
    w, w_hat = rng.standard_normal(shape).astype(np.float32), np.zeros(shape, np.float32)
    sigma, before = np.linalg.svd(w.astype(np.float64), compute_uv=False), np.inf
    for rank in (1, 3, 8, 100):
        part = zq.lorc(w, w_hat, rank)
        left = float(((w.astype(np.float64) - part.dense()) ** 2).sum())
        assert part.rank == min(rank, *shape)
        assert abs(left - (sigma[rank:] ** 2).sum()) <= 1e-5 * (sigma ** 2).sum()
        assert left <= before
        before = left


def test_iterations_find_what_all_eigenvectors_give(monkeypatch):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((150, 400)).astype(np.float32)  # flat spectrum: the hard case
    zeros = np.zeros_like(w)
    exact = zq.lorc(w, zeros, 8)
    monkeypatch.setattr(lorc_module, "EXACT", 100)
    found = zq.lorc(w, zeros, 8)
    assert not np.array_equal(found.u, exact.u)
    norms = [np.linalg.norm(w - part.dense()) ** 2 for part in (found, exact)]
    assert norms[0] <= norms[1] * (1 + 1e-4)


def test_no_error_gives_zeros_and_less_than_full_rank_is_exact():
    w = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    none = zq.lorc(w, w, 4)
    assert not none.dense().any() and np.isfinite(none.u).all()
    error = np.outer(np.arange(6), np.arange(9)).astype(np.float32)
    for int8 in (False, True):
        part = zq.lorc(w + error, w, 4, int8)
        assert np.abs(part.dense() - ((w + error) - w)).max() <= (0.4 if int8 else 1e-5)


def test_integer_factors():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, 60)).astype(np.float32)
    part, exact = zq.lorc(w, np.zeros_like(w), 8, int8=True), zq.lorc(w, np.zeros_like(w), 8)
    assert np.array_equal(part.u.codes, ops.quantize_weight(exact.u)[0])
    assert part.nbytes < exact.nbytes / 2
    step_u, step_v = (np.abs(f).max(1) / 127 for f in (exact.u, exact.v))  # half a step is what rounding may cost
    bound = 8 * (step_u.max() * np.abs(exact.v).max() + step_v.max() * np.abs(exact.u).max()) / 2 * 1.1
    assert np.abs(part.dense() - exact.dense()).max() <= bound
    u, v = part.factors()
    assert np.array_equal(part.dense(), u @ v)


def test_lorc_helps_most_where_bits_are_few():
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((64, 128)) * np.exp(rng.standard_normal((1, 128)))).astype(np.float32)
    gains = []
    for bits in (2, 3, 4):
        q = RTN().quantize(w, QuantSpec(bits))
        error = np.linalg.norm(w - q.dequantize())
        rest = np.linalg.norm(w - q.dequantize() - LoRC(rank=8).repair(w, q, q.spec).dense())
        gains.append(error - rest)
    assert gains[0] > gains[1] > gains[2] > 0


# -- in layers

def int8_layer(name, n, k, **extras):
    w = np.random.default_rng([n, k]).standard_normal((n, k)).astype(np.float32)
    act = QuantSpec(8, granularity="token", symmetric=False, dynamic=True)
    return zq.Linear(name, RTN().quantize(w, QuantSpec(8)), None, act, extras=zq.Extras(**extras)), w


@pytest.mark.parametrize("int8", [False, True])
def test_corrected_layers_run_alone_fused_and_in_part(int8):
    x = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)
    parts = []
    for name, n in (("a", 33), ("b", 7)):
        plain, w = int8_layer(name, n, 40)
        parts.append(int8_layer(name, n, 40, correction=zq.lorc(w, np.zeros_like(w), 3, int8))[0])
        left, right = parts[-1].extras.correction.factors()
        x_hat = _core.dequantize_rows(*_core.quantize_tokens(x, ASYMMETRIC, False))
        assert np.allclose(parts[-1](x), plain(x) + (x_hat @ right.T) @ left.T, atol=1e-4)
    both = zq.Linear.fuse(parts)
    assert both.extras.correction.rank == 6
    assert np.array_equal(both(x), np.concatenate([part(x) for part in parts], axis=1))
    rows = np.array([30, 2, 39])
    assert np.array_equal(both.take(rows)(x), both(x)[:, rows])
    codes = _core.quantize_tokens(x, ASYMMETRIC, False)
    assert both.quant == "asymmetric" and np.array_equal(both(codes), both(x))
    with pytest.raises(ValueError, match="differ in their extras"):
        zq.Linear.fuse([parts[0], int8_layer("c", 5, 40)[0]])


def test_layers_with_outliers_run_alone_fused_and_in_part():
    x = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)
    x[4, 11] = 50
    parts, exact = [], []
    for name, n in (("a", 33), ("b", 7)):
        w = int8_layer(name, n, 40)[1]
        parts.append(int8_layer(name, n, 40, outliers=Outliers(6.0, np.array([11]), w[:, [11]].copy()))[0])
        exact.append(llm_int8(x, w, 6.0, symmetric=False))
        assert np.allclose(parts[-1](x), exact[-1], atol=1e-4)
    both = zq.Linear.fuse(parts)
    assert both.quant is None and np.array_equal(both(x), np.concatenate([part(x) for part in parts], axis=1))
    assert np.array_equal(both.take(np.array([3, 0]))(x), both(x)[:, [3, 0]])
    with pytest.raises(ValueError, match="outliers' threshold or columns"):
        zq.Linear.fuse([parts[0], int8_layer("c", 5, 40, outliers=Outliers(5.0, np.array([11]), np.ones((5, 1), F)))[0]])


def test_outliers_need_int8_rows_and_codes_per_token():
    spots = zq.Extras(outliers=Outliers(6.0, np.array([], np.int64), np.ones((2, 0), F)))
    weight = RTN().quantize(np.ones((2, 8), F), QuantSpec(4))
    with pytest.raises(ValueError, match="fc: outliers need 8-bit weights"):
        zq.Linear("fc", weight, None, QuantSpec(8, granularity="token", dynamic=True), extras=spots)
    with pytest.raises(ValueError, match="fc: outliers need"):
        zq.Linear("fc", RTN().quantize(np.ones((2, 8), F), QuantSpec(8)), extras=spots)


def test_factors_of_two_kinds_do_not_stack():
    w = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    with pytest.raises(ValueError, match="float32 and in codes"):
        LowRank.stack([zq.lorc(w, np.zeros_like(w), 2), zq.lorc(w, np.zeros_like(w), 2, int8=True)])


# -- refusals

REFUSED = [
    (lambda: zq.lorc(np.ones((2, 2), F), np.ones((2, 3), F)), ValueError, "one shape"),
    (lambda: zq.lorc(np.ones((2, 2), F), np.full((2, 2), np.inf, F)), ValueError, "w_hat: NaN or Inf"),
    (lambda: zq.lorc(np.ones((2, 2), F), np.ones((2, 2), F), 0), ValueError, "rank: expected an integer of 1 or more, got 0"),
    (lambda: zq.llm_int8_matmul(np.ones((2, 2), F), np.ones((2, 3), F)), ValueError, "expected shapes"),
    (lambda: zq.llm_int8_matmul(np.ones((2, 2), F), np.ones((2, 2), F), 0), ValueError, "threshold"),
    (lambda: zq.LoRC(rank=0), ValueError, "rank: expected an integer of 1 or more, got 0"),
    (lambda: zq.llm_int8_matmul(np.ones((2, 0), F), np.ones((3, 0), F)), ValueError, "expected shapes"),
    (lambda: LLMInt8(threshold=-1), ValueError, "threshold: expected a number above 0, got -1"),
    (lambda: LLMInt8().repair(np.ones((2, 2), F), None, QuantSpec(4)), ValueError, "symmetric 8-bit weights"),
    (lambda: LLMInt8().repair(np.ones((2, 2), F), None, QuantSpec(8)), ValueError, "needs calibration"),
]


@pytest.mark.parametrize("call,error,message", REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_extension_refuses_what_does_not_fit():
    codes, scale = np.ones((3, 8), np.int8), np.ones(3, F)

    def new():
        return _core.linear_pack_s8(codes, scale, None)

    with pytest.raises(ValueError, match=r"u: expected shape \(3, 2\)"):
        _core.linear_correct(new(), np.ones((2, 2), F), np.ones((2, 8), F))
    with pytest.raises(ValueError, match="v: expected shape"):
        _core.linear_correct(new(), np.ones((3, 0), F), np.ones((0, 8), F))
    with pytest.raises(ValueError, match="columns: expected ascending indices below 8, got 8"):
        _core.linear_outliers(new(), 6.0, np.array([8]), np.ones((3, 1), F))
    with pytest.raises(ValueError, match="threshold: expected more than 0, got nan"):
        _core.linear_outliers(new(), float("nan"), np.array([1]), np.ones((3, 1), F))
    with pytest.raises(ValueError, match="int8 weights with one scale per channel"):
        _core.linear_outliers(_core.linear_pack_f32(np.ones((3, 8), F), None), 6.0, np.array([1]), np.ones((3, 1), F))
    split = new()
    _core.linear_outliers(split, 6.0, np.array([1]), np.ones((3, 1), F))
    with pytest.raises(ValueError, match="already"):
        _core.linear_correct(split, np.ones((3, 1), F), np.ones((1, 8), F))
    x = np.ones((2, 8), F)
    with pytest.raises(TypeError, match="takes float32 rows, not codes"):
        _core.linear_forward(split, _core.quantize_tokens(x, SYMMETRIC, False), SYMMETRIC, 0, None, 0)
    with pytest.raises(ValueError, match="quant_in"):
        _core.linear_forward(split, x, INT16, 0, None, 0)
    assert _core.linear_bytes(split) > _core.linear_bytes(new())


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("granularity,dynamic", [("token", True), ("tensor", True), ("tensor", False)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_corrections_behind_branches_and_scales_per_tensor(symmetric, granularity, dynamic, shift):
    """The correction multiplies what the codes stand for, whatever made them."""
    x, w, bias, _, _ = layer(21, 33, 40, 1)
    rng = np.random.default_rng(0)
    branch = Branch(np.exp(rng.standard_normal(40)).astype(F), rng.standard_normal(40).astype(F) if shift else None)
    act = QuantSpec(8, granularity=granularity, symmetric=symmetric, dynamic=dynamic)
    static = None if dynamic else StaticRange(0.03, 128 if symmetric else 100)
    q = RTN().quantize(w, QuantSpec(4, granularity="group", group_size=8))
    correction = zq.lorc(w, q.dequantize(), 3)
    plain, corrected = (zq.Linear("fc", q, bias, act, extras=zq.Extras(static, branch, part)) for part in (None, correction))
    ones = zq.Linear("one", RTN().quantize(np.eye(40, dtype=F), QuantSpec(8)), None, act, extras=zq.Extras(static, branch))
    u, v = correction.factors()
    want = plain(x) + (ones(x).astype(np.float64) @ v.T) @ u.T  # ones(x): the rows that the codes stand for
    assert np.abs(everywhere(lambda: corrected(x)) - want).max() <= 1e-5 * max(1, np.abs(want).max())


def test_outliers_are_found_behind_the_branch():
    x, w, bias, _, _ = layer(21, 33, 40, 1)
    x = np.clip(x, -3, 3)
    scale = np.ones(40, F)
    scale[7] = 0.01  # makes an outlier of column 7
    act = QuantSpec(8, granularity="token", dynamic=True)
    spots = Outliers(6.0, np.array([7]), np.ascontiguousarray(w[:, [7]]))
    fc = zq.Linear("fc", RTN().quantize(w, QuantSpec(8)), bias, act, extras=zq.Extras(branch=Branch(scale), outliers=spots))
    want = llm_int8(Branch(scale)(x), w, 6.0, bias)
    assert np.abs(everywhere(lambda: fc(x)) - want).max() <= 1e-5 * np.abs(want).max()


def test_no_input_features():
    """The sums are empty: the bias is left. In a new thread, whose scratch holds nothing yet."""
    bias, nothing = np.arange(3, dtype=F), np.zeros(0, F)
    spotted, branched = (_core.linear_pack_s8(np.zeros((3, 0), np.int8), np.ones(3, F), bias) for _ in range(2))
    _core.linear_outliers(spotted, 6.0, np.zeros(0, np.int64), np.zeros((3, 0), F))
    _core.linear_input(branched, None, 0, nothing, nothing)
    with ThreadPoolExecutor(1) as pool:
        for handle in (spotted, branched):
            y = pool.submit(_core.linear_forward, handle, np.zeros((2, 0), F), SYMMETRIC, 0, None, 0).result()
            assert y.tolist() == [[0, 1, 2]] * 2
