"""float32 logits of every decoder family and rotary scaling against transformers, on tiny random models.

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant, tmp_path):
    config = config_of(variant)
    directory = write(tmp_path / "model", config, tensors_of(config))
    ids = prompts()[0]
    want = their_logits(directory, ids)
    assert np.abs(load(directory)([ids])[0] - want).max() <= 1e-5 * max(1, np.abs(want).max())
    with np.load(GOLDEN) as golden:
        assert np.abs(golden[variant] - want[list(ROWS)]).max() <= 1e-5 * max(1, np.abs(want).max())
