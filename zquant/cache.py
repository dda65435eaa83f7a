"""The key-value cache of a decoder."""
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from .checks import as_count

__all__ = ["KVCache"]

_DTYPES = ("float32", "int8")


class KVCache:
    """Keys and values of past tokens, for every layer of a decoder and a batch of sequences.

    :meth:`zquant.CausalLM.new_cache` makes one of a model's sizes, and any of the same sizes will do.

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
    batch
        The same as ``sequences``.
    one_each
        (sequences + 1,) int64, the offsets of a step in which every sequence gets one token.
    handle
        What the functions of the extension take.

    Raises
    ------
    TypeError, ValueError
        A size is not an integer or not positive, or the dtype is unknown.

    Notes
    -----
    ``copy.copy`` and ``copy.deepcopy`` give a cache with pages of its own. It does not pickle: what it holds can be computed
    again from the token ids.

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
        self.layers, self.kv_heads, self.head_dim, self.dtype = layers, kv_heads, head_dim, dtype
        self._hold(_core.kv_new(layers, sequences, kv_heads, head_dim, dtype == "int8"))

    def _hold(self, handle: Any) -> None:
        self.handle = handle
        self.sequences = len(_core.kv_lengths(handle))
        self.one_each = np.arange(self.sequences + 1)

    @property
    def batch(self) -> int:
        """The same as ``sequences``, under the name that :meth:`zquant.CausalLM.new_cache` has for it."""
        return self.sequences

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

        Parameters
        ----------
        length
            Tokens that stay.
        sequence
            Index of a sequence; None is all of them.

        Raises
        ------
        ValueError
            ``length`` is negative, ``sequence`` does not exist, or that sequence is shorter than ``length``.

        >>> from zquant.cache import KVCache
        >>> KVCache(1, 1, 8).truncate(0)
        """
        length = as_count("length", length, 0)
        if sequence is not None:
            _core.kv_truncate(self.handle, as_count("sequence", sequence, 0, self.sequences - 1), length)
            return
        for s, n in enumerate(self.lengths.tolist()):
            _core.kv_truncate(self.handle, s, min(length, n))

    def restore(self, lengths: npt.NDArray[np.int64]) -> None:
        """Back to ``lengths`` that the sequences have had, after a pass that failed; what it had begun is forgotten."""
        for sequence, length in enumerate(lengths.tolist()):
            _core.kv_truncate(self.handle, sequence, length)

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
            rows are not integers or bools; a sequence that does not exist.

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
        if index.ndim != 1:
            raise ValueError(f"rows: expected one dimension, got shape {index.shape}")
        bad = index[(index < 0) | (index >= self.sequences)]
        if len(bad):  # before the cast, which makes -1 of what uint64 holds
            raise ValueError(f"rows: expected sequences 0 to {self.sequences - 1}, got {bad[0]}")
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._hold(_core.kv_select(self.handle, index.astype(np.int64)))
        return new

    def __copy__(self) -> KVCache:
        return self.select(range(self.sequences))

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        return self.select(range(self.sequences))

    def __reduce__(self) -> Any:
        raise TypeError("KVCache: its pages are memory of this process and cannot be pickled; pickle the token ids, and run "
                        "them through the model with a new cache")

    def __repr__(self) -> str:
        lengths = self.lengths
        return (f"KVCache(layers={self.layers}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
                f"sequences={len(lengths)}, dtype={self.dtype!r}): {lengths.sum()} tokens, {self.nbytes / 1e6:.1f} MB")
