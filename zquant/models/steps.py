"""A model's forward over fixed sequences, cut before every matrix product: what calibration walks along.

The layers of a model come in units (embeddings, blocks, head), those of a unit in stages: the layers of a stage read the
same rows. :class:`Steps` lists them and runs one unit on one batch of sequences.
"""
from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from .. import _core
from .base import _HEAD_ACTIVATIONS, Model
from .blocks import Packed
from .decoder import CausalLM

__all__ = ["Batch", "Run", "Steps", "Unit", "steps_of"]

#: Yields the input (tokens, k) of each stage, and returns the unit's output.
Run = Generator[np.ndarray, None, Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Whole sequences, tokens ``first`` to ``last - 1`` of all; ``offsets`` are counted from ``first``."""

    first: int
    last: int
    offsets: np.ndarray

    @property
    def sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def longest(self) -> int:
        return int(np.diff(self.offsets).max())


@dataclass(frozen=True, eq=False)
class Unit:
    """A block, or what comes before or after the blocks.

    Attributes
    ----------
    name : for errors
    stages : names of the layers that read the same rows, in the order of the forward
    prepare : from a model (the unit's layers may have been exchanged) to what runs a batch, given its hidden states
    per_token : whether a layer reads every token; else one of each sequence
    """

    name: str
    stages: tuple[tuple[str, ...], ...]
    prepare: Callable[[Any], Callable[[Batch, np.ndarray], Run]]
    per_token: bool = True


class Steps:
    """Sequences of token ids, laid end to end and cut into batches of at most ``tokens`` tokens (or one longer sequence).

    Attributes
    ----------
    units : list of Unit, in order
    batches : list of Batch
    packed : Packed, all sequences
    """

    units: list[Unit]

    def __init__(self, model: Any, ids: Sequence[np.ndarray], tokens: int) -> None:
        self.packed: Packed = model.pack(list(ids))
        offsets = self.packed.offsets
        self.batches = [Batch(int(offsets[i]), int(offsets[j]), offsets[i:j + 1] - offsets[i])
                        for i, j in self._cut(model, tokens)]

    def _cut(self, model: Any, tokens: int) -> Iterator[tuple[int, int]]:
        return self.packed.chunks(tokens)


class EncoderSteps(Steps):
    """BERT and its relations."""

    def __init__(self, model: Model, ids: Sequence[np.ndarray], tokens: int) -> None:
        super().__init__(model, ids, tokens)
        self.units = [Unit("embeddings", (), self._embeddings)]
        self.units += [self._block(model, i) for i in range(model.dims.layers)]
        self.units += self._head(model)

    def _embeddings(self, model: Model) -> Callable[[Batch, np.ndarray], Run]:
        embed = model._embedder()

        def run(batch: Batch, _: np.ndarray) -> Run:
            yield from ()
            return embed(self.packed, batch.first, batch.last, 0)[0]

        return run

    @staticmethod
    def _block(model: Model, index: int) -> Unit:
        prefix, names = model.prefix + model.family.layer.format(index), model.family.block
        roles = ("query", "key", "value"), ("attention",), ("intermediate",), ("output",)

        def prepare(model: Model) -> Callable[[Batch, np.ndarray], Run]:
            block = model._block(index)
            return lambda batch, x: block.steps(x, batch.offsets)

        stages = tuple(tuple(prefix + names[role] for role in stage) for stage in roles)
        return Unit(prefix.rstrip("."), stages, prepare)

    @staticmethod
    def _head(model: Model) -> list[Unit]:
        family, prefix = model.family, model.prefix
        head = family.head
        dense = (prefix if head.dense_in_base else "") + head.dense
        pooler = prefix + (family.pooler or "")
        if model.has_head:
            stages: tuple[tuple[str, ...], ...] = ((dense,), (head.out,))
        elif pooler in model.linears:
            stages = ((pooler,),)
        else:
            return []

        def prepare(model: Model) -> Callable[[Batch, np.ndarray], Run]:
            def run(batch: Batch, x: np.ndarray) -> Run:
                first = x[batch.offsets[:-1]]
                yield first
                if model.has_head:
                    yield _HEAD_ACTIVATIONS[head.activation](cast(np.ndarray, model.linears[dense](first)))

            return run

        return [Unit("head", stages, prepare, per_token=False)]


class DecoderSteps(Steps):
    """GPT-2, Llama and their relations."""

    def __init__(self, model: CausalLM, ids: Sequence[np.ndarray], tokens: int) -> None:
        super().__init__(model, ids, tokens)
        a, outer = model.dims, model.family.outer
        widened = a.embedding != a.hidden
        before = ((model.prefix + outer["project_in"],),) if widened else ()
        ends = ([model.prefix + outer["project_out"]] if widened else []) + ([] if a.tied else [model.family.head])
        after = tuple((name,) for name in ends)
        self.units = [Unit("embeddings", before, self._embeddings)]
        self.units += [self._block(model, i) for i in range(a.layers)]
        self.units += [Unit("head", after, self._head)] if after else []

    def _cut(self, model: CausalLM, tokens: int) -> Iterator[tuple[int, int]]:
        """Where the rotation depends on a sequence's length, every sequence is alone."""
        rope = model.dims.rope
        alone = rope is not None and any(rope.depends_on_length(int(n)) for n in np.diff(self.packed.offsets))
        return self.packed.chunks(1 if alone else tokens)

    def _embeddings(self, model: CausalLM) -> Callable[[Batch, np.ndarray], Run]:
        ids, positions = cast(np.ndarray, self.packed.ids), self.packed.positions

        def run(batch: Batch, _: np.ndarray) -> Run:
            seen: list[np.ndarray] = []
            part = slice(batch.first, batch.last)
            x = model._embed(ids[part], positions[part], lambda name, given, output: seen.append(given))
            yield from seen
            return x

        return run

    @staticmethod
    def _block(model: CausalLM, index: int) -> Unit:
        prefix, a = model.prefix + model.family.layer.format(index), model.dims
        inputs = ("query", "key", "value") if a.qkv == "split" else ("qkv",)
        roles = inputs, ("attention",), ("gate", "up") if a.gated else ("up",), ("down",)

        def prepare(model: CausalLM) -> Callable[[Batch, np.ndarray], Run]:
            block = model._make_block(index)

            def run(batch: Batch, x: np.ndarray) -> Run:
                cache = _core.kv_new(1, batch.sequences, a.kv_heads, a.head_dim, False)
                rotation = (None, None) if a.rope is None else a.rope.tables(batch.longest, batch.longest)
                return block.steps(x, cache, batch.offsets, rotation)

            return run

        stages = tuple(tuple(prefix + model.family.block[role] for role in stage) for stage in roles)
        return Unit(prefix.rstrip("."), stages, prepare)

    @staticmethod
    def _head(model: CausalLM) -> Callable[[Batch, np.ndarray], Run]:
        a = model.dims
        norm = model._norm(model.prefix + model.family.outer["final_norm"]) if a.final_norm else None
        project = model._make_projection("project_out") if a.embedding != a.hidden else None

        def run(batch: Batch, x: np.ndarray) -> Run:
            inner = x if norm is None else norm(x)
            if project is not None:
                yield inner
                inner = project(inner)
            if not a.tied:
                yield inner

        return run


def steps_of(model: Any, ids: Sequence[np.ndarray], tokens: int) -> Steps:
    """The steps of an encoder or a decoder; ValueError on ids that it cannot take."""
    return (DecoderSteps if isinstance(model, CausalLM) else EncoderSteps)(model, ids, tokens)
