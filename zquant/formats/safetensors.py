"""safetensors files: read by memory mapping, written beside and renamed.

The `safetensors` library decides whether a file is well formed, so that a hostile file gets the reference verdict; the
tensors themselves are views of the mapped file, converted to float32 where they are float16 or bfloat16.
"""
from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..mapped import map_bytes

__all__ = ["Checkpoint", "Stored", "open_checkpoint", "write_safetensors", "writing_safetensors"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# On disk (little-endian). BF16 has no NumPy type: its bits travel as uint16.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as it lies in a file: ``array`` in the file's own type; ``dtype`` is the safetensors name."""

    array: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def float32(self) -> np.ndarray:
        """The values: float16 and bfloat16 as float32 copies (exact), anything else as it is."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32) if self.dtype == "F16" else self.array


def _header(path: Path, data: np.ndarray) -> tuple[int, dict[str, Any]]:
    """Where the data starts and the parsed header, after the reference implementation has accepted the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        size = int.from_bytes(data[:8].tobytes(), "little")
        return 8 + size, json.loads(data[8:8 + size].tobytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error}") from None


class _File:
    """One mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FormatError(f"{path}: no such file")
        self.path = path
        self.data = map_bytes(path)
        self.start, self.tensors = _header(path, self.data)
        self.metadata: dict[str, str] = self.tensors.pop("__metadata__", None) or {}

    def stored(self, name: str) -> Stored:
        info = self.tensors[name]
        dtype, shape = info["dtype"], tuple(info["shape"])
        if dtype not in DTYPES:
            raise FormatError(f"{self.path}: tensor {name!r} is {dtype}; supported: {', '.join(DTYPES)}")
        begin, end = (self.start + offset for offset in info["data_offsets"])
        return Stored(self.data[begin:end].view(DTYPES[dtype]).reshape(shape), dtype)


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint, by name, mapped when asked for; see :func:`open_checkpoint`.

    ``checkpoint[name]`` is an array: float32 for F32 (a view of the file, read-only), F16 and BF16 (a copy); the
    stored type for everything else. ``stored(name)`` is the tensor as it lies in the file.
    """

    def __init__(self, path: Path, files: Mapping[str, _File]) -> None:
        self.path = path
        self._files = dict(files)

    @property
    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of all files together."""
        merged: dict[str, str] = {}
        for file in dict.fromkeys(self._files.values()):
            merged.update(file.metadata)
        return merged

    def stored(self, name: str) -> Stored:
        """The tensor in the file's own type, a view of the mapped file."""
        return self._file(name).stored(name)

    def dtype(self, name: str) -> str:
        """The safetensors name of the stored type, such as "F32"."""
        return self._file(name).tensors[name]["dtype"]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).tensors[name]["shape"])

    def _file(self, name: str) -> _File:
        if name not in self._files:
            raise FormatError(f"{self.path}: no tensor {name!r}")
        return self._files[name]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._files:
            raise KeyError(name)
        return self.stored(name).float32()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a safetensors file, or a directory with ``model.safetensors`` or ``model.safetensors.index.json``.

    Nothing is read but the headers. A directory with exactly one ``*.safetensors`` file of another name opens too.

    Parameters
    ----------
    path
        File or directory.

    Returns
    -------
    Checkpoint
        A mapping from tensor names to arrays.

    Raises
    ------
    FormatError
        Missing files, malformed or truncated files, shards or tensors that the index names and that are not there;
        the message names the file.
    """
    path = Path(path)
    if not path.is_dir():
        return Checkpoint(path, _names(_File(path)))
    if (path / SINGLE).is_file():
        return Checkpoint(path, _names(_File(path / SINGLE)))
    if (path / INDEX).is_file():
        return _sharded(path)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return Checkpoint(path, _names(_File(others[0])))
    hint = "; PyTorch .bin files are not read, save the model as safetensors" if any(path.glob("*.bin")) else ""
    raise FormatError(f"{path}: neither {SINGLE} nor {INDEX}{hint}")


def _names(file: _File) -> dict[str, _File]:
    return dict.fromkeys(file.tensors, file)


def _sharded(directory: Path) -> Checkpoint:
    index = directory / INDEX
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index}: not a safetensors index: {error!r}") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FormatError(f"{index}: {shard!r} is not the name of a file in this directory")
        if not (directory / shard).is_file():
            raise FormatError(f"{index}: shard {shard} is missing")
    files = {shard: _File(directory / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise FormatError(f"{directory / shard}: tensor {name!r} is listed in {INDEX} but not in this file")
    return Checkpoint(directory, {name: files[shard] for name, shard in weight_map.items()})


def _as_stored(name: str, value: np.ndarray | Stored) -> Stored:
    if isinstance(value, Stored):
        return value
    value = np.asarray(value)
    for dtype, code in DTYPES.items():
        if dtype != "BF16" and value.dtype.newbyteorder("<") == np.dtype(code):
            return Stored(value, dtype)
    raise ValueError(f"write_safetensors: tensor {name!r} has dtype {value.dtype}; supported: {', '.join(DTYPES)}")


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray | Stored],
                      metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file: beside it under a temporary name, then renamed over it.

    Tensors are written one after another, so that mapped ones need no memory; larger item types come first, which
    keeps every tensor aligned.

    Parameters
    ----------
    path
        The file; an existing one is replaced in one step, or left alone if anything fails.
    tensors
        Arrays, or :class:`Stored` tensors (bfloat16).
    metadata
        Strings for ``__metadata__``.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     write_safetensors(os.path.join(d, "x.safetensors"), {"a": np.arange(3, dtype=np.int32)})
    ...     os.path.getsize(os.path.join(d, "x.safetensors"))
    76
    """
    stored = {name: _as_stored(name, value) for name, value in tensors.items()}
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    with writing_safetensors(path, layout, metadata) as write:
        for name in layout:
            write(name, stored[name].array)


