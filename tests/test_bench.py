"""The benchmarks run and print what they promise; no figure is asserted (the machine is shared)."""
from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
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
    assert ("vpdpbusd ymm" in names) == ("avxvnni" in _core.levels())
    assert ("vpmaddwd" in names) == ("avx2" in _core.levels())


@needs_cc
def test_gemm(tmp_path: Path) -> None:
    text, rows = run("bench_gemm.py", "--shapes", "tiny", "--rounds", "1", "--seconds", "0.02", "--threads", "1",
                     tmp_path=tmp_path)
    assert {r["name"] for r in rows} == {"w8a8", "w8a8+gelu", "w8a8 f32-in", "w4a8 g128", "w4a8 g64", "w4a8 g32", "f32"}
    assert all(ROW <= set(r) for r in rows)
    assert all((r["m"], r["n"], r["k"]) == (8, 64, 64) for r in rows)
    assert "percent of the peak" in text


@needs_cc
def test_gemv(tmp_path: Path) -> None:
    text, rows = run("bench_gemv.py", "--shapes", "64x64", "--m", "1,2", "--copies", "0", "--seconds", "0.02", "--threads", "1",
                     tmp_path=tmp_path)
    assert {r["name"] for r in rows} == {"w8a8", "w4a8-g64", "w4a8-g128", "w4a16-g64", "f32"}
    assert all(ROW <= set(r) for r in rows)
    assert {r["m"] for r in rows} == {1, 2}
    assert "percent of the best time" in text


@needs_cc
def test_encoder(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    text, rows = run("bench_encoder.py", "--models", "tiny", "--cases", "1x8,2x4", "--rounds", "1", "--seconds", "0.02",
                     "--threads", "1", tmp_path=tmp_path)
    assert "left out" not in text, text
    engines = {r["engine"] for r in rows if "engine" in r}
    assert engines == {"zquant fp32", "zquant w8a8", "zquant w4/8a8"}
    assert {r["case"] for r in rows if "case" in r} == {"1x8", "2x4"}
    assert text.count("Python's share") == 3
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
def test_sleeping_is_lost_time(harness: Any) -> None:
    import time

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
