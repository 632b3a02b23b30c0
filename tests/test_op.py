"""GGML_OP_FASA_ATTN through ggml graphs on the CPU backend: index_write and attn, against the NumPy oracle."""

import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from oracle import fasa_oracle as oracle
from support import shapes, tolerances
from support.native import ROOT, Graph, ggml

TILE = oracle.TILE


@dataclasses.dataclass
class Case:
    """Inputs of the op in C order; letters as in ggml-fasa.h. K and V hold values, which a cache of their type keeps."""

    q: np.ndarray  # f32 [S, H, T, D], before rotation
    k: np.ndarray  # [S, n_cells, G, D], the cache, rotated if hadamard is not 0
    v: np.ndarray  # [S, n_cells, G, DV], the cache
    mask: np.ndarray  # [S, T, N]
    dims: np.ndarray  # i32 [G, J]
    budget: int
    scale: float
    softcap: float = 0.0
    sinks: np.ndarray = None
    index_type: str = "f16"
    type_k: str = "f16"
    type_v: str = "f16"
    hadamard: int = 0

    @property
    def written(self):
        """Global ids of the cells that hold a token, in the order in which they are written."""
        return np.random.default_rng(self.k.size).permutation(self.k.shape[0] * self.k.shape[1])

    @property
    def rotated_q(self):
        return oracle.unrotate(self.q, self.hadamard).astype(np.float32)  # its own inverse

    def seen(self):
        """K and V as the cache keeps them, [S, G, N, D]."""
        n_kv = self.mask.shape[2]
        kept = (shapes.stored(self.k, self.type_k)[1], shapes.stored(self.v, self.type_v)[1])
        return [cache[:, :n_kv].swapaxes(1, 2) for cache in kept]

    def index(self):
        s, n_cells, g, _ = self.k.shape
        index = oracle.new_index(s, g, n_cells, self.dims.shape[1], self.index_type)
        k = shapes.stored(self.k, self.type_k)[1]
        return oracle.index_cache(k, self.written, index, self.dims, self.index_type, self.hadamard)

    def expected(self):
        """The oracle's (output [S, T, H, DV], margins [S, T, G])."""
        return oracle.attn(
            self.rotated_q, *self.seen(), self.mask, self.index(), self.dims, self.scale, self.budget, self.softcap,
            self.sinks, self.index_type, self.hadamard,
        )  # fmt: skip


def make_case(rng, group, n_head_kv, d, n_dim, n_kv, budget, n_stream=1, n_row=1, d_v=None, mask_type=np.float16, **kw):
    """A random case whose cache has more cells than the graph sees, and whose selections are clear-cut."""
    d_v = d_v or d
    n_cells = shapes.pad(n_kv) + 2 * TILE
    mask = np.stack([shapes.mask(rng, n_kv, mask_type, 0.3, 0.5 * budget / n_kv) for _ in range(n_stream * n_row)])
    for row in mask:  # forced cells must fit the budget
        forced = np.flatnonzero(oracle.visibility(row)[1])
        row[forced[budget:]] = 0.0
    hadamard = kw.get("hadamard", 0)
    case = Case(
        q=shapes.f32(rng, n_stream, n_head_kv * group, n_row, d),
        k=(shapes.exact_k if hadamard else shapes.f16)(rng, n_stream, n_cells, n_head_kv, d),
        v=shapes.f16(rng, n_stream, n_cells, n_head_kv, d_v),
        mask=mask.reshape(n_stream, n_row, n_kv),
        dims=shapes.dims(rng, n_head_kv, n_dim, d),
        budget=budget,
        scale=float(np.float32(d**-0.5)),
        **kw,
    )
    while case.expected()[1].min() < tolerances.MARGIN:
        case.q[...] = shapes.f32(rng, *case.q.shape)
    return case


