"""Text from a decoder: greedy and sampled generation, batched or streamed. :meth:`CausalLM.generate` calls this."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._progress import bar
from .checks import as_count, as_real
from .tokenization import check_text

__all__ = ["Generation", "Stream", "check_language_model", "generate", "prompt_ids", "text_ids"]

#: Tokens of the prompt's end that are decoded with the first new ones: some decoders treat the start of a text specially.
_CONTEXT = 6
#: Tokens that an incomplete character is waited for; a character has at most four bytes.
_PATIENCE = 8
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt; ``str()`` is the text.

    Attributes
    ----------
    text
        The continuation, without the prompt and without the stop token; None for a model without tokenizer.
    ids
        The new token ids, the stop token included where there was one.
    prompt_length
        Tokens of the prompt.
    finish_reason
        "stop" (a stop token), "length" (``max_new_tokens``) or "context" (the model's positions are used up); None for
        the state of a :class:`Stream` that has not ended.
    prompt_seconds, seconds
        From the call to the first new token, and to the last. Two results that differ only here are equal.

    >>> written = Generation(" is blue.", (318, 4171, 13), prompt_length=2, finish_reason="length")
    >>> str(written), len(written.ids)
    (' is blue.', 3)
    """

    text: str | None
    ids: tuple[int, ...]
    prompt_length: int
    finish_reason: str | None
    prompt_seconds: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second once the prompt was read; 0.0 for fewer than two tokens."""
        return (len(self.ids) - 1) / max(self.seconds - self.prompt_seconds, 1e-9) if len(self.ids) > 1 else 0.0

    def __str__(self) -> str:
        return str(list(self.ids)) if self.text is None else self.text

    def __repr__(self) -> str:
        shown = str(list(self.ids)) if self.text is None else repr(self.text)
        if len(shown) > 200:
            shown = shown[:120] + " ... " + shown[-60:]
        rate = f", {self.tokens_per_second:.0f} tokens/s" if self.tokens_per_second else ""
        return (
            f"Generation({shown},\n  {len(self.ids)} tokens after {self.prompt_length}, "
            f"finish_reason={self.finish_reason!r}{rate})"
        )


# --- arguments ---------------------------------------------------------------------------------------------------


def check_language_model(name: str, lm: Any) -> None:
    """TypeError, which says what the argument ``name`` is, where ``lm`` is no loaded language model.

    >>> check_language_model("lm", "tiny-llama-5m")
    Traceback (most recent call last):
    ...
    TypeError: lm: expected a loaded language model (zquant.load(directory)), got str
    """
    if not hasattr(lm, "new_cache"):
        raise TypeError(f"{name}: expected a loaded language model (zquant.load(directory)), got {type(lm).__name__}")


def text_ids(lm: Any, text: str, name: str = "text") -> list[int]:
    """Token ids of a text of any length, with the special tokens that tokenizer.json adds.

    Raises
    ------
    ValueError
        The model's directory has no tokenizer.json; a text with lone surrogates, which is called ``name``.
    """
    check_text(name, text)
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise ValueError(f"{lm.path}: has no tokenizer.json; give token ids in place of text")
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # the model's own stays as it is on disk
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer.encode(text).ids


def prompt_ids(lm: Any, prompt: Any, name: str = "prompt") -> list[int]:
    """Token ids of one prompt, a text or ids. An empty text becomes the token that texts begin with (BOS).

    Raises
    ------
    ValueError
        Empty ids, an empty text for a model without BOS, a text that is not Unicode, ids out of the vocabulary, more tokens
        than positions.
    """
    if isinstance(prompt, str):
        ids = text_ids(lm, prompt, name)
        if not ids:
            if not isinstance(lm.bos_id, int):
                raise ValueError(f"{name}: empty, and config.json has no bos_token_id to begin with")
            ids = [lm.bos_id]
    else:
        ids = _integers(prompt, name)
    if not ids:
        raise ValueError(f"{name}: no tokens; expected at least one (the BOS id, to begin with nothing)")
    for token in ids:
        if not 0 <= token < lm.vocabulary:
            raise ValueError(f"{name}: token id {token} is outside 0..{lm.vocabulary - 1}")
    if len(ids) > lm.max_positions:
        raise ValueError(f"{name}: {len(ids)} tokens; the model has {lm.max_positions} positions")
    return ids


def _integers(values: Any, name: str) -> list[int]:
    try:
        return [operator.index(v) for v in (values.tolist() if isinstance(values, np.ndarray) else values)]
    except TypeError:
        raise ValueError(f"{name}: expected a text or a sequence of token ids, got {_shown(values)}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _is_one(prompt: Any) -> bool:
    """One prompt (a text, a flat sequence of ids) as against a sequence of prompts."""
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1
    if not isinstance(prompt, Sequence):
        raise ValueError(f"prompt: expected a text, token ids, or a list of either, got {_shown(prompt)}")
    return not len(prompt) or not isinstance(prompt[0], (str, Sequence, np.ndarray))


def _stop_ids(lm: Any, stop: Any) -> frozenset[int]:
    """None: the model's end-of-text ids; else what is given, and only that."""
    if stop is None:
        return frozenset(lm.eos_ids)
    stop = [stop] if isinstance(stop, (str, int, np.integer)) else stop
    return frozenset(_stop_id(lm, item) for item in stop)


