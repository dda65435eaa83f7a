"""Model families: against the NumPy oracle, packing, taps, checkpoints of every kind, and errors."""
from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")

from tiny_models import (
    FAMILIES,
    HIDDEN,
    LABELS,
    LAYERS,
    POSITIONS,
    PREFIX,
    VOCAB,
    batch,
    config_of,
    tensors_of,
    write,
)

from zquant.errors import FormatError
from zquant.models import load
from zquant.models.blocks import Packed, pack, rows
from zquant.models.family import column_positions, counted_positions
from zquant.quantize import quantize
from zquant.reference import models as reference

SHARED = Path(os.environ.get("ZQUANT_SHARED", Path(__file__).parents[2] / "shared"))
# Hidden states and logits are of order 1. Sums of 48 to 80 float32 products are good for 1e-5; GELU's own error (2.4e-6, with
# tanh 1e-5) goes through such a sum and a norm as well: measured 1.3e-5 and 4.2e-5, and 2e-6 beside a reference with our GELU.
TOLERANCE, SUMS, TANH = 2e-5, 1e-5, 6e-5


def assert_close(got, want, tolerance=TOLERANCE):
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= tolerance


@pytest.fixture(params=FAMILIES)
def kind(request):
    return request.param


@pytest.fixture
def tiny(tmp_path):
    """make(kind, ...) -> (model, tensors, config)"""
    def make(kind, head=False, act="gelu", edit=None, change=None, shards=1, **kwargs):
        tensors, config = tensors_of(kind, head, **kwargs), config_of(kind, head, act)
        if edit:
            tensors = edit(tensors) or tensors
        config.update(change or {})
        return load(write(tmp_path / "model", config, tensors, shards)), tensors, config
    return make


# -- numbers

@pytest.mark.parametrize("prefix", [False, True])
def test_hidden_states_are_the_oracles(kind, prefix, tiny):
    model, tensors, config = tiny(kind, prefix=prefix)
    ids, mask = batch(kind)
    assert_close(model(ids, mask), reference.encode(tensors, config, ids, mask))
    assert_close(model(ids), reference.encode(tensors, config, ids))


def test_logits_are_the_oracles(kind, tiny):
    model, tensors, config = tiny(kind, head=True)
    ids, mask = batch(kind)
    got = model(ids, mask)
    assert got.shape == (5, LABELS)
    assert_close(got, reference.classify(tensors, config, ids, mask))
    assert_close(model.hidden_states(ids, mask), reference.encode(tensors, config, ids, mask))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu"])
def test_activations(act, tiny):
    model, tensors, config = tiny("bert", act=act)
    ids, mask = batch("bert")
    tolerance = {"gelu": TOLERANCE, "gelu_new": TANH}.get(act, SUMS)
    assert_close(model(ids, mask), reference.encode(tensors, config, ids, mask), tolerance)


def test_token_types(tiny):
    model, tensors, config = tiny("bert")
    ids, mask = batch("bert")
    types = np.random.default_rng(3).integers(0, 2, ids.shape)
    got = model(ids, mask, types)
    assert_close(got, reference.encode(tensors, config, ids, mask, types))
    assert np.abs(got - model(ids, mask)).max() > 0.1


def test_left_padding_and_holes_keep_positions(kind, tiny):
    """Masked tokens are not computed, and the others keep the positions that the family gives them."""
    model, tensors, config = tiny(kind)
    ids, mask = batch(kind)
    ids, mask = ids[:, ::-1].copy(), mask[:, ::-1].copy()
    mask[0, [2, 7]] = 0
    assert_close(model(ids, mask), reference.encode(tensors, config, ids, mask))


def test_a_padding_token_that_is_not_masked(tiny):
    """RoBERTa does not count it, whatever the mask says."""
    model, tensors, config = tiny("roberta")
    ids, mask = batch("roberta")
    assert_close(model(ids, np.ones_like(mask)), reference.encode(tensors, config, ids, np.ones_like(mask)))


def test_embeddings_in_place_of_ids(tiny):
    model, tensors, config = tiny("bert", head=True)
    x = np.random.default_rng(5).normal(size=(2, 6, HIDDEN)).astype(np.float32)
    assert_close(model(embeddings=x), reference.classify(tensors, config, embeddings=x))


