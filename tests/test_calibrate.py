"""Calibration: statistics against plain NumPy on taps, sequential against parallel, files, memory, bad input."""
from __future__ import annotations

import gc
import importlib
import json
import re
import tempfile
import tracemalloc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny_decoders
import tiny_models

import zquant as zq
from zquant import cli
from zquant.calibrate import MODES, Shared, Walker, read_sequences, walk
from zquant.errors import FormatError
from zquant.methods import STEPS, Method
from zquant.models import load
from zquant.statistics import NEEDS, Accumulator, fingerprint

ALL = frozenset(NEEDS) - {"deviation"}
SHARED = {"llama": 4, "gpt2": 4, "gpt_neox": 4, "opt": 4, "qwen3": 4, "bert": 4, "distilbert": 4}  # inputs of a block


def decoder(tmp_path, variant="llama", name="model", seed=0, **changes):
    config = tiny_decoders.config_of(variant, **changes)
    return load(tiny_models.write(tmp_path / name, config, tiny_decoders.tensors_of(config, seed=seed)))


def encoder(tmp_path, kind="bert", head=False, name="model", pooler=True):
    tensors = tiny_models.tensors_of(kind, head, pooler=pooler)
    return load(tiny_models.write(tmp_path / name, tiny_models.config_of(kind, head), tensors))


def ids_of(count=9, longest=20, low=5, high=60, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, n) for n in [longest, 1, *rng.integers(2, longest, count - 2)]]


def inputs(model, ids):
    """Name -> rows that the layer read, in float64, from the whole model's taps."""
    seen: dict[str, list[np.ndarray]] = {}
    for row in ids:  # one by one: the order of calibration's rows
        model([row], tap=lambda name, x, y: seen.setdefault(name, []).append(x.copy()))
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in seen.items()}


def plain(x):
    return dict(absmax=np.abs(x).max(0), minmax=np.stack([x.min(0), x.max(0)]), mean_abs=np.abs(x).mean(0),
                gram=x.T @ x / len(x))


def assert_same(got, x, rows):
    want = plain(x)
    for name in ("absmax", "minmax"):
        np.testing.assert_array_equal(got[name], want[name])
    for name in ("mean_abs", "gram"):
        assert got[name].dtype == np.float64
        assert np.abs(got[name] - want[name]).max() <= 1e-12 * np.abs(want[name]).max()
    assert got.tokens == len(x) and len(got["samples"]) == min(rows, len(x))
    assert all((x == row).all(1).any() for row in got["samples"].astype(np.float64))


