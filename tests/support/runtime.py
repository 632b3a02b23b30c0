"""Models and contexts through the stock ctypes binding of llama.cpp, and FASA's own API through cffi.

Everything here is what a user of the C API would write; no helper decodes in a way of its own.
"""

import contextlib
import ctypes
import functools

import cffi
import numpy as np

from .native import declarations, lib_dir

OFF, AUTO, ON = 0, 1, 2
INDEX_TYPES = {"f16": 0, "q8": 1, "q4": 2}  # ggml-fasa.h

log_lines = []  # what llama.cpp said, newest last


@functools.cache
def llama():
    """The stock module llama_cpp on the patched libraries, its log going to log_lines."""
    from fasa import _native

    module = _native.import_llama_cpp()

    @module.llama_log_callback
    def on_log(_level, text, _user_data):
        log_lines.append(text.decode(errors="replace"))

    module.keep_log_callback = on_log
    module.llama_log_set(on_log, ctypes.c_void_p(0))
    module.llama_backend_init()
    return module


@functools.cache
def fasa_api():
    """(ffi, library) with the functions of llama-fasa.h."""
    llama()
    ffi = cffi.FFI()
    ffi.cdef("struct llama_model; struct llama_context; typedef int32_t llama_seq_id;" + declarations("llama-fasa.h"))
    return ffi, ffi.dlopen(str(lib_dir() / "libllama.so"))


def last_error():
    ffi, lib = fasa_api()
    return ffi.string(lib.llama_fasa_last_error()).decode()


@contextlib.contextmanager
def fasa_params(mode=ON, budget=0, n_sink=-1, n_recent=-1, max_batch=0, index_type=None, budget_schedule=0):
    """Contexts created inside run with these parameters; index_type is a name or None."""
    ffi, lib = fasa_api()
    before = lib.llama_fasa_get_params()
    index_type = -1 if index_type is None else INDEX_TYPES[index_type]
    given = ffi.new("struct llama_fasa_params *", (mode, budget, n_sink, n_recent, max_batch, index_type))
    given.budget_schedule = budget_schedule
    assert lib.llama_fasa_set_params(given) == 0, last_error()
    try:
        yield
    finally:
        assert lib.llama_fasa_set_params(ffi.new("struct llama_fasa_params *", before)) == 0


class NoSlot(RuntimeError):
    """No room in the cache for a batch; nothing has changed."""


class Model:
    """A loaded model; raises RuntimeError when it cannot be loaded."""

    def __init__(self, path):
        api = llama()
        self.path = path
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.handle = api.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise RuntimeError("".join(log_lines[-20:]))
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.handle))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        llama().llama_model_free(self.handle)

    def calibrated(self):
        """1 calibrated, 0 not, -1 invalid; and the error's sentence."""
        ffi, lib = fasa_api()
        return lib.llama_fasa_model_calibrated(ffi.cast("struct llama_model *", _address(self.handle))), last_error()

    def context(self, **kwargs):
        """A context as the settings in force have it; see Context."""
        return Context(self, **kwargs)


class Context:
    """A context with flash attention and an F16 KV cache; raises RuntimeError when it cannot be created.

    decode() gives the logits of the last token, or of all, as float64 [n, n_vocab].
    """

    def __init__(self, model, n_ctx=1024, n_ubatch=512, n_seq=1, unified=True, n_threads=1, **more):
        api = llama()
        self.model = model
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ctx, n_ubatch
        params.n_seq_max, params.kv_unified = n_seq, unified
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        for name, value in more.items():
            setattr(params, name, value)
        self.handle = api.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise RuntimeError("".join(log_lines[-20:]))
        self.memory = api.llama_get_memory(self.handle)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        if self.handle:
            llama().llama_free(self.handle)
            self.handle = None

    def decode(self, tokens, pos=None, seq=0, all_logits=False):
        """Decodes tokens of one sequence, after its last one unless pos says where."""
        if pos is None:
            pos = llama().llama_memory_seq_pos_max(self.memory, seq) + 1
        rows = self.decode_rows([(token, pos + i, [seq]) for i, token in enumerate(tokens)], all_logits)
        return rows if all_logits else rows[-1]

    def decode_rows(self, rows, all_logits=True):
        """Decodes one batch of (token, position, sequences); the logits of every row, or of the last."""
        api = llama()
        batch = api.llama_batch_init(len(rows), 0, max(len(seqs) for _, _, seqs in rows))
        batch.n_tokens = len(rows)
        for i, (token, pos, seqs) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), pos, len(seqs)
            for j, seq in enumerate(seqs):
                batch.seq_id[i][j] = seq
            batch.logits[i] = all_logits or i == len(rows) - 1
        status = api.llama_decode(self.handle, batch)
        wanted = [i for i in range(len(rows)) if batch.logits[i]]
        api.llama_batch_free(batch)
        if status == 1:
            raise NoSlot
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}: " + "".join(log_lines[-20:]))
        return np.stack([self._logits(i) for i in wanted])

    def _logits(self, i):
        pointer = llama().llama_get_logits_ith(self.handle, i)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,)).astype(np.float64)

    def greedy(self, tokens, n):
        """The n likeliest next tokens after tokens, decoded one by one."""
        logits, said = self.decode(tokens), []
        while len(said) < n:
            said.append(int(logits.argmax()))
            logits = self.decode(said[-1:])
        return said

    def save(self, seq=None, flags=0):
        """The state of the context, or of one sequence with LLAMA_STATE_SEQ_FLAGS, as bytes."""
        api = llama()
        if seq is None:
            size = api.llama_state_get_size(self.handle)
        else:
            size = api.llama_state_seq_get_size_ext(self.handle, seq, flags)
        buffer = (ctypes.c_uint8 * size)()
        if seq is None:
            n = api.llama_state_get_data(self.handle, buffer, size)
        else:
            n = api.llama_state_seq_get_data_ext(self.handle, buffer, size, seq, flags)
        assert n == size
        return bytes(buffer)

    def load(self, state, seq=None, flags=0):
        """Restores what save() gave, one sequence into sequence seq."""
        api = llama()
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            n = api.llama_state_set_data(self.handle, buffer, len(state))
        else:
            n = api.llama_state_seq_set_data_ext(self.handle, buffer, len(state), seq, flags)
        assert n == len(state)

    def set_budget(self, budget):
        """The status of llama_fasa_set_budget, and the error's sentence."""
        ffi, lib = fasa_api()
        status = lib.llama_fasa_set_budget(ffi.cast("struct llama_context *", _address(self.handle)), budget)
        return status, last_error()

    def set_prompts(self, *seqs):
        """Sequences whose tokens are read of a prompt from now on."""
        ffi, lib = fasa_api()
        lib.llama_fasa_set_prompts(ffi.cast("struct llama_context *", _address(self.handle)), seqs, len(seqs))

    def stats(self):
        ffi, lib = fasa_api()
        return lib.llama_fasa_get_stats(ffi.cast("struct llama_context *", _address(self.handle)))

    def info(self):
        ffi, lib = fasa_api()
        return lib.llama_fasa_get_info(ffi.cast("struct llama_context *", _address(self.handle)))


def _address(handle):
    return ctypes.cast(handle, ctypes.c_void_p).value
