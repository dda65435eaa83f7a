"""What the benchmarks say of what they measured: made-up rows, gates and caches, no timing."""
from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    harness.out_of_cache_bytes.cache_clear()
    yield harness
    harness.out_of_cache_bytes.cache_clear()


class FakeHost:
    """A host's peaks: ``rate`` of one thread, and of two together ``cores`` times as much."""

    def __init__(self, cores: float, rate: float = 100.0) -> None:
        self.cores, self.rate, self.asked = cores, rate, 0

    def peak(self, kind: int, threads: int = 1) -> float:
        del kind
        self.asked += 1
        return self.rate * (self.cores if threads > 1 else 1.0)

    def kinds(self) -> list[int]:
        return [0, 1]

    def read(self, size: int, threads: int, repeats: int = 9) -> float:
        del size, repeats
        return 10.0 * threads


def gate_of(harness: Any, host: FakeHost, threads: int = 2) -> Any:
    """A gate that measures nothing; it needs neither a compiler nor two CPUs."""
    gate = harness.Gate.__new__(harness.Gate)
    gate.threads, gate.settle, gate.kind, gate.ceilings, gate.reachable = threads, 0.0, 0, host, True
    gate.kinds = {"int8": 0, "float": 1}
    gate.fastest = {"int8": [100.0] * 3, "float": [25.0] * 3}
    gate.ratios = {"int8": [1.0], "float": [0.25]}
    return gate


