"""Time of each stage and of the whole attention op for one decode step on the CPU, against upstream's flash attention.

Whole ops (flash_attn, dense, fasa, index_write) run as ggml graphs with a node for each of several copies of K, V and
index, as a model has layers. The stages inside the op (tip, select, fac) are called one KV head at a time from as many
threads; each call costs some 2 us from Python, which short contexts show. Everything takes turns in rounds, on other
copies each time, so many that caches do not hold them. Prints one JSON line per measurement and a table of medians.

bytes are those of K, V, index or scores that a step has to read. The share is of the bandwidth at which the same
threads read K, which takes turns with the stages: medians both. (Smallest and largest, and the bandwidth of a copy,
bytes read and written, are in the rows too.)
"""

import argparse
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the threads are ours

import cffi  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from gen_cdef import INCLUDE, declarations  # noqa: E402
from machine import emit, row  # noqa: E402

GGML_CDEF = """
typedef uint16_t ggml_fp16_t;
struct ggml_context;
struct ggml_cgraph;
struct ggml_tensor;
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
struct ggml_context * ggml_init(struct ggml_init_params params);
void ggml_free(struct ggml_context * ctx);
struct ggml_tensor * ggml_new_tensor_4d(struct ggml_context *, int type, int64_t, int64_t, int64_t, int64_t);
struct ggml_tensor * ggml_view_4d(struct ggml_context *, struct ggml_tensor *, int64_t, int64_t, int64_t, int64_t,
                                  size_t, size_t, size_t, size_t);
struct ggml_tensor * ggml_flash_attn_ext(struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *,
                                         struct ggml_tensor *, struct ggml_tensor *, float, float, float);
void * ggml_get_data(const struct ggml_tensor *);
size_t ggml_nbytes(const struct ggml_tensor *);
struct ggml_cgraph * ggml_new_graph_custom(struct ggml_context *, size_t size, bool grads);
void ggml_build_forward_expand(struct ggml_cgraph *, struct ggml_tensor *);
void * ggml_backend_cpu_init(void);
void ggml_backend_cpu_set_n_threads(void * backend, int n_threads);
int ggml_backend_graph_compute(void * backend, struct ggml_cgraph *);
"""
F32, F16, I32, I64 = 0, 1, 26, 27
INDEX_TYPES = ("f16", "q8", "q4")
N_SINK, N_RECENT = 4, 32
COLD_BYTES = 256 << 20  # of index, read before a copy comes round again
LAYERS = 32  # copies that a measurement goes through, if there are as many
LINE = 64  # bytes of a cache line
IDLE = 0.05  # seconds after which OpenMP's threads, which keep waiting for a next graph, have left the CPUs to others
MARGIN = 16 << 20  # of a ggml context: what is there once, alignment
NODE_BYTES = 4096  # of a ggml context, per node: its views and headers


class Library:
    """The patched libggml-base and libggml-cpu."""

    def __init__(self):
        try:
            from fasa import _native  # not needed by who only wants the table
        except ImportError as err:
            raise SystemExit(f"error: {err}; install the package (pip install .)") from err
        headers = [declarations((INCLUDE / name).read_text()) for name in ("ggml-fasa.h", "ggml-fasa-cpu.h")]
        self.ffi = cffi.FFI()
        self.ffi.cdef(GGML_CDEF + "".join(headers))
        paths = [_native.lib_path(name) for name in ("ggml-base", "ggml-cpu")]
        try:
            self.libraries = [self.ffi.dlopen(str(p), self.ffi.RTLD_GLOBAL | self.ffi.RTLD_NOW) for p in paths]
        except OSError as err:
            raise SystemExit(f"error: {err}; install the package or set LLAMA_CPP_LIB_PATH") from err

    def __getattr__(self, name):
        base, cpu = self.libraries
        return getattr(cpu, name) if hasattr(cpu, name) else getattr(base, name)


