"""GPTQ: the identities of its specification, the NumPy reference, degenerate Hessians, bad input."""
from __future__ import annotations

import ctypes
import runpy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from alarms import alarms, fork_while, interrupt, resident
from conftest import SHARED

import zquant as zq
from zquant import _core
from zquant.methods import METHODS
from zquant.methods.gptq import FP4, NF4, _grid, _order
from zquant.reference import gptq as reference
from zquant.spec import QuantSpec


def problem(n=37, k=101, seed=1, tokens=400, rank=12):
    """Weights, and the Gram matrix of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, k)) + 0.3 * rng.standard_normal((tokens, k))
    return rng.standard_normal((n, k)).astype(np.float32), x.T @ x / tokens


def drift(k, seed=2, tokens=400):
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((tokens, k)).T @ rng.standard_normal((tokens, k)) / tokens


OPTIONS = [
    {}, {"act_order": False}, {"symmetric": False, "bits": 3}, {"group_size": 32}, {"group_size": 32, "act_order": "group"},
    {"group_size": 16, "act_order": False, "static_groups": False, "symmetric": False},
    {"group_size": 32, "act_order": "group", "static_groups": False}, {"group_size": 64, "mse": True, "bits": 3},
    {"mse": True, "symmetric": False}, {"grid": "nf4", "group_size": 16}, {"grid": "fp4", "mse": True},
    {"grid": [-1, -0.25, 0, 0.3, 1.5], "act_order": False}, {"deviation": True}, {"bits": 2, "group_size": 8},
    {"deviation": True, "alpha": 1.0, "group_size": 32, "act_order": "group", "static_groups": False},
    {"scales": True}, {"scales": True, "group_size": 32, "grid": "nf4"}, {"scales": True, "deviation": True, "bits": 3},
]


def name(options):
    return ",".join(f"{k}={v}" for k, v in options.items()) or "default"


@pytest.fixture(params=OPTIONS, ids=name)
def options(request):
    given = dict(request.param)
    if given.pop("deviation", False):
        given["deviation"] = drift(101)
    if given.pop("scales", False):
        given["scales"] = shared_scales(-(-101 // given.get("group_size", 101)))[:37]
    return given


def shared_scales(groups):
    """For 80 rows: four after another share a scale, and some weights are clipped."""
    return np.random.default_rng(5).uniform(0.1, 0.5, (20, groups)).astype(np.float32).repeat(4, 0)


def of_rows(options, rows):
    """The same options for other rows."""
    return {**options, "scales": shared_scales(options["scales"].shape[1])[rows]} if "scales" in options else options


def for_reference(options):
    return {**options, "grid": _grid(options["grid"])} if "grid" in options else options


def same(a, b):
    zeros = (getattr(a, "zeros", None), getattr(b, "zeros", None))
    return (np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)
            and (zeros[0] is None or np.array_equal(*zeros)))


def trace(d, h):
    return np.einsum("ij,jk,ik->", d, h, d)


def error(w, q):
    return w - q.dequantize().astype(np.float64)


# ---- the reference, and its identities -------------------------------------------------------------------------
@pytest.mark.parametrize("block", [1, 8, 32, 101])
def test_identities_of_the_reference(options, block):
    """W - Q = E U, and sum E^2 = tr D H D^T: what the solver's loss rests on. GPTAQ adds a term to the first."""
    w, h = problem()
    codes, scales, zeros, d, e, u = reference.gptq(w, h, block=block, **for_reference(options))
    if "deviation" not in options:
        order = reference.gptq_order(np.diag(h), options.get("act_order", True), min(options.get("group_size") or 101, 101))
        damped = h[np.ix_(order, order)] + 0.01 * np.diag(h).mean() * np.eye(101)
        np.testing.assert_allclose(d, e @ u, rtol=0, atol=1e-10)
        np.testing.assert_allclose((e**2).sum(), trace(d, damped), rtol=1e-9)
    whole = reference.gptq(w, h, block=101, **for_reference(options))
    assert np.array_equal(codes, whole[0])
    np.testing.assert_allclose(scales, whole[1], rtol=1e-6)


