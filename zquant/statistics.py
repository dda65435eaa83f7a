"""What calibration keeps of the inputs of linear layers, and the file that it is kept in."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FormatError, VersionError
from .formats.safetensors import Stored, open_checkpoint, writing_safetensors
from .qtensor import QTensor

__all__ = ["NEEDS", "Accumulator", "InputStatistics", "RunInfo", "Statistics", "check_needs", "fingerprint"]

#: Name -> (type in a file, shape) of each statistic of an input with k channels; ``rows`` are sampled.
NEEDS: dict[str, tuple[str, Callable[[int, int], tuple[int, ...]]]] = {
    "absmax": ("F32", lambda k, rows: (k,)),
    "minmax": ("F32", lambda k, rows: (2, k)),
    "mean_abs": ("F64", lambda k, rows: (k,)),
    "gram": ("F64", lambda k, rows: (k, k)),
    "deviation": ("F64", lambda k, rows: (k, k)),
    "samples": ("F32", lambda k, rows: (rows, k)),
}
#: Up to so many channels the Gram matrix is multiplied in float64; beyond, blocks of rows are in float32.
EXACT = 1024
VERSION = 1
KEY = "zquant_statistics"  # in the metadata of a file
# In config.json, and without influence on what a model computes.
_IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")


def check_needs(needs: Any) -> frozenset[str]:
    """The names of statistics, as a set; ValueError names what is unknown.

    >>> sorted(check_needs(["gram", "absmax"]))
    ['absmax', 'gram']
    """
    if isinstance(needs, str):
        needs = [needs]
    try:
        found = frozenset(needs)
    except TypeError:
        raise ValueError(f"needs: expected names of statistics, got {needs!r}") from None
    if unknown := sorted(map(str, found - NEEDS.keys())):
        raise ValueError(f"needs: unknown statistics {', '.join(unknown)}; known: {', '.join(NEEDS)}")
    if not found:
        raise ValueError(f"needs: no statistics asked for; known: {', '.join(NEEDS)}")
    return found


@dataclass(frozen=True, eq=False)
class InputStatistics(Mapping[str, np.ndarray]):
    """Statistics of the rows X (tokens, k) that some layers' weights multiply; a mapping from name to array.

    ========= ============================================================ =================
    absmax    max over tokens of abs(x), per channel                       (k,) float32
    minmax    min and max over tokens, per channel                         (2, k) float32
    mean_abs  mean over tokens of abs(x), per channel                      (k,) float64
    gram      X^T X / tokens                                               (k, k) float64
    deviation (X_float - X)^T X / tokens, X_float of the float model       (k, k) float64
    samples   some of the rows; the same tokens for all layers             (rows, k) float32
    ========= ============================================================ =================

    "deviation" is what quantized predecessors do to a layer's input: it is there in the sequential mode alone.

    Attributes
    ----------
    layers : names of the layers that read these rows
    tokens : number of rows
    arrays : what the mapping holds

    >>> stats = InputStatistics(("query", "key"), 5, {"absmax": np.float32([3, 1])})
    >>> stats["absmax"].tolist(), list(stats)
    ([3.0, 1.0], ['absmax'])
    """

    layers: tuple[str, ...]
    tokens: int
    arrays: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def __repr__(self) -> str:
        return f"InputStatistics({', '.join(self.layers)}: {', '.join(self.arrays)} of {self.tokens:,} tokens)"


class Accumulator:
    """Adds up the statistics of one input, whatever pieces its rows come in.

    Rows are gathered into blocks of a fixed size before anything is summed, so that the result has the same bits however
    the rows were cut into batches. A block of X is multiplied in float64 up to 1,024 channels, else in float32; blocks
    are added in float64.

    >>> a = Accumulator(("fc",), 2, {"absmax", "gram"})
    >>> a.add(np.float32([[1, 2]])); a.add(np.float32([[-3, 0]]))
    >>> s = a.result(); s["absmax"].tolist(), s["gram"].tolist()
    ([3.0, 2.0], [[5.0, 1.0], [1.0, 2.0]])
    """

    def __init__(self, layers: Sequence[str], k: int, needs: Collection[str], picks: np.ndarray | None = None) -> None:
        self.layers, self.k, self.needs, self.tokens = tuple(layers), k, frozenset(needs), 0
        block = 512 if k <= EXACT else 2048
        self._gram = np.zeros((k, k)) if "gram" in needs else None
        self._deviation = np.zeros((k, k)) if "deviation" in needs else None
        # Rows, and beside them what the float model has in their places.
        self._buffer, self._filled = np.empty((1 if self._deviation is None else 2, block, k), np.float32), 0
        self._low, self._high = np.full(k, np.inf, np.float32), np.full(k, -np.inf, np.float32)
        self._sum = np.zeros(k)
        self._picks = np.empty(0, np.int64) if picks is None else picks
        self._rows = np.empty((len(self._picks), k), np.float32)

    def add(self, x: np.ndarray, reference: np.ndarray | None = None) -> None:
        """Rows (n, k) float32, in order; for "deviation", ``reference`` has the float model's in their places."""
        if x.ndim != 2 or x.shape[1] != self.k:
            raise ValueError(f"{self.layers[0]}: expected rows of {self.k} features, got shape {x.shape}")
        given = [x]
        if self._deviation is not None:
            if reference is None or reference.shape != x.shape:
                raise ValueError(f"{self.layers[0]}: deviation needs the float model's rows too, of shape {x.shape}")
            given.append(reference)
        first, last = np.searchsorted(self._picks, [self.tokens, self.tokens + len(x)])
        self._rows[first:last] = x[self._picks[first:last] - self.tokens]
        self.tokens += len(x)
        block, done = self._buffer.shape[1], 0
        while done < len(x):
            if self._filled == 0 and len(x) - done >= block:
                self._sum_up([rows[done:done + block] for rows in given])
                done += block
                continue
            n = min(block - self._filled, len(x) - done)
            for kept, rows in zip(self._buffer, given):
                kept[self._filled:self._filled + n] = rows[done:done + n]
            self._filled, done = self._filled + n, done + n
            if self._filled == block:
                self._flush()

    def _flush(self) -> None:
        if self._filled:
            self._sum_up(list(self._buffer[:, :self._filled]))
        self._filled = 0

    def _sum_up(self, given: list[np.ndarray]) -> None:
        x = given[0]
        if self.needs & {"absmax", "minmax"}:
            np.minimum(self._low, x.min(axis=0), out=self._low)
            np.maximum(self._high, x.max(axis=0), out=self._high)
        if "mean_abs" in self.needs:
            self._sum += np.abs(x).sum(axis=0, dtype=np.float64)
        kind = np.float64 if self.k <= EXACT else np.float32
        if self._gram is not None or self._deviation is not None:
            x = np.ascontiguousarray(x, kind)
        if self._gram is not None:
            self._gram += np.dot(x.T, x)
        if self._deviation is not None:
            self._deviation += np.dot((given[1].astype(kind) - x).T, x)

    def result(self) -> InputStatistics:
        """The statistics of all rows so far; ValueError if there were none, or if sums overflowed."""
        if not self.tokens:
            raise ValueError(f"{self.layers[0]}: no rows to take statistics of")
        self._flush()
        arrays: dict[str, np.ndarray] = {}
        if "absmax" in self.needs:
            arrays["absmax"] = np.maximum(np.abs(self._low), np.abs(self._high))
        if "minmax" in self.needs:
            arrays["minmax"] = np.stack([self._low, self._high])
        if "mean_abs" in self.needs:
            arrays["mean_abs"] = self._sum / self.tokens
        if self._gram is not None:
            self._gram /= self.tokens
            arrays["gram"] = self._gram
        if self._deviation is not None:
            self._deviation /= self.tokens
            arrays["deviation"] = self._deviation
        if "samples" in self.needs:
            arrays["samples"] = self._rows
        for name, array in arrays.items():  # |g_ij| <= sqrt(g_ii g_jj): the diagonal of a Gram matrix speaks for it all
            if not np.isfinite(array.diagonal() if name == "gram" else array).all():
                raise ValueError(f"{self.layers[0]}: {name} of its inputs is not finite")
        return InputStatistics(self.layers, self.tokens, arrays)


