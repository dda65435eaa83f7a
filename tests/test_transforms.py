"""Transforms by folding: the same outputs on every family, the papers' identities, and what they do against outliers."""
from __future__ import annotations

import numpy as np
import pytest
import tiny_decoders
import tiny_models

import zquant as zq
from zquant.methods import Step
from zquant.methods.folded import output_error, rounded_inputs
from zquant.methods.outlier_suppression import thresholds
from zquant.methods.smoothquant import ALPHAS, search_alpha
from zquant.models import foldings as module
from zquant.models.foldings import STAGES, Folding, fold, foldings
from zquant.reference import transforms as reference
from zquant.spec import TOKEN_ASYMMETRIC, TOKEN_SYMMETRIC, QuantSpec, Scheme

BLOCK = STAGES[:-1]
TENSOR = QuantSpec(8, granularity="tensor")
W8A8 = Scheme.parse("w8a8")
EVERY = [*tiny_decoders.VARIANTS, *tiny_models.FAMILIES]
TRANSFORMS = {
    "smoothquant": zq.SmoothQuant(),
    "smoothquant, everywhere": zq.SmoothQuant(0.7, stages=BLOCK),
    "smoothquant, search": zq.SmoothQuant("search"),
    "outlier suppression": zq.OutlierSuppression(steps=4),
    "outlier suppression, everywhere": zq.OutlierSuppression(stages=BLOCK, steps=4),
    "outlier suppression, no shift": zq.OutlierSuppression(shift=False, steps=4),
    "fptq": zq.FPTQ(v0=0.1),
}


@pytest.fixture
def make(tmp_path):
    """A random model of a variant, and token ids for it."""
    def made(variant, **changes):
        if variant in tiny_decoders.VARIANTS:
            config = tiny_decoders.config_of(variant, **changes)
            tensors, ids = tiny_decoders.tensors_of(config), tiny_decoders.prompts((15, 1, 12))
        else:
            config, tensors = tiny_models.config_of(variant), tiny_models.tensors_of(variant)
            ids = [[5, 6, 7, 8, 40], [9], [10, 11, 12]]
        return zq.load(tiny_models.write(tmp_path / variant.replace(" ", "_"), config, tensors)), ids

    return made


def difference(a, b):
    return np.abs(a - b).max() / np.abs(a).max()


def inputs(model, ids):
    """Name -> rows that the layer reads."""
    seen: dict[str, list[np.ndarray]] = {}
    model(ids, tap=lambda name, x, y: seen.setdefault(name, []).append(x.copy()))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def random_scale(rng, folding, k):
    scale = folding.tied(np.exp(rng.normal(0, 1.5, k)))
    return scale, folding.tied(rng.normal(0, 2, k)) if folding.shift else None


def folded_everywhere(model, branch=False):
    rng = np.random.default_rng(0)
    for folding in foldings(model):
        if folding.exact or branch:
            scale, shift = random_scale(rng, folding, model.linears[folding.consumers[0]].in_features)
            model = fold(model, folding, scale, shift, branch=branch)
    return model


# -- the table

@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("variant", EVERY)
def test_folding_changes_nothing(make, variant, branch):
    model, ids = make(variant)
    before = model(ids)
    assert difference(before, folded_everywhere(model, branch)(ids)) <= 1e-5
    np.testing.assert_array_equal(model(ids), before)


@pytest.mark.parametrize("variant", EVERY)
def test_layers_read_what_the_folding_says(make, variant):
    model, ids = make(variant)
    rng, taps = np.random.default_rng(1), inputs(model, ids)
    for folding in foldings(model):
        if folding.exact:
            scale, shift = random_scale(rng, folding, model.linears[folding.consumers[0]].in_features)
            now = inputs(fold(model, folding, scale, shift), ids)
            for name in folding.consumers:
                want = (taps[name] - (0 if shift is None else shift)) / scale
                assert difference(want, now[name]) <= 2e-5


def wrong_bias(layer, scale, shift, branch=None):
    weight = layer.weight * scale
    bias = layer.bias if shift is None else layer.bias + weight @ shift
    return module._changed(layer, weight, bias, layer.extras)