def test_solver_is_the_reference(options):
    """Codes are equal: float32 sums in the solver, float64 in the reference, and no weight this close to a border."""
    w, h = problem()
    q, info = zq.gptq(w, h, compare=False, **options)
    codes, scales, zeros, *_ = reference.gptq(w, h, **for_reference(options))
    rows = (codes != q.codes).any(1)
    # A search for a scale may meet two equally good ones, and a dynamic group's scale is not exact.
    assert rows.sum() <= (2 if options.get("mse") or not options.get("static_groups", True) else 0)
    np.testing.assert_allclose(q.scales[~rows], scales[~rows], rtol=2e-6)
    if getattr(q, "zeros", None) is not None:
        assert np.array_equal(q.zeros[~rows], zeros[~rows])
    if "deviation" not in options:
        np.testing.assert_allclose(info.loss, trace(error(w, q), h), rtol=2e-5)


def test_the_comparison_sees_a_planted_fault():
    w, h = problem()
    q, _ = zq.gptq(w, h, compare=False)
    h[3, 7] = h[7, 3] = h[3, 7] + 0.2
    assert (reference.gptq(w, h)[0] != q.codes).any()


def test_golden():
    """Two columns, by hand: H = [[1, c], [c, 1]] moves c * error of the first to the second (damping 0)."""
    w = np.array([[0.34, 0.34], [1.0, 3.0]], np.float32)
    h = np.array([[1, 0.9], [0.9, 1]])
    q, info = zq.gptq(w, h, bits=3, damping=0.0, act_order=False)
    s0 = 0.34 / 3  # both weights of row 0 are at the end of the grid: nothing is lost
    np.testing.assert_allclose(q.scales[:, 0], [s0, 1], rtol=1e-6)
    assert q.codes.tolist() == [[3, 3], [1, 3]] and info.loss == 0
    q, info = zq.gptq(np.array([[1.4, 3.0]], np.float32), h, bits=3, damping=0.0, act_order=False)
    assert q.codes.tolist() == [[1, 3]]  # 3 + 0.9 * 0.4 is clamped to 3
    np.testing.assert_allclose(info.loss, 0.4**2, rtol=1e-5)
    q, info = zq.gptq(np.array([[1.4, 2.3, 3.0]], np.float32), np.eye(3) + 0.9 * (np.eye(3, k=1) + np.eye(3, k=-1)) * [1, 1, 0]
                      * np.array([[1], [1], [0]]), bits=3, damping=0.0, act_order=False)
    assert q.codes.tolist() == [[1, 3, 3]]  # 2.3 + 0.9 * 0.4 = 2.66: up, where round to nearest goes down
    np.testing.assert_allclose(info.loss, 0.4**2 + 0.7**2 - 2 * 0.9 * 0.4 * 0.7, rtol=1e-5)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The names of golden_check.py: GPTQ and GPTAQ in plain Python lists, by another hand."""
    file = SHARED / "methods" / "golden_check.py"
    if not file.is_file():
        pytest.skip("no shared/ beside the repository; set ZQUANT_SHARED")
    return runpy.run_path(str(file))


@pytest.mark.parametrize(("group", "alpha"), [(None, 0), (4, 0), (None, 0.25), (None, 1.0)])
def test_golden_check(golden, group, alpha):
    """Unsigned 4-bit codes of columns as they are; a group's scale is found when it is reached, from its weights then."""
    weights = [[float(np.float32(x)) for x in row] for row in golden["W"]]
    want = golden["gptq"](weights, golden["U"], 8, grp=group, stale=False, P=golden["Pa"][alpha] if alpha else None, lazy="w")
    deviation = {"deviation": np.array(golden["dXX"]), "alpha": alpha} if alpha else {}
    q, _ = zq.gptq(np.array(weights, np.float32), np.array(golden["H"]), 4, group, False, act_order=False, damping=0.0,
                   static_groups=group is None, compare=False, **deviation)
    np.testing.assert_allclose(q.dequantize(), want[0], rtol=0, atol=1e-5)


