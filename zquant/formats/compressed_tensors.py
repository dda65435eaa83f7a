"""The compressed-tensors layout of quantized models: what vLLM, transformers and llm-compressor read.

A quantized layer ``m`` is stored as

    int-quantized     m.weight int8 (n, k), m.weight_scale (n, g), [m.weight_zero_point int8 (n, g)]
    pack-quantized    m.weight_packed int32 (n, ceil(k bits / 32)), m.weight_scale (n, g), m.weight_shape int64 (2),
                      [m.weight_zero_point int32 (ceil(n bits / 32), g)]

with g = 1 per channel or ceil(k / group_size). Packed values are code + 2^(bits-1), in a dense little-endian bit stream per
row (per column for zero points). Asymmetric codes are signed here: code and zero point are each 2^(bits-1) less than in a
QTensor. What a layer carries beside its weight is in :mod:`zquant.formats.layer_extras`. ``quantization_config`` in
config.json says which layers are stored how. Its objects refuse unknown keys, so what the layout cannot say (row blocks, the
scheme's name) travels in the metadata of the safetensors file.
"""
from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import FormatError, VersionError
from ..extras import Extras
from ..linear import HALVES, Linear
from ..ops.quantize import pack, unpack
from ..qtensor import QTensor
from ..spec import QuantSpec, Scheme
from .layer_extras import PREFIX, read_extras
from .safetensors import Checkpoint, Stored

__all__ = ["FORMAT_VERSION", "ModelTensors", "pack_layer", "quantization_config", "zquant_metadata"]

FORMAT_VERSION = 2  # 2: layers with extras, activations per tensor
PARAMETERS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
              "input_zero_point", "weight_global_scale", "input_global_scale", "output_scale", "output_zero_point")


# ---- writing ---------------------------------------------------------------------------------------------------------
def storage_format(spec: QuantSpec, activations: QuantSpec | None) -> str:
    """The compressed-tensors format that a weight is stored in."""
    return "int-quantized" if spec.bits == 8 and activations is not None else "pack-quantized"


def pack_layer(module: str, weight: QTensor, packed: bool) -> dict[str, np.ndarray]:
    """The tensors that store one quantized weight.

    >>> w = QTensor(np.arange(8, dtype=np.int8)[None] - 4, np.ones((1, 1), np.float32), None, QuantSpec(4))
    >>> tensors = pack_layer("fc", w, packed=True)
    >>> hex(tensors["fc.weight_packed"][0, 0].view(np.uint32))
    '0xba987654'
    """
    bits, half = weight.spec.bits, 1 << (weight.spec.bits - 1)
    tensors = {f"{module}.weight_scale": weight.scales}
    if packed:
        offset = np.uint8(half if weight.spec.symmetric else 0)
        tensors[f"{module}.weight_packed"] = _pack_rows(weight.codes.view(np.uint8) + offset, bits)
        tensors[f"{module}.weight_shape"] = np.array(weight.shape, np.int64)
        if weight.zeros is not None:
            columns = _pack_rows(np.ascontiguousarray(weight.zeros.T.astype(np.uint8)), bits)
            tensors[f"{module}.weight_zero_point"] = np.ascontiguousarray(columns.T)
    else:
        tensors[f"{module}.weight"] = weight.codes if weight.spec.symmetric else (weight.codes ^ 0x80).view(np.int8)
        if weight.zeros is not None:
            tensors[f"{module}.weight_zero_point"] = (weight.zeros - 128).astype(np.int8)
    return tensors


