"""ONNX's own node tests for its quantization operators: what maps to a function of zquant is equal bit for bit."""
from __future__ import annotations

import numpy as np
import onnx_reader
import pytest
from conftest import SHARED

from zquant import _core, ops, reference

ROOT = SHARED / "data" / "onnx-node-tests"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="shared/data/onnx-node-tests is not beside the repository")

QUANTIZE = [
    "test_quantizelinear", "test_quantizelinear_axis", "test_quantizelinear_blocked_asymmetric",
    "test_quantizelinear_blocked_symmetric", "test_quantizelinear_int16", "test_quantizelinear_int2",
    "test_quantizelinear_int4", "test_quantizelinear_uint16", "test_quantizelinear_uint2", "test_quantizelinear_uint4",
]
DEQUANTIZE = [
    "test_dequantizelinear", "test_dequantizelinear_axis", "test_dequantizelinear_blocked", "test_dequantizelinear_int16",
    "test_dequantizelinear_int2", "test_dequantizelinear_int4", "test_dequantizelinear_uint16",
    "test_dequantizelinear_uint2", "test_dequantizelinear_uint4",
]
DYNAMIC = [
    f"test_dynamicquantizelinear{kind}{expanded}"
    for kind in ("", "_max_adjusted", "_min_adjusted")
    for expanded in ("", "_expanded")
]
MATMUL = ["test_matmulinteger"]
QLINEAR_MATMUL = [
    f"test_qlinearmatmul_{dims}_{codes}_{scales}"
    for dims in ("2D", "3D")
    for codes in ("int8", "uint8")
    for scales in ("float16", "float32")
]
# Integers of less than a byte to float: unpack and dequantize with scale 1. From float: Cast wraps modulo 2^bits where
# quantizers saturate, so only its second half maps, integers in bytes to a stream of their low bits.
NARROW = ("INT2", "INT4", "UINT2", "UINT4")
CAST_FROM_NARROW = [f"test_cast_{t}_to_{to}" for t in NARROW
                    for to in ("FLOAT", "FLOAT16", t.replace("2", "8").replace("4", "8"))]
CAST_TO_NARROW = [f"test_cast_{of}_to_{t}" for t in NARROW for of in ("FLOAT", "FLOAT16")]
RUN = QUANTIZE + DEQUANTIZE + DYNAMIC + MATMUL + QLINEAR_MATMUL + CAST_FROM_NARROW + CAST_TO_NARROW

FP8 = "the FP8 formats (E4M3, E5M2, their FNUZ variants) are not among this release's code types"
FP4 = "FP4 (E2M1) is not among this release's code types"
E8M0 = "E8M0 scales (MX formats) are not part of this release"
BF16 = "bfloat16 is read from checkpoints, not an operator's type; the checkpoint reader's tests cover it"
CONV = "zquant has no convolutions"
FLOAT8 = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
NOT_RUN = {
    **{f"test_cast_{of}_to_{t}": FP8 for t in FLOAT8 for of in ("FLOAT", "FLOAT16")},
    **{f"test_cast_no_saturate_{of}_to_{t}": FP8 for t in FLOAT8 for of in ("FLOAT", "FLOAT16")},
    **{f"test_cast_{t}_to_{to}": FP8 for t in FLOAT8 for to in ("FLOAT", "FLOAT16")},
    **{f"test_cast_{of}_to_FLOAT4E2M1": FP4 for of in ("FLOAT", "FLOAT16")},
    **{f"test_cast_FLOAT4E2M1_to_{to}": FP4 for to in ("FLOAT", "FLOAT16")},
    **{f"test_cast_e8m0_{of}_to_FLOAT8E8M0": E8M0 for of in ("FLOAT", "FLOAT16")},
    **{f"test_cast_e8m0_FLOAT8E8M0_to_{to}": E8M0 for to in ("FLOAT", "FLOAT16")},
    "test_cast_BFLOAT16_to_FLOAT": BF16,
    "test_cast_FLOAT_to_BFLOAT16": BF16,
    "test_convinteger_with_padding": CONV,
    "test_convinteger_without_padding": CONV,
    "test_qlinearconv": CONV,
    "test_dequantizelinear_e4m3fn": FP8,
    "test_dequantizelinear_e4m3fn_float16": FP8,
    "test_dequantizelinear_e4m3fn_zero_point": FP8,
    "test_dequantizelinear_e5m2": FP8,
    "test_dequantizelinear_float4e2m1": FP4,
    "test_quantizelinear_e4m3fn": FP8,
    "test_quantizelinear_e5m2": FP8,
    "test_quantizelinear_float4e2m1": FP4,
}


