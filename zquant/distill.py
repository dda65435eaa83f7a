"""Layer-by-layer knowledge distillation (ZeroQuant, Yao et al., 2022, arXiv 2206.01861, section 4.3).

    h_k = L_k(h_{k-1}),     loss_k = mean (L_k(h_{k-1}) - L^_k(h_{k-1}))^2     over tokens and features

L_k is block k of the float model (the teacher), L^_k the same block with quantized weights and activations (the student). The
student reads the teacher's hidden states, so that blocks do not depend on each other. All parameters of the block are trained:
weights straight through their quantizers, biases and norms. zquant/ops/lkd.py does the steps; here is what is around them.
"""
from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ._executors import run_all, workers_of
from ._progress import bar
from .calibrate import _advance, _one_of, _packed
from .checks import as_count
from .distill_files import Finished
from .hidden_states import HiddenStates, remove_stale
from .linear import Linear
from .methods.lkd import TrainOptions
from .models.blocks import last_value
from .models.steps import Unit, steps_of
from .models.trainable import FloatBlock, block_of, given_scales, linear_specs
from .ops.lkd import LinearSpec, TrainedBlock
from .ops.quantize import _array
from .qtensor import QTensor
from .resources import Resources
from .spec import Scheme

__all__ = ["BlockJob", "BlockResult", "TrainOptions", "distill", "layers_of", "lkd", "train_block"]

Array = np.ndarray
Rows = Array | HiddenStates

BATCH_TOKENS = 2048  # of a step, where the number of sequences is not given
CHECKS = 10  # how often the held-out loss is looked at
HELD_OUT = 8  # one sequence in so many


@dataclass(frozen=True, eq=False)
class BlockJob:
    """Everything that :func:`train_block` needs besides the hidden states; it pickles.

    Attributes
    ----------
    name : of the block, for errors and progress
    block : FloatBlock
    specs : format of each linear layer
    options : TrainOptions
    seed : of the batches
    weights, scales : where linear layers start that another solver has quantized
    """

    name: str
    block: FloatBlock
    specs: Mapping[str, LinearSpec]
    options: TrainOptions = TrainOptions()
    seed: tuple[int, ...] = (0,)
    weights: Mapping[str, Array] = field(default_factory=dict, repr=False)
    scales: Mapping[str, Array] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class BlockResult:
    """A trained block.

    Attributes
    ----------
    codes : int8 codes (out, in) and float32 scales (out, groups) by linear layer that is quantized
    tensors : float32 values of all else: norms, biases, linear layers that stay in float32
    losses : (steps,) loss of each step's batch, before the step
    checks : (n, 2) number of steps done, and the loss then on the sequences held out; the first row is the start
    best_step : the number of steps after which the parameters were as they are here: the least of ``checks``
    lr : learning rate that was used

    >>> import numpy as np
    >>> result = BlockResult({}, {}, np.array([0.5, 0.3]), np.array([[0, 0.6], [2, 0.2]]), 2, 3e-4)
    >>> bool(result.checks[-1, 1] < result.checks[0, 1])
    True
    """

    codes: dict[str, tuple[Array, Array]] = field(repr=False)
    tensors: dict[str, Array] = field(repr=False)
    losses: Array = field(repr=False)
    checks: Array = field(repr=False)
    best_step: int
    lr: float

    @property
    def start_loss(self) -> float:
        """On the sequences held out, before training."""
        return float(self.checks[0, 1])

    @property
    def loss(self) -> float:
        """On the sequences held out, of the result; never above ``start_loss``."""
        return float(self.checks[:, 1].min())