@dataclass(frozen=True)
class Toy(Method):
    """Round to nearest of weights that the statistics have changed; remembers what it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "absmax"})
    strength: float = 0.5
    seen: ClassVar[list] = []

    def quantize(self, w, spec, stats=None):
        assert stats is not None and self.needs <= stats.keys()
        assert stats["gram"].shape == (w.shape[1], w.shape[1]) and stats["absmax"].shape == (w.shape[1],)
        Toy.seen.append((stats.layers, {name: stats[name].copy() for name in self.needs}))
        shrunk = w * (1 - self.strength * (stats["absmax"] < np.median(stats["absmax"]))).astype(np.float32)
        return zq.RTN().quantize(shrunk, spec)


@pytest.fixture(autouse=True)
def forget():
    Toy.seen.clear()


# -- statistics of several recipes

def test_recipes_share_the_passes_over_the_float_model(tmp_path, monkeypatch):
    model, ids, runs = decoder(tmp_path), ids_of(), []
    real = Walker.run
    monkeypatch.setattr(Walker, "run", lambda self, *rest: runs.append(self.needs) or real(self, *rest))
    shared = Shared(model, ids, samples=9, seed=0)
    recipes = ["smoothquant", "smoothquant+gptq", "os+", "smoothquant"]
    small = [zq.quantize(model, "w4a8", recipe, calib=shared) for recipe in recipes]
    assert runs == [{"absmax"}, {"gram"}, {"minmax", "samples"}] and shared.spared > 0
    for recipe, got in zip(recipes, small):
        np.testing.assert_array_equal(got(ids[:2]), zq.quantize(model, "w4a8", recipe, calib=ids)(ids[:2]))
    other = decoder(tmp_path, name="other", seed=1)
    np.testing.assert_array_equal(zq.quantize(other, "w4a8", "smoothquant", calib=shared)(ids[:2]),
                                  zq.quantize(other, "w4a8", "smoothquant", calib=ids)(ids[:2]))


@pytest.mark.parametrize("needs, bound, spilled", [
    ({"gram"}, 0, True), ({"gram", "absmax"}, 1 << 10, True), ({"gram"}, 1 << 30, False), ({"absmax", "samples"}, 0, False)])
def test_matrices_beyond_the_bound_are_in_a_file_without_a_name(tmp_path, monkeypatch, needs, bound, spilled):
    model, ids = decoder(tmp_path), ids_of()
    want, quantized = zq.calibrate(model, ids, needs), zq.quantize(model, "w4a16", "awq", calib=ids)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(importlib.import_module("zquant.calibrate"), "IN_MEMORY", bound)
    got = zq.calibrate(model, ids, needs)
    assert not any(folder.iterdir())
    gc.collect()
    for name in want:
        for need in needs:
            np.testing.assert_array_equal(got[name][need], want[name][need])
            assert (not got[name][need].flags.owndata and not got[name][need].flags.writeable) == spilled
    np.testing.assert_array_equal(zq.quantize(model, "w4a16", "awq", calib=ids)(ids[:2]), quantized(ids[:2]))


# -- against plain NumPy

@pytest.mark.parametrize("variant", tiny_decoders.VARIANTS)
def test_decoders_as_tapped(tmp_path, variant):
    model, ids = decoder(tmp_path, variant), ids_of(longest=30)
    stats = zq.calibrate(model, ids, ALL, rows=40, seq_len=30)
    taps = inputs(model, ids)
    assert set(stats) == set(taps) == set(dict(model.named_linears()))
    for name, x in taps.items():
        assert_same(stats[name], x, 40)


@pytest.mark.parametrize("kind", tiny_models.FAMILIES)
@pytest.mark.parametrize("head", [False, True])
def test_encoders_as_tapped(tmp_path, kind, head):
    model, ids = encoder(tmp_path, kind, head), ids_of()
    stats = zq.calibrate(model, ids, ALL, rows=40)
    taps = inputs(model, ids)
    pooler = [name for name in stats if name.endswith("pooler.dense") and name not in taps]
    for name in pooler:  # a forward without a head does not run it
        taps[name] = np.concatenate([model([row])[:, 0] for row in ids]).astype(np.float64)
    assert set(stats) == set(taps) == set(dict(model.named_linears()))
    for name, x in taps.items():
        assert_same(stats[name], x, 40)


def test_the_comparison_can_fail(tmp_path):
    model, ids = decoder(tmp_path), ids_of()
    stats, taps = zq.calibrate(model, ids, ALL), inputs(model, ids)
    name = next(iter(taps))
    taps[name][3, 5] *= 1 + 1e-6
    with pytest.raises(AssertionError):
        assert_same(stats[name], taps[name], 512)


@pytest.mark.parametrize("kind", SHARED)
def test_layers_that_share_an_input_share_statistics(tmp_path, kind):
    model = (encoder if kind in tiny_models.FAMILIES else decoder)(tmp_path, kind)
    stats = zq.calibrate(model, ids_of(), {"gram"})
    assert list(stats) == list(dict(model.named_linears()))
    layers = model.dims.layers
    assert len(stats.groups) == SHARED[kind] * layers + sum("lm_head" in n or "embed_out" in n or "pooler" in n for n in stats)
    for group in stats.groups:
        assert all(stats[name] is group for name in group.layers)


def test_a_quantized_model_is_measured_as_it_runs(tmp_path):
    for model in (decoder(tmp_path), encoder(tmp_path, name="e")):
        small, ids = zq.quantize(model, "w8a8"), ids_of()
        stats, taps = zq.calibrate(small, ids, ALL), inputs(small, ids)
        for name, x in taps.items():
            assert_same(stats[name], x, 512)


def test_wide_inputs_are_multiplied_in_float32():
    x = np.random.default_rng(0).standard_normal((5000, 1030)).astype(np.float32)
    a = Accumulator(("fc",), 1030, {"gram"})
    a.add(x)
    want = x.astype(np.float64).T @ x.astype(np.float64) / len(x)
    error = np.abs(a.result()["gram"] - want).max()
    assert 0 < error <= 2e-6  # a diagonal of 1, blocks of 2048 rows


@pytest.mark.parametrize("k", [7, 1030])
def test_statistics_do_not_depend_on_how_rows_arrive(k):
    x = np.random.default_rng(0).standard_normal((4700, k)).astype(np.float32)
    picks = np.array([0, 511, 512, 513, 4699])
    results = []
    for step in (4700, 512, 700, 77):
        a = Accumulator(("fc",), k, ALL, picks)
        for i in range(0, len(x), step):
            a.add(x[i:i + step])
        results.append(a.result())
    for other in results[1:]:
        for name in ALL:
            np.testing.assert_array_equal(other[name], results[0][name])
    np.testing.assert_array_equal(results[0]["samples"], x[picks])


@pytest.mark.parametrize("mode", MODES)
def test_batches_do_not_matter(tmp_path, mode, threads):
    for model in (decoder(tmp_path), encoder(tmp_path, name="e")):
        runs = [zq.calibrate(model, ids_of(), ALL, mode=mode, scheme="w4a8-g16", batch_tokens=n) for n in (1, 37, 2048)]
        for name in runs[0]:
            for need in ALL:
                a, b, c = (run[name][need].astype(np.float64) for run in runs)
                assert max(np.abs(a - b).max(), np.abs(a - c).max()) <= 1e-12 * np.abs(a).max()


# -- sequential

def test_sequential_sees_quantized_predecessors(tmp_path):
    """Each stage's statistics are those of a model whose earlier layers are quantized, and no others."""
    model, ids = decoder(tmp_path, "llama"), ids_of()
    full = zq.quantize(model, "w4a8-g16")
    begin = model.replace(embeddings=full.embeddings, scheme=full.scheme)
    stats = zq.calibrate(model, ids, ALL, mode="sequential", scheme="w4a8-g16")
    done: dict = {}
    for group in stats.groups:
        taps = inputs(begin.replace(linears=done), ids)
        assert_same(group, taps[group.layers[0]], 512)
        done.update({name: full.linears[name] for name in group.layers})
    assert len(done) == len(full.linears)


