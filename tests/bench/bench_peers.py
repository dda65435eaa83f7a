"""Linear layers beside other engines' on the same shapes, turn by turn, with the ratios that are goals.

Engines: PyTorch with FBGEMM and with oneDNN, ONNX Runtime, OpenVINO, ggml (llama.cpp), each in its own process (see
kernel_peers.py for what a job includes); those that are not installed are listed. Weights have the bytes of the same random
numbers; the cosine of every result to the exact product is checked. One row and 16 rows with a Llama's weights rotate over
copies that no cache holds together (harness.out_of_cache_bytes(); --quick: 256 MiB). A percentage is of the peak of the int8
(f32: float32) instructions. Goals are those of the design's section 7; ratios without one are there to be quoted.
Ratios are of the best gated times of all rounds, ours above theirs: codes in are compared with codes in, float32 in with
float32 in. CTranslate2 has no linear layer of its own to call: bench_encoder.py --peers has it as a whole model. With two
threads there is no time while the host runs both on one core.

    python tests/bench/bench_peers.py --quick
    python tests/bench/bench_peers.py --engines ggml,torch --jobs "int8,int8 dynamic" --threads 1 --json out.json
"""
from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import harness
import kernel_peers
import linears
import peers

OURS = "zquant-kernel"
NO_DRIVER = {"ctranslate2": "no linear layer to call by itself; see bench_encoder.py --peers",
             "XNNPACK, AOCL, ik_llama.cpp": "no driver for them here"}
LEAST_COSINE = 0.98  # a result of the wrong sign is wrong, too
# Of jobs with weights from memory, by rows: decoding's, and what G7 says of 16 rows.
FROM_MEMORY = {1: ("int8 dynamic", "w4 g64", "w4 g32", "w4 q4_k"), 16: ("int8", "w4 g128")}


class Case(NamedTuple):
    m: int
    n: int
    k: int
    rotate: int = 0  # bytes of weights to rotate over
    sort: str = ""  # whose ratios are kept apart: "minilm", "ragged"

    def has(self, job: str) -> bool:
        return not self.rotate or job in FROM_MEMORY[self.m]


def cases_of(name: str, rotate: int) -> list[Case]:
    """tiny: smoke test. quick: one size of each sort, of BERT-base with 512 rows all three linears. full: BERT-base with 1, 8,
    128, 512 and 2048 rows, the 7B Llama's with 512 and, from memory, 1 and 16, MiniLM's with 512, the ragged ones."""
    if name == "tiny":
        return [Case(8, 64, 256)]
    quick = name == "quick"
    hot = [Case(m, n, k) for m in (1, 8) for n, k in linears.BERT]
    few = [Case(m, n, k, rotate) for m in (1, 16) for n, k in linears.LLAMA[: 1 if quick else 3]]
    small = [Case(512, n, k, sort="minilm") for n, k in linears.MINILM[2 if quick else 0:]]
    odd = [Case(m, n, k, sort="ragged") for n, k in linears.RAGGED for m in linears.ragged_rows(n, k, 5e7)[quick:]]
    if quick:
        return [*hot[:1], *hot[3:4], *(Case(512, n, k) for n, k in linears.BERT), *small, *odd, *few]
    many = [Case(m, n, k) for m in (128, 512, 2048) for n, k in linears.BERT]
    return [*hot, *many, *(Case(512, n, k) for n, k in linears.LLAMA), *small, *dict.fromkeys(odd), *few]


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
    sort: str = ""  # as Case's

    def covers(self, row: dict[str, Any]) -> bool:
        """Whether a row's shape is one that the goal is for."""
        return self.low <= row["m"] <= self.high and bool(row["rotate"]) == self.rotated and row.get("sort", "") == self.sort


def against(*names: str, job: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, job) for name in names)


