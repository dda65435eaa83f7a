"""What a long run may use: memory, a directory for what is finished, an executor."""
from __future__ import annotations

import os
from concurrent.futures import Executor
from dataclasses import dataclass

from .checks import as_count

__all__ = ["MEMORY", "Resources"]

MEMORY = 1 << 31  # bytes


@dataclass(frozen=True)
class Resources:
    """Where training of blocks runs, and what it may use. None of it changes a bit of the results.

    Attributes
    ----------
    work_dir
        Directory in which every finished block is one file. A run that was killed or interrupted continues from there; files of
        another model, of other data or options are refused.
    memory
        Bytes that hidden states of all tokens may take in memory; beyond, they are in temporary files, in ``work_dir`` or the
        system's directory for such.
    executor
        Any ``concurrent.futures.Executor``, on which blocks are trained side by side. Processes on other machines need a
        ``work_dir`` that they see as well, where hidden states are in files.

    >>> Resources(memory=-1)
    Traceback (most recent call last):
    ...
    ValueError: memory: expected an integer of 0 or more, got -1
    """

    work_dir: str | os.PathLike[str] | None = None
    memory: int = MEMORY
    executor: Executor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", as_count("memory", self.memory, 0))
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            raise TypeError(f"executor: expected a concurrent.futures.Executor, got {type(self.executor).__name__}")