# ---- what must not change the result ---------------------------------------------------------------------------
def test_blocks_threads_and_levels_do_not_show(options):
    """Bit for bit: every weight is one chain of fma over the columns before it."""
    w, h = problem(n=70)
    options = of_rows(options, slice(70))
    first, info = zq.gptq(w, h, **options)
    for block in (1, 8, 31, 1000):
        assert same(first, zq.gptq(w, h, block=block, **options)[0])
    before = _core.threads()
    try:
        for threads in (1, 2, 3):
            _core.set_threads(threads)
            again, other = zq.gptq(w, h, **options)
            assert same(first, again) and other == info
    finally:
        _core.set_threads(before)
    for level in zq.cpu.info().available:
        with zq.cpu.use(level):
            assert same(first, zq.gptq(w, h, **options)[0])


def test_threads_do_not_show_in_the_factor():
    """More columns than a block of the factorisation has, and more rows than a job."""
    w, h = problem(n=300, k=700, tokens=900)
    before = _core.threads()
    results = []
    try:
        for threads in (1, 2, 4):
            _core.set_threads(threads)
            results.append(zq.gptq(w, h, group_size=64))
    finally:
        _core.set_threads(before)
    assert all(same(results[0][0], q) and info == results[0][1] for q, info in results)
    codes = reference.gptq(w, h, group_size=64)[0]
    assert (codes != results[0][0].codes).mean() < 2e-3


def test_solvers_side_by_side_leave_blas_its_threads():
    """Each of them has BLAS keep to one thread meanwhile; the last one puts back what the first one found."""
    blas = ctypes.CDLL(_core.__file__)
    w, h = problem(n=4, k=700)
    before, want = blas.openblas_get_num_threads(), zq.gptq(w, h)[0]
    blas.openblas_set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(same(want, q) for q, _ in pool.map(lambda _: zq.gptq(w, h), range(24)))
        assert blas.openblas_get_num_threads() == 2
    finally:
        blas.openblas_set_num_threads(before)


def test_rows_do_not_depend_on_each_other(options):
    w, h = problem(n=40)
    whole, _ = zq.gptq(w, h, **of_rows(options, slice(40)))
    for rows in (slice(0, 1), slice(5, 38)):
        part, _ = zq.gptq(w[rows], h, **of_rows(options, rows))
        assert np.array_equal(part.codes, whole.codes[rows]) and np.array_equal(part.scales, whole.scales[rows])


def test_scale_of_the_hessian_shows_in_the_losses_only(options):
    w, h = problem()
    options = {**options, "deviation": 64 * options["deviation"]} if "deviation" in options else options
    halved = {**options, "deviation": options["deviation"] / 64} if "deviation" in options else options
    a, b = zq.gptq(w, h, **halved), zq.gptq(w, 64 * h, **options)
    assert same(a[0], b[0])
    np.testing.assert_allclose(64 * a[1].loss, b[1].loss, rtol=1e-9)


def test_awkward_arrays(nasty_arrays):
    w, h = problem(n=9, k=24)
    first, _ = zq.gptq(w, h, group_size=8)
    for array in nasty_arrays(w).values():
        assert same(first, zq.gptq(array, h, group_size=8)[0])
    for array in nasty_arrays(h).values():
        assert same(first, zq.gptq(w, array, group_size=8)[0])
    zq.gptq(w, h.astype(np.float32), group_size=8)


