"""quantize(), save and load: bit-identical outputs, what the directory holds, what is refused."""
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")

import tiny_decoders  # noqa: E402
from tiny_models import FAMILIES, batch, config_of, tensors_of, write  # noqa: E402

import zquant as zq  # noqa: E402
from zquant import saving  # noqa: E402
from zquant.demo_model import find_minilm  # noqa: E402
from zquant.errors import FormatError, VersionError  # noqa: E402
from zquant.formats.safetensors import Stored, open_checkpoint, write_safetensors  # noqa: E402
from zquant.qtensor import QTensor  # noqa: E402
from zquant.saving import check_source, check_writable  # noqa: E402
from zquant.spec import QuantSpec, Scheme  # noqa: E402

LLAMA = Path(__file__).parent / "data" / "tiny-llama-5m"
SCHEMES = ["w8a8", "w8a8-sym", "w8a8+e32", "w8a8-b16", "w8a8-g16", "w4/8a8", "w4/8a8-g16", "w4/8a8-b8", "w4a8-g32-sym",
           "w3a8-g8", "w8a16", "w4a16", "w3a16-g16"]


@pytest.fixture
def tiny(tmp_path):
    def make(kind="bert", head=False, **options):
        return zq.load(write(tmp_path / "float", config_of(kind, head), tensors_of(kind, head), **options))
    return make


def same_model(a, b):
    """Bit-equal parameters and formats."""
    assert list(a.linears) == list(b.linears) and list(a.tensors) == list(b.tensors)
    for name, layer in a.linears.items():
        other = b.linears[name]
        assert (layer.spec, layer.activations) == (other.spec, other.activations), name
        np.testing.assert_array_equal(layer.dense(), other.dense(), err_msg=name)
        np.testing.assert_array_equal(layer.bias, other.bias, err_msg=name)
    assert a.scheme == b.scheme and a.nbytes == b.nbytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_the_same_bits(tiny, tmp_path, scheme):
    q = zq.quantize(tiny(), scheme)
    ids, mask = batch("bert")
    again = zq.load(q.save(tmp_path / "saved"))
    same_model(q, again)
    np.testing.assert_array_equal(q(ids, mask), again(ids, mask))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again))(ids, mask), q(ids, mask))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_and_head(tiny, tmp_path, kind, head):
    q = zq.quantize(tiny(kind, head), "w4/8a8-g16")
    assert any(layer.spec == QuantSpec(8) for layer in q.linears.values())
    assert any(layer.spec == QuantSpec(4, granularity="group", group_size=16) for layer in q.linears.values())
    again = zq.load(q.save(tmp_path / "saved"))
    ids, mask = batch(kind)
    np.testing.assert_array_equal(q(ids, mask), again(ids, mask))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    floats = {name for name, layer in q.linears.items() if layer.spec is None}
    assert floats <= set(config["quantization_config"]["ignore"])
    assert {k: v for k, v in config.items() if k != "quantization_config"} == config_of(kind, head)


