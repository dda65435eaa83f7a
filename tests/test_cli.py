"""The command line: exit codes, messages, and (where all-MiniLM-L6-v2 is installed) whole runs."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_lm import LM
from fakes import Encoder, Model

import zquant
from zquant import cli
from zquant.demo import Row, format_rows
from zquant.demo_sentences import PAIRS, SENTENCES
from zquant.generate import generate


def call(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


#: Both ways to the command: as a module, and what the installed script does.
STARTS = {
    "module": ["-m", "zquant"],
    "script": [
        "-c",
        "import sys; from importlib.metadata import entry_points as found\n"
        "(command,) = set(found(group='console_scripts', name='zquant'))\nsys.exit(command.load()())",
    ],
}


def process(*argv, start="module", **options):
    return subprocess.Popen(
        [sys.executable, *STARTS[start], *map(str, argv)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


# --- usage -------------------------------------------------------------------------------------------------------


def test_version_and_help(capsys):
    assert call(capsys, "--version") == (0, f"zquant {zquant.__version__}\n", "")
    for command in ("quantize", "compare", "eval sts", "ppl", "generate", "info", "demo"):
        code, out, _ = call(capsys, *command.split(), "--help")
        assert code == 0 and f"examples:\n  zquant {command}" in out and "--threads" in out
        assert max(map(len, out.splitlines())) <= 132


USAGE = {
    "no command": [],
    "unknown command": ["quantise"],
    "no output": ["quantize", "x"],
    "unknown scheme": ["quantize", "x", "-o", "y", "--scheme", "w9a9"],
    "override without a format": ["quantize", "x", "-o", "y", "--override", "*.dense"],
    "override with 9 bits": ["quantize", "x", "-o", "y", "--override", "*=9"],
    "override with group size 0": ["quantize", "x", "-o", "y", "--override", "*=4-g0"],
    "no threads": ["info", "--threads", "0"],
    "two sources": ["compare", "x", "y", "--sentences", "a", "--sts", "b"],
    "sentences and text": ["compare", "x", "y", "--sentences", "a", "--text", "b"],
    "no text": ["ppl", "x"],
    "seq-len 1": ["ppl", "x", "--text", "y", "--seq-len", "1"],
    "stride 0": ["ppl", "x", "--text", "y", "--stride", "0"],
    "no prompt": ["generate", "x"],
    "temperature": ["generate", "x", "y", "--temperature", "-1"],
    "temperature nan": ["generate", "x", "y", "--temperature", "nan"],
    "top-p": ["generate", "x", "y", "--top-p", "1.5"],
    "tokens": ["generate", "x", "y", "--max-new-tokens", "many"],
    "cache": ["generate", "x", "y", "--kv-cache", "int4"],
    "empty output": ["quantize", "x", "-o", "", "--force"],
    "empty model": ["info", ""],
    "threads of a superscript": ["info", "--threads", "\u00b2"],
    "seed of a superscript": ["generate", "x", "y", "--seed", "\u00b2"],
    "two weight groupings": ["quantize", "x", "-o", "y", "--scheme", "w4a16-g32-row"],
    "batch size 0": ["eval", "sts", "x", "y", "--batch-size", "0"],
}


@pytest.mark.parametrize("argv", USAGE.values(), ids=USAGE.keys())
def test_usage_errors(capsys, argv):
    code, out, err = call(capsys, *argv)
    assert code == 2 and out == "" and "error:" in err and "Traceback" not in err


def test_overrides():
    from zquant.spec import QuantSpec

    assert cli._override("a*=float") == ("a*", "float")
    assert cli._override("x=y=int8") == ("x=y", 8)
    assert cli._override("*=4-g32") == ("*", QuantSpec(4, granularity="group", group_size=32))
    assert cli._override("*=8-b48") == ("*", QuantSpec(8, granularity="row_block", blocks=48))


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path):
    """A directory that is not empty."""
    path = tmp_path / "full"
    path.mkdir()
    (path / "file").write_text("kept")
    return path


def test_failures_are_one_line(capsys, tmp_path, full):
    file = full / "file"
    empty = tmp_path / "empty"
    empty.write_text("\n\n")
    cases = [
        (["quantize", tmp_path / "none", "-o", tmp_path / "out"], "none: not a directory"),
        (["quantize", full, "-o", tmp_path / "out"], "config.json"),
        (["quantize", tmp_path / "none", "-o", full], "full: not empty; --force writes into it"),
        (["quantize", tmp_path / "none", "-o", file], "exists and is not a directory"),
        (["quantize", full, "-o", full, "--force"], "is the model itself"),
        (["compare", full, full, "--sentences", empty], "no sentences"),
        (["compare", full, full, "--sentences", tmp_path / "none"], "No such file or directory: .*none"),
        (["eval", "sts", full, file], "line 1: expected two sentences and a score"),
        (["info", tmp_path / "none"], "not a directory"),
        (["ppl", tmp_path / "none", "--text", file], "none: not a directory"),
        (["ppl", full, "--text", tmp_path / "none"], "No such file or directory: .*none"),
        (["compare", full, full, "--text", tmp_path / "none"], "No such file or directory: .*none"),
        (["generate", full, "a"], "config.json"),
    ]
    for argv, message in cases:
        code, out, err = call(capsys, *argv)
        assert (code, out) == (1, ""), argv
        assert re.fullmatch(rf"zquant: .*{message}.*\n", err), err
    assert file.read_text() == "kept" and not (tmp_path / "out").exists()


def test_a_source_that_cannot_be_copied_is_said_before_the_work(capsys, monkeypatch, tmp_path):
    """As where a cache of links lost what one of them leads to."""
    source = shutil.copytree(Path(__file__).parent / "data" / "tiny-llama-5m", tmp_path / "m")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("nowhere")
    monkeypatch.setattr(sys.modules["zquant.quantize"], "quantize", lambda *_, **__: pytest.fail("began to quantize"))
    code, out, err = call(capsys, "quantize", source, "-o", tmp_path / "out")
    assert (code, out, err) == (1, "", f"zquant: No such file or directory: {source / 'tokenizer.json'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_unexpected_error_names_its_type(capsys, monkeypatch, tmp_path):
    def fail(*_):
        raise KeyError("weight")

    monkeypatch.setattr(cli, "_open", fail)
    assert call(capsys, "info", tmp_path) == (1, "", "zquant: KeyError: 'weight'\n")
    monkeypatch.setenv("ZQUANT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main(["info", str(tmp_path)])


@pytest.mark.parametrize("start", STARTS)
def test_interrupt(tmp_path, start):
    """Ctrl-C while a file is being read: exit code 130, no traceback. The pipe makes the moment certain."""
    fifo = tmp_path / "pairs.csv"
    os.mkfifo(fifo)
    child = process("eval", "sts", tmp_path, fifo, start=start)
    with open(fifo, "w"):  # opens when the child reads
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (130, "", "zquant: interrupted\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_interrupt_while_numpy_is_imported(tmp_path, ignored):
    """The script says so as always; with Ctrl-C ignored, as behind nohup, it goes on."""
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nos._exit(7)\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        child = process("info", start="script", env={**os.environ, "PYTHONPATH": paths})
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == ((7, "", "") if ignored else (130, "", "zquant: interrupted\n"))


def test_interrupt_while_arguments_are_parsed(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    assert call(capsys, "info") == (130, "", "zquant: interrupted\n")


def test_closed_pipe():
    child = process("info")
    child.stdout.close()
    assert child.wait(timeout=20) == 0
    assert child.stderr.read() == ""


def test_info(capsys):
    code, out, err = call(capsys, "info", "--threads", "1")
    assert (code, err) == (0, "")
    assert re.search(rf"^zquant +{zquant.__version__}$", out, re.M) and re.search(r"^threads +1$", out, re.M)
    assert zquant.cpu.info().active in out


@pytest.fixture(autouse=True)
def _threads():
    """Commands set the number of threads of this process."""
    before = zquant.get_num_threads()
    yield
    zquant.set_num_threads(before)


# --- commands on a small NumPy model -----------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    model = Model.make()
    models = {"float": Encoder(model), "int8": Encoder(model.quantized())}
    monkeypatch.setattr(cli, "_open", lambda path, encoder=False: models[path.name])
    return models


def test_compare(capsys, tmp_path, fake):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("first sentence\n\nanother one\n")
    code, out, _ = call(capsys, "compare", "float", "int8", "--sentences", sentences, "--json", tmp_path / "r.json",
                        "--html", tmp_path / "r.html")
    assert "Signal to noise" in (tmp_path / "r.html").read_text()
    assert code == 0 and "2 sentences" in out and Model.names[0] in out
    assert json.loads((tmp_path / "r.json").read_text())["scheme"] == "w8a8"


def test_compare_sts_and_plot(capsys, tmp_path, fake):
    pytest.importorskip("matplotlib")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a cat,a cat sat,4\na cat,zzz,0\nrain,brain,2\n")
    code, out, err = call(capsys, "compare", "float", "int8", "--sts", pairs, "--plot", tmp_path / "r.png")
    assert code == 0, err
    assert len(re.findall(r"STS: Spearman +-?[\d.]+", out)) == 2 and "6 sentences" in out
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_eval_sts(capsys, tmp_path, fake):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a cat,a cat sat,4\na cat,zzz,0\n")
    code, out, _ = call(capsys, "eval", "sts", "int8", pairs)
    assert code == 0 and out.startswith("STS: Spearman 100.00")


# --- language models ---------------------------------------------------------------------------------------------


@pytest.fixture
def lm(monkeypatch):
    models = {"float": LM(), "int8": LM().quantized()}
    monkeypatch.setattr(cli, "_open_lm", lambda path: models[path.name])
    monkeypatch.setattr(cli, "_open", lambda path, encoder=False: models[path.name])
    return models


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A text that is long enough for a few windows of sixteen bytes.")
    return path


def test_ppl(capsys, lm, text):
    code, out, err = call(capsys, "ppl", "float", "--text", text, "--seq-len", "16")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"perplexity [\d.]+ \(nll [\d.]+, 58 tokens, 4 windows of 16, [\d.]+ s\)\n", out)
    code, out, _ = call(capsys, "ppl", "float", "--text", text, "--seq-len", "16", "--stride", "8", "--kv-cache", "int8")
    assert code == 0 and "61 tokens" in out and "stride 8" in out and lm["float"].caches[-1] == "int8"
    code, _, err = call(capsys, "ppl", "float", "--text", text)
    assert (code, err) == (1, "zquant: seq_len: 512, but the model has 64 positions\n")


def test_generate(capsys, lm, monkeypatch):
    argv = ["generate", "float", "a", "--max-new-tokens", "6", "--temperature", "1", "--seed", "3"]
    code, out, err = call(capsys, *argv)
    assert code == 0 and out == f"a{generate(LM(), 'a', max_new_tokens=6, temperature=1, seed=3)}\n"
    assert re.fullmatch(r"zquant: 6 tokens after 1, length, \d+ tokens/s\n", err)
    assert call(capsys, *argv, "--stream")[:2] == (0, out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a")))
    assert call(capsys, "generate", "float", "-", *argv[3:])[:2] == (0, out)
    assert call(capsys, *argv[:3], "--max-new-tokens", "0")[1] == "a\n"
    code, _, err = call(capsys, *argv, "--stop", "ab")
    assert code == 1 and "single tokens" in err


def test_interrupted_stream(capsys, lm):
    def follow(history):
        if len(history) == 4:
            raise KeyboardInterrupt
        return ord("x")

    lm["float"].follow = follow
    code, out, err = call(capsys, "generate", "float", "ab", "--stream")
    assert (code, out, err) == (130, "abxx\n", "zquant: interrupted\n")


def test_compare_language_models(capsys, lm, text, tmp_path):
    code, out, _ = call(capsys, "compare", "float", "int8", "--text", text, "--json", tmp_path / "r.json")
    assert code == 0 and "KL to float32" in out and "61 tokens" in out
    assert json.loads((tmp_path / "r.json").read_text())["perplexity"]["tokens"] == 61
    code, _, err = call(capsys, "compare", "float", "int8")
    assert code == 1 and "language models are compared on --text" in err


def test_language_model_commands(capsys, tmp_path):
    """The three lines of a first session, on the model in the repository."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    model, out_dir, file = Path(__file__).parent / "data" / "tiny-llama-5m", tmp_path / "w4", tmp_path / "text.txt"
    file.write_text(" ".join(SENTENCES))
    code, out, err = call(capsys, "quantize", model, "-o", out_dir, "--scheme", "w4a8")
    assert (code, err) == (0, "") and re.search(r"w4a8, 11\.0 -> \d\.\d MB", out)
    before, after = (call(capsys, "ppl", d, "--text", file, "--seq-len", "256")[1] for d in (model, out_dir))
    ppl = [float(re.match(r"perplexity ([\d.]+)", line).group(1)) for line in (before, after)]
    assert 20 < ppl[0] < ppl[1] < 1.3 * ppl[0]
    code, out, err = call(capsys, "generate", out_dir, "The history of", "--max-new-tokens", "8", "--stream")
    assert code == 0 and out.startswith("The history of") and len(out) > 20 and "8 tokens after" in err
    code, out, _ = call(capsys, "info", out_dir)
    assert code == 0 and "language model, 512 positions, vocabulary 4,096" in out and "int4, groups of 64" in out


