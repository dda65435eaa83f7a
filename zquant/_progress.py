"""Progress bars: tqdm, imported where a bar may be seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

#: A bar appears only for work that takes longer than this (seconds).
DELAY = 2.0


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel (having ipykernel imported is not enough)."""
    ipython = sys.modules.get("IPython")
    return "ipykernel" in sys.modules and ipython is not None and ipython.get_ipython() is not None


def bar(items: Iterable[T], what: str, show: bool | None = None, note: Callable[[T], str] | None = None,
        **options: Any) -> Iterator[T]:
    """Iterate over ``items`` under a bar on stderr that appears after two seconds.

    ``show``: True or False; None shows it where stderr is a terminal, or in a notebook.
    ``note``: what to say of an item behind the bar.
    """
    if show is None:
        show = sys.stderr is not None and (sys.stderr.isatty() or _in_notebook())
    if not show:
        yield from items
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    # The bar is closed by the ``with`` even where the loop's body raises.
    with tqdm(items, desc=what, delay=DELAY, leave=False, **options) as shown:
        for item in shown:
            if note is not None:
                shown.set_postfix_str(note(item), refresh=False)
            yield item
