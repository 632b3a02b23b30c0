"""How far FASA's output is from dense attention, by llama-perplexity: perplexity ratio, KL divergence, top-1 agreement.

    python tools/eval_quality.py --model A.gguf B.gguf --text test.txt --chunks -1 6 --tasks
    python tools/eval_quality.py --model M.gguf --text T.txt --chunks 2 --variants default oracle --out T.jsonl
    python tools/eval_quality.py --docs

The first command is the whole table of docs/quality.md: without --ctx, --variants and --budget, every variant at the
least budget, the most telling ones at larger ones and at a larger context; with --tasks also what
tools/eval_tasks.py asks. For each context the text is run once dense, saving the logits, then once for each variant
and budget with every batch served sparse by the op that ships. Rows that --out holds already are not measured again,
so a run that was stopped goes on. Logits take n_vocab * n_ctx bytes per chunk on disk. --docs writes the rows of
docs/benchmarks/quality.jsonl into docs/quality.md; tools/plot_benchmarks.py draws them.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

import eval_tasks
from machine import ROOT, emit, find_tool, gpu_field, row

UBATCH = 512
FOLDER, DOCS = ROOT / "docs" / "benchmarks", ROOT / "docs" / "quality.md"
ROWS = FOLDER / "quality.jsonl", FOLDER / "tasks.jsonl"
BEGIN, END = "<!-- tools/eval_quality.py --docs writes from here -->\n", "<!-- to here -->\n"

# variant -> (what it is, arguments of fasa-calibrate, arguments of llama-perplexity); {..} see arguments()
ON = ["--fasa", "on", "--fasa-max-batch", str(UBATCH), "--fasa-budget", "{budget}"]
VARIANTS = {
    "default": ("what fasa-calibrate stores", [], ON),
    "overlap": ("FCs by overlap with the tokens of full scores", ["--criterion", "overlap"], ON),
    "error": ("FCs by output error", ["--criterion", "error"], ON),
    "ca": ("FCs by the paper's contextual agreement, else as the default", ["--criterion", "ca"], ON),
    "random": ("random FCs, the control", ["--criterion", "random"], ON),
    "oracle": (
        "exact scores in place of TIP: all FCs in f16",
        ["--criterion", "random", "--n-tip", "4096"],
        [*ON, "--fasa-index-type", "f16"],
    ),
    "window": (
        "sinks and recent tokens only, but for one",
        ["--criterion", "random"],
        [*ON, "--fasa-sink", "4", "--fasa-recent", "{window}"],
    ),
    "paper": (
        "the paper's rule, but per KV group: a quarter of the FCs by contextual agreement, nothing forced, one layer dense",
        ["--criterion", "ca", "--n-tip", "{quarter}", "--sink", "0", "--recent", "0", "--dense-layers", "{first}"],
        [*ON, "--fasa-sink", "0", "--fasa-recent", "0", "--fasa-index-type", "f16"],
    ),
    "index-f16": ("as the default, with an index in f16", [], [*ON, "--fasa-index-type", "f16"]),
    "index-q8": ("as the default, with an index in q8", [], [*ON, "--fasa-index-type", "q8"]),
    "pyramid": (
        "budgets of 3/2 in the first sparse layer to 1/2 in the last",
        [],
        [*ON, "--fasa-budget-schedule", "150"],
    ),
    "kv-q8_0": ("dense, K and V in q8_0", None, ["--fasa", "off", "-ctk", "q8_0", "-ctv", "q8_0"]),
    "kv-q4_0": ("dense, K and V in q4_0", None, ["--fasa", "off", "-ctk", "q4_0", "-ctv", "q4_0"]),
}

# What is in the whole table: (context, budget, variants); and in its tasks: (context, budgets, tasks)
TELLING = ["default", "oracle", "paper", "window"]
TABLE = [(4096, 256, list(VARIANTS)), (4096, 512, TELLING), (4096, 1024, TELLING), (8192, 512, TELLING)]
TASKS = [(8192, [256, 1024], list(eval_tasks.TASKS)), (32768, [256], ["passkey"])]

# What llama-perplexity prints at its end; the sign between value and uncertainty is not ASCII.
NUMBER = r"\s*:\s*(-?[\d.]+)\s*\S+\s*([\d.]+)"
FIGURES = {
    "ppl": "Mean PPL[(]Q[)]",
    "ppl_base": "Mean PPL[(]base[)]",
    "ppl_ratio": "Mean PPL[(]Q[)]/PPL[(]base[)]",
    "kl": "Mean\\s+KLD",
    "top1": "Same top p",
}
STARTED = re.compile(
    r"fasa: (?P<n_layer_sparse>\d+) layers sparse, (?P<n_layer_dense>\d+) dense.* (?P<index_type>\w+) index of "
    r"(?P<index_mib>[\d.]+) MiB beside (?P<kv_mib>[\d.]+) MiB"
)


def parse_figures(output):
    """The figures of FIGURES and their uncertainties (key + "_err"), top1 in percent; and what FASA said at its start."""
    figures = {}
    for name, label in FIGURES.items():
        found = re.search("^" + label + NUMBER, output, re.M)
        if not found:
            raise ValueError(f"llama-perplexity printed no {name}")
        figures[name], figures[name + "_err"] = float(found[1]), float(found[2])
    started = STARTED.search(output)
    if started:
        figures.update(started.groupdict())
    return figures


def check_run(command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = result.stdout.decode(errors="replace")
    if result.returncode != 0:
        tail = "\n".join(output.splitlines()[-20:])
        raise SystemExit(f"error: {' '.join(map(str, command))} failed:\n{tail}")
    return output


def arguments(templates, **values):
    return [template.format(**values) for template in templates]


@functools.cache  # it takes seconds to read a large vocabulary
def hyperparameters(model):
    """A function that looks one up by the name that it has after that of the architecture; None: there is none."""
    from gguf import GGUFReader

    fields = GGUFReader(model).fields
    arch = fields["general.architecture"].contents()
    found = {name.removeprefix(f"{arch}."): f.contents() for name, f in fields.items() if name.startswith(f"{arch}.")}
    return found.get


def of_paper(model):
    """What the paper's rule leaves to the model: a quarter of the FCs of a head, and how many layers are dense besides
    those with a window."""
    get = hyperparameters(model)
    head_size = get("attention.key_length") or get("embedding_length") // get("attention.head_count")
    n_rot = get("rope.dimension_count") or head_size
    return {"quarter": n_rot // 2 // 4, "first": 0 if get("attention.sliding_window") else 1}


def table(rows):
    """Markdown: one table for each model, text, number of chunks and context."""
    lines = []

    def subject(r):
        weights = f" with weights in {r['weights']}" if r.get("weights") else ""
        return r["model"].split(" ")[0].split(".gguf")[0] + weights, r["text"], r["chunks"], r["ctx"]

    for (model, text, chunks, ctx), group in itertools.groupby(sorted(rows, key=subject), subject):
        group = list(group)
        seconds = sum(r.get("seconds") or 0 for r in group)
        took = f", measured in {seconds / 60:.0f} min on {group[0].get('gpu') or group[0]['cpu']}" if seconds else ""
        lines += [
            "",
            f"{model}, {text}, context {ctx}, {'all' if chunks < 0 else chunks} chunks{took}:",
            "",
            "| variant | budget | index | sparse layers | ppl ratio | mean KL from dense | same top-1 % | commit |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in sorted(group, key=lambda r: (r["budget"] or 0, r["kl"])):
            index = (
                f"{r['index_type']}, 1/{float(r['kv_mib']) / float(r['index_mib']):.1f} of KV"
                if r.get("kv_mib")
                else ""
            )
            layers = f"{r['n_layer_sparse']} of {int(r['n_layer_sparse']) + int(r['n_layer_dense'])}" if index else ""
            lines.append(
                f"| {r['variant']} | {r['budget'] or ''} | {index} | {layers} | {r['ppl_ratio']:.4f} | "
                f"{r['kl']:.5f} +- {r['kl_err']:.5f} | {r['top1']:.2f} | {r['commit'].split('-')[0]} |"
            )
    return "\n".join(lines)


def runs(rows):
    """A sentence for each run of the command."""
    return "\n".join(
        f"{r['n_row']} rows and {r['n_task_set']} sets of tasks for {', '.join(r['models'])} took {r['seconds'] / 60:.0f} min on "
        f"{r.get('gpu') or r['cpu']}, {r['jobs']} programs side by side, commit {r['commit'].split('-')[0]}."
        for r in rows
    )


def with_tables(docs):
    """The text of docs/quality.md with the tables of all rows between its marks."""
    rows, tasks = ([json.loads(line) for line in path.read_text().splitlines()] for path in ROWS)
    before, rest = docs.split(BEGIN)
    plots = "\n".join(
        f"![KL divergence by budget]({FOLDER.name}/{p.name})\n" for p in sorted(FOLDER.glob("quality-*.png"))
    )
    took = runs([r for r in rows if r["kind"] == "quality_run"])
    parts = took, table([r for r in rows if r["kind"] == "quality"]), plots, "## Retrieval", eval_tasks.table(tasks), ""
    return before + BEGIN + "\n\n".join(filter(None, parts)) + "\n" + END + rest.split(END)[1]


def done(out):
    """[settings of a row, ...] of what a file holds already; see settings_of."""
    rows = map(json.loads, out.read_text().splitlines() if out.exists() else [])
    return [settings_of(r) for r in rows if r["kind"] == "quality"]


def settings_of(measured):
    """What a row is a measurement of."""
    return [
        measured.get(k) for k in ("model", "weights", "text", "ctx", "chunks", "variant", "budget", "calibrate_args")
    ]


def plan(args):
    """(context, variant, budget) of every row that is asked for."""
    if not (args.ctx or args.variants or args.budget):
        table = TABLE
    else:
        table = itertools.product(args.ctx or [4096], args.budget or [256], [args.variants or list(VARIANTS)])
    rows = {}  # in order, once each: of K and V in another type there is one for all budgets
    for ctx, budget, variants in table:
        rows |= {(ctx, v, None if VARIANTS[v][1] is None else budget): None for v in variants}
    return list(rows)


class Once:
    """Makes files, each once, whichever thread asks first."""

    def __init__(self):
        self.lock, self.locks = threading.Lock(), {}

    def make(self, path, command):
        """path, made by a command (part): what to run to write the file part."""
        with self.lock:
            lock = self.locks.setdefault(path, threading.Lock())
        with lock:
            if not path.exists():
                part = path.with_suffix(".part")
                check_run(command(part))
                part.rename(path)
        return path


def in_f32(args, model, work, once):
    """A copy of the model with weights in f32."""
    quantize = find_tool("llama-quantize", args.llama_quantize)
    return once.make(
        work / pathlib.Path(model).name, lambda part: [quantize, "--allow-requantize", model, part, "F32"]
    )


def sidecar(args, model, work, once, how=()):
    """The calibration of a model, made with these arguments of fasa-calibrate."""
    how = [*how, *args.calibrate_args.split()]
    name = f"{'-'.join(['calibrated', *how]).replace('/', '-')}.gguf"
    command = [find_tool("fasa-calibrate", args.fasa_calibrate), model, "--sidecar", "--threads", str(args.threads)]
    return once.make(work / name, lambda part: [*command, "--n-gpu-layers", str(args.n_gpu_layers), "-o", part, *how])


def perplexity_command(args, model, ctx, chunks):
    command = [find_tool("llama-perplexity", args.llama_perplexity), "-m", model, "-f", args.text, "-fa", "on"]
    options = {"-c": ctx, "--chunks": chunks, "-b": min(ctx, 2048), "-ub": UBATCH, "-t": args.threads}
    options["-ngl"] = args.n_gpu_layers
    return [*command, *map(str, itertools.chain(*options.items()))]


def evaluate(args, model, chunks, work, pool, once):
    """The rows of a model that --out does not hold yet."""
    text, have = pathlib.Path(args.text).name, done(args.out)
    of_model = of_paper(model)

    def one(ctx, variant, budget, measured):
        _, how, options = VARIANTS[variant]
        values = {"budget": budget, "window": (budget or 0) - 5, **of_model}
        command = perplexity_command(args, model, ctx, chunks)
        how = None if how is None else sidecar(args, model, work, once, arguments(how, **values))
        logits = once.make(
            work / f"dense-{ctx}-{chunks}.logits",
            lambda part: [*command, "--kl-divergence-base", part, "--fasa", "off"],
        )
        command += ["--kl-divergence-base", logits, "--kl-divergence", *arguments(options, **values)]
        if how is not None:
            command += ["--fasa-file", how]
        return measured | parse_figures(check_run(command))

    jobs = []
    for ctx, variant, budget in plan(args):
        settings = dict(variant=variant, budget=budget, ctx=ctx, chunks=chunks, text=text)
        measured = row(
            "quality", model, **settings, weights=args.weights, calibrate_args=args.calibrate_args, **gpu_field(args.n_gpu_layers)
        )
        if settings_of(measured) not in have:
            jobs.append(pool.submit(one, ctx, variant, budget, measured))
    rows = []
    for job in concurrent.futures.as_completed(jobs):
        measured = job.result()
        emit(measured, args.out)
        print(f"{measured['model']}, context {measured['ctx']}, {measured['variant']}, budget {measured['budget']}: "
              f"KL {measured['kl']:.5f}", file=sys.stderr)  # fmt: skip
        rows.append(measured)
    for logits in work.glob("dense-*.logits"):  # of no more use, and large
        logits.unlink()
    return rows


def ask_tasks(args, model, ctx, budgets, tasks, work, once):
    """Rows of eval_tasks.py for a model as it is."""
    command = [sys.executable, eval_tasks.__file__, "--model", model, "--tasks", *tasks, "--out", args.tasks_out]
    command += ["--fasa-file", sidecar(args, model, work, once), "--ctx", str(ctx), "--budget", *map(str, budgets)]
    command += ["--n-gpu-layers", str(args.n_gpu_layers), "--threads", str(args.threads), "--n", str(args.trials)]
    command += ["--llama-server", find_tool("llama-server", args.llama_server)]
    print(check_run(command).splitlines()[-1], file=sys.stderr)


def run(args, chunks, work, pool):
    """All that is asked for; chunks: {model: how many}."""
    began, once, rows, asked = time.monotonic(), Once(), [], []
    if args.weights == "f32":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # or cuBLAS would round them
    for model, (ctx, budgets, tasks) in itertools.product(chunks if args.tasks else [], TASKS):
        if ctx <= hyperparameters(model)("context_length"):
            of_tasks = work / pathlib.Path(model).stem / "tasks"
            of_tasks.mkdir(parents=True, exist_ok=True)
            asked.append(pool.submit(ask_tasks, args, model, ctx, budgets, tasks, of_tasks, once))
    for model, n_chunks in chunks.items():
        of_model = work / pathlib.Path(model).stem
        of_model.mkdir(parents=True, exist_ok=True)
        measured = model if args.weights is None else in_f32(args, model, of_model, once)
        rows += evaluate(args, measured, n_chunks, of_model, pool, once)
    for job in concurrent.futures.as_completed(asked):
        job.result()
    print(table(rows))
    what = {"n_row": len(rows), "n_task_set": len(asked), "seconds": round(time.monotonic() - began)}
    ran = row("quality_run", **what, models=[pathlib.Path(m).name for m in chunks], jobs=args.jobs, **gpu_field(args.n_gpu_layers))
    print(runs([ran]))
    if rows:
        emit(ran, args.out)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__
        + "\nvariants:\n"
        + "\n".join(f"  {name:8} {what}" for name, (what, _, _) in VARIANTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", help="GGUF files; they are not changed")
    parser.add_argument("--text", help="text to predict; not the calibration text")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/quality.md, and do nothing else")
    parser.add_argument("--ctx", type=int, nargs="+", help="(default: 4096)")
    parser.add_argument("--budget", type=int, nargs="+", help="(default: 256)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="(default: all)")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[-1], help="contexts evaluated, for each model (default: -1, all)"
    )
    parser.add_argument(
        "--tasks", action="store_true", help="also ask the tasks of eval_tasks.py, of the models as they are"
    )
    parser.add_argument("--trials", type=int, default=50, help="of each task (default: 50)")
    parser.add_argument("--jobs", type=int, default=1, help="programs that run side by side (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each program (default: all)")
    parser.add_argument("--n-gpu-layers", type=int, default=0)
    parser.add_argument(
        "--weights", choices=["f32"],
        help="measure a copy of the model with weights in f32: activations then stay what they are, while those that are"
        " quantised to suit quantised weights turn the least difference into a KL divergence of 0.015 on some machines",
    )  # fmt: skip
    parser.add_argument(
        "--work", help="folder for sidecars and logits, used again by a run that goes on (default: a temporary one)"
    )
    parser.add_argument("--calibrate-args", default="", help="more arguments of fasa-calibrate, in one string")
    parser.add_argument("--llama-perplexity", help="path of the program (default: the installed one)")
    parser.add_argument("--llama-quantize", help="path of the program (default: the installed one)")
    parser.add_argument("--llama-server", help="path of the program (default: the installed one)")
    parser.add_argument("--fasa-calibrate", help="path of the program (default: the installed one)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=ROWS[0],
        help="append the JSON lines to this file (default: that of the docs)",
    )
    parser.add_argument(
        "--tasks-out", type=pathlib.Path, default=ROWS[1], help="the same for --tasks (default: that of the docs)"
    )
    args = parser.parse_args()
    if args.docs:
        DOCS.write_text(with_tables(DOCS.read_text()))
        return
    if not args.model or not args.text:
        parser.error("--model and --text are needed")
    for path in [*args.model, args.text]:
        if not os.path.isfile(path):
            parser.error(f"there is no file {path}")

    chunks = args.chunks * len(args.model) if len(args.chunks) == 1 else args.chunks
    if len(chunks) != len(args.model):
        parser.error("--chunks: give one number, or one for each model")

    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            run(args, dict(zip(args.model, chunks)), pathlib.Path(args.work or temporary), pool)
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
