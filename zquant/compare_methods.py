"""Several recipes for one model in one table: the same loss for all, time, memory, size."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._progress import bar
from .calibrate import Shared, _rss
from .language_report import MAX_TOKENS
from .losses import Loss, Measured, loss_for
from .methods import Preset, Recipe, Step
from .quantize import choose_scheme, quantize
from .report import _size
from .spec import Scheme
from .statistics import Statistics
from .tables import html_table, text_table

__all__ = ["MethodResult", "MethodsTable", "compare_methods"]


@dataclass(frozen=True)
class MethodResult:
    """One recipe.

    Attributes
    ----------
    name : what it was called
    scheme : name of the scheme
    recipe : :meth:`Recipe.to_dict` of what was done
    value, increase : the loss, and how much worse than float32; None where it failed
    recovered : share of the increase by round to nearest, in the same scheme, that this recipe avoids; None where round to
        nearest costs nothing
    seconds : to quantize, calibration included, also where another recipe has done it: a pass over the float model that
        several recipes need is made once
    peak_bytes : the most memory that the process had meanwhile beyond what it had before, sampled 50 times a second
    nbytes : size of the quantized weights
    error : why it failed, or ""

    >>> MethodResult("gptq", "w4a16", {}, value=20.5, increase=0.5, recovered=0.6).increase
    0.5
    """

    name: str
    scheme: str
    recipe: Mapping[str, Any]
    value: float | None = None
    increase: float | None = None
    recovered: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    nbytes: int = 0
    error: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class MethodsTable(Measured):
    """The result of :func:`compare_methods`; printed, shown in Jupyter, plotted (the increase of the loss by recipe and
    scheme), saved. ``table[name]`` is the first result of that name.

    Attributes
    ----------
    results : one :class:`MethodResult` per recipe, in the order given; round to nearest is added to each scheme without it
    metric, reference : the loss's name, and its value for the float model
    nbytes : size of the float weights
    interrupted : whether it was stopped before its end; what was found until then is here

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> enc = zq.SentenceEncoder(find_minilm())
    >>> table = zq.compare_methods(enc, {"int8": ("w8a8", "rtn")}, evaluation=["The sky is clear."])
    >>> [result.name for result in table.results], table.metric
    (['int8'], 'cosine to float32')
    """

    figure = "methods_figure"
    loss: Loss
    results: tuple[MethodResult, ...]
    nbytes: int
    interrupted: bool = False

    def __getitem__(self, name: str) -> MethodResult:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"{name!r} is not among {', '.join(result.name for result in self.results)}")

    def __iter__(self) -> Iterator[MethodResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        header = ["method", "scheme", self.metric, "increase", "of RTN's loss regained", "seconds", "peak MB", "MB"]
        rows = [["float32", "", self.loss.text(self.reference), "", "", "", "", f"{self.nbytes / 1e6:.1f}"]]
        return header, rows + [self._row(result) for result in self.results]

    def _row(self, r: MethodResult) -> list[str]:
        if r.value is None or r.increase is None:
            return [r.name, r.scheme, "failed", "", "", f"{r.seconds:.1f}", "", ""]
        regained = "-" if r.recovered is None else f"{100 * r.recovered:.0f} %"
        return [r.name, r.scheme, self.loss.text(r.value), f"{r.increase:+.4g}", regained, f"{r.seconds:.1f}",
                f"{r.peak_bytes / 1e6:.0f}", f"{r.nbytes / 1e6:.1f}"]

    def _notes(self) -> list[str]:
        notes = [f"{r.name} ({r.scheme}) failed: {r.error}" for r in self.results if r.error]
        return notes + ["interrupted: some recipes are missing"] * self.interrupted

    def __repr__(self) -> str:
        return "\n".join([text_table(*self._table(), left=2), *self._notes()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return html_table(*self._table(), left=2) + notes

    def _contents(self) -> dict[str, Any]:
        return {"metric": self.metric, "reference": self.reference, "bytes": self.nbytes, "interrupted": self.interrupted,
                "results": [dict(vars(result)) for result in self.results]}


@dataclass(frozen=True)
class _Job:
    name: str
    recipe: Recipe
    scheme: Scheme


def compare_methods(
    model: Any,
    methods: Mapping[str, Any] | Sequence[Any],
    calib: Any = None,
    evaluation: Any = None,
    *,
    scheme: str | Scheme | None = None,
    mode: str = "sequential",
    samples: int = 128,
    seq_len: int = 512,
    max_tokens: int | None = MAX_TOKENS,
    batch_size: int | None = None,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> MethodsTable:
    """Quantize a model by several recipes and compare what each costs.

    Parameters
    ----------
    model
        A float CausalLM, SentenceEncoder or Model. It is not changed.
    methods
        Name -> recipe, or name -> (scheme, recipe); recipes as for :meth:`Recipe.of`. Or a list of recipes and pairs, which
        are then called what the recipes are.
    calib
        Calibration data for recipes that need some, as in :func:`zquant.quantize`; never what ``evaluation`` is.
    evaluation
        What the loss is measured on; see :func:`zquant.losses.loss_for`: a text for language models; sentences, or scored
        pairs, for encoders.
    scheme
        For recipes that are not in a pair with one. None: a preset's own, else "w8a8".
    mode, samples, seed
        Of the calibration, as in :func:`zquant.quantize`.
    seq_len, max_tokens, batch_size
        Of the loss.
    show_progress_bar
        None: where stderr is a terminal, after two seconds.

    Returns
    -------
    MethodsTable
        A recipe that fails has a row that says why. After Ctrl-C: those that were done until then, and ``interrupted``.

    Raises
    ------
    ValueError, TypeError
        No recipes; names that are not known or steps out of order; data that the loss cannot be measured on.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> enc = zq.SentenceEncoder(find_minilm())
    >>> table = zq.compare_methods(enc, {"int8": ("w8a8", "rtn"), "int4": ("w4a8", "rtn")}, evaluation=["The sky is clear."])
    >>> table["int8"].value > table["int4"].value > 0.9
    True
    """
    if evaluation is None:
        raise ValueError("evaluation: expected what the loss is measured on: a text, sentences or scored pairs")
    jobs = list(_jobs(methods, scheme))
    loss = loss_for(model, evaluation, seq_len=seq_len, max_tokens=max_tokens, batch_size=batch_size)
    if calib is not None and not isinstance(calib, Statistics):
        calib = Shared(model, calib, samples=samples, seed=seed)
    options = dict(calib=calib, mode=mode, samples=samples, seed=seed, show_progress_bar=False)
    results: list[MethodResult] = []
    interrupted = False
    try:
        for job in bar(jobs, "methods", show_progress_bar, unit="recipe"):
            results.append(_measured(model, job, loss, options))
    except KeyboardInterrupt:
        interrupted = True
    return MethodsTable(loss, tuple(_with_recovered(jobs, results)), _size(model), interrupted)


def _jobs(methods: Any, default: str | Scheme | None) -> Iterator[_Job]:
    """Every recipe, and before the first of each scheme round to nearest where it is not among them."""
    if isinstance(methods, (str, Recipe, Preset, Step)) or not methods:
        raise ValueError("methods: expected a mapping from names to recipes, or a list of recipes")
    found = []
    for name, method in methods.items() if isinstance(methods, Mapping) else ((None, method) for method in methods):
        pair = isinstance(method, tuple) and len(method) == 2 and _is_scheme(method[0])
        scheme, what = method if pair else (default, method)
        recipe = Recipe.of(what)
        found.append(_Job(recipe.name if name is None else str(name), recipe, choose_scheme(scheme, what)))
    has_baseline = {job.scheme for job in found if _is_plain(job)}
    for job in found:
        if job.scheme not in has_baseline:
            has_baseline.add(job.scheme)
            yield _Job("rtn", Recipe.of("rtn"), job.scheme)
        yield job


def _is_plain(job: _Job) -> bool:
    """Whether it is round to nearest alone, what others are compared with."""
    return job.recipe.steps == Recipe.of("rtn").steps


def _with_recovered(jobs: Sequence[_Job], results: Sequence[MethodResult]) -> Iterator[MethodResult]:
    """The results, each with its share of what round to nearest costs in its scheme."""
    costs: dict[Scheme, float] = {}
    for job, result in zip(jobs, results):
        if _is_plain(job) and result.increase is not None:
            costs.setdefault(job.scheme, result.increase)
    for job, result in zip(jobs, results):
        cost = costs.get(job.scheme, 0.0)
        known = cost > 0 and result.increase is not None and not _is_plain(job)
        yield replace(result, recovered=1 - result.increase / cost) if known else result  # type: ignore[operator]


def _is_scheme(value: Any) -> bool:
    try:
        Scheme.parse(value)
    except ValueError:
        return False
    return True


def _measured(model: Any, job: _Job, loss: Loss, options: dict[str, Any]) -> MethodResult:
    known: dict[str, Any] = dict(name=job.name, scheme=job.scheme.name, recipe=job.recipe.to_dict())
    calib = options["calib"]
    start, peak, before = time.perf_counter(), _PeakMemory(), getattr(calib, "spared", 0.0)

    def seconds() -> float:
        return time.perf_counter() - start + getattr(calib, "spared", 0.0) - before

    try:
        with peak:
            small = quantize(model, job.scheme, job.recipe, **options)
        spent = seconds()
        value = loss(small)
    except Exception as error:  # whatever a recipe fails of, the others go on
        return MethodResult(**known, seconds=seconds(),
                            error=str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
    return MethodResult(**known, value=value, increase=loss.increase(value), seconds=spent, peak_bytes=peak.bytes,
                        nbytes=_size(small))


class _PeakMemory:
    """The most memory of the process inside a ``with``, beyond what it had at its beginning."""

    def __init__(self) -> None:
        self.bytes, self._end = 0, threading.Event()

    def __enter__(self) -> None:
        self._before = _rss()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.bytes = max(self.bytes, _rss() - self._before)

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()
        self.bytes = max(self.bytes, _rss() - self._before)
