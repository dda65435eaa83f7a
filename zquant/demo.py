"""``zquant demo``: one sentence encoder, quantized in two ways, compared with float32 in one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._progress import bar
from .demo_sentences import PAIRS, SENTENCES
from .evaluate import cosine_fidelity, read_pairs, sts
from .report import speeds

__all__ = ["Row", "format_rows", "run"]

SCHEMES = ("w8a8", "w4/8a8")


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; cosines are to float32, correlations in [-1, 1], size in bytes."""

    scheme: str
    size: int
    mean_cosine: float
    min_cosine: float
    demo_spearman: float
    sts_spearman: float | None
    rate: float
    speedup: float


def format_rows(rows: Sequence[Row]) -> str:
    """The table, at most 90 columns wide; the first row is the reference for sizes and speeds.

    >>> print(format_rows([Row("float32", 90_000_000, 1.0, 1.0, 0.9, None, 800.0, 1.0),
    ...                    Row("w8a8", 45_000_000, 0.9986, 0.99, 0.9, None, 1600.0, 2.0)]))
             size    times   cosine  to fp32  Spearman  sentences   times
    scheme     MB  smaller     mean  minimum      demo   a second  faster
    ---------------------------------------------------------------------
    float32  90.0     1.00  1.00000  1.00000     90.00        800    1.00
    w8a8     45.0     2.00  0.99860  0.99000     90.00       1600    2.00
    """
    columns = [
        ("", "scheme", [row.scheme for row in rows]),
        ("size", "MB", [f"{row.size / 1e6:.1f}" for row in rows]),
        ("times", "smaller", [f"{rows[0].size / row.size:.2f}" for row in rows]),
        ("cosine", "mean", [f"{row.mean_cosine:.5f}" for row in rows]),
        ("to fp32", "minimum", [f"{row.min_cosine:.5f}" for row in rows]),
        ("Spearman", "demo", [f"{100 * row.demo_spearman:.2f}" for row in rows]),
        ("sentences", "a second", [f"{row.rate:.0f}" for row in rows]),
        ("times", "faster", [f"{row.speedup:.2f}" for row in rows]),
    ]
    if any(row.sts_spearman is not None for row in rows):
        scores = ["-" if row.sts_spearman is None else f"{100 * row.sts_spearman:.2f}" for row in rows]
        columns.insert(6, ("x100", "file", scores))
    widths = [max(len(top), len(name), *map(len, cells)) for top, name, cells in columns]
    lines = [
        [column[0] for column in columns],
        [column[1] for column in columns],
        *zip(*(column[2] for column in columns)),
    ]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in lines
    ]
    return "\n".join([*text[:2], "-" * len(text[0]), *text[2:]])


def run(
    model: str | os.PathLike[str] | None = None,
    sts_file: str | os.PathLike[str] | None = None,
    schemes: Sequence[str] = SCHEMES,
    rounds: int = 7,
    show: Callable[[str], Any] = print,
) -> list[Row]:
    """Quantize a sentence encoder by each scheme and print fidelity, size and speed against float32.

    Parameters
    ----------
    model
        Directory of a sentence encoder; None finds the installed all-MiniLM-L6-v2.
    sts_file
        csv or tsv of sentence pairs with scores (see :func:`zquant.evaluate.read_pairs`), or None.
    schemes
        Names of schemes.
    rounds
        Rounds of the interleaved speed measurement.
    show
        Takes the text to print.

    Returns
    -------
    The rows of the table, float32 first.
    """
    from . import cpu
    from .encoder import SentenceEncoder
    from .quantize import quantize

    pairs = read_pairs(sts_file) if sts_file is not None else None
    path = Path(model) if model is not None else Path(_find_model())
    reference = SentenceEncoder(path)
    info = cpu.info()
    threads = f"{info.threads} thread{'s' * (info.threads != 1)}"
    name = path.name if model is not None else "all-MiniLM-L6-v2"
    show(f"{name}: {len(SENTENCES)} sentences, {threads}, {info.active} kernels\n")
    encoders = {"float32": reference}
    for name in bar(schemes, "quantizing"):
        encoders[name] = quantize(reference, name)
    rows = _measure(encoders, pairs, rounds)
    show(format_rows(rows))
    show(
        f"\nSpearman: rank correlation of cosines with scores; demo: {len(PAIRS)} pairs written for this demo"
        + (f", file: {len(pairs)} pairs" if pairs else "")
        + "."
    )
    return rows


def _find_model() -> Any:
    from .demo_model import find_minilm

    return find_minilm()


def _measure(encoders: dict[str, Any], pairs: Any, rounds: int) -> list[Row]:
    sentences = list(SENTENCES)
    exact = np.asarray(encoders["float32"].encode(sentences))
    runs = [lambda e=encoder: e.encode(sentences) for encoder in encoders.values()]
    facts = []
    for name, encoder in bar(encoders.items(), "evaluating", total=len(encoders)):
        cosine = cosine_fidelity(exact, encoder.encode(sentences))
        scores = sts(encoder, PAIRS).spearman, sts(encoder, pairs).spearman if pairs else None
        facts.append((name, encoder.model.nbytes, float(cosine.mean()), float(cosine.min()), *scores))
    rates, ratios = speeds(runs, len(sentences), rounds, show_progress_bar=None)
    return [Row(*fact, rate, ratio) for fact, rate, ratio in zip(facts, rates, ratios)]
