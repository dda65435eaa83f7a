"""The kernels beside the ceilings of this CPU: a section for each line of the table of goals.

Ceilings come first, measured in the same run. Integer products refer to the peak of vpdpbusd, float32 ones and attention to
that of vfmadd231ps; "gemv" to plain readings of the memory around each slice, "hot" (one row, weights in a cache) to plain
readings of as many bytes, again and again by as many threads; "avx2" and "avxvnni" to the 256-bit
instructions that they run, and nothing else, from registers (the tables say which): with groups that includes each group's
conversion and multiplication by its scale, which no exact computation can do without, but not the unpacking of codes, which
many rows may share; "amx" to the peak of tdpbusd (the other sections are measured at the level of AVX-512 where the CPU has
both); "tiles" compares the two heights that AVX-512's tiles of groups may have, whichever this CPU chooses; "rows" counts the
float32 bytes of the input. Products of up to 16 rows take some ten microseconds: a C
loop calls the library 16 times (or once for each copy of the weights), as the engines that the goals refer to were called.
"In a sequence" is the same as models run it, a sequence of kernels without the interpreter in between: what creates and frees
outputs counts too. "passes" says how often a product of 768 features takes the time of the pass over its rows. A goal is met
when every shape reaches it (w8a8: the mean, and every shape a lower one), "mean" is said where only the mean does. Goals differ
between Zen 4 and Zen 5; other CPUs are judged as Zen 4. Lines without a goal are there for their mean. Of the design's goals
other engines are in bench_peers.py, the solver is in bench_gptq.py. With two threads nothing is measured while the host runs
both on one core, which is looked at before each section, and after each row that no peaks guard.

    python tests/bench/bench_kernels.py --quick                      # everything in about a minute per thread count
    python tests/bench/bench_kernels.py --only w8a8,gemv --threads 1 --json new.json
    python tests/bench/bench_kernels.py --compare old.json new.json  # exit code 1: something became slower
"""
from __future__ import annotations

import collections
import inspect
import itertools
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ceilings
import harness
import linears
import memory
import numpy as np

Rows = list[dict[str, Any]]
UNREACHED = harness.NOT_ALL_CORES
SURE = 0.03  # smaller changes are noise whatever the rows say
NOT_CHOSEN, NOT_HERE = "no such shape in this run", "not on this CPU"
RETRIES = 2
L2_BYTES = 384 << 10  # of float32 that the row operators read
FEW_ROWS, SEQUENCE = 16, 16  # up to so many rows: so many layers per call
HOT_SLICE = 1e-3  # seconds of work between two readings of a cache
INSTRUCTIONS = 4  # int8 operations per float32 operation
FAMILIES = {"memory": "gemv", "hot": "in cache", "rotated": "from memory", "sequence": "in a sequence",
            "levels": "/ avx512vnni", "tiles": "tall / low tiles"}
IN_TURN = ("levels", "tiles")
UNGUARDED = ("memory", "hot", *IN_TURN)  # measured one by one, not beside peaks


class Item(NamedTuple):
    """One thing to measure. Attention: m tokens, n heads of k features; row operators: m rows of k."""

    kind: str
    m: int
    n: int
    k: int
    family: str = "linear"  # or of FAMILIES ("memory": percent of its readings), "rows", "attention"
    level: str = ""  # dispatch level; the best one when empty

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.level, self.kind, FAMILIES.get(self.family))))


@dataclass(frozen=True)
class Goal:
    """What the rows whose label matches must reach, on Zen 4 and on Zen 5."""

    label: str
    must: tuple[float, float] | None  # None: a mean to quote, no goal
    match: str = ""  # regular expression on "name m,n,k"
    mean: tuple[float, float] | None = None  # must of the mean; each shape has `must`
    figure: str = "percent"  # or "value", or "each" (value per thread)
    threads: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Section:
    items: Callable[[bool], Iterable[Item]]  # argument: quick
    goals: tuple[Goal, ...]
    ratio: Callable[[Rows], Rows] | None = None  # rows that follow from the measured ones


# ---- what is measured -------------------------------------------------------------------------------------
def items_of(kinds: Iterable[str], shapes: Iterable[tuple[int, int]], tokens: Iterable[int], **more: str) -> list[Item]:
    return [Item(kind, m, n, k, **more) for (n, k), kind, m in itertools.product(shapes, kinds, tokens)]


