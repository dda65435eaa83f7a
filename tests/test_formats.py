"""safetensors and compressed-tensors files: round trips, hostile and broken input."""
import doctest
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

from zquant import mapped
from zquant.errors import FormatError, VersionError
from zquant.formats.safetensors import INDEX, Stored, open_checkpoint, write_safetensors
from zquant.methods import RTN
from zquant.spec import TOKEN_ASYMMETRIC, QuantSpec

pytest.importorskip("safetensors")

from zquant.formats import compressed_tensors as ct  # noqa: E402
from zquant.formats import safetensors as st  # noqa: E402
from zquant.linear import Linear  # noqa: E402

MALFORMED = SHARED / "data" / "safetensors-malformed"
needs_malformed = pytest.mark.skipif(not MALFORMED.is_dir(), reason="no shared data (ZQUANT_SHARED)")


def expected_verdicts():
    path = MALFORMED / "expected.json"
    return sorted(json.loads(path.read_text()).items()) if path.is_file() else []


@pytest.mark.parametrize("module", [st, ct, mapped])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


# ---- safetensors -----------------------------------------------------------------------------------------------------
@needs_malformed
def test_all_18_cases_are_there():
    assert len(expected_verdicts()) == 18


@needs_malformed
@pytest.mark.parametrize("name, verdict", [(n, v["expected"]) for n, v in expected_verdicts()])
def test_malformed_files(name, verdict):
    if verdict == "OK":
        checkpoint = open_checkpoint(MALFORMED / name)
        for tensor in checkpoint:
            assert checkpoint[tensor].shape == checkpoint.shape(tensor)
    else:
        with pytest.raises(FormatError, match=name):
            open_checkpoint(MALFORMED / name)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data (ZQUANT_SHARED)")
def test_a_file_of_another_writer():
    checkpoint = open_checkpoint(SHARED / "data" / "peer-safetensors" / "hadamards.safetensors")
    assert len(checkpoint) > 0
    for name in checkpoint:
        assert checkpoint[name].size == np.prod(checkpoint.shape(name))


TENSORS = {"f32": np.arange(6, dtype=np.float32).reshape(2, 3), "f64": np.array([1.5]), "f16": np.array([1.5, -2], np.float16),
           "i8": np.array([-128, 127], np.int8), "u8": np.array([[255]], np.uint8), "i64": np.array(7),
           "i32": np.arange(3, dtype=np.int32), "bool": np.array([True, False, True]),
           "empty": np.zeros((0, 4), np.float32), "name with ü": np.ones(1, np.int16)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS | {"bf16": Stored(np.array([0x3FC0, 0xC000, 0x0001], np.uint16), "BF16")}, {"a": "b"})
    return path


def test_round_trip(file):
    checkpoint = open_checkpoint(file)
    assert checkpoint.metadata == {"a": "b"}
    assert set(checkpoint) == set(TENSORS) | {"bf16"}
    for name, array in TENSORS.items():
        want = array.astype(np.float32) if name == "f16" else array
        assert checkpoint[name].dtype == want.dtype and checkpoint.stored(name).array.dtype == array.dtype
        np.testing.assert_array_equal(checkpoint[name], want)
    np.testing.assert_array_equal(checkpoint["bf16"], np.array([1.5, -2, 2.0**-133], np.float32))
    assert checkpoint.dtype("bf16") == "BF16"
    assert not checkpoint["f32"].flags.writeable
    assert "nope" not in checkpoint and len(checkpoint) == 11
    with pytest.raises(KeyError):
        checkpoint["nope"]


def test_the_reference_implementation_agrees(tmp_path):
    from safetensors.numpy import load_file

    file = tmp_path / "x.safetensors"
    write_safetensors(file, TENSORS)
    loaded = load_file(file)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_big_endian_and_strided_arrays_are_written_as_their_values(tmp_path):
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    write_safetensors(tmp_path / "x.safetensors", {"a": array[:, ::2], "b": array.T})
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(checkpoint["a"], array[:, ::2])
    np.testing.assert_array_equal(checkpoint["b"], array.T)


def test_arrays_outlive_the_checkpoint_and_release_keeps_values(file):
    array = open_checkpoint(file)["f32"]
    assert array.sum() == 15
    mapped.release(array)
    assert array.sum() == 15


