"""Stage index_cache over the life of a KV cache: after every operation FASA answers as a fresh context does.

A stale index gives fluent wrong answers, so each test ends with the same comparison: logits of sparse steps after the
operation against those of a context that read the same tokens and nothing else.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import gguf_keys, native, tolerances
from support.runtime import INDEX_TYPES, OFF, ON, Model, fasa_params, llama
from support.tiny_gguf import N_VOCAB, Shape, write_tiny_gguf

BUDGET, N_SINK, N_RECENT = 64, 4, 12
N_TIP = {"llama": [4, 6, 0], "qwen2": [5, 0, 4], "gemma3": [0, 0, 0, 0, 0, 6]}  # gemma3: the others have a window
ROPE_TYPE = {"llama": "norm", "qwen2": "neox", "gemma3": "neox"}
N_CTX = 1024
STEPS = 9  # sparse decode steps compared


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def model(request, tmp_path_factory):
    """A tiny calibrated model; its attention is sharp, so that a wrong selection shows."""
    arch, folder = request.param, tmp_path_factory.mktemp("model")
    n_tip = N_TIP[arch]
    shape = Shape(n_layer=len(n_tip))
    plain = write_tiny_gguf(folder / "plain.gguf", arch, shape, sharpness=3.0)
    fcs = gguf_keys.random_fcs(np.random.default_rng(3), shape.n_head_kv, shape.head_size, n_tip)
    keys = gguf_keys.fasa_keys(len(n_tip), shape.n_head_kv, shape.head_size, n_tip, fcs, ROPE_TYPE[arch])
    with Model(gguf_keys.with_keys(plain, folder / "model.gguf", keys)) as loaded:
        yield loaded


@pytest.fixture
def text(rng):
    """A function that makes n random tokens."""
    return lambda n: [int(t) for t in rng.integers(3, N_VOCAB, n)]


@pytest.fixture
def fasa(model):
    """A function that creates a context with FASA on."""
    made = []

    def create(mode=ON, index_type=None, **kwargs):
        with fasa_params(mode, BUDGET, N_SINK, N_RECENT, index_type=index_type):
            made.append(model.context(n_ctx=kwargs.pop("n_ctx", N_CTX), **kwargs))
        assert made[-1].info().active == (mode == ON)
        return made[-1]

    yield create
    for ctx in made:
        llama().llama_free(ctx.handle)


def steps(ctx, tokens, seq=0):
    """Logits of sparse decode steps."""
    before = ctx.stats().n_step_sparse
    logits = np.stack([ctx.decode([token], seq=seq) for token in tokens])
    assert ctx.stats().n_step_sparse == before + len(tokens), "the steps were not sparse"
    return logits


def check(ctx, fresh, prompt, tokens, seq=0):
    """Sparse steps over tokens in ctx, which holds prompt, equal those of a fresh context that reads prompt."""
    expected = steps_after(fresh, prompt, tokens)
    assert difference(steps(ctx, tokens, seq), expected) <= tolerances.LIFECYCLE_NMSE


def difference(actual, expected):
    """Median NMSE over steps: one step in many may decide a near tie otherwise, a stale index spoils every one."""
    return float(np.median([tolerances.nmse(a, e) for a, e in zip(actual, expected)]))


def steps_after(ctx, prompt, tokens):
    ctx.decode(prompt)
    return steps(ctx, tokens)


def rm(ctx, seq, first, end):
    assert llama().llama_memory_seq_rm(ctx.memory, seq, first, end)


def test_the_comparison_can_fail(fasa, text):
    """Dense steps are far outside the tolerance, and so is a context whose first 200 tokens were others."""
    prompt, tokens = text(500), text(STEPS)
    expected = steps_after(fasa(), prompt, tokens)
    dense = fasa(OFF)
    dense.decode(prompt)
    assert difference([dense.decode([t]) for t in tokens], expected) > 100 * tolerances.LIFECYCLE_NMSE
    assert difference(steps_after(fasa(), text(200) + prompt[200:], tokens), expected) > 100 * tolerances.LIFECYCLE_NMSE
    assert np.array_equal(steps_after(fasa(), prompt, tokens), expected)


def test_flash_attention_decided_by_llama_cpp(fasa, text):
    """With flash attention on auto, which probes the graph first, FASA runs as with it on."""
    prompt, tokens = text(500), text(STEPS)
    expected = steps_after(fasa(), prompt, tokens)
    auto = fasa(flash_attn_type=llama().LLAMA_FLASH_ATTN_TYPE_AUTO)
    assert np.array_equal(steps_after(auto, prompt, tokens), expected)


def loaded(ctx, create):
    """A context from create in the state of ctx: its index is rebuilt from K, all of it."""
    other = create(n_ctx=llama().llama_n_ctx(ctx.handle), n_seq=llama().llama_n_seq_max(ctx.handle), unified=False)
    other.load(ctx.save())
    return other


def same(actual, expected):
    return difference(actual, expected) <= tolerances.LIFECYCLE_NMSE


def test_no_index_within_the_budget(fasa, text):
    """Steps of few tokens index nothing until one sees more cells than the budget; that one finds all of them."""
    count = native.ggml()[1].ggml_fasa_cpu_n_index_write
    tokens, ctx = text(STEPS), fasa(n_ubatch=32)
    before = count()
    ctx.decode(text(250))
    for token in text(6):
        ctx.decode([token])
    assert count() == before and ctx.stats().n_step_dense == 6 and ctx.stats().n_index_rebuild == 0
    reference = loaded(ctx, fasa)
    assert same(steps(ctx, tokens), steps(reference, tokens))
    assert ctx.stats().n_index_rebuild == 1 and count() > before


def test_rebuild_after_a_batch_of_fewer_threads(fasa, text):
    """A rebuild has the threads of a step; the pool of the batch before, which the backend still holds, has but one."""
    ffi, lib = native.ggml()
    params = [lib.ggml_threadpool_params_default(n) for n in (4, 1)]
    pools = [lib.ggml_threadpool_new(ffi.new("struct ggml_threadpool_params *", of)) for of in params]
    try:
        prompt, tokens = text(300), text(STEPS)
        fresh = fasa()
        with fasa() as ctx:
            llama().llama_set_n_threads(ctx.handle, 4, 1)
            attach = ctypes.CDLL(str(native.lib_dir() / "libllama.so")).llama_attach_threadpool
            addresses = (ctypes.c_void_p(int(ffi.cast("intptr_t", pool))) for pool in pools)
            attach(ctypes.cast(ctx.handle, ctypes.c_void_p), *addresses)
            for at in range(0, 300, 50):  # both read the same batches: K of others is rounded otherwise
                ctx.decode(prompt[at : at + 50])
                fresh.decode(prompt[at : at + 50])
            assert ctx.stats().n_index_rebuild == 1
            assert difference(steps(ctx, tokens), steps(fresh, tokens)) <= tolerances.LIFECYCLE_NMSE
    finally:
        for pool in pools:
            lib.ggml_threadpool_free(pool)


def test_rebuild_of_many_layers(tmp_path, text):
    """As many as llama.cpp has at most."""
    n = 512
    shape = Shape(n_layer=n, n_head=1, n_head_kv=1, head_size=32, n_embd=32, n_ff=32)
    plain = write_tiny_gguf(tmp_path / "plain.gguf", "llama", shape)
    fcs = gguf_keys.random_fcs(np.random.default_rng(3), 1, 32, [2] * n)
    center = gguf_keys.array(gguf_keys.F32, [0.5] * 4 * n)
    keys = gguf_keys.fasa_keys(n, 1, 32, [2] * n, fcs, "norm", center=center)
    with Model(gguf_keys.with_keys(plain, tmp_path / "model.gguf", keys)) as model:
        with fasa_params(ON, BUDGET, N_SINK, N_RECENT), model.context(n_ctx=512) as ctx:
            for _ in range(6):
                ctx.decode(text(50))
            steps(ctx, text(1))
            assert ctx.stats().n_index_rebuild == 1


@pytest.mark.parametrize("n_ubatch, n_prefill, n_rebuild", [(32, 8, 1), (256, 1, 0)])
def test_budget_crossed_within_a_batch(fasa, text, n_ubatch, n_prefill, n_rebuild):
    """The last rows of a prompt are a sparse step of their own, right behind steps that, being small, wrote no index."""
    prompt, tokens = text(256), text(1 + STEPS)
    ctx, short = fasa(n_ubatch=n_ubatch), fasa(n_ubatch=n_ubatch)
    first = ctx.decode(prompt + tokens[:1])
    stats = ctx.stats()
    assert (stats.n_step_prefill, stats.n_step_sparse, stats.n_index_rebuild) == (n_prefill, 1, n_rebuild)
    short.decode(prompt)
    reference = loaded(short, fasa)
    assert same([first], steps(reference, tokens[:1]))
    assert same(steps(ctx, tokens[1:]), steps(reference, tokens[1:]))


@pytest.mark.parametrize("budget", [0, 512, 1000], ids=["dense", "padded", "larger"])
def test_budget_lowered(fasa, text, budget):
    """A budget lowered while the graph keeps its shape; cells of both times, before and after, are indexed once."""
    ctx = fasa()
    for n_rebuild in (1, 2):
        ctx.set_budget(budget)
        ctx.decode(text(180))
        for token in text(20):
            ctx.decode([token])
        if n_rebuild == 1:
            ctx.decode(text(80))
        reference, tokens = loaded(ctx, fasa), text(STEPS)
        ctx.set_budget(BUDGET)
        assert same(steps(ctx, tokens), steps(reference, tokens))
        assert ctx.stats().n_index_rebuild == n_rebuild


def test_one_stream_within_the_budget(fasa, text):
    """A stream that fits the budget by itself does not when it shares a batch with one that exceeds it."""
    ctx = fasa(n_ctx=2 * N_CTX, n_seq=2, unified=False)
    ctx.decode(text(400), seq=0)
    steps(ctx, text(2), seq=0)
    ctx.decode(text(200), seq=1)
    ctx.decode(text(1), seq=1)
    assert ctx.stats().n_step_dense == 1 and ctx.stats().n_index_rebuild == 0
    reference = loaded(ctx, fasa)
    batches = [[(a, 402 + i, [0]), (b, 201 + i, [1])] for i, (a, b) in enumerate(zip(text(STEPS), text(STEPS)))]
    assert same([ctx.decode_rows(rows) for rows in batches], [reference.decode_rows(rows) for rows in batches])
    assert ctx.stats().n_step_sparse == 2 + STEPS and ctx.stats().n_index_rebuild == 1


def test_restored_graph_is_not_used_again(fasa, text):
    """A rebuild comes between two steps of one graph: the step after a load has the shape of the one before."""
    tokens, ctx = text(STEPS), fasa()
    steps_after(ctx, text(300), text(2))
    state = ctx.save()
    expected = steps(ctx, tokens)
    ctx.load(state)
    assert same(steps(ctx, tokens), expected)


def test_append(fasa, text):
    """A prompt in pieces."""
    pieces = [text(300), text(37), text(9), text(120)]
    ctx = fasa()
    for piece in pieces:
        ctx.decode(piece)
    check(ctx, fasa(), sum(pieces, []), text(STEPS))


def test_reuse_of_a_prefix(fasa, text):
    """seq_rm of the tail, then another continuation in its cells."""
    prefix, old, new = text(350), text(200), text(180)
    ctx = fasa()
    ctx.decode(prefix + old)
    steps(ctx, text(STEPS))
    rm(ctx, 0, len(prefix), -1)
    ctx.decode(new)
    check(ctx, fasa(), prefix + new, text(STEPS))


def test_step_back_and_decode_again(fasa, text):
    """Single tokens taken back and replaced, as speculative decoding does."""
    prompt = text(400)
    ctx = fasa()
    ctx.decode(prompt)
    for n_back in (1, 2, 3, 1):
        ctx.decode(text(4))
        rm(ctx, 0, len(prompt) + 4 - n_back, -1)
        rm(ctx, 0, len(prompt), -1)
        prompt += (kept := text(2))
        steps(ctx, kept)
    expected = fasa()
    expected.decode(prompt[:400])
    for token in prompt[400:]:
        expected.decode([token])
    tokens = text(STEPS)
    assert difference(steps(ctx, tokens), steps(expected, tokens)) <= tolerances.LIFECYCLE_NMSE


@pytest.mark.parametrize("data", [True, False])
def test_clear(fasa, text, data):
    ctx, prompt = fasa(), text(420)
    steps_after(ctx, text(700), text(STEPS))
    llama().llama_memory_clear(ctx.memory, data)
    ctx.decode(prompt)
    check(ctx, fasa(), prompt, text(STEPS))


def test_holes_are_filled(fasa, text):
    """Two sequences in one cache; the first is removed and its cells are taken by a third: cells out of order."""
    first, second, third = text(200), text(380), text(330)
    ctx = fasa(n_seq=3, unified=True)
    for i in range(0, 200, 50):  # interleaved, so that holes lie between cells in use
        ctx.decode(first[i : i + 50], seq=0)
        ctx.decode(second[i : i + 50], seq=1)
    ctx.decode(second[200:], seq=1)
    rm(ctx, 0, -1, -1)
    ctx.decode(third, seq=2)
    tokens = text(STEPS)
    for seq, prompt in ((1, second), (2, third)):
        check(ctx, fasa(), prompt, tokens, seq)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_two_sequences(fasa, text, unified):
    """Alone and in one batch, sequences do not see each other."""
    prompts, tokens = [text(300), text(480)], [text(STEPS), text(STEPS)]
    ctx = fasa(n_ctx=2 * N_CTX, n_seq=2, unified=unified)
    expected = [steps_after(fasa(), prompts[seq], tokens[seq]) for seq in (0, 1)]
    for seq, prompt in enumerate(prompts):
        ctx.decode(prompt, seq=seq)
    before = ctx.stats().n_row_sparse
    batches = [[(tokens[s][i], len(prompts[s]) + i, [s]) for s in (0, 1)] for i in range(STEPS)]
    actual = np.stack([ctx.decode_rows(rows) for rows in batches])  # [step, sequence, n_vocab]
    for seq in (0, 1):
        assert difference(actual[:, seq], expected[seq]) <= tolerances.LIFECYCLE_NMSE, f"sequence {seq}"
    assert ctx.stats().n_row_sparse == before + 2 * STEPS


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_seq_cp(fasa, text, unified):
    """A copied sequence goes on by itself; with streams its K, and so its index, is copied to other cells."""
    prompt, ours, theirs = text(450), text(60), text(80)
    ctx = fasa(n_ctx=2 * N_CTX, n_seq=2, unified=unified)
    ctx.decode(text(500), seq=1)  # leaves something else in the target's cells
    rm(ctx, 1, -1, -1)
    ctx.decode(prompt, seq=0)
    llama().llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    ctx.decode(ours, seq=0)
    ctx.decode(theirs, seq=1)
    tokens = text(STEPS)
    check(ctx, fasa(), prompt + theirs, tokens, seq=1)
    check(ctx, fasa(), prompt + ours, tokens, seq=0)


def test_seq_keep(fasa, text):
    prompt = text(400)
    ctx = fasa(n_seq=2, unified=True)
    ctx.decode(text(300), seq=1)
    ctx.decode(prompt, seq=0)
    llama().llama_memory_seq_keep(ctx.memory, 0)
    check(ctx, fasa(), prompt, text(STEPS))


def test_state_of_the_context(fasa, text):
    """Saved and loaded, into a used and into a fresh context; the index is rebuilt at once, not in a timed step."""
    prompt, tokens = text(430), text(STEPS)
    source = fasa()
    expected = steps_after(source, prompt, tokens)
    rm(source, 0, len(prompt), -1)
    state = source.save()
    used = fasa()
    steps_after(used, text(600), text(2))
    for ctx in (used, fasa(), source):
        before = ctx.stats().n_index_rebuild
        ctx.load(state)
        assert ctx.stats().n_index_rebuild == before + 1
        assert difference(steps(ctx, tokens), expected) <= tolerances.LIFECYCLE_NMSE
        assert ctx.stats().n_index_rebuild == before + 1


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_state_of_a_sequence(fasa, text, unified):
    """One sequence saved, and loaded as another one of another context, whose own go on undisturbed."""
    prompt, other, tokens = text(430), text(350), text(STEPS)
    source, ctx = (fasa(n_ctx=2 * N_CTX, n_seq=3, unified=unified) for _ in range(2))
    source.decode(prompt, seq=1)
    state = source.save(seq=1)
    ctx.decode(other, seq=0)
    ctx.decode(text(150), seq=2)
    ctx.load(state, seq=1)
    check(ctx, fasa(), prompt, tokens, seq=1)
    check(ctx, fasa(), other, tokens, seq=0)
    ctx.load(state, seq=0)  # over a sequence in use
    check(ctx, fasa(), prompt, tokens, seq=0)


def test_state_in_files(fasa, text, tmp_path):
    """The same through session and sequence files."""
    prompt, tokens, api = text(430), text(STEPS), llama()
    kept = (ctypes.c_int32 * len(prompt))(*prompt)
    n_kept = ctypes.c_size_t()
    source, path = fasa(), str(tmp_path / "state").encode()
    source.decode(prompt)
    for save, load in [
        (lambda: api.llama_state_save_file(source.handle, path, kept, len(prompt)),
         lambda ctx: api.llama_state_load_file(ctx.handle, path, kept, len(prompt), n_kept)),
        (lambda: api.llama_state_seq_save_file(source.handle, path, 0, kept, len(prompt)),
         lambda ctx: api.llama_state_seq_load_file(ctx.handle, path, 0, kept, len(prompt), n_kept)),
    ]:  # fmt: skip
        assert save()
        ctx = fasa()
        steps_after(ctx, text(500), text(2))
        assert load(ctx) and n_kept.value == len(prompt)
        check(ctx, fasa(), prompt, tokens)


def test_state_of_a_dense_context(fasa, text):
    """State files hold no index: what was saved with FASA off loads with FASA on, and the other way round."""
    prompt, tokens = text(430), text(STEPS)
    dense, sparse = fasa(OFF), fasa()
    dense.decode(prompt)
    expected = np.stack([dense.decode([t]) for t in tokens])
    rm(dense, 0, len(prompt), -1)
    sparse.load(dense.save())
    check(sparse, fasa(), prompt, tokens)
    rm(sparse, 0, len(prompt), -1)
    again = fasa(OFF)
    again.load(sparse.save())
    assert difference([again.decode([t]) for t in tokens], expected) <= tolerances.LIFECYCLE_NMSE


RESTART = """
import ctypes, json, os, sys
import llama_cpp as api
job = json.loads(sys.argv[1])
quiet = api.llama_log_callback(lambda level, text, data: None)
api.llama_log_set(quiet, ctypes.c_void_p(0))
if job["fasa"]:
    from support.runtime import ON, fasa_params
    in_force = fasa_params(ON, *job["fasa"])
    in_force.__enter__()
