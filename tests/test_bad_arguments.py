"""Arguments of the wrong kind or out of range: errors that name the argument, what was expected and what came."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_lm import LM
from fakes import Encoder, Model

import zquant as zq
from zquant import ops
from zquant.qtensor import QTensor
from zquant.spec import QuantSpec

TINY = Path(__file__).parent / "data" / "tiny-llama-5m"


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("tokenizers")
    return zq.load(TINY)


# ---- texts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["The cat sat on the mat and " * 12, "x" * 300, "a/" * 200])
def test_texts_longer_than_file_names(tiny, text):
    """256 to 499 bytes without a newline: longer than any name of a file, so the system has no answer."""
    assert 255 < len(text) < 500
    assert zq.perplexity(tiny, text).ppl > 1
    assert zq.calibrate(tiny, text).groups[0].tokens > 50


def test_the_name_of_a_file_is_still_no_text(tiny, tmp_path):
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(ValueError, match="is the name of a file"):
        zq.perplexity(tiny, str(tmp_path / "text.txt"))


@pytest.mark.parametrize("call, words", [
    (lambda lm: lm.generate("ab\udcff"), "prompt: expected Unicode text, but character 2 is the lone surrogate U\\+DCFF"),
    (lambda lm: lm.generate(["a", "\ud800"]), r"prompt\[1\]: .*character 0 .*U\+D800"),
    (lambda lm: lm.generate("a", stop="\udcff"), "stop: .*character 0"),
    (lambda lm: zq.perplexity(lm, "a\udcff"), "text: .*character 1"),
    (lambda lm: zq.perplexity(lm, ["a b", "a\udcff"]), r"text\[1\]: .*character 1"),
    (lambda lm: zq.calibrate(lm, "a\udcff"), "calibration data: .*character 1"),
    (lambda lm: zq.calibrate(lm, [*["fine"] * 30, "a\udcff"], samples=2), r"calibration data\[30\]: .*character 1"),
])
def test_lone_surrogates(tiny, call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny)


# ---- kinds of models -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, words", [
    (lambda: zq.quantize("path", "w8a8"), "model: expected a loaded model .*, got str"),
    (lambda: zq.quantize(Path("path")), "model: expected a loaded model .*, got PosixPath"),
    (lambda: zq.quantize(None), "model: expected a loaded model .*, got NoneType"),
    (lambda: zq.quantize(zq.Model), "model: expected a loaded model .*, got (type|ABCMeta)"),
    (lambda: zq.calibrate("path", "random"), "model: expected a loaded model .*, got str"),
    (lambda: zq.perplexity(Encoder(Model.make()), "a b"), "lm: expected a loaded language model .*, got Encoder"),
    (lambda: zq.perplexity("path", "a b"), "lm: expected a loaded language model .*, got str"),
    (lambda: zq.compare("path", LM(), "a b"), "model: expected a loaded model .*, got str"),
    (lambda: zq.compare(LM(), None, "a b"), "quantized: expected a loaded model .*, got NoneType"),
    (lambda: zq.language_report.compare_language(Model.make(), LM(), "a"), "lm: expected a loaded language .*, got Model"),
    (lambda: zq.sensitivity(None, ["a"]), "model: expected a loaded model .*, got NoneType"),
    (lambda: zq.compare_methods("path", ["rtn"], evaluation=["a"]), "model: expected a loaded model .*, got str"),
])
def test_something_else_than_a_model(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize("pair, words", [
    ((LM(), Encoder(Model.make())), "model is a language model and quantized is a sentence encoder; expected two of one kind"),
    ((Encoder(Model.make()), LM()), "model is a sentence encoder and quantized is a language model"),
    ((Model.make(), Encoder(Model.make())), "model is a model without pooling and quantized is a sentence encoder"),
])
def test_compare_two_kinds(pair, words):
    with pytest.raises(ValueError, match=words):
        zq.compare(*pair, "a b")


# ---- integer products ------------------------------------------------------------------------------------------------

TEN, ONE = np.uint8([[10]]), np.uint8([[1]])


@pytest.mark.parametrize("a, b, zeros, words", [
    (TEN, ONE, (0, 40000), "b_zero_point: expected integers of 0 to 255, got 40000"),
    (TEN, ONE, (65536, 0), "a_zero_point: expected integers of 0 to 255, got 65536"),
    (TEN, ONE, (-1, 0), "a_zero_point: expected integers of 0 to 255, got -1"),
    (TEN.view(np.int8), ONE, (128, 0), "a_zero_point: expected integers of -128 to 127, got 128"),
    (TEN, ONE, (0, 1.9), "b_zero_point: expected integers of 0 to 255, got 1.9"),
    (TEN, ONE, (0, np.nan), "b_zero_point: expected integers of 0 to 255, got nan"),
    (TEN, ONE, (np.inf, 0), "a_zero_point: expected integers of 0 to 255, got inf"),
    (TEN, ONE, ([1, 2], 0), "a_zero_point: expected 1 or 1 values, got 2"),
])
def test_matmul_integer_refuses_zero_points(a, b, zeros, words):
    with pytest.raises(ValueError, match=words):
        ops.matmul_integer(a, b, *zeros)
    for kind in ("1", True, [[None]]):
        with pytest.raises(TypeError, match="b_zero_point: expected an integer or an array of integers"):
            ops.matmul_integer(a, b, 0, kind)


QLINEAR = dict(a=TEN, a_scale=np.float32(1), a_zero_point=np.uint8(0), b=ONE, b_scale=np.float32(1), b_zero_point=np.uint8(0),
               y_scale=np.float32(1), y_zero_point=np.uint8(0))


@pytest.mark.parametrize("change, words", [
    (dict(a_scale=np.float32(np.nan)), "a_scale: expected finite values, got nan"),
    (dict(b_scale=np.float32([np.inf])), "b_scale: expected finite values, got inf"),
    (dict(y_scale=0), "y_scale: expected finite positive values, got 0"),
    (dict(y_scale=-1.0), "y_scale: expected finite positive values, got -1.0"),
    (dict(y_scale=np.nan), "y_scale: expected finite positive values, got nan"),
    (dict(b_scale=np.float32([1, 2])), "b_scale: expected 1 or 1 values, got 2"),
    (dict(a_zero_point=256), "a_zero_point: expected integers of 0 to 255, got 256"),
])
def test_qlinear_matmul_refuses(change, words):
    assert ops.qlinear_matmul(**QLINEAR).tolist() == [[10]]
    with pytest.raises(ValueError, match=words):
        ops.qlinear_matmul(**{**QLINEAR, **change})
    with pytest.raises(TypeError, match="y_scale: expected a number or an array of numbers, got 'x'"):
        ops.qlinear_matmul(**{**QLINEAR, "y_scale": "x"})


X, W = np.ones((1, 3), np.float32), np.eye(2, 3, dtype=np.float32)


@pytest.mark.parametrize("options, error, words", [
    (dict(quantize=(0.1, 12.7)), ValueError, "quantize: zero_point: expected integers of 0 to 255, got 12.7"),
    (dict(quantize=(0.1, 256)), ValueError, "quantize: zero_point: expected integers of 0 to 255, got 256"),
    (dict(quantize=(0.1, None)), TypeError, "quantize: zero_point: expected an integer or an array of integers, got None"),
    (dict(quantize=(None, 0)), TypeError, "quantize: scale: expected a number or an array of numbers, got None"),
    (dict(quantize=(0.0, 0)), ValueError, "quantize: scale: expected finite positive values, got 0.0"),
    (dict(quantize=(1e300, 0)), ValueError, "quantize: scale: expected finite positive values, got 1e\\+300"),
    (dict(quantize=(np.float32([1, np.nan]), 0)), ValueError, "quantize: scale: expected finite positive values, got nan"),
    (dict(quantize=3), ValueError, "quantize: expected None, 'symmetric', 'asymmetric' or \\(scale, zero_point\\), got 3"),
    (dict(quantize=(0.1,)), ValueError, "quantize: expected None"),
    (dict(activation=["gelu"]), ValueError, "activation: expected one of None, relu, .*, got \\['gelu'\\]"),
    (dict(activation=0), ValueError, "activation: expected one of None"),
])
def test_linear_refuses(options, error, words):
    with pytest.raises(error, match=words):
        ops.linear(X, W, **options)


def test_linear_w8a8_refuses_unhashable_names():
    with pytest.raises(ValueError, match="activations: expected 'asymmetric', 'symmetric' or 'int16', got \\['int16'\\]"):
        ops.linear_w8a8(X, W.astype(np.int8), np.ones(2, np.float32), activations=["int16"])


# ---- QTensor ---------------------------------------------------------------------------------------------------------

GROUP4, UNSIGNED4 = QuantSpec(4, granularity="group", group_size=2), QuantSpec(4, symmetric=False)
CODES, SCALES = np.zeros((2, 4), np.int8), np.ones((2, 2), np.float32)


def changed(array, value):
    array = array.copy()
    array[1, 1] = value
    return array


@pytest.mark.parametrize("fields, words", [
    ((changed(CODES, 8), SCALES, None, GROUP4), "codes of 4 bits must be -8 to 7, got 8"),
    ((changed(CODES, -9), SCALES, None, GROUP4), "codes of 4 bits must be -8 to 7, got -9"),
    ((changed(CODES.view(np.uint8), 16), SCALES[:, :1], np.zeros((2, 1), np.int32), UNSIGNED4), "codes .* 0 to 15, got 16"),
    ((CODES.view(np.uint8), SCALES[:, :1], np.int32([[0], [16]]), UNSIGNED4), "zeros of 4 bits must be 0 to 15, got 16"),
    ((CODES.view(np.uint8), SCALES[:, :1], np.int32([[0], [-1]]), UNSIGNED4), "zeros of 4 bits must be 0 to 15, got -1"),
    ((CODES.view(np.uint8), SCALES[:, :1], np.int32([[0], [256]]), UNSIGNED4.replace(bits=8)), "zeros .* 0 to 255, got 256"),
    ((CODES, changed(SCALES, np.nan), None, GROUP4), "scales must be finite and positive, got nan in row 1"),
    ((CODES, changed(SCALES, np.inf), None, GROUP4), "scales must be finite and positive, got inf in row 1"),
    ((CODES, changed(SCALES, 0), None, GROUP4), "scales must be finite and positive, got 0.0 in row 1"),
])
def test_qtensor_refuses_values(fields, words):
    with pytest.raises(ValueError, match=words):
        QTensor(*fields)


@pytest.mark.parametrize("fields, words", [
    (([[1, 2]], SCALES, None, GROUP4), "codes must be a NumPy array, got list"),
    ((CODES, [[1.0]], None, GROUP4), "scales must be a NumPy array, got list"),
    ((CODES, None, None, GROUP4), "scales must be a NumPy array, got NoneType"),
    ((CODES.view(np.uint8), SCALES, [[0]], UNSIGNED4), "zeros must be a NumPy array, got list"),
    ((CODES, SCALES, None, "int4"), "spec must be a QuantSpec, got 'int4'"),
])
def test_qtensor_refuses_types(fields, words):
    with pytest.raises(TypeError, match=words):
        QTensor(*fields)


def test_qtensor_takes_all_codes_of_its_bits():
    codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    assert QTensor(codes, np.ones((2, 1), np.float32), None, QuantSpec(4)).codes.min() == -8
    assert QTensor(np.empty((0, 4), np.int8), np.empty((0, 1), np.float32), None, QuantSpec(4)).shape == (0, 4)
    assert QTensor(np.empty((2, 0), np.int8), np.empty((2, 0), np.float32), None, QuantSpec(4)).shape == (2, 0)


@pytest.mark.parametrize("spec", [QuantSpec(3), UNSIGNED4, GROUP4, QuantSpec(2, granularity="tensor")], ids=str)
def test_what_quantizers_make_would_pass_the_checks(spec):
    w = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    gram = (w.T @ w).astype(np.float64)
    for made in (zq.RTN().quantize(w, spec), zq.ZQLocal(steps=3, lr=0.1).quantize(w, spec, {"gram": gram})):
        again = QTensor(made.codes, made.scales, made.zeros, made.spec)
        assert np.array_equal(again.dequantize(), made.dequantize()) and not made.codes.flags.writeable


# ---- options of recipes' steps ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, words", [
    (lambda: zq.GPTQ(damping=-1), "GPTQ: damping: expected a finite number of 0 or more, got -1"),
    (lambda: zq.GPTQ(damping="x"), "GPTQ: damping: .*, got 'x'"),
    (lambda: zq.GPTQ(damping=10**400), "GPTQ: damping: expected a finite number"),
    (lambda: zq.GPTQ(damping=float("nan")), "GPTQ: damping: .*, got nan"),
    (lambda: zq.GPTQ(damping=float("inf")), "GPTQ: damping: .*, got inf"),
    (lambda: zq.GPTQ(block=0), "GPTQ: block: expected an integer of 1 or more, got 0"),
    (lambda: zq.GPTQ(block=1.5), "GPTQ: block: expected an integer of 1 or more, got 1.5"),
    (lambda: zq.GPTQ(act_order="groups"), "GPTQ: act_order: expected True, False or 'group', got 'groups'"),
    (lambda: zq.GPTQ(act_order=1), "GPTQ: act_order: .*, got 1"),
    (lambda: zq.GPTQ(static_groups="no"), "GPTQ: static_groups: expected True or False, got 'no'"),
    (lambda: zq.GPTQ(mse=None), "GPTQ: mse: expected True or False, got None"),
    (lambda: zq.GPTAQ(damping=-1), "GPTAQ: damping"),
    (lambda: zq.GPTAQ(alpha="x"), "GPTAQ: alpha: expected a finite number of 0 or more, got 'x'"),
    (lambda: zq.GPTAQ(alpha=float("nan")), "GPTAQ: alpha"),
    (lambda: zq.AWQScale(duo="all"), "AWQScale: duo: expected True, False or 'both', got 'all'"),
    (lambda: zq.AWQScale(duo=[1]), "AWQScale: duo"),
    (lambda: zq.FPTQ(v0="x"), "FPTQ: expected 0 <= v0 <= v1, got v0='x' and v1=150"),
    (lambda: zq.FPTQ(v1=None), "FPTQ: expected 0 <= v0 <= v1"),
    (lambda: zq.LLMInt8(threshold=None), "threshold: expected a number above 0, got None"),
    (lambda: zq.LoRC(int8="no"), "LoRC: int8: expected True or False, got 'no'"),
    (lambda: zq.LKD(search=0.5), "search: expected a sequence of factors of lr, got 0.5"),
    (lambda: zq.ZQLocal(search=None), "search: expected a sequence of factors of lr, got None"),
    (lambda: zq.ZQLocal(lr="x"), "lr: expected positive numbers, got 'x'"),
    (lambda: zq.SmoothQuant(alpha=None), "SmoothQuant: alpha must be a number from 0 to 1 or 'search', got None"),
    (lambda: zq.SmoothQuant(branch="no"), "SmoothQuant: branch: expected True or False, got 'no'"),
    (lambda: zq.SmoothQuant(stages=3), "SmoothQuant: stages must be some of .*; got 3"),
    (lambda: zq.SmoothQuant(stages=[["qkv"]]), "SmoothQuant: stages must be some of"),
    (lambda: zq.OutlierSuppression(shift=1), "OutlierSuppression: shift: expected True or False, got 1"),
    (lambda: zq.OutlierSuppression(branch=None), "OutlierSuppression: branch: expected True or False, got None"),
])
def test_options_of_steps_are_checked_when_they_are_made(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_options_of_steps_take_numpys_numbers():
    step = zq.GPTAQ(act_order=np.True_, damping=np.float32(0.5), block=np.int64(64), mse=np.False_, alpha=1)
    assert step == zq.GPTAQ(act_order=True, damping=0.5, block=64, mse=False, alpha=1.0)
    assert zq.methods.Step.from_dict(step.to_dict()) == step and type(step.block) is int
    assert zq.GPTQ(act_order="group", damping=0).damping == 0.0
    assert zq.SmoothQuant(alpha=np.float32(0.5), stages=(stage for stage in ["qkv"])).stages == ("qkv",)
    assert zq.FPTQ(v1=float("inf")).v1 == float("inf")
