"""Dispatch, threads, BLAS and the cost of importing."""
from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import zquant as zq
from zquant import _blas, _core


def python(code, **env):
    """Run code in a fresh interpreter; (exit code, stdout, stderr)."""
    root = os.path.dirname(os.path.dirname(zq.__file__))
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": path, **env})
    return run.returncode, run.stdout.strip(), run.stderr


def test_info_names_what_runs():
    info = zq.cpu.info()
    assert info.active == info.available[-1] or "ZQUANT_ISA" in os.environ
    assert info.available[0] == "ref" and info.threads >= 1 and info.blas_core
    assert set(info.kernels.values()) <= set(info.available)
    assert repr(info).startswith("CPUInfo(active=")


@pytest.mark.parametrize("level", ["ref", "avx2", "avxvnni", "avx512vnni", "amx"])
def test_the_environment_caps_the_level(level):
    available = zq.cpu.info().available if "ZQUANT_ISA" not in os.environ else tuple(_core.levels())
    code, out, err = python("import zquant as zq; print(zq.cpu.info().active)", ZQUANT_ISA=level)
    assert code == 0, err
    order = ["ref", "avx2", "avxvnni", "avx512vnni", "amx"]
    assert out == [v for v in available if order.index(v) <= order.index(level)][-1]


def test_an_unknown_level_is_an_import_error_with_the_list():
    code, _, err = python("import zquant", ZQUANT_ISA="avx9")
    assert code == 1 and "ZQUANT_ISA=avx9: expected one of ref, avx2, avxvnni, avx512vnni, amx" in err


def test_use_restores_the_level_after_an_error():
    before = _core.level()
    with pytest.raises(RuntimeError), zq.cpu.use("ref"):
        assert _core.level() == "ref"
        raise RuntimeError
    assert _core.level() == before
    with pytest.raises(ValueError, match=r"level: 'avx9' is not one of this CPU's levels \['ref'"), zq.cpu.use("avx9"):
        pass


@pytest.mark.parametrize("bad,error", [(0, ValueError), (-1, ValueError), (257, ValueError), (1.5, TypeError),
                                       ("2", TypeError)])
def test_thread_counts_are_checked(bad, error):
    before = zq.get_num_threads()
    with pytest.raises(error, match="n: expected"):
        zq.set_num_threads(bad)
    assert zq.get_num_threads() == before


def test_the_default_follows_the_affinity_mask():
    code, out, err = python("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
                            "import zquant as zq; print(zq.get_num_threads())")
    assert code == 0 and out == "1", err


def test_import_needs_numpy_alone_and_is_quick():
    heavy = "safetensors tokenizers tqdm matplotlib torch transformers pandas scipy".split()
    seconds = []
    for _ in range(3):  # CPU time, the best of three: the machine may be busy
        code, out, err = python(
            "import time, sys, numpy; t = time.process_time(); import zquant; t = time.process_time() - t\n"
            f"print(t, [m for m in {heavy} if m in sys.modules])")
        assert code == 0, err
        t, _, loaded = out.partition(" ")
        assert loaded == "[]"
        seconds.append(float(t))
    assert min(seconds) < 0.3


def test_blas_core_is_corrected_only_where_it_is_wrong():
    zen4 = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: avx2 avx512bw avx512vl\n\nprocessor: 1\n"
    assert _blas.better_core(zen4) is None
    assert _blas.better_core(zen4.replace("25", "26")) == "SkylakeX"
    assert _blas.better_core(zen4.replace("25", "26").replace(" avx512bw", "")) is None
    assert _blas.better_core("") is None
    code, out, _ = python("import os, zquant; print(os.environ.get('OPENBLAS_CORETYPE'), zquant.cpu.info().blas_core)",
                          OPENBLAS_CORETYPE="Haswell")
    assert code == 0 and out == "Haswell Haswell"


def test_results_do_not_change_while_another_thread_holds_the_pool():
    import threading

    x = np.random.default_rng(0).standard_normal((400, 200)).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((300, 200)).astype(np.float32)
    want = zq.ops.linear(x, w)
    stop = threading.Event()

    def load():
        while not stop.is_set():
            zq.ops.linear(x, w)

    other = threading.Thread(target=load)
    other.start()
    try:
        for _ in range(50):
            assert np.array_equal(zq.ops.linear(x, w), want)
    finally:
        stop.set()
        other.join()


def test_thread_count_may_change_between_calls():
    x = np.random.default_rng(0).standard_normal((333, 96)).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((65, 96)).astype(np.float32)
    before, results = zq.get_num_threads(), []
    for n in (1, 4, 2, 7, 1, 3):
        zq.set_num_threads(n)
        results.append(zq.ops.linear(x, w))
    zq.set_num_threads(before)
    assert all(np.array_equal(r, results[0]) for r in results)


def test_the_environment_is_left_alone():
    clean = "import os; os.environ.pop('OPENBLAS_CORETYPE', None); "
    code, out, err = python(clean + "import zquant; print(os.environ.get('OPENBLAS_CORETYPE'), zquant.cpu.info().blas_core)")
    assert code == 0, err
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
        better = _blas.better_core(f.read(8192))
    assert out.startswith("None ") and (better is None or out == f"None {better}")
