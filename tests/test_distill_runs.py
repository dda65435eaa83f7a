"""Training of blocks as a run: finished blocks as files, hidden states in files, executors. The same bits in every case."""
from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_decoders
import tiny_models

import zquant as zq
from zquant import cli
from zquant import distill as module
from zquant._executors import run_all, workers_of
from zquant.distill import TrainOptions, distill
from zquant.errors import FormatError
from zquant.formats.safetensors import write_safetensors
from zquant.hidden_states import HiddenStates, remove_stale
from zquant.models import load
from zquant.ops.lkd import TrainedBlock
from zquant.resources import Resources
from zquant.spec import Scheme
from zquant.work_directory import WorkDirectory

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

STEPS = 5
BLOCKS = ["model.layers.0", "model.layers.1", "model.layers.2"]


def write_model(directory: Path, seed: int = 0) -> Path:
    config = tiny_decoders.config_of("llama")
    return tiny_models.write(directory, config, tiny_decoders.tensors_of(config, seed=seed))


def ids_of(count: int = 16, length: int = 20, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, tiny_decoders.VOCAB, (count, length)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("run") / "model"))


def train(model, *, ids=None, scheme="w4/8a8-g16", steps=STEPS, seed=0, inputs="teacher", **resources):
    options = TrainOptions(steps=steps, lr=1e-3, batch_size=4)
    return distill(model, model, Scheme.parse(scheme), ids_of() if ids is None else ids, options, seed=seed, inputs=inputs,
                   resources=Resources(**resources))


@pytest.fixture(scope="module")
def expected(model):
    """inputs -> the bits of a run without anything around it."""
    return {inputs: bits(train(model, inputs=inputs)) for inputs in ("teacher", "student")}


def bits(trained) -> dict[str, bytes | str]:
    """Everything that a run gives, in bytes."""
    student, results = trained
    found: dict[str, bytes | str] = {"blocks": ",".join(results)}
    for name, r in results.items():
        arrays = {"losses": r.losses, "checks": r.checks, "best": np.array([r.best_step, r.lr]), **r.tensors}
        arrays |= {f"{key}.{i}": array for key, pair in r.codes.items() for i, array in enumerate(pair)}
        found |= {f"{name}.{key}": array.tobytes() for key, array in sorted(arrays.items())}
    found["logits"] = student(ids_of(2))[0].tobytes()
    return found


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def count_steps(monkeypatch):
    """count_steps(limit) -> a list that grows with every step of training; the step behind the limit is Ctrl-C."""
    def install(limit=10**9):
        seen: list[int] = []
        step = TrainedBlock.step

        def counted(self, *args, **kwargs):
            if len(seen) == limit:
                raise KeyboardInterrupt
            seen.append(1)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(TrainedBlock, "step", counted)
        return seen

    return install


# -- finished blocks

@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_interrupted_and_continued(model, expected, tmp_path, count_steps, monkeypatch, inputs):
    count_steps(2 * STEPS + 1)
    with pytest.raises(KeyboardInterrupt):
        train(model, inputs=inputs, work_dir=tmp_path, memory=0)
    assert files(tmp_path) == [f"{name}.safetensors" for name in BLOCKS[:2]]
    monkeypatch.undo()
    seen = count_steps()
    assert bits(train(model, inputs=inputs, work_dir=tmp_path)) == expected[inputs] and len(seen) == STEPS
    assert bits(train(model, inputs=inputs, work_dir=tmp_path)) == expected[inputs] and len(seen) == STEPS
    (tmp_path / f"{BLOCKS[1]}.safetensors").unlink()
    assert bits(train(model, inputs=inputs, work_dir=tmp_path)) == expected[inputs] and len(seen) == 2 * STEPS


def test_killed_and_continued(model, expected, tmp_path):
    """SIGKILL in the third block: nothing can be tidied up, and nothing is lost but that block."""
    child = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_distill_runs as t
step, seen = t.TrainedBlock.step, []
def killed(self, *args, **kwargs):
    seen.append(1)
    if len(seen) > {2 * STEPS + 2}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
