#!/usr/bin/env python3
"""Checks and measures FASA-M on a CUDA GPU and appends rows to docs/benchmarks/mapped.jsonl; 5 minutes on an H100.

    ops        the op on K and V in mapped memory against K and V on the device, and staged against flash attention
    speed      decode and prefill at a depth: dense, FASA-C and FASA-M
    memory     what the KV cache takes of the device at the largest context by the driver's figure, and speed there
    tokens     greedy decoding: FASA-M against FASA-C from the same state; save, restart, restore, continue
    balloon    with all but a little of the device's memory taken by another process: dense must fail, FASA must run
    fit        the same through llama-server and its automatic fitting, if that program is there
    sanitizer  compute-sanitizer (memcheck, racecheck, initcheck) on ops

Needs the programs of a build with -DGGML_CUDA=ON -DFASA_BUILD_TESTS=ON; the model, if there is none, is written by
tools/random_gguf.py.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from machine import ROOT, emit, gpu, row

PARTS = ("ops", "speed", "memory", "tokens", "balloon", "fit", "sanitizer")
LEAVE_MIB = 3584  # beside the model's weights, for everything a context takes of the device
N_GEN = 68  # of which 4 are not timed
NEAR_TIE = 0.1  # difference of logits


class Failed(Exception):
    pass


class Bench:
    def __init__(self, args):
        self.args = args
        self.program = str(pathlib.Path(args.bin) / "fasa-mapped")
        self.env = dict(os.environ, LD_LIBRARY_PATH=f"{args.bin}:{os.environ.get('LD_LIBRARY_PATH', '')}")

    def call(self, *command, check=True, timeout=280):
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout)
        if check and result.returncode != 0:
            raise Failed(f"{' '.join(command)}: {result.stdout[-2000:]} {result.stderr[-2000:]}")
        return result

    def run(self, model=None, check=True, **settings):
        """One context; what it printed as a dict, or its message if it failed and may."""
        words = [f"{key}={value}" for key, value in settings.items()]
        started = time.time()
        result = self.call(self.program, "run", str(model or self.args.model), *words, check=check)
        if result.returncode != 0:
            return result.stderr.strip()
        ran = json.loads(result.stdout)
        shown = {key: value for key, value in ran.items() if key not in ("tokens", "gaps")}
        print(f"{' '.join(words)} ({time.time() - started:.0f} s): {json.dumps(shown)}", flush=True)
        sys.stdout.write("".join(line for line in result.stderr.splitlines(True) if line.startswith("fasa:")))
        return ran

    def copy_rate(self):
        """GB/s of a plain copy to the device."""
        if not hasattr(self, "rate"):
            self.rate = json.loads(self.call(self.program, "copy").stdout)["copy_gb_s"]
        return self.rate

    def report(self, ran, **more):
        if ran["n_row_hit"] + ran["n_row_miss"] > 0:
            bytes_per_step = ran["n_row_miss"] * ran["row_bytes"] / ran["n_step_sparse"]
            more["row_hit_rate"] = round(ran["n_row_hit"] / (ran["n_row_hit"] + ran["n_row_miss"]), 4)
            more["bus_bytes_per_step"] = round(bytes_per_step)
            more["copy_gb_s"] = self.copy_rate()
            more["bus_share"] = round(bytes_per_step * ran["decode_tok_s"] / 1e9 / self.copy_rate(), 4)
            print({key: more[key] for key in ("row_hit_rate", "bus_bytes_per_step", "copy_gb_s", "bus_share")})
        settings = {key: value for key, value in ran.items() if key not in ("tokens", "logits", "gaps")}
        emit(row("mapped", self.args.model, gpu=gpu(), **settings, **more), self.args.out)

    def note(self, check, result, with_model=True):
        model = self.args.model if with_model else None
        emit(row("mapped_check", model, gpu=gpu(), check=check, result=result), self.args.out)

    def ops(self):
        result = self.call(self.program, "ops", check=False)
        print(result.stdout, result.stderr)
        if result.returncode != 0:
            raise Failed("cases failed")
        self.note("ops", result.stdout.splitlines()[-1], with_model=False)

    def speed(self):
        for mode in ("off", "c", "m"):
            self.report(self.run(mode=mode, depth=self.args.depth, gen=N_GEN), mode=mode)

    def memory(self):
        n_ctx, depth = self.args.ctx, self.args.ctx - N_GEN - 8

        def share(m, dense):
            """Device memory of the KV cache in M: what the context takes, less what dense takes beside K and V."""
            beside = dense["context_mib"] - m["kv_mib"]
            return {
                "kv_device_mib": round(m["context_mib"] - beside, 1),
                "dense_context_mib": dense["context_mib"],
                "kv_share": round((m["context_mib"] - beside) / m["kv_mib"], 4),
            }

        dense = self.run(mode="off", ctx=n_ctx, depth=depth, gen=N_GEN)
        self.report(dense, mode="off")
        m = self.run(mode="m", ctx=n_ctx, depth=depth, gen=N_GEN)
        self.report(m, mode="m", **share(m, dense))
        print(f"q4 index: {share(m, dense)}")
        dense = self.run(mode="off", ctx=n_ctx, depth=4096, gen=N_GEN)
        m = self.run(model=self.args.model_f16, mode="m", index="f16", ctx=n_ctx, depth=4096, gen=N_GEN)
        self.report(m, mode="m", **share(m, dense))
        print(f"f16 index, {m['n_tip']} FCs: {share(m, dense)}")

    def staged_whole(self, ran):
        """Whether all prompt batches of a run staged K and V of a layer at once, see GGML_FASA_STAGED_WHOLE."""
        from gguf import GGUFReader

        fields = GGUFReader(self.args.model).fields
        n_layer = fields[fields["general.architecture"].contents() + ".block_count"].contents()
        return ran["kv_mib"] / n_layer * ran["depth"] / ran["ctx"] <= 32

    def tokens(self):
        with tempfile.TemporaryDirectory() as folder:
            of = {mode: os.path.join(folder, mode) for mode in "cm"}
            more = {"text": self.args.text} if self.args.text else {}

            def run(mode, **state):
                return self.run(mode=mode, depth=self.args.depth_tokens, gen=64, **more, **state)

            runs = {
                "c": run("c", save=of["c"]),
                "m": run("m", save=of["m"]),
                "m from its own state": run("m", load=of["m"]),
                "m from the state of c": run("m", load=of["c"]),
                "c from the state of m": run("c", load=of["m"]),
            }
        wrong = []
        for a, b, same_bits in (
            ("m", "m from its own state", True),
            ("c", "m from the state of c", True),
            ("m", "c from the state of m", True),
            ("c", "m", self.staged_whole(runs["m"])),  # else sums have another order: a near tie may fall the other way
        ):
            tokens, bits = [runs[name]["tokens"] for name in (a, b)], runs[a]["logits"] == runs[b]["logits"]
            n_same = next((i for i, (x, y) in enumerate(zip(*tokens)) if x != y), len(tokens[0]))
            result = f"{n_same}/{len(tokens[0])} the same, logits {'equal' if bits else 'not equal'} bit by bit"
            if n_same < len(tokens[0]):
                gap = runs[a]["gaps"][n_same]
                result += f", the first other one where the best logit led by {gap}"
                if same_bits or gap > NEAR_TIE:
                    wrong.append(f"{a}, {b}")
            elif same_bits and not bits:
                wrong.append(f"{a}, {b}")
            print(f"tokens of {a} and {b}: {result}")
            self.note(f"tokens of {a} and {b}", result)
        if wrong:
            raise Failed(f"other tokens: {'; '.join(wrong)}")

    @contextlib.contextmanager
    def held(self):
        """Device memory taken by another process."""
        leave = os.path.getsize(self.args.model) // 2**20 + LEAVE_MIB
        process = subprocess.Popen(
            [self.program, "balloon", str(leave)], env=self.env, stdout=subprocess.PIPE, text=True
        )
        try:
            print("balloon:", process.stdout.readline().strip(), flush=True)
            yield
        finally:
            process.kill()
            process.wait()

    def balloon(self):
        with self.held():
            dense = self.run(mode="off", ctx=self.args.ctx, depth=1024, gen=8, check=False)
            if not isinstance(dense, str):
                raise Failed("dense has started")
            print("dense:", dense.splitlines()[-1] if dense else "failed")
            m = self.run(mode="auto", ctx=self.args.ctx, depth=8192, gen=N_GEN)
            if m["ran"] != "m":
                raise Failed(f"auto chose {m['ran']}")
            self.report(m, mode="auto", balloon=True)
            self.note("device memory taken", "dense fails, FASA-M runs")

    def fit(self):
        server = pathlib.Path(self.args.bin) / "llama-server"
        if not server.exists():
            print("there is no llama-server")
            return
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        options = f"-c {self.args.ctx} --fasa on --fasa-budget 256 -fa on -np 1 --port {port} --no-warmup".split()
        with self.held(), tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                [str(server), "-m", str(self.args.model), *options], env=self.env, stdout=log, stderr=log
            )
            try:
                url, until = f"http://127.0.0.1:{port}", time.time() + 120
                while True:
                    try:
                        with urllib.request.urlopen(f"{url}/health", timeout=5):
                            break
                    except OSError:
                        if process.poll() is not None or time.time() > until:
                            raise Failed("llama-server did not start") from None
                        time.sleep(0.5)
                body = json.dumps({"prompt": "one two three " * 200, "n_predict": 32}).encode()
                request = urllib.request.Request(f"{url}/completion", body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=120) as answer:
                    timings = json.load(answer)["timings"]
                print(f"llama-server answered: {timings}")
            finally:
                process.terminate()
                process.wait(30)
                log.seek(0)
                lines = [line for line in log if re.search(r"fasa:|FASA|fit|error", line)]
                print("".join(lines[-40:]))
        ran = next((line for line in lines if "(FASA-M)" in line), None)
        if not ran:
            raise Failed("the log does not say FASA-M")
        self.note("device memory taken, llama-server", f"FASA-M, {timings['predicted_per_second']:.0f} tok/s")

    def sanitizer(self):
        failed = []
        for tool in ("memcheck", "racecheck", "initcheck"):
            # the program copies whole tensors, also what nothing has written yet: only kernels are of interest
            options = f"--tool {tool} --check-api-memory-access no --error-exitcode 1".split()
            result = self.call("compute-sanitizer", *options, self.program, "ops", check=False)
            print(tool, result.stdout[-1500:], result.stderr[-500:])
            # flash attention as it is upstream, which runs here too, is not ours to judge
            found = re.findall(r"(?:at|by) (?:void )?([\w:]+)[<(].*", result.stdout)
            ours = [kernel for kernel in found if "fasa" in kernel]
            passed = re.search(r"(\d+)/(\d+) cases passed", result.stdout)
            if not passed:
                raise Failed(tool)
            if ours or passed[1] != passed[2] or (result.returncode != 0 and not found):
                failed.append(tool)
            others = f", reports on upstream's {', '.join(sorted(set(found)))}" if found else ""
            result = f"{passed[0]}, {len(ours)} reports on our kernels{others}"
            self.note(f"ops, compute-sanitizer {tool}", result, with_model=False)
        if failed:
            raise Failed(", ".join(failed))


def table(rows):
    """Markdown: a line for each context."""
    lines = [
        "| mode | context | depth | index | prompt tok/s | decode tok/s | device memory of the context, MiB "
        "| of the KV cache, MiB (share) | row cache hits | MB a step over the bus (share of a copy's rate) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        sparse = r["ran"] != "off"
        name = {"off": "dense"}.get(r["ran"], f"FASA-{r['ran'].upper()}, budget {r['budget']}")
        bound = f", {r['vram']} MiB" if r["vram"] else ""
        name += ", chosen; memory taken" if r.get("balloon") else bound
        cells = [
            name,
            r["ctx"],
            r["depth"],
            f"{r['index_type']}, {r['n_tip']} FCs" if sparse else "",
            r["prompt_tok_s"],
            r["decode_tok_s"],
            r["context_mib"],
        ]
        cells.append(f"{r['kv_device_mib']:.0f} (1/{1 / r['kv_share']:.1f})" if "kv_share" in r else "")
        if "row_hit_rate" in r:
            bus = f"{r['bus_bytes_per_step'] / 1e6:.1f} ({100 * r['bus_share']:.0f} % of {r['copy_gb_s']} GB/s)"
            cells += [f"{100 * r['row_hit_rate']:.0f} %", bus]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def checks_table(rows):
    """Markdown: a line for each check."""
    return "\n".join(["| check | result |", "|---|---|"] + [f"| {r['check']} | {r['result']} |" for r in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bin", required=True, metavar="DIR", help="folder of fasa-mapped")
    add(
        "--model",
        default="/tmp/fasa-random-8b-sparse.gguf",
        help="calibrated, without dense layers (default: %(default)s)",
    )
    add(
        "--model-f16",
        default="/tmp/fasa-random-8b-12.gguf",
        help="the same with 12 FCs, for an f16 index (default: %(default)s)",
    )
    add("--only", default=",".join(PARTS), metavar="PART,PART")
    add("--ctx", type=int, default=131072, help="largest context (default: %(default)s)")
    add("--depth", type=int, default=32768, help="depth of speed (default: %(default)s)")
    add("--depth-tokens", type=int, default=8000, help="depth of tokens (default: %(default)s)")
    add("--text", metavar="FILE", help="prompt of tokens (default: random tokens)")
    add("--out", default=str(ROOT / "docs/benchmarks/mapped.jsonl"), metavar="JSONL")
    args = parser.parse_args()
    parts = args.only.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"--only: there is no part '{part}'")
    needed = [(args.model, 16)] * (not {"ops", "sanitizer"} >= set(parts)) + [(args.model_f16, 12)] * ("memory" in parts)
    for model, n_tip in needed:
        if not os.path.exists(model):
            options = f"--dense-layers 0 --n-tip {n_tip}".split()
            subprocess.run([sys.executable, str(ROOT / "tools/random_gguf.py"), model, *options], check=True)
    bench, failed = Bench(args), []
    for part in parts:
        print(f"== {part}", flush=True)
        started = time.time()
        try:
            getattr(bench, part)()
        except (Failed, OSError, subprocess.TimeoutExpired) as err:
            print(f"error: {part}: {err}", file=sys.stderr)
            failed.append(part)
        print(f"== {part} took {time.time() - started:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