def _stop_id(lm: Any, item: Any) -> int:
    if not isinstance(item, str):
        return _integers([item], "stop")[0]
    check_text("stop", item)
    if lm.tokenizer is None:
        raise ValueError(f"stop: {item!r} needs a tokenizer.json, which {lm.path} has not; give token ids")
    known = lm.tokenizer.token_to_id(item)
    ids = [known] if known is not None else lm.tokenizer.encode(item, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ValueError(f"stop: {item!r} is {len(ids)} tokens; expected single tokens")
    return ids[0]


def _generators(seed: Any, count: int) -> list[np.random.Generator]:
    """One per sequence. One seed serves each of them alike, so that no text depends on its neighbours."""
    if seed is None:
        return [np.random.default_rng() for _ in range(count)]
    seeds = [seed] * count if isinstance(seed, (int, np.integer)) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed: expected one, or one per prompt ({count}), got {len(seeds)}")
    return [np.random.default_rng(as_count("seed", one, 0)) for one in seeds]


# --- choosing a token --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sampler:
    """temperature, then top_k, then top_p (over what top_k left), then one uniform number per token."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: np.random.Generator

    def choose(self, logits: np.ndarray) -> int:
        best = int(np.argmax(logits))  # NaN, if there is one
        if not math.isfinite(logits[best]):
            raise ValueError("logits: NaN or Inf")
        if self.temperature == 0.0:
            return best
        ids, weights = self._candidates(logits)
        total = np.cumsum(weights)
        place = np.searchsorted(total, self.generator.random() * total[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)])

    def _candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids, weights that need not sum to one) of the tokens to draw from."""
        ids = np.arange(len(logits))
        if self.top_k is not None and self.top_k < len(logits):
            border = np.partition(logits, -self.top_k)[-self.top_k]
            ids = np.flatnonzero(logits >= border)
        scaled = (logits[ids].astype(np.float64) - float(logits.max())) / self.temperature
        weights = np.exp(scaled)
        if self.top_k is not None:
            ids, weights = _likeliest(ids, weights, self.top_k)
        if self.top_p is not None:
            total = weights.sum()
            # Ids below (1 - p) / n hold less than 1 - p together: none of them is in the nucleus, and sorting is dear.
            likely = weights >= total * (1.0 - self.top_p) / len(weights)
            ids, weights = _likeliest(ids[likely], weights[likely], None)
            # The smallest set that holds p: a token is in it if those before it hold less.
            size = 1 + int(np.searchsorted(np.cumsum(weights[:-1]), self.top_p * total, side="left"))
            ids, weights = ids[:size], weights[:size]
        return ids, weights


def _likeliest(ids: np.ndarray, weights: np.ndarray, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sorted, the heaviest first, the lower id first among equals."""
    order = np.argsort(-weights, kind="stable")[:count]
    return ids[order], weights[order]


# --- text as it comes --------------------------------------------------------------------------------------------


class _Text:
    """Decodes token by token; a piece is given out when its last character is whole.

    A token may hold part of a UTF-8 character, and what a token means can depend on the one before (a leading space). So
    the tokens since the last piece are decoded behind those of the piece before, and the difference is the text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.before = list(prompt[-_CONTEXT:])
        self.waiting: list[int] = []
        self.known = tokenizer.decode(self.before)

    def push(self, token: int, last: bool = False) -> str:
        self.waiting.append(token)
        return self._flush(last or len(self.waiting) > _PATIENCE)

    def end(self) -> str:
        """What was kept back."""
        return self._flush(True) if self.waiting else ""

    def _flush(self, whole: bool) -> str:
        text = self.tokenizer.decode(self.before + self.waiting)
        if text.endswith(_REPLACEMENT) and not whole:
            return ""
        piece = text[len(self.known) :]
        self.before, self.waiting = self.waiting, []
        self.known = self.tokenizer.decode(self.before)
        return piece


class _Sequence:
    """One prompt on its way."""

    def __init__(self, lm: Any, index: int, prompt: list[int], sampler: _Sampler, limit: int, stop: frozenset[int]) -> None:
        self.index, self.prompt, self.sampler, self.stop = index, prompt, sampler, stop
        self.limit = min(limit, lm.max_positions - len(prompt) + 1)
        self.at_limit = "length" if self.limit == limit else "context"
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.finish: str | None = None if self.limit else self.at_limit
        self.decoder = None if lm.tokenizer is None else _Text(lm.tokenizer, prompt)
        self.prompt_seconds = self.seconds = 0.0

    def step(self, logits: np.ndarray, seconds: float) -> Any:
        """Choose the next token; returns the new text, or without a tokenizer the token."""
        token = self.sampler.choose(logits)
        self.prompt_seconds = self.prompt_seconds or seconds
        self.seconds = seconds
        self.ids.append(token)
        if token in self.stop:
            self.finish = "stop"
        elif len(self.ids) == self.limit:
            self.finish = self.at_limit
        if self.decoder is None:
            return token
        if self.finish == "stop":
            piece = self.decoder.end()
        else:
            piece = self.decoder.push(token, last=self.finish is not None)
        self.pieces.append(piece)
        return piece

    def result(self) -> Generation:
        text = None if self.decoder is None else "".join(self.pieces)
        return Generation(text, tuple(self.ids), len(self.prompt), self.finish, self.prompt_seconds, self.seconds)


def _run(lm: Any, sequences: list[_Sequence], kv_cache: str, start: float) -> Iterator[list[tuple[_Sequence, Any]]]:
    """One item per step: what each sequence that is still running got. Those that ended leave the batch."""
    active = [s for s in sequences if s.finish is None]
    if not active:
        return
    cache = lm.new_cache(len(active), kv_cache)
    feed: Any = [s.prompt for s in active]
    while True:
        logits = lm(feed, cache=cache, logits="last")
        now = time.perf_counter() - start
        yield [(s, s.step(row, now)) for s, row in zip(active, logits)]
        stay = [i for i, s in enumerate(active) if s.finish is None]
        if not stay:
            return
        if len(stay) < len(active):
            cache, active = cache.select(stay), [active[i] for i in stay]
        feed = np.array([s.ids[-1:] for s in active])


class Stream(Iterator[Any]):
    """Text as it is written: iterate over it. Made by ``generate(..., stream=True)``.

    For one prompt the items are strings (whole characters; without a tokenizer: token ids), for a list of prompts they are
    pairs (index of the prompt, string). Joined, the strings are the ``text`` of the result.

    Attributes
    ----------
    result
        The :class:`Generation`, or the list of them, as far as it has come; after the last item it is what ``generate``
        returns without ``stream``.
    """

    def __init__(self, sequences: list[_Sequence], steps: Iterator[list[tuple[_Sequence, Any]]], one: bool) -> None:
        self._sequences, self._one = sequences, one
        self._items = self._flat(steps)

    def _flat(self, steps: Iterator[list[tuple[_Sequence, Any]]]) -> Iterator[Any]:
        for step in steps:
            for sequence, piece in step:
                if piece != "":
                    yield piece if self._one else (sequence.index, piece)

    def __next__(self) -> Any:
        return next(self._items)

    def close(self) -> None:
        """Stop; the cache is given back. ``result`` keeps what came so far."""
        self._items.close()  # type: ignore[attr-defined]

    @property
    def result(self) -> Any:
        results = [s.result() for s in self._sequences]
        return results[0] if self._one else results

    def __repr__(self) -> str:
        return f"Stream({self.result!r})"


def generate(
    lm: Any,
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: Any = None,
    stop: Any = None,
    stream: bool = False,
    kv_cache: str = "float32",
    show_progress_bar: bool | None = None,
) -> Any:
    """Continue a prompt, or a batch of prompts of any lengths.

    Parameters
    ----------
    lm
        A :class:`CausalLM`.
    prompt
        A text, a sequence of token ids, or a list of either. An empty text begins with the model's BOS token, where
        config.json has one.
    max_new_tokens
        At most so many per prompt; 0 gives empty results without running the model. Generation also ends where the model
        has no more positions.
    temperature
        0 takes the likeliest token (the lower id among equals); above, logits are divided by it and a token is drawn.
    top_k, top_p
        Draw from the k likeliest tokens; from the smallest set of tokens that holds the probability p (after ``top_k``).
        None: from all. Both leave the choice of temperature 0 as it is.
    seed
        An integer: every prompt gets a NumPy Generator seeded with it, so that its text depends neither on the batch nor
        on its place in it (equal prompts then get equal texts). A sequence of integers: one per prompt. None: fresh
        numbers.
    stop
        Token ids, or strings that are single tokens, at which a text ends, in place of the end-of-text tokens of
        generation_config.json or config.json; () never stops.
    stream
        True returns a :class:`Stream` at once; the model runs while it is iterated over.
    kv_cache
        "float32", or "int8" (a quarter of the memory).
    show_progress_bar
        None: where stderr is a terminal, after two seconds. Not with ``stream``.

    Returns
    -------
    Generation, list of Generation, or Stream
        One for a single prompt, a list for a list. Each equals the result for that prompt alone; with integer layers
        this holds bit by bit, as every step's logits are equal.

    Raises
    ------
    TypeError
        Something else than a loaded language model.
    ValueError
        Empty prompts, texts that are not Unicode, ids out of the vocabulary, prompts longer than the model's positions,
        options out of range; NaN in the logits.
    KeyboardInterrupt
        Ctrl-C ends generation within the layer that is running; a Stream then still has ``result``.

    >>> from zquant.generate import _Sampler
    >>> _Sampler(0.0, None, None, np.random.default_rng(0)).choose(np.float32([0.0, 3.0, 1.0]))
    1
    """
    start = time.perf_counter()
    check_language_model("lm", lm)
    one = _is_one(prompt)
    prompts = [prompt_ids(lm, prompt)] if one else [prompt_ids(lm, p, f"prompt[{i}]") for i, p in enumerate(prompt)]
    limit = as_count("max_new_tokens", max_new_tokens, 0)
    temperature = as_real("temperature", temperature, 0.0, 1e6, "a number of 0 or more")
    top_k = None if top_k is None else as_count("top_k", top_k, 1)
    if top_p is not None:
        top_p = as_real("top_p", top_p, 1e-12, 1.0, "a number above 0, at most 1")
        top_p = None if top_p == 1.0 else top_p
    if kv_cache not in ("float32", "int8"):
        raise ValueError(f"kv_cache: expected 'float32' or 'int8', got {kv_cache!r}")
    ends = _stop_ids(lm, stop)
    samplers = [_Sampler(temperature, top_k, top_p, g) for g in _generators(seed, len(prompts))]
    sequences = [_Sequence(lm, i, ids, sampler, limit, ends) for i, (ids, sampler) in enumerate(zip(prompts, samplers))]
    steps = _run(lm, sequences, kv_cache, start)
    if stream:
        return Stream(sequences, steps, one)
    for _ in bar(steps, "generate", show_progress_bar, total=max((s.limit for s in sequences), default=0), unit="token"):
        pass
    results = [s.result() for s in sequences]
    return results[0] if one else results
