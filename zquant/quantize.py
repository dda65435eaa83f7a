"""quantize: a model in, a quantized model out."""
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from ._progress import bar
from .calibrate import MODES, Sequences, Shared, _one_of, check_model, collect, read_sequences, walk
from .extras import Extras, static_range
from .formats.safetensors import Stored
from .linear import Linear
from .mapped import release
from .methods import PRESETS, BlockMethod, Method, Preset, Recipe, Repair, Step, Transform, get_method
from .qtensor import QTensor
from .resources import MEMORY, Resources
from .spec import QuantSpec, Scheme
from .statistics import InputStatistics, Statistics

__all__ = ["quantize"]

PIECE = 1 << 22  # weights of a large matrix that are float32 at a time

M = TypeVar("M")


def quantize(model: M, scheme: str | Scheme | None = None, method: Any = "rtn", *, calib: Any = None,
             mode: str = "sequential", samples: int = 128, seq_len: int | None = None, seed: int = 0,
             work_dir: str | os.PathLike[str] | None = None, memory: int = MEMORY, executor: Executor | None = None,
             show_progress_bar: bool | None = None) -> M:
    """Quantize a model's linear layers (and, if the scheme says so, its word embeddings).

    The layers are taken one at a time, so that a model whose weights are mapped from disk is never in memory as a whole.

    Parameters
    ----------
    model
        A Model, a CausalLM or a SentenceEncoder. It is not changed.
    scheme
        A name ("w8a8", "w4/8a8-g128", ...; see :meth:`Scheme.parse`) or a :class:`Scheme`. None: the preset's, where
        ``method`` is one, else "w8a8".
    method
        What :meth:`Recipe.of` takes: a name ("gptq"), names joined with + ("smoothquant+gptq+lorc"), the name of a preset
        ("zeroquant"; see ``zquant.PRESETS``), a step with its options, a list of steps, or a :class:`Recipe`.
    calib
        For methods that look at data (``Recipe.of(method).needs``), and for schemes with static activations; others ignore
        it: texts, ids or "random" as for :func:`zquant.calibrate`, or :class:`zquant.Statistics` of this model where one
        pass over the data is enough. Keep it apart from what you evaluate on.
    mode
        "sequential": the solver's statistics of each layer are taken after those before it have been quantized, inside a
        block too. "parallel": those of the float model throughout. Transforms look at the float model in either mode.
        Statistics that are given are used as they are.
    samples, seq_len, seed
        What is taken of ``calib``; see :func:`zquant.calibrate`.
    work_dir, memory, executor
        For methods that train whole blocks ("lkd", "zq-global"): a directory in which every finished block is a file, from
        which a run that was killed or interrupted continues; bytes that hidden states may take in memory; a
        ``concurrent.futures.Executor`` on which blocks are trained side by side. See :class:`zquant.resources.Resources`.
    show_progress_bar
        True or False; None shows one in a terminal or notebook, when the work takes more than two seconds.

    Returns
    -------
    Model, CausalLM or SentenceEncoder
        A new one of the same kind. Its ``recipe`` says what was done, and is saved with it.

    Raises
    ------
    TypeError
        Something else than a loaded model.
    ValueError
        Unknown scheme or method, steps out of order; NaN or Inf in a weight, a layer that cannot run in the format, a model
        that is quantized already (each names the layer); an override that matches no layer; a method that needs data
        without ``calib``, data without tokens, statistics of another model or for a recipe that needs several passes; a
        work_dir of another run, or for a method that trains no blocks.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> encoder = zq.SentenceEncoder(find_minilm())
    >>> zq.quantize(encoder, "w4/8a8", "smoothquant+gptq", calib=["The sky is clear.", "He sold the car."]).model
    BERT(6 layers, hidden 384, 12 heads, 22.7 M parameters, w4/8a8 by smoothquant+gptq, 20.9 MB)
    """
    check_model("model", model)
    recipe = Recipe.of(method)
    resources = _resources(recipe, work_dir, memory, executor)
    scheme = choose_scheme(scheme, method)
    _one_of("mode", mode, MODES)
    check_float(model, scheme)
    _check_overrides(scheme, dict(inner_network(model).named_linears()))
    data = _Data(model, recipe, scheme, calib, dict(samples=samples, seq_len=seq_len, seed=seed), resources)
    for step in recipe.transforms:
        model, scheme = _transform(model, step, data, scheme, show_progress_bar)
    quantizer = Quantizer(model, scheme, recipe)
    quantizer.run(data, mode, seed, show_progress_bar)
    return quantizer.finish()


def choose_scheme(scheme: str | Scheme | None, method: Any) -> Scheme:
    """The scheme that was given; else the one of the preset that ``method`` is; else "w8a8".

    >>> choose_scheme(None, "zeroquant").name
    'w8a8'
    """
    if scheme is not None:
        return Scheme.parse(scheme)
    if isinstance(method, Preset):
        return method.scheme
    recipe = None if isinstance(method, Step) else Recipe.of(method)
    found = None if recipe is None else PRESETS.get(recipe.name)
    return found.scheme if found is not None and found.recipe == recipe else Scheme.parse("w8a8")


