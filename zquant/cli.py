"""The ``zquant`` command. Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["main"]

DONE, FAILED, INTERRUPTED = 0, 1, 130

_SCHEMES = """\
schemes:
  w8a8       int8 weights per channel, uint8 activations per token, computed as they come (asymmetric)
  w8a8-sym   the same with symmetric int8 activations
  w4/8a8     attention int8, feed-forward int4 in groups (ZeroQuant's mixed precision)
  w4a8       int4 weights in groups
  w4a16      int4 weights only
  suffixes   -g32 (groups of 32 inputs), -row (one scale per output channel), -b48 (48 blocks of rows), -wt (weights with one
             scale), -tensor (activations with one scale for all tokens of a call), -static (one scale from --calib), +e32
             (word embeddings stay float; else int8 per row)
"""


_METHODS = """\
methods:
  a name (rtn, gptq, ...), names joined with + in the order transforms, solver, repairs, or a preset by its paper's name
  (zeroquant, ...), which brings its own scheme; an unknown name lists those that are known
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (argparse itself exits with 2 on wrong usage).

    >>> main(["info"])                                     # doctest: +ELLIPSIS
    zquant ...
    0
    """
    try:
        arguments = _parser().parse_args(argv)
        _set_threads(arguments.threads)
        arguments.run(arguments)
        sys.stdout.flush()
        return DONE
    except KeyboardInterrupt:
        print("zquant: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if os.environ.get("ZQUANT_TRACEBACK"):
            raise
        print(f"zquant: {_one_line(error)}", file=sys.stderr)
        return FAILED


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    expected = isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) and text
    return text if expected else f"{type(error).__name__}: {text}"


# --- arguments ---------------------------------------------------------------------------------------------------


def _whole(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of {least} or more, got {text!r}")
        return int(text)

    return parse


def _fraction(high: float) -> Any:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0.0 <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from 0 to {high:g}, got {text!r}")
        return value

    return parse


def _path(text: str) -> Path:
    """An empty name is what a variable that was not set gives, and Path would take it for the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def _threads(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 256:
        raise argparse.ArgumentTypeError(f"expected 1 to 256, got {text!r}")
    return value


def _override(text: str) -> tuple[str, Any]:
    from .spec import QuantSpec

    glob, _, spec = text.rpartition("=")
    match = re.fullmatch(r"(?:int)?([2-8])(?:-(g|b)(\d+))?", spec)
    if not glob or not (match or spec == "float"):
        raise argparse.ArgumentTypeError(f"expected GLOB=SPEC with SPEC float, 8, 4, 4-g32 or 8-b48, got {text!r}")
    if match is None:
        return glob, "float"
    bits, kind, size = match.groups()
    if kind is None:
        return glob, int(bits)
    try:
        if kind == "g":
            return glob, QuantSpec(int(bits), granularity="group", group_size=int(size))
        return glob, QuantSpec(int(bits), granularity="row_block", blocks=int(size))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _scheme(text: str) -> Any:
    from .spec import Scheme

    try:
        return Scheme.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _recipe(text: str) -> Any:
    from .methods import Recipe

    try:
        return Recipe.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _recipes(text: str) -> list[Any]:
    return [_recipe(part) for part in text.split(",")]


def _schemes(text: str) -> list[Any]:
    return [_scheme(part) for part in text.split(",")]


def _command(commands: Any, name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="threads (default: the CPUs this process may use)"
    )
    return parser


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="zquant",
        description="Quantize Transformers on a CPU, measure what it costs, and run them.",
        epilog="examples:\n  zquant demo\n  zquant quantize all-MiniLM-L6-v2 -o minilm-w8a8 --scheme w8a8\n"
        "  zquant compare all-MiniLM-L6-v2 minilm-w8a8 --plot report.png\n"
        "  zquant ppl tiny-llama-5m --text wiki.test.raw\n"
        "  zquant generate tiny-llama-5m \"Once upon a time\" --stream\n\n"
        "Each command has its own --help. DIR is a Hugging Face model directory. Exit codes: 0 done, 1 failed, 2 wrong "
        "usage,\n130 interrupted. ZQUANT_TRACEBACK=1 shows where an error came from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zquant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(commands)
    _add_compare(commands)
    _add_sweep(commands)
    _add_sensitivity(commands)
    _add_eval(commands)
    _add_ppl(commands)
    _add_generate(commands)
    _add_info(commands)
    _add_demo(commands)
    return parser


def _add_quantize(commands: Any) -> None:
    parser = _command(
        commands,
        "quantize",
        _quantize,
        "quantize a model directory and write a new one",
        "zquant quantize all-MiniLM-L6-v2 -o minilm-w8a8\n"
        "zquant quantize all-MiniLM-L6-v2 -o minilm-w4 --scheme w4/8a8-g32\n"
        "zquant quantize Llama-3.2-1B -o llama-w4 --scheme w4a8\n"
        "zquant quantize Llama-3.2-1B -o llama-gptq --scheme w4a16 --method gptq --calib wiki.valid.raw\n"
        "zquant quantize Llama-3.2-1B -o llama-lkd --scheme w4/8a8 --method lkd --calib wiki.valid.raw --work-dir lkd-run\n"
        "zquant quantize bert-base -o mixed --scheme w4a8 --override '*.value=8' --override 'encoder.layer.0.*=float'",
    )
    parser.epilog = f"{_SCHEMES}\n{_METHODS}\n{parser.epilog}"
    parser.add_argument("model", metavar="DIR", type=_path, help="the model to quantize")
    parser.add_argument("-o", "--output", metavar="OUT", type=_path, required=True, help="directory to write")
    parser.add_argument("--scheme", type=_scheme, help="how to quantize (default: the preset's, else w8a8)")
    parser.add_argument(
        "--override",
        metavar="GLOB=SPEC",
        type=_override,
        action="append",
        default=[],
        help="other weights for layers whose names match: float, 8, 4, 4-g32, 8-b48; repeatable, the last match wins",
    )
    parser.add_argument(
        "--method", metavar="NAME", type=_recipe, default="rtn", help="recipe or preset (default: %(default)s)"
    )
    parser.add_argument(
        "--calib",
        metavar="FILE",
        type=_path,
        help="for methods that look at data, and static activations: text (encoders read its lines), or statistics that "
        "zquant.calibrate saved (.safetensors), not what the model is evaluated on; or random, for tokens drawn from the "
        "vocabulary",
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        type=_path,
        help="for methods that train blocks (lkd, zq-global): finished blocks are files there, and a run that was interrupted "
        "or killed continues",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_whole(1),
        help="for lkd: train N blocks side by side, each in a process of its own (default: one after the other)",
    )
    parser.add_argument("--force", action="store_true", help="write into OUT although it is not empty")


def _add_loss(parser: argparse.ArgumentParser) -> None:
    """What the loss is measured on, and where the results go; see :func:`_loss_data`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", type=_path, help="UTF-8 text for the perplexity of a language model")
    source.add_argument("--sentences", metavar="FILE", type=_path, help="one a line, for the fidelity of an encoder")
    source.add_argument("--sts", metavar="FILE", type=_path, help="csv or tsv of scored pairs, for its rank correlation")
    parser.add_argument(
        "--calib", metavar="FILE", type=_path, help="for methods that look at data: text; not what the loss is measured on"
    )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=_whole(2),
        default=16384,
        help="tokens of the text that are used (default: %(default)s)",
    )
    _add_files(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Where results go besides the terminal; see :func:`_write_files`."""
    parser.add_argument("--json", metavar="FILE", type=_path, help="write the results as JSON")
    parser.add_argument("--plot", metavar="FILE", type=_path, help="write their picture (.png, .svg, .pdf)")
    parser.add_argument("--html", metavar="FILE", type=_path, help="write their tables as HTML")


def _add_sweep(commands: Any) -> None:
    parser = _command(
        commands,
        "sweep",
        _sweep,
        "quantize a model by several methods and schemes and compare the losses",
        "zquant sweep tiny-llama-5m --methods rtn,gptq --schemes w4a16,w3a16 --calib wiki.valid.raw --text wiki.test.raw\n"
        "zquant sweep all-MiniLM-L6-v2 --methods rtn,gptq --schemes w4a8 --calib mine.txt --sts stsb-test.csv "
        "--plot sweep.png",
    )
    parser.epilog = f"{_SCHEMES}\n{_METHODS}\n{parser.epilog}"
    parser.add_argument("model", metavar="DIR", type=_path, help="a float model")
    parser.add_argument("--methods", metavar="LIST", type=_recipes, required=True, help="recipes, between commas")
    parser.add_argument(
        "--schemes", metavar="LIST", type=_schemes, default=[None], help="each with every method (default: as quantize's)"
    )
    _add_loss(parser)


def _add_sensitivity(commands: Any) -> None:
    parser = _command(
        commands,
        "sensitivity",
        _sensitivity,
        "measure what quantized weights, activations and both cost, by layer and by kind of layer",
        "zquant sensitivity tiny-llama-5m --text wiki.test.raw --max-tokens 4096\n"
        "zquant sensitivity all-MiniLM-L6-v2 --sentences mine.txt --scheme w4a8-g32 --parts all,kind --json found.json",
    )
    parser.epilog = f"{_SCHEMES}\n{parser.epilog}"
    parser.add_argument("model", metavar="DIR", type=_path, help="a float model")
    parser.add_argument("--scheme", type=_scheme, default="w4a8", help="what is studied (default: %(default)s)")
    parser.add_argument("--method", metavar="NAME", type=_recipe, default="rtn", help="solver (default: %(default)s)")
    parser.add_argument(
        "--parts",
        metavar="LIST",
        type=lambda text: text.split(","),
        default=["all", "kind", "layer", "blocks"],
        help="some of all,kind,layer,blocks (default: all four)",
    )
    _add_loss(parser)


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        _compare,
        "compare a model with its quantized version: layers, fidelity, size, speed",
        "zquant compare all-MiniLM-L6-v2 minilm-w8a8\n"
        "zquant compare all-MiniLM-L6-v2 minilm-w8a8 --sentences mine.txt --json report.json --plot report.png\n"
        "zquant compare all-MiniLM-L6-v2 minilm-w8a8 --sts stsb-test.csv\n"
        "zquant compare tiny-llama-5m tiny-llama-w4 --text wiki.test.raw",
    )
    parser.add_argument("model", metavar="DIR", type=_path, help="the reference")
    parser.add_argument("quantized", metavar="QDIR", type=_path, help="its quantized version")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--sentences", metavar="FILE", type=_path, help="text, one sentence a line (default: the demo's 200 sentences)"
    )
    source.add_argument(
        "--sts",
        metavar="FILE",
        type=_path,
        help="csv or tsv of sentence pairs with scores; also prints the correlations",
    )
    source.add_argument("--text", metavar="FILE", type=_path, help="text that language models are compared on")
    parser.add_argument("--all", action="store_true", help="print every layer, not the ten worst")
    _add_files(parser)


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser("eval", help="score a model on a task", description="Score a model on a task.")
    tasks = parser.add_subparsers(title="tasks", metavar="TASK", required=True)
    task = _command(
        tasks,
        "sts",
        _eval_sts,
        "semantic textual similarity: rank correlation of cosines with people's scores",
        "zquant eval sts minilm-w8a8 stsb-en-test.csv",
    )
    task.add_argument("model", metavar="DIR", type=_path, help="a sentence encoder, float or quantized")
    task.add_argument(
        "file", metavar="FILE", type=_path, help="csv or tsv: sentence1, sentence2, score; a header is optional"
    )
    task.add_argument(
        "--batch-size",
        metavar="N",
        type=_whole(1),
        default=32,
        help="sentences per forward pass (default: %(default)s)",
    )


def _add_ppl(commands: Any) -> None:
    parser = _command(
        commands,
        "ppl",
        _ppl,
        "perplexity of a language model on a text",
        "zquant ppl tiny-llama-5m --text wiki.test.raw\n"
        "zquant ppl tiny-llama-w8a8 --text wiki.test.raw --seq-len 512 --stride 256\n"
        "zquant ppl tiny-llama-w8a8 --text wiki.test.raw --kv-cache int8",
    )
    parser.add_argument("model", metavar="DIR", type=_path, help="a language model, float or quantized")
    parser.add_argument("--text", metavar="FILE", type=_path, required=True, help="UTF-8 text")
    parser.add_argument(
        "--seq-len", metavar="N", type=_whole(2), default=512, help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument(
        "--stride",
        metavar="N",
        type=_whole(1),
        help="windows begin N tokens apart and score what is new (default: they do not overlap, and the first token "
        "of each is not scored)",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=_whole(1), default=8, help="windows per forward pass (default: %(default)s)"
    )
    _add_kv_cache(parser)


def _add_kv_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-cache",
        choices=("float32", "int8"),
        default="float32",
        help="what keys and values are held in (default: %(default)s)",
    )


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        _generate,
        "continue a prompt",
        'zquant generate tiny-llama-5m "Once upon a time"\n'
        'zquant generate tiny-llama-w4 "Once upon a time" --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1\n'
        "cat prompt.txt | zquant generate tiny-llama-w4 - --stream",
    )
    parser.add_argument("model", metavar="DIR", type=_path, help="a language model, float or quantized")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=_whole(0), default=128, help="at most so many (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=_fraction(1e6),
        default=0.0,
        help="0 takes the likeliest token; else tokens are drawn (default: %(default)g)",
    )
    parser.add_argument("--top-k", metavar="K", type=_whole(1), help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", metavar="P", type=_fraction(1.0), help="draw from the likeliest that hold P")
    parser.add_argument("--seed", metavar="N", type=_whole(0), help="the same text each time")
    parser.add_argument("--stop", metavar="TOKEN", action="append", help="stop there, not at the model's own; repeatable")
    parser.add_argument("--stream", action="store_true", help="print the text as it is written")
    _add_kv_cache(parser)


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        _info,
        "print what this CPU offers, or what a model directory holds",
        "zquant info\nzquant info minilm-w8a8",
    )
    parser.add_argument("model", metavar="DIR", type=_path, nargs="?", help="a model directory, float or quantized")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "quantize all-MiniLM-L6-v2 and print fidelity, size and speed",
        "zquant demo\nzquant demo --model bge-small-en --sts stsb-en-test.csv --threads 1",
    )
    parser.add_argument("--model", metavar="DIR", type=_path, help="another sentence encoder")
    parser.add_argument("--sts", metavar="FILE", type=_path, help="csv or tsv of sentence pairs with scores")


