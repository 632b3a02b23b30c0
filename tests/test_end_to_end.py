"""Real architectures, whole: transformers models as GGUF files through llama.cpp with FASA, against NumPy with FASA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import tolerances
from support.gguf_keys import fasa_keys, random_fcs, with_keys
from support.native import ggml
from support.runtime import AUTO, INDEX_TYPES, OFF, ON, Model, fasa_params

BUDGET, N_SINK, N_RECENT = 64, 4, 12
N_TIP = {"llama": (4, 0, 6), "qwen2": (0, 6)}  # FCs of each layer, 0 = dense
ARCH = pytest.mark.parametrize("arch", ["llama", "qwen2"])


class Subject:
    """A tiny transformers model, its GGUF file with random FC tables, and tokens to read."""

    def __init__(self, arch, folder, seed):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        from support.hf_to_gguf import hf_to_gguf

        rng = np.random.default_rng([seed, len(arch)])
        sizes = {
            "llama": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3),
            "qwen2": dict(hidden_size=448, num_attention_heads=7, num_key_value_heads=1, num_hidden_layers=2),
        }[arch]
        kind = {"llama": "Llama", "qwen2": "Qwen2"}[arch]
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=320, intermediate_size=96, max_position_embeddings=2048, tie_word_embeddings=False, **sizes
        )
        torch.manual_seed(int(rng.integers(2**31)))
        self.hf = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        sharper = 1.7 if arch == "llama" else 1.3  # attention that prefers some tokens, as trained models have
        with torch.no_grad():
            for name, p in self.hf.named_parameters():
                scale = sharper if "q_proj" in name or "k_proj" in name else 1.0
                if "embed" in name:
                    torch.nn.init.normal_(p)
                elif p.dim() == 2:
                    torch.nn.init.normal_(p, std=scale / p.shape[1] ** 0.5)
                elif name.endswith("bias"):
                    torch.nn.init.normal_(p, std=0.5)
                else:
                    torch.nn.init.normal_(p, mean=1.0, std=0.1)

        self.tokens = rng.integers(0, 320, 700)
        n_rot, n_head_kv = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
        plain = hf_to_gguf(self.hf, folder / f"{arch}-plain.gguf")
        rope_type = {"llama": "norm", "qwen2": "neox"}[arch]
        n_tip = N_TIP[arch]
        self.fcs = random_fcs(rng, n_head_kv, n_rot, n_tip)
        keys = fasa_keys(len(n_tip), n_head_kv, n_rot, n_tip, self.fcs, rope_type)
        self.path = with_keys(plain, folder / f"{arch}.gguf", keys)

    def numpy(self, budget=BUDGET, **kwargs):
        from support.numpy_llama import NumpyLlama

        return NumpyLlama(self.hf, self.fcs, budget, N_SINK, N_RECENT, **kwargs)


@pytest.fixture(scope="module")
def subjects(request, tmp_path_factory):
    made, folder = {}, tmp_path_factory.mktemp("models")

    def subject(arch):
        if arch not in made:
            made[arch] = Subject(arch, folder, request.config.getoption("--seed"))
        return made[arch]

    return subject


def sparse_params(index_type="f16", **kwargs):
    return fasa_params(ON, BUDGET, N_SINK, N_RECENT, index_type=index_type, **kwargs)


def check_rows(actual, expected, margins, most=np.max):
    """Compares the rows all of whose selections are clear-cut; there must be some. most: of their errors."""
    clear = margins > tolerances.MODEL_MARGIN
    assert clear.mean() >= 0.2, "too few rows to compare"
    errors = np.array([tolerances.nmse(a, e) for a, e in zip(actual[clear], expected[clear])])
    assert most(errors) <= tolerances.MODEL_NMSE, f"NMSE {errors.max():.2e}, median {np.median(errors):.2e}"


@ARCH
def test_numpy_model_is_the_transformers_model(subjects, arch):
    """The ground under the tests below: without FASA and f16 the NumPy model is the transformers model."""
    import torch

    subject = subjects(arch)
    tokens = subject.tokens[:200]
    with torch.no_grad():
        expected = subject.hf.double()(torch.tensor(tokens[None])).logits[0].numpy()
    actual, _ = subject.numpy(f16=False).forward(tokens)
    assert tolerances.nmse(actual, expected) < 1e-12


@ARCH
def test_dense_logits(subjects, arch):
    """With FASA off the GGUF file is the model: no mistake in the conversion can hide below."""
    subject = subjects(arch)
    expected, _ = subject.numpy().forward(subject.tokens[:300])
    with fasa_params(OFF), Model(subject.path) as model, model.context() as ctx:
        actual = ctx.decode(subject.tokens[:300], all_logits=True)
        assert ctx.info().active == 0
    assert tolerances.nmse(actual, expected) <= tolerances.MODEL_NMSE


@ARCH
@pytest.mark.parametrize("index_type", INDEX_TYPES)
@pytest.mark.parametrize("n_prompt", [300, 511, 600])
def test_decode_steps_are_sparse(subjects, arch, n_prompt, index_type):
    """Prefill is dense; every step after it attends to the cells that the oracle selects."""
    subject = subjects(arch)
    n_steps = 24
    steps = subject.tokens[n_prompt : n_prompt + n_steps]
    oracle = subject.numpy(index_type=index_type)
    oracle.forward(subject.tokens[:n_prompt])
    expected, margins = map(np.concatenate, zip(*(oracle.forward([token], sparse=True) for token in steps)))
    with sparse_params(index_type), Model(subject.path) as model, model.context() as ctx:
        ctx.decode(subject.tokens[:n_prompt])
        actual = np.stack([ctx.decode([token]) for token in steps])
        stats, info = ctx.stats(), ctx.info()
    # an integer near its rounding boundary may fall on either side, and move all scores of its head
    check_rows(actual, expected, margins, np.max if index_type == "f16" else np.median)

    assert (stats.n_step_sparse, stats.n_row_sparse, stats.n_step_dense) == (n_steps, n_steps, 0)
    assert stats.n_step_prefill == -(-n_prompt // 512) and stats.n_index_rebuild == 0
    n_sparse = sum(n > 0 for n in N_TIP[arch])
    assert (info.active, info.n_layer_sparse, info.n_layer_dense) == (1, n_sparse, len(N_TIP[arch]) - n_sparse)
    assert (info.budget, info.n_sink, info.n_recent) == (BUDGET, N_SINK, N_RECENT)
    assert (info.n_tip_min, info.n_tip_max) == (min(n for n in N_TIP[arch] if n), max(N_TIP[arch]))

    # the comparison means something: dense logits are far from these
    oracle.keep(n_prompt)
    dense = np.concatenate([oracle.forward([token])[0] for token in steps])
    assert tolerances.nmse(dense, expected) > 100 * tolerances.MODEL_NMSE


@pytest.mark.parametrize(
    "budget, schedule, budgets",
    [(64, 150, (96, 0, 32)), (64, 51, (33, 0, 95)), (300, 180, (540, 0, 60))],
    ids=["pyramid", "inverted", "one layer has room for all"],
)
def test_budget_schedule(subjects, budget, schedule, budgets):
    """Each sparse layer keeps its own number of cells; none is dense because the budget of another has room for all."""
    subject, n_prompt = subjects("llama"), 400
    steps = subject.tokens[n_prompt : n_prompt + 24]
    oracle = subject.numpy(budgets)
    oracle.forward(subject.tokens[:n_prompt])
    expected, margins = map(np.concatenate, zip(*(oracle.forward([token], sparse=True) for token in steps)))
    params = fasa_params(ON, budget, N_SINK, N_RECENT, index_type="f16", budget_schedule=schedule)
    with params, Model(subject.path) as model, model.context() as ctx:
        ctx.decode(subject.tokens[:n_prompt])
        actual = np.stack([ctx.decode([token]) for token in steps])
        info, stats = ctx.info(), ctx.stats()
    check_rows(actual, expected, margins)
    assert (info.budget, info.budget_schedule, stats.n_step_sparse) == (budget, schedule, len(steps))


@ARCH
def test_who_runs_dense_layers(subjects, arch):
    """In sparse steps fac over all cells, in all others llama.cpp."""
    _, lib = ggml()
    subject, n_dense = subjects(arch), N_TIP[arch].count(0)
    with sparse_params(), Model(subject.path) as model, model.context() as ctx:
        before = lib.ggml_fasa_cpu_n_dense()
        ctx.decode(subject.tokens[:100])
        ctx.decode(subject.tokens[100:101])
        ctx.decode(subject.tokens[101:400])
        assert lib.ggml_fasa_cpu_n_dense() == before
        for token in subject.tokens[400:405]:
            ctx.decode([token])
        assert lib.ggml_fasa_cpu_n_dense() == before + 5 * n_dense


@ARCH
def test_every_row_of_a_batch_is_sparse(subjects, arch):
    """With max_batch at the batch size a prompt is read sparsely, too, each row with its own selection."""
    subject = subjects(arch)
    expected, margins, oracle = [], [], subject.numpy()
    for first in range(0, 640, 128):
        chunk = subject.tokens[first : first + 128]
        rows, margin = oracle.forward(chunk, sparse=first + 128 > 256)
        expected.append(rows)
        margins.append(margin)
    with sparse_params(max_batch=128), Model(subject.path) as model, model.context(n_ubatch=128) as ctx:
        actual = ctx.decode(subject.tokens[:640], all_logits=True)
        stats = ctx.stats()
    assert (stats.n_step_sparse, stats.n_row_sparse, stats.n_step_dense, stats.n_step_prefill) == (3, 384, 2, 0)
    check_rows(actual, np.concatenate(expected), np.concatenate(margins))


@ARCH
def test_max_batch_draws_the_line(subjects, arch):
    """Batches up to max_batch rows decode sparse, larger ones dense."""
    subject = subjects(arch)
    with sparse_params(max_batch=3), Model(subject.path) as model, model.context() as ctx:
        ctx.decode(subject.tokens[:400])
        for n, first in ((3, 400), (4, 403)):
            ctx.decode(subject.tokens[first : first + n])
        stats = ctx.stats()
    assert (stats.n_step_sparse, stats.n_row_sparse, stats.n_step_prefill) == (1, 3, 2)


@ARCH
@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_budget_of_all_is_off(subjects, arch, index_type):
    """FASA with budget >= n_kv gives the bits of FASA off, token by token."""
    subject = subjects(arch)
    logits = {}
    with Model(subject.path) as model:
        everything = fasa_params(ON, 1024, N_SINK, N_RECENT, index_type=index_type)
        pyramid = fasa_params(ON, 1600, N_SINK, N_RECENT, index_type=index_type, budget_schedule=150)
        for name, params in {"off": fasa_params(OFF), "all": everything, "pyramid": pyramid}.items():
            with params, model.context() as ctx:
                first = ctx.decode(subject.tokens[:500])
                logits[name] = np.stack([first] + [ctx.decode([t]) for t in subject.tokens[500:532]])
                assert ctx.stats().n_step_sparse == 0
    assert np.array_equal(logits["off"], logits["all"]) and np.array_equal(logits["off"], logits["pyramid"])


@ARCH
def test_short_contexts_decode_dense(subjects, arch):
    """Up to n_kv = budget, rounded up to 256, a step is dense and counted so."""
    subject = subjects(arch)
    with Model(subject.path) as model:
        with fasa_params(OFF), model.context() as ctx:
            ctx.decode(subject.tokens[:200])
            expected = np.stack([ctx.decode([t]) for t in subject.tokens[200:210]])
        with sparse_params(), model.context() as ctx:
            ctx.decode(subject.tokens[:200])
            actual = np.stack([ctx.decode([t]) for t in subject.tokens[200:210]])
            assert (ctx.stats().n_step_dense, ctx.stats().n_step_sparse) == (10, 0)
    assert np.array_equal(actual, expected)


@ARCH
def test_auto_needs_a_budget(subjects, arch, tmp_path):
    """AUTO runs FASA when a budget is given, by the caller or by the file, and else not."""
    subject = subjects(arch)
    with_budget = with_keys(subject.path, tmp_path / "budget.gguf", {"fasa.budget": 80, "fasa.n_sink": 2})
    for path, params, expected in [
        (subject.path, {}, 0),
        (subject.path, {"budget": 96}, 96),
        (with_budget, {}, 80),
        (with_budget, {"budget": 96}, 96),
    ]:
        with fasa_params(AUTO, **params), Model(path) as model, model.context() as ctx:
            info = ctx.info()
            assert (info.active, info.budget) == (expected > 0, expected)
            if expected:
                assert info.n_sink == (2 if path == with_budget else 4) and info.n_recent == 32


GREEDY = """
import ctypes, json, sys
sys.path.insert(0, sys.argv[1])
import llama_cpp as api
quiet = api.llama_log_callback(lambda level, text, data: None)
api.llama_log_set(quiet, ctypes.c_void_p(0))
path, n, tokens = sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
params = api.llama_model_default_params()
params.n_gpu_layers = 0
model = api.llama_model_load_from_file(path.encode(), params)
params = api.llama_context_default_params()
params.n_ctx = params.n_batch = 1024
params.n_threads = params.n_threads_batch = 1
params.flash_attn_type = 1
ctx = api.llama_init_from_model(model, params)
n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
said = []
while len(said) < n:
    step = said[-1:] or tokens
    step = (ctypes.c_int32 * len(step))(*step)  # the batch only points to it
    assert api.llama_decode(ctx, api.llama_batch_get_one(step, len(step))) == 0
    logits = api.llama_get_logits_ith(ctx, -1)[:n_vocab]
    said.append(max(range(n_vocab), key=logits.__getitem__))
print(json.dumps(said))
"""


@ARCH
def test_greedy_tokens_of_unpatched_llama_cpp(subjects, arch):
    """The calibrated file in an unpatched build, and FASA off or with budget >= n_kv here: the same tokens."""
    unpatched = os.environ.get("FASA_UNPATCHED_LIB_DIR")
    if not unpatched:
        pytest.skip("FASA_UNPATCHED_LIB_DIR names no folder of unpatched llama.cpp libraries")
    from support.runtime import llama

    subject = subjects(arch)
    tokens = [int(t) for t in subject.tokens[:400]]
    stock = str(Path(llama().__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, stock, str(subject.path), "48", json.dumps(tokens)],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": unpatched}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    with Model(subject.path) as model:
        for params in (fasa_params(OFF), fasa_params(ON, 1024)):
            with params, model.context() as ctx:
                assert ctx.greedy(tokens, 48) == expected