def _pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes (r, c) as little-endian bit streams (r, ceil(c bits / 32)) int32."""
    words = math.ceil(codes.shape[1] * bits / 32)
    padded = np.zeros((codes.shape[0], words * 4), np.uint8)
    stream = pack(codes, bits)
    padded[:, :stream.shape[1]] = stream
    return padded.view("<i4")


def _unpack_rows(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    stream = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return unpack(np.ascontiguousarray(stream[:, :math.ceil(columns * bits / 8)]), bits, columns, False)


def quantization_config(linears: Mapping[str, Linear], tables: Mapping[str, QTensor],
                        unlisted: Iterable[str] = ()) -> dict[str, Any]:
    """``quantization_config`` for config.json.

    Parameters
    ----------
    linears
        All linear layers by module name, quantized or not.
    tables
        The quantized embedding tables by module name.
    unlisted
        Other modules of class Linear, which readers must leave alone: a head that is the embedding table.
    """
    linear_groups: dict[str, list[str]] = {}  # a group, as JSON -> its layers
    for name, layer in linears.items():
        if layer.spec is not None:
            group = _group(layer.spec, layer.activations, storage_format(layer.spec, layer.activations))
            linear_groups.setdefault(group, []).append(name)
    groups = [json.loads(group) | {"targets": ["Linear"] if len(linear_groups) == 1 else _patterns(names, linears)}
              for group, names in linear_groups.items()]
    groups += [json.loads(_group(table.spec, None, "int-quantized")) | {"targets": _patterns([name], linears)}
               for name, table in tables.items()]
    formats = {group["format"] for group in groups}
    ignore = [name for name, layer in linears.items() if layer.spec is None]
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "ignore": [*ignore, *_without_prefix(ignore, linears), *unlisted],
            "kv_cache_scheme": None, "global_compression_ratio": None}


def _group(spec: QuantSpec, activations: QuantSpec | None, storage: str) -> str:
    weights, inputs = _arguments(spec), None if activations is None else _arguments(activations)
    if spec.granularity in ("row_block", "tensor"):  # one scale per row in the file
        weights["strategy"] = "channel"
    return json.dumps({"targets": [], "weights": weights, "input_activations": inputs, "output_activations": None,
                       "format": storage})


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    """QuantizationArgs of compressed-tensors."""
    return {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "strategy": spec.granularity,
            "group_size": spec.group_size, "dynamic": spec.dynamic}


def _patterns(names: list[str], linears: Mapping[str, Linear]) -> list[str]:
    """Regular expressions for some of the layers: layer numbers as \\d+ where that matches no other layer.

    They match with and without the prefix that a model with a head has ("bert."), since a client may load either.
    """
    chosen = set(names)
    patterns = []
    for name in names:
        general = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
        exact = any(re.fullmatch(general, other) and other not in chosen for other in linears)
        pattern = re.escape(name) if exact else general
        patterns.append(f"re:(.*\\.)?{_strip_prefix(pattern, linears)}$")
    return list(dict.fromkeys(patterns))


def _strip_prefix(pattern: str, linears: Mapping[str, Linear]) -> str:
    prefix = re.escape(_prefix(linears))
    return pattern[len(prefix):] if prefix and pattern.startswith(prefix) else pattern


def _prefix(linears: Mapping[str, Linear]) -> str:
    """ "bert." when the numbered layers are called bert.encoder.layer.0...., "" when encoder.layer.0.... """
    first = next((name for name in linears if re.search(r"\.\d+\.", name)), "")
    parts = first.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return parts[0] + "." if numbered > 2 else ""


def _without_prefix(names: list[str], linears: Mapping[str, Linear]) -> list[str]:
    prefix = _prefix(linears)
    return [name[len(prefix):] for name in names if prefix and name.startswith(prefix)]


def zquant_metadata(scheme: Scheme | None, linears: Mapping[str, Linear],
                    recipe: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Metadata of the safetensors file: our format's version, and what compressed-tensors cannot say."""
    layers = {name: layer.spec.to_dict() for name, layer in linears.items()
              if layer.spec is not None and layer.spec.granularity in ("row_block", "tensor")}
    extra = {"scheme": scheme and scheme.to_dict(), "layers": layers, "recipe": recipe}
    return {"format": "pt", "zquant_format_version": str(FORMAT_VERSION), "zquant": json.dumps(extra)}


# ---- reading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Group:
    """One entry of config_groups, as formats of ours."""

    targets: tuple[str, ...]
    weights: QuantSpec
    activations: QuantSpec | None

    def rank(self, module: str, kind: str) -> int | None:
        """How specifically a target names the module: 0 by name, 1 by pattern, 2 by class; None not at all."""
        ranks = [0 if target == module else 1 if target.startswith("re:") and re.match(target[3:], module) else
                 2 if target == kind else 3 for target in self.targets]
        return min(ranks) if ranks and min(ranks) < 3 else None


