"""GPTQ of one layer: time and peak memory of zq.gptq, of the usual loop in PyTorch and of the NumPy reference.

    python tests/bench/bench_gptq.py --peer-python PYTHON_WITH_TORCH --json FILE
    python tests/bench/bench_gptq.py --engine zquant --shape 4096x4096 --threads 1

4 bits, groups of 128, symmetric, columns by falling diagonal, float32 weights, the Hessian given. Every run is a process of
its own; what is timed is the best of `--repeat` calls. The floor is the products that GPTQ cannot do without at the float32
FMA peak, n k^2 for the columns, plus k^3 / 3 for the Cholesky factor at half of that (float64).

The columns alone are bound by FMA, not by caches: a tile of 12 columns and 32 rows reads 176 bytes for each 384 multiply-adds,
11 bytes a cycle at two FMA of 16 lanes, where L2 gives 64. Their share of the FMA peak is therefore printed by itself.
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import harness
import numpy as np

BITS, GROUP, DAMPING, BLOCK = 4, 128, 0.01, 128


def problem(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and a Hessian with a spread spectrum: k / 8 directions over noise."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((k // 8, k), np.float32) * rng.exponential(1, (1, k)).astype(np.float32)
    hessian = mix.T @ mix / np.float32(k // 8)
    hessian[np.diag_indices(k)] += np.float32(0.1)
    return rng.standard_normal((n, k), np.float32), hessian


def run_zquant(w, hessian, compare):
    import zquant as zq

    tensor, info = zq.gptq(w, hessian, BITS, GROUP, damping=DAMPING, block=BLOCK, compare=compare)
    return tensor.dequantize(), info


def run_numpy(w, hessian, compare):
    from zquant.reference import gptq

    codes, scales, _, _, _, _ = gptq.gptq(w, hessian, BITS, GROUP, damping=DAMPING, block=BLOCK)
    return codes * scales[:, np.arange(w.shape[1]) // GROUP], None


def run_torch(w, hessian, compare):
    """The algorithm as published: Cholesky, inverse, Cholesky of that, blocks of 128, one column at a time."""
    import torch

    w, h = torch.from_numpy(w).clone(), torch.from_numpy(hessian).clone()
    n, k = w.shape
    scale = w.reshape(n, k // GROUP, GROUP).abs().amax(2) / 7
    order = torch.argsort(torch.diag(h), descending=True, stable=True)
    w, h = w[:, order], h[order][:, order]
    h[range(k), range(k)] += DAMPING * torch.diag(h).mean()
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    out = torch.zeros_like(w)
    for i1 in range(0, k, BLOCK):
        i2 = min(i1 + BLOCK, k)
        w1, e1, u1 = w[:, i1:i2].clone(), torch.zeros(n, i2 - i1), u[i1:i2, i1:i2]
        for i in range(i2 - i1):
            s = scale[:, order[i1 + i] // GROUP]
            q = torch.clamp(torch.round(w1[:, i] / s), -7, 7) * s
            out[:, i1 + i] = q
            e1[:, i] = (w1[:, i] - q) / u1[i, i]
            w1[:, i:] -= e1[:, i : i + 1] @ u1[i : i + 1, i:]
        w[:, i2:] -= e1 @ u[i1:i2, i2:]
    return out[:, torch.argsort(order)].numpy(), None


ENGINES = {"zquant": run_zquant, "torch": run_torch, "numpy": run_numpy}


def peak_gflops(threads: int) -> float:
    """The float32 FMA peak, by the harness's kernels."""
    from ceilings import Ceilings

    ceilings = Ceilings(sorted(os.sched_getaffinity(0))[:threads])
    return ceilings.best(ceilings.float_kind, threads)  # in 1e9 a second


def best_of(repeat: int, engine: str, *problem: Any) -> tuple[float, np.ndarray]:
    """Seconds of the fastest call, and its result."""
    best, w_hat = float("inf"), np.empty(0)
    for _ in range(repeat):
        start = time.perf_counter()
        w_hat, _ = ENGINES[engine](*problem)
        best = min(best, time.perf_counter() - start)
    return best, w_hat