t.TrainedBlock.step = killed
t.train(t.load(sys.argv[1]), work_dir=sys.argv[2], memory=0)
"""
    work = tmp_path / "work"
    environment = {**os.environ, "PYTHONPATH": str(Path(zq.__file__).parent.parent)}
    run = subprocess.run([sys.executable, "-c", child, model.path, work], env=environment, timeout=120)
    assert run.returncode == -signal.SIGKILL
    left = files(work)
    assert left[-2:] == [f"{name}.safetensors" for name in BLOCKS[:2]]
    assert left[:-2] and all(name.startswith(".hidden-states-") for name in left[:-2])
    assert bits(train(model, work_dir=work)) == expected["teacher"]
    assert files(work) == [f"{name}.safetensors" for name in BLOCKS]


OTHERS = {"model": {}, "data": dict(ids=ids_of(seed=1)), "seed": dict(seed=1), "scheme": dict(scheme="w4a8-g16"),
          "options": dict(steps=STEPS + 1), "inputs, student": dict(inputs="student")}


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_another_run_are_refused(model, tmp_path, count_steps, what):
    count_steps(STEPS)
    with pytest.raises(KeyboardInterrupt):
        train(model, work_dir=tmp_path / "work")
    other = load(write_model(tmp_path / "other", seed=1)) if what == "model" else model
    differ = "differ" if "," in what else "differs"
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.safetensors: is of another run \(its {what} {differ}\)"):
        train(other, work_dir=tmp_path / "work", **OTHERS[what])


def test_seeds_of_numpy_are_seeds(model, tmp_path):
    plain, other = (train(model, seed=seed, steps=1, work_dir=tmp_path) for seed in (3, np.int64(3)))
    assert bits(plain) == bits(other)


@pytest.mark.parametrize("wrong", [dict(inputs="studnet"), dict(seed=-1)])
def test_what_a_run_refuses(model, wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        train(model, **wrong)


def test_the_starting_layers_are_part_of_the_run(model, tmp_path):
    ids, scheme = ids_of(), Scheme.parse("w4a16-g16")
    layers = {method: dict(zq.quantize(model, scheme, method, calib=ids).named_linears()) for method in ("rtn", "gptq")}
    for method in ("rtn", "gptq"):
        run = dict(start=layers[method], resources=Resources(work_dir=tmp_path))
        if method == "gptq":
            with pytest.raises(ValueError, match="its start differs"):
                distill(model, model, scheme, ids, TrainOptions(steps=0), **run)
        else:
            distill(model, model, scheme, ids, TrainOptions(steps=0), **run)


def test_a_work_directory_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file"):
        WorkDirectory(tmp_path / "file", {})
    with pytest.raises(OSError, match="/proc/self/"):  # nobody writes there
        WorkDirectory("/proc/self", {})
    directory = WorkDirectory(tmp_path, {"seed": 0})
    assert directory.load("a") is None
    write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(1)}, {"format": "np"})
    with pytest.raises(FormatError, match="a.safetensors: not a finished part"):
        directory.load("a")
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(FormatError, match="a.safetensors: not a valid"):
        directory.load("a")


# -- hidden states

@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_hidden_states_in_files(model, expected, tmp_path, monkeypatch, inputs):
    """The same bits; what Python and NumPy hold at most is less by most of the hidden states; no file stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert bits(train(model, inputs=inputs, memory=0)) == expected[inputs]
    assert bits(train(model, inputs=inputs, memory=0, work_dir=tmp_path / "work")) == expected[inputs]
    ids = ids_of(1200)
    states = 4 * tiny_decoders.HIDDEN * 1200 * 20
    peaks = []
    for memory in (1 << 31, 0):
        tracemalloc.start()
        train(model, inputs=inputs, ids=ids, steps=1, memory=memory)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] - peaks[1] > 1.5 * states, (peaks, states)
    gc.collect()
    assert files(tmp_path) == ["work"] and len(files(tmp_path / "work")) == len(BLOCKS)


