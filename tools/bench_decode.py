"""End-to-end speed by llama-bench, FASA against off: decode at several depths, and reading a prompt.

One run of llama-bench measures every setting of a depth in turn, so that all share one reading of the context and a
machine that slows down slows all; every round starts with another one. With --turns the depths take turns too, where
speed at one is to be compared with speed at another. Prints one JSON line per measurement and a
table of medians. A FASA run that made no sparse step is an error, not a row.
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
    found = re.search(r"^fasa: budget (\d+), .*$", stderr, re.M)
    if not found:
        return {}

    def counts(names, pattern):
        return zip(names.split(), map(int, re.search(pattern, found[0]).groups()))

    stats = {"budget": int(found[1])}
    stats.update(counts("n_layer_sparse n_layer_dense", r"layers (\d+) sparse (\d+) dense"))
    stats.update(counts("n_tip_min n_tip_max", r"n_tip (\d+) to (\d+)"))
    stats["index_type"] = re.search(r"index (\w+) \d+ bytes", found[0])[1]
    stats.update(counts("index_bytes kv_bytes mapped_bytes", r"index \w+ (\d+) bytes, kv (\d+) bytes, mapped (\d+) bytes"))
    stats.update(counts("n_step_sparse n_step_dense n_step_prefill", r"steps (\d+) sparse (\d+) dense (\d+) prefill"))
    return stats


def parse_tests(lines):
    """Yields (setting, test, stats) for every test in llama-bench's output, stdout and stderr together, in order.

    setting: (mode, budget) as llama-bench says before the test; test: its JSON line; stats: as of parse_stats, from the
    line after the test. Other lines go to stderr, for the person who waits.
    """
    setting, test = None, None
    for line in lines:
        is_setting, is_test = line.startswith("fasa: mode "), line.startswith("{")
        if test and (is_setting or is_test):
            yield setting, test, {}
            test = None
        if is_setting:
            mode, budget = re.match(r"fasa: mode (\w+), budget (\d+)", line).groups()
            setting = mode, int(budget)
        elif is_test:
            test = json.loads(line)
        elif test and parse_stats(line):
            yield setting, test, parse_stats(line)
            test = None
        else:
            sys.stderr.write(line)
    if test:
        yield setting, test, {}


def modes(rounds):
    """FASA off and on in each round, taking turns: whoever runs second finds warm caches."""
    return ",".join("off,on" if i % 2 == 0 else "on,off" for i in range(rounds))


def measure(bench, args, kind, tests):
    """Runs llama-bench with the options tests and yields a row for each test."""
    options = ["-fa", "1", "-t", str(args.threads), "-ngl", str(args.n_gpu_layers), "-r", str(args.reps), "-o", "jsonl"]
    options += [*tests, *args.bench_args.split(), "--fasa", modes(args.rounds)]
    options += ["--fasa-budget", ",".join(map(str, args.budget))]
    if args.index_type:
        options += ["--fasa-index-type", ",".join(args.index_type)]
    command = [bench, "-m", args.model, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with process:
        for (mode, budget), test, stats in parse_tests(process.stdout):
            fasa = mode == "on"
            sparse = fasa and test["n_gen"] > 0 and test["n_depth"] >= budget
            if bool(stats) != fasa or (sparse and stats["n_step_sparse"] == 0):
                process.kill()
                raise SystemExit(
                    f"error: asked for FASA {mode} at depth {test['n_depth']}, but llama-bench ran "
                    f"{stats.get('n_step_sparse', 0)} sparse steps"
                )
            yield row(
                kind,
                args.model,
                gpu=test["gpu_info"],
                backends=test["backends"],
                fasa=fasa,
                budget=budget if fasa else None,
                index_type=stats.get("index_type"),
                depth=test["n_depth"],
                n_prompt=test["n_prompt"],
                n_gen=test["n_gen"],
                threads=test["n_threads"],
                n_gpu_layers=test["n_gpu_layers"],
                type_k=test["type_k"],
                type_v=test["type_v"],
                tokens_per_s=test["samples_ts"],
                stats=stats,
                options=options,
            )
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} failed with status {process.returncode}")


def name(measured):
    """What a row ran, in a few words: "off", "256" or "256 q8"."""
    if not measured["fasa"]:
        return "off"
    index_type = measured.get("index_type")
    budget = measured.get("budget") or measured["stats"]["budget"]
    return f"{budget} {index_type}" if index_type else f"{budget}"


def table(rows):
    """Markdown: median and spread of tokens/s by depth and setting, against off at the same depth and at depth 0."""
    speeds = {}
    for r in rows:
        key = (r.get("n_prompt", 0), r["depth"], name(r))
        speeds.setdefault(key, []).extend(r["tokens_per_s"])
    lines = ["| prompt | depth | FASA | tok/s (min to max) | of off | of off at depth 0 |", "|---|---|---|---|---|---|"]

    def ratio(speed, *base):
        return f"{statistics.median(speed) / statistics.median(speeds[base]):.2f}" if base in speeds else ""

    off_first = sorted(speeds.items(), key=lambda item: (item[0][:2], item[0][2] != "off"))
    for (n_prompt, depth, setting), speed in off_first:
        lines.append(
            f"| {n_prompt or ''} | {depth} | {setting} | {statistics.median(speed):.2f} ({min(speed):.2f} to "
            f"{max(speed):.2f}) | {ratio(speed, n_prompt, depth, 'off')} | {ratio(speed, n_prompt, 0, 'off')} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="calibrated GGUF")
    parser.add_argument(
        "--depth",
        type=int,
        nargs="*",
        default=[0, 2048, 8000],
        help="tokens in the cache while decoding; none given: no decoding (default: 0 2048 8000)",
    )
    parser.add_argument(
        "--prompt", type=int, nargs="*", default=[512], help="lengths of prompts to read at depth 0 (default: 512)"
    )
    parser.add_argument("--budget", type=int, nargs="+", default=[256])
    parser.add_argument("--index-type", nargs="+", choices=["f16", "q8", "q4"], help="(default: the program's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-gpu-layers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=1, help="times that everything is measured anew (default: 1)")
    parser.add_argument("--reps", type=int, default=1, help="repetitions in a row within a round (default: 1)")
    parser.add_argument("--n-gen", type=int, default=32, help="tokens generated per repetition (default: 32)")
    parser.add_argument("--bench-args", default="", help="more arguments of llama-bench, in one string")
    parser.add_argument("--llama-bench", help="path of the program (default: the installed one)")
    parser.add_argument("--out", help="append the JSON lines to this file instead of printing them")
    args = parser.parse_args()

    bench = find_tool("llama-bench", args.llama_bench)
    runs = []
    if args.depth:
        runs.append(("decode", ["-p", "0", "-n", str(args.n_gen), "-d", ",".join(map(str, args.depth))]))
    if args.prompt:
        runs.append(("prefill", ["-p", ",".join(map(str, args.prompt)), "-n", "0", "-d", "0"]))
    rows = []
    for kind, tests in runs * args.turns:
        for measured in measure(bench, args, kind, tests):
            rows.append(measured)
            emit(measured, args.out)
            speed = statistics.median(measured["tokens_per_s"])
            print(f"{kind} depth {measured['depth']} FASA {name(measured)}: {speed:.2f} tok/s", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