params = api.llama_model_default_params()
params.n_gpu_layers = 0
model = api.llama_model_load_from_file(job["model"].encode(), params)
params = api.llama_context_default_params()
params.n_ctx = params.n_batch = 1024
params.n_threads = params.n_threads_batch = params.flash_attn_type = 1
params.type_k = job["type_k"]
ctx = api.llama_init_from_model(model, params)
n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
whole, sequence = ((job["state"] + end).encode() for end in (".context", ".sequence"))
kept, n_read = (ctypes.c_int32 * 1)(), ctypes.c_size_t()
if job["load"] == "context":
    assert api.llama_state_load_file(ctx, whole, kept, 1, n_read)
elif job["load"] == "sequence":
    assert api.llama_state_seq_load_file(ctx, sequence, 0, kept, 1, n_read)
step, said = job["tokens"], []
for _ in range(job["n"]):
    step = (ctypes.c_int32 * len(step))(*step)  # the batch only points to it
    assert api.llama_decode(ctx, api.llama_batch_get_one(step, len(step))) == 0
    logits = api.llama_get_logits_ith(ctx, -1)[:n_vocab]
    said.append(max(range(n_vocab), key=logits.__getitem__))
    step = said[-1:]
if job["save"]:
    assert api.llama_state_save_file(ctx, whole, kept, 1)
    assert api.llama_state_seq_save_file(ctx, sequence, 0, kept, 1)
