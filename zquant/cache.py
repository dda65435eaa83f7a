"""The key-value cache of a decoder."""
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core

__all__ = ["KVCache"]

_DTYPES = ("float32", "int8")


class KVCache:
    """Keys and values of past tokens, for every layer of a decoder and a batch of sequences.

    Memory comes in pages of 64 tokens per layer and sequence, allocated as they fill: a growing cache copies nothing.
    Sequences may have different lengths. Filling a cache in one pass, in chunks of any sizes or token by token gives the
    same bits, whatever else is in the batch.

    Parameters
    ----------
    layers, kv_heads, head_dim
        Of the model: attention layers, heads of keys and values, elements per head.
    sequences
        Sequences in the batch.
    dtype : "float32" or "int8"
        "int8": symmetric codes with one scale per token and head for keys and one for values
        (``scale = max|x| / 127``), a quarter of the memory; an element is off by at most half a scale.

    Attributes
    ----------
    layers, kv_heads, head_dim, sequences, dtype
        As given.
    handle
        What the functions of the extension take.

    Raises
    ------
    TypeError, ValueError
        A size is not an integer or not positive, or the dtype is unknown.

    >>> import numpy as np
    >>> from zquant.cache import KVCache
    >>> cache = KVCache(layers=2, kv_heads=4, head_dim=64, sequences=3)
    >>> cache.lengths
    array([0, 0, 0])
    >>> cache
    KVCache(layers=2, kv_heads=4, head_dim=64, sequences=3, dtype='float32'): 0 tokens, 0.0 MB
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, sequences: int = 1, dtype: str = "float32") -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected 'float32' or 'int8', got {dtype!r}")
        self._wrap(_core.kv_new(layers, sequences, kv_heads, head_dim, dtype == "int8"), layers, kv_heads, head_dim, dtype)

    def _wrap(self, handle: Any, layers: int, kv_heads: int, head_dim: int, dtype: str) -> None:
        self.handle = handle
        self.layers, self.kv_heads, self.head_dim, self.dtype = layers, kv_heads, head_dim, dtype

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, int64 (sequences,): a copy. They advance when the last layer has seen a token."""
        return _core.kv_lengths(self.handle)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages allocated so far, and of their tables."""
        return _core.kv_bytes(self.handle)

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forget the tokens from ``length`` on, of one sequence, or of all that are longer.

        Raises
        ------
        ValueError
            ``length`` is negative, ``sequence`` does not exist, or that sequence is shorter than ``length``.

        >>> from zquant.cache import KVCache
        >>> KVCache(1, 1, 8).truncate(0)
        """
        if sequence is not None:
            _core.kv_truncate(self.handle, sequence, length)
            return
        for s, n in enumerate(self.lengths.tolist()):
            _core.kv_truncate(self.handle, s, min(length, n))

    def select(self, rows: Any) -> KVCache:
        """A new cache whose sequence i is a copy of sequence ``rows[i]`` of this one, which stays as it is.

        Rows may be left out (sequences that ended) and may repeat (several continuations of one prompt).

        Parameters
        ----------
        rows : integers or bool
            Indices of sequences, or one bool per sequence.

        Raises
        ------
        TypeError, ValueError
            rows are not such integers.

        >>> from zquant.cache import KVCache
        >>> KVCache(1, 1, 8, sequences=3).select([2, 0]).sequences
        2
        """
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (self.sequences,):
                raise ValueError(f"rows: expected {self.sequences} bools, got shape {index.shape}")
            index = np.flatnonzero(index)
        if index.size and index.dtype.kind not in "iu":
            raise TypeError(f"rows: expected integers or bools, got {index.dtype}")
        new = KVCache.__new__(KVCache)
        new._wrap(_core.kv_select(self.handle, index.astype(np.int64)), self.layers, self.kv_heads, self.head_dim, self.dtype)
        return new

    def __repr__(self) -> str:
        lengths = self.lengths
        return (f"KVCache(layers={self.layers}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
                f"sequences={len(lengths)}, dtype={self.dtype!r}): {lengths.sum()} tokens, {self.nbytes / 1e6:.1f} MB")
