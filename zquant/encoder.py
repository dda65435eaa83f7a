"""SentenceEncoder: sentences to vectors, as a sentence-transformers directory describes it."""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .checks import as_count
from .errors import FormatError
from .models import DECODERS, FAMILIES, Model, load, read_config
from .tokenization import TextTokenizer, check_text

__all__ = ["SentenceEncoder"]

# A progress bar by default from this many sentences on.
_BAR = 2000
# Tokens of the shortest max_seq_length: two special ones, and one of the text.
_SHORTEST = 3
# In the order in which sentence-transformers concatenates them.
_POOLING = {"cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens"}


@dataclass(frozen=True)
class _Pipeline:
    """What modules.json says: where the Transformer is, how its hidden states become a vector."""

    transformer: Path
    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_length: int | None = None
    lower: bool = False


class SentenceEncoder:
    """A sentence embedding model.

    Parameters
    ----------
    path_or_model
        A sentence-transformers directory (modules.json, 1_Pooling, sentence_bert_config.json), a plain Hugging Face
        directory (mean pooling, no normalisation), or a Model, whose ``path`` then supplies these files.

    Attributes
    ----------
    model : Model
    dimension : int, features of an embedding
    path : Path of the directory, absolute
    max_seq_length : int, tokens per sentence, special tokens included

    Raises
    ------
    FormatError
        A directory that does not hold an encoder that can be read; modules or pooling modes that are not supported (the
        known are listed).
    TypeError
        Something else than a directory or a Model, a CausalLM say.

    >>> from zquant.demo_model import find_minilm
    >>> enc = SentenceEncoder(find_minilm())
    >>> enc
    SentenceEncoder(384 features, mean pooling, normalized, up to 256 tokens,
      BERT(6 layers, hidden 384, 12 heads, 22.7 M parameters, float32, 90.9 MB))
    >>> a = enc.encode(["The sky is clear.", "There are no clouds.", "He sold the car."])
    >>> a.shape, bool(enc.similarity(a[0], a[1]) > enc.similarity(a[0], a[2]))
    ((3, 384), True)
    """

    def __init__(self, path_or_model: str | os.PathLike[str] | Model) -> None:
        given = path_or_model if isinstance(path_or_model, Model) else None
        if given is None and not isinstance(path_or_model, (str, os.PathLike)):
            raise TypeError("SentenceEncoder: expected the path of a directory or a zquant.Model, an encoder; "
                            f"got {type(path_or_model).__name__}")
        path = Path(given.path if given is not None else path_or_model)  # type: ignore[arg-type]
        pipeline = _read_pipeline(path)
        self.model = _load_encoder(pipeline.transformer) if given is None else given
        self._prompts, self._default_prompt = _read_prompts(path)
        # Absolute: the tokenizer is read when first used, and save copies from there, wherever that happens.
        self.path, self._pipeline = path.absolute(), replace(pipeline, transformer=pipeline.transformer.absolute())
        self._max_seq_length = min(pipeline.max_length or self.model.max_length, self.model.max_length)
        self._tokenizer: TextTokenizer | None = None

    @property
    def max_seq_length(self) -> int:
        """Tokens per sentence, special tokens included; what exceeds them is cut. sentence_bert_config.json's, at most what the
        position table allows; it may be set.

        Raises
        ------
        ValueError
            Set to less than 3 (the special tokens and one of the text) or to more than the position table has.
        """
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self._max_seq_length = as_count("max_seq_length", value, _SHORTEST, self.model.max_length)

    @property
    def transformer(self) -> Path:
        """The directory with the model's and the tokenizer's files: ``path``, or the folder in it that modules.json names."""
        return self._pipeline.transformer

    @property
    def dimension(self) -> int:
        """Features of an embedding."""
        return self.model.dims.hidden * len(self._pipeline.pooling)

    @property
    def pooling(self) -> tuple[str, ...]:
        """"mean", "cls" (first token) or "max"; several are concatenated."""
        return self._pipeline.pooling

    @property
    def normalize(self) -> bool:
        """Whether embeddings have unit length by default."""
        return self._pipeline.normalize

    @property
    def nbytes(self) -> int:
        """Bytes of the model's weights as stored."""
        return self.model.nbytes

    def replace(self, model: Model) -> SentenceEncoder:
        """The same encoder around another model of the same size.

        Raises
        ------
        TypeError
            Something else than a Model.
        ValueError
            Another hidden size.
        """
        if not isinstance(model, Model):
            raise TypeError(f"replace: expected a zquant.Model, an encoder; got {type(model).__name__}")
        if model.dims.hidden != self.model.dims.hidden:
            raise ValueError(f"replace: expected hidden size {self.model.dims.hidden}, got {model.dims.hidden}")
        new = object.__new__(SentenceEncoder)
        new.__dict__.update(self.__dict__, model=model, _max_seq_length=min(self.max_seq_length, model.max_length))
        return new

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the encoder as a sentence-transformers directory; see :func:`zquant.saving.save`."""
        from .saving import save

        return save(self, directory)

    def length_settings(self) -> dict[str, Any] | None:
        """What sentence_bert_config.json is to say where ``max_seq_length`` is not what the files say; else None."""
        read = self._pipeline.max_length or self.model.max_length
        if self.max_seq_length == min(read, self.model.max_length):
            return None
        name = "sentence_bert_config.json"
        options = read_config(self.transformer, name) if (self.transformer / name).is_file() else {}
        return {**options, "max_seq_length": self.max_seq_length}

    def check_files(self) -> None:
        """Whether ``path`` still describes this encoder: :func:`zquant.saving.save` copies from there.

        Raises
        ------
        FormatError
            A file is missing or cannot be read.
        ValueError
            Pooling, normalisation, the length or the prompts are no longer those that were loaded.
        """
        now = replace(_read_pipeline(self.path), transformer=self.transformer), _read_prompts(self.path)
        if now != (self._pipeline, (self._prompts, self._default_prompt)):
            raise ValueError(f"{self.path}: its modules.json, or a file that belongs to it, has changed since the encoder was "
                             "loaded; load it again")

    def tokenize(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each sentence, special tokens included, cut at ``max_seq_length``; int32 arrays.

        Raises
        ------
        TypeError, ValueError
            Something that is not a string, or not valid text; the message has its index.
        """
        if self._tokenizer is None or self._tokenizer.max_length != self.max_seq_length:
            self._tokenizer = TextTokenizer(self.transformer, self.max_seq_length, self._pipeline.lower)
        return self._tokenizer(sentences)

    def encode(self, sentences: str | Sequence[str], batch_size: int = 32, normalize_embeddings: bool | None = None,
               show_progress_bar: bool | None = None, *, prompt: str | None = None, prompt_name: str | None = None,
               output_value: str = "sentence_embedding") -> Any:
        """Embed sentences.

        Parameters
        ----------
        sentences
            A string or a sequence of strings. "" is a sentence; one longer than ``max_seq_length`` tokens is cut.
        batch_size
            Sentences per forward. It changes neither the result nor, as nothing is padded, much of the speed.
        normalize_embeddings
            Whether to scale embeddings to unit length; None as modules.json says.
        show_progress_bar
            True, False, or None: from 2,000 sentences on.
        prompt, prompt_name
            Text put before every sentence, or its name in config_sentence_transformers.json; by default that file's
            ``default_prompt_name``, if it has one.
        output_value
            "sentence_embedding", or "token_embeddings": a list of (tokens, hidden) float32 arrays, one per sentence.

        Returns
        -------
        numpy.ndarray
            (n, dimension) float32 in the order given, (0, dimension) for an empty list; (dimension,) for a string.

        Raises
        ------
        ValueError
            Something that is not a string or not valid text (a lone surrogate), naming its index; batch_size below 1; unknown
            prompt names.
        TypeError
            ``sentences`` is neither a string nor a sequence, or a prompt or its name is not a string.
        """
        one = isinstance(sentences, str)
        texts = _texts([sentences] if one else sentences)
        batch_size = as_count("batch_size", batch_size, 1)
        if output_value not in ("sentence_embedding", "token_embeddings"):
            raise ValueError(f"output_value: expected 'sentence_embedding' or 'token_embeddings', got {output_value!r}")
        prefix = self._prompt(prompt, prompt_name)
        ids = self.tokenize([prefix + text for text in texts] if prefix else texts)
        bar = _progress(len(texts), show_progress_bar)
        try:
            if output_value == "token_embeddings":
                out: Any = self._tokens(ids, int(batch_size), bar)
            else:
                out = self._vectors(ids, int(batch_size), bar)
                if self.normalize if normalize_embeddings is None else normalize_embeddings:
                    out /= np.maximum(np.sqrt(np.einsum("ij,ij->i", out, out)), np.float32(1e-12))[:, None]
        finally:
            if bar is not None:
                bar.close()
        return out[0] if one else out

    def _vectors(self, ids: list[np.ndarray], batch_size: int, bar: Any) -> np.ndarray:
        out = np.empty((len(ids), self.dimension), np.float32)
        for index, packed in self._batches(ids, batch_size):
            for start, stop, hidden in self.model.stream(packed):
                offsets = packed.offsets[start:stop + 1] - packed.offsets[start]
                _pool(hidden, offsets, self.pooling, out, index[start:stop])
                if bar is not None:
                    bar.update(stop - start)
        return out

    def _tokens(self, ids: list[np.ndarray], batch_size: int, bar: Any) -> list[np.ndarray]:
        out: list[Any] = [None] * len(ids)
        for index, packed in self._batches(ids, batch_size):
            hidden = self.model.hidden(packed)
            for place, rows in zip(index, np.split(hidden, packed.offsets[1:-1])):
                out[place] = rows.copy()
            if bar is not None:
                bar.update(len(index))
        return out

    def _batches(self, ids: list[np.ndarray], batch_size: int) -> Any:
        """(indices, packed tokens), the longest sentences first: like lengths share a micro-batch."""
        order = np.argsort([-len(row) for row in ids], kind="stable").tolist()
        for start in range(0, len(order), batch_size):
            index = order[start:start + batch_size]
            yield index, self.model.pack([ids[i] for i in index])

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            check_text("prompt", prompt)
            return prompt
        name = self._default_prompt if name is None else name
        if name is None:
            return ""
        check_text("prompt_name", name)
        if name not in self._prompts:
            raise ValueError(f"prompt_name: {name!r} is not one of {sorted(self._prompts)}")
        return self._prompts[name]

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarity of each row of a (n, d) with each of b (m, d): (n, m) float32; a scalar for two vectors.

        A zero vector has similarity 0 with everything.
        """
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if a.ndim not in (1, 2) or b.ndim not in (1, 2) or a.shape[-1] != b.shape[-1]:
            raise ValueError(f"similarity: expected (n, d) and (m, d), got {a.shape} and {b.shape}")
        return _unit(a) @ _unit(b).T

    def __repr__(self) -> str:
        unit = "normalized" if self.normalize else "not normalized"
        return (f"SentenceEncoder({self.dimension} features, {'+'.join(self.pooling)} pooling, {unit}, "
                f"up to {self.max_seq_length} tokens,\n  {self.model!r})")


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))


def _texts(sentences: Any) -> list[str]:
    try:
        texts = list(sentences)
    except TypeError:
        raise TypeError(f"sentences: expected a string or a sequence of strings, got {type(sentences).__name__}") from None
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"sentences[{i}]: expected a string, got {type(text).__name__}")
        check_text(f"sentences[{i}]", text)  # here also, where a prompt has not yet been put before it
    return texts


def _progress(count: int, show: bool | None) -> Any:
    if not (count > _BAR if show is None else show):
        return None
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=count, desc="encode", unit=" sentences")


def _pool(hidden: np.ndarray, offsets: np.ndarray, modes: Sequence[str], out: np.ndarray, index: Sequence[int]) -> None:
    """Write the vectors of the sequences of one micro-batch into ``out[index]``."""
    width, bounds = hidden.shape[1], offsets.tolist()
    for s, place in enumerate(index):
        tokens, row = hidden[bounds[s]:bounds[s + 1]], out[place]
        for i, mode in enumerate(modes):
            part = row[i * width:(i + 1) * width]
            if mode == "mean":
                np.add.reduce(tokens, axis=0, out=part)
                part /= np.float32(len(tokens))
            elif mode == "max":
                np.maximum.reduce(tokens, axis=0, out=part)
            else:
                part[:] = tokens[0]


# -- reading the directory

def _load_encoder(place: Path) -> Model:
    kind = read_config(place).get("model_type")
    if isinstance(kind, str) and kind in DECODERS:
        raise FormatError(f"{place / 'config.json'}: model_type {kind!r} is a decoder; a SentenceEncoder needs an encoder, "
                          f"one of {', '.join(sorted(FAMILIES))} (zquant.load opens decoders)")
    return load(place)


def _read_pipeline(path: Path) -> _Pipeline:
    modules = _read_modules(path)
    if modules is None:
        return _transformer(path)
    kinds = [kind for kind, _ in modules]
    if kinds[:1] != ["Transformer"] or "Transformer" in kinds[1:]:
        raise FormatError(f"{path / 'modules.json'}: expected one Transformer, and first; got {kinds}")
    pipeline = _transformer(path / modules[0][1])
    for kind, place in modules[1:]:
        if kind == "Pooling":
            pipeline = replace(pipeline, pooling=_read_pooling(path / place))
        else:
            pipeline = replace(pipeline, normalize=True)
    return pipeline


def _read_modules(path: Path) -> list[tuple[str, str]] | None:
    """(class name, folder) of each module; None without modules.json."""
    file = path / "modules.json"
    if not file.is_file():
        return None
    known = ("Transformer", "Pooling", "Normalize")
    try:
        modules = [(str(m["type"]).rsplit(".", 1)[-1], str(m.get("path", ""))) for m in json.loads(file.read_bytes())]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"{file}: not a list of modules: {error!r}") from None
    for kind, place in modules:
        if kind not in known:
            raise FormatError(f"{file}: module {kind!r} is not supported; known: {', '.join(known)}")
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise FormatError(f"{file}: {place!r} is not a folder of this directory")
    return modules


def _transformer(place: Path) -> _Pipeline:
    file = place / "sentence_bert_config.json"
    options = read_config(place, file.name) if file.is_file() else {}
    length = options.get("max_seq_length")
    if length is None and (place / "tokenizer_config.json").is_file():
        length = read_config(place, "tokenizer_config.json").get("model_max_length")
        length = int(length) if isinstance(length, (int, float)) and 0 < length < 1e9 else None
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < _SHORTEST):
        raise FormatError(f"{file}: max_seq_length is {length!r}; expected an integer of {_SHORTEST} or more")
    return _Pipeline(place, max_length=length, lower=bool(options.get("do_lower_case", False)))


def _read_pooling(place: Path) -> tuple[str, ...]:
    config = read_config(place)
    if "pooling_mode" in config:
        value = config["pooling_mode"]
        wanted = [value] if isinstance(value, str) else list(value)
    else:
        names = {key: mode for mode, key in _POOLING.items()}
        wanted = [names.get(key, key.removeprefix("pooling_mode_"))
                  for key, on in config.items() if key.startswith("pooling_mode_") and on]
    unknown = [mode for mode in wanted if mode not in _POOLING]
    if unknown or not wanted:
        what = f"pooling {', '.join(map(str, unknown))} is not supported" if unknown else "no pooling mode is set"
        raise FormatError(f"{place / 'config.json'}: {what}; known: {', '.join(_POOLING)}")
    return tuple(mode for mode in _POOLING if mode in wanted)


def _read_prompts(path: Path) -> tuple[dict[str, str], str | None]:
    name = "config_sentence_transformers.json"
    if not (path / name).is_file():
        return {}, None
    config = read_config(path, name)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    # Recent files list empty prompts for "query" and "document"; a default must be one of the names.
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise FormatError(f"{path / name}: prompts: expected an object of strings")
    if default is not None and default not in prompts:
        raise FormatError(f"{path / name}: default_prompt_name {default!r} is not one of {sorted(prompts)}")
    return dict(prompts), default