def unscaled(layer, folding, scale, shift):
    return layer


@pytest.mark.parametrize(("name", "fault"), [("_reading", wrong_bias), ("_scaled_rows", unscaled)])
def test_the_comparison_sees_a_planted_fault(make, monkeypatch, name, fault):
    """The bias taken from scaled weights; a source that keeps its scale."""
    model, ids = make("gpt2")
    monkeypatch.setattr(module, name, fault)
    assert difference(model(ids), folded_everywhere(model)(ids)) > 1e-2


# variant -> kinds of qkv, attention, mlp, down, and what reads the last norm; s: can be shifted
KINDS = {
    "gpt2": "norm s, linear s, norm s, none s",
    "gpt2, untied": "norm s, linear s, norm s, none s, norm",
    "gpt2, scale by layer": "norm s, linear s, norm s, linear",
    "opt": "norm s, linear s, norm s, linear",
    "opt, norm after, projections": "none s, linear s, none s, linear",
    "opt, no bias": "norm, linear, norm, linear, norm",
    "gpt_neox": "norm s, linear s, norm s, none s, norm",
    "gpt_neox, no attention bias": "norm, linear, norm s, none s, norm",
    "llama": "norm, linear, norm, linear, norm",
    "llama, biases": "norm, linear s, norm, linear, norm",
    "qwen2": "norm, linear, norm, linear, norm",
    "bert": "none s, linear s, none s, none s",
    "distilbert": "none s, linear s, none s, none s",
}


@pytest.mark.parametrize("variant", KINDS)
def test_what_can_be_folded(make, variant):
    model, _ = make(variant)
    found = foldings(model)
    kinds = [folding.kind + " s" * folding.shift for folding in found]
    *block, last = [*KINDS[variant].split(", "), ""] if len(KINDS[variant].split(", ")) == 4 else KINDS[variant].split(", ")
    assert kinds == block * model.dims.layers + ([last] if last else [])
    assert all(bool(folding.reason) != folding.exact for folding in found)
    names = [name for folding in found for name in folding.consumers]
    assert len(names) == len(set(names))
    sources = [(folding.kind, folding.source, folding.stage) for folding in found if folding.exact]
    assert len(sources) == len(set(sources))


def test_heads_that_share_a_row_share_a_scale(make):
    model, _ = make("llama, one kv head")
    folding = foldings(model)[1]
    assert (folding.heads, folding.stage) == (4, "attention")
    values = np.arange(48.0)
    assert folding.tied(values).tolist() == [*range(36, 48)] * 4
    with pytest.raises(ValueError, match="4 heads share each row"):
        fold(model, folding, values + 1)


@pytest.mark.parametrize(("scale", "shift", "message"), [
    (np.ones(47), None, r"shape \(48,\), got shape \(47,\)"), (np.zeros(48), None, "must be positive"),
    (np.full(48, np.nan), None, "finite"), (np.ones(48), np.ones(48), "needs biases"),
])
def test_refused_scales(make, scale, shift, message):
    model, _ = make("llama")
    with pytest.raises(ValueError, match=message):
        fold(model, foldings(model)[0], scale, shift)


def test_refused_models(make):
    bert, _ = make("bert")
    with pytest.raises(ValueError, match="the residual connection reads the same rows"):
        fold(bert, foldings(bert)[0], np.ones(48))
    small = zq.quantize(make("llama")[0], "w8a8")
    with pytest.raises(ValueError, match="is quantized already"):
        fold(small, foldings(small)[0], np.ones(48))


def test_replace_checks_norms(make):
    model, _ = make("llama")
    with pytest.raises(ValueError, match="no such norm: model.embed_tokens.weight"):
        model.replace(norms={"model.embed_tokens.weight": np.ones((61, 48), np.float32)})
    with pytest.raises(ValueError, match="replace: model.norm.weight: NaN or Inf"):
        model.replace(norms={"model.norm.weight": np.full(48, np.nan)})
    assert model.replace(norms={"model.norm.weight": np.ones(48)}).tensors["model.norm.weight"].dtype == np.float32


# -- transforms of whole models

