"""Which layers suffer from which quantization: the study of ZeroQuant-V2 (Yao et al., 2023, arXiv 2303.08302), section 3.

Weights alone, activations alone, and both; in the whole model, in one kind of layer at a time, and in one layer at a time.
For language models the increase of the perplexity is sorted into the paper's classes:

    class 1: at most 0.1        class 2: more than 0.1, at most 0.5        class 3: more than 0.5
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ._progress import bar
from .extras import Extras
from .language_report import MAX_TOKENS
from .linear import Linear
from .losses import Loss, Measured, loss_for
from .methods import Recipe
from .qtensor import QTensor
from .quantize import inner_network, quantize
from .report import KINDS, layer_kind
from .spec import QuantSpec, Scheme
from .tables import html_table, text_table

__all__ = ["BLOCKS", "MODES", "PARTS", "BlockSize", "Finding", "Sensitivity", "sensitivity", "sensitivity_class"]

MODES = ("weights", "activations", "both")
PARTS = ("all", "kind", "layer", "blocks")
#: Inputs per scale that FGQ is studied with, after one scale per row.
BLOCKS = (1024, 512, 256, 128, 64, 32)


def sensitivity_class(increase: float) -> int:
    """The class of an increase in perplexity; the borders belong to the lower class, NaN to none but the worst.

    >>> [sensitivity_class(x) for x in (-0.2, 0.1, 0.11, 0.5, 0.51)]
    [1, 1, 2, 2, 3]
    """
    return 1 if increase <= 0.1 else 2 if increase <= 0.5 else 3


@dataclass(frozen=True)
class Finding:
    """What quantizing one part of the model does.

    Attributes
    ----------
    part : "all", "kind" or "layer"
    name : of the kind or the layer; "all" for all layers
    mode : what of it was quantized: "weights", "activations" or "both"
    value : of the loss
    increase : how much worse than the float model
    """

    part: str
    name: str
    mode: str
    value: float
    increase: float


@dataclass(frozen=True)
class BlockSize:
    """All weights in groups of one size (FGQ), activations float.

    Attributes
    ----------
    size : inputs per scale; None is one scale per row
    bits : stored bits per weight, scales included
    value, increase : as in :class:`Finding`
    """

    size: int | None
    bits: float
    value: float
    increase: float


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity(Measured):
    """The result of :func:`sensitivity`; printed, shown in Jupyter, plotted (layers, kinds and block sizes), saved.

    Attributes
    ----------
    scheme, method
        Names of what was studied.
    metric
        "perplexity", "cosine to float32" or "Spearman x 100".
    reference
        The float model's.
    findings
        :class:`Finding` of every part and mode.
    blocks
        :class:`BlockSize` by size, one scale per row first.
    seconds
        Time taken.
    interrupted
        Whether it was stopped before its end; what was found until then is here.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> found = zq.sensitivity(zq.SentenceEncoder(find_minilm()), ["The sky is clear."], "w8a8", parts=["all"])
    >>> found.metric, len(found.findings)
    ('cosine to float32', 3)
    """

    figure = "sensitivity_figure"
    scheme: str
    method: str
    loss: Loss = field(repr=False)
    findings: tuple[Finding, ...] = ()
    blocks: tuple[BlockSize, ...] = ()
    seconds: float = 0.0
    interrupted: bool = False

    def increases(self, part: str, mode: str) -> dict[str, float]:
        """Name -> increase of the loss, in the order of the network."""
        return {f.name: f.increase for f in self.findings if (f.part, f.mode) == (part, mode)}

    def sums(self) -> dict[str, float]:
        """Sum over the layers of the increases that each causes alone, by mode: what all would do if nothing added to
        nothing. Empty where layers were not studied."""
        found = {mode: self.increases("layer", mode) for mode in MODES}
        return {mode: sum(values.values()) for mode, values in found.items() if values}

    def _class(self, increase: float) -> str:
        """For tables; the paper's classes are of perplexities."""
        return f" [{sensitivity_class(increase)}]" if self.metric == "perplexity" else ""

    def _cell(self, increase: float | None) -> str:
        return "-" if increase is None else f"{increase:+.4f}{self._class(increase)}"

    def _tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Header and rows of the parts, then of the block sizes."""
        rows = []
        for part in ("all", "kind", "layer"):
            by_mode = [self.increases(part, mode) for mode in MODES]
            names = dict.fromkeys(name for found in by_mode for name in found)
            rows += [[name if part != "all" else "all layers", *(self._cell(found.get(name)) for found in by_mode)]
                     for name in names]
        if sums := self.sums():
            rows.append(["sum over the layers", *("-" if m not in sums else f"{sums[m]:+.4f}" for m in MODES)])
        if rows:
            yield ["quantized", *MODES], rows
        if self.blocks:
            yield ["weights, inputs per scale", "bits", self.metric, "increase"], [
                ["one row" if b.size is None else str(b.size), f"{b.bits:.2f}", self.loss.text(b.value),
                 self._cell(b.increase)] for b in self.blocks]

    def _title(self) -> str:
        classes = "; in brackets ZeroQuant-V2's classes 1 to 3" if self.metric == "perplexity" else ""
        return (f"{self.scheme} by {self.method}: increase of the loss, {self.metric} {self.loss.text(self.reference)} in "
                f"float32{classes} ({self.seconds:.1f} s{', interrupted' if self.interrupted else ''})")

    def __repr__(self) -> str:
        return "\n\n".join([self._title(), *(text_table(*table) for table in self._tables())])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._title())}</p>" + "".join(html_table(*table) for table in self._tables())

    def _contents(self) -> dict[str, Any]:
        """The class is None where the loss is not a perplexity."""
        def ranked(found: Finding | BlockSize) -> dict[str, Any]:
            rank = sensitivity_class(found.increase) if self.metric == "perplexity" else None
            return {**vars(found), "class": rank}

        return {"scheme": self.scheme, "method": self.method, "metric": self.metric, "reference": self.reference,
                "findings": [ranked(f) for f in self.findings], "blocks": [ranked(b) for b in self.blocks],
                "sums": self.sums(), "seconds": self.seconds, "interrupted": self.interrupted}


def sensitivity(
    model: Any,
    data: Any,
    scheme: str | Scheme = "w4a8",
    *,
    method: Any = "rtn",
    calib: Any = None,
    parts: Collection[str] = PARTS,
    seq_len: int = 512,
    max_tokens: int | None = MAX_TOKENS,
    batch_size: int | None = None,
    show_progress_bar: bool | None = None,
) -> Sensitivity:
    """How much each part of a model suffers from quantized weights, activations, and both.

    Word embeddings stay float, and so do layers that the scheme leaves out.

    Parameters
    ----------
    model
        A float CausalLM, SentenceEncoder or Model. It is not changed.
    data
        What the loss is measured on: for language models a text, for encoders sentences or scored pairs; see
        :func:`zquant.losses.loss_for`.
    scheme
        The format of weights and activations.
    method
        How weights are rounded; a recipe without transforms. Statistics are those of the float model.
    calib
        For methods and schemes that need data, as in :func:`zquant.quantize`; not ``data``.
    parts
        What is studied: "all" layers at once, each "kind" of layer, each "layer", and "blocks", the sizes of groups
        (``BLOCKS``) and one scale per row, for weights of the scheme's number of bits. One of these names, or several.
    seq_len, max_tokens, batch_size
        Of the loss.
    show_progress_bar
        None: where stderr is a terminal, after two seconds.

    Returns
    -------
    Sensitivity
        After Ctrl-C with what was found until then, and ``interrupted``.

    Raises
    ------
    ValueError
        Unknown scheme, method or part; a recipe with transforms; what :func:`zquant.quantize` refuses.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> enc = zq.SentenceEncoder(find_minilm())
    >>> found = zq.sensitivity(enc, ["The sky is clear.", "He sold the car."], "w8a8", parts=["all"])
    >>> [f.mode for f in found.findings], max(f.increase for f in found.findings) < 0.01
    (['weights', 'activations', 'both'], True)
    """
    start = time.perf_counter()
    recipe, scheme = Recipe.of(method), Scheme.parse(scheme).replace(embeddings="float")
    if recipe.transforms:
        raise ValueError(f"method: {recipe.name} changes the float model; study what it made of it with the solver alone")
    parts = {parts} if isinstance(parts, str) else set(parts)
    if unknown := sorted(parts - set(PARTS)):
        raise ValueError(f"parts: unknown {', '.join(unknown)}; known: {', '.join(PARTS)}")
    study = _Study(model, scheme, recipe, calib, show_progress_bar)
    loss = loss_for(model, data, seq_len=seq_len, max_tokens=max_tokens, batch_size=batch_size)
    jobs: list[Callable[[Loss], Finding | BlockSize]] = [partial(study.finding, *part) for part in study.parts(parts)]
    jobs += [partial(study.block_size, spec) for spec in (study.sizes() if "blocks" in parts else ())]
    found: list[Finding | BlockSize] = []
    interrupted = False
    try:
        for job in bar(jobs, "sensitivity", show_progress_bar, unit="model"):
            found.append(job(loss))
    except KeyboardInterrupt:
        interrupted = True
    return Sensitivity(scheme.name, recipe.name, loss, tuple(f for f in found if isinstance(f, Finding)),
                       tuple(f for f in found if isinstance(f, BlockSize)), time.perf_counter() - start, interrupted)


class _Study:
    """The float model, the quantized one, and mixtures of the two."""

    def __init__(self, model: Any, scheme: Scheme, recipe: Recipe, calib: Any, show: bool | None) -> None:
        self._model, self._scheme, self._recipe = model, scheme, recipe
        self._calib, self._show = calib, show
        self._before: dict[str, Linear] = dict(inner_network(model).named_linears())
        quantized = dict(inner_network(self._quantize(scheme)).named_linears())
        self._after = {name: layer for name, layer in quantized.items() if layer.spec is not None}
        if not self._after:
            raise ValueError(f"scheme {scheme.name}: quantizes no layer of this model")

    def _quantize(self, scheme: Scheme) -> Any:
        return quantize(self._model, scheme, self._recipe, calib=self._calib, mode="parallel", show_progress_bar=self._show)

    def _with(self, linears: Mapping[str, Linear]) -> Any:
        network = inner_network(self._model)
        small = network.replace(linears=linears, scheme=self._scheme)
        return small if network is self._model else self._model.replace(model=small)

    def parts(self, wanted: Collection[str]) -> list[tuple[str, str, str, list[str]]]:
        """(part, name, mode, layers) of all that is to be measured; without activations in the scheme, weights alone."""
        groups: list[tuple[str, str, list[str]]] = [("all", "all", list(self._after))]
        groups += [("kind", kind, [n for n in self._after if layer_kind(n) == kind]) for kind in KINDS]
        groups += [("layer", name, [name]) for name in self._after]
        modes = MODES if self._scheme.activations is not None else MODES[:1]  # float ones: "both" is the weights alone
        return [(part, name, mode, names) for part, name, names in groups if names and part in wanted for mode in modes]

    def finding(self, part: str, name: str, mode: str, layers: Collection[str], loss: Loss) -> Finding:
        """The float model with the weights, activations or both of some layers quantized."""
        value = loss(self._with({layer: self._mixed(mode, layer) for layer in layers}))
        return Finding(part, name, mode, value, loss.increase(value))

    def _mixed(self, mode: str, name: str) -> Linear:
        before, after = self._before[name], self._after[name]
        if mode == "both":
            return after
        if mode == "weights":
            return Linear(name, after._weight, after.bias, extras=_without(after.extras, "static", "outliers"))
        extras = _without(after.extras, "correction", "outliers")  # they stand for what the codes of the weights lack
        return Linear(name, before._weight, before.bias, after.activations, extras=extras)

    def sizes(self) -> list[QuantSpec]:
        """Formats of the weights: one scale per row, then blocks smaller than the longest row."""
        weights = self._scheme.weights
        if weights is None:
            return []
        longest = max(self._before[name].in_features for name in self._after)
        row = QuantSpec(weights.bits, symmetric=weights.symmetric)
        return [row, *(row.replace(granularity="group", group_size=size) for size in BLOCKS if size < longest)]

    def block_size(self, spec: QuantSpec, loss: Loss) -> BlockSize:
        """All studied layers in that format, activations float."""
        scheme = self._scheme.replace(weights=spec, activations=None, overrides=())
        small = self._quantize(scheme)
        tensors = [layer._weight for _, layer in inner_network(small).named_linears() if isinstance(layer._weight, QTensor)]
        bits = 8 * sum(t.nbytes for t in tensors) / sum(t.shape[0] * t.shape[1] for t in tensors)
        value = loss(small)
        return BlockSize(spec.group_size, bits, value, loss.increase(value))


def _without(extras: Extras, *names: str) -> Extras:
    return Extras(**{name: value for name, value in extras.given() if name not in names})