def run(case, n_threads=2, use_ref=False, permuted_q=True, dense=False):
    """The op's output [S, T, H, DV]: index_write into an empty index, then attn, in one graph; or dense."""
    n_stream, n_cells, n_head_kv, d = case.k.shape
    d_v, n_kv = case.v.shape[3], case.mask.shape[2]
    n_head, n_row = case.q.shape[1:3]
    size = sum(a.nbytes for a in (case.q, case.mask)) * 2 + (case.k.size + case.v.size) * 6 + n_stream * n_row * n_head * d_v * 4
    with Graph(size) as g:
        k_cache = g.cache(case.k.reshape(1, n_stream, n_cells, n_head_kv * d), case.type_k)
        v_cache = g.cache(case.v.reshape(1, n_stream, n_cells, n_head_kv * d_v), case.type_v)
        if permuted_q:  # as llama.cpp has it: heads of a token side by side
            q = g.lib.ggml_permute(g.ctx, g.tensor(np.ascontiguousarray(case.rotated_q.swapaxes(1, 2))), 0, 2, 1, 3)
        else:
            q = g.tensor(case.rotated_q)
        inputs = (
            q, g.heads(k_cache, case.type_k, case.k.shape, n_kv), g.heads(v_cache, case.type_v, case.v.shape, n_kv),
            g.tensor(case.mask[:, None]), g.ffi.NULL if case.sinks is None else g.tensor(case.sinks),
        )  # fmt: skip
        if dense:
            out = g.lib.ggml_fasa_dense(g.ctx, *inputs, case.scale, case.softcap)
        else:
            index_type = oracle.INDEX_TYPES.index(case.index_type)
            dims = g.tensor(case.dims)
            empty = g.lib.ggml_fasa_new_index(g.ctx, index_type, case.dims.shape[1], n_cells, n_head_kv, n_stream)
            g.array(empty, np.uint8, (g.lib.ggml_nbytes(empty),))[:] = 0xFF  # NaN
            cells = g.tensor(case.written.astype(np.int64))
            index = g.lib.ggml_fasa_index_write(g.ctx, k_cache, cells, empty, dims, index_type, case.hadamard)
            out = g.lib.ggml_fasa_attn(
                g.ctx, *inputs, index, dims, case.scale, case.softcap, case.budget, index_type, case.hadamard
            )
        result = g.array(out, np.float32, (n_stream, n_row, n_head, d_v))
        result[...] = np.nan
        g.compute(out, n_threads=n_threads, use_ref=use_ref)
        return result.copy()


def check(actual, case):
    """Compares an output with the oracle's."""
    expected, _ = case.expected()
    error = tolerances.nmse(actual, expected)
    assert error <= tolerances.OP_NMSE, f"NMSE {error:.2e}"


def check_dense(actual, case):
    expected = oracle.dense(case.rotated_q, *case.seen(), case.mask, case.scale, case.softcap, case.sinks)
    error = tolerances.nmse(actual, expected)
    assert error <= tolerances.OP_NMSE, f"NMSE {error:.2e}"


REF = pytest.mark.parametrize("use_ref", [True, False], ids=["ref", "fast"])
INDEX_TYPES = pytest.mark.parametrize("index_type", oracle.INDEX_TYPES)


@REF
@INDEX_TYPES
@pytest.mark.parametrize("group", shapes.GROUPS)
@pytest.mark.parametrize("d", shapes.HEAD_SIZES)
def test_attn(rng, group, d, index_type, use_ref):
    case = make_case(rng, group, 2, d, n_dim=min(16, d), n_kv=517, budget=64, n_row=2, index_type=index_type)
    check(run(case, use_ref=use_ref), case)


@REF
@pytest.mark.parametrize("n_kv", [1, 31, 32, 63, 64, 65, 256, 1000, 4096, 4099])
def test_attn_every_length(rng, n_kv, use_ref):
    case = make_case(rng, 3, 2, 64, 12, n_kv, budget=64, mask_type=np.float32)
    check(run(case, use_ref=use_ref), case)


@REF
@INDEX_TYPES
@pytest.mark.parametrize("hadamard", [0, 64])
@pytest.mark.parametrize("type_k", shapes.CACHE_TYPES)
def test_attn_of_every_cache_type(rng, type_k, hadamard, index_type, use_ref):
    kw = dict(type_k=type_k, type_v=str(rng.choice(shapes.CACHE_TYPES)), hadamard=hadamard, index_type=index_type)
    case = make_case(rng, 3, 2, 128, 16, 300, 48, n_row=2, **kw)
    check(run(case, use_ref=use_ref), case)
    check_dense(run(case, use_ref=use_ref, dense=True), case)


@REF
@pytest.mark.parametrize("group", shapes.GROUPS)
@pytest.mark.parametrize("d", shapes.HEAD_SIZES)
def test_dense(rng, group, d, use_ref):
    case = make_case(rng, group, 2, d, n_dim=2, n_kv=517, budget=64, n_row=2, d_v=int(rng.choice([d, 64, 80])))
    check_dense(run(case, use_ref=use_ref, dense=True), case)


