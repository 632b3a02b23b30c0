"""Drives llama-server for a while, as rude clients do, and checks what it answers against the same server without FASA.

Clients, more than slots, send short and long prompts, hang up in the middle of answers, generate beyond the context
(context shift), and save, erase and restore slots, all at once; first with a unified KV cache, then with a stream for
each slot, then, for comparison, without FASA. Sampling is greedy. Every answer is compared with the dense one to the
same prompt, and with the one that the server gave before, when it was quiet: the agreement is the share of tokens
before the first difference. The text being its own, a later difference says nothing more. Other batches round in other
ways, so agreement is not 1 with a dense server either.

A client waits until the slot that it wants is free: the pinned llama-server, asked for a slot that is at work, puts
another prompt from its prompt cache into it.

A run fails if a request fails, if the server ends, if no step was sparse, or if the mean agreement of one kind of
answers is below --least-agreement. Prints one JSON line for each run. Memory is the server's resident set: after every
prompt was seen once, in the middle, and at the end. With LLAMA_FASA_VERIFY=1 in the environment the server checks its
index after every step.
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from machine import emit, find_tool, row

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "calibrate_py" / "fasa_calibrate" / "calibration_text.txt").read_text()
N_SLOT = 4
N_CTX_SLOT = 2048
N_ANSWER = 16
SAVES = 20  # times that a slot is filled until its state is there to be saved
CACHE_RAM_MIB = 256  # what the prompt cache may add to the server's memory
# how often each kind of request is made
WEIGHTS = {"short": 6, "long": 6, "cancel": 4, "restore": 3, "shift": 2}


def cut(start, n):
    """n characters of the text, which goes round."""
    start %= len(TEXT)
    return (TEXT + TEXT)[start : start + n]


def prompts(n):
    """{name: text}, n of each kind: a piece of the text, and once more what stands in the middle of it.

    So the model knows how to go on. Short ones fit the budget and decode densely, long ones are 700 to 1500 tokens.
    """

    def again(start, n):
        return cut(start, n) + "\n\n" + cut(start + n // 2, 200)

    short = {f"short-{i}": again(1700 * i, 700) for i in range(n)}
    return {**short, **{f"long-{i}": again(2100 * i, 3000 + 3500 * i // n) for i in range(n)}}


class Server:
    """A running llama-server."""

    def __init__(self, program, args, log):
        self.log = log
        with open(log, "wb") as out:
            command = [program, *args, "--host", "127.0.0.1", "--port", "0"]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        self.port = self._ready()

    def _ready(self):
        """The port, once the model is loaded."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log.read_text(errors="replace"))
            if found:
                return int(found[1])
            time.sleep(0.2)
        self.process.kill()
        raise SystemExit(f"error: llama-server did not start:\n{self.log.read_text(errors='replace')[-2000:]}")

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=900) as response:
            return json.load(response)

    def post(self, path, body, hang_up_after=None):
        """The answer to a request; hang_up_after: ends the connection after so many lines of a stream, returns None."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{path}: status {response.status}: {response.read()[:300]!r}")
            if hang_up_after is None:
                return json.load(response)
            for _ in range(hang_up_after):
                response.readline()
            return None
        finally:
            connection.close()

    def complete(self, prompt, n=N_ANSWER, **more):
        body = {"prompt": prompt, "n_predict": n, "temperature": 0.0, "top_k": 1, "cache_prompt": True}
        return self.post("/completion", {**body, "return_tokens": True, "ignore_eos": True, **more})

    def memory(self):
        """Resident set, MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024

    def stop(self):
        """Ends it as a user would; the steps it counted, {} without FASA."""
        self.process.terminate()
        status = self.process.wait(120)
        if status != 0:
            raise SystemExit(f"error: llama-server ended with {status}: {self.log.read_text(errors='replace')[-2000:]}")
        found = re.findall(
            r"fasa: (\d+) decode steps sparse, (\d+) with .*?, (\d+) dense .*?, (\d+) prefill .*?rebuilt (\d+)",
            self.log.read_text(errors="replace"),
        )
        names = ("n_step_sparse", "n_step_mixed", "n_step_dense", "n_step_prefill", "n_index_rebuild")
        return dict(zip(names, map(int, found[-1]))) if found else {}


def agreement(answer, expected):
    """The share of expected before the first difference."""
    same = next((i for i, (a, b) in enumerate(zip(answer, expected)) if a != b), min(len(answer), len(expected)))
    return same / len(expected)