def _parse_arguments(where: str, data: Any) -> QuantSpec:
    strategies = {"channel": "channel", "group": "group", "token": "token", "tensor": "tensor"}
    if not isinstance(data, Mapping):
        raise FormatError(f"{where}: expected an object, got {data!r}")
    strategy = data.get("strategy") or ("group" if (data.get("group_size") or -1) > 0 else "channel")
    if data.get("type", "int") != "int" or strategy not in strategies or data.get("actorder") == "group":
        raise FormatError(f"{where}: integer formats per channel, group, tensor or token are supported, not "
                          f"type={data.get('type')!r}, strategy={strategy!r}, actorder={data.get('actorder')!r}")
    try:
        return QuantSpec(data.get("num_bits", 8), "int", strategies[strategy],
                         data.get("group_size") if strategy == "group" else None, data.get("symmetric", True),
                         data.get("dynamic", False))
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None


def _parse_group(where: str, data: Any) -> _Group:
    try:
        targets, weights, inputs = tuple(data["targets"]), data["weights"], data.get("input_activations")
    except (TypeError, KeyError, AttributeError):
        raise FormatError(f"{where}: a group needs targets and weights, got {data!r}") from None
    if data.get("output_activations"):
        raise FormatError(f"{where}: output_activations are not supported")
    activations = None if inputs is None else _parse_arguments(f"{where}.input_activations", inputs)
    if activations is not None and (activations.granularity not in ("token", "tensor") or activations.bits != 8):
        raise FormatError(f"{where}.input_activations: 8 bits per token or per tensor are supported, not {activations}")
    return _Group(targets, _parse_arguments(f"{where}.weights", weights), activations)


def _parse_config(where: str, config: Any) -> list[_Group]:
    if not isinstance(config, Mapping) or config.get("quant_method") != "compressed-tensors":
        method = config.get("quant_method") if isinstance(config, Mapping) else config
        raise FormatError(f"{where}: quantization_config: compressed-tensors is supported, not {method!r}")
    if config.get("quantization_status") != "compressed" or config.get("kv_cache_scheme"):
        raise FormatError(f"{where}: quantization_config: expected quantization_status 'compressed' and no kv_cache_scheme")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise FormatError(f"{where}: quantization_config: config_groups must be an object, got {groups!r}")
    return [_parse_group(f"{where}: config_groups.{name}", group) for name, group in groups.items()]


