"""Timing on a shared machine: short slices of a known peak guard every slice of work.

The neighbours of a virtual machine take the core away for milliseconds at a time, and the host may run two virtual
CPUs on one physical core for minutes. A timing is therefore kept only if a 0.2 ms slice of register-only instructions
ran at 96 % or more of its best speed right before it and right after it, and if the threads had their CPUs all the time
in between (the kernel counts what they used and how long they waited). What is reported is the median of the kept slices of the
best round; several rounds over all cases are interleaved. The clock drifts by some percent within a minute: "best" means the
third fastest slice of the last seconds, and percentages refer to that. Where too few slices
are kept, the figure is marked: it is then of all slices, less the time that the threads were without a CPU, and says little.

Some CPUs clock down under the work itself, and up again in peak slices (Intel's, by a tenth and more): hardly a slice passes
there, and nobody waits for good ones any more. Kernels are then compared with the peak slices right before and right after,
where these two agree: the figure is marked (~), and the median over such slices; it is no timing to quote, but its percentage
is. What compares two of them divides their percentages (quotient()).
"""
from __future__ import annotations

import argparse
import collections
import functools
import heapq
import itertools
import json
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ceilings
from ceilings import Ceilings

GATE = 0.96
RECENT = 3.0  # seconds: how old a peak slice may be to count
DRIFT = 0.9  # of the run's best peak: what is slower is not the clock but somebody else
ALIKE = 0.04  # the peak right before and right after a slice differ by no more, and both are at least
STEADY = 0.8  # of the run's best: less is not the clock
REFRESH = 30  # peak slices before each sample
LEAST_OUT_OF_CACHE, MOST_OUT_OF_CACHE = 256 << 20, 1 << 30  # see out_of_cache_bytes()
WHOLE_PARTS = 16 << 20  # what is read in turn is a multiple of it
CHECKS = 100  # slices with one thread and with all that decide whether the host gives all cores
NOT_ALL_CORES = "the host does not give every thread a core"
FEW_SLICES = "too few undisturbed slices"
MIN_BESIDE = 5
PATIENCE = 6  # slices without one that passed the gate, after which there is no waiting for a good moment
MAX_LOST = 0.03  # of a slice's wall time, that our threads were without a CPU
WORK_SLICE = 4e-3
LONG = 0.1  # a call that takes so many seconds averages the disturbances itself, and needs no warming
# A pool's workers spin for a while after their last region; a peak slice on their CPU would measure the sharing.
SETTLE = 0.3e-3

now = time.perf_counter


@dataclass
class Sample:
    """Seconds per call of one case: the median over the kept slices."""

    seconds: float
    kept: int
    slices: int
    faults: float = 0.0  # page faults per call
    speed: float = 0.0  # int8 peak of a thread at that time
    spread: float = 0.0  # between the quartiles of the kept slices, as a part of the median
    beside: tuple[tuple[float, float], ...] = ()  # slices between two peaks that agree: seconds per call, peak of a thread

    @property
    def gated(self) -> bool:
        """Whether enough slices were kept; a call that takes long averages the disturbances itself."""
        return self.kept >= (3 if self.seconds < LONG else 1)


@dataclass
class Case:
    """One line of a table. ``ops`` is what ``work()`` does, in operations (or bytes, for bandwidth)."""

    name: str
    work: Callable[[], Any]
    ops: float
    m: int = 0
    n: int = 0
    k: int = 0
    ceiling: str = "int8"  # which peak the percentage refers to, of Gate.kinds
    samples: list[Sample] = field(default_factory=list)

    def best(self) -> Sample | None:
        good = [s for s in self.samples if s.gated]
        return min(good, key=lambda s: s.seconds) if good else None

    def beside_peaks(self) -> tuple[tuple[float, float], ...]:
        """The slices of all rounds beside the peaks around them; none where a round passed the gate, or where they are few."""
        every = tuple(itertools.chain.from_iterable(s.beside for s in self.samples))
        return () if self.best() or len(every) < MIN_BESIDE else every

    def noise(self) -> float:
        """What a difference to another run must exceed: the rounds' distance, or the slices' within the best one."""
        good = sorted(s.seconds for s in self.samples if s.gated)
        best = self.best()
        return max(best.spread, good[1] / good[0] - 1 if len(good) > 1 else 0.0) if best else 0.0