@pytest.mark.parametrize("make", [decoder, partial(encoder, pooler=False)], ids=["decoder", "encoder"])
def test_deviation_is_what_the_float_model_has_beside(tmp_path, make):
    """Mean of (x_float - x) x^T, with x of a model whose earlier layers are quantized and x_float of one that is not."""
    model, ids = make(tmp_path), ids_of()
    full = zq.quantize(model, "w4a8-g16")
    begin = model.replace(embeddings=full.embeddings, scheme=full.scheme)
    runs = [zq.calibrate(model, ids, {"deviation", "gram"}, mode="sequential", scheme="w4a8-g16", batch_tokens=n)
            for n in (37, 2048)]
    assert all(np.abs(a["deviation"] - b["deviation"]).max() <= 1e-12 for a, b in zip(*(run.groups for run in runs)))
    plain, done = inputs(model, ids), {}
    for group in runs[0].groups:
        name = group.layers[0]
        x = inputs(begin.replace(linears=done), ids)[name]
        np.testing.assert_allclose(group["deviation"], (plain[name] - x).T @ x / len(x), rtol=0, atol=1e-10)
        assert np.abs(group["deviation"]).max() > 1e-5
        done.update({name: full.linears[name] for name in group.layers})
    assert len(done) == len(full.linears)