class Soak:
    """The clients of one server, and what they found."""

    def __init__(self, server, texts, dense, seed):
        self.server, self.texts, self.seed = server, texts, seed
        self.references = {"dense": dense}  # {whose: {prompt: tokens}}
        self.lock = threading.Lock()
        self.requests = collections.Counter()
        self.agreements = collections.defaultdict(list)
        self.errors = []
        self.n_shifted = 0
        self.slots = [threading.Lock() for _ in range(N_SLOT)]

    def check(self, kind, answer, name, n=N_ANSWER, before=()):
        """Compares n tokens with those of each reference that has said what was said before."""
        start = len(before)
        with self.lock:
            for whose, answers in self.references.items():
                if answers[name][:start] == list(before):
                    wanted = answers[name][start : start + n]
                    self.agreements[f"{kind}, {whose}"].append(agreement(answer["tokens"], wanted))

    def choose(self, rng, kind):
        return rng.choice([name for name in self.texts if name.startswith(kind)])

    @contextlib.contextmanager
    def slot(self, rng):
        """The number of a slot that nobody else will use meanwhile."""
        number = rng.randrange(N_SLOT)
        with self.slots[number]:
            yield number

    def answer(self, rng, kind):
        name = self.choose(rng, kind)
        with self.slot(rng) as slot:
            self.check(kind, self.server.complete(self.texts[name], id_slot=slot), name)

    def short(self, rng):
        self.answer(rng, "short")

    def long(self, rng):
        self.answer(rng, "long")

    def cancel(self, rng):
        body = {"prompt": rng.choice(list(self.texts.values())), "n_predict": 200, "stream": True, "ignore_eos": True}
        with self.slot(rng) as slot:
            self.server.post("/completion", {**body, "id_slot": slot}, hang_up_after=rng.randrange(20))
            while self.server.get("/slots")[slot]["is_processing"]:
                time.sleep(0.1)

    def shift(self, rng):
        """A prompt that nearly fills the context of a slot, and an answer that does not fit the rest."""
        tokens = self.server.post("/tokenize", {"content": cut(rng.randrange(len(TEXT)), len(TEXT))})["tokens"]
        n = N_CTX_SLOT - 100
        with self.slot(rng) as slot:
            answer = self.server.complete(tokens[:n], 160, id_slot=slot)
        if len(answer["tokens"]) != 160 or not answer["truncated"]:
            raise RuntimeError(f"{len(answer['tokens'])} tokens of 160 after a prompt of {n}, no context shift")
        with self.lock:
            self.n_shifted += 1

    def restore(self, rng):
        """Half of an answer, and the other half after the slot was saved, erased and restored."""
        name, half = self.choose(rng, "long"), N_ANSWER // 2
        tokens = self.server.post("/tokenize", {"content": self.texts[name], "add_special": True})["tokens"]
        with self.slot(rng) as slot:
            file = {"filename": f"slot-{slot}.bin"}
            for _ in range(SAVES):
                first = self.server.complete(tokens, half, id_slot=slot)
                self.check("long", first, name, half)
                # a unified cache that is full takes the cells of idle slots, and this one is idle now
                if self.server.post(f"/slots/{slot}?action=save", file)["n_saved"] >= len(tokens):
                    break
            self.server.post(f"/slots/{slot}?action=erase", {})
            n = self.server.post(f"/slots/{slot}?action=restore", file)["n_restored"]
            if n < len(tokens):
                raise RuntimeError(f"{n} tokens restored of {len(tokens)}")
            rest = self.server.complete(tokens + first["tokens"], N_ANSWER - half, id_slot=slot)
            self.check("restored", rest, name, N_ANSWER - half, first["tokens"])

    def client(self, number, deadline):
        rng = random.Random(f"{self.seed}-{number}")
        while time.monotonic() < deadline and not self.errors:
            kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            try:
                getattr(self, kind)(rng)
                with self.lock:
                    self.requests[kind] += 1
            except Exception as error:
                with self.lock:
                    self.errors.append(f"{kind}: {error!r}")

    def run(self, seconds, n_client):
        """Memory at start, middle and end, MiB."""
        answers = {name: self.server.complete(text) for name, text in self.texts.items()}
        for name, answer in answers.items():
            self.check("quiet", answer, name)
        self.references["quiet"] = {name: answer["tokens"] for name, answer in answers.items()}
        memory = [self.server.memory()]
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(i, end), daemon=True) for i in range(n_client)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end - seconds / 2 and not self.errors:
            time.sleep(0.2)
        memory.append(self.server.memory())
        for thread in threads:
            thread.join()
        return [*memory, self.server.memory()]


