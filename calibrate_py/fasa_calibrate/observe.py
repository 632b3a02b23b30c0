"""Stage calibrate, first half: runs a text through llama.cpp and hands over post-RoPE q and K, one layer at a time."""

import contextlib
import ctypes
import os
import re
import signal
import threading
from dataclasses import dataclass

import numpy as np

from .errors import CalibrateError
from .native import Tensors, c_function

ROPE_NAMES = {0: "norm", 2: "neox"}  # LLAMA_ROPE_TYPE_*
_K_CACHE = re.compile(rb"cache_k_l(\d+)$")
_FLASH_ATTN_ENABLED = 1
_FASA_OFF, _FASA_ON = 0, 2  # enum llama_fasa_mode
_BATCH = 512  # tokens evaluated at once by log_probs
_TYPE_F16 = 1


@dataclass
class Attention:
    """What one layer's attention saw. H query heads, G KV heads, Q sampled queries, N tokens, D head size."""

    layer: int
    q: np.ndarray  # F32 [Q, H, D] after RoPE
    k: np.ndarray  # F16 [G, N, D] as cached
    v: np.ndarray  # F16 [G, N, DV] as cached
    sinks: np.ndarray  # F32 [H] or None
    scale: float
    softcap: float
    rope: str  # "norm" or "neox", None where the layer has no rotary embedding
    n_rot: int
    full: bool  # whether every query sees all tokens before it


