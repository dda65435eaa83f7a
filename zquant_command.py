"""What the ``zquant`` command runs first. It lies outside the package, as importing that takes a moment, in which Ctrl-C is no
traceback either."""

from __future__ import annotations

import os
import signal

__all__ = ["main"]

INTERRUPTED = 130  # and the same words as in zquant.cli, which is not there yet


def _interrupted(*_: object) -> None:
    """No exception: imports, above all those out of C, print it or make another one of it. There is nothing to clean up yet."""
    try:
        os.write(2, b"zquant: interrupted\n")
    finally:  # whether or not anybody reads it
        os._exit(INTERRUPTED)


def main() -> int:
    """Import the command line and run it; returns the exit code, see :func:`zquant.cli.main`."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where the caller had it ignored
    if usual:
        signal.signal(signal.SIGINT, _interrupted)
    try:
        from zquant.cli import main as run
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()
