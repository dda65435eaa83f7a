"""AWQ: scales from the activations, and clipping."""
from __future__ import annotations

import numpy as np
import pytest
from tiny_decoders import config_of, tensors_of
from tiny_models import write

import zquant as zq
from zquant.methods import RTN, AWQClip, AWQScale
from zquant.models.foldings import foldings
from zquant.spec import QuantSpec, Scheme

F = np.float32


def problem(n=24, k=64, tokens=200, seed=0):
    """Weights, and inputs some of whose channels are large."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k)) * np.exp(1.5 * rng.standard_normal(k))
    return rng.standard_normal((n, k)).astype(F), x, x.T @ x / tokens


def output_error(w, w_hat, x):
    return float(((x @ (w_hat - w).T) ** 2).sum(1).mean())


@pytest.mark.parametrize("bits,group", [(3, None), (4, None), (3, 16), (4, 24), (4, 100)])
@pytest.mark.parametrize("duo", [False, True, "both"])
def test_the_scale_pays_off_and_its_loss_is_that_of_the_outputs(bits, group, duo):
    w, x, gram = problem()
    scale, info = zq.awq(w, np.abs(x).mean(0), gram, bits, group, duo=duo)
    spec = QuantSpec(bits) if group is None else QuantSpec(bits, granularity="group", group_size=group)
    w_hat = RTN().quantize(w * scale, spec).dequantize() / scale
    assert info.loss == pytest.approx(output_error(w, w_hat, x), rel=1e-4)
    assert info.rtn_loss == pytest.approx(output_error(w, RTN().quantize(w, spec).dequantize(), x), rel=1e-4)
    assert info.loss < 0.9 * info.rtn_loss


def test_both_kinds_of_scale_are_searched():
    w, x, gram = problem()
    size = np.abs(x).mean(0)
    alone = [zq.awq(w, size, gram, 3, duo=duo)[1].loss for duo in (False, True)]
    assert zq.awq(w, size, gram, 3, duo="both")[1].loss == min(alone)


def test_the_size_of_the_activations_does_not_matter():
    w, x, gram = problem()
    size = np.abs(x).mean(0)
    assert np.array_equal(zq.awq(w, size, gram, duo=False)[0], zq.awq(w, 1024 * size, gram, duo=False)[0])


def test_where_nothing_is_better_the_scale_is_one():
    w = F([[1, -1, 1, -1]])  # rounds without error
    scale, info = zq.awq(w, np.ones(4), np.eye(4))
    assert info.ratio is None and info.loss == info.rtn_loss and (scale == 1).all()


def test_channels_without_activations_keep_their_scale():
    w, x, gram = problem()
    x[:, [3, 40]] = 0
    scale, info = zq.awq(w, np.abs(x).mean(0), x.T @ x / len(x))
    assert info.ratio is not None and (scale[[3, 40]] == 1).all() and np.isfinite(scale).all()


def test_layers_that_share_an_input_share_the_scale():
    w, x, gram = problem(40)
    size = np.abs(x).mean(0)
    together, info = zq.awq([w[:10], w[10:]], size, gram)
    assert np.array_equal(together, zq.awq(w, size, gram)[0])
    scale, _ = zq.awq(w, size, gram, tie=lambda s: np.full_like(s, s.max()))
    assert len(set(scale.tolist())) == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits,group", [(3, None), (4, 16), (3, 24)])
def test_clipping_never_hurts_a_group(bits, group, symmetric):
    w, x, gram = problem()
    w[:, ::7] *= 3  # few large weights
    spec = QuantSpec(bits, symmetric=symmetric) if group is None else QuantSpec(
        bits, granularity="group", group_size=group, symmetric=symmetric)
    clipped = zq.awq_clip(w, gram, bits, group, symmetric)
    size = group or 64
    better = []
    for start in range(0, 64, size):
        part = slice(start, start + size)
        errors = [(((RTN().quantize(v, spec).dequantize() - w)[:, part] @ x[:, part].T) ** 2).mean(1) for v in (clipped, w)]
        assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
        better.append((errors[0] < 0.99 * errors[1]).mean())
    assert np.mean(better) > 0.2
    assert (np.abs(clipped) <= np.abs(w)).all() and (np.abs(clipped) >= 0.49 * np.abs(w).min()).all()


def test_the_method_rounds_the_clipped_weights():
    w, x, gram = problem()
    spec = QuantSpec(3, granularity="group", group_size=16)
    got = AWQClip().quantize(w, spec, {"gram": gram})
    want = RTN().quantize(zq.awq_clip(w, gram, 3, 16), spec)
    assert np.array_equal(got.codes, want.codes) and np.array_equal(got.scales, want.scales)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_a_folded_model_computes_the_same(family, tmp_path):
    model = zq.load(write(tmp_path / "model", config_of(family), tensors_of(config_of(family))))
    ids = np.random.default_rng(0).integers(0, model.dims.vocabulary, (3, 12))
    stats = zq.calibrate(model, list(ids), needs=AWQScale.needs)
    folded, scheme = AWQScale(grid=5).transform(model, stats, Scheme.parse("w3a16-g8"))
    assert scheme.name == "w3a16-g8"
    changed = [name for name, layer in folded.linears.items() if layer is not model.linears[name]]
    assert any(set(f.consumers) <= set(changed) for f in foldings(model) if f.exact)
    want, got = model(ids), folded(ids)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_inputs_whose_first_reader_stays_float_are_scaled_too(tmp_path):
    model = zq.load(write(tmp_path / "model", config_of("llama"), tensors_of(config_of("llama"))))
    stats = zq.calibrate(model, list(np.random.default_rng(0).integers(0, model.dims.vocabulary, (3, 12))), AWQScale.needs)
    folded, _ = AWQScale(grid=5).transform(model, stats, Scheme.parse("w3a16-g8").with_overrides({"*q_proj": "float"}))
    name = "model.layers.0.self_attn.k_proj"
    assert not np.array_equal(folded.linears[name].weight, model.linears[name].weight)


def test_numpy_s_integers_are_integers():
    w, x, gram = problem()
    scale = zq.awq(w, np.abs(x).mean(0), gram, np.int64(3), np.int32(16), grid=np.int64(5))[0]
    assert np.array_equal(scale, zq.awq(w, np.abs(x).mean(0), gram, 3, 16, grid=5)[0])
    assert type(AWQScale(grid=np.int64(5)).to_dict()["grid"]) is int


REFUSED = [
    (lambda w, x, g: zq.awq([], x, g), "weights: expected matrices"),
    (lambda w, x, g: zq.awq([w, w[:, :3].copy()], x, g), "same k"),
    (lambda w, x, g: zq.awq(w, x[:3], g), r"expected shapes \(64,\) and \(64, 64\), got \(3,\)"),
    (lambda w, x, g: zq.awq(w, -x, g), "negative"),
    (lambda w, x, g: zq.awq(w, x, g * np.nan), "NaN"),
    (lambda w, x, g: zq.awq(w, x, g, grid=0), "grid"),
    (lambda w, x, g: zq.awq(w, x, g, duo="none"), "duo"),
    (lambda w, x, g: zq.awq_clip(w, g[:3]), r"got \(24, 64\) and \(3, 64\)"),
    (lambda w, x, g: zq.awq_clip(w, g, grid=0), "grid: expected an integer of 1"),
    (lambda w, x, g: zq.awq_clip(w, g, most=1.5), "most: expected a number from 0 to 1, got 1.5"),
    (lambda w, x, g: AWQClip(grid=0), "grid"), (lambda w, x, g: AWQClip(most=np.nan), "most"),
    (lambda w, x, g: AWQScale(grid=0), "grid"),
    (lambda w, x, g: AWQClip().quantize(w, QuantSpec(4)), "needs calibration"),
    (lambda w, x, g: AWQClip().quantize(w, QuantSpec(4, granularity="row_block", blocks=2), {"gram": g}), "per channel or in"),
    (lambda w, x, g: AWQScale().transform(None, None, Scheme.parse("w4a16")), "needs calibration"),
]


@pytest.mark.parametrize("call,message", REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(call, message):
    w, x, gram = problem()
    with pytest.raises(ValueError, match=message):
        call(w, np.abs(x).mean(0), gram)
