"""Shape tables and random inputs, the same for the stage tests and the op tests."""

import numpy as np
from gguf import GGMLQuantizationType, quants

from oracle.fasa_oracle import TILE

GROUPS = (1, 3, 4, 7)  # query heads per KV head
HEAD_SIZES = (32, 64, 80, 96, 128, 256)
BUDGETS = (1, 37, 64, 256)
CACHE_TYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BLOCK = 32  # values that a quantised type of these keeps together


def pad(n, multiple=TILE):
    return -(-n // multiple) * multiple


def around(budget):
    """Numbers of cells at which select and fac change their ways, for a budget."""
    return sorted({1, 31, 32, 33, 997, budget - 1, budget, budget + 1, 4096, 4097, 5003} - {0})


def f16(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)


def f32(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def type_id(name):
    """The number of a cache type in enum ggml_type."""
    return int(GGMLQuantizationType[name.upper()])


def stored(values, name):
    """What a cache of that type keeps of values [..., D]: (its bytes [..., size of a row], the values they mean)."""
    kind = GGMLQuantizationType[name.upper()]
    data = quants.quantize(np.ascontiguousarray(values, dtype=np.float32), kind)
    return np.ascontiguousarray(data).view(np.uint8), quants.dequantize(data, kind)


def exact_k(rng, *shape):
    """K values whose sums are exact in float32 in any order, in every cache type: small whole numbers over 8, each block
    holding both ends of the range, so that all blocks have one scale."""
    k = rng.integers(-8, 9, (*shape[:-1], shape[-1] // BLOCK, BLOCK))
    k[..., 0], k[..., 1] = 8, -8
    return (k / 8).astype(np.float32).reshape(shape)


def mask(rng, n, dtype, hidden=0.2, forced=0.05):
    """A mask row: 0 visible, -0.0 always selected, -inf hidden, the last two in the shares given."""
    row = np.zeros(n, dtype)
    kind = rng.random(n)
    row[kind < hidden + forced] = -0.0
    row[kind < hidden] = -np.inf
    return row


def dims(rng, n_head_kv, n_dim, d):
    """Random dims of each head, distinct within a head, in no order."""
    return np.stack([rng.permutation(d)[:n_dim] for _ in range(n_head_kv)]).astype(np.int32)
