"""Write tests/data/decoders_golden.npz: what transformers makes of the tiny decoders of tests/tiny_decoders.py.

    python tests/parity/make_golden_decoders.py      # in an environment with torch and transformers
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from tiny_decoders import VARIANTS, config_of, prompts, tensors_of  # noqa: E402
from tiny_models import write  # noqa: E402

GOLDEN = TESTS / "data" / "decoders_golden.npz"
ROWS = (0, 11, 21, 32)  # positions of the first prompt whose logits are kept


def their_logits(directory: Path, ids: list[int]) -> np.ndarray:
    """(T, V) float32 of ``transformers.AutoModelForCausalLM``."""
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def main() -> None:
    golden = {}
    for variant in VARIANTS:
        config = config_of(variant)
        with tempfile.TemporaryDirectory() as folder:
            logits = their_logits(write(Path(folder) / "model", config, tensors_of(config)), prompts()[0])
        golden[variant] = logits[list(ROWS)]
    np.savez_compressed(GOLDEN, **golden)
    print(f"{GOLDEN.relative_to(TESTS.parent)}: {len(golden)} models, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
