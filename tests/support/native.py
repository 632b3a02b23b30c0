"""The patched libraries, as the tests call them: through cffi, with declarations read from our own headers.

The folder of the libraries is LLAMA_CPP_LIB_PATH, which llama-cpp-python reads too, else that of the package ``fasa``.
"""

import functools
import importlib.util
import os
import re
from pathlib import Path

import cffi
import numpy as np
import pytest

from support import shapes

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("ggml-fasa.h", "ggml-fasa-cpu.h")

# The part of ggml's C API that a test needs to build and run a graph.
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
struct ggml_tensor * ggml_permute(struct ggml_context *, struct ggml_tensor *, int, int, int, int);
size_t ggml_row_size(int type, int64_t ne);
void * ggml_get_data(const struct ggml_tensor *);
const char * ggml_get_name(const struct ggml_tensor *);
size_t ggml_nbytes(const struct ggml_tensor *);
struct ggml_cgraph * ggml_new_graph(struct ggml_context *);
void ggml_build_forward_expand(struct ggml_cgraph *, struct ggml_tensor *);
void * ggml_backend_cpu_init(void);
void ggml_backend_free(void * backend);
void ggml_backend_cpu_set_n_threads(void * backend, int n_threads);
void ggml_backend_cpu_set_use_ref(void * backend, bool use_ref);
int ggml_backend_graph_compute(void * backend, struct ggml_cgraph *);
struct ggml_threadpool_params { bool cpumask[512]; int n_threads; int prio; uint32_t poll; bool strict_cpu; bool paused; };
struct ggml_threadpool_params ggml_threadpool_params_default(int n_threads);
void * ggml_threadpool_new(struct ggml_threadpool_params *);
void ggml_threadpool_free(void * pool);
"""
GGML_TYPES = {
    np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int32): 26, np.dtype(np.int64): 27,
    np.dtype(np.uint8): 24,
}  # fmt: skip


def declarations(header):
    """The declarations of one of our headers, without comments, preprocessor lines and export macros."""
    text = (ROOT / "ggml_fasa" / "include" / header).read_text()
    text = re.sub(r"//[^\n]*|^#[^\n]*", "", text, flags=re.M)
    return re.sub(r'extern "C" \{|\bGGML_(BACKEND_)?API\b|\bLLAMA_API\b|^}\s*\Z', "", text, flags=re.M)


def lib_dir():
    """The folder that holds the patched libraries, or None."""
    if os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(os.environ["LLAMA_CPP_LIB_PATH"])
    spec = importlib.util.find_spec("fasa")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


@functools.cache
def ggml():
    """(ffi, library) of libggml-cpu with our op, and of libggml-base below it."""
    folder = lib_dir()
    if folder is None:
        pytest.fail("no patched libraries: install the package, or set LLAMA_CPP_LIB_PATH to their folder")
    ffi = cffi.FFI()
    ffi.cdef(GGML_CDEF + "".join(map(declarations, HEADERS)))
    base = ffi.dlopen(str(folder / "libggml-base.so"), ffi.RTLD_GLOBAL | ffi.RTLD_NOW)
    cpu = folder / "libggml-cpu.so"
    if not cpu.exists():  # one of several, with FASA_PORTABLE
        from fasa import _native

        cpu = _native.cpu_path()
    cpu = ffi.dlopen(str(cpu), ffi.RTLD_GLOBAL | ffi.RTLD_NOW)
    return ffi, _Either(cpu, base)


class _Either:
    """Looks a symbol up in the libraries given, in order."""

    def __init__(self, *libraries):
        self.libraries = libraries

    def __getattr__(self, name):
        for library in self.libraries:
            try:
                return getattr(library, name)
            except AttributeError as error:
                missing = error
        raise missing


def pointer(array, ctype):
    """A C pointer to the data of a contiguous array; NULL for None."""
    ffi, _ = ggml()
    if array is None:
        return ffi.NULL
    assert array.flags.c_contiguous
    return ffi.cast(ctype, array.ctypes.data)


class Graph:
    """A ggml context whose tensors live in memory of its own, and graphs over them. Shapes are in C order."""

    def __init__(self, size):
        self.ffi, self.lib = ggml()
        self.ctx = self.lib.ggml_init({"mem_size": size + (4 << 20), "mem_buffer": self.ffi.NULL, "no_alloc": False})
        assert self.ctx != self.ffi.NULL

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.lib.ggml_free(self.ctx)

    def tensor(self, array):
        """A new tensor that holds a copy of the array."""
        shape = (1,) * (4 - array.ndim) + array.shape
        t = self.lib.ggml_new_tensor_4d(self.ctx, GGML_TYPES[array.dtype], *shape[::-1])
        self.array(t, array.dtype, array.shape)[...] = array
        return t

    def cache(self, values, name):
        """A new tensor of a cache type by name, of the shape of values, that keeps them."""
        shape = (1,) * (4 - values.ndim) + values.shape
        t = self.lib.ggml_new_tensor_4d(self.ctx, shapes.type_id(name), *shape[::-1])
        data, _ = shapes.stored(values, name)
        self.array(t, np.uint8, data.shape)[...] = data
        return t

    def array(self, tensor, dtype, shape):
        """The data of a contiguous tensor, as a view: valid while the graph lives."""
        dtype = np.dtype(dtype)
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        assert n_bytes == self.lib.ggml_nbytes(tensor)
        return np.frombuffer(self.ffi.buffer(self.lib.ggml_get_data(tensor), n_bytes), dtype).reshape(shape)

    def heads(self, cache, name, shape, n_kv):
        """The first n_kv cells of a cache of shape [S, n_cells, G, D], as the op takes them: [S, G, n_kv, D]."""
        n_stream, n_cells, n_head_kv, d = shape
        row = self.lib.ggml_row_size(shapes.type_id(name), d)
        cell = row * n_head_kv
        return self.lib.ggml_view_4d(self.ctx, cache, d, n_kv, n_head_kv, n_stream, cell, row, cell * n_cells, 0)

    def compute(self, *outputs, n_threads=1, use_ref=False):
        """Runs the graph that ends in the outputs on the CPU backend."""
        graph = self.lib.ggml_new_graph(self.ctx)
        for output in outputs:
            self.lib.ggml_build_forward_expand(graph, output)
        backend = self.lib.ggml_backend_cpu_init()
        try:
            self.lib.ggml_backend_cpu_set_n_threads(backend, n_threads)
            self.lib.ggml_backend_cpu_set_use_ref(backend, use_ref)
            assert self.lib.ggml_backend_graph_compute(backend, graph) == 0
        finally:
            self.lib.ggml_backend_free(backend)