@REF
@pytest.mark.parametrize("n_kv", [1, 31, 64, 65, 255, 256, 257, 1000, 4099])
def test_dense_every_length(rng, n_kv, use_ref):
    kw = dict(softcap=float(rng.choice([0.0, 5.0])), sinks=shapes.f32(rng, 6), mask_type=np.float32)
    case = make_case(rng, 3, 2, 64, 2, n_kv, budget=64, **kw)
    for n_threads in (1, 2, 5):
        check_dense(run(case, n_threads, use_ref, dense=True), case)


@REF
def test_dense_of_growing_logits(rng, use_ref):
    """Each cell outweighs all before it: what was summed is brought down again and again."""
    case = make_case(rng, 3, 1, 64, 2, 600, 64)
    case.mask[...] = shapes.mask(rng, 600, np.float16)
    case.q[...] = 1
    case.k[...] = (np.arange(case.k.shape[1]) / 16)[None, :, None, None]
    check_dense(run(case, use_ref=use_ref, dense=True), case)


@REF
@pytest.mark.parametrize("permuted_q", [True, False], ids=["permuted", "contiguous"])
@pytest.mark.parametrize("n_stream, n_row", [(1, 5), (2, 1), (2, 4), (3, 17)])
def test_attn_streams_and_rows(rng, n_stream, n_row, permuted_q, use_ref):
    case = make_case(rng, 4, 2, 64, 16, 300, 48, n_stream, n_row)
    check(run(case, use_ref=use_ref, permuted_q=permuted_q), case)
    check_dense(run(case, use_ref=use_ref, permuted_q=permuted_q, dense=True), case)


@REF
@pytest.mark.parametrize("d, d_v", [(64, 128), (128, 64), (96, 80), (192, 128)])
def test_attn_value_size_of_its_own(rng, d, d_v, use_ref):
    case = make_case(rng, 3, 2, d, 16, 300, 48, n_row=3, d_v=d_v)
    check(run(case, use_ref=use_ref), case)


@REF
@pytest.mark.parametrize("softcap, with_sinks", [(0.0, True), (2.0, False), (20.0, True)])
def test_attn_softcap_and_sinks(rng, softcap, with_sinks, use_ref):
    sinks = shapes.f32(rng, 8) * 3 if with_sinks else None
    case = make_case(rng, 4, 2, 64, 16, 300, 48, n_row=3, softcap=softcap, sinks=sinks)
    check(run(case, use_ref=use_ref), case)


def test_attn_random_shapes(rng):
    for _ in range(25):
        d, group, n_kv = int(rng.choice(shapes.HEAD_SIZES)), int(rng.choice(shapes.GROUPS)), int(rng.integers(1, 2500))
        shape = dict(n_dim=2 * int(rng.integers(1, 17)), n_kv=n_kv, budget=int(rng.integers(8, 300)))
        shape.update(n_stream=int(rng.integers(1, 3)), n_row=int(rng.integers(1, 5)))
        shape.update(mask_type=rng.choice([np.float16, np.float32]), index_type=str(rng.choice(oracle.INDEX_TYPES)))
        case = make_case(rng, group, int(rng.integers(1, 5)), d, **shape)
        n_threads = int(rng.integers(1, 6))
        try:
            check(run(case, n_threads), case)
        except AssertionError as error:
            raise AssertionError(f"{error} at d {d}, group {group}, threads {n_threads}, {shape}") from error


@INDEX_TYPES
@pytest.mark.parametrize("dense", [False, True], ids=["attn", "dense"])
@pytest.mark.parametrize("n_row, n_head_kv", [(1, 1), (1, 3), (9, 3)])
def test_number_of_threads(rng, n_row, n_head_kv, dense, index_type):
    """Work is cut the same way for any number of threads: the same bits come out."""
    case = make_case(rng, 3, n_head_kv, 64, 16, 1500, 64, n_row=n_row, index_type=index_type)
    one = run(case, n_threads=1, dense=dense)
    (check_dense if dense else check)(one, case)
    for n_threads in (2, 3, 5):
        assert np.array_equal(run(case, n_threads, dense=dense), one), f"{n_threads} threads"


def test_fewer_threads_than_asked_for():
    """OpenMP may start fewer threads than a graph was planned for. Four have heads of their own; three would share rows."""
    code = (
        "import numpy as np, test_op as t; case = t.make_case(np.random.default_rng(0), 1, 16, 64, 16, 6000, 64);"
        "t.check(t.run(case, n_threads=4), case); t.check_dense(t.run(case, n_threads=4, dense=True), case)"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path, "OMP_THREAD_LIMIT": "3"})


