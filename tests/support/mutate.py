"""Damaged copies of GGUF files, from a seeded generator, and what a reader of them must hold to."""

import struct

from fasa_calibrate.errors import CalibrateError
from fasa_calibrate.gguf_file import read_gguf
from fasa_calibrate.metadata import fingerprint

# lengths, counts and types that readers trip over
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 9, 13, 31, 32, 255, 2**16, 2**24 + 1]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**62 + 1, 2**63, 2**64 - 1]


def mutated(rng, seeds, start=0, end=None):
    """A seed, a bytes object, with one or two random changes at offsets in [start, end)."""
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.integers(1, 3)):
        limit = min(len(data), len(data) if end is None else end)
        if limit <= start:
            break
        at = int(rng.integers(start, limit))
        n = int(rng.integers(1, 17))
        kind = rng.integers(7)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            data[at : at + n] = rng.bytes(n)
        elif kind == 3:
            number = NUMBERS[rng.integers(len(NUMBERS))]
            width = int(rng.choice([4, 8]))
            data[at : at + width] = struct.pack("<Q", number)[:width]
        elif kind == 4:
            del data[at : at + n]
        elif kind == 5:
            other = seeds[rng.integers(len(seeds))]
            source = int(rng.integers(len(other)))
            data[at:at] = other[source : source + 4 * n]
        elif end is None:
            del data[at:]
    return bytes(data)


def check_reader(path):
    """The Python reader either refuses a file with its own exception and one sentence, or stays inside of it."""
    try:
        gguf = read_gguf(path)
        fingerprint([gguf])
    except CalibrateError as error:
        text = str(error).replace(str(path), "")
        assert text.isascii() and text.isprintable(), repr(text)
        return False
    assert all(0 <= key.start < key.value_at <= key.end <= gguf.infos_start for key in gguf.keys.values())
    assert all(t.offset >= gguf.infos_end and t.offset + t.n_bytes <= gguf.size for t in gguf.tensors)
    return True