@pytest.mark.parametrize("bound", [None, 4 * 30 * 7, 4 * 30 * 7 - 1, 0])
def test_hidden_states(tmp_path, bound):
    x, rows = HiddenStates(30, 7, bound=bound, directory=tmp_path), np.random.default_rng(0).random((30, 7), np.float32)
    for i in range(0, 30, 8):
        x[i:i + 8] = rows[i:i + 8]
    assert (x.path is None) == (bound is None or bound >= 4 * 30 * 7) and x.shape == (30, 7) and len(x) == 30
    pick = np.array([29, 0, 3, 3])
    for states in (x, pickle.loads(pickle.dumps(x))):
        np.testing.assert_array_equal(states[0:30], rows)
        np.testing.assert_array_equal(states[pick], rows[pick])
    part = x[3:5]
    part[:] = 0  # a copy
    np.testing.assert_array_equal(x[3:5], rows[3:5])
    assert remove_stale(tmp_path) == 0 and len(files(tmp_path)) == (x.path is not None)
    del x, states
    gc.collect()
    assert files(tmp_path) == []


def test_a_forked_child_leaves_the_file(tmp_path):
    x = HiddenStates(3, 2, bound=0, directory=tmp_path)
    child = os.fork()
    if child == 0:
        del x
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and x.path.exists()


def test_a_full_disk_says_where(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device, for 4,000 bytes of hidden states: '.*/.hidden-") as found:
        HiddenStates(100, 10, bound=0, directory=tmp_path)
    assert found.value.errno == errno.ENOSPC
    del found
    gc.collect()
    assert files(tmp_path) == []


def test_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".hidden-states-1").write_bytes(b"")
    (tmp_path / "other").write_bytes(b"")
    assert remove_stale(tmp_path) == 1 and files(tmp_path) == ["other"]


# -- executors

def make_executor(kind: str) -> Executor:
    if kind == "threads":
        return ThreadPoolExecutor(2)
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(kind))


@pytest.mark.parametrize("kind", ["threads", "spawn", "fork"])
@pytest.mark.parametrize("memory", [1 << 31, 0], ids=["in memory", "in files"])
def test_executors(model, expected, tmp_path, kind, memory):
    before = zq.get_num_threads()
    with make_executor(kind) as executor:
        assert bits(train(model, executor=executor, memory=memory, work_dir=tmp_path)) == expected["teacher"]
    assert files(tmp_path) == [f"{name}.safetensors" for name in BLOCKS] and zq.get_num_threads() == before
    (tmp_path / f"{BLOCKS[1]}.safetensors").unlink()
    with make_executor("threads") as executor:
        assert bits(train(model, executor=executor, memory=memory, work_dir=tmp_path)) == expected["teacher"]


@pytest.mark.parametrize("memory", [1 << 31, 0], ids=["in memory", "in files"])
def test_dask_cluster(model, expected, memory):
    """A real cluster of two worker processes on this machine."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            executor = client.get_executor()
            assert workers_of(executor) == (2, 2)
            assert bits(train(model, executor=executor, memory=memory)) == expected["teacher"]
            assert executor.submit(os.getpid).result() != os.getpid()


def test_blocks_that_depend_on_each_other_have_no_executor(model):
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="executor: .* wait for those"):
        train(model, inputs="student", executor=executor)


@pytest.mark.parametrize("wrong, error", [(dict(executor=2), TypeError), (dict(memory=-1), ValueError),
                                          (dict(memory=1.5), ValueError), (dict(memory=True), ValueError)])
def test_resources_that_are_none(wrong, error):
    with pytest.raises(error, match=f"^{next(iter(wrong))}: expected"):
        Resources(**wrong)


def test_ctrl_c_on_an_executor_keeps_what_is_complete(model, expected, tmp_path, monkeypatch):
    """The second block's worker is interrupted; the first and the third are kept where they are complete."""
    real, third = module.train_block, threading.Event()

    def interrupted(job, *rest):
        if job.name == BLOCKS[1]:
            assert third.wait(30)
            raise KeyboardInterrupt
        found = real(job, *rest)
        if job.name == BLOCKS[2]:
            third.set()
        return found

    monkeypatch.setattr(module, "train_block", interrupted)
    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(KeyboardInterrupt):
            train(model, work_dir=tmp_path, executor=executor)
    assert files(tmp_path)[0] == f"{BLOCKS[0]}.safetensors" and f"{BLOCKS[1]}.safetensors" not in files(tmp_path)
    monkeypatch.undo()
    assert bits(train(model, work_dir=tmp_path)) == expected["teacher"]


