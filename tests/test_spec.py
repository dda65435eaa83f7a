"""Number formats and schemes as data."""
import doctest
import json
import pickle

import pytest

from zquant import spec as spec_module
from zquant.spec import QuantSpec, Scheme

SPECS = [QuantSpec(), QuantSpec(4, granularity="group", group_size=64), QuantSpec(3, granularity="row_block", blocks=48),
         QuantSpec(8, granularity="token", symmetric=False, dynamic=True), QuantSpec(8, granularity="tensor"),
         QuantSpec(4, symmetric=False), QuantSpec(8, granularity="tensor", symmetric=False, dynamic=True)]
NAMES = ["w8a8", "w8a8-sym", "w4/8a8", "w4/8a8-g32", "w4/8a8-b48", "w4a8", "w4a8-g128", "w4a8-sym-g32", "w8a16", "w4a16",
         "w3a16-g16", "w8a8+e8", "w4/8a8-g128+e32", "w8a8-tensor", "w8a8-static-sym-wt", "w4a8-static-g64", "w4a16-wt",
         "w3a16-row+e32", "w4a8-row-static"]


def test_examples():
    assert doctest.testmod(spec_module).failed == 0


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_spec_round_trips(spec):
    assert eval(repr(spec)) == spec
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(eval(repr(spec)))


@pytest.mark.parametrize("name", NAMES)
def test_scheme_round_trips(name):
    scheme = Scheme.parse(name).with_overrides({"encoder.layer.0.*": "float", "*.query": 4, "*.key": QuantSpec(8)})
    scheme = scheme.replace(activation_overrides={"*.key": None, "*.value": QuantSpec(8, granularity="tensor")})
    assert eval(repr(scheme)) == scheme
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert pickle.loads(pickle.dumps(scheme)) == scheme
    assert Scheme.parse(scheme) is scheme
    assert str(scheme) == name


@pytest.mark.parametrize("fields, words", [
    (dict(bits=9), ("bits", "9")),
    (dict(bits=1), ("bits", "1")),
    (dict(bits=True), ("bits", "True")),
    (dict(bits=8.0), ("bits", "8.0")),
    (dict(format="int7"), ("format", "int7", "known")),
    (dict(granularity="row"), ("granularity", "row", "channel")),
    (dict(granularity="group"), ("group_size", "None")),
    (dict(granularity="group", group_size=0), ("group_size", "0")),
    (dict(granularity="group", group_size=-1), ("group_size", "-1")),
    (dict(group_size=64), ("group_size=64", "group")),
    (dict(granularity="row_block", blocks=0), ("blocks", "0")),
    (dict(blocks=48), ("blocks=48", "row_block")),
    (dict(dynamic=True), ("dynamic", "token")),
    (dict(granularity="token"), ("dynamic", "token")),
    (dict(granularity="group", group_size=8, dynamic=True), ("dynamic", "tensor")),
    (dict(symmetric=1), ("symmetric", "1")),
    (dict(granularity="row_block", blocks=2, symmetric=False), ("row_block", "symmetric")),
])
def test_bad_specs_say_what_is_wrong(fields, words):
    with pytest.raises(ValueError) as error:
        QuantSpec(**fields)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["", "w8", "w8a8-", "w8a4", "w8a8-g", "w8a8-x3", "W8A8", "w8a8+e4", "8", None, 8])
def test_unknown_scheme_lists_the_known(name):
    with pytest.raises(ValueError, match="known: w8a8, w4a8, w4/8a8"):
        Scheme.parse(name)


@pytest.mark.parametrize("name, words", [
    ("w4a16-g32-row", "names two weight groupings: -g32, -row; expected one"),
    ("w8a8-row-g32", "names two weight groupings: -row, -g32"),
    ("w8a8-g32-b48", "names two weight groupings: -g32, -b48"),
    ("w4a8-wt-sym-g32", "names two weight groupings: -wt, -g32"),
    ("w4a8-g32-g64", "names two weight groupings: -g32, -g64"),
    ("w8a8-static-tensor", "names two ways to share the activations' scales: -static, -tensor"),
    ("w8a8-sym-sym", "says -sym twice"),
])
def test_contradictory_suffixes(name, words):
    with pytest.raises(ValueError, match=f"scheme '{name}' {words}"):
        Scheme.parse(name)


