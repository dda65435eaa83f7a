"""Trained blocks as files, so that a run that was interrupted continues."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .linear import Linear
from .qtensor import QTensor
from .spec import Scheme
from .statistics import fingerprint
from .work_directory import WorkDirectory

if TYPE_CHECKING:
    from .distill import BlockResult

__all__ = ["Finished"]

VERSION = 1  # of the files, and of what training does with the same options


class Finished:
    """Trained blocks in a work directory; without one nothing is kept.

    Parameters
    ----------
    path : of the directory, or None
    teacher, scheme, ids, options, student, start
        What decides the results; see :func:`zquant.distill.distill`. ``student`` where blocks read its hidden states.
    """

    def __init__(self, path: str | os.PathLike[str] | None, teacher: Any, scheme: Scheme, ids: Sequence[np.ndarray],
                 options: Mapping[str, Any], student: Any, start: Mapping[str, Linear]) -> None:
        self._directory = None if path is None else WorkDirectory(path, {
            "version": VERSION, "model": fingerprint(teacher), "data": _hash(ids), "scheme": scheme.to_dict(), **options,
            "student": None if student is None else fingerprint(student),
            "start": _hash([array for name in sorted(start) for array in _arrays(start[name])])})

    def load(self, name: str) -> BlockResult | None:
        """A block that is finished, or None; see :meth:`WorkDirectory.load` for errors."""
        from .distill import BlockResult

        found = None if self._directory is None else self._directory.load(name)
        if found is None:
            return None
        arrays, info = found
        parts: dict[str, dict[str, np.ndarray]] = {"codes": {}, "scales": {}, "tensor": {}}
        for key, array in arrays.items():
            kind, _, tensor = key.partition(".")
            parts.get(kind, {})[tensor] = array
        codes = {tensor: (array, parts["scales"][tensor]) for tensor, array in parts["codes"].items()}
        return BlockResult(codes, parts["tensor"], arrays["losses"], arrays["checks"], info["best_step"], info["lr"])

    def save(self, name: str, result: BlockResult) -> None:
        """Keep a block: its file is there whole, or not at all."""
        if self._directory is None:
            return
        arrays = {"losses": result.losses, "checks": result.checks}
        for tensor, (codes, scales) in result.codes.items():
            arrays |= {f"codes.{tensor}": codes, f"scales.{tensor}": scales}
        arrays |= {f"tensor.{tensor}": array for tensor, array in result.tensors.items()}
        self._directory.save(name, arrays, {"best_step": result.best_step, "lr": result.lr})


def _arrays(layer: Linear) -> list[np.ndarray]:
    weight = layer._weight
    return [weight.codes, weight.scales] if isinstance(weight, QTensor) else []


def _hash(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