class ModelTensors(Mapping[str, np.ndarray]):
    """The tensors of a model by the names that they have in float, whether the checkpoint is quantized or not.

    ``tensors["m.weight"]`` is float32 also where the checkpoint has codes; :meth:`linear` and :meth:`table` give layers
    and embedding tables in the form they were stored in. Quantization parameters are not listed.

    Parameters
    ----------
    checkpoint
        The open checkpoint.
    config
        The contents of config.json.

    Raises
    ------
    FormatError
        Quantization formats that are not supported; tensors that are missing or do not fit.
    VersionError
        A model saved by a later version of zquant.
    """

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.scheme: Scheme | None = None
        self.recipe: Mapping[str, Any] | None = None
        self._specs: dict[str, QuantSpec] = {}
        self._read_metadata(checkpoint.metadata)
        settings = config.get("quantization_config")
        self._groups = _parse_config(f"{checkpoint.path}/config.json", settings) if settings else []
        self._quantized = {n.rpartition(".")[0] for n in checkpoint if n.endswith((".weight_scale", ".weight_packed"))}
        if self._quantized and not self._groups:
            raise FormatError(f"{checkpoint.path}: tensor {min(self._quantized)}.weight is quantized but config.json has no "
                              "quantization_config")
        hidden = {f"{module}.{parameter}" for module in self._quantized for parameter in PARAMETERS}
        listed = [name for name in checkpoint if name not in hidden and not name.rpartition(".")[2].startswith(PREFIX)]
        self._names = dict.fromkeys(listed + [f"{module}.weight" for module in sorted(self._quantized)])

    def _read_metadata(self, metadata: Mapping[str, str]) -> None:
        version = metadata.get("zquant_format_version")
        if version is None:
            return
        if not version.isdecimal() or int(version) > FORMAT_VERSION:
            raise VersionError(f"{self.checkpoint.path}: saved in zquant format version {version}; this zquant reads up to "
                               f"version {FORMAT_VERSION}: upgrade zquant to open it")
        try:
            extra = json.loads(metadata["zquant"])
            self.scheme = Scheme.from_dict(extra["scheme"]) if extra["scheme"] else None
            self._specs = {name: QuantSpec.from_dict(spec) for name, spec in extra["layers"].items()}
            self.recipe = extra.get("recipe")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"{self.checkpoint.path}: the zquant metadata is damaged: {error!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        module = name.removesuffix(".weight")
        return self._qtensor(module, "Linear")[0].dequantize() if module in self._quantized else self.checkpoint[name]

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor of that (float) name is stored as codes."""
        return name.removesuffix(".weight") in self._quantized

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the tensor has in float; codes are not read."""
        module = name.removesuffix(".weight")
        if module in self._quantized and f"{module}.weight_packed" in self.checkpoint:
            return self._packed_shape(module)
        return self.checkpoint.shape(name)

    def dtype(self, name: str) -> str:
        """The safetensors name of the stored type; "F32" for codes, which stand for float32 values."""
        return "F32" if self.is_quantized(name) else self.checkpoint.dtype(name)

    def linear(self, module: str, transposed: bool = False) -> Linear:
        """The linear layer ``module``: weight (float, mapped, or QTensor), bias where there is one, input quantization.

        ``transposed``: a float weight is stored (in, out), as the Conv1D of GPT-2. Codes are (out, in) always.
        """
        bias = self._float32(f"{module}.bias") if f"{module}.bias" in self.checkpoint else None
        if module not in self._quantized:
            stored = self.checkpoint.stored(f"{module}.weight")
            stored = Stored(stored.array.T, stored.dtype) if transposed else stored
            extras = self._extras(module, None)
            return self._checked(module, stored if stored.dtype in HALVES else stored.array, bias, None, extras)
        weight, activations = self._qtensor(module, "Linear")
        return self._checked(module, weight, bias, activations, self._extras(module, activations))

    def _extras(self, module: str, activations: QuantSpec | None) -> Extras:
        try:
            return read_extras(module, activations, self.checkpoint, partial(self._parameter, module))
        except FormatError:
            raise
        except ValueError as error:
            raise self._error(module, str(error)) from None

    def _checked(self, module: str, weight: np.ndarray | Stored | QTensor, bias: np.ndarray | None,
                 activations: QuantSpec | None, extras: Extras) -> Linear:
        """The layer; where it has extras, what does not fit is the file's fault."""
        try:
            return Linear(module, weight, bias, activations, extras=extras)
        except ValueError as error:
            raise (self._error(module, str(error)) if extras else error) from None

    def table(self, name: str) -> np.ndarray | Stored | QTensor:
        """The embedding table of that (float) name as it is stored: float32 or float16 mapped, bfloat16 as
        :class:`Stored`, or a QTensor with one scale per row."""
        module = name.removesuffix(".weight")
        if module not in self._quantized:
            stored = self.checkpoint.stored(name)
            return stored if stored.dtype == "BF16" else stored.array
        weight, _ = self._qtensor(module, "Embedding")
        if weight.groups != 1 or weight.zeros is not None:
            raise FormatError(f"{self.checkpoint.path}: embedding table {name!r}: one symmetric scale per row is supported, "
                              f"not {weight.spec}")
        return weight

    def _float32(self, name: str) -> np.ndarray:
        array = self.checkpoint.stored(name).float32()
        if array.dtype != np.float32:
            raise FormatError(f"{self.checkpoint.path}: tensor {name!r} is {array.dtype}; expected F32, F16 or BF16")
        return array

    def _error(self, module: str, text: str) -> FormatError:
        return FormatError(f"{self.checkpoint.path}: layer {module!r}: {text}")

    def _group(self, module: str, kind: str) -> _Group:
        ranked = [(rank, i) for i, group in enumerate(self._groups) if (rank := group.rank(module, kind)) is not None]
        if not ranked:
            raise self._error(module, "is quantized, but no config_groups target in config.json names it")
        return self._groups[min(ranked)[1]]

    def _parameter(self, module: str, name: str, dtypes: Iterable[str], shape: tuple[int, ...]) -> np.ndarray:
        full = f"{module}.{name}"
        if full not in self.checkpoint:
            raise self._error(module, f"tensor {full!r} is missing")
        got = self.checkpoint.shape(full)
        if self.checkpoint.dtype(full) not in dtypes or len(got) != len(shape) or any(
                want not in (-1, n) for want, n in zip(shape, got)):
            raise self._error(module, f"tensor {full!r} is {self.checkpoint.dtype(full)} of shape "
                              f"{got}; expected {' or '.join(dtypes)} of shape {str(shape).replace('-1', 'any')}")
        return self.checkpoint[full]

    def _packed_shape(self, module: str) -> tuple[int, int]:
        n, k = self._parameter(module, "weight_shape", ("I64", "I32"), (2,)).tolist()
        if n < 0 or k < 0:
            raise self._error(module, f"weight_shape {[n, k]} is negative")
        return n, k

    def _qtensor(self, module: str, kind: str) -> tuple[QTensor, QuantSpec | None]:
        """A quantized weight and the format of its inputs; every shape is checked against the others."""
        group = self._group(module, kind)
        spec = group.weights
        if f"{module}.weight_g_idx" in self.checkpoint:
            raise self._error(module, "activation order (weight_g_idx) is not supported")
        packed = f"{module}.weight_packed" in self.checkpoint
        shape = self._packed_shape(module) if packed else self.checkpoint.shape(f"{module}.weight")
        if len(shape) != 2:
            raise self._error(module, f"weight must be 2-D, got shape {shape}")
        codes = self._codes(module, spec, packed, shape)
        scales = self._scales(module, spec, shape)
        zeros = None if spec.symmetric else self._zeros(module, spec, packed, scales.shape)
        if not spec.symmetric:
            codes = (codes.view(np.uint8) ^ 0x80) if not packed else codes
        if spec.granularity == "tensor":  # kept as one scale per row
            spec = QuantSpec(spec.bits)
        try:
            return QTensor(codes, scales, zeros, self._own_spec(module, spec)), group.activations
        except ValueError as error:
            raise self._error(module, str(error)) from None

    def _own_spec(self, module: str, spec: QuantSpec) -> QuantSpec:
        """What our metadata says about a layer that is stored with one scale per row, if it agrees otherwise."""
        own = self._specs.get(module, spec)
        return own if (own.bits, own.symmetric, own.group_size) == (spec.bits, spec.symmetric, spec.group_size) else spec

    def _codes(self, module: str, spec: QuantSpec, packed: bool, shape: tuple[int, int]) -> np.ndarray:
        if not packed:
            return self._parameter(module, "weight", ("I8",), shape)
        words = self._parameter(module, "weight_packed", ("I32",), (shape[0], math.ceil(shape[1] * spec.bits / 32)))
        codes = _unpack_rows(words, spec.bits, shape[1])
        return codes if not spec.symmetric else (codes - np.uint8(1 << (spec.bits - 1))).view(np.int8)

    def _scales(self, module: str, spec: QuantSpec, shape: tuple[int, int]) -> np.ndarray:
        groups = math.ceil(shape[1] / spec.group_size) if spec.group_size else 1
        floats = ("F32", "F16", "BF16")
        if spec.granularity == "tensor":
            one = self._parameter(module, "weight_scale", floats, (1,))
            scales = np.repeat(one.astype(np.float32)[None], shape[0], axis=0)
        else:
            scales = self._parameter(module, "weight_scale", floats, (shape[0], groups)).astype(np.float32, copy=False)
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise self._error(module, "weight_scale holds values that are not finite and positive")
        return scales

    def _zeros(self, module: str, spec: QuantSpec, packed: bool, shape: tuple[int, ...]) -> np.ndarray:
        n, groups = shape
        if not packed:
            return self._parameter(module, "weight_zero_point", ("I8",), (n, groups)).astype(np.int32) + 128
        words = self._parameter(module, "weight_zero_point", ("I32",), (math.ceil(n * spec.bits / 32), groups))
        return np.ascontiguousarray(_unpack_rows(words.T, spec.bits, n).T).astype(np.int32)