# ---- what it is for ----------------------------------------------------------------------------------------------
def test_better_than_round_to_nearest(options):
    w, h = problem()
    q, info = zq.gptq(w, h, **options)
    assert info.loss < 0.7 * info.rtn_loss and info.rtn_rows <= 2 and info.fallback is None
    if not {"grid", "deviation", "scales"} & set(options):
        group = options.get("group_size")
        codes, scales, zeros = zq.ops.quantize_weight(w, options.get("bits", 4), group, options.get("symmetric", True))
        rtn = zq.ops.dequantize_weight(codes, scales, zeros, group)
        np.testing.assert_allclose(info.rtn_loss, trace((w - rtn).astype(np.float64), h), rtol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_no_row_is_worse_than_round_to_nearest(seed):
    """Steep spectra and few bits, where greedy rounding with clipping does lose."""
    rng = np.random.default_rng(seed)
    k = 24
    x = rng.standard_normal((30, k)) * 10.0 ** -rng.uniform(0, 2, k)
    w, h = rng.standard_t(2, (64, k)).astype(np.float32), x.T @ x / 30
    q, info = zq.gptq(w, h, bits=2, symmetric=False, act_order=False)
    plain, other = zq.gptq(w, h, bits=2, symmetric=False, act_order=False, compare=False)
    codes, scales, zeros = zq.ops.quantize_weight(w, 2, None, False)
    rtn = np.einsum("ij,jk,ik->i", d := w - zq.ops.dequantize_weight(codes, scales, zeros).astype(float), h, d)
    loss = np.einsum("ij,jk,ik->i", d := error(w, q), h, d)
    before = np.einsum("ij,jk,ik->i", d := error(w, plain), h, d)
    assert (loss <= rtn * (1 + 1e-4)).all()
    assert info.rtn_rows == (before > rtn).sum() > 0 and np.isnan(other.rtn_loss)


def test_uncorrelated_inputs_give_round_to_nearest():
    w, _ = problem()
    for symmetric in (True, False):
        q, info = zq.gptq(w, 3 * np.eye(101), 4, 16, symmetric)
        assert same(q, zq.methods.RTN().quantize(w, QuantSpec(4, granularity="group", group_size=16, symmetric=symmetric)))
        assert info.rank == 101 and abs(info.loss / info.rtn_loss - 1) < 1e-6


def test_eight_bits_lose_little():
    w, h = problem()
    q, info = zq.gptq(w, h, bits=8, group_size=16)
    assert info.loss < 1e-4 * trace(w.astype(np.float64), h)


def test_permuted_columns_permute_the_result():
    w, h = problem()
    p = np.random.default_rng(0).permutation(101)
    assert np.array_equal(zq.gptq(w[:, p], h[np.ix_(p, p)])[0].codes, zq.gptq(w, h)[0].codes[:, p])


def test_mse_scales_have_less_weighted_error():
    w, h = problem()
    weight = np.diag(h)
    plain, _ = zq.gptq(w, np.diag(weight), 3, compare=False)
    searched, info = zq.gptq(w, np.diag(weight), 3, mse=True, compare=False)
    assert (error(w, searched) ** 2 @ weight <= error(w, plain) ** 2 @ weight * (1 + 1e-6)).all()
    assert (searched.scales <= plain.scales).all() and (searched.scales < plain.scales).mean() > 0.5


def test_gptaq_lowers_the_asymmetric_loss():
    """|w_hat x - w x_float|^2 over the tokens, against GPTQ that does not know x_float."""
    rng = np.random.default_rng(3)
    n, k, tokens = 32, 64, 2000
    x = rng.standard_normal((tokens, 8)) @ rng.standard_normal((8, k)) + 0.3 * rng.standard_normal((tokens, k))
    x_float = 1.05 * x + 0.15 * rng.standard_normal(x.shape)
    w = rng.standard_normal((n, k)).astype(np.float32)
    h, d = x.T @ x / tokens, (x_float - x).T @ x / tokens

    def loss(q):
        return ((x @ q.dequantize().T - x_float @ w.T) ** 2).sum() / tokens

    without = loss(zq.gptq(w, h)[0])
    quarter, info = zq.gptq(w, h, deviation=d)
    whole, info = zq.gptq(w, h, deviation=d, alpha=1.0)
    assert loss(whole) < loss(quarter) < without
    rtn = zq.methods.RTN().quantize(w, QuantSpec(4))
    np.testing.assert_allclose(loss(whole) - loss(rtn), info.loss - info.rtn_loss, rtol=1e-6)


def test_grids():
    assert np.array_equal(_grid("NF4")[0], NF4) and (np.diff(NF4) > 0).all()
    values, borders = _grid("fp4")
    x = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 7, -7], np.float32)
    want = [0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, 6, -6]
    assert FP4[np.searchsorted(borders, x, side="left")].tolist() == want
    q, _ = zq.gptq(6 * np.array([[1, 0.125, -0.125]], np.float32), np.eye(3), grid="fp4")
    assert q.dequantize().tolist() == [[6, 1, -1]]


