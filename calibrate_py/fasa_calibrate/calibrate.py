"""Runs a model over a text and chooses the dominant FCs of every layer and KV head."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Optional

import numpy as np

from .criteria import CHOOSE, Group, Quality, Rules, quality
from .errors import CalibrateError

DENSE_SHARE = 15
TIP_SHARE = Fraction(1, 4)  # of the head size
LARGE_HEAD = 256
LARGE_TIP_SHARE, LARGE_INDEX_TYPE = Fraction(3, 16), "q8"


@dataclass(frozen=True)
class Options:
    """What decides the result, for a given model and text."""

    criterion: str = "mass"
    n_tip: Optional[int] = None  # or all FCs of a head that has fewer; None: see index_of
    rules: Rules = field(default_factory=Rules)
    n_ctx: int = 4096
    n_query: int = 32
    n_dense: Optional[int] = None  # layers to leave dense, None for one in DENSE_SHARE of those that FASA can serve
    seed: int = 0
    index_type: Optional[str] = None  # type of the index to recommend; None: see index_of


@dataclass
class Calibration:
    """Dominant FCs of each layer, {layer: [ids of KV head 0, ids of KV head 1, ...]}, and what they came from.

    centers: {layer: [Group.center of KV head 0, ...]}
    quality: {layer: Quality}, of every layer that FASA can serve, those left dense included
    """

    rope: str
    n_layer: int
    n_rot: dict
    n_head_kv: dict
    fcs: dict
    centers: dict
    quality: dict
    n_tokens: int
    n_query: int
    index_type: Optional[str] = None  # recommended


def index_of(options, head_size):
    """FCs of a head, and the recommended type of their index, None for what the runtime takes.

    Left to us, the index is 1/15 of f16 K and V; of large heads, whose keys 4 bits serve badly, it is 1/10
    (docs/quality.md).
    """
    if options.n_tip is None and options.index_type is None and head_size >= LARGE_HEAD:
        return int(head_size * LARGE_TIP_SHARE), LARGE_INDEX_TYPE
    return options.n_tip or int(head_size * TIP_SHARE), options.index_type


def query_positions(n_tokens, n_query, budget, seed):
    """Ascending positions of the sampled queries, each past twice the budget, one from each of n_query equal parts."""
    first = 2 * budget
    edges = np.linspace(first, n_tokens, min(n_query, n_tokens - first) + 1).astype(int)
    rng = np.random.default_rng(seed)
    return np.array([rng.integers(a, b) for a, b in zip(edges[:-1], edges[1:])])


def calibrate(model, text, options, n_threads, progress=None, held_out=0):
    """Returns the Calibration of an open Model; progress() is called after each layer that has attention.

    held_out: the last one in so many tokens is left out; 0: none
    """
    rope = model.rope
    tokens = model.tokenize(text)[: min(options.n_ctx, model.n_ctx_train)]
    tokens = tokens[: len(tokens) - (len(tokens) // held_out if held_out else 0)]
    rules = options.rules
    if rules.n_free < 1:
        raise CalibrateError("the budget must be larger than the forced tokens")
    if len(tokens) <= 2 * rules.budget:
        raise CalibrateError(
            f"{len(tokens)} tokens are too few: calibration for a budget of {rules.budget} needs more than"
            f" {2 * rules.budget}"
        )
    positions = query_positions(len(tokens), options.n_query, rules.budget, options.seed)
    result = Calibration(rope, model.n_layer, {}, {}, {}, {}, {}, len(tokens), len(positions))

    def visit(attention):
        result.n_rot[attention.layer] = attention.n_rot
        result.n_head_kv[attention.layer] = len(attention.k)
        if attention.full and attention.rope is not None:
            result.index_type = result.index_type or index_of(options, attention.k.shape[-1])[1]
            heads = _choose_layer(attention, positions, options, each)
            result.fcs[attention.layer], result.centers[attention.layer], of_heads = map(list, zip(*heads))
            result.quality[attention.layer] = sum(of_heads, Quality())
        if progress is not None:
            progress()

    with ThreadPoolExecutor(n_threads) as pool:
        each = partial(_each, pool, n_threads)
        model.attentions(tokens, positions, visit, n_threads)
    if not result.fcs:
        raise CalibrateError("this model has no layer that FASA can serve: no full attention with rotary embedding")
    for layer in worst_layers({il: q.relative_error for il, q in result.quality.items()}, options.n_dense):
        del result.fcs[layer], result.centers[layer]
    return result


def worst_layers(errors, n_dense):
    """The layers to leave dense, at least one less than there are."""
    if n_dense is None:
        n_dense = round(len(errors) / DENSE_SHARE)
    return sorted(errors, key=errors.get, reverse=True)[: min(n_dense, len(errors) - 1)]


def _each(pool, n_threads, function, items):
    """[function(item), ...], by threads that take turns at the items."""
    results = [None] * len(items)

    def work(first):
        for at in range(first, len(items), n_threads):
            results[at] = function(items[at])

    list(pool.map(work, range(n_threads)))
    return results


def _choose_layer(attention, positions, options, each):
    if attention.n_rot % 2 or not 2 <= attention.n_rot <= attention.k.shape[-1]:
        raise CalibrateError(f"layer {attention.layer} rotates {attention.n_rot} dims, which is not supported")
    if not all(np.isfinite(x).all() for x in (attention.q, attention.k, attention.v)):
        raise CalibrateError(f"layer {attention.layer} has q, K or V that are not finite numbers in f16")
    n_head_kv = len(attention.k)
    n_group = attention.q.shape[1] // n_head_kv
    n_tip = min(index_of(options, attention.k.shape[-1])[0], attention.n_rot // 2)

    def choose(head):
        heads = slice(head * n_group, (head + 1) * n_group)
        sinks = None if attention.sinks is None else attention.sinks[heads]
        group = Group(
            attention.q[:, heads],
            attention.k[head],
            attention.v[head],
            positions,
            attention.rope,
            attention.n_rot,
            attention.scale,
            attention.softcap,
            sinks,
        )
        # a stream of its own for every head: the result does not depend on the order of work
        rng = np.random.default_rng([options.seed, attention.layer, head])
        fcs = CHOOSE[options.criterion](group, n_tip, options.rules, rng, each)
        return fcs, group.center(fcs), quality(group, fcs, options.rules, each)

    return [choose(head) for head in range(n_head_kv)]


def sha256_text(text):
    return hashlib.sha256(text.encode()).hexdigest()
