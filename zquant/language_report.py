"""What quantization did to a language model: :func:`compare_language`, which ``zquant.compare`` calls for decoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ._progress import bar
from .checks import as_count
from .generate import check_language_model
from .perplexity import Window, batches, chunk_size, cut, log_sum_exp, targets
from .report import (
    TAPPED_TOKENS,
    LayerError,
    ReportBase,
    _check_same_layers,
    _layer_errors,
    _OutputNoise,
    _size,
    check_pair,
    scheme_name,
    speeds,
)
from .threads import get_num_threads

__all__ = ["LanguageReport", "Rates", "compare_language"]

#: Tokens of the text that reports use, unless told otherwise: some seconds for a small model, steady figures.
MAX_TOKENS = 16384
#: Tokens that are read, and then written, when speed is measured.
PREFILL_TOKENS, DECODE_TOKENS = 256, 16


@dataclass(frozen=True)
class Rates:
    """Tokens per second of the two models, and the median over the rounds of the ratio of their times."""

    before: float
    after: float
    speedup: float

    def as_dict(self) -> dict[str, float]:
        return {"before": self.before, "after": self.after, "speedup": self.speedup}


@dataclass(frozen=True, eq=False, repr=False)
class LanguageReport(ReportBase):
    """The difference between a language model and its quantized version; printed, shown in Jupyter, plotted, saved.

    Attributes
    ----------
    scheme
        Name of the scheme of the quantized model.
    layers
        :class:`LayerError` of every linear layer, in the network's order; :attr:`worst` has them sorted.
    ppl_before, ppl_after
        Perplexities on the tokens compared.
    kl
        float64 (tokens,): Kullback-Leibler divergence, in nats, of the quantized model's next-token distribution from the
        float32 model's, for every scored token.
    agreement
        Share of the tokens for which both models find the same one likeliest.
    bytes_before, bytes_after
        Size of the weights.
    prefill, decode
        :class:`Rates` of reading a prompt and of writing one sequence token by token; None where not measured.
    threads
        Threads that the kernels used.

    >>> from pathlib import Path
    >>> import zquant as zq
    >>> lm = zq.load(Path(zq.__file__).parents[1] / "tests" / "data" / "tiny-llama-5m")
    >>> report = zq.compare(lm, zq.quantize(lm, "w8a8"), "The sky is clear. There are no clouds.", rounds=0)
    >>> bool(report.kl.mean() < 0.1), report.bytes_after < report.bytes_before
    (True, True)
    """

    scheme: str
    layers: tuple[LayerError, ...]
    ppl_before: float
    ppl_after: float
    kl: np.ndarray
    agreement: float
    bytes_before: int
    bytes_after: int
    prefill: Rates | None = None
    decode: Rates | None = None
    threads: int = 1

    @property
    def mean_kl(self) -> float:
        """Mean of ``kl``."""
        return float(self.kl.mean())

    @property
    def ppl_increase(self) -> float:
        """``ppl_after / ppl_before - 1``."""
        return self.ppl_after / self.ppl_before - 1

    @property
    def headline(self) -> list[str]:
        """The report in a few words each, for a title."""
        parts = [
            f"perplexity {self.ppl_before:.4g} -> {self.ppl_after:.4g}",
            f"same top token {100 * self.agreement:.1f} %",
            f"{self.shrinkage:.1f} times smaller",
        ]
        return parts + ([] if self.decode is None else [f"decodes {self.decode.speedup:.1f} times as fast"])

    def _facts(self) -> list[tuple[str, str]]:
        change = f"{self.ppl_before:.4f} -> {self.ppl_after:.4f} ({100 * self.ppl_increase:+.2f} %, {len(self.kl):,} tokens)"
        facts = [
            ("perplexity", change),
            ("KL to float32", f"mean {self.mean_kl:.5f}, max {self.kl.max():.3f} nats"),
            ("same top token", f"{100 * self.agreement:.2f} %"),
            self._size(),
        ]
        for name, rates in (("prefill, tokens/s", self.prefill), ("decode, tokens/s", self.decode)):
            if rates is not None:
                values = f"{rates.before:.0f} -> {rates.after:.0f} ({rates.speedup:.2f}x, {self._threads()})"
                facts.append((name, values))
        return facts

    def _contents(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "threads": self.threads,
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "perplexity": {"before": self.ppl_before, "after": self.ppl_after, "tokens": len(self.kl)},
            "kl": {"mean": self.mean_kl, "max": float(self.kl.max()), "values": self.kl.tolist()},
            "top_token_agreement": self.agreement,
            "prefill_tokens_per_second": self.prefill and self.prefill.as_dict(),
            "decode_tokens_per_second": self.decode and self.decode.as_dict(),
            "layers": self._layers(),
        }


def _some(found: list[Window], limit: int | None) -> list[Window]:
    """The first windows, with at most ``limit`` tokens; the last of them may get shorter."""
    if limit is None:
        return found
    taken: list[Window] = []
    for window in found:
        ids = window.ids[:limit]
        if len(ids) <= window.first:
            break
        taken.append(Window(ids, window.first))
        limit -= len(ids)
    return taken


class _Divergence:
    """Sums over the scored tokens of both models' logits."""

    def __init__(self) -> None:
        self.nll = [0.0, 0.0]
        self.same = 0
        self.kl: list[np.ndarray] = []

    def add(self, p: np.ndarray, q: np.ndarray, wanted: np.ndarray) -> None:
        """Logits (n, V) of both, and the next ids; rows whose id is negative do not count."""
        rows = np.flatnonzero(wanted >= 0)
        if not len(rows):
            return
        step = max(1, (1 << 18) // p.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            self._add(p[part], q[part], wanted[part])

    def _add(self, p: np.ndarray, q: np.ndarray, wanted: np.ndarray) -> None:
        at = np.arange(len(wanted))
        sums = log_sum_exp(p), log_sum_exp(q)
        for i, (logits, total) in enumerate(zip((p, q), sums)):
            self.nll[i] += float((total - logits[at, wanted]).sum())
        self.same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        # sum_v P (log P - log Q), with log P = p - sum: rounding may leave a little less than 0.
        chances = np.exp(p - sums[0][:, None].astype(np.float32))
        kl = np.einsum("nv,nv->n", chances, p - q, dtype=np.float64) - (sums[0] - sums[1])
        self.kl.append(np.maximum(kl, 0.0))


def _diverge(lm: Any, quantized: Any, parts: list[list[Window]], show: bool | None) -> _Divergence:
    found, chunk = _Divergence(), chunk_size(lm)
    for batch in bar(parts, "logits", show):
        packed, wanted = lm.pack([w.ids for w in batch]), targets(batch)
        streams = (model.stream(packed, chunk=chunk) for model in (lm, quantized))
        for (start, stop, p), (_, _, q) in zip(*streams):
            found.add(p, q, wanted[start:stop])
    return found


def _noise(lm: Any, quantized: Any, parts: list[list[Window]], show: bool | None) -> _OutputNoise:
    """Outputs of every layer on the first tokens; logits only of the last token of each window, they are not compared."""
    noise = _OutputNoise()
    for batch in bar(parts, "layer outputs", show):
        rows = [w.ids for w in batch]
        lm(rows, logits="last", tap=noise.keep)
        quantized(rows, logits="last", tap=noise.add)
        noise.reference.clear()
    return noise


def _prefill(lm: Any, ids: np.ndarray) -> None:
    lm([ids], logits="last")


def _decode(lm: Any, ids: np.ndarray, more: np.ndarray) -> None:
    """Tokens one by one after a prompt of one; what they are does not matter for the speed."""
    cache = lm.new_cache(1)
    lm([ids], cache=cache, logits="last")
    for token in more:
        lm(np.array([[token]]), cache=cache, logits="last")


def _rates(lm: Any, quantized: Any, ids: np.ndarray, rounds: int, show: bool | None) -> list[Rates]:
    """Prefill and decode; a text shorter than what is wanted is repeated."""
    length = min(PREFILL_TOKENS, lm.max_positions)
    prompt, steps = np.resize(ids, length), np.resize(ids, min(DECODE_TOKENS, lm.max_positions - 1))
    found = []
    kinds: list[tuple[int, Callable[..., None], tuple[Any, ...]]] = [
        (length, _prefill, (prompt,)),
        (1 + len(steps), _decode, (prompt[:1], steps)),
    ]
    for count, run, arguments in kinds:
        runs = [partial(run, model, *arguments) for model in (lm, quantized)]
        for warm_up in runs:
            warm_up()
        rates, ratios = speeds(runs, count, rounds, show)
        found.append(Rates(rates[0], rates[1], ratios[1]))
    return found


def compare_language(
    lm: Any,
    quantized: Any,
    text: Any,
    *,
    seq_len: int = 512,
    max_tokens: int | None = MAX_TOKENS,
    batch_size: int = 8,
    rounds: int = 5,
    show_progress_bar: bool | None = None,
) -> LanguageReport:
    """Compare a language model with its quantized version on a text; ``zquant.compare`` calls this for decoders.

    Parameters
    ----------
    lm, quantized
        Two :class:`CausalLM` of one architecture; the first is the reference.
    text
        What :func:`zquant.perplexity` takes: a text, a ``pathlib.Path``, token ids, or a list of texts or ids.
    seq_len
        Tokens of a window (at most the model's positions are used); windows do not overlap.
    max_tokens
        Tokens of the text that are used; None: all. The layers' outputs are compared on the first 1,024 of them.
    batch_size
        Windows per forward pass.
    rounds
        Rounds of the speed measurement; 0 leaves it out.
    show_progress_bar
        None: where stderr is a terminal, after two seconds.

    Raises
    ------
    TypeError
        Something else than loaded language models.
    ValueError
        Fewer than two tokens; the two are not versions of one model (the layer is named).
    """
    check_language_model("lm", lm)
    check_pair(lm, quantized, ("lm", "quantized"))
    before, after = dict(lm.named_linears()), dict(quantized.named_linears())
    _check_same_layers(before, after)
    if max_tokens is not None:
        as_count("max_tokens", max_tokens, 2)
    size = as_count("batch_size", batch_size, 1)
    found = _some(cut(lm, text, min(seq_len, lm.max_positions), None), max_tokens)
    noise = _noise(lm, quantized, batches(_some(found, TAPPED_TOKENS), 1), show_progress_bar)
    layers = _layer_errors(before, after, noise, show_progress_bar)
    sums = _diverge(lm, quantized, batches(found, size), show_progress_bar)
    kl = np.concatenate(sums.kl)
    prefill, decode = _rates(lm, quantized, found[0].ids, rounds, show_progress_bar) if rounds else (None, None)
    return LanguageReport(
        scheme=scheme_name(quantized),
        layers=layers,
        ppl_before=math.exp(sums.nll[0] / len(kl)),
        ppl_after=math.exp(sums.nll[1] / len(kl)),
        kl=kl,
        agreement=sums.same / len(kl),
        bytes_before=_size(lm),
        bytes_after=_size(quantized),
        prefill=prefill,
        decode=decode,
        threads=get_num_threads(),
    )
