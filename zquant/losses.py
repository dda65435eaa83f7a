"""What a quantized model is judged by: perplexity of a language model, fidelity or rank correlation of an encoder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

from .evaluate import Pairs, _as_pairs, cosine_fidelity, sts
from .language_report import MAX_TOKENS, _some
from .perplexity import cut, perplexity
from .report import _run, _token_ids
from .tables import Written

__all__ = ["Loss", "Measured", "loss_for"]


class Loss(ABC):
    """A figure of a model, and how much worse it is than the float model's.

    Attributes
    ----------
    name : what is measured
    reference : the float model's value
    sign : 1 where a larger value is worse, else -1
    """

    name: str
    sign: int
    reference: float

    @abstractmethod
    def __call__(self, model: Any) -> float:
        """The value of a model of the same kind as the float one."""

    @abstractmethod
    def text(self, value: float) -> str:
        """A value as tables print it."""

    def increase(self, value: float) -> float:
        """How much worse than the float model; negative where it is better."""
        return self.sign * (value - self.reference)


class Measured(Written):
    """What results share that are values of one loss.

    Attributes
    ----------
    loss : the :class:`Loss`
    interrupted : whether the measurement was stopped before its end
    """

    loss: Loss
    interrupted: bool

    @property
    def metric(self) -> str:
        """The loss's name: "perplexity", "cosine to float32" or "Spearman x 100"."""
        return self.loss.name

    @property
    def reference(self) -> float:
        """The float model's value."""
        return self.loss.reference


class PerplexityLoss(Loss):
    """Perplexity on the first tokens of a text, in windows that do not overlap; the text is tokenized once."""

    name, sign = "perplexity", 1

    def __init__(self, lm: Any, text: Any, seq_len: int, max_tokens: int | None, batch_size: int) -> None:
        self._seq_len, self._batch = min(seq_len, lm.max_positions), batch_size
        self._ids = [window.ids for window in _some(cut(lm, text, self._seq_len, None), max_tokens)]
        self.reference = self(lm)

    def __call__(self, model: Any) -> float:
        return perplexity(model, self._ids, self._seq_len, batch_size=self._batch, show_progress_bar=False).ppl

    def text(self, value: float) -> str:
        return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


class CosineLoss(Loss):
    """Mean cosine between the outputs for some sentences and the float model's."""

    name, sign, reference = "cosine to float32", -1, 1.0

    def __init__(self, encoder: Any, sentences: Any, batch_size: int) -> None:
        if isinstance(sentences, str) or not len(sentences):
            raise ValueError("sentences: expected a non-empty sequence of strings")
        self._sentences, self._batch = list(sentences), batch_size
        self._ids = _token_ids(encoder, self._sentences)
        self._outputs = _run(encoder, self._sentences, self._ids, batch_size)

    def __call__(self, model: Any) -> float:
        return float(cosine_fidelity(self._outputs, _run(model, self._sentences, self._ids, self._batch)).mean())

    def text(self, value: float) -> str:
        return f"{value:.5f}"


class SpearmanLoss(Loss):
    """Rank correlation, times 100, of cosines with people's scores of sentence pairs."""

    name, sign = "Spearman x 100", -1

    def __init__(self, encoder: Any, pairs: Any, batch_size: int) -> None:
        self._pairs, self._batch = _as_pairs(pairs), batch_size
        self.reference = self(encoder)

    def __call__(self, model: Any) -> float:
        return 100 * sts(model, self._pairs, batch_size=self._batch).spearman

    def text(self, value: float) -> str:
        return f"{value:.2f}"


def loss_for(model: Any, data: Any, *, seq_len: int = 512, max_tokens: int | None = MAX_TOKENS,
             batch_size: int | None = None) -> Loss:
    """The loss that fits a model and data; the float model is measured at once.

    Parameters
    ----------
    model
        The float CausalLM, SentenceEncoder or Model.
    data
        Language models: what :func:`zquant.perplexity` takes. Encoders: sentences; or sentence pairs with scores, as
        :class:`zquant.evaluate.Pairs` or the path of a file of them.
    seq_len, max_tokens
        Language models: tokens of a window, and of the text that are used (None: all).
    batch_size
        Windows (None: 8) or sentences (None: 32) per forward pass.

    Returns
    -------
    Loss

    Raises
    ------
    ValueError
        No tokens, no sentences, one text for an encoder; a file that is not of scored pairs.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> loss = loss_for(zq.SentenceEncoder(find_minilm()), ["The sky is clear."])
    >>> loss.name, loss.reference
    ('cosine to float32', 1.0)
    """
    if hasattr(model, "new_cache"):
        return PerplexityLoss(model, data, seq_len, max_tokens, batch_size or 8)
    if isinstance(data, (Pairs, os.PathLike)):
        return SpearmanLoss(model, data, batch_size or 32)
    return CosineLoss(model, data, batch_size or 32)
