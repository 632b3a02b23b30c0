"""Shape tables and random inputs, the same for the stage tests and the op tests."""

import numpy as np

from oracle.fasa_oracle import TILE

GROUPS = (1, 3, 4, 7)  # query heads per KV head
HEAD_SIZES = (32, 64, 80, 96, 128, 256)
BUDGETS = (1, 37, 64, 256)


def pad(n, multiple=TILE):
    return -(-n // multiple) * multiple


def around(budget):
    """Numbers of cells at which select and fac change their ways, for a budget."""
    return sorted({1, 31, 32, 33, 997, budget - 1, budget, budget + 1, 4096, 4097, 5003} - {0})


def f16(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)


def f32(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


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