# --- commands ----------------------------------------------------------------------------------------------------


def _set_threads(count: int | None) -> None:
    if count is not None:
        from .threads import set_num_threads

        set_num_threads(count)


def _open(path: Path, encoder: bool = False) -> Any:
    """A sentence encoder where the directory says that it is one, else the bare model; always one (of mean pooling) on
    ``encoder``."""
    from .encoder import SentenceEncoder
    from .models import load

    if not path.is_dir():
        raise NotADirectoryError(f"{path}: not a directory")
    if (path / "modules.json").is_file():
        return SentenceEncoder(path)
    model = load(path)
    if not encoder:
        return model
    if hasattr(model, "new_cache"):
        raise ValueError(f"{path}: {model.family.name} is a language model; expected a sentence encoder")
    return SentenceEncoder(model)


def _open_lm(path: Path) -> Any:
    from .models import load

    if not path.is_dir():
        raise NotADirectoryError(f"{path}: not a directory")
    lm = load(path)
    if not hasattr(lm, "new_cache"):
        raise ValueError(f"{path}: {lm.family.name} is not a language model")
    return lm


def _check_output(source: Path, output: Path, force: bool) -> None:
    from .saving import check_writable

    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: exists and is not a directory")
    if output.is_dir() and source.is_dir() and output.samefile(source):
        raise ValueError(f"{output}: is the model itself; write the quantized model elsewhere")
    if not force and output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"{output}: not empty; --force writes into it")
    check_writable(output)


