"""Outliers planted in trained models: one scale per tensor breaks, SmoothQuant and Outlier Suppression+ bring it back."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

import zquant as zq
from zquant import _core
from zquant.methods.outlier_suppression import OutlierSuppression
from zquant.methods.smoothquant import SmoothQuant
from zquant.planted import plant_outliers
from zquant.spec import Scheme

WIKI = SHARED / "data" / "wikitext2"
MODELS = {"tiny-llama-5m": Path(__file__).parent / "data" / "tiny-llama-5m", "gpt2-30m": SHARED / "models" / "gpt2-30m"}
LENGTH = 256
# The last matrix of the feed-forward layer too: behind a gate it has outliers of its own, that nobody planted.
STAGES = ("qkv", "mlp", "down")

needs_tensor = pytest.mark.skipif(not hasattr(_core, "linear_input"), reason="the extension has no activations per tensor")


class Case:
    """A model, the same with planted outliers, and statistics of that."""

    def __init__(self, path):
        if not path.is_dir() or not WIKI.is_dir():
            pytest.skip(f"{path.name} or wikitext2 is missing")
        self.model = zq.load(path)
        self.hard = plant_outliers(self.model)
        self._text = (WIKI / "wiki.test.raw").read_text(encoding="utf-8")[:30_000]
        self.calib = (WIKI / "wiki.valid.tokens").read_text(encoding="utf-8").replace("<unk>", "")[:40_000]
        self.stats = zq.calibrate(self.hard, self.calib, {"absmax", "minmax", "samples"}, samples=16, seq_len=LENGTH)
        self.fp = self.perplexity(self.model)

    def perplexity(self, model):
        return zq.perplexity(model, self._text, LENGTH, show_progress_bar=False).ppl

    def quantized(self, model, scheme, step=None):
        parsed = Scheme.parse(scheme)
        if step is not None:
            model, parsed = step.transform(model, self.stats, parsed)
        return self.perplexity(zq.quantize(model, parsed, show_progress_bar=False))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return Case(MODELS[request.param])


def test_planted_outliers_change_nothing(case):
    assert case.perplexity(case.hard) == pytest.approx(case.fp, rel=1e-5)
    absmax = case.stats[next(iter(case.stats))]["absmax"]
    assert np.sort(absmax)[-6] > 10 * np.median(absmax)


@needs_tensor
def test_one_scale_per_tensor_breaks(case):
    assert case.quantized(case.hard, "w8a8-tensor") >= 2 * case.fp
    assert case.quantized(case.model, "w8a8-tensor") <= 1.02 * case.fp


@needs_tensor
def test_smoothquant_brings_it_back(case):
    assert case.quantized(case.hard, "w8a8-tensor", SmoothQuant(0.75, stages=STAGES)) <= 1.01 * case.fp


@needs_tensor
def test_outlier_suppression_brings_it_back(case):
    """To within 1 % of what the format costs the model without planted outliers."""
    got = case.quantized(case.hard, "w8a8-tensor", OutlierSuppression(steps=20))
    assert got <= 1.01 * case.quantized(case.model, "w8a8-tensor")


@pytest.mark.parametrize("step", [SmoothQuant(0.75), OutlierSuppression(steps=20)], ids=repr)
def test_with_scales_per_token(case, step):
    before, after = case.quantized(case.hard, "w8a8"), case.quantized(case.hard, "w8a8", step)
    assert before >= 1.05 * case.fp and after <= 1.01 * case.fp
