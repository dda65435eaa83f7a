"""What a linear layer does beside its product: activations per tensor, static ranges, branches; and how it is stored."""
from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import tiny_decoders as decoders
from tiny_models import FAMILIES, batch, config_of, tensors_of, write

import zquant as zq
from zquant import _core, reference
from zquant.errors import FormatError
from zquant.extras import Branch, Extras, LowRank, Outliers, StaticRange, static_range
from zquant.formats.safetensors import open_checkpoint, write_safetensors
from zquant.linear import Linear
from zquant.qtensor import QTensor
from zquant.spec import QuantSpec

PER_TENSOR = {(symmetric, dynamic): QuantSpec(8, granularity="tensor", symmetric=symmetric, dynamic=dynamic)
              for symmetric in (True, False) for dynamic in (True, False)}
WEIGHTS = {"int8": QuantSpec(), "int4 groups": QuantSpec(4, granularity="group", group_size=16),
           "int8 groups": QuantSpec(8, granularity="group", group_size=8), "per tensor": QuantSpec(granularity="tensor")}
SIZES = [(1, 1, 1), (2, 3, 5), (7, 33, 31), (12, 64, 65), (37, 35, 512), (131, 70, 72), (300, 40, 40)]


def rows(m, k, seed=0):
    """Channels of different sizes around different means."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((m, k)) * rng.uniform(0.1, 4, k) + rng.normal(0, 1, k)).astype(np.float32)


def weight(n, k, spec=WEIGHTS["int8"], seed=1):
    return zq.RTN().quantize(np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32), spec)


def branch_of(k, shift, seed=2):
    rng = np.random.default_rng(seed)
    return Branch(rng.uniform(0.3, 3, k).astype(np.float32), rng.normal(0, 1, k).astype(np.float32) if shift else None)


def codes_of(x, spec, static):
    """Token codes of x with one scale for all rows, in NumPy."""
    if spec.dynamic:
        ends = np.array([[min(0, x.min(initial=0)), max(0, x.max(initial=0))]], np.float32)
        _, scale, zero = reference.quantize_per_token(ends, spec.symmetric)
        static = StaticRange(scale[0], 128 if zero is None else zero[0])
    q = np.clip(np.rint(x / np.float32(static.scale)) + static.zero, 0, 255).astype(np.uint8)
    return q, np.full(len(x), static.scale, np.float32), np.full(len(x), static.zero, np.int32)


def extras_of(x, spec, **others):
    """With a static range that a fifth of the largest values is outside of."""
    ends = np.float32(0.8) * np.stack([x.min(0, initial=0), x.max(0, initial=0)])
    return Extras(None if spec.dynamic else static_range(spec, ends), **others)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("spec", PER_TENSOR.values(), ids=repr)
def test_activations_per_tensor_are_the_codes_that_numpy_makes(isa, threads, kind, spec):
    for m, n, k in SIZES:
        x, w = rows(m, k), weight(n, k, WEIGHTS[kind])
        extras = extras_of(x, spec)
        layer = Linear("fc", w, rows(1, n)[0], spec, extras=extras)
        residual = rows(m, n, 5)
        got = layer(x, "gelu", residual)
        want = Linear("fc", w, rows(1, n)[0], zq.spec.TOKEN_ASYMMETRIC)(codes_of(x, spec, extras.static), "gelu", residual)
        assert got.tobytes() == want.tobytes(), (m, n, k)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_outside_the_range_saturates(isa, symmetric):
    huge = np.float32([[0, 1e38, -1e38, 3.4e38, -3.4e38, 12.7, -12.7, 12.9]])
    zero = 128 if symmetric else 3
    w = QTensor(np.eye(8, dtype=np.int8), np.ones((8, 1), np.float32), None, QuantSpec())
    y = Linear("fc", w, None, PER_TENSOR[symmetric, False], extras=Extras(StaticRange(0.1, zero)))(huge)
    top, low = 255 - zero, -zero
    want = np.clip([0, top, low, top, low, 127, -127, 129], low, top)
    np.testing.assert_array_equal(np.rint(y[0] / np.float32(0.1)), want)


@pytest.mark.parametrize("spec", PER_TENSOR.values(), ids=repr)
@pytest.mark.parametrize("m", [3, 150])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_rows_are_named(isa, threads, spec, m, bad):
    x = rows(m, 40)
    layer = Linear("fc", weight(33, 40), None, spec, extras=extras_of(x, spec))
    x[2, 39] = bad
    with pytest.raises(ValueError, match="x.*row 2"):
        layer(x)


def test_an_input_of_zeros_and_one_without_rows():
    for spec in PER_TENSOR.values():
        layer = Linear("fc", weight(5, 9), None, spec, extras=Extras(None if spec.dynamic else StaticRange(1, 128)))
        assert not layer(np.zeros((3, 9), np.float32)).any()
        assert layer(np.zeros((0, 9), np.float32)).shape == (0, 5)


def test_a_static_range_makes_rows_independent_and_a_dynamic_one_does_not():
    x = rows(20, 30)
    x[0] *= 50
    for spec in PER_TENSOR.values():
        layer = Linear("fc", weight(11, 30), None, spec, extras=extras_of(x, spec))
        alone = np.concatenate([layer(x[i:i + 1]) for i in range(len(x))])
        assert np.array_equal(layer(x), alone) == (not spec.dynamic)


def test_codes_of_minus_128_keep_the_rounding_of_the_activations():
    """Weights that other tools wrote run in float32, with the values that the codes of x stand for."""
    x, k = rows(9, 24), 24
    codes = np.random.default_rng(3).integers(-128, 127, (7, k)).astype(np.int8)
    codes[0, 0] = -128
    w = QTensor(codes, np.full((7, 1), 0.01, np.float32), None, QuantSpec())
    for spec in PER_TENSOR.values():
        for branch in (None, branch_of(k, True)):
            seen = x if branch is None else branch(x)
            extras = extras_of(seen, spec, branch=branch)
            q, scale, zero = codes_of(seen, spec, extras.static)
            values = reference.dequantize_per_token(q, scale, zero)
            got = Linear("fc", w, None, spec, extras=extras)(x)
            np.testing.assert_array_equal(got, Linear("fc", w.dequantize())(values))


# ---- branches ---------------------------------------------------------------------------------------------------------
ON_BRANCHES = {"float32": (None, None), "int16": (QuantSpec(), None), "per token": (QuantSpec(), zq.spec.TOKEN_ASYMMETRIC),
               "symmetric": (WEIGHTS["int4 groups"], zq.spec.TOKEN_SYMMETRIC),
               "static": (QuantSpec(), PER_TENSOR[False, False]), "dynamic": (QuantSpec(), PER_TENSOR[True, True])}


@pytest.mark.parametrize("kind", ON_BRANCHES)
@pytest.mark.parametrize("shift", [True, False])
def test_a_branch_is_what_numpy_computes(isa, threads, kind, shift):
    spec, act = ON_BRANCHES[kind]
    for m, n, k in SIZES:
        x, branch = rows(m, k), branch_of(k, shift)
        seen = branch(x)
        assert np.abs(seen - (x - (branch.shift if shift else 0)) / branch.scale).max() <= 2e-7 * np.abs(seen).max()
        w = weight(n, k, spec) if spec else weight(n, k).dequantize()
        extras = Extras() if act is None else extras_of(seen, act) if act.granularity == "tensor" else Extras()
        got = Linear("fc", w, None, act, extras=Extras(extras.static, branch))(x, "relu")
        assert got.tobytes() == Linear("fc", w, None, act, extras=extras)(seen, "relu").tobytes(), (m, n, k)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 40])
def test_reads_end_with_the_row(isa, guarded, k):
    x = guarded(rows(3, k))
    for spec, act in ON_BRANCHES.values():
        w = weight(4, k, spec) if spec else weight(4, k).dequantize()
        static = StaticRange(0.1, 100) if act == PER_TENSOR[False, False] else None
        assert np.isfinite(Linear("fc", w, None, act, extras=Extras(static, branch_of(k, True)))(x)).all()


def test_a_layer_with_a_branch_takes_rows_only():
    layer = Linear("fc", weight(3, 4), None, zq.spec.TOKEN_ASYMMETRIC, extras=Extras(branch=branch_of(4, False)))
    assert layer.quant is None
    with pytest.raises(TypeError, match="float32 rows"):
        layer(_core.quantize_tokens(rows(2, 4), 2, True))
    with pytest.raises(TypeError, match="float32 rows"):
        _core.linear_forward(layer._packed(), _core.quantize_tokens(rows(2, 4), 2, True), 2, 0, None, 0)


# ---- models -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def tiny(tmp_path):
    return lambda kind="bert": zq.load(write(tmp_path / "float", config_of(kind), tensors_of(kind)))


def on_branches(model, spread=3.0):
    """The same function with a branch in front of every layer of the blocks: columns times scale, bias plus W shift."""
    changed = {}
    for i, (name, layer) in enumerate(model.linears.items()):
        if ".layer." in name:
            key = name.rpartition(".")[0] if any(part in name for part in ("query", "key", "value", "_lin")) else name
            rng = np.random.default_rng(len(key))  # query, key and value read the same rows: one branch
            k = layer.in_features
            branch = Branch(np.exp(rng.uniform(-1, 1, k) * np.log(spread)).astype(np.float32),
                            rng.normal(0, 0.3, k).astype(np.float32))
            bias = layer.bias + layer.weight @ branch.shift
            changed[name] = Linear(name, layer.weight * branch.scale, bias, extras=Extras(branch=branch))
    return model.replace(linears=changed)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_encoder_on_branches_computes_the_same(tiny, kind):
    model, (ids, mask) = tiny(kind), batch(kind)
    moved, want = on_branches(model), model(ids, mask)
    assert np.abs(moved(ids, mask) - want).max() <= 1e-5 * np.abs(want).max()
    small = zq.quantize(moved, "w8a8")
    assert all(small.linears[name].extras == moved.linears[name].extras for name in moved.linears)
    seen = {}
    y = small(ids, mask, tap=lambda name, x, out: seen.setdefault(name, x))
    np.testing.assert_array_equal(y, small(ids, mask))  # what taps see is what runs
    assert np.corrcoef(y.ravel(), want.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("shift", [False, True])
def test_methods_see_what_is_behind_the_branch(tiny, shift):
    name, ids = "encoder.layer.1.output.dense", [[5, 6, 7, 8, 9, 10]] * 3
    plain = tiny()
    layer = plain.linears[name]
    branch = branch_of(layer.in_features, shift)
    moved = plain.replace(linears={name: Linear(name, layer.weight, layer.bias, extras=Extras(branch=branch))})
    needs = {"gram", "samples", "minmax"}
    before, behind = (zq.calibrate(model, ids, needs=needs)[name] for model in (plain, moved))
    np.testing.assert_array_equal(behind["samples"], branch(before["samples"]))
    np.testing.assert_array_equal(behind["minmax"], branch(before["minmax"]))
    rows = branch(before["samples"]).astype(np.float64)
    np.testing.assert_allclose(behind["gram"], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6 * np.abs(behind["gram"]).max())
    scheme = zq.Scheme.parse("w4a16").replace(overrides={"*": None, name: 4})
    got = zq.quantize(moved, scheme, "gptq", calib=ids, mode="parallel").linears[name]
    want = zq.GPTQ().quantize(layer.weight, got.spec, {"gram": behind["gram"]})
    np.testing.assert_array_equal(got.weight.codes, want.codes)


@pytest.mark.parametrize("scheme", ["w8a8-tensor", "w8a8-static", "w8a8-static-sym-wt", "w4a8-static-g16", "w8a8-tensor-sym"])
def test_quantize_per_tensor(tiny, tmp_path, scheme):
    model, (ids, mask) = tiny(), batch("bert")
    calib = [row[m > 0] for row, m in zip(ids, mask)]
    small = zq.quantize(model, scheme, calib=calib, mode="parallel")
    statistics = zq.calibrate(model, calib, needs={"minmax"})
    for name, layer in small.linears.items():
        if layer.spec is not None and "static" in scheme:
            assert layer.extras.static == static_range(layer.activations, statistics[name]["minmax"])
    y, want = small(ids, mask), model(ids, mask)
    assert np.corrcoef(y.ravel(), want.ravel())[0, 1] > (0.99 if scheme.startswith("w8") else 0.9)
    np.testing.assert_array_equal(y, small(ids, mask, tap=lambda *_: None))
    if "static" in scheme:
        np.testing.assert_array_equal(small(ids[:1], mask[:1]), y[:1])
    again = zq.load(small.save(tmp_path / "saved"))
    np.testing.assert_array_equal(again(ids, mask), y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again))(ids, mask), y)
    assert again.nbytes == small.nbytes


def test_what_static_activations_need(tiny):
    model, _ = tiny(), batch("bert")
    with pytest.raises(ValueError, match="w8a8-static.*minmax.*give calib="):
        zq.quantize(model, "w8a8-static")
    ids = [[5, 6, 7]]
    with pytest.raises(ValueError, match="minmax"):
        zq.quantize(model, "w8a8-static", calib=zq.calibrate(model, ids, needs={"absmax"}))
    given = zq.calibrate(model, ids, needs={"minmax"})
    assert zq.quantize(model, "w8a8-static", calib=given).linears[next(iter(given))].extras.static is not None


def test_one_layer_may_differ(tiny):
    model, (ids, mask) = tiny(), batch("bert")
    static = PER_TENSOR[True, False]
    scheme = zq.Scheme.parse("w8a8").replace(activation_overrides={"*.query": static, "*.1.output.dense": None})
    small = zq.quantize(model, scheme, calib=[[5, 6, 7, 8]])
    kinds = {name: layer.activations for name, layer in small.linears.items() if layer.spec is not None}
    assert {kinds[name] for name in kinds if name.endswith("query")} == {static}
    assert kinds["encoder.layer.1.output.dense"] is None and kinds["encoder.layer.0.output.dense"] == scheme.activations
    np.testing.assert_array_equal(small(ids, mask), small(ids, mask, tap=lambda *_: None))
    with pytest.raises(ValueError, match="override 'nothing' matches no"):
        zq.quantize(model, scheme.replace(activation_overrides={"nothing": static}))


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-tensor-sym", "w4a8-static-sym"])
@pytest.mark.parametrize("variant", decoders.FAMILIES)
def test_decoders_per_tensor(tmp_path, variant, scheme):
    """Cut or not, a prompt gives the same bits where ranges are static; the head, if it is a table, reads tokens."""
    config = decoders.config_of(variant)
    model = zq.load(write(tmp_path / "float", config, decoders.tensors_of(config)))
    prompt = decoders.prompts((12,))
    small = zq.quantize(model, scheme, calib=decoders.prompts())
    y, want = small(prompt), model(prompt)
    assert np.corrcoef(y.ravel(), want.ravel())[0, 1] > (0.98 if scheme.startswith("w8") else 0.8)
    np.testing.assert_array_equal(y, small(prompt, tap=lambda *_: None))
    again = zq.load(small.save(tmp_path / "saved"))
    np.testing.assert_array_equal(again(prompt), y)


# ---- the data, and where it goes ---------------------------------------------------------------------------------------
def test_static_range():
    symmetric, asymmetric = PER_TENSOR[True, False], PER_TENSOR[False, False]
    ends = np.float32([[-2, 0.5, 3], [1, 0.5, 6.5]])
    assert static_range(symmetric, ends) == StaticRange(6.5 / 127, 128)
    got = static_range(asymmetric, ends)
    assert got == StaticRange(8.5 / 255, 60) and got.scale == np.float32(8.5 / 255)
    assert static_range(asymmetric, np.float32([[3], [5]])) == StaticRange(5 / 255, 0)
    assert static_range(asymmetric, np.float32([[-5], [-3]])) == StaticRange(5 / 255, 255)
    for zeros in (np.zeros((2, 3), np.float32), np.full((2, 3), 1e-44, np.float32)):
        assert static_range(symmetric, zeros) == StaticRange(1, 128)
    assert np.isfinite(static_range(asymmetric, np.float32([[-3e38], [3e38]])).scale)


GOOD = dict(branch=Branch(np.ones(4, np.float32)), correction=LowRank(np.ones((3, 2), np.float32), np.ones((2, 4), np.float32)),
            outliers=Outliers(6, np.array([1, 3]), np.ones((3, 2), np.float32)))
CODED = LowRank(weight(3, 2), weight(2, 4, seed=8))
TOKEN = QuantSpec(8, granularity="token", dynamic=True)


@pytest.mark.parametrize("make, words", [
    (lambda: StaticRange(0, 0), "scale"), (lambda: StaticRange(np.nan, 0), "scale"), (lambda: StaticRange(1e-40, 0), "scale"),
    (lambda: StaticRange(1e39, 0), "scale"), (lambda: StaticRange(1, 256), "zero"), (lambda: StaticRange(1, 0.5), "zero"),
    (lambda: Branch(np.zeros(3, np.float32)), "positive"), (lambda: Branch(np.full(3, 1e-40, np.float32)), "normal"),
    (lambda: Branch(np.ones(3)), "float64"), (lambda: Branch(np.ones(3, np.float32), np.ones(2, np.float32)), "shift"),
    (lambda: Branch(np.float32([1, np.nan])), "NaN"), (lambda: Branch(np.ones((1, 3), np.float32)), "shape"),
    (lambda: LowRank(np.ones((3, 2), np.float32), np.ones((3, 4), np.float32)), "rank 2 and v rank 3"),
    (lambda: LowRank(weight(3, 2, QuantSpec(4)), np.ones((2, 4), np.float32)), "codes of u"),
    (lambda: Outliers(0, np.array([1]), np.ones((3, 1), np.float32)), "threshold"),
    (lambda: Outliers(6, np.array([1, 1]), np.ones((3, 2), np.float32)), "ascending"),
    (lambda: Outliers(6, [0.5], np.ones((3, 1), np.float32)), "ascending int64 of shape .c,., got float64"),
    (lambda: LowRank(np.ones((3, 0), np.float32), np.ones((0, 4), np.float32)), "rank must be at least 1"),
    (lambda: Outliers(6, np.array([1]), np.ones((3, 2), np.float32)), "weights"),
    (lambda: static_range(QuantSpec(), np.zeros((2, 1), np.float32)), "format"),
    (lambda: static_range(PER_TENSOR[True, False], np.zeros(3, np.float32)), "shape"),
    (lambda: Linear("fc", np.ones((3, 5), np.float32), extras=Extras(branch=GOOD["branch"])), "fc: Branch.*5"),
    (lambda: Linear("fc", np.ones((2, 4), np.float32), extras=Extras(correction=GOOD["correction"])), "fc: LowRank"),
    (lambda: Linear("fc", np.ones((2, 4), np.float32), extras=Extras(outliers=GOOD["outliers"])), "fc: Outliers.*2 rows"),
    (lambda: Linear("fc", np.ones((3, 3), np.float32), extras=Extras(outliers=GOOD["outliers"])), "up to 3.*3 inputs"),
    (lambda: Linear("fc", weight(3, 4), None, PER_TENSOR[True, False]), "fc: static.*extras.static"),
    (lambda: Linear("fc", weight(3, 4), None, PER_TENSOR[True, False], extras=Extras(StaticRange(1, 3))), "zero point 128"),
    (lambda: Linear("fc", weight(3, 4), None, PER_TENSOR[True, True], extras=Extras(StaticRange(1, 128))), "not dynamic"),
    (lambda: Linear("fc", np.ones((3, 4), np.float32), extras=Extras(StaticRange(1, 128))), "not dynamic"),
])
def test_what_does_not_fit_says_so(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_extras_of_the_wrong_kind():
    with pytest.raises(TypeError, match="branch must be a Branch"):
        Extras(branch=np.ones(3))


def test_extras_compare_by_value():
    again = {name: pickle.loads(pickle.dumps(value)) for name, value in GOOD.items()}
    assert Extras(**again) == Extras(**GOOD) and not Extras() and Extras(**GOOD)
    assert Extras(correction=CODED) == Extras(correction=pickle.loads(pickle.dumps(CODED))) != Extras(**GOOD)
    for name in again:
        assert Extras(**dict(again, **{name: None})) != Extras(**GOOD)
    assert Branch(np.float32([1, 2])) != Branch(np.float32([1, 3])) != Branch(np.float32([1, 3]), np.zeros(2, np.float32))
    with pytest.raises(ValueError):
        GOOD["branch"].scale[0] = 2


def test_extras_follow_the_layer():
    x = rows(6, 4)
    layer = Linear("fc", weight(3, 4), None, PER_TENSOR[True, False], extras=Extras(StaticRange(0.1, 128), branch_of(4, True)))
    both = Linear.fuse([layer, layer])
    assert both.extras == layer.extras and both(x).tobytes() == np.concatenate([layer(x)] * 2, 1).tobytes()
    assert layer.take(np.array([2, 0]))(x).tobytes() == layer(x)[:, [2, 0]].tobytes()
    assert pickle.loads(pickle.dumps(layer))(x).tobytes() == layer(x).tobytes()
    assert layer.nbytes == layer.weight.nbytes + 5 + 2 * 16
    assert layer.with_weight(layer.weight).extras == Extras(branch=layer.extras.branch)
    assert "static" in repr(layer) and "branch" in repr(layer)
    corrected = Linear("fc", np.ones((3, 4), np.float32), extras=Extras(correction=GOOD["correction"]))
    split = Linear("fc", weight(3, 4), None, TOKEN, extras=Extras(outliers=GOOD["outliers"]))
    assert corrected.take(np.array([2, 0])).extras.correction.u.shape == (2, 2)
    assert split.take(np.array([2, 0])).extras.outliers.weights.shape == (2, 2)
    assert Extras(correction=CODED).take(np.array([2])).correction.u.codes.tolist() == CODED.u.codes[[2]].tolist()


@pytest.mark.parametrize("other", [dict(branch=branch_of(4, True)), dict(correction=GOOD["correction"]),
                                   dict(outliers=Outliers(5, np.array([1, 3]), np.ones((3, 2), np.float32)))])
def test_layers_with_other_extras_are_not_fused(other):
    a, b = (Linear("fc", weight(3, 4), None, TOKEN, extras=Extras(**fields)) for fields in ({}, other))
    with pytest.raises(ValueError, match="extras"):
        Linear.fuse([a, b])


@pytest.mark.parametrize("args, words", [((0.0, 0, None, None), "scale"), ((1.0, 256, None, None), "zero"),
                                         ((None, 0, np.ones(3, np.float32), None), "factor"),
                                         ((None, 0, np.ones(4), None), "factor"),
                                         ((None, 0, None, np.ones(4, np.float32)), "factor"),
                                         ((None, 0, np.float32([1, 1, 1, np.inf]), None), "factor")])
def test_linear_input_checks_what_it_is_given(args, words):
    handle = _core.linear_pack_s8(np.ones((3, 4), np.int8), np.ones(3, np.float32), None)
    with pytest.raises((ValueError, TypeError), match=words):
        _core.linear_input(handle, *args)
    with pytest.raises(ValueError, match="static"):
        _core.linear_forward(handle, rows(2, 4), 4, 0, None, 0)
    with pytest.raises(ValueError, match="quant_in"):
        _core.linear_forward(handle, rows(2, 4), 7, 0, None, 0)


# ---- files ------------------------------------------------------------------------------------------------------------
NAME = "encoder.layer.0.attention.self.query"


def saved(tiny, tmp_path, change=lambda tensors: None, scheme="w8a8-static", **fields):
    """A saved model whose query layer has the fields given; ``change`` gets the tensors of the file."""
    model = zq.quantize(tiny(), scheme, calib=[[5, 6, 7, 8, 9]])
    layer = model.linears[NAME]
    extras = Extras(layer.extras.static, **fields)
    model = model.replace(linears={NAME: layer.with_weight(layer.weight, layer.activations, extras=extras)})
    file = model.save(tmp_path / "saved") / "model.safetensors"
    checkpoint = open_checkpoint(file)
    tensors = {name: checkpoint.stored(name).array.copy() for name in checkpoint}
    change(tensors)
    write_safetensors(file, tensors, checkpoint.metadata)
    return model, file.parent


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8", "w8a8-static-sym", "w8a8 with outliers"])
@pytest.mark.parametrize("coded", [False, True])
def test_every_field_round_trips(tiny, tmp_path, scheme, coded):
    k, n = 48, 48
    u, v = weight(n, 2), weight(2, k, seed=4)
    extra = dict(correction=LowRank(u, v) if coded else LowRank(u.dequantize(), v.dequantize()))
    if "outliers" in scheme:
        extra = dict(outliers=Outliers(np.inf if coded else 6, np.array([] if coded else [1, 5], np.int64),
                                       np.ones((n, 0 if coded else 2), np.float32)))
    model, place = saved(tiny, tmp_path, scheme=scheme.split()[0], branch=branch_of(k, coded), **extra)
    again = zq.load(place)
    for name, layer in model.linears.items():
        assert (again.linears[name].extras, again.linears[name].activations) == (layer.extras, layer.activations), name
    assert not [name for name in again.tensors if "zquant" in name or "input_" in name]
    assert again.nbytes == model.nbytes


def test_a_float_model_on_branches_round_trips(tiny, tmp_path):
    model, (ids, mask) = on_branches(tiny()), batch("bert")
    np.testing.assert_array_equal(zq.load(model.save(tmp_path / "saved"))(ids, mask), model(ids, mask))


def test_static_ranges_are_stored_as_compressed_tensors_names_them(tiny, tmp_path):
    model, place = saved(tiny, tmp_path)
    tensors, static = open_checkpoint(place), model.linears[NAME].extras.static
    assert tensors[f"{NAME}.input_scale"].tolist() == [static.scale]
    assert tensors[f"{NAME}.input_zero_point"].tolist() == [static.zero - 128]
    config = json.loads((place / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    inputs = config["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"], inputs["symmetric"]) == ("tensor", False, False)
    assert config["format"] == "int-quantized"


@pytest.mark.parametrize("name, value, words", [
    ("input_scale", None, "input_scale' is missing"),
    ("input_zero_point", None, "input_zero_point' is missing"),
    ("input_scale", np.zeros(1, np.float32), "scale must be a positive"),
    ("input_scale", np.ones(2, np.float32), "of shape"),
    ("input_zero_point", np.zeros(1, np.int32), "expected I8"),
    ("zquant_branch_scale", None, "zquant_branch_scale' is missing"),
    ("zquant_branch_scale", np.ones(47, np.float32), "Branch"),
    ("zquant_branch_scale", np.ones((2, 24), np.float32), r"expected F32 of shape \(any,\)"),
    ("zquant_branch_shift", np.full(48, np.nan, np.float32), "NaN"),
    ("zquant_correction_u", None, "zquant_correction_u' is missing"),
    ("zquant_correction_v", np.ones((3, 48), np.float32), "rank"),
    ("zquant_outlier_threshold", None, "zquant_outlier_threshold' is missing"),
    ("zquant_outlier_columns", np.array([1, 48]), "up to 48"),
    ("zquant_outlier_weights", np.ones((47, 2), np.float32), "48 rows"),
])
def test_damaged_files_name_the_layer(tiny, tmp_path, name, value, words):
    def change(tensors):
        del tensors[f"{NAME}.{name}"]
        if value is not None:
            tensors[f"{NAME}.{name}"] = value

    ones = np.ones((48, 2), np.float32)
    if "outlier" in name:
        _, place = saved(tiny, tmp_path, change, "w8a8", outliers=Outliers(6, np.array([1, 5]), ones))
    else:
        _, place = saved(tiny, tmp_path, change, branch=branch_of(48, True), correction=LowRank(ones, ones.T.copy()))
    with pytest.raises(FormatError, match=words) as error:
        zq.load(place).linears[NAME]
    assert NAME in str(error.value) and str(place) in str(error.value)


def test_a_range_without_static_activations(tiny, tmp_path):
    def change(tensors):
        tensors[f"{NAME}.input_scale"] = np.ones(1, np.float32)

    with pytest.raises(FormatError, match="input_scale is stored"):
        zq.load(saved(tiny, tmp_path, change, scheme="w8a8")[1])
