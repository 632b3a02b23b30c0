"""Runs upstream's own tests on the patched tree and writes which pass as a table.

    cmake -B build/upstream -DLLAMA_BUILD_TESTS=ON
    cmake --build build/upstream --target llama-server $(python tools/upstream_tests.py --targets)
    python tools/upstream_tests.py build/upstream LLAMA_CPP model.gguf --out docs/upstream-tests.md

LLAMA_CPP: the source tree, for its tests of the server's API, which need what tools/server/tests/requirements.txt in it
names; model.gguf: stands for the models that the tests would download. With --unpatched BUILD, a build of the same tree
without our patches, what failed is run there too. With LLAMA_ARG_FASA_BUDGET set, the server's tests run with FASA.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from machine import commit, pin

ROOT = pathlib.Path(__file__).resolve().parent.parent

# area, program, arguments; {model}: the model, {work}: a folder that lives through the run
PROGRAMS = [
    ("ops", "test-backend-ops", "test -b CPU -o FASA_ATTN"),
    ("ops", "test-backend-ops", "test -b CPU -o SET_ROWS"),
    ("ops", "test-backend-ops", "test -b CPU -o SOFT_MAX"),
    ("ops", "test-backend-ops", "test -b CPU -o ROPE"),
    ("ops", "test-quantize-fns", ""),
    ("ops", "test-rope", ""),
    ("ops", "test-col2im-1d", ""),
    ("ops", "test-tiled-mulmat", ""),
    ("ops", "test-opt", ""),
    ("files", "test-gguf", ""),
    ("files", "test-alloc", ""),
    ("archs", "test-llama-archs", "-o {work}"),
    ("state", "test-save-load-state", "--models {work}"),
    ("state", "test-recurrent-state-rollback", "--models {work}"),
    ("state", "test-state-restore-fragmented", "-m {model}"),
    ("batches", "test-batch-alloc", ""),
    ("threads", "test-barrier", ""),
    ("threads", "test-thread-safety", "-m {model} -ngl 0 -p Hello -n 32 -c 256 -ub 32 -np 4 -t 1"),
    ("models", "test-model-load-cancel", "{model}"),
    ("models", "test-autorelease", "{model}"),
    ("options", "test-arg-parser", ""),
    ("options", "test-model-resolution", ""),
    ("sampling", "test-sampling", ""),
    ("ops", "test-backend-ops", "test -b CPU -o MUL_MAT"),
    ("ops", "test-backend-ops", "test -b CPU -o FLASH_ATTN_EXT"),
]
# files of the server's tests that need no other model than the one that is replaced
SERVER = ["basic", "completion", "ctx_shift", "ignore_eos", "kv_keep_only_active", "metrics", "slot_save", "tokenize"]


def run_program(build, program, args, seconds):
    """(result, why): passed, failed, or not run to its end in time."""
    command = [str(build / "bin" / program), *args]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        return "failed", error.strerror
    except subprocess.TimeoutExpired:
        return "not run", f"no end after {seconds} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode == 0:
        return "passed", ""
    return "failed", f"exit {done.returncode}: {' '.join(lines[-1:])[:120]}"


def run_server_tests(build, tree, model, tests):
    """{test: (result, why)} of pytest arguments below the server's tests, by pytest's names."""
    folder = tree / "tools" / "server" / "tests"
    environment = {
        **os.environ,
        "LLAMA_SERVER_BIN_PATH": str(build / "bin" / "llama-server"),
        "FASA_UPSTREAM_MODEL": str(model),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as work:
        report = pathlib.Path(work) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "upstream_server", "-m", "not slow", "-q"]
        command += [f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr)
        results = {}
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.get("classname").split(".")[-1]
            result, why = "passed", ""
            for child in case:
                if child.tag in ("failure", "error", "skipped"):
                    result = "not run" if child.tag == "skipped" else "failed"
                    why = (child.get("message") or "").splitlines()[0][:120] if child.get("message") else ""
            results[f"unit/{file}.py::{case.get('name')}"] = result, why
    return results


def run_all(args, work):
    """[(area, name, result, why, result unpatched or "")]"""
    rows = []
    for area, program, text in PROGRAMS:
        words = [word.format(model=args.model, work=work) for word in text.split()]
        result, why = run_program(args.build, program, words, args.seconds)
        unpatched = ""
        if result == "failed" and args.unpatched:
            unpatched, _ = run_program(args.unpatched, program, words, args.seconds)
        name = f"{program} {text.format(model='model.gguf', work='MODELS')}".strip()
        print(f"{result:8} {name} {why}", file=sys.stderr, flush=True)
        rows.append((area, name, result, why, unpatched))
    results = run_server_tests(args.build, args.llama_cpp, args.model, [f"unit/test_{name}.py" for name in args.server])
    failed = [name for name, (result, _) in results.items() if result == "failed"]
    again = run_server_tests(args.unpatched, args.llama_cpp, args.model, failed) if failed and args.unpatched else {}
    for name, (result, why) in results.items():
        rows.append(("server", name, result, why, again.get(name, ("", ""))[0]))
    return rows


def table(rows):
    lines = ["| area | tests | passed | failed | of these unpatched too | not run |", "|---|---|---|---|---|---|"]
    for area in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == area]
        counts = [sum(row[2] == result for row in own) for result in ("passed", "failed", "not run")]
        both = sum(row[2] == row[4] == "failed" for row in own)
        lines.append(f"| {area} | {len(own)} | {counts[0]} | {counts[1]} | {both} | {counts[2]} |")
    return "\n".join(lines)


def page(rows):
    """docs/upstream-tests.md"""
    def listed(chosen):
        return "\n".join(f"| `{name}` | {why.replace('|', '/')} | {un or '-'} |" for _, name, _, why, un in chosen)

    head = "| test | why | unpatched |\n|---|---|---|\n"
    programs = "\n".join(f"- `{name}`: {result}" for area, name, result, *_ in rows if area != "server")
    fasa = os.environ.get("LLAMA_ARG_FASA_BUDGET")
    return f"""# Upstream's tests on the patched tree

