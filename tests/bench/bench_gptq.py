"""GPTQ of one layer: time and peak memory of zq.gptq, of the usual loop in PyTorch and of the NumPy reference.

    python tests/bench/bench_gptq.py                          # ours and PyTorch's (where installed), 4096x4096 and 4096x11008
    python tests/bench/bench_gptq.py --engine zquant --shape 4096x4096 --threads 1
    python tests/bench/bench_gptq.py --engine numpy --shape 1024x1024

4 bits, groups of 128, symmetric, columns by falling diagonal, float32 weights, the Hessian given. Every run is a process of
its own; what is timed is the best of `--repeat` calls. The floor is the products that GPTQ cannot do without at the float32
FMA peak, n k^2 for the columns, plus k^3 / 3 for the Cholesky factor at half of that (float64).
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

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
    sys.path.insert(0, str(Path(__file__).parent))
    from ceilings import Ceilings

    ceilings = Ceilings(sorted(os.sched_getaffinity(0))[:threads])
    return ceilings.best(ceilings.float_kind, threads)  # in 1e9 a second


def one(engine: str, n: int, k: int, threads: int, repeat: int, compare: bool) -> dict[str, float]:
    if engine == "torch":
        import torch

        torch.set_num_threads(threads)
    if engine == "zquant":
        import zquant as zq

        zq.set_num_threads(threads)
    w, hessian = problem(n, k)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        w_hat, _ = ENGINES[engine](w, hessian, compare)
        best = min(best, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    d = w[:64] - w_hat[:64].astype(np.float32)
    return {"seconds": best, "extra_mib": (peak - before) / 1024, "loss64": float(np.einsum("ij,ij->", d @ hessian, d))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--shape", action="append", help="NxK; default 4096x4096 and 4096x11008")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-compare", action="store_true", help="ours without round to nearest, as the loop has none")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--json", action="store_true", help="one engine, one shape, one line")
    parser.add_argument("--peak", type=float, help="float32 FMA peak in GFLOP/s, measured before")
    args = parser.parse_args()
    shapes = [tuple(int(x) for x in s.split("x")) for s in args.shape or ("4096x4096", "4096x11008")]
    if args.json:
        print(json.dumps(one(args.engine, *shapes[0], args.threads, args.repeat, not args.no_compare)))
        return
    peak = args.peak or peak_gflops(args.threads)
    print(f"{args.threads} threads, float32 FMA peak {peak:.0f} GFLOP/s")
    for n, k in shapes:
        floor = (n * k**2 + 2 * k**3 / 3) / peak / 1e9
        for engine in [args.engine] if args.engine else ["zquant", "torch"]:
            python = args.peer_python if engine == "torch" else sys.executable
            command = [python, __file__, "--json", "--engine", engine, "--shape", f"{n}x{k}", "--threads", str(args.threads),
                       "--repeat", str(args.repeat), *(["--no-compare"] if args.no_compare else [])]
            threads = {v: str(args.threads) for v in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
            if done.returncode:
                print(f"{n}x{k} {engine}: not run ({(done.stderr.strip().splitlines() or ['?'])[-1]})")
                continue
            r = json.loads(done.stdout)
            print(f"{n}x{k} {engine}: {r['seconds']:.2f} s, {100 * floor / r['seconds']:.0f} % of the floor's speed, "
                  f"{r['extra_mib']:.0f} MiB above the inputs, loss of 64 rows {r['loss64']:.5g}")


if __name__ == "__main__":
    main()
