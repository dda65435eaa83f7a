"""Exceptions of zquant. Everything else is a plain ValueError or TypeError."""
from __future__ import annotations

__all__ = ["FormatError", "VersionError"]


class FormatError(ValueError):
    """A file or directory does not hold what its format says; the message begins with its path."""


class VersionError(FormatError):
    """A saved model was written by a later version of the format than this one reads."""
