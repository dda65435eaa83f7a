"""The engines that bench_encoder.py and bench_decode.py time, and the process that serves one of them.

Every engine runs in a process of its own, so that thread pools, allocators and environment variables of one do not
touch another; only one works at a time. Models are converted once into a cache folder outside the repository
(``ZQUANT_BENCH_CACHE``, default ``zquant-bench`` among the temporary files). An engine whose package is missing is left out.
"""
from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

REPO = Path(__file__).resolve().parents[2]
FLOAT32, REDUCED, BITS8 = "float32", "reduced-precision float", "8 bits"  # what the linear layers compute in


def cache_root() -> Path:
    return Path(os.environ.get("ZQUANT_BENCH_CACHE", Path(tempfile.gettempdir()) / "zquant-bench"))


def cache_dir(model: Path, name: str) -> Path:
    """A folder for what `name` converts `model` to; keyed by the weights' path, size and time."""
    weights = model / "model.safetensors"
    stat = weights.stat()
    key = hashlib.sha256(f"{weights.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    path = cache_root() / f"{key}-{name}"
    path.mkdir(parents=True, exist_ok=True)
    return path


class Engine:
    """A loaded model. ``run(ids, mask)`` computes hidden states of (B, T) int64 ids; mask 1 marks tokens."""

    name: ClassVar[str]
    kind: ClassVar[str] = "encoder"
    precision: ClassVar[str] = BITS8
    modules: ClassVar[tuple[str, ...]] = ()
    idle: ClassVar[float] = 0.0  # how long its workers keep spinning after a call, seconds
    caller_sleeps: ClassVar[bool] = False  # all of its work is done by threads of its own

    def __init__(self, model: Path, threads: int) -> None:
        raise TypeError("abstract")

    def run(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        raise TypeError("abstract")

    def hidden(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The result of run() as a (B, T, d) array."""
        return np.asarray(self.run(ids, mask))

    def example(self, vocabulary: int) -> Callable[[], Any]:
        """Work that keeps every thread of the engine busy."""
        ids, mask = random_batch(vocabulary, 8, 64)
        return lambda: self.run(ids, mask)

    @classmethod
    def missing(cls) -> str | None:
        """The first package that is not installed, or None."""
        return next((m for m in cls.modules if importlib.util.find_spec(m) is None), None)


ENGINES: dict[str, type[Engine]] = {}


def register(cls: type[Engine]) -> type[Engine]:
    ENGINES[cls.name] = cls
    return cls


# ---- ours -----------------------------------------------------------------------------------------------
class CoreClock:
    """Adds up the time spent inside the extension while the context lasts, by wrapping its functions."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}  # seconds and calls by function
        self.wall = 0.0  # seconds of the last call of share_outside()
        self.watch: Callable[[str, Any, tuple[Any, ...]], Any] | None = None  # makes the calls instead, untimed

    def __enter__(self) -> CoreClock:  # noqa: PYI034  (typing.Self came with 3.11)
        from zquant import _core

        self.core = _core
        self.functions = {n: f for n in dir(_core) if callable(f := getattr(_core, n)) and not n.startswith("_")
                          and "sequence" not in n}  # a sequence stands for the interpreter: only what it calls counts
        for name, function in self.functions.items():
            setattr(_core, name, self.timed(function, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.functions.items():
            setattr(self.core, name, function)

    def timed(self, function: Any, name: str) -> Any:
        """The function, whose calls count as spent inside under this name."""
        mine, clock = self.spent.setdefault(name, [0.0, 0]), time.perf_counter

        def timed(*args: Any) -> Any:
            if self.watch is not None:
                return self.watch(name, function, args)
            start = clock()
            try:
                return function(*args)
            finally:
                mine[0] += clock() - start
                mine[1] += 1

        return timed

    @property
    def inside(self) -> float:
        return sum(seconds for seconds, _ in self.spent.values())

    def seconds_inside(self, work: Callable[[], Any]) -> float:
        """What one call of work() spends inside the extension."""
        for mine in self.spent.values():
            mine[:] = 0.0, 0
        work()
        return self.inside

    def share_outside(self, work: Callable[[], Any], cost: float) -> float:
        """The part of the wall time of one call of work() that is spent outside, without the wrappers' own time."""
        start = time.perf_counter()
        self.seconds_inside(work)
        self.wall = time.perf_counter() - start - sum(calls for _, calls in self.spent.values()) * cost
        return (self.wall - self.inside) / self.wall

    def shares(self, work: Callable[[], Any], cost: float) -> dict[str, float]:
        """The parts of the wall time of one call of work(): by function of the extension, and "Python" for the rest."""
        outside = self.share_outside(work, cost)
        scale = (1.0 - outside) / max(self.inside, 1e-12)
        used = {name: scale * seconds for name, (seconds, calls) in self.spent.items() if calls}
        return {**used, "Python": outside}

    def cost(self, calls: int = 20000) -> float:
        """Seconds that a wrapper adds to a call outside of what it counts: the least of five tries."""
        nothing = self.timed(lambda: None, "nothing")
        mine, tries = self.spent.pop("nothing"), []
        for _ in range(5):
            mine[0] = 0.0
            start = time.perf_counter()
            for _ in range(calls):
                nothing()
            tries.append((time.perf_counter() - start - mine[0]) / calls)
        return min(tries)

    def quantizations(self, work: Callable[[], Any]) -> Callable[[], float]:
        """A stopwatch for what the linear layers of one call of work() quantize within their calls: it gives the seconds that
        as many rows of the same sizes take in calls of quantize_tokens. (A product that quantizes its output as it computes it
        may well take less.)"""
        noted: collections.Counter[tuple[int, int, int]] = collections.Counter()

        def watch(name: str, function: Any, args: tuple[Any, ...]) -> Any:
            result = function(*args)
            if name == "linear_forward":
                noted.update(quantized(args, result))
            return result

        self.watch = watch
        try:
            work()
        finally:
            self.watch = None
        return self._repeated(noted)

    def _repeated(self, noted: dict[tuple[int, int, int], int]) -> Callable[[], float]:
        quantize, rng = self.functions["quantize_tokens"], np.random.default_rng(3)
        rows = [(rng.standard_normal((m, n), np.float32), mode, count) for (m, n, mode), count in noted.items()]

        def seconds() -> float:
            start = time.perf_counter()
            for x, mode, count in rows:
                for _ in range(count):
                    quantize(x, mode, True)
            return time.perf_counter() - start

        return seconds if rows else lambda: 0.0


def quantized(args: tuple[Any, ...], result: Any) -> list[tuple[int, int, int]]:
    """Rows, features and mode of what a call of linear_forward quantizes: float32 rows before integer weights, and its output.
    Modes that quantize_tokens does not have (int16, one scale for all) stand for asymmetric codes per token."""
    _, x, quant_in, _, _, quant_out = args
    found = []
    if quant_in and not isinstance(x, tuple):
        found.append((*x.shape, quant_in if quant_in in (1, 2) else 2))
    if isinstance(quant_out, tuple) or quant_out:
        q = result[0] if isinstance(result, tuple) else result
        found.append((*q.shape, 2 if isinstance(quant_out, tuple) else quant_out))
    return found


def mean_pooled(hidden: np.ndarray) -> np.ndarray:
    """(B, d) means over (B, T, d) without padding, as SentenceEncoder makes them."""
    out = np.empty((hidden.shape[0], hidden.shape[2]), np.float32)
    for row, tokens in zip(out, hidden):
        np.add.reduce(tokens, axis=0, out=row)
        row /= np.float32(len(tokens))
    return out


def scheme_of(model: Path, name: str) -> Any:
    """The named scheme; a head of its own is int8, as one that is tied to the word table is."""
    import zquant as zq

    untied = json.loads((model / "config.json").read_text()).get("tie_word_embeddings") is False
    scheme = zq.Scheme.parse(name)
    bits = scheme.weights.bits if scheme.weights else None
    return scheme.with_overrides({"lm_head": bits} if untied else {})


class ZQuant(Engine):
    scheme: ClassVar[str | None] = None
    modules = ("numpy", "safetensors")

    def __init__(self, model: Path, threads: int) -> None:
        import zquant as zq

        zq.set_num_threads(threads)
        self.source = model, threads
        self.model = zq.load(model)
        if self.scheme is not None:
            self.model = zq.quantize(self.model, scheme_of(model, self.scheme))

    def run(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        return self.model(ids, mask)

    def shares(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], gate: Any) -> Iterable[tuple[dict[str, float], bool]]:
        """The parts of the wall time of run() and pooling on each batch, see parts_of_call(), and whether they are gated."""
        with CoreClock() as clock:
            twin, cost, pool = type(self)(*self.source), clock.cost(), clock.timed(mean_pooled, "pooling")
            for ids, mask in batches:
                work = lambda: pool(twin.run(ids, mask))
                again = clock.quantizations(work)
                yield typical_parts(lambda: parts_of_call(clock, work, cost, again), gate)


def typical_parts(measure: Callable[[], dict[str, float]], gate: Any, want: int = 15,
                  seconds: float = 1.0) -> tuple[dict[str, float], bool]:
    """What the call with the median part of products gives, of the undisturbed ones (as Gate.measure() has it); of all, and
    False, where these are too few."""
    import harness

    every: list[dict[str, float]] = []
    clean: list[dict[str, float]] = []
    now, before = time.perf_counter, gate.wait()
    end, took = now() + seconds, 0.0
    while len(clean) < want and now() < end or not clean and len(every) < 3:
        start, lost_time = now(), gate.lost_time()
        every.append(measure())
        took, lost = now() - start, lost_time()
        after = gate.good()
        if before and after and lost <= harness.MAX_LOST * took:
            clean.append(every[-1])
        before = after or gate.wait()
    gated = len(clean) >= (3 if took < harness.LONG else 1)
    chosen = sorted(clean if gated else every, key=lambda parts: parts["products"])
    return chosen[len(chosen) // 2], gated


def parts_of_call(clock: CoreClock, work: Callable[[], Any], cost: float, again: Callable[[], float]) -> dict[str, float]:
    """The parts of one call of work() by function, "products" in place of linear_forward: without the quantization in them."""
    parts = clock.shares(work, cost)
    linear = parts.pop("linear_forward", 0.0)
    quantization = min(again() / clock.wall, linear)
    return {**parts, "quantization": quantization, "products": linear - quantization}


def python_share(make: Callable[[], Any], work: Callable[[Any], Any], calls: int = 400) -> float:
    """The part of the wall time of ``work(model)`` that is not spent inside the extension.

    Two equal models take turns. One gives the wall time; the other, made while the functions are wrapped (blocks bind them
    when they are built), the time inside. Timed in one, the wrappers would count: they are Python as well, and as slow as
    everything whose code the weights have driven out of the caches.
    """
    clock, plain = CoreClock(), make()
    with clock:
        twin = make()
        work(twin)
    work(plain)
    found: list[float] = []
    end = time.perf_counter() + 4.0
    while len(found) < 3 or (len(found) < calls and time.perf_counter() < end):
        start = time.perf_counter()
        work(plain)
        wall = time.perf_counter() - start
        with clock:
            found.append(1.0 - clock.seconds_inside(lambda: work(twin)) / wall)
    return float(np.median(found))


for _name, _scheme, _precision in (("zquant fp32", None, FLOAT32), ("zquant w8a8", "w8a8", BITS8),
                                   ("zquant w8a8+attn8", "w8a8+attn8", BITS8), ("zquant w4/8a8", "w4/8a8", "4 and 8 bits")):
    register(type(_name.replace(" ", "_"), (ZQuant,), {"name": _name, "scheme": _scheme, "precision": _precision}))


# ---- PyTorch ----------------------------------------------------------------------------------------------
@register
class TorchF32(Engine):
    name = "torch fp32"
    precision = FLOAT32
    modules = ("torch", "transformers")
    idle = 0.01

    def __init__(self, model: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = transformers.AutoModel.from_pretrained(model).eval()

    def run(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        with self.torch.inference_mode():
            return self.model(input_ids=self.torch.from_numpy(ids), attention_mask=self.torch.from_numpy(mask))[0]


@register
class TorchBf16(TorchF32):
    """All of the model in bfloat16: autocast would convert the weights in every call."""

    name = "torch bf16"
    precision = REDUCED

    def __init__(self, model: Path, threads: int) -> None:
        super().__init__(model, threads)
        self.model = self.model.to(self.torch.bfloat16)

    def hidden(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.run(ids, mask).float().numpy()


@register
class TorchInt8(TorchF32):
    name = "torch int8 dynamic"
    precision = BITS8

    def __init__(self, model: Path, threads: int) -> None:
        super().__init__(model, threads)
        torch = self.torch
        self.model = torch.ao.quantization.quantize_dynamic(self.model, {torch.nn.Linear}, dtype=torch.qint8)


# ---- ONNX Runtime -----------------------------------------------------------------------------------------
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def export_onnx(model: Path) -> Path:
    """Hidden states as ONNX, dynamic batch and length. Eager attention: the pattern that ONNX Runtime fuses."""
    path = cache_dir(model, "onnx") / "model.onnx"
    if path.exists():
        return path
    import torch
    import transformers

    class Hidden(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.inner(input_ids=ids, attention_mask=mask, token_type_ids=types)[0]

    inner = transformers.AutoModel.from_pretrained(model, attn_implementation="eager")
    ids = torch.from_numpy(random_batch(inner.config.vocab_size, 2, 16)[0])
    tmp = path.with_suffix(".tmp")
    torch.onnx.export(
        Hidden(inner).eval(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), str(tmp), dynamo=False,
        opset_version=17, input_names=list(INPUTS), output_names=["hidden"],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in (*INPUTS, "hidden")})
    tmp.rename(path)
    return path


def fused_onnx(model: Path) -> Path:
    """The same after ONNX Runtime's own transformer optimizer (Attention, SkipLayerNormalization, BiasGelu)."""
    path = cache_dir(model, "onnx") / "fused.onnx"
    if not path.exists():
        from onnxruntime.transformers import optimizer

        config = json.loads((model / "config.json").read_text())
        fused = optimizer.optimize_model(str(export_onnx(model)), model_type="bert", opt_level=0,
                                         num_heads=config["num_attention_heads"], hidden_size=config["hidden_size"])
        count = fused.get_fused_operator_statistics()["Attention"]
        if count != config["num_hidden_layers"]:
            raise RuntimeError(f"onnxruntime fused {count} of {config['num_hidden_layers']} attention blocks")
        fused.save_model_to_file(str(path))
    return path


@register
class OrtF32(Engine):
    name = "onnxruntime fp32"
    precision = FLOAT32
    modules = ("onnxruntime", "onnx", "torch", "transformers")
    idle = 0.01

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(str(self.path(model)), options, providers=["CPUExecutionProvider"])

    def path(self, model: Path) -> Path:
        return fused_onnx(model)

    def run(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        return self.session.run(None, dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)))))[0]


@register
class OrtInt8(OrtF32):
    name = "onnxruntime int8 dynamic"
    precision = BITS8

    def path(self, model: Path) -> Path:
        path = cache_dir(model, "onnx") / "int8.onnx"
        if not path.exists():
            import onnx
            from onnxruntime.quantization import QuantType, quantize_dynamic

            # shape inference does not know the fused operators' types: all of them are float
            quantize_dynamic(str(fused_onnx(model)), str(path), per_channel=True, weight_type=QuantType.QInt8,
                             extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
        return path


# ---- OpenVINO ---------------------------------------------------------------------------------------------
@register
class OpenVinoF32(Engine):
    name = "openvino f32"
    precision = FLOAT32
    hint: ClassVar[str] = "f32"
    modules = ("openvino", "torch", "transformers")
    idle = 0.01

    def __init__(self, model: Path, threads: int) -> None:
        import openvino as ov

        config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": self.hint}
        compiled = ov.Core().compile_model(self.graph(model), "CPU", config)
        got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if got != self.hint:  # a CPU without the instructions: it would be the float32 engine under another name
            raise RuntimeError(f"openvino computes in {got} here, not in {self.hint}")
        self.request = compiled.create_infer_request()

    def graph(self, model: Path) -> Any:
        import openvino as ov

        return ov.Core().read_model(str(export_onnx(model)))

    def run(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        return self.request.infer(dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)))), share_inputs=True)[0]


@register
class OpenVinoBf16(OpenVinoF32):
    name = "openvino bf16"
    precision = REDUCED
    hint = "bf16"


@register
class OpenVinoInt8(OpenVinoF32):
    """Static activations calibrated by NNCF on 300 inputs, as its documentation does for Transformers."""

    name = "openvino int8 nncf"
    precision = BITS8
    modules = (*OpenVinoF32.modules, "nncf")

    def graph(self, model: Path) -> Any:
        import openvino as ov

        path = cache_dir(model, "openvino") / "int8.xml"
        if not path.exists():
            import nncf

            texts = [dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)))) for ids, mask in calibration_batches(model)]
            quantized = nncf.quantize(super().graph(model), nncf.Dataset(texts), model_type=nncf.ModelType.TRANSFORMER,
                                      subset_size=len(texts), preset=nncf.QuantizationPreset.MIXED)
            ov.save_model(quantized, str(path), compress_to_fp16=False)
        return ov.Core().read_model(str(path))