class _Manual(Executor):
    """One worker, which works when it is told."""

    def __init__(self):
        self.submitted: list[tuple[Future, object]] = []

    def submit(self, fn, *args):
        future: Future = Future()
        self.submitted.append((future, lambda: future.set_result(fn(*args))))
        return future


def test_arguments_are_made_as_workers_take_them():
    executor, kept, made = _Manual(), {}, []

    def calls():
        for i in range(5):
            made.append(i)
            yield i, (i, 2)

    def work():
        for done in range(5):
            while len(executor.submitted) <= done:
                time.sleep(0.001)
            ahead.append(len(made) - done)
            executor.submitted[done][1]()

    ahead: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    assert sorted(run_all(pow, calls(), executor, kept.__setitem__)) == [0, 1, 2, 3, 4]
    thread.join()
    assert kept == {i: i * i for i in range(5)} and max(ahead) <= 2


def test_what_has_not_begun_is_cancelled():
    executor, kept = _Manual(), {}
    steps = run_all(pow, ((i, (i, 2)) for i in range(5)), executor, kept.__setitem__)
    timer = threading.Timer(0.05, lambda: executor.submitted[0][1]())
    timer.start()
    assert next(steps) == 0
    steps.close()  # as where Ctrl-C comes between two results
    assert [future.cancelled() for future, _ in executor.submitted] == [False, True] and kept == {0: 0}


def test_ctrl_c_while_a_result_is_kept():
    """What was complete is kept all the same, the one that was interrupted too."""
    executor, kept, calls = _Manual(), {}, []

    def keep(key, result):
        calls.append(key)
        if len(calls) == 1:
            raise KeyboardInterrupt
        kept[key] = result

    def work():
        while len(executor.submitted) < 2:
            time.sleep(0.001)
        for _, compute in executor.submitted[::-1]:
            compute()

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        list(run_all(pow, ((i, (i, 2)) for i in range(5)), executor, keep))
    thread.join()
    assert calls[0] in kept and set(kept) <= {0, 1}


def _threads() -> tuple[int, int]:
    return os.getpid(), zq.get_num_threads()


