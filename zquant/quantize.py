"""quantize: a model in, a quantized model out."""
from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import numpy as np

from ._progress import bar
from .formats.safetensors import Stored
from .linear import Linear
from .mapped import release
from .methods import Method, get_method
from .qtensor import QTensor
from .spec import QuantSpec, Scheme

__all__ = ["quantize"]

PIECE = 1 << 22  # weights of a large matrix that are float32 at a time

M = TypeVar("M")


def quantize(model: M, scheme: str | Scheme = "w8a8", method: str | Method = "rtn", *,
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
        quantized already (each names the layer); an override that matches no layer.
    """
    scheme, method = Scheme.parse(scheme), get_method(method)
    inner = getattr(model, "model", None)
    if inner is not None and hasattr(model, "encode"):
        small = quantize(inner, scheme, method, show_progress_bar=show_progress_bar)
        return model.replace(model=small)  # type: ignore[attr-defined]
    layers = dict(model.named_linears())  # type: ignore[attr-defined]
    _check_overrides(scheme, layers)
    if scheme.int8_attention and not hasattr(model, "has_head"):
        raise ValueError(f"scheme {scheme.name}: int8 attention is for encoders, not {type(model).__name__}")
    linears = {}
    for name, layer in bar(layers.items(), "quantize", show_progress_bar, total=len(layers), unit="layer"):
        spec = scheme.weights_for(name)
        if spec is not None:
            linears[name] = _quantize_layer(name, layer, spec, scheme.activations, method)
    tables = {name: _quantize_table(name, table, scheme.embeddings, method)
              for name, table in model.embeddings.items()  # type: ignore[attr-defined]
              if scheme.embeddings is not None and table is model.word_embeddings}  # type: ignore[attr-defined]
    return model.replace(linears=linears, embeddings=tables, scheme=scheme)  # type: ignore[attr-defined]


def _check_overrides(scheme: Scheme, names: Iterable[str]) -> None:
    """A pattern that the user gave and that matches nothing is a mistake; those of the named schemes may not apply."""
    built_in = set(Scheme.parse("w4/8a8").overrides)
    for glob, spec in scheme.overrides:
        if (glob, spec) not in built_in and not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"scheme {scheme.name}: override {glob!r} matches no linear layer of the model")


def _quantize_layer(name: str, layer: Linear, spec: QuantSpec, activations: QuantSpec | None, method: Method) -> Linear:
    weight = _quantize_weight(name, layer._weight, spec, method)
    layer.release()
    return layer.with_weight(weight, activations)


def _quantize_table(name: str, table: Any, spec: QuantSpec, method: Method) -> QTensor:
    """An embedding table, of whatever float type. ZeroQuant quantizes that of words; the others are small."""
    if isinstance(table, np.ndarray) and table.dtype == np.float16:
        table = Stored(table, "F16")
    return _quantize_weight(name, table, spec, method)


def _quantize_weight(name: str, weight: np.ndarray | Stored | QTensor, spec: QuantSpec, method: Method) -> QTensor:
    if isinstance(weight, QTensor):
        raise ValueError(f"{name}: is quantized already ({weight.spec}); quantize the float model instead")
    array = weight.array if isinstance(weight, Stored) else weight
    try:
        if method.by_rows and spec.granularity in ("channel", "group") and array.size > PIECE:
            try:
                return _in_pieces(weight, spec, method)
            except ValueError:
                pass  # as a whole it fails again, and says which row of the matrix it is
        return method.quantize(_float32(weight), spec)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    finally:
        release(array)


def _float32(weight: np.ndarray | Stored) -> np.ndarray:
    return weight.float32() if isinstance(weight, Stored) else weight.astype(np.float32, copy=False)


def _in_pieces(weight: np.ndarray | Stored, spec: QuantSpec, method: Method) -> QTensor:
    """Some rows at a time, so that the float32 copy of a large float16 matrix never exists; the same codes."""
    n, k = weight.shape
    codes = np.empty((n, k), np.int8 if spec.symmetric else np.uint8)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    for start in range(0, n, step := max(1, PIECE // k)):
        part = slice(start, start + step)
        rows = Stored(weight.array[part], weight.dtype) if isinstance(weight, Stored) else weight[part]
        piece = method.quantize(_float32(rows), spec)
        codes[part] = piece.codes
        scales.append(piece.scales)
        if piece.zeros is not None:
            zeros.append(piece.zeros)
        release(rows.array if isinstance(rows, Stored) else rows)
    return QTensor(codes, np.concatenate(scales), np.concatenate(zeros) if zeros else None, spec)
