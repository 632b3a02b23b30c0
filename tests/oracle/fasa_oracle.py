"""The oracle: FASA in NumPy float64, one function per stage, written to be read beside the paper (arXiv 2602.03152).

Arrays are in C order, so their axes are those of ggml_fasa/include/ggml-fasa.h reversed. Letters are the same:
D head size of K, DV of V, H query heads, G KV heads, R = H / G, T query rows, N cells, S streams, J index dims.
It imports nothing of ours and shares no code with what it checks.
"""

import numpy as np

TILE = 32  # cells side by side in the index layout


def fc_dims(fcs, n_rot, rope_type):
    """The two dims of each FC of a head, in the order of ``fcs``: NORM (2i, 2i+1), NEOX (i, i + n_rot/2)."""
    fcs = np.asarray(fcs, dtype=np.int64)
    pair = {"norm": (2 * fcs, 2 * fcs + 1), "neox": (fcs, fcs + n_rot // 2)}[rope_type]
    return np.stack(pair, axis=-1).reshape(*fcs.shape[:-1], -1).astype(np.int32)


def new_index(n_stream, n_head_kv, n_cells, n_dim):
    """An empty index, f16 [S, G, n_cells / TILE, J, TILE]."""
    return np.zeros((n_stream, n_head_kv, n_cells // TILE, n_dim, TILE), dtype=np.float16)


def index_cache(k, cells, index, dims):
    """Stage index_cache: the index with dims of the given K rows copied in.

    k: f16 [S, n_cells, G, D]; cells: [n] global ids, stream * n_cells + cell; index: see new_index; dims: [G, J].
    """
    index = index.copy()
    n_cells = k.shape[1]
    for cell in np.asarray(cells).ravel():
        s, c = divmod(int(cell), n_cells)
        for g, head_dims in enumerate(dims):
            index[s, g, c // TILE, :, c % TILE] = k[s, c, g, head_dims]
    return index


def visibility(mask):
    """What a mask says of each cell: (visible, always selected), both bool, from 0, -0.0 and -inf."""
    mask = np.asarray(mask, dtype=np.float64)
    visible = mask != -np.inf
    return visible, visible & np.signbit(mask)


def tip(q, index, mask):
    """Stage tip (section 4.1): scores of the cells of one KV group for one query row.

    q: [R, J], already scaled; index: the head's plane [n_tiles, J, TILE]; mask: [N].
    Returns [N]: sum over heads of softmax(partial q.k); -inf where hidden, +inf where always selected.
    """
    visible, forced = visibility(mask)
    cells = np.flatnonzero(visible)
    scores = np.full(len(visible), -np.inf)
    if len(cells):
        k_dom = index[cells // TILE, :, cells % TILE].astype(np.float64)  # [n, J]
        logits = np.asarray(q, dtype=np.float64) @ k_dom.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores[cells] = (p / p.sum(axis=1, keepdims=True)).sum(axis=0)
    scores[forced] = np.inf
    return scores


def select(scores, budget):
    """Stage select: the ``budget`` best cells, ascending; a tie goes to the lower cell, hidden cells never."""
    order = np.lexsort((np.arange(len(scores)), -np.asarray(scores)))[:budget]
    return np.sort(order[np.asarray(scores)[order] != -np.inf])


def margin(scores, budget):
    """How clear-cut a selection is: relative gap between the last score kept and the first left out; inf if none is.

    A test uses it to leave out rows that another float type may rightly decide otherwise.
    """
    best = np.sort(np.asarray(scores)[np.asarray(scores) != -np.inf])[::-1]
    if len(best) <= budget or np.isinf(best[budget - 1]):
        return np.inf
    return (best[budget - 1] - best[budget]) / max(abs(best[budget - 1]), np.finfo(np.float64).tiny)


def fac(q, k, v, cells, scale, softcap=0.0, sinks=None):
    """Stage fac (section 4.2): exact attention of the heads of one KV group over the selected cells.

    q: [R, D]; k: [N, D]; v: [N, DV]; cells: [n]; sinks: [R] or None, one more logit in the denominator.
    Returns [R, DV], zeros if no cell is selected.
    """
    q = np.asarray(q, dtype=np.float64)
    if len(cells) == 0:
        return np.zeros((len(q), v.shape[1]))
    logits = q @ k[cells].astype(np.float64).T * scale
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    top = logits.max(axis=1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, np.asarray(sinks, dtype=np.float64)[:, None])
    p = np.exp(logits - top)
    total = p.sum(axis=1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, dtype=np.float64)[:, None] - top)
    return (p / total) @ v[cells].astype(np.float64)


def attn(q, k, v, mask, index, dims, scale, budget, softcap=0.0, sinks=None):
    """All stages: tip -> select -> fac. Returns (out [S, T, H, DV], margins [S, T, G]).

    q: [S, H, T, D]; k: f16 [S, G, N, D]; v: f16 [S, G, N, DV]; mask: [S, T, N]; sinks: [H] or None;
    index: [S, G, n_tiles, J, TILE]; dims: [G, J]. A row that sees no cell yields zeros.
    """
    n_stream, n_head, n_row, _ = q.shape
    n_head_kv = k.shape[1]
    n_group = n_head // n_head_kv
    out = np.zeros((n_stream, n_row, n_head, v.shape[3]))
    margins = np.full((n_stream, n_row, n_head_kv), np.inf)
    for s, t, g in np.ndindex(n_stream, n_row, n_head_kv):
        heads = slice(g * n_group, (g + 1) * n_group)
        rows = q[s, heads, t].astype(np.float64)
        scores = tip(rows[:, dims[g]] * scale, index[s, g], mask[s, t])
        cells = select(scores, budget)
        margins[s, t, g] = margin(scores, budget)
        out[s, t, heads] = fac(rows, k[s, g], v[s, g], cells, scale, softcap, None if sinks is None else sinks[heads])
    return out, margins