@dataclass(frozen=True)
class RunInfo:
    """How statistics came about.

    Attributes
    ----------
    fingerprint : of the model, see :func:`fingerprint`
    source : "text", "ids" or "random"
    sequences, tokens, seq_len : how much text
    seed : of what was drawn
    mode : "parallel" (the float model throughout) or "sequential" (each layer saw its quantized predecessors)
    scheme : what the predecessors were quantized with; "" for none
    """

    fingerprint: str
    source: str
    sequences: int
    tokens: int
    seq_len: int
    seed: int
    mode: str = "parallel"
    scheme: str = ""


class Statistics(Mapping[str, InputStatistics]):
    """Statistics of the inputs of a model's linear layers; a mapping from layer name to :class:`InputStatistics`. Layers
    that read the same rows share one. Made by :func:`zquant.calibrate` and :meth:`load`.

    Attributes
    ----------
    groups : list of InputStatistics, in the order of the forward
    info : RunInfo
    seconds : time that it took
    peak_bytes : the process's memory at its highest meanwhile

    >>> from pathlib import Path
    >>> import zquant as zq
    >>> lm = zq.load(Path(zq.__file__).parents[1] / "tests" / "data" / "tiny-llama-5m")
    >>> stats = zq.calibrate(lm, [[1, 2, 3], [4, 5]], needs={"absmax"})
    >>> len(stats), stats["model.layers.0.mlp.down_proj"].tokens
    (42, 5)
    """

    def __init__(self, groups: Sequence[InputStatistics], info: RunInfo, seconds: float = 0.0, peak_bytes: int = 0) -> None:
        self.groups, self.info, self.seconds, self.peak_bytes = list(groups), info, seconds, peak_bytes
        self._by_layer = {layer: group for group in self.groups for layer in group.layers}

    def __getitem__(self, layer: str) -> InputStatistics:
        return self._by_layer[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_layer)

    def __len__(self) -> int:
        return len(self._by_layer)

    @property
    def needs(self) -> frozenset[str]:
        """What is there of every layer."""
        return frozenset.intersection(*(frozenset(group) for group in self.groups)) if self.groups else frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(group.nbytes for group in self.groups)

    def check(self, model: Any, needs: Collection[str] = (), layers: Collection[str] = ()) -> None:
        """ValueError unless these are statistics of this model, with what is needed of these layers."""
        if fingerprint(model) != self.info.fingerprint:
            raise ValueError("statistics: they are of another model (its configuration or weights differ); calibrate this one")
        for layer in layers:
            missing = sorted(set(needs) - self._by_layer.get(layer, {}).keys())
            if missing:
                raise ValueError(f"statistics: of {layer} there is no {', '.join(missing)}; "
                                 f"calibrate with needs={sorted(needs)}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, beside ``path`` and renamed when complete."""
        with _writing(path, [_shapes(group) for group in self.groups], self.info) as write:
            for group in self.groups:
                write(group)
            write.finish(self.seconds, self.peak_bytes)
        return Path(path)

    @staticmethod
    def load(path: str | os.PathLike[str], model: Any = None) -> Statistics:
        """Statistics from a file, memory-mapped.

        Parameters
        ----------
        path
            Written by :meth:`save`, or by ``zquant.calibrate(..., file=path)``.
        model
            Check at once that they are of this model.

        Raises
        ------
        FormatError
            Not such a file; the message begins with its name.
        ValueError
            Statistics of another model.
        """
        found = _read(Path(path))
        if model is not None:
            found.check(model)
        return found

    def __repr__(self) -> str:
        i = self.info
        how = f", {i.mode}" + (f" ({i.scheme})" if i.scheme else "")
        peak = f", peak memory {self.peak_bytes / 1e6:,.0f} MB" if self.peak_bytes else ""
        return (f"Statistics({len(self)} layers, {len(self.groups)} inputs: {', '.join(sorted(self.needs))}; "
                f"{i.sequences:,} sequences of {i.source}, {i.tokens:,} tokens{how}; {self.nbytes / 1e6:.1f} MB, "
                f"{self.seconds:.1f} s{peak})")


# -- the model's identity

def fingerprint(model: Any) -> str:
    """A hash of what a model computes: configuration, names, types and shapes of all weights, 64 values of each.

    A model or a sentence encoder; where it lies on disk does not matter.
    """
    model = getattr(model, "model", model)
    config = {key: value for key, value in model.config.items() if key not in _IRRELEVANT}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    weights = {name: layer._weight for name, layer in model.named_linears()}
    biases = {f"{name}.bias": layer.bias for name, layer in model.named_linears() if layer.bias is not None}
    for name, value in sorted({**weights, **biases, **model.tensors}.items()):
        arrays = [value.codes, value.scales] if isinstance(value, QTensor) else [value]
        for array in arrays:
            array = array.array if isinstance(array, Stored) else array
            digest.update(f"\n{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.flat[np.linspace(0, array.size - 1, min(array.size, 64)).astype(np.int64)].tobytes())
    return digest.hexdigest()


# -- files

@dataclass(frozen=True)
class GroupShape:
    """What a file says of one input before its numbers are there."""

    layers: tuple[str, ...]
    k: int
    tokens: int
    rows: int
    needs: tuple[str, ...]

    @property
    def matrix_bytes(self) -> int:
        """Of what grows with k squared."""
        return 8 * self.k * self.k * len({"gram", "deviation"}.intersection(self.needs))

    def layout(self, index: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {f"{index}.{need}": (NEEDS[need][0], NEEDS[need][1](self.k, self.rows)) for need in self.needs}


def _shapes(group: InputStatistics) -> GroupShape:
    rows = len(group["samples"]) if "samples" in group else 0
    k = next(iter(group.values())).shape[-1]
    return GroupShape(group.layers, k, group.tokens, rows, tuple(sorted(group)))


class _Write:
    """Writes one group after the other."""

    def __init__(self, write: Callable[[str, np.ndarray], None]) -> None:
        self._write, self._index = write, 0

    def __call__(self, group: InputStatistics) -> None:
        for need, array in group.items():
            self._write(f"{self._index}.{need}", array)
        self._index += 1

    def finish(self, seconds: float, peak_bytes: int) -> None:
        self._write("run", np.array([seconds, peak_bytes], np.float64))


@contextmanager
def _writing(path: str | os.PathLike[str], shapes: Sequence[GroupShape], info: RunInfo) -> Iterator[_Write]:
    layout: dict[str, tuple[str, tuple[int, ...]]] = {"run": ("F64", (2,))}
    for index, shape in enumerate(shapes):
        layout |= shape.layout(index)
    text = json.dumps({"version": VERSION, "info": asdict(info), "groups": [asdict(shape) for shape in shapes]})
    with writing_safetensors(path, layout, {KEY: text}) as write:
        yield _Write(write)


def _read(path: Path) -> Statistics:
    file = open_checkpoint(path)
    if KEY not in file.metadata:
        raise FormatError(f"{path}: holds no statistics of zquant")
    try:
        data = json.loads(file.metadata[KEY])
        if data["version"] > VERSION:
            raise VersionError(f"{path}: statistics of version {data['version']}; this zquant reads up to {VERSION}")
        info = RunInfo(**data["info"])
        shapes = [GroupShape(**{**group, "layers": tuple(group["layers"])}) for group in data["groups"]]
        groups = [_read_group(file, index, shape) for index, shape in enumerate(shapes)]
        seconds, peak = file["run"].tolist()
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path}: not statistics of zquant: {error}") from None
    return Statistics(groups, info, seconds, int(peak))


def _read_group(file: Any, index: int, shape: GroupShape) -> InputStatistics:
    arrays = {}
    for name, (dtype, size) in shape.layout(index).items():
        if file.dtype(name) != dtype or file.shape(name) != size:
            raise ValueError(f"{name} is {file.dtype(name)} {file.shape(name)}, expected {dtype} {size}")
        arrays[name.partition(".")[2]] = file[name]
    return InputStatistics(shape.layers, shape.tokens, arrays)