BOTH = {1: 1.0, 2: 1.0}
FLOAT = ("torch fbgemm", "onnxruntime op", "openvino op", "ggml op")
INT8 = ("torch fbgemm", "torch onednn", "onnxruntime op", "openvino op", "ggml op")
GOALS = (
    Goal("G1b oneDNN (torch), codes in", "int8", against("torch onednn", job="int8"), BOTH, 128, 4096, 0.95),
    Goal("G1b oneDNN (openvino), float32 in", "int8 dynamic", against("openvino op", job="int8 dynamic"), BOTH, 128, 4096,
         0.95),
    Goal("G1c FBGEMM (torch), float32 in", "int8 dynamic", against("torch fbgemm", job="int8 dynamic"), {1: 1.07, 2: 1.07}, 128,
         4096),
    Goal("G1c llama.cpp q8_0", "int8 dynamic", against("ggml op", job="int8 dynamic"), {1: 4.0, 2: 4.0}, 128, 4096),
    Goal("onnxruntime, codes in", "int8", against("onnxruntime op", job="int8"), {}, 128, 4096),
    Goal("onnxruntime, float32 in", "int8 dynamic", against("onnxruntime op", job="int8 dynamic"), {}, 128, 4096),
    Goal("G2 oneDNN (torch), GELU, codes in", "int8 gelu", against("torch onednn", job="int8 gelu"), {1: 1.05, 2: 1.05}, 128,
         4096),
    Goal("G3 oneDNN (torch), m = 8", "int8", against("torch onednn", job="int8"), {1: 1.08, 2: 1.08}, 8, 8),
    Goal("G4b llama.cpp q4_0", "w4 g32", against("ggml op", job="w4 g32"), {1: 2.8, 2: 2.8}, 8, 4096),
    *(Goal(f"W4 {g} onnxruntime, openvino", f"w4 {g}", against("onnxruntime op", "openvino op", job=f"w4 {g}"), {}, 8, 4096)
      for g in ("g128", "g64", "g32")),
    Goal("G5b llama.cpp q4_0, q4_K", "w4 g64", (("ggml op", "w4 g32"), ("ggml op", "w4 q4_k")), {1: 1.25, 2: 1.05}, 1, 1,
         rotated=True),
    Goal("G6 oneDNN (torch), m = 1 in cache", "int8", against("torch onednn", job="int8"), {1: 1.3, 2: 1.3}, 1, 1),
    Goal("G7 oneDNN (torch), Llama m = 16 from memory", "int8", against("torch onednn", job="int8"), {1: 1.2, 2: 1.2}, 16, 16,
         rotated=True),
    Goal("W4 g128 onnxruntime, openvino, Llama m = 16 from memory", "w4 g128",
         against("onnxruntime op", "openvino op", job="w4 g128"), {}, 16, 16, rotated=True),
    *(Goal(f"{title}, {of} in", job, against(*engines, job=job), {}, 8, 4096, sort=sort)
      for sort, title in (("minilm", "MiniLM best int8"), ("ragged", "ragged best int8"))
      for job, of, engines in (("int8", "codes", ("torch onednn", "onnxruntime op")), ("int8 dynamic", "float32", INT8))),
    Goal("best float32", "f32", against(*FLOAT, job="f32"), {}, 8, 4096),
)

Best = dict[tuple[str, str], dict[str, Any]]


def measure(turns: list[peers.Turn], cases: list[Case], args: Any, threads: int) -> list[dict[str, Any]]:
    """Rounds of turns for each job and shape."""
    rows: list[dict[str, Any]] = []
    failed: set[tuple[str, str]] = set()
    for case, job in itertools.product(cases, args.jobs.split(",")):
        best: Best = {}
        for _, turn in itertools.product(range(args.rounds), turns):
            if not case.has(job) or not peers.ENGINES[turn.name].takes(job, case.k) or (turn.name, job) in failed:
                continue
            reply = turn.ask("case", job=job, seconds=args.seconds, m=case.m, n=case.n, k=case.k, rotate=case.rotate)
            if wrong(reply):
                failed.add((turn.name, job))
                print(f"# {turn.name} {job}: left out: {wrong(reply)}")
                continue
            peers.keep(best, (turn.name, job), timed(reply, case), larger=True)
        rows += [row_of(case, name, job, threads, reply) for (name, job), reply in best.items()]
    return rows


def row_of(case: Case, engine: str, job: str, threads: int, reply: dict[str, Any]) -> dict[str, Any]:
    more = {} if reply["value"] else {"why": harness.NOT_ALL_CORES}
    return harness.row(f"{engine} {job}" + " from memory" * bool(case.rotate), threads, reply["value"], "GOP/s",
                       m=case.m, n=case.n, k=case.k, ceiling=reply["peak"], engine=engine, job=job, gated=reply["gated"],
                       cosine=reply["cosine"], rotate=case.rotate, sort=case.sort, **more)


