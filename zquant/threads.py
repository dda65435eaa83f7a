"""How many threads the kernels use."""
from __future__ import annotations

from . import _core

__all__ = ["get_num_threads", "set_num_threads"]


def set_num_threads(n: int) -> None:
    """Let every kernel use up to ``n`` threads (1 to 256), in this process, from now on.

    The default is the number of CPUs that the process may use: its affinity mask, or its cgroup quota where that is
    smaller. Results have the same bits for any number.

    >>> import zquant as zq
    >>> before = zq.get_num_threads()
    >>> zq.set_num_threads(1); zq.get_num_threads()
    1
    >>> zq.set_num_threads(before)
    """
    _core.set_threads(n)


def get_num_threads() -> int:
    """The number of threads that kernels may use; see :func:`set_num_threads`.

    >>> import zquant as zq
    >>> zq.get_num_threads() >= 1
    True
    """
    return _core.threads()
