"""Stage metadata: what fasa-calibrate writes, and that it changes nothing else, whatever happens meanwhile."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from fasa_calibrate import cli, write
from fasa_calibrate.cli import main
from fasa_calibrate.errors import CalibrateError
from fasa_calibrate.gguf_file import _tensor_bytes, read_gguf
from fasa_calibrate.metadata import ARRAY, STRING, U32, fingerprint
from fasa_calibrate.native import c_function, load_llama_cpp
from fasa_calibrate.observe import Model
from fasa_calibrate.show import main as inspect
from support.gguf_keys import F32, array, scalar, split_in_parts, with_keys
from support.tiny_gguf import Shape, write_tiny_gguf

TEXT = "The keeper rang the bell for four hours, and 59 teeth were enough for the clock. " * 10
TYPES = {  # docs/metadata.md
    "version": gguf.GGUFValueType.UINT32,
    "rope_type": gguf.GGUFValueType.STRING,
    "n_head_kv": gguf.GGUFValueType.INT32,
    "n_rot": gguf.GGUFValueType.INT32,
    "n_tip": gguf.GGUFValueType.INT32,
    "fc": gguf.GGUFValueType.INT32,
    "n_sink": gguf.GGUFValueType.UINT32,
    "n_recent": gguf.GGUFValueType.UINT32,
    "calibration.tool": gguf.GGUFValueType.STRING,
    "calibration.criterion": gguf.GGUFValueType.STRING,
    "calibration.text": gguf.GGUFValueType.STRING,
    "calibration.text_sha256": gguf.GGUFValueType.STRING,
    "calibration.n_tokens": gguf.GGUFValueType.UINT32,
    "calibration.n_query": gguf.GGUFValueType.UINT32,
    "calibration.seed": gguf.GGUFValueType.UINT32,
    "calibration.budget": gguf.GGUFValueType.UINT32,
    "calibration.n_sink": gguf.GGUFValueType.UINT32,
    "calibration.n_recent": gguf.GGUFValueType.UINT32,
    "budget": gguf.GGUFValueType.UINT32,
    "center": gguf.GGUFValueType.FLOAT32,
    "calibration.error": gguf.GGUFValueType.FLOAT32,
    "calibration.recall": gguf.GGUFValueType.FLOAT32,
    "calibration.recall_budget": gguf.GGUFValueType.INT32,
    "fingerprint": gguf.GGUFValueType.STRING,
}
FIGURES = {"calibration.error", "calibration.recall", "calibration.recall_budget"}
KEYS = [("fasa.version", U32, 1), ("fasa.note", STRING, "x" * 99), ("fasa.fc", ARRAY, list(range(50)))]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return write_tiny_gguf(folder / "tiny.gguf", "qwen2")


def calibrate(model, *args):
    text = model.parent.parent / "text.txt"
    text.write_text(TEXT)
    fast = ["--quiet", "--n-query", "4", "--n-ctx", "300", "--budget", "96", "--criterion", "random"]
    return main([str(model), "--text", str(text), *fast, *args])


def contents(path):
    """Keys other than ours, in order, with type and value; tensors with type, shape and bytes."""
    reader = gguf.GGUFReader(path)
    keys = [
        (name, field.types, [bytes(part) for part in field.parts])
        for name, field in reader.fields.items()
        if not name.startswith(("fasa.", "GGUF."))
    ]
    tensors = [(t.name, t.tensor_type, t.shape.tolist(), bytes(t.data)) for t in reader.tensors]
    return keys, tensors


def fasa_fields(path):
    return {n[5:]: f for n, f in gguf.GGUFReader(path).fields.items() if n.startswith("fasa.")}


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def written_to(folder):
    """Sizes of the temporary files; one with content is past its creation."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                yield path.stat().st_size


# --- what is written ---


def test_only_our_keys_change(model):
    before = contents(model)
    assert calibrate(model) == 0
    assert contents(model) == before
    assert leftovers(model.parent) == []