def bench_of(harness: Any, monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> Any:
    import bench_kernels

    bench = bench_kernels.Bench.__new__(bench_kernels.Bench)
    bench.args, bench.best = SimpleNamespace(rotate=0, tiny=False, rounds=1, seconds=0.0), ""
    bench.gate, bench.found, bench.packed, bench.memory = gate_of(harness, host), {}, {}, None

    def measured(items: list[Any]) -> None:
        bench.found.update({i: harness.row(i.name, 2, 1.0, "x", m=i.m, n=i.n, k=i.k, noise=0.0) for i in items})

    monkeypatch.setattr(bench, "interleaved", measured)
    monkeypatch.setattr(bench, "unguarded", lambda i: harness.row(i.name, 2, 1.0, "x", m=i.m, n=i.n, k=i.k, noise=0.0))
    from zquant import _core

    monkeypatch.setattr(_core, "use_level", lambda level: None)
    return bench


# ---- two threads on one core ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("cores", "whole"), [(2.0, True), (1.95, True), (1.85, False), (1.0, False)])
def test_two_threads_need_two_cores(harness: Any, cores: float, whole: bool) -> None:
    gate = gate_of(harness, FakeHost(cores))
    assert gate.check() is whole
    assert gate.reachable is whole
    gate.ceilings.cores = 2.0
    assert gate.check(), "it is looked at again"


def test_one_thread_alone_on_half_a_core_is_no_reference(harness: Any) -> None:
    assert not gate_of(harness, FakeHost(2.0, rate=50.0)).check()
    assert gate_of(harness, FakeHost(2.0, rate=93.0)).check(), "the clock may fall by some percent"


def test_one_thread_asks_the_host_nothing(harness: Any) -> None:
    host = FakeHost(1.0)
    assert gate_of(harness, host, threads=1).check()
    assert host.asked == 0


def test_what_no_peak_guards_is_dropped_when_a_core_is_lost_meanwhile(harness: Any) -> None:
    gate = gate_of(harness, FakeHost(2.0))
    assert gate.with_all_cores(lambda: 7) == 7

    def lose() -> int:
        gate.ceilings.cores = 1.0
        return 7

    assert gate.with_all_cores(lose) is None
    assert gate.with_all_cores(lambda: pytest.fail("measured on one core")) is None


def test_ceilings_of_two_threads_are_not_said_on_one_core(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(harness, monkeypatch, FakeHost(1.0))
    rows = bench.limits()
    assert len(rows) == 6
    assert all(r["value"] is None and r["why"] == harness.NOT_ALL_CORES for r in rows)
    bench.gate.ceilings.cores = 2.0
    values = {r["name"].split()[0]: r["value"] for r in bench.limits()}
    assert values["read"] == 20.0
    assert [r["value"] for r in bench.limits()][:2] == [200.0, 50.0]


def test_sections_are_measured_again_once_there_are_two_cores(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_kernels

    items = [bench_kernels.Item("w8a8", 1, 8, 8, family) for family in ("linear", *bench_kernels.UNGUARDED, "rotated")]
    bench = bench_of(harness, monkeypatch, FakeHost(1.0))
    bench.measure(items)
    assert [(r["value"], r["why"]) for r in bench.found.values()] == [(None, harness.NOT_ALL_CORES)] * len(items)
    bench.gate.ceilings.cores = 2.0
    bench.measure(items[:1])
    assert bench.found[items[0]]["value"] == 1.0
    assert bench.found[items[1]]["value"] is None
    bench.measure(items)
    assert all(r["value"] == 1.0 for r in bench.found.values())
    monkeypatch.setattr(bench, "interleaved", lambda new: pytest.fail("measured twice") if new else None)
    bench.measure(items[:1])


def test_rows_in_turn_and_from_memory_need_both_cores_until_their_end(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_kernels

    bench = bench_of(harness, monkeypatch, FakeHost(2.0))

    def lose(item: Any) -> Any:
        bench.gate.ceilings.cores = 1.0
        return harness.row(item.name, 2, 1.0, "x")

    monkeypatch.setattr(bench, "unguarded", lose)
    for family in bench_kernels.UNGUARDED:
        bench.gate.ceilings.cores = 2.0
        item = bench_kernels.Item("w8a8", 1, 8, 8, family)
        bench.measure([item])
        assert bench.found[item]["value"] is None, family


# ---- quotients ------------------------------------------------------------------------------------------------
def measured(harness: Any, name: str, value: float | None, speed: float, beside: int = 0, **more: Any) -> dict[str, Any]:
    return harness.row(name, 1, value, "GOP/s", m=512, n=8, k=64, noise=0.01, speed=speed, beside=beside, **more)


def test_a_quotient_is_of_the_same_clock(harness: Any) -> None:
    """90 % of the int8 peak over 90 % of the float32 peak, a quarter of it, is 4 whatever the clocks were."""
    fast, slow = measured(harness, "a", 90.0, 100.0), measured(harness, "b", 0.9 * 20.0, 80.0)
    assert harness.quotient("q", fast, slow)["value"] == pytest.approx(4.0)
    assert harness.quotient("q", fast, {**slow, "speed": None})["value"] == pytest.approx(5.0), "nothing known of its clock"


def test_a_quotient_is_marked_where_one_side_is(harness: Any) -> None:
    plain, marked = measured(harness, "a", 90.0, 100.0), measured(harness, "b", 18.0, 80.0, beside=7)
    for a, b in itertools.product((plain, marked), repeat=2):
        assert harness.cell(harness.quotient("q", a, b)).startswith("~") == (a is marked or b is marked)
    missing = harness.quotient("q", plain, measured(harness, "b", None, 100.0, why="it rained"))
    assert (harness.cell(missing), missing["why"]) == ("n/a", "it rained")


def test_rows_say_at_which_clock_they_were_measured(harness: Any) -> None:
    gate = gate_of(harness, FakeHost(2.0))
    case = harness.Case("c", lambda: None, 40e9, ceiling="float")
    case.samples.append(harness.Sample(1.0, 5, 5, speed=90.0))
    other = harness.Case("o", lambda: None, 20e9, ceiling="float")
    other.samples.append(harness.Sample(1.0, 0, 9, beside=((1.0, 80.0),) * harness.MIN_BESIDE))
    none = harness.Case("n", lambda: None, 20e9)
    none.samples.append(harness.Sample(1.0, 0, 9))
    rows = harness.rows_of(gate, [case, other, none])
    assert [r["speed"] for r in rows[:2]] == pytest.approx([90.0, 80.0])
    assert [r["ceiling"] for r in rows] == [pytest.approx(2 * 90 / 4), pytest.approx(2 * 80 / 4), None]
    assert [r.get("why") for r in rows] == [None, None, harness.FEW_SLICES]


def test_all_ratios_of_the_sections_carry_marks(harness: Any) -> None:
    import bench_kernels

    def rows(*names: str, k: int = 64) -> list[dict[str, Any]]:
        return [{**measured(harness, name, 90.0, 100.0, beside=9), "k": k} for name in names]

    found = [*bench_kernels.ratios(rows("w8a8", "f32")),
             *bench_kernels.attention_ratios(rows("attention int8 checked", "attention fp32 checked")),
             *bench_kernels.pass_ratios(rows("quantize", "w8a8"))]
    assert len(found) == 3
    assert all(harness.cell(r).startswith("~") for r in found)


def test_passes_are_counted_in_products(harness: Any) -> None:
    """128 rows of 768 in 10 us, and their product with 768 x 768 in 400 us: 40 passes."""
    import bench_kernels

    rows = [harness.row("gelu", 1, 128 * 768 * 4 / 10e-6 / 1e9, "GB/s", m=128, n=1, k=768, noise=0.0),
            harness.row("w8a8", 1, 2 * 128 * 768 * 768 / 400e-6 / 1e9, "GOP/s", m=128, n=768, k=768, noise=0.0)]
    (ratio,) = bench_kernels.pass_ratios(rows)
    assert ratio["value"] == pytest.approx(40.0)
    assert ratio["name"] == "product / gelu"
    (goal,) = bench_kernels.SECTIONS["passes"].goals
    assert bench_kernels.judge(goal, [*rows, ratio], 0)["verdict"] == "met"
    assert bench_kernels.judge(goal, [*rows, {**ratio, "value": 33.0}], 0)["verdict"] == "missed"


# ---- out of cache ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("cache", "free", "holders", "wanted"), [
    (32 << 20, 64 << 30, 1, 256 << 20), (480 << 20, 64 << 30, 1, 960 << 20), (2 << 30, 64 << 30, 1, 1 << 30),
    (480 << 20, 2 << 30, 1, 512 << 20), (480 << 20, 8 << 30, 6, 672 << 20), (0, 64 << 30, 1, 256 << 20),
    (480 << 20, 1 << 20, 1, 16 << 20)])
def test_how_much_is_out_of_cache(harness: Any, monkeypatch: pytest.MonkeyPatch, cache: int, free: int, holders: int,
                                  wanted: int) -> None:
    monkeypatch.setattr(harness, "third_level_bytes", lambda: cache)
    monkeypatch.setattr(harness, "free_bytes", lambda: free)
    assert harness.out_of_cache_bytes(holders) == wanted
    assert harness.out_of_cache_bytes(holders, harness.LEAST_OUT_OF_CACHE) == min(wanted, 256 << 20)


def test_sizes_that_the_system_does_not_tell(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert harness.third_level_bytes() >= 0
    assert harness.free_bytes() > 1 << 20
    monkeypatch.setattr(harness.os, "sysconf", lambda name: 0)
    monkeypatch.setattr(harness.Path, "read_text", lambda self: "32768K\n")
    assert harness.third_level_bytes() == 32 << 20


def test_readings_of_memory_are_parts_of_the_buffer(harness: Any) -> None:
    import memory

    asked = []
    host = SimpleNamespace(read_part=lambda size, at, part, threads: asked.append((size, at, part)) or 10.0)
    for threads, size in itertools.product((1, 2, 3), (16 << 20, 80 << 20)):
        memory.Memory(gate_of(harness, host, threads), size)
        assert all(at + part <= whole <= size // threads and part % memory.STEP == at % memory.STEP == 0
                   for whole, at, part in asked)
        assert {at for _, at, _ in asked} == set(range(0, asked[0][0], asked[0][2])), "every part is read"
        asked.clear()


def test_rows_from_a_cache_are_beside_readings_of_it(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import memory

    host = SimpleNamespace(read_again=lambda size, passes, threads: 50.0)
    gate = gate_of(harness, host, 1)
    hot = memory.Hot(gate, 600_000)
    case = harness.Case("w", lambda: None, 4e9)
    slices = [memory.Slice(0.1, 50.0, 50.0, False)] * 3 + [memory.Slice(9.0, 50.0, 50.0, True)] * 5
    row = memory.row(hot, case, 1, slices)
    assert (row["value"], row["percent"], row["kept"]) == (pytest.approx(40.0), pytest.approx(80.0), 3)
    assert memory.row(hot, case, 1, slices[1:])["why"] == harness.FEW_SLICES
    calls: list[str] = []
    monkeypatch.setattr(gate, "lost_time", lambda: calls.append("start") or (lambda: 0.0), raising=False)
    memory.slices(hot, lambda: calls.append("work"), 2, 0.0)
    assert calls == ["work", "start", "work", "work"] * 3, "the first call brings the weights back"


# ---- goals ----------------------------------------------------------------------------------------------------
def test_every_goal_of_the_issue_is_judged(harness: Any) -> None:
    """A row of the issue's table, or of the design's, each with its bars by threads (Zen 4)."""
    import bench_kernels

    bars = {(f"{name}: {goal.label}", threads): goal.must[0] for name, section in bench_kernels.SECTIONS.items()
            for goal in section.goals if goal.must for threads in goal.threads}
    wanted = {"small-m: m = 8": (92, 84), "small-m: Llama m = 16, w8a8": (85, 72), "small-m: Llama m = 16, w4a8 g128": (85, 82),
              "gemv: W8": (93, 93), "gemv: W4": (88, 88), "hot: W8, m = 1": (85, 85), "ragged: 172x64": (80, 80),
              "rows: softmax, GB/s per thread": (35, 35), "attention: int8 / fp32, T >= 128": (1.8, 1.8),
              "avxvnni: w4a8": (85, 85)}
    for title, of_threads in wanted.items():
        assert (bars[title, 1], bars[title, 2]) == of_threads, title


def test_every_row_is_in_a_mean(harness: Any) -> None:
    """So that nothing that is quoted has to be averaged by hand."""
    import bench_kernels

    helpers = {"attention fp32 checked", "attention int8 checked"}  # what a ratio is made of
    for name, section in bench_kernels.SECTIONS.items():
        rows = [harness.row(i.name, 1, 1.0, "GOP/s", m=i.m, n=i.n, k=i.k, ceiling=1.0, noise=0.0) for i in section.items(False)]
        derived = section.ratio(rows) if section.ratio else []
        for row in derived if derived and name != "attention" else [r for r in rows + derived if r["name"] not in helpers]:
            label = bench_kernels.label_of(row)
            assert any(bench_kernels.re.search(goal.match, label) for goal in section.goals), (name, label)


def test_a_goal_that_is_only_a_mean_has_no_verdict(harness: Any) -> None:
    import bench_kernels

    goal = bench_kernels.Goal("g", None)
    got = bench_kernels.judge(goal, [harness.row("x", 1, 50.0, "GOP/s", ceiling=100.0)], 0)
    assert (got["verdict"], got["mean"], bench_kernels.must_of(goal)) == ("", 50.0, "")
    assert bench_kernels.must_of(bench_kernels.Goal("g", (86, 82), mean=(91, 91))) == "91; 86 / 82"


def summary(harness: Any, capsys: pytest.CaptureFixture[str], of_threads: dict[int, Any]) -> dict[str, str]:
    import bench_kernels

    bench_kernels.print_summary(of_threads)
    lines = capsys.readouterr().out.strip().splitlines()
    return {line.split("  ")[0]: " ".join(line.split()) for line in lines}


def test_the_summary_has_every_goal(harness: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_kernels

    monkeypatch.setattr(bench_kernels, "zen", lambda: 0)

    def row(threads: int, value: float | None, **more: Any) -> dict[str, Any]:
        return harness.row("w8a8 in cache", threads, value, "GB/s", m=1, n=768, k=768, ceiling=100.0, **more)

    lost = {"why": harness.NOT_ALL_CORES}
    small = [harness.row("w8a8", t, v, "GOP/s", m=8, n=768, k=768, ceiling=100.0) for t, v in ((1, 90.0), (2, 90.0))]
    found = summary(harness, capsys, {1: {"hot": [row(1, 90.0, beside=9)], "small-m": small[:1], "avx2": []},
                                      2: {"hot": [row(2, None, **lost)], "small-m": small[1:], "avx2": []}})
    assert found["hot: W8, m = 1"] == f"hot: W8, m = 1 85 ~90.0, ~90.0 met 85 n/a: {harness.NOT_ALL_CORES} n/a"
    assert found["small-m: m = 8"] == "small-m: m = 8 92 90.0, 90.0 missed 84 90.0, 90.0 met"
    assert f"n/a: {bench_kernels.NOT_CHOSEN}" in found["small-m: Llama m = 16, w8a8"]
    assert found["avx2: w8a8"].count(f"n/a: {bench_kernels.NOT_HERE}") == 2
    assert "small-m: m = 8 in a sequence" not in found, "no goal, and nothing to say"


# ---- other engines --------------------------------------------------------------------------------------------
def peer_row(harness: Any, engine: str, job: str, value: float | None, m: int, **more: Any) -> dict[str, Any]:
    more = {"gated": True, "rotate": 0, "sort": "", **more}
    return harness.row(f"{engine} {job}", 1, value, "GOP/s", m=m, n=8, k=8, engine=engine, job=job, **more)


@pytest.mark.parametrize(("cosine", "right"), [(0.999, True), (-0.999, False), (0.9, False)])
def test_a_result_of_the_wrong_sign_is_wrong(harness: Any, cosine: float, right: bool) -> None:
    import bench_peers

    assert (bench_peers.wrong({"cosine": cosine}) == "") is right
    assert bench_peers.wrong({"error": "no"}) == "no"


def test_shapes_of_all_goals_are_run(harness: Any) -> None:
    import bench_peers

    for name in ("full", "quick"):
        cases = bench_peers.cases_of(name, 1 << 20)
        assert len(set(cases)) == len(cases)
        for goal in bench_peers.GOALS:
            assert any(goal.covers({**c._asdict()}) and c.has(goal.ours) for c in cases), (name, goal.name)
    full = bench_peers.cases_of("full", 1 << 20)
    assert {(c.n, c.k) for c in full if c.rotate} == set(bench_peers.linears.LLAMA)
    assert len(bench_peers.cases_of("tiny", 1 << 20)) == 1


def test_goals_keep_to_their_shapes(harness: Any) -> None:
    """16 rows from memory are G7's alone, MiniLM's and odd shapes have lines of their own."""
    import bench_peers

    def names(**more: Any) -> set[str]:
        rows = [peer_row(harness, engine, "int8", 3.0, **more) for engine in (bench_peers.OURS, "torch onednn")]
        return {r["name"].removeprefix("ratio ") for r in bench_peers.goals(rows, 1)}

    assert names(m=16, rotate=1) == {"G7 oneDNN (torch), Llama m = 16 from memory"}
    assert names(m=512, sort="minilm") == {"MiniLM best int8, codes in"}
    assert names(m=512, sort="ragged") == {"ragged best int8, codes in"}
    assert names(m=1) == {"G6 oneDNN (torch), m = 1 in cache"}
    assert not names(m=1, rotate=1), "codes in, from memory: no goal"
    assert names(m=512) == {"G1b oneDNN (torch), codes in"}
    assert names(m=8) == {"G3 oneDNN (torch), m = 8"}


def test_goals_without_a_ratio_say_why(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_peers

    def said(*rows: dict[str, Any]) -> str:
        bench_peers.report(list(rows), bench_peers.goals(list(rows), 1), 1)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("G2 "))
        return " ".join(line.split("codes in")[1].split())

    ours, theirs = (peer_row(harness, e, "int8 gelu", 10.0, 512) for e in (bench_peers.OURS, "torch onednn"))
    assert said(ours, theirs) == "1.00 1.00 1.05 missed 1"
    assert said({**ours, "value": 11.0}, theirs) == "1.10 1.10 1.05 met 1"
    assert said(ours) == "n/a n/a 1.05 n/a: not in this run 0"
    assert said(ours, {**theirs, "gated": False}) == f"n/a n/a 1.05 n/a: {harness.FEW_SLICES} 0"
    lost = {**theirs, "gated": False, "value": None, "why": harness.NOT_ALL_CORES}
    assert said(ours, lost) == f"n/a n/a 1.05 n/a: {harness.NOT_ALL_CORES} 0"


def test_a_round_without_all_cores_has_no_time(harness: Any) -> None:
    import bench_peers

    turns = [SimpleNamespace(name="zquant-kernel", ask=lambda do, **request: next(replies))]
    time = {"seconds": 1e-3, "gated": False, "cosine": 1.0, "peak": 900.0}
    lost = {"unreached": True, "cosine": 1.0}
    args = SimpleNamespace(jobs="int8", rounds=2, seconds=0.1)
    for answers, value in (((lost, time), 2e-6 * 512 * 64), ((time, lost), 2e-6 * 512 * 64), ((lost, lost), None)):
        replies = iter(answers)
        (row,) = bench_peers.measure(turns, [bench_peers.Case(512, 8, 8)], args, 2)
        assert row["value"] == (None if value is None else pytest.approx(2e-9 * 512 * 8 * 8 / 1e-3))
        assert row.get("why") == (harness.NOT_ALL_CORES if value is None else None)


def test_engines_take_only_inputs_of_whole_blocks(harness: Any) -> None:
    import kernel_peers

    takes = {(engine.name, job, k): engine.takes(job, k) for engine in (kernel_peers.ZQuantKernels, kernel_peers.GgmlKernels)
             for job, k in itertools.product(kernel_peers.JOBS, (64, 1000, 768))}
    ours = {(job, k) for (name, job, k), yes in takes.items() if yes and name == "zquant-kernel"}
    assert {("int8", 1000), ("int8 gelu", 64), ("f32", 1000), ("w4 g64", 64), ("w4 g128", 768)} <= ours
    assert not {("w4 g128", 64), ("w4 g64", 1000), ("w4 g32", 1000), ("w4 q4_k", 768)} & ours
    theirs = {(job, k) for (name, job, k), yes in takes.items() if yes and name == "ggml op"}
    assert {("f32", 1000), ("int8 dynamic", 64), ("w4 q4_k", 768)} <= theirs
    assert not {("int8 dynamic", 1000), ("w4 q4_k", 64), ("int8", 768)} & theirs
