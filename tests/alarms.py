"""Signals that come while a call runs, and what that leaves behind."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alarms(handler, after, every=0.0):
    """Call ``handler`` after so many seconds of this process's own CPU time: what else the machine does changes nothing.

    An exception that it raises may come before the body has begun, so what expects one stands outside:
    ``with pytest.raises(KeyboardInterrupt), alarms(interrupt, 0.01):``.
    """
    before = signal.signal(signal.SIGPROF, handler)
    try:
        signal.setitimer(signal.ITIMER_PROF, after, every)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def interrupt(*_):
    raise KeyboardInterrupt("alarm")


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


#: A program whose signal handler forks while ``compute()`` runs. The child has none of the threads that were at work.
FORKS = """
import os, signal
import numpy as np
{prepare}
child = []
def fork(*_):
    child.append(os.fork())
want = compute()
signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, {after})
try:
    status = 0 if (compute() == want).all() else 1
except RuntimeError as error:  # the child's, where a worker had begun something
    status = 0 if child == [0] and {words!r} in str(error) else 2
signal.setitimer(signal.ITIMER_REAL, 0)
if child == [0]:
    os._exit(status)
assert status == 0
assert not child or os.waitpid(child[0], 0)[1] == 0
"""


def fork_while(prepare, after, words):
    """Run FORKS. ``prepare`` defines compute(), which gives an array, the same each time, or in the child says ``words``."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    program = FORKS.format(prepare=prepare, after=after, words=words)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=env)
