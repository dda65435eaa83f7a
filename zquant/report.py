"""What quantization cost and what it gained: :func:`compare` and the :class:`Report` that it returns."""

from __future__ import annotations

import html
import math
import re
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ._progress import bar
from .calibrate import check_model
from .evaluate import _decibels, cosine_fidelity, sqnr_db
from .tables import Written
from .threads import get_num_threads

__all__ = ["KINDS", "LayerError", "Report", "compare", "layer_kind", "scheme_name", "speeds"]

#: Sentences that the speed of the two models is measured on, at most.
TIMED_SENTENCES = 256

#: Tokens of one forward pass whose layer outputs are held.
TAPPED_TOKENS = 1024

_KINDS: tuple[tuple[str, str], ...] = (
    ("query", r"(query|q_proj|q_lin|wq)$"),
    ("key", r"(key|k_proj|k_lin|wk)$"),
    ("value", r"(value|v_proj|v_lin|wv)$"),
    ("attention in", r"(c_attn|qkv|qkv_proj|query_key_value|in_proj)$"),
    ("attention out", r"(attention\.output\.dense|attn\.c_proj|attention\.dense|o_proj|out_lin|out_proj|wo)$"),
    ("feed-forward in", r"(intermediate\.dense|lin1|c_fc|up_proj|gate_proj|gate_up_proj|fc1|fc_in|dense_h_to_4h)$"),
    ("feed-forward out", r"(output\.dense|lin2|c_proj|down_proj|fc2|fc_out|dense_4h_to_h)$"),
)
#: The kinds of linear layers, in the order in which a block uses them.
KINDS: tuple[str, ...] = tuple(kind for kind, _ in _KINDS) + ("other",)


def layer_kind(name: str) -> str:
    """What a linear layer does, told from its Hugging Face name; one of :data:`KINDS`.

    >>> layer_kind("encoder.layer.3.attention.self.query")
    'query'
    >>> layer_kind("encoder.layer.3.attention.output.dense"), layer_kind("encoder.layer.3.output.dense")
    ('attention out', 'feed-forward out')
    >>> layer_kind("pooler.dense")
    'other'
    """
    if _block(name) is None:
        return "other"
    return next((kind for kind, pattern in _KINDS if re.search(r"(^|\.)" + pattern, name)), "other")


def _block(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found.group(1)) if found else None


@dataclass(frozen=True)
class LayerError:
    """One linear layer: how far its weights and its outputs are from float32, in dB (inf: equal).

    ``output_db`` compares outputs within the running models: it holds the layer's own error and what reaches it from
    the layers before it. It is None for a layer that the sentences never reached.
    """

    name: str
    weights: str
    weight_db: float
    output_db: float | None

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        return layer_kind(self.name)

    @property
    def block(self) -> int | None:
        """The number of the Transformer block, None outside of the blocks."""
        return _block(self.name)


