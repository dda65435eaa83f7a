"""Decoders: against the NumPy oracle and transformers' golden logits, cache, invariances, checkpoints, errors."""
from __future__ import annotations

import json
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")

from tiny_decoders import (
    FAMILIES,
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    VARIANTS,
    VOCAB,
    config_of,
    prompts,
    tensors_of,
)
from tiny_models import write

from zquant import KVCache, _core
from zquant.errors import FormatError
from zquant.models import CausalLM, decoder_blocks, load
from zquant.quantize import quantize
from zquant.reference import decoders as reference
from zquant.spec import Scheme

DATA = Path(__file__).parent / "data"
ROWS = (0, 11, 21, 32)  # as tests/parity/make_golden_decoders.py
SCHEMES = ["w8a8", "w8a8-sym", "w4a8-g16", "w4a16-g16", "w8a8+e32"]
INTEGER = ["w8a8", "w4a8-g16", "w8a8+e32"]


def assert_close(got, want, tolerance=1e-5):
    """Relative to the largest logit: tied heads of random tables have logits of 30, others of 5."""
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())


@pytest.fixture(params=FAMILIES)
def kind(request):
    return request.param


@pytest.fixture
def tiny(tmp_path):
    """make(variant, scheme=None, edit=..., config changes...) -> model; .tensors and .config are kept on it."""
    def make(variant, scheme=None, edit=None, prefix=True, shards=1, **changes):
        config = config_of(variant, **changes)
        tensors = tensors_of(config, prefix)
        if edit:
            tensors = edit(tensors) or tensors
        model = load(write(tmp_path / "model", config, tensors, shards))
        make.tensors, make.config = tensors, config
        return quantize(model, scheme) if scheme else model
    return make


# -- numbers

@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_oracles_and_transformers(variant, tiny):
    model, ids = tiny(variant), prompts()
    got = model(ids)
    assert got.shape == (4, 33, VOCAB)
    for row, logits in zip(ids, got):
        assert_close(logits[:len(row)], reference.logits(tiny.tensors, tiny.config, row))
        assert not logits[len(row):].any()
    with np.load(DATA / "decoders_golden.npz") as golden:
        assert set(golden) == set(VARIANTS)
        assert_close(got[0][list(ROWS)], golden[variant])


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gpt_neox", "opt"])
def test_names_without_the_prefix(variant, tiny):
    want = tiny(variant)(prompts())
    assert np.array_equal(tiny(variant, prefix=False)(prompts()), want)


def test_opt_with_the_older_prefix(tiny):
    want = tiny("opt")(prompts())
    assert np.array_equal(tiny("opt", edit=lambda t: {n.replace("model.decoder.", "decoder."): a for n, a in t.items()})(
        prompts()), want)


@pytest.mark.parametrize("fault", ["q and k exchanged", "window one wider", "positions off by one", "one bias off by 1e-2"])
def test_the_comparison_notices(fault, tiny):
    variant = {"window one wider": "mistral", "q and k exchanged": "gpt_neox"}.get(fault, "gpt2")
    model, row = tiny(variant), prompts()[0]
    tensors, config = dict(tiny.tensors), dict(tiny.config)
    if fault == "q and k exchanged":
        name = "gpt_neox.layers.1.attention.query_key_value.weight"
        tensors[name] = tensors[name].reshape(HEADS, 3, -1, HIDDEN)[:, [1, 0, 2]].reshape(-1, HIDDEN)
    elif fault == "window one wider":
        config["sliding_window"] += 1
    elif fault == "positions off by one":
        tensors["transformer.wpe.weight"] = np.roll(tensors["transformer.wpe.weight"], 1, 0)
    else:
        tensors["transformer.h.2.mlp.c_proj.bias"] = tensors["transformer.h.2.mlp.c_proj.bias"] + np.eye(1, HIDDEN, 5)[0] * 1e-2
    with pytest.raises(AssertionError):
        assert_close(model([row])[0], reference.logits(tensors, config, row))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_models_are_close(kind, scheme, tiny):
    model, ids = tiny(kind), prompts()[:1]
    want = model(ids)[0]
    small = quantize(model, scheme)
    got = small(ids)[0]
    cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    assert cosine.mean() > (0.93 if "4" in scheme else 0.99)
    assert not np.array_equal(got, want)
    assert np.array_equal(model(ids)[0], want)
    assert small.nbytes < model.nbytes
    assert scheme in repr(small)