def test_every_directory_is_run_or_has_its_reason():
    found = sorted(p.name for p in ROOT.iterdir() if p.is_dir())
    assert len(found) == 99
    assert sorted(RUN + list(NOT_RUN)) == found


def bits_of(dtype: str) -> int:
    return int(dtype.lstrip("uint"))


def codes(t: onnx_reader.Tensor) -> np.ndarray:
    """A tensor of integers, unpacked to whole bytes."""
    if t.dtype.lstrip("u") not in ("int2", "int4"):
        return t.data
    count = int(np.prod(t.shape, dtype=int))
    return ops.unpack(t.data, bits_of(t.dtype), count, t.dtype[0] == "i").reshape(t.shape)


def load(name: str):
    folder = ROOT / name / "test_data_set_0"
    node = onnx_reader.nodes(ROOT / name / "model.onnx")[0]
    return node, onnx_reader.tensors(folder, "input"), onnx_reader.tensors(folder, "output")


def equal(got, tensor: onnx_reader.Tensor) -> None:
    """The same type, shape and bytes; codes of less than a byte are compared packed, as the file has them."""
    got = np.asarray(got)
    assert got.shape == tensor.shape
    if tensor.dtype.lstrip("u") in ("int2", "int4"):
        got = ops.pack(got.reshape(-1), bits_of(tensor.dtype))
    assert got.dtype == tensor.data.dtype
    assert got.tobytes() == tensor.data.tobytes()


def layout(node, scale: np.ndarray) -> dict:
    """axis and block_size of a QuantizeLinear or DequantizeLinear; ONNX ignores the axis of a single scale."""
    return {} if scale.size == 1 else {
        "axis": node.attributes.get("axis", 1), "block_size": node.attributes.get("block_size", 0)}


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("functions", [ops, reference], ids=["ops", "reference"])
def test_quantize_linear(isa, name, functions):
    node, (x, scale, *zero), (want,) = load(name)
    assert node.op == "QuantizeLinear"
    zero_point = codes(zero[0]) if zero else None
    equal(functions.quantize_linear(x.data, scale.data, zero_point, want.dtype, **layout(node, scale.data)), want)


@pytest.mark.parametrize("name", DEQUANTIZE)
@pytest.mark.parametrize("functions", [ops, reference], ids=["ops", "reference"])
def test_dequantize_linear(isa, name, functions):
    node, (q, scale, *zero), (want,) = load(name)
    assert node.op == "DequantizeLinear"
    zero_point = codes(zero[0]) if zero else None
    equal(functions.dequantize_linear(codes(q), scale.data, zero_point, **layout(node, scale.data)), want)


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("functions", [ops, reference], ids=["ops", "reference"])
def test_dynamic_quantize_linear(isa, name, functions):
    _, (x,), outputs = load(name)
    for got, want in zip(functions.dynamic_quantize_linear(x.data), outputs, strict=True):
        equal(got, want)


@pytest.mark.parametrize("name", MATMUL)
@pytest.mark.parametrize("functions", [ops, reference], ids=["ops", "reference"])
def test_matmul_integer(isa, name, functions):
    _, inputs, (want,) = load(name)
    equal(functions.matmul_integer(*(t.data for t in inputs)), want)


@pytest.mark.parametrize("name", QLINEAR_MATMUL)
@pytest.mark.parametrize("functions", [ops, reference], ids=["ops", "reference"])
def test_qlinear_matmul(isa, name, functions):
    _, inputs, (want,) = load(name)
    equal(functions.qlinear_matmul(*(t.data for t in inputs)), want)


@pytest.mark.parametrize("name", CAST_FROM_NARROW)
def test_cast_from_narrow_integers(isa, name):
    _, (q,), (want,) = load(name)
    got = codes(q)
    if want.dtype == "float16":  # the codes are small integers: exact in float16 too
        got = ops.dequantize_linear(got, 1.0).astype(np.float16)
    elif want.dtype == "float32":
        got = ops.dequantize_linear(got, 1.0)
    equal(got, want)


@pytest.mark.parametrize("name", CAST_TO_NARROW)
def test_cast_to_narrow_integers(isa, name):
    _, (x,), (want,) = load(name)
    integers = x.data.astype(np.int8).reshape(-1)
    assert np.array_equal(integers, x.data.reshape(-1)), "the inputs are integers: nothing is truncated here"
    for pack in (_core.pack_bits, reference.pack):
        assert pack(integers, bits_of(want.dtype)).tobytes() == want.data.tobytes()


def test_the_comparison_sees_one_wrong_bit():
    _, (x, scale, zero), (want,) = load("test_quantizelinear")
    got = ops.quantize_linear(x.data, scale.data, zero.data, want.dtype)
    got[-1] ^= 1
    with pytest.raises(AssertionError):
        equal(got, want)
