"""Attention: its exponentials, and the int8 form against the reference bit for bit, at every level and thread count."""
from __future__ import annotations

import numpy as np
import pytest
from test_nn import everywhere, make, same_bits
from tiny_decoders import config_of as decoder_config
from tiny_decoders import tensors_of as decoder_tensors
from tiny_models import batch, config_of, tensors_of, write

import zquant as zq
import zquant.reference as ref
from zquant import Scheme, _core, ops
from zquant.models import blocks
from zquant.reference import nn as ref_nn


def test_the_exponentials_are_as_accurate_as_stated():
    t = np.float32(np.linspace(-125, 0, 200001))
    exact = np.exp2(np.float64(t))
    assert np.abs(ref_nn.exp2_f32(t) / exact - 1).max() < 1.8e-7
    codes = ref_nn.exp2_codes(t)
    assert np.abs(codes - 255 * exact).max() < 0.5 + 255 * 1.1e-4
    assert codes.max() == 255 and codes[-1] == 255 and not codes[t < -9.01].any()
    assert ref_nn.exp2_f32(np.float32([0, -126, -1e30, -np.inf])).tolist() == [1, 0, 0, 0]


def test_codes_of_p_do_not_depend_on_which_of_two_integers_is_taken_halfway():
    """The reference and level amx round t to even, the other levels to odd: 2^n 2^r with r = 1/2 or -1/2."""
    t = np.float32(np.arange(-19.5, 0))
    c = np.float32(ref_nn._CODE)
    codes = []
    for r in np.float32([0.5, -0.5]):
        p = c[0] + r * (c[1] + r * (c[2] + r * c[3]))
        codes.append(np.rint(p * np.exp2(t - r)))
        assert np.abs(p * np.exp2(t - r) % 1 - 0.5).min() > 0.03  # whatever the order of operations
    np.testing.assert_array_equal(*codes)
    np.testing.assert_array_equal(codes[0], ref_nn.exp2_codes(t))


def both(q, k, v, heads, **more):
    got = everywhere(ops.attention, q, k, v, heads, int8=True, **more)
    want = ref.attention_int8(q, k, v, heads, **more)
    assert got.dtype == np.float32 and got.shape == q.shape
    np.testing.assert_array_equal(got, want)
    return got


@pytest.mark.parametrize("heads,d", [(1, 1), (2, 3), (3, 8), (2, 17), (4, 32), (1, 33), (2, 64), (1, 112), (1, 128)])
@pytest.mark.parametrize("tokens", [1, 2, 15, 33, 70])
def test_int8_is_the_reference_bit_for_bit(heads, d, tokens):
    q, k, v = (make(2, tokens, heads * d, seed=s) for s in range(3))
    got = both(q, k, v, heads)
    exact = ref.attention(q, k, v, heads)
    assert np.abs(got - exact).max() < 0.06


@pytest.mark.parametrize("tokens", [255, 256, 257, 600])
def test_int8_over_more_than_one_tile_of_keys(tokens):
    q, k, v = (make(1, tokens, 32, seed=s, scale=2) for s in range(3))
    both(q, k, v, 2)
    k[0, :, 0] = np.arange(tokens) * np.float32(0.1)  # the maximum rises from tile to tile
    q[..., 0] = 3
    both(q, k, v, 2)


@pytest.mark.parametrize("d", [5, 32, 40, 64, 68, 80, 100, 128, 160])
@pytest.mark.parametrize("tokens", [97, 130, 259])
def test_int8_over_many_keys_for_heads_of_any_width(d, tokens):
    """So many that tile registers are used where the CPU has them, in one step and in several."""
    q, k, v = (make(1, tokens, 2 * d, seed=s) for s in range(3))
    both(q, k, v, 2)


def test_int8_masks_and_lengths():
    q, k, v = (make(3, 41, 20, seed=s) for s in range(3))
    mask = np.random.default_rng(0).random((3, 41)) < 0.6
    for arguments in ({"key_mask": mask}, {"lengths": [41, 0, 5]}, {"key_mask": mask, "lengths": [40, 1, 0]}, {"scale": 0.7}):
        both(q, k, v, 4, **arguments)
    mask[1] = False
    got = both(q, k, v, 4, key_mask=mask)
    assert not got[1].any()
    k[~mask], v[~mask] = 1e30, -1e30
    assert same_bits(ops.attention(q, k, v, 4, key_mask=mask, int8=True), got)


def test_int8_does_not_depend_on_the_batch():
    q, k, v = (make(5, 300, 32, seed=s) for s in range(3))
    whole = ops.attention(q, k, v, 1, int8=True)
    for b in range(5):
        one = [np.ascontiguousarray(a[b:b + 1]) for a in (q, k, v)]
        assert same_bits(ops.attention(*one, 1, int8=True)[0], np.ascontiguousarray(whole[b]))


def test_int8_of_equal_values_gives_that_value():
    """The weights are normalised after rounding: they add up to exactly 1, to the last digits of float32."""
    q, k = (make(1, 50, 16, seed=s, scale=3) for s in range(2))
    got = everywhere(ops.attention, q, k, np.full((1, 50, 16), 2.5, np.float32), 2, int8=True)
    np.testing.assert_allclose(got, 2.5, rtol=4e-7)


