"""quantize: a model in, a quantized model out."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from ._progress import bar
from .calibrate import MODES, _one_of, read_sequences, walk
from .formats.safetensors import Stored
from .linear import Linear
from .mapped import release
from .methods import Method, get_method
from .qtensor import QTensor
from .spec import QuantSpec, Scheme
from .statistics import InputStatistics, Statistics

__all__ = ["quantize"]

PIECE = 1 << 22  # weights of a large matrix that are float32 at a time

M = TypeVar("M")


def quantize(model: M, scheme: str | Scheme = "w8a8", method: str | Method = "rtn", *, calib: Any = None,
             mode: str = "sequential", samples: int = 128, seq_len: int | None = None, seed: int = 0,
             show_progress_bar: bool | None = None) -> M:
    """Quantize a model's linear layers (and, if the scheme says so, its word embeddings).

    The layers are taken one at a time, so that a model whose weights are mapped from disk is never in memory as a whole.

    Parameters
    ----------
    model
        A Model or a SentenceEncoder. It is not changed.
    scheme
        A name ("w8a8", "w4/8a8-g128", ...; see :meth:`Scheme.parse`) or a :class:`Scheme`.
    method
        A name or a :class:`Method`.
    calib
        For methods that look at data (``method.needs``; others ignore it): texts, ids or "random" as for
        :func:`zquant.calibrate`, or :class:`zquant.Statistics` of this model. Keep it apart from what you evaluate on.
    mode
        "sequential": statistics of each layer are taken after those before it have been quantized, inside a block too.
        "parallel": those of the float model throughout. Statistics that are given are used as they are.
    samples, seq_len, seed
        What is taken of ``calib``; see :func:`zquant.calibrate`.
    show_progress_bar
        True or False; None shows one in a terminal or notebook, when the work takes more than two seconds.

    Returns
    -------
    Model or SentenceEncoder
        A new one of the same kind.

    Raises
    ------
    ValueError
        Unknown scheme or method; NaN or Inf in a weight, a layer that cannot run in the format, a model that is
        quantized already (each names the layer); an override that matches no layer; a method that needs data without
        ``calib``, data without tokens, statistics of another model.
    """
    quantizer = Quantizer(model, scheme, method)
    needs = quantizer.method.needs
    _one_of("mode", mode, MODES)
    if not needs:
        quantizer.layer_by_layer(None, show_progress_bar)
    elif calib is None:
        raise ValueError(f"method {type(quantizer.method).__name__} needs {', '.join(sorted(needs))} of the layers' inputs: "
                         "give calib=, a text of the kind that the model will see")
    elif isinstance(calib, Statistics):
        calib.check(model, needs, quantizer.specs)
        quantizer.layer_by_layer(calib, show_progress_bar)
    elif quantizer.specs:
        sequences = read_sequences(model, calib, samples=samples, seq_len=seq_len, seed=seed)
        begin = quantizer.start if mode == "sequential" else quantizer.network
        walk(begin, sequences.ids, needs, quantizer.visit, sequential=mode == "sequential", wanted=quantizer.specs, seed=seed,
             reference=quantizer.network, progress=show_progress_bar)
    return quantizer.finish()


class Quantizer:
    """A model while it is being quantized.

    Attributes
    ----------
    network : the float model
    start : the same with quantized word embeddings, if the scheme says so: where the sequential mode begins
    specs : name -> format of the layers that are quantized
    """

    def __init__(self, model: Any, scheme: str | Scheme, method: str | Method) -> None:
        self.model, self.scheme, self.method = model, Scheme.parse(scheme), get_method(method)
        scheme, inner = self.scheme, getattr(model, "model", None)
        self.network: Any = inner if inner is not None and hasattr(model, "encode") else model
        self._layers: dict[str, Linear] = dict(self.network.named_linears())
        _check_overrides(scheme, self._layers)
        if scheme.int8_attention and not hasattr(self.network, "has_head"):
            raise ValueError(f"scheme {scheme.name}: int8 attention is for encoders, not {type(self.network).__name__}")
        specs = {name: scheme.weights_for(name) for name in self._layers}
        self.specs = {name: spec for name, spec in specs.items() if spec is not None}
        for name in self.specs:
            _refuse_quantized(name, self._layers[name]._weight)
        self._linears: dict[str, Linear] = {}

    @cached_property
    def start(self) -> Any:
        return self.network.replace(embeddings=self._tables, scheme=self.scheme)

    @cached_property
    def _tables(self) -> dict[str, QTensor]:
        """Word embeddings. Tables round to nearest whatever the method is: a row is read, not multiplied."""
        method = self.method if not self.method.needs else get_method("rtn")
        return {name: _quantize_table(name, table, self.scheme.embeddings, method)
                for name, table in self.network.embeddings.items()
                if self.scheme.embeddings is not None and table is self.network.word_embeddings}

    def visit(self, stats: InputStatistics) -> dict[str, Linear]:
        """The layers that ``stats`` is about, quantized; see :func:`zquant.calibrate.walk`."""
        found = {name: self._quantize(name, stats) for name in stats.layers if name in self.specs}
        self._linears.update(found)
        return found

    def layer_by_layer(self, stats: Statistics | None, show: bool | None) -> None:
        """All layers, with statistics that are there already or with none."""
        for name in bar(self.specs, "quantize", show, total=len(self.specs), unit="layer"):
            self._linears[name] = self._quantize(name, None if stats is None else stats[name])

    def _quantize(self, name: str, stats: InputStatistics | None) -> Linear:
        layer = self._layers[name]
        weight = _quantize_weight(name, layer._weight, self.specs[name], self.method, stats)
        layer.release()
        return layer.with_weight(weight, self.scheme.activations)

    def finish(self) -> Any:
        """The quantized model, of the kind that was given."""
        small = self.network.replace(linears=self._linears, embeddings=self._tables, scheme=self.scheme)
        return small if self.network is self.model else self.model.replace(model=small)


def _check_overrides(scheme: Scheme, names: Iterable[str]) -> None:
    """A pattern that the user gave and that matches nothing is a mistake; those of the named schemes may not apply."""
    built_in = set(Scheme.parse("w4/8a8").overrides)
    for glob, spec in scheme.overrides:
        if (glob, spec) not in built_in and not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"scheme {scheme.name}: override {glob!r} matches no linear layer of the model")


def _quantize_table(name: str, table: Any, spec: QuantSpec, method: Method) -> QTensor:
    """An embedding table, of whatever float type. ZeroQuant quantizes that of words; the others are small."""
    if isinstance(table, np.ndarray) and table.dtype == np.float16:
        table = Stored(table, "F16")
    return _quantize_weight(name, table, spec, method)


def _refuse_quantized(name: str, weight: Any) -> None:
    if isinstance(weight, QTensor):
        raise ValueError(f"{name}: is quantized already ({weight.spec}); quantize the float model instead")


def _quantize_weight(name: str, weight: Any, spec: QuantSpec, method: Method,
                     stats: Mapping[str, np.ndarray] | None = None) -> QTensor:
    _refuse_quantized(name, weight)
    array = weight.array if isinstance(weight, Stored) else weight
    try:
        if method.by_rows and spec.granularity in ("channel", "group") and array.size > PIECE:
            try:
                return _in_pieces(weight, spec, method, stats)
            except ValueError:
                pass  # as a whole it fails again, and says which row of the matrix it is
        return method.quantize(_float32(weight), spec, stats)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    finally:
        release(array)


def _float32(weight: np.ndarray | Stored) -> np.ndarray:
    return weight.float32() if isinstance(weight, Stored) else weight.astype(np.float32, copy=False)


def _in_pieces(weight: np.ndarray | Stored, spec: QuantSpec, method: Method,
               stats: Mapping[str, np.ndarray] | None) -> QTensor:
    """Some rows at a time, so that the float32 copy of a large float16 matrix never exists; the same codes."""
    n, k = weight.shape
    codes = np.empty((n, k), np.int8 if spec.symmetric else np.uint8)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    for start in range(0, n, step := max(1, PIECE // k)):
        part = slice(start, start + step)
        rows = Stored(weight.array[part], weight.dtype) if isinstance(weight, Stored) else weight[part]
        piece = method.quantize(_float32(rows), spec, stats)
        codes[part] = piece.codes
        scales.append(piece.scales)
        if piece.zeros is not None:
            zeros.append(piece.zeros)
        release(rows.array if isinstance(rows, Stored) else rows)
    return QTensor(codes, np.concatenate(scales), np.concatenate(zeros) if zeros else None, spec)
