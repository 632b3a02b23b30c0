"""Each stage of the op on the CPU, reference and fast path, against the NumPy oracle."""

import numpy as np
import pytest

from oracle import fasa_oracle as oracle
from support import shapes, tolerances
from support.native import ggml, pointer

TILE = oracle.TILE
PATHS = pytest.mark.parametrize("use_ref", [True, False], ids=["ref", "fast"])
NAN16 = np.float16(np.nan)


def write_index(k, dims, cells, index, index_type="f16", type_k="f16", hadamard=0, center=None):
    """Stage index_cache through C, into a plane of an index; k: [n_cells, D]."""
    d = k.shape[1]
    rows, _ = shapes.stored(k, type_k)
    scratch = np.full(d + len(dims) + TILE, np.nan, np.float32)
    ffi, lib = ggml()
    shift = ffi.NULL if center is None else pointer(center, "float *")
    for cell in cells:
        lib.ggml_fasa_cpu_index_write(
            pointer(rows[cell], "void *"), shapes.type_id(type_k), d, hadamard, pointer(dims, "int32_t *"), shift, len(dims),
            int(cell), oracle.INDEX_TYPES.index(index_type), pointer(index, "void *"), pointer(scratch, "float *"),
        )  # fmt: skip
    assert np.isnan(scratch[-TILE:]).all(), "index_cache wrote past its scratch"


def random_index(rng, index_type, n_kv, n_dim):
    """A plane of an index of random cells, the tail of its last tile included."""
    n_cells = shapes.pad(n_kv)
    index = oracle.new_index(1, 1, n_cells, n_dim, index_type)
    if index_type == "f16":
        return shapes.f16(rng, *index.shape)[0, 0]
    scales, words = oracle.tile_parts(index)
    scales[...] = shapes.f16(rng, *scales.shape) / np.float16(64 if index_type == "q8" else 4)
    words[...] = rng.integers(0, 256, words.shape)
    if index_type == "q8":
        np.maximum(words, 1, out=words)  # -128 does not occur
    return index[0, 0]


def run_tip(q, index, mask, use_ref, index_type="f16"):
    """Stage tip through C; outputs and scratch start as NaN, and must not be written past their ends."""
    ffi, lib = ggml()
    n_group, n_dim = q.shape
    n_kv = len(mask)
    scratch = np.full(lib.ggml_fasa_cpu_tip_scratch(n_group, n_dim, n_kv) + TILE, np.nan, np.float32)
    scores = np.full(shapes.pad(n_kv) + TILE, np.nan, np.float32)
    lib.ggml_fasa_cpu_tip(
        pointer(q, "float *"), n_group, n_dim, oracle.INDEX_TYPES.index(index_type), pointer(index, "void *"),
        pointer(mask, "void *"), mask.dtype == np.float16, n_kv, pointer(scratch, "float *"), pointer(scores, "float *"), use_ref,
    )  # fmt: skip
    assert np.isnan(scores[-TILE:]).all(), "tip wrote past its scores"
    assert np.isnan(scratch[-TILE:]).all(), "tip wrote past its scratch"
    return scores[:n_kv]


def run_select(scores, budget, use_ref):
    """Stage select through C: the cells."""
    ffi, lib = ggml()
    n_out = min(budget, len(scores))
    cells = np.full(n_out + TILE, -7, np.int32)
    scratch = np.full(2 * len(scores) + TILE, 7, np.uint32)
    n = lib.ggml_fasa_cpu_select(
        pointer(scores, "float *"), len(scores), budget, pointer(scratch, "uint32_t *"), pointer(cells, "int32_t *"), use_ref
    )
    assert 0 <= n <= n_out
    assert (cells[n_out:] == -7).all(), "select wrote past its output"
    assert (scratch[2 * len(scores) :] == 7).all(), "select wrote past its scratch"
    return cells[:n]


