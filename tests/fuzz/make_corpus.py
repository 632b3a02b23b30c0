#!/usr/bin/env python3
"""Writes seeds for fuzz-loader and fuzz_gguf_file.py into a folder: small GGUF files, valid and broken in known ways.

    tests/fuzz/make_corpus.py FOLDER

The models that the files fit are those of fuzz-loader.cpp. A dictionary of key names for libFuzzer goes to FOLDER.dict.
"""

import pathlib
import struct
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support import gguf_keys  # noqa: E402
from support.gguf_keys import F32, I32, STRING, U64, array, scalar  # noqa: E402

SEED = 7
N_LAYER = 4  # as in fuzz-loader.cpp
NORM = dict(n_head_kv=2, n_rot=32, n_tip=[3, 0, 5, 1])
NEOX = dict(n_head_kv=1, n_rot=8, n_tip=[4, 1, 0, 2])
OPTIONAL = {"budget": 256, "n_sink": 4, "n_recent": 32, "index_type": "q4"}


def fasa_keys(rope_type, n_head_kv, n_rot, n_tip, **more):
    """Valid fasa.* keys of one of the models."""
    fcs = gguf_keys.random_fcs(np.random.default_rng(SEED), n_head_kv, n_rot, n_tip)
    return gguf_keys.fasa_keys(N_LAYER, n_head_kv, n_rot, n_tip, fcs, rope_type, **more)


def tensor_info(name, shape, offset=0):
    """An entry of the tensor table, of an F32 tensor; shape: ne[0] first."""
    return gguf_keys.string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)


def gguf_file(keys, tensors=b"", n_tensors=0, data=b""):
    """The bytes of a GGUF file; keys: {name: value as gguf_keys.encode takes them}."""
    entries = [
        gguf_keys.string(name) + struct.pack("<I", kind) + raw
        for name, (kind, raw) in ((name, gguf_keys.encode(value)) for name, value in keys.items())
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(entries)) + b"".join(entries) + tensors
    return head + b"\0" * (-len(head) % gguf_keys.ALIGNMENT) + data


def seeds():
    """{name: bytes} of all seeds."""
    norm, neox = fasa_keys("norm", **NORM), fasa_keys("neox", **NEOX)
    model = {"general.architecture": "llama", "llama.block_count": N_LAYER, "general.alignment": 32}
    every_type = {
        "a.f32": scalar(F32, 1.5), "a.u64": scalar(U64, 2**40), "a.i32": scalar(I32, -1),
        "a.strings": array(STRING, ["x", "yz"]), "a.floats": array(F32, [0.5, 1.0]), "a.empty": array(I32, []),
    }  # fmt: skip
    tensors = tensor_info("blk.0.attn_q.weight", (8, 2)) + tensor_info("output.weight", (4, 2, 2), 64)
    changes = {
        "version": {"fasa.version": 2},
        "type": {"fasa.version": "1"},
        "rope": {"fasa.rope_type": "mrope"},
        "missing": {"fasa.fc": None},
        "short": {"fasa.fc": norm["fasa.fc"][:-1]},
        "descending": {"fasa.fc": norm["fasa.fc"][::-1]},
        "range": {"fasa.fc": [99] * len(norm["fasa.fc"])},
        "strings": {"fasa.n_tip": array(STRING, ["3"] * N_LAYER)},
        "budget": {"fasa.budget": 2**32 - 1},
        "center": {"fasa.center": array(F32, [float("nan")] * (2 * len(norm["fasa.fc"])))},
        "long": {"fasa.fc": array(I32, [1, 2, 3], length=2**62 + 1)},
    }
    files = {
        "norm": gguf_file(norm),
        "neox": gguf_file(neox),
        "optional": gguf_file(fasa_keys("norm", **NORM, **OPTIONAL)),
        "optional-neox": gguf_file(fasa_keys("neox", **NEOX, **OPTIONAL)),
        "types": gguf_file({**every_type, **norm}),
        "center": gguf_file({**norm, "fasa.center": array(F32, [0.5] * (2 * len(norm["fasa.fc"])))}),
        "sidecar": gguf_file({**norm, "fasa.fingerprint": "0123456789abcdef"}),
        "none": gguf_file(model),
        "model": gguf_file({**model, **norm}, tensors, 2, b"\1" * 128),
    }
    for name, change in changes.items():
        keys = {**norm, **change}
        files["bad-" + name] = gguf_file({key: value for key, value in keys.items() if value is not None})
    return files


def dictionary():
    """The strings that no mutation would hit upon, in libFuzzer's format."""
    keys = fasa_keys("norm", **NORM, **OPTIONAL)
    words = [*keys, "fasa.center", "fasa.fingerprint", "norm", "neox", "f16", "q8", "q4", "general.alignment", "GGUF"]
    return "".join(f'"{word}"\n' for word in words)


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)
    folder.with_suffix(".dict").write_text(dictionary())


if __name__ == "__main__":
    main()
