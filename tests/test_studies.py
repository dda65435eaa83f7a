"""sensitivity and compare_methods: figures against quantizing by hand, tables, pictures, files, Ctrl-C; their commands."""
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from test_calibrate import decoder, encoder, ids_of
from test_cli import call

import zquant as zq
from zquant.losses import PerplexityLoss, loss_for
from zquant.methods import GPTQ, STEPS, Transform
from zquant.quantize import Quantizer
from zquant.sensitivity import BLOCKS, MODES, sensitivity_class
from zquant.tables import html_table, page, text_table, write_text

TINY = Path(__file__).parent / "data" / "tiny-llama-5m"
TEXT = ("Once upon a time there was a small house by the sea. Tom and Lily went to the park. They saw a big dog, and the dog "
        "was happy. The sun was warm. Lily had a red ball. She threw the ball and the dog ran to get it. ") * 4
OTHER = "The cat sat on the mat and looked at the birds in the tree. One day a boy found a key under a stone. " * 6


def documents(seed=5):
    return ids_of(6, 30, seed=seed)


@dataclass(frozen=True)
class Failing(Transform):
    def transform(self, model, statistics, scheme):
        raise RuntimeError("no such luck")


# -- sensitivity

@pytest.mark.parametrize("increase, rank", [(-1, 1), (0, 1), (0.1, 1), (0.1000001, 2), (0.5, 2), (0.5000001, 3), (np.inf, 3),
                                            (np.nan, 3)])
def test_the_paper_s_classes(increase, rank):
    assert sensitivity_class(increase) == rank


def by_hand(lm, mode, names):
    """The float model with some layers quantized, from quantize itself."""
    small = dict(zq.quantize(lm, "w3a8" if mode == "both" else "w3a16").named_linears())
    return lm.replace(linears={name: small[name] for name in names})


@pytest.mark.parametrize("mode", ["weights", "both"])
def test_findings_are_what_quantizing_by_hand_gives(tmp_path, mode):
    lm, ids = decoder(tmp_path), documents()
    found = zq.sensitivity(lm, ids, "w3a8", seq_len=30)
    assert found.reference == zq.perplexity(lm, ids, 30).ppl and found.metric == "perplexity"
    names = [name for name, layer in zq.quantize(lm, "w8a8").named_linears() if layer.spec is not None]
    parts = {("all", "all"): names, ("layer", names[5]): [names[5]],
             ("kind", "query"): [name for name in names if name.endswith("q_proj")]}
    values = {(f.part, f.name): f for f in found.findings if f.mode == mode}
    for key, layers in parts.items():
        assert values[key].value == zq.perplexity(by_hand(lm, mode, layers), ids, 30).ppl
        assert values[key].increase == values[key].value - found.reference
    assert list(found.increases("layer", mode)) == names
    assert found.sums()[mode] == pytest.approx(sum(found.increases("layer", mode).values()))


def test_activations_alone(tmp_path):
    """Of weights that 8 bits hold exactly, quantizing both is quantizing the activations."""
    lm, ids = decoder(tmp_path), documents()
    linears = {name: layer.with_weight(layer.dense()) for name, layer in zq.quantize(lm, "w8a8").named_linears()}
    lm = lm.replace(linears=linears)
    found = zq.sensitivity(lm, ids, "w8a8", parts=["all", "layer"], seq_len=30)
    for part in ("all", "layer"):
        weights, activations, both = (np.array(list(found.increases(part, mode).values())) for mode in MODES)
        assert np.abs(weights).max() < 0.01 * np.abs(both).max()
        np.testing.assert_allclose(activations, both, atol=0.02 * np.abs(both).max())
        assert np.abs(activations).max() > 1e-3


