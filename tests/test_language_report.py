"""Reports on language models against sums written out here; planted faults must show."""

import json
import math

import numpy as np
import pytest
from fake_lm import LM

import zquant.language_report as module
from zquant.evaluate import sqnr_db
from zquant.language_report import LanguageReport, Rates
from zquant.perplexity import perplexity
from zquant.report import compare

IDS = np.random.default_rng(3).integers(0, 256, 100)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


@pytest.fixture(scope="module")
def models():
    lm = LM()
    return lm, lm.quantized()


@pytest.fixture(scope="module")
def report(models):
    return compare(*models, IDS, seq_len=40, rounds=0)


def test_divergence(models, report):
    lm, quantized = models
    kl, same = [], 0
    for begin in range(0, 100, 40):
        for end in range(begin + 1, min(begin + 40, 100)):
            history = IDS[begin:end].tolist()
            p, q = log_softmax(lm.row(history)), log_softmax(quantized.row(history))
            kl.append((np.exp(p) * (p - q)).sum())
            same += p.argmax() == q.argmax()
    np.testing.assert_allclose(report.kl, kl, rtol=1e-4, atol=1e-6)
    assert report.mean_kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert report.agreement == same / len(kl) < 1
    assert report.ppl_before == pytest.approx(perplexity(lm, IDS, 40).ppl, rel=1e-9)
    assert report.ppl_after == pytest.approx(perplexity(quantized, IDS, 40).ppl, rel=1e-9)
    assert report.ppl_increase == pytest.approx(report.ppl_after / report.ppl_before - 1)


def test_layers(models, report):
    lm, quantized = models
    for layer in report.layers:
        a, b = lm.linears[layer.name].weight, quantized.linears[layer.name].weight
        assert layer.weight_db == pytest.approx(sqnr_db(a, b), abs=1e-9)
        # Both models see their own inputs, all 100 tokens of them.
        outputs = []
        for model, weight in ((lm, a), (quantized, b)):
            rows = [model.row(IDS[c : i + 1].tolist()) for c in range(0, 100, 40) for i in range(c, min(c + 40, 100))]
            x = np.stack(rows)
            outputs.append((x[:, :4] if layer.name.endswith("up_proj") else x[:, 4:8]) @ weight.T)
        assert layer.output_db == pytest.approx(sqnr_db(*outputs), abs=1e-3)
    assert [x.kind for x in report.layers] == ["feed-forward in", "feed-forward out"] * 2


def test_a_planted_fault_is_the_worst_layer(models):
    lm, _ = models
    quantized = lm.quantized(noise=0.0)
    bad = "model.layers.1.mlp.up_proj"
    quantized.linears[bad].weight[0] += 5
    assert compare(lm, quantized, IDS, seq_len=40, rounds=0).worst[0].name == bad
    del quantized.linears[bad]
    with pytest.raises(ValueError, match=f"missing {bad}"):
        compare(lm, quantized, IDS, seq_len=40)


def test_equal_models(models):
    report = compare(models[0], models[0], IDS, rounds=0)
    assert report.mean_kl < 1e-6 and (report.kl >= 0).all() and report.agreement == 1.0
    assert report.ppl_before == report.ppl_after and "exact" in str(report)
    pytest.importorskip("matplotlib")
    report.plot()


def test_max_tokens(models):
    lm, quantized = models
    report = compare(lm, quantized, IDS, seq_len=40, max_tokens=50, rounds=0)
    assert len(report.kl) == 39 + 9 and report.ppl_before == pytest.approx(perplexity(lm, IDS[:50], 40).ppl)
    assert len(compare(lm, quantized, IDS, seq_len=40, max_tokens=41, rounds=0).kl) == 39
    assert len(compare(lm, quantized, IDS, seq_len=40, max_tokens=None, rounds=0).kl) == 97
    assert len(compare(lm, quantized, [IDS[:10], IDS[:30]], rounds=0).kl) == 9 + 29
    assert len(compare(lm, quantized, IDS, rounds=0).kl) == 63 + 35  # windows as long as the positions allow


def test_speed(models):
    report = compare(*models, "a text", seq_len=8, rounds=2)
    for rates in (report.prefill, report.decode):
        assert rates.before > 0 and rates.after > 0 and rates.speedup > 0
    assert "decode, tokens/s" in str(report) and module.PREFILL_TOKENS >= 256


def test_text_and_json(report):
    text = str(report)
    assert text.startswith("w8a8: 4 linear layers")
    for part in ("perplexity", "KL to float32", "same top token", "97 tokens", "smaller", "model.layers.0.mlp.up_proj"):
        assert part in text
    data = json.loads(report.to_json())
    assert data["kl"]["mean"] == report.mean_kl and len(data["kl"]["values"]) == 97
    assert data["perplexity"]["after"] == report.ppl_after and data["decode_tokens_per_second"] is None
    assert "<table>" in report._repr_html_() and "perplexity" in report._repr_html_()
    timed = LanguageReport("a<b", (), 10.0, 11.0, np.array([0.1]), 0.5, 8, 2, Rates(1, 2, 2), Rates(3, 12, 4.0), 2)
    assert "a&lt;b" in timed._repr_html_() and "3 -> 12 (4.00x, 2 threads)" in str(timed)
    assert "(+10.00 %, 1 tokens)" in str(timed) and json.loads(timed.to_json())["decode_tokens_per_second"]["speedup"] == 4


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot().savefig(tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input(models):
    for text, options, message in [
        ("", {}, "fewer than two tokens"),
        (IDS, {"max_tokens": 1}, "max_tokens: expected an integer of 2 or more"),
        (IDS, {"seq_len": 1}, "seq_len"),
        (IDS, {"rounds": -1}, "rounds"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(*models, text, **options)
    from fakes import Encoder, Model

    with pytest.raises(TypeError, match="seq_len: for language models only"):
        compare(*[Encoder(Model.make())] * 2, ["a"], seq_len=3)
