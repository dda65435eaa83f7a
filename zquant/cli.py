"""The ``zquant`` command. Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
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
  suffixes   -g32 (groups of 32 inputs), -b48 (48 blocks of rows), +e32 (word embeddings stay float; else int8 per row)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (argparse itself exits with 2 on wrong usage).

    >>> main(["info"])                                     # doctest: +ELLIPSIS
    zquant ...
    0
    """
    arguments = _parser().parse_args(argv)
    try:
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


def _batch_size(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _threads(text: str) -> int:
    value = int(text) if text.isdigit() else 0
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
        "  zquant compare all-MiniLM-L6-v2 minilm-w8a8 --plot report.png\n\n"
        "Each command has its own --help. DIR is a Hugging Face model directory. Exit codes: 0 done, 1 failed, 2 wrong "
        "usage,\n130 interrupted. ZQUANT_TRACEBACK=1 shows where an error came from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zquant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(commands)
    _add_compare(commands)
    _add_eval(commands)
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
        "zquant quantize bert-base -o mixed --scheme w4a8 --override '*.value=8' --override 'encoder.layer.0.*=float'",
    )
    parser.epilog = f"{_SCHEMES}\n{parser.epilog}"
    parser.add_argument("model", metavar="DIR", type=Path, help="the model to quantize")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="directory to write")
    parser.add_argument("--scheme", type=_scheme, default="w8a8", help="how to quantize (default: %(default)s)")
    parser.add_argument(
        "--override",
        metavar="GLOB=SPEC",
        type=_override,
        action="append",
        default=[],
        help="other weights for layers whose names match: float, 8, 4, 4-g32, 8-b48; repeatable, the last match wins",
    )
    parser.add_argument("--force", action="store_true", help="write into OUT although it is not empty")


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        _compare,
        "compare a model with its quantized version: layers, fidelity, size, speed",
        "zquant compare all-MiniLM-L6-v2 minilm-w8a8\n"
        "zquant compare all-MiniLM-L6-v2 minilm-w8a8 --sentences mine.txt --json report.json --plot report.png\n"
        "zquant compare all-MiniLM-L6-v2 minilm-w8a8 --sts stsb-test.csv",
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="the reference")
    parser.add_argument("quantized", metavar="QDIR", type=Path, help="its quantized version")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--sentences", metavar="FILE", type=Path, help="text, one sentence a line (default: the demo's 200 sentences)"
    )
    source.add_argument(
        "--sts",
        metavar="FILE",
        type=Path,
        help="csv or tsv of sentence pairs with scores; also prints the correlations",
    )
    parser.add_argument("--all", action="store_true", help="print every layer, not the ten worst")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the report's picture (.png, .svg, .pdf)")


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
    task.add_argument("model", metavar="DIR", type=Path, help="a sentence encoder, float or quantized")
    task.add_argument(
        "file", metavar="FILE", type=Path, help="csv or tsv: sentence1, sentence2, score; a header is optional"
    )
    task.add_argument(
        "--batch-size",
        metavar="N",
        type=_batch_size,
        default=32,
        help="sentences per forward pass (default: %(default)s)",
    )


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        _info,
        "print what this CPU offers, or what a model directory holds",
        "zquant info\nzquant info minilm-w8a8",
    )
    parser.add_argument("model", metavar="DIR", type=Path, nargs="?", help="a model directory, float or quantized")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "quantize all-MiniLM-L6-v2 and print fidelity, size and speed",
        "zquant demo\nzquant demo --model bge-small-en --sts stsb-en-test.csv --threads 1",
    )
    parser.add_argument("--model", metavar="DIR", type=Path, help="another sentence encoder")
    parser.add_argument("--sts", metavar="FILE", type=Path, help="csv or tsv of sentence pairs with scores")


# --- commands ----------------------------------------------------------------------------------------------------


def _set_threads(count: int | None) -> None:
    if count is not None:
        from .threads import set_num_threads

        set_num_threads(count)


def _open(path: Path, encoder: bool = False) -> Any:
    """A sentence encoder where the directory says that it is one (or always), else the bare model."""
    from .encoder import SentenceEncoder
    from .models import load

    if not path.is_dir():
        raise NotADirectoryError(f"{path}: not a directory")
    return SentenceEncoder(path) if encoder or (path / "modules.json").is_file() else load(path)


def _check_output(source: Path, output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: exists and is not a directory")
    if output.is_dir() and source.is_dir() and output.samefile(source):
        raise ValueError(f"{output}: is the model itself; write the quantized model elsewhere")
    if not force and output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"{output}: not empty; --force writes into it")


def _network(model: Any) -> Any:
    return getattr(model, "model", model)


def _quantize(arguments: argparse.Namespace) -> None:
    from .quantize import quantize

    _check_output(arguments.model, arguments.output, arguments.force)
    start = time.perf_counter()
    model = _open(arguments.model)
    scheme = arguments.scheme.with_overrides(dict(arguments.override))
    quantized = quantize(model, scheme)
    quantized.save(arguments.output)
    before, after = _network(model).nbytes, _network(quantized).nbytes
    print(
        f"{arguments.output}: {scheme.name}, {before / 1e6:.1f} -> {after / 1e6:.1f} MB "
        f"({before / after:.2f}x smaller), {time.perf_counter() - start:.1f} s"
    )


def _sentences(path: Path) -> list[str]:
    from .evaluate import read_text

    lines = [line.strip() for line in read_text(path).splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"{path}: no sentences; expected one a line")
    return found


def _compare(arguments: argparse.Namespace) -> None:
    from . import demo_sentences
    from .evaluate import read_pairs, sts
    from .report import compare

    pairs = read_pairs(arguments.sts) if arguments.sts else None
    if pairs:
        sentences: Sequence[str] = [*pairs.first, *pairs.second]
    else:
        sentences = _sentences(arguments.sentences) if arguments.sentences else demo_sentences.SENTENCES
    if arguments.plot:
        from . import plot  # noqa: F401  says at once that matplotlib is missing
    model, quantized = _open(arguments.model), _open(arguments.quantized)
    report = compare(model, quantized, sentences)
    print(report.table(None if arguments.all else 10))
    if pairs:
        print("\nSTS (Spearman, Pearson x100)")
        for name, encoder in (("float32", model), (report.scheme, quantized)):
            print(f"  {name:<10} {sts(encoder, pairs)}")
    if arguments.json:
        report.save_json(arguments.json)
    if arguments.plot:
        report.plot().savefig(arguments.plot, dpi=130)


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