def test_a_float_model_saves_and_a_quantized_one_saves_again(tiny, tmp_path):
    model, (ids, mask) = tiny(), batch("bert")
    again = zq.load(model.save(tmp_path / "float2"))
    np.testing.assert_array_equal(model(ids, mask), again(ids, mask))
    assert "quantization_config" not in json.loads((tmp_path / "float2" / "config.json").read_text())
    first = zq.load(zq.quantize(again, "w4/8a8-g16").save(tmp_path / "one"))
    first.save(tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_saving_over_the_source(tiny):
    model, (ids, mask) = tiny(), batch("bert")
    want = model(ids, mask)
    q = zq.quantize(model, "w8a8")
    extra = model.path / "notes.txt"
    extra.write_text("mine")
    q.save(model.path)
    np.testing.assert_array_equal(zq.load(model.path)(ids, mask), q(ids, mask))
    np.testing.assert_array_equal(model(ids, mask), want)  # still mapped from the replaced file
    assert extra.read_text() == "mine"
    assert not [p for p in model.path.parent.iterdir() if p.name.startswith(".")]


def test_a_failed_save_leaves_nothing(tiny, tmp_path, monkeypatch):
    q = zq.quantize(tiny(), "w8a8")
    q.save(tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    monkeypatch.setattr("zquant.saving.quantization_config", lambda *_: 1 / 0)
    for place in ("saved", "new"):
        with pytest.raises(ZeroDivisionError):
            q.save(tmp_path / place)
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float", "saved"]


def test_saving_into_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        tiny().save(tmp_path / "file")


def test_half_precision_tensors_stay_as_they_came(tmp_path):
    tensors = {name: Stored((value.view(np.uint32) >> 16).astype(np.uint16), "BF16")
               for name, value in tensors_of("bert").items()}
    source = write(tmp_path / "bf16", config_of("bert"), {})
    write_safetensors(source / "model.safetensors", tensors)
    q = zq.quantize(zq.load(source), "w8a8+e32")
    saved = open_checkpoint(q.save(tmp_path / "saved"))
    for name in ("pooler.dense.weight", "embeddings.LayerNorm.bias", "embeddings.word_embeddings.weight",
                 "encoder.layer.0.output.dense.bias"):
        assert saved.dtype(name) == "BF16"
        np.testing.assert_array_equal(saved.stored(name).array, tensors[name].array)
    assert saved.dtype("encoder.layer.0.output.dense.weight") == "I8"
    ids, mask = batch("bert")
    np.testing.assert_array_equal(zq.load(tmp_path / "saved")(ids, mask), q(ids, mask))


def test_sharded_sources(tiny, tmp_path):
    q = zq.quantize(tiny(shards=3), "w8a8")
    ids, mask = batch("bert")
    np.testing.assert_array_equal(zq.load(q.save(tmp_path / "saved"))(ids, mask), q(ids, mask))


# ---- where the model came from -----------------------------------------------------------------------------------------
def dtypes(directory):
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.dtype(name) for name in checkpoint}


def test_a_relative_path_and_another_working_directory(tmp_path, monkeypatch):
    shutil.copytree(LLAMA, tmp_path / "m")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    model = zq.load("m")
    q = zq.quantize(model, "w4a8")
    monkeypatch.chdir(tmp_path / "sub")
    assert model.path == tmp_path / "m" and q.replace(path=Path("x")).path == tmp_path / "sub" / "x"
    assert q.generate("hi", max_new_tokens=1).ids
    for name, what in (("float", model), ("q", q)):
        assert what.save(name) == Path(name)
        assert (tmp_path / "sub" / name / "tokenizer.json").read_bytes() == (LLAMA / "tokenizer.json").read_bytes()
    assert dtypes("float") == dtypes(LLAMA)


def in_halves(tensors, dtype):
    if dtype == "F16":
        return {name: value.astype(np.float16) for name, value in tensors.items()}
    return {name: Stored((value.view(np.uint32) >> 16).astype(np.uint16), "BF16") for name, value in tensors.items()}


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_float_models_keep_16_bits_after_their_files_are_overwritten(kind, dtype, tmp_path):
    config = config_of(kind) if kind == "bert" else tiny_decoders.config_of(kind)
    tensors = tensors_of(kind) if kind == "bert" else tiny_decoders.tensors_of(config)
    source = write(tmp_path / "m", config, {})
    write_safetensors(source / "model.safetensors", in_halves(tensors, dtype))
    shutil.copytree(source, tmp_path / "before")
    model = zq.load(source)
    name = next(name for name in model.tensors if "norm" in name.lower() or "ln_" in name)
    changed = model.replace(norms={name: np.float32(model.tensors[name]) + np.float32(1e-6)})
    zq.quantize(model, "w8a8").save(source)
    zq.load(model.save(tmp_path / "after"))
    before, after = open_checkpoint(tmp_path / "before"), open_checkpoint(tmp_path / "after")
    assert set(before) == set(after) and set(dtypes(tmp_path / "after").values()) == {dtype}
    assert all(np.array_equal(before.stored(name).array, after.stored(name).array) for name in before)
    saved = dtypes(changed.save(tmp_path / "changed"))
    assert saved.pop(name) == "F32" and set(saved.values()) == {dtype}  # what 16 bits cannot hold is not rounded


def test_a_source_that_is_gone_or_cannot_be_read(tmp_path):
    source, want = tmp_path / "m", tmp_path / "saved"
    shutil.copytree(LLAMA, source)
    model = zq.load(source)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="m/tokenizer.json"):
        model.save(want)
    (source / "tokenizer.json").unlink()
    (source / "modules.json").write_text("{")
    with pytest.raises(FormatError, match="m/modules.json: not a list of modules"):
        model.save(want)
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match="the directory that the model was loaded from.* is gone.*m'$"):
        model.save(want)
    assert not list(tmp_path.iterdir())


