"""Perplexity of a language model on a text: how well it predicts each token from those before it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._progress import bar
from .checks import as_count
from .evaluate import read_text
from .generate import _integers, check_language_model, text_ids

__all__ = ["PerplexityResult", "Window", "documents", "log_sum_exp", "perplexity", "windows"]

#: Logits that are held at a time, in elements: 64 MB.
LOGITS = 1 << 24
#: Rows of logits whose exponentials are held at a time, in elements: they stay in the CPU's cache.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and what it was computed on; ``float()`` is the perplexity.

    Attributes
    ----------
    ppl
        exp(nll).
    nll
        Mean over the scored tokens of the negative logarithm of their probability, in nats.
    tokens
        Tokens that were scored.
    windows
        Forward passes' worth of text that they came from.
    seq_len, stride
        As asked for.
    seconds
        Time taken, tokenizing included. Two results that differ only here are equal.

    >>> float(PerplexityResult(ppl=20.0, nll=2.996, tokens=511, windows=1, seq_len=512))
    20.0
    """

    ppl: float
    nll: float
    tokens: int
    windows: int
    seq_len: int
    stride: int | None = None
    seconds: float = field(default=0.0, compare=False)

    def __float__(self) -> float:
        return self.ppl

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride else ""
        return (
            f"perplexity {self.ppl:.4f} (nll {self.nll:.5f}, {self.tokens:,} tokens, "
            f"{self.windows:,} windows of {self.seq_len}{stride}, {self.seconds:.1f} s)"
        )


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens of one forward; those from index ``first`` on are scored."""

    ids: np.ndarray
    first: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


def windows(count: int, seq_len: int, stride: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored token) of the windows over ``count`` tokens.

    Without a stride they do not overlap, and the first token of each has nothing before it and is not scored. With one,
    they begin ``stride`` tokens apart and each scores what no window before it has: its other tokens are context, as in
    the recipe of Hugging Face's documentation. Every token but the first is then scored once, if stride < seq_len. The
    last window is as short as it comes.

    >>> list(windows(10, 4))
    [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    >>> list(windows(10, 4, stride=2))
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    done = 0
    for begin in range(0, count, stride or seq_len):
        end = min(begin + seq_len, count)
        first = max(begin + 1, done)
        if first < end:
            yield begin, end, first
        done = end
        if end == count:
            return


def documents(lm: Any, text: Any) -> list[np.ndarray]:
    """Token ids of a text, a file, ids, or a list of texts or ids; one array per document.

    Raises
    ------
    ValueError
        Something else; ids out of the vocabulary; the name of a file given as text.
    """
    if isinstance(text, os.PathLike):
        rows: list[Any] = [text_ids(lm, read_text(text))]
    elif isinstance(text, str):
        rows = [text_ids(lm, _not_a_name(text))]
    elif isinstance(text, np.ndarray) and text.ndim == 1:
        rows = [text]
    elif isinstance(text, (Sequence, np.ndarray)) and len(text):
        nested = isinstance(text[0], (str, Sequence, np.ndarray))
        rows = ([text_ids(lm, row, f"text[{i}]") if isinstance(row, str) else row for i, row in enumerate(text)]
                if nested else [text])
    else:
        raise ValueError(f"text: expected a text, a Path, token ids, or a list of texts or ids, got {text!r}")
    return [_checked(lm, row, "text" if len(rows) == 1 else f"text[{i}]") for i, row in enumerate(rows)]


def _not_a_name(text: str) -> str:
    """A mistake that would give the perplexity of a dozen characters."""
    if len(text) < 500 and "\n" not in text and "\0" not in text and os.path.isfile(text):  # False also for what no name can be
        raise ValueError(f"text: {text!r} is the name of a file; pathlib.Path({text!r}) reads it")
    return text


def _checked(lm: Any, row: Any, name: str) -> np.ndarray:
    ids = np.array(_integers(row, name), np.int64)
    if len(ids) and not (0 <= ids.min() and ids.max() < lm.vocabulary):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{name}: token id {bad} is outside 0..{lm.vocabulary - 1}")
    return ids


def cut(lm: Any, text: Any, seq_len: int, stride: int | None) -> list[Window]:
    """The windows over every document; ValueError where there is nothing to score."""
    check_language_model("lm", lm)
    seq_len = as_count("seq_len", seq_len, 2)
    if seq_len > lm.max_positions:
        raise ValueError(f"seq_len: {seq_len}, but the model has {lm.max_positions} positions")
    if stride is not None and as_count("stride", stride, 1) > seq_len:
        raise ValueError(f"stride: {stride} is more than seq_len, {seq_len}: tokens between the windows would be left out")
    found = [
        Window(ids[begin:end], first - begin)
        for ids in documents(lm, text)
        for begin, end, first in windows(len(ids), seq_len, stride)
    ]
    if not found:
        raise ValueError("text: fewer than two tokens; the first has nothing before it and is not scored")
    return found


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """log(sum(exp(row))) of every row of (n, V) float32 logits, as float64; rows are worked on in blocks.

    >>> bool(abs(log_sum_exp(np.float32([[1000.0, 1000.0]]))[0] - 1000 - np.log(2)) < 1e-6)
    True
    """
    out = np.empty(len(logits))
    step = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = logits[start : start + step]
        peak = rows.max(axis=1)
        powers = rows - peak[:, None]
        np.exp(powers, out=powers)
        out[start : start + step] = peak + np.log(powers.sum(axis=1).astype(np.float64))
    return out


def batches(found: list[Window], batch_size: int) -> list[list[Window]]:
    return [found[start : start + batch_size] for start in range(0, len(found), batch_size)]


def targets(batch: list[Window]) -> np.ndarray:
    """For every packed token of a batch the id that its logits are to predict, -1 where nothing is scored."""
    rows = []
    for window in batch:
        row = np.full(len(window.ids), -1, np.int64)
        row[window.first - 1 : -1] = window.ids[window.first :]
        rows.append(row)
    return np.concatenate(rows)


def chunk_size(lm: Any) -> int:
    """Tokens whose logits are computed together."""
    return max(1, min(512, LOGITS // lm.vocabulary))


def _window_nll(lm: Any, batch: list[Window], kv_cache: str) -> float:
    """Sum over the scored tokens of a batch."""
    wanted, total = targets(batch), 0.0
    cache = lm.new_cache(len(batch), kv_cache)
    for start, stop, logits in lm.stream(lm.pack([w.ids for w in batch]), cache, chunk=chunk_size(lm)):
        total += float(token_nll(logits, wanted[start:stop]).sum())
    return total


def token_nll(logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods, float64, of the rows that have a target."""
    rows = np.flatnonzero(wanted >= 0)
    scored = logits if len(rows) == len(logits) else logits[rows]
    return log_sum_exp(scored) - scored[np.arange(len(rows)), wanted[rows]]