def test_deviation_of_unquantized_predecessors_is_nothing(tmp_path):
    model = decoder(tmp_path)
    stats = zq.calibrate(model, ids_of(), {"deviation"}, mode="sequential", scheme="w4a8-g16+e32")
    assert [bool(group["deviation"].any()) for group in stats.groups[:2]] == [False, True]
    path = stats.save(tmp_path / "stats.safetensors")
    np.testing.assert_array_equal(zq.Statistics.load(path).groups[1]["deviation"], stats.groups[1]["deviation"])


def test_gptaq_in_a_walk(tmp_path):
    """quantize() gives GPTAQ the statistics that calibrate() takes; GPTQ is what it is without a deviation."""
    model, ids = decoder(tmp_path), ids_of()
    got, gptq = (zq.quantize(model, "w3a16-g16", method, calib=ids) for method in ("gptaq", "gptq"))
    stats = zq.calibrate(model, ids, {"deviation"}, mode="sequential", scheme="w3a16-g16", method="gptaq")
    again = zq.quantize(model, "w3a16-g16", "gptaq", calib=stats)
    differ, names = 0, [name for name in stats if isinstance(got.linears[name]._weight, zq.QTensor)]
    for name in names:
        codes, same, other = (model.linears[name]._weight.codes for model in (got, again, gptq))
        np.testing.assert_array_equal(codes, same)
        differ += not np.array_equal(codes, other)
    assert differ > len(names) / 2
    with pytest.raises(ValueError, match="'deviation'.*needs mode='sequential'"):
        zq.quantize(model, "w3a16-g16", "gptaq", calib=ids, mode="parallel")


@pytest.mark.parametrize("reference", [None, np.zeros((2, 2), np.float32)])
def test_deviation_needs_the_float_models_rows(reference):
    with pytest.raises(ValueError, match="deviation needs the float model's rows too, of shape \\(3, 2\\)"):
        Accumulator(("fc",), 2, {"deviation"}).add(np.zeros((3, 2), np.float32), reference)


@pytest.mark.parametrize("k", [5, 1030])
def test_deviation_in_pieces(k):
    x, wanted = (np.random.default_rng(seed).standard_normal((4700, k)).astype(np.float32) for seed in (0, 1))
    results = []
    for step in (4700, 700):
        a = Accumulator(("fc",), k, {"deviation"})
        for i in range(0, len(x), step):
            a.add(x[i:i + step], wanted[i:i + step])
        results.append(a.result()["deviation"])
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], (wanted.astype(float) - x).T @ x / len(x), rtol=0, atol=5e-6)


@pytest.mark.parametrize("make", [decoder, encoder])
def test_modes_differ_where_they_should(tmp_path, make):
    model, ids = make(tmp_path), ids_of()
    parallel = zq.calibrate(model, ids, {"gram"})
    sequential = zq.calibrate(model, ids, {"gram"}, mode="sequential", scheme="w4a8-g16+e32")
    same = [np.array_equal(a["gram"], b["gram"]) for a, b in zip(parallel.groups, sequential.groups)]
    assert same[0] and not any(same[1:])  # nothing precedes the first
    assert (parallel.info.mode, sequential.info.mode) == MODES
    assert sequential.info.scheme.startswith("w4a8-g16")


