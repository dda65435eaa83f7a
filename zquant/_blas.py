"""Which kernels OpenBLAS picks, corrected where that is still possible.

OpenBLAS 0.3.21 (Debian 12) and 0.3.34 do not know AMD family 26 (Zen 5) and fall back to their AVX2 kernels, at 42 % of
the float32 peak instead of 80 %. The choice is made once, when the library is loaded, and ``OPENBLAS_CORETYPE`` decides
it; :func:`core_hint` sets that for the moment in which ``zquant._core`` loads its OpenBLAS, unless the user has set it.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["core_hint", "better_core"]

_VARIABLE = "OPENBLAS_CORETYPE"


def better_core(cpuinfo: str) -> str | None:
    """The core type to ask for on the CPU that ``cpuinfo`` (the text of /proc/cpuinfo) describes, or None.

    >>> better_core("vendor_id : AuthenticAMD\\ncpu family : 26\\nflags : avx2 avx512bw avx512vl\\n")
    'SkylakeX'
    >>> better_core("vendor_id : GenuineIntel\\ncpu family : 6\\nflags : avx2 avx512bw avx512vl\\n") is None
    True
    """
    fields = {}
    for line in cpuinfo.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    family = fields.get("cpu family", "")
    new_amd = fields.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= 26
    flags = fields.get("flags", "").split()
    return "SkylakeX" if new_amd and "avx512bw" in flags and "avx512vl" in flags else None


@contextmanager
def core_hint() -> Iterator[None]:
    """Set OPENBLAS_CORETYPE while the body loads OpenBLAS; the environment is as before afterwards."""
    core = None
    if _VARIABLE not in os.environ:
        try:
            with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
                core = better_core(f.read(8192))
        except OSError:
            pass
    if core is None:
        yield
        return
    os.environ[_VARIABLE] = core
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