def lkd(block: FloatBlock, inputs: Any, targets: Any, scheme: str | Scheme, *, lr: float = 3e-4, steps: int = 100,
        batch_size: int | None = None, seed: int = 0, search: Sequence[float] = (), kl: float = 0.0,
        weights: Mapping[str, Array] | None = None, scales: Mapping[str, Array] | None = None) -> BlockResult:
    """Train one block so that, quantized, it gives the targets: layer-by-layer knowledge distillation (ZeroQuant, arXiv
    2206.01861, section 4.3). It lowers the mean of (L^(inputs) - targets)^2 over tokens and features, straight through the
    quantizers of L^.

    Parameters
    ----------
    block
        The float block, where training starts.
    inputs, targets
        Hidden states before and after the block: (sequences, tokens, width) float32, or a list of (tokens, width) for
        sequences of different lengths.
    scheme
        Formats, by the names of the block's layers; symmetric weights, activations per token or in float32.
    lr
        Of AdamW; it falls to 0 along half a cosine.
    steps
        0 gives round to nearest.
    batch_size
        Sequences of a step, drawn anew for each; None: as many as hold about 2048 tokens.
    seed
        Of the batches, and of which sequences are held out.
    search
        Factors of ``lr`` that are tried besides 1, for a tenth of the steps each. The one whose loss on the sequences held
        out is then least goes on.
    kl
        Weight of the Kullback-Leibler divergence of the softmax of the block's output, beside the squared error.
    weights, scales
        By the names of linear layers in ``block.tensors``: float32 values (out, in) to start from, and float32 scales (out,
        groups) of their codes that then stay, those of GPTQ for example.

    Returns
    -------
    BlockResult
        The best of what was seen at ten points on the way and at the start, by the loss on the sequences held out: every
        eighth, or all where there are fewer than eight.

    Raises
    ------
    ValueError
        NaN or Inf, shapes that do not fit, formats that cannot be trained, options that no descent can have, a
        learning rate at which float32 overflows.
    TypeError
        Hidden states, weights or scales that are not float32.

    >>> from zquant.ops.lkd import BlockShape
    >>> rng = np.random.default_rng(0)
    >>> def random(*dims): return rng.standard_normal(dims, np.float32) / 4
    >>> block = FloatBlock(BlockShape(width=16, heads=2, inner=32, order="pre", causal=True), {
    ...     "qkv": random(48, 16), "o": random(16, 16), "up": random(32, 16), "down": random(16, 32),
    ...     **{name: np.ones(16, np.float32) for name in ("norm1", "norm2", "norm1_bias", "norm2_bias")}})
    >>> x = random(8, 12, 16)
    >>> offsets = np.arange(0, 97, 12)
    >>> y = TrainedBlock(block.shape, block.tensors).forward(x.reshape(96, 16), offsets).reshape(x.shape)
    >>> result = lkd(block, x, y, "w4a8", steps=20, lr=3e-3)
    >>> result.loss < result.start_loss
    True
    """
    x, y = _states(inputs, "inputs"), _states(targets, "targets")
    lengths = [len(part) for part in x]
    if lengths != [len(part) for part in y]:
        raise ValueError("targets: expected sequences as long as those of inputs")
    options = TrainOptions(lr, steps, batch_size, tuple(search), kl)
    job = BlockJob("block", block, linear_specs(block, Scheme.parse(scheme)), options, (as_count("seed", seed, 0),),
                   weights or {}, scales or {})
    return train_block(job, np.concatenate(x), np.concatenate(y), np.cumsum([0, *lengths]))


def _states(value: Any, name: str) -> list[Array]:
    states = [_array(np.asarray(part), f"{name}[{i}]", "float32") for i, part in enumerate(value)]
    if not states or any(part.ndim != 2 or not len(part) for part in states):
        raise ValueError(f"{name}: expected (sequences, tokens, width), or a list of (tokens, width), none of them empty")
    return states


# -- one block

def train_block(job: BlockJob, inputs: Rows, targets: Rows, offsets: Array) -> BlockResult:
    """As :func:`lkd`, on packed hidden states. The same arguments give the same bits, for any number of threads and in any
    process.

    Parameters
    ----------
    job
        The block and how it is trained.
    inputs, targets
        (tokens, width) float32: of all sequences, one behind the other.
    offsets
        (sequences + 1,) integers: sequence i is rows ``offsets[i]`` to ``offsets[i + 1] - 1``.

    Raises
    ------
    ValueError
        As :func:`lkd`; it begins with the job's name.
    """
    return last_value(_training(job, inputs, targets, offsets))


def _training(job: BlockJob, inputs: Rows, targets: Rows, offsets: Array) -> Generator[float, None, BlockResult]:
    """As :func:`train_block`; yields the loss of each step."""
    try:
        return (yield from _Training(job, inputs, targets, offsets).run())
    except ValueError as error:
        raise ValueError(f"{job.name}: {error}") from None


