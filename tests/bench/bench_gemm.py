"""Matrix products of the linear layers as percent of the CPU's peak, measured in the same run.

Integer kinds refer to the peak of the level's exact u8 x s8 instructions (vpdpbusd, or vpmaddwd + vpaddd), float32 to
the peak of vfmadd231ps. Kinds: w8a8 (codes with zero points in, scales, bias, float32 out), w8a8+gelu, w8a8 f32-in (float32 rows quantized on the way in), w4a8 with groups of 128, 64 and 32, and float32. The small-batch Llama shapes
rotate over copies of the weights, so that these come from memory.

    python tests/bench/bench_gemm.py
    python tests/bench/bench_gemm.py --shapes bert --kinds w8a8,f32 --threads 1 --json out.json
"""
from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPES = {  # (n, k) of the linears, tokens
    "bert": (((768, 768), (3072, 768), (768, 3072)), (8, 128, 512, 2048)),
    "minilm": (((384, 384), (1152, 384), (1536, 384), (384, 1536)), (128, 512, 4096)),
    "llama": (((4096, 4096), (11008, 4096), (4096, 11008)), (16, 512)),
    "tiny": (((64, 64),), (8,)),
}
KINDS = ("w8a8", "w8a8+gelu", "w8a8 f32-in", "w4a8 g128", "w4a8 g64", "w4a8 g32", "f32")
GELU, TOKEN_ASYM = 2, 2
OUT_OF_CACHE = 96 << 20  # bytes of weights to rotate over
BIG = 1 << 23  # weights from this size on, with few tokens, are measured from memory


def make_handle(kind: str, n: int, k: int, rng: np.random.Generator) -> Any:
    """Packed random weights of one kind."""
    from zquant import _core

    bias = rng.normal(0, 1, n).astype(np.float32)
    if kind == "f32":
        return _core.linear_pack_f32(rng.normal(0, 0.05, (n, k)).astype(np.float32), bias)
    if kind.startswith("w4a8"):
        group = int(kind.rpartition("g")[2])
        codes = rng.integers(-7, 8, (n, k), dtype=np.int8)
        scales = rng.uniform(0.005, 0.01, (n, -(-k // group))).astype(np.float32)
        return _core.linear_pack_group(codes, scales, group, 4, bias)
    codes = rng.integers(-127, 128, (n, k), dtype=np.int8)
    return _core.linear_pack_s8(codes, rng.uniform(0.0005, 0.001, n).astype(np.float32), bias)


def make_work(kind: str, m: int, n: int, k: int, handles: list[Any], rng: np.random.Generator) -> Callable[[], Any]:
    """One call of linear_forward, the next copy of the weights each time."""
    from zquant import _core

    x: Any = rng.normal(0, 1, (m, k)).astype(np.float32)
    quant_in = TOKEN_ASYM if kind == "w8a8 f32-in" else 0
    if kind not in ("f32", "w8a8 f32-in"):
        x = _core.quantize_tokens(x, TOKEN_ASYM, True) if hasattr(_core, "quantize_tokens") else plain_codes(x)
    act = GELU if kind.endswith("gelu") else 0
    forward, turn = _core.linear_forward, itertools.cycle(handles)
    if len(handles) == 1:
        handle = handles[0]
        return lambda: forward(handle, x, quant_in, act, None, 0)
    return lambda: forward(next(turn), x, quant_in, act, None, 0)


def plain_codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per-token asymmetric codes in rows padded to 64, as the kernels take them."""
    m, k = x.shape
    lo, hi = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    scale = ((hi - lo) / 255).astype(np.float32)
    zero = np.rint(-lo / scale).astype(np.int32)
    rows = np.zeros((m, -(-k // 64) * 64), np.uint8)
    rows[:, :k] = np.clip(np.rint(x / scale[:, None]) + zero[:, None], 0, 255)
    return rows[:, :k], scale, zero


def make_cases(args: Any) -> list[harness.Case]:
    rng = np.random.default_rng(3)
    cases = []
    for group in args.shapes.split(","):
        linears, tokens = SHAPES[group]
        for (n, k), kind in itertools.product(linears, args.kinds.split(",")):
            handles = [make_handle(kind, n, k, rng)]
            for m in args.m or tokens:
                used = handles
                if m < 64 and n * k >= BIG:
                    from zquant import _core

                    copies = -(-OUT_OF_CACHE // _core.linear_bytes(handles[0]))
                    while len(handles) < copies:
                        handles.append(make_handle(kind, n, k, rng))
                elif len(handles) > 1:
                    used = handles[:1]
                cases.append(harness.Case(kind, make_work(kind, m, n, k, used, rng), 2.0 * m * n * k, m, n, k,
                                          "float" if kind == "f32" else "int8"))
    return cases


def summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Mean and worst percentage per kind and number of tokens."""
    lines = []
    for name, few in itertools.product(dict.fromkeys(r["name"] for r in rows), (True, False)):
        percents = [r["percent"] for r in rows if r["name"] == name and (r["m"] < 128) == few and r["percent"]]
        if percents:
            lines.append([name + (", m < 128" if few else ", m >= 128"), f"{np.mean(percents):.1f}",
                          f"{min(percents):.1f}", str(len(percents))])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="bert,minilm,llama")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--m", type=lambda t: [int(v) for v in t.split(",")], help="tokens, instead of each group's own")
    parser.add_argument("--isa", help="dispatch level; default: the best")
    args = parser.parse_args(argv)
    allowed = os.sched_getaffinity(0)
    from zquant import _core

    if args.isa:
        _core.use_level(args.isa)
    _core.set_threads(len(allowed))
    cases = make_cases(args)
    rows = []
    for threads in harness.thread_counts(args.threads):
        os.sched_setaffinity(0, allowed)
        gate = harness.Gate(threads, level=args.isa)
        if not gate.reachable:
            print(f"# {threads}T n/a: the host does not give {threads} full cores now")
            continue
        _core.set_threads(threads)
        if threads > 1:
            biggest = max(cases, key=lambda c: c.ops)
            gate.pin(biggest.work)
        for case in cases:
            case.samples.clear()
        harness.run_cases(gate, cases, args.rounds, args.seconds)
        these = harness.rows_of(gate, cases)
        print(f"\n# {threads}T: {_core.level()}, int8 peak {gate.peak['int8']:.0f} GOP/s, "
              f"float32 peak {gate.peak['float']:.0f} GFLOP/s")
        header, lines = harness.pivot(these)
        harness.print_table(f"GOP/s (percent of the peak), {threads} thread{'s' * (threads > 1)}", header, lines)
        harness.print_table("percent of the peak", ["kind", "mean", "worst", "shapes"], summary(these))
        faulty = [r for r in these if (r["faults"] or 0) > 16]
        if faulty:
            print(f"# page faults per call: {max(r['faults'] for r in faulty):.0f} at most, in {len(faulty)} cases")
        rows += these
    harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
