"""calibrate: statistics of what a model's linear layers read, in one pass over some text, block by block.

The hidden states of all sequences are kept between blocks; of statistics, those of one block at a time (parallel mode) or of
one stage, the layers that read the same rows (sequential mode). :func:`walk` hands them to a visitor and forgets them.
"""
from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ._progress import bar
from .checks import as_count
from .evaluate import read_text
from .generate import text_ids
from .linear import Linear
from .methods import BlockMethod, Method, Recipe
from .models.steps import Batch, Run, Steps, Unit, steps_of
from .perplexity import _checked, _not_a_name
from .spec import Scheme
from .statistics import Accumulator, GroupShape, InputStatistics, RunInfo, Statistics, _writing, check_needs, fingerprint
from .tokenization import TextTokenizer, check_text

__all__ = ["MODES", "Sequences", "Shared", "Visitor", "calibrate", "check_model", "read_sequences", "walk"]

MODES = ("parallel", "sequential")
#: Tokens of a sequence by default, at most.
LENGTH = 512
#: Matrices of statistics that are held in memory, in bytes; more of them go to a temporary file.
IN_MEMORY = 1 << 30

#: Takes the statistics of one stage; in sequential mode it may return layers, by name, that stand in their places from then on.
Visitor = Callable[[InputStatistics], "Mapping[str, Linear] | None"]


