"""The patch series: applies, reverses and re-applies, refuses other trees, and holds call sites only."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "ggml_fasa" / "patches"
MAX_ADDED_LINES = 120

# What an added line may be. Logic belongs into ggml_fasa/.
CALL = r"(?:[\w:\[\]]+(?:\.|->))*[\w:]*\w\(.*\)"
ALLOWED = {
    "blank or bracket": r"[{}]*;?",
    "include": r'#include [<"][\w./-]+[>"]',
    "preprocessor condition": r"#(?:if|ifdef|endif|else)\b.*",
    "comment": r"//.*",
    "case": r"case \w+:.*",
    "break": r"(?:\} )?break;",
    "enum value": r"[A-Z][A-Z0-9_]+,",
    "table entry": r'(?:\[\w+\]\s*=\s*)?"[^"]*",|\{\s*"[^"]*".*\},?',
    "assertion": r"static_assert\(.*\);",
    "call": rf"(?:[\w:*&<>. ]+ \|?= )?(?:return )?!?{CALL};",
    "one more operand": rf"{CALL} \|\|",
    "constant returned": r"return true;",
    "result taken over": r"\w+ = [A-Z][A-Z0-9_]+;",
    "guarded call": r"(?:\} else )?(?:if|for) \(.*\)\s*(?:\{.*\}|\{|.*;)",
    "number": r"#define [A-Z0-9_]+\s+\d+",
    "declaration": r"[\w:<>*& ]+[ *&]\w+(?:\s*=\s*[\w:.()>-]+|\(.*\)(?: const)?)?;",
}


def series() -> list[str]:
    lines = (PATCHES / "series").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pinned_sums() -> dict[str, str]:
    lines = (PATCHES / "upstream.sha256").read_text().splitlines()
    return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}


def sums(tree: Path) -> dict[str, str]:
    files = (p for p in tree.rglob("*") if p.is_file() and ".fasa-patches" not in p.parts)
    return {p.relative_to(tree).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run_script(mode: str, tree: Path, patches: Path = PATCHES) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent / "cmake"
    cmake = str(beside) if beside.exists() else shutil.which("cmake")
    assert cmake, "no cmake: install the test extra"
    script = ROOT / "cmake" / "apply-patches.cmake"
    args = [cmake, f"-DMODE={mode}", f"-DTREE={tree}", f"-DPATCHES={patches}", "-P", str(script)]
    return subprocess.run(args, capture_output=True, text=True, check=False)


def upstream_trees() -> list[Path]:
    given = [Path(os.environ["FASA_LLAMA_CPP_DIR"])] if os.environ.get("FASA_LLAMA_CPP_DIR") else []
    built = [*ROOT.glob("build/*/upstream-sdist/tree/vendor/llama.cpp"), *ROOT.glob("build/*/upstream-copy/tree")]
    return given + sorted(built, key=lambda p: p.stat().st_mtime, reverse=True)


@pytest.fixture
def pristine(tmp_path: Path) -> Path:
    """The upstream files that the series touches, as upstream has them; taken from a given tree or from a build's."""
    trees = upstream_trees()
    if not trees:
        pytest.skip("no llama.cpp tree: build first, or set FASA_LLAMA_CPP_DIR")
    tree = tmp_path / "llama.cpp"
    for path in pinned_sums():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trees[0] / path, tree / path)
    if sums(tree) != pinned_sums():
        kept = trees[0] / ".fasa-patches"
        reversed_ = run_script("reverse", tree, kept if kept.is_dir() else PATCHES)
        assert reversed_.returncode == 0, reversed_.stderr
    assert sums(tree) == pinned_sums()
    return tree


def test_series_names_every_patch() -> None:
    assert series() == sorted(p.name for p in PATCHES.glob("*.patch"))
    assert series(), "the series is empty"


