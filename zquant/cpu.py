"""What this CPU offers and what runs: dispatch levels, kernels, threads, BLAS."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import _core

__all__ = ["CPUInfo", "info", "use"]


@dataclass(frozen=True)
class CPUInfo:
    """The state of dispatch at one moment; see :func:`info`."""

    active: str
    available: tuple[str, ...]
    threads: int
    blas_core: str
    blas_config: str = field(repr=False)
    kernels: dict[str, str] = field(repr=False)


def info() -> CPUInfo:
    """Dispatch level in use, levels available, threads, and the kernel set that OpenBLAS chose.

    ``kernels`` maps each kernel to the level whose code serves it (a level inherits what it does not override).
    ``ZQUANT_ISA=ref|avx2|avxvnni|avx512vnni|amx`` in the environment caps the level at import: the best level of this CPU
    that is not above it runs. Levels are not nested: a CPU may have AVX-512 VNNI but not the 256-bit ``avxvnni`` (Zen 4),
    where ``ZQUANT_ISA=avxvnni`` therefore means ``avx2``. For ``amx``, Linux has to grant the process tile registers,
    which importing zquant asks for: signal stacks (``sigaltstack``) must then have room for them, so that a program whose
    native code sets up small ones may want ``ZQUANT_ISA=avx512vnni``.

    >>> import zquant as zq
    >>> zq.cpu.info().active in zq.cpu.info().available
    True
    """
    core, config = _core.blas()
    return CPUInfo(_core.level(), tuple(_core.levels()), _core.threads(), core, config, _core.kernels())


@contextmanager
def use(level: str) -> Iterator[None]:
    """Run the body at another dispatch level (process-wide; meant for tests and comparisons).

    Parameters
    ----------
    level
        One of ``info().available``; anything else is a ValueError that lists them.

    >>> import zquant as zq
    >>> with zq.cpu.use("ref"):
    ...     zq.cpu.info().active
    'ref'
    """
    before = _core.level()
    _core.use_level(level)
    try:
        yield
    finally:
        _core.use_level(before)
