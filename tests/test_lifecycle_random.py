"""Random lives of a KV cache, with the index checked against K after every step; see support/random_life.py.

FASA_TEST_LIVES says how many lives for each architecture and stream mode; the default keeps the suite short. A failure
prints the seed and the number of its life, and `python -m support.random_life` (in tests/) runs that one alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.random_life import ARCHS, Life

LIVES = int(os.environ.get("FASA_TEST_LIVES", 20))


def run(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "support.random_life", *map(str, args)],
        cwd=Path(__file__).parent, env={**os.environ, "GGML_NO_BACKTRACE": "1", **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["unified", "streams"])
@pytest.mark.parametrize("arch", ARCHS)
def test_random_lives(request, arch, mode):
    args = ["--arch", arch, "--lives", LIVES, "--seed", request.config.getoption("--seed")]
    done = run(*args, *["--streams"] * (mode == "streams"), LLAMA_FASA_VERIFY="1")
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(arch, mode, counts)
    assert counts["lives"] == LIVES and counts["steps sparse"] >= 9 * LIVES * 0.9
    # a prompt begins within the budget and is not indexed before it leaves it: each life rebuilds, and then writes
    assert counts["rebuilt"] >= LIVES and counts["index writes"] >= counts["steps sparse"]
    assert counts["compared: loaded"] > 0.8 * LIVES
    if LIVES >= 100:
        assert counts["compared: read anew"] > 0.1 * LIVES
        # llama.cpp splits the batches of streams and of hybrid models before they could mix
        assert ("steps mixed" in counts) == (mode == "unified" and arch != "lfm2")
        assert min(counts[name[3:]] for name in dir(Life) if name.startswith("op_")) > 0
