"""The developer programs that measure: on tiny models and on rows made up here."""

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.runtime import ON, Model, fasa_params

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
import bench_decode  # noqa: E402
import eval_quality  # noqa: E402
import eval_tasks  # noqa: E402
import machine  # noqa: E402
import soak  # noqa: E402
import upstream_tests  # noqa: E402

SHAPE = "--layers 3 --embd 128 --heads 6 --heads-kv 2 --head-size 64 --ff 96 --vocab 300 --n-tip 8 --ctx 4096 --quiet"


def run(tool, *args):
    command = [sys.executable, str(TOOLS / tool), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)


def random_gguf(path, *args):
    done = run("random_gguf.py", path, *SHAPE.split(), *args)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return random_gguf(tmp_path_factory.mktemp("random") / "random.gguf")


def test_random_gguf_decodes_sparse(random_model, rng):
    with Model(random_model) as model:
        assert model.calibrated() == (1, "")
        assert model.n_vocab == 300
        with fasa_params(ON, budget=64), model.context(n_ctx=1024) as context:
            logits = [context.decode(rng.integers(3, 300, 600))]
            logits += [context.decode([token]) for token in rng.integers(3, 300, 5)]
            assert context.info().n_layer_sparse == 1 and context.info().n_tip_max == 8
            assert context.stats().n_step_sparse == 5
    assert np.isfinite(logits).all()
    assert (np.std(logits, axis=1) > 0.1).all() and (np.std(logits, axis=0) > 0.01).all()


def test_random_gguf_is_its_seed(random_model, tmp_path):
    same, other = random_gguf(tmp_path / "same.gguf"), random_gguf(tmp_path / "other.gguf", "--seed", 1)
    assert same.read_bytes() == random_model.read_bytes() != other.read_bytes()


def test_random_gguf_with_a_tied_output(random_model, tmp_path):
    tied = random_gguf(tmp_path / "tied.gguf", "--tie")
    assert random_model.stat().st_size - tied.stat().st_size > 300 * 128 // 2
    with Model(tied) as model, model.context(n_ctx=256) as context:
        assert np.isfinite(context.decode([5, 6, 7])).all()


@pytest.mark.parametrize(
    "options", ["--n-tip 33", "--heads 5", "--ff 100", "--vocab 258", "--dense-layers 3", "--layers 0"]
)
def test_random_gguf_refuses(tmp_path, options):
    done = run("random_gguf.py", tmp_path / "no.gguf", *SHAPE.split(), *options.split())
    assert done.returncode != 0 and "must" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


LOG = """\
fasa: mode off, budget 64, sink not set, recent not set, max batch not set, index type not set
{"n_gen": 4, "samples_ts": [1.0]}
load: something else
fasa: mode on, budget 64, sink not set, recent not set, max batch not set, index type q8
{"n_gen": 4, "samples_ts": [2.0]}
fasa: budget 64, layers 2 sparse 1 dense, n_tip 8 to 9, index q8 10 bytes, kv 20 bytes, mapped 0 bytes, steps 4 sparse 3 dense 2 prefill
fasa: mode on, budget 128, sink not set, recent not set, max batch not set
{"n_gen": 4, "samples_ts": [3.0]}
"""  # noqa: E501


def test_bench_decode_pairs_settings_with_tests(capsys):
    off, on, bare = bench_decode.parse_tests(LOG.splitlines(keepends=True))
    assert off == (("off", 64), {"n_gen": 4, "samples_ts": [1.0]}, {})
    assert on[0] == ("on", 64) and on[1]["samples_ts"] == [2.0]
    assert [on[2][key] for key in ("n_step_sparse", "n_tip_max", "index_type", "kv_bytes", "mapped_bytes")] == [4, 9, "q8", 20, 0]
    assert bare == (("on", 128), {"n_gen": 4, "samples_ts": [3.0]}, {})
    assert capsys.readouterr().err == "load: something else\n"


def test_bench_decode_modes_take_turns():
    assert bench_decode.modes(3) == "off,on,on,off,off,on"


