"""Timing of work whose data come from memory, or from a cache, beside plain readings of the same.

A slice of work reads at least 16 MiB; a plain reading of 16 MiB before and after it, from a big buffer (see
harness.out_of_cache_bytes()) that is also read in turn, tells what the memory gives at that moment. Slices are kept while both
readings are near the run's median and the threads had their CPUs (some parts of the buffer and of the data stay in a
third-level cache; medians pass over them). Work whose data stay in a cache is compared with readings of as many bytes, again
and again: they are then in the same cache, whichever that is.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness

PART = harness.WHOLE_PARTS  # bytes of a slice
STEP = 256  # bytes that a reading is a multiple of
HOT_SLICE = 0.3e-3  # seconds of a reading from a cache
NEAR = 0.2  # of the run's bandwidth: how far the readings around a kept slice may be from it


class Memory:
    """Readings of the memory by the threads of a gate, a part of a big buffer after the other."""

    warm = False  # whether a call that is not timed comes first

    def __init__(self, gate: harness.Gate, size: int) -> None:
        self.gate = gate
        self.part = min(PART, size) // gate.threads // STEP * STEP
        self.size = size // gate.threads // self.part * self.part
        self.at = 0
        self.seen: list[float] = []
        for _ in range(3 * size // PART + 8):
            self.read()
        del self.seen[:-8]  # the first ones touched new pages

    def read(self) -> float:
        self.gate.rest()
        self.seen.append(self.gate.ceilings.read_part(self.size, self.at, self.part, self.gate.threads))
        self.at = (self.at + self.part) % self.size
        return self.seen[-1]

    @property
    def bandwidth(self) -> float:
        return statistics.median(self.seen)


class Hot(Memory):
    """Readings of ``size`` bytes by the threads together, each a part of its own, as often as a slice takes."""

    warm = True  # a reading has driven the work's data out

    def __init__(self, gate: harness.Gate, size: int) -> None:
        self.gate, self.size, self.passes = gate, max(STEP, size // gate.threads // STEP * STEP), 1
        gate.ceilings.read_again(self.size, 1, gate.threads)  # touches the pages
        start = harness.now()
        gate.ceilings.read_again(self.size, 100, gate.threads)
        self.passes = max(1, int(100 * HOT_SLICE / (harness.now() - start)))
        self.seen: list[float] = []
        for _ in range(8):
            self.read()

    def read(self) -> float:
        self.gate.rest()
        self.seen.append(self.gate.ceilings.read_again(self.size, self.passes, self.gate.threads))
        return self.seen[-1]


@dataclass
class Slice:
    seconds: float
    before: float
    after: float
    lost: bool


def slices(memory: Memory, work: Callable[[], Any], calls: int, seconds: float) -> list[Slice]:
    """Slices of ``calls`` calls for so many seconds, at least three."""
    found: list[Slice] = []
    end = harness.now() + seconds
    while harness.now() < end or len(found) < 3:
        before = memory.read()
        if memory.warm:
            work()
        lost_time = memory.gate.lost_time()
        start = harness.now()
        for _ in range(calls):
            work()
        took = harness.now() - start
        lost = lost_time() > harness.MAX_LOST * took
        found.append(Slice(took, before, memory.read(), lost))
    return found


def row(memory: Memory, case: harness.Case, calls: int, every: list[Slice], **more: Any) -> dict[str, Any]:
    """GB/s of what one call of the case reads (``case.ops`` bytes), median of the kept slices; percent of the readings."""
    usual = memory.bandwidth
    kept = [s for s in every if not s.lost and max(abs(s.before - usual), abs(s.after - usual)) <= NEAR * usual]
    value = share = None
    why: dict[str, Any] = {"why": harness.FEW_SLICES}
    if len(kept) >= 3:
        size = 1e-9 * calls * case.ops
        value = size / statistics.median(s.seconds for s in kept)
        share = statistics.median(size / s.seconds / (0.5 * (s.before + s.after)) for s in kept)
        why = {}
    return harness.row(case.name, memory.gate.threads, value, "GB/s", m=case.m, n=case.n, k=case.k,
                       ceiling=value / share if value and share else None, kept=len(kept), slices=len(every),
                       noise=round(harness.spread_of([s.seconds for s in kept]), 4), **why, **more)