def test_int8_of_extreme_values():
    zero = np.zeros((1, 7, 8), np.float32)
    v = make(1, 7, 8)
    assert np.abs(both(zero, zero, v, 1) - v.mean(1, keepdims=True)).max() < 0.02
    tiny_ = np.full((1, 7, 8), 1e-44, np.float32)
    assert np.isfinite(both(tiny_, v, tiny_, 1)).all()
    big = make(1, 7, 8, scale=1e12)
    assert np.isfinite(both(big, big, big, 1)).all()
    with pytest.raises(ValueError, match="finite, but the result overflows"):
        ops.attention(np.full_like(v, 3e38), v, v, 1, scale=100.0, int8=True)
    with pytest.raises(ValueError, match="finite, but the result overflows"):
        ops.attention(v, np.full_like(v, 3e38), v, 1, int8=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", range(3))
def test_int8_refuses_what_is_not_finite(isa, bad, which):
    operands = [make(2, 9, 12, seed=s) for s in range(3)]
    operands[which][1, 4, 7] = bad
    with pytest.raises(ValueError, match=f"^{'qkv'[which]}: NaN or Inf in row 13"):
        ops.attention(*operands, 2, int8=True)
    rows = [a.reshape(18, 12) for a in operands]
    with pytest.raises(ValueError, match=f"^{'qkv'[which]}: NaN or Inf in row 13"):
        _core.attention(*rows, np.int64([0, 9, 18]), 2, 0.5, None, True)


@pytest.mark.parametrize("heads,d", [(2, 32), (2, 16), (3, 5)])
def test_int8_from_a_number_of_rows_on(heads, d):
    lengths = [3, 48, 47, 0, 70, 1]
    offsets = np.cumsum([0, *lengths])
    qkv = make(offsets[-1], 3 * heads * d)
    got = everywhere(_core.attention_fused, qkv, offsets, heads, 0.5, None, 0, 48)
    for begin, rows in zip(offsets, lengths):
        alone = np.int64([0, rows])
        want = _core.attention_fused(qkv[begin:begin + rows], alone, heads, 0.5, None, 0, rows >= 48)
        assert same_bits(got[begin:begin + rows], want)


@pytest.mark.parametrize("heads,d", [(3, 5), (2, 20), (2, 48)])
def test_what_other_calls_left_in_memory_is_not_read(heads, d):
    """Sequences too short for int8 in a call that has it: their heads are rounded up to fewer columns."""
    offsets, mask = np.int64([0, 20, 70]), np.ones(70, np.uint8)
    mask[3] = 0
    qkv, huge = make(70, 3 * heads * d), np.full((1, 1 << 18), 3e38, np.float32)

    def run():
        _core.activation(huge, 0, 2)  # its float32 rows go through the memory in which attention works
        return _core.attention_fused(qkv, offsets, heads, 0.5, mask, 0, 48)

    assert same_bits(everywhere(run)[:20], _core.attention_fused(qkv[:20], offsets[:2], heads, 0.5, mask[:20], 0, 0))


def test_int8_does_not_read_behind_the_end(isa, guarded):
    for tokens, heads, d in [(1, 1, 1), (3, 2, 5), (33, 1, 16), (47, 2, 9), (64, 1, 32), (270, 1, 7)]:
        qkv = guarded(make(tokens, 3 * heads * d))
        _core.attention_fused(qkv, guarded(np.int64([0, tokens])), heads, 0.5, guarded(np.ones(tokens, np.uint8)), 2, True)
        q = [guarded(make(tokens, heads * d, seed=s)) for s in range(3)]
        _core.attention(*q, np.int64([0, tokens]), heads, 0.5, None, True)


def test_wrong_arguments_are_named():
    x = np.zeros((1, 65540), np.float32)
    with pytest.raises(ValueError, match="int8_rows: expected at most 65536 columns per head, got 65540"):
        _core.attention(x, x, x, np.int64([0, 1]), 1, 1.0, None, True)
    with pytest.raises(ValueError, match="int8_rows: expected at least 0, got -1"):
        _core.attention(x, x, x, np.int64([0, 1]), 1, 1.0, None, -1)
    with pytest.raises(TypeError, match="attention: expected 7 arguments"):
        _core.attention(x, x, x, np.int64([0, 1]), 1, 1.0, None, True, 1)


# ---- models ----------------------------------------------------------------------------------------------------


def test_the_scheme_carries_the_option(tmp_path):
    assert Scheme.parse("w8a8+e32+attn8") == Scheme.parse("w8a8+e32").replace(name="w8a8+e32+attn8", int8_attention=True)
    assert Scheme.from_dict(Scheme.parse("w8a8+attn8").to_dict()).int8_attention
    data = Scheme.parse("w8a8").to_dict()
    del data["int8_attention"]  # of a model saved before there was the option
    assert Scheme.from_dict(data) == Scheme.parse("w8a8")
    with pytest.raises(ValueError, match="int8_attention must be True or False, got 1"):
        Scheme("x", int8_attention=1)


def test_a_model_with_int8_attention_is_saved_and_restored(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr(blocks, "INT8_ROWS", 10)
    model = zq.load(write(tmp_path / "float", config_of("bert"), tensors_of("bert")))
    ids, mask = batch("bert")
    plain, small = (zq.quantize(model, scheme) for scheme in ("w8a8", "w8a8+attn8"))
    want = small(ids, mask)
    codes = mask.sum(axis=1) >= 10
    assert codes.any() and not codes.all() and same_bits(want[~codes], plain(ids, mask)[~codes])
    assert not np.array_equal(want, plain(ids, mask)) and np.abs(want - plain(ids, mask)).max() < 0.3
    small.save(tmp_path / "small")
    again = zq.load(tmp_path / "small")
    assert again.scheme == small.scheme and same_bits(again(ids, mask), want)
    seen = []
    assert same_bits(small(ids, mask, tap=lambda name, x, y: seen.append(name)), want) and seen


def test_decoders_have_no_int8_attention(tmp_path):
    pytest.importorskip("safetensors")
    model = zq.load(write(tmp_path / "llama", decoder_config("llama"), decoder_tensors(decoder_config("llama"))))
    with pytest.raises(ValueError, match="int8 attention is for encoders, not CausalLM"):
        zq.quantize(model, "w8a8+attn8")