class Model:
    """A GGUF loaded by llama.cpp for passes over a text, dense unless a budget is asked for. A context manager.

    sidecar: the file with its calibration; None leaves that to llama.cpp, and must be None if it has no FASA
    """

    def __init__(self, llama_cpp, path, n_gpu_layers=0, verbose=False, sidecar=None):
        self._lib = llama_cpp
        self._tensors = Tensors(llama_cpp)
        self._interrupt = None
        with contextlib.ExitStack() as undo:
            if not verbose:
                undo.enter_context(_silence(llama_cpp))
            undo.enter_context(_fasa(llama_cpp, mode=_FASA_OFF))
            if sidecar is not None:
                undo.enter_context(_fasa_file(llama_cpp, sidecar))
            params = llama_cpp.llama_model_default_params()
            params.n_gpu_layers = n_gpu_layers
            # also where Ctrl-C is noticed while a large model loads
            params.progress_callback = llama_cpp.llama_progress_callback(self._guard(lambda done, data: None))
            with self._native_call():
                llama_cpp.llama_backend_init()
                self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
                if self._model:
                    undo.callback(llama_cpp.llama_model_free, self._model)
            if not self._model:
                raise CalibrateError("llama.cpp cannot load this model (--verbose shows its reason)")
            self._undo = undo.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._undo.close()

    def _guard(self, function):
        """A callback that stops the native side on any exception, which is raised again after the native call."""

        def call(*args):
            try:
                function(*args)
            except BaseException as err:  # also KeyboardInterrupt: C code must not be unwound
                self._interrupt = self._interrupt or err
            return self._interrupt is None

        return call

    @contextlib.contextmanager
    def _native_call(self):
        """Ends early, by way of the callbacks, on a signal or an exception in a callback, which is raised after it.

        A signal handler that raised inside a callback could do so outside of _guard, where ctypes drops exceptions.
        """
        arrived = []

        def note(number, frame):
            arrived.append(number)
            self._interrupt = self._interrupt or KeyboardInterrupt()

        main_thread = threading.current_thread() is threading.main_thread()
        heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if main_thread and signal.getsignal(n) != signal.SIG_IGN]
        old = {number: signal.signal(number, note) for number in heeded}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        for number in arrived:
            os.kill(os.getpid(), number)  # to the handler it was meant for
        if self._interrupt is not None:
            raise self._interrupt

    @property
    def n_layer(self):
        return self._lib.llama_model_n_layer(self._model)

    @property
    def n_ctx_train(self):
        return self._lib.llama_model_n_ctx_train(self._model)

    @property
    def rope(self):
        """`norm` or `neox`; anything else is refused."""
        kind = self._lib.llama_model_rope_type(self._model)
        if kind not in ROPE_NAMES:
            raise CalibrateError("this model has no rotary embedding of the norm or neox kind")
        return ROPE_NAMES[kind]

    def tokenize(self, text):
        """I32 token ids of a str, special tokens as the model wants them."""
        vocab = self._lib.llama_model_get_vocab(self._model)
        data = text.encode()
        n = len(data) + 8
        for _ in range(2):
            tokens = (ctypes.c_int32 * max(n, 1))()
            n = self._lib.llama_tokenize(vocab, data, len(data), tokens, len(tokens), True, False)
            if n >= 0:
                break
            n = -n  # how many there are
        else:
            raise CalibrateError("the text could not be tokenized")
        return np.array(tokens[:n], np.int32)

    def attentions(self, tokens, positions, visit, n_threads):
        """Evaluates tokens densely and calls visit(Attention) for each layer that keeps K of its own, in order.

        positions: ascending indices of the queries to hand over. Only one layer's data exists at a time.
        """
        lib, n_tokens = self._lib, len(tokens)
        params = lib.llama_context_default_params()
        params.n_batch = params.n_ubatch = n_tokens
        params.n_ctx = -(-n_tokens // 256) * 256
        n_swa = lib.llama_model_n_swa(self._model)
        if n_swa > 0:
            # large enough that the cache of a sliding-window layer is smaller than the others, which identifies it
            params.n_ctx += -(-n_swa // 256) * 256 + 256
        params.n_seq_max = params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = _FLASH_ATTN_ENABLED
        params.type_k = params.type_v = _TYPE_F16
        params.swa_full = False
        graph = _Graph(self._tensors, n_tokens, np.asarray(positions), self.rope, visit)
        params.cb_eval = lib.ggml_backend_sched_eval_callback(self._on_node(graph))
        ids = (ctypes.c_int32 * n_tokens)(*tokens)
        status = None
        with self._native_call():
            context = lib.llama_init_from_model(self._model, params)
            if context:
                graph.n_cells = lib.llama_n_ctx(context)
                status = lib.llama_decode(context, lib.llama_batch_get_one(ids, n_tokens))
                lib.llama_free(context)
        if status is None:
            raise CalibrateError("llama.cpp cannot run this model with flash attention (--verbose shows its reason)")
        if status != 0:
            raise CalibrateError("llama.cpp failed to evaluate the calibration text")

    def log_probs(self, tokens, positions, n_threads, budget=None):
        """Log-probabilities of the token after each of the ascending positions, F32 [positions, vocabulary].

        Dense, or with every batch served by FASA at this budget.
        """
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_batch = params.n_ubatch = params.n_outputs_max = _BATCH
        params.n_ctx = -(-len(tokens) // 256) * 256
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = _FLASH_ATTN_ENABLED
        params.abort_callback = lib.ggml_abort_callback(lambda data: self._interrupt is not None)
        fasa = {"mode": _FASA_OFF} if budget is None else {"mode": _FASA_ON, "budget": budget, "max_batch": _BATCH}
        n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        rows, status = [], None
        with self._native_call(), _fasa(lib, **fasa), contextlib.ExitStack() as undo:
            context = lib.llama_init_from_model(self._model, params)
            if context:
                undo.callback(lib.llama_free, context)
                batch = lib.llama_batch_init(_BATCH, 0, 1)
                undo.callback(lib.llama_batch_free, batch)
                status = 0
            for start in range(0, len(tokens) if context else 0, _BATCH):
                batch.n_tokens = min(_BATCH, len(tokens) - start)
                wanted = np.isin(np.arange(start, start + batch.n_tokens), positions)
                for i in range(batch.n_tokens):
                    batch.token[i], batch.pos[i], batch.logits[i] = int(tokens[start + i]), start + i, int(wanted[i])
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                status = status or lib.llama_decode(context, batch)
                if status != 0:
                    break
                for i in np.flatnonzero(wanted):
                    logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, int(i)), (n_vocab,))
                    top = logits.max()
                    rows.append(logits - (top + np.log(np.exp(logits - top, dtype=np.float64).sum())).astype(np.float32))
        if status is None:
            raise CalibrateError("llama.cpp cannot run this model with FASA (--verbose shows its reason)")
        if status != 0:
            raise CalibrateError("llama.cpp failed to evaluate the calibration text")
        return np.stack(rows)

    def _on_node(self, graph):
        def ask(address):
            nonlocal wanted
            wanted = graph.wants(address)

        def take(address):
            graph.take(address)

        wanted = False
        ask, take = self._guard(ask), self._guard(take)

        def on_node(address, asking, data):
            if not asking:
                return take(address) if self._interrupt is None else False
            # once interrupted, ask for every node: a refusal then ends the evaluation
            return not ask(address) or wanted

        return on_node


class _Graph:
    """Follows the nodes of one graph in the order of evaluation."""

    def __init__(self, tensors, n_tokens, positions, rope, visit):
        self.tensors, self.n_tokens, self.positions, self.visit = tensors, n_tokens, positions, visit
        self.model_rope = rope
        self.n_cells = 0
        self.ropes = []  # (n_dims, mode, head size, heads) of the rope nodes since the last attention
        self.seen = set()

    def wants(self, address):
        op = self.tensors.op(address)
        if op == "ROPE":
            node = self.tensors.at(address)
            self.ropes.append((node.op_params[1], node.op_params[2], node.ne[0], node.ne[1]))
        return op == "FLASH_ATTN_EXT"

    def take(self, address):
        node = self.tensors.at(address)
        ropes, self.ropes = self.ropes, []
        q, k, v, mask, sinks = (node.src[i] for i in range(5))
        if not (q and k and v and k.contents.view_src):
            return
        q, k, v = q.contents, k.contents, v.contents
        cache = k.view_src.contents
        match = _K_CACHE.match(cache.name)
        if match is None or int(match[1]) in self.seen:
            return  # no cache of the usual kind, or one that belongs to an earlier layer
        layer = int(match[1])
        self.seen.add(layer)
        head_size, n_head, n_head_kv = q.ne[0], q.ne[2], k.ne[2]
        as_q = q.ne[1] == self.n_tokens and q.ne[3] == 1
        as_k = k.ne[0] == head_size and k.ne[1] >= self.n_tokens and n_head_kv > 0 and n_head % n_head_kv == 0
        as_v = v.ne[1] >= self.n_tokens and v.ne[2] == n_head_kv
        if not (as_q and as_k and as_v):
            raise CalibrateError(f"attention of layer {layer} has a shape that calibration does not know")
        scale, bias, softcap = np.array(node.op_params[:3], np.int32).view(np.float32)
        if bias != 0:
            raise CalibrateError("this model uses ALiBi, not rotary embedding")
        rope = {(n_dims, mode) for n_dims, mode, *shape in ropes if shape == [head_size, n_head]}
        if len(rope) > 1:
            raise CalibrateError(f"layer {layer} rotates its queries more than once")
        n_rot, mode = rope.pop() if rope else (0, None)
        self.visit(
            Attention(
                layer=layer,
                q=np.stack([self._row(q, t, (n_head, head_size), (q.nb[2], q.nb[0])) for t in self.positions]),
                k=self._rows(k),
                v=self._rows(v),
                sinks=self.tensors.read(sinks.contents, 0, (n_head,), (4,)) if sinks else None,
                scale=float(scale),
                softcap=float(softcap),
                rope=ROPE_NAMES.get(mode),
                n_rot=n_rot,
                full=cache.ne[1] >= self.n_cells and self._sees_all(mask),
            )
        )

    def _rows(self, cache):
        shape = (cache.ne[2], self.n_tokens, cache.ne[0])
        return self.tensors.read(cache, 0, shape, (cache.nb[2], cache.nb[1], cache.nb[0]))

    def _row(self, tensor, t, shape, strides):
        return self.tensors.read(tensor, t * tensor.nb[1], shape, strides)

    def _sees_all(self, mask):
        if not mask:
            return False
        mask = mask.contents
        for t in self.positions:
            visible = self._row(mask, t, (self.n_tokens,), (mask.nb[0],)) == 0
            if not (visible[: t + 1].all() and not visible[t + 1 :].any()):
                return False
        return True


@contextlib.contextmanager
def _silence(llama_cpp):
    """llama.cpp logs nothing; then as before. The log callback is one per process."""
    old, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(old), ctypes.byref(data))
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(old, data)


