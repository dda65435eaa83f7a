"""What each method of post-training quantization costs a model: perplexity, or STS-B's rank correlation and cosines.

    python tests/bench/bench_methods.py --models tiny-llama-5m --json FILE
    python tests/bench/bench_methods.py --models minilm --schemes w8a8+e32,w4a8+e32 --json FILE
    python tests/bench/bench_methods.py --models gpt2-30m --schemes w4/8a8-row+e32 --methods RTN,GPTQ,LKD --json FILE
    python tests/bench/bench_methods.py --table --json FILE

Language models are calibrated on WikiText-2's validation text without its "<unk>" (the first --samples windows of 512 tokens;
or on twelve books, or on tokens drawn at random) and measured on the first --windows windows of its test text and a quarter as
many of the text of Python's own pydoc topics. MiniLM is calibrated on --samples sentences of STS-B's training set (or lines of
the books, or random tokens), drawn with seed 0, and measured on its test set.
Embeddings and heads stay float32 in the default schemes. Each cell is quantized once for all of its losses, and statistics of
the float model are taken once for all cells. Cells that --json holds for the same settings are not computed again, and it is
written after every cell, so that a run may be stopped at any time.
"""
from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import zquant as zq
from zquant.calibrate import Shared
from zquant.demo_model import find_minilm
from zquant.evaluate import read_pairs
from zquant.generate import text_ids
from zquant.losses import loss_for
from zquant.methods import GPTQ, LKD, LLMInt8, LoRC, Recipe
from zquant.spec import Scheme
from zquant.tables import write_text

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("ZQUANT_SHARED") or ROOT.parent / "shared")
WIKI = SHARED / "data" / "wikitext2"
STSB = SHARED / "data" / "stsb"
BOOKS = SHARED / "data" / "english-pd-nltk" / "gutenberg"
MODELS = {"tiny-llama-5m": ROOT / "tests" / "data" / "tiny-llama-5m", "gpt2-30m": SHARED / "models" / "gpt2-30m"}
SCHEMES = ("w4a16-row+e32", "w4a16-g64+e32", "w4a16-g128+e32", "w3a16-row+e32", "w3a16-g64+e32", "w4a8+e32", "w8a8+e32")
_PLAIN: dict[str, Any] = {
    "RTN": "rtn", "GPTQ": "gptq", "GPTQ mse": GPTQ(mse=True), "GPTAQ": "gptaq", "AWQ": "awq", "AWQ+GPTQ": "awq+gptq",
    "AWQ+GPTQ mse": ["awq-scale", GPTQ(mse=True)],
    "SmoothQuant": "smoothquant", "OS+": "os+", "FPTQ": "fptq", "LLM.int8()": "llm.int8",
}
METHODS = {name: Recipe.of(recipe) for name, recipe in _PLAIN.items()}
METHODS |= {f"{name} + LoRC": Recipe.of([*recipe.steps, LoRC()]) for name, recipe in METHODS.items() if name != "LLM.int8()"}
PLAIN = list(METHODS)
# Methods that train: they take minutes, and are computed where --methods names them.
_TRAINED: dict[str, Any] = {"ZQ-Local": "zq-local", "LKD": "lkd", "LKD search": LKD(search=(0.3, 3.0, 10.0)),
                            "ZQ-Global": "zq-global", "GPTQ+LKD": "gptq+lkd"}
METHODS |= {name: Recipe.of(recipe) for name, recipe in _TRAINED.items()}
CALIB = ("wikitext2", "books", "random")  # the first: for MiniLM its own sentences
LENGTH = 512
HIGHER = ("STS-B", "cosine")  # is better


class Setting:
    """A model with its calibration data and its losses; the float model's values are measured at once."""

    def __init__(self, name: str, samples: int, windows: int, calib: str) -> None:
        self.model, data, texts = (_encoder(calib) if name == "minilm" else
                                   _language_model(MODELS[name], samples, windows, calib))
        self.calib = Shared(self.model, data, samples=samples, seed=0)
        self.losses = {what: loss_for(self.model, text, seq_len=LENGTH, max_tokens=count)
                       for what, (text, count) in texts.items()}

    def cell(self, scheme: Scheme, recipe: Recipe) -> dict[str, Any]:
        """The losses of one recipe, and the seconds that it took with nothing known before."""
        start, spared = time.perf_counter(), self.calib.spared
        small = zq.quantize(self.model, scheme, recipe, calib=self.calib, seed=0)
        seconds = time.perf_counter() - start + self.calib.spared - spared
        return {"values": {what: loss(small) for what, loss in self.losses.items()}, "seconds": seconds}


