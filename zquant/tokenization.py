"""Text to token ids with the ``tokenizers`` library, which is imported when a tokenizer is read."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checks import as_count
from .errors import FormatError

__all__ = ["TextTokenizer", "check_text", "read_tokenizer"]

_VARIABLE = "TOKENIZERS_PARALLELISM"
# Sentences handed over at a time: enough for the library's threads, and bounded memory for its Encoding objects.
_BATCH = 2048


def read_tokenizer(directory: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a directory's tokenizer.json; FormatError naming the file if that fails."""
    from tokenizers import Tokenizer

    _quiet_forks()
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FormatError(f"{file}: no such file")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{file}: not a tokenizer: {error}") from None


def check_text(name: str, text: Any) -> None:
    r"""TypeError on what is not a string, ValueError on a string that is not text: with a lone surrogate, half a character.

    >>> check_text("prompt", "caf\u00e9")
    >>> check_text("prompt", "a\ud800")
    Traceback (most recent call last):
    ...
    ValueError: prompt: expected Unicode text, but character 1 is the lone surrogate U+D800, as of bytes that are not UTF-8
    """
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected Unicode text, but character {error.start} is the lone surrogate "
                         f"U+{ord(text[error.start]):04X}, as of bytes that are not UTF-8") from None


class _Forks:
    """Around a fork: the child's tokenizers work on one thread.

    The library's threads do not survive a fork. It notices, but its older releases (0.20, not 0.23) then warn unless the
    variable is set; set for good, it would cost the parent its threads. A value that the user has set is left alone.
    """

    def __init__(self) -> None:
        self.ours = False

    def before(self) -> None:
        self.ours = _VARIABLE not in os.environ
        if self.ours:
            os.environ[_VARIABLE] = "false"

    def after_in_parent(self) -> None:
        if self.ours:
            os.environ.pop(_VARIABLE, None)


_forks: _Forks | None = None


def _quiet_forks() -> None:
    global _forks
    if _forks is None and hasattr(os, "register_at_fork"):
        _forks = _Forks()
        os.register_at_fork(before=_forks.before, after_in_parent=_forks.after_in_parent)


class TextTokenizer:
    """Sentences to token ids, truncated and without padding, whatever tokenizer.json says about either.

    Parameters
    ----------
    directory
        Where tokenizer.json is.
    max_length
        Tokens per sentence, special tokens included; what exceeds it is cut.
    lower
        Lower-case the text first.

    Raises
    ------
    FormatError
        No tokenizer.json, or one that cannot be read.
    ValueError
        ``max_length`` is not an integer, below 1, or has no room for the special tokens.

    Notes
    -----
    The library holds one set of truncation options per tokenizer, so this object has a tokenizer of its own: a model's
    ``tokenizer`` stays as it is on disk.
    """

    def __init__(self, directory: Path, max_length: int, lower: bool = False) -> None:
        self.directory, self.lower = Path(directory).absolute(), lower
        self._tokenizer = read_tokenizer(Path(directory))
        self._tokenizer.no_padding()
        # The library does not truncate at all where the special tokens alone are too many.
        self.max_length = as_count("max_length", max_length, max(1, self._tokenizer.num_special_tokens_to_add(False)))
        self._tokenizer.enable_truncation(self.max_length)

    def __call__(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of token ids per sentence, special tokens included.

        Raises
        ------
        TypeError, ValueError
            Something that is not a string, or not valid text; the message has its index.
        """
        for i, sentence in enumerate(sentences):
            check_text(f"sentences[{i}]", sentence)
        if self.lower:
            sentences = [sentence.lower() for sentence in sentences]
        encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        ids = []
        for start in range(0, len(sentences), _BATCH):
            ids += [np.array(e.ids, np.int32) for e in encode(list(sentences[start:start + _BATCH]))]
        return ids

    def __reduce__(self) -> tuple[Any, ...]:
        return TextTokenizer, (self.directory, self.max_length, self.lower)

    def __repr__(self) -> str:
        return f"TextTokenizer({str(self.directory)!r}, max_length={self.max_length})"
