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


INDEX_TYPES = ("f16", "q8", "q4")  # in the order of enum ggml_fasa_index_type
INTEGERS = {"q8": (4, -127, 127, 128), "q4": (8, -8, 7, 8)}  # dims of a word, range, offset


def unrotate(x, block):
    """x [..., D] before or after its multiplication by orthonormal Walsh-Hadamard blocks; as it is if block is 0."""
    if not block:
        return x
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    x = np.asarray(x, dtype=np.float64)
    return (x.reshape(*x.shape[:-1], -1, block) @ h / np.sqrt(block)).reshape(x.shape)


def new_index(n_stream, n_head_kv, n_cells, n_dim, index_type="f16"):
    """An empty index: f16 [S, G, n_cells / TILE, J, TILE], or bytes [S, G, n_cells / TILE, tile size]."""
    if index_type == "f16":
        return np.zeros((n_stream, n_head_kv, n_cells // TILE, n_dim, TILE), dtype=np.float16)
    n_word = -(-n_dim // INTEGERS[index_type][0])
    return np.zeros((n_stream, n_head_kv, n_cells // TILE, TILE * (2 + 4 * n_word)), dtype=np.uint8)


def tile_parts(tiles):
    """Views of tiles of integers [..., tile size]: scales f16 [..., TILE] and the bytes of words [..., W, TILE, 4]."""
    scales, words = tiles[..., : 2 * TILE], tiles[..., 2 * TILE :]
    return scales.view(np.float16), words.reshape(*tiles.shape[:-1], -1, TILE, 4)


def integers(k, index_type):
    """The f16 scale and the integers of the K values [J] of a cell, in float32 as ggml-fasa.h defines them."""
    _, low, high, _ = INTEGERS[index_type]
    k = np.asarray(k, dtype=np.float32)
    top = k[np.argmax(np.abs(k))]
    d = np.float16(np.abs(top) / np.float32(127) if index_type == "q8" else top / np.float32(-8))
    if d == 0:
        return d, np.zeros(len(k), dtype=np.int64)
    x = np.rint(k * (np.float32(1) / np.float32(d)))
    return d, np.clip(x, low, high).astype(np.int64)


def index_cache(k, cells, index, dims, index_type="f16", hadamard=0, center=None):
    """Stage index_cache: the index with dims of the given K rows put in.

    k: [S, n_cells, G, D] values; cells: [n] global ids, stream * n_cells + cell; index: see new_index; dims: [G, J];
    center: [G, J], subtracted in float32, or None.
    """
    index = index.copy()
    n_cells = k.shape[1]
    for cell in np.asarray(cells).ravel():
        s, c = divmod(int(cell), n_cells)
        for g, head_dims in enumerate(dims):
            values = unrotate(k[s, c, g], hadamard)[head_dims]
            if center is not None:
                values = values.astype(np.float32) - center[g].astype(np.float32)
            if index_type == "f16":
                index[s, g, c // TILE, :, c % TILE] = values
                continue
            per_word, _, _, offset = INTEGERS[index_type]
            scales, words = tile_parts(index[s, g, c // TILE])
            scales[c % TILE], x = integers(values, index_type)
            words[:, c % TILE] = 0
            for j, xj in enumerate(x):
                words[j // per_word, c % TILE, j % 4] |= int(xj + offset) << (4 if j % per_word >= 4 else 0)
    return index


def index_values(index, cells, n_dim, index_type):
    """What the plane of a head says of cells: factors [n] and values [n, J], whose products stand for K."""
    if index_type == "f16":
        return np.ones(len(cells)), index[cells // TILE, :, cells % TILE].astype(np.float64)
    per_word, _, _, offset = INTEGERS[index_type]
    scales, words = tile_parts(index)
    x = words[cells // TILE, :, cells % TILE].astype(np.int64)  # [n, W, 4]
    if per_word == 8:
        x = np.concatenate([x & 15, x >> 4], axis=-1)
    return scales[cells // TILE, cells % TILE].astype(np.float64), x.reshape(len(cells), -1)[:, :n_dim] - offset


def query_integers(q):
    """tip's query of one head [J] for an index of integers: (m / 127, q'), in float32 as ggml-fasa.h defines them."""
    q = np.asarray(q, dtype=np.float32)
    m = np.abs(q).max()
    if m < np.finfo(np.float32).tiny:
        return 0.0, np.zeros(len(q))
    return float(m) / 127, np.rint(q * (np.float32(127) / m)).astype(np.float64)


def visibility(mask):
    """What a mask says of each cell: (visible, always selected), both bool, from 0, -0.0 and -inf."""
    mask = np.asarray(mask, dtype=np.float64)
    visible = mask != -np.inf
    return visible, visible & np.signbit(mask)


def tip(q, index, mask, index_type="f16"):
    """Stage tip (section 4.1): scores of the cells of one KV group for one query row.

    q: [R, J], already scaled; index: the head's plane, new_index without its first two axes; mask: [N].
    Returns [N]: sum over heads of softmax(partial q.k); -inf where hidden, +inf where always selected.
    """
    visible, forced = visibility(mask)
    cells = np.flatnonzero(visible)
    scores = np.full(len(visible), -np.inf)
    if len(cells):
        d, x = index_values(index, cells, q.shape[1], index_type)
        heads = [(1.0, np.asarray(row, dtype=np.float64)) if index_type == "f16" else query_integers(row) for row in q]
        logits = np.stack([factor * d * (x @ row) for factor, row in heads])
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


def attn(q, k, v, mask, index, dims, scale, budget, softcap=0.0, sinks=None, index_type="f16", hadamard=0):
    """All stages: tip -> select -> fac. Returns (out [S, T, H, DV], margins [S, T, G]).

    q: [S, H, T, D]; k: [S, G, N, D]; v: [S, G, N, DV]; mask: [S, T, N]; sinks: [H] or None;
    index: see new_index; dims: [G, J]. A row that sees no cell yields zeros.
    """
    n_stream, n_head, n_row, _ = q.shape
    n_head_kv = k.shape[1]
    n_group = n_head // n_head_kv
    out = np.zeros((n_stream, n_row, n_head, v.shape[3]))
    margins = np.full((n_stream, n_row, n_head_kv), np.inf)
    for s, t, g in np.ndindex(n_stream, n_row, n_head_kv):
        heads = slice(g * n_group, (g + 1) * n_group)
        rows = q[s, heads, t].astype(np.float64)
        scores = tip(unrotate(rows, hadamard)[:, dims[g]] * scale, index[s, g], mask[s, t], index_type)
        cells = select(scores, budget)
        margins[s, t, g] = margin(scores, budget)
        out[s, t, heads] = fac(rows, k[s, g], v[s, g], cells, scale, softcap, None if sinks is None else sinks[heads])
    return out, margins


def dense(q, k, v, mask, scale, softcap=0.0, sinks=None):
    """Stage fac over all visible cells; arguments and result [S, T, H, DV] as of attn."""
    n_stream, n_head, n_row, _ = q.shape
    n_group = n_head // k.shape[1]
    out = np.zeros((n_stream, n_row, n_head, v.shape[3]))
    for s, t, g in np.ndindex(n_stream, n_row, k.shape[1]):
        heads = slice(g * n_group, (g + 1) * n_group)
        cells = np.flatnonzero(visibility(mask[s, t])[0])
        out[s, t, heads] = fac(q[s, heads, t], k[s, g], v[s, g], cells, scale, softcap, None if sinks is None else sinks[heads])
    return out
