"""Memory-mapped files: read-only byte maps, and giving their pages back."""
from __future__ import annotations

import mmap
import os

import numpy as np

__all__ = ["map_bytes", "release"]


def map_bytes(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a file as a read-only uint8 array backed by the page cache; an empty file gives an empty array.

    >>> import os, tempfile
    >>> with tempfile.NamedTemporaryFile(delete=False) as f:
    ...     _ = f.write(b"abc")
    >>> map_bytes(f.name).tolist()
    [97, 98, 99]
    >>> os.unlink(f.name)
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def release(array: np.ndarray) -> bool:
    """Drop the pages of a mapped array from this process (they stay in the page cache and come back when read).

    Arrays that are not views of a mapped file are left alone. Returns whether pages were dropped.

    >>> release(np.zeros(3))
    False
    """
    base: object = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if not isinstance(base, mmap.mmap) or array.size == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return False
    low, high = (np.lib.array_utils.byte_bounds(array) if hasattr(np.lib, "array_utils")
                 else np.byte_bounds(array))  # type: ignore[attr-defined]
    origin = np.frombuffer(base, np.uint8).__array_interface__["data"][0]
    first = -(-(low - origin) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: neighbours may be in use
    last = (high - origin) // mmap.PAGESIZE * mmap.PAGESIZE
    if last <= first:
        return False
    base.madvise(mmap.MADV_DONTNEED, first, last - first)
    return True