def run_fac(q, k, v, cells, scale, softcap, sinks, use_ref, out_stride=None, type_k="f16", type_v="f16"):
    """Stage fac through C; k and v are [N, G, D] caches of which head 0 is attended to."""
    ffi, lib = ggml()
    n_group, d_k, d_v = len(q), k.shape[2], v.shape[2]
    (k, _), (v, _) = shapes.stored(k, type_k), shapes.stored(v, type_v)
    out_stride = out_stride or d_v
    scratch = np.full(lib.ggml_fasa_cpu_fac_scratch(n_group, len(cells), max(d_k, d_v)) + TILE, np.nan, np.float32)
    out = np.full((n_group, out_stride), np.nan, np.float32)
    lib.ggml_fasa_cpu_fac(
        pointer(q, "float *"), n_group, q.shape[1],
        pointer(k, "void *"), shapes.type_id(type_k), k.strides[0],
        pointer(v, "void *"), shapes.type_id(type_v), v.strides[0],
        d_k, d_v, pointer(cells, "int32_t *"), len(cells), scale, softcap,
        pointer(sinks, "float *"), pointer(scratch, "float *"), pointer(out, "float *"), out_stride, use_ref,
    )  # fmt: skip
    assert np.isnan(out[:, d_v:]).all(), "fac wrote between its heads"
    assert np.isnan(scratch[-TILE:]).all(), "fac wrote past its scratch"
    return out[:, :d_v]


def assert_scores(actual, expected):
    """Scores agree: exactly where infinite, to the table's tolerances elsewhere."""
    infinite = np.isinf(expected)
    assert np.array_equal(actual[infinite], expected[infinite].astype(np.float32))
    actual, expected = actual[~infinite], expected[~infinite]
    assert tolerances.nmse(actual, expected) <= tolerances.TIP_NMSE
    large = expected > tolerances.TIP_RELATIVE_FLOOR
    assert np.all(np.abs(actual - expected)[large] <= tolerances.TIP_RELATIVE * expected[large])


# index_cache


INDEX_TYPES = pytest.mark.parametrize("index_type", oracle.INDEX_TYPES)