def test_order_of_groups():
    diagonal = np.array([1, 5, 2, 9, 3, 4, 7.0])
    assert _order(diagonal, "group", 2).tolist() == [3, 2, 1, 0, 5, 4, 6] == reference.gptq_order(diagonal, "group", 2).tolist()
    assert _order(diagonal, True, 2).tolist() == [3, 6, 1, 5, 4, 2, 0]


# ---- degenerate input --------------------------------------------------------------------------------------------
def finite(q, info):
    assert np.isfinite(q.dequantize()).all() and np.isfinite(q.scales).all() and (q.scales > 0).all()
    assert np.isfinite([info.loss, info.rtn_loss, info.damping]).all() and info.loss <= info.rtn_loss


@pytest.mark.parametrize("damping", [0.0, 1e-8, 0.01])
def test_singular_hessians(options, damping):
    """Rank 1 (one calibration token), a few tokens, nothing at all, one live column."""
    w, _ = problem()
    rng = np.random.default_rng(0)
    one, few, live = rng.standard_normal((1, 101)), rng.standard_normal((5, 101)), np.zeros((1, 101))
    live[0, 4] = 2
    for x in (one, few, live, 0 * one):
        q, info = zq.gptq(w, x.T @ x, damping=damping, **options)
        if "deviation" not in options:
            finite(q, info)
        assert info.dead == (x == 0).all(0).sum() and info.rank <= 101 - info.dead
        assert (info.fallback == "damping") == (info.damping > damping)
    x = np.ones((1, 101))
    q, info = zq.gptq(w, x.T @ x, damping=damping, **options)
    assert info.rank == 1
    assert damping or info.fallback == "damping"


def test_dead_columns_and_zero_rows(options):
    w, h = problem()
    dead = [0, 17, 100]
    h[dead], h[:, dead], w[3] = 0, 0, 0
    if "grid" in options:
        return  # a grid need not have a 0
    q, info = zq.gptq(w, h, **options)
    assert info.dead == 3
    assert (q.dequantize()[:, dead] == 0).all()
    assert "deviation" in options or (q.dequantize()[3] == 0).all()


def test_huge_and_tiny_weights():
    w, h = problem()
    w[0] *= np.float32(1e37)
    w[1] *= np.float32(1e-42)
    w[2, 5] = 3e38
    q, _ = zq.gptq(w, h)
    assert np.isfinite(q.dequantize()).all()
    assert same(zq.gptq(w, 1e30 * h)[0], q) or (zq.gptq(w, 1e30 * h)[0].codes != q.codes).mean() < 1e-2


def test_a_hessian_that_is_far_from_positive_definite():
    w, _ = problem()
    h = np.ones((101, 101)) * 1e3
    h[np.diag_indices(101)] = 1
    q, info = zq.gptq(w, -h + 2 * np.diag(np.diag(h)))
    assert info.fallback == "damping" and info.damping > 100
    h = np.zeros((101, 101))
    h[0, 0] = 1
    h[1, 1] = 1e-300
    assert np.isfinite(zq.gptq(w, h)[0].dequantize()).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (3, 1), (33, 2)])
def test_small_and_empty(shape):
    w = np.ones(shape, np.float32)
    for grid in (None, "nf4"):
        q, info = zq.gptq(w, np.eye(shape[1]), group_size=4, grid=grid)
        assert q.codes.shape == shape and q.dequantize().shape == shape
        np.testing.assert_allclose(q.dequantize(), w, rtol=1e-6)