@REF
@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("group", [1, 3])
def test_attn_ties_go_to_the_lower_cell(rng, group, n_threads, use_ref):
    """Scores on a coarse grid tie by the dozen; the heads of a group look alike, so that their sums tie, too."""
    case = make_case(rng, group, 2, 32, 4, 1000, 50)
    case.scale = 0.25  # products and sums are exact
    for g, head_dims in enumerate(case.dims):
        case.k[:, :, g, head_dims] = rng.integers(-2, 3, (*case.k.shape[:2], len(head_dims)))
        case.q[:, g * group : (g + 1) * group, :, head_dims] = rng.integers(-2, 3, len(head_dims)) / 2
    check(run(case, n_threads, use_ref), case)


@REF
def test_attn_of_equal_keys_keeps_the_lowest_cells(rng, use_ref):
    """All cells tie: the first `budget` visible ones are kept, and their mean is the output."""
    case = make_case(rng, 4, 2, 64, 16, 700, 32)
    case.k[...] = case.k[:, :1]
    case.mask[...] = shapes.mask(rng, 700, np.float16, 0.3, 0.0)
    kept = np.flatnonzero(case.mask[0, 0] == 0)[:32]
    mean = case.v[0, kept].astype(np.float64).mean(axis=0)  # [G, DV]
    for n_threads in (1, 2, 3):
        actual = run(case, n_threads, use_ref)
        assert tolerances.nmse(actual[0, 0], np.repeat(mean, 4, axis=0)) <= tolerances.OP_NMSE


@REF
@pytest.mark.parametrize("budget", [300, 301, 10**6])
def test_attn_budget_of_all_is_dense(rng, budget, use_ref):
    """With budget >= n_kv the op is plain softmax attention, whatever the dims say."""
    case = make_case(rng, 3, 2, 64, 16, 300, 48, n_row=3)
    case.budget = budget
    k, v = (c[0, :300].astype(np.float64).repeat(3, axis=1) for c in (case.k, case.v))
    logits = np.einsum("htd,nhd->htn", case.q[0].astype(np.float64), k) * case.scale + case.mask[0].astype(np.float64)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    dense = np.einsum("htn,nhd->thd", p / p.sum(axis=-1, keepdims=True), v)
    for n_threads in (1, 3):
        assert tolerances.nmse(run(case, n_threads, use_ref)[0], dense) <= tolerances.OP_NMSE


@REF
@pytest.mark.parametrize("dense", [False, True], ids=["attn", "dense"])
def test_hidden_cells_are_ignored(rng, dense, use_ref):
    """Hidden cells may hold NaN in K, V and index; a row that sees nothing yields zeros."""
    case = make_case(rng, 3, 2, 64, 16, 400, 48, n_row=3)
    case.mask[...] = case.mask[:, :1]  # all rows see the same cells
    hidden = np.append(np.flatnonzero(np.isinf(case.mask[0, 0])), np.arange(400, case.k.shape[1]))
    clean = {n: run(case, n, use_ref, dense=dense) for n in (1, 2)}
    (check_dense if dense else check)(clean[1], case)
    case.k[:, hidden], case.v[:, hidden] = np.nan, np.nan
    for n in (1, 2):
        assert np.array_equal(run(case, n, use_ref, dense=dense), clean[n])
    case.mask[0, 1] = -np.inf
    for n in (1, 2):
        actual = run(case, n, use_ref, dense=dense)
        assert (actual[0, 1] == 0).all() and np.array_equal(actual[0, [0, 2]], clean[n][0, [0, 2]])


@REF
def test_attn_keeps_forced_cells(rng, use_ref):
    """A forced cell is kept though every other cell scores higher; take its sign away and it is dropped."""
    case = make_case(rng, 2, 1, 32, 8, 500, 16)
    case.mask[...] = 0.0
    case.q[:, 1] = case.q[:, 0]
    case.k[0, 123, 0, case.dims[0]] = -8 * np.sign(case.q[0, 0, 0, case.dims[0]])
    case.v[...] = 0
    case.v[0, 123] = 1  # the output shows whether cell 123 is read
    case.k[0, 123, 0, np.setdiff1d(np.arange(32), case.dims[0])] = 0
    case.scale = 0.01
    assert (run(case, use_ref=use_ref) == 0).all()
    case.mask[0, 0, 123] = -0.0
    assert (run(case, use_ref=use_ref) > 1e-3).all()
    check(run(case, use_ref=use_ref), case)


