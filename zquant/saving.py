"""Save a model as a Hugging Face directory that compressed-tensors readers (vLLM, transformers) also load."""
from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FormatError
from .formats.compressed_tensors import pack_layer, quantization_config, storage_format, zquant_metadata
from .formats.layer_extras import pack_extras
from .formats.safetensors import SINGLE, Stored, replacing, write_safetensors
from .linear import Linear
from .qtensor import QTensor

__all__ = ["check_source", "check_writable", "save"]

# What a tokenizer and sentence-transformers read; weights, configuration and model cards are not copied.
COMPANIONS = ("tokenizer*.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "*.bpe.model", "spiece.model", "modules.json", "sentence_*_config.json",
              "config_sentence_transformers.json", "generation_config.json", "LICENSE*", "NOTICE*")


def save(model: Any, directory: str | os.PathLike[str]) -> Path:
    """Write a model or a sentence encoder, quantized or float, as a Hugging Face directory.

    ``model.safetensors`` and ``config.json`` (with a ``quantization_config``) are written; tokenizer files, and those of
    sentence-transformers (``modules.json`` and the directories that it names), are copied from where the model came from.
    Everything is written to a temporary directory, inside the target where that exists and else beside it, and moved into
    place when it is complete; files of the target that have other names are left alone.

    Parameters
    ----------
    model
        A Model or a SentenceEncoder.
    directory
        Created if it does not exist, as is what a symbolic link leads to. It may be the directory that the model was loaded
        from.

    Returns
    -------
    pathlib.Path
        The directory.

    Raises
    ------
    ValueError
        ``directory`` is a file; or the files of a sentence encoder are no longer those that it was loaded with.
    OSError
        ``directory`` cannot be written (:func:`check_writable` says so beforehand); or the directory that the model was
        loaded from is gone, or a file in it that is to be copied cannot be read (:func:`check_source` says so beforehand).

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
    check_source(model)
    place, staging = _stage(target)
    new = staging / "model"  # with the permissions of any new directory there; the temporary one is its maker's alone
    try:
        new.mkdir()
        _write(model, new)
        _move_in(new, place)
    except OSError as error:
        # The temporary directory means nothing to the caller; errors about the model's own files stay as they are.
        if error.errno is not None and (error.filename is None or str(staging) in str(error.filename)):
            raise _about(target, error, place) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def check_source(model: Any) -> None:
    """Raise what :func:`save` would raise if it could not copy what belongs to the model from where it was loaded. Cheap: to be
    asked before work that ends in saving its result.

    Parameters
    ----------
    model
        A Model or a SentenceEncoder; one made of it copies from the same directory.

    Raises
    ------
    ValueError
        The files of a sentence encoder are no longer those that it was loaded with.
    OSError
        The directory is gone, or a file in it that is to be copied cannot be read.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> check_source(zq.SentenceEncoder(find_minilm()))
    """
    for source in _sources(model):
        for path in _companions(source):
            if not (source / path).is_dir():
                with open(source / path, "rb"):
                    pass
    if hasattr(model, "model"):
        model.check_files()


def check_writable(path: Path) -> None:
    """Raise what :func:`save` would raise at its end if it could not write there. Cheap, and nothing is left behind.

    Parameters
    ----------
    path
        The directory that is to be written; it need not exist.

    Raises
    ------
    ValueError
        It is a file, or a symbolic link that leads back to itself.
    OSError
        No permission, a file system that is read-only or full, a file where one of its parents should be.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     check_writable(Path(place) / "a" / "new")
    ...     os.listdir(place)
    []
    """
    _, staging = _stage(Path(path))
    staging.rmdir()


def _stage(target: Path) -> tuple[Path, Path]:
    """Where the target is once links are followed, and a temporary directory: in the nearest directory that exists, the
    target itself if it does. Its parent may be read-only or on another file system, as with a mounted volume."""
    place = room = Path(os.path.realpath(target))
    try:
        if place.is_symlink():
            raise ValueError(f"{target}: is a symbolic link that leads back to itself; save needs a directory")
        if place.exists() and not place.is_dir():
            raise ValueError(f"{target}: is a file; save needs a directory")
        room = next(directory for directory in (place, *place.parents) if directory.exists())
        return place, Path(tempfile.mkdtemp(prefix=".zquant-save-", dir=room))
    except OSError as error:
        raise _about(target, error, room) from None


def _about(target: Path, error: OSError, room: Path) -> OSError:
    """The same error, of the same class, with the target in place of a temporary name."""
    return OSError(error.errno, f"the model cannot be written: {error.strerror} in {room}", str(target))


def _write(model: Any, directory: Path) -> None:
    """A sentence encoder may keep its Transformer in a subdirectory: the layout stays as it was. The source is needed for as
    long as its files are copied; it may go while the weights, which take longest, are written."""
    root, inner, place = Path(model.path), getattr(model, "model", None), directory
    for source in _sources(model):
        place = directory / source.relative_to(root)
        place.mkdir(parents=True, exist_ok=True)
        _copy_companions(source, place)
    if inner is not None:
        model.check_files()
        settings = model.length_settings()
        if settings is not None:
            (place / "sentence_bert_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    _write_model(model if inner is None else inner, place)


def _sources(model: Any) -> list[Path]:
    """The directory that a model was loaded from, and behind it that of an encoder's Transformer if it has its own."""
    root = Path(model.path)
    transformer = model.transformer if hasattr(model, "model") else root
    return [root] if transformer == root else [root, transformer]


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
    tensors: dict[str, np.ndarray | Stored] = {}
    for name, layer in linears.items():
        if isinstance(layer.weight, QTensor):
            packed = storage_format(layer.weight.spec, layer.activations) == "pack-quantized"
            tensors.update(pack_layer(name, layer.weight, packed))
        else:
            tensors[f"{name}.weight"] = _float_weight(model, name, layer._weight)
        tensors.update(pack_extras(name, layer.extras, layer.activations is None or layer.activations.symmetric))
        if layer.bias is not None:
            tensors[f"{name}.bias"] = _as_it_came(model.halves.get(f"{name}.bias"), layer.bias)
    for name, table in tables.items():
        tensors.update(pack_layer(name, table, packed=False))
    for name, array in model.tensors.items():
        if not isinstance(array, QTensor):
            tensors[name] = array if isinstance(array, Stored) else _as_it_came(model.halves.get(name), array)
    return tensors


