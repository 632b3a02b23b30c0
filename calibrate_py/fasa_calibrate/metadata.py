"""Stage metadata: the fasa.* keys of docs/metadata.md, from a Calibration, and their encoding in GGUF."""

import contextlib
import re
import struct

import numpy as np

from . import __version__
from .criteria import RECALL_BUDGETS, Quality
from .errors import CalibrateError
from .gguf_file import ARRAY, STRING, shown

PREFIX = "fasa."
VERSION = 1
INDEX_TYPES = ("f16", "q8", "q4")
U32, I32, F32 = 4, 5, 6

_SAMPLE, _N_SAMPLE = 256, 8  # bytes, samples of a tensor
_QK_WEIGHT = re.compile(r"blk\.\d+\.attn_(q|k|qkv)(_norm)?\.(weight|bias)$")


def fasa_keys(gguf, fingerprint, calibration, options, text_name, text_sha256, budget):
    """[(name, kind, value), ...] in the order of docs/metadata.md; kind is U32, STRING or ARRAY (of I32 or F32).

    fingerprint: of the model; budget: recommendation to store, None for none
    """
    layers = range(calibration.n_layer)
    fcs = [calibration.fcs.get(il, []) for il in layers]
    rules = options.rules
    keys = [
        ("version", U32, VERSION),
        ("fingerprint", STRING, fingerprint),
        ("rope_type", STRING, calibration.rope),
        ("n_head_kv", ARRAY, [calibration.n_head_kv.get(il, _per_layer(gguf, "n_head_kv", il)) for il in layers]),
        ("n_rot", ARRAY, [calibration.n_rot.get(il) or _per_layer(gguf, "n_rot", il) for il in layers]),
        ("n_tip", ARRAY, [len(heads[0]) if heads else 0 for heads in fcs]),
        ("fc", ARRAY, [fc for heads in fcs for head in heads for fc in head]),
    ]
    if calibration.centers:
        keys.append(("center", ARRAY, np.concatenate([c for il in layers for c in calibration.centers.get(il, [])])))
    if budget is not None:
        keys.append(("budget", U32, budget))
    keys += [
        ("n_sink", U32, rules.n_sink),
        ("n_recent", U32, rules.n_recent),
    ]
    if calibration.index_type is not None:
        keys.append(("index_type", STRING, calibration.index_type))
    keys += [
        ("calibration.tool", STRING, f"fasa-calibrate {__version__}"),
        ("calibration.criterion", STRING, options.criterion),
        ("calibration.text", STRING, text_name),
        ("calibration.text_sha256", STRING, text_sha256),
        ("calibration.n_tokens", U32, calibration.n_tokens),
        ("calibration.n_query", U32, calibration.n_query),
        ("calibration.seed", U32, options.seed),
        ("calibration.budget", U32, rules.budget),
        ("calibration.n_sink", U32, rules.n_sink),
        ("calibration.n_recent", U32, rules.n_recent),
    ]
    if calibration.quality:
        none = Quality(1, -1.0, 1.0, np.full(len(RECALL_BUDGETS), -1.0))
        layers = [calibration.quality.get(il, none) for il in layers]
        keys += [
            ("calibration.error", ARRAY, np.array([q.relative_error for q in layers])),
            ("calibration.recall", ARRAY, np.concatenate([q.mean_recall for q in layers])),
            ("calibration.recall_budget", ARRAY, RECALL_BUDGETS),
        ]
    return [(PREFIX + name, kind, value) for name, kind, value in keys]


def sidecar_of(path):
    """Where the sidecar of a model is looked for."""
    return re.sub(r"\.gguf$", "", path) + ".fasa.gguf"


def _per_layer(gguf, what, layer):
    """n_head_kv or n_rot of a layer that the calibration text did not reach, by llama.cpp's rules for absent keys."""
    arch = gguf.get("general.architecture")

    def get(key, default):
        value = gguf.get(f"{arch}.{key}", default)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else default
        if not isinstance(value, int):
            raise CalibrateError(f"the GGUF file lacks {shown(f'{arch}.{key}')}")
        return value

    n_head = get("attention.head_count", None)
    if what == "n_head_kv":
        return get("attention.head_count_kv", n_head)
    head_size = get("attention.key_length", get("embedding_length", None) // n_head if n_head else 0)
    return get("rope.dimension_count", head_size)


def fingerprint(parts):
    """Of a model, whose files are parts; the same as the loader's, see docs/metadata.md. 16 hex digits."""
    weights = [(tensor.name.encode(), part, tensor) for part in parts for tensor in part.tensors]
    data = bytearray()
    with contextlib.ExitStack() as stack:
        files = {id(part): stack.enter_context(part.open()) for part in parts}
        for name, part, tensor in sorted(weights, key=lambda w: w[0]):
            if not _QK_WEIGHT.match(tensor.name):
                continue
            shape = (*tensor.shape, *[1] * (4 - len(tensor.shape)))
            data += name + b"\0" + struct.pack("<5Q", tensor.type, *shape)
            n = min(tensor.n_bytes, _SAMPLE)
            for i in range(_N_SAMPLE):
                files[id(part)].seek(tensor.offset + (tensor.n_bytes - n) // (_N_SAMPLE - 1) * i)
                data += files[id(part)].read(n)
    return f"{_fnv1a(data):016x}"


def _fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def encode_key(name, kind, value):
    """One entry of the key section of a GGUF file."""

    def string(text):
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    head = string(name) + struct.pack("<I", kind)
    if kind == STRING:
        return head + string(value)
    if kind == ARRAY:
        value = np.asarray(value)
        kind, dtype = (F32, "<f4") if value.dtype.kind == "f" else (I32, "<i4")
        return head + struct.pack("<IQ", kind, len(value)) + value.astype(dtype).tobytes()
    return head + struct.pack("<I", value)
