"""Reports against sums written out here, on a small NumPy model; planted faults must show."""

import json
import math

import numpy as np
import pytest
import tiny_models
from fakes import Encoder, Linear, Model

from zquant.evaluate import sqnr_db
from zquant.report import KINDS, LayerError, Report, compare, layer_kind, speeds

SENTENCES = [
    "the cat sat on the mat",
    "rain",
    "a",
    "quantization is rounding with a plan",
    "seven words make up this short sentence",
]


def outputs(model, sentences):
    """Every layer's outputs of one forward without batches or micro-batches."""
    found = {}
    whole = Model(model.linears, rows=10**6)
    ids = Encoder(model).tokenize(sentences)
    whole(ids, tap=lambda name, x, y: found.__setitem__(name, y))
    return found


@pytest.fixture(scope="module")
def pair():
    model = Model.make()
    return Encoder(model), Encoder(model.quantized())


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_layers(pair, batch_size):
    encoder, quantized = pair
    report = compare(encoder, quantized, SENTENCES, batch_size=batch_size, rounds=0)
    assert [x.name for x in report.layers] == [*Model.names, "pooler.dense"]
    before, after = outputs(encoder.model, SENTENCES), outputs(quantized.model, SENTENCES)
    for layer in report.layers[:-1]:
        weights = [e.model.linears[layer.name].weight for e in pair]
        assert layer.weight_db == pytest.approx(sqnr_db(*weights), abs=1e-9)
        assert layer.output_db == pytest.approx(sqnr_db(before[layer.name], after[layer.name]), abs=1e-3)
        assert layer.weights == "int8, per channel"
    pooler = report.layers[-1]
    assert (pooler.weights, pooler.weight_db, pooler.output_db) == ("float32", math.inf, None)  # it never runs
    assert [x.output_db for x in report.worst[:-1]] == sorted(x.output_db for x in report.layers[:-1])
    assert report.worst[-1] is pooler


def test_fidelity_and_size(pair):
    encoder, quantized = pair
    report = compare(encoder, quantized, SENTENCES, rounds=0)
    a, b = encoder.encode(SENTENCES).astype(float), quantized.encode(SENTENCES).astype(float)
    expected = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(report.cosine, expected, atol=1e-12)
    assert 0.9 < report.min_cosine <= report.mean_cosine < 1
    assert report.rows == "sentences" and report.scheme == "w8a8"
    assert (report.bytes_before, report.bytes_after) == (encoder.model.nbytes, quantized.model.nbytes)
    assert report.rate_before is None and report.speedup is None


def test_equal_models(pair):
    report = compare(pair[0], pair[0], SENTENCES, rounds=0)
    assert all(x.weight_db == math.inf and x.output_db in (math.inf, None) for x in report.layers)
    assert report.min_cosine == pytest.approx(1.0)
    assert "exact" in str(report) and report.scheme == "float32"
    json.loads(report.to_json())
    pytest.importorskip("matplotlib")
    report.plot()


def test_a_planted_fault_is_the_worst_layer():
    model = Model.make()
    bad = Model.names[-1]
    quantized = model.quantized(step=1 / 1024)
    weight = quantized.linears[bad].weight.copy()
    weight[3] *= -1
    quantized.linears[bad] = Linear(bad, weight, spec="int8, per channel")
    report = compare(Encoder(model), Encoder(quantized), SENTENCES, rounds=0)
    assert report.worst[0].name == bad
    assert min(report.layers, key=lambda x: x.weight_db).name == bad
    first = [x.output_db for x in report.layers[:3]]  # nothing before the fault is touched by it
    clean = compare(Encoder(model), Encoder(model.quantized(step=1 / 1024)), SENTENCES, rounds=0)
    assert first == [x.output_db for x in clean.layers[:3]]


def test_bare_models_compare_tokens():
    model = Model.make()
    ids = Encoder(model).tokenize(SENTENCES)
    report = compare(model, model.quantized(), ids, rounds=1, batch_size=2)
    assert report.rows == "tokens" and len(report.cosine) == sum(map(len, ids))
    assert report.speedup > 0