def _float_weight(model: Any, name: str, weight: Any) -> np.ndarray | Stored:
    transposed = name in model.transposed
    if isinstance(weight, Stored):
        return Stored(weight.array.T, weight.dtype) if transposed else weight
    return _as_it_came(model.halves.get(f"{name}.weight"), weight.T if transposed else weight)


def _as_it_came(dtype: str | None, array: np.ndarray) -> np.ndarray | Stored:
    """float32 values that were read from float16 or bfloat16 go back as such, where that loses nothing. The checkpoint is not
    asked: it may have been overwritten since."""
    if dtype is None or array.dtype != np.float32:
        return array
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = Stored(array.astype(np.float16), dtype)
    else:
        half = Stored((array.view(np.uint32) >> 16).astype(np.uint16), dtype)
    return half if np.array_equal(half.float32(), array) else array


def _copy_companions(source: Path, directory: Path) -> None:
    """Errors are raised, and name the file: a model without its tokenizer looks saved and is not. Contents alone are copied:
    that the source may be read-only is nothing to its copy."""
    for path in _companions(source):
        if (source / path).is_dir():
            (directory / path).mkdir(parents=True, exist_ok=True)
        else:
            shutil.copyfile(source / path, directory / path)


def _companions(source: Path) -> Iterator[Path]:
    """What is copied, relative to ``source``: files, and directories before what is in them."""
    if not source.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the directory that the model was loaded from, whose tokenizer and other files "
                                "are saved with it, is gone; load the model from where it is now", str(source))
    for name in sorted(os.listdir(source)):
        if any(fnmatchcase(name, pattern) for pattern in COMPANIONS) and not (source / name).is_dir():
            yield Path(name)
    for module in _sentence_modules(source):
        if (source / module).is_dir():  # modules without settings, such as Normalize, may have none
            yield from _module(source, Path(module))


def _module(source: Path, module: Path) -> Iterator[Path]:
    yield module
    for name in () if _is_transformer(source / module) else sorted(os.listdir(source / module)):
        if (source / module / name).is_dir():
            yield from _module(source, module / name)
        else:
            yield module / name


def _sentence_modules(source: Path) -> list[str]:
    """The directories that modules.json names, those inside ``source`` only."""
    file = source / "modules.json"
    if not file.exists():
        return []
    try:
        paths = [Path(str(module.get("path", ""))) for module in json.loads(file.read_bytes())]
    except (ValueError, AttributeError, TypeError) as error:
        raise FormatError(f"{file}: not a list of modules: {error!r}") from None
    return [str(path) for path in paths if path.parts and ".." not in path.parts and not path.is_absolute()]


def _is_transformer(directory: Path) -> bool:
    """The Transformer's own directory is written, not copied: it is the one with a model_type in config.json."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _move_in(new: Path, place: Path) -> None:
    """Into place: one rename for a new directory, else file by file, weights before the configuration that names them."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(new, place)
        return
    files = sorted((file for file in new.rglob("*") if file.is_file()), key=lambda file: file.name == "config.json")
    moves = [(file, place / file.relative_to(new)) for file in files]
    for _, to in moves:  # all of them before the first is moved: a directory that is half old and half new is no model
        _check_file(to)
    for file, to in moves:
        _move(file, to)


def _check_file(new: Path) -> None:
    if new.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory, where a file of the model goes", str(new))
    parent = next(directory for directory in new.parents if directory.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, where a directory of the model goes", str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written, and a file of the model goes there", str(parent))


def _move(file: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(file, new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing(new) as temporary:  # a subdirectory of the target may be a link to another file system, or a mount
            shutil.copyfile(file, temporary)
