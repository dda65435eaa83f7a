"""Instruction and bandwidth ceilings of this CPU, measured by ceilings.c.

Run by itself it prints them; the benchmarks import :class:`Ceilings` for the peak of their own run.
"""
from __future__ import annotations

import ctypes
import os
import sys

import native

# As in ceilings.c; where the end of a group counts, one kind for each size of groups.
GROUPS = (128, 64, 32)
VNNI, FMA512, SIGNS256, FMA256 = range(4)
NIBBLES256, VNNI256, VNNI256_GROUPS, TILES = range(4, 7), 7, range(8, 11), 11
GROUP_END = "cvt + fma every"
KIND_NAMES = {
    VNNI: "vpdpbusd zmm (u8 x s8)",
    FMA512: "vfmadd231ps zmm",
    SIGNS256: "vpsignb + vpmaddubsw + vpmaddwd + vpaddd ymm (exact u8 x s8 on AVX2)",
    FMA256: "vfmadd231ps ymm",
    VNNI256: "vpdpbusd ymm (u8 x s8, AVX-VNNI)",
    TILES: "tdpbusd (u8 x s8, AMX)",
    **{kind: f"vpmaddubsw + vpaddw ymm, vpmaddwd + vpaddd every 32 k, {GROUP_END} {group} k"
       for kind, group in zip(NIBBLES256, GROUPS)},
    **{kind: f"vpdpbusd ymm, {GROUP_END} {group} k" for kind, group in zip(VNNI256_GROUPS, GROUPS)},
}
SLICE = 0.2e-3


class Ceilings:
    """The library, with its helper threads pinned to ``cpus[1:]``.

    Parameters
    ----------
    cpus
        One CPU per thread, distinct; the calling thread belongs on the first. Default: the process's affinity mask.
    """

    def __init__(self, cpus: list[int] | None = None) -> None:
        lib = native.library("ceilings.c")
        lib.zqb_peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
        lib.zqb_peak.restype = ctypes.c_double
        lib.zqb_runs.argtypes = [ctypes.c_int]
        lib.zqb_read.argtypes = [ctypes.c_size_t, ctypes.c_long, ctypes.c_int]
        lib.zqb_read.restype = ctypes.c_double
        lib.zqb_read_part.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        lib.zqb_read_part.restype = ctypes.c_double
        self._lib = lib
        self.cpus = sorted(os.sched_getaffinity(0)) if cpus is None else list(cpus)
        self.isa = lib.zqb_isa()
        array = (ctypes.c_int * len(self.cpus))(*self.cpus)
        if lib.zqb_team(array, len(self.cpus)) != 0:
            raise RuntimeError(f"cannot start {len(self.cpus)} threads")

    @property
    def int8_kind(self) -> int:
        """The instructions that bound exact integer products here; -1 without AVX2."""
        return self._first(VNNI, VNNI256, SIGNS256)

    @property
    def float_kind(self) -> int:
        return self._first(FMA512, FMA256)

    def _first(self, *kinds: int) -> int:
        return next((kind for kind in kinds if kind in self.kinds()), -1)

    def kinds(self) -> list[int]:
        return [kind for kind in KIND_NAMES if self._lib.zqb_runs(kind)]

    def peak(self, kind: int, threads: int = 1, seconds: float = SLICE) -> float:
        """One slice: 1e9 operations a second, summed over the threads."""
        return float(self._lib.zqb_peak(kind, threads, seconds))

    def best(self, kind: int, threads: int = 1, slices: int = 400) -> float:
        """What the fastest slices reach: the third fastest, as one lucky clock reading is not a peak."""
        if kind < 0:
            return 0.0
        return sorted(self.peak(kind, threads) for _ in range(max(slices, 3)))[-3]

    def read(self, bytes_per_thread: int, threads: int = 1, repeats: int = 9) -> float:
        """Best read bandwidth of `repeats` in GB/s, summed over the threads, huge pages."""
        passes = max(1, (64 << 20) // bytes_per_thread)
        self._lib.zqb_read(bytes_per_thread, 1, threads)  # first touch
        return max(float(self._lib.zqb_read(bytes_per_thread, passes, threads)) for _ in range(repeats))

    def read_again(self, bytes_per_thread: int, passes: int, threads: int = 1) -> float:
        """GB/s of reading as many bytes per thread (a multiple of 256) so often, summed over the threads."""
        return float(self._lib.zqb_read(bytes_per_thread, passes, threads))

    def read_part(self, bytes_per_thread: int, start: int, part: int, threads: int = 1) -> float:
        """GB/s of reading ``part`` bytes per thread once, from ``start`` on; multiples of 256."""
        return float(self._lib.zqb_read_part(bytes_per_thread, start, part, threads))


SIZES = (("L1 16 KiB", 16 << 10), ("L2 512 KiB", 512 << 10), ("L3 4 MiB", 4 << 20))  # per thread


def main(argv: list[str] | None = None) -> int:
    import argparse

    import harness

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="few slices and no DRAM sweep (the smoke test)")
    args = parser.parse_args(argv)
    ceilings = Ceilings()
    os.sched_setaffinity(0, {ceilings.cpus[0]})
    rows = []
    if not ceilings.kinds():
        print("neither AVX2 nor AVX-512 VNNI: no ceilings are defined for this CPU")
    size = harness.out_of_cache_bytes()
    print(f"out of cache: {size >> 20} MiB, third-level cache: {harness.third_level_bytes() >> 20} MiB")
    for threads in dict.fromkeys((1, len(ceilings.cpus))):
        for kind in ceilings.kinds():
            value = ceilings.best(kind, threads, 20 if args.quick else 400)
            rows.append(harness.row(KIND_NAMES[kind], threads, value, "GOP/s"))
        for name, part in SIZES[:2] if args.quick else harness.read_sizes(size, threads):
            rows.append(harness.row("read " + name, threads, ceilings.read(part, threads), "GB/s"))
    for r in rows:
        print(f"{r['name']:<78} {r['threads']}T {r['value']:9.1f} {r['unit']}")
    harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
