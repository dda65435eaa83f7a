"""Hidden states of all tokens between two blocks: in memory, or in a temporary file where they are large."""
from __future__ import annotations

import fcntl
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from .mapped import release

__all__ = ["HiddenStates", "remove_stale"]

PREFIX = ".hidden-states-"


class HiddenStates:
    """Rows (tokens, width) of float32 that are read and written in parts; what is read is a copy.

    Beyond ``bound`` bytes they lie in a file, mapped while somebody reads or writes; the pages of a part are given back at
    once, so that the process holds next to none of them. The file goes when the object that made it does. Pickled, rows in
    memory travel with their values; rows in a file as its path, which other processes then read.

    Parameters
    ----------
    tokens, width : the shape
    bound : bytes that may be in memory; None for any number
    directory : where the file is made; None for the system's temporary directory

    Raises
    ------
    OSError
        No room on the disk, with the file's path and size.

    >>> x = HiddenStates(6, 2, bound=0)
    >>> x[:4] = np.ones((4, 2), np.float32); x[4:] = np.zeros((2, 2), np.float32)
    >>> x[3:5].tolist(), x.shape, x.path.exists()
    ([[1.0, 1.0], [0.0, 0.0]], (6, 2), True)
    """

    path: Path | None = None

    def __init__(self, tokens: int, width: int, *, bound: int | None = None,
                 directory: str | os.PathLike[str] | None = None) -> None:
        self.shape = tokens, width
        if bound is None or self.nbytes <= bound:
            self._rows = np.empty(self.shape, np.float32)
            return
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=directory)
        self.path = Path(name)
        weakref.finalize(self, _remove, handle, name, os.getpid())
        fcntl.flock(handle, fcntl.LOCK_SH)  # while this process lives; see remove_stale
        try:
            os.posix_fallocate(handle, 0, self.nbytes)  # a full disk says so here, and not by a signal at a write to the map
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, for {self.nbytes:,} bytes of hidden states", name) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return 4 * self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def _mapped(self, mode: Any) -> np.ndarray:
        return self._rows if self.path is None else np.memmap(self.path, np.float32, mode, shape=self.shape)

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        rows = self._mapped("r")
        found = np.array(rows[part])
        release(rows)
        return found

    def __setitem__(self, part: slice, rows: np.ndarray) -> None:
        mapped = self._mapped("r+")
        mapped[part] = rows
        release(mapped)

    def __repr__(self) -> str:
        where = "memory" if self.path is None else str(self.path)
        return f"HiddenStates({self.shape[0]:,} x {self.shape[1]:,}, {self.nbytes / 1e6:.1f} MB in {where})"


def _remove(handle: int, name: str, process: int) -> None:
    """The file's end. A forked child has the object as well, but the file is not its own."""
    os.close(handle)
    if os.getpid() == process:
        Path(name).unlink(missing_ok=True)


def remove_stale(directory: str | os.PathLike[str]) -> int:
    """Remove the files of processes that were killed from a directory; how many there were."""
    count = 0
    for path in Path(directory).glob(PREFIX + "*"):
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its process is alive
            path.unlink(missing_ok=True)
            count += 1
    return count
