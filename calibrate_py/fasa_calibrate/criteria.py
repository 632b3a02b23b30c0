"""Stage calibrate, second half: chooses the dominant FCs of one KV head from the q and K it saw.

Letters: F FCs of a head (n_rot / 2), R query heads of the KV group, Q sampled queries, N tokens, D head size,
t tokens visible to one query (its position + 1).
"""

from dataclasses import dataclass, field, fields

import numpy as np

CRITERIA = ("mass", "overlap", "error", "ca", "random")
RECALL_BUDGETS = (64, 128, 256, 512, 1024)
DROP_SHARE = 32  # a step drops at most one in so many FCs
SCREEN_SHARE = 2  # one in so many queries decides which half of the FCs the others need not look at


@dataclass(frozen=True)
class Rules:
    """What holds at run time while a budget is in force."""

    budget: int = 256  # tokens kept per query and KV group, forced ones included
    n_sink: int = 4
    n_recent: int = 32

    @property
    def n_free(self):
        return self.budget - self.n_sink - self.n_recent


def fc_planes(x, rope, n_rot):
    """The rotary planes of rows x [..., D] as F32 [F, ..., 2]; the pairing is defined in docs/metadata.md."""
    rotated = np.asarray(x[..., :n_rot], np.float32)
    if rope == "norm":
        planes = rotated.reshape(*rotated.shape[:-1], n_rot // 2, 2)
    else:
        planes = np.stack([rotated[..., : n_rot // 2], rotated[..., n_rot // 2 :]], axis=-1)
    return np.ascontiguousarray(np.moveaxis(planes, -2, 0))


def in_turn(function, items):
    """[function(item), ...]; what is called `each` here may call it for several items at once."""
    return [function(item) for item in items]


class Group:
    """Scores of the queries of one KV group over its keys.

    q: [Q, R, D], k: [N, D], v: [N, DV], positions: [Q] cell of each query's own token, sinks: [R] or None
    """

    def __init__(self, q, k, v, positions, rope, n_rot, scale, softcap=0.0, sinks=None):
        self.positions = np.asarray(positions)
        self._q = np.asarray(q, np.float32)
        self._k = np.asarray(k, np.float32)
        self._v = np.asarray(v, np.float32)
        self._q_fc = fc_planes(self._q, rope, n_rot) * np.float32(scale)  # [F, Q, R, 2]
        self._k_fc = np.ascontiguousarray(fc_planes(self._k, rope, n_rot).transpose(0, 2, 1))  # [F, 2, N]
        self._scale, self._softcap, self._sinks = scale, softcap, sinks
        self.n_fc = n_rot // 2

    def fc_scores(self, i):
        """Scaled score of each FC for query i: F32 [F, R, t]."""
        return self._q_fc[:, i] @ self._k_fc[:, :, : self.positions[i] + 1]

    def logits(self, i):
        """Full scaled scores of query i: F32 [R, t]."""
        return (self._q[i] @ self._k[: self.positions[i] + 1].T) * np.float32(self._scale)

    def attention(self, i):
        """Dense attention weights of query i, softcap and sinks applied: F32 [R, t]."""
        s = self.logits(i)
        if self._softcap:
            s = self._softcap * np.tanh(s / self._softcap)
        top = s.max(axis=-1, keepdims=True)
        e = np.exp(s - top)
        total = e.sum(axis=-1, keepdims=True)
        if self._sinks is not None:
            total += np.exp(self._sinks[:, None] - top)
        return e / total

    def output(self, attention):
        """Rows of V weighted by attention [..., t]: F32 [..., DV]."""
        return attention @ self._v[: attention.shape[-1]]

    def center(self, fcs):
        """The mean of K over all tokens in the dims of fcs, first dims of the planes, then second: F32 [2 * len(fcs)]."""
        return self._k_fc[fcs].mean(axis=-1, dtype=np.float64).T.ravel().astype(np.float32)


def tip_rank(scores):
    """By what tokens are ranked at run time: the sum over a group's heads of softmax(TIP). [..., R, t] -> [..., t].

    Overwrites scores.
    """
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    weight = np.float32(1) / scores.sum(axis=-1)
    return np.matmul(weight[..., None, :], scores)[..., 0, :]


def top_sum(rank, values, n):
    """Sum of values [t] over the n best tokens of each row of rank [C, t]; ties go to the lower token."""
    if rank.shape[-1] <= n:
        return np.full(len(rank), values.sum(), np.float32)
    bound = np.partition(rank, rank.shape[-1] - n, axis=-1)[:, rank.shape[-1] - n, None]
    kept = rank >= bound
    for row in np.flatnonzero(kept.sum(axis=-1) != n):
        kept[row] = False
        kept[row, np.argsort(-rank[row], kind="stable")[:n]] = True
    return kept @ values


def order_of_selection(rank, rules):
    """Tokens in the order in which select takes them: those that are forced, then the rest by rank [t]; int [t]."""
    t = len(rank)
    forced = np.zeros(t, bool)
    forced[: rules.n_sink] = forced[max(0, t - rules.n_recent) :] = True
    free = np.flatnonzero(~forced)
    return np.concatenate([np.flatnonzero(forced), free[np.argsort(-rank[free], kind="stable")]])


def sparse_output(group, weights, kept):
    """Attention over the kept tokens only, from the dense weights [R, t]: [R, DV]."""
    some = np.zeros_like(weights)
    some[:, kept] = weights[:, kept]
    total = np.maximum(some.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)  # not 0, as far below the largest
    return group.output(some * (weights.sum(axis=-1, keepdims=True) / total))


@dataclass
class Quality:
    """What attention over the tokens that some FCs select makes of queries, summed over queries, heads and layers."""

    n_query: int = 0
    error: float = 0.0  # squares of the difference from dense output
    size: float = 0.0  # squares of the dense output
    recall: np.ndarray = field(default_factory=lambda: np.zeros(len(RECALL_BUDGETS)))  # dense mass on selected tokens

    def __add__(self, other):
        return Quality(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def relative_error(self):
        return self.error / max(self.size, 1e-30)

    @property
    def mean_recall(self):
        """The share of dense attention that falls on the selected tokens, for each of RECALL_BUDGETS."""
        return self.recall / max(self.n_query, 1)


def quality(group, fcs, rules, each=in_turn):
    """The Quality of FCs; recall for several budgets, the rest for that of the rules."""

    def of_query(i):
        weights = group.attention(i)
        order = order_of_selection(tip_rank(group.fc_scores(i)[fcs].sum(axis=0)), rules)
        dense = group.output(weights)
        difference = sparse_output(group, weights, order[: rules.budget]) - dense
        mass = weights.mean(axis=0)
        recall = np.cumsum(mass[order])[np.minimum(RECALL_BUDGETS, len(order)) - 1] / mass.sum()
        return Quality(1, float(np.square(difference).sum()), float(np.square(dense).sum()), recall)

    return sum(each(of_query, range(len(group.positions))), Quality())


def choose_greedily(group, n_tip, gain, each):
    """Backward elimination: of all FCs those are dropped, step by step, without which gain is largest.

    gain(i, scores [C, R, t]) says for query i how good each of C partial scores is: [C]. In each step a part of the
    queries sees all FCs, the rest the better half. To add FCs one by one to none is worse: some are of use only together,
    so that the first choices are all but blind.
    """
    queries = range(len(group.positions))
    screen, rest = queries[::SCREEN_SHARE], [i for i in queries if i % SCREEN_SHARE]
    fc = each(group.fc_scores, queries)
    tip = [f.sum(axis=0) for f in fc]
    chosen = np.arange(group.n_fc)

    def gains(of, candidates):
        return sum(each(lambda i: gain(i, tip[i] - fc[i][candidates]), of))

    while len(chosen) > n_tip:
        n = min(len(chosen) - n_tip, max(1, len(chosen) // DROP_SHARE))
        by_screen = gains(screen, chosen)
        better = np.sort(np.argsort(-by_screen, kind="stable")[: max(n, (len(chosen) + 1) // 2)])
        by_all = by_screen[better] + gains(rest, chosen[better]) if rest else by_screen[better]
        worst = better[np.argsort(-by_all, kind="stable")[:n]]
        for i in queries:
            tip[i] -= fc[i][chosen[worst]].sum(axis=0)
        chosen = np.delete(chosen, worst)
    return chosen.tolist()


def _free(group, rules):
    """The tokens of each query that are not forced."""
    return [slice(rules.n_sink, max(rules.n_sink, t + 1 - rules.n_recent)) for t in group.positions]


def choose_mass(group, n_tip, rules, rng, each=in_turn):
    """FCs with which select captures most dense attention mass, beyond the tokens that are forced anyway."""
    free = _free(group, rules)
    mass = each(lambda i: group.attention(i).mean(axis=0)[free[i]], range(len(free)))
    return choose_greedily(group, n_tip, lambda i, s: top_sum(tip_rank(s)[:, free[i]], mass[i], rules.n_free), each)


def choose_overlap(group, n_tip, rules, rng, each=in_turn):
    """FCs with which select finds most of the tokens that full scores would select, beyond the forced ones."""
    free = _free(group, rules)

    def best(i):
        rank = tip_rank(group.logits(i))[free[i]]
        wanted = np.zeros(len(rank), np.float32)
        wanted[np.argsort(-rank, kind="stable")[: rules.n_free]] = 1
        return wanted

    wanted = each(best, range(len(free)))
    return choose_greedily(group, n_tip, lambda i, s: top_sum(tip_rank(s)[:, free[i]], wanted[i], rules.n_free), each)


def choose_error(group, n_tip, rules, rng, each=in_turn):
    """FCs with which the output of attention over the selected tokens is nearest to the dense one."""
    weights = each(group.attention, range(len(group.positions)))
    dense = each(group.output, weights)

    def gain(i, scores):
        kept = [order_of_selection(rank, rules)[: rules.budget] for rank in tip_rank(scores)]
        return np.array([-np.square(sparse_output(group, weights[i], k) - dense[i]).sum() for k in kept])

    return choose_greedily(group, n_tip, gain, each)


def choose_ca(group, n_tip, rules, rng, each=in_turn):
    """Contextual agreement (paper, equations 2 to 5): FCs whose top tokens agree best with the full head's, each FC
    on its own, averaged over the heads of the group. K of equation 2 is the budget; nothing is forced."""

    def of_query(i):
        agreement = np.zeros(group.n_fc)
        by_fc, full = group.fc_scores(i), group.logits(i)
        n = min(rules.budget, full.shape[-1])
        for head in range(len(full)):
            top = np.zeros(full.shape[-1], np.float32)
            top[np.argpartition(-full[head], n - 1)[:n]] = 1
            agreement += top_sum(by_fc[:, head], top, n)
        return agreement

    agreement = sum(each(of_query, range(len(group.positions))))
    return sorted(np.argsort(-agreement, kind="stable")[:n_tip].tolist())


def choose_random(group, n_tip, rules, rng, each=in_turn):
    """The control: any other criterion must do clearly better."""
    return sorted(rng.choice(group.n_fc, n_tip, replace=False).tolist())


CHOOSE = {
    "mass": choose_mass,
    "overlap": choose_overlap,
    "error": choose_error,
    "ca": choose_ca,
    "random": choose_random,
}
