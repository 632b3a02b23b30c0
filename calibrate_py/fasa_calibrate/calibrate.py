"""Runs a model over a text and chooses the dominant FCs of every layer and KV head."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .criteria import CHOOSE, Group, Rules
from .errors import CalibrateError

@dataclass(frozen=True)
class Options:
    """What decides the result, for a given model and text."""

    criterion: str = "mass"
    n_tip: int = 16  # or all FCs of a head that has fewer
    rules: Rules = field(default_factory=Rules)
    n_ctx: int = 4096
    n_query: int = 48
    dense_layers: int = 2
    seed: int = 0


@dataclass
class Calibration:
    """Dominant FCs of each layer: {layer: [ids of KV head 0, ids of KV head 1, ...]}, and what they came from."""

    rope: str
    n_layer: int
    n_rot: dict
    n_head_kv: dict
    fcs: dict
    n_tokens: int
    n_query: int


def query_positions(n_tokens, n_query, budget, seed):
    """Ascending positions of the sampled queries, each past twice the budget, one from each of n_query equal parts."""
    first = 2 * budget
    edges = np.linspace(first, n_tokens, min(n_query, n_tokens - first) + 1).astype(int)
    rng = np.random.default_rng(seed)
    return np.array([rng.integers(a, b) for a, b in zip(edges[:-1], edges[1:])])


def calibrate(model, text, options, n_threads, progress=None):
    """Returns the Calibration of an open Model; progress() is called after each layer that has attention."""
    rope = model.rope
    tokens = model.tokenize(text)[: min(options.n_ctx, model.n_ctx_train)]
    rules = options.rules
    if rules.n_free < 1:
        raise CalibrateError("the budget must be larger than the forced tokens")
    if len(tokens) <= 2 * rules.budget:
        raise CalibrateError(
            f"{len(tokens)} tokens are too few: calibration for a budget of {rules.budget} needs more than"
            f" {2 * rules.budget}"
        )
    positions = query_positions(len(tokens), options.n_query, rules.budget, options.seed)
    result = Calibration(rope, model.n_layer, {}, {}, {}, len(tokens), len(positions))

    def visit(attention):
        result.n_rot[attention.layer] = attention.n_rot
        result.n_head_kv[attention.layer] = len(attention.k)
        if attention.layer >= options.dense_layers and attention.full and attention.rope is not None:
            result.fcs[attention.layer] = _choose_layer(attention, positions, options, pool)
        if progress is not None:
            progress()

    with ThreadPoolExecutor(n_threads) as pool:
        model.attentions(tokens, positions, visit, n_threads)
    if not result.fcs:
        raise CalibrateError("this model has no layer that FASA can serve: no full attention with rotary embedding")
    return result


def _choose_layer(attention, positions, options, pool):
    if attention.n_rot % 2 or not 2 <= attention.n_rot <= attention.k.shape[-1]:
        raise CalibrateError(f"layer {attention.layer} rotates {attention.n_rot} dims, which is not supported")
    n_head_kv = len(attention.k)
    n_group = attention.q.shape[1] // n_head_kv
    n_tip = min(options.n_tip, attention.n_rot // 2)

    def choose(head):
        heads = slice(head * n_group, (head + 1) * n_group)
        sinks = None if attention.sinks is None else attention.sinks[heads]
        group = Group(
            attention.q[:, heads],
            attention.k[head],
            positions,
            attention.rope,
            attention.n_rot,
            attention.scale,
            attention.softcap,
            sinks,
        )
        # a stream of its own for every head: the result does not depend on the order of work
        rng = np.random.default_rng([options.seed, attention.layer, head])
        return CHOOSE[options.criterion](group, n_tip, options.rules, rng)

    return list(pool.map(choose, range(n_head_kv)))


def sha256_text(text):
    return hashlib.sha256(text.encode()).hexdigest()