def _resources(recipe: Recipe, work_dir: str | os.PathLike[str] | None, memory: int, executor: Executor | None) -> Resources:
    for name, value in (("work_dir", work_dir), ("executor", executor)):
        if value is not None and not isinstance(recipe.method, BlockMethod):
            raise ValueError(f"{name}: method {recipe.name} trains no blocks; lkd and zq-global do")
    return Resources(work_dir, memory, executor)


class _Data:
    """Calibration data of a recipe: checked at once, read when a step asks for it.

    Attributes
    ----------
    given : the Statistics or whatever else the caller gave; None where no step needs data
    resources : for training on it
    """

    def __init__(self, model: Any, recipe: Recipe, scheme: Scheme, calib: Any, options: dict[str, Any],
                 resources: Resources) -> None:
        self._model, self._network, self._options, self.resources = model, inner_network(model), options, resources
        self.given = calib if needs_data(recipe, scheme) else None
        if not needs_data(recipe, scheme):
            return
        if calib is None:
            raise ValueError(f"{_wanting(recipe, scheme)}: give calib=, a text of the kind that the model will see")
        if isinstance(calib, Statistics) and isinstance(recipe.method, BlockMethod):
            raise ValueError(f"calib: {recipe.name} trains on hidden states, which statistics do not hold: give the text "
                             "itself")
        after = frozenset[str]().union(*(step.needs for step in recipe.steps[1:]))
        if isinstance(calib, Statistics) and recipe.transforms and (after or _static(scheme)):
            raise ValueError(f"calib: {recipe.name} calibrates again after {recipe.steps[0].registered}, and statistics of the "
                             "model as it was do not do for that: give the text itself")

    @cached_property
    def sequences(self) -> Sequences:
        if isinstance(self.given, Shared):
            return self.given.sequences
        return read_sequences(self._model, self.given, **self._options)

    def statistics(self, model: Any, needs: frozenset[str], show: bool | None) -> Statistics | None:
        """Of a float model; None where nothing is needed."""
        if not needs:
            return None
        if isinstance(self.given, Statistics):
            self.given.check(model, needs, dict(getattr(model, "model", model).named_linears()))
            return self.given
        if isinstance(self.given, Shared) and model is self._network and model is self.given.network:
            return self.given.statistics(needs, self._options["seed"], show)
        return collect(model, self.sequences, needs, seed=self._options["seed"], progress=show)


def needs_data(recipe: Recipe, scheme: Scheme) -> bool:
    """Whether ``quantize`` asks for calibration data.

    >>> needs_data(Recipe.of("gptq"), Scheme.parse("w4a16")), needs_data(Recipe.of("rtn"), Scheme.parse("w4a16"))
    (True, False)
    """
    return bool(recipe.needs) or isinstance(recipe.method, BlockMethod) or _static(scheme)


def _wanting(recipe: Recipe, scheme: Scheme) -> str:
    """Who needs what data, for an error."""
    if isinstance(recipe.method, BlockMethod):
        return f"method {recipe.name} trains blocks on hidden states"
    if recipe.needs:
        return f"method {recipe.name} needs {', '.join(sorted(recipe.needs))} of the layers' inputs"
    return f"scheme {scheme.name}, whose activations have static ranges, needs minmax of the layers' inputs"


def _static(scheme: Scheme) -> bool:
    """Whether some layer's activations have a scale that is known beforehand."""
    return any(map(_is_static, [scheme.activations, *(spec for _, spec in scheme.activation_overrides)]))


def _transform(model: Any, step: Transform, data: _Data, scheme: Scheme, show: bool | None) -> tuple[Any, Scheme]:
    network = inner_network(model)
    statistics = data.statistics(network, step.needs, show)
    try:
        changed, scheme = step.transform(network, statistics, scheme)
    except ValueError as error:
        raise ValueError(f"{step.registered}: {error}") from None
    return (changed if network is model else model.replace(model=changed)), scheme


def inner_network(model: Any) -> Any:
    """The Model inside a SentenceEncoder; others are that themselves. TypeError on what is no model."""
    check_model("model", model)
    inner = getattr(model, "model", None)
    return inner if inner is not None and hasattr(model, "encode") else model


def check_float(model: Any, scheme: Scheme) -> None:
    """ValueError naming the first layer that ``scheme`` quantizes and that is quantized already."""
    for name, layer in inner_network(model).named_linears():
        if scheme.weights_for(name) is not None:
            _refuse_quantized(name, layer._weight)


