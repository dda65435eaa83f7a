"""Logits of every decoder family and rotary scaling against transformers, on tiny random models; saved models read by it.

    python -m pytest tests/parity          # in an environment with torch and transformers; skipped elsewhere
"""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parent))

from make_golden_decoders import GOLDEN, ROWS, their_logits
from tiny_decoders import VARIANTS, config_of, prompts, tensors_of
from tiny_models import write

from zquant.models import load
from zquant.quantize import quantize


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant, tmp_path):
    config = config_of(variant)
    directory = write(tmp_path / "model", config, tensors_of(config))
    ids = prompts()[0]
    want = their_logits(directory, ids)
    assert np.abs(load(directory)([ids])[0] - want).max() <= 1e-5 * max(1, np.abs(want).max())
    with np.load(GOLDEN) as golden:
        assert np.abs(golden[variant] - want[list(ROWS)]).max() <= 1e-5 * max(1, np.abs(want).max())


@pytest.mark.parametrize("scheme", ["w8a8+e32", "w4a16-g16+e32", "w8a16+e32"])
@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_what_is_saved(kind, scheme, tmp_path):
    """Weight-only products have 16-bit inputs here and float32 ones there. With 8-bit inputs a rounding tie that falls the
    other way moves everything after it: the two are then as far apart as float32 and either, at most."""
    pytest.importorskip("compressed_tensors")
    config, ids = config_of(kind), prompts()[0]
    model = load(write(tmp_path / "model", config, tensors_of(config)))
    small = quantize(model, scheme)
    want = their_logits(small.save(tmp_path / "saved"), ids)
    noise = np.abs(small([ids])[0] - model([ids])[0]).mean()
    apart = np.abs(small([ids])[0] - want)
    if scheme == "w8a8+e32":
        assert apart.mean() <= noise
    else:
        assert apart.max() <= 1e-3 * max(1, np.abs(want).max()) and apart.mean() < 0.05 * noise
