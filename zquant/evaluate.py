"""How good a model's outputs are: cosines, correlations, signal-to-noise ratios, semantic textual similarity (STS).

All functions take NumPy arrays or local files; nothing is downloaded.
"""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Pairs", "STSResult", "cosine_fidelity", "pearson", "read_pairs", "read_text", "spearman", "sqnr_db", "sts"]


def _finite(name: str, x: Any, ndim: int) -> np.ndarray:
    array = np.asarray(x)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}")
    array = array.astype(np.float64)
    bad = ~np.isfinite(array)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise ValueError(f"{name}: row {row} holds NaN or Inf")
    return array


def _same_shape(names: tuple[str, str], a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{names[0]} and {names[1]}: shapes differ, {a.shape} and {b.shape}")


def _unit_peak(a: np.ndarray) -> np.ndarray:
    """Rows divided by their largest magnitude, so that squares neither overflow nor vanish."""
    peak = np.abs(a).max(axis=-1, keepdims=True, initial=0.0)
    return a / np.where(peak > 0, peak, 1.0)


def cosine_fidelity(a: Any, b: Any) -> np.ndarray:
    """Cosine between corresponding rows of two arrays.

    Parameters
    ----------
    a, b
        Real arrays of one shape (n, d); for instance the embeddings of a float32 and of a quantized model.

    Returns
    -------
    float64 (n,), in [-1, 1]. Two zero rows count as equal (1.0), a zero row against a non-zero one as 0.0.

    Raises
    ------
    TypeError
        Not real numbers.
    ValueError
        Not two-dimensional, shapes differ, or NaN or Inf (array and row named).

    >>> cosine_fidelity([[1.0, 0.0], [1.0, 1.0]], [[2.0, 0.0], [1.0, -1.0]]).tolist()
    [1.0, 0.0]
    """
    x, y = _finite("a", a, 2), _finite("b", b, 2)
    _same_shape(("a", "b"), x, y)
    x, y = _unit_peak(x), _unit_peak(y)
    nx, ny = np.sqrt((x * x).sum(axis=1)), np.sqrt((y * y).sum(axis=1))
    both = (nx > 0) & (ny > 0)
    cosine = (x * y).sum(axis=1) / np.where(both, nx * ny, 1.0)
    return np.where(both, np.clip(cosine, -1.0, 1.0), ((nx == 0) & (ny == 0)).astype(np.float64))


def pearson(x: Any, y: Any) -> float:
    """Pearson's correlation of two sequences, in [-1, 1].

    A constant sequence has no correlation with anything; the result is then 0.0, not NaN.

    Parameters
    ----------
    x, y
        Real, one length n >= 2.

    Raises
    ------
    ValueError
        Lengths differ, fewer than two values, NaN or Inf.

    >>> round(pearson([1, 2, 3, 4], [1, 3, 2, 4]), 6)
    0.8
    """
    u, v = _finite("x", x, 1), _finite("y", y, 1)
    _same_shape(("x", "y"), u, v)
    if len(u) < 2:
        raise ValueError(f"x and y: expected at least two values, got {len(u)}")
    if (u == u[0]).all() or (v == v[0]).all():
        return 0.0
    u, v = _unit_peak(u), _unit_peak(v)
    u, v = _unit_peak(u - u.mean()), _unit_peak(v - v.mean())
    return float(np.clip((u * v).sum() / math.sqrt((u * u).sum() * (v * v).sum()), -1.0, 1.0))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse.reshape(-1)]


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation of two sequences, in [-1, 1]; ties share the mean of their ranks.

    The Pearson correlation of the ranks, 0.0 where a sequence is constant. Arguments and exceptions: :func:`pearson`.

    >>> spearman([1, 2, 3, 4], [10, 20, 30, 4000])
    1.0
    >>> round(spearman([1, 2, 2, 3], [1, 2, 3, 4]), 6)
    0.948683
    """
    return pearson(_ranks(_finite("x", x, 1)), _ranks(_finite("y", y, 1)))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    if signal == 0.0:
        return -math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise))


def sqnr_db(reference: Any, approx: Any) -> float:
    """Signal-to-quantization-noise ratio in decibels.

    ``10 log10( sum(r^2) / sum((r - a)^2) )``: +inf when the arrays are equal (two zero arrays included), -inf when the
    reference is zero and the approximation is not. 6.02 dB are one bit.

    Parameters
    ----------
    reference, approx
        Real arrays of one shape, any number of dimensions.

    Raises
    ------
    ValueError
        Shapes differ, or NaN or Inf.

    >>> round(sqnr_db([3.0, 4.0], [3.0, 4.5]), 6)
    20.0
    >>> sqnr_db([0.0], [0.0])
    inf
    """
    shapes = np.shape(reference), np.shape(approx)
    if shapes[0] != shapes[1]:
        raise ValueError(f"reference and approx: shapes differ, {shapes[0]} and {shapes[1]}")
    r = _finite("reference", np.ravel(reference), 1)
    a = _finite("approx", np.ravel(approx), 1)
    peak = max(np.abs(r).max(initial=0.0), np.abs(a).max(initial=0.0))
    if peak == 0.0:
        return math.inf
    r, a = r / peak, a / peak
    return _decibels(float((r * r).sum()), float(((r - a) ** 2).sum()))


# --- semantic textual similarity ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with the similarity that people gave them (any scale)."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.scores)


_FIRST = ("sentence1", "sentence_1", "text1", "source", "s1")
_SECOND = ("sentence2", "sentence_2", "text2", "target", "s2")
_SCORE = ("score", "similarity_score", "similarity", "relatedness_score", "label", "gold")


def _column(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _columns(row: list[str], where: str) -> tuple[tuple[int, int, int], bool]:
    """Where the two sentences and the score stand, and whether this first row is a header."""
    header = [cell.strip().lower() for cell in row]
    found = _column(header, _FIRST), _column(header, _SECOND), _column(header, _SCORE)
    if None not in found:
        return found, True  # type: ignore[return-value]
    if len(row) < 3:
        raise ValueError(f"{where}: expected two sentences and a score, got {len(row)} column{'s' * (len(row) != 1)}")
    if len(row) == 3:
        return (0, 1, 2), _number(row[2]) is None
    raise ValueError(
        f"{where}: {len(row)} columns and no header with sentence1, sentence2 and score; "
        "expected that header or exactly three columns"
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file; ValueError names the file and the line of what is not UTF-8."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def _rows(text: str, path: Path):
    """(line number, cells) of every non-empty record; tabs where the first line has two of them, else commas.

    Tab-separated files are read without quoting: STS and GLUE files hold single quotation marks inside sentences.
    """
    tabs = text.split("\n", 1)[0].count("\t") >= 2
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    line = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def read_pairs(path: str | os.PathLike[str]) -> Pairs:
    """Read sentence pairs and scores from a csv or tsv file.

    Parameters
    ----------
    path
        UTF-8. Three columns (sentence, sentence, score), or any columns under a header that names ``sentence1``,
        ``sentence2`` and ``score``. A header is recognized by itself. Tabs separate the columns where the first line
        has two or more, else commas (with double quotes as usual in csv).

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        Not such a file; the message names the file, the line and what was expected.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "pairs.csv")
    ...     with open(path, "w") as file:
    ...         _ = file.write('A cat sleeps.,"A cat, asleep.",5\\nA cat sleeps.,It rains.,0\\n')
    ...     read_pairs(path).scores
    (5.0, 0.0)
    """
    path = Path(path)
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    columns: tuple[int, int, int] | None = None
    for line, row in _rows(read_text(path), path):
        where = f"{path}, line {line}"
        if columns is None:
            columns, is_header = _columns(row, where)
            width = len(row)
            if is_header:
                continue
        if len(row) != width:
            raise ValueError(f"{where}: expected {width} columns, got {len(row)}")
        score = _number(row[columns[2]])
        if score is None:
            raise ValueError(f"{where}: expected a finite number as the score, got {row[columns[2]]!r}")
        first.append(row[columns[0]])
        second.append(row[columns[1]])
        scores.append(score)
    if len(scores) < 2:
        raise ValueError(f"{path}: expected at least two sentence pairs, got {len(scores)}")
    return Pairs(tuple(first), tuple(second), tuple(scores))


@dataclass(frozen=True)
class STSResult:
    """Correlation of a model's cosine similarities with people's scores.

    ``spearman`` and ``pearson`` lie in [-1, 1] and print times 100, as the literature does; ``n`` pairs, ``seconds`` of
    encoding.

    >>> print(STSResult(spearman=0.8203, pearson=0.8274, n=1379, seconds=1.5))
    STS: Spearman 82.03, Pearson 82.74 (1379 pairs, 1.5 s)
    """

    spearman: float
    pearson: float
    n: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"STS: Spearman {100 * self.spearman:.2f}, Pearson {100 * self.pearson:.2f} "
            f"({self.n} pairs, {self.seconds:.1f} s)"
        )


def _as_pairs(pairs: Any) -> Pairs:
    if isinstance(pairs, Pairs):
        return pairs
    if isinstance(pairs, (str, os.PathLike)):
        return read_pairs(pairs)
    rows = list(pairs)
    for i, row in enumerate(rows):
        if not (isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 3):
            raise ValueError(f"pairs: item {i}: expected (sentence, sentence, score), got {row!r}")
    return Pairs(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(float(r[2]) for r in rows))


def sts(encoder: Any, pairs: Any, *, batch_size: int = 32, show_progress_bar: bool = False) -> STSResult:
    """Semantic textual similarity: do the encoder's cosines order sentence pairs as people did?

    Parameters
    ----------
    encoder
        Anything with ``encode(sentences, batch_size=, show_progress_bar=)`` -> (n, d), such as a ``SentenceEncoder``.
    pairs
        A csv or tsv file (see :func:`read_pairs`), :class:`Pairs`, or a sequence of (sentence, sentence, score).
    batch_size
        Passed on to ``encode``.
    show_progress_bar
        Passed on to ``encode``.

    Raises
    ------
    TypeError
        ``encoder`` has no ``encode``: a loaded model gives hidden states, ``SentenceEncoder`` makes embeddings of them.
    ValueError
        Malformed file or pairs, fewer than two pairs.

    >>> class Letters:                                     # a toy encoder: counts letters
    ...     def encode(self, sentences, batch_size=32, show_progress_bar=False):
    ...         return [[s.count(c) for c in "abcde"] for s in sentences]
    >>> result = sts(Letters(), [("abc", "cba", 5.0), ("abc", "abd", 3.0), ("abc", "eee", 0.0)])
    >>> result.n, round(result.spearman, 6)
    (3, 1.0)
    """
    if not callable(getattr(encoder, "encode", None)):
        raise TypeError(f"encoder: expected a SentenceEncoder or another object with encode(), got {type(encoder).__name__}")
    data = _as_pairs(pairs)
    start = time.perf_counter()
    sentences = [*data.first, *data.second]
    embeddings = np.asarray(encoder.encode(sentences, batch_size=batch_size, show_progress_bar=show_progress_bar))
    seconds = time.perf_counter() - start
    cosine = cosine_fidelity(embeddings[: len(data)], embeddings[len(data) :])
    return STSResult(spearman(cosine, data.scores), pearson(cosine, data.scores), len(data), seconds)