def test_pooler(tiny):
    model, tensors, _ = tiny("bert")
    hidden = model(batch("bert")[0])
    want = np.tanh(hidden[:, 0].astype(float) @ tensors["pooler.dense.weight"].T + tensors["pooler.dense.bias"])
    assert_close(model.pooled(hidden), want)
    with pytest.raises(ValueError, match="no pooler"):
        tiny("distilbert")[0].pooled(hidden)


@pytest.mark.parametrize("fault", ["query and value exchanged", "one bias off by 1e-3", "positions off by one"])
def test_the_comparison_notices(fault, tiny):
    model, tensors, config = tiny("bert")
    ids, mask = batch("bert")
    if fault == "query and value exchanged":
        a, b = (f"encoder.layer.1.attention.self.{part}.weight" for part in ("query", "value"))
        tensors[a], tensors[b] = tensors[b], tensors[a]
    elif fault == "one bias off by 1e-3":
        tensors["encoder.layer.0.output.dense.bias"] = (
            tensors["encoder.layer.0.output.dense.bias"] + np.eye(1, HIDDEN, 5)[0] * 1e-3)
    else:
        tensors["embeddings.position_embeddings.weight"] = np.roll(tensors["embeddings.position_embeddings.weight"], 1, 0)
    with pytest.raises(AssertionError):
        assert_close(model(ids, mask), reference.encode(tensors, config, ids, mask))


# -- packing

def test_lists_arrays_and_micro_batches_give_the_same_bits(kind, tiny, monkeypatch):
    model, _, _ = tiny(kind)
    ids, mask = batch(kind)
    want = model(ids, mask)
    ragged = [row[m != 0].tolist() for row, m in zip(ids, mask)]
    assert np.array_equal(model(ragged), want)
    alone = [model([row])[0] for row in ragged]
    assert all(np.array_equal(a, w[:len(a)]) for a, w in zip(alone, want))
    whole = Packed.chunks
    monkeypatch.setattr(Packed, "chunks", lambda self: whole(self, 14))
    assert np.array_equal(model(ids, mask), want)


def test_masked_slots_are_zero(tiny):
    model, _, _ = tiny("bert")
    ids, mask = batch("bert")
    hidden = model(ids, mask)
    assert not hidden[mask == 0].any()
    assert hidden[mask == 1].any(axis=1).all()


def test_chunks_cover_the_batch():
    packed = pack([[1] * n for n in (3, 9, 0, 2, 2, 20, 1)], positions=column_positions, pad=0)
    assert list(packed.chunks(10)) == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7)]
    assert list(packed.chunks(1000)) == [(0, 7)]


def test_positions():
    ids = np.array([5, 6, 1, 7, 1, 1, 8])
    starts = np.array([0, 0, 0, 0, 4, 4, 4])
    assert counted_positions(ids, ids, starts, 1).tolist() == [2, 3, 1, 4, 1, 1, 2]
    assert counted_positions(None, np.arange(3), None, 1).tolist() == [2, 3, 4]


def test_empty_inputs(tiny):
    model, _, _ = tiny("bert")
    assert model([]).shape == (0, 0, HIDDEN)
    assert model(np.zeros((0, 4), int)).shape == (0, 4, HIDDEN)
    assert model([[], [5, 6], []]).shape == (3, 2, HIDDEN)
    assert np.array_equal(model([[], [5, 6], []])[1:2], model([[5, 6]]))
    assert not model([[], [5, 6], []])[0].any()
    head, _, _ = tiny("bert", head=True)
    assert head([]).shape == (0, LABELS)
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        head([[5], []])


@pytest.mark.parametrize("call, message", [
    (lambda m: m([[1, VOCAB]]), f"input_ids: {VOCAB} is outside 0..{VOCAB - 1}"),
    (lambda m: m([[-1]]), "input_ids: -1 is outside"),
    (lambda m: m([[1.5]]), "input_ids.0.: expected integers, got float64"),
    (lambda m: m(np.array([1, 2])), r"input_ids: expected shape \(B, T\), got \(2,\)"),
    (lambda m: m([[1] * (POSITIONS + 1)]), f"needs position {POSITIONS}; the model has {POSITIONS}"),
    (lambda m: m([[1, 2]], [[1]]), r"attention_mask: expected the shape of the input, lengths \[2\]; got \[1\]"),
    (lambda m: m([[1, 2]], [[1, 2]]), "attention_mask: expected zeros and ones, got values from 1 to 2"),
    (lambda m: m([[1, 2]], None, [[0, 2]]), "token_type_ids: 2 is outside 0..1"),
    (lambda m: m(), "give input_ids or embeddings"),
    (lambda m: m(embeddings=np.zeros((1, 2, 3))), f"expected {HIDDEN} features, got 3"),
    (lambda m: m(embeddings=np.zeros((2, 3))), "expected floats of shape"),
])
def test_bad_calls(call, message, tiny):
    with pytest.raises(ValueError, match=message):
        call(tiny("bert")[0])