def calibrate(
    model: Any,
    data: Any,
    needs: Collection[str] = ("absmax",),
    *,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    mode: str = "parallel",
    scheme: str | Scheme | None = None,
    method: str | Method | Recipe = "rtn",
    rows: int = 512,
    batch_tokens: int = 2048,
    file: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Statistics:
    """Statistics of the inputs of a model's linear layers.

    Parameters
    ----------
    model
        A Model, a CausalLM or a SentenceEncoder.
    data
        Text of the kind that the model will see: never what it is evaluated on. A text, a ``pathlib.Path`` of a UTF-8
        file, or a list of texts; token ids, or a list or array of them; or "random" for ids drawn from the vocabulary.
        Language models read documents in windows of ``seq_len`` tokens; encoders read a list's texts, or a text's lines,
        cut at ``seq_len``.
    needs
        Which: "absmax", "minmax", "mean_abs", "gram", "samples", "deviation" (sequential mode). See
        :class:`InputStatistics`.
    samples
        Sequences at most; drawn where there are more.
    seq_len
        Tokens of a sequence at most. None: 512, or as many as the model takes.
    seed
        Of everything that is drawn.
    mode
        "parallel": every layer's input is that of the model given. "sequential": every layer is quantized once its
        statistics are known, and those behind it see what it then computes. That needs ``scheme``.
    scheme, method
        As in :func:`zquant.quantize`; for the sequential mode.
    rows
        Rows that "samples" keeps.
    batch_tokens
        Tokens that go through a block together. It bounds the memory; results have the same bits for any.
    file
        Write the statistics to this safetensors file, block by block, and return them mapped from there: memory then
        holds one block's at a time, where Gram matrices of all would not fit. None: the same with a temporary file that
        has no name any more, where the matrices would take more than 1 GiB.
    progress
        True or False; None shows a bar in a terminal or notebook, when the work takes more than two seconds.

    Returns
    -------
    Statistics
        By layer name. Layers that share their input (query, key, value; gate, up) share one object. A head that is the
        embedding table is not among them.

    Raises
    ------
    TypeError
        Something else than a loaded model.
    ValueError
        No tokens; ids out of the vocabulary; unknown needs or mode; seq_len beyond the model's positions; NaN.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> enc = zq.SentenceEncoder(find_minilm())
    >>> stats = zq.calibrate(enc, ["The sky is clear.", "He sold the car."], needs={"absmax", "gram"})
    >>> layer = stats["encoder.layer.0.output.dense"]
    >>> layer["gram"].shape, layer.tokens
    ((1536, 1536), 14)
    >>> stats["encoder.layer.0.attention.self.query"] is stats["encoder.layer.0.attention.self.value"]
    True
    """
    check_model("model", model)
    wanted = check_needs(needs)
    _one_of("mode", mode, MODES)
    quantizer = _quantizer(model, mode, scheme, method)
    sequences = read_sequences(model, data, samples=samples, seq_len=seq_len, seed=seed)
    return collect(model, sequences, wanted, quantizer=quantizer, rows=as_count("rows", rows, 1), seed=seed,
                   batch_tokens=as_count("batch_tokens", batch_tokens, 1), file=file, progress=progress)


def collect(model: Any, sequences: Sequences, needs: frozenset[str], *, quantizer: Any = None, rows: int = 512, seed: int = 0,
            batch_tokens: int = 2048, file: str | os.PathLike[str] | None = None,
            progress: bool | None = None) -> Statistics:
    """As :func:`calibrate`, of sequences that are read already; sequential with a ``zquant.quantize.Quantizer``."""
    start = time.perf_counter()
    info = RunInfo(fingerprint(model), sequences.source, len(sequences.ids), sequences.tokens, sequences.seq_len, seed,
                   MODES[0] if quantizer is None else MODES[1], "" if quantizer is None else quantizer.scheme.name)
    walker = Walker(getattr(model, "model", model) if quantizer is None else quantizer.start, sequences.ids,
                    needs if quantizer is None else needs | quantizer.needs, sequential=quantizer is not None,
                    rows=rows, seed=seed, batch_tokens=batch_tokens, reference=None if quantizer is None else quantizer.network)

    def written(file: str | os.PathLike[str]) -> Statistics:
        with _writing(file, walker.shapes(), info) as write:
            walker.run(_keeping(write, quantizer), progress)
            write.finish(time.perf_counter() - start, walker.peak_bytes)
        return Statistics.load(file)

    if file is not None:
        return written(file)
    if sum(shape.matrix_bytes for shape in walker.shapes()) > IN_MEMORY:
        with tempfile.TemporaryDirectory(prefix="zquant-") as folder:
            return written(os.path.join(folder, "statistics.safetensors"))  # mapped, it outlives its name
    groups: list[InputStatistics] = []
    walker.run(_keeping(groups.append, quantizer), progress)
    return Statistics(groups, info, time.perf_counter() - start, walker.peak_bytes)


def _quantizer(model: Any, mode: str, scheme: str | Scheme | None, method: Any) -> Any:
    """What the sequential mode replaces layers with; None for the parallel mode."""
    if mode == "parallel":
        return None
    if scheme is None:
        raise ValueError("mode: 'sequential' needs a scheme, which predecessors are quantized with")
    from .quantize import Quantizer

    recipe = Recipe.of(method)
    if recipe.transforms:
        raise ValueError(f"method: {recipe.name} transforms the model before it is calibrated; calibrate what it made of it")
    if isinstance(recipe.method, BlockMethod):
        raise ValueError(f"method: {recipe.name} trains whole blocks, which are not there before they are calibrated; name a "
                         "solver of single layers")
    return Quantizer(model, Scheme.parse(scheme), recipe)


def _keeping(keep: Callable[[InputStatistics], None], quantizer: Any) -> Visitor:
    """A visitor that keeps the statistics, and quantizes where the mode is sequential."""
    def visit(group: InputStatistics) -> Mapping[str, Linear] | None:
        keep(group)
        return None if quantizer is None else quantizer.visit(group)

    return visit


def check_model(name: str, model: Any) -> None:
    """TypeError, which says what the argument ``name`` is, where ``model`` is no loaded model.

    >>> check_model("model", "all-MiniLM-L6-v2")
    Traceback (most recent call last):
    ...
    TypeError: model: expected a loaded model (zquant.load(directory), zquant.SentenceEncoder(directory)), got str
    """
    if isinstance(model, type) or not hasattr(getattr(model, "model", model), "named_linears"):
        raise TypeError(f"{name}: expected a loaded model (zquant.load(directory), zquant.SentenceEncoder(directory)), "
                        f"got {type(model).__name__}")


def _one_of(what: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{what}: expected {' or '.join(map(repr, known))}, got {value!r}")


# -- what is read

@dataclass(frozen=True, eq=False)
class Sequences:
    """Token ids of every sequence, none of them empty; ``source`` is "text", "ids" or "random"."""

    ids: list[np.ndarray]
    source: str
    seq_len: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def read_sequences(model: Any, data: Any, *, samples: int = 128, seq_len: int | None = None, seed: int = 0) -> Sequences:
    """Calibration data as sequences of at most ``seq_len`` tokens, at most ``samples`` of them; see :func:`calibrate`.

    Raises
    ------
    ValueError
        No tokens, ids out of the vocabulary, a text where the model has no tokenizer, seq_len beyond its positions.
    """
    network = getattr(model, "model", model)
    samples, limit = as_count("samples", samples, 1), getattr(model, "max_seq_length", network.max_length)
    seq_len = min(LENGTH, limit) if seq_len is None else as_count("seq_len", seq_len, 1)
    if seq_len > limit:
        raise ValueError(f"seq_len: {seq_len}, but the model takes {limit} tokens")
    rng = np.random.default_rng(as_count("seed", seed, 0))
    if isinstance(data, str) and data == "random":
        return Sequences(_random(network, samples, seq_len, rng), "random", seq_len)
    rows, source = _rows(data)
    if source == "text":
        for i, text in enumerate(rows):
            check_text("calibration data" if isinstance(data, (str, os.PathLike)) else f"calibration data[{i}]", text)
    if source == "text" and not hasattr(network, "new_cache"):
        if isinstance(data, (str, os.PathLike)):
            rows = rows[0].splitlines()
        rows = _drawn([text for text in rows if text.strip()], samples, rng)  # before they are tokenized
        found = _tokenizer(model, seq_len)(rows) if rows else []
    else:
        ids = _documents(network, rows, source)
        found = _drawn([row[i:i + seq_len] for row in ids for i in range(0, len(row), seq_len)], samples, rng)
    if not found:
        raise ValueError("calibration data: no tokens")
    return Sequences(found, source, seq_len)


class Shared:
    """Calibration data of several recipes for one model: ``zquant.quantize(model, calib=shared)`` for each of them.

    The data are read once. Statistics of the model that recipes begin with are kept, so that those that look at the same
    ones take one pass together; what is behind a first transform, or quantized in sequence, is every recipe's own.

    Attributes
    ----------
    spared : seconds that passes would have taken whose statistics were there already
    """

    def __init__(self, model: Any, data: Any, **options: Any) -> None:
        self.network, self.spared = getattr(model, "model", model), 0.0
        self._model, self._data, self._options = model, data, options
        self._kept: list[Statistics] = []

    @cached_property
    def sequences(self) -> Sequences:
        return read_sequences(self._model, self._data, **self._options)

    def statistics(self, needs: frozenset[str], seed: int, progress: bool | None = None) -> Statistics:
        """Of the model as it was given."""
        for found in self._kept:
            if needs <= found.needs:
                self.spared += found.seconds
                return found
        self._kept.append(collect(self.network, self.sequences, needs, seed=seed, progress=progress))
        return self._kept[-1]


def _rows(data: Any) -> tuple[list[Any], str]:
    """Texts or sequences of ids, and which of the two."""
    if isinstance(data, os.PathLike):
        return [read_text(data)], "text"
    if isinstance(data, str):
        return [_not_a_name(data)], "text"
    if not isinstance(data, (Sequence, np.ndarray)) or (isinstance(data, np.ndarray) and data.ndim not in (1, 2)):
        raise ValueError(f"calibration data: expected a text, a Path, token ids, a list of texts or ids, or 'random', "
                         f"got {type(data).__name__}")
    if len(data) == 0:
        raise ValueError("calibration data: no tokens")
    kinds = {isinstance(row, str) for row in data}
    if len(kinds) == 2:
        raise ValueError("calibration data: texts and ids in one list")
    nested = isinstance(data[0], (str, Sequence, np.ndarray))
    return (list(data) if nested else [data]), "text" if kinds == {True} else "ids"


def _documents(network: Any, rows: list[Any], source: str) -> list[np.ndarray]:
    vocabulary = _Vocabulary(network.dims.vocabulary)
    ids = [text_ids(network, row, "calibration data") for row in rows] if source == "text" else rows
    return [_checked(vocabulary, row, "calibration data" if len(rows) == 1 else f"calibration data[{i}]")
            for i, row in enumerate(ids)]


@dataclass(frozen=True)
class _Vocabulary:
    vocabulary: int


def _tokenizer(model: Any, seq_len: int) -> Any:
    pipeline = getattr(model, "_pipeline", None)
    if pipeline is None:
        return TextTokenizer(model.path, seq_len)
    return TextTokenizer(pipeline.transformer, seq_len, pipeline.lower)


def _drawn(rows: list[Any], samples: int, rng: np.random.Generator) -> list[Any]:
    if len(rows) <= samples:
        return rows
    return [rows[i] for i in np.sort(rng.choice(len(rows), samples, replace=False))]


def _random(network: Any, samples: int, seq_len: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Ids of the whole vocabulary; an encoder's padding, which is not numbered as other tokens are, is left out."""
    pad, count = getattr(network.dims, "pad", None), network.dims.vocabulary
    if pad is None or pad >= count or count == 1:
        return list(rng.integers(0, count, (samples, seq_len)))
    ids = rng.integers(0, count - 1, (samples, seq_len))
    return list(ids + (ids >= pad))


# -- walking along a model

def walk(model: Any, ids: Sequence[np.ndarray], needs: Collection[str], visit: Visitor, *, sequential: bool = False,
         progress: bool | None = None, **options: Any) -> int:
    """Hand the statistics of every stage to ``visit``, in the order of the forward; what it does not keep is forgotten.

    In sequential mode the layers that ``visit`` returns take the places of those named, before what comes next is
    computed: query, key and value before attention, gate and up before down. Returns the memory at its highest, in bytes.

    Parameters
    ----------
    model
        A Model or a CausalLM; it is not changed.
    ids
        Token ids of each sequence.
    options
        Those of :class:`Walker`.
    """
    walker = Walker(model, ids, check_needs(needs), sequential=sequential, **options)
    walker.run(visit, progress)
    return walker.peak_bytes


class Walker:
    """One pass over a model; see :func:`walk`.

    Parameters
    ----------
    wanted
        Layers of which statistics are wanted; None for all. Nothing behind the last of them is computed.
    rows, seed
        Of the rows that "samples" keeps: how many, and which.
    batch_tokens
        Tokens that go through a block together.
    reference
        The float model, for "deviation": it is walked along, in step, and its hidden states are held as well.
    """

    def __init__(self, model: Any, ids: Sequence[np.ndarray], needs: frozenset[str], *, sequential: bool = False,
                 wanted: Collection[str] | None = None, rows: int = 512, seed: int = 0, batch_tokens: int = 2048,
                 reference: Any = None) -> None:
        self.model, self.needs, self.sequential = model, needs, sequential
        self._wanted, self._rows, self._seed = wanted, rows, seed
        if "deviation" in needs and (reference is None or not sequential):
            raise ValueError("needs: 'deviation', from the float model's inputs, needs mode='sequential': in parallel mode "
                             "every layer has just those")
        self._reference = reference if "deviation" in needs else None
        self.steps: Steps = steps_of(model, ids, batch_tokens)
        self.tokens, self.sequences = self.steps.batches[-1].last, len(ids)
        last = max((i for i, unit in enumerate(self.steps.units) if any(map(self._is_wanted, unit.stages))), default=-1)
        self.units = self.steps.units[:last + 1]
        self.peak_bytes = 0

    def _is_wanted(self, stage: Sequence[str]) -> bool:
        return self._wanted is None or any(name in self._wanted for name in stage)

    def _picks(self, unit: Unit) -> np.ndarray:
        """Which rows "samples" keeps: the same tokens for all layers."""
        count = self.tokens if unit.per_token else self.sequences
        if "samples" not in self.needs:
            return np.empty(0, np.int64)
        return np.sort(np.random.default_rng(self._seed).choice(count, min(self._rows, count), replace=False))

    def _accumulator(self, unit: Unit, stage: Sequence[str]) -> Accumulator:
        return Accumulator(stage, self.model.linears[stage[0]].in_features, self.needs, self._picks(unit))

    def shapes(self) -> list[GroupShape]:
        """What the visitor will be given."""
        return [GroupShape(stage, self.model.linears[stage[0]].in_features, self.tokens if unit.per_token else self.sequences,
                           len(self._picks(unit)), tuple(sorted(self.needs)))
                for unit in self.units for stage in unit.stages if self._is_wanted(stage)]

    def run(self, visit: Visitor, progress: bool | None = None) -> None:
        """Walk; an exception (KeyboardInterrupt too) ends it and leaves the model as it was."""
        stages = sum(self._is_wanted(stage) for unit in self.units for stage in unit.stages)
        passes = len(self.units) + (stages - 1 if self.sequential else 0)
        before, highest = _peak_rss(), 0
        total = passes * len(self.steps.batches)
        for _ in bar(self._ticks(visit), "calibrate", progress, total=total, unit="batch"):
            highest = max(highest, _rss())
        after = _peak_rss()
        self.peak_bytes = after if after > before else highest  # the process's own mark, where this pass has set it

    def _ticks(self, visit: Visitor) -> Iterator[None]:
        """Yields after each batch of each pass over a unit."""
        x = np.empty((1 if self._reference is None else 2, self.tokens, self.model.dims.hidden), np.float32)
        for unit in self.units:
            if self.sequential:
                for index, stage in enumerate(unit.stages):
                    if self._is_wanted(stage):
                        yield from self._one_stage(unit, index, x, visit)
                if unit is not self.units[-1]:  # nobody reads what the last one computes
                    yield from self._pass(unit, x, {})
                continue
            found = {i: self._accumulator(unit, stage) for i, stage in enumerate(unit.stages) if self._is_wanted(stage)}
            yield from self._pass(unit, x, found)
            while found:
                visit(found.pop(min(found)).result())

    def _pass(self, unit: Unit, x: np.ndarray, found: Mapping[int, Accumulator]) -> Iterator[None]:
        """The whole unit: its inputs into the accumulators, its outputs in place of its inputs."""
        for batch, runs in self._batches(unit, x):
            for index in range(len(unit.stages)):
                given = [_advance(unit, steps) for steps in runs]
                if index in found:
                    found[index].add(*self._behind_branches(unit.stages[index], given))
            if unit is not self.units[-1]:
                for states, steps in zip(x, runs):
                    out = _advance(unit, steps)
                    if out is not None:
                        states[batch.first:batch.last] = out
            yield

    def _one_stage(self, unit: Unit, index: int, x: np.ndarray, visit: Visitor) -> Iterator[None]:
        """The unit as far as the input of one stage; then the visitor's layers take their places."""
        found = self._accumulator(unit, unit.stages[index])
        for _, runs in self._batches(unit, x):
            for _ in range(index):
                for steps in runs:
                    _advance(unit, steps)
            found.add(*self._behind_branches(unit.stages[index], [_advance(unit, steps) for steps in runs]))
            for steps in runs:
                steps.close()
            yield
        self.model = self.model.replace(linears=dict(visit(found.result()) or {}))

    def _behind_branches(self, stage: Sequence[str], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What the weights of a stage's layers multiply, in each model; a branch is the same for all of them."""
        branch = self.model.linears[stage[0]].extras.branch
        return list(rows) if branch is None else [branch(x) for x in rows]

    def _batches(self, unit: Unit, x: np.ndarray) -> Iterator[tuple[Batch, list[Run]]]:
        """The unit on each batch: as it is now and, for "deviation", the float model's. x (1 or 2, tokens, hidden)."""
        models = [self.model] if self._reference is None else [self.model, self._reference]
        with ExitStack() as packed:
            prepared = [unit.prepare(packed.enter_context(_packed(model, unit))) for model in models]
            for batch in self.steps.batches:
                yield batch, [run(batch, states[batch.first:batch.last]) for run, states in zip(prepared, x)]


@contextmanager
def _packed(model: Any, unit: Unit) -> Iterator[Any]:
    """The model with layers of the unit that are packed for the while of the body: its own would stay packed."""
    layers = {name: model.linears[name] for stage in unit.stages for name in stage}
    fresh = {name: layer.with_weight(layer._weight, layer.activations, extras=layer.extras) for name, layer in layers.items()}
    try:
        yield model.replace(linears=fresh)
    finally:
        for layer in layers.values():
            layer.release()


def _advance(unit: Unit, steps: Run) -> Any:
    """The input of the next stage; after the last, the unit's output."""
    try:
        return next(steps)
    except StopIteration as end:
        return end.value
    except ValueError as error:
        raise ValueError(f"{unit.name}: {error}") from None


def _rss() -> int:
    """Bytes of memory that the process has now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as status:
            return int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _peak_rss() -> int:
    """The most that it has ever had."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
