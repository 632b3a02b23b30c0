"""FASA's options in the tools: bad values end in one sentence, environment and command line meet, FASA runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import bench_decode  # noqa: E402

BAD = [
    ("--fasa", "maybe"),
    ("--fasa-budget", "0"),
    ("--fasa-budget", "-1"),
    ("--fasa-budget", "256x"),
    ("--fasa-budget", ""),
    ("--fasa-budget", "99999999999"),
    ("--fasa-budget-schedule", "200"),
    ("--fasa-budget-schedule", "3:1"),
    ("--fasa-sink", "-1"),
    ("--fasa-recent", "1.5"),
    ("--fasa-max-batch", "0"),
    ("--fasa-index-type", "q5"),
    ("--fasa-index-type", "F16"),
    ("--fasa-mode", "on"),
    ("--fasa-vram", "0"),
    ("--fasa-vram", "1GiB"),
]
TOOLS = ["llama-cli", "llama-server", "llama-perplexity", "llama-bench"]


def run(program, *args, env=None):
    command = [str(program), *map(str, args)]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False, timeout=300
    )


@pytest.mark.parametrize("option,value", BAD)
@pytest.mark.parametrize("tool", TOOLS)
def test_bad_value(bin_dir, tool, option, value):
    done = run(bin_dir / tool, "-m", "no-such.gguf", option, value)
    assert done.returncode > 0
    sentences = [line for line in done.stderr.splitlines() if "expected" in line]
    assert len(sentences) == 1 and option in sentences[0] and f"'{value}'" in sentences[0], done.stderr


@pytest.mark.parametrize("option,value", BAD)
@pytest.mark.parametrize("tool", TOOLS)
def test_bad_environment(bin_dir, tool, option, value):
    name = "LLAMA_ARG_" + option[2:].upper().replace("-", "_")
    done = run(bin_dir / tool, "-m", "no-such.gguf", env={name: value})
    assert done.returncode > 0
    sentences = [line for line in done.stderr.splitlines() if "expected" in line]
    assert len(sentences) == 1 and name in sentences[0] and f"'{value}'" in sentences[0], done.stderr


def bench(bin_dir, model, *args, env=None):
    """llama-bench of a few tokens at depth 300, and FASA's counters."""
    done = run(
        bin_dir / "llama-bench",
        "-m",
        model,
        "-p",
        0,
        "-n",
        2,
        "-d",
        600,
        "-r",
        2,
        "-fa",
        1,
        "-o",
        "jsonl",
        *args,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert len(bench_decode.parse_samples(done.stdout)) == 2
    return bench_decode.parse_stats(done.stderr)


def test_bench_runs_sparse_only_when_asked(bin_dir, calibrated):
    assert bench(bin_dir, calibrated) == {}
    assert bench(bin_dir, calibrated, "--fasa", "off", "--fasa-budget", 64) == {}
    stats = bench(bin_dir, calibrated, "--fasa-budget", 64)
    assert stats["budget"] == 64
    # the warm-up token attends to an empty cache; each of 2 repetitions generates 2 tokens
    assert stats["n_step_sparse"] == 4 and stats["n_step_dense"] == 1
    within = bench(bin_dir, calibrated, "--fasa", "on", "--fasa-budget", 4096)
    assert within["n_step_sparse"] == 0 and within["n_step_dense"] == 5


def test_command_line_wins_over_environment(bin_dir, calibrated):
    env = {"LLAMA_ARG_FASA": "on", "LLAMA_ARG_FASA_BUDGET": "100", "LLAMA_ARG_FASA_SINK": "7"}
    stats = bench(bin_dir, calibrated, env=env)
    assert stats["budget"] == 100
    stats = bench(bin_dir, calibrated, "--fasa-budget", 200, env=env)
    assert stats["budget"] == 200


@pytest.mark.parametrize("tool", TOOLS)
def test_uncalibrated_model(bin_dir, smollm2, tmp_path, tool):
    text = tmp_path / "text.txt"
    text.write_text("One, two, three. " * 100)
    options = {
        "llama-cli": ["-c", 512, "-p", "hello", "-n", 1, "-st"],
        "llama-server": ["-c", 512, "--port", 0],
        "llama-perplexity": ["-c", 64, "-f", text],
        "llama-bench": ["-p", 0, "-n", 1, "-r", 1],
    }[tool]
    done = run(bin_dir / tool, "-m", smollm2, *options, "--fasa", "on")
    assert done.returncode > 0
    assert "the model is not calibrated, run fasa-calibrate" in done.stdout + done.stderr


def test_uncalibrated_model_is_dense_by_default(bin_dir, smollm2):
    assert bench(bin_dir, smollm2, "--fasa-budget", 64) == {}


def test_forced_tokens_must_fit_the_budget(bin_dir, calibrated):
    done = run(bin_dir / "llama-bench", "-m", calibrated, "-p", 0, "-n", 1, "-r", 1, "--fasa-budget", 36)
    assert done.returncode > 0
    assert "4 sinks and 32 recent tokens leave no room in a budget of 36" in done.stderr