def test_max_length(tiny):
    assert tiny("bert")[0].max_length == POSITIONS
    model = tiny("roberta")[0]
    assert model.max_length == POSITIONS - 2
    assert model([[7] * model.max_length]).shape[1] == POSITIONS - 2
    with pytest.raises(ValueError, match="needs position"):
        model([[7] * (model.max_length + 1)])


# -- taps

@pytest.mark.parametrize("scheme", [None, "w8a8", "w8a8-sym", "w4/8a8"])
def test_taps_see_every_layer_and_change_nothing(kind, scheme, tiny):
    model, _, _ = tiny(kind, head=True)
    model = quantize(model, scheme) if scheme else model
    ids, mask = batch(kind)
    seen = []
    got = model(ids, mask, tap=lambda name, x, y: seen.append((name, x, y)))
    assert np.array_equal(got, model(ids, mask))
    assert [name for name, _, _ in seen] == [name for name, _ in model.named_linears()]
    for name, x, y in seen:
        assert np.array_equal(model.linears[name](np.ascontiguousarray(x)), y), name


# -- quantized

@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-sym", "w4/8a8-g16", "w8a8+e8"])
def test_quantized_models_are_close_and_leave_the_float_one_alone(kind, scheme, tiny):
    model, _, _ = tiny(kind)
    ids, mask = batch(kind)
    want = model(ids, mask)
    small = quantize(model, scheme)
    got = small(ids, mask)
    cosine = (got * want).sum(-1)[mask == 1] / (np.linalg.norm(got, axis=-1) * np.linalg.norm(want, axis=-1))[mask == 1]
    assert cosine.min() > (0.95 if "4" in scheme else 0.995)
    assert not np.array_equal(got, want)
    assert np.array_equal(model(ids, mask), want)
    assert small.nbytes < model.nbytes
    assert scheme in repr(small) and "float32" in repr(model)


def test_one_projection_may_differ(tiny):
    """An override for the query alone: three products in place of the fused one."""
    from zquant.spec import Scheme

    model, _, _ = tiny("bert")
    ids, mask = batch("bert")
    small = quantize(model, Scheme.parse("w8a8").with_overrides({"encoder.layer.0.attention.self.query": None}))
    assert small.linears["encoder.layer.0.attention.self.query"].quant is None
    got = small(ids, mask)
    assert np.abs(got - model(ids, mask)).max() < 0.3
    assert np.array_equal(got, small(ids, mask, tap=lambda *_: None))


# -- checkpoints

@pytest.mark.parametrize("shards", [1, 3])
def test_sharded(shards, tiny):
    model, tensors, config = tiny("distilbert", shards=shards)
    ids, mask = batch("distilbert")
    assert_close(model(ids, mask), reference.encode(tensors, config, ids, mask))


def test_float16(tiny):
    model, tensors, config = tiny("bert", edit=lambda t: {n: a.astype(np.float16) for n, a in t.items()})
    assert model.word_embeddings.dtype == np.float16
    ids, mask = batch("bert")
    assert_close(model(ids, mask), reference.encode(tensors, config, ids, mask))
    assert np.array_equal(quantize(model, "w8a8+e8")(ids).shape, model(ids).shape)


def test_bfloat16(tmp_path):
    from zquant.formats.safetensors import Stored, write_safetensors

    bits = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in tensors_of("bert").items()}
    (tmp_path / "config.json").write_text(json.dumps(config_of("bert")))
    write_safetensors(tmp_path / "model.safetensors", {name: Stored(array, "BF16") for name, array in bits.items()})
    cut = {name: (array.astype(np.uint32) << 16).view(np.float32) for name, array in bits.items()}
    ids, mask = batch("bert")
    assert_close(load(tmp_path)(ids, mask), reference.encode(cut, config_of("bert"), ids, mask))


