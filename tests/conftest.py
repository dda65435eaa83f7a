"""Fixtures shared by all tests: dispatch levels, threads, guard pages, arrays that are awkward to read."""
from __future__ import annotations

import ctypes
import mmap
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from zquant import _core, cpu

#: Test data that is not part of the repository: beside it, or where the environment says.
SHARED = Path(os.environ.get("ZQUANT_SHARED") or Path(__file__).parents[2] / "shared")
PAGE = mmap.PAGESIZE
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background by a shell ignores it
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@pytest.fixture(params=_core.levels())
def isa(request):
    """The test runs once per dispatch level of this CPU, slowest first."""
    with cpu.use(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    """The test runs with one thread and with two."""
    before = _core.threads()
    _core.set_threads(request.param)
    yield request.param
    _core.set_threads(before)


def guard(a: np.ndarray) -> np.ndarray:
    """A copy of `a` whose last byte is the last one before a page that cannot be read."""
    a = np.ascontiguousarray(a)
    pages = -(-max(a.nbytes, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(address + pages * PAGE, PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    out = np.frombuffer(memory, a.dtype, a.size, pages * PAGE - a.nbytes).reshape(a.shape)
    out[...] = a
    return out


@pytest.fixture
def guarded():
    """guarded(array): see :func:`guard`. A read behind the end ends the process with SIGSEGV."""
    return guard


def nasty(a: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays equal to `a` that C cannot read as they lie: each is another reason to copy first."""
    strided = np.zeros((*a.shape[:-1], a.shape[-1] * 2), a.dtype)[..., ::2]
    strided[...] = a
    unaligned = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    unaligned[...] = a
    record = np.zeros(a.shape, np.dtype([("pad", "u1"), ("value", a.dtype)]))
    record["value"] = a
    read_only = a.copy()
    read_only.flags.writeable = False
    return {
        "strided": strided,
        "reversed": np.ascontiguousarray(a[..., ::-1])[..., ::-1],
        "fortran": np.asfortranarray(a),
        "unaligned": unaligned,
        "byte-swapped": a.astype(a.dtype.newbyteorder()),
        "record field": record["value"],
        "read-only": read_only,
    }


@pytest.fixture
def nasty_arrays():
    """nasty_arrays(array) -> {what is wrong with it: an equal array}; see :func:`nasty`."""
    return nasty


@pytest.fixture(scope="session")
def shared():
    """The folder of test data; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no shared/ beside the repository; set ZQUANT_SHARED")
    return SHARED