def perplexity(
    lm: Any,
    text: Any,
    seq_len: int = 512,
    stride: int | None = None,
    *,
    batch_size: int = 8,
    kv_cache: str = "float32",
    show_progress_bar: bool | None = None,
) -> PerplexityResult:
    """Perplexity of a language model on a text.

    Parameters
    ----------
    lm
        A :class:`CausalLM`, float or quantized.
    text
        A text, a ``pathlib.Path`` of a UTF-8 file, token ids, or a list of texts or of sequences of ids: documents that
        do not see each other.
    seq_len
        Tokens of a window, at least 2 and at most the model's positions.
    stride
        None: windows do not overlap, the first token of each is not scored. Else windows begin so many tokens apart and
        score what is new in them: slower, and lower as tokens have more context. See :func:`windows`.
    batch_size
        Windows per forward pass. It changes neither the result nor much of the speed or memory: logits are computed for
        at most 64 MB of them at a time.
    kv_cache
        "float32" or "int8": what keys and values are held in.
    show_progress_bar
        None: where stderr is a terminal, after two seconds.

    Returns
    -------
    PerplexityResult
        Every scored token has the same weight, those of a short last window too.

    Raises
    ------
    TypeError
        Something else than a loaded language model.
    ValueError
        Fewer than two tokens, ids out of the vocabulary, seq_len or stride out of range, NaN in weights or logits.

    >>> from pathlib import Path
    >>> import zquant as zq
    >>> lm = zq.load(Path(zq.__file__).parents[1] / "tests" / "data" / "tiny-llama-5m")
    >>> result = zq.perplexity(lm, "The sky is clear. There are no clouds.")
    >>> result.ppl < lm.vocabulary, result.windows
    (True, 1)
    """
    start = time.perf_counter()
    found = cut(lm, text, seq_len, stride)
    size = as_count("batch_size", batch_size, 1)
    parts = [
        _window_nll(lm, batch, kv_cache)
        for batch in bar(batches(found, size), "perplexity", show_progress_bar, unit="batch")
    ]
    tokens = sum(w.scored for w in found)
    nll = math.fsum(parts) / tokens
    if not math.isfinite(nll):
        raise ValueError(f"logits: the mean negative log-likelihood is {nll}")
    ppl = math.exp(nll) if nll < 700 else math.inf
    return PerplexityResult(ppl, nll, tokens, len(found), seq_len, stride, time.perf_counter() - start)
