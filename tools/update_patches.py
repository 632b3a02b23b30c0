"""Regenerates ggml_fasa/patches from a pristine and an edited llama.cpp tree.

    python tools/update_patches.py PRISTINE EDITED [--check]

Writes one patch per part of llama.cpp, the series, and the sha256 of every upstream file a patch touches. The patches
carry no context lines, so that no upstream text is kept here; the sha256 stand in for it. With --check nothing is
written, and the exit status is 1 if the files here differ from what would be.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "ggml_fasa" / "patches"

# patch -> the folders of llama.cpp it covers
PARTS = {
    "0001-ggml.patch": ["ggml"],
    "0002-llama.patch": ["src", "include"],
    "0003-common.patch": ["common"],
    "0004-tools.patch": ["tools"],
    "0005-test-backend-ops.patch": ["tests"],
}


def files_below(tree: Path, folders: list[str]) -> set[str]:
    paths = (p for folder in folders for p in (tree / folder).rglob("*"))
    return {p.relative_to(tree).as_posix() for p in paths if p.is_file() and p.suffix not in {".orig", ".rej", ".pyc"}}


def diff(pristine: Path, edited: Path, path: str) -> str:
    """The zero-context diff of one file, with a/ and b/ names relative to the tree."""
    options = ["--no-index", "--no-color", "--no-ext-diff", "--no-renames", "-U0", "--diff-algorithm=histogram"]
    command = ["git", "diff", *options, "--", str(pristine / path), str(edited / path)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode not in (0, 1):
        sys.exit(f"git diff failed on {path}: {out.stderr.strip()}")
    lines = out.stdout.splitlines(keepends=True)
    hunks = next((i for i, line in enumerate(lines) if line.startswith("@@")), len(lines))
    if hunks == len(lines):
        return ""
    body = [line if not line.startswith("@@") else bare_hunk_header(line) for line in lines[hunks:]]
    return "".join([f"--- a/{path}\n", f"+++ b/{path}\n", *body])


def bare_hunk_header(line: str) -> str:
    """Drops the line of upstream code that git repeats after the second @@."""
    return line[: line.index("@@", 2) + 2] + "\n"


def generate(pristine: Path, edited: Path) -> dict[str, str]:
    """Name -> contents of every file in the patches folder that this tool owns."""
    made: dict[str, str] = {}
    touched: list[str] = []
    for name, folders in PARTS.items():
        old, new = files_below(pristine, folders), files_below(edited, folders)
        changed = sorted(p for p in old & new if (pristine / p).read_bytes() != (edited / p).read_bytes())
        if new - old:
            sys.exit(
                f"the edited tree has files that upstream has not: {', '.join(sorted(new - old)[:5])}; "
                "a patch holds call sites only, put new files into ggml_fasa"
            )
        patch = "".join(diff(pristine, edited, p) for p in changed)
        if patch:
            made[name] = patch
            touched += changed
    made["series"] = "".join(f"{name}\n" for name in made)
    made["upstream.sha256"] = "".join(
        f"{hashlib.sha256((pristine / p).read_bytes()).hexdigest()}  {p}\n" for p in sorted(touched)
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Regenerate ggml_fasa/patches from two llama.cpp trees.")
    parser.add_argument("pristine", type=Path, help="llama.cpp at the pinned commit")
    parser.add_argument("edited", type=Path, help="the same tree with the call sites added")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    args = parser.parse_args()
    for tree in (args.pristine, args.edited):
        if not (tree / "ggml" / "CMakeLists.txt").is_file():
            parser.error(f"{tree} is no llama.cpp tree")

    made = generate(args.pristine, args.edited)
    stale = sorted(p.name for p in PATCHES.glob("*.patch") if p.name not in made)
    differs = [n for n, text in made.items() if not (PATCHES / n).is_file() or (PATCHES / n).read_text() != text]
    if args.check:
        if differs or stale:
            sys.exit(f"out of date: {', '.join([*differs, *stale])}; run tools/update_patches.py")
        return
    for name in stale:
        (PATCHES / name).unlink()
    for name, text in made.items():
        (PATCHES / name).write_text(text)
    added = {n: sum(s.startswith("+") and not s.startswith("+++") for s in t.splitlines()) for n, t in made.items()}
    for name in PARTS:
        print(f"{name}: {added.get(name, 0)} lines added")
    print(f"in all {sum(added[n] for n in PARTS if n in added)}")


if __name__ == "__main__":
    main()
