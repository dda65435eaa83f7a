"""Single linear layers in other engines, for bench_peers.py: each engine in a process of its own, as in peers.py.

A job says what goes in and comes out: "int8" takes 8-bit codes and gives float32 (onnxruntime's MatMulInteger: int32, without
scales), "int8 gelu" does that with GELU (erf) in the same call; all others take float32 and give float32. "int8 dynamic"
quantizes its input while it is timed (openvino: with a range known beforehand), "w4 gN" has 4-bit weights with a scale per
group of N, "w4 q4_k" is ggml's type of that name, "f32" is plain.
"""
from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import sys
import weakref
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import harness
import linears
import numpy as np
import peers

JOBS = ("int8", "int8 gelu", "int8 dynamic", "f32", "w4 g128", "w4 g64", "w4 g32", "w4 q4_k")
CODES_BYTES = {"f32": 4.0, "int8": 1.0, "int8 gelu": 1.0, "int8 dynamic": 1.0}  # of a weight; else half a byte


def quantize_weights(w: np.ndarray, largest: int, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes, and float32 scales of each row or of each group of a row."""
    n, k = w.shape
    blocks = w.reshape(n, -1, group or k)
    scale = (np.abs(blocks).max(2, keepdims=True) / largest).astype(np.float32)
    codes = np.rint(blocks / scale).astype(np.int8).reshape(n, k)
    return codes, scale[:, :, 0] if group else scale[:, 0, 0]


def quantize_input(x: np.ndarray) -> tuple[np.ndarray, float]:
    """uint8 codes around 128 with one scale."""
    scale = float(np.abs(x).max()) / 127
    return (np.rint(x / scale) + 128).astype(np.uint8), scale


def group_of(job: str) -> int:
    return int(job.rpartition("g")[2])


class Kernels(peers.Engine):
    """``prepare(job, x, w)`` returns the call to time, which computes x w^T."""

    kind = "kernel"
    jobs: ClassVar[tuple[str, ...]]
    pool_per_model: ClassVar[bool] = False  # else one pool that lasts, pinned at the start
    blocks: ClassVar[dict[str, int]] = {}  # what k must be a multiple of, of a job, where that is more than its group
    distribution: ClassVar[str] = ""  # where it is not the first module's name

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.made: dict[Any, Any] = {}  # of this case's weights; copies share it

    @classmethod
    def takes(cls, job: str, k: int) -> bool:
        """Whether the job is one of this engine's, and for so many input features."""
        return job in cls.jobs and k % cls.blocks.get(job, group_of(job) if " g" in job and job[0] == "w" else 1) == 0

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def codes(self, w: np.ndarray, largest: int, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """quantize_weights() of this case's weights."""
        return self.once((largest, group), lambda: quantize_weights(w, largest, group))

    def prepare(self, job: str, x: np.ndarray, w: np.ndarray) -> Callable[[], Any]:
        raise TypeError("abstract")

    def version(self) -> str:
        return version(self.distribution or self.modules[0])


# ---- ours -----------------------------------------------------------------------------------------------
@peers.register
class ZQuantKernels(Kernels):
    name = "zquant-kernel"
    modules = ("numpy",)
    jobs = JOBS[:-1]

    def __init__(self, threads: int) -> None:
        from zquant import _core

        super().__init__(threads)
        self.core = _core
        _core.set_threads(threads)

    def version(self) -> str:
        import zquant

        return f"{zquant.__version__} {self.core.level()}"

    def prepare(self, job: str, x: np.ndarray, w: np.ndarray) -> Callable[[], Any]:
        codes_in = job in ("int8", "int8 gelu")
        core, quant = self.core, 0 if job == "f32" or codes_in else linears.TOKEN_ASYM
        if job == "f32":
            handle = core.linear_pack_f32(w, None)
        elif job.startswith("int8"):
            handle = core.linear_pack_s8(*self.codes(w, 127), None)
        else:
            codes, scales = self.codes(w, 7, group_of(job))
            handle = core.linear_pack_group(codes, scales, group_of(job), 4, None)
        rows: Any = core.quantize_tokens(x, linears.TOKEN_ASYM, True) if codes_in else x
        activation = linears.GELU if job == "int8 gelu" else 0
        return lambda: core.linear_forward(handle, rows, quant, activation, None, 0)


# ---- PyTorch: FBGEMM, oneDNN, and what it chooses by itself -------------------------------------------------
class TorchKernels(Kernels):
    modules = ("torch",)
    idle = 0.01
    engine: ClassVar[str]

    def __init__(self, threads: int) -> None:
        import torch

        super().__init__(threads)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        torch.backends.quantized.engine = self.engine
        self.torch = torch

    def prepare(self, job: str, x: np.ndarray, w: np.ndarray) -> Callable[[], Any]:
        torch = self.torch
        if job == "f32":
            rows, weight = torch.from_numpy(x), torch.from_numpy(w.copy())
            return lambda: torch.nn.functional.linear(rows, weight)
        codes, scale = self.codes(w, 127)
        scales, zeros = torch.from_numpy(scale), torch.zeros(len(scale), dtype=torch.int64)
        if job in ("int8", "int8 gelu"):
            q, x_scale = quantize_input(x)
            after = ("none", [], "") if job == "int8" else ("gelu", [], "none")  # "none": not the approximation by tanh
            rows, packed = torch.from_numpy(q), torch.ops.onednn.qlinear_prepack(torch.from_numpy(codes), list(q.shape))
            return lambda: torch.ops.onednn.qlinear_pointwise(rows, x_scale, 128, packed, scales, zeros, None, 1.0, 0,
                                                              torch.float32, *after)
        weight = torch.quantize_per_channel(torch.from_numpy(w), scales.double(), zeros, 0, torch.qint8)
        packed, rows = torch.ops.quantized.linear_prepack(weight, None), torch.from_numpy(x)
        return lambda: torch.ops.quantized.linear_dynamic(rows, packed)


for _name, _engine, _jobs in (("torch fbgemm", "fbgemm", ("int8 dynamic", "f32")),
                              ("torch onednn", "onednn", ("int8", "int8 gelu", "int8 dynamic"))):
    peers.register(type(_name.replace(" ", "_"), (TorchKernels,), {"name": _name, "engine": _engine, "jobs": _jobs}))


# ---- ONNX Runtime -----------------------------------------------------------------------------------------
@peers.register
class OrtKernels(Kernels):
    """MatMul, MatMulInteger, DynamicQuantizeMatMul, and MatMulNBits that may compute in int8 (accuracy level 4)."""

    name = "onnxruntime op"
    pool_per_model = True
    modules = ("onnxruntime", "onnx")
    jobs = ("int8", "int8 dynamic", "f32", "w4 g128", "w4 g64", "w4 g32")
    idle = 0.01

    def prepare(self, job: str, x: np.ndarray, w: np.ndarray) -> Callable[[], Any]:
        n, k = w.shape
        if job == "f32":
            return self.session("MatMul", x, {"B": np.ascontiguousarray(w.T)})
        if job.startswith("int8"):
            codes, scale = self.codes(w, 127)
            codes = np.ascontiguousarray(codes.T)
            if job == "int8":
                return self.session("MatMulInteger", quantize_input(x)[0], {"B": codes, "zero": np.uint8(128)}, out="INT32")
            return self.session("DynamicQuantizeMatMul", x, {"B": codes, "scale": scale}, domain="com.microsoft")
        group = group_of(job)
        codes, scales = self.codes(w, 7, group)
        nibbles = (codes + 8).astype(np.uint8).reshape(n, k // group, group // 2, 2)
        packed = nibbles[..., 0] | nibbles[..., 1] << 4
        return self.session("MatMulNBits", x, {"B": packed, "scales": scales.reshape(-1)}, domain="com.microsoft",
                            K=k, N=n, bits=4, block_size=group, accuracy_level=4)

    def session(self, op: str, x: np.ndarray, constants: dict[str, Any], domain: str = "", out: str = "FLOAT",
                **attributes: int) -> Callable[[], Any]:
        """A model of one node whose first input is x."""
        import onnx
        import onnxruntime as ort

        of = onnx.helper
        kind = of.np_dtype_to_tensor_dtype(x.dtype)
        graph = of.make_graph(
            [of.make_node(op, ["A", *constants], ["Y"], domain=domain, **attributes)], "one",
            [of.make_tensor_value_info("A", kind, x.shape)],
            [of.make_tensor_value_info("Y", getattr(onnx.TensorProto, out), None)],
            [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()])
        model = of.make_model(graph, opset_imports=[of.make_opsetid("", 17), of.make_opsetid("com.microsoft", 1)], ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"A": x})[0]


# ---- OpenVINO ---------------------------------------------------------------------------------------------
@peers.register
class OpenVinoKernels(Kernels):
    """MatMul; with FakeQuantize before it and int8 weights (oneDNN's int8); with compressed weights and dynamic activations."""

    name = "openvino op"
    pool_per_model = True
    modules = ("openvino",)
    jobs = ("int8 dynamic", "f32", "w4 g128", "w4 g64", "w4 g32")
    idle = 0.01

    def prepare(self, job: str, x: np.ndarray, w: np.ndarray) -> Callable[[], Any]:
        import openvino as ov
        from openvino import opset13 as op

        n, k = w.shape
        given = op.parameter(list(x.shape), np.float32)
        rows: Any = given
        config: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        if job == "f32":
            weight: Any = op.constant(w)
        elif job == "int8 dynamic":
            codes, scale = self.codes(w, 127)
            weight = op.multiply(op.convert(op.constant(codes), "f32"), op.constant(scale[:, None]))
            top = np.float32(np.abs(x).max())
            low, high = op.constant(np.float32(-top * 128 / 127)), op.constant(top)
            rows = op.fake_quantize(given, low, high, low, high, 256)
        else:
            group = group_of(job)
            codes, scales = self.codes(w, 7, group)
            nibbles = (codes + 8).astype(np.uint8).reshape(-1, 2)
            packed = ov.Tensor(nibbles[:, 0] | nibbles[:, 1] << 4, ov.Shape([n, k // group, group]), ov.Type.u4)
            centred = op.subtract(op.convert(ov.op.Constant(packed), "f32"), op.constant(np.float32(8)))
            weight = op.reshape(op.multiply(centred, op.constant(scales[:, :, None])), op.constant(np.int64([n, k])), False)
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(group)
        model = ov.Model([op.matmul(rows, weight, False, True)], [given])
        request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
        return lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)[0]


# ---- ggml ---------------------------------------------------------------------------------------------------
class _InitParams(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@peers.register
class GgmlKernels(Kernels):
    """A graph of one ggml_mul_mat in llama-cpp-python's libraries, weights in the repacked buffer type where ggml has one."""

    name = "ggml op"
    modules = ("llama_cpp",)
    distribution = "llama_cpp_python"
    jobs = ("int8 dynamic", "f32", "w4 g32", "w4 q4_k")
    idle = 0.02
    blocks: ClassVar[dict[str, int]] = {"int8 dynamic": 32, "w4 g32": 32, "w4 q4_k": 256}
    types: ClassVar[dict[str, int]] = {"f32": 0, "w4 g32": 2, "int8 dynamic": 8, "w4 q4_k": 12}  # enum ggml_type

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import importlib.util

        folder = Path(str(importlib.util.find_spec("llama_cpp").origin)).parent / "lib"
        self.base, self.cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
        self.backend = ctypes.c_void_p(self.call(self.cpu, "ggml_backend_cpu_init"))
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        registry = self.pointer(self.cpu, "ggml_backend_cpu_reg")
        self.device = self.pointer(self.base, "ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0))
        self.plain = self.pointer(self.base, "ggml_backend_cpu_buffer_type")
        self.repacked = self.find_repacked(registry)

    @staticmethod
    def call(library: ctypes.CDLL, name: str, *args: Any, result: Any = ctypes.c_void_p) -> Any:
        function = getattr(library, name)
        function.restype = result
        return function(*args)

    def pointer(self, library: ctypes.CDLL, name: str, *args: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.call(library, name, *args))

    def find_repacked(self, registry: ctypes.c_void_p) -> ctypes.c_void_p | None:
        """The buffer type that interleaves rows of the weights, among the CPU's extra ones."""
        found = self.call(self.base, "ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        if not found:
            return None
        types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)(self.device)
        every = itertools.takewhile(bool, (types[i] for i in itertools.count())) if types else ()
        named = {self.call(self.base, "ggml_backend_buft_name", ctypes.c_void_p(t), result=ctypes.c_char_p): t for t in every}
        return ctypes.c_void_p(named[b"CPU_REPACK"]) if b"CPU_REPACK" in named else None

    def tensor(self, kind: int, shape: tuple[int, int], buffer_type: ctypes.c_void_p) -> tuple[Any, Any, Any]:
        """A (rows, columns) tensor in a buffer of its own: itself, its context, its buffer."""
        context = self.pointer(self.base, "ggml_init", _InitParams(1 << 16, None, True))
        made = self.pointer(self.base, "ggml_new_tensor_2d", context, kind, ctypes.c_int64(shape[1]), ctypes.c_int64(shape[0]))
        buffer = self.pointer(self.base, "ggml_backend_alloc_ctx_tensors_from_buft", context, buffer_type)
        if not buffer:
            raise RuntimeError("ggml gives no buffer")
        return made, context, buffer

    def prepare(self, job: str, x: np.ndarray, w: np.ndarray) -> Callable[[], Any]:
        kind, n = self.types[job], len(w)
        stored = self.once(kind, lambda: self.quantized(kind, w)) if kind else w
        rows = self.tensor(0, x.shape, self.plain)
        self.set(rows[0], x)
        for buffer_type in (self.repacked, self.plain):
            if buffer_type is None:
                continue
            weight = self.tensor(kind, w.shape, buffer_type)
            product = self.product(weight[0], rows[0])
            if self.call(self.base, "ggml_backend_dev_supports_op", self.device, product[0], result=ctypes.c_bool):
                break
            self.free([weight, product])
        self.set(weight[0], stored)
        graph = self.pointer(self.base, "ggml_new_graph", product[1])
        self.base.ggml_build_forward_expand(graph, product[0])
        y = np.empty((len(x), n), np.float32)

        def run() -> np.ndarray:
            if self.base.ggml_backend_graph_compute(self.backend, graph) != 0:
                raise RuntimeError("ggml_backend_graph_compute failed")
            return y

        def result() -> np.ndarray:
            run()
            self.call(self.base, "ggml_backend_tensor_get", product[0], y.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0),
                      ctypes.c_size_t(y.nbytes), result=None)
            return y

        run.result = result
        weakref.finalize(run, self.free, [weight, rows, product])
        return run

    def quantized(self, kind: int, w: np.ndarray) -> np.ndarray:
        n, k = w.shape
        stored = np.empty(n * self.call(self.base, "ggml_row_size", kind, ctypes.c_int64(k), result=ctypes.c_size_t), np.uint8)
        self.call(self.base, "ggml_quantize_chunk", kind, *(a.ctypes.data_as(ctypes.c_void_p) for a in (w, stored)),
                  ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k), None, result=ctypes.c_size_t)
        return stored

    def product(self, weight: ctypes.c_void_p, rows: ctypes.c_void_p) -> tuple[Any, Any, Any]:
        context = self.pointer(self.base, "ggml_init", _InitParams(1 << 20, None, True))
        made = self.pointer(self.base, "ggml_mul_mat", context, weight, rows)
        return made, context, self.pointer(self.base, "ggml_backend_alloc_ctx_tensors_from_buft", context, self.plain)

    def set(self, tensor: ctypes.c_void_p, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        self.call(self.base, "ggml_backend_tensor_set", tensor, values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0),
                  ctypes.c_size_t(values.nbytes), result=None)

    def free(self, made: list[tuple[Any, Any, Any]]) -> None:
        for _, context, buffer in made:
            self.call(self.base, "ggml_backend_buffer_free", buffer, result=None)
            self.call(self.base, "ggml_free", context, result=None)


# ---- the serving process ------------------------------------------------------------------------------------
class KernelServer:
    """Times one case after the other; keeps only the last one's weights."""

    def __init__(self, name: str, threads: int) -> None:
        self.gate = harness.Gate(threads, spinning=name.startswith("zquant"))
        os.sched_setaffinity(0, set(self.gate.cpus))  # pools inherit it, and OpenMP counts it: it spins only with a CPU each
        self.engine: Kernels = peers.ENGINES[name](threads)
        if threads > 1:
            self.gate.settle = max(self.gate.settle, self.engine.idle)
            x, w = linears.random_floats((512, 768), 1), linears.random_floats((768, 768), 2)
            self.gate.pin(self.engine.prepare(self.engine.jobs[0], x, w))
            self.engine.made.clear()
        self.last: tuple[Any, ...] = ()

    def do_hello(self) -> dict[str, Any]:
        return {"reachable": self.gate.check(), "peak": self.gate.peak, "version": self.engine.version()}

    def do_case(self, job: str, m: int, n: int, k: int, rotate: int, seconds: float) -> dict[str, Any]:
        """Seconds, peak and cosine; without a time while the host does not give every thread a core (what passed the gate had
        them)."""
        if self.last[:1] != ((job, m, n, k, rotate),):
            self.last = ()
            self.engine.made.clear()
            self.last = ((job, m, n, k, rotate), *self.prepare(job, m, n, k, rotate))
        _, work, cosine = self.last
        before = self.gate.check()
        sample = self.gate.measure(work, seconds=seconds)
        if not sample.gated and not (before and self.gate.check()):
            return {"unreached": True, "cosine": cosine}
        return {"seconds": sample.seconds, "gated": sample.gated, "cosine": cosine,
                "peak": self.gate.limit("float" if job == "f32" else "int8", sample.speed)}

    def prepare(self, job: str, m: int, n: int, k: int, rotate: int) -> tuple[Callable[[], Any], float]:
        """The call (over copies of the weights) and the cosine of its result to the exact product of the first rows."""
        x, w = linears.random_floats((m, k), 1), linears.random_floats((n, k), 2)
        new_pool = self.gate.threads > 1 and self.engine.pool_per_model
        if new_pool:  # it inherits the caller's affinity
            os.sched_setaffinity(0, set(self.gate.cpus))
        copies = max(1, -(-rotate // int(n * k * CODES_BYTES.get(job, 0.5))))
        calls = [self.engine.prepare(job, x, w) for _ in range(copies)]
        y = np.asarray(getattr(calls[0], "result", calls[0])(), np.float64)[:8].ravel()
        exact = (x[:8].astype(np.float64) @ w.T.astype(np.float64)).ravel()
        if job == "int8 gelu":
            exact = exact * 0.5 * (1 + np.vectorize(math.erf)(exact / math.sqrt(2)))
        turn = itertools.cycle(calls)
        work = calls[0] if copies == 1 else lambda: next(turn)()
        if new_pool:
            self.gate.pin(work, 0.1)
        return work, float(y @ exact / np.linalg.norm(y) / np.linalg.norm(exact))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        peers.serve(lambda: KernelServer(sys.argv[1], int(sys.argv[2])))