@INDEX_TYPES
@pytest.mark.parametrize("n_threads", [1, 3])
def test_index_write_overwrites(rng, n_threads, index_type):
    """Cells in any order, some of them twice over time; cells not named keep what they had."""
    n_stream, n_cells, n_head_kv, d, n_dim = 2, 4 * TILE, 3, 64, 10
    dims = shapes.dims(rng, n_head_kv, n_dim, d)
    index = oracle.new_index(n_stream, n_head_kv, n_cells, n_dim, index_type)
    type_id = oracle.INDEX_TYPES.index(index_type)
    with Graph(4 << 20) as g:
        tensor = g.lib.ggml_fasa_new_index(g.ctx, type_id, n_dim, n_cells, n_head_kv, n_stream)
        data = g.array(tensor, np.uint8, index.view(np.uint8).shape)
        data[...] = index.view(np.uint8)[...] = rng.integers(0, 256, data.shape)
        for _ in range(3):
            k = shapes.f16(rng, n_stream, n_cells, n_head_kv, d)
            cells = rng.permutation(n_stream * n_cells)[: int(rng.integers(1, 100))]
            k_cache = g.tensor(k.reshape(1, n_stream, n_cells, -1))
            ids = g.tensor(cells.astype(np.int64))
            out = g.lib.ggml_fasa_index_write(g.ctx, k_cache, ids, tensor, g.tensor(dims), type_id, 0)
            g.compute(out, n_threads=n_threads)
            index = oracle.index_cache(k, cells, index, dims, index_type)
            assert np.array_equal(data, index.view(np.uint8))


def test_counters_show_that_the_op_ran(rng):
    _, lib = ggml()
    counters = (lib.ggml_fasa_cpu_n_attn, lib.ggml_fasa_cpu_n_index_write, lib.ggml_fasa_cpu_n_dense)
    before = [count() for count in counters]
    case = make_case(rng, 1, 1, 32, 4, 64, 16)
    run(case, n_threads=2)
    assert [count() for count in counters] == [before[0] + 1, before[1] + 1, before[2]]
    run(case, n_threads=2, dense=True)
    assert [count() for count in counters] == [before[0] + 1, before[1] + 1, before[2] + 1]


def test_backend_ops_of_upstream():
    """Upstream's harness runs our cases: the fast path against the reference, with guards around every tensor."""
    built = sorted(ROOT.glob("build/*/bin/test-backend-ops"), key=lambda path: path.stat().st_mtime)
    program = os.environ.get("FASA_TEST_BACKEND_OPS") or (built[-1] if built else None)
    if not program:
        pytest.skip("no test-backend-ops: build with FASA_BUILD_TESTS, or name one by FASA_TEST_BACKEND_OPS")
    done = subprocess.run([program, "-b", "CPU", "-o", "FASA_ATTN"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+)/(\d+) tests passed", done.stdout)
    assert passed and int(passed[1]) == int(passed[2]) > 100


@pytest.mark.parametrize(
    "n_kv, staging_mib, expected",
    [
        (8192, 32, 8),  # K and V take 32 MiB: all heads
        (8192, 31, 2),  # staging does not hold them: a quarter of the heads, twice
        (8192, 15, 1),
        (8224, 512, 2),  # beyond 32 MiB a quarter, however large staging is
        (65536, 128, 2),
        (65536, 127, 1),
    ],
)
def test_heads_staged_at_a_time(n_kv, staging_mib, expected):
    ffi, lib = ggml()
    ctx = lib.ggml_init({"mem_size": 1 << 20, "mem_buffer": ffi.NULL, "no_alloc": True})
    try:
        f32, f16, i8 = 0, 1, 24
        q = lib.ggml_new_tensor_4d(ctx, f32, 128, 4, 32, 1)
        k, v = (
            lib.ggml_permute(ctx, lib.ggml_new_tensor_4d(ctx, f16, 128, 8, n_kv, 1), 0, 2, 1, 3) for _ in range(2)
        )
        mask = lib.ggml_new_tensor_4d(ctx, f16, n_kv, 4, 1, 1)
        staging = lib.ggml_new_tensor_4d(ctx, i8, staging_mib << 20, 1, 1, 1)
        op = lib.ggml_fasa_staged(ctx, q, k, v, mask, ffi.NULL, staging, 1.0, 0.0)
        assert lib.ggml_fasa_staged_heads(op) == expected
    finally:
        lib.ggml_free(ctx)
