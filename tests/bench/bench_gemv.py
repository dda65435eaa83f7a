"""Linear layers of a decoder generating tokens: 1 to 16 rows at a time, weights from memory.

Calls rotate over 256 MiB of copies of the weights. A slice of work reads at least 16 MiB of them; a plain reading of 16 MiB
before and after it, from a buffer of 256 MiB that is also read in turn, tells what the memory gives at that moment.
Slices are kept while both readings are near the run's median and the threads had their CPUs (some parts of the buffer
and of the weights stay in a third-level cache; medians pass over them). The value is GB/s of packed weight bytes (codes,
scales, biases), median of the kept slices. The percentage is the median of what the bytes, or the operations where these
take longer (from 4 to 16 rows on), would have taken at the bandwidth of the readings around the slice or at the peak of
the instructions, in percent of what they took.
Kinds: w8a8, w4a8 and w4a16 (int16 activations, two products per row) with groups, and float32.

    python tests/bench/bench_gemv.py
    python tests/bench/bench_gemv.py --shapes 4096x4096 --kinds w8a8,w4a16-g64 --m 1 --threads 1
"""
from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPES = "4096x4096,11008x4096,4096x11008,2048x2048,5632x2048,2048x5632,32000x2048"
KINDS = "w8a8,w4a8-g64,w4a8-g128,w4a16-g64,f32"
ROTATE = 256  # MiB of weights; a third-level cache of 32 MiB keeps a third of 96 MiB that are read in turn
PART = 16 << 20  # bytes of a slice
NEAR = 0.2  # of the run's bandwidth: how far the readings around a kept slice may be from it
TOKEN_ASYM, TOKEN_16 = 2, 3


