"""Rotary embedding, key-value cache and causal attention over it: one answer, however a prompt is cut up."""
from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import zlib

import numpy as np
import pytest
from test_nn import assert_close, everywhere, make, onnx_cases, same_bits

import zquant as zq
import zquant.reference as ref
from zquant import KVCache, _core, ops

EPS = 1e-6
# heads, kv heads, head_dim: groups of 1 to 40, dimensions that fill vectors and that do not
SHAPES = [(1, 1, 1), (2, 1, 16), (4, 1, 32), (8, 1, 64), (4, 4, 20), (6, 3, 80), (2, 2, 128), (3, 1, 33), (32, 4, 16),
          (40, 1, 8)]


def tables(positions, half):
    angle = np.arange(positions)[:, None] / 10000.0 ** (np.arange(half) / max(half, 1))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class Setting:
    """One attention layer's arguments, and random input for it."""

    def __init__(self, heads, kv_heads, d, tokens=512, rope=None, norm=False, window=0, int8=False, interleaved=False):
        self.heads, self.kv_heads, self.d, self.window, self.int8, self.interleaved = (
            heads, kv_heads, d, window, int8, interleaved)
        self.cos, self.sin = (None, None) if rope is None else tables(tokens, rope)
        self.norms = (make(d, seed=7), make(d, seed=8)) if norm else (None, None)

    def qkv(self, rows, seed=0):
        return make(rows, (self.heads + 2 * self.kv_heads) * self.d, seed=seed)

    def cache(self, sequences=1, layers=1):
        return _core.kv_new(layers, sequences, self.kv_heads, self.d, self.int8)

    def attend(self, cache, x, offsets=None, layer=0, quant=0, wanted=None):
        offsets = np.int64([0, len(x)]) if offsets is None else offsets
        return _core.kv_attend(cache, layer, x, offsets, wanted, self.heads, self.cos, self.sin, self.interleaved, *self.norms,
                               EPS, self.d**-0.5, self.window, quant)

    def run(self, x, chunks=None):
        """One sequence, in passes of the given sizes."""
        cache, ends = self.cache(), np.cumsum([len(x)] if chunks is None else chunks)
        assert ends[-1] == len(x)
        return np.concatenate([self.attend(cache, part) for part in np.split(x, ends[:-1])])

    def reference(self, x):
        """float64 over the whole sequence, keys and values as they are before the cache rounds them."""
        h, kv, d = self.heads, self.kv_heads, self.d
        q, k, v = np.split(x[None].astype(np.float64), [h * d, (h + kv) * d], -1)
        for name, weight in zip("qk", self.norms):
            if weight is not None:
                a = q if name == "q" else k
                a[...] = ref.rms_norm(a.reshape(*a.shape[:2], -1, d), weight, EPS).reshape(a.shape)
        if self.cos is not None:
            at = np.arange(len(x))[None]
            q = ref.rotary(q, at, self.cos, self.sin, h, self.interleaved)
            k = ref.rotary(k, at, self.cos, self.sin, kv, self.interleaved)
        return ref.causal_attention(q, k, v, h, kv, self.window)[0]


# ---- rotary embedding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads,d,half", [(1, 2, 1), (3, 16, 8), (2, 64, 32), (2, 80, 20), (4, 33, 16), (1, 7, 0), (2, 96, 37)])
def test_rotary_against_the_reference(heads, d, half, interleaved):
    x, (cos, sin) = make(9, heads * d), tables(40, half)
    positions = np.int64([0, 39, 3, 3, 17, 8, 1, 0, 20])
    got = everywhere(_core.rotary, x, positions, cos, sin, heads, interleaved)
    assert_close(got, ref.rotary(x, positions, cos, sin, heads, interleaved), atol=1e-6)
    still = got.reshape(9, heads, d)[..., 2 * half:]
    assert same_bits(still.copy(), x.reshape(9, heads, d)[..., 2 * half:].copy())
    public = ops.rotary(x.reshape(3, 3, -1), positions.reshape(3, 3).astype(np.int16), cos, sin, heads, interleaved)
    assert same_bits(public.reshape(9, -1), got)
    if half:
        assert not same_bits(got, x)


# ---- attention over the cache against the reference ------------------------------------------------------------


