"""Decoders: tokens a second of prompts and of single steps, beside llama.cpp with --peers.

Models have random weights in the shapes of GPT-2 124M and 350M and of a 1.1B Llama; they are written once as Hugging Face
folders (and as GGUF files of the same values for llama.cpp) into ZQUANT_BENCH_CACHE. "prefill N" takes N tokens into an empty
cache and computes the logits of the last token (llama.cpp and zquant then leave out of the last block what only other tokens
need; the percentages count it in full for both); "decode @N" is one token after N others, and is forgotten again, so that
every step has the same context. Percentages: of prefill, the time that the linear layers' products would take at the peak of
the exact int8 instructions (float32: of vfmadd231ps); of decode, the time to read the weights and the keys and values at the
bandwidth from memory. Both are measured in the same run with as many threads. What fits into the caches can exceed 100 %.
Each engine runs in its own process and they take turns, case by case and round by round; see harness.py for the gating. A
figure is "n/a" where the host ran both threads on one core in all rounds; ~ marks those with too few clean slices, and their
ratios.

    python tests/bench/bench_decode.py                    # zquant alone
    python tests/bench/bench_decode.py --peers --models llama-1.1b --json out.json
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import decoders
import harness
import numpy as np
import peers

PREFILL = (256, 2048)
CONTEXTS = (64, 1024)
REPORTED = ("gpt2-124m", "gpt2-350m", "llama-1.1b")
MEMORY_GOAL = 1.5e9
SHARE_GOAL = 5  # percent, from 124M on
GOALS = (  # performance.md 9: (name, kind of case, ours, theirs, must by threads, the models that it is for)
    ("M5", "prefill", ("zquant-lm w8a8", "zquant-lm w4a8 g64"), ("llama.cpp q8_0", "llama.cpp q4_0", "llama.cpp q4_k"),
     {1: 3.0, 2: 3.0}, REPORTED),
    ("M6", "decode", ("zquant-lm w4a8 g64",), ("llama.cpp q4_0", "llama.cpp q4_k"), {1: 1.4, 2: 1.15}, ("llama-1.1b",)),
)

Best = dict[tuple[str, str], dict[str, Any]]


def cache_numbers(config: dict[str, Any], tokens: int) -> int:
    """Keys and values that a step after so many tokens reads."""
    if config["model_type"] == "gpt2":
        return 2 * config["n_layer"] * config["n_embd"] * tokens
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * tokens


def measure_prefill(turn: peers.Turn, tokens: int, config: dict[str, Any], args: Any, best: Best) -> None:
    reply = turn.ask("prefill", tokens=tokens, seconds=args.seconds)
    if not answered(turn, f"prefill {tokens}", reply):
        return
    blocks, head = decoders.parameters(config)
    peak = reply["peak"]["float" if turn.name.endswith("fp32") else "int8"]
    limit = peak * 1e9 / (2 * (blocks + head / tokens))
    peers.keep(best, (turn.name, f"prefill {tokens}"), {
        "value": tokens / reply["seconds"] if reply["reachable"] else None, "gated": reply["gated"], "ceiling": limit,
        "of": "instruction peak"}, larger=True)


def measure_decode(turn: peers.Turn, context: int, config: dict[str, Any], bandwidth: float, args: Any,
                   best: Best) -> None:
    reply = turn.ask("decode", context=context, seconds=args.seconds)
    if not answered(turn, f"decode @{context}", reply):
        return
    size = reply["weight_bytes"] + reply["cache_item"] * cache_numbers(config, context)
    peers.keep(best, (turn.name, f"decode @{context}"), {
        "value": 1 / reply["seconds"] if reply["reachable"] else None, "gated": reply["gated"],
        "ceiling": bandwidth * 1e9 / size, "bytes": size, "of": "read bandwidth"}, larger=True)


def answered(turn: peers.Turn, case: str, reply: dict[str, Any]) -> bool:
    if "error" in reply:
        print(f"# {turn.name} {case}: {reply['error'][:200]}")
    return "error" not in reply


def wanted(best: Best, turn: peers.Turn, tokens: int, number: int, args: Any) -> bool:
    """Long prompts are timed once: again in later rounds only where there is no value yet."""
    return number == 0 or tokens <= args.repeat or best.get((turn.name, f"prefill {tokens}"), {"value": 0})["value"] is None


def measure(turns: list[peers.Turn], label: str, config: dict[str, Any], threads: int, args: Any) -> list[dict[str, Any]]:
    """Rounds over the cases, every engine in turn: the best round's tokens a second."""
    best: Best = {}
    bandwidth = 0.0
    for number in range(args.rounds):
        for case in [c for c in PREFILL if c <= args.limit]:
            for turn in turns:
                if wanted(best, turn, case, number, args):
                    measure_prefill(turn, case, config, args, best)
        for case in [c for c in CONTEXTS if c <= args.limit]:
            bandwidth = turns[0].ask("bandwidth").get("GB/s", 0.0)  # the best so far
            for turn in turns:
                measure_decode(turn, case, config, bandwidth, args, best)
    for entry in best.values():  # the bandwidth of the whole run, as the peak
        if entry["of"] == "read bandwidth":
            entry["ceiling"] = bandwidth * 1e9 / entry["bytes"]
    print(f"\n# {label} {threads}T: read bandwidth {bandwidth:.1f} GB/s, int8 peak {turns[0].hello['peak']['int8']:.0f} "
          f"GOP/s, float32 peak {turns[0].hello['peak']['float']:.0f} GFLOP/s")
    return [harness.row(f"{label} {engine} {case}", threads, r["value"], "tok/s", m=int(case.split()[1].strip("@")),
                        ceiling=r["ceiling"] or None, engine=engine, case=case, model=label, gated=r["gated"],
                        bytes=r.get("bytes"), of=r["of"]) for (engine, case), r in best.items()]


