"""LLAMA_FASA_VERIFY: silent while the index is right, and one line and an abort when it is not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Decodes a prompt and a few tokens; an evaluation callback flips a bit of the index of layer 1 at the third token.
FLIP = """
import ctypes, sys, tempfile
import numpy as np
from support.native import ggml
from support.random_life import write_model, BUDGET, N_SINK, N_RECENT
from support.runtime import ON, Model, fasa_params, llama

arch, index_type, type_k, at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
api, (ffi, lib) = llama(), ggml()
left = 0

@api.ggml_backend_sched_eval_callback
def on_node(tensor, ask, _):
    global left
    if ask or not left:
        return True
    tensor = ffi.cast("struct ggml_tensor *", ctypes.cast(tensor, ctypes.c_void_p).value)
    if ffi.string(lib.ggml_get_name(tensor)) == b"fasa_index_cache-1":
        left = 0
        ffi.buffer(lib.ggml_get_data(tensor), lib.ggml_nbytes(tensor))[at] = b"\\x55"
    return True

rng = np.random.default_rng(1)
with tempfile.TemporaryDirectory() as folder, Model(write_model(folder, arch)) as model:
    with fasa_params(ON, BUDGET, N_SINK, N_RECENT, index_type=index_type):
        ctx = model.context(cb_eval=on_node, type_k=type_k)
    ctx.decode(rng.integers(3, 250, 300))
    for i in range(4):
        left = i == 2
        ctx.decode([i + 5])
    print("decoded")
"""
F16, Q8_0 = 1, 8


def decode(arch, index_type, type_k, at, **env):
    return subprocess.run(
        [sys.executable, "-c", FLIP, arch, index_type, str(type_k), str(at)],
        cwd=Path(__file__).parent, env={**os.environ, "GGML_NO_BACKTRACE": "1", **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arch, index_type, type_k, at, cell",
    [
        ("llama", "f16", F16, 2 * 5, 5),  # a value of the first dim
        ("llama", "q8", Q8_0, 2 * 7, 7),  # a scale
        ("llama", "q4", F16, 2 * 32 + 4 * 9, 9),  # a word of values
        ("lfm2", "q4", Q8_0, 2 * 32 + 4 * 31, 31),
        ("gemma3", "q8", F16, 2 * 3, None),  # layer 1 has a window and no index
    ],
)
def test_a_flipped_byte_is_found(arch, index_type, type_k, at, cell):
    found = decode(arch, index_type, type_k, at, LLAMA_FASA_VERIFY="1")
    if cell is None:
        assert found.returncode == 0 and "decoded" in found.stdout, found.stderr
        return
    assert found.returncode < 0 and "decoded" not in found.stdout
    lines = [line for line in found.stderr.splitlines() if "FASA" in line]
    sentence = f"FASA: the index is out of date in layer 1, stream 0, KV head 0, cell {cell}"
    assert len(lines) == 1 and re.search(sentence + "$", lines[0]), found.stderr
    for off in ({}, {"LLAMA_FASA_VERIFY": "0"}):
        unnoticed = decode(arch, index_type, type_k, at, **off)
        assert unnoticed.returncode == 0 and "decoded" in unnoticed.stdout, unnoticed.stderr


# What fails half way leaves K as it may be, but the index must be of it: a state that is cut off, a shift that is aborted.
HALF = """
import ctypes, sys, tempfile
import numpy as np
from support.random_life import write_model, BUDGET, N_SINK, N_RECENT
from support.runtime import ON, Model, fasa_params, llama

api, rng, left = llama(), np.random.default_rng(1), None

@api.ggml_abort_callback
def abort(_):
    global left
    left = left and left - 1
    return left == 1

with tempfile.TemporaryDirectory() as folder, Model(write_model(folder, "llama")) as model:
    with fasa_params(ON, BUDGET, N_SINK, N_RECENT):
        ctx = model.context(abort_callback=abort)
    ctx.decode(rng.integers(3, 250, 400))
    if sys.argv[1] == "state":
        part = (ctypes.c_uint8 * 4000).from_buffer_copy(ctx.save()[:4000])
        assert api.llama_state_set_data(ctx.handle, part, len(part)) == 0
        assert api.llama_memory_seq_pos_max(ctx.memory, 0) > 256
    else:
        api.llama_memory_seq_rm(ctx.memory, 0, 20, 30)
        api.llama_memory_seq_add(ctx.memory, 0, 30, -1, -10)
        left = 2
    ctx.decode([5])
    assert ctx.stats().n_step_sparse == 1 and not left
    print("decoded")
"""


@pytest.mark.parametrize("what", ["state", "shift"])
def test_what_fails_half_way(what):
    done = subprocess.run(
        [sys.executable, "-c", HALF, what], cwd=Path(__file__).parent,
        env={**os.environ, "GGML_NO_BACKTRACE": "1", "LLAMA_FASA_VERIFY": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "decoded" in done.stdout, done.stderr