def test_input_is_not_changed(options):
    w, h = problem()
    copies = w.copy(), h.copy()
    w.flags.writeable = h.flags.writeable = False
    zq.gptq(w, h, **options)
    assert np.array_equal(w, copies[0]) and np.array_equal(h, copies[1])


# ---- bad input -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "exception", "message"), [
    ({"w": np.zeros((2, 3), np.float64)}, TypeError, "w: expected float32"),
    ({"w": np.zeros(3, np.float32)}, ValueError, "w: expected 2"),
    ({"w": np.full((2, 3), np.nan, np.float32)}, ValueError, "w: NaN or Inf in row 0"),
    ({"hessian": np.eye(4)}, ValueError, "hessian: expected shape"),
    ({"hessian": np.eye(3, dtype=int)}, TypeError, "hessian: expected float32 or float64"),
    ({"hessian": None}, TypeError, "hessian"),
    ({"hessian": np.diag([1, np.inf, 1])}, ValueError, "hessian: NaN or Inf in row 1"),
    ({"hessian": np.eye(3) + np.eye(3, k=1)}, ValueError, "hessian: not symmetric in row 0"),
    ({"hessian": np.diag([1.0, 1, -1])}, ValueError, "hessian: a negative diagonal element in row 2"),
    ({"deviation": np.eye(2)}, ValueError, "deviation: expected shape"),
    ({"deviation": np.full((3, 3), np.nan)}, ValueError, "deviation: NaN or Inf in row 0"),
    ({"bits": 9}, ValueError, "bits"), ({"group_size": 0}, ValueError, "group_size"),
    ({"symmetric": 2}, TypeError, "symmetric"),
    ({"act_order": "rows"}, ValueError, "act_order"), ({"damping": -1.0}, ValueError, "damping"),
    ({"damping": np.nan}, ValueError, "damping"), ({"damping": "a"}, TypeError, "damping"), ({"block": 0}, ValueError, "block"),
    ({"alpha": np.inf}, ValueError, "alpha"), ({"grid": "nf5"}, ValueError, "grid: unknown"),
    ({"grid": [1.0]}, ValueError, "grid: expected 2"), ({"grid": [1.0, 0.0]}, ValueError, "grid: expected finite"),
    ({"static_groups": False, "group_size": 2}, ValueError, "static_groups"),
    ({"scales": np.ones((2, 2), np.float32)}, ValueError, "scales: expected shape"),
    ({"scales": np.ones((2, 1))}, TypeError, "scales: expected float32"),
    ({"scales": np.array([[1], [0]], np.float32)}, ValueError, "scales: expected normal numbers above 0, got another in row 1"),
    ({"scales": np.ones((2, 1), np.float32), "symmetric": False}, ValueError, "scales: stay"),
    ({"scales": np.ones((2, 1), np.float32), "static_groups": False, "act_order": False}, ValueError, "scales: stay"),
])
def test_bad_input(changes, exception, message):
    given = {"w": np.ones((2, 3), np.float32), "hessian": np.eye(3)} | changes
    with pytest.raises(exception, match=message):
        zq.gptq(given.pop("w"), given.pop("hessian"), **given)


def test_numpy_s_numbers_are_numbers():
    w, h = problem()
    given = zq.gptq(w, h, np.int64(4), np.int32(16), np.True_, act_order=np.False_)[0]
    assert same(given, zq.gptq(w, h, 4, 16, True, act_order=False)[0])


def test_the_core_checks_its_arguments():
    w, h, order = np.ones((2, 4), np.float32), np.eye(4), np.arange(4)
    rest = (4, True, None, None, 2, False, False, True, 128, 0.01, 1.0, None)
    assert _core.gptq(w, h, None, order, *rest) is not None
    for bad in (np.array([0, 1, 2, 2]), np.array([0, 1, 2, 4]), np.array([-1, 0, 1, 2]), np.arange(3)):
        with pytest.raises(ValueError, match="order"):
            _core.gptq(w, h, None, bad, *rest)
    with pytest.raises(ValueError, match="tears"):
        _core.gptq(w, h, None, np.array([0, 2, 1, 3]), *rest[:5], True, *rest[6:])
    values = np.array([0, 1], np.float32)
    for bad in (values, values[:0]):
        with pytest.raises(ValueError, match="borders"):
            _core.gptq(w, h, None, order, 4, True, values, bad, *rest[4:])
    with pytest.raises(ValueError, match="values"):
        _core.gptq(w, h, None, order, 4, True, values[::-1], values[:1], *rest[4:])


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------
LONG = {"check and factor": (dict(n=8, k=5632), {}), "columns": (dict(n=32768, k=1024), {"mse": True}),
        "shift": (dict(n=8, k=3072), {"deviation": True, "compare": False})}