def test_a_scheme_leaves_heads_of_their_own_float(tiny):
    for variant, name in (("llama", "lm_head"), ("gpt_neox", "embed_out")):
        small = tiny(variant, "w8a8")
        assert small.linears[name].spec is None
        told = quantize(tiny(variant), Scheme.parse("w8a8").with_overrides({name: 8}))
        assert str(told.linears[name].spec).startswith("int8")


def test_a_tied_head_follows_the_table(tiny):
    """int8 rows where the scheme says so, read by 8-bit or 16-bit tokens; the float table otherwise."""
    ids = prompts()[:1]
    for scheme, quant in (("w8a8", "asymmetric"), ("w8a8-sym", "symmetric"), ("w8a16", None), ("w8a8+e32", None)):
        small = tiny("gpt2", scheme)
        small(ids)
        head = small._parts["head"].layer
        assert (head.spec is None) == ("e32" in scheme)
        assert head.quant == quant
        assert "lm_head" not in small.linears


def test_one_projection_may_differ(kind, tiny):
    model, ids = tiny(kind), prompts()[:2]
    name = next(iter(model.linears))
    small = quantize(model, Scheme.parse("w8a8").with_overrides({name: None}))
    assert small.linears[name].spec is None
    assert np.array_equal(small(ids), small(ids, tap=lambda *_: None))


# -- batches, chunks, threads, the cache

def test_a_chunk_may_be_numpys_integer(tiny):
    model, ids = tiny("llama"), prompts()
    assert np.array_equal(model(ids, logits="last", chunk=np.int64(7)), model(ids, logits="last"))


@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a8-g16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_logits_are_the_last_of_all(variant, scheme, tiny):
    """The last block computes them alone. Chunks may hold several sequences' last tokens, or none."""
    model, ids = tiny(variant, scheme), prompts()
    after = prompts((4, 3, 1, 5), seed=2)
    for dtype in ("float32", "int8"):
        cache, more = model.new_cache(4, dtype), model.new_cache(4, dtype)
        want = [w[len(row) - 1] for w, row in zip(model(ids, cache=cache), ids)]
        for chunk in (512, 30, 3):
            mine = model.new_cache(4, dtype)
            assert np.array_equal(model(ids, logits="last", cache=mine, chunk=chunk), want)
        seen = []
        got = model(ids, logits="last", cache=more, chunk=7, tap=lambda name, x, y: seen.append(len(x)))
        assert np.array_equal(got, want) and min(seen) > 0
        want = [w[len(row) - 1] for w, row in zip(model(after, cache=cache), after)]  # from the keys and values of before
        assert np.array_equal(model(after, logits="last", cache=mine), want)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("variant", ["gpt2", "llama", "gpt_neox", "opt, norm after, projections", "qwen3, layer types",
                                     "llama, dynamic"])
def test_batches_chunks_and_padding_give_the_same_bits(variant, scheme, tiny):
    model, ids = tiny(variant, scheme), prompts()
    want = model(ids)
    for row, logits in zip(ids, want):
        assert np.array_equal(model([row])[0], logits[:len(row)])
    assert np.array_equal(model(ids, chunk=5), want)
    assert np.array_equal(model(ids, logits="last", chunk=7), np.stack([w[len(row) - 1] for w, row in zip(want, ids)]))
    width = max(map(len, ids))
    left = np.array([[0] * (width - len(row)) + row for row in ids])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    got = model(left, mask)
    assert not got[mask == 0].any()
    assert all(np.array_equal(g[width - len(row):], w[:len(row)]) for g, w, row in zip(got, want, ids))
    assert np.array_equal(model(left[:, ::-1], mask[:, ::-1])[0, ::-1].shape, want[0].shape)


@pytest.mark.parametrize("scheme", INTEGER)
def test_threads_and_levels_give_the_same_bits(kind, scheme, tiny, isa, threads):
    model, ids = tiny(kind, scheme), prompts()
    got = model(ids)
    key = (kind, scheme)
    assert np.array_equal(got, _first.setdefault(key, got))