def test_rounding_codes_do_not_depend_on_the_mode(tmp_path):
    """A method that ignores what it is told gives what RTN gives: the walk replaces layers and nothing else."""
    model = decoder(tmp_path)
    want = zq.quantize(model, "w4a8-g16")
    for mode in MODES:
        got = zq.quantize(model, "w4a8-g16", Toy(strength=0), calib=ids_of(), mode=mode)
        np.testing.assert_array_equal(got(ids_of(4)), want(ids_of(4)))


@pytest.mark.parametrize("make", [decoder, encoder])
@pytest.mark.parametrize("mode", MODES)
def test_quantize_gives_the_method_what_it_needs(tmp_path, make, mode):
    model, ids = make(tmp_path), ids_of()
    before = fingerprint(model)
    small = zq.quantize(model, "w4a8-g16", Toy(), calib=ids, mode=mode)
    assert fingerprint(model) == before and all(layer.spec is None for _, layer in model.named_linears())
    wanted = [name for name, layer in zq.quantize(model, "w4a8-g16").named_linears() if layer.spec is not None]
    assert [name for name, layer in small.named_linears() if layer.spec is not None] == wanted
    assert [name for layers, _ in dict.fromkeys((layers, 0) for layers, _ in Toy.seen) for name in layers] == wanted
    given = list(Toy.seen)
    Toy.seen.clear()
    stats = zq.calibrate(model, ids, Toy.needs, mode=mode, scheme="w4a8-g16", method=Toy())
    by_layer = {layers: arrays for layers, arrays in given}
    for group in stats.groups:
        for name in Toy.needs:
            if group.layers in by_layer:  # a head or pooler stays float
                np.testing.assert_array_equal(group[name], by_layer[group.layers][name])
    if mode == "parallel":
        Toy.seen.clear()
        again = zq.quantize(model, "w4a8-g16", Toy(), calib=stats)
        for (_, a), (_, b) in zip(small.named_linears(), again.named_linears()):
            assert a.spec == b.spec
            if a.spec is not None:
                np.testing.assert_array_equal(a.weight.codes, b.weight.codes)


def test_layers_that_stay_float_are_not_measured(tmp_path):
    model = decoder(tmp_path)
    scheme = zq.Scheme.parse("w4a8-g16").with_overrides({"*.mlp.*": "float", "*layers.2*": "float", "lm_head": "float"})
    small = zq.quantize(model, scheme, Toy(), calib=ids_of())
    seen = {name for layers, _ in Toy.seen for name in layers}
    assert seen == {name for name in seen if re.search(r"layers\.[01]\.self_attn", name)} and len(seen) == 8
    assert small.linears["model.layers.2.mlp.up_proj"].spec is None


def test_the_walk_stops_when_it_is_told(tmp_path):
    model, count = decoder(tmp_path), []

    def visit(stats):
        count.append(stats)
        if len(count) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(model, ids_of(), {"absmax"}, visit, sequential=True)
    assert len(count) == 3
    with pytest.raises(KeyboardInterrupt):
        zq.quantize(model, "w8a8", _Interrupted(), calib=ids_of())
    assert all(layer.spec is None for _, layer in model.named_linears())


class _Interrupted(Toy):
    def quantize(self, w, spec, stats=None):
        raise KeyboardInterrupt


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [decoder, encoder])
def test_the_bar_ends_where_it_says(tmp_path, monkeypatch, mode, make):
    counts = []

    def bar(items, what, show, total, unit):
        for i, item in enumerate(items):
            yield item
        counts.append((i + 1, total))

    monkeypatch.setattr(importlib.import_module("zquant.calibrate"), "bar", bar)
    for ids in (ids_of(), ids_of(30)):
        zq.calibrate(make(tmp_path), ids, mode=mode, scheme="w8a8", batch_tokens=50)
        zq.quantize(make(tmp_path), "w8a8", Toy(), calib=ids, mode=mode)
    assert len(counts) == 4 and all(done == total > 1 for done, total in counts)


# -- memory

def traced_peak(model, ids, sequential):
    gc.collect()
    tracemalloc.start()
    try:
        walk(model, ids, {"gram"}, lambda stats: None, sequential=sequential)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sequential", [False, True])