@pytest.mark.parametrize("extra", ["embeddings.position_ids", "bert.embeddings.position_ids", "cls.predictions.bias",
                                   "cls.seq_relationship.weight"])
def test_tensors_that_are_no_error(extra, tiny):
    stray = np.arange(POSITIONS)[None] if "position" in extra else np.zeros(3, np.float32)
    model, _, _ = tiny("bert", prefix=extra.startswith(("bert", "cls")), edit=lambda t: t | {extra: stray})
    assert extra not in model.tensors


def test_gamma_and_beta(tiny):
    want = tiny("bert")[0]([[5, 6, 7]])
    old = lambda t: {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
                     for n, a in t.items()}
    assert np.array_equal(tiny("bert", edit=old)[0]([[5, 6, 7]]), want)


def test_a_pooler_is_optional_unless_used(tiny):
    assert "pooler.dense" not in tiny("bert", pooler=False)[0].linears
    with pytest.raises(FormatError, match="missing tensors: bert.pooler.dense.weight, bert.pooler.dense.bias"):
        tiny("bert", head=True, pooler=False)


def test_missing_and_unexpected_are_all_named(kind, tiny):
    def edit(tensors):
        names = [name for name in tensors if "layer.1." in name][:2]
        edit.gone = names
        return {n: a for n, a in tensors.items() if n not in names} | {"spare.weight": np.zeros(2, np.float32)}

    with pytest.raises(FormatError) as error:
        tiny(kind, edit=edit)
    for name in edit.gone + ["spare.weight", "missing", "unexpected"]:
        assert name in str(error.value)
    assert "model" in str(error.value)


def test_wrong_shapes_and_types_are_named(tiny):
    def edit(tensors):
        tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((7, HIDDEN), np.float32)
        tensors["embeddings.LayerNorm.bias"] = np.zeros(HIDDEN, np.int64)

    with pytest.raises(FormatError, match=rf"expected shape \(80, {HIDDEN}\), got \(7, {HIDDEN}\)") as error:
        tiny("bert", edit=edit)
    assert "encoder.layer.0.intermediate.dense.weight" in str(error.value)
    assert "embeddings.LayerNorm.bias: expected F32" in str(error.value) and "I64" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name, named", [
    ("encoder.layer.1.attention.output.dense.weight", "encoder.layer.1.attention.output.dense"),
    ("encoder.layer.0.attention.self.key.weight", "encoder.layer.0.attention.self.key"),
    ("encoder.layer.0.output.dense.bias", "encoder.layer.0.output.dense.bias"),
    ("encoder.layer.0.output.LayerNorm.weight", "encoder.layer.0.output.LayerNorm.weight"),
    ("embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight"),
    ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight, row 5"),
])
def test_weights_that_are_not_finite_are_named(name, named, value, tiny):
    def edit(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][5] = value

    with pytest.raises(ValueError) as error:
        tiny("bert", edit=edit)[0]([[4, 5, 6]])
    assert named in str(error.value)
    with pytest.raises(ValueError) as error:
        quantize(tiny("bert", edit=edit)[0], "w8a8+e8")([[4, 5, 6]])
    assert named.partition(",")[0] in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mamba"}, "model_type 'mamba' is not known; known: bert, distilbert, gpt2, gpt_neox, llama, mistral"),
    ({"model_type": None}, "model_type None is not known"),
    ({"hidden_act": "mish"}, "hidden_act is 'mish'; known: gelu, gelu_new"),
    ({"num_attention_heads": 5}, "48 hidden units do not divide into 5 heads"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; expected a number"),
    ({"hidden_size": 0}, "hidden_size is 0; expected a positive"),
    ({"position_embedding_type": "relative_key"}, "relative_key"),
    ({"is_decoder": True}, "is_decoder"),
])
def test_configurations_that_are_refused(change, message, tiny):
    with pytest.raises(FormatError, match=message) as error:
        tiny("bert", change=change)
    assert "config.json" in str(error.value)