def big(quick: bool, kinds: Iterable[str], few: tuple[int, ...] = (), **more: str) -> list[Item]:
    """The linears of BERT-base and of a 7B Llama."""
    kinds = tuple(kinds)
    return [*items_of(kinds, linears.BERT, (*few, *((512,) if quick else (128, 512, 2048))), **more),
            *items_of(kinds, linears.LLAMA[: 2 if quick and more else 3], (512,), **more)]


GROUPS = ("w4a8 g128", "w4a8 g64", "w4a8 g32")
FUSED = ("w8a8+gelu", "w8a8 int8-out", "w8a8+gelu int8-out", "w8a8 f32-in")
GEMV = ("w8a8", "w4a8 g64", "w4a16 g64", "w4a8 g128")  # two kinds of the same weights follow each other
ROW_KINDS = ("quantize", "layernorm", "rmsnorm", "gelu", "softmax")


def ragged(quick: bool) -> list[Item]:
    """Products of at least 50 and 200 million operations, with odd numbers of rows too."""
    wanted = (5e7,) if quick else (5e7, 2e8)
    return [Item("w8a8", m, n, k) for (n, k), ops in itertools.product(linears.RAGGED, wanted)
            for m in linears.ragged_rows(n, k, ops)]


def row_items(quick: bool) -> list[Item]:
    widths = (768,) if quick else (384, 768, 2048, 3072)
    return [Item(kind, L2_BYTES // 4 // k, 1, k, "rows") for kind, k in itertools.product(ROW_KINDS, widths)]


def attention_items(quick: bool) -> list[Item]:
    del quick
    return [Item(f"attention {kind}", tokens, 12, width, "attention")
            for kind, width, tokens in itertools.product(attention_calls(), (64, 32), (16, 128, 512, 2048))]


def at_level(level: str) -> Callable[[bool], list[Item]]:
    def items(quick: bool) -> list[Item]:
        from zquant import _core

        if level not in _core.levels():
            return []
        return [*big(quick, ("w8a8",), level=level),
                *items_of(GROUPS, linears.BERT[2:] if quick else linears.BERT, (512,), level=level)]

    return items


def ratios(rows: Rows) -> Rows:
    """int8 against float32 of the same linear, where both were measured."""
    at = {(r["name"], r["m"], r["n"], r["k"]): r for r in rows}
    return [harness.quotient("w8a8 / f32", r, at[("f32", *key)], INSTRUCTIONS)
            for (name, *key), r in at.items() if name == "w8a8" and ("f32", *key) in at]


def tile_items(quick: bool) -> list[Item]:
    """Products at the amx level, few rows and many, and how many times as fast as one level below they and attention are."""
    from zquant import _core

    if "amx" not in _core.levels():
        return []
    shapes = (*linears.BERT, *linears.MINILM[2:], *linears.LLAMA[: 1 if quick else 3])
    products = [item for family in ("linear", "levels")
                for item in items_of(AMX_KINDS, shapes, (16, 512), family=family, level="amx")]
    return [*products, *(Item("attention int8 checked", tokens, 12, width, "levels", "amx")
                         for width, tokens in itertools.product((64, 32), (128, 512)))]


def tall_items(quick: bool) -> list[Item]:
    """Groups at the level of AVX-512: how many times as fast tall tiles are as low ones."""
    from zquant import _core

    if "avx512vnni" not in _core.levels():
        return []
    return items_of(GROUPS, linears.BERT[:: 2 if quick else 1], (5, 8, 16, 512), family="tiles", level="avx512vnni")


def attention_ratios(rows: Rows) -> Rows:
    at = {(r["name"], r["m"], r["k"]): r for r in rows}
    return [harness.quotient("attention int8 / fp32", r, at["attention fp32 checked", m, k])
            for (name, m, k), r in at.items() if name == "attention int8 checked"]


def pass_items(quick: bool) -> list[Item]:
    """The row operators at 768 features, and the product of those rows that follows them."""
    rows = [item for item in row_items(quick) if item.k == 768]
    return [*rows, Item("w8a8", rows[0].m, 768, 768)]


def pass_ratios(rows: Rows) -> Rows:
    """How many passes over the rows take the time of the product."""
    product = next((r for r in rows if r["name"] == "w8a8"), None)
    found = []
    for r in rows if product else ():
        if r is not product:
            scale = 2.0 * product["n"] * product["k"] / (4.0 * r["k"])  # operations of a row of it, by bytes of a row
            each = {**r, "value": scale * r["value"] if r["value"] else None}
            found.append(harness.quotient(f"product / {r['name']}", each, product))
    return found


ONE, TWO = (1,), (2,)
MUST_LEVEL = (Goal("w8a8", (85, 85), "w8a8"), Goal("w4a8", (85, 85), "w4a8"))
MUST_SMALL = (
    Goal("m = 8", (92, 92), "w8a8 8,", threads=ONE), Goal("m = 8", (84, 84), "w8a8 8,", threads=TWO),
    Goal("m = 8 in a sequence", None, "w8a8 in a sequence"),
    *(Goal(f"Llama m = 16, {kind}", (must, must), f"^{kind} from memory", threads=threads)
      for kind, of_two in (("w8a8", 72), ("w4a8 g128", 82)) for threads, must in ((ONE, 85), (TWO, of_two))))
MUST_GEMV = (Goal("W8", (93, 93), "^w8"), Goal("W4", (88, 88), "^w4"))
AMX_KINDS = ("w8a8", "w8a8+gelu int8-out", *GROUPS)
MEANS_AMX = tuple(Goal(f"{kind}, m = {m}{what}", None, f"^amx {re.escape(kind + family)} {m},", figure=figure)
                  for kind, m, (what, family, figure) in itertools.product(
                      AMX_KINDS, (16, 512), (("", "", "percent"), (" / avx512vnni", " / avx512vnni", "value"))))
MEANS_AMX += tuple(Goal(f"attention int8, heads of {width} / avx512vnni", None, f"attention int8 .*,{width}$", figure="value")
                   for width in (64, 32))
SECTIONS = {
    "w8a8": Section(lambda quick: big(quick, ("w8a8",)), (Goal("each shape", (86, 82), mean=(91, 90)),)),
    "epilogues": Section(lambda quick: items_of(FUSED, linears.BERT, (512,) if quick else (128, 512, 2048)),
                         (Goal("K = 768", (83, 80), ",768$"), Goal("K = 3072", (92, 90), ",3072$"))),
    "minilm": Section(lambda quick: items_of(("w8a8",), linears.MINILM, (512, 4096)),
                      (Goal("K = 1536", (85, 85), ",1536$"), Goal("K = 384", (78, 78), ",384$"))),
    "w4a8": Section(lambda quick: big(quick, GROUPS, (8,)),
                    tuple(Goal(g, must, f"{g} ") for g, must in zip(GROUPS, ((89, 86), (85, 81), (80, 78))))),
    "small-m": Section(lambda quick: [*items_of(("w8a8",), linears.BERT, (8,)),
                                      *items_of(("w8a8",), linears.BERT, (8,), family="sequence"),
                                      *items_of(("w8a8", "w4a8 g128"), linears.LLAMA, (16,), family="rotated")], MUST_SMALL),
    "gemv": Section(lambda quick: items_of(GEMV, linears.LLAMA, (1,), family="memory"), MUST_GEMV),
    "hot": Section(lambda quick: items_of(("w8a8",), linears.BERT, (1,), family="hot"), (Goal("W8, m = 1", (85, 85)),)),
    "ragged": Section(ragged, tuple(Goal(f"{n}x{k}", (80, 80), f",{n},{k}$") for n, k in linears.RAGGED)),
    "rows": Section(row_items, tuple(Goal(f"{kind}, GB/s per thread", (35, 35), f"^{kind} ", figure="each")
                                     for kind in ROW_KINDS)),
    "passes": Section(pass_items, (Goal("product / pass (a pass takes 3 % at most)", (33.3, 33.3), "^product",
                                        figure="value"),), pass_ratios),
    "f32": Section(lambda quick: [*big(quick, ("f32",)), *items_of(("f32+gelu",), linears.BERT, (512,))],
                   (Goal("each", (88, 88)),)),
    "attention": Section(attention_items, (
        Goal("fp32, T >= 128", (60, 60), r"fp32 (128|512|2048),"), Goal("fp32, T = 16", None, "fp32 16,"),
        Goal("int8 / fp32, T >= 128", (1.8, 1.8), "/ fp32 (128|512|2048),", figure="value"),
        Goal("int8 / fp32, T = 16", None, "/ fp32 16,", figure="value")), attention_ratios),
    "ratio": Section(lambda quick: [*big(quick, ("w8a8", "f32")), *items_of(("w8a8", "f32"), linears.MINILM, (512,))],
                     (Goal("int8 / float32", (3.5, 3.5), "/", mean=(3.8, 3.8), figure="value"),), ratios),
    "avx2": Section(at_level("avx2"), MUST_LEVEL),
    "avxvnni": Section(at_level("avxvnni"), MUST_LEVEL),
    "amx": Section(tile_items, MEANS_AMX),
    "tiles": Section(tall_items, tuple(Goal(f"{g}, tall / low", None, f"{g} tall", figure="value") for g in GROUPS)),
}
# Of a level's kinds of weights: the instructions whose peak is their ceiling.
LEVEL_KINDS = {"avx2 w8a8": ceilings.SIGNS256, "avxvnni w8a8": ceilings.VNNI256,
               **{f"avx2 {g}": kind for g, kind in zip(GROUPS, ceilings.NIBBLES256)},
               **{f"avxvnni {g}": kind for g, kind in zip(GROUPS, ceilings.VNNI256_GROUPS)},
               **{f"amx {kind}": ceilings.TILES for kind in AMX_KINDS}}


# ---- the calls to time --------------------------------------------------------------------------------------
def attention_calls() -> dict[str, Callable[..., Any]]:
    """Kinds of attention over (q, k, v, offsets, heads, scale): the core's, and int8 beside float32 as zquant.ops has it."""
    from zquant import _core, ops

    def plain(q: Any, k: Any, v: Any, offsets: Any, heads: int, scale: float) -> Any:
        return _core.attention(q, k, v, offsets, heads, scale, None)

    def checked(**more: Any) -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any, offsets: Any, heads: int, scale: float) -> Any:
            batch = (len(offsets) - 1, -1, q.shape[1])
            return ops.attention(q.reshape(batch), k.reshape(batch), v.reshape(batch), heads, scale=scale, **more)

        return run

    calls = {"fp32": plain}
    if "int8" in inspect.signature(ops.attention).parameters:
        calls.update({"fp32 checked": checked(), "int8 checked": checked(int8=True)})
    return calls


def attention_case(item: Item) -> harness.Case:
    """At least 512 tokens in sequences of m."""
    batch = max(1, 512 // item.m)
    q, k, v = (linears.random_floats((batch * item.m, item.n * item.k), seed) for seed in (1, 2, 3))
    offsets = np.arange(0, batch * item.m + 1, item.m, dtype=np.int64)
    run, scale = attention_calls()[item.kind.removeprefix("attention ")], item.k ** -0.5
    ops = 4.0 * batch * item.m * item.m * item.n * item.k
    return harness.Case(item.name, lambda: run(q, k, v, offsets, item.n, scale), ops, item.m, item.n, item.k, "float")


def rows_case(item: Item) -> harness.Case:
    from zquant import _core

    asym = linears.TOKEN_ASYM
    x = _core.activation(linears.random_floats((item.m, item.k)), 0, 0)  # an operator's output, as in a model: on whole lines
    weight, bias = np.ones(item.k, np.float32), np.zeros(item.k, np.float32)
    call = {"quantize": lambda: _core.quantize_tokens(x, asym, True),
            "layernorm": lambda: _core.layer_norm(x, None, weight, bias, 1e-12, asym, True),
            "rmsnorm": lambda: _core.rms_norm(x, None, weight, 1e-6, asym, True),
            "gelu": lambda: _core.activation(x, linears.GELU, asym),
            "softmax": lambda: _core.softmax(x, asym)}[item.kind]
    return harness.Case(item.name, call, 4.0 * item.m * item.k, item.m, item.n, item.k)


class Bench:
    """Measures items with one number of threads, none of them twice."""

    def __init__(self, threads: int, args: Any) -> None:
        from zquant import _core

        # The goals are for AVX-512 VNNI, and in its peak.
        self.args, self.best = args, "avx512vnni" if _core.level() == "amx" else _core.level()
        _core.set_threads(threads)
        wanted = {name: kind for name, kind in LEVEL_KINDS.items() if name.split()[0] in args.only}
        self.gate = harness.Gate(threads, more=wanted)
        self.memory: memory.Memory | None = None
        self.found: dict[Item, dict[str, Any]] = {}
        self.packed: dict[tuple[str, int, int, bool], list[Any]] = {}

    def measure(self, items: list[Item]) -> None:
        """Rows for those that have none yet, or only because the host did not give all cores then."""
        from zquant import _core

        new = [item for item in dict.fromkeys(items)
               if item not in self.found or self.found[item].get("why") == UNREACHED]
        if not self.gate.check():
            self.found.update({item: self.not_measured(item) for item in new})
            return
        for level, group in itertools.groupby(new, key=lambda item: item.level):
            _core.use_level(level or self.best)
            todo = list(group)
            self.interleaved([item for item in todo if item.family not in (*UNGUARDED, "rotated")])
            for item in todo:  # their copies of the weights leave no memory for others
                if item.family == "rotated":
                    self.interleaved([item])
            for item in todo:
                if item.family in UNGUARDED:
                    self.found[item] = self.gate.with_all_cores(lambda: self.unguarded(item)) or self.not_measured(item)  # noqa: B023
            self.packed.clear()
            _core.use_level(self.best)

    def interleaved(self, items: list[Item]) -> None:
        """Rounds over all of them, between peaks."""
        cases = [self.case(item) for item in items]
        if cases and self.gate.threads > 1:
            self.gate.pin(max(cases, key=lambda c: c.ops).work)
        harness.run_cases(self.gate, cases, self.args.rounds, self.args.seconds)
        for _ in range(0 if self.args.tiny else RETRIES):  # a neighbour's bad second must not take a shape out of the table
            again = [c for c in cases if c.best() is None]
            if again:
                harness.run_cases(self.gate, again, 1, 2 * self.args.seconds)
        for item, case in zip(items, cases):
            unit = {"rows": "GB/s", "attention": "GFLOP/s"}.get(item.family, "GOP/s")
            (self.found[item],) = harness.rows_of(self.gate, [case], unit)
            if item.family == "rows":
                self.found[item].update(ceiling=None, percent=None)
        self.packed.clear()

    def unguarded(self, item: Item) -> dict[str, Any]:
        return {"memory": self.from_memory, "hot": self.from_cache}.get(item.family, self.in_turn)(item)

    def not_measured(self, item: Item) -> dict[str, Any]:
        return harness.row(item.name, self.gate.threads, None, "", m=item.m, n=item.n, k=item.k, noise=0.0, why=UNREACHED)

    def case(self, item: Item) -> harness.Case:
        if item.family == "rows":
            return rows_case(item)
        if item.kind.startswith("attention"):
            return attention_case(item)
        weights, ops = self.weights(item), 2.0 * item.m * item.n * item.k
        work: Callable[[], Any]
        if item.m > FEW_ROWS:
            work = linears.call(item.kind, item.m, item.k, weights)
        else:
            times = max(SEQUENCE, len(weights))
            repeat = linears.Loop if item.family != "sequence" and linears.is_plain(item.kind) else linears.sequence
            work, ops = repeat(item.kind, item.m, item.k, weights, times), times * ops
        return harness.Case(item.name, work, ops, item.m, item.n, item.k, self.peak_of(item))

    @staticmethod
    def peak_of(item: Item) -> str:
        if item.family == "attention" or item.kind.startswith("f32"):
            return "float"
        name = f"{item.level} {item.kind}"
        return name if name in LEVEL_KINDS else "int8"

    def bounds(self, items: Iterable[Item]) -> list[str]:
        """What the percentages of these items refer to, in words, a line for each."""
        found: dict[str, None] = {}
        for item in items:
            if item.family == "memory":
                found["read bandwidth of the memory around each slice"] = None
            elif item.family == "hot":
                found["read bandwidth of as many bytes, in the same cache, around each slice"] = None
            elif item.family not in ("rows", *IN_TURN) and self.gate.kinds[self.peak_of(item)] >= 0:
                which = f"{self.peak_of(item)}: " if item.level else ""
                found[which + ceilings.KIND_NAMES[self.gate.kinds[self.peak_of(item)]]] = None
        return list(found)

    def weights(self, item: Item) -> list[Any]:
        kind, rotated = linears.weight_of(item.kind), item.family in ("memory", "rotated")
        key = (kind.replace("a16", "a8"), item.n, item.k, rotated)
        if key not in self.packed:
            if rotated:
                self.packed.clear()
            self.packed[key] = linears.handles(kind, item.n, item.k, self.args.rotate if rotated else 0)
        return self.packed[key]

    def from_memory(self, item: Item) -> dict[str, Any]:
        from zquant import _core

        if self.memory is None:
            self.memory = memory.Memory(self.gate, max(self.args.rotate, memory.PART))
        weights = self.weights(item)
        size = _core.linear_bytes(weights[0])
        case = harness.Case(item.name, linears.call(item.kind, item.m, item.k, weights), size, item.m, item.n, item.k)
        if self.gate.threads > 1:
            self.gate.pin(case.work)
        calls = -(-memory.PART // size)
        every = memory.slices(self.memory, case.work, calls, self.args.rounds * self.args.seconds)
        return memory.row(self.memory, case, calls, every)

    def from_cache(self, item: Item) -> dict[str, Any]:
        """The weights read by a loop of one row, beside plain readings of as many bytes."""
        from zquant import _core

        weights = self.weights(item)
        size = _core.linear_bytes(weights[0])
        work = linears.Loop(item.kind, item.m, item.k, weights, SEQUENCE)
        case = harness.Case(item.name, work, SEQUENCE * size, item.m, item.n, item.k)
        if self.gate.threads > 1:
            self.gate.pin(work)
        hot = memory.Hot(self.gate, size)
        calls = 1 + int(HOT_SLICE / max(harness.seconds_of(work), 1e-7))
        return memory.row(hot, case, calls, memory.slices(hot, work, calls, self.args.rounds * self.args.seconds))

    def in_turn(self, item: Item) -> dict[str, Any]:
        """How many times as fast as at the level of AVX-512, or in low tiles: the median of slices in turn, without a peak."""
        work, ratios = self.case(item).work, list[float]()
        calls = 1 + int(harness.WORK_SLICE / max(harness.seconds_of(work), 1e-7))
        end = harness.now() + self.args.rounds * self.args.seconds
        while harness.now() < end or len(ratios) < 5:
            took = []
            for ours in (False, True):
                self.choose(item, ours)
                work()
                start = harness.now()
                for _ in range(calls):
                    work()
                took.append(harness.now() - start)
            ratios.append(took[0] / took[1])
        self.choose(item, None)
        return harness.row(item.name, self.gate.threads, statistics.median(ratios), "x", m=item.m, n=item.n, k=item.k,
                           noise=harness.spread_of(ratios))

    @staticmethod
    def choose(item: Item, ours: bool | None) -> None:
        """The two sides of in_turn(); None for what the CPU's own choice is (the level is set by who measures)."""
        from zquant import _core

        if item.family == "tiles":
            _core.use_cpu_choices(-1 if ours is None else int(ours), -1)
        elif ours is not None:
            _core.use_level(item.level if ours else "avx512vnni")

    def rows(self, name: str, items: list[Item]) -> Rows:
        """The section's rows: measured ones, and what follows from them."""
        measured, ratio = [self.found[item] for item in items], SECTIONS[name].ratio
        return measured + (ratio(measured) if ratio else [])

    def limits(self) -> Rows:
        """The ceilings: peaks of the gate's instructions, and read bandwidths. A peak of two threads is twice that of one: it
        has no value while the host does not give all cores, nor have readings then."""
        kinds, threads = self.gate.ceilings, self.gate.threads
        peaks = {kind: self.gate.peak[name] for name, kind in self.gate.kinds.items() if kind in kinds.kinds()}
        whole = self.gate.check()
        rows = [limit_row("peak " + ceilings.KIND_NAMES[kind], threads, peak if whole else None, "GOP/s")
                for kind, peak in peaks.items()]
        sizes = harness.read_sizes(max(self.args.rotate, memory.PART), threads)
        for name, size in sizes[:2] if self.args.tiny else sizes:
            value = self.gate.with_all_cores(lambda: kinds.read(size, threads))  # noqa: B023
            rows.append(limit_row("read " + name, threads, value, "GB/s", bytes=size))
        return rows


def limit_row(name: str, threads: int, value: float | None, unit: str, **more: Any) -> dict[str, Any]:
    return harness.row(name, threads, value, unit, noise=0.0, **more, **{} if value else {"why": UNREACHED})


# ---- goals and tables ---------------------------------------------------------------------------------------
def zen() -> int:
    """Which of a goal's two figures is this CPU's: 1 for AMD's family 26 (Zen 5) and later."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return 0
    family = re.search(r"^cpu family\s*: (\d+)$", text, re.MULTILINE)
    return int("AuthenticAMD" in text and family is not None and int(family[1]) >= 26)


def label_of(row: dict[str, Any]) -> str:
    return f"{row['name']} {row['m']},{row['n']},{row['k']}"


def judge(goal: Goal, rows: Rows, cpu: int) -> dict[str, Any]:
    """Mean, worst and verdict of a goal over the rows it is for. The mean of ratios is the geometric one. ``why``: what the
    matter is where there is no value; ``beside``: a value is not of slices that passed the gate."""
    chosen = [r for r in rows if re.search(goal.match, label_of(r))]
    key = "percent" if goal.figure == "percent" else "value"
    figures = {label_of(r): r[key] / (r["threads"] if goal.figure == "each" else 1) for r in chosen if r[key] is not None}
    if not figures:
        why = collections.Counter(r.get("why", harness.FEW_SLICES) for r in chosen).most_common(1)
        return {"shapes": 0, "of": len(chosen), "mean": None, "worst": None, "at": "", "verdict": "not measured",
                "why": why[0][0] if why else NOT_CHOSEN if rows else NOT_HERE, "beside": False}
    average = statistics.geometric_mean if goal.figure == "value" else statistics.fmean
    mean, at = average(figures.values()), min(figures, key=lambda name: figures[name])
    beside = any(r.get("beside") for r in chosen if r[key] is not None)
    return {"shapes": len(figures), "of": len(chosen), "mean": mean, "worst": figures[at], "at": at,
            "verdict": verdict_of(goal, mean, figures[at], cpu), "why": "", "beside": beside}


def verdict_of(goal: Goal, mean: float, worst: float, cpu: int) -> str:
    if goal.must is None:
        return ""
    whole = mean >= (goal.mean or goal.must)[cpu]
    return "met" if worst >= goal.must[cpu] and whole else "mean" if whole else "missed"


def must_of(goal: Goal) -> str:
    """What is wanted on Zen 4 / on Zen 5, after the mean's own bar where it has one."""
    return "; ".join(" / ".join(f"{v:g}" for v in dict.fromkeys(bar)) for bar in (goal.mean, goal.must) if bar)


def verdicts(rows_of_section: dict[str, Rows], threads: int, cpu: int) -> Iterable[tuple[str, Goal, dict[str, Any]]]:
    """Every goal of these sections for so many threads, with its title."""
    for name, rows in rows_of_section.items():
        for goal in SECTIONS[name].goals:
            if min(threads, 2) in goal.threads:
                yield f"{name}: {goal.label}", goal, judge(goal, rows, cpu)


def figure(goal: Goal, got: dict[str, Any], which: str) -> str:
    """The mean or the worst of a goal, marked as in the tables."""
    if got[which] is None:
        return "n/a"
    return f"{'~' * got['beside']}{got[which]:.{2 if goal.figure == 'value' else 1}f}"


def print_goals(rows_of_section: dict[str, Rows], threads: int) -> None:
    cpu = zen()
    lines = [[title, figure(goal, got, "mean"), figure(goal, got, "worst"), must_of(goal), got["verdict"],
              f"{got['shapes']} of {got['of']}", got["at"]]
             for title, goal, got in verdicts(rows_of_section, threads, cpu) if got["of"]]
    harness.print_table(f"goals, {threads}T (percent of the ceiling unless said; must: mean; each, Zen 4 / Zen 5)",
                        ["goal", "mean", "worst", "must", "Zen 5" if cpu else "Zen 4", "shapes", "worst at"], lines)


def print_summary(of_threads: dict[int, dict[str, Rows]]) -> None:
    """A line for each goal: what it must be, then mean, worst and verdict with each number of threads, or why there is none."""
    cpu, lines = zen(), dict[str, dict[int, list[str]]]()
    for threads, sections in of_threads.items():
        for title, goal, got in verdicts(sections, threads, cpu):
            if goal.must is None and not got["shapes"]:
                continue
            value = f"{figure(goal, got, 'mean')}, {figure(goal, got, 'worst')}" if got["shapes"] else f"n/a: {got['why']}"
            lines.setdefault(title, {})[threads] = [must_of(goal), value, got["verdict"] if got["shapes"] else "n/a"]
    nothing = ["", "", ""]  # no goal with so many threads
    header = ["goal", *(text for t in of_threads for text in (f"{t}T must", "mean, worst", ""))]
    harness.print_table(f"summary of the goals ({'Zen 5' if cpu else 'Zen 4'}'s of two)", header, [
        [title, *(text for t in of_threads for text in found.get(t, nothing))] for title, found in lines.items()])


def run_threads(threads: int, args: Any) -> tuple[Rows, dict[str, Rows]]:
    """All rows, and those of each section."""
    bench = Bench(threads, args)
    rows = bench.limits()
    print(f"\n# {threads}T; from memory: {max(args.rotate, memory.PART) >> 20} MiB (third-level cache: "
          f"{harness.third_level_bytes() >> 20} MiB)" + ("" if bench.gate.reachable else f" n/a: {UNREACHED} now"))
    for r in rows:
        print(f"{r['name']:<84} " + ("n/a" if r["value"] is None else f"{r['value']:9.1f} {r['unit']}"))
    chosen = {name: list(dict.fromkeys(tiny(SECTIONS[name].items(True)) if args.tiny else SECTIONS[name].items(args.quick)))
              for name in args.only}
    for name, items in chosen.items():
        start = harness.now()
        bench.measure(items)
        if all(bench.found[item].get("why") == UNREACHED for item in items):
            print(f"\n{name}, {threads}T: n/a: {UNREACHED if items else NOT_HERE}")
        else:
            header, lines = harness.pivot(bench.rows(name, items))
            title = f"{name}, {threads}T: value (percent of the ceiling) [{harness.now() - start:.0f} s]"
            harness.print_table("\n  ceiling ".join([title, *bench.bounds(items)]), header, lines)
        sys.stdout.flush()
    # What several sections have may have been measured in a later one only.
    of_section = {name: bench.rows(name, items) for name, items in chosen.items()}
    print_goals(of_section, threads)
    return rows + list({id(r): r for rs in of_section.values() for r in rs}.values()), of_section


def tiny(items: Iterable[Item]) -> list[Item]:
    """One small shape of each kind: for the smoke test."""
    small = {"rows": (8, 1, 64), "attention": (16, 2, 32)}
    return list(dict.fromkeys(Item(i.kind, *small.get(i.family, (8, 64, 64)), i.family, i.level) for i in items))


# ---- two files beside each other ----------------------------------------------------------------------------
def changes(old: Rows, new: Rows) -> list[dict[str, Any]]:
    """Rows that both files have: the ratio of the percentages (of values without one), and what is beyond noise."""
    def keyed(rows: Rows) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {tuple(r[key] for key in ("name", "m", "n", "k", "threads")): r for r in rows}

    before, found = keyed(old), []
    for key, b in keyed(new).items():
        a = before.get(key)
        if a is None or a["value"] is None or b["value"] is None:
            continue
        what = "percent" if a["percent"] and b["percent"] else "value"
        ratio, noise = b[what] / a[what], max(SURE, a.get("noise", 0.0) + b.get("noise", 0.0))
        found.append({"row": b, "old": a[what], "new": b[what], "unit": "%" if what == "percent" else b["unit"], "ratio": ratio,
                      "mark": "faster" if ratio > 1 + noise else "slower" if ratio < 1 / (1 + noise) else ""})
    return found


def compare(old: str, new: str) -> int:
    """Print the changes; 1 when a row became slower (ceilings are the machine's, not ours), else 0."""
    rows = [json.loads(Path(path).read_text()) for path in (old, new)]
    found = changes(*rows)
    lines = [[label_of(c["row"]), str(c["row"]["threads"]), f"{c['old']:.1f}", f"{c['new']:.1f}", c["unit"],
              f"{c['ratio']:.3f}", c["mark"]] for c in found]
    harness.print_table(f"{new} against {old}", ["row", "threads", "old", "new", "", "ratio", ""], lines)
    if found:
        print(f"geometric mean of {len(found)} ratios: {statistics.geometric_mean(c['ratio'] for c in found):.3f}; "
              f"not in both files or n/a: {max(map(len, rows)) - len(found)}")
    return int(any(c["mark"] == "slower" and not c["row"]["name"].startswith(("peak", "read")) for c in found))


def parse(argv: list[str] | None) -> Any:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=None, seconds=None)
    parser.add_argument("--only", help=f"sections, comma-separated: {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="two short rounds over fewer shapes and fewer copies of weights")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape of each kind (the smoke test)")
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="two files of --json instead of measuring")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else list(SECTIONS)
    unknown = set(args.only) - SECTIONS.keys()
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    args.rounds = args.rounds or (1 if args.tiny else 2 if args.quick else 3)
    args.seconds = args.seconds or (0.1 if args.quick else 0.6)
    most = harness.LEAST_OUT_OF_CACHE if args.quick else harness.MOST_OUT_OF_CACHE  # packing 1 GiB takes some 5 seconds
    args.rotate = 0 if args.tiny else harness.out_of_cache_bytes(most=most)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.compare:
        return compare(*args.compare)
    allowed = os.sched_getaffinity(0)
    rows: Rows = []
    of_threads: dict[int, dict[str, Rows]] = {}
    for threads in harness.thread_counts(args.threads):
        os.sched_setaffinity(0, allowed)
        these, of_threads[threads] = run_threads(threads, args)
        rows += these
    print_summary(of_threads)
    harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