@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("variant", EVERY)
def test_transforms_change_nothing(make, variant, transform):
    model, ids = make(variant)
    step = TRANSFORMS[transform]
    changed, _ = step.transform(model, zq.calibrate(model, ids, step.needs), W8A8)
    assert difference(model(ids), changed(ids)) <= 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_one_token_is_enough(make, transform):
    model, ids = make("opt")
    step = TRANSFORMS[transform]
    changed, _ = step.transform(model, zq.calibrate(model, [[7]], step.needs), W8A8)
    assert difference(model(ids), changed(ids)) <= 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_steps_travel_as_json(transform):
    step = TRANSFORMS[transform]
    assert Step.from_dict(step.to_dict()) == step
    lists = {"stages": list(step.stages)} if getattr(step, "stages", None) else {}
    assert Step.from_dict({**step.to_dict(), **lists}) == step


def test_branch_is_a_choice(make):
    model, ids = make("bert")
    stats = zq.calibrate(model, ids)
    with_branch, without = (zq.SmoothQuant(branch=b).transform(model, stats, W8A8)[0] for b in (True, False))
    name = "encoder.layer.0.attention.self.query"
    assert with_branch.linears[name].extras.branch is not None and without.linears[name].extras.branch is None
    assert all(without.linears[n] is layer for n, layer in model.linears.items())


def test_layers_that_stay_float_are_left_alone(make):
    model, ids = make("llama")
    scheme = W8A8.with_overrides({"model.layers.1.*": "float"})
    for step in (zq.SmoothQuant(), zq.FPTQ(v0=0.1)):
        changed, _ = step.transform(model, zq.calibrate(model, ids, step.needs), scheme)
        same = {name for name, layer in model.linears.items() if changed.linears[name] is layer}
        assert {name for name in model.linears if name.startswith("model.layers.1.")} < same
        assert "model.layers.0.mlp.up_proj" not in same


# -- SmoothQuant

def matrices(seed=0, k=48, n=16, tokens=24, outlier=100.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k)).astype(np.float32)
    x[:, 3] *= outlier
    return x, rng.standard_normal((n, k)).astype(np.float32)


def test_smoothquant_identities():
    x, w = matrices()
    a, heaviest = np.abs(x).max(0).astype(np.float64), np.abs(w).max(0).astype(np.float64)
    s = zq.smoothquant_scales(a, w)
    np.testing.assert_allclose(a / s, heaviest * s, rtol=1e-14)
    np.testing.assert_allclose(a / s, np.sqrt(a * heaviest), rtol=1e-14)
    np.testing.assert_allclose(a / zq.smoothquant_scales(a, w, 1), 1, rtol=1e-14)
    np.testing.assert_allclose(heaviest * zq.smoothquant_scales(a, w, 0), 1, rtol=1e-14)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.85, 1])
def test_smoothquant_as_the_reference(alpha):
    x, w = matrices()
    a = np.abs(x).max(0)
    a[5], w[:, 7] = 0, 0
    want = reference.smoothquant(a.tolist(), np.abs(w).max(0).tolist(), alpha)
    np.testing.assert_allclose(zq.smoothquant_scales(a, [w[:4], w[4:]], alpha), want, rtol=1e-14)
    assert want[5] == want[7] == 1


def test_smoothquant_scales_have_a_floor():
    assert zq.smoothquant_scales([1e-12, 1.0], np.ones((1, 2), np.float32), 1).tolist() == [1e-5, 1]


@pytest.mark.parametrize(("absmax", "w", "alpha", "message"), [
    ([1, 2], np.ones((3, 3)), 0.5, "absmax has 2 channels"), ([1, -2], np.ones((3, 2)), 0.5, "none below 0"),
    ([1, np.inf], np.ones((3, 2)), 0.5, "finite"), ([1, 2], np.full((3, 2), np.nan), 0.5, "weights: NaN"),
    ([1, 2], np.ones((3, 2)), 1.1, "from 0 to 1"), ([1, 2], np.ones((3, 2)), True, "from 0 to 1"),
    ([1, 2], [], 0.5, "got none"),
])
def test_smoothquant_bad_input(absmax, w, alpha, message):
    with pytest.raises(ValueError, match=message):
        zq.smoothquant_scales(absmax, w, alpha)