def _language_model(path: Path, samples: int, windows: int,
                    calib: str) -> tuple[Any, Any, dict[str, tuple[Any, int | None]]]:
    """Model, calibration data, and name -> (text, tokens) that it is measured on."""
    lm = zq.load(path)
    ids: Any = "random"
    if calib != "random":
        text = (WIKI / "wiki.valid.tokens").read_text(encoding="utf-8").replace(" <unk>", "")
        text = text if calib == "wikitext2" else _books()
        ids = np.array(text_ids(lm, text))[:samples * LENGTH].reshape(-1, LENGTH)
    topics = "\n".join(pydoc_data.topics.topics.values())
    return lm, ids, {"wikitext2": (WIKI / "wiki.test.raw", windows * LENGTH), "pydoc": (topics, max(1, windows // 4) * LENGTH)}


def _books() -> str:
    return "\n".join(book.read_text(encoding="utf-8", errors="replace") for book in sorted(BOOKS.rglob("*.txt"))[:12])


def _encoder(calib: str) -> tuple[Any, Any, dict[str, tuple[Any, int | None]]]:
    train, test = read_pairs(STSB / "stsb-en-train.csv"), read_pairs(STSB / "stsb-en-test.csv")
    sentences: Any = "random"
    if calib == "books":
        sentences = [line for line in _books().splitlines() if len(line) > 20]
    elif calib != "random":
        sentences = list(dict.fromkeys([*train.first, *train.second]))
    return zq.SentenceEncoder(find_minilm()), sentences, {"STS-B": (test, None), "cosine": ([*test.first, *test.second], None)}


def applies(scheme: Scheme, recipe: Recipe) -> bool:
    """Whether a recipe is for this scheme: FPTQ decides about activations, LLM.int8() has 8-bit weights."""
    assert scheme.weights is not None
    eight = not any(isinstance(step, LLMInt8) for step in recipe.steps) or scheme.weights.bits == 8
    return eight and (scheme.activations is not None or not any(isinstance(step, zq.FPTQ) for step in recipe.steps))


def jobs(schemes: list[str], methods: list[str]) -> list[tuple[str, str]]:
    """(scheme, method) of all cells, those without LoRC first."""
    found = [(scheme, name) for scheme in schemes for name in methods if applies(Scheme.parse(scheme), METHODS[name])]
    return sorted(found, key=lambda job: job[1].endswith("LoRC"))


def key(*parts: Any) -> str:
    return "|".join(map(str, parts))


def run(args: argparse.Namespace, found: dict[str, Any], save: Callable[[], None]) -> None:
    """Compute what ``found`` does not hold yet; ``save`` after every cell."""
    for model in args.models:
        samples = args.samples if args.calib == CALIB[0] else f"{args.samples} of {args.calib}"
        settings = (model, samples, args.windows)
        wanted = [job for job in jobs(args.schemes, args.methods) if key(*settings, *job) not in found]
        if not wanted:
            continue
        setting = Setting(model, args.samples, args.windows, args.calib)
        found[key(*settings, "", "float32")] = {"values": {what: loss.reference for what, loss in setting.losses.items()}}
        for number, (scheme, name) in enumerate(wanted, 1):
            try:
                cell = setting.cell(Scheme.parse(scheme), METHODS[name])
            except ValueError as error:
                cell = {"error": str(error)}
            found[key(*settings, scheme, name)] = cell
            save()
            shown = cell.get("error") or ", ".join(f"{what} {value:.2f}" for what, value in cell["values"].items())
            print(f"{model} {number}/{len(wanted)} {scheme} {name}: {shown} ({cell.get('seconds', 0):.0f} s)", flush=True)


def regained(what: str, value: float, rtn: float | None, exact: float) -> str:
    """The share of round to nearest's loss that a method avoids, where that loss is more than half a percent."""
    sign = -1 if what in HIGHER else 1
    if rtn is None or value == rtn or sign * (rtn / exact - 1) < 0.005:
        return ""
    return f" ({100 * (1 - (value - exact) / (rtn - exact)):.0f} %)"


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Markdown: a table for each model, setting and loss."""
    for setting in dict.fromkeys(tuple(name.split("|")[:3]) for name in found):
        cells = {tuple(name.split("|")[3:]): cell for name, cell in found.items() if tuple(name.split("|")[:3]) == setting}
        schemes, names = (list(dict.fromkeys(part for part in parts if part)) for parts in zip(*cells))
        exact = cells.pop(("", "float32"))["values"]
        for what, reference in exact.items():
            digits = 5 if what == "cosine" else 2
            windows = "" if setting[0] == "minilm" else f", {setting[2]} windows"
            yield f"{setting[0]}, {what}: float32 {reference:.{digits}f} ({setting[1]} samples{windows})\n"
            yield f"| | {' | '.join(schemes)} |\n|---{'|---' * len(schemes)}|"
            for name in names[1:]:
                row = []
                for scheme in schemes:
                    value = cells.get((scheme, name), {}).get("values", {}).get(what)
                    rtn = cells.get((scheme, "RTN"), {}).get("values", {}).get(what)
                    row.append("" if value is None else f"{value:.{digits}f}{regained(what, value, rtn, reference)}")
                yield f"| {name} | {' | '.join(row)} |"
            yield ""


def listed(known: Any) -> Callable[[str], list[str]]:
    """A type for argparse: names between commas, all of them known."""
    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=listed([*MODELS, "minilm"]), default=["tiny-llama-5m"])
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(SCHEMES))
    parser.add_argument("--methods", type=listed(METHODS), default=PLAIN)
    parser.add_argument("--calib", choices=CALIB, default=CALIB[0],
                        help="data of calibration (default: %(default)s; for MiniLM that is STS-B)")
    parser.add_argument("--samples", type=int, default=128, help="sequences of calibration")
    parser.add_argument("--windows", type=int, default=60, help="windows of 512 tokens that perplexity is measured on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", type=Path, help="results; read first, written after every cell")
    parser.add_argument("--table", action="store_true", help="print what --json holds as Markdown, and compute nothing")
    args = parser.parse_args()
    zq.set_num_threads(args.threads)
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    try:
        if not args.table:
            run(args, found, lambda: write_text(args.json, json.dumps(found, indent=1)) if args.json else None)
    except KeyboardInterrupt:
        print("interrupted; what was computed stays", file=sys.stderr)
        return 130
    print("\n".join(tables(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
