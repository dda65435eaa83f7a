"""A directory in which a long run leaves what is finished, one file for each part, so that it can be continued."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from .errors import FormatError
from .formats.safetensors import open_checkpoint, write_safetensors

__all__ = ["WorkDirectory"]

KEY = "zquant.part"


class WorkDirectory:
    """Parts of one run as safetensors files. Each is written beside its place and renamed: it is there whole or not at all.

    Parameters
    ----------
    path : created where it does not exist
    run
        What decides the results, by name, ready for JSON: the model's fingerprint, the data's, options. Every file has it in
        its metadata, and files of another run are refused.

    Raises
    ------
    ValueError
        ``path`` is a file.
    OSError
        Nothing can be written there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     WorkDirectory(path, {"seed": 0}).save("block-0", {"loss": np.array([0.5, 0.25])}, {"best": 1})
    ...     tensors, info = WorkDirectory(path, {"seed": 0}).load("block-0")
    ...     WorkDirectory(path, {"seed": 1}).load("block-0")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ...block-0.safetensors: is of another run (its seed differs); take another directory, or remove the file
    >>> tensors["loss"].tolist(), info
    ([0.5, 0.25], {'best': 1})
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.path, self.run = Path(path), json.loads(json.dumps(run))  # tuples become lists, as they do in the files
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: is a file; a run leaves its parts in a directory")
        self.path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=self.path):
            pass  # a directory that cannot be written says so now, and not when the first part is finished

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.safetensors"

    def load(self, part: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and information of a finished part; None where it is not there.

        Raises
        ------
        ValueError
            A file of another run.
        FormatError
            Not a file of a run at all.
        """
        path = self._file(part)
        if not path.exists():
            return None
        file = open_checkpoint(path)
        try:
            data = json.loads(file.metadata[KEY])
            run, info = dict(data["run"]), dict(data["info"])
        except (KeyError, ValueError, TypeError):
            raise FormatError(f"{path}: not a finished part of a run of zquant") from None
        if wrong := sorted(name for name in run.keys() | self.run.keys() if run.get(name) != self.run.get(name)):
            differ = f"{wrong[0]} differs" if len(wrong) == 1 else f"{', '.join(wrong)} differ"
            raise ValueError(f"{path}: is of another run (its {differ}); take another directory, or remove the file")
        return {name: np.array(array) for name, array in file.items()}, info

    def save(self, part: str, tensors: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
        """Keep a finished part."""
        write_safetensors(self._file(part), tensors, {KEY: json.dumps({"run": self.run, "info": dict(info)})})