def loss_of(x, w, activations, scale, spec=QuantSpec()):
    """RMS error of the outputs, everything spelled out here."""
    z = x / scale
    if activations.granularity == "token":
        step = np.abs(z).max(1, keepdims=True) / 127
    else:
        step = np.abs(z).max() / 127
    v = w * scale
    grid = np.abs(v).max(1, keepdims=True) / 127
    y = (np.rint(z / step) * step) @ (np.rint(v / grid) * grid).T
    return np.sqrt(np.square(y - x.astype(np.float64) @ w.T).mean())


def test_output_error_is_what_it_says():
    x, w = matrices()
    s = zq.smoothquant_scales(np.abs(x).max(0), w)
    for spec in (TOKEN_SYMMETRIC, TENSOR):
        got = output_error(x, [w[:5], w[5:]], QuantSpec(), spec)(s, np.abs(x / s).max())
        assert got == pytest.approx(loss_of(x, w, spec, s)**2 * len(w), rel=1e-3)


def test_a_planted_outlier_orders_the_formats():
    """The specification's table, mean of 8 seeds: smoothing beats scales per token, and these beat one scale."""
    ones, errors = np.ones(48), np.zeros(4)
    for seed in range(8):
        x, w = matrices(seed)
        s = zq.smoothquant_scales(np.abs(x).max(0), w)
        errors += [loss_of(x, w, spec, scale) / 8 for scale in (s, ones) for spec in (TOKEN_SYMMETRIC, TENSOR)]
    smooth_token, smooth_tensor, token, tensor = errors
    assert smooth_token < smooth_tensor < token < tensor
    assert tensor > 3 * smooth_tensor


@pytest.mark.parametrize("activations", [TOKEN_ASYMMETRIC, TOKEN_SYMMETRIC, TENSOR, None], ids=str)
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_the_search_keeps_the_best(activations, outlier):
    x, w = matrices(outlier=outlier)
    most = np.abs(x).max(0).astype(np.float64)
    alpha, scale = search_alpha(most, x, [w[:5], w[5:]], QuantSpec(4), activations)
    loss = output_error(x, [w], QuantSpec(4), activations)
    tried = {a: loss(s, (most / s).max()) for a in ALPHAS for s in [zq.smoothquant_scales(most, w, a)]}
    tried[None] = loss(np.ones(48), most.max())
    assert tried[alpha] == min(tried.values())
    np.testing.assert_array_equal(scale, np.ones(48) if alpha is None else zq.smoothquant_scales(most, w, alpha))


# -- Outlier Suppression+

def spread(seed=0):
    """Channels off centre, one of them far out."""
    x, w = matrices(seed, outlier=40.0)
    x[:, 10] += 30
    return x, w, np.stack([x.min(0), x.max(0)])


def test_outlier_suppression_identities():
    x, _, ends = spread()
    for t in (1.0, 2.5, 20.0):
        z, s = zq.outlier_suppression(ends, t)
        half = np.abs(x - z).max(0)
        assert np.abs((x - z) / s).max() <= t * (1 + 1e-6)
        assert (s >= 1).all() and (s[half <= t] == 1).all()
    assert np.abs(x - z).max() * 2 == pytest.approx(np.ptp(x, axis=0).max())
    assert (zq.outlier_suppression(ends, half.max())[1] == 1).all()


@pytest.mark.parametrize("threshold", [0.3, 1.0, 7.5])
def test_outlier_suppression_as_the_reference(threshold):
    ends = spread()[2]
    z, s = zq.outlier_suppression(ends, threshold)
    want = reference.outlier_suppression(*ends.astype(np.float64).tolist(), threshold)
    np.testing.assert_allclose(z, want[0], rtol=1e-14)
    np.testing.assert_allclose(s, want[1], rtol=1e-14)
    assert not zq.outlier_suppression(ends, threshold, shift=False)[0].any()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("activations", [TOKEN_ASYMMETRIC, TENSOR], ids=str)