def test_directories_that_are_refused(tmp_path):
    with pytest.raises(FormatError, match="no such directory"):
        load(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="file: is a file; expected a directory"):
        load(tmp_path / "file")
    with pytest.raises(FormatError, match="config.json: no such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(FormatError, match="expected a JSON object, got list"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not readable as JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(FormatError, match="model.safetensors"):
        load(tmp_path)
    write(tmp_path, {"model_type": "bert"}, tensors_of("bert"))
    with pytest.raises(FormatError, match="config.json: hidden_size is missing"):
        load(tmp_path)


def test_without_embeddings(tmp_path):
    tensors = {n: a for n, a in tensors_of("bert", head=True).items() if "embeddings" not in n}
    write(tmp_path, config_of("bert", head=True), tensors)
    with pytest.raises(FormatError, match="missing tensors: bert.embeddings.word_embeddings"):
        load(tmp_path)
    model = load(tmp_path, embeddings=False)
    assert model.embeddings == {} and model.word_embeddings is None
    assert model(embeddings=np.ones((1, 4, HIDDEN), np.float32)).shape == (1, LABELS)
    with pytest.raises(ValueError, match="loaded without embeddings"):
        model([[1, 2]])


# -- the object

def test_replace_shares_and_checks(tiny):
    model, _, _ = tiny("bert")
    name = "encoder.layer.0.output.dense"
    layer = model.linears[name].with_weight(np.zeros((HIDDEN, 80), np.float32))
    other = model.replace(linears={name: layer})
    assert other.linears[name] is layer and model.linears[name] is not layer
    assert other.linears["pooler.dense"] is model.linears["pooler.dense"]
    assert other.word_embeddings is model.word_embeddings
    assert not np.array_equal(other([[5, 6]]), model([[5, 6]]))
    with pytest.raises(ValueError, match="no such linear layer: fc"):
        model.replace(linears={"fc": layer})
    with pytest.raises(ValueError, match=r"expected shape \(48, 48\), got \(48, 80\)"):
        model.replace(linears={"pooler.dense": layer})
    with pytest.raises(ValueError, match="no such embedding table: x"):
        model.replace(embeddings={"x": np.zeros((1, 1), np.float32)})
    with pytest.raises(TypeError, match="known"):
        model.replace(colour=1)


def test_weights_are_mapped(tiny):
    model, _, _ = tiny("bert")
    for array in (model.word_embeddings, model.linears["encoder.layer.0.output.dense"].weight):
        assert not array.flags.owndata and not array.flags.writeable


def test_repr_counts_and_pickles(kind, tiny):
    model, tensors, _ = tiny(kind, head=True)
    assert model.parameters == sum(a.size for a in tensors.values())
    assert model.nbytes == sum(a.nbytes for a in tensors.values())
    text = repr(model)
    assert text.startswith({"bert": "BERT(", "distilbert": "DistilBERT("}.get(kind, "RoBERTa("))
    assert f"{LAYERS} layers, hidden {HIDDEN}, 3 heads, {LABELS} labels" in text
    assert next(iter(model.linears)).startswith(PREFIX[kind])
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copy([[5, 6, 7]]), model([[5, 6, 7]]))
    assert model.tokenizer is None


def test_many_threads(tiny):
    from concurrent.futures import ThreadPoolExecutor

    model, _, _ = tiny("bert")
    ids, mask = batch("bert")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: model(ids, mask), range(16)))
    assert all(np.array_equal(r, results[0]) for r in results)


def test_rows_of_tables():
    table = np.arange(12, dtype=np.float16).reshape(4, 3)
    assert rows(table, np.array([3, 0])).tolist() == [[9, 10, 11], [0, 1, 2]]
    assert rows(table.astype(np.float32), np.array([1])).flags.owndata


# -- a real model, without its embedding table

def test_bert_tiny_sst2_logits():
    directory = SHARED / "models" / "bert-tiny-sst2-encoder"
    if not directory.is_dir():
        pytest.skip("no shared/models/bert-tiny-sst2-encoder (set ZQUANT_SHARED)")
    from safetensors.numpy import load_file

    model = load(directory, weights="encoder.safetensors", embeddings=False)
    expected = model.config["expected_logits_true_layernorm"]
    inputs = load_file(directory / "embedding_inputs.safetensors")
    assert len(expected) == len(inputs) == 3
    for name, logits in expected.items():
        x = next(array for key, array in inputs.items() if key.startswith(name))
        assert np.abs(model(embeddings=x[None])[0] - logits).max() <= 1e-4
