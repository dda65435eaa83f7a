"""Model families and loading: ``load(path)`` picks the family by ``config.json``'s ``model_type``."""
from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from . import bert, distilbert, gpt2, gpt_neox, llama, mistral, opt, qwen2, qwen3, roberta  # noqa: F401  (they register)
from .base import Model
from .blocks import Table
from .decoder import CausalLM
from .decoder_family import DECODERS, Architecture, DecoderFamily
from .family import FAMILIES, Dims, Family, register

__all__ = ["DECODERS", "FAMILIES", "CausalLM", "DecoderFamily", "Family", "Model", "load", "read_config", "register"]

_HALVES = ("F16", "BF16")
_FLOATS = ("F32", *_HALVES)


def load(path: str | os.PathLike[str], *, weights: str | None = None, embeddings: bool = True) -> Any:
    """Load a model from a Hugging Face directory; weights are memory-mapped.

    Parameters
    ----------
    path
        Directory with config.json and safetensors weights (single file or sharded; float32, float16, bfloat16, or
        quantized as :meth:`Model.save` writes them). Tensor names may carry the family's prefix (``bert.``).
    weights
        Name of the weight file in the directory, where it is not one of the usual.
    embeddings
        False for an encoder's checkpoint without embedding tables: the model is then called with ``embeddings=``.

    Returns
    -------
    Model or CausalLM
        A decoder (gpt2, opt, gpt_neox, llama, mistral, qwen2, qwen3) as CausalLM. An encoder as Model: with a
        classification head if config.json's ``architectures`` says ``...ForSequenceClassification`` (or says nothing and
        the head's tensors are there). Heads for pre-training in the file are left out.

    Raises
    ------
    FormatError
        A file in place of a directory; no or unreadable config.json; an unknown ``model_type`` (the known are listed);
        missing or unexpected tensors (all named); wrong shapes or types; malformed weight files; NaN or Inf in small
        tensors. Weight matrices are checked when they are packed or quantized: the ValueError then names the layer.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> zq.load(find_minilm())
    BERT(6 layers, hidden 384, 12 heads, 22.7 M parameters, float32, 90.9 MB)
    """
    from ..formats.compressed_tensors import ModelTensors
    from ..formats.safetensors import open_checkpoint

    path = Path(path)
    config = read_config(path)
    family = _family(path, config)
    tensors = ModelTensors(open_checkpoint(path / weights if weights else path), config)
    try:
        reader = (_DecoderReader(family, config, tensors) if isinstance(family, DecoderFamily)
                  else _EncoderReader(family, config, tensors, embeddings))
        return reader.model(path).replace(recipe=_recipe(path, tensors.recipe))
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a model directory; FormatError naming the file if it is missing or something else."""
    file = Path(path) / name
    if Path(path).is_file():
        raise FormatError(f"{path}: is a file; expected a directory, with {name} in it")
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file" if Path(path).is_dir() else f"{path}: no such directory") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _family(path: Path, config: Mapping[str, Any]) -> Family | DecoderFamily:
    known: dict[str, Family | DecoderFamily] = {**FAMILIES, **DECODERS}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise FormatError(f"{path / 'config.json'}: model_type {kind!r} is not known; known: {', '.join(sorted(known))}")
    return known[kind]


def _recipe(path: Path, data: Mapping[str, Any] | None) -> Any:
    """What the file says of its making. A recipe that this version cannot read does not keep the model from running."""
    from ..methods import Recipe

    try:
        return None if data is None else Recipe.from_dict(data)
    except (ValueError, TypeError) as error:
        warnings.warn(f"{path}: the recipe that it was quantized by is not known here: {error}", stacklevel=3)
        return None


class _Reader:
    """Matches a checkpoint's tensors with what the family expects."""

    family: Any
    prefix: str

    def __init__(self, config: Mapping[str, Any], tensors: Any) -> None:
        self.config, self.tensors = config, tensors
        self.stored = {name: name for name in tensors}  # the name that is expected -> the name in the file
        self.transposed: set[str] = set()  # weights stored (in, out)

    def _ignored(self, name: str) -> bool:
        return self.family.is_unused(name)

    def _check(self, expected: Mapping[str, tuple[int, ...]], biases: Iterable[str]) -> None:
        self._compare_names(expected)
        self._compare_shapes(expected)
        for name in biases:
            self._finite(name)

    def _compare_names(self, expected: Mapping[str, Any]) -> None:
        missing = [name for name in expected if name not in self.stored]
        unexpected = [name for name in self.stored if name not in expected and not self._ignored(name)]
        problems = [f"{what} tensors: {', '.join(names)}"
                    for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        if problems:
            raise ValueError(f"{self.family.name} checkpoint with " + "; ".join(problems))

    def _compare_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        problems = []
        for name, shape in expected.items():
            got = self.tensors.shape(self.stored[name])
            if name in self.transposed and not self.tensors.is_quantized(name):
                shape = shape[::-1]
            if got != shape:
                problems.append(f"{name}: expected shape {shape}, got {got}")
            elif not self.tensors.is_quantized(name) and self._dtype(name) not in _FLOATS:
                problems.append(f"{name}: expected {', '.join(_FLOATS)} or quantized, got {self._dtype(name)}")
        if problems:
            raise ValueError("; ".join(problems))

    def _dtype(self, name: str) -> str:
        return self.tensors.checkpoint.dtype(self.stored[name])

    def _halves(self, names: Iterable[str]) -> dict[str, str]:
        """Which of these tensors the file has in 16 bits, and in which."""
        return {name: self._dtype(name) for name in names
                if not self.tensors.is_quantized(self.stored[name]) and self._dtype(name) in _HALVES}

    def _finite(self, name: str) -> np.ndarray:
        """A small tensor, read and checked now."""
        array = self.tensors[self.stored[name]]
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: NaN or Inf")
        return array

    def _table(self, name: str) -> Table:
        """An embedding table as it is stored, mapped. Rows of the word table are checked when they are used."""
        if name.removeprefix(self.prefix) != self.family.embeddings["word"]:
            self._finite(name)
        return self.tensors.table(name)


class _EncoderReader(_Reader):
    """BERT and its relations."""

    def __init__(self, family: Family, config: Mapping[str, Any], tensors: Any, embeddings: bool) -> None:
        super().__init__(config, tensors)
        self.family, self.embeddings = family, embeddings
        self.dims: Dims = family.dims(config)
        # Older BERT checkpoints call the layer norms' weights gamma and beta.
        self.stored = {_renamed(name): name for name in tensors}
        self.prefix = family.prefix if any(name.startswith(family.prefix) for name in tensors) else ""
        self.has_head = self._wants_head()
        self.has_pooler = not self.has_head and family.pooler is not None and self._has(family.pooler)

    def _has(self, module: str) -> bool:
        return any(f"{self.prefix}{module}.{part}" in self.stored for part in ("weight", "bias"))

    def _wants_head(self) -> bool:
        architectures = self.config.get("architectures")
        if architectures:
            return str(architectures[0]).endswith("ForSequenceClassification")
        return self.family.head.out + ".weight" in self.stored

    def model(self, path: Path) -> Model:
        sizes = self.family.linears(self.dims, self.prefix, self.has_head, self.has_pooler)
        tables = self.family.tables(self.dims, self.prefix) if self.embeddings else {}
        small = self.family.norms(self.dims, self.prefix, self.embeddings)
        biases = {f"{name}.bias": (size[0],) for name, size in sizes.items()}
        expected = {f"{name}.weight": size for name, size in sizes.items()} | tables | small | biases
        self._check(expected, biases)
        linears = {name: self.tensors.linear(name) for name in sizes}
        arrays: dict[str, Table] = {name: self._finite(name) for name in small} | {name: self._table(name) for name in tables}
        return Model(self.family, self.config, self.dims, linears, arrays, path=path, prefix=self.prefix,
                     has_head=self.has_head, scheme=self.tensors.scheme, halves=self._halves(expected))

    def _ignored(self, name: str) -> bool:
        pooler = self.family.pooler
        return (self.family.is_unused(name) or (pooler is not None and name.startswith(self.prefix + pooler + "."))
                or (not self.embeddings and name.startswith(self.prefix + "embeddings.")))


class _DecoderReader(_Reader):
    """GPT-2, Llama and their relations."""

    def __init__(self, family: DecoderFamily, config: Mapping[str, Any], tensors: Any) -> None:
        super().__init__(config, tensors)
        self.family = family
        self.dims: Architecture = family.dims(config)
        found = (p for p in family.prefixes if p and any(name.startswith(p) for name in tensors))
        self.prefix = next(found, "")

    def _ignored(self, name: str) -> bool:
        # Checkpoints may hold a tied head a second time.
        return super()._ignored(name) or (self.dims.tied and name == f"{self.family.head}.weight")

    def model(self, path: Path) -> CausalLM:
        family, dims, prefix = self.family, self.dims, self.prefix
        head = f"{family.head}.weight"
        if not dims.tied and head not in self.stored:
            raise ValueError(f"tensor {head} is missing, and the head is not tied to the embedding table "
                             f"(tie_word_embeddings is {self.config.get('tie_word_embeddings', 'absent')})")
        sizes, transposed = family.linears(dims, prefix), family.transposed(dims, prefix)
        self.transposed = {f"{name}.weight" for name in transposed}
        tables, small = family.tables(dims, prefix), family.norms(dims, prefix)
        biases = {f"{name}.bias": (sizes[name][0],) for name in family.biases(dims, prefix)}
        expected = {f"{name}.weight": size for name, size in sizes.items()} | tables | small | biases
        self._check(expected, biases)
        linears = {name: self.tensors.linear(name, name in transposed) for name in sizes}
        arrays: dict[str, Table] = {name: self._finite(name) for name in small} | {name: self._table(name) for name in tables}
        return CausalLM(family, self.config, dims, linears, arrays, path=path, prefix=prefix, scheme=self.tensors.scheme,
                        halves=self._halves(expected))


def _renamed(name: str) -> str:
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith("LayerNorm" + old):
            return name.removesuffix(old) + new
    return name