def test_apply_reverse_apply(pristine: Path) -> None:
    before = sums(pristine)
    applied = run_script("apply", pristine)
    assert applied.returncode == 0, applied.stderr
    patched = sums(pristine)
    assert patched.keys() == before.keys()
    assert all(patched[path] != before[path] for path in before), "a patch left its file as it was"

    reversed_ = run_script("reverse", pristine)
    assert reversed_.returncode == 0, reversed_.stderr
    assert sums(pristine) == before

    again = run_script("apply", pristine)
    assert again.returncode == 0, again.stderr
    assert sums(pristine) == patched


def test_second_apply_touches_nothing(pristine: Path) -> None:
    assert run_script("apply", pristine).returncode == 0
    times = {p: p.stat().st_mtime_ns for p in pristine.rglob("*") if p.is_file()}
    second = run_script("apply", pristine)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("already applied") == len(series())
    assert {p: p.stat().st_mtime_ns for p in pristine.rglob("*") if p.is_file()} == times


def test_changed_series_replaces_the_old_one(pristine: Path, tmp_path: Path) -> None:
    assert run_script("apply", pristine).returncode == 0
    patched = sums(pristine)
    shorter = tmp_path / "patches"
    shutil.copytree(PATCHES, shorter)
    (shorter / "series").write_text(series()[0] + "\n")
    replaced = run_script("apply", pristine, shorter)
    assert replaced.returncode == 0, replaced.stderr
    assert sums(pristine) != patched
    assert run_script("apply", pristine).returncode == 0
    assert sums(pristine) == patched


@pytest.mark.parametrize("mode", ["apply", "reverse"])
def test_foreign_tree_is_refused(pristine: Path, mode: str) -> None:
    path = next(line[6:] for line in (PATCHES / series()[0]).read_text().splitlines() if line.startswith("--- a/"))
    text = (pristine / path).read_text()
    (pristine / path).write_text("// not upstream's\n" + text)
    before = sums(pristine)
    refused = run_script(mode, pristine)
    assert refused.returncode != 0
    message = " ".join(refused.stderr.split())
    assert series()[0] in message and path in message
    assert "FASA_LLAMA_CPP_DIR" in message and "tools/update_patches.py" in message
    assert sums(pristine) == before


def test_inside_another_repository(pristine: Path) -> None:
    """git must not take the surrounding repository's word for what the paths mean."""
    subprocess.run(["git", "init", "-q", str(pristine.parent)], check=True)
    before = sums(pristine)
    assert run_script("apply", pristine).returncode == 0
    assert sums(pristine) != before


def added_lines() -> list[tuple[str, str]]:
    found = []
    for name in series():
        for line in (PATCHES / name).read_text().splitlines():
            if line.startswith("+") and not line.startswith("+++ "):
                found.append((name, line[1:]))
    return found


def test_added_lines_stay_under_the_bar() -> None:
    assert 0 < len(added_lines()) <= MAX_ADDED_LINES


@pytest.mark.parametrize("name,line", added_lines(), ids=lambda value: value.strip()[:60])
def test_added_line_is_a_call_site(name: str, line: str) -> None:
    bare = re.sub(r"\s*//.*$", "", line.strip()) or line.strip()
    assert any(re.fullmatch(pattern, bare) for pattern in ALLOWED.values()), f"{name}: {line}"


def test_patches_hold_no_upstream_context() -> None:
    for name in series():
        for line in (PATCHES / name).read_text().splitlines():
            assert not line.startswith(" "), f"{name} has a context line: {line}"
            if line.startswith("@@"):
                assert re.fullmatch(r"@@ -\d+(,\d+)? \+\d+(,\d+)? @@", line), f"{name} repeats upstream code: {line}"


def test_pinned_sums_cover_exactly_the_touched_files() -> None:
    lines = [line for name in series() for line in (PATCHES / name).read_text().splitlines()]
    touched = [line[6:] for line in lines if line.startswith("--- a/")]
    assert sorted(touched) == sorted(pinned_sums())
