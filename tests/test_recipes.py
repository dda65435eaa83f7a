"""Recipes: order, names, round trips; quantize against the same steps by hand; what is saved with the model."""
import json
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from test_calibrate import decoder, encoder, ids_of

import zquant as zq
from zquant.extras import LowRank
from zquant.methods import (
    GPTQ,
    PRESETS,
    RTN,
    STEPS,
    LoRC,
    Method,
    OutlierSuppression,
    Preset,
    Recipe,
    Repair,
    Step,
    Transform,
    preset,
    register,
)
from zquant.models.foldings import fold, foldings


@dataclass(frozen=True)
class Smooth(Transform):
    """Folds a power of the inputs' maxima into what produces them; counts its calls."""

    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})
    seen: ClassVar[list] = []
    power: float = 0.5

    def transform(self, model, statistics, scheme):
        assert statistics.needs == self.needs and statistics.info.mode == "parallel"
        Smooth.seen.append(statistics)
        for folding in foldings(model):
            if folding.exact:
                values = folding.tied(statistics[folding.consumers[0]]["absmax"].astype(np.float64))
                model = fold(model, folding, np.maximum(values, 1e-3) ** self.power)
        return model, scheme


@dataclass(frozen=True)
class Deep(Transform):
    """Needs no data; changes the scheme."""

    def transform(self, model, statistics, scheme):
        assert statistics is None
        return model, scheme.replace(overrides=(("*down_proj", None),))


@dataclass(frozen=True)
class Broken(Transform):
    def transform(self, model, statistics, scheme):
        raise ValueError("model.layers.0.mlp: no way")


