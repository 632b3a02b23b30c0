"""Reads the layout of a GGUF file: where each key and each tensor lies. GGUF is untrusted: every length is checked."""

import mmap
import os
import re
import struct
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES

from .errors import CalibrateError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

STRING, ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
# Weights and bytes of a block of each type; those listed are not in every release of gguf, or otherwise there.
_BLOCKS = {kind.value: sizes for kind, sizes in GGML_QUANT_SIZES.items()}
_BLOCKS.update({9: (32, 36), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18)})
_MAX_DIMS = 4
_MAX_NAME = 65535
_MAX_ARRAY_DEPTH = 4
# As objects of Python entries and numbers take many times the bytes that they have in the file.
_MAX_ENTRIES = 1 << 18
_MAX_DECODED = 1 << 22


def shown(name):
    """A name from a file as a message may show it: quoted, printable and not long."""
    return ascii(name if len(name) <= 64 else name[:61] + "...")


@dataclass
class Key:
    name: str
    type: int
    start: int  # of the whole entry, name included, in the file
    end: int
    value_at: int


@dataclass
class TensorInfo:
    name: str
    type: int
    shape: tuple  # ne[0] first
    offset: int  # from the start of the file
    n_bytes: int


@dataclass
class GgufFile:
    """What a rewrite needs to know of a file; `keys` and `tensors` are in file order."""

    path: str
    version: int
    size: int
    infos_start: int
    infos_end: int
    data_start: int
    alignment: int
    keys: dict = field(default_factory=dict)
    tensors: list = field(default_factory=list)
    values: dict = field(default_factory=dict)
    stamp: tuple = ()  # see _stamp

    def get(self, name, default=None):
        """The value of a key: a scalar, a str, or a list of scalars. Other and very long arrays are not decoded."""
        return self.values.get(name, default)

    def open(self):
        """The file, open for reading, as long as it is the one that was parsed: offsets mean nothing in another."""
        try:
            file = open(self.path, "rb")
        except OSError as err:
            raise CalibrateError(f"cannot read '{self.path}': {err.strerror}") from err
        if _stamp(file) != self.stamp:
            file.close()
            raise CalibrateError(f"another program changed '{self.path}' meanwhile: nothing was written, try again")
        return file


