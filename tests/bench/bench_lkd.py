"""One training step of a block for layer-by-layer distillation: time and peak memory of TrainedBlock and of PyTorch.

    python tests/bench/bench_lkd.py                                  # ours and PyTorch's (where installed), 1 and 2 threads
    python tests/bench/bench_lkd.py --peer-python PATH --threads 1 --json FILE

A BERT-base block, 32 sequences of 128 tokens: forward and backward of the MSE loss with 4-bit weights (a scale per row) and
8-bit activations (a scale per token), gradients straight through, and AdamW. PyTorch's step is the same computation in eager
mode with scaled_dot_product_attention and fused AdamW. Each engine is a process of its own; they take turns, and the best step
of all rounds counts. The percentage is of the float32 FMA peak, for the products of the linear layers (three each; the gradient
by the block's input is not needed) and of attention (two forward, five back), whatever arithmetic an engine does them in: ours
does those of the forward pass on integer codes, so that 100 % is no limit.
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

SEQUENCES, LENGTH, WIDTH, INNER, HEADS = 32, 128, 768, 3072, 12
TINY = (2, 16, 32, 64, 2)
LR = 5e-6


def problem(sizes: tuple[int, ...]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Parameters of a block, its input, and what it is to give."""
    sequences, length, width, inner, _ = sizes
    rng = np.random.default_rng(0)
    rows = {"qkv": (3 * width, width), "o": (width, width), "up": (inner, width), "down": (width, inner)}
    tensors = {n: rng.standard_normal(d, np.float32) / np.float32(d[1] ** 0.5) for n, d in rows.items()}
    tensors |= {n + "_bias": np.zeros(d[0], np.float32) for n, d in rows.items()}
    for n in ("norm1", "norm2"):
        tensors |= {n: np.ones(width, np.float32), n + "_bias": np.zeros(width, np.float32)}
    x, target = rng.standard_normal((2, sequences * length, width), np.float32)
    return tensors, x, target


def operations(sizes: tuple[int, ...]) -> float:
    """2 x multiplications of a step."""
    sequences, length, width, inner, _ = sizes
    tokens = sequences * length
    linears = 3 * (4 * width * width + 2 * width * inner) - 3 * width * width
    return 2.0 * tokens * (linears + 7 * length * width)


def zquant_step(sizes: tuple[int, ...], threads: int) -> Callable[[], float]:
    import zquant as zq
    from zquant.ops.lkd import BlockShape, LinearSpec, TrainedBlock

    zq.set_num_threads(threads)
    sequences, length, width, inner, heads = sizes
    tensors, x, target = problem(sizes)
    spec = LinearSpec(4, activations="symmetric")
    block = TrainedBlock(BlockShape(width, heads, inner), tensors, dict.fromkeys(("qkv", "o", "up", "down"), spec))
    offsets = np.arange(0, sequences * length + 1, length)
    return lambda: block.step(x, target, offsets, LR)


def torch_step(sizes: tuple[int, ...], threads: int) -> Callable[[], float]:
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    sequences, length, width, _, heads = sizes
    arrays, x, target = problem(sizes)
    p = {n: torch.from_numpy(a).requires_grad_() for n, a in arrays.items()}
    x, target = (torch.from_numpy(a).view(sequences, length, width) for a in (x, target))
    optimizer = torch.optim.AdamW(p.values(), lr=LR, weight_decay=0.0, fused=True)

    class Fake(torch.autograd.Function):
        """Symmetric codes with a scale per row of the last axis, and back; the gradient passes."""

        @staticmethod
        def forward(ctx, v, top):
            scale = v.abs().amax(-1, keepdim=True) / top
            return (v / scale).round_().clamp_(-top, top).mul_(scale)

        @staticmethod
        def backward(ctx, dy):
            return dy, None

    def linear(name, v):
        return functional.linear(Fake.apply(v, 127.0), Fake.apply(p[name], 7.0), p[name + "_bias"])

    def norm(name, v):
        return functional.layer_norm(v, (width,), p[name], p[name + "_bias"], 1e-12)

    def step():
        optimizer.zero_grad()
        q, k, v = (a.view(sequences, length, heads, -1).transpose(1, 2) for a in linear("qkv", x).split(width, -1))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        h = norm("norm1", x + linear("o", attended))
        y = norm("norm2", h + linear("down", functional.gelu(linear("up", h))))
        loss = functional.mse_loss(y, target)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


ENGINES = {"zquant": zquant_step, "torch": torch_step}


def one(engine: str, sizes: tuple[int, ...], threads: int, repeat: int) -> dict[str, float]:
    step = ENGINES[engine](sizes, threads)
    losses, times = [step()], []
    for _ in range(repeat):
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": min(times), "peak_mib": peak, "first_loss": losses[0], "last_loss": losses[-1]}


def run(engine: str, python: str, threads: int, args: argparse.Namespace) -> dict[str, float] | None:
    """One process of an engine; None where it does not run."""
    command = [python, __file__, "--engine", engine, "--threads", str(threads), "--repeat", str(args.repeat),
               *(["--tiny"] if args.tiny else [])]
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        print(f"{engine}: not run ({(done.stderr.strip().splitlines() or ['?'])[-1]})")
        return None
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, help="this one, in this process; prints one line of JSON")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="steps per round, after one that is not timed")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--tiny", action="store_true", help="a small block (the smoke test)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    sizes = TINY if args.tiny else (SEQUENCES, LENGTH, WIDTH, INNER, HEADS)
    if args.engine:
        print(json.dumps(one(args.engine, sizes, int(args.threads), args.repeat)))
        return
    import harness
    from ceilings import Ceilings

    cpus, rows = sorted(os.sched_getaffinity(0)), []
    for threads in (int(t) for t in args.threads.split(",")):
        ceilings = Ceilings(cpus[:threads])
        peak = ceilings.best(ceilings.float_kind, threads)
        best: dict[str, dict[str, float]] = {}
        for _ in range(args.rounds):
            for engine in ENGINES:
                python = args.peer_python if engine == "torch" else sys.executable
                r = run(engine, python, threads, args)
                if r and (engine not in best or r["seconds"] < best[engine]["seconds"]):
                    best[engine] = r
        for engine, r in best.items():
            rate = operations(sizes) / r["seconds"] / 1e9
            rows.append(harness.row(engine, threads, rate, "GFLOP/s", ceiling=peak or None, **r))
            percent = f" ({rows[-1]['percent']:.0f} % of the FMA peak's rate)" if peak else ""
            print(f"{threads}T {engine:<7} {1e3 * r['seconds']:8.1f} ms a step, {rows[-1]['value']:.0f} GFLOP/s{percent}, "
                  f"peak memory {r['peak_mib']:.0f} MiB, loss {r['first_loss']:.6f} -> {r['last_loss']:.6f}")
        if len(best) == 2:
            print(f"{threads}T zquant is {best['torch']['seconds'] / best['zquant']['seconds']:.2f} times as fast")
    harness.write_json(args.json, rows)


if __name__ == "__main__":
    main()
