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
    assert ("vpdpbusd" in names) == ("avx512vnni" in _core.levels())
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