def _stamp(file):
    """What changes when an open file is written to or another one takes its name."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class _Reader:
    def __init__(self, data, size):
        self.data, self.size, self.at = data, size, 0

    def need(self, n):
        if n > self.size - self.at:
            raise CalibrateError("the GGUF file is truncated or damaged")

    def unpack(self, fmt):
        n = struct.calcsize(fmt)
        self.need(n)
        value = struct.unpack_from(fmt, self.data, self.at)[0]
        self.at += n
        return value

    def take(self, n):
        self.need(n)
        self.at += n
        return self.data[self.at - n : self.at]

    def string(self, limit=None):
        n = self.unpack("<Q")
        if limit is not None and n > limit:
            raise CalibrateError("the GGUF file is damaged: a name is too long")
        return self.take(n)

    def name(self):
        try:
            return self.string(_MAX_NAME).decode("utf-8")
        except UnicodeDecodeError:
            raise CalibrateError("the GGUF file is damaged: a name is not UTF-8") from None

    def value(self, kind, depth=0):
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])
        if kind == STRING:
            return self.string().decode("utf-8", "replace")
        if kind != ARRAY or depth > _MAX_ARRAY_DEPTH:
            raise CalibrateError("the GGUF file is damaged: a key has an unknown type")
        item, count = self.unpack("<I"), self.unpack("<Q")
        if item in _SCALARS:
            data = self.take(count * struct.calcsize(_SCALARS[item]))
            if count > _MAX_DECODED:
                return None
            return list(struct.unpack(f"<{count}{_SCALARS[item][1]}", data))
        if count > (self.size - self.at) // 8:
            raise CalibrateError("the GGUF file is truncated or damaged")
        for _ in range(count):
            if item == STRING:
                self.take(self.unpack("<Q"))
            else:
                self.value(item, depth + 1)
        return None


def _tensor_bytes(name, kind, shape):
    if kind not in _BLOCKS:
        raise CalibrateError(f"tensor {shown(name)} has an unknown type ({kind})")
    block, size = _BLOCKS[kind]
    if shape[0] % block:
        raise CalibrateError(f"the GGUF file is damaged: rows of tensor {shown(name)} are no whole number of blocks")
    n = shape[0] // block * size
    for dim in shape[1:]:
        n *= dim
    return n


def read_gguf(path):
    """Parses header, keys and tensor table of a little-endian GGUF file of version 2 or 3."""
    try:
        size = os.path.getsize(path)
        if os.path.isdir(path):
            raise CalibrateError(f"'{path}' is a directory")
        not_gguf = CalibrateError(f"'{path}' is not a GGUF file")
        if size < 24:
            raise not_gguf
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise not_gguf
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    gguf = _parse(path, data, size)
                except CalibrateError as err:  # one of several perhaps: a part, or a sidecar that nobody named
                    raise CalibrateError(f"{err} ('{path}')") from None
            gguf.stamp = _stamp(file)
            return gguf
    except OSError as err:
        raise CalibrateError(f"cannot read '{path}': {err.strerror}") from err


def read_parts(path):
    """The files of a model, the one at path first: several if it is split."""
    first = read_gguf(path)
    n_split = first.get("split.count", 0)
    if not isinstance(n_split, int) or n_split <= 1:
        return [first]
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path)
    if match is None or int(match[2]) != n_split:
        raise CalibrateError(f"'{path}' is a part of a split model, but not its first one by its name")
    return [first, *(read_gguf(f"{match[1]}-{i:05d}-of-{match[2]}.gguf") for i in range(2, n_split + 1))]


def _parse(path, data, size):
    reader = _Reader(data, size)
    reader.at = 4
    version = reader.unpack("<I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise CalibrateError("big-endian GGUF files are not supported")
        raise CalibrateError(f"GGUF version {version} is not supported")
    n_tensors, n_keys = reader.unpack("<Q"), reader.unpack("<Q")
    # the smallest entry of either table takes more than 12 bytes
    if max(n_tensors, n_keys) > min(size // 12, _MAX_ENTRIES):
        raise CalibrateError("the GGUF file is truncated or damaged: it claims more entries than it can have")
    gguf = GgufFile(path, version, size, 0, 0, 0, DEFAULT_ALIGNMENT)
    for _ in range(n_keys):
        start = reader.at
        name = reader.name()
        kind = reader.unpack("<I")
        value_at = reader.at
        value = reader.value(kind)
        if name in gguf.keys:
            raise CalibrateError(f"the GGUF file is damaged: key {shown(name)} occurs twice")
        gguf.keys[name] = Key(name, kind, start, reader.at, value_at)
        if value is not None:
            gguf.values[name] = value
    gguf.infos_start = reader.at
    raw = []
    for _ in range(n_tensors):
        name = reader.name()
        n_dims = reader.unpack("<I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise CalibrateError(f"the GGUF file is damaged: tensor {shown(name)} has {n_dims} dimensions")
        shape = tuple(reader.unpack("<Q") for _ in range(n_dims))
        kind, offset = reader.unpack("<I"), reader.unpack("<Q")
        raw.append((name, kind, shape, offset))
    gguf.infos_end = reader.at
    alignment = gguf.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CalibrateError("the GGUF file is damaged: general.alignment is no power of two")
    gguf.alignment = alignment
    gguf.data_start = -(-gguf.infos_end // alignment) * alignment
    for name, kind, shape, offset in raw:
        n_bytes = _tensor_bytes(name, kind, shape)
        if offset % alignment or gguf.data_start + offset + n_bytes > size:
            raise CalibrateError(f"the GGUF file is truncated or damaged: tensor {shown(name)} lies outside of it")
        gguf.tensors.append(TensorInfo(name, kind, shape, gguf.data_start + offset, n_bytes))
    return gguf