def test_the_threshold_loses_least(activations, shift):
    x, w, ends = spread()
    z, s = zq.outlier_suppression(ends, samples=x, weights=[w[:3], w[3:]], activations=activations, shift=shift)
    half = np.abs(ends - z).max(0)
    loss = output_error(x, w, QuantSpec(), activations, z if shift else None)
    tried = [loss(np.maximum(1, half / t), t) for t in thresholds(half.max())]
    chosen = loss(s, (half / s).max())
    assert chosen <= min(tried) * (1 + 1e-6) and chosen < tried[0]


@pytest.mark.parametrize("step", [zq.SmoothQuant(), zq.OutlierSuppression(), zq.FPTQ(), zq.AWQScale()], ids=repr)
def test_transforms_without_statistics_say_so(step):
    with pytest.raises(ValueError, match=f"{type(step).__name__} needs calibration: .* {sorted(step.needs)[-1]}"):
        step.transform(None, None, zq.Scheme.parse("w8a8"))


def test_small_inputs_are_left_alone():
    x, w, ends = spread()
    _, s = zq.outlier_suppression(ends / 100, samples=x / 100, weights=w)
    assert (s == 1).all()


@pytest.mark.parametrize(("minmax", "options", "message"), [
    ([[1, 2]], {"threshold": 1}, "minmax"), ([[1], [0]], {"threshold": 1}, "above the second"),
    ([[0], [np.nan]], {"threshold": 1}, "finite"), ([[0], [1]], {"threshold": 0}, "positive"), ([[0], [1]], {}, "samples"),
    ([[0], [1]], {"samples": np.ones((3, 2)), "weights": np.ones((4, 2))}, r"expected shape \(m, 1\) as minmax has"),
    ([[0], [1]], {"samples": np.ones((3, 1)), "weights": np.ones((4, 2))}, "with the same k"),
    ([[0], [1]], {"samples": np.ones((3, 1)), "weights": []}, "with the same k"),
    ([[0], [1]], {"samples": np.full((3, 1), np.nan), "weights": np.ones((4, 1))}, "NaN"),
    ([[0], [1]], {"samples": np.ones((3, 1)), "weights": np.ones((4, 1)), "steps": 0}, "steps"),
])
def test_outlier_suppression_bad_input(minmax, options, message):
    with pytest.raises(ValueError, match=message):
        zq.outlier_suppression(minmax, **options)


def test_rounded_inputs():
    x = matrices(outlier=1.0)[0]
    for spec, step in ((TENSOR, 4 / 127), (TOKEN_SYMMETRIC, np.abs(x).max(1, keepdims=True) / 127),
                       (TENSOR.replace(symmetric=False, dynamic=True), np.ptp(x) / 255)):
        error = np.abs(rounded_inputs(x, spec, 4.0) - x)
        assert (error <= step * 0.501).all() and error.max() > 0
    assert rounded_inputs(x, TENSOR, 1.0).max() == pytest.approx(1) and rounded_inputs(x, None, 1.0) is x
    assert not rounded_inputs(np.zeros((2, 3), np.float32), TENSOR, 0.0).any()


# -- FPTQ

@pytest.mark.parametrize(("v", "mode"), [(15, "static"), (15.0001, "equalize"), (150, "equalize"), (150.0001, "token")])
def test_fptq_policy(v, mode):
    absmax = [1.0, v, 0.0, 2.0]
    policy = zq.fptq(absmax)
    want = reference.fptq(absmax, 15, 150)
    assert policy.mode == mode == want[0]
    np.testing.assert_allclose(policy.scale, want[1], rtol=1e-14)


def test_logarithmic_equalization():
    m = np.array([150.0, 15.0, 2.0, 1e-3, 0.0])
    s = zq.fptq(m).scale
    np.testing.assert_allclose((m / s)[:4], np.log2(2 + m[:4]), rtol=1e-12)
    np.testing.assert_allclose((m / s)[:2], [7.248, 4.0875], atol=1e-4)
    assert s[2] == 1 and s[4] == 1


@pytest.mark.parametrize(("absmax", "options", "message"), [
    ([np.nan], {}, "finite"), ([[1.0]], {}, "shape"), ([1.0], {"v0": 5, "v1": 4}, "v0 <= v1"), ([1.0], {"v0": -1}, "v0"),
])
def test_fptq_bad_input(absmax, options, message):
    with pytest.raises(ValueError, match=message):
        zq.fptq(absmax, **options)


