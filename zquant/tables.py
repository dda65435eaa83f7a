"""Tables of results as text, HTML and JSON."""

from __future__ import annotations

import html
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["Written", "html_table", "page", "plain", "text_table", "write_text"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two blanks apart, the first ``left`` of them to the left, the others to the right.

    >>> print(text_table(["name", "x"], [["a", "10"], ["long", "2"]]))
    name   x
    a     10
    long   2
    """
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in table
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same as an HTML table.

    >>> html_table(["x"], [["<"]], left=0)
    '<table><thead><tr><th>x</th></tr></thead><tbody><tr><td>&lt;</td></tr></tbody></table>'
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        style = [" style='text-align:left'" if i < left else "" for i in range(len(cells))]
        return "".join(f"<{tag}{s}>{html.escape(cell)}</{tag}>" for s, cell in zip(style, cells))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def page(title: str, body: str) -> str:
    """A whole HTML document."""
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        "<style>body{font-family:sans-serif;margin:2em}td,th{padding:.15em .8em;text-align:right}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def plain(value: Any) -> Any:
    """A tree of dicts, lists and values with what JSON has no number for as the strings "inf", "-inf" and "nan".

    >>> plain({"a": [1.5, float("inf")], "b": float("nan")})
    {'a': [1.5, 'inf'], 'b': 'nan'}
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file, beside it first and then renamed."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class Written(ABC):
    """What results share that can be written to files.

    Attributes
    ----------
    figure : name of the function of ``zquant.plot`` that draws them
    """

    figure: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain Python objects, ready for JSON; what is infinite or NaN becomes the string "inf", "-inf" or
        "nan"."""
        return plain(self._contents())  # type: ignore[no-any-return]

    @abstractmethod
    def _contents(self) -> dict[str, Any]:
        """What :meth:`as_dict` gives, with numbers as they are."""

    def plot(self) -> Any:
        """One picture, a ``matplotlib.figure.Figure`` (``.savefig(path)`` writes it; Jupyter shows it).

        Raises
        ------
        ImportError
            matplotlib is not installed.
        """
        from . import plot

        return getattr(plot, self.figure)(self)

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`as_dict` as JSON text."""
        return json.dumps(self.as_dict(), indent=indent, allow_nan=False)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file, beside it first and then renamed."""
        write_text(path, self.to_json() + "\n")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write what Jupyter shows as an HTML document."""
        write_text(path, page(type(self).__name__, self._repr_html_()))

    @abstractmethod
    def _repr_html_(self) -> str:
        """The result as HTML."""