def long_problem(name):
    """Half a second or more on two cores, most of it in one of the solver's parts."""
    sizes, options = LONG[name]
    n, k = sizes["n"], sizes["k"]
    w = np.random.default_rng(0).standard_normal((n, k), np.float32)
    given = {"deviation": 0.01 * np.eye(k, k=1)} if options.get("deviation") else {}
    return w, np.eye(k) + 0.01, {**options, **given}


FORKS = """
import os, signal, numpy as np, zquant as zq
zq.set_num_threads(2)
rng = np.random.default_rng(0)
x = rng.standard_normal((2200, 2048), np.float32)
w, h = rng.standard_normal((700, 2048), np.float32), x.T @ x
def compute():
    return zq.gptq(w, h, bits=4)[0].codes
"""


@pytest.mark.parametrize("after", [0.02, 0.06, 0.1, 0.2])
def test_a_handler_that_forks(after):
    """The child has none of the threads that were at work: it says so or ends with the same codes, and does not wait."""
    fork_while(FORKS, after, "a signal handler forked")


@pytest.mark.parametrize("name", LONG)
def test_handlers_of_signals_run_meanwhile(name):
    """Python code that raises nothing changes nothing, and need not wait for the end; on another thread neither."""
    w, h, options = long_problem(name)
    want, _ = zq.gptq(w, h, **options)
    calls, start = [], time.process_time()
    with alarms(lambda *_: calls.append(time.process_time()), 0.06, 0.06):
        got, _ = zq.gptq(w, h, **options)
    took = time.process_time() - start
    gaps = np.diff([start, *calls])
    assert same(want, got) and (gaps.max() < 0.5 * took or took < 0.3)
    with ThreadPoolExecutor(1) as pool, alarms(lambda *_: None, 0.06, 0.06):
        assert same(want, pool.submit(zq.gptq, w, h, **options).result()[0])


@pytest.mark.parametrize("name", LONG)
def test_an_interrupted_solver_ends_at_once(name):
    """By its share of the whole call's CPU time, which other programs do not change."""
    w, h, options = long_problem(name)
    want, _ = zq.gptq(w, h, **options)  # with the page faults of a first call
    start = time.process_time()
    zq.gptq(w, h, **options)
    whole = time.process_time() - start
    late = []
    for part in (0.02, 0.1, 0.2):
        start = time.process_time()
        with pytest.raises(KeyboardInterrupt, match="alarm"), alarms(interrupt, part * whole):
            zq.gptq(w, h, **options)
        late.append((time.process_time() - start) / whole - part)
    assert min(late) < 0.5, late  # near 0.8 where it goes on to its end
    assert same(want, zq.gptq(w, h, **options)[0])


def test_an_interrupted_solver_keeps_no_memory():
    """The factor alone would be 75 MB each time."""
    w, h = np.ones((8, 3072), np.float32), np.eye(3072) + 0.01
    zq.gptq(w, h)
    before = resident()
    for after in (0.001, 0.03, 0.06, 0.09, 0.12):
        with pytest.raises(KeyboardInterrupt), alarms(interrupt, after):
            while True:
                zq.gptq(w, h)
    assert resident() < before + 60e6