_first: dict = {}


@pytest.mark.parametrize("scheme", [None, *INTEGER])
@pytest.mark.parametrize("variant", [*FAMILIES, "opt, norm after, projections", "llama, yarn", "qwen2, window"])
def test_cached_decoding_is_the_full_forward(variant, scheme, tiny):
    model, ids = tiny(variant, scheme), prompts()
    want, cache = model(ids), model.new_cache(4)
    for start, stop in ((0, 1), (1, 9), (9, 10), (10, 33)):
        rows = [i for i, row in enumerate(ids) if start < len(row)]
        cache = cache.select(rows) if len(rows) < cache.batch else cache
        ids, want = [ids[i] for i in rows], want[rows]
        got = model([row[start:stop] for row in ids], cache=cache)
        for g, w, row in zip(got, want, ids):
            n = len(row[start:stop])
            assert np.array_equal(g[:n], w[start:start + n])
        assert cache.lengths.tolist() == [min(stop, len(row)) for row in ids]


@pytest.mark.parametrize("scheme", [None, *INTEGER])
@pytest.mark.parametrize("variant", [*FAMILIES, "opt, norm after, projections", "llama, dynamic"])
def test_one_more_token_of_each_is_the_long_way(variant, scheme, tiny):
    """One token each with logits="last" takes a shorter way through Python; all its spellings give the same bits."""
    model = tiny(variant, scheme)
    prompt, feed = [row[:n] for row, n in zip(prompts((20, 20, 20)), (3, 17, 9))], [[5], [2], [7]]
    cache = model.new_cache(3)
    model(prompt, cache=cache)
    want = model(feed, cache=cache.select([0, 1, 2]))[:, 0]
    for given in (feed, tuple(map(tuple, feed)), np.array(feed), np.array(feed, np.int32), [np.array(row) for row in feed]):
        mine = cache.select([0, 1, 2])
        assert np.array_equal(model(given, cache=mine, logits="last"), want)
        assert mine.lengths.tolist() == [4, 18, 10]
    for bad in ([[5], [2], [-1]], [[5], [2], [10**6]], [[5], [2]], [[5], [2], []], [[5], [2], [0.5]]):
        with pytest.raises(ValueError, match="input_ids|cache"):
            model(bad, cache=cache, logits="last")
    assert cache.lengths.tolist() == [3, 17, 9]


@pytest.mark.parametrize("prompt", [[4], [4, 5]])
@pytest.mark.parametrize("name, part", [("model.layers.1.self_attn.o_proj", "model.layers.1: "), ("lm_head", "lm_head: ")])
def test_a_failing_step_leaves_the_cache(name, part, prompt, tiny):
    def edit(tensors):
        return tensors | {name + ".weight": tensors[name + ".weight"] * np.float32(3e38)}

    good, bad = tiny("llama"), tiny("llama", edit=edit)
    cache = good.new_cache(1)
    good([[1, 2, 3]], cache=cache)
    with pytest.raises(ValueError, match=f"^{part}"):
        bad([prompt], cache=cache, logits="last")
    assert cache.lengths.tolist() == [3]
    good([prompt], cache=cache, logits="last")


def test_ctrl_c_between_two_kernels(tiny):
    """The signal comes while a block computes: the pass ends there, and the cache is as it was."""
    model = tiny("llama")
    cache = model.new_cache(1)
    model([[1, 2, 3]], cache=cache)
    block = model._parts["blocks"][1]
    add = block.add

    def interrupted(calls, x, *others):
        return add(calls, calls.add(lambda given: (signal.raise_signal(signal.SIGINT), given)[1], x), *others)

    block.add = interrupted
    del model._parts["plain", False]
    with pytest.raises(KeyboardInterrupt):
        model([[4]], cache=cache, logits="last")
    assert cache.lengths.tolist() == [3]