def _network(model: Any) -> Any:
    return getattr(model, "model", model)


def _calibration(path: Path | None, recipe: Any, scheme: Any) -> Any:
    """Statistics from a file of them, the path of a text, "random", or None."""
    from .quantize import needs_data
    from .statistics import Statistics

    if path is None:
        return None
    if not needs_data(recipe, scheme):
        raise ValueError(f"--calib: method {recipe.name} needs no calibration data")
    if path == Path("random") and not path.exists():
        return "random"
    return Statistics.load(path) if path.suffix == ".safetensors" else path


@contextmanager
def _processes(count: int | None) -> Iterator[Any]:
    """An executor of so many processes; None for None. They leave Ctrl-C to this one, and end with it."""
    if count is None:
        yield None
        return
    import multiprocessing
    import signal
    from concurrent.futures import ProcessPoolExecutor

    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield executor
    except BaseException:
        for process in (executor._processes or {}).values():  # what they are at is lost anyway
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _quantize(arguments: argparse.Namespace) -> None:
    from .calibrate import _peak_rss
    from .quantize import choose_scheme, quantize
    from .saving import check_source

    _check_output(arguments.model, arguments.output, arguments.force)
    start = time.perf_counter()
    model = _open(arguments.model)
    check_source(model)
    recipe = arguments.method
    scheme = choose_scheme(arguments.scheme, recipe).with_overrides(dict(arguments.override))
    calib = _calibration(arguments.calib, recipe, scheme)
    with _processes(arguments.jobs) as executor:
        quantized = quantize(model, scheme, recipe, calib=calib, work_dir=arguments.work_dir, executor=executor)
    quantized.save(arguments.output)
    before, after = _network(model).nbytes, _network(quantized).nbytes
    print(
        f"{arguments.output}: {scheme.name}, {before / 1e6:.1f} -> {after / 1e6:.1f} MB "
        f"({before / after:.2f}x smaller), {time.perf_counter() - start:.1f} s"
        + (f", peak memory {_peak_rss() / 1e6:,.0f} MB" if arguments.calib else "")
    )