def test_memory_is_one_batch():
    """The outputs of at most one batch are alive at a time."""
    from zquant import report as module

    model = Model.make(rows=10**6)
    noise, alive = module._OutputNoise(), []
    keep = noise.keep
    noise.keep = lambda name, x, y: (
        keep(name, x, y),
        alive.append(sum(len(a) for q in noise.reference.values() for a in q)),
    )
    batches = list(module._batches([np.zeros(400, int)] * 9, 32))
    assert [len(b) for b in batches] == [2, 2, 2, 2, 1]
    module._OutputNoise, original = lambda: noise, module._OutputNoise
    try:
        module._output_noise(model, model.quantized(), batches, False)
    finally:
        module._OutputNoise = original
    assert max(alive) == 800 * len(Model.names) and not noise.reference


def test_refusals(pair):
    encoder, quantized = pair
    for bad in ([], "one string"):
        with pytest.raises(ValueError, match="non-empty sequence"):
            compare(encoder, quantized, bad)
    fewer = Model({n: x for n, x in quantized.model.linears.items() if n != Model.names[1]})
    with pytest.raises(ValueError, match=f"missing {Model.names[1]}"):
        compare(encoder, Encoder(fewer), SENTENCES)
    with pytest.raises(ValueError, match=f"extra {Model.names[1]}"):
        compare(Encoder(fewer), encoder, SENTENCES)
    other = Model({**quantized.model.linears, Model.names[0]: Linear(Model.names[0], np.ones((13, 8), np.float32))})
    with pytest.raises(ValueError, match=rf"{Model.names[0]} is \(13, 8\), expected \(12, 8\)"):
        compare(encoder, Encoder(other), SENTENCES)


def test_micro_batches_that_differ_are_an_error():
    model = Model.make(rows=5)
    quantized = model.quantized()
    quantized.rows = 7
    with pytest.raises(ValueError, match="output shapes differ"):
        compare(Encoder(model), Encoder(quantized), SENTENCES, rounds=0)


def test_speeds_takes_turns():
    order = []
    runs = [lambda i=i: order.append(i) for i in range(3)]
    rates, ratios = speeds(runs, count=10, rounds=3)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert len(rates) == len(ratios) == 3 and ratios[0] == 1.0
    with pytest.raises(ValueError, match="rounds"):
        speeds(runs, 1, 0)


def test_kinds():
    names = {
        "encoder.layer.11.attention.self.query": "query",
        "bert.encoder.layer.0.attention.self.key": "key",
        "roberta.encoder.layer.3.attention.self.value": "value",
        "encoder.layer.0.attention.output.dense": "attention out",
        "encoder.layer.0.intermediate.dense": "feed-forward in",
        "encoder.layer.0.output.dense": "feed-forward out",
        "transformer.layer.2.attention.q_lin": "query",
        "transformer.layer.2.attention.out_lin": "attention out",
        "transformer.layer.2.ffn.lin1": "feed-forward in",
        "transformer.layer.2.ffn.lin2": "feed-forward out",
        "transformer.h.7.attn.c_attn": "attention in",
        "transformer.h.7.attn.c_proj": "attention out",
        "transformer.h.7.mlp.c_proj": "feed-forward out",
        "model.layers.30.self_attn.o_proj": "attention out",
        "model.layers.30.mlp.gate_proj": "feed-forward in",
        "classifier.out_proj": "other",
        "pre_classifier": "other",
    }
    assert {name: layer_kind(name) for name in names} == names
    assert set(names.values()) == set(KINDS)