@pytest.mark.parametrize("kind", ["threads", "spawn", "fork"])
def test_workers_share_the_cores(kind):
    before, found = zq.get_num_threads(), {}
    zq.set_num_threads(4)
    try:
        with make_executor(kind) as executor:
            list(run_all(_threads, ((i, ()) for i in range(6)), executor, found.__setitem__))
        assert zq.get_num_threads() == 4
    finally:
        zq.set_num_threads(before)
    wanted = max(1, len(os.sched_getaffinity(0)) // 2) if kind == "spawn" else 2
    assert {threads for _, threads in found.values()} == {wanted}


def test_an_executor_that_does_not_say_has_one_worker():
    assert workers_of(_Manual()) == (1, 1)


def test_the_error_names_the_block(tmp_path):
    config = tiny_decoders.config_of("llama")
    tensors = tiny_decoders.tensors_of(config)
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 3e38
    broken = load(tiny_models.write(tmp_path / "model", config, tensors))
    for executor in (None, ThreadPoolExecutor(2)):
        with pytest.raises(ValueError, match=r"model\.layers\.[12]: "):
            train(broken, executor=executor, work_dir=tmp_path / "work")
        assert files(tmp_path / "work") == [f"{BLOCKS[0]}.safetensors"]


def test_a_file_says_what_it_is_of(model, tmp_path):
    train(model, work_dir=tmp_path, steps=1)
    size = int.from_bytes((head := (tmp_path / f"{BLOCKS[0]}.safetensors").read_bytes())[:8], "little")
    data = json.loads(json.loads(head[8:8 + size])["__metadata__"]["zquant.part"])
    assert data["run"]["options"]["steps"] == 1 and re.fullmatch("[0-9a-f]{64}", data["run"]["model"])


# -- quantize and the command

def quantized(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run_command(model, out, *argv) -> int:
    options = ["--scheme", "w4/8a8-g16", "--method", "lkd", "--calib", "random", *map(str, argv)]
    return cli.main(["quantize", str(model.path), "-o", str(out), *options])


@pytest.fixture
def ten_steps(monkeypatch):
    """Methods that train blocks do so for ten steps by default."""
    real = zq.LKD.options

    def short(self):
        found = real.fget(self)
        return TrainOptions(found.lr, 10, found.batch_size, found.search, found.kl)

    monkeypatch.setattr(zq.LKD, "options", property(short))


def test_the_command_continues(model, tmp_path, capsys, count_steps, ten_steps, monkeypatch):
    assert run_command(model, tmp_path / "whole") == cli.DONE
    real = TrainedBlock.step
    count_steps(15)
    assert run_command(model, tmp_path / "out", "--work-dir", tmp_path / "work") == cli.INTERRUPTED
    assert capsys.readouterr().err.endswith("zquant: interrupted\n") and not (tmp_path / "out").exists()
    assert files(tmp_path / "work") == [f"{BLOCKS[0]}.safetensors"]
    monkeypatch.setattr(TrainedBlock, "step", real)
    seen = count_steps()
    assert run_command(model, tmp_path / "out", "--work-dir", tmp_path / "work") == cli.DONE and len(seen) == 20
    assert quantized(tmp_path / "out") == quantized(tmp_path / "whole")


def test_the_command_in_processes(model, tmp_path, ten_steps):
    assert run_command(model, tmp_path / "one") == run_command(model, tmp_path / "two", "--jobs", 2) == cli.DONE
    assert quantized(tmp_path / "one") == quantized(tmp_path / "two")


@pytest.mark.parametrize("how", ["Ctrl-C of all", "SIGINT to one"])
def test_interrupted_processes_end(tmp_path, how):
    """The command with two processes, interrupted while blocks are trained: the exit code, and nothing is left running."""
    path = Path(__file__).parent / "data" / "tiny-llama-5m"
    environment = {**os.environ, "PYTHONPATH": str(Path(zq.__file__).parent.parent), "TMPDIR": str(tmp_path)}
    argv = [path, "-o", tmp_path / "out", "--scheme", "w4/8a8", "--method", "lkd", "--calib", "random", "--jobs", "2"]
    child = subprocess.Popen([sys.executable, "-m", "zquant", "quantize", *map(str, argv)], text=True, stderr=subprocess.PIPE,
                             env=environment, start_new_session=True)
    try:
        workers = wait_for(lambda: busy_children(child.pid), 2)
        os.killpg(child.pid, signal.SIGINT) if how.startswith("Ctrl-C") else child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
        assert (child.returncode, err) == (cli.INTERRUPTED, "zquant: interrupted\n")
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        child.kill()


def busy_children(parent: int) -> list[int]:
    """Those that have computed for half a second since they began."""
    found = []
    for line in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        used = sum(map(int, Path(f"/proc/{line}/stat").read_text().rpartition(")")[2].split()[11:13]))
        if used > 0.5 * os.sysconf("SC_CLK_TCK") + 20:
            found.append(int(line))
    return found


def wait_for(condition, count: int, seconds: float = 120):
    end = time.monotonic() + seconds
    while len(found := condition()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("name, value", [("work_dir", "work"), ("executor", ThreadPoolExecutor(1))])
def test_only_methods_that_train_blocks_take_them(model, name, value):
    with pytest.raises(ValueError, match=f"{name}: method gptq trains no blocks"):
        zq.quantize(model, "w4a16-g16", "gptq", calib="random", **{name: value})


def test_quantize_on_an_executor(model, tmp_path):
    options = dict(scheme="w4a8-g16", method=zq.LKD(steps=STEPS), calib=ids_of())
    plain = zq.quantize(model, **options)
    with ThreadPoolExecutor(2) as executor:
        other = zq.quantize(model, **options, executor=executor, work_dir=tmp_path, memory=0)
    for name in (f"{block}.mlp.{layer}_proj" for block in BLOCKS for layer in ("gate", "down")):
        np.testing.assert_array_equal(plain.linears[name].weight.codes, other.linears[name].weight.codes, err_msg=name)
    np.testing.assert_array_equal(plain(ids_of(1))[0], other(ids_of(1))[0])