def test_block_sizes(tmp_path):
    lm, ids = decoder(tmp_path), documents()
    found = zq.sensitivity(lm, ids, "w3a8-g16", parts=["blocks"], seq_len=30)
    assert [b.size for b in found.blocks] == [None, 64, 32] and BLOCKS[-2:] == (64, 32) and not found.findings
    for block in found.blocks:
        scheme = zq.Scheme("x", zq.QuantSpec(3) if block.size is None else
                           zq.QuantSpec(3, granularity="group", group_size=block.size))
        assert block.value == zq.perplexity(zq.quantize(lm, scheme), ids, 30).ppl
    bits = [b.bits for b in found.blocks]
    assert all(a < b for a, b in zip(bits, bits[1:])) and 3 < bits[0] < bits[-1] <= 3 + 32 / 32 + 32 / 48


def test_encoders_have_no_classes(tmp_path):
    rows = [row.tolist() for row in ids_of()]
    found = zq.sensitivity(encoder(tmp_path), rows, "w4a8", parts=["all", "kind"])
    assert found.metric == "cosine to float32" and found.reference == 1
    assert all(f.increase == pytest.approx(1 - f.value) and 0 < f.increase < 0.5 for f in found.findings if f.part == "all")
    assert "[" not in repr(found) and all(f["class"] is None for f in found.as_dict()["findings"])


def test_a_solver_and_float_activations(tmp_path):
    lm, ids = decoder(tmp_path), documents()
    found = zq.sensitivity(lm, ids, "w3a16", method=GPTQ(), calib=documents(9), parts="all", seq_len=30)
    assert [(f.part, f.mode) for f in found.findings] == [("all", "weights")] and found.method == "gptq"
    small = zq.quantize(lm, "w3a16+e32", GPTQ(), calib=documents(9), mode="parallel")
    assert found.findings[0].value == zq.perplexity(small, ids, 30).ppl


def test_sensitivity_as_text_html_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = zq.sensitivity(decoder(tmp_path), documents(), "w3a8", seq_len=30)
    rank = sensitivity_class(found.increases("all", "both")["all"])
    line = next(line for line in repr(found).splitlines() if line.startswith("all layers"))
    assert line.endswith(f"[{rank}]") and "sum over the layers" in repr(found) and "one row" in repr(found)
    assert "<table>" in found._repr_html_() and "model.layers.0.self_attn.q_proj" in found._repr_html_()
    found.save_json(tmp_path / "s.json")
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["sums"] == found.sums() and len(data["findings"]) == 3 * (1 + 6 + 21) and data["interrupted"] is False
    figure = found.plot()
    assert len(figure.axes) == 3 and len(figure.axes[0].lines[0].get_xdata()) == 21


@pytest.mark.parametrize("options, message", [
    (dict(parts=["rows"]), "unknown rows; known: all, kind"), (dict(method="failing"), "changes the float model"),
    (dict(method="gptq"), "needs gram"), (dict(scheme="w9"), "unknown scheme"),
    (dict(scheme=zq.Scheme("none")), "quantizes no layer")])
def test_wrong_calls_of_sensitivity(tmp_path, monkeypatch, options, message):
    monkeypatch.setitem(STEPS, "failing", Failing)
    with pytest.raises(ValueError, match=message):
        zq.sensitivity(decoder(tmp_path), documents(), **{"seq_len": 30, **options})


def interrupt_after(monkeypatch, count):
    """Ctrl-C when the loss is computed for the count-th time."""
    real, calls = PerplexityLoss.__call__, []

    def loss(self, model):
        calls.append(model)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(self, model)

    monkeypatch.setattr(PerplexityLoss, "__call__", loss)