# ---- a model ---
@pytest.mark.parametrize("bits", [4, 3])
def test_half_of_the_perplexity_is_recovered(shared, bits):
    """Per channel, weights only: 60 windows of WikiText-2's test, calibrated on 128 of its validation text."""
    lm = zq.load(Path(__file__).parent / "data" / "tiny-llama-5m")
    text, unseen = ((shared / "data" / "wikitext2" / name).read_text(encoding="utf-8")
                    for name in ("wiki.valid.tokens", "wiki.test.raw"))
    windows = np.array(lm.tokenizer.encode(text.replace(" <unk>", "")).ids[:128 * 512]).reshape(128, 512)
    ids = lm.tokenizer.encode(unseen).ids[:60 * 512]
    scheme = zq.Scheme(f"w{bits}", weights=QuantSpec(bits))
    rounded = zq.perplexity(zq.quantize(lm, scheme), ids).ppl
    solved = zq.perplexity(zq.quantize(lm, scheme, "gptq", calib=list(windows)), ids).ppl
    assert rounded - solved >= 0.5 * (rounded - zq.perplexity(lm, ids).ppl)


# ---- the method ------------------------------------------------------------------------------------------------------
def test_method():
    method = METHODS["gptq"](act_order="group", damping=0.02)
    assert zq.Method.from_dict(method.to_dict()) == method and method.needs == {"gram"}
    w, h = problem()
    spec = QuantSpec(4, granularity="group", group_size=16, symmetric=False)
    stats = {"gram": h, "deviation": drift(101)}
    gptaq = METHODS["gptaq"](act_order="group", damping=0.02)
    assert zq.Method.from_dict(gptaq.to_dict()) == gptaq and gptaq.needs == {"gram", "deviation"}
    assert same(method.quantize(w, spec, {"gram": h}), zq.gptq(w, h, 4, 16, False, act_order="group", damping=0.02)[0])
    assert same(method.quantize(w, spec, stats), method.quantize(w, spec, {"gram": h}))
    assert same(gptaq.quantize(w, spec, stats),
                zq.gptq(w, h, 4, 16, False, act_order="group", damping=0.02, deviation=stats["deviation"])[0])
    with pytest.raises(ValueError, match="gram"):
        method.quantize(w, spec)
    with pytest.raises(ValueError, match="deviation and gram"):
        gptaq.quantize(w, spec, {"gram": h})


@pytest.mark.parametrize("spec", [QuantSpec(4, granularity="row_block", blocks=4), QuantSpec(3, granularity="tensor")])
@pytest.mark.parametrize("name", ["gptq", "gptaq"])
def test_rows_that_share_a_scale(spec, name):
    """They have that of round to nearest, so that only the codes differ, for the better."""
    w, h = problem(n=36)
    stats = {"gram": h, "deviation": drift(101)}
    tensor, info = METHODS[name]().solve(w, spec, stats)
    rtn = METHODS["rtn"]().quantize(w, spec)
    np.testing.assert_array_equal(tensor.scales, rtn.scales)
    assert tensor.spec == spec and tensor.nbytes == rtn.nbytes and len(np.unique(tensor.scales)) == (spec.blocks or 1)
    assert info.loss < info.rtn_loss and (name == "gptaq" or trace(error(w, tensor), h) < 0.7 * trace(error(w, rtn), h))
    for options in ({"mse": True}, {"static_groups": False, "act_order": False}):
        with pytest.raises(ValueError, match="with the scales of round to nearest: not with mse=True"):
            METHODS[name](**options).solve(w, spec, stats)


def test_given_scales_are_not_the_result_s():
    """Neither where round to nearest is all there is; and weights far beyond the last code are that code, without a warning."""
    w, scales = np.full((2, 3), 3e38, np.float32), np.full((2, 1), 1e-37, np.float32)
    for hessian in (np.eye(3), np.diag([1.0, 0, 1]), -1e30 * (np.ones((3, 3)) - np.eye(3)) + 1e30 * np.eye(3)):
        tensor, _ = zq.gptq(w, hessian, scales=scales)
        assert np.abs(tensor.codes).max() == 7
        np.testing.assert_array_equal(tensor.scales, scales)
        assert not np.shares_memory(tensor.scales, scales)
    assert scales.flags.writeable