print(json.dumps(said))
"""


@pytest.fixture
def process(model, tmp_path):
    """A function that decodes greedily in a process of its own, which may load a state first and save it at the end."""

    def run(tokens, n, type_k, load="", save=False, fasa=True, lib_dir=None):
        job = dict(model=str(model.path), state=str(tmp_path / "state"), tokens=tokens, n=n, type_k=type_k, load=load)
        job |= dict(save=save, fasa=[BUDGET, N_SINK, N_RECENT] if fasa else None)
        stock = Path(llama().__file__).parent.parent
        env = {**os.environ, "LLAMA_FASA_VERIFY": "1", "PYTHONPATH": f"{stock}:{os.environ.get('PYTHONPATH', '')}"}
        env["LLAMA_CPP_LIB_PATH"] = str(lib_dir or native.lib_dir())
        command = [sys.executable, "-c", RESTART, json.dumps(job)]
        tests = Path(__file__).parent
        done = subprocess.run(command, cwd=tests, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_save_restart_continue(process, text, type_k):
    """Saved, and gone on with in another process: the same tokens as without the break."""
    prompt, n, type_k = text(420), 24, TYPES[type_k]
    unbroken = process(prompt, 2 * n, type_k)
    first = process(prompt, n, type_k, save=True)
    for what in ("context", "sequence"):
        assert first + process(first[-1:], n, type_k, load=what) == unbroken
    assert process(prompt, 2 * n, type_k, fasa=False) != unbroken


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_state_files_and_unpatched_llama_cpp(process, text, type_k):
    """A state that FASA saved goes on in unpatched llama.cpp as here with FASA off, and the other way round."""
    unpatched = os.environ.get("FASA_UNPATCHED_LIB_DIR")
    if not unpatched:
        pytest.skip("FASA_UNPATCHED_LIB_DIR names no folder of unpatched llama.cpp libraries")
    prompt, n, type_k, ways = text(420), 24, TYPES[type_k], ("context", "sequence")
    stock = dict(fasa=False, lib_dir=unpatched)
    last = process(prompt, n, type_k, save=True)[-1:]
    for what in ways:
        assert process(last, n, type_k, load=what, **stock) == process(last, n, type_k, load=what, fasa=False)
    last = process(prompt, n, type_k, save=True, **stock)[-1:]
    here = [process(last, n, type_k, load=what) for what in ways]
    assert process(prompt, n, type_k, save=True, fasa=False)[-1:] == last
    assert [process(last, n, type_k, load=what) for what in ways] == here


def test_context_shift(fasa, text):
    """seq_add rotates cached K in place, and the index with it: an index from before the shift fails this test.

    The reference is a state load of the shifted cache, which rebuilds the index from K.
    """
    prompt, tokens = text(600), text(STEPS)
    ctx = fasa()
    assert llama().llama_memory_can_shift(ctx.memory)
    steps_after(ctx, prompt, text(2))
    rm(ctx, 0, 100, 250)
    llama().llama_memory_seq_add(ctx.memory, 0, 250, -1, -150)
    n = llama().llama_memory_seq_pos_max(ctx.memory, 0) + 1
    assert n == 602 - 150
    actual = steps(ctx, tokens)
    assert ctx.stats().n_index_rebuild == 1
    rm(ctx, 0, n, -1)
    reference = fasa()
    reference.load(ctx.save())
    assert difference(actual, steps(reference, tokens)) <= tolerances.LIFECYCLE_NMSE


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_context_shift_of_one_sequence(fasa, text, unified):
    """The other sequence is not disturbed."""
    prompt, tokens = text(400), text(STEPS)
    ctx = fasa(n_ctx=2 * N_CTX, n_seq=2, unified=unified)
    ctx.decode(text(500), seq=0)
    ctx.decode(prompt, seq=1)
    rm(ctx, 0, 0, 100)
    llama().llama_memory_seq_add(ctx.memory, 0, 100, -1, -100)
    check(ctx, fasa(), prompt, tokens, seq=1)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_many_sequences_in_a_batch(fasa, text, unified):
    """max_batch counts the rows of a sequence: a batch of one row for each of ten decodes sparse."""
    n_seq, prompt, tokens = 10, text(400), text(STEPS)
    ctx = fasa(n_ctx=512 * n_seq, n_seq=n_seq, unified=unified)
    for seq in range(n_seq):
        ctx.decode(prompt, seq=seq)
    expected = steps_after(fasa(), prompt, tokens)
    before = ctx.stats().n_row_sparse
    batches = [[(token, 400 + i, [seq]) for seq in range(n_seq)] for i, token in enumerate(tokens)]
    actual = np.stack([ctx.decode_rows(rows) for rows in batches])
    assert ctx.stats().n_row_sparse == before + n_seq * STEPS
    for seq in range(n_seq):
        assert difference(actual[:, seq], expected) <= tolerances.LIFECYCLE_NMSE, f"sequence {seq}"


# --- budgets at run time, and batches that decode and read prompts at once ---


def test_budget_of_each_step(fasa, text):
    """Steps with changing budgets, whose graphs llama.cpp would reuse: the bits of contexts made with those budgets."""
    prompt, tokens = text(700), text(4)
    ctx, expected = fasa(), {}
    for budget in (BUDGET, 0, 40, 300):
        with fasa_params(ON if budget else OFF, budget, N_SINK, N_RECENT), ctx.model.context(n_ctx=N_CTX) as made:
            made.decode(prompt)
            expected[budget] = probe(made, tokens, len(prompt))
    ctx.decode(prompt)
    for budget in (0, 40, 40, 300, BUDGET, 0, BUDGET, 300):
        assert ctx.set_budget(budget) == (0, "")
        assert ctx.info().budget == budget
        assert np.array_equal(probe(ctx, tokens, len(prompt)), expected[budget])
    assert ctx.stats().n_step_sparse == 6 * len(tokens) and ctx.stats().n_step_dense == 2 * len(tokens)


def probe(ctx, tokens, n):
    """Logits of each token as the one at position n."""
    logits = []
    for token in tokens:
        logits.append(ctx.decode([token], pos=n))
        rm(ctx, 0, n, -1)
    return np.stack(logits)


def test_budget_that_cannot_be(fasa):
    ctx, off = fasa(), fasa(OFF)
    for budget, message in [(-1, "-1, outside"), (2**24 + 1, "outside"), (N_SINK + N_RECENT, "leave no room")]:
        status, error = ctx.set_budget(budget)
        assert status == -1 and message in error and ctx.info().budget == BUDGET
    assert off.set_budget(0)[0] == 0
    status, error = off.set_budget(BUDGET)
    assert status == -1 and "runs without" in error


def test_prompt_beside_decoding(fasa, text):
    """Rows of a unified cache that decode are sparse while the prompt behind them in the batch is read densely.

    The batches have as many rows and sequences, so that only FASA can tell that a graph does not fit.
    """
    first, second, n_draft = text(450), text(400), 3
    ctx, alone, dense = fasa(n_ctx=2 * N_CTX, n_seq=2), fasa(), fasa(OFF)
    ctx.decode(first)
    alone.decode(first)
    read, decoded, prompts = 0, [], []
    for n_decode in (1, n_draft, 1, n_draft, 1):
        tokens, piece = text(n_decode), second[read : read + 60 - n_decode]
        rows = [(t, len(first) + i, [0]) for i, t in enumerate(tokens)]
        rows += [(t, read + i, [1]) for i, t in enumerate(piece)]
        before = ctx.stats()
        actual = ctx.decode_rows(rows)
        after = ctx.stats()
        assert after.n_step_mixed == before.n_step_mixed + 1 and after.n_row_sparse == before.n_row_sparse + n_decode
        decoded += zip(actual[:n_decode], alone.decode(tokens, all_logits=True))
        prompts += zip(actual[n_decode:], dense.decode(piece, all_logits=True))
        first, read = first + tokens, read + len(piece)
    assert difference(*zip(*decoded)) <= tolerances.LIFECYCLE_NMSE
    assert difference(*zip(*prompts)) <= tolerances.LIFECYCLE_NMSE
    more = text(300)
    ctx.decode(more, seq=1)
    check(ctx, fasa(), second[:read] + more, text(STEPS), seq=1)


def test_prompt_before_decoding(fasa, text):
    """Rows that decode are dense where a prompt comes first in the batch."""
    first, second = text(450), text(60)
    ctx = fasa(n_seq=2)
    ctx.decode(first)
    ctx.decode_rows([(t, i, [1]) for i, t in enumerate(second)] + [(7, len(first), [0])])
    assert (ctx.stats().n_step_mixed, ctx.stats().n_step_sparse, ctx.stats().n_step_prefill) == (0, 0, 2)


def test_few_tokens_of_a_prompt(fasa, text):
    """Rows of a sequence that reads a prompt are dense however few they are, of whatever sequences are beside it.

    The steps have as many rows, so that only FASA can tell that a graph does not fit.
    """
    prompt, token = text(450), text(1)
    ctx, dense = fasa(), fasa(OFF)
    ctx.decode(prompt)
    dense.decode(prompt)
    expected = probe(dense, token, len(prompt))
    sparse = probe(ctx, token, len(prompt))
    for seqs, logits in [([0], expected), ([], sparse), ([1], sparse), ([1, 0], expected), ([], sparse)]:
        ctx.set_prompts(*seqs)
        assert np.array_equal(probe(ctx, token, len(prompt)), logits), seqs
    assert not np.array_equal(sparse, expected)
    assert (ctx.stats().n_step_sparse, ctx.stats().n_step_prefill) == (4, 3)  # one of them the prompt


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_few_tokens_of_a_prompt_beside_decoding(fasa, text, unified):
    """The sequence before the prompt decodes sparse; in a cache of streams, whose rows go together, it is dense."""
    prompts, tokens = [text(450), text(430)], text(2)
    ctx = fasa(n_ctx=2 * N_CTX, n_seq=2, unified=unified)
    for seq, prompt in enumerate(prompts):
        ctx.decode(prompt, seq=seq)
    ctx.set_prompts(1)
    before = ctx.stats()
    rows = ctx.decode_rows([(token, len(prompts[seq]), [seq]) for seq, token in enumerate(tokens)])
    after = ctx.stats()
    assert (after.n_step_mixed - before.n_step_mixed, after.n_row_sparse - before.n_row_sparse) == (unified, unified)
    for seq, mode in enumerate([ON if unified else OFF, OFF]):
        alone = fasa(mode)
        alone.decode(prompts[seq])
        assert tolerances.nmse(rows[seq], alone.decode(tokens[seq : seq + 1])) <= tolerances.LIFECYCLE_NMSE
    ctx.set_prompts()
    check(ctx, fasa(), prompts[1] + tokens[1:], text(STEPS), seq=1)


# --- types of K, V and the index ---

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}  # ggml_type
KV_TYPES = [("f16", "f16"), ("bf16", "bf16"), ("f32", "f32"), ("q8_0", "q8_0"), ("q5_1", "q5_0"), ("q4_1", "q4_1"),
            ("q4_0", "q4_0"), ("q8_0", "f16"), ("f16", "q4_0")]  # fmt: skip


def cache(type_k, type_v="f16"):
    return dict(type_k=TYPES[type_k], type_v=TYPES[type_v])


@pytest.fixture(scope="module", params=[64, 32], ids=["rotated", "plain"])
def typed(request, tmp_path_factory):
    """A function that creates a context of a model with heads of 64 dims, whose K llama.cpp rotates if it is quantised
    and a test does not forbid it, or with heads of 32 dims, whose K it never rotates."""
    folder, n_tip = tmp_path_factory.mktemp("typed"), [6, 8]
    shape = Shape(n_layer=2, head_size=request.param, n_embd=4 * request.param)
    plain = write_tiny_gguf(folder / "plain.gguf", "qwen2", shape, sharpness=3.0)
    fcs = gguf_keys.random_fcs(np.random.default_rng(5), shape.n_head_kv, shape.head_size, n_tip)
    keys = gguf_keys.fasa_keys(len(n_tip), shape.n_head_kv, shape.head_size, n_tip, fcs, "neox")

    def create(index_type, mode=ON, **kwargs):
        with fasa_params(mode, BUDGET, N_SINK, N_RECENT, index_type=index_type):
            return model.context(n_ctx=N_CTX, **kwargs)

    create.rotated = request.param % 64 == 0
    with Model(gguf_keys.with_keys(plain, folder / "model.gguf", keys)) as model:
        yield create


@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize("type_k, type_v", KV_TYPES)
def test_index_of_decode_is_that_of_a_rebuild(typed, text, type_k, type_v, index_type):
    """The index written token by token holds the bits of one rebuilt from the same K, whatever their types."""
    prompt, tokens, more = text(400), text(STEPS), text(STEPS)
    with typed(index_type, **cache(type_k, type_v)) as ctx, typed(index_type, **cache(type_k, type_v)) as rebuilt:
        steps_after(ctx, prompt, tokens)
        rebuilt.load(ctx.save())
        assert rebuilt.stats().n_index_rebuild == 1
        assert np.array_equal(steps(ctx, more), steps(rebuilt, more))


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("type_k", ["q8_0", "q5_1"])
def test_index_is_taken_before_the_rotation(typed, text, monkeypatch, type_k, rotate):
    """Selection by a quantised K is that of f16 but for its rounding; other dims would select something else."""
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", str(int(not rotate)))
    prompt, tokens = text(400), text(STEPS)
    results = {}
    for name, mode, kv in [("f16", ON, "f16"), ("quantised", ON, type_k), ("dense", OFF, type_k)]:
        with typed("f16", mode, **cache(kv)) as ctx:
            ctx.decode(prompt)
            results[name] = np.stack([ctx.decode([token]) for token in tokens])
    rounding = difference(results["quantised"], results["f16"])
    assert rounding < 0.2 * difference(results["dense"], results["f16"])


@pytest.mark.parametrize("type_k", ["f16", "f32", "q8_0"])
def test_context_shift_of_a_type(typed, text, type_k):
    """llama.cpp shifts K, which it cannot if it is quantised and not rotated, and the index is rebuilt from it."""
    prompt, tokens = text(500), text(STEPS)
    if type_k == "q8_0" and not typed.rotated:
        pytest.skip("llama.cpp crashes")
    with typed("q8", **cache(type_k)) as ctx, typed("q8", **cache(type_k)) as reference:
        steps_after(ctx, prompt, text(2))
        rm(ctx, 0, 100, 250)
        llama().llama_memory_seq_add(ctx.memory, 0, 250, -1, -150)
        actual = steps(ctx, tokens)
        assert ctx.stats().n_index_rebuild == 1
        rm(ctx, 0, 502 - 150, -1)
        reference.load(ctx.save())
        assert difference(actual, steps(reference, tokens)) <= tolerances.LIFECYCLE_NMSE


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_full_budget_is_off_whatever_the_index(typed, text, index_type):
    """While the cache fits the budget, the bits are those of FASA off."""
    prompt, tokens = text(200), text(STEPS)
    with typed(index_type) as ctx, typed(index_type, OFF) as off:
        logits = [[c.decode(prompt)] + [c.decode([t]) for t in tokens] for c in (ctx, off)]
        assert ctx.stats().n_step_sparse == 0 and ctx.info().active and not off.info().active
    assert np.array_equal(*logits)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_threads(typed, text, index_type):
    """Any number of threads says the same."""
    prompt, said = text(420), []
    for n_threads in (1, 2, 3, 5):
        with typed(index_type, n_threads=n_threads) as ctx:
            said.append(ctx.greedy(prompt, 24))
            assert ctx.stats().n_step_sparse == 24
    assert said.count(said[0]) == len(said)