@pytest.mark.parametrize("head", [False, True], ids=["hidden", "logits"])
@pytest.mark.parametrize("kind", tiny_models.FAMILIES)
def test_real_models_of_every_family(kind, head, tmp_path):
    pytest.importorskip("safetensors")
    from zquant import load, quantize

    path = tiny_models.write(tmp_path, tiny_models.config_of(kind, head), tiny_models.tensors_of(kind, head))
    model = load(path)
    ids = [row[: 3 + 2 * i] for i, row in enumerate(tiny_models.batch(kind)[0])]
    report = compare(model, quantize(model, "w8a8"), ids, rounds=1, batch_size=2)
    assert (report.rows, len(report.cosine)) == (("sentences", 5) if head else ("tokens", sum(map(len, ids))))
    blocks = [x for x in report.layers if x.block is not None]
    assert len(blocks) == 12 and {x.kind for x in blocks} == set(KINDS) - {"attention in", "other"}
    assert all(x.weights == "int8, per channel" and 20 < x.output_db < 80 and 30 < x.weight_db < 60 for x in blocks)
    assert all((x.output_db is None) != head for x in report.layers if x.block is None)
    assert report.min_cosine > 0.99 and report.bytes_before > 2 * report.bytes_after


# --- how it looks ------------------------------------------------------------------------------------------------


def example(layers=12, name="encoder.layer.{}.output.dense"):
    errors = tuple(LayerError(name.format(i), "int8, per channel", 40.0 + i, 20.0 + i) for i in range(layers))
    return Report(
        "w8a8", errors, np.array([0.99, 1.0, 0.98]), "sentences", 90_000_000, 30_000_000, 800.0, 1600.0, 2.0, 2
    )


def test_text():
    text = str(example())
    assert text.splitlines()[:4] == [
        "w8a8: 12 linear layers",
        "  cosine to float32  mean 0.99000, min 0.98000 (3 sentences)",
        "  size               90.0 MB -> 30.0 MB (3.00x smaller)",
        "  sentences/s        800 -> 1600 (2.00x, 2 threads)",
    ]
    assert "encoder.layer.0.output.dense  int8, per channel    40.0    20.0" in text
    assert "... and 2 more" in text and "layer.11" not in text
    assert "layer.11" in example().table(None) and "more" not in example().table(None)
    assert max(map(len, text.splitlines())) <= 100


def test_html_is_escaped():
    page = example(3, "<script>.{}")._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;.2" in page and page.count("<tr>") == 3 + 1 + 3


def test_json(tmp_path):
    path = tmp_path / "report.json"
    report = example()
    report.save_json(path)
    data = json.loads(path.read_text())
    assert data["layers"][3] == {
        "name": "encoder.layer.3.output.dense",
        "kind": "feed-forward out",
        "weights": "int8, per channel",
        "weight_db": 43.0,
        "output_db": 23.0,
    }
    assert data["cosine"]["values"] == [0.99, 1.0, 0.98] and data["sentences_per_second"]["speedup"] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    exact = Report("x", (LayerError("a", "float32", math.inf, -math.inf),), np.ones(1), "tokens", 1, 1)
    assert exact.as_dict()["layers"][0]["weight_db"] == "inf" and exact.as_dict()["layers"][0]["output_db"] == "-inf"
    with pytest.raises(OSError):
        report.save_json(tmp_path / "none" / "report.json")


@pytest.mark.parametrize(
    "report", [example(), example(1), example(90), example(2, "head{}")], ids=["12", "1", "90", "heads"]
)
def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    figure = report.plot()
    left, right = figure.axes
    heights = sorted(p.get_height() for p in left.patches)
    assert heights == [x.output_db for x in report.worst]
    assert sum(p.get_height() for p in right.patches) == len(report.cosine)
    figure.savefig(tmp_path / "a.png")
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def test_bar_shows_after_the_delay_and_only_where_asked(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    from zquant import _progress

    assert list(_progress.bar(range(3), "work", True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # done before the delay
    monkeypatch.setattr(_progress, "DELAY", 0.0)
    assert list(_progress.bar(range(3), "work", None)) == list(_progress.bar(range(3), "work", False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # captured, hence not a terminal
    assert list(_progress.bar(range(3), "work", True)) == [0, 1, 2]
    assert "work" in capsys.readouterr().err