def check_index_write(rng, k, n_dim, index_type, type_k="f16", hadamard=0, center=None):
    """Writes half the cells in some order over an index of rubbish; the oracle must give the same bits."""
    n_cells, d = k.shape
    dims = shapes.dims(rng, 1, n_dim, d)
    cells = rng.permutation(n_cells)[: n_cells // 2]
    index = oracle.new_index(1, 1, n_cells, n_dim, index_type)
    index.view(np.uint8)[...] = rng.integers(0, 256, index.view(np.uint8).shape)
    _, values = shapes.stored(k, type_k)
    expected = oracle.index_cache(values[None, :, None], cells, index, dims, index_type, hadamard, center)
    write_index(k, dims[0], cells, index, index_type, type_k, hadamard, None if center is None else center[0])
    assert np.array_equal(index.view(np.uint8), expected.view(np.uint8)), f"{n_dim} dims"


@INDEX_TYPES
@pytest.mark.parametrize("d", shapes.HEAD_SIZES)
def test_index_write(rng, d, index_type):
    for n_dim in {2, 6, 8, d // 2, d - 2, d}:
        check_index_write(rng, shapes.f16(rng, 3 * TILE, d), n_dim, index_type)


@INDEX_TYPES
def test_index_write_of_extreme_rows(rng, index_type):
    """Zeros, one value only, denormals, the largest f16, and values that tie for the largest magnitude."""
    k = shapes.f16(rng, 2 * TILE, 32)
    k[::6] = 0
    k[1::6, 1:] = 0
    k[2::6] *= np.float16(1e-6)
    k[3::6] = np.float16(65504) * np.sign(k[3::6])
    k[4::6] = np.float16(0.5) * np.sign(k[4::6])
    for n_dim in (2, 16, 32):
        check_index_write(rng, k, n_dim, index_type)


@INDEX_TYPES
@pytest.mark.parametrize("hadamard", [0, 64])
@pytest.mark.parametrize("type_k", shapes.CACHE_TYPES)
def test_index_write_from_every_cache_type(rng, type_k, hadamard, index_type):
    """What is kept is K before its rotation."""
    for d in (64, 128):
        check_index_write(rng, shapes.exact_k(rng, 2 * TILE, d), 16, index_type, type_k, hadamard)


@INDEX_TYPES
@pytest.mark.parametrize("hadamard", [0, 64])
def test_index_write_subtracts_the_center(rng, hadamard, index_type):
    k, center = shapes.exact_k(rng, 2 * TILE, 64), shapes.f32(rng, 1, 16)
    check_index_write(rng, k, 16, index_type, hadamard=hadamard, center=center)


@pytest.mark.parametrize("hadamard", [2, 32, 128, 256])
def test_index_write_of_rotations_of_any_size(rng, hadamard):
    k, dims, cells = shapes.f32(rng, TILE, 256), shapes.dims(rng, 1, 32, 256), np.arange(TILE)
    index = oracle.new_index(1, 1, TILE, 32)
    expected = oracle.index_cache(k[None, :, None], cells, index, dims, hadamard=hadamard)
    write_index(k, dims[0], cells, index, type_k="f32", hadamard=hadamard)
    assert np.allclose(index, expected, rtol=2**-10, atol=1e-6)


# tip


@PATHS
@INDEX_TYPES
@pytest.mark.parametrize("n_group", (*shapes.GROUPS, 8))
@pytest.mark.parametrize("mask_type", [np.float16, np.float32], ids=["mask_f16", "mask_f32"])
def test_tip(rng, n_group, mask_type, index_type, use_ref):
    for n_kv in (1, 2, 31, 32, 33, 63, 65, 255, 997, 4097):
        n_dim = int(rng.choice([2, 4, 6, 8, 16, 24, 32, 34, 64]))
        index = random_index(rng, index_type, n_kv, n_dim)
        q = shapes.f32(rng, n_group, n_dim) * np.float32(rng.choice([0.05, 0.3, 1.0]))
        mask = shapes.mask(rng, n_kv, mask_type)
        assert_scores(run_tip(q, index, mask, use_ref, index_type), oracle.tip(q, index, mask, index_type))


@PATHS
@INDEX_TYPES
@pytest.mark.parametrize("n_dim", [*range(2, 66, 2), 96, 128, 256])
def test_tip_every_number_of_dims(rng, n_dim, index_type, use_ref):
    n_kv = 200
    index, q = random_index(rng, index_type, n_kv, n_dim), shapes.f32(rng, 3, n_dim)
    q[1] = 0
    mask = shapes.mask(rng, n_kv, np.float32)
    assert_scores(run_tip(q, index, mask, use_ref, index_type), oracle.tip(q, index, mask, index_type))


@pytest.mark.parametrize("n_dim", [32, 64, 72, 128, 256])
@pytest.mark.parametrize("index_type", ["q8", "q4"])
def test_tip_of_integers_at_their_ends(rng, index_type, n_dim):
    """The largest integers of one sign in q and index: sums that 16 bits would not hold, in the end or on the way."""
    n_kv = 64
    mask = np.zeros(n_kv, np.float32)
    for first, last in ((0x00, 0x00), (0x11, 0x11), (0xFF, 0xFF), (0x00, 0xFF), (0xFF, 0x00)):
        for sign in (-1, 1):
            index = random_index(rng, index_type, n_kv, n_dim)
            scales, words = oracle.tile_parts(index)
            scales[...] = np.linspace(1e-6, 2e-6, n_kv).reshape(scales.shape)
            half = words.shape[1] // 2
            words[:, :half] = max(first, 1) if index_type == "q8" else first
            words[:, half:] = max(last, 1) if index_type == "q8" else last
            q = np.full((2, n_dim), sign, np.float32)
            expected = oracle.tip(q, index, mask, index_type)
            for use_ref in (True, False):
                assert_scores(run_tip(q, index, mask, use_ref, index_type), expected)


@PATHS
@INDEX_TYPES
def test_tip_skips_what_hidden_cells_hold(rng, index_type, use_ref):
    """Stale cells may hold anything: NaN and infinities there change no score."""
    n_kv, n_dim = 300, 16
    index, q = random_index(rng, index_type, n_kv, n_dim), shapes.f32(rng, 4, n_dim)
    mask = shapes.mask(rng, n_kv, np.float16, hidden=0.5)
    mask[64:160] = -np.inf  # whole tiles, too
    clean = run_tip(q, index, mask, use_ref, index_type)
    stale = np.append(np.flatnonzero(np.isinf(mask)), np.arange(n_kv, shapes.pad(n_kv)))  # and past the end
    for bad in (np.nan, np.inf, -np.inf):
        if index_type == "f16":
            index[stale // TILE, :, stale % TILE] = bad
        else:
            scales, words = oracle.tile_parts(index)
            scales[stale // TILE, stale % TILE] = bad
            words[stale // TILE, :, stale % TILE] = rng.integers(0, 256)
        assert np.array_equal(run_tip(q, index, mask, use_ref, index_type), clean)
    assert_scores(clean, oracle.tip(q, index, mask, index_type))


@PATHS
@INDEX_TYPES
def test_tip_masks_of_one_kind(rng, index_type, use_ref):
    """All hidden, all visible, all forced, and one visible cell only."""
    n_kv, n_dim = 100, 8
    index, q = random_index(rng, index_type, n_kv, n_dim), shapes.f32(rng, 3, n_dim)
    for value in (-np.inf, 0.0, -0.0):
        mask = np.full(n_kv, value, np.float32)
        assert_scores(run_tip(q, index, mask, use_ref, index_type), oracle.tip(q, index, mask, index_type))
    for cell in (0, 31, 32, 99):
        mask = np.full(n_kv, -np.inf, np.float32)
        mask[cell] = 0.0
        scores = run_tip(q, index, mask, use_ref, index_type)
        assert scores[cell] == pytest.approx(3.0) and np.isneginf(np.delete(scores, cell)).all()


@PATHS
def test_tip_survives_large_logits(rng, use_ref):
    """The softmax is taken after its maximum is subtracted: logits of thousands overflow nothing."""
    n_kv, n_dim = 200, 16
    index, q = shapes.f16(rng, shapes.pad(n_kv) // TILE, n_dim, TILE), shapes.f32(rng, 3, n_dim) * 300
    mask = np.zeros(n_kv, np.float16)
    scores = run_tip(q, index, mask, use_ref)
    assert np.isfinite(scores).all() and scores.sum() == pytest.approx(3.0, rel=1e-4)
    winners = oracle.tip(q, index, mask) > 0.5  # one cell takes nearly all the weight of a head
    assert winners.any() and np.array_equal(scores > 0.5, winners)


@PATHS
@pytest.mark.parametrize("sign", (1, -1))
def test_tip_survives_logits_beyond_measure(sign, use_ref):
    """Of billions, as a broken model may have them: weights are still weights."""
    n_kv, n_dim = 3000, 2
    index = np.full((shapes.pad(n_kv) // TILE, n_dim, TILE), sign * 3e4, np.float16)
    index[0, 0, 5] = index[-1, 0, 7] = 6e4
    scores = run_tip(np.full((2, n_dim), 1e5, np.float32), index, np.zeros(n_kv, np.float32), use_ref)
    assert np.isfinite(scores).all() and (scores >= 0).all() and scores.sum() == pytest.approx(2.0, rel=1e-3)


@PATHS
def test_tip_of_equal_cells_is_equal(rng, use_ref):
    """Equal index rows get equal scores wherever they lie, else the tie rule would mean nothing."""
    n_dim = 16
    for n_kv in (33, 100, 1000):
        row, q = shapes.f16(rng, n_dim), shapes.f32(rng, 3, n_dim)
        index = np.repeat(np.tile(row[None, :, None], (shapes.pad(n_kv) // TILE, 1, 1)), TILE, axis=2)
        scores = run_tip(q, np.ascontiguousarray(index), np.zeros(n_kv, np.float32), use_ref)
        assert (scores == scores[0]).all()


@PATHS
@INDEX_TYPES
def test_tip_of_equal_cells_among_others_is_equal(rng, index_type, use_ref):
    """The same, where neighbours differ from place to place by many orders of magnitude."""
    n_kv, n_dim = 3000, 8
    rows = shapes.f16(rng, n_kv, n_dim) * rng.uniform(0.1, 4, 6).repeat(500).astype(np.float16)[:, None]
    cells = np.arange(7, n_kv, 97)
    rows[cells] = rows[cells[0]] * np.float16(0.5)
    index = oracle.index_cache(
        np.concatenate([rows, np.zeros((shapes.pad(n_kv) - n_kv, n_dim), np.float16)])[None, :, None],
        np.arange(n_kv), oracle.new_index(1, 1, shapes.pad(n_kv), n_dim, index_type), np.arange(n_dim)[None], index_type,
    )  # fmt: skip
    for n_group in (1, 3, 4):
        q = shapes.f32(rng, n_group, n_dim)
        scores = run_tip(q, index[0, 0], np.zeros(n_kv, np.float32), use_ref, index_type)[cells]
        assert scores[0] > 0 and (scores == scores[0]).all()


# select


@PATHS
@pytest.mark.parametrize("budget", shapes.BUDGETS)
@pytest.mark.parametrize(
    "kind",
    ["random", "quantised", "equal", "masked", "softmax", "ascending", "descending", "side by side", "repeating"],
)
def test_select(rng, budget, kind, use_ref):
    for n_kv in shapes.around(budget):
        scores = {
            "random": lambda n: rng.random(n),
            "quantised": lambda n: rng.integers(0, 5, n).astype(np.float32) / 4,
            "equal": lambda n: np.full(n, 0.25, np.float32),
            "masked": lambda n: np.where(rng.random(n) < 0.3, shapes.mask(rng, n, np.float32, 0.6), 0.5),
            "softmax": lambda n: np.exp(10 * shapes.f32(rng, n)),
            "ascending": lambda n: np.arange(n),
            "descending": lambda n: np.arange(n, 0, -1),
            "side by side": lambda n: np.exp(-np.abs(np.arange(n) - n // 3) / 20) + rng.random(n) / 100,
            "repeating": lambda n: np.resize(rng.random(2 * budget + 8), n),
        }[kind](n_kv).astype(np.float32)
        if kind == "masked":  # some always selected, fewer than the budget
            forced = rng.permutation(n_kv)[: min(n_kv, budget) // 2]
            scores[forced] = np.inf
        expected = oracle.select(scores, budget)
        actual = run_select(scores, budget, use_ref)
        assert np.array_equal(actual, expected), f"n_kv {n_kv}"


@PATHS
def test_select_tie_at_the_budget_goes_to_the_lower_cell(use_ref):
    """The boundary value occurs before, at and after the cut."""
    scores = np.array([1, 2, 1, 3, 1, 1, 2, 1, 0, 1], np.float32)
    assert run_select(scores, 5, use_ref).tolist() == [0, 1, 2, 3, 6]
    assert run_select(scores, 4, use_ref).tolist() == [0, 1, 3, 6]
    assert run_select(np.zeros(70, np.float32), 33, use_ref).tolist() == list(range(33))


@PATHS
def test_select_forced_cells_come_first_and_hidden_never(use_ref):
    scores = np.array([-np.inf, 9, np.inf, 8, -np.inf, np.inf, 7, np.inf], np.float32)
    assert run_select(scores, 3, use_ref).tolist() == [2, 5, 7]
    assert run_select(scores, 5, use_ref).tolist() == [1, 2, 3, 5, 7]
    assert run_select(scores, 8, use_ref).tolist() == [1, 2, 3, 5, 6, 7]
    assert run_select(np.full(5, -np.inf, np.float32), 3, use_ref).tolist() == []
    assert run_select(np.full(5, np.inf, np.float32), 3, use_ref).tolist() == [0, 1, 2]


@PATHS
@pytest.mark.parametrize("best", [1.0, np.inf])
def test_select_of_as_many_high_scores_as_the_budget(best, use_ref):
    """Those next to each other, and the rest far below: what a bound on the budget-th score leaves is just the budget."""
    for width in (1, 4, 8, 16):  # of a vector
        scores = np.full((2, 64 // width, 4, width), 0.001, np.float32)
        scores[0, :, 0] = best
        expected = np.flatnonzero(scores == best)
        assert np.array_equal(run_select(scores.reshape(-1), 64, use_ref), expected), f"width {width}"


@PATHS
def test_select_tells_zeros_and_tiny_scores_apart(rng, use_ref):
    """Softmax scores span many decades, down to denormals and zero."""
    scores = np.zeros(600, np.float32)
    scores[rng.permutation(600)[:40]] = np.float32(1e-42) * rng.integers(1, 1000, 40).astype(np.float32)
    for budget in (1, 20, 40, 41, 100, 599):
        assert np.array_equal(run_select(scores, budget, use_ref), oracle.select(scores, budget))


@PATHS
def test_no_cells_at_all(use_ref):
    """n_kv = 0: nothing is scored, nothing is selected."""
    nothing = np.zeros(0, np.float32)
    assert len(run_tip(np.ones((3, 8), np.float32), np.zeros((0, 8, TILE), np.float16), nothing, use_ref)) == 0
    assert len(run_select(nothing, 5, use_ref)) == 0


@PATHS
def test_select_random_shapes(rng, use_ref):
    for _ in range(60):
        n_kv, budget, levels = int(rng.integers(1, 6000)), int(rng.integers(1, 700)), int(rng.integers(1, 3000))
        scores = np.exp(-rng.integers(0, levels, n_kv) / 50).astype(np.float32)
        scores[rng.random(n_kv) < rng.random()] = -np.inf
        actual = run_select(scores, budget, use_ref)
        assert np.array_equal(actual, oracle.select(scores, budget)), f"n_kv {n_kv}, budget {budget}, levels {levels}"


# fac


@PATHS
@pytest.mark.parametrize("n_group", shapes.GROUPS)
@pytest.mark.parametrize("d", shapes.HEAD_SIZES)
def test_fac(rng, d, n_group, use_ref):
    n_kv, n_head_kv = 600, 2
    for n_cells in (1, 2, 31, 32, 33, 63, 257, n_kv):
        d_v = int(rng.choice([d, d, 32, 64, 72, 128]))
        q = shapes.f32(rng, n_group, d)
        k, v = shapes.f16(rng, n_kv, n_head_kv, d), shapes.f16(rng, n_kv, n_head_kv, d_v)
        cells = np.sort(rng.permutation(n_kv)[:n_cells]).astype(np.int32)
        left_out = np.setdiff1d(np.arange(n_kv), cells)
        k[left_out], v[left_out] = np.nan, np.nan  # stale rows are not read
        sinks = shapes.f32(rng, n_group) if rng.random() < 0.5 else None
        softcap = float(rng.choice([0.0, 0.0, 5.0, 30.0]))
        scale = float(rng.choice([d**-0.5, 1.0, 0.01]))
        actual = run_fac(q, k, v, cells, scale, softcap, sinks, use_ref, out_stride=d_v + 8)
        expected = oracle.fac(q, k[:, 0], v[:, 0], cells, scale, softcap, sinks)
        assert tolerances.nmse(actual, expected) <= tolerances.FAC_NMSE, f"cells {n_cells}, d_v {d_v}, cap {softcap}"


@PATHS
@pytest.mark.parametrize("type_v", shapes.CACHE_TYPES)
@pytest.mark.parametrize("type_k", shapes.CACHE_TYPES)
def test_fac_of_every_cache_type(rng, type_k, type_v, use_ref):
    n_kv, d = 200, int(rng.choice([32, 64, 96, 128]))
    q, k, v = shapes.f32(rng, 4, d), shapes.f32(rng, n_kv, 2, d), shapes.f32(rng, n_kv, 2, d)
    for n_cells in (1, 63, 64, 65, 150):
        cells = np.sort(rng.permutation(n_kv)[:n_cells]).astype(np.int32)
        actual = run_fac(q, k, v, cells, d**-0.5, 0.0, None, use_ref, type_k=type_k, type_v=type_v)
        (_, k_values), (_, v_values) = shapes.stored(k, type_k), shapes.stored(v, type_v)
        expected = oracle.fac(q, k_values[:, 0], v_values[:, 0], cells, d**-0.5)
        assert tolerances.nmse(actual, expected) <= tolerances.FAC_NMSE, f"cells {n_cells}, d {d}"


@PATHS
@pytest.mark.parametrize("d", [*range(1, 12), 33, 40, 72, 112, 192, 200, 576])
def test_fac_every_head_size(rng, d, use_ref):
    """Head sizes that no vector width divides, too."""
    q, cells = shapes.f32(rng, 3, d), np.arange(0, 90, 2, dtype=np.int32)
    k, v = shapes.f16(rng, 90, 1, d), shapes.f16(rng, 90, 1, d)
    actual = run_fac(q, k, v, cells, d**-0.5, 0.0, None, use_ref)
    assert tolerances.nmse(actual, oracle.fac(q, k[:, 0], v[:, 0], cells, d**-0.5)) <= tolerances.FAC_NMSE


@PATHS
def test_fac_without_cells_is_zero(rng, use_ref):
    """Attention sinks alone give zeros, too."""
    q, k, v = shapes.f32(rng, 3, 64), shapes.f16(rng, 8, 1, 64), shapes.f16(rng, 8, 1, 64)
    for sinks in (None, shapes.f32(rng, 3)):
        assert (run_fac(q, k, v, np.zeros(0, np.int32), 1.0, 0.0, sinks, use_ref) == 0).all()


@PATHS
def test_fac_keeps_accuracy_over_many_cells(rng, use_ref):
    """Values of one sign over thousands of cells: f16 accumulation would lose them."""
    q, k = shapes.f32(rng, 4, 64) * np.float32(0.05), shapes.f16(rng, 5000, 1, 64)
    v = np.abs(shapes.f16(rng, 5000, 1, 64)) + np.float16(1)
    cells = np.arange(5000, dtype=np.int32)
    actual = run_fac(q, k, v, cells, 0.125, 0.0, None, use_ref)
    assert np.allclose(actual, oracle.fac(q, k[:, 0], v[:, 0], cells, 0.125), rtol=2e-5)


@PATHS
def test_fac_survives_large_logits(rng, use_ref):
    """Logits of thousands, and a sink larger than any of them."""
    q, k, v = shapes.f32(rng, 3, 64) * 100, shapes.f16(rng, 200, 1, 64), shapes.f16(rng, 200, 1, 64)
    cells = np.arange(200, dtype=np.int32)
    for sinks in (None, np.array([1e4, 0, -1e4], np.float32)):
        expected = oracle.fac(q, k[:, 0], v[:, 0], cells, 1.0, 0.0, sinks)
        # logits of 1e3 are off by 1e3 * eps32 * sqrt(64) = 5e-4, and so are the weights, relatively
        assert np.allclose(run_fac(q, k, v, cells, 1.0, 0.0, sinks, use_ref), expected, atol=5e-3)
