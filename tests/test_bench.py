"""The benchmarks run and print what they promise; no figure is asserted (the machine is shared)."""
from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parent / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    return harness


def run(script: str, *args: str, tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    out = tmp_path / "rows.json"
    env = dict(os.environ, ZQUANT_BENCH_CACHE=str(tmp_path), PYTHONPATH=str(BENCH.parents[1]))
    done = subprocess.run([sys.executable, str(BENCH / script), *args, "--json", str(out)], capture_output=True,
                          text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(out.read_text())


needs_cc = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc").split()[0]), reason="no C compiler")
ROW = {"name", "m", "n", "k", "threads", "value", "unit", "ceiling", "percent"}


@needs_cc
def test_ceilings(tmp_path: Path) -> None:
    text, rows = run("ceilings.py", "--quick", tmp_path=tmp_path)
    assert all(ROW <= set(r) for r in rows)
    assert all(r["value"] > 0 for r in rows)
    assert "GB/s" in text
    from zquant import _core

    names = " ".join(r["name"] for r in rows)
    assert ("vpdpbusd zmm" in names) == ("avx512vnni" in _core.levels())
    assert ("tdpbusd" in names) == ("amx" in _core.levels())
    assert ("vpsignb" in names) == ("every 32 k" in names) == ("avx2" in _core.levels())


@needs_cc
def test_kernels(tmp_path: Path, harness: Any) -> None:
    import bench_kernels
    import ceilings

    from zquant import _core

    text, rows = run("bench_kernels.py", "--tiny", "--seconds", "0.01", "--threads", "1", tmp_path=tmp_path)
    assert all(ROW <= set(r) for r in rows)
    names = {r["name"] for r in rows}
    assert {"w8a8", "w8a8+gelu int8-out", "w8a8 f32-in", *bench_kernels.GROUPS, "f32", "w4a16 g64 gemv", "w8a8 from memory",
            "attention fp32", "w8a8 / f32", *bench_kernels.ROW_KINDS} <= names
    assert all(r["m"] == r["n"] == 0 for r in rows if r["name"].startswith(("peak", "read")))
    assert all(r["n"] == 64 for r in rows if r["name"].startswith(("w8", "w4")))
    assert len(rows) == len({(r["name"], r["m"], r["n"], r["k"], r["threads"]) for r in rows}), "a row was measured twice"
    elsewhere = {"avx2", "avxvnni", "amx", "tiles", "epilogues", "minilm", "attention"}  # without goals for it
    for name in set(bench_kernels.SECTIONS) - elsewhere:
        assert f"{name}: " in text
    for name, kind in bench_kernels.LEVEL_KINDS.items():  # a level's percentages are of the instructions it runs
        if name.split()[0] in _core.levels():
            assert f"ceiling {name}: {ceilings.KIND_NAMES[kind]}" in text
            (peak,) = (r["value"] for r in rows if r["name"] == f"peak {ceilings.KIND_NAMES[kind]}")
            assert all(r["ceiling"] is None or r["ceiling"] < 2 * peak for r in rows if r["name"].startswith(name))


@needs_cc
@pytest.mark.parametrize("kind", ["w8a8", "w4a8 g32"])
def test_a_loop_in_c_runs_the_products_in_turn(harness: Any, kind: str) -> None:
    import linears

    from zquant import _core

    other = _core.linear_pack_s8(np.ones((70, 100), np.int8), np.ones(70, np.float32), None)
    weights = [*linears.handles(kind, 70, 100), other]
    for times, last in ((1, 0), (2, 1), (5, 0)):
        loop = linears.Loop(kind, 3, 100, weights, times)
        loop()
        np.testing.assert_array_equal(loop.y, _core.linear_forward(weights[last], *linears.arguments(kind, 3, 100)))
    with pytest.raises(ValueError, match=r"w8a8\+gelu: expected codes in and float32 out"):
        linears.Loop("w8a8+gelu", 3, 100, weights, 1)


@needs_cc
@pytest.mark.parametrize("m", [1, 5, 16, 17, 32, 45])
@pytest.mark.parametrize("k", [8, 62, 72, 127, 200, 1000])
def test_codes_are_read_to_the_next_multiple_of_eight_at_most(harness: Any, isa: str, guarded: Any, m: int, k: int) -> None:
    """zq.h's promise to callers from C (Python's codes are copied to padded rows): behind it there is no memory, and what lies
    between a row's codes and it does not count. Steps of 64 input features do not fit these rows."""
    import linears

    loop = linears.Loop("w8a8", m, k, linears.handles("w8a8", 70, k), 1)
    loop()
    want = loop.y.copy()
    codes = np.full((m, -(-k // 8) * 8), 255, np.uint8)
    codes[:, :k] = loop.rows[0]
    codes = guarded(codes)
    loop.arguments = (*loop.arguments[:3], codes.ctypes.data, codes.strides[0], *loop.arguments[5:])
    loop.y[...] = np.nan
    loop()
    np.testing.assert_array_equal(loop.y, want)


@needs_cc
def test_only_some_kernels(tmp_path: Path) -> None:
    text, rows = run("bench_kernels.py", "--tiny", "--only", "f32,rows", "--seconds", "0.01", "--threads", "1",
                     tmp_path=tmp_path)
    assert {r["unit"] for r in rows if r["k"]} == {"GOP/s", "GB/s"}
    assert "w8a8" not in text


def test_every_section_has_shapes_and_goals_that_match(harness: Any) -> None:
    import bench_kernels

    for quick in (True, False):
        for name, section in bench_kernels.SECTIONS.items():
            items = list(section.items(quick))
            assert items or name in ("avx2", "avxvnni", "amx", "tiles"), name
            rows = [harness.row(i.name, 1, 1.0, "GOP/s", m=i.m, n=i.n, k=i.k, ceiling=1.0, noise=0.0) for i in items]
            rows += section.ratio(rows) if section.ratio else []
            for goal in section.goals if items else ():
                if goal.label != "int8 / fp32, T >= 128":  # only where there is an int8 attention
                    assert bench_kernels.judge(goal, rows, 0)["of"] > 0, (name, goal)
    assert all(2 * i.m * i.n * i.k >= 5e7 for i in bench_kernels.ragged(False))


def test_judging_a_goal(harness: Any) -> None:
    import bench_kernels

    def verdict(*percents: float | None, cpu: int = 0) -> str:
        goal = bench_kernels.Goal("g", (86, 82), mean=(91, 90))
        rows = [harness.row("x", 1, p, "GOP/s", m=i, ceiling=100.0) for i, p in enumerate(percents)]
        return bench_kernels.judge(goal, rows, cpu)["verdict"]

    assert verdict(90, 92) == "met"
    assert verdict(89, 92) == "missed"
    assert verdict(89, 92, cpu=1) == "met"
    assert verdict(85, 99) == "mean"
    assert verdict(None, 92) == "met"
    assert verdict(None) == "not measured"
    each = bench_kernels.Goal("g", (35, 35), figure="each")
    assert bench_kernels.judge(each, [harness.row("x", 2, 60.0, "GB/s")], 0)["verdict"] == "missed"


def test_comparing_two_files(harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_kernels

    def write(name: str, *values: float | None) -> str:
        rows = [harness.row(f"case{i}", 1, v, "GOP/s", ceiling=100.0, noise=0.02) for i, v in enumerate(values)]
        rows.append(harness.row("peak x", 1, values[0], "GOP/s", noise=0.0))
        harness.write_json(str(tmp_path / name), rows)
        return str(tmp_path / name)

    old = write("old.json", 50.0, 60.0, 70.0)
    assert bench_kernels.main(["--compare", old, old]) == 0
    assert bench_kernels.main(["--compare", old, write("faster.json", 53.0, 59.0, 70.0)]) == 0
    text = capsys.readouterr().out
    assert text.count("faster") >= 1
    assert "slower" not in text
    assert bench_kernels.main(["--compare", old, write("slower.json", 50.0, 57.0, None)]) == 1
    assert "0.950  slower" in capsys.readouterr().out


def test_the_peak_follows_the_clock(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slower clock is the peak after some seconds; a core that somebody else uses is not."""
    gate = harness.Gate(1)
    clock = [1000.0]
    monkeypatch.setattr(harness, "now", lambda: clock[0])
    gate.fastest["int8"] = [100.0] * 3
    gate.recent.clear()
    gate.recent.extend((1000.0, 100.0) for _ in range(5))
    assert gate.speed() == 100.0
    clock[0] += 2 * harness.RECENT
    gate.recent.extend((clock[0], 95.0) for _ in range(5))
    assert gate.speed() == 95.0
    clock[0] += 2 * harness.RECENT
    gate.recent.extend((clock[0], 50.0) for _ in range(5))
    assert gate.speed() == pytest.approx(100.0 * harness.DRIFT)


@needs_cc
def test_peers_of_kernels(tmp_path: Path, harness: Any) -> None:
    import kernel_peers
    import peers

    text, rows = run("bench_peers.py", "--shapes", "tiny", "--rounds", "1", "--seconds", "0.02", "--threads", "1",
                     tmp_path=tmp_path)
    assert all(ROW <= set(r) for r in rows)
    ours = [r for r in rows if r.get("engine") == "zquant-kernel"]
    assert {r["job"] for r in ours} == set(kernel_peers.JOBS[:-1])
    assert all(r["cosine"] > (0.9999 if r["job"] == "f32" else 0.98) for r in rows if "cosine" in r)
    for name, engine in peers.ENGINES.items():
        if engine.kind == "kernel":
            assert f"# {name}: " in text
            assert (engine.missing() is not None) == (f"# {name}: left out, {engine.missing()} is not installed" in text)


def test_ratios_to_other_kernels(harness: Any) -> None:
    import bench_peers

    def row(engine: str, job: str, value: float, m: int = 512, **more: Any) -> dict[str, Any]:
        more = {"gated": True, "rotate": 0, **more}
        return harness.row(f"{engine} {job}", 1, value, "GOP/s", m=m, n=8, k=8, engine=engine, job=job, **more)

    def goal(name: str, *rows: dict[str, Any]) -> dict[str, Any] | None:
        return next((g for g in bench_peers.goals(list(rows), 1) if g["name"].startswith(f"ratio {name}")), None)

    ours, theirs = row(bench_peers.OURS, "int8", 100.0), row("torch onednn", "int8", 100.0)
    wide = row(bench_peers.OURS, "int8", 96.0, 1024), row("torch onednn", "int8", 100.0, 1024)
    got = goal("G1b oneDNN (torch)", ours, theirs, *wide)
    assert (got["shapes"], got["least"]) == (2, pytest.approx(0.96))
    assert bench_peers.verdict(got) == "missed", "the geometric mean is below 1"
    assert bench_peers.verdict(goal("G1b oneDNN (torch)", ours, theirs)) == "met"
    assert goal("G1b oneDNN (torch)", ours, row("torch onednn", "int8", 100.0, gated=False)) is None
    decode = [row(bench_peers.OURS, "w4 g64", 130.0, 1, rotate=1), row("ggml op", "w4 g32", 80.0, 1, rotate=1),
              row("ggml op", "w4 q4_k", 100.0, 1, rotate=1)]
    assert goal("G5b", *decode)["value"] == pytest.approx(1.3), "the better of the two types counts"


@needs_cc
def test_encoder(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    text, rows = run("bench_encoder.py", "--models", "tiny", "--cases", "1x8,2x4", "--rounds", "1", "--seconds", "0.02",
                     "--threads", "1", tmp_path=tmp_path)
    assert "left out" not in text, text
    engines = {r["engine"] for r in rows if "engine" in r}
    assert engines == {"zquant fp32", "zquant w8a8", "zquant w8a8+attn8", "zquant w4/8a8"}
    assert {r["case"] for r in rows if "case" in r} == {"1x8", "2x4"}
    shares = [float(line.split("layers ")[1].split()[0]) for line in text.splitlines() if "outside the linear layers" in line]
    assert len(shares) == 4 * 2
    assert all(0 < share < 100 for share in shares)
    assert "peak memory of quantizing to w8a8" in text


@needs_cc
def test_decode(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    text, rows = run("bench_decode.py", "--models", "tiny-gpt2,tiny-llama", "--limit", "256", "--rounds", "1", "--seconds",
                     "0.02", "--threads", "1", tmp_path=tmp_path)
    assert "left out" not in text, text
    assert all(ROW <= set(r) for r in rows)
    assert {r["model"] for r in rows if "model" in r} == {"tiny-gpt2", "tiny-llama"}
    assert {r["engine"] for r in rows if "engine" in r} == {f"zquant-lm {s}" for s in ("fp32", "w8a8", "w4a8 g64", "w4a16 g64")}
    assert {r["case"] for r in rows if "case" in r} == {"prefill 256", "decode @64"}
    assert text.count("Python's share") == 8
    cosines = [float(line.split()[-1]) for line in text.splitlines() if "cosine of logits" in line]
    assert len(cosines) == 8
    assert min(cosines) > 0.9
    assert text.count("at the peak (") == 2
    assert "ratio to llama.cpp" not in text


def test_goals_compare_with_the_best_peer(harness: Any) -> None:
    import bench_decode

    speeds = {"zquant-lm w4a8 g64": 28.0, "llama.cpp q4_0": 10.0, "llama.cpp q4_k": 20.0, "llama.cpp q8_0": 25.0}
    rows = [harness.row(e, 1, v, "tok/s", engine=e, case="decode @64", gated=True) for e, v in speeds.items()]
    (row,) = bench_decode.goals(rows, "llama-1.1b", 1)
    assert row["value"] == pytest.approx(1.4)
    assert row["goal"] == 1.4
    assert bench_decode.verdict(row) == "reached"
    assert bench_decode.verdict({**row, "value": 1.39}) == "missed"
    rows[1]["gated"] = False
    (row,) = bench_decode.goals(rows, "llama-1.1b", 1)
    assert bench_decode.verdict(row) == "not measured"
    assert bench_decode.goals(rows, "gpt2-124m", 1)[0]["goal"] is None
    assert bench_decode.goals(rows[:1], "llama-1.1b", 1) == []


def test_the_better_of_two_rounds_is_kept(harness: Any) -> None:
    import peers

    best: dict[Any, Any] = {}
    for value, gated in ((5.0, False), (3.0, True), (4.0, True), (9.0, False)):
        peers.keep(best, ("e", "c"), {"value": value, "gated": gated}, larger=True)
    assert best["e", "c"]["value"] == 4.0
    peers.keep(best, ("e", "c"), {"value": 2.0, "gated": True}, larger=False)
    assert best["e", "c"]["value"] == 2.0


def test_random_decoders_are_what_their_names_say(harness: Any, tmp_path: Path) -> None:
    import decoders

    sizes = {name: [round(n / 1e6) for n in decoders.parameters(config)] for name, config in decoders.SHAPES.items()}
    assert sizes["gpt2-124m"] == [85, 39]
    assert sizes["gpt2-350m"] == [302, 51]
    assert sizes["llama-1.1b"] == [969, 66]
    numpy = pytest.importorskip("safetensors.numpy")
    for name in ("tiny-gpt2", "tiny-llama"):
        config = decoders.SHAPES[name]
        folder = decoders.write_random(tmp_path / name, config)
        tensors = numpy.load_file(folder / "model.safetensors")
        assert {n: t.shape for n, t in tensors.items()} == dict(decoders.tensor_shapes(config))
        assert all(np.isfinite(t).all() and t.std() > 0 for t in tensors.values())
        assert json.loads((folder / "config.json").read_text()) == config


def test_rotated_rows(harness: Any) -> None:
    import decoders

    w = np.arange(8)[:, None]  # two heads of four: halves (0, 1) and (2, 3) become neighbours
    assert decoders.rotated(w, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_q4_k_blocks_have_the_spread_they_should(harness: Any) -> None:
    """Decoded by the gguf package."""
    gguf = pytest.importorskip("gguf")
    import decoders

    blocks = decoders.random_q4_k((16, 512), np.random.default_rng(0))
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
    assert values.shape == (16, 512)
    assert 0.5 * decoders.SPREAD < values.std() < 2 * decoders.SPREAD


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_gguf_files_hold_the_same_weights(harness: Any, tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("safetensors.numpy")
    import decoders

    for name, ours, theirs in (("tiny-gpt2", "transformer.h.1.mlp.c_fc.weight", "blk.1.ffn_up.weight"),
                               ("tiny-llama", "model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight")):
        folder = decoders.write_random(tmp_path / name, decoders.SHAPES[name])
        path = decoders.write_gguf(folder, kind, tmp_path / f"{name}-{kind}.gguf")
        stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
        w = numpy.load_file(folder / "model.safetensors")[ours].astype(np.float32)
        got = gguf.quants.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        error = got - (w.T if name == "tiny-gpt2" else w)
        assert np.abs(error).max() < (0.1 if kind == "q8_0" else 1.0) * decoders.SPREAD
        assert len(stored) == len(list(decoders.tensor_shapes(decoders.SHAPES[name])))


@needs_cc
def test_a_disturbed_slice_is_dropped(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = harness.Gate(1)
    answers = iter([True] + [False, True] * 1000)
    monkeypatch.setattr(gate, "good", lambda: next(answers))
    monkeypatch.setattr(gate, "kind", 0)
    sample = gate.measure(lambda: None, want=3, seconds=0.01)
    assert sample.kept == 0
    assert not sample.gated
    monkeypatch.setattr(gate, "good", lambda: True)
    monkeypatch.setattr(gate, "lost_time", lambda: lambda: 1.0)
    assert gate.measure(lambda: None, want=3, seconds=0.01).kept == 0, "the threads were without a CPU"
    monkeypatch.setattr(gate, "lost_time", lambda: lambda: 0.0)
    assert gate.measure(lambda: None, want=3, seconds=1.0).kept == 3


@needs_cc
@pytest.mark.parametrize(("rates", "said"), [((90.0,), True), ((90.0, 60.0), False), ((70.0,), False)])
def test_work_that_lowers_the_clock_is_compared_with_the_peaks_beside_it(harness: Any, monkeypatch: pytest.MonkeyPatch,
                                                                         rates: tuple[float, ...], said: bool) -> None:
    """No slice passes the gate. Peaks around it that agree are its ceiling; those that differ, or are far too low, are none."""
    gate = harness.Gate(1)
    turns = itertools.cycle(rates)

    def no_good() -> bool:
        gate.latest = next(turns)
        return False

    monkeypatch.setattr(gate, "kind", 0)
    monkeypatch.setattr(gate, "good", no_good)
    monkeypatch.setattr(gate, "wait", no_good)
    monkeypatch.setattr(gate, "lost_time", lambda: lambda: 0.0)
    gate.fastest["int8"], gate.ratios["int8"] = [100.0] * 3, [1.0]
    case = harness.Case("half", lambda: time.sleep(1e-3), 1e-3 * 90e9 / 2)
    case.samples.append(gate.measure(case.work, seconds=0.09))
    (row,) = harness.rows_of(gate, [case])
    assert row["kept"] == 0
    assert (row["value"] is not None) == said == harness.cell(row).startswith("~")
    if said:
        assert row["beside"] >= harness.MIN_BESIDE
        assert row["ceiling"] == pytest.approx(90.0)
        assert 10 < row["percent"] <= 50  # it sleeps at least as long as it says
    else:
        assert harness.cell(row) == "n/a"


@needs_cc
def test_waiting_does_not_raise_the_clock_between_slices(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work lowers the clock to 90 %, peak slices raise it within some milliseconds: before and after it never agree if the
    gate waits in between, and do where it does not."""
    gate = harness.Gate(1)
    clock = [100.0]

    def work() -> None:
        clock[0] = 90.0

    def good() -> bool:
        gate.latest = clock[0]
        clock[0] = min(100.0, clock[0] + 0.5)
        return gate.latest >= 96.0

    monkeypatch.setattr(gate, "kind", 0)
    monkeypatch.setattr(gate, "good", good)
    monkeypatch.setattr(gate, "lost_time", lambda: lambda: 0.0)
    gate.fastest["int8"], gate.ratios["int8"] = [100.0] * 3, [1.0]
    monkeypatch.setattr(harness, "WORK_SLICE", 1e-4)
    case = harness.Case("any", work, 1.0)
    case.samples.append(gate.measure(case.work, seconds=0.2))
    (row,) = harness.rows_of(gate, [case])
    assert row["kept"] == 0 and row["beside"] >= harness.MIN_BESIDE and row["ceiling"] == pytest.approx(90.0)


@needs_cc
def test_sleeping_is_lost_time(harness: Any) -> None:
    gate = harness.Gate(1)
    lost_time = gate.lost_time()
    time.sleep(0.05)
    assert lost_time() > 0.04


def test_rows_without_a_value_say_so(harness: Any) -> None:
    row = harness.row("x", 2, None, "GOP/s", ceiling=10.0)
    assert row["percent"] is None
    assert harness.cell(row) == "n/a"
    assert harness.cell(harness.row("x", 1, 5.0, "GOP/s", ceiling=10.0)) == "5 (50)"


def test_pivot(harness: Any) -> None:
    rows = [harness.row(n, 1, 1.0, "GOP/s", m=m, n=2, k=3) for n in ("a", "b") for m in (1, 2)]
    assert harness.pivot(rows[:-1]) == (["m,n,k", "a", "b"], [["1,2,3", "1", "1"], ["2,2,3", "1", ""]])


def test_every_peer_names_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import peers

    assert len(peers.ENGINES) >= 10
    for engine in peers.ENGINES.values():
        missing = engine.missing()
        assert missing is None or importlib.util.find_spec(missing) is None


def test_batches_survive_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import peers

    batches = [peers.random_batch(100, 2, n) for n in (3, 5)]
    peers.save_batches(tmp_path / "b.npz", batches)
    for (ids, mask), (ids2, mask2) in zip(batches, peers.load_batches(tmp_path / "b.npz")):
        np.testing.assert_array_equal(ids, ids2)
        np.testing.assert_array_equal(mask, mask2)


@needs_cc
def test_training_of_a_block(tmp_path: Path) -> None:
    text, rows = run("bench_lkd.py", "--tiny", "--rounds", "1", "--repeat", "2", "--threads", "1", tmp_path=tmp_path)
    assert {"zquant"} <= {r["name"] for r in rows} <= {"zquant", "torch"}
    assert all(ROW <= set(r) and r["value"] > 0 and r["last_loss"] < r["first_loss"] for r in rows)
    assert "peak memory" in text and "ms a step" in text
    losses = [r["first_loss"] for r in rows]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-3)


def test_methods(tmp_path: Path, shared: Path) -> None:
    """Cells are the perplexities of quantizing by hand, and are not computed twice."""
    pytest.importorskip("safetensors")
    import zquant as zq

    options = ["--schemes", "w3a16-row+e32,w8a8+e32", "--methods", "RTN,FPTQ,RTN + LoRC", "--samples", "1", "--windows", "1"]
    text, found = run("bench_methods.py", *options, tmp_path=tmp_path)
    cells = {tuple(name.split("|")[3:]): cell["values"]["wikitext2"] for name, cell in found.items()}
    assert list(cells) == [("", "float32"), ("w3a16-row+e32", "RTN"), ("w8a8+e32", "RTN"), ("w8a8+e32", "FPTQ"),
                           ("w3a16-row+e32", "RTN + LoRC"), ("w8a8+e32", "RTN + LoRC")]
    lm = zq.load(BENCH.parent / "data" / "tiny-llama-5m")
    test = (shared / "data" / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    ids = lm.tokenizer.encode(test[:10_000]).ids[:512]
    small = zq.quantize(lm, "w3a16-row+e32", "lorc")
    assert cells["w3a16-row+e32", "RTN + LoRC"] == zq.perplexity(small, ids).ppl
    assert f"| RTN | {cells['w3a16-row+e32', 'RTN']:.2f} | {cells['w8a8+e32', 'RTN']:.2f} |" in text
    again, same = run("bench_methods.py", *options, tmp_path=tmp_path)
    assert same == found and "1/" not in again and again in text
