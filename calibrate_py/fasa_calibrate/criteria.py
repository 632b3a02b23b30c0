"""Stage calibrate, second half: chooses the dominant FCs of one KV head from the q and K it saw.

Letters: F FCs of a head (n_rot / 2), R query heads of the KV group, Q sampled queries, N tokens, D head size,
t tokens visible to one query (its position + 1).
"""

from dataclasses import dataclass

import numpy as np

CRITERIA = ("mass", "ca", "random")


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


class Group:
    """Scores of the queries of one KV group over its keys.

    q: [Q, R, D], k: [N, D], positions: [Q] cell of each query's own token, sinks: [R] or None
    """

    def __init__(self, q, k, positions, rope, n_rot, scale, softcap=0.0, sinks=None):
        self.positions = np.asarray(positions)
        self._q = np.asarray(q, np.float32)
        self._k = np.asarray(k, np.float32)
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


def choose_mass(group, n_tip, rules, rng):
    """Greedy forward selection: each step adds the FC with which select captures most dense attention mass.

    Mass is counted under the rules of run time, beyond the tokens that are forced anyway.
    """
    queries = range(len(group.positions))
    fc = [group.fc_scores(i) for i in queries]
    free = [slice(rules.n_sink, max(rules.n_sink, t + 1 - rules.n_recent)) for t in group.positions]
    mass = [group.attention(i).mean(axis=0)[free[i]] for i in queries]
    tip = [np.zeros_like(f[0]) for f in fc]
    chosen, rest = [], list(range(group.n_fc))
    while len(chosen) < n_tip:
        captured = np.zeros(len(rest))
        for i in queries:
            rank = tip_rank(fc[i][rest] + tip[i])[:, free[i]]
            captured += top_sum(rank, mass[i], rules.n_free)
        best = rest.pop(int(np.argmax(captured)))
        chosen.append(best)
        for i in queries:
            tip[i] += fc[i][best]
    return sorted(chosen)


def choose_ca(group, n_tip, rules, rng):
    """Contextual agreement (paper, equations 2 to 5): FCs whose top tokens agree best with the full head's, each FC
    on its own, averaged over the heads of the group. K of equation 2 is the budget; nothing is forced."""
    agreement = np.zeros(group.n_fc)
    for i in range(len(group.positions)):
        by_fc, full = group.fc_scores(i), group.logits(i)
        n = min(rules.budget, full.shape[-1])
        for head in range(len(full)):
            top = np.zeros(full.shape[-1], np.float32)
            top[np.argpartition(-full[head], n - 1)[:n]] = 1
            agreement += top_sum(by_fc[:, head], top, n)
    return sorted(np.argsort(-agreement, kind="stable")[:n_tip].tolist())


def choose_random(group, n_tip, rules, rng):
    """The control: any other criterion must do clearly better."""
    return sorted(rng.choice(group.n_fc, n_tip, replace=False).tolist())


CHOOSE = {"mass": choose_mass, "ca": choose_ca, "random": choose_random}
