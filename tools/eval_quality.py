"""How far FASA's output is from dense attention, by llama-perplexity: perplexity ratio, KL divergence, top-1 agreement.

Runs the text once dense, saving the logits, then once for each variant with every batch served sparse, through the
shipped op. Variants: copies of the model calibrated by mass (what ships), by the paper's criterion (ca), and a random
choice of FCs, the control that must come out clearly worse. Logits take n_vocab * n_ctx bytes per chunk on disk.
"""

import argparse
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from machine import emit, find_tool, row

UBATCH = 512

# What llama-perplexity prints at its end; the sign between value and uncertainty is not ASCII.
NUMBER = r"\s*:\s*(-?[\d.]+)\s*\S+\s*([\d.]+)"
FIGURES = {
    "ppl": "Mean PPL[(]Q[)]",
    "ppl_base": "Mean PPL[(]base[)]",
    "ppl_ratio": "Mean PPL[(]Q[)]/PPL[(]base[)]",
    "kl": "Mean\\s+KLD",
    "top1": "Same top p",
}


def parse_figures(output):
    """The figures of FIGURES and their uncertainties (key + "_err"); top1 in percent."""
    figures = {}
    for name, label in FIGURES.items():
        found = re.search("^" + label + NUMBER, output, re.M)
        if not found:
            raise ValueError(f"llama-perplexity printed no {name}")
        figures[name], figures[name + "_err"] = float(found[1]), float(found[2])
    return figures


def check_run(command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = result.stdout.decode(errors="replace")
    if result.returncode != 0:
        tail = "\n".join(output.splitlines()[-20:])
        raise SystemExit(f"error: {' '.join(map(str, command))} failed:\n{tail}")
    return output


def table(rows):
    lines = ["| variant | budget | index | ppl ratio | KL | top-1 % |", "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['variant']} | {r['budget']} | {r.get('index_type') or ''} | {r['ppl_ratio']:.4f} | "
            f"{r['kl']:.4f} +- {r['kl_err']:.4f} | {r['top1']:.2f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF; it is not changed")
    parser.add_argument("--text", required=True, help="text to predict; not the calibration text")
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--chunks", type=int, default=8, help="contexts evaluated, -1: all (default: 8)")
    parser.add_argument("--budget", type=int, nargs="+", default=[256])
    parser.add_argument(
        "--index-type", nargs="+", choices=["f16", "q8", "q4"], default=[None], help="(default: the program's)"
    )
    parser.add_argument("--variants", nargs="+", choices=["mass", "ca", "random"], default=["mass", "ca", "random"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", help="folder for the copies and logits, kept (default: a temporary one)")
    parser.add_argument("--calibrate-args", default="", help="more arguments of fasa-calibrate, in one string")
    parser.add_argument("--llama-perplexity", help="path of the program (default: the installed one)")
    parser.add_argument("--fasa-calibrate", help="path of the program (default: the installed one)")
    parser.add_argument("--out", help="append the JSON lines to this file instead of printing them")
    args = parser.parse_args()

    perplexity = find_tool("llama-perplexity", args.llama_perplexity)
    calibrate = find_tool("fasa-calibrate", args.fasa_calibrate)
    with tempfile.TemporaryDirectory() as temporary:
        work = pathlib.Path(args.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        logits = work / "dense.logits"

        def evaluate(model, *more):
            return check_run(
                [
                    perplexity,
                    "-m",
                    model,
                    "-f",
                    args.text,
                    "-c",
                    str(args.ctx),
                    "--chunks",
                    str(args.chunks),
                    "-t",
                    str(args.threads),
                    "-b",
                    "2048",
                    "-ub",
                    str(UBATCH),
                    "-fa",
                    "on",
                    "--kl-divergence-base",
                    logits,
                    *more,
                ]
            )

        evaluate(args.model, "--fasa", "off")
        rows = []
        for variant in args.variants:
            copy = work / f"{variant}.gguf"
            more = ["--criterion", variant, *args.calibrate_args.split()]
            check_run([calibrate, args.model, "-o", copy, "--force", *more])
            for budget, index_type in itertools.product(args.budget, args.index_type):
                output = evaluate(
                    copy,
                    "--kl-divergence",
                    "--fasa",
                    "on",
                    "--fasa-budget",
                    str(budget),
                    "--fasa-max-batch",
                    str(UBATCH),
                    *(["--fasa-index-type", index_type] if index_type else []),
                )
                rows.append(
                    row(
                        "quality",
                        copy,
                        variant=variant,
                        budget=budget,
                        index_type=index_type,
                        ctx=args.ctx,
                        chunks=args.chunks,
                        text=pathlib.Path(args.text).name,
                        calibrate_args=args.calibrate_args,
                        **parse_figures(output),
                    )
                )
                emit(rows[-1], args.out)
                print(f"{variant} budget {budget} {index_type or ''}: KL {rows[-1]['kl']:.4f}", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