Written by `tools/upstream_tests.py`, which says how; commit {commit()}, llama-cpp-python {pin()}.
{f"The server ran with FASA, budget {fasa}." if fasa else "The server ran without a budget, so without FASA."}

{table(rows)}

The server's tests expect the model stories260K from a hub. Here another model takes its place, so those that compare
the model's very words fail on any tree.

## Programs

{programs}

## Failed

{head}{listed([row for row in rows if row[2] == "failed"])}

## Not run

{head}{listed([row for row in rows if row[2] == "not run"])}
""".encode("ascii", "replace").decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", nargs="?", type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("llama_cpp", nargs="?", type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("model", nargs="?", type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--unpatched", type=lambda p: pathlib.Path(p).resolve(), help="a build without our patches")
    parser.add_argument("--seconds", type=int, default=3600, help="most for one program (default: 3600)")
    parser.add_argument("--server", nargs="*", default=SERVER, help="which of the server's test files")
    parser.add_argument("--out", type=pathlib.Path, help="the page to write; without it the table goes to the terminal")
    parser.add_argument("--targets", action="store_true", help="print the programs to build, and no more")
    args = parser.parse_args()
    if args.targets:
        print(*dict.fromkeys(program for _, program, _ in PROGRAMS))
        return 0
    if args.model is None:
        parser.error("give BUILD, LLAMA_CPP and the model")
    with tempfile.TemporaryDirectory() as work:
        rows = run_all(args, work)
    if args.out:
        args.out.write_text(page(rows))
    print(table(rows))
    new = [name for _, name, result, _, unpatched in rows if result == "failed" and unpatched != "failed"]
    for name in new:
        print(f"error: {name} failed" + (" and passes unpatched" if args.unpatched else ""), file=sys.stderr)
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
