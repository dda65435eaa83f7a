"""Linear layers beside other engines' on the same shapes, turn by turn, with the ratios that are goals.

Engines: PyTorch with FBGEMM and with oneDNN, ONNX Runtime, OpenVINO, ggml (llama.cpp), each in its own process (see
kernel_peers.py for what a job includes); those that are not installed are listed. Weights have the bytes of the same random
numbers; the cosine of every result to the exact product is checked. m = 1 with a Llama's weights rotates over 128 MiB of
copies. A percentage is of the peak of the int8 (f32: float32) instructions. Goals are those of the design's section 7.
Ratios are of the best gated times of all rounds, ours above theirs: codes in are compared with codes in, float32 in with
float32 in. CTranslate2 has no linear layer of its own to call: bench_encoder.py --peers has it as a whole model.

    python tests/bench/bench_peers.py --quick
    python tests/bench/bench_peers.py --engines ggml,torch --jobs "int8,int8 dynamic" --threads 1 --json out.json
"""
from __future__ import annotations

import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import kernel_peers
import linears
import peers

OURS = "zquant-kernel"
NO_DRIVER = {"ctranslate2": "no linear layer to call by itself; see bench_encoder.py --peers",
             "XNNPACK, AOCL, ik_llama.cpp": "no driver for them here"}
ROTATE = 128 << 20
FROM_MEMORY = ("int8 dynamic", "w4 g64", "w4 g32", "w4 q4_k")
Case = tuple[int, int, int, int]  # m, n, k, bytes of weights to rotate over


def cases_of(name: str) -> list[Case]:
    """tiny: smoke test. quick: one size of each sort. full: the shapes of bench_kernels.py."""
    if name == "tiny":
        return [(8, 64, 256, 0)]
    hot = [(m, n, k, 0) for m in (1, 8) for n, k in linears.BERT]
    if name == "quick":
        return [*hot[:1], *hot[3:4], *((512, n, k, 0) for n, k in linears.BERT), (1, 4096, 4096, ROTATE)]
    return [*hot, *((m, n, k, 0) for m in (128, 512, 2048) for n, k in linears.BERT),
            *((512, n, k, 0) for n, k in linears.LLAMA), *((1, n, k, ROTATE) for n, k in linears.LLAMA)]


@dataclass(frozen=True)
class Goal:
    """Our job against (engine, job) of peers: geometric mean and least of the ratios over m in [low, high]."""

    name: str
    ours: str
    theirs: tuple[tuple[str, str], ...]  # the best of them counts
    must: dict[int, float]  # by threads: each (or, with a least, the geometric mean)
    low: int
    high: int
    least: float | None = None
    rotated: bool = False


def against(*names: str, job: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, job) for name in names)


BOTH = {1: 1.0, 2: 1.0}
FLOAT = ("torch fbgemm", "onnxruntime op", "openvino op", "ggml op")
GOALS = (
    Goal("G1b oneDNN (torch), codes in", "int8", against("torch onednn", job="int8"), BOTH, 128, 4096, 0.95),
    Goal("G1b oneDNN (openvino), float32 in", "int8 dynamic", against("openvino op", job="int8 dynamic"), BOTH, 128, 4096,
         0.95),
    Goal("G1c FBGEMM (torch), float32 in", "int8 dynamic", against("torch fbgemm", job="int8 dynamic"), {1: 1.07, 2: 1.07}, 128,
         4096),
    Goal("G1c llama.cpp q8_0", "int8 dynamic", against("ggml op", job="int8 dynamic"), {1: 4.0, 2: 4.0}, 128, 4096),
    Goal("onnxruntime, codes in", "int8", against("onnxruntime op", job="int8"), {}, 128, 4096),
    Goal("onnxruntime, float32 in", "int8 dynamic", against("onnxruntime op", job="int8 dynamic"), {}, 128, 4096),
    Goal("G3 oneDNN (torch), m = 8", "int8", against("torch onednn", job="int8"), {1: 1.08, 2: 1.08}, 8, 8),
    Goal("G4b llama.cpp q4_0", "w4 g32", against("ggml op", job="w4 g32"), {1: 2.8, 2: 2.8}, 8, 4096),
    *(Goal(f"W4 {g} onnxruntime, openvino", f"w4 {g}", against("onnxruntime op", "openvino op", job=f"w4 {g}"), {}, 8, 4096)
      for g in ("g128", "g64", "g32")),
    Goal("G5b llama.cpp q4_0, q4_K", "w4 g64", (("ggml op", "w4 g32"), ("ggml op", "w4 q4_k")), {1: 1.25, 2: 1.05}, 1, 1,
         rotated=True),
    Goal("G6 oneDNN (torch), m = 1 in cache", "int8", against("torch onednn", job="int8"), {1: 1.3, 2: 1.3}, 1, 1),
    Goal("best float32", "f32", against(*FLOAT, job="f32"), {}, 8, 4096),
)

Best = dict[tuple[str, str], dict[str, Any]]