class Step:
    """Copies of what one layer's attention of one decode step needs, in one ggml context; and graphs over them."""

    def __init__(self, lib, args, d, n_kv):
        self.lib, self.args, self.d, self.n_kv = lib, args, d, n_kv
        self.G, self.R, self.J = args.n_head_kv, args.n_head // args.n_head_kv, 2 * args.n_tip
        self.n_index_types = [INDEX_TYPES.index(t) for t in args.index_type]
        self.kv_bytes = 2 * 2 * d * self.G * n_kv
        self.index_bytes = {t: lib.ggml_fasa_tile_size(t, self.J) * n_kv // 32 * self.G for t in self.n_index_types}
        copy = self.kv_bytes + sum(self.index_bytes.values())
        wanted = -(-COLD_BYTES // min(self.index_bytes.values()))
        self.n_copy = max(2, min(wanted, int(args.memory * 2**30) // copy))
        self.n_copy -= self.n_copy % LAYERS if self.n_copy > LAYERS else 0
        n_node = 2 + len(args.index_type) * (2 + len(args.budget))  # of a copy
        size = self.n_copy * (copy + n_node * (4 * d * args.n_head + NODE_BYTES)) + 4 * self.kv_bytes // d + MARGIN
        self.layers = [range(i, min(i + LAYERS, self.n_copy)) for i in range(0, self.n_copy, LAYERS)]
        self.ctx = lib.ggml_init({"mem_size": size, "mem_buffer": lib.ffi.NULL, "no_alloc": False})
        if self.ctx == lib.ffi.NULL:
            raise SystemExit(f"error: no memory for {size >> 20} MiB; give less by --memory")
        self._fill()

    def close(self):
        self.lib.ggml_free(self.ctx)

    def _tensor(self, kind, *ne):
        self._align()
        return self.lib.ggml_new_tensor_4d(self.ctx, kind, *ne, *[1] * (4 - len(ne)))

    def _align(self):
        """Makes the data of the context's next tensor begin at a cache line, as in a KV cache."""

        def end(size):  # of a new tensor of so many bytes
            tensor = self.lib.ggml_new_tensor_4d(self.ctx, I32, size // 4, 1, 1, 1)
            return int(self.lib.ffi.cast("uintptr_t", self.lib.ggml_get_data(tensor))) + size

        first = end(LINE)
        second = end(LINE)
        head = second - first - LINE  # of a tensor, before its data
        end(LINE + -(second + 2 * head) % LINE)

    def data(self, tensor, dtype):
        n = self.lib.ggml_nbytes(tensor)
        return np.frombuffer(self.lib.ffi.buffer(self.lib.ggml_get_data(tensor), n), dtype)

    def _fill(self):
        rng = np.random.default_rng(self.args.seed)
        d, n_kv, G = self.d, self.n_kv, self.G
        self.q = self._tensor(F32, d, 1, G * self.R)
        self.data(self.q, np.float32)[:] = rng.standard_normal(d * G * self.R, np.float32)
        self.mask = self._tensor(F16, n_kv)
        forced = self.data(self.mask, np.float16)
        forced[:] = 0
        forced[:N_SINK] = forced[-N_RECENT:] = -0.0
        self.dims = self._tensor(I32, self.J, G)
        # planes of norm rope
        planes = [np.sort(rng.permutation(d // 2)[: self.args.n_tip]) for _ in range(G)]
        self.data(self.dims, np.int32)[:] = np.ravel([[(2 * i, 2 * i + 1) for i in head] for head in planes])
        self.cell = self._tensor(I64, 1)
        self.data(self.cell, np.int64)[:] = n_kv - 1
        self.k = [self._tensor(F16, d * G, n_kv) for _ in range(self.n_copy)]
        self.v = [self._tensor(F16, d * G, n_kv) for _ in range(self.n_copy)]
        some = rng.standard_normal(max(1 << 20, d * G + 1), np.float32).astype(np.float16)
        for tensor in self.k + self.v:
            values, at = self.data(tensor, np.float16), int(rng.integers(some.size))
            values[: some.size] = np.roll(some, at)[: values.size]
            for i in range(some.size, values.size, some.size):  # from itself: fast
                values[i : i + some.size] = values[: min(some.size, values.size - i)]
        self.index = {
            t: [self._index(t) for _ in range(self.n_copy)]
            for t in self.n_index_types
        }
        all_cells = self._tensor(I64, n_kv)
        self.data(all_cells, np.int64)[:] = np.arange(n_kv)
        for t in self.n_index_types:
            for copies in self.layers:
                self.run(self.graph(copies, lambda c, t=t: [self.write(c, t, all_cells)]), os.cpu_count())

    def _index(self, index_type):
        self._align()
        return self.lib.ggml_fasa_new_index(self.ctx, index_type, self.J, self.n_kv, self.G, 1)

    def graph(self, copies, nodes):
        """A graph of the nodes nodes(copy) of some copies."""
        graph = self.lib.ggml_new_graph_custom(self.ctx, 16 * len(copies), False)
        for copy in copies:
            for node in nodes(copy):
                self.lib.ggml_build_forward_expand(graph, node)
        return graph

    def run(self, graph, n_threads):
        backend = _backend(self.lib)
        self.lib.ggml_backend_cpu_set_n_threads(backend, n_threads)
        if self.lib.ggml_backend_graph_compute(backend, graph) != 0:
            raise SystemExit("error: the graph did not run")

    def rows(self, cache):
        """K or V as the op takes it: [D, N, G]."""
        row_bytes = 2 * self.d * self.G
        return self.lib.ggml_view_4d(
            self.ctx, cache, self.d, self.n_kv, self.G, 1, row_bytes, 2 * self.d, row_bytes * self.n_kv, 0
        )

    def write(self, copy, index_type, cells):
        return self.lib.ggml_fasa_index_write(
            self.ctx, self.k[copy], cells, self.index[index_type][copy], self.dims, index_type, 0
        )

    def flash_attn(self, c):
        return [
            self.lib.ggml_flash_attn_ext(
                self.ctx, self.q, self.rows(self.k[c]), self.rows(self.v[c]), self.mask, self.d**-0.5, 0.0, 0.0
            )
        ]

    def dense(self, c):
        return [
            self.lib.ggml_fasa_dense(
                self.ctx,
                self.q,
                self.rows(self.k[c]),
                self.rows(self.v[c]),
                self.mask,
                self.lib.ffi.NULL,
                self.d**-0.5,
                0.0,
            )
        ]

    def index_write(self, c, index_type):
        return [self.write(c, index_type, self.cell)]

    def fasa(self, c, index_type, budget):
        index = self.write(c, index_type, self.cell)
        return [
            index,
            self.lib.ggml_fasa_attn(
                self.ctx,
                self.q,
                self.rows(self.k[c]),
                self.rows(self.v[c]),
                self.mask,
                self.lib.ffi.NULL,
                index,
                self.dims,
                self.d**-0.5,
                0.0,
                budget,
                index_type,
                0,
            ),
        ]

    def check(self):
        """Refuses to time a wrong attention: compares a KV group's result over all cells with NumPy.

        Not with upstream's, which sums V in F16: that costs it an NMSE of 1e-2 where attention is as flat as here.
        """
        ours = [self.dense(0)[0], self.fasa(0, self.n_index_types[0], self.n_kv)[-1]]
        graph = self.lib.ggml_new_graph_custom(self.ctx, 64, False)
        for node in ours:
            self.lib.ggml_build_forward_expand(graph, node)
        self.run(graph, 1)
        q = self.data(self.q, np.float32).reshape(-1, self.d)[: self.R]
        k, v = (self.data(t[0], np.float16).reshape(self.n_kv, self.G, self.d)[:, 0] for t in (self.k, self.v))
        weight = np.exp(q @ k.astype(np.float32).T * self.d**-0.5)
        want = weight @ v.astype(np.float32) / weight.sum(axis=1, keepdims=True)
        for node in ours:
            got = self.data(node, np.float32).reshape(-1, self.d)[: self.R]
            if not np.sum((got - want) ** 2) < 1e-6 * np.sum(want**2):
                raise SystemExit(f"error: attention over all {self.n_kv} cells is wrong")


def _backend(lib):
    if not hasattr(lib, "backend"):
        lib.backend = lib.ggml_backend_cpu_init()
    return lib.backend


class StageCalls:
    """The stages inside the op, for one index type and budget: what threads need to call them, each for every n-th KV head.

    Scratch and scores are a thread's own and stay in its core's cache, as in the op where heads go round evenly.
    """

    def __init__(self, step, index_type, budget, n_threads):
        self.step, self.t, self.budget = step, index_type, min(budget, step.n_kv)
        lib, ffi, d = step.lib, step.lib.ffi, step.d
        n_kv, R, G, J = step.n_kv, step.R, step.G, step.J
        self.arrays = []
        pointer = self._pointer
        dims = step.data(step.dims, np.int32).reshape(G, J)
        q = step.data(step.q, np.float32).reshape(G, R, d)
        self.q_tip = [pointer(np.take(q[g], dims[g], axis=1) * np.float32(d**-0.5)) for g in range(G)]
        self.q = [pointer(q[g]) for g in range(G)]
        self.cells = [pointer(np.zeros(self.budget, np.int32), "int32_t *") for _ in range(G)]
        self.out = [pointer(np.zeros(R * d, np.float32)) for _ in range(G)]
        n_scratch = lib.ggml_fasa_cpu_tip_scratch(R, J, n_kv) + lib.ggml_fasa_cpu_fac_scratch(R, self.budget, d) + n_kv

        def of_threads(n):
            arrays = [pointer(np.zeros(n, np.float32)) for _ in range(n_threads)]
            return [arrays[g % n_threads] for g in range(G)]

        self.scratch, self.scores = of_threads(n_scratch), of_threads(n_kv)
        self.mask = lib.ggml_get_data(step.mask)

        def heads(tensors, n_bytes):
            return [[ffi.cast("char *", lib.ggml_get_data(t)) + g * n_bytes for g in range(G)] for t in tensors]

        self.index = heads(step.index[index_type], step.index_bytes[index_type] // G)
        self.k, self.v = heads(step.k, 2 * d), heads(step.v, 2 * d)

    def _pointer(self, array, ctype="float *"):
        """To a copy of array that begins at a cache line, as work buffers of graphs do."""
        room = np.zeros(array.nbytes + LINE, np.uint8)
        aligned = room[-room.ctypes.data % LINE :][: array.nbytes].view(array.dtype)
        aligned[:] = array.ravel()
        self.arrays.append(room)
        return self.step.lib.ffi.cast(ctype, aligned.ctypes.data)

    def tip(self, c, g):
        s = self.step
        s.lib.ggml_fasa_cpu_tip(
            self.q_tip[g],
            s.R,
            s.J,
            self.t,
            self.index[c][g],
            self.mask,
            True,
            s.n_kv,
            self.scratch[g],
            self.scores[g],
            False,
        )

    def select(self, c, g):
        s = self.step
        s.lib.ggml_fasa_cpu_select(
            self.scores[g], s.n_kv, self.budget, s.lib.ffi.cast("void *", self.scratch[g]), self.cells[g], False
        )

    def fac(self, c, g):
        s, stride = self.step, 2 * self.step.d * self.step.G
        s.lib.ggml_fasa_cpu_fac(
            self.q[g],
            s.R,
            s.d,
            self.k[c][g],
            F16,
            stride,
            self.v[c][g],
            F16,
            stride,
            s.d,
            s.d,
            self.cells[g],
            self.budget,
            s.d**-0.5,
            0.0,
            s.lib.ffi.NULL,
            self.scratch[g],
            self.out[g],
            s.d,
            False,
        )


class Team:
    """Threads that each do a share of the work, at the same time."""

    def __init__(self, n_threads):
        self.n = n_threads
        self.pool = ThreadPoolExecutor(n_threads)
        self.cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []

    def seconds(self, work):
        """Wall time from the first thread's start of work(i), i in 0 .. n_threads - 1, to the last one's end."""
        barrier = threading.Barrier(self.n)
        time.sleep(IDLE)

        def share(i):
            if self.cpus:  # threads that wake each other would begin on one
                os.sched_setaffinity(0, {self.cpus[i % len(self.cpus)]})
            barrier.wait()
            start = time.perf_counter()
            work(i)
            return start, time.perf_counter()

        starts, ends = zip(*self.pool.map(share, range(self.n)))
        return max(ends) - min(starts)

    def stage(self, n_head_kv, copies, function):
        """Seconds of a stage over all KV heads of a step: the average over the copies."""

        def work(i):
            for c in copies:
                for g in range(i, n_head_kv, self.n):
                    function(c, g)

        return self.seconds(work) / len(copies)


def read_rate(step, team, copies):
    """GB/s at which the threads read K, in the memory that the stages read."""
    parts = [np.array_split(step.data(step.k[c], np.int64), team.n) for c in copies]
    seconds = team.seconds(lambda i: [part[i].max() for part in parts])
    return step.kv_bytes / 2 * len(parts) / seconds / 1e9


def copy_rate(step, team, copies):
    """GB/s, read and written, at which the threads copy K over V."""
    pairs = [[np.array_split(step.data(t[c], np.int64), team.n) for t in (step.v, step.k)] for c in copies]
    seconds = team.seconds(lambda i: [np.copyto(v[i], k[i]) for v, k in pairs])
    return step.kv_bytes * len(pairs) / seconds / 1e9


def measurements(step, args, team):
    """[(stage, index type or None, budget or None, bytes, function), ...]; function(i) runs the i-th of step.layers and
    gives the seconds of a step."""
    found = []
    wake = step.graph([0], lambda c: step.index_write(c, step.n_index_types[0]))

    def op(stage, n_bytes, nodes, index_type=None, budget=None):
        graphs = [step.graph(copies, nodes) for copies in step.layers]

        def seconds(i):
            step.run(wake, team.n)  # as in a model, threads wait for the graph
            start = time.perf_counter()
            step.run(graphs[i], team.n)
            return (time.perf_counter() - start) / len(step.layers[i])

        found.append((stage, index_type, budget, n_bytes, seconds))

    def stage(name, n_bytes, function, index_type, budget=None):
        def seconds(i):
            return team.stage(step.G, step.layers[i], function)

        found.append((name, index_type, budget, n_bytes, seconds))

    op("flash_attn", step.kv_bytes, step.flash_attn)
    op("dense", step.kv_bytes, step.dense)
    for t, index_type in zip(step.n_index_types, args.index_type):
        n_index = step.index_bytes[t]
        n_row = 2 * step.d * step.G
        op("index_write", n_row + n_index // step.n_kv, lambda c, t=t: step.index_write(c, t), index_type)
        for budget in args.budget:
            n_sel = min(budget, step.n_kv) * step.kv_bytes // step.n_kv
            op("fasa", n_index + n_sel, lambda c, t=t, b=budget: step.fasa(c, t, b), index_type, budget)
            calls = StageCalls(step, t, budget, team.n)
            if budget == args.budget[0]:
                stage("tip", n_index, calls.tip, index_type)
            team.stage(step.G, [0], calls.tip)  # select needs scores, fac cells
            team.stage(step.G, [0], calls.select)
            stage("select", 4 * step.n_kv * step.G, calls.select, index_type, budget)
            stage("fac", n_sel, calls.fac, index_type, budget)
    return found


def measure(lib, args, d, n_kv, team):
    """Rows of one shape."""
    step = Step(lib, args, d, n_kv)
    step.check()
    todo = measurements(step, args, team)
    turns = [seconds for *_, seconds in todo]
    turns += [lambda i, rate=rate: rate(step, team, step.layers[i]) for rate in (read_rate, copy_rate)]
    results = [[] for _ in turns]
    for i in range(args.rounds + 1):
        for j in range(len(turns)):
            at = (i + j) % len(turns)  # whoever follows the same one always might find its traces
            results[at].append(turns[at]((i + at) % len(step.layers)))
    *seconds, reads, copies = (r[1:] for r in results)  # the first round warms up
    read, copy = statistics.median(reads), statistics.median(copies)
    print(f"d {d}, n_kv {n_kv}, {team.n} threads: read {read:.1f} GB/s, copy {copy:.1f} GB/s", file=sys.stderr)
    flash = statistics.median(seconds[0])
    rows = []
    for (stage, index_type, budget, n_bytes, _), times in zip(todo, seconds):
        median = statistics.median(times)
        rows.append(
            row(
                "stage",
                stage=stage,
                index_type=index_type,
                budget=budget,
                d=d,
                n_kv=n_kv,
                n_head=args.n_head,
                n_head_kv=args.n_head_kv,
                n_tip=args.n_tip,
                threads=team.n,
                n_copy=step.n_copy,
                us=median * 1e6,
                us_min=min(times) * 1e6,
                us_max=max(times) * 1e6,
                bytes=n_bytes,
                gb_s=n_bytes / median / 1e9,
                read_gb_s=read,
                read_gb_s_min=min(reads),
                read_gb_s_max=max(reads),
                copy_gb_s=copy,
                share_of_read=n_bytes / median / 1e9 / read,
                flash_attn_ratio=flash / median,
            )
        )
    step.close()
    return rows


def table(rows):
    """Markdown: one line per shape and stage."""
    lines = [
        "| d | n_kv | threads | stage | index | budget | us (min to max) | GB/s | of read bandwidth | times as fast as "
        "flash attention |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    whole = ("flash_attn", "dense", "fasa")
    for r in rows:
        ratio = f"{r['flash_attn_ratio']:.2f}" if r["stage"] in whole else ""
        lines.append(
            f"| {r['d']} | {r['n_kv']} | {r['threads']} | {r['stage']} | {r['index_type'] or ''} | "
            f"{r['budget'] or ''} | {r['us']:.1f} ({r['us_min']:.1f} to {r['us_max']:.1f}) | {r['gb_s']:.2f} | "
            f"{r['share_of_read']:.0%} | {ratio} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--n-kv", type=int, nargs="+", default=[2048, 8192, 32768, 131072], help="cells, multiples of 32")
    add("--d", type=int, nargs="+", default=[64, 128], help="head sizes (default: 64 128)")
    add("--n-head", type=int, default=32)
    add("--n-head-kv", type=int, default=8)
    add("--n-tip", type=int, default=16, help="FCs per head (default: 16)")
    add("--budget", type=int, nargs="+", default=[256])
    add("--index-type", nargs="+", choices=INDEX_TYPES, default=list(INDEX_TYPES))
    add("--threads", type=int, nargs="+", default=[os.cpu_count()])
    add("--rounds", type=int, default=5)
    add("--memory", type=float, default=4, help="GiB for the copies of K, V and index (default: 4)")
    add("--seed", type=int, default=0)
    add("--out", help="append the JSON lines to this file instead of printing them")
    args = parser.parse_args()
    if any(n % 32 or n <= N_SINK + N_RECENT for n in args.n_kv):
        parser.error("--n-kv must be multiples of 32, and at least 64")
    if any(d % 2 or args.n_tip > d // 2 for d in args.d) or args.n_head % args.n_head_kv:
        parser.error("--n-tip must be at most half of --d, and --n-head a multiple of --n-head-kv")

    lib = Library()
    rows = []
    shapes = [(d, n_kv, n) for n in args.threads for d in args.d for n_kv in args.n_kv]
    teams = {n: Team(n) for n in args.threads}
    for d, n_kv, n in tqdm(shapes, desc="shapes", disable=None):
        for measured in measure(lib, args, d, n_kv, teams[n]):
            rows.append(measured)
            emit(measured, args.out)
    print(table(rows))


if __name__ == "__main__":
    main()