def test_one_block_of_statistics_at_a_time(tmp_path, sequential):
    """The peak does not grow with the number of blocks."""
    model, ids = encoder(tmp_path), ids_of()
    peaks = []
    for layers in (1, 2):
        dims = model.dims.__class__(**{**model.dims.__dict__, "layers": layers})
        names = {n for n in model.linears if "layer.1." not in n or layers == 2}
        one = model.replace()
        one.dims, one.linears = dims, {n: model.linears[n] for n in names}
        one._reset()
        peaks.append(min(traced_peak(one, ids, sequential) for _ in range(3)))  # what is made once is there after one
    assert peaks[1] <= peaks[0] + 8 * tiny_models.HIDDEN**2  # less than another Gram matrix


def test_calibration_leaves_no_packed_weights(tmp_path):
    model = decoder(tmp_path)
    stats = zq.calibrate(model, ids_of(), mode="sequential", scheme="w8a8")
    assert all(layer._handle is None for _, layer in model.named_linears())
    assert stats.peak_bytes > 1e6 and "peak memory" in repr(stats) and stats.seconds > 0


# -- files

@pytest.mark.parametrize("mode", MODES)
def test_save_and_load(tmp_path, mode):
    model = decoder(tmp_path)
    stats = zq.calibrate(model, ids_of(), ALL, mode=mode, scheme="w8a8", rows=9)
    path = stats.save(tmp_path / "stats.safetensors")
    direct = zq.calibrate(model, ids_of(), ALL, mode=mode, scheme="w8a8", rows=9, file=tmp_path / "direct.safetensors")
    for other in (zq.Statistics.load(path, model), direct):
        assert list(other) == list(stats) and other.info == stats.info and other.needs == ALL
        for a, b in zip(other.groups, stats.groups):
            assert (a.layers, a.tokens) == (b.layers, b.tokens)
            for name in ALL:
                assert a[name].dtype == b[name].dtype
                np.testing.assert_array_equal(a[name], b[name])
    assert zq.Statistics.load(path).seconds == stats.seconds
    assert sorted(p.name for p in tmp_path.iterdir()) == ["direct.safetensors", "model", "stats.safetensors"]


def test_an_interrupted_file_does_not_appear(tmp_path, monkeypatch):
    model = decoder(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Walker, "_one_stage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        zq.calibrate(model, ids_of(), mode="sequential", scheme="w8a8", file=tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_statistics_of_another_model_are_refused(tmp_path):
    model = decoder(tmp_path)
    path = zq.calibrate(model, ids_of(), Toy.needs).save(tmp_path / "s.safetensors")
    same = decoder(tmp_path, name="copy")
    assert fingerprint(same) == fingerprint(model)
    zq.quantize(same, "w8a8", Toy(), calib=zq.Statistics.load(path, same))
    others = [decoder(tmp_path, name="seed", seed=1), decoder(tmp_path, name="rope", rope_theta=10.0),
              decoder(tmp_path, "qwen3", name="family"), zq.quantize(model, "w8a8")]
    for other in others:
        with pytest.raises(ValueError, match="another model"):
            zq.Statistics.load(path, other)
        with pytest.raises(ValueError, match="another model"):
            zq.quantize(other.replace(linears=dict(model.linears)) if other.scheme else other, "w8a8", Toy(),
                        calib=zq.Statistics.load(path))


def test_a_changed_bias_or_norm_changes_the_fingerprint(tmp_path):
    model = decoder(tmp_path, "gpt2")
    for name in ("transformer.h.1.ln_1.weight", "transformer.wte.weight"):
        other = model.replace()
        other.tensors[name] = other.tensors[name] * np.float32(1.5)
        assert fingerprint(other) != fingerprint(model)
        other.tensors[name] = model.tensors[name]


def test_damaged_files(tmp_path):
    model = decoder(tmp_path)
    path = zq.calibrate(model, ids_of()).save(tmp_path / "s.safetensors")
    data = path.read_bytes()
    cases = {
        "not a valid safetensors": data[:-9],
        "of version 9": data.replace(rb'{\"version\": 1', rb'{\"version\": 9'),
        "not statistics": data.replace(rb'\"rows\": 0', rb'\"r0ws\": 0'),
        "expected F32": data.replace(rb'\"k\": 48', rb'\"k\": 47'),
        "holds no statistics": data.replace(b"zquant_statistics", b"zquant_statistisc"),
    }
    for message, damaged in cases.items():
        assert damaged != data, message
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=message) as error:
            zq.Statistics.load(path)
        assert str(path) in str(error.value)
    with pytest.raises(FormatError, match="holds no statistics"):
        zq.Statistics.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(FormatError, match="no such file"):
        zq.Statistics.load(tmp_path / "none")