def test_dynamic_rotation_depends_on_the_sequence_alone(tiny):
    """Past the trained length the frequencies follow the sequence's own length, not the batch's longest."""
    model, ids = tiny("llama, dynamic"), prompts((33, 12, 20))
    alone = [model([row])[0] for row in ids]
    for logits, row, want in zip(model(ids), ids, alone):
        assert np.array_equal(logits[:len(row)], want)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_cache(dtype, tiny):
    model, ids = tiny("llama"), prompts((20,))
    full, cache = model(ids), model.new_cache(1, dtype)
    got = np.concatenate([model([ids[0][:12]], cache=cache), model([ids[0][12:]], cache=cache)], axis=1)
    assert np.abs(got - full).max() <= (0 if dtype == "float32" else 0.2)
    assert (dtype == "float32") == np.array_equal(got, full)
    assert f"sequences=1, dtype='{dtype}'): 20 tokens" in repr(cache) and cache.nbytes > 0
    cache.truncate(12, sequence=0)
    assert np.array_equal(model([ids[0][12:]], cache=cache), got[:, 12:])
    twice = cache.select([0, 0])
    assert twice.batch == 2 and twice.lengths.tolist() == [20, 20] and twice.dtype == dtype
    cache.truncate(0)
    assert np.array_equal(model([ids[0][:12]], cache=cache), got[:, :12])
    assert twice.lengths.tolist() == [20, 20]


def test_bad_caches(tiny):
    model = tiny("llama")
    with pytest.raises(ValueError, match="cache: has 2 sequences, the batch 1"):
        model([[5]], cache=model.new_cache(2))
    with pytest.raises(ValueError, match="cache: of a model with 3 layers, 4 key-value heads of 12; this one has 3, 2 of 12"):
        model([[5]], cache=tiny("gpt2").new_cache(1))
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'int8', got 'int4'"):
        model.new_cache(1, "int4")
    with pytest.raises(ValueError, match="batch: expected an integer of 0 or more, got 1.5"):
        model.new_cache(1.5)
    for options in ({}, {"logits": "last"}):
        with pytest.raises(TypeError, match=r"cache: expected a zquant.KVCache, as new_cache\(\) makes it, got tuple"):
            model([[5]], cache=((), ()), **options)


def test_the_cache_of_a_model_is_the_public_one(tiny):
    model, ids = tiny("llama"), prompts((9,))
    a = model.dims
    own, made = KVCache(a.layers, a.kv_heads, a.head_dim, dtype="int8"), model.new_cache(1, "int8")
    assert isinstance(made, KVCache)
    assert np.array_equal(model(ids, cache=own), model(ids, cache=made))
    with pytest.raises(TypeError, match="rows: expected integers or bools, got float64"):
        made.select([0.7])
    assert made.select([True]).lengths.tolist() == [9]


@pytest.mark.parametrize("ids", [np.array([[2**64 - 1]], np.uint64), [[2**64 - 1]], [[2**64 - 1, -1]],
                                 [np.uint64([2**64 - 1])]])
def test_ids_that_64_bits_cannot_hold_are_named(ids, tiny):
    model = tiny("llama")
    for options in ({}, {"logits": "last", "cache": model.new_cache(1)}):
        with pytest.raises(ValueError, match=r"input_ids.*: 18446744073709551615 is out of range"):
            model(ids, **options)
    with pytest.raises(ValueError, match=r"input_ids\[0\]: expected integers, got float64"):
        model([[0.5]])
    assert np.array_equal(model(np.array([[3]], np.uint64)), model([[3]]))


def test_after_a_failure_the_cache_is_as_it_was(tiny):
    def edit(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * np.float32(3e38)

    ids = prompts((20,))[0]
    model, good = tiny("llama", edit=edit), tiny("llama")
    cache = good.new_cache(1)
    first = good([ids[:8]], cache=cache)
    with pytest.raises(ValueError, match="model.layers.1"):
        model([ids[8:]], cache=cache)
    assert cache.lengths.tolist() == [8]
    assert np.array_equal(good([ids[8:]], cache=cache)[0], good([ids])[0][8:])
    assert np.array_equal(first[0], good([ids])[0][:8])


def test_many_threads(tiny):
    from concurrent.futures import ThreadPoolExecutor

    model, ids = tiny("llama", "w8a8"), prompts()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: model(ids), range(16)))
    assert all(np.array_equal(r, results[0]) for r in results)