def pack(kind: str, n: int, k: int, copies_of: int) -> list[Any]:
    """Packed copies of one random weight of one kind, at least ``copies_of`` bytes together."""
    from zquant import _core

    rng = np.random.default_rng(n + k)
    bias = rng.normal(0, 1, n).astype(np.float32)
    if kind == "f32":
        w = rng.random((n, k), np.float32) - np.float32(0.5)
        make = lambda: _core.linear_pack_f32(w, bias)  # noqa: E731
    elif kind == "w8a8":
        codes, scale = rng.integers(-127, 128, (n, k), np.int8), np.full(n, 1e-3, np.float32)
        make = lambda: _core.linear_pack_s8(codes, scale, bias)  # noqa: E731
    else:
        group = int(kind.rpartition("g")[2])
        codes, scales = rng.integers(-7, 8, (n, k), np.int8), np.full((n, -(-k // group)), 1e-2, np.float32)
        make = lambda: _core.linear_pack_group(codes, scales, group, 4, bias)  # noqa: E731
    handles = [make()]
    while len(handles) * _core.linear_bytes(handles[0]) < copies_of:
        handles.append(make())
    return handles


def make_work(kind: str, m: int, k: int, handles: list[Any], calls: int) -> Callable[[], None]:
    """``calls`` calls of linear_forward on float32 rows, each on the next copy of the weights."""
    from zquant import _core

    x = np.random.default_rng(m).standard_normal((m, k), np.float32)
    quant = 0 if kind == "f32" else TOKEN_16 if "a16" in kind else TOKEN_ASYM
    forward, turn = _core.linear_forward, itertools.cycle(handles)

    def work() -> None:
        for _ in range(calls):
            forward(next(turn), x, quant, 0, None, 0)

    return work


class Memory:
    """Readings of the memory by the threads of a gate, a part of a big buffer after the other."""

    def __init__(self, gate: harness.Gate, size: int) -> None:
        self.gate, self.size = gate, size // gate.threads
        self.part = min(PART // gate.threads, self.size)
        self.at = 0
        self.seen: list[float] = []
        for _ in range(3 * size // PART + 8):
            self.read()
        del self.seen[:-8]  # the first ones touched new pages

    def read(self) -> float:
        end = harness.now() + self.gate.settle
        while harness.now() < end:
            pass
        self.seen.append(self.gate.ceilings.read_part(self.size, self.at, self.part, self.gate.threads))
        self.at = (self.at + self.part) % self.size
        return self.seen[-1]

    @property
    def bandwidth(self) -> float:
        return statistics.median(self.seen)


@dataclass
class Slice:
    seconds: float
    before: float
    after: float
    lost: bool


def run_slice(gate: harness.Gate, memory: Memory, case: harness.Case, slices: list[Slice]) -> None:
    before = memory.seen[-1]
    lost_time = gate.lost_time()
    start = harness.now()
    case.work()
    took = harness.now() - start
    lost = lost_time() > harness.MAX_LOST * took
    slices.append(Slice(took, before, memory.read(), lost))


def measure(gate: harness.Gate, args: Any, rows: list[dict[str, Any]]) -> float:
    """All cases on the threads of the gate, one weight at a time; appends rows and returns the read bandwidth."""
    from zquant import _core

    memory = Memory(gate, args.copies << 20 if args.copies else PART)
    found: list[tuple[harness.Case, float, list[Slice]]] = []
    for shape, kind in itertools.product(args.shapes.split(","), args.kinds.split(",")):
        n, k = map(int, shape.split("x"))
        handles = pack(kind, n, k, args.copies << 20)
        size = _core.linear_bytes(handles[0])
        calls = -(-PART // size) if args.copies else 1
        cases = [harness.Case(kind, make_work(kind, m, k, handles, calls), calls * size, m, n, k,
                              "float" if kind == "f32" else "int8") for m in args.m]
        if gate.threads > 1:
            gate.pin(cases[-1].work)
        slices: list[list[Slice]] = [[] for _ in cases]
        end = harness.now() + args.seconds * len(cases)
        gate.measure_peaks()
        while harness.now() < end or len(slices[-1]) < 3:
            for case, of_case in zip(cases, slices):
                memory.read()
                run_slice(gate, memory, case, of_case)
        products = 2 if "a16" in kind else 1
        found += [(c, products * 2.0 * c.m * n * k * calls, s) for c, s in zip(cases, slices)]
    for case, operations, every in found:
        rows.append(evaluate(gate, memory, case, operations, every))
    return memory.bandwidth


def evaluate(gate: harness.Gate, memory: Memory, case: harness.Case, operations: float,
             every: list[Slice]) -> dict[str, Any]:
    """The row of one case."""
    usual = memory.bandwidth
    kept = [s for s in every if not s.lost and max(abs(s.before - usual), abs(s.after - usual)) <= NEAR * usual]
    peak = gate.peak[case.ceiling]
    value = percent = None
    if len(kept) >= 3:
        bound = [max(case.ops / (0.5 * (s.before + s.after)), operations / peak if peak else 0.0) / 1e9 for s in kept]
        value = case.ops / statistics.median(s.seconds for s in kept) / 1e9
        percent = statistics.median(b / s.seconds for b, s in zip(bound, kept))
    return harness.row(case.name, gate.threads, value, "GB/s", m=case.m, n=case.n, k=case.k,
                       ceiling=value / percent if value and percent else None, kept=len(kept), slices=len(every))


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="out x in features")
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--m", type=lambda t: [int(v) for v in t.split(",")], default=[1, 2, 4, 8, 16])
    parser.add_argument("--copies", type=int, default=ROTATE, help="MiB of weights to rotate over; 0: in cache")
    parser.add_argument("--isa", help="dispatch level; default: the best")
    args = parser.parse_args(argv)
    allowed = os.sched_getaffinity(0)
    from zquant import _core

    if args.isa:
        _core.use_level(args.isa)
    rows: list[dict[str, Any]] = []
    for threads in harness.thread_counts(args.threads):
        os.sched_setaffinity(0, allowed)
        _core.set_threads(threads)
        gate = harness.Gate(threads)
        if not gate.reachable:
            print(f"# {threads}T n/a: the host does not give {threads} full cores now")
            continue
        start = len(rows)
        bandwidth = measure(gate, args, rows)
        print(f"\n# {threads}T: {_core.level()}, {bandwidth:.1f} GB/s read from memory, int8 peak {gate.peak['int8']:.0f} GOP/s")
        header, lines = harness.pivot(rows[start:])
        harness.print_table(f"GB/s of weights (percent of the best time), {threads} thread{'s' * (threads > 1)}", header, lines)
    harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
