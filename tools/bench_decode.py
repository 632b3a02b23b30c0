"""End-to-end decode speed, FASA against off, in alternating rounds of llama-bench.

Every round runs the same program twice, off and on, so that a machine that slows down slows both. Prints one JSON
line per run and a table of medians. A FASA run that made no sparse step is an error, not a row.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys

from machine import emit, find_tool, row


def parse_samples(stdout):
    """tokens/s of every repetition of the generation test in llama-bench's JSON lines."""
    samples = []
    for line in stdout.splitlines():
        if line.startswith("{"):
            test = json.loads(line)
            if test["n_gen"] > 0:
                samples += test["samples_ts"]
    if not samples:
        raise ValueError("llama-bench printed no generation test")
    return samples


def parse_stats(stderr):
    """The counters that llama-bench prints for a context served by FASA; {} if none was."""
    found = re.search(
        r"^fasa: budget (\d+), layers (\d+) sparse (\d+) dense, n_tip (\d+) to (\d+), index (\d+) bytes, "
        r"kv (\d+) bytes, steps (\d+) sparse (\d+) dense (\d+) prefill",
        stderr,
        re.M,
    )
    names = (
        "budget",
        "n_layer_sparse",
        "n_layer_dense",
        "n_tip_min",
        "n_tip_max",
        "index_bytes",
        "kv_bytes",
        "n_step_sparse",
        "n_step_dense",
        "n_step_prefill",
    )
    return dict(zip(names, map(int, found.groups()))) if found else {}


def run(bench, args, depth, fasa):
    options = [
        "-p",
        "0",
        "-n",
        str(args.n_gen),
        "-d",
        str(depth),
        "-fa",
        "1",
        "-t",
        str(args.threads),
        "-r",
        str(args.reps),
        "-o",
        "jsonl",
    ]
    options += ["--fasa", "on", "--fasa-budget", str(args.budget)] if fasa else ["--fasa", "off"]
    command = [bench, "-m", args.model, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{result.stderr.strip()}")
    stats = parse_stats(result.stderr)
    if bool(stats) != fasa or (fasa and depth >= args.budget and stats["n_step_sparse"] == 0):
        raise SystemExit(
            f"error: asked for FASA {'on' if fasa else 'off'} at depth {depth}, but llama-bench ran "
            f"{stats.get('n_step_sparse', 0)} sparse steps"
        )
    return row(
        "decode",
        args.model,
        fasa=fasa,
        depth=depth,
        n_gen=args.n_gen,
        threads=args.threads,
        tokens_per_s=parse_samples(result.stdout),
        stats=stats,
        options=options,
    )


def table(rows, budget):
    """Markdown: median and spread of tokens/s by depth."""
    lines = [f"| depth | off tok/s (min to max) | FASA {budget} tok/s (min to max) | ratio |", "|---|---|---|---|"]
    for depth in sorted({r["depth"] for r in rows}):
        speed = [
            [s for r in rows if r["depth"] == depth and r["fasa"] == fasa for s in r["tokens_per_s"]]
            for fasa in (False, True)
        ]
        cells = [f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in speed]
        ratio = statistics.median(speed[1]) / statistics.median(speed[0])
        lines.append(f"| {depth} | {cells[0]} | {cells[1]} | {ratio:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="calibrated GGUF")
    parser.add_argument("--depth", type=int, nargs="+", default=[8000], help="tokens in the cache (default: 8000)")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reps", type=int, default=1, help="repetitions within a run (default: 1)")
    parser.add_argument("--n-gen", type=int, default=32, help="tokens generated per repetition (default: 32)")
    parser.add_argument("--llama-bench", help="path of the program (default: the installed one)")
    parser.add_argument("--out", help="append the JSON lines to this file instead of printing them")
    args = parser.parse_args()

    bench = find_tool("llama-bench", args.llama_bench)
    rows = []
    for depth in args.depth:
        for i in range(args.rounds):
            # Whoever runs second finds warm caches: take turns.
            for fasa in (False, True) if i % 2 == 0 else (True, False):
                rows.append(run(bench, args, depth, fasa))
                emit(rows[-1], args.out)
                print(
                    f"depth {depth} round {i + 1}/{args.rounds} {'FASA' if fasa else 'off'}: "
                    f"{statistics.median(rows[-1]['tokens_per_s']):.2f} tok/s",
                    file=sys.stderr,
                )
    print(table(rows, args.budget))


if __name__ == "__main__":
    main()