def test_a_large_float_head_is_streamed(tiny, monkeypatch):
    ids = prompts()
    for edit in (None, lambda t: {n: a.astype(np.float16) for n, a in t.items()}):
        for variant in ("gpt2", "llama"):
            model = tiny(variant, edit=edit)
            want = model(ids)
            with monkeypatch.context() as change:
                change.setattr(decoder_blocks, "HEAD_BYTES", 0)
                change.setattr(decoder_blocks, "HEAD_ROWS", 16)
                other = model.replace()
                assert np.array_equal(other(ids), want)
                assert other._parts["head"].product is None


# -- taps

@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a8-g16", "w4a16-g16"])
@pytest.mark.parametrize("variant", [*FAMILIES, "opt, norm after, projections", "gpt_neox, sequential"])
def test_taps_see_every_layer_and_change_nothing(variant, scheme, tiny):
    model, ids = tiny(variant, scheme), prompts()
    seen = []
    got = model(ids, tap=lambda name, x, y: seen.append((name, x, y)))
    assert np.array_equal(got, model(ids))
    assert [name for name, _, _ in seen] == [name for name, _ in model.named_linears()]
    for name, x, y in seen:
        assert np.array_equal(model.linears[name](np.ascontiguousarray(x)), y), name


# -- checkpoints

@pytest.mark.parametrize("shards", [1, 3])
def test_sharded(shards, kind, tiny):
    want = tiny(kind)(prompts())
    assert np.array_equal(tiny(kind, shards=shards)(prompts()), want)


def test_float16_stays_float16_until_it_is_packed(kind, tiny):
    model = tiny(kind, edit=lambda t: {n: a.astype(np.float16) for n, a in t.items()})
    assert model.nbytes < 1.1 * sum(a.nbytes for a in tiny.tensors.values())
    row = prompts()[0]
    assert_close(model([row])[0], reference.logits(tiny.tensors, tiny.config, row))
    assert quantize(model, "w8a8")([row]).shape == (1, len(row), VOCAB)


def test_bfloat16(kind, tmp_path):
    from zquant.formats.safetensors import Stored, write_safetensors

    config = config_of(kind)
    bits = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in tensors_of(config).items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", {name: Stored(array, "BF16") for name, array in bits.items()})
    cut = {name: (array.astype(np.uint32) << 16).view(np.float32) for name, array in bits.items()}
    row = prompts()[0]
    assert_close(load(tmp_path)([row])[0], reference.logits(cut, config, row))


@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a8-g16", "w4a16-g16", "w8a8-b4"])
@pytest.mark.parametrize("variant", [*FAMILIES, "opt, norm after, projections", "gpt2, untied"])
def test_saved_models_come_back(variant, scheme, tiny, tmp_path):
    model, ids = tiny(variant, scheme), prompts()
    again = load(model.save(tmp_path / "saved"))
    assert np.array_equal(again(ids), model(ids))
    assert again.scheme == model.scheme and again.config["model_type"] == model.config["model_type"]
    assert again.nbytes == model.nbytes


def test_saved_floats_lie_as_they_came(tiny, tmp_path):
    """GPT-2's Conv1D is (in, out) in the file, its codes are (out, in) like everybody's."""
    from safetensors.numpy import load_file

    for dtype in (np.float32, np.float16):
        model = tiny("gpt2", edit=lambda t: {n: a.astype(dtype) for n, a in t.items()})
        saved = load_file(model.save(tmp_path / "float") / "model.safetensors")
        assert saved.keys() == tiny.tensors.keys()
        assert all(saved[n].dtype == dtype and np.array_equal(saved[n], a) for n, a in tiny.tensors.items())
    saved = load_file(quantize(model, "w8a8").save(tmp_path / "w8") / "model.safetensors")
    assert saved["transformer.h.0.attn.c_attn.weight"].shape == (3 * HIDDEN, HIDDEN)


def test_readers_are_told_to_leave_a_tied_head_alone(tiny, tmp_path):
    for variant, ignored in (("llama, all heads", ["lm_head"]), ("llama", ["lm_head"]), ("gpt_neox", ["embed_out", "lm_head"])):
        directory = tiny(variant, "w8a8+e32").save(tmp_path / "saved")
        config = json.loads((directory / "config.json").read_text())
        assert config["quantization_config"]["ignore"] == ignored


