"""Puts keys into a GGUF file byte by byte, so that tests can write what a well-behaved writer would not."""

import struct

import gguf
import numpy as np

U32, I32, F32, STRING, ARRAY, U64 = 4, 5, 6, 8, 9, 10  # value types of GGUF
FORMATS = {U32: "<I", I32: "<i", F32: "<f", U64: "<Q"}
ALIGNMENT = 32
KEYS_AT = 24  # magic, version, number of tensors, number of keys


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def scalar(kind, value):
    """(type, bytes) of one value."""
    return kind, string(value) if kind == STRING else struct.pack(FORMATS[kind], value)


def array(kind, values, length=None):
    """(type, bytes) of an array; length: the number of values that it claims to hold."""
    length = len(values) if length is None else length
    return ARRAY, struct.pack("<IQ", kind, length) + b"".join(scalar(kind, v)[1] for v in values)


def encode(value):
    """(type, bytes) of a value typed as in docs/metadata.md: u32, string or i32 array; such pairs stay as they are."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, str):
        return scalar(STRING, value)
    return array(I32, value) if isinstance(value, list) else scalar(U32, value)


def with_keys(source, path, keys):
    """Writes a copy of the GGUF file source to path, with more keys in front of its own; returns path."""
    data = source.read_bytes()
    assert data[:4] == b"GGUF"
    encoded = {name: encode(value) for name, value in keys.items()}
    entries = [string(name) + struct.pack("<I", kind) + raw for name, (kind, raw) in encoded.items()]
    (n_keys,) = struct.unpack_from("<Q", data, 16)
    # one more key fills up to the alignment, so that tensor data keep their place behind the header
    filler = string(f"test.filler.{n_keys}") + struct.pack("<I", STRING)
    entries.append(filler + string(" " * (-(sum(map(len, entries)) + len(filler) + 8) % ALIGNMENT)))
    path.write_bytes(data[:16] + struct.pack("<Q", n_keys + len(entries)) + b"".join(entries) + data[KEYS_AT:])
    return path


def fasa_keys(n_layer, n_head_kv, n_rot, n_tip, fcs, rope_type="norm", **more):
    """Valid fasa.* keys of a model whose layers are all alike but for n_tip and perhaps n_head_kv, then a list.

    n_tip: [n_layer]; fcs: see random_fcs; more: further keys without their prefix
    """
    keys = {
        "fasa.version": 1,
        "fasa.rope_type": rope_type,
        "fasa.n_head_kv": n_head_kv if isinstance(n_head_kv, list) else [n_head_kv] * n_layer,
        "fasa.n_rot": [n_rot] * n_layer,
        "fasa.n_tip": list(map(int, n_tip)),
        "fasa.fc": [int(i) for layer in fcs for i in layer.ravel()],
    }
    return {**keys, **{f"fasa.{name}": value for name, value in more.items()}}


def random_fcs(rng, n_head_kv, n_rot, n_tip):
    """A random FC table: for each layer an array [n_head_kv, n_tip], ascending in each head."""
    return [np.sort(np.stack([rng.permutation(n_rot // 2)[:n] for _ in range(n_head_kv)])) for n in n_tip]


def split_in_parts(model, folder, arch, n=2):
    """The model in n parts as llama-gguf-split names them, keys in the first one; returns that."""
    reader = gguf.GGUFReader(model)
    tensors = np.array_split(np.arange(len(reader.tensors)), n)
    for i, part in enumerate(tensors):
        path = folder / f"split-{i + 1:05d}-of-{n:05d}.gguf"
        writer = gguf.GGUFWriter(str(path), arch)
        if i == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind, *item = field.types[:2]
                    writer.add_key_value(field.name, field.contents(), kind, *item)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", n)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for at in part:
            tensor = reader.tensors[at]
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"split-00001-of-{n:05d}.gguf"