class _FasaParams(ctypes.Structure):
    """struct llama_fasa_params."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "mode", "budget", "n_sink", "n_recent", "max_batch", "index_type", "variant", "vram", "budget_schedule"
        )
    ]


@contextlib.contextmanager
def _fasa(llama_cpp, **settings):
    """Contexts are made with these fields of _FasaParams, whatever a model's metadata say; then as before. These
    settings too are per process."""
    try:
        get = c_function(llama_cpp, "llama_fasa_get_params", [], _FasaParams)
        put = c_function(llama_cpp, "llama_fasa_set_params", [ctypes.POINTER(_FasaParams)], ctypes.c_int32)
    except AttributeError:  # a llama.cpp without FASA
        yield
        return
    old = get()
    new = _FasaParams.from_buffer_copy(old)
    for name, value in settings.items():
        setattr(new, name, value)
    put(ctypes.byref(new))
    try:
        yield
    finally:
        put(ctypes.byref(old))


@contextlib.contextmanager
def _fasa_file(llama_cpp, path):
    """Models are loaded with the calibration at path."""
    try:
        put = c_function(llama_cpp, "llama_fasa_set_file", [ctypes.c_char_p], None)
    except AttributeError as err:
        raise CalibrateError("this llama.cpp has no FASA, through which --target-kld measures") from err
    put(os.fsencode(path))
    try:
        yield
    finally:
        put(None)