def test_buffers_of_other_implementations_and_a_second_tied_head(tiny):
    def edit(tensors):
        return tensors | {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32), "lm_head.weight":
                          tensors["transformer.wte.weight"].copy()}

    assert "lm_head" not in tiny("gpt2", edit=edit).linears
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    assert tiny("llama", edit=lambda t: t | old)([[5]]).shape == (1, 1, VOCAB)


@pytest.mark.parametrize("variant, head", [("llama", "lm_head.weight"), ("gpt2, untied", "lm_head.weight"),
                                           ("gpt_neox", "embed_out.weight")])
def test_a_missing_head_is_named(variant, head, tiny):
    with pytest.raises(FormatError, match=rf"tensor {head} is missing, .* \(tie_word_embeddings is False\)") as error:
        tiny(variant, edit=lambda t: {n: a for n, a in t.items() if n != head})
    assert "model" in str(error.value)


def test_missing_and_unexpected_are_all_named(kind, tiny):
    def edit(tensors):
        names = [name for name in tensors if "1." in name][:2]
        edit.gone = names
        return {n: a for n, a in tensors.items() if n not in names} | {"spare.weight": np.zeros(2, np.float32)}

    with pytest.raises(FormatError) as error:
        tiny(kind, edit=edit)
    for name in edit.gone + ["spare.weight", "missing", "unexpected"]:
        assert name in str(error.value)


def test_wrong_shapes_are_named(tiny):
    def edit(tensors):
        name = "transformer.h.0.mlp.c_fc.weight"
        tensors[name] = tensors[name].T.copy()

    with pytest.raises(FormatError, match=r"h.0.mlp.c_fc.weight: expected shape \(48, 192\), got \(192, 48\)"):
        tiny("gpt2", edit=edit)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("variant, name, named", [
    ("llama", "model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj"),
    ("llama", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj"),
    ("llama", "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.gate_proj"),
    ("llama", "model.norm.weight", "model.norm.weight"),
    ("llama", "lm_head.weight", "lm_head"),
    ("llama", "model.embed_tokens.weight", "model.embed_tokens.weight, row 5"),
    ("gpt2", "transformer.wpe.weight", "transformer.wpe.weight"),
    ("gpt2", "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn"),
    ("gpt2", "transformer.h.1.mlp.c_fc.bias", "transformer.h.1.mlp.c_fc.bias"),
])
def test_weights_that_are_not_finite_are_named(variant, name, named, value, tiny):
    def edit(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][5] = value

    with pytest.raises(ValueError) as error:
        tiny(variant, edit=edit)([[4, 5, 6]])
    assert named in str(error.value)
    with pytest.raises(ValueError) as error:
        tiny(variant, "w8a8", edit=edit)([[4, 5, 6]])
    assert named.partition(",")[0] in str(error.value)


def test_logits_that_are_not_finite_name_the_head(tiny):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * np.float32(3e38)

    with pytest.raises(ValueError, match="lm_head"):
        tiny("llama", edit=edit)([[4, 5, 6]])


@pytest.mark.parametrize("variant, change, message", [
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not known; known: default, linear"),
    ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish'; known: gelu, gelu_new"),
    ("llama", {"num_key_value_heads": 3}, "4 heads do not divide into 3 key-value heads"),
    ("llama", {"head_dim": None, "num_attention_heads": 5}, "48 hidden units do not divide into 5 heads"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers is '2'; expected an integer, at least 1"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a positive number"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True; only False is supported"),
    ("gpt2", {"n_head": 5}, "48 hidden units do not divide into 5 heads"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
    ("gpt_neox", {"rotary_pct": 0.25}, "3 rotary features of 12 per head; expected an even number"),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["chunked"] * 3}, "layer_types must name one of full_attention"),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "for each of 3 layers"),
])
def test_configurations_that_are_refused(variant, change, message, tmp_path):
    directory = write(tmp_path / "model", config_of(variant) | change, tensors_of(config_of(variant)))
    with pytest.raises(FormatError, match=message) as error:
        load(directory)
    assert "config.json" in str(error.value)


# -- calls