def test_release_gives_memory_back(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(1 << 20, np.float32)})
    array = open_checkpoint(tmp_path / "x.safetensors")["a"]
    pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])  # noqa: E731
    array.sum()
    before = pages()
    assert mapped.release(array)
    assert before - pages() > 900  # of 1024
    assert array.sum() == 1 << 20
    assert not mapped.release(np.ones(1 << 20))


def test_a_failed_write_leaves_the_old_file(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="complex"):
        write_safetensors(file, {"a": np.ones(2, complex)})

    class Broken:
        dtype, shape, itemsize, nbytes = np.dtype(np.float32), (2,), 4, 8

    with pytest.raises(Exception):
        write_safetensors(file, {"a": Stored(Broken(), "F32")})
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 20, -1])
def test_truncated_files(file, keep):
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(FormatError, match="x.safetensors"):
        open_checkpoint(file)


def test_unsupported_types_are_named(tmp_path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="x.safetensors.*'a' is F8_E4M3"):
        checkpoint["a"]


def sharded(directory, weight_map, **shards):
    for name, tensors in shards.items():
        write_safetensors(directory / f"{name}.safetensors", tensors)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded(tmp_path):
    one = np.ones(2, np.float32)
    sharded(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"}, s1={"a": one, "unlisted": one}, s2={"b": 2 * one})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["a", "b"]
    np.testing.assert_array_equal(checkpoint["b"], 2 * one)


@pytest.mark.parametrize("weight_map, words", [
    ({"a": "s1.safetensors", "b": "s2.safetensors"}, "shard s2.safetensors is missing"),
    ({"a": "s1.safetensors", "b": "s1.safetensors"}, "s1.safetensors: tensor 'b' is listed"),
    ({"a": "../s1.safetensors"}, "not the name of a file"),
    ({"a": 3}, "not the name of a file"),
    ([], "not a safetensors index"),
    (None, "not a safetensors index"),
])
def test_broken_indexes(tmp_path, weight_map, words):
    sharded(tmp_path, weight_map, s1={"a": np.ones(2, np.float32)})
    with pytest.raises(FormatError, match=words) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(FormatError, match="neither model.safetensors nor"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="save the model as safetensors"):
        open_checkpoint(tmp_path)
    write_safetensors(tmp_path / "other.safetensors", {"a": np.ones(1)})
    assert list(open_checkpoint(tmp_path)) == ["a"]


# ---- compressed-tensors ----------------------------------------------------------------------------------------------
SPECS = [QuantSpec(8), QuantSpec(8, granularity="group", group_size=16), QuantSpec(8, symmetric=False), QuantSpec(4),
         QuantSpec(4, granularity="group", group_size=16), QuantSpec(4, granularity="group", group_size=16, symmetric=False),
         QuantSpec(3, granularity="group", group_size=24), QuantSpec(3, symmetric=False), QuantSpec(2), QuantSpec(7),
         QuantSpec(8, granularity="row_block", blocks=3), QuantSpec(8, granularity="tensor"),
         QuantSpec(4, granularity="row_block", blocks=6)]


def layers(spec, activations, prefix="", k=37):
    """Two numbered layers quantized, one float."""
    rng = np.random.default_rng(0)
    made = {}
    for name in ("encoder.layer.0.fc", "encoder.layer.1.fc", "pooler.dense"):
        w = rng.standard_normal((12, k)).astype(np.float32)
        weight = w if name.startswith("pooler") else RTN().quantize(w, spec)
        made[prefix + name] = Linear(prefix + name, weight, rng.standard_normal(12).astype(np.float32),
                                     None if weight is w else activations)
    return made


def store(directory, linears, tables=None, change=None, config_change=None, metadata=True):
    tensors = {}
    for name, layer in linears.items():
        if layer.spec is None:
            tensors[f"{name}.weight"] = layer.weight
        else:
            tensors |= ct.pack_layer(name, layer.weight, ct.storage_format(layer.spec, layer.activations) == "pack-quantized")
        tensors[f"{name}.bias"] = layer.bias
    config = {"quantization_config": ct.quantization_config(linears, tables or {})}
    (change or (lambda t: None))(tensors)
    (config_change or (lambda c: None))(config["quantization_config"])
    write_safetensors(directory / "model.safetensors", tensors, ct.zquant_metadata(None, linears) if metadata else None)
    return ct.ModelTensors(open_checkpoint(directory), json.loads(json.dumps(config)))


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layers_round_trip(tmp_path, spec, prefix):
    for activations in [None, TOKEN_ASYMMETRIC] if spec.symmetric and (spec.group_size or 8) % 8 == 0 else [None]:
        linears = layers(spec, activations, prefix)
        tensors = store(tmp_path, linears)
        assert set(tensors) == {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
        for name, layer in linears.items():
            again = tensors.linear(name)
            assert again.spec == layer.spec and again.activations == layer.activations and again.name == name
            assert tensors.shape(f"{name}.weight") == layer.shape and tensors.dtype(f"{name}.weight") == "F32"
            assert tensors.is_quantized(f"{name}.weight") == (layer.spec is not None)
            np.testing.assert_array_equal(again.dense(), layer.dense())
            np.testing.assert_array_equal(tensors[f"{name}.weight"], layer.dense())
            np.testing.assert_array_equal(again.bias, layer.bias)


def test_without_our_metadata_row_blocks_read_as_channels(tmp_path):
    linears = layers(QuantSpec(8, granularity="row_block", blocks=3), TOKEN_ASYMMETRIC)
    again = store(tmp_path, linears, metadata=False).linear("encoder.layer.0.fc")
    assert again.spec == QuantSpec(8)
    np.testing.assert_array_equal(again.dense(), linears["encoder.layer.0.fc"].dense())


def test_config_of_one_format():
    config = ct.quantization_config(layers(QuantSpec(8), TOKEN_ASYMMETRIC), {})
    assert config["format"] == "int-quantized" and config["ignore"] == ["pooler.dense"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_config_of_two_formats_has_patterns():
    linears = layers(QuantSpec(8), TOKEN_ASYMMETRIC, "bert.")
    wide = layers(QuantSpec(4, granularity="group", group_size=16), TOKEN_ASYMMETRIC, "bert.")
    linears |= {name.replace("fc", "wide"): layer for name, layer in wide.items() if "fc" in name}
    config = ct.quantization_config(linears, {
        "bert.embeddings.word": RTN().quantize(np.ones((3, 4), np.float32), QuantSpec(8))})
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["bert.pooler.dense", "pooler.dense"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [[r"re:(.*\.)?encoder\.layer\.\d+\.fc$"], [r"re:(.*\.)?encoder\.layer\.\d+\.wide$"],
                       [r"re:(.*\.)?embeddings\.word$"]]


def test_patterns_do_not_reach_layers_of_another_format():
    linears = layers(QuantSpec(8), TOKEN_ASYMMETRIC)
    linears["encoder.layer.1.fc"] = layers(QuantSpec(4), TOKEN_ASYMMETRIC)["encoder.layer.1.fc"]
    targets = [group["targets"] for group in ct.quantization_config(linears, {})["config_groups"].values()]
    assert targets == [[r"re:(.*\.)?encoder\.layer\.0\.fc$"], [r"re:(.*\.)?encoder\.layer\.1\.fc$"]]


def test_packing_of_the_published_vector():
    """Codes 0..7 of int4 are the word 0x76543210 once 8 is added to signed codes; 3-bit codes i % 8 are known too."""
    weight = RTN().quantize(np.zeros((1, 8), np.float32), QuantSpec(4))
    object.__setattr__(weight, "codes", (np.arange(8, dtype=np.int8) - 8)[None])
    assert ct.pack_layer("m", weight, True)["m.weight_packed"].view(np.uint32).tolist() == [[0x76543210]]
    weight = RTN().quantize(np.zeros((1, 32), np.float32), QuantSpec(3))
    object.__setattr__(weight, "codes", (np.arange(32) % 8 - 4).astype(np.int8)[None])
    assert ct.pack_layer("m", weight, True)["m.weight_packed"].view(np.uint32).tolist() == [
        [0x88FAC688, 0xC688FAC6, 0xFAC688FA]]


FC = "encoder.layer.0.fc"


def put(name, value):
    return lambda tensors: tensors.__setitem__(f"{FC}.{name}", value)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(f"{FC}.weight_scale"), "weight_scale' is missing"),
    (lambda t: t.pop(f"{FC}.weight_shape"), "weight_shape' is missing"),
    (put("weight_scale", np.ones((12, 2), np.float32)), r"weight_scale.*expected .* of shape \(12, 3\)"),
    (put("weight_scale", np.ones((12, 3), np.int32)), "weight_scale.*is I32"),
    (put("weight_scale", np.zeros((12, 3), np.float32)), "not finite and positive"),
    (put("weight_scale", np.full((12, 3), np.nan, np.float32)), "not finite and positive"),
    (put("weight_packed", np.zeros((12, 4), np.int32)), r"weight_packed.*of shape \(12, 5\)"),
    (put("weight_packed", np.zeros((12, 5), np.float32)), "weight_packed.*is F32"),
    (put("weight_shape", np.array([-1, 37])), "negative"),
    (put("weight_shape", np.array([12, 2**62])), "weight_packed|weight_scale"),
    (put("weight_shape", np.array([12])), "weight_shape"),
    (put("weight_g_idx", np.zeros(37, np.int32)), "weight_g_idx"),
])
def test_broken_packed_layers(tmp_path, change, words):
    with pytest.raises(FormatError, match=words) as error:
        store(tmp_path, layers(QuantSpec(4, granularity="group", group_size=16), TOKEN_ASYMMETRIC), change=change).linear(FC)
    assert FC in str(error.value) and str(tmp_path) in str(error.value)


def group(key, value):
    return lambda config: config["config_groups"]["group_0"].__setitem__(key, value)


def argument(key, value, of="weights"):
    return lambda config: config["config_groups"]["group_0"][of].__setitem__(key, value)


@pytest.mark.parametrize("change, words", [
    (lambda c: c.update(quant_method="gptq"), "'gptq'"),
    (lambda c: c.update(quantization_status="frozen"), "compressed"),
    (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    (lambda c: c.update(config_groups=[1]), "config_groups"),
    (group("targets", ["re:nothing"]), "no config_groups target"),
    (group("weights", None), "weights"),
    (group("output_activations", {"num_bits": 8}), "output_activations"),
    (argument("type", "float"), "integer formats"),
    (argument("strategy", "block"), "integer formats"),
    (argument("num_bits", 9), "bits"),
    (argument("num_bits", 4, "input_activations"), "8 bits per token"),
    (argument("strategy", "group", "input_activations"), "group"),
    (lambda c: c["config_groups"]["group_0"]["input_activations"].update(strategy="tensor", dynamic=False), "input_scale"),
    (lambda c: c["config_groups"]["group_0"].pop("targets"), "targets"),
])
def test_configurations_that_are_not_supported(tmp_path, change, words):
    with pytest.raises(FormatError, match=words) as error:
        store(tmp_path, layers(QuantSpec(8), TOKEN_ASYMMETRIC), config_change=change).linear(FC)
    assert str(tmp_path) in str(error.value)


def test_codes_without_a_quantization_config(tmp_path):
    linears = layers(QuantSpec(8), TOKEN_ASYMMETRIC)
    store(tmp_path, linears)
    with pytest.raises(FormatError, match="encoder.layer.0.fc.weight is quantized but config.json has no"):
        ct.ModelTensors(open_checkpoint(tmp_path), {})


@pytest.mark.parametrize("metadata, error, words", [
    ({"zquant_format_version": "3", "zquant": "{}"}, VersionError, "version 3.*upgrade"),
    ({"zquant_format_version": "x", "zquant": "{}"}, VersionError, "version x"),
    ({"zquant_format_version": "1"}, FormatError, "damaged"),
    ({"zquant_format_version": "1", "zquant": "["}, FormatError, "damaged"),
    ({"zquant_format_version": "1", "zquant": '{"scheme": 3, "layers": {}}'}, FormatError, "damaged"),
])
def test_metadata_of_later_versions_and_damaged(tmp_path, metadata, error, words):
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)}, metadata)
    with pytest.raises(error, match=words):
        ct.ModelTensors(open_checkpoint(tmp_path), {})
