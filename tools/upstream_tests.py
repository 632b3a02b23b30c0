"""Runs upstream's own tests on the patched tree and writes which pass as a table.

    cmake -B build/upstream -DLLAMA_BUILD_TESTS=ON
    cmake --build build/upstream --target $(python tools/upstream_tests.py --targets)
    python tools/upstream_tests.py build/upstream LLAMA_CPP model.gguf --out docs/upstream-tests.md

LLAMA_CPP: the source tree, for its tests of the server's API, which need what tools/server/tests/requirements.txt in it
names; model.gguf: a small calibrated model, stands for the models that the tests would download. The server's tests run
with the budget that the model's file recommends, and some of them once more in other ways. With --unpatched BUILD, a
build of the same tree without our patches, what failed is run there too.

It takes hours. What came to its end is kept in BUILD/upstream-tests.json and not run again, so that a run that was
stopped goes on, and can be made in parts: --only "test-backend-ops.*MUL_MAT", --only "^server:".
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from machine import commit, pin

ROOT = pathlib.Path(__file__).resolve().parent.parent

# area, program, arguments; {model}: the model, {models}: a folder of tiny models of all architectures
PROGRAMS = [
    ("archs", "test-llama-archs", "-o {models}"),  # writes the folder
    ("ops", "test-backend-ops", "test -b CPU -o FASA_ATTN"),
    ("ops", "test-backend-ops", "test -b CPU -o SET_ROWS"),
    ("ops", "test-backend-ops", "test -b CPU -o SOFT_MAX"),
    ("ops", "test-backend-ops", "test -b CPU -o ROPE"),
    ("ops", "test-backend-ops", "test -b CPU -o MUL_MAT"),
    ("ops", "test-backend-ops", "test -b CPU -o FLASH_ATTN_EXT -p kv=113,"),  # every head size and type; all take hours
    ("ops", "test-quantize-fns", ""),
    ("ops", "test-rope", ""),
    ("ops", "test-col2im-1d", ""),
    ("ops", "test-tiled-mulmat", ""),
    ("ops", "test-opt", ""),
    ("files", "test-gguf", ""),
    ("files", "test-alloc", ""),
    ("state", "test-save-load-state", "--models {models} -t 1"),
    ("state", "test-recurrent-state-rollback", "--models {models} -t 1"),
    ("state", "test-state-restore-fragmented", "-m {model}"),
    ("batches", "test-batch-alloc", ""),
    ("threads", "test-barrier", ""),
    ("threads", "test-thread-safety", "-m {model} -ngl 0 -p Hello -n 32 -c 256 -ub 32 -np 4 -t 1"),
    ("models", "test-model-load-cancel", "{model}"),
    ("models", "test-autorelease", "{model}"),
    ("options", "test-model-resolution", ""),
    ("sampling", "test-sampling", ""),
]
# programs that download in the middle of it, and so cannot pass without a network
DOWNLOADS = [("options", "test-arg-parser"), ("files", "test-gguf-model-data"), ("files", "test-quant-type-selection")]
# the server's test files that decode, and keep what they decoded; these run with FASA too
DECODING = "completion ctx_shift embedding infill kv_keep_only_active metrics rerank slot_save speculative".split()
# areas of the server's tests: the server's environment, its test files
SERVER = {
    "server": ({}, ["test_*.py"]),
    "server with FASA": (
        {"LLAMA_ARG_FASA_BUDGET": "64", "LLAMA_FASA_VERIFY": "1"},
        [f"test_{name}.py" for name in DECODING],
    ),
    "server without FASA": ({"LLAMA_ARG_FASA": "off"}, ["test_tool_call.py"]),  # parses sampled text
}


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
    output = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        return "passed", ", ".join(re.findall(r"\d+/\d+ tests passed", output))
    return "failed", f"exit {done.returncode}: {' '.join(output.splitlines()[-1:])[:120]}"


def run_server_tests(build, tree, model, environment, tests):
    """{test: (result, why)} of pytest arguments below the server's tests, by pytest's names."""
    folder = tree / "tools" / "server" / "tests"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_FASA")},
        "LLAMA_SERVER_BIN_PATH": str(build / "bin" / "llama-server"),
        "FASA_UPSTREAM_MODEL": str(model),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]),
        **environment,
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
                    why = (child.get("message") or "").partition("\n")[0].replace(str(tree), "LLAMA_CPP")[:120]
            results[f"unit/{file}.py::{case.get('name')}"] = result, why
    return results


def units(args):
    """{name: (area, run)}; run(build, tests) returns {test: (result, why)}; tests: of these at least, None: of all."""
    models = args.build / "upstream-test-models"
    models.mkdir(exist_ok=True)

    def program(name, program, text):
        words = [word.format(model=args.model, models=models) for word in text.split()]
        return lambda build, _: {name: run_program(build, program, words, args.seconds)}

    def server(file, environment):
        def run(build, tests):
            functions = {test.partition("[")[0] for test in tests or [f"unit/{file}"]}  # parameters are hard to quote
            return run_server_tests(build, args.llama_cpp, args.model, environment, sorted(functions))

        return run

    found = {}
    for area, name, text in PROGRAMS:
        full = f"{name} {text.format(model='model.gguf', models='MODELS')}".strip()
        found[full] = area, program(full, name, text)
    unit = args.llama_cpp / "tools" / "server" / "tests" / "unit"
    for area, (environment, patterns) in SERVER.items():
        for path in sorted(path for pattern in patterns for path in unit.glob(pattern)):
            found[f"{area}: {path.name}"] = area, server(path.name, environment)
    return found


def run_all(args):
    """[(area, name, result, why, result unpatched or "", commit)], of this run and of those before it."""
    kept = args.build / "upstream-tests.json"

    def results():
        return json.loads(kept.read_text()) if kept.exists() else {}

    rows = [(area, program, "not run", "needs a download", "", "") for area, program in DOWNLOADS]
    for name, (area, run) in units(args).items():
        unit = results().get(name, {"commit": "", "tests": {name: ("not run", "not asked for")}, "unpatched": {}})
        if re.search(args.only, name):
            ended = unit["commit"] and (area in SERVER or unit["tests"][name][0] != "not run")
            if args.again or not ended:
                unit = {"commit": commit(), "tests": run(args.build, None), "unpatched": {}}
            failed = [test for test, (result, _) in unit["tests"].items() if result == "failed"]
            if args.unpatched and set(failed) - set(unit["unpatched"]):
                again = run(args.unpatched, failed)
                unit["unpatched"] = {test: again[test][0] for test in failed if test in again}
            kept.write_text(json.dumps({**results(), name: unit}, indent=1))  # others may have been added meanwhile
        for test, (result, why) in unit["tests"].items():
            rows.append((area, test, result, why, unit["unpatched"].get(test, ""), unit["commit"]))
            print(*rows[-1][2:5], test, file=sys.stderr, flush=True)
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

    def listed(result):
        chosen = [row for row in rows if row[2] == result]
        lines = [f"| {row[0]} | `{row[1]}` | {row[3].replace('|', '/')} | {row[4] or '-'} |" for row in chosen]
        return "\n".join(["| area | test | why | unpatched |", "|---|---|---|---|", *lines])

    programs = "\n".join(
        f"- `{name}`: {result}{f', {why}' if why and result == 'passed' else ''}"
        for area, name, result, why, *_ in rows
        if area not in SERVER
    )
    commits = ", ".join(dict.fromkeys(row[5] for row in rows if row[5]))
    return f"""# Upstream's tests on the patched tree