def test_keys_have_the_types_of_the_contract(model):
    assert calibrate(model) == 0
    fields = fasa_fields(model)
    assert {name: field.types[-1] for name, field in fields.items()} == TYPES
    arrays = {name for name, field in fields.items() if field.types[0] == gguf.GGUFValueType.ARRAY}
    assert arrays == {"n_head_kv", "n_rot", "n_tip", "fc", "center", *FIGURES}
    values = {name: field.contents() for name, field in fields.items()}
    assert (values["version"], values["rope_type"]) == (1, "neox")
    assert (values["n_sink"], values["n_recent"], values["calibration.budget"]) == (4, 32, 96)
    assert (values["calibration.criterion"], values["calibration.text"]) == ("random", "text.txt")
    assert values["calibration.text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (values["calibration.n_tokens"], values["calibration.n_query"]) == (300, 4)


def test_store_budget(model):
    assert calibrate(model) == 0
    assert fasa_fields(model)["budget"].contents() == 96
    assert calibrate(model, "--store-budget", "0") == 0
    assert "budget" not in fasa_fields(model)
    assert calibrate(model, "--store-budget", "512", "--sink", "2", "--recent", "7") == 0
    fields = fasa_fields(model)
    assert [fields[n].contents() for n in ("budget", "n_sink", "n_recent")] == [512, 2, 7]
    assert fields["budget"].types == [gguf.GGUFValueType.UINT32]


def test_store_index_type(model, capsys):
    assert calibrate(model, "--index-type", "q8") == 0
    field = fasa_fields(model)["index_type"]
    assert field.contents() == "q8" and field.types == [gguf.GGUFValueType.STRING]
    with pytest.raises(SystemExit):
        calibrate(model, "--index-type", "q5")
    assert "invalid choice: 'q5'" in capsys.readouterr().err


def test_a_second_run_replaces_the_keys(model):
    assert calibrate(model, "--store-budget", "512", "--index-type", "q4") == 0
    assert calibrate(model) == 0
    again = model.read_bytes()
    assert set(fasa_fields(model)) == set(TYPES)  # no recommendations: they are not what this run was asked for
    assert calibrate(model) == 0
    assert model.read_bytes() == again


def test_remove_gives_the_file_back(model):
    original = model.read_bytes()
    assert calibrate(model) == 0
    assert model.read_bytes() != original
    assert main([str(model), "--remove", "--quiet"]) == 0
    assert model.read_bytes() == original


def test_alignment_is_kept(tmp_path, model):
    aligned = write_tiny_gguf(tmp_path / "aligned.gguf")
    copy = tmp_path / "copy.gguf"
    # 4096 in place of 32 moves the data; gguf-py writes it so
    writer = gguf.GGUFWriter(str(copy), "llama")
    writer.add_custom_alignment(4096)
    for tensor in gguf.GGUFReader(aligned).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = contents(copy)
    write.write_keys(read_gguf(str(copy)), str(copy), KEYS)
    assert contents(copy) == before
    assert all(t.data_offset % 4096 == 0 for t in gguf.GGUFReader(copy).tensors)


def test_the_calibrated_file_loads_and_tokenizes_as_before(model, tmp_path):
    out = tmp_path / "out.gguf"
    assert calibrate(model, "-o", str(out)) == 0
    with Model(load_llama_cpp(), model) as before, Model(load_llama_cpp(), out) as after:
        assert after.n_layer == before.n_layer
        assert np.array_equal(after.tokenize(TEXT), before.tokenize(TEXT))


def test_fingerprint_is_of_q_and_k_weights(model, tmp_path):
    def change(name):
        path = tmp_path / "changed.gguf"
        data = bytearray(model.read_bytes())
        tensor = next(t for t in read_gguf(str(model)).tensors if t.name == name)
        data[tensor.offset + 5] ^= 1
        path.write_bytes(data)
        return fingerprint([read_gguf(str(path))])

    original = fingerprint([read_gguf(str(model))])
    for name in ("blk.0.attn_q.weight", "blk.3.attn_k.weight", "blk.1.attn_k.bias"):
        assert change(name) != original
    assert change("blk.0.attn_v.weight") == original
    assert calibrate(model) == 0
    assert fingerprint([read_gguf(str(model))]) == original == fasa_fields(model)["fingerprint"].contents()


def test_types_are_as_large_as_in_ggml():
    lib = load_llama_cpp()
    block, size = (c_function(lib, f"ggml_{n}_size", [ctypes.c_int], ctypes.c_int64) for n in ("blck", "type"))
    kinds = [kind for kind in range(lib.GGML_TYPE_COUNT) if block(kind) > 0]  # the others were removed
    assert len(kinds) > 30
    for kind in kinds:
        assert _tensor_bytes("weight", kind, (5 * block(kind), 3)) == 15 * size(kind), kind


# --- sidecars ---


def test_a_sidecar_holds_the_keys_and_leaves_the_model_alone(model, tmp_path):
    before = model.read_bytes()
    assert calibrate(model, "--sidecar") == 0
    assert model.read_bytes() == before
    sidecar = model.with_suffix(".fasa.gguf")
    assert sidecar.stat().st_size < 20000 and not gguf.GGUFReader(sidecar).tensors
    assert calibrate(model) == 0
    assert {n: f.contents() for n, f in fasa_fields(sidecar).items()} == {
        n: f.contents() for n, f in fasa_fields(model).items()
    }
    assert leftovers(model.parent) == []


def test_where_a_sidecar_may_be_written(model, tmp_path, capsys):
    out = tmp_path / "else.gguf"
    assert calibrate(model, "--sidecar", "-o", str(out)) == 0
    assert calibrate(model, "--sidecar", "-o", str(out)) == 0, "a sidecar may be replaced"
    before, sidecar = model.read_bytes(), out.read_bytes()
    assert calibrate(model, "-o", str(out)) == 1, "but not by a copy of the model"
    assert "--force replaces it" in capsys.readouterr().err and out.read_bytes() == sidecar
    assert calibrate(model, "--sidecar", "-o", str(model)) == 1
    assert "another name than the model" in capsys.readouterr().err
    other = tmp_path / "other.gguf"
    other.write_bytes(before)
    assert calibrate(model, "--sidecar", "-o", str(other)) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert model.read_bytes() == before == other.read_bytes()
    assert main([str(model), "--sidecar", "--remove"]) == 1
    assert "a file to delete" in capsys.readouterr().err


def test_a_split_model_takes_a_sidecar_only(model, tmp_path, capsys):
    folder = tmp_path / "parts"
    folder.mkdir()
    first = split_in_parts(model, folder, "qwen2")
    assert calibrate(first) == 1
    assert "this model is split: give --sidecar" in capsys.readouterr().err
    assert calibrate(first, "--sidecar") == 0
    assert calibrate(model, "--sidecar") == 0
    parts, whole = (fasa_fields(p.with_suffix(".fasa.gguf")) for p in (first, model))
    assert parts["fingerprint"].contents() == whole["fingerprint"].contents()
    second = first.with_name(first.name.replace("00001-of", "00002-of"))
    assert calibrate(second, "--sidecar") == 1
    assert "not its first one" in capsys.readouterr().err


# --- fasa-inspect ---


def test_inspect(model, tmp_path, capsys):
    def shown(*args):
        assert inspect(list(map(str, args))) == 0
        return capsys.readouterr().out

    assert inspect([str(model)]) == 1
    assert "carries no calibration" in capsys.readouterr().err
    assert calibrate(model, "--sidecar") == 0
    capsys.readouterr()
    sidecar = model.with_suffix(".fasa.gguf")
    assert shown(model) == shown(sidecar) and str(sidecar) in shown(model)
    found = json.loads(shown(model, "--json"))
    stored = {name: field.contents() for name, field in fasa_fields(sidecar).items()}
    assert found["fingerprint"] == stored["fingerprint"] and found["budget"] == stored["budget"]
    assert [fc for layer in found["layers"] for head in layer["fc"] for fc in head] == stored["fc"]
    assert [layer["error"] for layer in found["layers"]] == stored["calibration.error"]
    assert [r for layer in found["layers"] for r in layer["recall"].values()] == stored["calibration.recall"]
    pytest.importorskip("matplotlib")
    shown(model, "--plot", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert inspect([str(model), "--plot", str(tmp_path / "none" / "map.png")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_inspect_refuses_the_sidecar_of_another_model(model, capsys):
    assert calibrate(model, "--sidecar") == 0
    write_tiny_gguf(model, "qwen2", seed=1)
    assert inspect([str(model)]) == 1
    assert "made for other weights" in capsys.readouterr().err
    assert inspect([str(model.with_suffix(".fasa.gguf"))]) == 0


def with_changed(model, path, **changes):
    """A copy of an uncalibrated model with the keys of a calibration, some of them changed."""
    assert calibrate(model, "--sidecar", "-o", str(path)) == 0
    keys = {"fasa." + name: field.contents() for name, field in fasa_fields(path).items()}
    keys = {name: array(F32, v) if isinstance(v, list) and type(v[0]) is float else v for name, v in keys.items()}
    return with_keys(model, path, {**keys, **changes})


@pytest.mark.parametrize(
    "name,value",
    [
        ("version", 2),
        ("version", "1"),
        ("n_tip", []),
        ("n_tip", [-1] * 4),
        ("n_tip", "8888"),
        ("n_rot", [-32] * 4),
        ("n_rot", [2**31 - 1] * 4),
        ("n_rot", "\x20!!!"),
        ("n_head_kv", [2] * 3),
        ("n_head_kv", [2**31 - 1] * 4),
        ("fc", "0" * 64),
        ("fc", [16] * 64),
        ("fc", [-17] * 64),
        ("fc", [0] * 63),
        ("fc", array(F32, [0.5] * 64)),
        ("calibration.error", array(F32, [float("nan")] * 4)),
        ("calibration.error", array(F32, [0.5] * 3)),
        ("calibration.recall", "0" * 20),
        ("calibration.recall", array(F32, [0.5] * 19)),
        ("calibration.recall_budget", "12345"),
        ("calibration.recall_budget", array(F32, [0.5] * 5)),
    ],
)
def test_inspect_refuses_what_is_damaged(model, tmp_path, capsys, name, value):
    path = with_changed(model, tmp_path / "damaged.gguf", **{"fasa." + name: value})
    for more in ([], ["--json"], ["--plot", str(tmp_path / "map.png")]):
        assert inspect([str(path), *more]) == 1
        message = capsys.readouterr().err
        assert "run fasa-calibrate again" in message and message.count("\n") == 1
    assert not (tmp_path / "map.png").exists()


def test_inspect_prints_no_control_characters(model, tmp_path, capsys):
    strange = {"fasa.calibration.text": "\x1b]0;title\a", "fasa.\x1b[2J": 1, "fasa.note": scalar(F32, float("nan"))}
    path = with_changed(model, tmp_path / "strange.gguf", **strange)
    for more in ([], ["--json"]):
        assert inspect([str(path), *more]) == 0
        shown = capsys.readouterr().out
        assert shown.isascii() and shown.replace("\n", "").isprintable() and "]0;title" in shown
    assert "NaN" not in shown  # which is not JSON


def test_inspect_into_a_pipe_that_nobody_reads(model):
    assert calibrate(model) == 0
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from fasa_calibrate.show import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, str(model)], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not take such names")
@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_that_are_not_utf_8(model, tmp_path, encoding):
    folder = os.fsencode(tmp_path) + b"/na\xefve \xe2\x82\xac"
    os.mkdir(folder)
    named, text = folder + b"/m\xf6del.gguf", folder + b"/t\xe9xt"
    model.rename(os.fsdecode(named))
    with open(text, "w") as file:
        file.write(TEXT)
    out = folder + b"/s\xefde.gguf"
    more = ["--text", text, "--budget", "96", "--criterion", "random", "--n-ctx", "300", "--sidecar", "-o", out]
    commands = [
        [sys.executable, "-m", "fasa_calibrate", named, *more],
        [sys.executable, "-c", "import sys; from fasa_calibrate.show import main; sys.exit(main())", out],
    ]
    for command in commands:
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, env=env, capture_output=True, check=False)
        assert done.returncode == 0 and rb"s\udcefde.gguf" in done.stdout, done.stderr
    assert fasa_fields(os.fsdecode(out))["calibration.text"].contents() == "t\ufffdxt"


# --- where it is written ---


def test_output_leaves_the_model_alone(model, tmp_path, capsys):
    before, out = model.read_bytes(), tmp_path / "out.gguf"
    assert calibrate(model, "-o", str(out)) == 0
    assert model.read_bytes() == before
    written = out.read_bytes()
    assert calibrate(model, "-o", str(out), "--seed", "1") == 1
    assert "--force" in capsys.readouterr().err and out.read_bytes() == written
    assert calibrate(model, "-o", str(out), "--seed", "1", "--force") == 0
    assert out.read_bytes() != written
    assert calibrate(model, "-o", str(model)) == 0  # the model itself needs no --force


def test_links_and_mode_survive(model, tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    model.chmod(0o640)
    assert calibrate(link) == 0
    assert link.is_symlink() and fasa_fields(model)
    assert model.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("output", ["missing/out.gguf", "models", "fifo"])
def test_impossible_outputs(model, tmp_path, capsys, output):
    os.mkfifo(tmp_path / "fifo")
    assert calibrate(model, "-o", str(tmp_path / output), "--force") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "fifo").is_fifo()  # as /dev/null, which a rename would replace


def test_an_empty_output_is_not_the_model(model, capsys):
    before = model.read_bytes()
    assert calibrate(model, "-o", "") == 1
    assert "'' is not a file" in capsys.readouterr().err and model.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(model, capsys):
    model.parent.chmod(0o555)
    try:
        assert calibrate(model) == 1
    finally:
        model.parent.chmod(0o755)
    assert "not writable" in capsys.readouterr().err


# --- when things go wrong ---


def test_no_space_is_noticed_before_writing(model, monkeypatch, capsys):
    before = model.read_bytes()
    usage = write.shutil.disk_usage(model.parent)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=len(before) // 2))
    assert main([str(model), "--remove", "--quiet"]) == 1
    assert "are free" in capsys.readouterr().err
    assert model.read_bytes() == before and leftovers(model.parent) == []


def test_a_write_that_fails_midway(model):
    """RLIMIT_FSIZE stands for a full disk: the same error path."""
    before = model.read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    command = [sys.executable, "-m", "fasa_calibrate", str(model), "--remove"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no space left" in done.stderr and "Traceback" not in done.stderr
    assert model.read_bytes() == before and leftovers(model.parent) == []


def test_file_systems_that_lack_something(model, monkeypatch, capsys):
    """Locks, as Lustre and NFS often do, or a folder that can be opened and synced."""

    def lacks(function, error, of_what):
        def call(first, *args):
            if of_what(first):
                raise OSError(error, os.strerror(error))
            return function(first, *args)

        return call

    monkeypatch.setattr(write.fcntl, "flock", lacks(write.fcntl.flock, errno.ENOSYS, lambda file: True))
    monkeypatch.setattr(write.os, "fsync", lacks(os.fsync, errno.EINVAL, lambda fd: stat.S_ISDIR(os.fstat(fd).st_mode)))
    assert calibrate(model) == 0, capsys.readouterr().err
    assert fasa_fields(model) and leftovers(model.parent) == []


REWRITE = """
import sys
from fasa_calibrate import cli, write
from fasa_calibrate.gguf_file import read_gguf
from fasa_calibrate.show import main as inspect
from fasa_calibrate.metadata import U32
write._BLOCK = 4096
pause = __import__("time").sleep if {slow} else None
with write.termination_as_exception():
    n = 0
    while True:
        n += 1
        print(n, flush=True)
        gguf = read_gguf(sys.argv[1])
        keys = [("fasa.version", U32, n)] * (n % 2)
        write.write_keys(gguf, sys.argv[1], keys, pause and (lambda size: pause(0.05)))
"""


def rewriting(model, slow=False):
    """A process that rewrites the model again and again, with and without a key."""
    command = [sys.executable, "-c", REWRITE.format(slow=slow), str(model)]

    def heed_interrupts():  # a background job of a shell ignores them, and so would what it starts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=heed_interrupts)
    assert process.stdout.readline() == b"1\n"
    return process


def test_killed_at_any_moment_the_file_is_whole(tmp_path, rng):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", shape=Shape(n_layer=2))
    before = contents(model)
    for _ in range(20):
        process = rewriting(model)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        process.stdout.close()
        assert contents(model) == before
        with Model(load_llama_cpp(), model) as loaded:
            assert loaded.n_layer == 2
    assert main([str(model), "--remove", "--quiet"]) == 0
    assert leftovers(tmp_path) == []  # what the killed runs left is gone


def test_a_file_in_use_by_another_run_is_not_removed(model):
    process = rewriting(model, slow=True)
    try:
        while not any(written_to(model.parent)):
            assert process.poll() is None
        write._remove_stale(os.path.join(model.parent, "."))
        assert leftovers(model.parent)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    write._remove_stale(os.path.join(model.parent, "."))
    assert not leftovers(model.parent)


@pytest.mark.parametrize("options", [[], ["-o", "out.gguf"], ["--sidecar"]], ids=str)
@pytest.mark.parametrize("other", ["calibrates", "removes"])
def test_a_model_that_changes_meanwhile_is_left_alone(model, monkeypatch, capsys, options, other):
    """Where its keys and tensors were says nothing about where they are now."""
    monkeypatch.chdir(model.parent)
    during, before = cli.calibrate, model.read_bytes()

    def calibrate_slowly(*args, **kwargs):
        monkeypatch.setattr(cli, "calibrate", during)
        result = during(*args, **kwargs)
        if other == "calibrates":
            assert calibrate(model, "--n-tip", "3") == 0
        else:
            model.unlink()
        return result

    monkeypatch.setattr(cli, "calibrate", calibrate_slowly)
    assert calibrate(model, *options) == 1
    message = capsys.readouterr().err
    assert ("another program changed" if model.exists() else "No such file") in message and message.count("\n") == 1
    if model.exists():
        assert fasa_fields(model)["n_tip"].contents() == [3] * 4
        assert main([str(model), "--remove", "--quiet"]) == 0 and model.read_bytes() == before
    assert [path for path in model.parent.iterdir() if path != model] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_debris(model, number):
    before = contents(model)
    process = rewriting(model, slow=True)
    while not any(written_to(model.parent)):
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert leftovers(model.parent) == [] and contents(model) == before


def test_an_interrupt_after_the_rename_promises_no_old_file(model, monkeypatch, capsys):
    def replace(source, target, rename=os.replace):
        rename(source, target)
        raise KeyboardInterrupt

    before = model.read_bytes()
    monkeypatch.setattr(write.os, "replace", replace)
    assert calibrate(model) == 130
    assert model.read_bytes() != before and leftovers(model.parent) == []
    assert capsys.readouterr().err == "fasa-calibrate: interrupted, nothing is half written\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(model, number):
    """As by nohup, or by a shell for what it runs in the background."""
    code = """
import os, signal, sys
from fasa_calibrate import cli, observe
number = int(sys.argv.pop(1))
signal.signal(number, signal.SIG_IGN)
evaluate = observe._Graph.take
def at_every_node(*args):
    os.kill(os.getpid(), number)
    evaluate(*args)
observe._Graph.take = at_every_node
sys.exit(cli.main())
"""
    text = model.parent / "text.txt"
    text.write_text(TEXT)
    options = ["--text", str(text), "--budget", "96", "--criterion", "random", "--n-ctx", "300"]
    command = [sys.executable, "-c", code, str(int(number)), str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and fasa_fields(model), done.stderr


# --- files that are not what they should be ---


def refused(capsys, path):
    before = path.read_bytes() if path.is_file() else None
    assert main([str(path), "--remove", "--quiet"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("fasa-calibrate: error: ") and message.count("\n") == 1
    assert before is None or path.read_bytes() == before
    return message


def test_no_file(tmp_path, capsys):
    assert "No such file" in refused(capsys, tmp_path / "missing.gguf")
    assert "directory" in refused(capsys, tmp_path)


@pytest.mark.parametrize("size", [0, 3, 4, 23, 24, 100, 2000, 5000, -1])
def test_truncated(model, capsys, size):
    data = model.read_bytes()
    model.write_bytes(data[:size])
    message = refused(capsys, model)
    assert ("not a GGUF" if 0 <= size < 24 else "truncated") in message


def patched(model, at, value):
    data = bytearray(model.read_bytes())
    data[at : at + len(value)] = value
    model.write_bytes(data)
    return model


@pytest.mark.parametrize(
    "at,value,message",
    [
        (0, b"GGML", "not a GGUF"),
        (4, b"\x01\0\0\0", "version 1"),
        (4, b"\0\0\0\x03", "big-endian"),
        (8, b"\xff" * 8, "more entries"),
        (16, b"\xff" * 8, "more entries"),
        (24, b"\xff" * 8, "too long"),  # length of the first key
        (32, b"\xff" * 4, "not UTF-8"),  # the key itself
    ],
)
def test_damaged_header(model, capsys, at, value, message):
    assert message in refused(capsys, patched(model, at, value))


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("tokenizer.ggml.tokens", b"\x09\0\0\0\x08\0\0\0" + b"\xff" * 8, "truncated"),  # an array of 2^64 - 1 strings
        ("tokenizer.ggml.scores", b"\x09\0\0\0\x06\0\0\0" + b"\xff" * 8, "truncated"),
        ("general.name", b"\x08\0\0\0" + b"\xff" * 8, "truncated"),
        ("general.name", b"\x63\0\0\0", "unknown type"),
    ],
)
def test_damaged_key(model, capsys, key, value, message):
    entry = read_gguf(str(model)).keys[key]
    assert message in refused(capsys, patched(model, entry.value_at - 4, value))


def test_long_tables_do_not_fill_the_memory(model, tmp_path, capsys):
    """Python's objects take many times their bytes in the file; what is not needed is not decoded."""
    n, long = 5 << 20, tmp_path / "long.gguf"
    with_keys(model, long, {"test.long": (ARRAY, struct.pack("<IQ", 0, n) + bytes(n))})
    before = long.read_bytes()
    tracemalloc.start()
    gguf_file = read_gguf(str(long))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * n and gguf_file.get("test.long") is None
    assert main([str(long), "--remove", "--quiet"]) == 0 and long.read_bytes() == before

    n = 1 << 20
    keys = b"".join(b"\5\0\0\0\0\0\0\0%05x\0\0\0\0\0" % i for i in range(n))
    long.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, n) + keys)
    assert "more entries" in refused(capsys, long)


def test_nested_arrays_end(tmp_path, capsys):
    deep = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little") + deep * 5000
    path = tmp_path / "deep.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + key)
    assert "unknown type" in refused(capsys, path)


@pytest.mark.parametrize(
    "at,value,message", [(0, 99, "dimensions"), (4, 1 << 60, "outside"), (20, 9999, "unknown type")]
)
def test_damaged_tensor_table(model, capsys, at, value, message):
    data = model.read_bytes()
    name = b"blk.0.attn_q.weight"
    start = data.index(name) + len(name)
    size = 8 if at == 4 else 4
    assert message in refused(capsys, patched(model, start + at, value.to_bytes(size, "little")))


@pytest.mark.parametrize(
    "extra,message",
    [
        ({"split.count": 3}, "split"),
        ({"llama.attention.kv_lora_rank": 64}, "MLA"),
    ],
)
def test_models_that_are_not_supported(tmp_path, capsys, extra, message):
    assert message in refused(capsys, write_tiny_gguf(tmp_path / "tiny.gguf", extra=extra))


def test_no_tensors_and_big_endian(tmp_path, capsys):
    for name, order, message in (("a", "LITTLE", "no tensors"), ("b", "BIG", "big-endian")):
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama", endianess=gguf.GGUFEndian[order])
        writer.add_name("empty")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert message in refused(capsys, path)


def test_the_damaged_one_of_several_files_is_named(model, tmp_path, capsys):
    assert calibrate(model, "--sidecar") == 0
    sidecar = model.with_suffix(".fasa.gguf")
    sidecar.write_bytes(sidecar.read_bytes()[:500])
    assert inspect([str(model)]) == 1
    assert f"truncated or damaged ('{sidecar}')" in capsys.readouterr().err
    first = split_in_parts(model, tmp_path, "qwen2")
    second = first.with_name(first.name.replace("00001-of", "00002-of"))
    second.write_bytes(second.read_bytes()[:-100])
    assert calibrate(first, "--sidecar") == 1
    assert f"lies outside of it ('{second}')" in capsys.readouterr().err


def test_random_damage_is_refused_or_harmless(model, tmp_path, rng):
    """No damage to header, keys or tensor table may end in another exception than ours."""
    data, end = model.read_bytes(), read_gguf(str(model)).infos_end
    path, n_refused = tmp_path / "damaged.gguf", 0
    for _ in range(400):
        broken = bytearray(data)
        for at in rng.integers(0, end, rng.integers(1, 8)):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            read_gguf(str(path))
        except CalibrateError:
            n_refused += 1
    assert n_refused > 100
