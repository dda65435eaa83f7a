"""What bench_encoder.py and bench_decode.py say: n/a, marks, goals, shares. Rows and gates are faked, nothing is timed."""
from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parent / "bench"
W8A8, ATTN8, FP32 = "zquant w8a8", "zquant w8a8+attn8", "zquant fp32"
OPENVINO, ORT, CT2 = "openvino int8 nncf", "onnxruntime int8 dynamic", "ctranslate2 int8"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def encoder() -> Any:
    import bench_encoder

    return bench_encoder


@pytest.fixture
def decode() -> Any:
    import bench_decode

    return bench_decode


@pytest.fixture
def peers() -> Any:
    import peers

    return peers


def row(engine: str, case: str, value: float | None, gated: bool = True, threads: int = 1) -> dict[str, Any]:
    import harness

    unit = "1/s" if case == "STS" else "ms"
    return harness.row(f"minilm {engine} {case}", threads, value, unit, engine=engine, case=case, model="minilm", gated=gated)


class Turn:
    """An engine's process that gives these replies, one after the other."""

    def __init__(self, name: str, *replies: dict[str, Any]) -> None:
        self.name, self.replies, self.closed = name, list(replies), False
        self.hello = {"peak": {"int8": 100.0, "float": 25.0}}

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        return {"GB/s": 10.0} if do == "bandwidth" else self.replies.pop(0)

    def close(self) -> None:
        self.closed = True


def reply(seconds: float, gated: bool = True, reachable: bool = True, **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "kept": 1, "gated": gated, "reachable": reachable, **more}


def lines_of(text: str, first: str) -> list[list[str]]:
    """The cells of the lines that begin with this name."""
    return [line[len(first):].split() for line in text.splitlines() if line.startswith(first + "  ")]


# ---- two threads on one core --------------------------------------------------------------------------------
class FakeGate:
    """Its checks for a core per thread give these answers, the last one again and again; its samples take a second."""

    def __init__(self, *cores: bool, gated: bool = False) -> None:
        self.cores, self.gated, self.peak = list(cores), gated, {"int8": 200.0}

    def check(self) -> bool:
        return self.cores.pop(0) if len(self.cores) > 1 else self.cores[0]

    def measure(self, work: Callable[[], Any], seconds: float) -> Any:
        work()
        return SimpleNamespace(seconds=1.0, kept=1, faults=0.0, gated=self.gated)


def server(peers: Any, gate: FakeGate) -> Any:
    engine = SimpleNamespace(idle=0.0, run=lambda ids, mask: None, prefill=lambda ids: None, step=lambda token: None,
                             weight_bytes=8.0, cache_item=4, share_of_step=lambda ids: 0.25,
                             shares=lambda batches, gate: (({"products": 0.5}, True) for _ in batches))
    made = object.__new__(peers.Server)
    made.gate, made.engine, made.vocabulary = gate, engine, 100
    return made


@pytest.mark.parametrize(("before", "after", "reachable"), [(True, True, True), (False, True, False), (True, False, False)])
def test_every_sample_says_whether_the_threads_had_cores(peers: Any, before: bool, after: bool, reachable: bool) -> None:
    for ask in (lambda s: s.do_case(1, 4, 0.0), lambda s: s.do_prefill(4, 0.0), lambda s: s.do_decode(4, 0.0)):
        got = ask(server(peers, FakeGate(before, after)))
        assert (got["reachable"], got["gated"]) == (reachable, False)
        assert ask(server(peers, FakeGate(before, after, gated=True)))["reachable"], "slices beside whole peaks were kept"
    assert server(peers, FakeGate(before, after)).do_share_of_step(4)["reachable"] == reachable
    shares = server(peers, FakeGate(before, after, True)).do_shares([[1, 4], [2, 4]])["shares"]
    assert shares == [({"products": 0.5}, True) if there else None for there in (reachable, after)]


