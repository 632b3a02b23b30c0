"""Stage metadata: the fasa.* keys of docs/metadata.md, from a Calibration, and their encoding in GGUF."""

import hashlib
import re
import struct

from . import __version__
from .errors import CalibrateError
from .gguf_file import ARRAY, STRING, shown

PREFIX = "fasa."
VERSION = 1
INDEX_TYPES = ("f16", "q8", "q4")
U32, I32 = 4, 5

_QK_WEIGHT = re.compile(r"blk\.\d+\.attn_(q|k|qkv)(_norm)?\.(weight|bias)$")


def fasa_keys(gguf, calibration, options, text_name, text_sha256, store_budget=None, index_type=None):
    """[(name, kind, value), ...] in the order of docs/metadata.md; kind is U32, STRING or ARRAY (of I32).

    store_budget, index_type: recommendations to store, None for none
    """
    layers = range(calibration.n_layer)
    fcs = [calibration.fcs.get(il, []) for il in layers]
    rules = options.rules
    keys = [
        ("version", U32, VERSION),
        ("rope_type", STRING, calibration.rope),
        ("n_head_kv", ARRAY, [calibration.n_head_kv.get(il, _per_layer(gguf, "n_head_kv", il)) for il in layers]),
        ("n_rot", ARRAY, [calibration.n_rot.get(il) or _per_layer(gguf, "n_rot", il) for il in layers]),
        ("n_tip", ARRAY, [len(heads[0]) if heads else 0 for heads in fcs]),
        ("fc", ARRAY, [fc for heads in fcs for head in heads for fc in head]),
    ]
    if store_budget is not None:
        keys.append(("budget", U32, store_budget))
    keys += [
        ("n_sink", U32, rules.n_sink),
        ("n_recent", U32, rules.n_recent),
    ]
    if index_type is not None:
        keys.append(("index_type", STRING, index_type))
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
        ("calibration.fingerprint", STRING, fingerprint(gguf)),
    ]
    return [(PREFIX + name, kind, value) for name, kind, value in keys]


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


def fingerprint(gguf):
    """sha256 (hex) of the attention q and k weights and biases, ascending by name. Each contributes its name and a
    zero byte, then little-endian u32 type, u32 number of dims, u64 dims (ne[0] first), then its bytes."""
    digest = hashlib.sha256()
    with open(gguf.path, "rb") as file:
        for tensor in sorted(gguf.tensors, key=lambda t: t.name):
            if not _QK_WEIGHT.match(tensor.name):
                continue
            n_dims = len(tensor.shape)
            digest.update(tensor.name.encode() + b"\0")
            digest.update(struct.pack(f"<II{n_dims}Q", tensor.type, n_dims, *tensor.shape))
            file.seek(tensor.offset)
            left = tensor.n_bytes
            while left:
                block = file.read(min(left, 1 << 22))
                if not block:
                    raise CalibrateError("the GGUF file is truncated or damaged")
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def encode_key(name, kind, value):
    """One entry of the key section of a GGUF file."""

    def string(text):
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    head = string(name) + struct.pack("<I", kind)
    if kind == STRING:
        return head + string(value)
    if kind == ARRAY:
        return head + struct.pack(f"<IQ{len(value)}i", I32, len(value), *value)
    return head + struct.pack("<I", value)