def calibration_batches(model: Path, count: int = 300) -> list[tuple[np.ndarray, np.ndarray]]:
    """Single inputs: the file that ZQUANT_BENCH_CALIBRATION names (ids.npz of bench_encoder), else random ids."""
    source = os.environ.get("ZQUANT_BENCH_CALIBRATION")
    if source:
        batches = load_batches(Path(source))
        rows = [(ids[i : i + 1, : int(mask[i].sum())], mask[i : i + 1, : int(mask[i].sum())])
                for ids, mask in batches for i in range(len(ids))]
        step = max(1, len(rows) // count)
        return [(np.ascontiguousarray(i), np.ascontiguousarray(m)) for i, m in rows[::step][:count]]
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(11)
    lengths = rng.integers(8, 64, count)
    return [(rng.integers(min(1000, vocabulary // 2), vocabulary, (1, n)), np.ones((1, n), np.int64)) for n in lengths]


# ---- CTranslate2 ------------------------------------------------------------------------------------------
@register
class CTranslate2Int8(Engine):
    name = "ctranslate2 int8"
    modules = ("ctranslate2", "torch", "transformers")
    idle = 0.25  # its OpenMP runtime spins for 200 ms
    caller_sleeps = True

    def __init__(self, model: Path, threads: int) -> None:
        import ctranslate2

        path = cache_dir(model, "ct2") / "int8"
        if not (path / "model.bin").exists():
            ctranslate2.converters.TransformersConverter(str(model)).convert(str(path), quantization="int8", force=True)
        self.ct2 = ctranslate2
        self.encoder = ctranslate2.Encoder(str(path), device="cpu", compute_type="int8_float32", intra_threads=threads)

    def run(self, ids: np.ndarray, mask: np.ndarray) -> Any:
        lengths = self.ct2.StorageView.from_array(mask.sum(axis=1).astype(np.int32))
        tokens = self.ct2.StorageView.from_array(ids.astype(np.int32))
        return self.encoder.forward_batch(tokens, lengths).last_hidden_state


# ---- decoders ---------------------------------------------------------------------------------------------
class Decoder(Engine):
    """A language model with room for one sequence of ``decoders.CONTEXT`` tokens."""

    kind = "decoder"
    weight_bytes: float  # of the weights that one step reads
    cache_item: ClassVar[float]  # bytes of one number in the key-value cache

    def prefill(self, ids: np.ndarray) -> Any:
        """Forget everything, take these (T,) ids, and compute the logits of the last."""
        raise TypeError("abstract")

    def step(self, token: int) -> Any:
        """One more token and its logits; then forget it again, so that every step has the same context."""
        raise TypeError("abstract")

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """(V,) float32 of the last token, of one prefill and one step."""
        raise TypeError("abstract")

    def example(self, vocabulary: int) -> Callable[[], Any]:
        ids = random_batch(vocabulary, 1, 64)[0][0]
        return lambda: (self.prefill(ids), self.step(1))


class ZQuantDecoder(ZQuant, Decoder):
    cache_item = 4

    def __init__(self, model: Path, threads: int) -> None:
        super().__init__(model, threads)
        self.cache = self.model.new_cache(1)
        self.weight_bytes = sum(float_or_packed(layer.weight) for layer in self.model.linears.values())
        if self.model.dims.tied:
            self.weight_bytes += float_or_packed(self.model.word_embeddings)

    def prefill(self, ids: np.ndarray) -> Any:
        self.cache.truncate(0)
        return self.model(ids[None], cache=self.cache, logits="last")

    def step(self, token: int) -> Any:
        before = int(self.cache.lengths[0])
        y = self.model([[token]], cache=self.cache, logits="last")
        self.cache.truncate(before)
        return y

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self.prefill(ids[:-1])
        return np.asarray(self.step(int(ids[-1])))[0]

    def share_of_step(self, ids: np.ndarray) -> float:
        """Python's share of a step after these ids. The last thing to ask: the model is made anew, not to have two."""
        del self.model, self.cache

        def twin() -> ZQuantDecoder:
            made = type(self)(*self.source)
            made.prefill(ids)
            return made

        token = np.array([[1]])  # the context grows meanwhile: to cut it again is no part of decoding
        return python_share(twin, lambda made: made.model(token, cache=made.cache, logits="last"))


def float_or_packed(weight: Any) -> float:
    """Bytes that a product with this weight reads: its codes and scales, or float32."""
    return float(weight.nbytes) if hasattr(weight, "bits_per_weight") else 4.0 * float(np.prod(weight.shape))


for _name, _scheme in (("zquant-lm fp32", None), ("zquant-lm w8a8", "w8a8"), ("zquant-lm w4a8 g64", "w4a8-g64"),
                       ("zquant-lm w4a16 g64", "w4a16-g64")):
    register(type(_name.replace(" ", "_"), (ZQuantDecoder,), {"name": _name, "scheme": _scheme}))


class LlamaCpp(Decoder):
    """llama.cpp through the plain functions of llama-cpp-python: nothing of Python is in the loop but one call."""

    modules = ("llama_cpp", "gguf", "safetensors")
    idle = 0.02
    quant: ClassVar[str]
    cache_item = 2

    def __init__(self, model: Path, threads: int) -> None:
        import decoders
        import llama_cpp

        path = decoders.write_gguf(model, self.quant, cache_dir(model, "gguf") / f"{self.quant}.gguf")
        self.lib = lib = llama_cpp
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = decoders.CONTEXT, 2048, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        self.memory = lib.llama_get_memory(self.context)
        self.vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        self.weight_bytes = sum(decoders.parameters(json.loads((model / "config.json").read_text()))) * (
            decoders.GGUF_BYTES[self.quant])
        self.length = 0

    def _decode(self, ids: Any) -> None:
        tokens = (self.lib.llama_token * len(ids))(*ids)
        code = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def prefill(self, ids: np.ndarray) -> Any:
        self.lib.llama_memory_seq_rm(self.memory, 0, 0, -1)
        self.length = len(ids)
        self._decode(ids.tolist())
        return self.lib.llama_get_logits_ith(self.context, -1)[0]  # waits until it is computed

    def step(self, token: int) -> Any:
        self._decode([token])
        y = self.lib.llama_get_logits_ith(self.context, -1)
        first = y[0]
        self.lib.llama_memory_seq_rm(self.memory, 0, self.length, -1)
        return first

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self.prefill(ids[:-1])
        self._decode(ids[-1:].tolist())
        y = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(y, (self.vocabulary,)).copy()


for _quant in ("q8_0", "q4_0", "q4_k"):
    register(type(f"llama_cpp_{_quant}", (LlamaCpp,), {"name": f"llama.cpp {_quant}", "quant": _quant}))


# ---- the serving process --------------------------------------------------------------------------------
def save_batches(path: Path, batches: list[tuple[np.ndarray, np.ndarray]]) -> None:
    np.savez(path, **{f"{kind}{i}": a for i, b in enumerate(batches) for kind, a in zip(("ids", "mask"), b)})


def load_batches(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    with np.load(path) as z:
        return [(z[f"ids{i}"], z[f"mask{i}"]) for i in range(len(z.files) // 2)]


def random_batch(vocabulary: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([batch, length])
    return rng.integers(min(1000, vocabulary // 2), vocabulary, (batch, length)), np.ones((batch, length), np.int64)


def pin_workers(cpus: list[int], work: Callable[[], Any], seconds: float = 0.3) -> list[int]:
    """Pin those threads, one per CPU, that work for a caller who sleeps meanwhile, the busiest one first; their ids. Watched
    in their place, the caller would seem to be without a CPU all the time."""
    import harness

    before, me = harness.thread_times(), threading.get_native_id()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        work()
    spent = {tid: ticks - before.get(tid, 0) for tid, ticks in harness.thread_times().items() if tid != me}
    busiest = sorted((tid for tid in spent if spent[tid] > 0), key=lambda tid: -spent[tid])[: len(cpus)]
    for tid, cpu in zip(busiest, cpus):
        os.sched_setaffinity(tid, {cpu})
    return busiest or [me]


class Server:
    """Answers JSON lines on stdin; see the methods named do_*."""

    def __init__(self, name: str, model: Path, threads: int) -> None:
        import harness

        self.harness = harness
        self.gate = harness.Gate(threads, spinning=name.startswith("zquant"))
        self.vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        os.sched_setaffinity(0, set(self.gate.cpus))  # pools made now inherit all our CPUs
        start = time.perf_counter()
        self.engine = ENGINES[name](model, threads)
        self.load_seconds = time.perf_counter() - start
        self.gate.pin(self.engine.example(self.vocabulary))
        if self.engine.caller_sleeps:
            self.gate.tids = pin_workers(self.gate.cpus, self.engine.example(self.vocabulary))
        self.gate.settle = max(self.gate.settle, self.engine.idle if threads > 1 and self.engine.idle < 0.05 else 0)

    def do_hello(self) -> dict[str, Any]:
        return {"load_seconds": self.load_seconds, "reachable": self.gate.check(), "peak": self.gate.peak}

    def full_cores(self) -> bool:
        """After a call: the engine's own workers may still spin, and would look like somebody else's."""
        time.sleep(self.engine.idle)
        return self.gate.check()

    def sampled(self, work: Callable[[], Any], seconds: float) -> dict[str, Any]:
        """One sample of work(). It has no value where the host ran the threads on fewer cores: "reachable" is False then. What
        passed the gate had them."""
        before = self.gate.check()
        sample = self.gate.measure(work, seconds=seconds)
        return {"seconds": sample.seconds, "kept": sample.kept, "faults": sample.faults, "gated": sample.gated,
                "reachable": sample.gated or (before and self.full_cores())}

    def do_case(self, batch: int, length: int, seconds: float) -> dict[str, Any]:
        ids, mask = random_batch(self.vocabulary, batch, length)
        return self.sampled(lambda: self.engine.run(ids, mask), seconds)

    def do_corpus(self, path: str, limit: int | None) -> dict[str, Any]:
        """Seconds for all batches, each timed until a slice is kept (three tries; the fastest where none is)."""
        total, kept, sentences = 0.0, 0, 0
        reachable = self.gate.check()
        batches = load_batches(Path(path))
        step = max(1, len(batches) // limit) if limit else 1
        batches = batches[::step]
        self.engine.run(*batches[0])
        for ids, mask in batches:
            tries = []
            for _ in range(3):
                before = self.gate.wait()
                lost_time = self.gate.lost_time()
                start = time.perf_counter()
                self.engine.run(ids, mask)
                tries.append(time.perf_counter() - start)
                if before and lost_time() <= self.harness.MAX_LOST * tries[-1] and self.gate.good():
                    kept += 1
                    tries = tries[-1:]
                    break
            total += min(tries)
            sentences += len(ids)
        gated = kept >= 0.8 * len(batches)
        return {"seconds": total, "sentences": sentences, "kept": kept, "batches": len(batches), "gated": gated,
                "reachable": gated or (reachable and self.full_cores())}

    def do_embed(self, path: str, count: int) -> dict[str, Any]:
        """Mean-pooled hidden states of the first `count` batches, normalized: to see that the engine computes."""
        rows = []
        for ids, mask in load_batches(Path(path))[:count]:
            mean = (self.engine.hidden(ids, mask) * mask[:, :, None]).sum(1)
            rows.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return {"rows": np.concatenate(rows).tolist()}

    def do_bandwidth(self) -> dict[str, Any]:
        return {"GB/s": self.gate.bandwidth()}

    def do_prefill(self, tokens: int, seconds: float) -> dict[str, Any]:
        """A prompt of so many tokens into an empty cache."""
        ids = random_batch(self.vocabulary, 1, tokens)[0][0]
        return {**self.sampled(lambda: self.engine.prefill(ids), seconds), "peak": self.gate.peak}

    def do_decode(self, context: int, seconds: float) -> dict[str, Any]:
        """One token after so many."""
        self.engine.prefill(random_batch(self.vocabulary, 1, context)[0][0])
        return {**self.sampled(lambda: self.engine.step(1), seconds), "weight_bytes": self.engine.weight_bytes,
                "cache_item": self.engine.cache_item}

    def do_logits(self, tokens: int) -> dict[str, Any]:
        return {"logits": self.engine.logits(random_batch(self.vocabulary, 1, tokens)[0][0]).tolist()}

    def do_share_of_step(self, context: int) -> dict[str, Any]:
        before = self.gate.check()
        share = self.engine.share_of_step(random_batch(self.vocabulary, 1, context)[0][0])
        return {"share": share, "reachable": before and self.full_cores()}

    def do_shares(self, cases: list[list[int]]) -> dict[str, Any]:
        """The parts of each case's time, and whether they are gated; None where the host did not give all cores."""
        found: list[tuple[dict[str, float], bool] | None] = []
        before = self.gate.check()
        for parts, gated in self.engine.shares((random_batch(self.vocabulary, b, t) for b, t in cases), self.gate):
            after = self.full_cores()
            found.append((parts, gated) if before and after else None)
            before = after
        return {"shares": found}


def serve(make: Callable[[], Any]) -> None:
    """Make a server and answer requests until stdin ends. Libraries that print go to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        server = make()
        reply: dict[str, Any] = server.do_hello()
    except Exception as error:  # noqa: BLE001  (reported to the parent, which leaves the engine out)
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), file=out, flush=True)
    for line in sys.stdin if "error" not in reply else ():
        request = json.loads(line)
        try:
            reply = getattr(server, "do_" + request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


# ---- the other end of it ------------------------------------------------------------------------------------
class Turn:
    """One engine's process: a script that serves, with its arguments."""

    def __init__(self, name: str, idle: float, threads: int, *command: str, **environment: str) -> None:
        self.name, self.idle = name, idle
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", **environment)
        noise = None if os.environ.get("ZQUANT_BENCH_VERBOSE") else subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise,
                                        text=True, env=env)
        # stderr is only read when the process dies; libraries that chat must not fill the pipe meanwhile
        if self.process.stderr:
            self.noise: list[str] = []
            stream = self.process.stderr
            threading.Thread(target=lambda: self.noise.extend(stream), daemon=True).start()
        self.hello = self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        return {"error": "the process ended: " + "".join(getattr(self, "noise", [])[-3:]).strip()}

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        if self.process.poll() is not None:
            return {"error": "the process ended"}
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        reply = self._read()
        time.sleep(self.idle)
        return reply

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(names: list[str], model: Path, threads: int) -> list[Turn]:
    """A process for each engine of models."""
    return started((Turn(n, ENGINES[n].idle, threads, __file__, n, str(model), str(threads)) for n in names), threads)


def started(turns: Iterable[Turn], threads: int) -> list[Turn]:
    """Those that came up; for each of the others a line says why it is left out."""
    up = []
    for turn in turns:
        if "error" in turn.hello:
            print(f"# {turn.name}: left out: {turn.hello['error'][:300]}")
            turn.close()
            continue
        time.sleep(turn.idle)
        up.append(turn)
    if any(not t.hello["reachable"] for t in up):
        print(f"# {threads}T: the host does not give {threads} full cores now; figures without them are n/a")
    return up


def engines_for(kind: str, with_peers: bool, wanted: str | None) -> list[str]:
    """The engines of a kind that can run here; the others' missing package is printed."""
    names = [n for n, e in ENGINES.items() if e.kind == kind and (with_peers or n.startswith("zquant"))]
    names = [n for n in names if not wanted or any(part in n for part in wanted.split(","))]
    for name in list(names):
        package = ENGINES[name].missing()
        if package:
            print(f"# {name}: left out, {package} is not installed")
            names.remove(name)
    return names


def keep(best: dict[tuple[str, str], dict[str, Any]], key: tuple[str, str], new: dict[str, Any], larger: bool) -> None:
    """Let ``new`` replace what was best so far: a value beats none, a gated one others, then the larger or smaller one wins."""
    def rank(entry: dict[str, Any]) -> tuple[bool, bool, float]:
        value = entry["value"]
        return value is not None, entry["gated"], 0.0 if value is None else value if larger else -value

    if key not in best or rank(new) > rank(best[key]):
        best[key] = new


PEAK_SCRIPT = """
import json, sys
from pathlib import Path
def peak():
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM'))
import zquant as zq, safetensors, zquant.models, zquant.quantize, peers
baseline = peak()
model = zq.quantize(zq.load(sys.argv[1]), peers.scheme_of(Path(sys.argv[1]), sys.argv[2]))
print(json.dumps(dict(baseline=baseline, peak=peak())))
"""


def quantizing_memory(model: Path, scheme: str) -> dict[str, int]:
    """Peak resident bytes of a process that loads and quantizes: after the imports (baseline) and in the end (peak)."""
    paths = [str(REPO), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    done = subprocess.run([sys.executable, "-c", PEAK_SCRIPT, str(model), scheme], env=env, check=True,
                          capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        serve(lambda: Server(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
