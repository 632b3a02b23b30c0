"""Whether decoding with FASA still finds what stands far back: retrieval tasks, the same server dense and sparse.

    python tools/eval_tasks.py --model M.gguf --ctx 4096 8192 --budget 256 1024 --n 50 --out rows.jsonl

Tasks of our own making, after those of RULER: passkey (a number in repeated filler), single (a number for a key,
among varied sentences), multikey (the same with ten keys, one of which is asked for), variable (a value handed on
from variable to variable), words (the most common word of a list). Trials take turns over ten depths. llama-server
reads each prompt densely, then answers it once densely and once for each budget with the same K and V, by greedy
decoding, each time from the prompt's last token on: read again alone, it can come to other near ties than in a batch.
A hit is an answer that begins with what was asked for. Prints a JSON line for each task, context and budget (0: dense);
done rows of --out are not run again. Needs nothing but Python and llama-server; the model's calibration is where
llama.cpp finds it, or --fasa-file.
"""

import argparse
import collections
import itertools
import json
import operator
import pathlib
import random
import re
import tempfile

from machine import emit, find_tool, gpu_field, row
from soak import Server

N_DEPTH, N_HOP = 10, 3
COMMON = 0.3  # share of the common word in its list
N_ANSWER = 8  # tokens
RESERVE = 64  # tokens of the context for the answer, and for sentences longer than others

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
WHO = "baker sailor teacher farmer doctor painter miller hunter tailor gardener".split()
DID = "carried forgot repaired sold found painted wanted lost praised hid".split()
WHAT = "basket lantern letter violin blanket ladder kettle mirror compass barrel".split()
WHERE = "harbour market orchard chapel bridge stable library meadow tavern mill".split()
COLOUR = "red green blue white black yellow grey brown silver purple".split()


def sentences(rng):
    """Varied sentences, without end."""
    while True:
        who, did, what, where, colour = (rng.choice(words) for words in (WHO, DID, WHAT, WHERE, COLOUR))
        yield f"The {who} {did} the {colour} {what} near the {where}. "


def number(rng):
    return str(rng.randrange(10000, 100000))


# A task makes of (rng, depth) its filler, [(depth, sentence to hide there), ...], question, and the word to answer. But
# for the last one, it draws the same whatever the depth is, so that trials at different depths share a text.


def passkey(rng, depth):
    key = number(rng)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    return itertools.repeat(FILLER), [(depth, needle)], "What is the pass key? The pass key is", key


def multikey(rng, depth, n_key=N_DEPTH):
    keys = [f"{colour} {what}" for colour, what in rng.sample(list(itertools.product(COLOUR, WHAT)), n_key)]
    values = [number(rng) for _ in keys]
    asked = int(depth * n_key)
    needles = [
        ((i + 0.5) / n_key if n_key > 1 else depth, f"One of the magic numbers for {key} is: {value}. ")
        for i, (key, value) in enumerate(zip(keys, values))
    ]
    key = keys[asked]
    question = f"What is the magic number for {key}? The magic number for {key} mentioned in the text is:"
    return sentences(rng), needles, question, values[asked]


def single(rng, depth):
    return multikey(rng, depth, 1)


def variable(rng, depth):
    names = rng.sample([a + b for a, b in itertools.product("ABCDEFGH", "JKLMNPQR")], N_HOP + 1)
    value = number(rng)
    said = [f"VAR {names[0]} = {value}. "] + [f"VAR {b} = VAR {a}. " for a, b in zip(names, names[1:])]
    needles = [(depth + (1 - depth) * i / len(said), sentence) for i, sentence in enumerate(said)]
    return sentences(rng), needles, f"What is the value of VAR {names[-1]}? The value of VAR {names[-1]} is", value


def words(rng, depth):
    rng = random.Random(f"{rng.random()} {depth}")
    common, *others = rng.sample(WHO + DID + WHAT + WHERE, 30)
    filler = (common if rng.random() < COMMON else rng.choice(others) for _ in itertools.count())
    return (word + ", " for word in filler), [], "The most common word in the list above is", common


TASKS = {"passkey": passkey, "single": single, "multikey": multikey, "variable": variable, "words": words}


def prompt(task, rng, depth, n_tokens, count):
    """(text, the word to answer); the text has about n_tokens tokens, as count(text) counts them."""
    filler, needles, question, wanted = TASKS[task](rng, depth)
    n_free = n_tokens - count("".join(needle for _, needle in needles) + question)
    pieces = list(itertools.islice(filler, 64))
    pieces += itertools.islice(filler, int(n_free / count("".join(pieces)) * 64))
    del pieces[int(n_free / count("".join(pieces)) * len(pieces)) :]
    at = collections.defaultdict(str)
    for place, needle in needles:
        at[int(place * len(pieces))] += needle
    return "".join(at[i] + piece for i, piece in enumerate(pieces)) + "\n\n" + question, wanted