def one(engine: str, n: int, k: int, threads: int, repeat: int, compare: bool) -> dict[str, Any]:
    """One engine on one shape, in this process."""
    if engine == "torch":
        import torch

        torch.set_num_threads(threads)
    if engine == "zquant":
        import zquant as zq

        zq.set_num_threads(threads)
    w, hessian = problem(n, k)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, w_hat = best_of(repeat, engine, w, hessian, compare)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    d = w[:64] - w_hat[:64].astype(np.float32)
    found: dict[str, Any] = {"seconds": seconds, "extra_mib": (peak - before) / 1024,
                             "loss64": float(np.einsum("ij,ij->", d @ hessian, d))}
    if engine == "zquant":
        # What all rows cost beyond the fewest that keep the threads busy is the columns; the rest is the factorisation.
        few = 32 * threads
        all_rows, factor = (best_of(repeat, engine, rows, hessian, False)[0] for rows in (w, w[:few]))
        found |= {"factor_seconds": factor, "columns_seconds": (all_rows - factor) * n / (n - few),
                  "blas": zq.cpu.info().blas_core}
    return found


def child(python: str, engine: str, n: int, k: int, threads: int, args: argparse.Namespace) -> dict[str, Any] | str:
    """One engine on one shape, in a process of its own; or why there is nothing to tell."""
    command = [python, __file__, "--one", "--engine", engine, "--shape", f"{n}x{k}", "--threads", str(threads),
               "--repeat", str(args.repeat), *(["--no-compare"] if args.no_compare else [])]
    kept = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}  # as zquant chooses by itself
    limits = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **limits})
    if done.returncode:
        return f"not run ({(done.stderr.strip().splitlines() or ['?'])[-1]})"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def describe(engine: str, n: int, k: int, threads: int, peak: float, r: dict[str, Any]) -> list[dict[str, Any]]:
    """Print a result, and make it the records of --json."""
    floor = (n * k**2 + 2 * k**3 / 3) / peak / 1e9
    print(f"{n}x{k} {threads}T {engine}: {r['seconds']:.2f} s, {100 * floor / r['seconds']:.0f} % of the floor's speed, "
          f"{r['extra_mib']:.0f} MiB above the inputs, loss of 64 rows {r['loss64']:.5g}")
    shape = {"m": 0, "n": n, "k": k}
    rows = [harness.row(f"gptq {engine}", threads, r["seconds"], "s", **shape, extra_mib=round(r["extra_mib"]),
                        floor=floor, loss64=r["loss64"])]
    if engine == "zquant":
        gflops = n * k**2 / max(r["columns_seconds"], 1e-9) / 1e9
        print(f"    factor {r['factor_seconds']:.2f} s (OpenBLAS for {r['blas']}); columns {r['columns_seconds']:.2f} s, "
              f"{100 * gflops / peak:.0f} % of the FMA peak")
        rows.append(harness.row("gptq columns", threads, gflops, "GOP/s", **shape, ceiling=peak))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: all; numpy up to 4096 columns")
    parser.add_argument("--shape", action="append", help="NxK; default 4096x4096 and 4096x11008")
    parser.add_argument("--threads", type=int, action="append", help="default: 1, and all CPUs")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-compare", action="store_true", help="ours without round to nearest, as the loop has none")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", action="store_true", help="one engine, one shape, here and now; prints a line of JSON")
    args = parser.parse_args()
    shapes = [tuple(int(x) for x in s.split("x")) for s in args.shape or ("4096x4096", "4096x11008")]
    counts = args.threads or sorted({1, len(os.sched_getaffinity(0))})
    if args.one:
        print(json.dumps(one(args.engine[0], *shapes[0], counts[0], args.repeat, not args.no_compare)))
        return 0
    rows: list[dict[str, Any]] = []
    try:
        for threads in counts:
            peak = peak_gflops(threads)
            print(f"{threads} threads, float32 FMA peak {peak:.0f} GFLOP/s", flush=True)
            for n, k in shapes:
                for engine in args.engine or [e for e in ENGINES if e != "numpy" or k <= 4096]:
                    r = child(args.peer_python if engine == "torch" else sys.executable, engine, n, k, threads, args)
                    if isinstance(r, str):
                        print(f"{n}x{k} {threads}T {engine}: {r}")
                    else:
                        rows += describe(engine, n, k, threads, peak, r)
    except KeyboardInterrupt:
        print("interrupted; what was measured stays", file=sys.stderr)
        return 130
    finally:
        harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