def test_bench_decode(bin_dir, random_model, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = "--depth 0 600 --prompt 64 --budget 64 128 --index-type f16 q4 --rounds 1 --n-gen 2 --threads 1".split()
    programs = ["--model", random_model, "--llama-bench", bin_dir / "llama-bench"]
    done = run("bench_decode.py", *programs, *options, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ran = [(r["kind"], r["depth"], bench_decode.name(r)) for r in rows if r["fasa"]]
    settings = ["64 f16", "128 f16", "64 q4", "128 q4"]
    assert ran == [(*where, s) for where in (("decode", 0), ("decode", 600), ("prefill", 0)) for s in settings]
    assert sum(not r["fasa"] for r in rows) == len(ran)
    assert all(r["commit"] and r["pin"] and r["cpu"] and r["model_sha256"] and min(r["tokens_per_s"]) > 0 for r in rows)
    assert len(done.stdout.splitlines()) == 2 + 3 * 5


def test_bench_stages(tmp_path):
    out = tmp_path / "rows.jsonl"
    shape = "--n-kv 96 --d 32 --n-head 6 --n-head-kv 2 --n-tip 4 --budget 48".split()
    done = run("bench_stages.py", *shape, *"--threads 2 --rounds 2 --memory 0.01".split(), "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    of_type = ["index_write", "fasa", "tip", "select", "fac"]
    want = [("flash_attn", None), ("dense", None)] + [(s, t) for t in ("f16", "q8", "q4") for s in of_type]
    assert [(r["stage"], r["index_type"]) for r in rows] == want
    assert all(0 < r["us_min"] <= r["us"] <= r["us_max"] and r["read_gb_s"] > 0 for r in rows)
    n_bytes = {(r["stage"], r["index_type"]): r["bytes"] for r in rows}
    assert n_bytes["dense", None] == 2 * 2 * 32 * 2 * 96 and n_bytes["tip", "f16"] == 2 * 8 * 2 * 96
    assert n_bytes["fac", "q8"] == 2 * 2 * 32 * 2 * 48
    assert len(done.stdout.splitlines()) == 2 + len(rows)


def made_up_rows():
    base = {"date": "2030-01-01T00:00:00+00:00", "commit": "c0ffee", "cpu": "some CPU", "n_cpu": 2}
    for depth, off, on in [(0, 90.0, 88.0), (8000, 10.0, 70.0)]:
        common = {**base, "kind": "decode", "model": "some.gguf", "depth": depth, "stats": {}}
        yield {**common, "fasa": False, "tokens_per_s": [off - 1, off, off + 2]}
        yield {**common, "fasa": True, "budget": 256, "index_type": "q8", "tokens_per_s": [on]}
    common = {**base, "kind": "stage", "d": 64, "threads": 2, "read_gb_s": 20, "copy_gb_s": 18}
    for n_kv in 2048, 131072:
        for stage, index_type, us in [("flash_attn", None, n_kv), ("fasa", "q8", n_kv / 16)]:
            times = {"us": us, "us_min": us, "us_max": us, "flash_attn_ratio": n_kv / us}
            times.update(gb_s=1, share_of_read=0.05)
            yield {**common, "n_kv": n_kv, "stage": stage, "index_type": index_type, "budget": 256, **times}
    yield {**base, "gpu": "some GPU", "kind": "ops", "passed": "12/12"}
    mapped = {**base, "gpu": "some GPU", "kind": "mapped", "model": "some.gguf", "ctx": 512, "depth": 500, "budget": 256}
    mapped.update(index_type="q4", n_tip=16, vram=0, prompt_tok_s=1.0, decode_tok_s=2.0, context_mib=600.0)
    yield {**mapped, "ran": "off"}
    bus = {"row_hit_rate": 0.75, "bus_bytes_per_step": 8e6, "bus_share": 0.1, "copy_gb_s": 50.0}
    yield {**mapped, **bus, "ran": "m", "kv_device_mib": 60.0, "kv_share": 0.05}
    yield {**base, "gpu": "some GPU", "kind": "mapped_check", "check": "memcheck", "result": "3/3"}


@pytest.fixture
def benchmarks(tmp_path):
    (tmp_path / "made-up.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made_up_rows()))
    return tmp_path


def test_plot_benchmarks(benchmarks):
    pytest.importorskip("matplotlib")
    done = run("plot_benchmarks.py", "--dir", benchmarks)
    assert done.returncode == 0, done.stderr
    pictures = {path.name: path.read_bytes() for path in benchmarks.glob("*.png")}
    assert sorted(pictures) == ["decode-some-some-cpu-2-cores.png", "stages-some-cpu-2-cores.png"]
    text = (benchmarks / "README.md").read_text(encoding="ascii")
    assert all(f"]({name})" in text for name in pictures)
    assert "|  | 8000 | off | 10.00 (9.00 to 12.00) | 1.00 | 0.11 |" in text
    assert "|  | 8000 | 256 q8 | 70.00 (70.00 to 70.00) | 7.00 | 0.78 |" in text
    assert "| 64 | 131072 | 2 | fasa | q8 | 256 | 8192.0 (8192.0 to 8192.0) | 1.00 | 5% | 16.00 |" in text
    assert "| test-backend-ops | 12/12 |" in text
    assert "| dense | 512 | 500 |  | 1.0 | 2.0 | 600.0 |  |  |  |" in text
    assert "| 60 (1/20.0) | 75 % | 8.0 (10 % of 50.0 GB/s) |" in text and "| memcheck | 3/3 |" in text
    assert run("plot_benchmarks.py", "--dir", benchmarks).returncode == 0
    assert pictures == {path.name: path.read_bytes() for path in benchmarks.glob("*.png")}


def test_plot_benchmarks_shows_what_is_current(benchmarks):
    rows = list(made_up_rows())
    later = {"date": "2030-01-02T00:00:00+00:00", "commit": "decade"}
    with (benchmarks / "later.jsonl").open("w") as file:
        for r in rows[4:]:  # all stages and checks
            file.write(json.dumps({**r, **later}) + "\n")
        file.write(json.dumps({**rows[2], **later}) + "\n")  # one row of a decode table
    assert run("plot_benchmarks.py", "--dir", benchmarks).returncode == 0
    text = (benchmarks / "README.md").read_text(encoding="ascii")
    chapters = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    commits = {name: re.findall(r"^### .* commit (\w+)", part, re.M) for name, part in chapters.items()}
    assert commits.pop("Decode and prefill") == ["c0ffee", "decade"]
    assert len(commits) == 4 and all(of == ["decade"] for of in commits.values()), commits


def test_plot_benchmarks_check(benchmarks):
    missing = run("plot_benchmarks.py", "--dir", benchmarks, "--check")
    assert missing.returncode == 1 and "out of date" in missing.stderr
    assert not (benchmarks / "README.md").exists()


def test_plot_benchmarks_names_a_bad_line(benchmarks):
    with (benchmarks / "made-up.jsonl").open("a") as file:
        file.write('{"kind": "guess"}\n')
    done = run("plot_benchmarks.py", "--dir", benchmarks)
    assert done.returncode == 1 and "made-up.jsonl line 13" in done.stderr


def test_benchmarks_page_is_up_to_date():
    done = run("plot_benchmarks.py", "--check")
    assert done.returncode == 0, done.stderr


def test_bench_gpu_refuses(tmp_path):
    for options, sentence in [
        (["--only", "ops,lunch", "--bin", tmp_path], "there is no part 'lunch'"),
        (["--bin", tmp_path], "llama-bench and test-backend-ops are not in"),
        (["--bin"], "--bin: expected a value"),
        (["--what", "x"], "unknown option --what"),
    ]:
        done = subprocess.run(["bash", TOOLS / "bench_gpu.sh", *options], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_row_is_not_lost_with_its_file(tmp_path, capsys):
    with pytest.raises(SystemExit, match="cannot write .*No such file or directory"):
        machine.emit({"kind": "long"}, tmp_path / "missing" / "rows.jsonl")
    assert json.loads(capsys.readouterr().out) == {"kind": "long"}


@pytest.mark.parametrize("missing", ["--model", "--text"])
def test_eval_quality_refuses_files_that_are_not_there(tmp_path, missing):
    files = {"--model": tmp_path / "here", "--text": tmp_path / "here", missing: tmp_path / "missing"}
    (tmp_path / "here").touch()
    done = run("eval_quality.py", *[word for pair in files.items() for word in pair])
    assert done.returncode == 2 and done.stderr.endswith(f"there is no file {tmp_path / 'missing'}\n")


def test_eval_quality(bin_dir, smollm2, tmp_path):
    """A row for each variant, budget and context, in one command; another run measures what is missing only."""
    calibrate = tmp_path / "fasa-calibrate"
    calibrate.write_text(f'#!/bin/sh\nexec {sys.executable} -m fasa_calibrate "$@"\n')
    calibrate.chmod(0o755)
    text, out = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("One, two, three. " * 300)
    programs = ["--llama-perplexity", bin_dir / "llama-perplexity", "--fasa-calibrate", calibrate, "--threads", 2]
    subject = ["--model", smollm2, "--text", text, "--ctx", 512, "--chunks", 1, "--work", tmp_path / "work"]
    more = ["--calibrate-args=--n-ctx 600 --n-query 1 --n-tip 1"]

    def measure(*variants):
        options = ["--variants", *variants, "--budget", 128, "--out", out]
        done = run("eval_quality.py", *programs, *subject, *more, *options)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        ran = [r["n_row"] for r in rows if r["kind"] == "quality_run"]
        return [r for r in rows if r["kind"] == "quality"], ran

    rows, ran = measure("default", "kv-q8_0")
    assert {(r["variant"], r["budget"]) for r in rows} == {("default", 128), ("kv-q8_0", None)} and ran == [2]
    before = rows
    rows, ran = measure("default", "pyramid", "kv-q8_0")
    assert rows[:2] == before and [r["variant"] for r in rows[2:]] == ["pyramid"] and ran == [2, 1]
    rows.sort(key=lambda r: r["variant"])
    assert all(r["ppl_base"] == rows[0]["ppl_base"] and r["kl"] > 0 for r in rows)
    assert rows[0]["n_layer_sparse"] == "28" and "kv_mib" not in rows[1]
    assert len({r["kl"] for r in rows}) == len(rows)


def test_eval_quality_whole_table(bin_dir, random_model, tmp_path, monkeypatch):
    """Without settings: all of the table, each dense variant once, and the tasks of contexts that the model knows."""
    calibrate = tmp_path / "fasa-calibrate"
    calibrate.write_text(f'#!/bin/sh\nexec {sys.executable} -m fasa_calibrate "$@" --n-ctx 600 --n-query 2\n')
    calibrate.chmod(0o755)
    text, out, tasks_out = tmp_path / "text.txt", tmp_path / "rows.jsonl", tmp_path / "tasks.jsonl"
    text.write_text("One, two, three. " * 600)
    monkeypatch.setattr(eval_quality, "TABLE", [(512, 64, ["default", "kv-q8_0"]), (512, 128, ["default", "kv-q8_0"])])
    monkeypatch.setattr(eval_quality, "TASKS", [(1024, [64], ["passkey", "words"]), (1 << 30, [64], ["passkey"])])
    args = ["eval_quality.py", "--model", random_model, "--text", text, "--chunks", 1, "--tasks", "--trials", 2, "--jobs", 2]
    args += ["--threads", 1, "--work", tmp_path / "work", "--out", out, "--tasks-out", tasks_out]
    args += ["--llama-perplexity", bin_dir / "llama-perplexity", "--llama-server", bin_dir / "llama-server"]
    monkeypatch.setattr(sys, "argv", [*map(str, args), "--fasa-calibrate", str(calibrate)])
    eval_quality.main()
    rows, tasks = ([json.loads(line) for line in path.read_text().splitlines()] for path in (out, tasks_out))
    assert rows.pop()["kind"] == "quality_run"
    measured = sorted((r["variant"], r["budget"] or 0) for r in rows)
    assert measured == [("default", 64), ("default", 128), ("kv-q8_0", 0)]
    assert {(r["task"], r["ctx"], r["budget"], r["n"]) for r in tasks} == {
        (task, 1024, budget, 2) for task in ("passkey", "words") for budget in (0, 64)
    }
    assert not list((tmp_path / "work").glob("*/*.logits"))


@pytest.mark.parametrize("task", eval_tasks.TASKS)
def test_task_prompts(task):
    """Prompts fill the context, hold what is asked for at the depth that is said, and share a text between depths."""

    def count(text):
        return len(text.split())

    made = {d: eval_tasks.prompt(task, random.Random(7), d, 500, count) for d in (0.05, 0.45, 0.95)}
    for depth, (text, wanted) in made.items():
        assert 400 < count(text) <= 500 and wanted in text and not text.endswith(wanted)
        if task != "words":
            assert abs(text.index(wanted) / len(text) - depth) < 0.1
    (first, _), (_, _), (last, _) = made.values()
    if task in ("passkey", "single", "multikey"):
        same = next(i for i, (a, b) in enumerate(zip(last, first)) if a != b)
        assert same > (0.9 if task == "multikey" else 0.03) * len(first)


def test_eval_tasks(bin_dir, random_model, tmp_path):
    out = tmp_path / "rows.jsonl"
    args = ["--model", random_model, "--llama-server", bin_dir / "llama-server", "--ctx", 1024, "--threads", 2]
    args += ["--tasks", "passkey", "multikey", "--n", 3, "--out", out]
    for budgets, n_row in ((["64"], 4), (["64", "128"], 6)):
        done = run("eval_tasks.py", *args, "--budget", *budgets)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == n_row
    assert {(r["task"], r["budget"]) for r in rows} == {(t, b) for t in ("passkey", "multikey") for b in (0, 64, 128)}
    assert all(r["hits"] == sum(r["by_depth"].values()) and len(r["by_depth"]) == 3 for r in rows)


def test_agreement_ends_at_the_first_difference():
    assert soak.agreement([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert soak.agreement([1, 2, 9, 4], [1, 2, 3, 4]) == 0.5
    assert soak.agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert soak.agreement([], [1, 2]) == 0


def test_soak(bin_dir, calibrated, tmp_path):
    """A short one, with both kinds of cache and without FASA; and one whose bar no answer can reach."""
    out = tmp_path / "rows.jsonl"
    args = [calibrated, "--dense-minutes", 0.02, "--prompts", 1, "--llama-server", bin_dir / "llama-server", "--out", out]
    # of this seed the five clients begin with the five kinds of requests
    done = run("soak.py", *args, "--minutes", 0.04, "--clients", 5, "--seed", 27)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["cache"], row["budget"]) for row in rows] == [("unified", 512), ("streams", 512), ("unified", 0)]
    for row in rows:
        assert row["errors"] == [] and (row["share_sparse"] > 0) == (row["budget"] > 0)
        assert set(row["requests"]) == set(soak.WEIGHTS) and row["n_shifted"] == row["requests"]["shift"]
        assert row["memory_mib"]["start"] > 0
    done = run("soak.py", *args, "--minutes", 0.04, "--clients", 1, "--least-agreement", 1.1)
    assert done.returncode == 1 and "answers agree" in done.stderr, done.stderr


def test_upstream_table():
    rows = [
        ("ops", "test-a", "passed", "7/7 tests passed", "", "c1"),
        ("ops", "test-b", "failed", "exit 1", "failed", "c1"),
        ("server", "test_c", "failed", "exit 1", "passed", "c2"),
        ("server", "test_d", "not run", "needs a download", "", "c2"),
    ]
    page = upstream_tests.page(rows)
    assert "| ops | 2 | 1 | 1 | 1 | 0 |" in page and "| server | 2 | 0 | 1 | 0 | 1 |" in page
    assert "- `test-a`: passed, 7/7 tests passed\n" in page and "commit c1, c2," in page
    assert "`test_d`" in page.split("## Not run")[1]


def test_upstream_run_goes_on(tmp_path, monkeypatch):
    """What ended is kept; what did not end, runs; what failed runs unpatched, once; parts add up."""
    ran = []

    def unit(name, result):
        return "ops", lambda build, tests: ran.append((build.name, name, tests)) or {name: (result, "")}

    units = {"one": unit("one", "passed"), "two": unit("two", "not run"), "three": unit("three", "failed")}
    monkeypatch.setattr(upstream_tests, "units", lambda args: units)
    patched, unpatched = tmp_path, tmp_path / "unpatched"
    first, second, third = ((patched.name, name, None) for name in units)
    again = ("unpatched", "three", ["three"])
    for only, other, force, expected in [
        ("^o", None, False, [first]),
        ("", None, False, [second, third]),
        ("t", unpatched, False, [second, again]),
        ("", unpatched, False, [second]),
        ("one", unpatched, True, [first]),
    ]:
        ran.clear()
        args = argparse.Namespace(build=patched, unpatched=other, only=only, again=force)
        rows = [row[1:5] for row in upstream_tests.run_all(args) if row[0] == "ops"]
        assert ran == expected
    assert [row[:2] for row in rows] == [("one", "passed"), ("two", "not run"), ("three", "failed")]
    assert rows[2][3] == "failed"