# -- what is read

def test_sequences(tmp_path):
    model = decoder(tmp_path)
    long = np.arange(3, 60).repeat(3)
    s = read_sequences(model, long, samples=100, seq_len=20)
    np.testing.assert_array_equal(np.concatenate(s.ids), long)
    assert [len(row) for row in s.ids] == [20] * 8 + [11] and (s.tokens, s.source) == (171, "ids")
    few = read_sequences(model, long, samples=4, seq_len=20, seed=1)
    assert len(few.ids) == 4 and all(any(np.array_equal(a, b) for b in s.ids) for a in few.ids)
    assert all(np.array_equal(a, b) for a, b in zip(few.ids, read_sequences(model, long, samples=4, seq_len=20, seed=1).ids))
    assert read_sequences(model, [[3, 4], [5]]).ids[1].tolist() == [5]
    assert len(read_sequences(model, np.full((3, 10), 4)).ids) == 3
    assert read_sequences(model, long).seq_len == 40  # the model's positions


def test_random_tokens(tmp_path):
    model = decoder(tmp_path)
    a, b, c = (read_sequences(model, "random", samples=6, seq_len=30, seed=s).ids for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and np.shape(a) == (6, 30)
    assert 0 <= np.min(a) and np.max(a) < tiny_decoders.VOCAB
    pads = read_sequences(encoder(tmp_path, "roberta", name="r"), "random", samples=200, seq_len=20).ids
    assert set(np.concatenate(pads)) == set(range(tiny_models.VOCAB)) - {1}
    assert zq.calibrate(model, "random", samples=2, seq_len=8).info.source == "random"


@pytest.mark.parametrize("data, message", [
    ([], "no tokens"), ("", "no tokens|tokenizer"), ([[]], "no tokens"), ([[], []], "no tokens"),
    ([[3, 61]], "token id 61 is outside 0..60"), ([[3], [-1]], r"\[1\]: token id -1"), ([[0.5]], "token ids"),
    (None, "NoneType"), (3, "int"), (["a", [3]], "texts and ids"), (np.zeros((2, 2, 2), int), "ndarray"),
    (["a text"], "no tokenizer.json"),
])
def test_bad_data(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        zq.calibrate(decoder(tmp_path), data)


@pytest.mark.parametrize("options, message", [
    (dict(needs={"hessian"}), "unknown statistics hessian; known: absmax"), (dict(needs=()), "no statistics"),
    (dict(needs=3), "expected names"), (dict(mode="serial"), "'parallel' or 'sequential', got 'serial'"),
    (dict(mode="sequential", scheme="w8a8", method="lkd"), "lkd trains whole blocks"),
    (dict(mode="sequential"), "needs a scheme"), (dict(samples=0), "samples"), (dict(seq_len=41), "takes 40 tokens"),
    (dict(seq_len=0), "seq_len"), (dict(seed=-1), "seed"), (dict(rows=0), "rows"), (dict(batch_tokens=0), "batch_tokens"),
])
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        zq.calibrate(decoder(tmp_path), [[3, 4]], **options)


def test_bad_calls_of_quantize(tmp_path):
    model = decoder(tmp_path)
    with pytest.raises(ValueError, match="toy needs absmax, gram.*calib="):
        zq.quantize(model, "w8a8", Toy())
    with pytest.raises(ValueError, match="there is no gram; calibrate with needs"):
        zq.quantize(model, "w8a8", Toy(), calib=zq.calibrate(model, ids_of(), {"absmax"}))
    with pytest.raises(ValueError, match="mode"):
        zq.quantize(model, "w8a8", Toy(), calib=ids_of(), mode="both")
    with pytest.raises(ValueError, match="quantized already"):
        zq.quantize(zq.quantize(model), "w8a8", Toy(), calib=ids_of())
    assert zq.quantize(model, "w8a8", "rtn", calib=[[3]]).scheme.name == "w8a8"  # not looked at


def test_infinite_inputs_name_the_layer():
    a = Accumulator(("fc1", "fc2"), 2, {"gram"})
    a.add(np.float32([[np.inf, 1]]))
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="fc1: gram of its inputs is not finite"):
        a.result()
    with pytest.raises(ValueError, match="no rows"):
        Accumulator(("fc",), 2, {"gram"}).result()
    with pytest.raises(ValueError, match="rows of 2 features"):
        Accumulator(("fc",), 2, {"gram"}).add(np.zeros((1, 3), np.float32))


# -- real models and the command

def test_sentence_encoder_and_text(shared, tmp_path):
    pytest.importorskip("tokenizers")
    from zquant.demo_model import find_minilm
    from zquant.demo_sentences import SENTENCES

    try:
        enc = zq.SentenceEncoder(find_minilm())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    file = tmp_path / "text.txt"
    file.write_text("\n".join(SENTENCES[:6]) + "\n\n", encoding="utf-8")
    stats = zq.calibrate(enc, SENTENCES[:6])
    from_file = zq.calibrate(enc, file)
    ids = enc.tokenize(SENTENCES[:6])
    assert stats.info == from_file.info and stats.info.tokens == sum(map(len, ids))
    seen: dict = {}
    enc.model(ids, tap=lambda name, x, y: seen.setdefault(name, []).append(np.abs(x).max(0)))
    for name, parts in seen.items():
        np.testing.assert_array_equal(stats[name]["absmax"], np.max(parts, axis=0))
    small = zq.quantize(enc, "w8a8", Toy(strength=0), calib=SENTENCES[:6])
    np.testing.assert_array_equal(small.encode(SENTENCES[6:9]), zq.quantize(enc, "w8a8").encode(SENTENCES[6:9]))


def test_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(STEPS, "toy", Toy)
    model = str(Path(__file__).parent / "data" / "tiny-llama-5m")
    text = tmp_path / "calibration.txt"
    text.write_text("Once upon a time there was a small house by the sea. " * 30, encoding="utf-8")
    argv = ["quantize", model, "--scheme", "w8a8", "--method", "toy"]
    assert cli.main([*argv, "-o", str(tmp_path / "a"), "--calib", str(text)]) == 0
    assert "peak memory" in capsys.readouterr().out and len(Toy.seen) == 42
    lm = zq.load(model)
    stats = zq.calibrate(lm, text, Toy.needs).save(tmp_path / "s.safetensors")
    assert cli.main([*argv, "-o", str(tmp_path / "b"), "--calib", str(stats)]) == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    capsys.readouterr()
    for more, message in ((["--method", "toy"], "needs absmax, gram"), (["--calib", str(text)], "rtn needs no"),
                          (["--method", "toy", "--calib", str(tmp_path / "none")], "No such file")):
        assert cli.main(["quantize", model, "-o", str(tmp_path / "c"), *more]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "c").exists()