def test_sensitivity_keeps_what_it_has_on_ctrl_c(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    lm = decoder(tmp_path)
    interrupt_after(monkeypatch, 4)
    found = zq.sensitivity(lm, documents(), "w3a8", seq_len=30)
    assert found.interrupted and len(found.findings) == 2 and not found.blocks and "interrupted" in repr(found)
    assert found.plot() is not None and json.loads(found.to_json())["interrupted"]


# -- compare_methods

def test_rows_are_what_quantizing_by_hand_gives():
    pytest.importorskip("tokenizers")
    lm = zq.load(TINY)
    table = zq.compare_methods(lm, {"plain": "rtn", "solved": GPTQ(), "eight": ("w8a8", "zeroquant")}, OTHER, TEXT,
                               scheme="w3a16")
    assert [(r.name, r.scheme) for r in table.results] == [("plain", "w3a16"), ("solved", "w3a16"), ("eight", "w8a8")]
    for name, scheme, method in (("plain", "w3a16", "rtn"), ("solved", "w3a16", GPTQ()), ("eight", "w8a8", "rtn")):
        small, row = zq.quantize(lm, scheme, method, calib=OTHER), table[name]
        assert row.value == zq.perplexity(small, TEXT).ppl and row.nbytes == small.nbytes and row.seconds > 0
        assert row.increase == row.value - table.reference and not row.error and row.peak_bytes >= 0
    share = 1 - table["solved"].increase / table["plain"].increase
    assert table["solved"].recovered == pytest.approx(share) and table["plain"].recovered is None
    assert f"{100 * share:.0f} %" in repr(table)


def test_what_is_recovered_does_not_depend_on_the_order():
    pytest.importorskip("tokenizers")
    methods = {"better": ("w3a16", "lorc"), "plain": ("w3a16", "rtn")}
    table = zq.compare_methods(zq.load(TINY), methods, None, documents(), seq_len=30)
    assert [r.name for r in table] == list(methods) and len(table) == 2
    assert table["better"].recovered == 1 - table["better"].increase / table["plain"].increase
    with pytest.raises(KeyError, match="'none' is not among better, plain"):
        table["none"]


def test_losses_without_a_number_are_written(tmp_path):
    table = zq.compare_methods(decoder(tmp_path), ["rtn"], None, documents(), seq_len=30)
    worse = replace(table, results=(replace(table["rtn"], value=np.inf, increase=np.inf), replace(table["rtn"], value=np.nan)))
    assert [r["value"] for r in json.loads(worse.to_json())["results"]] == ["inf", "nan"]


def test_round_to_nearest_is_added_to_each_scheme(tmp_path):
    table = zq.compare_methods(decoder(tmp_path), ["gptq", ("w3a8", "gptq"), ("w3a8", "gptq+lorc"), "zeroquant"], documents(9),
                               documents(), seq_len=30)
    assert [(r.name, r.scheme) for r in table.results] == [
        ("rtn", "w4a16"), ("gptq", "w4a16"), ("rtn", "w3a8"), ("gptq", "w3a8"), ("gptq+lorc", "w3a8"), ("zeroquant", "w8a8")]


def test_schemes_of_one_name_have_baselines_of_their_own():
    pytest.importorskip("tokenizers")
    mixed = zq.Scheme.parse("w3a16").with_overrides({"*down_proj": "float"})
    table = zq.compare_methods(zq.load(TINY), [("w3a16", "gptq"), (mixed, "gptq")], OTHER, TEXT)
    plain = [r for r in table.results if r.name == "rtn"]
    assert len(plain) == 2 and plain[0].value != plain[1].value
    assert table.results[3].recovered == pytest.approx(1 - table.results[3].increase / plain[1].increase)


def test_a_failed_recipe_is_a_row(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(STEPS, "failing", Failing)
    table = zq.compare_methods(decoder(tmp_path), ["rtn", "failing", "gptq", ("w4a8", "llm.int8")], None, documents(),
                               scheme="w8a8", seq_len=30)
    assert table["rtn"].value and table["failing"].value is None and table["failing"].error == "RuntimeError: no such luck"
    assert "needs gram" in table["gptq"].error and "8-bit" in table["llm.int8"].error or "absmax" in table["llm.int8"].error
    assert "failing (w8a8) failed: RuntimeError: no such luck" in repr(table) and "no such luck" in table._repr_html_()
    assert any("failed" in note.get_text() for note in table.plot().axes[0].texts)
    json.loads(table.to_json())


def test_results_are_kept_on_ctrl_c(tmp_path, monkeypatch):
    lm, real = decoder(tmp_path), Quantizer.finish

    def finish(self):
        if self.recipe.name == "gptq":
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Quantizer, "finish", finish)
    table = zq.compare_methods(lm, ["rtn", "gptq", "lorc"], documents(9), documents(), scheme="w4a8", seq_len=30)
    assert table.interrupted and [r.name for r in table.results] == ["rtn"] and "interrupted" in repr(table)


@pytest.mark.parametrize("methods, evaluation, error, message", [
    ([], 1, ValueError, "methods: expected"), ("gptq", 1, ValueError, "methods: expected"),
    (GPTQ(), 1, ValueError, "methods: expected"), (zq.PRESETS["awq"], 1, ValueError, "methods: expected"),
    (["gptqq"], 1, ValueError, "unknown"),
    ({"a": ("w8a8", "rtn+gptq")}, 1, ValueError, "both turn"), (["rtn"], None, ValueError, "evaluation: expected"),
    ({"a": 3}, 1, TypeError, "int")])
def test_wrong_calls_of_compare_methods(tmp_path, methods, evaluation, error, message):
    with pytest.raises(error, match=message):
        zq.compare_methods(decoder(tmp_path), methods, None, evaluation and documents(), seq_len=30)


def test_methods_as_html_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    table = zq.compare_methods(decoder(tmp_path), {"a<b": "rtn", "g": "gptq"}, documents(9), documents(), scheme="w3a16",
                               seq_len=30)
    table.save_html(tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text()
    assert text.startswith("<!DOCTYPE html>") and "a&lt;b" in text and "a<b" not in text
    axes = table.plot().axes[0]
    ends = {line.get_xdata()[-1] for line in axes.lines}
    assert {r.increase for r in table.results} <= ends
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a<b", "g"]


# -- losses and tables

def test_correlation_and_fidelity_of_an_encoder(shared):
    pytest.importorskip("tokenizers")
    from zquant.demo_model import find_minilm
    from zquant.demo_sentences import PAIRS, SENTENCES
    from zquant.evaluate import Pairs

    try:
        enc = zq.SentenceEncoder(find_minilm())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pairs = Pairs(*zip(*[(a, b, float(i)) for i, (a, b) in enumerate(p[:2] for p in PAIRS)]))
    loss, small = loss_for(enc, pairs), zq.quantize(enc, "w4a8")
    assert loss.name == "Spearman x 100" and loss.reference == 100 * zq.sts(enc, pairs).spearman
    assert loss.increase(loss(small)) == loss.reference - 100 * zq.sts(small, pairs).spearman
    cosine = loss_for(enc, SENTENCES[:8])
    assert cosine(small) == zq.cosine_fidelity(enc.encode(SENTENCES[:8]), small.encode(SENTENCES[:8])).mean()
    with pytest.raises(ValueError, match="non-empty"):
        loss_for(enc, "one text")


def test_text_and_html_tables():
    assert text_table(["a", "bb"], [["x", "1"], ["long", "22"]]).splitlines() == ["a     bb", "x      1", "long  22"]
    assert "&amp;" in html_table(["a&b"], []) and page("t<", "<p>").count("<p>") == 1


def test_an_interrupted_file_does_not_appear(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("zquant.tables.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "text")
    assert list(tmp_path.iterdir()) == []


# -- commands

@pytest.fixture
def texts(tmp_path):
    paths = tmp_path / "text.txt", tmp_path / "calibration.txt"
    for path, text in zip(paths, (TEXT, OTHER)):
        path.write_text(text, encoding="utf-8")
    return paths


def test_sweep(tmp_path, texts, capsys):
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    text, calib = texts
    files = [tmp_path / f"out.{kind}" for kind in ("json", "png", "html")]
    code, out, err = call(capsys, "sweep", TINY, "--methods", "rtn,gptq", "--schemes", "w4a16,w3a16", "--calib", calib,
                          "--text", text, "--json", files[0], "--plot", files[1], "--html", files[2])
    assert code == 0, err
    rows = json.loads(files[0].read_text())["results"]
    assert [(r["name"], r["scheme"]) for r in rows] == [(m, s) for s in ("w4a16", "w3a16") for m in ("rtn", "gptq")]
    for row in rows:
        assert any(row["scheme"] in line and f"{row['value']:.2f}" in line for line in out.splitlines())
    assert rows[0]["value"] == zq.perplexity(zq.quantize(zq.load(TINY), "w4a16"), text).ppl
    assert files[1].read_bytes().startswith(b"\x89PNG") and "gptq" in files[2].read_text()


def test_sensitivity_command(tmp_path, texts, capsys):
    pytest.importorskip("tokenizers")
    code, out, err = call(capsys, "sensitivity", TINY, "--text", texts[0], "--parts", "all,kind", "--max-tokens", 100, "--json",
                          tmp_path / "s.json")
    assert code == 0, err
    data = json.loads((tmp_path / "s.json").read_text())
    assert {f["part"] for f in data["findings"]} == {"all", "kind"} and "feed-forward out" in out


def test_quantize_takes_recipes_and_presets(tmp_path, texts, capsys):
    pytest.importorskip("tokenizers")
    code, out, err = call(capsys, "quantize", TINY, "-o", tmp_path / "a", "--method", "gptq+lorc", "--scheme", "w4a16-g64",
                          "--calib", texts[1])
    assert code == 0 and "w4a16-g64" in out, err
    assert zq.load(tmp_path / "a").recipe == zq.Recipe.of("gptq+lorc")
    code, out, _ = call(capsys, "quantize", TINY, "-o", tmp_path / "b", "--method", "zeroquant-v2", "--calib", texts[1])
    assert code == 0 and zq.load(tmp_path / "b").scheme == zq.PRESETS["zeroquant-v2"].scheme


@pytest.mark.parametrize("argv, code, message", [
    (["quantize", TINY, "-o", "x", "--method", "rtn+gptq"], 2, "both turn weights"),
    (["quantize", TINY, "-o", "x", "--method", "none"], 2, "known: .*gptq"),
    (["sweep", TINY, "--methods", "rtn"], 2, "one of the arguments --text --sentences --sts is required"),
    (["sweep", TINY, "--methods", "rtn,none", "--text", "t"], 2, "known: "),
    (["sweep", TINY, "--methods", "rtn", "--text", "none.txt"], 1, "No such file"),
    (["sweep", TINY, "--methods", "rtn", "--schemes", "w9", "--text", "t"], 2, "unknown scheme"),
    (["sensitivity", TINY, "--text", str(TINY / "config.json"), "--parts", "rows"], 1, "unknown rows"),
    (["sensitivity", TINY, "--sentences", str(TINY / "config.json")], 1, "measured on --text"),
])
def test_wrong_commands(argv, code, message, capsys, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    got, _, err = call(capsys, *argv)
    assert got == code and re.search(message, err), err


def test_a_sweep_that_is_interrupted_or_fails(texts, capsys, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(STEPS, "failing", Failing)
    argv = ["sweep", TINY, "--text", texts[0], "--schemes", "w8a8", "--methods"]
    code, out, err = call(capsys, *argv, "failing,rtn")
    assert code == 1 and "no such luck" in out and "1 of 2 methods failed" in err
    interrupt_after(monkeypatch, 3)
    code, out, err = call(capsys, *argv, "rtn,lorc")
    assert code == 130 and "rtn" in out and "interrupted" in out and "interrupted" in err
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules["zquant.compare_methods"], "quantize", lambda *_, **__: 1 / 0)
    code, out, err = call(capsys, *argv, "rtn")
    assert code == 1 and "every method failed" in err and "ZeroDivisionError" in out


@pytest.mark.parametrize("command", ["sweep", "sensitivity", "quantize"])
def test_help_has_examples(command, capsys):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and f"  zquant {command} " in out and "schemes:" in out