def report(rows: list[dict[str, Any]], title: str) -> None:
    """One line per engine: tokens a second and the percentage of the ceiling; then the goals' ratios."""
    engines, cases = (list(dict.fromkeys(r[key] for r in rows)) for key in ("engine", "case"))
    at = {(r["engine"], r["case"]): r for r in rows}

    def text(engine: str, case: str) -> str:
        r = at.get((engine, case))
        if r is None or r["value"] is None:
            return "-" if r is None else "n/a"
        return f"{r['value']:.{0 if r['value'] >= 100 else 1}f} ({r['percent'] or 0:.0f})" + ("" if r["gated"] else "~")

    harness.print_table(f"{title}: tokens/s (percent of the ceiling); ~ too few clean slices", ["engine", *cases],
                        [[e, *(text(e, c) for c in cases)] for e in engines])


def goals(rows: list[dict[str, Any]], model: str, threads: int) -> list[dict[str, Any]]:
    """Ratios to the best of the peers in the goal, one row each: none where a side is missing, no value where one has none."""
    at = {(r["engine"], r["case"]): (r["value"], r["gated"]) for r in rows}
    found = []
    for name, kind, ours, theirs, must, models in GOALS:
        for case in dict.fromkeys(r["case"] for r in rows if r["case"].startswith(kind)):
            reached = [at[e, case] for e in theirs if (e, case) in at]
            for engine in ours if reached else ():
                if (engine, case) in at:
                    ours, best = at[engine, case][0], max((value for value, _ in reached if value is not None), default=None)
                    ratio = None if ours is None or best is None else ours / best
                    gated = ratio is not None and at[engine, case][1] and all(g for _, g in reached)
                    found.append(harness.row(f"{name} {model} {engine} {case}", threads, ratio, "x best llama.cpp",
                                             goal=must.get(threads) if model in models else None, gated=gated))
    return found


def verdict(row: dict[str, Any]) -> str:
    if not row["goal"]:
        return ""
    return "not measured" if not row["gated"] else "reached" if row["value"] >= row["goal"] else "missed"


def print_goals(rows: list[dict[str, Any]]) -> None:
    if rows:
        harness.print_table("ratio to llama.cpp's best type of the goal; ~ a side had too few clean slices",
                            ["goal, model, engine, case", "ratio", "must", ""],
                            [[r["name"], ratio_cell(r), str(r["goal"] or ""), verdict(r)] for r in rows])