class ReportBase(Written):
    """What the reports on encoders and on language models share: text, HTML, JSON, a picture."""

    figure = "report_figure"
    scheme: str
    layers: tuple[LayerError, ...]
    bytes_before: int
    bytes_after: int
    threads: int

    @property
    def worst(self) -> tuple[LayerError, ...]:
        """The layers, lowest output signal-to-noise first."""
        return tuple(sorted(self.layers, key=lambda x: (math.inf if x.output_db is None else x.output_db, x.weight_db)))

    @property
    def shrinkage(self) -> float:
        """``bytes_before / bytes_after``."""
        return self.bytes_before / max(self.bytes_after, 1)

    @property
    @abstractmethod
    def headline(self) -> list[str]:
        """The report in a few words each, for a title."""

    @abstractmethod
    def _facts(self) -> list[tuple[str, str]]:
        """(name, value) lines."""

    def _size(self) -> tuple[str, str]:
        sizes = f"{_mb(self.bytes_before)} -> {_mb(self.bytes_after)}"
        return "size", f"{sizes} ({self.shrinkage:.2f}x smaller)"

    def _threads(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads != 1)}"

    def _layers(self) -> list[dict[str, Any]]:
        return [
            {
                "name": x.name,
                "kind": x.kind,
                "weights": x.weights,
                "weight_db": x.weight_db,
                "output_db": x.output_db,
            }
            for x in self.layers
        ]

    def table(self, limit: int | None = 10) -> str:
        """The whole report as text, with the ``limit`` worst layers (None: all)."""
        shown = self.worst[:limit]
        lines = [f"{self.scheme}: {len(self.layers)} linear layers"]
        lines += [f"  {name:<18} {value}" for name, value in self._facts()]
        if shown:
            name, weights = max(len("layer"), *(len(x.name) for x in shown)), max(7, *(len(x.weights) for x in shown))
            lines += ["", f"{'signal to noise (dB), worst first':<{name + weights + 2}}  {'weight':>6}  {'output':>6}"]
            lines += [
                f"{x.name:<{name}}  {x.weights:<{weights}}  {_db(x.weight_db):>6}  {_db(x.output_db):>6}" for x in shown
            ]
        if len(shown) < len(self.layers):
            lines.append(f"... and {len(self.layers) - len(shown)} more: .table(limit=None) or .layers")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        facts = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td style='text-align:left'>{html.escape(v)}</td></tr>"
            for k, v in self._facts()
        )
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(x.name)}</td>"
            f"<td style='text-align:left'>{html.escape(x.weights)}</td>"
            f"<td>{_db(x.weight_db)}</td><td>{_db(x.output_db)}</td></tr>"
            for x in self.worst
        )
        return (
            f"<b>{html.escape(self.scheme)}</b>: {len(self.layers)} linear layers<table>{facts}</table>"
            "<details open><summary>Signal to noise, worst layers first</summary>"
            "<div style='max-height:22em;overflow:auto'><table><thead><tr><th style='text-align:left'>layer</th>"
            "<th style='text-align:left'>weights</th><th>weight (dB)</th><th>output (dB)</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div></details>"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Report(ReportBase):
    """The difference between a model and its quantized version; printed, shown as a table in Jupyter, plotted, saved.

    Attributes
    ----------
    scheme
        Name of the scheme of the quantized model.
    layers
        :class:`LayerError` of every linear layer, in the network's order; :attr:`worst` has them sorted.
    cosine
        float64 (n,): cosine of each output row to the float32 model's.
    rows
        What a row is: "sentences", or "tokens" for a model without pooling.
    bytes_before, bytes_after
        Size of the weights.
    rate_before, rate_after
        Sentences per second, None where speed was not measured.
    speedup
        Median over the interleaved rounds of the ratio of the two times, None where speed was not measured.
    threads
        Threads that the kernels used.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> encoder = zq.SentenceEncoder(find_minilm())
    >>> report = zq.compare(encoder, zq.quantize(encoder, "w8a8"), ["The sky is clear."], rounds=0)
    >>> report.rows, report.bytes_after < report.bytes_before
    ('sentences', True)
    """

    scheme: str
    layers: tuple[LayerError, ...]
    cosine: np.ndarray
    rows: str
    bytes_before: int
    bytes_after: int
    rate_before: float | None = None
    rate_after: float | None = None
    speedup: float | None = None
    threads: int = 1

    @property
    def mean_cosine(self) -> float:
        """Mean of ``cosine``."""
        return float(self.cosine.mean())

    @property
    def min_cosine(self) -> float:
        """Smallest of ``cosine``."""
        return float(self.cosine.min())

    @property
    def headline(self) -> list[str]:
        """The report in a few words each, for a title."""
        parts = [f"mean cosine {self.mean_cosine:.4f}", f"{self.shrinkage:.1f} times smaller"]
        return parts + ([] if self.speedup is None else [f"{self.speedup:.1f} times as fast"])

    def _facts(self) -> list[tuple[str, str]]:
        cosine = f"mean {self.mean_cosine:.5f}, min {self.min_cosine:.5f} ({len(self.cosine)} {self.rows})"
        facts = [("cosine to float32", cosine), self._size()]
        if self.speedup is not None:
            rates = f"{self.rate_before:.0f} -> {self.rate_after:.0f} ({self.speedup:.2f}x, {self._threads()})"
            facts.append(("sentences/s", rates))
        return facts

    def _contents(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "threads": self.threads,
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "sentences_per_second": {"before": self.rate_before, "after": self.rate_after, "speedup": self.speedup},
            "cosine": {
                "mean": self.mean_cosine,
                "min": self.min_cosine,
                "rows": self.rows,
                "values": self.cosine.tolist(),
            },
            "layers": self._layers(),
        }


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _db(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if value == math.inf else f"{value:.1f}"


# --- measuring ---------------------------------------------------------------------------------------------------


def speeds(
    runs: Sequence[Callable[[], Any]], count: int, rounds: int = 5, show_progress_bar: bool | None = False
) -> tuple[list[float], list[float]]:
    """Rates of several ways to do the same work, measured in turns so that a disturbance meets all of them.

    Parameters
    ----------
    runs
        Called once each per round; a round starts with another one each time. Warm them up before.
    count
        Items that one call works on.
    rounds
        Rounds, at least 1; medians are taken over them.

    Returns
    -------
    rates, ratios
        Items per second of each run, and how many times faster than the first run each is: the median over the rounds
        of the ratio within a round.

    >>> rates, ratios = speeds([lambda: sum(range(1000)), lambda: sum(range(1000))], count=10, rounds=3)
    >>> len(rates), ratios[0]
    (2, 1.0)
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    seconds = np.empty((rounds, len(runs)))
    for turn in bar(range(rounds), "timing", show_progress_bar):
        for i in range(len(runs)):
            which = (turn + i) % len(runs)
            start = time.perf_counter()
            runs[which]()
            seconds[turn, which] = max(time.perf_counter() - start, 1e-9)
    rates = count / np.median(seconds, axis=0)
    return rates.tolist(), np.median(seconds[:, :1] / seconds, axis=0).tolist()


class _OutputNoise:
    """Sums of r^2 and (r - a)^2 per layer; the activations of one batch are all that is held.

    A model may call a tap several times per layer (micro-batches): outputs are kept and compared in order.
    """

    def __init__(self) -> None:
        self.reference: dict[str, deque[np.ndarray]] = {}
        self.sums: dict[str, list[float]] = {}

    def keep(self, name: str, x: Any, y: np.ndarray) -> None:
        """The tap of the float32 model."""
        self.reference.setdefault(name, deque()).append(np.array(y, dtype=np.float32))

    def add(self, name: str, x: Any, y: np.ndarray) -> None:
        """The tap of the quantized model."""
        kept = self.reference.get(name)
        if not kept:
            raise ValueError(f"layer {name}: ran in the quantized model only; these are not two versions of one model")
        r = kept.popleft()
        if r.shape != np.shape(y):
            raise ValueError(f"layer {name}: output shapes differ, {r.shape} and {np.shape(y)}")
        r = r.astype(np.float64).ravel()
        noise = r - np.asarray(y).ravel()
        total = self.sums.setdefault(name, [0.0, 0.0])
        # Not with @: BLAS would wake its threads for every layer.
        total[0] += float(np.einsum("i,i->", r, r))
        total[1] += float(np.einsum("i,i->", noise, noise))

    def decibels(self, name: str) -> float | None:
        return _decibels(*self.sums[name]) if name in self.sums else None


def _network(model: Any) -> Any:
    return getattr(model, "model", model)


def _size(model: Any) -> int:
    return int(_network(model).nbytes)


def scheme_name(model: Any) -> str:
    """Name of the scheme that a model or an encoder was quantized by; "float32" where it was not."""
    scheme = getattr(_network(model), "scheme", None)
    return str(getattr(scheme, "name", scheme) or "float32")


def _check_same_layers(before: dict[str, Any], after: dict[str, Any]) -> None:
    missing, extra = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    if missing or extra:
        parts = [f"{what} {', '.join(names[:3])}" for what, names in (("missing", missing), ("extra", extra)) if names]
        raise ValueError(f"quantized: not a version of the same model; linear layers {'; '.join(parts)}")
    for name, linear in before.items():
        if after[name].shape != linear.shape:
            raise ValueError(f"quantized: layer {name} is {after[name].shape}, expected {linear.shape}")


def _kind(model: Any) -> str:
    if hasattr(model, "new_cache"):
        return "a language model"
    return "a sentence encoder" if hasattr(model, "encode") else "a model without pooling"


def check_pair(model: Any, quantized: Any, names: tuple[str, str] = ("model", "quantized")) -> None:
    """Errors that say what the two arguments of those names are, where they cannot be compared.

    Raises
    ------
    TypeError
        One is no loaded model.
    ValueError
        The two are of different kinds: language model, sentence encoder, model without pooling.
    """
    for name, each in zip(names, (model, quantized)):
        check_model(name, each)
    kinds = _kind(model), _kind(quantized)
    if kinds[0] != kinds[1]:
        raise ValueError(f"{names[0]} is {kinds[0]} and {names[1]} is {kinds[1]}; expected two of one kind")


def _token_ids(model: Any, sentences: Sequence[Any]) -> list[np.ndarray]:
    """Token ids of each sentence; sentences that are token ids already stay as they are. TypeError on what is no model."""
    check_model("model", model)
    if not all(isinstance(s, str) for s in sentences):
        return [np.asarray(s) for s in sentences]
    if hasattr(model, "tokenize"):
        return model.tokenize(sentences)
    from .tokenization import TextTokenizer

    return TextTokenizer(model.path, model.max_length)(sentences)


def _batches(ids: list[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
    """At most ``batch_size`` sequences and about TAPPED_TOKENS tokens at a time."""
    batch: list[np.ndarray] = []
    for row in ids:
        if batch and (len(batch) == batch_size or sum(map(len, batch)) + len(row) > TAPPED_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _output_noise(before: Any, after: Any, batches: list[list[np.ndarray]], show: bool | None) -> _OutputNoise:
    noise = _OutputNoise()
    for batch in bar(batches, "layer outputs", show):
        _network(before)(batch, tap=noise.keep)
        _network(after)(batch, tap=noise.add)
        noise.reference.clear()
    return noise


def _layer_errors(
    before: dict[str, Any], after: dict[str, Any], noise: _OutputNoise, show: bool | None
) -> tuple[LayerError, ...]:
    """Every linear layer; the dense weights of one layer are all that is held."""
    return tuple(
        LayerError(
            name, str(after[name].spec or "float32"), sqnr_db(linear.dense(), after[name].dense()), noise.decibels(name)
        )
        for name, linear in bar(before.items(), "weights", show, total=len(before))
    )


def _run(model: Any, sentences: list[Any], ids: list[np.ndarray], batch_size: int) -> np.ndarray:
    """Embeddings of an encoder; else rows of logits, or hidden states of every token."""
    if hasattr(model, "encode"):
        return model.encode(sentences, batch_size=batch_size, show_progress_bar=False)
    rows = []
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        y = np.asarray(model(batch))
        rows += [y] if y.ndim == 2 else [hidden[: len(row)] for hidden, row in zip(y, batch)]
    return np.concatenate(rows)


def compare(
    model: Any,
    quantized: Any,
    sentences: Any,
    *,
    batch_size: int | None = None,
    rounds: int = 5,
    show_progress_bar: bool | None = None,
    **options: Any,
) -> Any:
    """Compare a model with its quantized version: error per layer, fidelity, size, speed.

    Encoders are compared on sentences, language models on a text: see :func:`zquant.language_report.compare_language`.

    Parameters
    ----------
    model, quantized
        Two ``SentenceEncoder`` or two models of one architecture; the first is the reference.
    sentences
        For encoders: at least one string, some hundred make the figures steady; for models without pooling also sequences
        of token ids. For language models: a text, a ``pathlib.Path``, token ids, or a list of texts or ids.
    batch_size
        Sentences (None: 32) or windows of a text (None: 8) per forward pass. The layers' outputs are compared batch by
        batch, about 1,024 tokens at a time.
    rounds
        Rounds of the speed measurement (on at most 256 of the sentences); 0 leaves it out.
    show_progress_bar
        None: where stderr is a terminal, after two seconds.
    options
        For language models: ``seq_len``, ``max_tokens``.

    Returns
    -------
    Report or LanguageReport

    Raises
    ------
    TypeError
        Something else than loaded models.
    ValueError
        No sentences, or the two are not versions of one model (the layer is named), or of different kinds.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> encoder = zq.SentenceEncoder(find_minilm())
    >>> report = zq.compare(encoder, zq.quantize(encoder, "w8a8"), ["The sky is clear.", "He sold the car."], rounds=0)
    >>> bool(report.cosine.min() > 0.99), report.worst[0].output_db > 15
    (True, True)
    """
    check_pair(model, quantized)
    if hasattr(model, "new_cache"):
        from .language_report import compare_language

        common: dict[str, Any] = dict(batch_size=batch_size or 8, rounds=rounds, show_progress_bar=show_progress_bar)
        return compare_language(model, quantized, sentences, **common, **options)
    if options:
        raise TypeError(f"compare: {', '.join(options)}: for language models only")
    batch_size = batch_size or 32
    if isinstance(sentences, str) or not len(sentences):
        raise ValueError("sentences: expected a non-empty sequence of strings")
    sentences = list(sentences)
    before, after = dict(_network(model).named_linears()), dict(_network(quantized).named_linears())
    _check_same_layers(before, after)
    ids = _token_ids(model, sentences)
    noise = _output_noise(model, quantized, list(_batches(ids, batch_size)), show_progress_bar)
    layers = _layer_errors(before, after, noise, show_progress_bar)
    outputs = [_run(m, sentences, ids, batch_size) for m in (model, quantized)]
    rates: list[Any] = [None, None]
    ratios: list[Any] = [None, None]
    if rounds:
        few, some = sentences[:TIMED_SENTENCES], ids[:TIMED_SENTENCES]
        runs = [partial(_run, m, few, some, batch_size) for m in (model, quantized)]
        rates, ratios = speeds(runs, len(few), rounds, show_progress_bar)
    return Report(
        scheme=scheme_name(quantized),
        layers=layers,
        cosine=cosine_fidelity(*outputs),
        rows="sentences" if len(outputs[0]) == len(sentences) else "tokens",
        bytes_before=_size(model),
        bytes_after=_size(quantized),
        rate_before=rates[0],
        rate_after=rates[1],
        speedup=ratios[1],
        threads=get_num_threads(),
    )
