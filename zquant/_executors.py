"""Independent pieces of work on any ``concurrent.futures.Executor``: threads, processes, a Dask cluster."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from .threads import get_num_threads, set_num_threads

__all__ = ["run_all", "workers_of"]

K = TypeVar("K")
R = TypeVar("R")


def workers_of(executor: Executor) -> tuple[int, int]:
    """How many pieces it works on at a time: in all, and on one machine, whose cores they divide. 1 where it does not say.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> workers_of(ThreadPoolExecutor(3))
    (3, 3)
    """
    count = getattr(executor, "_max_workers", None)  # of both executors of the standard library
    if isinstance(count, int):
        return count, count
    client = getattr(executor, "_client", None)  # of distributed's
    if client is None:
        return 1, 1
    hosts: Counter[str] = Counter()
    for address, threads in client.nthreads().items():
        hosts[address.rpartition(":")[0]] += threads
    return max(1, hosts.total()), max(hosts.values(), default=1)


@contextmanager
def _shared(workers: int) -> Iterator[None]:
    """This process's threads divided among workers that are threads of it."""
    before = get_num_threads()
    set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        set_num_threads(before)


def _call(function: Callable[..., R], arguments: tuple[Any, ...], home: int, workers: int) -> R:
    """In a worker: a process of its own takes its share of the machine, and keeps to it."""
    if os.getpid() != home and not getattr(_call, "shared", False):
        set_num_threads(max(1, get_num_threads() // workers))
        _call.shared = True  # type: ignore[attr-defined]
    return function(*arguments)


def run_all(function: Callable[..., R], calls: Iterable[tuple[K, tuple[Any, ...]]], executor: Executor,
            keep: Callable[[K, R], None]) -> Iterator[K]:
    """Compute ``function(*arguments)`` for each (key, arguments) of ``calls`` on the executor; ``keep(key, result)`` here, and
    yield the key.

    Arguments are made only as workers take them, one piece more than there are workers: large ones are not all in memory. Where
    a piece fails, or Ctrl-C comes, those that have not begun are cancelled, and those that are complete are kept.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> found = {}
    >>> with ThreadPoolExecutor(2) as executor:
    ...     sorted(run_all(pow, ((i, (i, 2)) for i in range(4)), executor, found.__setitem__))
    [0, 1, 2, 3]
    >>> found[3]
    9
    """
    (count, here), remaining = workers_of(executor), iter(calls)
    pending: dict[Future[R], tuple[K, tuple[Any, ...]]] = {}  # with the arguments: what they refer to must live as long
    try:
        with _shared(here if isinstance(executor, ThreadPoolExecutor) else 1):
            while True:
                while len(pending) <= count and (call := next(remaining, None)) is not None:
                    pending[executor.submit(_call, function, call[1], os.getpid(), here)] = call
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    key, result = pending[future][0], future.result()
                    keep(key, result)  # while it is pending: where Ctrl-C comes now, it is kept below
                    del pending[future]
                    yield key
    except BaseException:
        begun = [(future, key) for future, (key, _) in pending.items() if not future.cancel()]
        for future, key in begun:
            if future.done() and future.exception() is None:
                keep(key, future.result())
        raise
