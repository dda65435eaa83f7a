"""Outliers planted in trained models: one scale per tensor breaks; SmoothQuant, Outlier Suppression+ and LLM.int8() mend it.

The figures are printed: pytest -s.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

import zquant as zq
from zquant.calibrate import Shared

WIKI = SHARED / "data" / "wikitext2"
MODELS = {"tiny-llama-5m": Path(__file__).parent / "data" / "tiny-llama-5m", "gpt2-30m": SHARED / "models" / "gpt2-30m"}
# Ranges of a feed-forward layer's inner channels need many tokens: with 16 sequences in place of 128 no recipe gets
# tiny-llama-5m below 1 % with one scale per tensor. Behind its gate there are outliers that nobody planted.
SEQUENCES = {"tiny-llama-5m": 128, "gpt2-30m": 24}
STAGES = {"tiny-llama-5m": ("qkv", "mlp", "down"), "gpt2-30m": ("qkv", "mlp")}
LENGTH = 256


class Case:
    """A model, the same with planted outliers, and calibration data for that."""

    def __init__(self, name):
        path = MODELS[name]
        if not path.is_dir() or not WIKI.is_dir():
            pytest.skip(f"{name} or wikitext2 is missing")
        self.name = name
        self.model, self.stages = zq.load(path), STAGES[name]
        self.hard = zq.plant_outliers(self.model)
        text = (WIKI / "wiki.test.raw").read_text(encoding="utf-8")[:30_000]
        self._ids = self.model.tokenizer.encode(text).ids
        calib = (WIKI / "wiki.valid.tokens").read_text(encoding="utf-8").replace("<unk>", "")[:320_000]
        self.calib = Shared(self.hard, calib, samples=SEQUENCES[name], seq_len=LENGTH)
        self.fp = self.perplexity(self.model)
        self._rounded = {}

    def perplexity(self, model):
        return zq.perplexity(model, self._ids, LENGTH, show_progress_bar=False).ppl

    def quantized(self, scheme, recipe):
        """Perplexity of the model with planted outliers."""
        found = self.perplexity(zq.quantize(self.hard, scheme, recipe, calib=self.calib, show_progress_bar=False))
        print(f"\n{self.name} {scheme} {recipe}: {found:.2f}, {100 * (found / self.fp - 1):+.2f} % of {self.fp:.2f}", end="")
        return found

    def rounded(self, scheme):
        """The same by round to nearest, as a share of the float model's."""
        if scheme not in self._rounded:
            self._rounded[scheme] = self.quantized(scheme, "rtn") / self.fp
        return self._rounded[scheme]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return Case(request.param)


def test_planted_outliers_change_nothing(case):
    assert case.perplexity(case.hard) == pytest.approx(case.fp, rel=1e-5)
    absmax = zq.calibrate(case.hard, case.calib.sequences.ids[:8])[next(iter(case.hard.linears))]["absmax"]
    assert np.sort(absmax)[-6] > 10 * np.median(absmax)


def test_one_scale_per_tensor_breaks(case):
    assert case.rounded("w8a8-tensor+e32") >= 2
    assert case.perplexity(zq.quantize(case.model, "w8a8-tensor+e32")) <= 1.01 * case.fp


def test_smoothquant_brings_it_back(case):
    recipe = zq.SmoothQuant(0.75, stages=case.stages)
    assert case.quantized("w8a8-tensor+e32", recipe) <= 1.01 * case.fp


def test_outlier_suppression_brings_it_back(case):
    assert case.quantized("w8a8-tensor+e32", zq.OutlierSuppression(steps=10)) <= 1.01 * case.fp


def test_llm_int8_brings_it_back(case):
    """Its activations have a scale per token; without it that costs 5 % and more."""
    assert case.rounded("w8a8-sym+e32") >= 1.05
    assert case.quantized("w8a8-sym+e32", "llm.int8") <= 1.01 * case.fp


@pytest.mark.parametrize("recipe", [zq.SmoothQuant(0.75), zq.OutlierSuppression(steps=10)], ids=repr)
def test_with_scales_per_token(case, recipe):
    assert case.rounded("w8a8+e32") >= 1.05
    assert case.quantized("w8a8+e32", recipe) <= 1.01 * case.fp