def test_an_encoder_is_no_language_model(capsys, minilm, tmp_path):
    code, _, err = call(capsys, "generate", minilm, "a")
    assert code == 1 and "BERT is not a language model" in err


# --- what is wrong is said before the work ------------------------------------------------------------------------


TINY = Path(__file__).parent / "data" / "tiny-llama-5m"


@pytest.fixture
def no_work(monkeypatch):
    """No model may be opened."""

    def fail(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(cli, "_open", fail)
    monkeypatch.setattr(cli, "_open_lm", fail)


def refused(capsys, message, *argv):
    code, out, err = call(capsys, *argv)
    assert (code, out) == (1, "") and re.search(message, err), err


@pytest.mark.parametrize("option, name, message", [
    ("--json", "none/r.json", "--json .*none/r.json: .*none is not a directory"),
    ("--html", ".", "--html .*: is a directory"),
    ("--plot", "r.xyz", "unknown kind of picture '.xyz'; known: .*png.*svg"),
    ("--plot", "r", "unknown kind of picture ''"),
])
@pytest.mark.parametrize("command", ["compare", "sweep", "sensitivity"])
def test_files_of_results_are_checked_first(capsys, text, tmp_path, no_work, command, option, name, message):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    more = {"compare": ["int8"], "sweep": ["--methods", "rtn"], "sensitivity": []}[command]
    refused(capsys, message, command, "float", *more, "--text", text, option, tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(capsys, text, tmp_path, no_work):
    tmp_path.chmod(0o500)
    try:
        refused(capsys, "--json .*: may not be written", "compare", "a", "b", "--text", text, "--json", tmp_path / "r.json")
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_directory(capsys, text, tmp_path, no_work, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(capsys, "--json .*: may not be written", "compare", "a", "b", "--text", text, "--json", tmp_path / "r.json")


def test_one_file_that_fails_leaves_the_others(capsys, lm, text, tmp_path, monkeypatch):
    from zquant.tables import Written

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Written, "save_json", full)
    code, out, err = call(capsys, "compare", "float", "int8", "--text", text, "--json", tmp_path / "r.json", "--html",
                          tmp_path / "r.html")
    assert code == 1 and "KL to float32" in out and (tmp_path / "r.html").is_file()
    assert err == f"zquant: --json {tmp_path / 'r.json'}: No space left on device\n"


def test_missing_calibration_is_said_first(capsys, text, no_work):
    refused(capsys, r"--calib FILE is missing, which gptq \(w4a16\) needs", "sweep", "m", "--methods", "rtn,gptq", "--schemes",
            "w4a16", "--text", text)
    refused(capsys, r"which gptq \(w4a16\), awq \(w4a16-g128\) need\n", "sweep", "m", "--methods", "gptq,awq", "--text", text)
    refused(capsys, r"rtn \(w8a8-static\) needs", "sensitivity", "m", "--scheme", "w8a8-static", "--text", text)


def test_sweep_says_which_methods_failed(capsys, text, tmp_path):
    """Row blocks that do not divide the rows."""
    code, out, err = call(capsys, "sweep", TINY, "--methods", "rtn", "--schemes", "w8a16,w8a16-b7", "--text", text)
    assert code == 1 and "rtn (w8a16-b7) failed: " in out
    assert err == "zquant: 1 of 2 methods failed: rtn (w8a16-b7); the table says why\n"


def test_output_is_checked_first(capsys, no_work, tmp_path, monkeypatch):
    from zquant import saving

    def fail(path):
        raise PermissionError(f"{path}: may not be written")

    monkeypatch.setattr(saving, "check_writable", fail)
    refused(capsys, "out: may not be written", "quantize", TINY, "-o", tmp_path / "out")


# --- kinds of models ---------------------------------------------------------------------------------------------


def test_sts_of_a_language_model(capsys, tmp_path):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a cat,a cat sat,4\na cat,zzz,0\n")
    for argv in (["eval", "sts", TINY, pairs], ["compare", TINY, TINY, "--sts", pairs],
                 ["sweep", TINY, "--methods", "rtn", "--sts", pairs]):
        refused(capsys, "tiny-llama-5m: .* is a language model; expected a sentence encoder", *argv)


def test_models_of_two_kinds(capsys, lm, fake, monkeypatch, text):
    models = {"lm": LM(), "encoder": Encoder(Model.make()), "bare": Model.make()}
    monkeypatch.setattr(cli, "_open", lambda path, encoder=False: models[path.name])
    refused(capsys, "^zquant: lm is a language model and encoder is a sentence encoder; expected two of one kind\n$",
            "compare", "lm", "encoder", "--text", text)
    refused(capsys, "^zquant: bare is a model without pooling and encoder is a sentence encoder; expected two of one kind\n$",
            "compare", "bare", "encoder")


def test_sts_opens_plain_directories_as_encoders(capsys, minilm, tmp_path):
    """As ``zquant eval sts`` does: a Hugging Face encoder without modules.json, mean pooling."""
    plain, small, pairs = tmp_path / "plain", tmp_path / "small", tmp_path / "pairs.csv"
    plain.mkdir()
    for file in Path(minilm).iterdir():
        if file.is_file() and file.name != "modules.json":
            (plain / file.name).symlink_to(file.resolve())
    pairs.write_text("a cat,a cat sat,4\na cat,zzz,0\nrain,a brain,2\n")
    assert call(capsys, "quantize", plain, "-o", small)[0] == 0
    code, out, err = call(capsys, "compare", plain, small, "--sts", pairs)
    assert code == 0 and "(6 sentences)" in out and len(re.findall("STS: Spearman", out)) == 2, err
    code, out, err = call(capsys, "sweep", plain, "--methods", "rtn", "--sts", pairs)
    assert code == 0 and "Spearman x 100" in out, err
    code, out, err = call(capsys, "sensitivity", plain, "--parts", "all", "--sts", pairs)
    assert code == 0 and "Spearman x 100" in out, err


# --- text that is not UTF-8 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, given, message", [
    (["-"], b"a\ncaf\xe9", "stdin, line 2: not UTF-8 (byte 0xe9)"),
    ([b"caf\xe9"], b"", "PROMPT, line 1: not UTF-8 (byte 0xe9)"),
    (["a", "--stop", b"\xff"], b"", "--stop, line 1: not UTF-8 (byte 0xff)"),
])
def test_text_that_is_not_utf8(argv, given, message):
    pytest.importorskip("tokenizers")
    command = [sys.executable, "-m", "zquant", "generate", str(TINY), *argv, "--max-new-tokens", "1"]
    done = subprocess.run(command, input=given, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", f"zquant: {message}\n")


# --- the demo ----------------------------------------------------------------------------------------------------


def test_demo_sentences():
    assert len(PAIRS) == 60 and len(SENTENCES) == 200 == len(set(SENTENCES))
    assert sorted({score for _, _, score in PAIRS}) == [0, 1, 2, 3, 4, 5]


def test_demo_table_fits_90_columns():
    rows = [
        Row("float32", 10**10, 1.0, 1.0, 0.88, 0.82, 99999.0, 1.0),
        Row("w4/8a8-sym", 10**9, 0.9, -0.9, -0.88, -0.82, 9.0, 99.99),
    ]
    lines = format_rows(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 90
    assert "82.00" in lines[3] and "file" in lines[1] and "file" not in format_rows([Row("a", 1, 1, 1, 1, None, 1, 1)])


# --- the real model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("tokenizers")
    from zquant.demo_model import find_minilm

    try:
        return find_minilm()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_quantize_info_eval_on_minilm(capsys, minilm, tmp_path):
    out_dir, pairs = tmp_path / "q", tmp_path / "pairs.csv"
    pairs.write_text("".join(f'"{a}","{b}",{s}\n' for a, b, s in PAIRS))
    code, out, err = call(capsys, "quantize", minilm, "-o", out_dir, "--override", "encoder.layer.0.output.dense=4-g32")
    assert (code, err) == (0, "") and re.search(r"w8a8, 9\d\.\d -> \d\d\.\d MB", out)
    code, _, err = call(capsys, "quantize", minilm, "-o", out_dir)
    assert code == 1 and "not empty" in err
    code, out, _ = call(capsys, "info", out_dir)
    assert code == 0 and "w8a8" in out and "35 x int8, per channel" in out and "1 x int4, groups of 32" in out
    code, out, _ = call(capsys, "eval", "sts", out_dir, pairs)
    assert code == 0 and float(re.search(r"Spearman ([\d.]+)", out).group(1)) > 80


def test_demo_on_minilm(minilm):
    from zquant.demo import run

    shown = []
    rows = run(minilm, rounds=1, show=shown.append)
    text = "\n".join(shown)
    by = {row.scheme: row for row in rows}
    assert list(by) == ["float32", "w8a8", "w4/8a8"]
    assert by["float32"].mean_cosine == pytest.approx(1)
    assert by["w8a8"].mean_cosine > 0.998 > by["w4/8a8"].mean_cosine > 0.95
    assert by["float32"].size > 3.7 * by["w8a8"].size > 3.7 * by["w4/8a8"].size
    assert all(row.demo_spearman > 0.9 and row.rate > 0 for row in rows)
    assert max(len(line) for line in text.splitlines()) <= 100 and "60 pairs" in text