def _sentences(path: Path) -> list[str]:
    from .evaluate import read_text

    lines = [line.strip() for line in read_text(path).splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"{path}: no sentences; expected one a line")
    return found


def _compare(arguments: argparse.Namespace) -> None:
    from .report import check_pair, compare

    _check_files(arguments)
    given, pairs = _compared(arguments)
    model, quantized = (_open(path, encoder=bool(arguments.sts)) for path in (arguments.model, arguments.quantized))
    check_pair(model, quantized, (str(arguments.model), str(arguments.quantized)))
    if hasattr(_network(model), "new_cache") != isinstance(given, Path):
        raise ValueError(f"{arguments.model}: language models are compared on --text FILE, encoders on sentences")
    report = compare(model, quantized, given)
    print(report.table(None if arguments.all else 10))
    if pairs:
        from .evaluate import sts

        print("\nSTS (Spearman, Pearson x100)")
        for name, encoder in (("float32", model), (report.scheme, quantized)):
            print(f"  {name:<10} {sts(encoder, pairs)}")
    _write_files(report, arguments)


def _check_files(arguments: argparse.Namespace) -> None:
    """What can be known of --json, --plot and --html before the work whose results they are for."""
    for name in ("json", "plot", "html"):
        path = getattr(arguments, name)
        if path is None:
            continue
        if path.is_dir():
            raise IsADirectoryError(f"--{name} {path}: is a directory; expected the name of a file")
        if not path.parent.is_dir():
            raise NotADirectoryError(f"--{name} {path}: {path.parent} is not a directory")
        if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise PermissionError(f"--{name} {path}: may not be written")
    if arguments.plot:
        from .plot import Figure  # says at once that matplotlib is missing

        suffix, known = arguments.plot.suffix, Figure().canvas.get_supported_filetypes()
        if suffix[1:].lower() not in known:
            kinds = ", ".join(f".{kind}" for kind in sorted(known))
            raise ValueError(f"--plot {arguments.plot}: unknown kind of picture {suffix!r}; known: {kinds}")