def test_whether_enough_slices_were_kept_is_the_gates_word(peers: Any, encoder: Any) -> None:
    """A call over 0.1 s needs one."""
    gate = FakeGate(True, gated=True)
    best: dict[Any, Any] = {}
    encoder.keep(best, Turn(W8A8), "1x4", server(peers, gate).do_case(1, 4, 0.0), "ms")
    assert best[W8A8, "1x4"] == {"value": 1000.0, "unit": "ms", "gated": True}


def test_any_value_is_better_than_none(peers: Any) -> None:
    best: dict[Any, Any] = {}
    for value, gated, kept in ((None, False, None), (5.0, False, 5.0), (None, False, 5.0), (7.0, True, 7.0), (6.0, False, 7.0)):
        peers.keep(best, ("e", "c"), {"value": value, "gated": gated}, larger=False)
        assert best["e", "c"]["value"] == kept


def test_encoder_figures_without_cores_are_none(encoder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args = SimpleNamespace(rounds=2, cases=[(1, 16), (1, 128)], seconds=0.0, limit=None)
    lost, there = reply(1e-3, False, False), reply(2e-3, False, True)
    ours = Turn(W8A8, lost, lost, lost, there)
    rows = encoder.measure([ours, Turn(OPENVINO, *[reply(4e-3)] * 4)], "minilm", 2, args, None)
    assert {(r["engine"], r["case"]): r["value"] for r in rows} == {
        (W8A8, "1x16"): None, (W8A8, "1x128"): 2.0, (OPENVINO, "1x16"): 4.0, (OPENVINO, "1x128"): 4.0}
    encoder.report(rows, "minilm", 2)
    text = capsys.readouterr().out
    assert lines_of(text, W8A8) == [["8", "bits", "n/a", "2~"]]
    assert lines_of(text, OPENVINO) == [["8", "bits", "4", "4"], ["8", "bits", "n/a", "2.00~"]]


def test_sentences_without_cores_are_none(encoder: Any) -> None:
    args = SimpleNamespace(rounds=1, cases=[], seconds=0.0, limit=None)
    for reachable, value in ((True, 50.0), (False, None)):
        turn = Turn(W8A8, reply(2.0, False, reachable, sentences=100, batches=4))
        (got,) = encoder.measure([turn], "minilm", 2, args, Path("x"))
        assert (got["case"], got["value"], got["unit"]) == ("STS", value, "1/s")


def test_decode_figures_without_cores_are_none(decode: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import decoders

    config = decoders.SHAPES["tiny-llama"]
    args = SimpleNamespace(rounds=2, limit=256, repeat=0, seconds=0.0)
    more = {"peak": {"int8": 100.0, "float": 25.0}, "weight_bytes": 8.0, "cache_item": 4}
    lost, there = reply(1.0, False, False, **more), reply(0.5, False, True, **more)
    turns = [Turn("zquant-lm w8a8", lost, lost, there, lost), Turn("llama.cpp q8_0", there, lost, there)]
    rows = decode.measure(turns, "tiny-llama", config, 2, args)
    assert not turns[0].replies and not turns[1].replies, "a long prompt is timed again only where it has no value"
    assert [r["value"] for r in rows] == [512.0, 512.0, None, 2.0]
    assert rows[2]["percent"] is None
    decode.report(rows, "tiny-llama, 2 threads")
    text = capsys.readouterr().out
    (ours,), (theirs,) = lines_of(text, "zquant-lm w8a8"), lines_of(text, "llama.cpp q8_0")
    assert ours[-1] == "n/a"
    assert ours[0] == theirs[0] == "512"
    assert theirs[-1].endswith("~")


def test_python_share_of_a_step_without_cores(decode: Any, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [Turn("zquant-lm w8a8", {"share": 0.03, "reachable": False}), Turn("llama.cpp q8_0")]
    (got,) = decode.shares(turns, "m", 2)
    assert got["value"] is None and all(t.closed for t in turns)
    assert "of a decode step: n/a" in capsys.readouterr().out


# ---- marks --------------------------------------------------------------------------------------------------
def test_ratios_carry_the_marks_of_both_sides(encoder: Any) -> None:
    for ours, theirs, said in ((True, True, "2.00"), (False, True, "2.00~"), (True, False, "2.00~")):
        assert encoder.ratio_cell(row(W8A8, "1x16", 1.0, ours), row(OPENVINO, "1x16", 2.0, theirs)) == said
    assert encoder.ratio_cell(row(W8A8, "STS", 6.0), row(OPENVINO, "STS", 2.0)) == "3.00", "more sentences are better"
    assert encoder.ratio_cell(row(W8A8, "1x16", None), row(OPENVINO, "1x16", 2.0, False)) == "n/a"
    assert encoder.ratio_cell(row(W8A8, "1x16", 1.0), None) == "-"


def test_decode_ratios_carry_marks(decode: Any) -> None:
    def goal(ours: float | None, theirs: dict[str, tuple[float | None, bool]]) -> dict[str, Any]:
        import harness

        rows = [harness.row(e, 1, v, "tok/s", engine=e, case="decode @64", gated=g)
                for e, (v, g) in {"zquant-lm w4a8 g64": (ours, ours is not None), **theirs}.items()]
        (found,) = decode.goals(rows, "llama-1.1b", 1)
        return found

    small, other, lost = "llama.cpp q4_0", "llama.cpp q4_k", (None, False)
    for ours, theirs, cell in ((30.0, {small: (20.0, False)}, "1.50~"), (None, {small: (20.0, True)}, "n/a"),
                               (30.0, {small: lost}, "n/a"), (30.0, {small: (20.0, True), other: lost}, "1.50~")):
        got = goal(ours, theirs)
        assert (decode.ratio_cell(got), decode.verdict(got)) == (cell, "not measured")
    got = goal(30.0, {small: (20.0, True)})
    assert (decode.ratio_cell(got), decode.verdict(got)) == ("1.50", "reached")


def test_each_of_our_engines_has_its_table_of_ratios(encoder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    times = {FP32: 6.0, W8A8: 2.0, ATTN8: 1.0, OPENVINO: 4.0, "openvino f32": 12.0, "torch bf16": 9.0, "openvino bf16": 3.0}
    encoder.report([row(e, "1x128", t) for e, t in times.items()], "minilm", 1)
    parts = capsys.readouterr().out.split(" is faster by the factor")
    assert [part.splitlines()[-1] for part in parts[:-1]] == [W8A8, ATTN8, FP32]
    for ours, text in zip((W8A8, ATTN8), parts[1:]):
        assert lines_of(text, OPENVINO) == [["8", "bits", f"{4.0 / times[ours]:.2f}"]]
        assert not lines_of(text, ours)
        assert lines_of(text, "torch bf16")[0][:2] == ["reduced-precision", "float"]
    assert lines_of(parts[3], "openvino f32") == [["float32", "2.00"]]
    assert lines_of(parts[3], "openvino bf16") == [["reduced-precision", "float", "0.50"]]
    assert not lines_of(parts[3], OPENVINO) and not lines_of(parts[3], W8A8), "only floats beside float32"


# ---- goals --------------------------------------------------------------------------------------------------
def goal(encoder: Any, name: str, rows: list[dict[str, Any]], model: str = "minilm", **cosines: float) -> dict[str, Any] | None:
    known = {W8A8: cosines["w8a8"]} if cosines else {}
    found = [g for g in encoder.goals(rows, model, 1, known) if g["name"].startswith(name) and g["name"].endswith(W8A8)]
    assert len(found) <= 1
    return found[0] if found else None


def against(engine: str, **ratios: float) -> list[dict[str, Any]]:
    """Rows in which W8A8 is as many times as fast as the engine, cases named c1x128 and so on."""
    cases = {case.removeprefix("c"): ratio for case, ratio in ratios.items()}
    return [r for case, ratio in cases.items()
            for r in (row(W8A8, case, 10.0), row(engine, case, 10.0 / ratio if case == "STS" else 10.0 * ratio))]


def test_a_goal_is_met_where_every_case_is(encoder: Any) -> None:
    rows = against(OPENVINO, c1x128=1.2, c32x16=1.16, c1x16=0.5, STS=0.5)
    assert goal(encoder, "M1 openvino int8, from", rows)["verdict"] == "met"
    got = goal(encoder, "M1 openvino int8, from", against(OPENVINO, c1x128=1.6, c32x128=1.1))
    assert (got["value"], got["must"], got["at"], got["verdict"]) == (pytest.approx(1.1), 1.15, "32x128", "mean")
    assert (got["unit"], got["mean"], got["cases"], got["of"]) == ("x", pytest.approx(math.sqrt(1.76)), 2, 2)
    assert goal(encoder, "M1 openvino int8, from", against(OPENVINO, c1x128=1.1, c8x256=1.1))["verdict"] == "missed"
    assert goal(encoder, "M1 openvino int8, STS", against(OPENVINO, STS=1.24))["verdict"] == "missed"
    assert goal(encoder, "M1 openvino int8, STS", against(OPENVINO, STS=1.26))["verdict"] == "met"
    assert goal(encoder, "M1", against(ORT, c1x128=3.0)) is None, "its peer did not run"


def test_marked_cases_do_not_judge(encoder: Any) -> None:
    rows = against(OPENVINO, c1x128=1.2, c8x256=0.9)
    rows[-1]["gated"] = False
    got = goal(encoder, "M1", rows)
    assert (got["verdict"], got["cases"], got["of"], got["at"]) == ("met where measured", 1, 2, "1x128")
    rows[0]["gated"] = False
    got = goal(encoder, "M1", rows)
    assert (got["verdict"], got["gated"], got["value"]) == ("not measured", False, pytest.approx(0.9))
    rows[0]["value"] = rows[-1]["value"] = None
    assert (goal(encoder, "M1", rows)["value"], goal(encoder, "M1", rows)["verdict"]) == (None, "not measured")


def test_int8_goals_are_for_models_that_are_close_enough(encoder: Any) -> None:
    rows = against(OPENVINO, c1x128=1.2)
    assert goal(encoder, "M1", rows, w8a8=0.9985)["verdict"] == "met"
    assert goal(encoder, "M1", rows, w8a8=0.997)["verdict"] == "missed: cosine 0.9970"
    assert goal(encoder, "M1", rows, model="tiny")["must"] is None, "only what is reported has goals"


@pytest.mark.parametrize(("engine", "name"), [(ORT, "M2 onnxruntime int8"), (CT2, "M2 ctranslate2 int8")])
def test_every_int8_peer_is_a_goal_of_its_own(encoder: Any, engine: str, name: str) -> None:
    assert goal(encoder, name, against(engine, c1x128=1.81, STS=1.81, c1x16=1.0))["verdict"] == "met"
    assert goal(encoder, name, against(engine, c1x128=1.9, STS=1.79))["verdict"] == "mean"


def test_the_best_peer_counts(encoder: Any) -> None:
    rows = [row(W8A8, "1x16", 1.0), row(OPENVINO, "1x16", 1.3), row("openvino bf16", "1x16", 1.21), row(ATTN8, "1x16", 0.1)]
    assert goal(encoder, "M3", rows)["value"] == pytest.approx(1.21)
    assert goal(encoder, "M3", rows)["verdict"] == "met"
    slow, close = row(CT2, "1x16", 4.7, False), row(CT2, "1x16", 2.0, False)
    assert goal(encoder, "M3", [*rows, slow])["verdict"] == "met", "a mark does not make that the best peer"
    assert goal(encoder, "M3", [*rows, close])["verdict"] == "not measured"
    assert goal(encoder, "M3", [*rows, row(CT2, "1x16", None, False)])["verdict"] == "not measured"
    floats = [row(FP32, "1x16", 1.0), row("openvino f32", "1x16", 1.2), row("torch fp32", "1x16", 5.0), *rows]
    (got,) = [g for g in encoder.goals(floats, "minilm", 1, {}) if g["name"].startswith("M4")]
    assert (got["value"], got["verdict"]) == (pytest.approx(1.2), "met"), "bfloat16 is no float32 peer"


def test_goals_are_printed(encoder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    encoder.print_goals([], 1)
    assert capsys.readouterr().out == ""
    rows = against(OPENVINO, c1x16=1.3, c1x128=1.0)
    rows[0]["gated"] = False
    encoder.print_goals(encoder.goals(rows, "minilm", 1, {}), 1)
    text = capsys.readouterr().out
    assert lines_of(text, f"M1 openvino int8, from 128 tokens: minilm {W8A8}") == [
        ["1.00", "1.00", "1.15", "missed", "1", "of", "1", "1x128"]]
    assert lines_of(text, f"M3 best peer, 1x16: minilm {W8A8}") == [
        ["1.30~", "1.30~", "1.2", "not", "measured", "0", "of", "1", "1x16"]]


# ---- what is outside of the products ------------------------------------------------------------------------
@pytest.mark.parametrize(("label", "must"), [("minilm", 35.0), ("bert-base", 25.0), ("tiny", None)])
def test_shares_are_judged_in_one_case(encoder: Any, label: str, must: float | None) -> None:
    def shares(engine: str, *found: tuple[dict[str, float], bool] | None) -> list[dict[str, Any]]:
        return encoder.shares(Turn(engine, {"shares": list(found)}), label, 2, [(1, 16), (32, 128)])

    parts = {"products": 0.7, "Python": 0.1, "quantization": 0.2}
    small, large = shares(W8A8, (parts, True), (parts, True))
    assert small["must"] is None and small["verdict"] == ""
    assert large["value"] == pytest.approx(30.0)
    assert (large["unit"], large["threads"], large["must"]) == ("%", 2, must)
    assert large["parts"] == {"products": 70.0, "quantization": 20.0, "Python": 10.0}
    assert large["verdict"] == {35.0: "met", 25.0: "missed", None: ""}[must]
    assert shares(FP32, (parts, True), (parts, True))[1]["must"] is None, "nothing is quantized there"
    lost, disturbed = shares(W8A8, (parts, True), None)[1], shares(W8A8, (parts, True), (parts, False))[1]
    assert lost["value"] is None and disturbed["value"] == pytest.approx(30.0)
    assert lost["verdict"] == disturbed["verdict"] == ("not measured" if must else "")


def test_shares_are_printed(encoder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"products": 0.72, "Python": 0.08, "quantization": 0.1996, "threads": 0.0004}
    encoder.print_shares([encoder.share_row("minilm", W8A8, "32x128", 2, *found, 35.0)
                          for found in ((parts, True), (None, False), (parts, False))])
    first, second, third = capsys.readouterr().out.splitlines()
    assert "layers 28.0 %~ (" in third and third.endswith("not measured")
    assert first == (f"# {W8A8} 32x128 2T: outside the linear layers 28.0 % (quantization 20.0, Python 8.0); "
                     "must be <= 35 %: met")
    assert second == f"# {W8A8} 32x128 2T: outside the linear layers n/a; must be <= 35 %: not measured"


def test_what_a_linear_layer_quantizes(peers: Any) -> None:
    x, q = np.zeros((3, 8), np.float32), np.zeros((3, 5), np.uint8)
    codes = (np.zeros((3, 8), np.uint8), np.ones(3, np.float32), np.zeros(3, np.int32))
    grid = (np.ones(1, np.float32), np.zeros(1, np.int32))
    out = (q, np.ones(3, np.float32), np.zeros(3, np.int32))
    y = np.zeros((3, 5), np.float32)
    assert peers.quantized((None, x, 0, 0, None, 0), y) == [], "float32 weights take float32 rows"
    assert peers.quantized((None, codes, 2, 0, None, 0), y) == [], "the norm before it made the codes"
    assert peers.quantized((None, x, 1, 0, None, 0), y) == [(3, 8, 1)]
    assert peers.quantized((None, x, 4, 0, None, 2), out) == [(3, 8, 2), (3, 5, 2)]
    assert peers.quantized((None, codes, 2, 2, None, grid), q) == [(3, 5, 2)]


def test_quantization_counts_outside_of_the_products(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of 10 units on a clock that only the faked work moves: 6 in linear_forward, 3 in attention, 1 elsewhere."""
    now = [0.0]

    def core(name: str, cost: float) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            now[0] += cost
            calls.append((name, args))
            return np.zeros((4, 6), np.float32)
        return call

    calls: list[tuple[str, tuple[Any, ...]]] = []
    fake = types.ModuleType("zquant._core")
    for name, cost in (("linear_forward", 6.0), ("attention_fused", 3.0), ("quantize_tokens", 0.5)):
        setattr(fake, name, core(name, cost))
    package = types.ModuleType("zquant")
    package._core = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zquant", package)
    monkeypatch.setitem(sys.modules, "zquant._core", fake)
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])

    def work() -> None:
        fake.attention_fused()
        fake.linear_forward(None, np.zeros((4, 8), np.float32), 2, 0, None, 0)
        now[0] += 1.0

    with peers.CoreClock() as clock:
        again = clock.quantizations(work)
        parts = peers.parts_of_call(clock, work, 0.0, again)
    assert parts == pytest.approx({"attention_fused": 0.3, "Python": 0.1, "quantization": 0.05, "products": 0.55})
    assert calls[-1][0] == "quantize_tokens"
    assert (calls[-1][1][0].shape, calls[-1][1][1:]) == ((4, 8), (2, True))
    assert fake.linear_forward.__name__ == "call", "the functions are put back"
    none = clock.quantizations(lambda: None)
    assert none() == 0.0


def test_our_blocks_quantize_the_wide_rows_in_their_calls(encoder: Any, peers: Any, tmp_path: Path) -> None:
    """A BERT's products are given codes by what comes before them: only what intermediate hands on is quantized in a call."""
    pytest.importorskip("safetensors")
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 50}
    folder = encoder.write_random_bert(tmp_path / "tiny", {**encoder.BERT_BASE, **small})
    noted: list[tuple[int, int, int]] = []
    engine = peers.ENGINES[W8A8]
    keep, peers_quantized = noted.extend, peers.quantized

    def watched(args: tuple[Any, ...], result: Any) -> list[tuple[int, int, int]]:
        found = peers_quantized(args, result)
        keep(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "quantized", watched)
        patch.setattr(peers, "typical_parts", lambda measure, gate: (measure(), True))
        ((parts, _),) = engine.shares(engine(folder, 1), [peers.random_batch(50, 2, 8)], None)
    assert [(m, n) for m, n, _ in noted] == [(16, 128)] * 2
    assert sum(parts.values()) == pytest.approx(1.0)
    assert {"products", "quantization", "pooling", "Python", "layer_norm", "attention_fused"} <= set(parts)
    assert 0 < parts["quantization"] < 1


@pytest.mark.parametrize(("seconds", "clean", "products", "gated"), [
    (0.01, {0, 2, 4}, 0.3, True), (0.01, {0, 2}, 0.5, False), (0.2, {1}, 0.2, True), (0.2, set(), 0.2, False)])
def test_shares_are_of_undisturbed_calls(peers: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, clean: set[int],
                                         products: float, gated: bool) -> None:
    """Calls with 10, 20, ... 90 % of products, then nothing but 90; long ones need one clean call, and get three tries."""
    now, number = [0.0], [-1]

    def measure() -> dict[str, float]:
        number[0] += 1
        now[0] += seconds
        return {"products": 0.1 * min(number[0] + 1, 9)}

    gate = SimpleNamespace(wait=lambda: True, good=lambda: True, lost_time=lambda: lambda: 0.0 if number[0] in clean else 1.0)
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    parts, said = peers.typical_parts(measure, gate, seconds=9 * seconds if seconds < 0.1 else 0.1)
    assert (parts["products"], said) == (pytest.approx(products), gated)


def test_pooling_is_the_mean(peers: Any) -> None:
    hidden = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(peers.mean_pooled(hidden), hidden.mean(1), rtol=1e-6)


# ---- peers --------------------------------------------------------------------------------------------------
def test_float_peers_of_two_precisions(encoder: Any, peers: Any) -> None:
    assert {n for n in encoder.PEERS if peers.ENGINES[n].precision == peers.REDUCED} == {"torch bf16", "openvino bf16"}
    assert set(encoder.FLOAT32_PEERS) == {"torch fp32", "onnxruntime fp32", "openvino f32"}
    assert peers.ENGINES["torch bf16"].modules == peers.ENGINES["torch fp32"].modules
    assert all(e in encoder.ENCODERS for goal in encoder.GOALS for e in (*goal.ours, *goal.theirs)), "a goal names no engine"


@pytest.mark.parametrize(("got", "up"), [("bf16", True), ("f32", False)])
def test_openvino_must_compute_in_what_its_name_says(peers: Any, monkeypatch: pytest.MonkeyPatch, got: str, up: bool) -> None:
    asked: list[dict[str, Any]] = []
    compiled = SimpleNamespace(get_property=lambda name: SimpleNamespace(get_type_name=lambda: got),
                               create_infer_request=lambda: "request")
    core = SimpleNamespace(compile_model=lambda graph, device, config: asked.append(config) or compiled)
    fake = types.ModuleType("openvino")
    fake.Core = lambda: core  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", fake)
    monkeypatch.setattr(peers.OpenVinoF32, "graph", lambda self, model: None)
    if up:
        assert peers.ENGINES["openvino bf16"](Path("x"), 1).request == "request"
    else:
        with pytest.raises(RuntimeError, match="openvino computes in f32 here, not in bf16"):
            peers.ENGINES["openvino bf16"](Path("x"), 1)
    assert asked[0]["INFERENCE_PRECISION_HINT"] == "bf16"


def test_workers_are_watched_where_the_caller_sleeps(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import harness

    me = peers.threading.get_native_id()
    ticks, pinned = iter([{me: 5, 11: 9, 12: 1}, {me: 30, 11: 12, 12: 9, 13: 7, 14: 0}]), {}
    monkeypatch.setattr(harness, "thread_times", lambda: next(ticks))
    monkeypatch.setattr(peers.os, "sched_setaffinity", lambda tid, cpus: pinned.update({tid: cpus}))
    assert peers.pin_workers([4, 6], lambda: None, 0.0) == [12, 13], "the busiest since, without the caller"
    assert pinned == {12: {4}, 13: {6}}
    monkeypatch.setattr(harness, "thread_times", lambda: {me: 5})
    assert peers.pin_workers([4], lambda: None, 0.0) == [me]
    assert [name for name, engine in peers.ENGINES.items() if engine.caller_sleeps] == [CT2]


def test_the_corpus_is_gated_by_most_of_its_batches(peers: Any, tmp_path: Path) -> None:
    """Four of five batches with a clean slice; the cores are asked for only where that fails."""
    peers.save_batches(tmp_path / "b.npz", [peers.random_batch(100, 2, 3)] * 5)
    for clean, gated in ((4, True), (3, False)):
        gate: Any = FakeGate(False)
        answers = iter([True] * clean + [False] * 100)
        gate.wait, gate.good, gate.lost_time = lambda answers=answers: next(answers), lambda: True, lambda: lambda: 0.0
        made = server(peers, gate)
        made.harness = SimpleNamespace(MAX_LOST=1.0)
        got = made.do_corpus(str(tmp_path / "b.npz"), None)
        assert (got["gated"], got["reachable"], got["kept"], got["sentences"]) == (gated, gated, clean, 10)
        assert got["seconds"] <= time.perf_counter()