def test_fptq_decides_by_layer(make):
    model, ids = make("llama")
    stats = zq.calibrate(model, ids)
    peak = {folding.stage: stats[folding.consumers[0]]["absmax"].max() for folding in foldings(model)[:4]}
    step = zq.FPTQ(v0=peak["attention"], v1=max(peak.values()))
    changed, scheme = step.transform(model, stats, W8A8)
    first = foldings(model)[:4]
    modes = {folding.stage: {scheme.activations_for(name) for name in folding.consumers} for folding in first}
    static = {stage for stage, found in modes.items() if found == {TENSOR}}
    assert static == {stage for stage, v in peak.items() if v <= step.v0 or stage in ("qkv", "mlp")}
    now = zq.calibrate(changed, ids)
    for folding in first:
        v, m = peak[folding.stage], stats[folding.consumers[0]]["absmax"]
        want = np.log2(2 + m) if step.v0 < v and folding.kind == "norm" else m
        np.testing.assert_allclose(now[folding.consumers[0]]["absmax"], want, rtol=1e-5)


def test_own_overrides_go_before_fptq(make):
    model, ids = make("llama")
    name = "model.layers.0.mlp.down_proj"
    scheme = W8A8.replace(activation_overrides={name: TOKEN_SYMMETRIC})
    assert zq.FPTQ().transform(model, zq.calibrate(model, ids), scheme)[1].activations_for(name) == TOKEN_SYMMETRIC
    with pytest.raises(ValueError, match="leaves them float"):
        zq.FPTQ().transform(model, zq.calibrate(model, ids), Scheme.parse("w4a16"))


@pytest.mark.parametrize("make_step", [
    lambda: zq.SmoothQuant(2.0), lambda: zq.SmoothQuant("best"), lambda: zq.SmoothQuant(stages=("head",)),
    lambda: zq.OutlierSuppression(stages="qkv"), lambda: zq.OutlierSuppression(steps=0), lambda: zq.FPTQ(v0=200),
])
def test_bad_options(make_step):
    with pytest.raises(ValueError):
        make_step()


@pytest.mark.parametrize(("variant", "down"), [("llama", True), ("gpt2", False), ("bert", False)])
def test_outlier_suppression_behind_a_gate(make, variant, down):
    """By default it goes for the last matrix of the feed-forward layer where there is a gate, and nowhere else."""
    model, ids = make(variant)
    stats = zq.calibrate(model, ids, {"minmax", "samples"})
    changed = zq.OutlierSuppression(steps=4).transform(model, stats, W8A8)[0]
    stages = ("qkv", "mlp", "down") if down else ("qkv", "mlp")
    want = zq.OutlierSuppression(stages=stages, steps=4).transform(model, stats, W8A8)[0]
    np.testing.assert_array_equal(changed(ids), want(ids))


# -- planted outliers

@pytest.mark.parametrize("variant", ["gpt2", "opt", "gpt_neox", "llama", "qwen3"])
def test_planted_outliers(make, variant):
    model, ids = make(variant)
    hard = zq.plant_outliers(model, channels=3, factor=60, seed=1)
    assert difference(model(ids), hard(ids)) <= 1e-5
    before, now = zq.calibrate(model, ids), zq.calibrate(hard, ids)
    for folding in foldings(model):
        old, new = (stats[folding.consumers[0]]["absmax"] for stats in (before, now))
        larger = np.flatnonzero(new > 30 * old)
        assert len(larger) == 3 * (folding.stage in ("qkv", "mlp"))
        old[larger] *= 60
        np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-4)


def test_planted_outliers_bad_input(make):
    model = make("llama")[0]
    for options in ({"channels": 49}, {"channels": -1}, {"factor": 0.0}, {"factor": np.inf}):
        with pytest.raises(ValueError, match=next(iter(options))):
            zq.plant_outliers(model, **options)
    with pytest.raises(ValueError, match="no norm feeds linear layers alone"):
        zq.plant_outliers(make("bert")[0])


def test_folding_is_printable():
    assert "q_proj" in repr(Folding("qkv", ("q_proj",), "none", reason="why"))