@dataclass(frozen=True)
class Exact(Repair):
    """Makes up for everything: the error as a matrix of full rank. Remembers the statistics it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"mean_abs"})
    seen: ClassVar[list] = []

    def repair(self, w, tensor, spec, stats=None):
        Exact.seen.append(stats)
        return LowRank((w - tensor.dequantize()).astype(np.float32), np.eye(w.shape[1], dtype=np.float32))


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    Smooth.seen.clear()
    Exact.seen.clear()
    for cls in (Smooth, Deep, Broken, Exact):
        monkeypatch.setitem(STEPS, cls.registered, cls)


def codes(model):
    return {name: layer.weight.codes for name, layer in model.named_linears() if layer.spec is not None}


def assert_same_model(a, b):
    assert codes(a).keys() == codes(b).keys() and codes(a)
    for name, value in codes(a).items():
        np.testing.assert_array_equal(value, codes(b)[name], err_msg=name)
        assert dict(a.named_linears())[name].extras == dict(b.named_linears())[name].extras


# -- names and order

@pytest.mark.parametrize("given, kinds", [
    ("rtn", [RTN]), ("gptq", [GPTQ]), (" GPTQ ", [GPTQ]), ("smooth+gptq+lorc", [Smooth, GPTQ, LoRC]), ("smooth", [Smooth, RTN]),
    ("lorc", [RTN, LoRC]), ("smooth+lorc", [Smooth, RTN, LoRC]), ([], [RTN]), (["smooth", GPTQ(damping=0.1)], [Smooth, GPTQ]),
    (GPTQ(mse=True), [GPTQ]), (["smooth+gptq", LoRC()], [Smooth, GPTQ, LoRC]), ("zeroquant-v2", [GPTQ, LoRC]),
    ("smooth+zeroquant-v2", [Smooth, GPTQ, LoRC]), ("smooth+zeroquant+gptq", [Smooth, GPTQ])])
def test_recipes_of_names_and_steps(given, kinds):
    recipe = Recipe.of(given)
    assert [type(step) for step in recipe.steps] == kinds
    assert Recipe.of(recipe) is recipe and isinstance(recipe.method, Method)
    assert (*recipe.transforms, recipe.method, *recipe.repairs) == recipe.steps
    assert recipe.needs == frozenset().union(*(kind.needs for kind in kinds))


def test_options_stay():
    assert Recipe.of(["smooth", GPTQ(damping=0.1)]).method.damping == 0.1
    assert Recipe.of(GPTQ(mse=True)).steps == (GPTQ(mse=True),)


@pytest.mark.parametrize("given, error, message", [
    ("rtn+gptq", ValueError, "rtn and gptq both"), ("gptq+smooth", ValueError, "smooth transforms .* before gptq"),
    ("lorc+gptq", ValueError, "lorc repairs .* after gptq"), ("smooth+smooth", ValueError, "same step twice"),
    ("gptq+nothing", ValueError, "unknown method 'gptq.nothing'; known: .*gptq.*lorc"), ("", ValueError, "unknown"),
    ("gptq+", ValueError, "unknown"), ("gptq++lorc", ValueError, "unknown"), ("gptqlorc", ValueError, "unknown"),
    (None, TypeError, "NoneType"), (["gptq", 3], TypeError, "int"), (7, TypeError, "int")])
def test_wrong_recipes(given, error, message):
    with pytest.raises(error, match=message):
        Recipe.of(given)
    with pytest.raises(TypeError, match="expected Transform"):
        Recipe("mine", ("gptq",))


def test_a_name_that_ends_in_plus_needs_no_other():
    for given in ("os++gptq", "os+gptq"):
        assert Recipe.of(given).steps == (OutlierSuppression(), GPTQ())
    assert Recipe.of("os+").steps == (OutlierSuppression(), RTN())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name):
    found = PRESETS[name]
    assert isinstance(found, Preset) and Recipe.of(name) == found.recipe == Recipe.of(found) and found.recipe.name == name
    assert zq.Scheme.parse(found.scheme.name).name == found.scheme.name


@pytest.mark.parametrize("given", ["rtn", "smooth+gptq+lorc", "zeroquant-v2", [Smooth(power=0.3), GPTQ(act_order="group")]])
def test_round_trip(given):
    recipe = Recipe.of(given)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    scope = {cls.__name__: cls for cls in STEPS.values()}
    assert eval(repr(recipe), scope | {"Recipe": lambda name, *steps: Recipe(name, steps)}) == recipe


@pytest.mark.parametrize("data", [
    {}, {"steps": "gptq"}, {"steps": [{"method": "none"}]}, {"steps": [{"method": "rtn", "bits": 4}]},
    {"steps": [{"method": "rtn"}, {"method": "gptq"}]}, []])
def test_damaged_dicts(data):
    with pytest.raises(ValueError):
        Recipe.from_dict(data)


def test_register_by_name(monkeypatch):
    monkeypatch.delitem(STEPS, "some.thing", raising=False)

    @register("Some.Thing")
    @dataclass(frozen=True)
    class Other(Repair):
        pass

    try:
        assert STEPS["some.thing"] is Other and Other().to_dict() == {"method": "some.thing"}
        assert Recipe.of("gptq+some.thing").repairs == (Other(),)
    finally:
        del STEPS["some.thing"]
    for kind in (Method, Transform, Repair):
        work = {Method: "quantize", Transform: "transform", Repair: "repair"}[kind]
        with pytest.raises(TypeError, match=f"{kind.__name__} does not define {work}"):
            getattr(kind(), work)(None, None, None, *([None] if kind is Repair else []))


# -- quantize

@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_a_recipe_is_its_steps_by_hand(tmp_path, mode, variant):
    lm, ids = decoder(tmp_path, variant), ids_of()
    got = zq.quantize(lm, "w3a8-g16", ["smooth", GPTQ(), LoRC(rank=2)], calib=ids, mode=mode)
    stats = zq.calibrate(lm, ids, {"absmax"})
    smooth, scheme = Smooth().transform(lm, stats, zq.Scheme.parse("w3a8-g16"))
    want = zq.quantize(smooth, scheme, [GPTQ(), LoRC(rank=2)], calib=ids, mode=mode)
    assert_same_model(got, want)
    np.testing.assert_array_equal(got(ids[:2]), want(ids[:2]))
    plain = zq.quantize(lm, "w3a8-g16", GPTQ(), calib=ids, mode=mode)
    assert any((codes(plain)[name] != value).any() for name, value in codes(got).items())
    first = Smooth.seen[0]
    for name, layer in stats.items():
        np.testing.assert_array_equal(first[name]["absmax"], layer["absmax"])


def test_the_second_transform_sees_what_the_first_made(tmp_path):
    lm, ids = decoder(tmp_path), ids_of()

    @dataclass(frozen=True)
    class Again(Smooth):
        pass

    zq.quantize(lm, "w8a8", [Smooth(), Again()], calib=ids)
    first, second = Smooth.seen
    name = "model.layers.0.self_attn.q_proj"
    assert (first[name]["absmax"] != second[name]["absmax"]).any()
    np.testing.assert_allclose(second[name]["absmax"], np.sqrt(first[name]["absmax"]), rtol=1e-4)


def test_a_transform_may_change_the_scheme(tmp_path):
    small = zq.quantize(decoder(tmp_path), "w8a8", "deep")
    assert {name for name, layer in small.named_linears() if layer.spec is None} == {
        f"model.layers.{i}.mlp.down_proj" for i in range(3)} | {"lm_head"}


def test_repairs_get_the_solver_s_statistics(tmp_path):
    lm, ids = decoder(tmp_path), ids_of()
    small = zq.quantize(lm, "w2a16+e32", "exact", calib=ids)
    assert len(Exact.seen) == len(codes(small)) and all(set(stats) == {"mean_abs"} for stats in Exact.seen)
    np.testing.assert_allclose(small(ids[:3]), lm(ids[:3]), rtol=1e-2, atol=1e-2)
    rough = zq.quantize(lm, "w2a16+e32")
    assert np.abs(rough(ids[:3]) - lm(ids[:3])).max() > 0.5


def test_sentence_encoders_and_encoders(tmp_path):
    model, ids = encoder(tmp_path), ids_of()
    small = zq.quantize(model, "w4a8", "smooth+gptq", calib=ids)
    assert small.recipe.name == "smooth+gptq" and type(small) is type(model) and "by smooth+gptq" in repr(small)


@pytest.mark.parametrize("method, scheme, want", [
    ("zeroquant", None, "w8a8"), ("zeroquant", "w4a8", "w4a8"), ("rtn", None, "w8a8"), ("gptq", None, "w4a16"),
    (PRESETS["zeroquant-v2"], None, "w4a8"), (GPTQ(), None, "w8a8")])
def test_the_scheme_is_the_preset_s(tmp_path, method, scheme, want):
    small = zq.quantize(decoder(tmp_path), scheme, method, calib=ids_of())
    assert small.scheme.name == want


def test_statistics_do_where_one_pass_is_enough(tmp_path):
    lm, ids = decoder(tmp_path), ids_of()
    stats = zq.calibrate(lm, ids, {"absmax", "gram", "mean_abs"})
    for recipe in ("gptq", "gptq+exact"):
        given = zq.quantize(lm, "w4a8", recipe, calib=stats)
        assert_same_model(given, zq.quantize(lm, "w4a8", recipe, calib=ids, mode="parallel"))
    one = zq.calibrate(lm, ids, {"absmax"})
    assert_same_model(zq.quantize(lm, "w4a8", "smooth", calib=one), zq.quantize(lm, "w4a8", "smooth", calib=ids))
    for recipe in ("smooth+gptq", "smooth+exact", "deep+gptq"):
        with pytest.raises(ValueError, match="calibrates again after"):
            zq.quantize(lm, "w4a8", recipe, calib=stats)


@pytest.mark.parametrize("method, message", [
    ("smooth", "method smooth needs absmax"), ("gptq", "method gptq needs gram"),
    ("smooth+gptq+exact", "absmax, gram, mean_abs")])
def test_calibration_is_asked_for_before_anything_runs(tmp_path, method, message):
    with pytest.raises(ValueError, match=message):
        zq.quantize(decoder(tmp_path), "w8a8", method)
    assert not Smooth.seen


def test_errors_name_the_step(tmp_path):
    with pytest.raises(ValueError, match="^broken: model.layers.0.mlp: no way"):
        zq.quantize(decoder(tmp_path), "w8a8", "broken")
    with pytest.raises(ValueError, match=r"^model.layers.0.self_attn.q_proj: llm.int8: .*8-bit"):
        zq.quantize(decoder(tmp_path), "w4a8", "llm.int8", calib=ids_of())
    small = zq.quantize(decoder(tmp_path), "w8a8")
    with pytest.raises(ValueError, match="^model.layers.0.self_attn.q_proj: is quantized already"):
        zq.quantize(small, "w8a8", "smooth", calib=ids_of())
    assert not Smooth.seen


def test_calibrate_refuses_transforms(tmp_path):
    lm = decoder(tmp_path)
    with pytest.raises(ValueError, match="smooth.* transforms"):
        zq.calibrate(lm, ids_of(), mode="sequential", scheme="w8a8", method="smooth")
    stats = zq.calibrate(lm, ids_of(), {"absmax"}, mode="sequential", scheme="w4a8", method="gptq")
    assert stats.needs == {"absmax", "gram"}


def extras(model):
    """Field of Extras -> layers that have it."""
    found = {}
    for name, layer in model.named_linears():
        for field, value in vars(layer.extras).items():
            if value is not None:
                found.setdefault(field, set()).add(name)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("recipe, scheme, worst, fields", [
    ("smoothquant", "w8a8-sym", 0.05, ()), ("smoothquant", "w8a8-static-sym-wt", 0.1, ("static",)),
    ("os+", "w8a8-tensor", 0.1, ()), ("os+", "w8a8-static", 0.1, ("static",)), ("fptq", "w4a8-g16", 0.3, ("static",)),
    ("fptq+gptq+lorc", "w4a8-row-static", 0.3, ("static", "correction")), ("llm.int8", "w8a8-sym", 0.05, ("outliers",)),
    ("smoothquant+gptq+llm.int8", "w8a8", 0.05, ("outliers",)), ("smoothquant+gptq+lorc", "w4a8-g16", 0.3, ("correction",))])
def test_from_end_to_end_and_back(tmp_path, kind, recipe, scheme, worst, fields):
    """What each layer carries, a result that is near the float model's, and the same bits after saving and loading."""
    model, ids = (encoder(tmp_path) if kind == "bert" else decoder(tmp_path, kind)), ids_of()
    small = zq.quantize(model, scheme, recipe, calib=ids)
    found, quantized = extras(small), set(codes(small))
    branches = found.pop("branch", set())
    assert set(found) == set(fields) and all(found[field] == quantized for field in fields)
    assert bool(branches) == (kind == "bert" and any(name in recipe for name in ("smooth", "os+")))
    want, got = model(ids), small(ids)
    assert 0 < np.linalg.norm(got - want) <= worst * np.linalg.norm(want)
    small.save(tmp_path / "small")
    again = zq.load(tmp_path / "small")
    assert extras(again) == extras(small) and again.recipe == small.recipe and again.scheme == small.scheme
    np.testing.assert_array_equal(again(ids), got)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_fptq_takes_static_ranges_where_it_decides_for_them(tmp_path, mode):
    lm, ids = decoder(tmp_path), ids_of()
    stats = zq.calibrate(lm, ids)
    peaks = sorted(float(group["absmax"].max()) for group in stats.groups)
    step = zq.FPTQ(v0=peaks[len(peaks) // 3], v1=peaks[2 * len(peaks) // 3])
    small = zq.quantize(lm, "w4a8-g16", [step, GPTQ()], calib=ids, mode=mode)
    float_model, scheme = step.transform(lm, stats, zq.Scheme.parse("w4a8-g16"))
    static = {name for name in codes(small) if not scheme.activations_for(name).dynamic}
    assert small.scheme == scheme and extras(small) == {"static": static} and 0 < len(static) < len(codes(small))
    now = zq.calibrate(float_model, ids, {"absmax"})
    layers = dict(small.named_linears())
    for name in static:  # 8 bits, symmetric; quantized predecessors move the sequential mode's ranges a little
        near = 1e-6 if mode == "parallel" else 0.3
        assert float(layers[name].extras.static.scale) == pytest.approx(now[name]["absmax"].max() / 127, rel=near)
    assert_same_model(small, zq.quantize(float_model, scheme, GPTQ(), calib=ids, mode=mode))


# -- what is kept

def test_the_recipe_is_saved_with_the_model(tmp_path):
    lm, ids = decoder(tmp_path), ids_of()
    recipe = Recipe.of([Smooth(power=0.4), GPTQ(damping=0.02), Exact()])
    small = zq.quantize(lm, "w4a8", recipe, calib=ids)
    assert small.recipe == recipe and lm.recipe is None and zq.quantize(lm, "w8a8").recipe == Recipe.of("rtn")
    small.save(tmp_path / "small")
    assert zq.load(tmp_path / "small").recipe == recipe
    lm.save(tmp_path / "float")
    assert zq.load(tmp_path / "float").recipe is None


def test_an_unknown_recipe_does_not_keep_a_model_from_loading(tmp_path, monkeypatch):
    zq.quantize(decoder(tmp_path), "w8a8", "deep").save(tmp_path / "small")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zq.load(tmp_path / "small").recipe.name == "deep"
    monkeypatch.delitem(STEPS, "deep")
    with pytest.warns(UserWarning, match="recipe .*unknown method 'deep'"):
        assert zq.load(tmp_path / "small").recipe is None


def test_step_from_dict_refuses_what_it_does_not_know():
    assert Step.from_dict({"method": "lorc", "rank": 3}) == LoRC(rank=3)
    with pytest.raises(ValueError, match="unknown options"):
        Step.from_dict({"method": "lorc", "ranks": 3})
    with pytest.raises(ValueError, match="method: expected its name and options as a mapping, got 'lorc'"):
        Step.from_dict("lorc")


def test_preset_puts_a_name(monkeypatch):
    monkeypatch.setattr("zquant.methods.recipe.PRESETS", dict(PRESETS))
    preset("Mine", [Smooth(power=0.1), "gptq"], "w3a16")
    assert Recipe.of("mine").steps == (Smooth(power=0.1), GPTQ())
