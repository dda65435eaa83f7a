"""Exceptions of zquant. Everything else is a plain ValueError or TypeError."""
from __future__ import annotations

__all__ = ["FormatError", "VersionError"]


class FormatError(ValueError):
    """A file or directory does not hold what its format says; the message begins with its path.

    >>> import zquant as zq
    >>> with open("config.json", "w") as file:
    ...     _ = file.write("{")
    >>> try:
    ...     zq.load(".")
    ... except FormatError as error:
    ...     print(error)
    config.json: not readable as JSON: ...
    """


class VersionError(FormatError):
    """A saved model was written by a later version of the format than this one reads."""