class Gate:
    """Peak slices on the first ``threads`` CPUs of this process, and the timing that they guard."""

    def __init__(self, threads: int = 1, settle: float = SETTLE, spinning: bool = True,
                 more: dict[str, int] | None = None) -> None:
        self.threads = threads
        self.spinning = spinning  # the pool's workers never sleep while work() is called: all must use their CPUs
        self.settle = settle if threads > 1 else 0.0
        self.cpus = sorted(os.sched_getaffinity(0))
        if threads > len(self.cpus):
            raise ValueError(f"{threads} threads asked for, {len(self.cpus)} CPUs allowed")
        self.cpus = self.cpus[:threads]
        self.ceilings = Ceilings(self.cpus)
        os.sched_setaffinity(0, {self.cpus[0]})
        self.kind = self.ceilings.int8_kind
        self.kinds = {"int8": self.kind, "float": self.ceilings.float_kind, **(more or {})}
        self.fastest = {name: [0.0] * 3 for name in self.kinds}  # per thread, of all slices so far
        self.recent: collections.deque[tuple[float, float]] = collections.deque()  # time and rate of int8 slices
        self.ratios: dict[str, list[float]] = {name: [] for name in self.kinds}  # to the int8 peak of the same moment
        self.fastest_read = 0.0
        self.latest = 0.0  # int8 peak of a thread in the last slice
        self.measure_peaks()
        self.tids = [threading.get_native_id()]
        # False while the host runs the virtual CPUs on fewer physical cores: then N threads cannot be measured.
        self.reachable = True
        self.check()

    @property
    def peak(self) -> dict[str, float]:
        """Of all threads together; the third fastest slice seen, as one lucky clock reading is not a peak."""
        return {name: self.threads * best[0] for name, best in self.fastest.items()}

    def measure_peaks(self, slices: int = 300) -> None:
        """Single-threaded slices; run_cases() repeats them in every round, so that a bad moment is no ceiling."""
        rates: dict[str, list[float]] = {name: [0.0] * 3 for name in self.kinds}
        for _ in range(slices):  # in turn: the clock is the same for all
            for name, kind in self.kinds.items():
                if kind >= 0:
                    rates[name].append(self.ceilings.peak(kind))
                    self._saw(name, rates[name][-1], 1)
        best = {name: heapq.nlargest(3, seen)[-1] for name, seen in rates.items()}
        for name, seen in self.ratios.items():
            if best["int8"] > 0:
                seen.append(best[name] / best["int8"])

    def check(self) -> bool:
        """Whether the host gives every thread a core now (for minutes it may not): all together beside one alone, in turn."""
        if self.threads > 1 and self.kind >= 0:
            self.rest()
            pairs = [(self.ceilings.peak(self.kind), self.ceilings.peak(self.kind, self.threads)) for _ in range(CHECKS)]
            alone, together = (heapq.nlargest(3, rates)[-1] for rates in zip(*pairs))
            alone = max(alone, DRIFT * self.fastest["int8"][0])  # one alone may be half a core as well
            self.reachable = together >= GATE * self.threads * alone
        return self.reachable

    def with_all_cores(self, measure: Callable[[], Any]) -> Any:
        """What measure() gives, if every thread had a core right before and right after it; else None."""
        if not self.check():
            return None
        found = measure()
        return found if self.check() else None

    def _saw(self, name: str, rate: float, threads: int) -> None:
        """A slice's rate per thread. One thread alone may run at a higher clock than all of them: that is not their peak."""
        if rate > self.fastest[name][0]:
            self.fastest[name] = sorted([*self.fastest[name][1:], rate])
        if name == "int8" and threads == self.threads:
            self.recent.append((now(), rate))

    def speed(self) -> float:
        """The int8 peak of a thread now: of the last seconds, unless the machine is somebody else's."""
        oldest = now() - RECENT
        while self.recent and self.recent[0][0] < oldest:
            self.recent.popleft()
        third = heapq.nlargest(3, (rate for _, rate in self.recent))[-1] if self.recent else 0.0
        return max(third, DRIFT * self.fastest["int8"][0])

    def limit(self, name: str, speed: float) -> float:
        """The peak of all threads together for a kind of instructions while the int8 peak of a thread is ``speed``."""
        return self.threads * speed * statistics.median(self.ratios[name]) if self.ratios[name] else 0.0

    def bandwidth(self) -> float:
        """Read bandwidth of the threads together from memory, GB/s: the best seen in this run."""
        read = self.ceilings.read(out_of_cache_bytes() // self.threads, self.threads, repeats=15)
        self.fastest_read = max(self.fastest_read, read)
        return self.fastest_read

    def pin(self, work: Callable[[], Any], seconds: float = 0.3) -> None:
        """Pin the threads that ``work()`` uses to our CPUs, and watch them from now on."""
        self.tids = pin_busy_threads(self.cpus, work, seconds)

    def rest(self) -> None:
        """Let a pool's workers stop spinning."""
        end = now() + self.settle
        while self.settle and now() < end:
            pass

    def good(self) -> bool:
        """Run one peak slice: is the machine ours now?"""
        self.rest()
        if self.kind < 0:
            return True
        rate = self.ceilings.peak(self.kind, self.threads)
        self.latest = rate / self.threads
        self._saw("int8", self.latest, self.threads)
        return rate >= GATE * self.threads * self.speed()

    def alike(self, before: float, after: float) -> bool:
        """Whether two peak slices say the same of the time between them."""
        low, high = min(before, after), max(before, after)
        return low >= max((1 - ALIKE) * high, STEADY * self.fastest["int8"][0]) > 0

    def lost_time(self) -> Callable[[], float]:
        """Start a stopwatch: the seconds that our threads have been without a CPU since."""
        watched = self.tids if self.spinning else self.tids[:1]
        used, waited, start = cpu_time(watched), waiting_time(self.tids), now()
        return lambda: max(waiting_time(self.tids) - waited,
                           len(watched) * (now() - start) - (cpu_time(watched) - used))

    def undisturbed(self, took: float, lost: float) -> float:
        """``took`` less what was lost; as it is where threads may sleep while others work for them."""
        return max(took - lost / self.threads, 0.05 * took) if self.spinning else took

    def wait(self, seconds: float = 0.02) -> bool:
        """Peak slices until one is good, for at most ``seconds``."""
        end = now() + seconds
        while not self.good():
            if now() > end:
                return False
        return True

    def measure(self, work: Callable[[], Any], want: int = 15, seconds: float = 1.5) -> Sample:
        """Time ``work()`` until ``want`` slices are kept or ``seconds`` have passed."""
        first = seconds_of(work)
        if first < 10 * LONG:  # it may have paid for what the next ones find ready
            first = seconds_of(work)
        calls = max(1, min(20000, int(WORK_SLICE / max(first, 1e-7))))
        few = 1 if first >= LONG else 3
        kept: list[float] = []
        every: list[float] = []
        beside: list[tuple[float, float]] = []
        faults = 0
        for _ in range(REFRESH if seconds >= 0.1 else 0):
            self.good()
        end = now() + seconds
        before = self.wait()
        while len(kept) < want and (now() < end or len(kept) < few and len(every) < 3 and now() < end + 9 * seconds):
            if calls > 1 or self.threads > 1 and self.settle and first < LONG:
                work()  # wakes the pool and refills the caches; not timed
            f0 = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            peak, lost_time = self.latest, self.lost_time()
            start = now()
            for _ in range(calls):
                work()
            took = now() - start
            lost = lost_time()
            faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - f0
            after = self.good()
            every.append(self.undisturbed(took, lost) / calls)
            if lost <= MAX_LOST * took:
                if before and after:
                    kept.append(took / calls)
                if self.alike(peak, self.latest):
                    beside.append((took / calls, (peak + self.latest) / 2))
            # Waiting is peak slices, under which a clock rises that the work lowers: in vain if none passed so far.
            before = after or (bool(kept) or len(every) < PATIENCE) and self.wait()
        if len(kept) >= few:
            middle = statistics.median(kept)
        else:  # of few long calls the fastest was disturbed least
            middle = min(every) if few == 1 else statistics.median(every)
        return Sample(middle, len(kept), len(every), faults / (calls * len(every)), self.speed(), spread_of(kept),
                      tuple(beside))


@functools.cache
def out_of_cache_bytes(holders: int = 1, most: int = MOST_OUT_OF_CACHE) -> int:
    """How much all threads together read in turn where data are to come from memory.

    Twice the third-level cache, as one that is read in turn keeps a part of what is somewhat larger (32 MiB keep a third of
    96). A virtual machine reports the host's cache, of which neighbours have most: hence a limit. ``holders`` processes with
    that much each must leave half of the free memory to others, one alone three quarters.
    """
    wanted = min(most, max(LEAST_OUT_OF_CACHE, 2 * third_level_bytes()), free_bytes() // max(4, 2 * holders))
    return max(1, wanted // WHOLE_PARTS) * WHOLE_PARTS


def third_level_bytes() -> int:
    """The size of the third-level cache as the system tells it; 0 where it does not."""
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (OSError, ValueError):
        size = 0
    if size > 0:
        return size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 0
    return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)


def free_bytes() -> int:
    """Memory that a process may take without driving others out; all there is where the kernel does not say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_sizes(out_of_cache: int, threads: int) -> list[tuple[str, int]]:
    """Name and bytes per thread of the readings that are printed as ceilings."""
    return [*ceilings.SIZES, ("DRAM", out_of_cache // threads)]


def spread_of(values: list[float]) -> float:
    """The distance between the quartiles as a part of the median; 0 of fewer than four values."""
    if len(values) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = now()
    work()
    return now() - start


def pin_busy_threads(cpus: list[int], work: Callable[[], Any], seconds: float = 0.3) -> list[int]:
    """Run ``work`` for a while and pin the threads that used most CPU time, one per CPU; the caller to the first.

    Works for any library's pool: unpinned, two threads have been seen to share one CPU for whole runs.
    Returns the ids of the pinned threads.
    """
    me = threading.get_native_id()
    before = thread_times()
    end = now() + seconds
    while now() < end:
        work()
    spent = {tid: t - before.get(tid, 0) for tid, t in thread_times().items() if tid != me}
    busiest = sorted((tid for tid in spent if spent[tid] > 0), key=lambda tid: -spent[tid])[: len(cpus) - 1]
    for tid, cpu in zip([me, *busiest], cpus):
        os.sched_setaffinity(tid, {cpu})
    return [me, *busiest]


def cpu_time(tids: Iterable[int]) -> float:
    """Seconds of CPU time of these threads: each has a clock, numbered by the kernel's rule (CPUCLOCK_SCHED)."""
    total = 0.0
    for tid in tids:
        try:
            total += time.clock_gettime((~tid << 3) | 6)
        except OSError:
            continue
    return total


def waiting_time(tids: Iterable[int]) -> float:
    """Seconds that these threads have been runnable without a CPU so far; 0 where the kernel does not count them."""
    total = 0
    for tid in tids:
        try:
            total += int(Path(f"/proc/self/task/{tid}/schedstat").read_text().split()[1])
        except (OSError, IndexError):
            continue
    return 1e-9 * total


def thread_times() -> dict[int, int]:
    """Clock ticks of user and system time of every thread of this process."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        times[int(task.name)] = int(fields[11]) + int(fields[12])
    return times


def row(name: str, threads: int, value: float | None, unit: str, *, m: int = 0, n: int = 0, k: int = 0,
        ceiling: float | None = None, **more: Any) -> dict[str, Any]:
    """One record of the --json output; percent is None where there is no ceiling or no value."""
    percent = 100 * value / ceiling if value is not None and ceiling else None
    return {"name": name, "m": m, "n": n, "k": k, "threads": threads, "value": value, "unit": unit,
            "ceiling": ceiling, "percent": percent, **more}


def write_json(path: str | None, rows: list[dict[str, Any]]) -> None:
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def run_cases(gate: Gate, cases: list[Case], rounds: int, seconds: float, progress: bool = True) -> None:
    """Measure every case once per round, rounds interleaved."""
    for r in range(rounds):
        gate.measure_peaks(300 if seconds >= 0.1 else 20)  # less: it only has to work
        for i, case in enumerate(cases):
            if progress and sys.stderr.isatty():
                print(f"\r{gate.threads}T round {r + 1}/{rounds} {i + 1}/{len(cases)} {case.name:<30}",
                      end="", file=sys.stderr)
            case.samples.append(gate.measure(case.work, seconds=seconds))
    if progress and sys.stderr.isatty():
        print(file=sys.stderr)


def rows_of(gate: Gate, cases: Iterable[Case], unit: str = "GOP/s") -> list[dict[str, Any]]:
    """A row for each case: of its best round, or beside the peaks around its slices; without a value where neither is known."""
    rows = []
    for c in cases:
        best, beside = c.best(), c.beside_peaks()
        value, limit, noise, unit_limit = None, 0.0, c.noise(), gate.limit(c.ceiling, 1.0)
        if best:
            value, limit = c.ops / best.seconds / 1e9, gate.limit(c.ceiling, best.speed)
        elif beside:
            value = c.ops / statistics.median_low(seconds for seconds, _ in beside) / 1e9
            shares = [c.ops / seconds / 1e9 / gate.limit(c.ceiling, peak) for seconds, peak in beside]
            limit, noise = value / statistics.median_high(shares), spread_of(shares)  # of equal peaks the same slice's
        rows.append(row(c.name, gate.threads, value, unit, m=c.m, n=c.n, k=c.k, ceiling=limit or None,
                        noise=round(noise, 4), kept=sum(s.kept for s in c.samples), slices=sum(s.slices for s in c.samples),
                        faults=round(best.faults, 2) if best else None, beside=len(beside),
                        speed=limit / unit_limit if unit_limit else None, **{} if value else {"why": FEW_SLICES}))
    return rows


def quotient(name: str, a: dict[str, Any], b: dict[str, Any], ceiling: float | None = None) -> dict[str, Any]:
    """A row of how many times as fast ``a`` is as ``b``; marked (~) where one of them is."""
    # Both are first divided by the int8 peak of a thread at their own time, which is all that they share: a figure beside its
    # peaks is at whatever clock the core had then, often not the other's. So this is the quotient of the percentages times
    # the ratio of the two peaks, which slices in turn gave (Gate.ratios). It keeps what the work itself costs in clock.
    of, to = a.get("speed"), b.get("speed")
    clocks = to / of if of and to else 1.0
    value = a["value"] / b["value"] * clocks if a["value"] and b["value"] else None
    more = {} if value else {"why": next((r["why"] for r in (a, b) if "why" in r), FEW_SLICES)}
    return row(name, a["threads"], value, "x", m=a["m"], n=a["n"], k=a["k"], ceiling=ceiling,
               noise=a["noise"] + b["noise"], beside=a.get("beside", 0) + b.get("beside", 0), **more)


def cell(r: dict[str, Any]) -> str:
    """'446 (94)': value and percent of the ceiling; ~ before it: beside the peaks around it; 'n/a' where there are too few."""
    if r["value"] is None:
        return "n/a"
    percent = f" ({r['percent']:.0f})" if r["percent"] is not None else ""
    return f"{'~' * bool(r.get('beside'))}{r['value']:.{2 if r['unit'] == 'x' else 0}f}{percent}"


def print_table(title: str, header: list[str], lines: Iterable[list[str]]) -> None:
    lines = [header, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))))


def pivot(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Rows with the same (m, n, k) become one line, their names the columns."""
    names = list(dict.fromkeys(r["name"] for r in rows))
    shapes = list(dict.fromkeys((r["m"], r["n"], r["k"]) for r in rows))
    at = {(r["name"], r["m"], r["n"], r["k"]): r for r in rows}
    lines = [[",".join(map(str, s)), *(cell(at[(n, *s)]) if (n, *s) in at else "" for n in names)] for s in shapes]
    return ["m,n,k", *names], lines


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", default=None, help="comma-separated; default 1 and all CPUs of this process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="at most, per case and round")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser


def thread_counts(text: str | None) -> list[int]:
    cpus = len(os.sched_getaffinity(0))
    return [int(t) for t in text.split(",")] if text else list(dict.fromkeys((1, min(2, cpus))))
