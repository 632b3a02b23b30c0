"""Damaged files by seeded mutation: the readers refuse them or read them, and do nothing else.

FASA_FUZZ_RUNS sets the number of files for each reader. Coverage-guided fuzzing of the same readers: tests/fuzz.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fuzz.make_corpus import seeds
from support.mutate import check_reader, mutated

RUNS = int(os.environ.get("FASA_FUZZ_RUNS", 0))

# Loads mutated models until one is not handled, and says before each which one it is. argv: folder, seed, runs.
LOAD = """
import pathlib, sys
import numpy as np
from support.gguf_keys import KEYS_AT
from support.mutate import mutated
from support.runtime import Model, log_lines
from support.tiny_gguf import Shape, write_tiny_gguf
from test_loader import SHAPE, calibrated

folder, seed, runs = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
plain = write_tiny_gguf(folder / "plain.gguf", "llama", SHAPE)
seeds = [calibrated(plain, folder / "seed.gguf", changes).read_bytes() for changes in ({}, {"fasa.budget": 64})]
n_own = min(map(len, seeds)) - plain.stat().st_size
counts = {}
for i in range(runs):
    print("file", i, flush=True)
    path = folder / "mutated.gguf"
    path.write_bytes(mutated(np.random.default_rng([seed, i]), seeds, KEYS_AT, KEYS_AT + n_own))
    del log_lines[:]
    try:
        with Model(path) as model:
            status, error = model.calibrated()
            assert (status == -1) == bool(error) and "\\n" not in error and error.isascii(), (status, error)
    except RuntimeError:
        status = "not loaded"
    counts[status] = counts.get(status, 0) + 1
print(counts)
"""


def test_seeds(tmp_path):
    """The corpus reaches the readers: most seeds are GGUF files."""
    path = tmp_path / "seed.gguf"
    readable = {}
    for name, data in seeds().items():
        path.write_bytes(data)
        readable[name] = check_reader(path)
    assert [name for name, ok in readable.items() if not ok] == ["bad-long"]


def test_python_reader(tmp_path, request):
    seed = request.config.getoption("--seed")
    corpus = list(seeds().values())
    path = tmp_path / "mutated.gguf"
    n_read = 0
    for i in range(RUNS or 5000):
        path.write_bytes(mutated(np.random.default_rng([seed, i]), corpus))
        try:
            n_read += check_reader(path)
        except Exception as error:
            raise AssertionError(f"file {i} of seed {seed}: {error!r}") from error
    print(f"{RUNS or 5000} files, {n_read} readable")
    assert n_read > 0


def test_loader(tmp_path, request):
    """In a process of its own, which may crash."""
    pytest.importorskip("fasa")
    seed = request.config.getoption("--seed")
    command = [sys.executable, "-c", LOAD, str(tmp_path), str(seed), str(RUNS or 500)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]} of seed {seed}, exit {done.returncode}:\n{done.stderr[-2000:]}"
    print(lines[-1])
    assert "-1: " in lines[-1] and " 1: " in lines[-1].replace("{", " "), "the mutations miss the loader"