@pytest.mark.parametrize("call, message", [
    (lambda m: m([[1, VOCAB]]), f"input_ids: {VOCAB} is outside 0..{VOCAB - 1}"),
    (lambda m: m([[-1]]), "input_ids: -1 is outside"),
    (lambda m: m([[1.5]]), "input_ids.0.: expected integers, got float64"),
    (lambda m: m([1, 2]), r"input_ids.0.: expected a sequence of token ids, got shape \(\)"),
    (lambda m: m(np.array([1, 2])), r"input_ids: expected shape \(B, T\), got \(2,\)"),
    (lambda m: m([[]]), "sequence 0 is empty; a prompt needs at least one token"),
    (lambda m: m([[4], [5]], [[1], [0]]), "sequence 1 is empty"),
    (lambda m: m([[1] * (POSITIONS + 1)]), f"sequence 0 has {POSITIONS + 1} tokens; the model has {POSITIONS} positions"),
    (lambda m: m(np.ones((1, 4), int), np.array([[1, 0, 1, 1]])), "sequence 0 has a hole before column 2"),
    (lambda m: m(np.ones((2, 4), int), np.array([[0, 1, 1, 1], [0, 1, 0, 1]])), "sequence 1 has a hole before column 3"),
    (lambda m: m([[1, 2]], [[1]]), r"attention_mask: expected the shape of the input, lengths \[2\]; got \[1\]"),
    (lambda m: m([[1, 2]], [[1, 2]]), "attention_mask: expected zeros and ones"),
    (lambda m: m([[1]], logits="first"), "logits: expected 'all' or 'last', got 'first'"),
    (lambda m: m([[1]], chunk=0), "chunk: expected an integer of 1 or more, got 0"),
])
def test_bad_calls(call, message, tiny):
    with pytest.raises(ValueError, match=message):
        call(tiny("llama"))


def test_longer_than_the_positions_with_a_cache(tiny):
    model = tiny("gpt2")
    cache = model.new_cache(1)
    model([[5] * POSITIONS], cache=cache)
    with pytest.raises(ValueError, match=f"sequence 0 has {POSITIONS + 1} tokens; the model has {POSITIONS} positions"):
        model([[5]], cache=cache)
    assert cache.lengths.tolist() == [POSITIONS]


def test_an_empty_batch(tiny):
    assert tiny("llama")([]).shape == (0, 0, VOCAB)
    assert tiny("llama")([], logits="last").shape == (0, VOCAB)


# -- the object

def test_what_a_model_says(kind, tiny):
    model = tiny(kind)
    assert isinstance(model, CausalLM)
    assert model.parameters == sum(a.size for a in tiny.tensors.values())
    assert model.nbytes == sum(a.nbytes for a in tiny.tensors.values())
    assert model.max_positions == model.max_length == POSITIONS
    assert model.vocabulary == VOCAB and model.bos_id == 1 and model.eos_ids == (2,)
    text = repr(model)
    assert f"{LAYERS} layers, hidden {HIDDEN}, {HEADS} heads" in text and "float32" in text
    assert ("(2 key-value)" in text) == (kind in ("llama", "mistral", "qwen2", "qwen3"))
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copy(prompts()), model(prompts()))
    small = quantize(model, "w8a8")
    assert np.array_equal(pickle.loads(pickle.dumps(small))(prompts()), small(prompts()))