def ratio_cell(row: dict[str, Any]) -> str:
    return "n/a" if row["value"] is None else f"{row['value']:.2f}" + "~" * (not row["gated"])


def check(turns: list[peers.Turn]) -> None:
    """Cosine of every engine's logits to the first one's: an engine that computes nonsense is not a peer."""
    reference = None
    for turn in turns:
        reply = turn.ask("logits", tokens=48)
        if not answered(turn, "logits", reply):
            continue
        y = np.asarray(reply["logits"])
        reference = y if reference is None else reference
        cosine = float(y @ reference / np.linalg.norm(y) / np.linalg.norm(reference))
        note = " (random blocks: other weights)" if turn.name.endswith("q4_k") else ""
        print(f"# {turn.name:<26} cosine of logits to {turns[0].name}: {cosine:.5f}{note}")


def shares(turns: list[peers.Turn], label: str, threads: int) -> list[dict[str, Any]]:
    """Python's share of a decode step."""
    rows = []
    for turn in turns:
        if turn.name.startswith("zquant"):
            reply = turn.ask("share_of_step", context=CONTEXTS[0])
            if answered(turn, "Python's share", reply):
                share = 100 * reply["share"] if reply["reachable"] else None
                said = "n/a" if share is None else f"{share:.1f} %"
                print(f"# {turn.name}: Python's share of a decode step: {said} (goal: < {SHARE_GOAL} %)")
                rows.append(harness.row(f"{label} {turn.name} Python's share", threads, share, "%"))
        turn.close()
    return rows


def memory(folder: Path, label: str, scheme: str) -> dict[str, Any]:
    figures = peers.quantizing_memory(folder, scheme)
    file = (folder / "model.safetensors").stat().st_size
    print(f"{label}: quantizing to {scheme} takes {figures['peak'] / 1e9:.2f} GB of resident memory at the peak "
          f"({figures['baseline'] / 1e9:.2f} GB of it after the imports; the mapped file has {file / 1e9:.2f} GB; "
          f"goal for llama-1.1b: below {MEMORY_GOAL / 1e9:.1f} GB)")
    return harness.row(f"{label} peak memory {scheme}", 1, figures["peak"] / 1e9, "GB", baseline=figures["baseline"] / 1e9,
                       file=file / 1e9)


def parse(argv: list[str] | None) -> Any:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also llama.cpp, where llama_cpp and gguf are installed")
    parser.add_argument("--engines", help="only engines whose name contains one of these, comma-separated")
    parser.add_argument("--models", default=",".join(REPORTED), help=f"of {', '.join(decoders.SHAPES)}")
    parser.add_argument("--limit", type=int, default=decoders.CONTEXT, help="leave out cases with more tokens than this")
    parser.add_argument("--repeat", type=int, default=512, help="longer prompts only in the first round")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args(argv)
    unknown = set(args.models.split(",")) - decoders.SHAPES.keys()
    if unknown:
        parser.error(f"--models: {', '.join(sorted(unknown))}; known: {', '.join(decoders.SHAPES)}")
    return args


def run_model(label: str, names: list[str], args: Any) -> list[dict[str, Any]]:
    config = decoders.SHAPES[label]
    folder = decoders.write_random(peers.cache_root() / label, config)
    blocks, head = decoders.parameters(config)
    print(f"\n# {label}: {blocks / 1e6:.0f} M weights in the blocks, {head / 1e6:.0f} M in the head")
    rows: list[dict[str, Any]] = []
    for threads in harness.thread_counts(args.threads):
        turns = peers.start(names, folder, threads)
        if not turns:
            continue
        these = measure(turns, label, config, threads, args)
        report(these, f"{label}, {threads} thread{'s' * (threads > 1)}")
        ratios = goals(these, label, threads)
        print_goals(ratios)
        if threads == 1:
            check(turns)
        rows += shares(turns, label, threads)
        for turn in turns:
            turn.close()
        rows += these + ratios
    if not args.no_memory:
        rows.append(memory(folder, label, "w4a8-g64"))
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows: list[dict[str, Any]] = []
    names = peers.engines_for("decoder", args.peers, args.engines)
    for label in args.models.split(","):
        rows += run_model(label, names, args)
        sys.stdout.flush()
    harness.write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