def measure(turns: list[peers.Turn], cases: list[Case], args: Any, threads: int) -> list[dict[str, Any]]:
    """Rounds of turns for each job and shape."""
    rows: list[dict[str, Any]] = []
    failed: set[tuple[str, str]] = set()
    for (m, n, k, rotate), job in itertools.product(cases, args.jobs.split(",")):
        best: Best = {}
        for _, turn in itertools.product(range(args.rounds), turns):
            if job not in peers.ENGINES[turn.name].jobs or (turn.name, job) in failed or rotate and job not in FROM_MEMORY:
                continue
            reply = turn.ask("case", job=job, m=m, n=n, k=k, rotate=rotate, seconds=args.seconds)
            if "error" in reply or abs(reply["cosine"]) < 0.98:
                failed.add((turn.name, job))
                print(f"# {turn.name} {job}: left out: {reply.get('error', f'''cosine {reply.get('cosine')}''')[:300]}")
                continue
            peers.keep(best, (turn.name, job), {**reply, "value": 2e-9 * m * n * k / reply["seconds"]}, larger=True)
        rows += [harness.row(f"{name} {job}" + " from memory" * bool(rotate), threads, r["value"], "GOP/s", m=m, n=n, k=k,
                             ceiling=r["peak"], engine=name, job=job, gated=r["gated"], cosine=r["cosine"], rotate=rotate)
                 for (name, job), r in best.items()]
    return rows


def goals(rows: list[dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    """A row for each goal with its ratios: the geometric mean, the least, and what is wanted of them."""
    at = {(r["engine"], r["job"], r["m"], r["n"], r["k"], bool(r["rotate"])): r for r in rows if r["gated"]}
    found = []
    for goal in GOALS:
        ratios = []
        for (engine, job, *shape), ours in at.items():
            if engine != OURS or job != goal.ours or not goal.low <= shape[0] <= goal.high or shape[3] != goal.rotated:
                continue
            theirs = [at[(e, j, *shape)]["value"] for e, j in goal.theirs if (e, j, *shape) in at]
            ratios += [ours["value"] / max(theirs)] if theirs else []
        if ratios:
            found.append(harness.row(f"ratio {goal.name}", threads, statistics.geometric_mean(ratios), "x", least=min(ratios),
                                     shapes=len(ratios), goal=goal.must.get(threads), least_goal=goal.least))
    return found


def verdict(row: dict[str, Any]) -> str:
    """With a bar for the least, the mean has its own; without, every ratio must reach the bar."""
    if row["goal"] is None:
        return ""
    if row["least_goal"] is not None:
        return "met" if row["value"] >= row["goal"] and row["least"] >= row["least_goal"] else "missed"
    return "met" if row["least"] >= row["goal"] else "mean" if row["value"] >= row["goal"] else "missed"


def report(rows: list[dict[str, Any]], ratios: list[dict[str, Any]], threads: int) -> None:
    names = {r["engine"]: None for r in rows}
    at = {(r["engine"], r["job"], r["m"], r["n"], r["k"], r["rotate"]): r for r in rows}
    lines = []
    for job, *shape in dict.fromkeys((r["job"], r["m"], r["n"], r["k"], r["rotate"]) for r in rows):
        cells = [at.get((name, job, *shape)) for name in names]
        lines.append([f"{job} {','.join(map(str, shape[:3]))}" + " from memory" * bool(shape[3]),
                      *("" if r is None else harness.cell(r) + "~" * (not r["gated"]) for r in cells)])
    harness.print_table(f"GOP/s (percent of the peak), {threads}T; ~ too few clean slices", ["job m,n,k", *names], lines)
    harness.print_table(f"ours / theirs, {threads}T", ["goal", "geomean", "least", "must", "", "shapes"], [
        [r["name"].removeprefix("ratio "), f"{r['value']:.2f}", f"{r['least']:.2f}", must_of(r), verdict(r), str(r["shapes"])]
        for r in ratios])


def must_of(row: dict[str, Any]) -> str:
    return "" if row["goal"] is None else f"{row['goal']:g}" + (f"; {row['least_goal']:g}" if row["least_goal"] else "")


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=2, seconds=0.2)
    parser.add_argument("--engines", help="only engines whose name contains one of these, comma-separated (ours always)")
    parser.add_argument("--jobs", default=",".join(kernel_peers.JOBS))
    parser.add_argument("--shapes", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--quick", dest="shapes", action="store_const", const="quick", help="--shapes quick")
    args = parser.parse_args(argv)
    names = peers.engines_for("kernel", True, args.engines and f"{OURS},{args.engines}")
    for name, why in NO_DRIVER.items():
        print(f"# {name}: {why}")
    rows: list[dict[str, Any]] = []
    script = str(Path(kernel_peers.__file__))
    # Huge pages for everybody; NumPy only checks results, and its BLAS threads must not be mistaken for an engine's.
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OPENBLAS_NUM_THREADS": "1"}
    for threads in harness.thread_counts(args.threads):
        turns = peers.started((peers.Turn(name, peers.ENGINES[name].idle, threads, script, name, str(threads),
                                          **environment) for name in names), threads)
        for turn in turns:
            print(f"# {turn.name}: {turn.hello['version']}")
        these = measure(turns, cases_of(args.shapes), args, threads)
        for turn in turns:
            turn.close()
        ratios = goals(these, threads)
        report(these, ratios, threads)
        sys.stdout.flush()
        rows += these + ratios
    harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
