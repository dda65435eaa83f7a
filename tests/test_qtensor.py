"""QTensor and Linear: shapes, integer execution against plain NumPy, packing, pickling, errors."""
import doctest
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from zquant import linear as linear_module
from zquant import mapped as mapped_module
from zquant import qtensor as qtensor_module
from zquant.linear import MAX_K, Linear
from zquant.methods import RTN
from zquant.qtensor import QTensor
from zquant.spec import TOKEN_ASYMMETRIC, TOKEN_SYMMETRIC, QuantSpec

CHANNEL, GROUP4 = QuantSpec(8), QuantSpec(4, granularity="group", group_size=16)
SPECS = [CHANNEL, QuantSpec(4), GROUP4, QuantSpec(3, granularity="group", group_size=8),
         QuantSpec(8, granularity="group", group_size=16), QuantSpec(5, granularity="group", group_size=1000),
         QuantSpec(8, granularity="row_block", blocks=4), QuantSpec(8, granularity="tensor")]
ASYMMETRIC = [QuantSpec(8, symmetric=False), QuantSpec(4, granularity="group", group_size=16, symmetric=False)]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make(spec, n=12, k=40):
    return RTN().quantize(random(n, k), spec)


def fake_quantized(x, symmetric):
    """x after its trip through token codes: the conventions of zquant/ops/quantize.py in five lines."""
    if symmetric:
        amax = np.abs(x).max(1, keepdims=True)
        return np.rint(x * (np.float32(127) / amax)) * (amax / np.float32(127))
    lo, hi = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale, inverse = (hi - lo) / np.float32(255), np.float32(255) / (hi - lo)
    zero = np.rint(-lo * inverse)
    return (np.clip(np.rint(x * inverse) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize("module", [linear_module, mapped_module, qtensor_module])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("spec", SPECS + ASYMMETRIC, ids=str)
def test_dequantize_is_codes_minus_zeros_times_scales(spec):
    q = make(spec)
    columns = np.minimum(np.arange(40) // (spec.group_size or 40), q.scales.shape[1] - 1)
    zeros = 0 if q.zeros is None else q.zeros[:, columns].astype(np.float32)
    expected = (q.codes.astype(np.float32) - zeros) * q.scales[:, columns]
    assert q.dequantize().dtype == np.float32
    np.testing.assert_array_equal(q.dequantize(), expected)


def test_repr_and_sizes():
    q = RTN().quantize(random(3072, 768), QuantSpec(4, granularity="group", group_size=128))
    assert repr(q) == "QTensor(3072x768, int4, groups of 128, 1.20 MiB, was 9.00)"
    assert q.nbytes == 3072 * 768 // 2 + 3072 * 6 * 4
    assert q.bits_per_weight == 8 * q.nbytes / (3072 * 768)
    assert make(QuantSpec(8, granularity="row_block", blocks=4)).nbytes == 12 * 40 + 4 * 4
    assert make(QuantSpec(8, granularity="tensor")).nbytes == 12 * 40 + 4
    assert make(QuantSpec(3)).nbytes == 12 * 15 + 12 * 4
    assert make(ASYMMETRIC[1]).nbytes == 12 * 20 + 12 * 3 * 5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matmul_against_numpy(spec, symmetric):
    q, x = make(spec), random(7, 40, seed=1)
    y = q.matmul(x, activations=TOKEN_SYMMETRIC if symmetric else TOKEN_ASYMMETRIC)
    x_hat = fake_quantized(x, symmetric).astype(np.float64)
    w_hat = q.dequantize().astype(np.float64)
    # Integer sums are exact; what is left is a handful of float32 roundings per group of the epilogue.
    bound = 8 * np.finfo(np.float32).eps * (np.abs(x_hat) @ np.abs(w_hat).T + 1)
    assert (np.abs(y - x_hat @ w_hat.T) <= bound * q.scales.shape[1]).all()
    assert np.abs(y - x.astype(np.float64) @ w_hat.T).max() > bound.max()  # the comparison sees token quantization


@pytest.mark.parametrize("spec", SPECS[:3] + ASYMMETRIC, ids=str)
def test_matmul_weight_only(spec):
    q, x = make(spec), random(7, 40, seed=1)
    close = 1e-3 if spec.symmetric else 1e-5  # int16 codes of x, or float32
    np.testing.assert_allclose(q.matmul(x, activations=None), x @ q.dequantize().T, rtol=close, atol=close)


@pytest.mark.parametrize("spec", [*SPECS, *ASYMMETRIC], ids=str)
def test_weight_only_layers_keep_their_weights_small(spec):
    """Without activations: integer weights where the kernels take them, float32 where not; the values agree."""
    q, x = make(spec, 64, 256), random(7, 256, seed=1)
    layer, dense = Linear("l", q, random(64)), Linear("l", q.dequantize(), random(64))
    y, want = layer(x, "gelu"), dense(x, "gelu")
    assert np.abs(y - want).max() <= 1e-4 * np.abs(want).max()
    assert (layer.packed_bytes < 0.6 * dense.packed_bytes) == spec.symmetric
    codes, scale, zero = layer(x, quantize="asymmetric")
    assert codes.shape == (7, 64) and scale.shape == zero.shape == (7,)
    fused = Linear.fuse([layer, layer])(x)
    assert np.array_equal(fused, np.concatenate([layer(x), layer(x)], axis=1))


def test_weight_only_groups_of_odd_size_run_in_float32():
    q, x = make(QuantSpec(4, granularity="group", group_size=20)), random(7, 40, seed=1)
    layer = Linear("l", q)
    np.testing.assert_allclose(layer(x), x @ q.dequantize().T, rtol=1e-5, atol=1e-5)
    assert layer.packed_bytes >= 12 * 40 * 4


def test_matmul_shapes_bias_activation():
    q, x, bias = make(CHANNEL), random(2, 3, 40), random(12)
    y = q.matmul(x, bias=bias, activation="relu")
    assert y.shape == (2, 3, 12) and y.dtype == np.float32
    np.testing.assert_array_equal(y, Linear("l", q, bias, TOKEN_ASYMMETRIC)(x.reshape(6, 40), "relu").reshape(2, 3, 12))
    np.testing.assert_array_equal(q.matmul(x[0, 0]), q.matmul(x)[0, 0])
    with pytest.raises(ValueError, match="40 columns"):
        q.matmul(random(3, 41))
    with pytest.raises(ValueError, match="activation 'tanh'"):
        q.matmul(x, activation="tanh")
    with pytest.raises(ValueError, match="asymmetric weights"):
        make(ASYMMETRIC[0]).matmul(x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_matmul_names_the_bad_row(value):
    x = random(5, 40)
    x[3, 7] = value
    with pytest.raises(ValueError, match="x.*row 3"):
        make(CHANNEL).matmul(x)


@pytest.mark.parametrize("change, words", [
    (dict(codes=np.zeros((12, 40), np.uint8)), "codes"),
    (dict(codes=np.zeros(40, np.int8)), "codes"),
    (dict(scales=np.ones((12, 2), np.float32)), r"scales.*\(12, 3\)"),
    (dict(scales=np.ones((12, 3))), "scales must be float32"),
    (dict(zeros=np.zeros((12, 3), np.int32)), "zero points"),
])
def test_bad_qtensors(change, words):
    good = make(GROUP4)
    fields = dict(codes=good.codes, scales=good.scales, zeros=None, spec=GROUP4)
    with pytest.raises(ValueError, match=words):
        QTensor(**{**fields, **change})


def test_arrays_are_read_only_and_the_givers_are_not():
    codes = np.zeros((2, 3), np.int8)
    q = QTensor(codes, np.ones((2, 1), np.float32), None, CHANNEL)
    with pytest.raises(ValueError):
        q.codes[0, 0] = 1
    codes[0, 0] = 1
    with pytest.raises(AttributeError):
        q.codes = codes


@pytest.mark.parametrize("spec", SPECS + ASYMMETRIC, ids=str)
def test_pickle(spec):
    q, x = make(spec), random(3, 40)
    activations = TOKEN_ASYMMETRIC if spec.symmetric else None
    layer = Linear("l", q, random(12), activations)
    y = layer(x)
    q.matmul(x, activations=activations)
    again, copy = pickle.loads(pickle.dumps(q)), pickle.loads(pickle.dumps(layer))
    assert again.spec == spec and not again.codes.flags.writeable
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    np.testing.assert_array_equal(copy(x), y)
    assert copy.name == "l" and copy.activations == activations


def test_rows_of_an_embedding_table():
    q = make(CHANNEL)
    index = np.array([[3, 3], [0, 11]])
    np.testing.assert_array_equal(q.rows(index), q.dequantize()[index])
    with pytest.raises(ValueError, match="one symmetric scale per row"):
        make(GROUP4).rows(index)


# ---- Linear ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight, bias, activations, words", [
    (np.ones(3, np.float32), None, None, "2-D"),
    (np.ones((2, 3)), None, None, "float64"),
    (np.ones((2, 3), np.float32), np.ones(3, np.float32), None, r"bias must have shape \(2,\)"),
    (make(QuantSpec(4, granularity="group", group_size=12)), None, TOKEN_ASYMMETRIC, "group size 12"),
    (make(ASYMMETRIC[0]), None, TOKEN_ASYMMETRIC, "asymmetric"),
    (make(CHANNEL), None, QuantSpec(4, granularity="token", dynamic=True), "8 bits per token"),
])
def test_linear_errors_name_the_layer(weight, bias, activations, words):
    with pytest.raises(ValueError, match=words) as error:
        Linear("encoder.layer.7.fc", weight, bias, activations)
    assert str(error.value).startswith("encoder.layer.7.fc: ")


def test_linear_refuses_more_inputs_than_int32_holds():
    wide = QTensor(np.zeros((1, MAX_K + 1), np.int8), np.ones((1, 1), np.float32), None, CHANNEL)
    with pytest.raises(ValueError, match="fc: 66001 input features"):
        Linear("fc", wide, None, TOKEN_ASYMMETRIC)
    Linear("fc", wide)  # float32 has no such bound


def test_nan_weights_name_the_layer():
    w = np.ones((4, 5), np.float32)
    w[2, 1] = np.nan
    with pytest.raises(ValueError, match="fc: .*row 2"):
        Linear("fc", w)(np.ones((1, 5), np.float32))


def test_float_linear_takes_codes_too():
    x, layer = random(5, 40), Linear("fc", random(12, 40))
    codes = Linear("id", RTN().quantize(np.eye(40, dtype=np.float32), CHANNEL), None, TOKEN_SYMMETRIC)(x, quantize="asymmetric")
    assert isinstance(codes, tuple) and layer.quant is None
    q, scale, zero = codes
    np.testing.assert_array_equal(layer(codes),
                                  layer((q.astype(np.float32) - zero[:, None].astype(np.float32)) * scale[:, None]))


def test_codes_of_minus_128_run_in_float32_on_the_same_values():
    codes = np.random.default_rng(0).integers(-128, 128, (12, 40)).astype(np.int8)
    codes[3, 5] = -128
    q = QTensor(codes, np.full((12, 1), 0.01, np.float32), None, CHANNEL)
    x = random(7, 40)
    for activations in (TOKEN_SYMMETRIC, TOKEN_ASYMMETRIC):
        layer = Linear("foreign", q, None, activations)
        expected = fake_quantized(x, activations.symmetric) @ q.dequantize().T
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
        assert layer(x, quantize=layer.quant)[0].dtype == np.uint8


@pytest.mark.parametrize("spec", [None, CHANNEL, GROUP4, QuantSpec(8, granularity="row_block", blocks=4), ASYMMETRIC[1]],
                         ids=str)
def test_fuse_is_the_outputs_side_by_side(spec):
    layers = []
    for i, name in enumerate("qkv"):
        w = random(12, 40, seed=i)
        layers.append(Linear(name, w if spec is None else RTN().quantize(w, spec), random(12, seed=9) if i else None,
                             TOKEN_ASYMMETRIC if spec is not None and spec.symmetric else None))
    x, fused = random(5, 40), Linear.fuse(layers)
    assert fused.name == "q+k+v" and fused.shape == (36, 40)
    np.testing.assert_array_equal(fused(x), np.concatenate([layer(x) for layer in layers], axis=1))


def test_fuse_refuses_unlike_layers():
    with pytest.raises(ValueError, match="q\\+k: .*cannot be fused"):
        Linear.fuse([Linear("q", make(CHANNEL), None, TOKEN_ASYMMETRIC), Linear("k", make(GROUP4), None, TOKEN_ASYMMETRIC)])


def test_first_call_from_many_threads_packs_once(monkeypatch):
    layer, x, packs = Linear("l", make(CHANNEL, 256, 512), None, TOKEN_ASYMMETRIC), random(4, 512), []
    pack = layer._pack
    monkeypatch.setattr(layer, "_pack", lambda: packs.append(1) or pack())
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: layer(x), range(8)))
    assert len(packs) == 1
    assert all(np.array_equal(results[0], y) for y in results)


def test_with_weight_keeps_bias_and_shape():
    layer = Linear("l", random(12, 40), random(12))
    q = layer.with_weight(make(CHANNEL), TOKEN_ASYMMETRIC)
    assert q.bias is layer.bias and q.quant == "asymmetric" and layer.quant is None
    assert q.nbytes < layer.nbytes and q.packed_bytes > 0
    with pytest.raises(ValueError, match="l: weight must have shape"):
        layer.with_weight(make(CHANNEL, 12, 41))