@pytest.mark.parametrize("name, words", [("w9a8", "bits: expected an integer of 2 to 8, got 9"), ("w4a8-g0", "group_size"),
                                         ("w8a8-b0", "blocks"), ("w4/16a8", "got 16"),
                                         ("w8a16-static", "16 bits have no scale.*-static"), ("w4a16-tensor", "-tensor"),
                                         ("w4a16-sym", "16 bits have no scale.*-sym")])
def test_scheme_names_with_bad_numbers(name, words):
    with pytest.raises(ValueError, match=words):
        Scheme.parse(name)


@pytest.mark.parametrize("make, words", [
    (lambda: Scheme("x", weights=3.5), "weights"),
    (lambda: Scheme("", weights=8), "name"),
    (lambda: Scheme("x", activations=QuantSpec()), "activations"),
    (lambda: Scheme("x", weights=QuantSpec(granularity="token", dynamic=True)), "dynamic"),
    (lambda: Scheme("x", weights=QuantSpec(granularity="tensor", symmetric=False)), "symmetric"),
    (lambda: Scheme("x", activations=QuantSpec(4, granularity="tensor")), "8 bits"),
    (lambda: Scheme("x", 8, activation_overrides={"*": QuantSpec()}), "activation override '\\*'.*per token or per tensor"),
    (lambda: Scheme("x", 8, activation_overrides={3: None}), "pattern"),
    (lambda: Scheme("x", embeddings=QuantSpec(4, granularity="group", group_size=8)), "embeddings"),
    (lambda: Scheme.parse("w8a8").with_overrides({"": 8}), "pattern"),
    (lambda: Scheme.parse("w8a8").with_overrides({"*": "int9"}), "bits"),
    (lambda: Scheme.from_dict({"name": "x", "weight": None}), "unknown fields"),
    (lambda: Scheme.from_dict([1]), "mapping"),
])
def test_bad_schemes(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_zeroquant_mixed_precision():
    scheme = Scheme.parse("w4/8a8-g32")
    attention = ["encoder.layer.3.attention.self.query", "encoder.layer.3.attention.output.dense",
                 "transformer.layer.0.attention.q_lin", "h.0.attn.c_attn"]
    for name in attention:
        assert scheme.weights_for(name) == QuantSpec(8)
    for name in ["encoder.layer.3.intermediate.dense", "encoder.layer.3.output.dense", "transformer.layer.0.ffn.lin1"]:
        assert scheme.weights_for(name) == QuantSpec(4, granularity="group", group_size=32)
    for name in ["pooler.dense", "bert.pooler.dense", "classifier", "classifier.out_proj", "pre_classifier"]:
        assert scheme.weights_for(name) is None


def test_overrides_the_last_wins_and_beats_skip():
    scheme = Scheme.parse("w8a8").with_overrides({"*": "float", "*.query": 4, "pooler.*": 8})
    assert scheme.weights_for("a.key") is None
    assert scheme.weights_for("a.query") == QuantSpec(4, granularity="group", group_size=64)
    assert scheme.weights_for("pooler.dense") == QuantSpec(8)


def test_activations_of_names():
    assert Scheme.parse("w8a8").activations.symmetric is False
    assert Scheme.parse("w8a8-sym").activations.symmetric is True
    assert Scheme.parse("w8a16").activations is None
    assert Scheme.parse("w8a8-tensor").activations == QuantSpec(8, granularity="tensor", symmetric=False, dynamic=True)
    assert Scheme.parse("w8a8-static-sym").activations == QuantSpec(8, granularity="tensor")
    assert Scheme.parse("w8a8-wt").weights == QuantSpec(8, granularity="tensor")
    assert Scheme.parse("w4a16-row").weights == QuantSpec(4)
    assert Scheme.parse("w8a8").embeddings == QuantSpec(8)
    assert Scheme.parse("w8a8+e32").embeddings is None


def test_activations_for_the_last_override_wins():
    static, token = QuantSpec(8, granularity="tensor"), Scheme.parse("w8a8").activations
    scheme = Scheme.parse("w8a8").replace(activation_overrides={"*.dense": static, "*.output.dense": None})
    assert [scheme.activations_for(name) for name in ("a.query", "a.dense", "a.output.dense")] == [token, static, None]


def test_frozen():
    with pytest.raises(AttributeError):
        QuantSpec().bits = 4
    with pytest.raises(AttributeError):
        Scheme.parse("w8a8").weights = None