class Quantizer:
    """A model while it is being quantized; the recipe's transforms have happened.

    Attributes
    ----------
    network : the float model
    start : the same with quantized word embeddings, if the scheme says so: where the sequential mode begins
    specs : name -> format of the layers that are quantized
    needs : statistics that the solver, the repairs and static activations want
    """

    def __init__(self, model: Any, scheme: Scheme, recipe: Recipe) -> None:
        self.model, self.scheme, self.recipe, self.method = model, scheme, recipe, recipe.method
        self.network: Any = inner_network(model)
        self._layers: dict[str, Linear] = dict(self.network.named_linears())
        _check_overrides(scheme, self._layers)
        if scheme.int8_attention and not hasattr(self.network, "has_head"):
            raise ValueError(f"scheme {scheme.name}: int8 attention is for encoders, not {type(self.network).__name__}")
        check_float(model, scheme)
        specs = {name: scheme.weights_for(name) for name in self._layers}
        self.specs = {name: spec for name, spec in specs.items() if spec is not None}
        self._linears: dict[str, Linear] = {}
        self._norms: dict[str, np.ndarray] = {}

    @cached_property
    def needs(self) -> frozenset[str]:
        is_static = any(_is_static(self.scheme.activations_for(name)) for name in self.specs)
        static = frozenset({"minmax"} if is_static else ())
        return self.method.needs.union(static, *(step.needs for step in self.recipe.repairs))

    @cached_property
    def start(self) -> Any:
        return self.network.replace(embeddings=self._tables, scheme=self.scheme, recipe=self.recipe)

    @cached_property
    def _tables(self) -> dict[str, QTensor]:
        """Word embeddings. Tables round to nearest whatever the method is: a row is read, not multiplied."""
        method = self.method if not self.method.needs else get_method("rtn")
        return {name: _quantize_table(name, table, self.scheme.embeddings, method)
                for name, table in self.network.embeddings.items()
                if self.scheme.embeddings is not None and table is self.network.word_embeddings}

    def run(self, data: _Data, mode: str, seed: int, show: bool | None) -> None:
        """Quantize all layers."""
        needs = self.needs
        if isinstance(self.method, BlockMethod):
            self._block_by_block(self.method, data, mode, seed, show)
        elif isinstance(data.given, Statistics) and needs:
            data.given.check(self.model, needs, self.specs)
            self.layer_by_layer(data.given, show)
        elif needs and self.specs:
            begin = self.start if mode == "sequential" else self.network
            walk(begin, data.sequences.ids, needs, self.visit, sequential=mode == "sequential", wanted=self.specs, seed=seed,
                 reference=self.network, progress=show)
        else:
            self.layer_by_layer(None, show)

    def _block_by_block(self, method: BlockMethod, data: _Data, mode: str, seed: int, show: bool | None) -> None:
        """Blocks are trained; other layers round to nearest."""
        from .distill import distill

        if self.recipe.repairs:
            raise ValueError(f"recipe {self.recipe.name}: {self.recipe.repairs[0].registered} repairs what rounding took from "
                             f"a layer's weights, and {method.registered} has trained them to others")
        first = Quantizer(self.model, self.scheme, Recipe.of(method.start))
        if first.needs:
            first.run(data, mode, seed, show)
        trained, _ = distill(self.network, self.start, self.scheme, data.sequences.ids, method.options, seed=seed,
                             inputs=method.inputs, start=first._linears, resources=data.resources,
                             progress=show)
        self._linears = {name: layer for name, layer in trained.named_linears() if layer is not self._layers[name]}
        self._norms = {name: tensor for name, tensor in trained.tensors.items()
                       if tensor is not self.start.tensors[name]}
        for name in self.specs.keys() - self._linears.keys():
            self._linears[name] = self._quantize(name, None)

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
        layer, spec, act = self._layers[name], self.specs[name], self.scheme.activations_for(name)
        weight = _quantize_weight(name, layer._weight, spec, self.method, stats)
        extras = {step.fills: self._repair(name, step, weight, stats) for step in self.recipe.repairs}
        if act is not None and stats is not None and _is_static(act):
            extras["static"] = static_range(act, stats["minmax"])
        layer.release()
        return layer.with_weight(weight, act, extras=Extras(branch=layer.extras.branch, **extras))

    def _repair(self, name: str, step: Repair, tensor: QTensor, stats: Mapping[str, np.ndarray] | None) -> Any:
        try:
            return step.repair(self._layers[name].dense(), tensor, self.specs[name], stats)
        except ValueError as error:
            raise ValueError(f"{name}: {step.registered}: {error}") from None

    def finish(self) -> Any:
        """The quantized model, of the kind that was given."""
        small = self.start.replace(linears=self._linears, norms=self._norms)
        return small if self.network is self.model else self.model.replace(model=small)


def _is_static(activations: QuantSpec | None) -> bool:
    return activations is not None and activations.granularity == "tensor" and not activations.dynamic


def _check_overrides(scheme: Scheme, names: Iterable[str]) -> None:
    """A pattern that the user gave and that matches nothing is a mistake; those of the named schemes may not apply."""
    built_in = set(Scheme.parse("w4/8a8").overrides)
    for glob, spec in scheme.overrides + scheme.activation_overrides:
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
    return QTensor._made(codes, np.concatenate(scales), np.concatenate(zeros) if zeros else None, spec)