@contextmanager
def writing_safetensors(path: str | os.PathLike[str], layout: Mapping[str, tuple[str, tuple[int, ...]]],
                        metadata: Mapping[str, str] | None = None) -> Iterator[Callable[[str, np.ndarray], None]]:
    """``with writing_safetensors(...) as write``: a file whose tensors come one by one, in any order, and need not be in
    memory together. ``layout`` gives each tensor's type ("F32") and shape. The file appears when all have been written.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     with writing_safetensors(os.path.join(d, "x"), {"a": ("F32", (2,)), "b": ("F64", ())}) as write:
    ...         write("a", np.float32([1, 2]))
    ...         write("b", np.array(0.5))
    ...     open_checkpoint(os.path.join(d, "x"))["a"].tolist()
    [1.0, 2.0]
    """
    head, places = _lay_out(layout, metadata)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(head)
        missing = set(layout)

        def write(name: str, array: np.ndarray) -> None:
            dtype, shape = layout[name]
            if array.shape != tuple(shape) or array.dtype.newbyteorder("<") != np.dtype(DTYPES[dtype]):
                raise ValueError(f"{path}: tensor {name!r} is {dtype} {tuple(shape)}, got {array.dtype} {array.shape}")
            missing.discard(name)
            file.seek(places[name])
            data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            file.write(data.reshape(-1).view(np.uint8).data)

        yield write
        if missing:
            raise ValueError(f"{path}: tensors that were not written: {', '.join(sorted(missing))}")


def _lay_out(layout: Mapping[str, tuple[str, tuple[int, ...]]],
             metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """What the file begins with, and where each tensor goes: larger item types first."""
    size = {name: np.dtype(DTYPES[dtype]).itemsize for name, (dtype, _) in layout.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places, offset = {}, 0
    for name in sorted(layout, key=lambda name: (-size[name], name)):
        dtype, shape = layout[name]
        end = offset + math.prod(shape) * size[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        places[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + place for name, place in places.items()}


class replacing:
    """``with replacing(path) as temporary``: write the temporary file; it becomes ``path`` if nothing was raised."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        # Not mkstemp, whose 0600 is not what a saved model should have; umask applies.
        os.close(os.open(self.temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        os.replace(self.temporary, self.path)