class _Training:
    """One block while it is trained."""

    def __init__(self, job: BlockJob, inputs: Rows, targets: Rows, offsets: Array) -> None:
        self.options, block = job.options, job.block
        self.block = TrainedBlock(block.shape, {**block.tensors, **job.weights}, job.specs, block.rotary, job.scales)
        self.x, self.y, self.offsets = inputs, targets, np.asarray(offsets, np.int64)
        for name, states in (("inputs", inputs), ("targets", targets)):
            if states.shape != (self.offsets[-1], block.shape.width):
                raise ValueError(f"{name}: expected shape {(int(self.offsets[-1]), block.shape.width)}, got {states.shape}")
            if not all(np.isfinite(states[i:i + BATCH_TOKENS]).all() for i in range(0, len(states), BATCH_TOKENS)):
                raise ValueError(f"{name}: NaN or Inf")
        self.specs = job.specs
        count, rng = len(self.offsets) - 1, np.random.default_rng(job.seed)
        held = np.sort(rng.choice(count, count // HELD_OUT, replace=False))
        kept = np.setdiff1d(np.arange(count), held)
        self.held = held if len(held) else kept
        size = self.options.batch_size or max(1, round(BATCH_TOKENS * count / int(self.offsets[-1])))
        self.size = min(size, len(kept))
        self.batches = [rng.choice(kept, self.size, replace=False) for _ in range(self.options.steps)]

    def run(self) -> Generator[float, None, BlockResult]:
        self.losses: list[float] = []
        self.checks = [(0, self._held_out())]
        self.best = 0, self.checks[0][1], self._values()
        lr, done = self.options.lr, 0
        if self.options.search and self.options.steps:
            lr, done = yield from self._search()
        yield from self._steps(lr, done, self.options.steps)
        step, _, values = self.best
        for name, value in values.items():
            self.block.values[name][...] = value
        codes = {name: found for name in self.specs if (found := self.block.codes(name)) is not None}
        tensors = {name: value for name, value in values.items() if name not in codes}
        return BlockResult(codes, tensors, np.array(self.losses), np.array(self.checks, np.float64), step, lr)

    def _search(self) -> Generator[float, None, tuple[float, int]]:
        """The learning rate whose first steps lead lowest, and how many steps those were: the block is as they left it."""
        count = max(1, self.options.steps // CHECKS)
        start, before, best = self.block.state(), self.best, None
        for factor in dict.fromkeys((1.0, *self.options.search)):
            self.losses, self.checks, self.best = [], [before[:2]], before
            self.block.restore(start)
            yield from self._steps(lr := factor * self.options.lr, 0, count)
            if best is None or self.checks[-1][1] < best[0]:
                best = self.checks[-1][1], lr, self.losses, self.checks, self.best, self.block.state()
        assert best is not None
        _, lr, self.losses, self.checks, self.best, state = best
        self.block.restore(state)
        return lr, count

    def _steps(self, lr: float, first: int, last: int) -> Iterator[float]:
        total = self.options.steps
        for step in range(first, last):
            x, y, offsets = self._gather(self.batches[step])
            now = lr * 0.5 * (1 + math.cos(math.pi * step / total))
            self.losses.append(self.block.step(x, y, offsets, now, kl=self.options.kl))
            if (step + 1) % max(1, total // CHECKS) == 0 or step + 1 == total:
                self._check(step + 1)
            yield self.losses[-1]

    def _check(self, step: int) -> None:
        loss = self._held_out()
        self.checks.append((step, loss))
        if loss < self.best[1]:
            self.best = step, loss, self._values()

    def _values(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self.block.values.items()}

    def _gather(self, sequences: Array) -> tuple[Array, Array, Array]:
        rows = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in sequences])
        return self.x[rows], self.y[rows], np.cumsum([0, *(self.offsets[i + 1] - self.offsets[i] for i in sequences)])

    def _held_out(self) -> float:
        """Loss on the sequences held out, mean over their tokens."""
        total, tokens = 0.0, 0
        for start in range(0, len(self.held), self.size):
            x, y, offsets = self._gather(self.held[start:start + self.size])
            total += _token_losses(self.block.forward(x, offsets), y, self.options.kl)
            tokens += len(x)
        return total / tokens


def _token_losses(y: Array, target: Array, kl: float) -> float:
    """Sum over tokens of mean (y - target)^2 + kl KL(softmax(target) || softmax(y)), in float64."""
    y, target = y.astype(np.float64), target.astype(np.float64)
    total = float(np.square(y - target).mean(1).sum())
    if kl:
        log_p, log_q = (v - v.max(1, keepdims=True) for v in (target, y))
        log_p, log_q = (v - np.log(np.exp(v).sum(1, keepdims=True)) for v in (log_p, log_q))
        total += kl * float((np.exp(log_p) * (log_p - log_q)).sum())
    return total


# -- all blocks of a model

def layers_of(model: Any, scheme: Scheme, block: FloatBlock, result: BlockResult) -> tuple[dict[str, Linear], dict[str, Array]]:
    """The layers and the norms' tensors of a model that a trained block makes, by the model's names."""
    linears: dict[str, Linear] = {}
    for linear in block.linears:
        bias = result.tensors.get(linear + "_bias")
        biases = {} if bias is None else block.parts(linear, bias)
        codes, scales = result.codes.get(linear, (result.tensors.get(linear), None))
        assert codes is not None
        every = block.parts(linear, codes), {} if scales is None else block.parts(linear, scales)
        for name, part in every[0].items():
            spec = scheme.weights_for(name)
            weight = part if spec is None else QTensor(part, every[1][name], None, spec)
            act = None if spec is None else scheme.activations_for(name)
            linears[name] = Linear(name, weight, biases.get(name), act, extras=model.linears[name].extras)
    return linears, {name: result.tensors[key] for key, name in block.norms.items()}


def distill(teacher: Any, student: Any, scheme: Scheme, ids: Sequence[Array], options: TrainOptions, *, seed: int = 0,
            inputs: str = "teacher", start: Mapping[str, Linear] | None = None, resources: Resources | None = None,
            progress: bool | None = None) -> tuple[Any, dict[str, BlockResult]]:
    """Train every block of a model.

    Parameters
    ----------
    teacher
        A float Model or CausalLM.
    student
        The same with whatever is quantized outside its blocks.
    scheme
        Formats of the blocks' layers.
    ids
        Token ids of each sequence.
    options, seed
        Of the training; every block draws batches of its own.
    inputs
        What a student's block reads: "teacher", the float model's hidden states; "student", those of the quantized blocks
        before it.
    start
        Layers that another solver has quantized, by name; None for round to nearest.
    resources
        A directory for finished blocks, a bound of the memory, an executor; see :class:`zquant.resources.Resources`.

    Returns
    -------
    (Model or CausalLM, dict)
        The student with trained blocks, and what was trained by the block's name.

    Raises
    ------
    ValueError
        Blocks or formats that cannot be trained; an executor where blocks depend on each other; a work_dir that is a file or
        of another run; a seed below 0, other ``inputs``.
    FormatError
        A file in work_dir that has a block's name and is none.
    OSError
        No room for hidden states or finished blocks; those that were finished before stay.
    """
    run = _Run(teacher, student, scheme, ids, options, seed, inputs, start or {}, resources or Resources())
    per_block = options.steps + len(options.search) * max(1, options.steps // CHECKS) * bool(options.steps)
    with closing(run.ticks()) as ticks:  # where Ctrl-C comes, what is under way ends before it goes on
        for _ in bar(ticks, "distill", progress, total=max(1, per_block) * run.blocks, unit="step",
                     note=lambda loss: f"loss {loss:.2e}"):
            pass
    return run.student, {name: run.results[name] for name in run.names}


class _Run:
    """A model while its blocks are trained."""

    def __init__(self, teacher: Any, student: Any, scheme: Scheme, ids: Sequence[Array], options: TrainOptions, seed: int,
                 inputs: str, start: Mapping[str, Linear], resources: Resources) -> None:
        _one_of("inputs", inputs, ("teacher", "student"))
        self.teacher, self.student, self.scheme, self.options = teacher, student, scheme, options
        self.seed, self.inputs, self.start = as_count("seed", seed, 0), inputs, start
        self.blocks = teacher.dims.layers
        self.steps = steps_of(teacher, ids, BATCH_TOKENS)
        self.offsets = self.steps.packed.offsets
        self.results: dict[str, BlockResult] = {}
        self.names = [unit.name for unit in self.steps.units[1:1 + self.blocks]]
        self.executor, self.work_dir = resources.executor, resources.work_dir
        if self.executor is not None and inputs == "student":
            raise ValueError("executor: blocks that read what quantized blocks give wait for those; train them without one")
        alive = 4 if self.executor is None else workers_of(self.executor)[0] + 3  # hidden states that are there at a time
        self.bound = resources.memory // alive
        self.finished = Finished(self.work_dir, teacher, scheme, ids, dict(
            options=asdict(options), seed=self.seed, inputs=inputs), student if inputs == "student" else None, self.start)
        if self.work_dir is not None:
            remove_stale(self.work_dir)

    def job(self, index: int) -> BlockJob:
        """What there is to do for one block."""
        block = block_of(self.teacher, index, int(np.diff(self.offsets).max()))
        weights, scales = given_scales(block, self.start) if self.start else ({}, {})
        return BlockJob(self._unit(index).name, block, linear_specs(block, self.scheme), self.options, (self.seed, index),
                        weights, scales)

    def _unit(self, index: int) -> Unit:
        return self.steps.units[1 + index]

    def ticks(self) -> Generator[float, None, None]:
        """Yields the loss of each step, of one block after another."""
        there: dict[int, BlockResult] = {}
        for index, name in enumerate(self.names):
            self.job(index)  # formats and shapes that cannot be trained, before hours have passed
            if (result := self.finished.load(name)) is not None:
                there[index] = result
        if self.executor is not None:
            yield from self._side_by_side(there, self.executor)
        else:
            yield from self._one_by_one(there)

    def _one_by_one(self, there: Mapping[int, BlockResult]) -> Iterator[float]:
        own = self._hidden(self.student, self.steps.units[0], None) if self.inputs == "student" else None
        for index, x, y in self._teacher(there):
            job = self.job(index)
            if index in there:
                yield from self._again(job, there[index])
            else:
                assert x is not None and y is not None
                result = yield from _training(job, x if own is None else own, y, self.offsets)
                self.finished.save(job.name, result)
                self.put(job, result)
            x = y = None
            if own is not None and index + 1 < self.blocks:
                own = self._hidden(self.student, self._unit(index), own)

    def _side_by_side(self, there: Mapping[int, BlockResult], executor: Executor) -> Iterator[float]:
        """The same on an executor; losses come block by block."""
        def keep(index: int, result: BlockResult) -> None:
            self.finished.save(self.names[index], result)
            self.put(self.job(index), result)

        for index, result in there.items():
            yield from self._again(self.job(index), result)
        calls = ((index, (self.job(index), x, y, self.offsets)) for index, x, y in self._teacher(there) if index not in there)
        for index in run_all(train_block, calls, executor, keep):
            yield from self.results[self.names[index]].losses.tolist()

    def _again(self, job: BlockJob, result: BlockResult) -> Iterator[float]:
        """A block that an earlier run has finished."""
        self.put(job, result)
        yield from result.losses.tolist()

    def _teacher(self, there: Collection[int]) -> Iterator[tuple[int, HiddenStates | None, HiddenStates | None]]:
        """Number of each block, and the float model's hidden states before and after it as far as there are blocks to train."""
        last = max(set(range(self.blocks)).difference(there), default=-1)
        x = self._hidden(self.teacher, self.steps.units[0], None) if last >= 0 else None
        for index in range(self.blocks):
            y = self._hidden(self.teacher, self._unit(index), x) if index <= last else None
            yield index, x, y
            x = y

    def put(self, job: BlockJob, result: BlockResult) -> None:
        """Keep a block's result and let the student have it."""
        linears, norms = layers_of(self.teacher, self.scheme, job.block, result)
        self.student = self.student.replace(linears=linears, norms=norms)
        self.results[job.name] = result

    def _hidden(self, model: Any, unit: Unit, x: HiddenStates | None) -> HiddenStates:
        """The unit's output (tokens, width) of all sequences."""
        y = HiddenStates(int(self.offsets[-1]), self.teacher.dims.hidden, bound=self.bound, directory=self.work_dir)
        nothing = np.empty((0, self.teacher.dims.hidden), np.float32)
        with _packed(model, unit) as packed:
            run = unit.prepare(packed)
            for batch in self.steps.batches:
                part = slice(batch.first, batch.last)
                y[part] = _output(unit, run(batch, nothing if x is None else x[part]))
        return y


def _output(unit: Unit, steps: Any) -> Array:
    """What a unit's run returns in the end."""
    for _ in unit.stages:
        _advance(unit, steps)
    return _advance(unit, steps)