def _write_files(found: Any, arguments: argparse.Namespace) -> None:
    """All that were asked for: one that fails, as of a full disk, leaves the others to be written."""
    writers = {"json": found.save_json, "plot": lambda path: found.plot().savefig(path, dpi=130), "html": found.save_html}
    failures = []
    for name, write in writers.items():
        path = getattr(arguments, name)
        try:
            if path is not None:
                write(path)
        except Exception as error:
            failures.append(f"--{name} {path}: {_one_line(error)}")
    if failures:
        raise RuntimeError("; ".join(failures))


def _loss_data(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, and what its loss is measured on."""
    from .evaluate import read_pairs

    _check_files(arguments)
    for path in (arguments.text, arguments.calib):
        if path is not None:
            path.stat()
    data = arguments.text or (read_pairs(arguments.sts) if arguments.sts else _sentences(arguments.sentences))
    model = _open(arguments.model, encoder=bool(arguments.sts))
    if hasattr(_network(model), "new_cache") != isinstance(data, Path):
        raise ValueError(f"{arguments.model}: language models are measured on --text, encoders on --sentences or --sts")
    return model, data


def _check_calibration(arguments: argparse.Namespace, methods: Sequence[Any], schemes: Sequence[Any]) -> None:
    """Before the model is read; a scheme of None is the method's own."""
    from .quantize import choose_scheme, needs_data

    if arguments.calib is not None:
        return
    pairs = [(method, choose_scheme(scheme, method)) for scheme in schemes for method in methods]
    wanting = [f"{method.name} ({scheme.name})" for method, scheme in pairs if needs_data(method, scheme)]
    if wanting:
        raise ValueError(f"--calib FILE is missing, which {', '.join(wanting)} {'needs' if len(wanting) == 1 else 'need'}")


def _write_results(found: Any, arguments: argparse.Namespace) -> None:
    """What was found, also where Ctrl-C ended it early."""
    print(found)
    _write_files(found, arguments)
    if found.interrupted:
        raise KeyboardInterrupt


def _sweep(arguments: argparse.Namespace) -> None:
    from .compare_methods import compare_methods

    _check_calibration(arguments, arguments.methods, arguments.schemes)
    model, data = _loss_data(arguments)
    pairs = [method if scheme is None else (scheme, method) for scheme in arguments.schemes for method in arguments.methods]
    found = compare_methods(model, pairs, arguments.calib, data, max_tokens=arguments.max_tokens)
    _write_results(found, arguments)
    failed = [f"{result.name} ({result.scheme})" for result in found.results if result.error]
    if failed and len(failed) == len(found.results):
        raise ValueError("every method failed; the table says why")
    if failed:
        raise ValueError(f"{len(failed)} of {len(found.results)} methods failed: {', '.join(failed)}; the table says why")


def _sensitivity(arguments: argparse.Namespace) -> None:
    from .sensitivity import sensitivity

    _check_calibration(arguments, [arguments.method], [arguments.scheme])
    model, data = _loss_data(arguments)
    found = sensitivity(model, data, arguments.scheme, method=arguments.method, calib=arguments.calib, parts=arguments.parts,
                        max_tokens=arguments.max_tokens)
    _write_results(found, arguments)


def _compared(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """What the two models are compared on, and sentence pairs where there are any."""
    from . import demo_sentences
    from .evaluate import read_pairs

    if arguments.text:
        arguments.text.stat()  # a missing file is said before the models are read
        return arguments.text, None
    if arguments.sts:
        pairs = read_pairs(arguments.sts)
        return [*pairs.first, *pairs.second], pairs
    return _sentences(arguments.sentences) if arguments.sentences else demo_sentences.SENTENCES, None


def _eval_sts(arguments: argparse.Namespace) -> None:
    from .evaluate import read_pairs, sts

    pairs = read_pairs(arguments.file)
    print(
        sts(
            _open(arguments.model, encoder=True),
            pairs,
            batch_size=arguments.batch_size,
            show_progress_bar=sys.stderr.isatty(),
        )
    )


def _ppl(arguments: argparse.Namespace) -> None:
    from .perplexity import perplexity

    arguments.text.stat()
    options = dict(batch_size=arguments.batch_size, kv_cache=arguments.kv_cache)
    print(perplexity(_open_lm(arguments.model), arguments.text, arguments.seq_len, arguments.stride, **options))


def _generate(arguments: argparse.Namespace) -> None:
    """The prompt and its continuation on stdout, what it took on stderr."""
    from .generate import generate

    for name, text in (("PROMPT", arguments.prompt), *(("--stop", token) for token in arguments.stop or ())):
        _decoded(text.encode("utf-8", "surrogateescape"), name)  # Python has bytes that it could not decode as surrogates
    lm = _open_lm(arguments.model)
    prompt = _decoded(sys.stdin.buffer.read(), "stdin") if arguments.prompt == "-" else arguments.prompt
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "kv_cache")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.stream:
        result = _write_stream(prompt, generate(lm, prompt, stream=True, **options))
    else:
        result = generate(lm, prompt, **options)
        print(f"{prompt}{result.text}")
    rate = f", {result.tokens_per_second:.0f} tokens/s" if result.tokens_per_second else ""
    print(f"zquant: {len(result.ids)} tokens after {result.prompt_length}, {result.finish_reason}{rate}", file=sys.stderr)


def _decoded(data: bytes, source: str) -> str:
    """Bytes of a user's text; as :func:`zquant.evaluate.read_text` has it for files."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def _write_stream(prompt: str, stream: Any) -> Any:
    sys.stdout.write(prompt)
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:  # also when interrupted: what follows begins on a line of its own
        print(flush=True)
    return stream.result


def _info(arguments: argparse.Namespace) -> None:
    rows = _model_rows(arguments.model) if arguments.model else _cpu_rows()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _cpu_rows() -> list[tuple[str, str]]:
    import numpy

    from . import __version__, cpu

    info = cpu.info()
    return [
        ("zquant", __version__),
        ("python", f"{sys.version.split()[0]}, NumPy {numpy.__version__}"),
        ("kernels", f"{info.active} (available: {', '.join(info.available)})"),
        ("threads", str(info.threads)),
        ("OpenBLAS", info.blas_core),
    ]


def _model_rows(path: Path) -> list[tuple[str, str]]:
    from .report import scheme_name

    model = _open(path)
    network = _network(model)
    formats = Counter(str(linear.spec or "float32") for _, linear in network.named_linears())
    return [
        ("model", str(path)),
        ("family", network.family.name),
        (
            "use",
            f"sentence encoder, {model.dimension} features"
            if model is not network
            else f"language model, {network.max_positions:,} positions, vocabulary {network.vocabulary:,}"
            if hasattr(network, "new_cache")
            else "logits"
            if network.has_head
            else "hidden states",
        ),
        ("parameters", f"{network.parameters / 1e6:.1f} M"),
        ("scheme", scheme_name(network)),
        (
            "layers",
            f"{network.dims.layers} blocks; linear: "
            + "; ".join(f"{count} x {name}" for name, count in formats.items()),
        ),
        ("size", f"{network.nbytes / 1e6:.1f} MB"),
    ]


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import run

    run(arguments.model, arguments.sts)


if __name__ == "__main__":
    sys.exit(main())