@pytest.mark.parametrize("heads,kv_heads,d", SHAPES)
def test_attention_over_the_cache_against_the_reference(heads, kv_heads, d):
    for rope, norm, window in [(None, False, 0), (d // 2, False, 0), (d // 4, True, 5), (d // 2, True, 100)]:
        s = Setting(heads, kv_heads, d, rope=rope, norm=norm, window=window)
        x = s.qkv(150)
        assert_close(everywhere(s.run, x), s.reference(x), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 321, 512])
@pytest.mark.parametrize("window", [0, 1, 64, 200])
def test_every_boundary_of_pages_and_tiles(tokens, window):
    s = Setting(4, 2, 16, rope=8, window=window)
    x = s.qkv(tokens)
    got = s.run(x)
    assert_close(got, s.reference(x), atol=1e-5)
    assert same_bits(s.run(x, [tokens - tokens // 2, tokens // 2]), got)


def test_interleaved_pairs_and_codes_as_output():
    s = Setting(4, 2, 24, rope=12, interleaved=True, norm=True)
    x = s.qkv(70)
    assert_close(everywhere(s.run, x), s.reference(x), atol=1e-5)
    for quant in (1, 2):
        codes = everywhere(lambda q: s.attend(s.cache(), x, quant=q), quant)
        assert same_bits(codes, _core.quantize_tokens(s.run(x), quant, False))


def test_rising_scores_and_large_magnitudes():
    s = Setting(2, 1, 16)
    x = s.qkv(400)
    x[:, 32] = np.arange(400) * np.float32(0.3)
    x[:, :2] = 4
    assert_close(everywhere(s.run, x), s.reference(x), atol=2e-3)


# ---- the same bits, however the tokens arrive ------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [0, 3, 70, 256, 300])
@pytest.mark.parametrize("heads,kv_heads,d", [(2, 2, 16), (8, 1, 20), (6, 3, 64)])
def test_chunks_of_any_size_give_the_same_bits(heads, kv_heads, d, window, int8):
    n = 530
    s = Setting(heads, kv_heads, d, tokens=n, rope=d // 2, norm=True, window=window, int8=int8)
    x = s.qkv(n)
    x[100:140, ::3] = 0  # exact zeros of both signs, and values that underflow when they are weighted
    x[140:180] *= np.float32(-1e-38)
    want = everywhere(s.run, x)
    for chunks in ([1] * n, [529, 1], [64] * 8 + [18], [63, 1, 1, 65, 400], [256, 256, 18], [7, 0, 300, 223]):
        assert same_bits(s.run(x, chunks), want), chunks
    odd = sorted(np.random.default_rng(window).integers(0, n, 9).tolist())
    assert same_bits(everywhere(s.run, x, np.diff([0, *odd, n]).tolist()), want)


@pytest.mark.parametrize("int8", [False, True])
def test_other_sequences_of_the_batch_do_not_show(int8):
    s = Setting(4, 2, 32, rope=16, int8=int8, window=90)
    lengths = [[5, 0, 200, 64, 1], [1, 1, 1, 1, 1], [0, 70, 3, 0, 64], [1, 0, 1, 1, 1]]
    own = [s.qkv(sum(step[i] for step in lengths), seed=i) for i in range(5)]

    def batched():
        cache, at, out = s.cache(5), [0] * 5, [[] for _ in range(5)]
        for step in lengths:
            offsets = np.concatenate(([0], np.cumsum(step))).astype(np.int64)
            y = s.attend(cache, np.concatenate([own[i][at[i]:at[i] + n] for i, n in enumerate(step)]), offsets)
            for i, n in enumerate(step):
                out[i].append(y[offsets[i]:offsets[i + 1]])
                at[i] += n
        assert _core.kv_lengths(cache).tolist() == at
        return [np.concatenate(parts) for parts in out]

    for x, got in zip(own, everywhere(batched)):
        assert same_bits(got, s.run(x))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("quant", [0, 2])
@pytest.mark.parametrize("window", [0, 70])
def test_wanted_rows_alone(window, quant, int8):
    s = Setting(6, 3, 20, rope=8, norm=True, window=window, int8=int8)
    x, offsets = s.qkv(334), np.int64([0, 1, 1, 300, 334])
    start, more, after = s.qkv(8, seed=1), s.qkv(4, seed=2), np.int64([0, 1, 2, 3, 4])

    def run(wanted):
        cache = s.cache(4)
        s.attend(cache, start, 2 * after)
        return s.attend(cache, x, offsets, quant=quant, wanted=wanted), s.attend(cache, more, after)

    want, then = everywhere(run, None)
    for wanted in ([0, 299, 333], [5, 64, 65, 310], [333, 0, 7], []):
        got, following = everywhere(run, np.int64(wanted))
        assert same_bits(got, tuple(a[wanted] for a in want) if quant else want[wanted])
        assert same_bits(following, then)  # keys and values of all rows are in the cache


def test_rows_that_are_not_wanted_need_no_queries():
    s = Setting(2, 1, 16)
    x = s.qkv(40)
    want = s.attend(s.cache(), x)[-1:]
    x[:-1, :32] = np.nan
    assert same_bits(s.attend(s.cache(), x, wanted=np.int64([39])), want)
    x[3, 40] = np.nan
    with pytest.raises(ValueError, match="qkv: NaN or Inf in row"):
        s.attend(s.cache(), x, wanted=np.int64([39]))


def test_layers_are_separate_and_lengths_advance_with_the_last():
    s = Setting(2, 1, 16, rope=8)
    cache = s.cache(layers=3)
    inputs = [s.qkv(100, seed=i) for i in range(3)]
    for at, n in ((0, 70), (70, 1), (71, 29)):
        for layer, x in enumerate(inputs):
            got = s.attend(cache, x[at:at + n], layer=layer)
            assert same_bits(got, s.run(x)[at:at + n])
            assert _core.kv_lengths(cache).tolist() == [at + n if layer == 2 else at]


def test_a_pass_that_was_broken_off_can_begin_again():
    s = Setting(2, 1, 16, rope=8)
    x = s.qkv(80)
    cache = s.cache(layers=2)
    s.attend(cache, s.qkv(75, seed=3))  # layer 1 never comes
    for layer in (0, 1):
        assert same_bits(s.attend(cache, x, layer=layer), s.run(x))
    assert _core.kv_lengths(cache).tolist() == [80]
    bad = s.qkv(3)
    bad[1, 40] = np.nan
    with pytest.raises(ValueError, match="qkv: NaN or Inf in row 1"):
        s.attend(cache, bad)
    more = s.qkv(5, seed=4)
    assert same_bits(s.attend(cache, more), s.run(np.concatenate([x, more]))[80:])


# ---- the int8 cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 16, 33, 64, 80])
def test_int8_values_are_within_half_a_scale(d):
    """One key, so p = 1 and the result is the value as the cache gives it back."""
    for seed in range(5):
        s = Setting(3, 3, d, int8=True)
        x = s.qkv(1, seed=seed)
        v = x[0, 6 * d:].reshape(3, d)
        got = everywhere(s.run, x).reshape(3, d)
        scale = np.abs(v).max(-1, keepdims=True) / np.float32(127)
        codes = np.rint(v * (127 / np.abs(v).max(-1, keepdims=True)))
        assert_close(got, codes * scale.astype(np.float64), rtol=4e-7)  # p / p is 1 to an ulp or two
        assert (np.abs(got - v) <= scale * 0.501).all()


@pytest.mark.parametrize("d", [2, 16, 31, 64])
def test_int8_keys_are_within_half_a_scale(d):
    """Two equal values but for one feature, scores read back from p: each feature of a key is asked for by a unit query."""
    s = Setting(d, 1, d, int8=True)
    k = make(2, d, seed=5)
    x = np.zeros((2, (d + 2) * d), np.float32)
    x[:, : d * d] = np.eye(d, dtype=np.float32).reshape(-1)
    x[:, d * d:(d + 1) * d] = k
    x[1, (d + 1) * d] = 1.0  # v is 0 for the first key and 1 for the second, in feature 0
    p = s.run(x)[1].reshape(d, d)[:, 0].astype(np.float64)
    asked = np.log(p / (1 - p)) * d**0.5  # k[1] - k[0], as the cache has them
    bound = np.abs(k).max(-1).sum() / 127 / 2
    assert (np.abs(asked - (k[1] - k[0])) <= bound * 1.01 + 1e-5).all()
    assert np.abs(asked - (k[1] - k[0])).max() > 1e-4  # not the float32 keys


@pytest.mark.parametrize("window", [0, 60])
def test_int8_stays_near_float32_and_zeros_stay_zeros(window):
    s = Setting(4, 2, 64, rope=32, window=window, int8=True)
    x = s.qkv(300)
    error = np.abs(everywhere(s.run, x) - s.reference(x))
    assert 1e-4 < error.max() < 0.05
    assert not s.run(np.zeros_like(x)).any()
    tiny = np.full_like(x, 1e-42)
    assert not s.run(tiny).any()  # too small for a scale


# ---- memory, truncate, select ----------------------------------------------------------------------------------


def test_pages_are_allocated_as_they_fill():
    for dtype, per_token in (("float32", 2 * 4 * 20 * 4 + 2 * 4 * 12 * 2), ("int8", 2 * 4 * (20 + 4))):
        cache = KVCache(2, 4, 20, 3, dtype)
        s = Setting(4, 4, 20)
        empty = cache.nbytes
        assert empty < 1000
        sizes = [empty]
        for _ in range(130):
            for layer in range(2):
                s.attend(cache.handle, s.qkv(1), np.int64([0, 0, 1, 1]), layer)
            sizes.append(cache.nbytes)
        grown = np.flatnonzero(np.diff(sizes))
        assert grown.tolist() == [0, 64, 128] and cache.lengths.tolist() == [0, 130, 0]
        page = (sizes[-1] - empty) / (2 * 3)  # layers, pages
        assert 0.9 * 64 * per_token <= page <= 1.1 * 64 * per_token + 64
        assert "130 tokens" in repr(cache) and dtype in repr(cache)
        cache.truncate(65)
        assert cache.nbytes < sizes[-1] and cache.lengths.tolist() == [0, 65, 0]
        cache.truncate(0)
        assert cache.lengths.tolist() == [0, 0, 0] and cache.nbytes < empty + 200


@pytest.mark.parametrize("int8", [False, True])
def test_truncated_tokens_are_forgotten(int8):
    s = Setting(4, 2, 16, rope=8, int8=int8)
    x, other = s.qkv(200), s.qkv(150, seed=1)
    for keep in (0, 1, 63, 64, 65, 130, 199, 200):
        cache = s.cache(2)
        s.attend(cache, np.concatenate([x, other]), np.int64([0, 200, 350]))
        _core.kv_truncate(cache, 0, keep)
        assert _core.kv_lengths(cache).tolist() == [keep, 150]
        more = s.qkv(90, seed=2)
        got = s.attend(cache, np.concatenate([more, more]), np.int64([0, 90, 180]))
        assert same_bits(got[:90], s.run(np.concatenate([x[:keep], more]))[keep:])
        assert same_bits(got[90:], s.run(np.concatenate([other, more]))[150:])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_selected_sequences_are_copies(dtype):
    s = Setting(4, 2, 16, rope=8, int8=dtype == "int8")
    cache = KVCache(1, 2, 16, 3, dtype)
    own = [s.qkv(n, seed=n) for n in (100, 7, 64)]
    s.attend(cache.handle, np.concatenate(own), np.int64([0, 100, 107, 171]))
    chosen = cache.select([2, 0, 0])
    assert chosen.lengths.tolist() == [64, 100, 100] and cache.lengths.tolist() == [100, 7, 64]
    more = [s.qkv(2, seed=50 + i) for i in range(3)]
    got = s.attend(chosen.handle, np.concatenate(more), np.int64([0, 2, 4, 6]))
    del chosen
    gc.collect()
    assert cache.lengths.tolist() == [100, 7, 64]
    for i, row in enumerate([2, 0, 0]):
        assert same_bits(got[2 * i:2 * i + 2], s.run(np.concatenate([own[row], more[i]]))[-2:])
    again = s.attend(cache.handle, np.concatenate(more), np.int64([0, 2, 4, 6]))
    assert same_bits(again[:2], s.run(np.concatenate([own[0], more[0]]))[-2:])
    assert cache.select(np.array([True, False, True])).lengths.tolist() == [102, 66]
    assert cache.select([]).sequences == 0 and cache.select([]).nbytes == 0
    none = cache.select([])
    assert s.attend(none.handle, s.qkv(0), np.int64([0])).shape == (0, 64)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_have_pages_of_their_own(copied):
    s = Setting(4, 2, 16, rope=8)
    cache, x = KVCache(1, 2, 16, 2), s.qkv(9)
    s.attend(cache.handle, x, np.int64([0, 4, 9]))
    other = copied(cache)
    assert type(other) is KVCache and other.lengths.tolist() == [4, 5] and other.batch == other.sequences == 2
    cache.truncate(0)
    assert cache.lengths.tolist() == [0, 0] and other.lengths.tolist() == [4, 5]
    more = s.qkv(2, seed=1)
    assert same_bits(s.attend(other.handle, more, np.int64([0, 1, 2]))[:1], s.run(np.concatenate([x[:4], more[:1]]))[4:])


# ---- the public function ---------------------------------------------------------------------------------------


def test_causal_attention_of_padded_arrays():
    q, k, v = make(3, 70, 48), make(3, 70, 24, seed=1), make(3, 70, 24, seed=2)
    for arguments in ({}, {"window": 9}, {"lengths": [70, 0, 33]}, {"scale": 0.5, "window": 64}):
        got = everywhere(ops.causal_attention, q, k, v, 4, 2, **arguments)
        assert_close(got, ref.causal_attention(q, k, v, 4, 2, **arguments), atol=5e-6)
    assert_close(ops.causal_attention(q, q, q, 4), ref.causal_attention(q, q, q, 4), atol=5e-6)
    assert ops.causal_attention(q[:, :0], k[:, :0], v[:, :0], 4, 2).shape == (3, 0, 48)
    assert ops.causal_attention(q[:0], k[:0], v[:0], 4, 2).shape == (0, 70, 48)


def test_awkward_arrays_give_the_same_bits(nasty_arrays):
    s = Setting(4, 2, 16, rope=8, norm=True)
    x = s.qkv(70)
    want, before = s.run(x), zlib.crc32(x.tobytes())
    for what, a in nasty_arrays(x).items():
        assert same_bits(s.run(a), want), what
    for field in ("cos", "sin"):
        plain = getattr(s, field)
        for what, a in nasty_arrays(plain).items():
            setattr(s, field, a)
            assert same_bits(s.run(x), want), what
        setattr(s, field, plain)
    assert zlib.crc32(x.tobytes()) == before


def test_kernels_do_not_read_behind_the_end(isa, guarded):
    for heads, kv_heads, d, half, n in [(1, 1, 1, 0, 1), (4, 2, 5, 2, 33), (2, 1, 33, 16, 40), (8, 1, 16, 8, 65),
                                         (2, 2, 20, 7, 7)]:
        for int8 in (False, True):
            s = Setting(heads, kv_heads, d, norm=True, int8=int8)
            s.cos, s.sin = (guarded(t) for t in tables(n, half))
            s.norms = tuple(guarded(w) for w in s.norms)
            s.attend(s.cache(), guarded(s.qkv(n)), guarded(np.int64([0, n])), quant=2)
        x = guarded(make(n, heads * d))
        for interleaved in (False, True):
            _core.rotary(x, guarded(np.arange(n)), s.cos, s.sin, heads, interleaved)


# ---- threads and processes -------------------------------------------------------------------------------------


def test_one_cache_is_for_one_call_at_a_time():
    s = Setting(8, 2, 64, rope=32, tokens=4096)
    x, caches, failures = s.qkv(300), [s.cache(), s.cache()], []
    want = s.run(x)

    def own(cache):
        for _ in range(5):
            failures.extend([] if same_bits(s.attend(cache, x), want) else ["different"])
            _core.kv_truncate(cache, 0, 0)

    threads = [threading.Thread(target=own, args=(c,)) for c in caches]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failures
    shared, outcomes = s.cache(), []

    def together():
        for _ in range(6):
            try:
                s.attend(shared, x)
                outcomes.append("done")
            except RuntimeError as error:
                outcomes.append(str(error))

    threads = [threading.Thread(target=together) for _ in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert set(outcomes) <= {"done", "cache: another call is using it"}
    assert _core.kv_lengths(shared).tolist() == [300 * outcomes.count("done")]


def test_a_forked_child_goes_on_with_its_copy():
    s = Setting(4, 2, 32, rope=16)
    x, cache = s.qkv(90), s.cache()
    s.attend(cache, x[:80])
    want = s.run(x)[80:]
    child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(s.attend(cache, x[80:]), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _core.kv_lengths(cache).tolist() == [80]
    assert same_bits(s.attend(cache, x[80:]), want)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("int8", [False, True])
def test_values_that_are_not_finite_are_named(isa, threads, bad, int8):
    for norm in (False, True):
        for column in (3, 70, 90):  # in q, k, v
            s = Setting(4, 1, 16, rope=8, norm=norm, int8=int8)
            x = s.qkv(80)
            x[[37, 60], column] = bad
            cache = s.cache()
            with pytest.raises(ValueError, match="^qkv: NaN or Inf in row 37$"):
                s.attend(cache, x)
            assert _core.kv_lengths(cache).tolist() == [0]
            good = s.qkv(80)
            assert same_bits(s.attend(cache, good), s.run(good))
    for field in ("cos", "sin"):
        s = Setting(4, 1, 16, rope=8)
        getattr(s, field)[20, 3] = bad
        with pytest.raises(ValueError, match=f"^{field}: NaN or Inf in row 20$"):
            s.run(s.qkv(21))
        assert np.isfinite(s.run(s.qkv(20))).all()  # the row is not used
        with pytest.raises(ValueError, match=f"^{field}: NaN or Inf in row 20$"):
            ops.rotary(make(1, 64), np.array([20]), s.cos, s.sin, 4)
    s = Setting(4, 1, 16, norm=True)
    s.norms = (s.norms[0], np.full(16, bad, np.float32))
    with pytest.raises(ValueError, match="^k_norm: NaN or Inf in row 0$"):
        s.run(s.qkv(2))
    q = make(1, 5, 8)
    poisoned = q.copy()
    poisoned[0, 4, 0] = bad
    for i, name in enumerate("qkv"):
        operands = [q, q, q]
        operands[i] = poisoned
        with pytest.raises(ValueError, match=f"^{name}: NaN or Inf in row 4$"):
            ops.causal_attention(*operands, 2)


def test_overflow_is_an_error():
    s = Setting(2, 1, 16)
    with pytest.raises(ValueError, match="qkv: finite, but the result overflows float32 in row 0"):
        s.run(np.full((3, 64), 3e38, np.float32))
    with pytest.raises(ValueError, match="x: finite, but the result overflows float32 in row 0"):
        _core.rotary(np.full((1, 2), 3e38, np.float32), np.int64([0]), np.float32([[1]]), np.float32([[1]]), 1, False)


def attend(**changes):
    """kv_attend with good arguments but for the changes."""
    cos, sin = tables(10, 4)
    good = dict(cache=_core.kv_new(2, 2, 2, 8, False), layer=0, qkv=np.zeros((3, 64), np.float32), offsets=np.int64([0, 1, 3]),
                wanted=None, heads=4, cos=cos, sin=sin, interleaved=False, q_norm=None, k_norm=np.ones(8, np.float32),
                eps=1e-6, scale=1.0, window=0, quant=0)
    assert set(changes) <= set(good)
    return _core.kv_attend(*{**good, **changes}.values())


def started(layers=0):
    """A cache in which a pass over one and two tokens has done its first layers."""
    cache = _core.kv_new(2, 2, 2, 8, False)
    for layer in range(layers):
        attend(cache=cache, layer=layer)
    return cache


Z = np.zeros((2, 8), np.float32)
P = np.array([0, 1])


def test_the_good_arguments_are_good():
    assert attend().shape == (3, 32)
    cache = started(2)
    assert _core.kv_lengths(cache).tolist() == [1, 2]


@pytest.mark.parametrize("error,message,call", [
    (TypeError, "cache: expected what kv_new returned", lambda: attend(cache=None)),
    (TypeError, "cache: expected what kv_new returned", lambda: attend(cache=_core.linear_pack_f32(Z, None))),
    (TypeError, "cache: expected what kv_new returned", lambda: _core.kv_bytes(3)),
    (ValueError, "layer: expected 0 to 1, got 2", lambda: attend(layer=2)),
    (ValueError, "layer: expected 0, got 1", lambda: attend(layer=1)),
    (ValueError, "layer: expected 0, got 1", lambda: attend(cache=started(2), layer=1)),
    (ValueError, "offsets: layer 0 had 1 tokens of sequence 0, layer 1 has 2",
     lambda: attend(cache=started(1), layer=1, offsets=np.int64([0, 2, 3]))),
    (ValueError, "offsets: 1 sequences, but the cache has 2", lambda: attend(offsets=np.int64([0, 3]))),
    (ValueError, "offsets: expected 0 = ", lambda: attend(offsets=np.int64([0, 1, 4]))),
    (ValueError, "offsets: expected 0 = ", lambda: attend(offsets=np.int64([0, 4, 3]))),
    (TypeError, "offsets: expected int64, got int32", lambda: attend(offsets=np.int32([0, 1, 3]))),
    (ValueError, "wanted: expected rows 0 to 2, got 3", lambda: attend(wanted=np.int64([0, 3]))),
    (ValueError, "wanted: expected rows 0 to 2, got -1", lambda: attend(wanted=np.int64([-1]))),
    (TypeError, "wanted: expected int64, got int32", lambda: attend(wanted=np.int32([0]))),
    (TypeError, "qkv: expected float32, got float64", lambda: attend(qkv=np.zeros((3, 64)))),
    (ValueError, "qkv: expected 2 dimensions, got 1", lambda: attend(qkv=np.zeros(64, np.float32))),
    (ValueError, r"qkv: expected \(4 \+ 2 \* 2\) \* 8 columns, got 63", lambda: attend(qkv=np.zeros((3, 63), np.float32))),
    (ValueError, "heads: expected a multiple of the cache's 2 kv heads, got 3", lambda: attend(heads=3)),
    (ValueError, "heads: expected 1 to", lambda: attend(heads=0)),
    (ValueError, "cos: expected an array, as sin is one", lambda: attend(cos=None)),
    (ValueError, "sin: expected an array, as cos is one", lambda: attend(sin=None)),
    (ValueError, r"sin: expected shape \(10, 4\), got \(9, 4\)", lambda: attend(sin=np.zeros((9, 4), np.float32))),
    (ValueError, "cos: 5 columns are more than half of head_dim 8", lambda: attend(cos=np.zeros((10, 5), np.float32))),
    (ValueError, "cos: 1 positions, but sequence 1 reaches 2 tokens",
     lambda: attend(cos=np.zeros((1, 4), np.float32), sin=np.zeros((1, 4), np.float32))),
    (ValueError, r"q_norm: expected shape \(8,\), got \(7,\)", lambda: attend(q_norm=np.zeros(7, np.float32))),
    (TypeError, "k_norm: expected float32", lambda: attend(k_norm=np.zeros(8))),
    (ValueError, "eps: expected a finite number >= 0", lambda: attend(eps=-1.0)),
    (ValueError, "scale: expected a finite number > 0", lambda: attend(scale=0.0)),
    (ValueError, "window: expected 0 to", lambda: attend(window=-1)),
    (ValueError, "quant: expected 0 to 2", lambda: attend(quant=3)),
    (TypeError, "kv_attend: expected 15 arguments, got 2", lambda: _core.kv_attend(None, 0)),
    (ValueError, "sequence: expected 0 to 1, got 2", lambda: _core.kv_truncate(started(2), 2, 0)),
    (ValueError, "length: expected 0 to 2, got 3", lambda: _core.kv_truncate(started(2), 1, 3)),
    (ValueError, "length: expected 0 to 1, got -1", lambda: _core.kv_truncate(started(2), 0, -1)),
    (ValueError, "length: expected an integer of 0 or more, got -1", lambda: KVCache(1, 1, 8).truncate(-1)),
    (ValueError, "length: expected an integer of 0 or more, got 0.5", lambda: KVCache(1, 1, 8).truncate(0.5)),
    (ValueError, "length: expected an integer of 0 or more, got -1", lambda: KVCache(1, 1, 8, 0).truncate(-1)),
    (ValueError, "sequence: expected an integer of 0 to 1, got 2", lambda: KVCache(1, 1, 8, 2).truncate(0, 2)),
    (ValueError, "length: expected 0 to 0, got 1", lambda: KVCache(1, 1, 8).truncate(1, 0)),
    (ValueError, "rows: expected sequences 0 to 0, got 18446744073709551615",
     lambda: KVCache(1, 1, 8).select(np.array([2**64 - 1], np.uint64))),
    (ValueError, "rows: expected one dimension, got shape \\(1, 1\\)", lambda: KVCache(1, 1, 8).select([[0]])),
    (TypeError, "KVCache: its pages .* cannot be pickled", lambda: pickle.dumps(KVCache(1, 1, 8))),
    (ValueError, "rows: expected sequences 0 to 1, got 2", lambda: _core.kv_select(started(), np.int64([0, 2]))),
    (ValueError, "rows: expected sequences 0 to 1, got -1", lambda: _core.kv_select(started(), np.int64([-1]))),
    (TypeError, "rows: expected integers or bools, got float64", lambda: KVCache(1, 1, 8).select([0.0])),
    (ValueError, "rows: expected 1 bools", lambda: KVCache(1, 1, 8).select([True, False])),
    (ValueError, "dtype: expected 'float32' or 'int8', got 'float16'", lambda: KVCache(1, 1, 8, dtype="float16")),
    (ValueError, "layers: expected 1 to", lambda: KVCache(0, 1, 8)),
    (ValueError, "sequences: expected 0 to", lambda: KVCache(1, 1, 8, -1)),
    (ValueError, "head_dim: expected 1 to", lambda: KVCache(1, 1, 0)),
    (TypeError, "kv_heads: expected an integer", lambda: KVCache(1, 1.5, 8)),
    (ValueError, "positions: expected rows of cos 0 to 9, got 10", lambda: ops.rotary(Z, P + 9, *tables(10, 4), 1)),
    (ValueError, "positions: expected rows of cos 0 to 9, got -1", lambda: ops.rotary(Z, P - 1, *tables(10, 4), 1)),
    (ValueError, r"positions: expected shape \(2,\), got \(1,\)", lambda: ops.rotary(Z, P[:1], *tables(10, 4), 1)),
    (TypeError, "positions: expected integers, got float64", lambda: ops.rotary(Z, P * 1.0, *tables(10, 4), 1)),
    (TypeError, "cos: expected a NumPy array of float32, got NoneType", lambda: ops.rotary(Z, P, None, None, 1)),
    (ValueError, "x: 8 columns cannot be shared out to 3 heads", lambda: ops.rotary(Z, P, *tables(10, 1), 3)),
    (ValueError, "cos: 4 columns are more than half of head_dim 4", lambda: ops.rotary(Z, P, *tables(10, 4), 2)),
    (ValueError, "q: expected 3 dimensions", lambda: ops.causal_attention(Z, Z, Z, 1)),
    (ValueError, "num_heads: 8 columns of q cannot be shared out to 3 heads",
     lambda: ops.causal_attention(Z[None], Z[None], Z[None], 3)),
    (ValueError, "num_kv_heads: expected a divisor of num_heads 4, got 3",
     lambda: ops.causal_attention(Z[None], Z[None], Z[None], 4, 3)),
    (ValueError, r"k: expected shape \(1, 2, 4\), got \(1, 2, 8\)",
     lambda: ops.causal_attention(Z[None], Z[None], Z[None], 2, 1)),
    (ValueError, "lengths: expected 0 to 2, got 3 to 3",
     lambda: ops.causal_attention(Z[None], Z[None], Z[None], 2, lengths=[3])),
    (ValueError, "window: expected 0 to", lambda: ops.causal_attention(Z[None], Z[None], Z[None], 2, window=-2)),
])
def test_wrong_arguments_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_cache_too_big_for_memory_is_a_memory_error():
    cache = _core.kv_new(1, 1, 1 << 16, 1 << 12, False)  # 128 GiB a page
    with pytest.raises((MemoryError, ValueError)):
        _core.kv_new(1 << 14, 1 << 20, 1, 1, False)
    assert _core.kv_bytes(cache) < 1000


# ---- ONNX ------------------------------------------------------------------------------------------------------


def test_onnx_rotary_embedding(shared):
    """All eight; without position ids ONNX has a row of the tables for every token of every sequence."""
    seen = 0
    for name, node, inputs, (want,) in onnx_cases(shared, "test_rotary_embedding*"):
        x, cos, sin, *position = inputs
        four = x.ndim == 4  # (batch, heads, tokens, head_dim)
        rows = np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(x.shape[0], x.shape[2], -1) if four else x
        heads = x.shape[1] if four else node.attributes["num_heads"]
        if not position:
            position = [np.arange(cos.shape[0] * cos.shape[1]).reshape(cos.shape[:2])]
            cos, sin = (t.reshape(-1, t.shape[-1]) for t in (cos, sin))
        # where fewer elements are rotated, the tables are made for those
        got = ops.rotary(rows, position[0], cos, sin, heads, bool(node.attributes.get("interleaved", 0)))
        got = got.reshape(*rows.shape[:2], heads, -1).transpose(0, 2, 1, 3) if four else got
        assert_close(got, want, atol=1e-6)
        seen += 1
    assert seen == 8


#: Causal node tests with keys and values of one size and no other mask: with and without grouped heads, a past, padding.
CAUSAL = ["test_attention_3d_causal", "test_attention_3d_gqa_causal", "test_attention_4d_causal",
          "test_attention_4d_causal_nonpad_batch_prefill", "test_attention_4d_causal_nonpad_continued_prefill",
          "test_attention_4d_causal_with_past_and_present", "test_attention_4d_gqa_causal",
          "test_attention_4d_gqa_causal_nonpad_decode"]


def onnx_sequences(inputs):
    """(q, keys, values, position of the first query) of each sequence, as (tokens, features)."""
    q, k, v = ([row for row in (a.transpose(0, 2, 1, 3).reshape(a.shape[0], a.shape[2], -1) if a.ndim == 4 else a)]
               for a in inputs[:3])
    rest = inputs[3:]
    for i in range(len(q)):
        if len(rest) == 2:  # a past, which comes before the keys
            before = [a[i].transpose(1, 0, 2).reshape(a.shape[2], -1) for a in rest]
            yield q[i], np.concatenate([before[0], k[i]]), np.concatenate([before[1], v[i]]), len(before[0])
        elif len(rest) == 1:  # nonpad_kv_seqlen: the queries are the last of so many tokens
            n = int(rest[0][i])
            yield q[i], k[i][:n], v[i][:n], n - len(q[i])
        else:
            yield q[i], k[i], v[i], 0


def test_onnx_causal_attention(shared):
    seen = []
    for name, node, inputs, (want, *_) in onnx_cases(shared, *CAUSAL):
        four = want.ndim == 4
        heads = inputs[0].shape[1] if four else node.attributes["q_num_heads"]
        kv_heads = inputs[1].shape[1] if four else node.attributes["kv_num_heads"]
        want = want.transpose(0, 2, 1, 3).reshape(want.shape[0], want.shape[2], -1) if four else want
        for (q, k, v, past), expected in zip(onnx_sequences(inputs), want):
            # queries for the past, and for keys behind the last query, are filled up and what they give is dropped
            filled = np.zeros((len(k), q.shape[1]), np.float32)
            filled[past:past + len(q)] = q
            got = ops.causal_attention(filled[None], k[None], v[None], heads, kv_heads, scale=node.attributes.get("scale"))
            assert_close(got[0, past:past + len(q)], expected, atol=2e-6)
        seen.append(name)
    assert seen == CAUSAL


def test_the_cache_is_public():
    assert zq.KVCache is KVCache and "KVCache" in zq.__all__