def table(rows):
    """Markdown: a line for each run."""
    lines = [
        "| cache | budget | verified | minutes | requests | errors | context shifts | MiB, start, middle, end "
        "| steps sparse | agreement |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        requests = ", ".join(f"{n} {kind}" for kind, n in sorted(r["requests"].items()))
        memory = ", ".join(str(r["memory_mib"][when]) for when in ("start", "middle", "end"))
        agreement = "; ".join(f"{kind} {mean:.2f} ({r['n_compared'][kind]})" for kind, mean in r["agreement"].items())
        lines.append(
            f"| {r['cache']} | {r['budget'] or 'off'} | {'yes' if r['verify'] and r['budget'] else 'no'} "
            f"| {r['minutes']:g} | {sum(r['requests'].values())}: {requests} | {len(r['errors'])} | {r['n_shifted']} "
            f"| {memory} | {100 * r['share_sparse']:.0f} % | {agreement} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a calibrated GGUF file")
    parser.add_argument("--minutes", type=float, default=20, help="with FASA, half for each cache (default: 20)")
    parser.add_argument("--dense-minutes", type=float, default=5, help="without FASA, unified cache (default: 5)")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=8, help="of each length (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="of the server")
    parser.add_argument("--least-agreement", type=float, default=0.5, help="below it the run fails (default: 0.5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--llama-server", help="the program, if it is not the installed one")
    parser.add_argument("--out", help="append the JSON lines to this file")
    args = parser.parse_args()

    program = find_tool("llama-server", args.llama_server)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        common = ["-m", args.model, "-np", N_SLOT, "-t", args.threads, "-fa", "on", "--slot-save-path", folder]
        common += ["--context-shift", "--cache-ram", CACHE_RAM_MIB, "-c", N_SLOT * N_CTX_SLOT]
        common = [str(arg) for arg in common]
        dense = Server(program, [*common, "--fasa", "off", "--no-kv-unified"], folder / "dense.log")
        texts = prompts(args.prompts)
        expected = {name: dense.complete(text)["tokens"] for name, text in texts.items()}
        dense.stop()
        unified, streams = ["--kv-unified", "--kv-unified-per-slot", str(N_CTX_SLOT)], ["--no-kv-unified"]
        runs = [
            ("unified", unified, args.budget, args.minutes / 2),
            ("streams", streams, args.budget, args.minutes / 2),
            ("unified", unified, 0, args.dense_minutes),
        ]
        for cache, options, budget, minutes in runs:
            fasa = ["--fasa", "on", "--fasa-budget", str(budget)] if budget else ["--fasa", "off"]
            server = Server(program, [*common, *options, *fasa], folder / f"{cache}-{budget}.log")
            soak = Soak(server, texts, expected, args.seed)
            memory = soak.run(minutes * 60, args.clients)
            steps = server.stop()
            means = {kind: sum(values) / len(values) for kind, values in sorted(soak.agreements.items())}
            n_sparse = steps.get("n_step_sparse", 0) + steps.get("n_step_mixed", 0)
            n_decode = n_sparse + steps.get("n_step_dense", 0)
            share = n_sparse / n_decode if n_decode else 0
            emit(
                row(
                    "soak", args.model, cache=cache, n_slot=N_SLOT, n_ctx_slot=N_CTX_SLOT, budget=budget,
                    verify=os.environ.get("LLAMA_FASA_VERIFY", "0") != "0", clients=args.clients, threads=args.threads,
                    seed=args.seed, minutes=minutes, requests=dict(soak.requests), errors=soak.errors,
                    n_shifted=soak.n_shifted, agreement={kind: round(mean, 3) for kind, mean in means.items()},
                    n_compared={kind: len(values) for kind, values in sorted(soak.agreements.items())},
                    memory_mib=dict(zip(("start", "middle", "end"), memory)), **steps, share_sparse=round(share, 3),
                ),
                args.out,
            )  # fmt: skip
            what = f"{cache}, budget {budget}"
            failures += [f"{what}: {error}" for error in soak.errors]
            failures += [f"{what}: answers agree {v:.2f} ({k})" for k, v in means.items() if v < args.least_agreement]
            if budget and not share:
                failures.append(f"{what}: no step was sparse")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