def evaluate(server, task, ctx, budgets, n, seed):
    """{budget: {depth: [hit or not, ...]}} of n trials."""

    def count(text):
        return len(server.post("/tokenize", {"content": text})["tokens"])

    trials = []
    for trial in range(n):
        depth = (trial % N_DEPTH + 0.5) / N_DEPTH
        rng = random.Random(f"{seed} {task} {ctx} {trial // N_DEPTH}")
        trials.append((*prompt(task, rng, depth, ctx - RESERVE, count), depth))
    hits = {budget: collections.defaultdict(list) for budget in budgets}
    for text, wanted, depth in sorted(trials):  # neighbours begin alike, and what they share is read once
        server.complete(text, 0, fasa_budget=0)
        for budget in budgets:
            answer = server.complete(text, N_ANSWER, fasa_budget=budget, ignore_eos=False)
            if answer["tokens_evaluated"] + N_ANSWER > ctx:
                raise SystemExit(f"error: a prompt has {answer['tokens_evaluated']} tokens, too many for {ctx}")
            if answer["timings"]["prompt_n"] != 1:
                raise SystemExit("error: llama-server did not keep a prompt that it had read")
            hits[budget][depth].append(re.findall(r"\w+", answer["content"])[:1] == [wanted])
    return hits


def done(out):
    """What a file of rows holds already: {(model, task, ctx, n, seed, budget)}."""
    lines = pathlib.Path(out).read_text().splitlines() if out and pathlib.Path(out).exists() else []
    return {tuple(r[k] for k in ("model", "task", "ctx", "n", "seed", "budget")) for r in map(json.loads, lines)}


def table(rows):
    """Markdown: hits by task, context and budget."""
    rows = sorted(rows, key=lambda r: (r["model"], r["ctx"], list(TASKS).index(r["task"]), r["budget"]))
    budgets = sorted({r["budget"] for r in rows})
    lines = [
        f"| model | context | task | trials | {' | '.join(f'budget {b}' if b else 'dense' for b in budgets)} |",
        "|---|---|---|---|" + "---|" * len(budgets),
    ]
    subject = operator.itemgetter("model", "ctx", "task", "n")
    for (model, ctx, task, n), group in itertools.groupby(rows, subject):
        hits = {r["budget"]: r["hits"] for r in group}
        lines.append(f"| {model} | {ctx} | {task} | {n} | {' | '.join(str(hits.get(b, '')) for b in budgets)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF")
    parser.add_argument("--fasa-file", help="sidecar with the model's calibration")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ctx", type=int, nargs="+", default=[8192])
    parser.add_argument("--budget", type=int, nargs="+", default=[256, 1024], help="dense is always run, too")
    parser.add_argument("--n", type=int, default=50, help="trials of each task and context (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--n-gpu-layers", type=int, default=0)
    parser.add_argument("--llama-server", help="path of the program (default: the installed one)")
    parser.add_argument("--out", help="append the JSON lines to this file instead of printing them")
    args = parser.parse_args()
    program, name = find_tool("llama-server", args.llama_server), pathlib.Path(args.model).name
    rows, have = [], done(args.out)
    for ctx in args.ctx:
        # the window of all layers is kept, or a prompt could not be asked again from its middle
        options = ["-m", args.model, "-c", str(ctx), "-np", "1", "-fa", "on", "--fasa", "on", "--swa-full"]
        options += ["-ngl", str(args.n_gpu_layers)] + (["-t", str(args.threads)] if args.threads else [])
        options += ["--fasa-file", args.fasa_file] if args.fasa_file else []
        with tempfile.TemporaryDirectory() as folder:
            server = Server(program, options, pathlib.Path(folder) / "log")
            try:
                for task in args.tasks:
                    settings = dict(task=task, ctx=ctx, n=args.n, seed=args.seed)
                    budgets = [b for b in [0, *args.budget] if (name, *settings.values(), b) not in have]
                    for budget, found in evaluate(server, task, ctx, budgets, args.n, args.seed).items():
                        by_depth = {depth: sum(hits) for depth, hits in sorted(found.items())}
                        measured = dict(budget=budget, hits=sum(by_depth.values()), by_depth=by_depth)
                        measured.update(gpu_field(args.n_gpu_layers))
                        rows.append(row("task", args.model, **settings, **measured))
                        emit(rows[-1], args.out)
            finally:
                server.stop()
    print(table(rows))


if __name__ == "__main__":
    main()