def test_end_ids(tiny, tmp_path):
    model = tiny("llama", eos_token_id=[2, 3])
    assert model.eos_ids == (2, 3)
    (model.path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert model.eos_ids == (7,)
    (model.path / "generation_config.json").write_text("{}")
    assert tiny("llama", eos_token_id=None).eos_ids == ()


def test_replace(tiny):
    model = tiny("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    layer = model.linears[name].with_weight(np.zeros((4 * HIDDEN, HIDDEN), np.float32))
    other = model.replace(linears={name: layer})
    assert isinstance(other, CausalLM) and other.linears[name] is layer and model.linears[name] is not layer
    assert not np.array_equal(other([[5, 6]]), model([[5, 6]]))
    with pytest.raises(ValueError, match="no such linear layer: lm_head"):
        model.replace(linears={"lm_head": layer})


def test_weights_are_mapped(tiny):
    model = tiny("llama")
    for array in (model.word_embeddings, model.linears["model.layers.0.mlp.up_proj"].weight):
        assert not array.flags.owndata and not array.flags.writeable


# -- real models

@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_tiny_llama_golden(scheme):
    check_golden(DATA / "tiny-llama-5m", scheme)


def check_golden(directory, scheme=None):
    golden = json.loads((directory / "eval.json").read_text())["golden"]
    model = load(directory)
    model = quantize(model, scheme) if scheme else model
    got = model([golden["ids"]], logits="last")[0, :32]
    assert np.abs(got - golden["last_logits_first32"]).max() <= (0.6 if scheme else 2e-3)


def test_tiny_llama_batches_and_decodes_bit_equal():
    golden = json.loads((DATA / "tiny-llama-5m" / "eval.json").read_text())["golden"]["ids"]
    ids = [golden, golden[5:29], golden[:1]]
    for scheme in ("w8a8", "w4a8"):
        model = quantize(load(DATA / "tiny-llama-5m"), scheme)
        want = model(ids)
        for row, logits in zip(ids, want):
            assert np.array_equal(model([row])[0], logits[:len(row)])
        cache = model.new_cache(1)
        model([golden[:60]], cache=cache)
        steps = [model([[token]], cache=cache)[0, 0] for token in golden[60:]]
        assert np.array_equal(steps, want[0][60:])


def test_gpt2_30m_golden(shared):
    check_golden(shared / "models" / "gpt2-30m")


def test_gpt_nano_sort(shared):
    """The model of Bycroft's visualisation: it sorts, and its activations are those of minGPT, but for our GELU (1e-5 off)."""
    import base64

    directory = shared / "models" / "gpt-nano-sort"
    model, golden = load(directory), json.loads((directory / "golden.json").read_text())
    arrays = {n: np.frombuffer(base64.b64decode(v["data"]), np.float32).reshape(v["shape"])
              for n, v in golden.items() if n != "config"}
    ids, seen = arrays["idx"].astype(int), {}
    logits = model(ids, tap=lambda name, x, y: seen.update({name: (x, y)}))
    assert np.abs(logits - arrays["lm_head"]).max() <= 1e-3
    inside = {"attn.c_attn": ("ln1", "qkv"), "attn.c_proj": ("y", "yProj"), "mlp.c_fc": ("ln2", "fc"),
              "mlp.c_proj": ("gelu", "mlp")}
    wanted = {f"transformer.h.0.{name}": pair for name, pair in inside.items()} | {"lm_head": ("ln_f", "lm_head")}
    for name, pair in wanted.items():
        for got, want in zip(seen[name], pair):
            assert np.abs(got.reshape(arrays[want].shape) - arrays[want]).max() <= 1e-3, want
    for small in (model, quantize(model, "w8a8")):
        rng = np.random.default_rng(0)
        for _ in range(20):
            numbers = rng.integers(0, 3, 6).tolist()
            cache, answer, feed = small.new_cache(1), [], numbers
            for _ in range(6):
                answer.append(int(small([feed], cache=cache, logits="last")[0].argmax()))
                feed = answer[-1:]
            assert answer == sorted(numbers)


def test_stories260k_first_tokens(shared):
    """llama2.c's expected output begins "Once upon a time, there was a little girl named Lily."."""
    directory = shared / "models" / "stories260k-llama"
    model, cache, ids = load(directory), None, [1]
    pieces = _llama2c_pieces(directory / "tokenizer.llama2c.bin", model.vocabulary)
    cache, feed = model.new_cache(1), [1]
    while len(ids) < 40:
        feed = [int(model([feed], cache=cache, logits="last")[0].argmax())]
        ids += feed
    text = "".join(pieces[i] for i in ids[1:]).strip()
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


def _llama2c_pieces(file, count):
    """Pieces of llama2.c's tokenizer.bin: int32 longest, then float32 score, int32 length and the bytes of each."""
    data, at, pieces = file.read_bytes(), 4, []
    for _ in range(count):
        size = int.from_bytes(data[at + 4:at + 8], "little")
        pieces.append(data[at + 8:at + 8 + size].decode("utf-8", "replace"))
        at += 8 + size
    return pieces


def test_kernels_are_there():
    assert {"kv_new", "kv_attend", "kv_truncate", "kv_select"} <= set(dir(_core))