Written by `tools/upstream_tests.py`, which says how; commit {commits}, llama-cpp-python {pin()}.

{table(rows)}

The server's tests expect the model stories260K and others from a hub. Here one other model takes their place, so those
that compare a model's very words or its number of tokens fail on any tree. "server": the budget is what the model's
file recommends, so that a test with a long context samples another text than without FASA. "server with FASA": a budget
of 64 and `LLAMA_FASA_VERIFY=1`, so that the index is checked after each step; few of these tests have more than the
256 cells above which steps are sparse.

## Programs

{programs}

## Failed

{listed("failed")}

## Not run

{listed("not run")}
""".encode("ascii", "replace").decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", nargs="?", type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("llama_cpp", nargs="?", type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("model", nargs="?", type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--unpatched", type=lambda p: pathlib.Path(p).resolve(), help="a build without our patches")
    parser.add_argument("--seconds", type=int, default=3600, help="most for one program (default: 3600)")
    parser.add_argument("--only", metavar="REGEX", default="", help="which programs and server's test files, by name")
    parser.add_argument("--again", action="store_true", help="also what came to its end before")
    parser.add_argument("--out", type=pathlib.Path, help="the page to write; without it the table goes to the terminal")
    parser.add_argument("--targets", action="store_true", help="print the programs to build, and no more")
    args = parser.parse_args()
    if args.targets:
        print("llama-server", *dict.fromkeys(program for _, program, _ in PROGRAMS))
        return 0
    if args.model is None:
        parser.error("give BUILD, LLAMA_CPP and the model")
    for build in filter(None, (args.build, args.unpatched)):
        if not (build / "bin" / "llama-server").exists():
            parser.error(f"there is no llama-server in {build / 'bin'}")
    rows = run_all(args)
    if args.out:
        args.out.write_text(page(rows))
    print(table(rows))
    new = {name: unpatched for _, name, result, _, unpatched, _ in rows if result == "failed" and unpatched != "failed"}
    for name, unpatched in new.items():
        print(f"error: {name} failed" + (f", unpatched {unpatched}" if unpatched else ""), file=sys.stderr)
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