def wrong(reply: dict[str, Any]) -> str:
    """What is wrong with an engine's reply; empty if nothing is."""
    if "error" in reply:
        return str(reply["error"])[:300]
    return "" if reply["cosine"] >= LEAST_COSINE else f"cosine {reply['cosine']}"


def timed(reply: dict[str, Any], case: Case) -> dict[str, Any]:
    """With its speed; there is none where the host did not give all cores, and any other round replaces it."""
    if "unreached" in reply:
        return {**reply, "value": None, "gated": False, "peak": None}
    return {**reply, "value": 2e-9 * case.m * case.n * case.k / reply["seconds"]}


def goals(rows: list[dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    """A row for each goal with its ratios: the geometric mean, the least, and what is wanted of them."""
    found = []
    for goal in GOALS:
        speeds = [{shape_of(r): r["value"] for r in rows if r["gated"] and (r["engine"], r["job"]) == side and goal.covers(r)}
                  for side in ((OURS, goal.ours), *goal.theirs)]
        best = {shape: max(each[shape] for each in speeds[1:] if shape in each) for shape in set().union(*speeds[1:])}
        ratios = [value / best[shape] for shape, value in speeds[0].items() if shape in best]
        if ratios:
            found.append(harness.row(f"ratio {goal.name}", threads, statistics.geometric_mean(ratios), "x", least=min(ratios),
                                     shapes=len(ratios), goal=goal.must.get(threads), least_goal=goal.least))
    return found


def shape_of(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["m"], row["n"], row["k"]


def unknown(rows: list[dict[str, Any]], ratios: list[dict[str, Any]], threads: int) -> Iterable[tuple[Goal, str]]:
    """Goals without a ratio, and why."""
    known = {r["name"] for r in ratios}
    for goal in GOALS:
        if f"ratio {goal.name}" in known or threads not in goal.must:
            continue
        ours, theirs = ([r for r in rows if goal.covers(r) and (r["engine"], r["job"]) in sides]
                        for sides in ({(OURS, goal.ours)}, set(goal.theirs)))
        reasons = [r["why"] for r in (*ours, *theirs) if "why" in r]
        yield goal, (reasons or [harness.FEW_SLICES])[0] if ours and theirs else "not in this run"


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
        marks = ["~" * (r is not None and r["value"] is not None and not r["gated"]) for r in cells]
        lines.append([f"{job} {','.join(map(str, shape[:3]))}" + " from memory" * bool(shape[3]),
                      *("" if r is None else harness.cell(r) + mark for r, mark in zip(cells, marks))])
    harness.print_table(f"GOP/s (percent of the peak), {threads}T; ~ too few clean slices", ["job m,n,k", *names], lines)
    harness.print_table(f"ours / theirs, {threads}T", ["goal", "geomean", "least", "must", "", "shapes"], [
        *([r["name"].removeprefix("ratio "), f"{r['value']:.2f}", f"{r['least']:.2f}", must_of(r), verdict(r), str(r["shapes"])]
          for r in ratios),
        *([goal.name, "n/a", "n/a", must_of({"goal": goal.must[threads], "least_goal": goal.least}), f"n/a: {why}", "0"]
          for goal, why in unknown(rows, ratios, threads))])


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
    most = harness.MOST_OUT_OF_CACHE if args.shapes == "full" else harness.LEAST_OUT_OF_CACHE
    rotate = harness.out_of_cache_bytes(len(names), most)
    print(f"# from memory: {rotate >> 20} MiB of weights (third-level cache: {harness.third_level_bytes() >> 20} MiB)")
    script = str(Path(kernel_peers.__file__))
    # Huge pages for everybody; NumPy only checks results, and its BLAS threads must not be mistaken for an engine's.
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OPENBLAS_NUM_THREADS": "1"}
    for threads in harness.thread_counts(args.threads):
        turns = peers.started((peers.Turn(name, peers.ENGINES[name].idle, threads, script, name, str(threads),
                                          **environment) for name in names), threads)
        for turn in turns:
            print(f"# {turn.name}: {turn.hello['version']}")
        these = measure(turns, cases_of(args.shapes, rotate), args, threads)
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
