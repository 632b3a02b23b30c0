"""The docs name files, commands and options that exist, and leave none out."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fasa_calibrate.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = ["llama-cli", "llama-server", "llama-perplexity", "llama-bench"]
OURS = ("bindings/", "calibrate_py/", "cmake/", "docs/", "ggml_fasa/", "tests/", "tools/", ".ci/")
OPTION = r"--fasa[a-z-]*"


def named_paths(text):
    """What the text calls a file or folder of this repository: in code spans and blocks."""
    words = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M):
        words += block.split()
    return {word.rstrip(".,:;") for word in words if word.startswith(OURS)}


@pytest.mark.parametrize("path", [*DOCS, ROOT / "LICENSE"], ids=lambda p: p.name)
def test_ascii(path):
    path.read_text(encoding="ascii")


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_named_files_exist(path):
    assert not [name for name in named_paths(path.read_text()) if not (ROOT / name).exists()]


def test_links_exist():
    for path in DOCS:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_readme_commands_are_those_ci_runs():
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M)
    assert commands == ["demo", "test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(commands) <= set(targets)
    assert re.search(r"^exec make test$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert "tools/demo.py" in (ROOT / "Makefile").read_text()


def documented():
    """Options of docs/cli.md's first table -> their environment twins."""
    rows = re.findall(rf"^\| `({OPTION})[^`]*` \| `(\w+)` \|", (ROOT / "docs" / "cli.md").read_text(), re.M)
    return dict(rows)


def printed(help_text):
    """FASA's options in a program's help -> their environment twins; fails for an option without help or twin."""
    options = {}
    for entry in re.split(r"^(?=-)", help_text, flags=re.M):
        option = re.match(OPTION, entry)
        if option:
            twin = re.search(r"\(env: (\w+)\)", entry)
            assert twin, f"{option[0]} has no environment twin"
            assert len(entry.split()) > 8, f"{option[0]} has no help"
            options[option[0]] = twin[1]
    return options


@pytest.mark.parametrize("tool", TOOLS)
def test_options_and_docs_agree(bin_dir, tool):
    done = subprocess.run([str(bin_dir / tool), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert printed(done.stdout) == documented()
    for option, twin in documented().items():
        assert twin == "LLAMA_ARG_" + option[2:].upper().replace("-", "_")


def test_documented_defaults_are_the_headers():
    header = (ROOT / "ggml_fasa" / "include" / "llama-fasa.h").read_text()
    docs = (ROOT / "docs" / "cli.md").read_text()
    for option, name in [("budget", "BUDGET"), ("sink", "N_SINK"), ("recent", "N_RECENT"), ("max-batch", "MAX_BATCH")]:
        default = re.search(rf"LLAMA_FASA_{name}_DEFAULT\s+(\d+)", header)[1]
        assert re.search(rf"^\| `--fasa-{option} N` \| `\w+` \| {default} \|", docs, re.M), option
    default = re.search(r"LLAMA_FASA_INDEX_TYPE_DEFAULT\s+GGML_FASA_INDEX_(\w+)", header)[1].lower()
    assert re.search(rf"^\| `--fasa-index-type .*` \| `\w+` \| `{default}` \|", docs, re.M)


def test_calibrate_options_and_docs_agree():
    section = (ROOT / "docs" / "cli.md").read_text().split("## fasa-calibrate")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    actions = [action for action in build_parser()._actions if action.option_strings]
    named = re.findall(r"`(-[\w-]+)", " ".join(row[0] for row in rows))
    assert sorted(named) == sorted(option for action in actions for option in action.option_strings)
    for option, default, _ in rows:
        if re.fullmatch(r"\d+", default):
            name = re.search(r"--([\w-]+)", option)[1].replace("-", "_")
            assert [action.default for action in actions if action.dest == name] == [int(default)], name


def test_quality_tables_are_those_of_the_rows():
    spec = importlib.util.spec_from_file_location("eval_quality", ROOT / "tools" / "eval_quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "tools"))
    spec.loader.exec_module(module)
    docs = (ROOT / "docs" / "quality.md").read_text()
    assert module.with_tables(docs) == docs, "run tools/eval_quality.py --docs"
