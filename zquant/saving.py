"""Save a model as a Hugging Face directory that compressed-tensors readers (vLLM, transformers) also load."""
from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FormatError
from .formats.compressed_tensors import pack_layer, quantization_config, storage_format, zquant_metadata
from .formats.layer_extras import pack_extras
from .formats.safetensors import SINGLE, Checkpoint, Stored, open_checkpoint, write_safetensors
from .linear import Linear
from .qtensor import QTensor

__all__ = ["save"]

# What a tokenizer and sentence-transformers read; weights, configuration and model cards are not copied.
COMPANIONS = ("tokenizer*.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "*.bpe.model", "spiece.model", "modules.json", "sentence_*_config.json",
              "config_sentence_transformers.json", "generation_config.json", "LICENSE*", "NOTICE*")


def save(model: Any, directory: str | os.PathLike[str]) -> Path:
    """Write a model or a sentence encoder, quantized or float, as a Hugging Face directory.

    ``model.safetensors`` and ``config.json`` (with a ``quantization_config``) are written; tokenizer files, and those of
    sentence-transformers (``modules.json`` and the directories that it names), are copied from where the model came from.
    Everything is written to a temporary directory beside the target and moved in when it is complete; files of the target
    that have other names are left alone.

    Parameters
    ----------
    model
        A Model or a SentenceEncoder.
    directory
        Created if it does not exist. It may be the directory that the model was loaded from.

    Returns
    -------
    pathlib.Path
        The directory.

    Raises
    ------
    ValueError
        ``directory`` is a file.

    Notes
    -----
    ``transformers.AutoModel.from_pretrained`` reads the directory where compressed-tensors (0.20) is installed;
    ``sentence_transformers.SentenceTransformer`` does with
    ``model_kwargs={"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}``.

    Decoders: ``AutoModelForCausalLM`` reads them too, but where the head is tied to the embedding table only with a float
    table (schemes with "+e32") or with ``dequantize=True``. GPT-2 is the exception: transformers builds it of ``Conv1D``
    layers, which compressed-tensors does not know. Its codes are stored as everybody's, (out, in), and are read by zquant.

    Static ranges of activations are compressed-tensors' own. The other extras of a layer (a branch, a correction, outliers)
    are not: other readers pass over their tensors, and compute something else.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file; save needs a directory")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    try:
        _write(model, staging)
        _move_in(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _write(model: Any, directory: Path) -> None:
    """A sentence encoder may keep its Transformer in a subdirectory: the layout stays as it was."""
    inner = getattr(model, "model", None)
    if inner is None:
        _write_model(model, directory)
        _copy_companions(Path(model.path), directory)
        return
    root = Path(model.path)
    place = directory / (Path(inner.path).relative_to(root) if Path(inner.path).is_relative_to(root) else "")
    place.mkdir(parents=True, exist_ok=True)
    _copy_companions(root, directory)
    if place != directory:
        _copy_companions(Path(inner.path), place)
    _write_model(inner, place)


def _write_model(model: Any, directory: Path) -> None:
    linears: Mapping[str, Linear] = dict(model.named_linears())
    tables = {name.removesuffix(".weight"): t for name, t in model.tensors.items() if isinstance(t, QTensor)}
    metadata = zquant_metadata(model.scheme, linears, model.recipe and model.recipe.to_dict())
    write_safetensors(directory / SINGLE, _tensors(model, linears, tables), metadata)
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    if tables or any(layer.spec is not None for layer in linears.values()):
        config["quantization_config"] = quantization_config(linears, tables, model.unlisted)
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(model: Any, linears: Mapping[str, Linear], tables: Mapping[str, QTensor]) -> dict[str, np.ndarray | Stored]:
    """Everything that is stored, by its name in the file."""
    source = _source(model)
    transposed = model.transposed
    tensors: dict[str, np.ndarray | Stored] = {}
    for name, layer in linears.items():
        if isinstance(layer.weight, QTensor):
            packed = storage_format(layer.weight.spec, layer.activations) == "pack-quantized"
            tensors.update(pack_layer(name, layer.weight, packed))
        else:
            weight = layer.weight.T if name in transposed else layer.weight
            tensors[f"{name}.weight"] = _as_it_came(source, f"{name}.weight", weight)
        tensors.update(pack_extras(name, layer.extras, layer.activations is None or layer.activations.symmetric))
        if layer.bias is not None:
            tensors[f"{name}.bias"] = _as_it_came(source, f"{name}.bias", layer.bias)
    for name, table in tables.items():
        tensors.update(pack_layer(name, table, packed=False))
    for name, array in model.tensors.items():
        if not isinstance(array, QTensor):
            tensors[name] = array if isinstance(array, Stored) else _as_it_came(source, name, array)
    return tensors


def _source(model: Any) -> Checkpoint | None:
    try:
        return open_checkpoint(model.path)
    except FormatError:
        return None


def _as_it_came(source: Checkpoint | None, name: str, array: np.ndarray) -> np.ndarray | Stored:
    """float32 values that were read from float16 or bfloat16 go back as they were, if they still are what was read."""
    if source is None or name not in source or source.dtype(name) not in ("F16", "BF16") or array.dtype != np.float32:
        return array
    stored = source.stored(name)
    return stored if np.array_equal(stored.float32(), array) else array


def _copy_companions(source: Path, directory: Path) -> None:
    if not source.is_dir():
        return
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
    for module in _sentence_modules(source):
        if module and module != "." and (source / module).is_dir():
            shutil.copytree(source / module, directory / module, dirs_exist_ok=True, copy_function=shutil.copyfile,
                            ignore=_transformer_weights)


def _sentence_modules(source: Path) -> list[str]:
    """The directories that modules.json names, those inside ``source`` only."""
    try:
        modules = json.loads((source / "modules.json").read_bytes())
        paths = [str(module.get("path", "")) for module in modules]
    except (OSError, ValueError, AttributeError, TypeError):
        return []
    return [path for path in paths if path and ".." not in Path(path).parts and not Path(path).is_absolute()]


def _transformer_weights(directory: str, names: list[str]) -> set[str]:
    """The Transformer's own directory is written, not copied: it is the one with a model_type in config.json."""
    try:
        config = json.loads((Path(directory) / "config.json").read_bytes())
    except (OSError, ValueError):
        return set()
    return set(names) if isinstance(config, dict) and "model_type" in config else set()


def _move_in(staging: Path, target: Path) -> None:
    """Into place: one rename for a new directory, else file by file, weights before the configuration that names them."""
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)
    if not target.exists():
        os.rename(staging, target)
        return
    files = sorted((file for file in staging.rglob("*") if file.is_file()), key=lambda file: file.name == "config.json")
    for file in files:
        place = target / file.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
