"""Console commands of the patched llama.cpp tools: each starts the program of its name in ``fasa/bin``."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from typing import NoReturn


def _run(name: str) -> NoReturn:
    program = str(files("fasa") / "bin" / (name + (".exe" if sys.platform == "win32" else "")))
    if not os.path.exists(program):
        sys.exit(f"{name}: {program} is missing; install fasa with 'pip install .'")
    args = [program, *sys.argv[1:]]
    if sys.platform == "win32":
        # there execv returns to the shell before the program has ended
        sys.exit(subprocess.call(args))
    os.execv(program, args)


def llama_bench() -> NoReturn:
    _run("llama-bench")


def llama_cli() -> NoReturn:
    _run("llama-cli")


def llama_perplexity() -> NoReturn:
    _run("llama-perplexity")


def llama_quantize() -> NoReturn:
    _run("llama-quantize")


def llama_server() -> NoReturn:
    _run("llama-server")