GONE = "the directory that the model was loaded from, whose tokenizer and other files .* is gone.*/m'$"


def test_a_source_that_is_gone_is_said_before_anything_is_written(minilm, tmp_path, monkeypatch):
    """And before the work whose result is to be saved, to those who ask."""
    monkeypatch.setattr(saving, "_stage", lambda _: pytest.fail("the target was touched"))
    for origin, load in ((LLAMA, zq.load), (minilm.path, zq.SentenceEncoder)):
        model = load(shutil.copytree(origin, tmp_path / "m"))
        check_source(model)
        shutil.rmtree(tmp_path / "m")
        for call in (lambda: check_source(model), lambda: model.save(tmp_path / "saved")):
            with pytest.raises(FileNotFoundError, match=GONE):
                call()
    assert not list(tmp_path.iterdir())


def test_check_source_reads_what_is_copied(minilm, tmp_path):
    model = zq.SentenceEncoder(shutil.copytree(minilm.path, tmp_path / "m"))
    changes = {"1_Pooling/more.json": FileNotFoundError, "tokenizer.json": FileNotFoundError, "modules.json": FormatError}
    for name, error in changes.items():
        file = tmp_path / "m" / name
        kept = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        if error is FormatError:
            file.write_text("{")
        else:
            file.symlink_to("nowhere")
        with pytest.raises(error, match=f"m/{name}"):
            check_source(model)
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
    check_source(model)
    (tmp_path / "m" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(ValueError, match="has changed since the encoder was loaded"):
        check_source(model)


@pytest.mark.parametrize("late", [False, True])
def test_a_source_that_goes_meanwhile(minilm, tmp_path, monkeypatch, late):
    """Before its files are copied: an error, and nothing is left. While the weights are written: it is not needed any more."""
    source = shutil.copytree(minilm.path, tmp_path / "m")
    model = zq.SentenceEncoder(source)
    model.max_seq_length = 12  # another one than the files say
    model.tokenize(["read while it was there"])
    name = "_write_model" if late else "_copy_companions"
    real = getattr(saving, name)

    def with_the_source_gone(*arguments):
        shutil.rmtree(source, ignore_errors=True)
        return real(*arguments)

    monkeypatch.setattr(saving, name, with_the_source_gone)
    if not late:
        with pytest.raises(FileNotFoundError, match=GONE):
            model.save(tmp_path / "saved")
        assert not list(tmp_path.iterdir())
        return
    again = zq.SentenceEncoder(model.save(tmp_path / "saved"))
    options = json.loads((minilm.transformer / "sentence_bert_config.json").read_bytes())
    assert json.loads((again.transformer / "sentence_bert_config.json").read_bytes()) == {**options, "max_seq_length": 12}
    same_model(again.model, model.model)


# ---- where it goes -----------------------------------------------------------------------------------------------------
def left_behind(*directories):
    return [path for directory in directories for path in directory.rglob(".*")]


def test_a_link_to_another_file_system(tiny, tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        link = tmp_path / "link"
        link.symlink_to(other)
        model = tiny()
        check_writable(link)
        assert model.save(link) == link and link.is_symlink()
        same_model(zq.load(other), model)
        assert not left_behind(tmp_path, Path(other))


def test_a_module_that_is_a_link_to_another_file_system(minilm, tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "1_Pooling").symlink_to(other)
        minilm.save(tmp_path / "out")
        assert zq.SentenceEncoder(tmp_path / "out").pooling == ("mean",)
        assert [file.name for file in Path(other).iterdir()] == ["config.json"]


def test_a_target_whose_parent_is_not_writable(tiny, tmp_path, monkeypatch):
    model, real = tiny(), tempfile.mkdtemp
    (tmp_path / "volume" / "out").mkdir(parents=True)

    def refused(*args, dir, **options):
        if Path(dir) == tmp_path / "volume":
            raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/.temporary")
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    check_writable(tmp_path / "volume" / "out")
    same_model(zq.load(model.save(tmp_path / "volume" / "out")), model)
    for function in (check_writable, model.save):
        with pytest.raises(PermissionError, match="cannot be written: Permission denied in .*volume: '.*volume/new/one'"):
            function(tmp_path / "volume" / "new" / "one")
    assert [path.name for path in (tmp_path / "volume").iterdir()] == ["out"] and not left_behind(tmp_path)


def test_the_length_that_was_set_is_saved(minilm, tmp_path):
    """Else the saved encoder would give other embeddings of long texts."""
    before = minilm.max_seq_length
    try:
        minilm.max_seq_length = 12
        minilm.save(tmp_path / "short")
    finally:
        minilm.max_seq_length = before
    again = zq.SentenceEncoder(tmp_path / "short")
    assert again.max_seq_length == 12 and len(again.tokenize(["word " * 50])[0]) == 12
    options = json.loads((again.transformer / "sentence_bert_config.json").read_bytes())
    assert options == {**json.loads((minilm.transformer / "sentence_bert_config.json").read_bytes()), "max_seq_length": 12}
    again.save(tmp_path / "short")
    assert zq.SentenceEncoder(tmp_path / "short").max_seq_length == 12


def test_a_read_only_source_does_not_make_its_copy_read_only(minilm, tmp_path):
    source = shutil.copytree(minilm.path, tmp_path / "source")
    (source / "1_Pooling").chmod(0o555)
    (tmp_path / "new").mkdir()
    usual = (tmp_path / "new").stat().st_mode
    for target in ("new", "out"):
        zq.SentenceEncoder(source).save(tmp_path / target)
        assert (tmp_path / target / "1_Pooling").stat().st_mode == (tmp_path / target).stat().st_mode == usual
    (source / "1_Pooling").chmod(0o755)
    assert not list(tmp_path.rglob(".zquant-save*"))


def test_permissions_are_those_of_new_files_there(tiny, tmp_path):
    """A shared directory gives its group to what is made in it."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)
    (tmp_path / "shared" / "plain").mkdir()
    tiny().save(tmp_path / "shared" / "model")
    assert (tmp_path / "shared" / "model").stat().st_mode == (tmp_path / "shared" / "plain").stat().st_mode


def test_links_that_lead_nowhere(tiny, tmp_path):
    model = tiny()
    (tmp_path / "dangling").symlink_to(tmp_path / "a" / "b")
    check_writable(tmp_path / "dangling")
    assert not (tmp_path / "a").exists()
    model.save(tmp_path / "dangling")
    same_model(zq.load(tmp_path / "a" / "b"), model)
    (tmp_path / "loop").symlink_to("loop")
    for function in (check_writable, model.save):
        with pytest.raises(ValueError, match="loop: is a symbolic link that leads back to itself"):
            function(tmp_path / "loop")
    assert not left_behind(tmp_path)


def test_files_in_the_way(tiny, tmp_path):
    model = tiny()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file; save needs a directory"):
        check_writable(tmp_path / "file")
    for function in (check_writable, model.save):
        with pytest.raises(NotADirectoryError, match="Not a directory in .*file: '.*file/out'"):
            function(tmp_path / "file" / "out")
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="is a directory, where a file of the model goes: '.*out/config.json'"):
        model.save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_a_full_disk_names_the_target(tiny, tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    model = tiny()
    monkeypatch.setattr("zquant.saving.write_safetensors", full)
    with pytest.raises(OSError, match="cannot be written: No space left on device in .*: '.*/new'$") as raised:
        model.save(tmp_path / "new")
    assert ".zquant" not in str(raised.value) and not (tmp_path / "new").exists() and not left_behind(tmp_path)


# ---- sentence encoders -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def minilm():
    try:
        return zq.SentenceEncoder(find_minilm())
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("scheme", ["w8a8", "w4/8a8", "w4/8a8-b48"])
def test_minilm(minilm, tmp_path, scheme):
    sentences = ["A cat sleeps.", "", "Nobody expected the committee to agree so quickly.", "x " * 400]
    q = zq.quantize(minilm, scheme)
    again = zq.SentenceEncoder(q.save(tmp_path / "saved"))
    np.testing.assert_array_equal(q.encode(sentences), again.encode(sentences))
    assert again.max_seq_length == 256
    assert isinstance(q, zq.SentenceEncoder) and minilm.model.scheme is None
    size = sum(p.stat().st_size for p in (tmp_path / "saved").glob("*.safetensors"))
    assert q.nbytes <= size < q.nbytes * 1.01 + 30_000
    for name in ("modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
                 "1_Pooling/config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (minilm.path / name).read_bytes()


def test_a_transformer_in_its_own_folder(minilm, tmp_path):
    root, inner = tmp_path / "st", tmp_path / "st" / "0_Transformer"
    inner.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"):
        (inner / file).symlink_to(minilm.path / file)
    modules = json.loads((minilm.path / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_bytes((minilm.path / "1_Pooling" / "config.json").read_bytes())
    q = zq.quantize(zq.SentenceEncoder(root), "w8a8")
    saved = q.save(tmp_path / "saved")
    assert (not (saved / "config.json").exists()
            and "quantization_config" in (saved / "0_Transformer" / "config.json").read_text())
    np.testing.assert_array_equal(zq.SentenceEncoder(saved).encode(["a b"]), q.encode(["a b"]))


def test_an_encoder_whose_files_have_changed(minilm, tmp_path):
    source = zq.SentenceEncoder(minilm.save(tmp_path / "m"))
    (source.path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    with pytest.raises(ValueError, match="m: its modules.json, or a file that belongs to it, has changed"):
        source.save(tmp_path / "saved")
    shutil.rmtree(source.path / "1_Pooling")
    with pytest.raises(FormatError, match="m/1_Pooling"):
        source.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_peak_memory_of_quantizing(tmp_path):
    """Quantizing adds less than 1.3 times the float model's size to the process: here a model of 60 MB."""
    config = config_of("bert") | dict(vocab_size=20_000, hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    rng, tensors = np.random.default_rng(0), {}
    for name, value in tensors_of("bert").items():
        swap = {48: 384, 80: 1536, 61: 20_000}
        tensors[name] = rng.standard_normal([swap.get(n, n) for n in value.shape], dtype=np.float32)
    size = sum(t.nbytes for t in tensors.values())
    write(tmp_path / "m", config, tensors)
    code = ("import resource, sys, zquant as zq, safetensors, tqdm\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "before = peak()\n"
            "zq.quantize(zq.load(sys.argv[1]), 'w8a8').save(sys.argv[2])\n"
            "print(peak() - before)")
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "m", tmp_path / "q"], check=True, capture_output=True,
                         text=True, env=os.environ | {"PYTHONPATH": str(Path(zq.__file__).parents[1])})
    assert int(out.stdout) < 1.3 * size


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_the_input_is_untouched(tiny):
    model, (ids, mask) = tiny(), batch("bert")
    want = model(ids, mask)
    before = {name: layer.weight for name, layer in model.linears.items()}
    zq.quantize(model, "w4a8-g16")
    assert all(model.linears[name].weight is weight for name, weight in before.items()) and model.scheme is None
    np.testing.assert_array_equal(model(ids, mask), want)


@pytest.mark.parametrize("name", ["encoder.layer.1.intermediate.dense.weight", "embeddings.word_embeddings.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_not_finite_weights_name_the_layer(tmp_path, name, value):
    tensors = tensors_of("bert")
    tensors[name][3, 2] = value
    model = zq.load(write(tmp_path / "float", config_of("bert"), tensors))
    with pytest.raises(ValueError, match=name.removesuffix(".weight") + ".*row 3"):
        zq.quantize(model, "w8a8")


@pytest.mark.parametrize("scheme, words", [
    ("w8a9", "unknown scheme 'w8a9'"),
    ("w9a8", "bits"),
    ("w8a8-g0", "group_size"),
    ("w4a8-g12", "encoder.layer.0.attention.self.query: group size 12"),
    ("w8a8-b7", "encoder.layer.0.attention.self.query: .*7"),
    (Scheme.parse("w8a8").with_overrides({"encoder.layer.9.*": "float"}), "'encoder.layer.9.\\*' matches no"),
    (Scheme("x", QuantSpec(8, symmetric=False), QuantSpec(8, granularity="token", dynamic=True)), "query: asymmetric"),
])
def test_schemes_that_cannot_run(tiny, scheme, words):
    with pytest.raises(ValueError, match=words):
        zq.quantize(tiny(), scheme)


def test_other_refusals(tiny):
    q = zq.quantize(tiny(), "w8a8")
    with pytest.raises(ValueError, match="query: is quantized already"):
        zq.quantize(q, "w4a8")
    with pytest.raises(ValueError, match="unknown method 'best'"):
        zq.quantize(tiny(), "w8a8", "best")


def test_overrides(tiny, tmp_path):
    scheme = Scheme.parse("w8a8").with_overrides({"encoder.layer.0.*": "float", "*.layer.1.output.dense": 4, "pooler*": 8})
    q = zq.quantize(tiny(), scheme)
    specs = {name: layer.spec for name, layer in q.linears.items()}
    assert specs["encoder.layer.0.output.dense"] is None and specs["pooler.dense"] == QuantSpec(8)
    assert specs["encoder.layer.1.output.dense"].bits == 4 and specs["encoder.layer.1.attention.self.key"] == QuantSpec(8)
    again = zq.load(q.save(tmp_path / "saved"))
    same_model(q, again)
    ids, mask = batch("bert")
    np.testing.assert_array_equal(q(ids, mask), again(ids, mask))


def test_asymmetric_weights_run_and_save(tiny, tmp_path):
    scheme = Scheme("u4", QuantSpec(4, granularity="group", group_size=16, symmetric=False))
    q, (ids, mask) = zq.quantize(tiny(), scheme), batch("bert")
    again = zq.load(q.save(tmp_path / "saved"))
    same_model(q, again)
    np.testing.assert_array_equal(q(ids, mask), again(ids, mask))


def rewrite(directory, change):
    """Change the metadata of a saved model in place."""
    checkpoint = open_checkpoint(directory)
    metadata = checkpoint.metadata
    change(metadata)
    tensors = {name: Stored(checkpoint.stored(name).array.copy(), checkpoint.dtype(name)) for name in checkpoint}
    write_safetensors(directory / "model.safetensors", tensors, metadata)


def test_a_newer_format_version(tiny, tmp_path):
    saved = zq.quantize(tiny(), "w8a8").save(tmp_path / "saved")
    rewrite(saved, lambda m: m.update(zquant_format_version="3"))
    with pytest.raises(VersionError, match="version 3; this zquant reads up to version 2: upgrade"):
        zq.load(saved)


def test_a_saved_model_without_its_metadata(tiny, tmp_path):
    q, (ids, mask) = zq.quantize(tiny(), "w8a8-b16"), batch("bert")
    saved = q.save(tmp_path / "saved")
    rewrite(saved, lambda m: m.clear() or m.update(format="pt"))
    again = zq.load(saved)
    assert again.scheme is None and "quantized" in repr(again)
    np.testing.assert_array_equal(again(ids, mask), q(ids, mask))


@pytest.mark.parametrize("keep", [0.5, 0.999, 0.01])
def test_truncated_saved_models(tiny, tmp_path, keep):
    file = zq.quantize(tiny(), "w8a8").save(tmp_path / "saved") / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:int(keep * len(data))])
    with pytest.raises(FormatError, match="model.safetensors"):
        zq.load(tmp_path / "saved")


def test_quantized_embeddings_are_looked_up_row_by_row(tiny):
    q = zq.quantize(tiny(), "w8a8")
    table = q.word_embeddings
    assert isinstance(table, QTensor) and table.shape == (61, 48)
    assert sum(isinstance(t, QTensor) for t in q.tensors.values()) == 1
