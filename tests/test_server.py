"""llama-server with FASA: slots, budgets of requests, what it reports, drafts, saved slots, shifts, embeddings."""

import numpy as np
import pytest

from support.gguf_keys import fasa_keys, random_fcs, with_keys
from support.server import Server
from support.tiny_gguf import N_VOCAB, Shape, write_tiny_gguf

BUDGET, N_SINK, N_RECENT = 64, 4, 12
FASA = ["--fasa", "on", "--fasa-budget", BUDGET, "--fasa-sink", N_SINK, "--fasa-recent", N_RECENT]
OFF = ["--fasa", "off"]
N_TIP = [6, 0, 5]
UNIFIED, STREAMS = ["-np", 4, "--kv-unified"], ["-np", 4, "--no-kv-unified"]


def write_model(folder, arch, n_tip, rope_type):
    """A tiny calibrated model whose attention is sharp."""
    shape = Shape(n_layer=len(n_tip))
    plain = write_tiny_gguf(folder / "plain.gguf", arch, shape, sharpness=3.0)
    fcs = random_fcs(np.random.default_rng(3), shape.n_head_kv, shape.head_size, n_tip)
    keys = fasa_keys(len(n_tip), shape.n_head_kv, shape.head_size, n_tip, fcs, rope_type)
    return with_keys(plain, folder / "model.gguf", keys)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), "llama", N_TIP, "norm")


@pytest.fixture(scope="module")
def window_model(tmp_path_factory):
    """One whose other layers have a sliding window."""
    return write_model(tmp_path_factory.mktemp("window_model"), "gemma3", [0] * 5 + [6], "neox")


@pytest.fixture
def text(rng):
    return lambda n: [int(t) for t in rng.integers(3, N_VOCAB, n)]


@pytest.fixture
def server(bin_dir, model, tmp_path):
    """A function that starts a server, with 4 slots of one cache of 4096 tokens if it says nothing else."""

    def start(*args, n_slot=None, n_ctx=4096, gguf=model):
        sizes = ["-c", n_ctx, "-b", 256, "--metrics", *(["-np", n_slot] if n_slot else [])]
        log = tmp_path / f"log{len(list(tmp_path.iterdir()))}"
        return Server(bin_dir / "llama-server", gguf, *sizes, *args, log=log)

    return start


@pytest.mark.parametrize("kv", [[], UNIFIED, STREAMS], ids=["default", "unified", "streams"])
def test_slots(server, text, kv):
    """Eight requests on four slots, prompts and decoding mixed, one after the other and again at once."""
    requests = [dict(prompt=text(n), n=24) for n in (300, 330, 420, 290, 350, 310, 500, 280)]
    with server(*FASA, *kv) as s:
        alone = [s.complete(**request, cache_prompt=False) for request in requests]
        assert all(t["fasa_sparse_n"] == 23 and t["fasa_dense_n"] == 0 for _, t in alone)
        at_once = s.complete_all([dict(request, cache_prompt=False) for request in requests])
        # not the same tokens: a batch of other rows rounds otherwise and may decide a near tie otherwise
        assert all(len(tokens) == 24 for tokens, _ in alone + at_once)
        assert all(t["fasa_sparse_n"] + t["fasa_dense_n"] == 23 for _, t in at_once)
        # a step of streams that reads a prompt is dense for all four slots
        n_dense = 3 * len(requests) if kv == STREAMS else 0.1 * 23 * len(requests)
        assert sum(t["fasa_dense_n"] for _, t in at_once) <= n_dense
        counts = s.metrics()
        assert counts["rows_sparse_total"] >= sum(t["fasa_sparse_n"] for _, t in alone + at_once)
        if kv != STREAMS:  # whose batches llama.cpp splits by itself, with one row of a prompt beside those that decode
            assert counts["steps_mixed_total"] > 0


def test_the_end_of_a_prompt_is_dense(server, text, model, window_model):
    """However few tokens of it are read at once: what a batch leaves, what an earlier request has left to read, and the
    four that llama-server reads apart where layers have a window. So a sparse answer begins as the dense one does."""
    n, prompts = 10, [text(400), text(256 + 3)]
    for gguf in (model, window_model):
        with server(*FASA, n_slot=1, gguf=gguf) as s:
            for i, prompt in enumerate(prompts):
                whole, _ = s.complete(prompt, n, fasa_budget=0)
                for again in range(2):
                    tokens, timings = s.complete(prompt, n)
                    assert tokens[0] == whole[0] and timings["cache_n"] > 0 and timings["fasa_sparse_n"] == n - 1
                    assert s.metrics()["rows_sparse_total"] == (2 * i + again + 1) * (n - 1), (i, again)


def test_budget_of_a_request(server, text):
    prompt, n, anew = text(700), 16, dict(cache_prompt=False)
    with server(*OFF) as s:
        dense, timings = s.complete(prompt, n, **anew)
        assert "fasa_sparse_n" not in timings
        assert s.complete(prompt, n, fasa_budget=0, **anew)[0] == dense
        status, error = s.request("/completion", dict(prompt=prompt, n_predict=1, fasa_budget=64))
        assert status == 400 and "runs without" in error
    with server("--fasa", "on", "--fasa-budget", 300, *FASA[4:]) as s:
        said = {300: s.complete(prompt, n, **anew)[0]}
    with server(*FASA) as s:
        said[BUDGET] = s.complete(prompt, n, **anew)[0]
        for budget, expected in [(0, dense), (BUDGET, said[BUDGET]), (300, said[300]), (0, dense), (300, said[300])]:
            tokens, timings = s.complete(prompt, n, fasa_budget=budget, **anew)
            assert tokens == expected, budget
            sparse = 0 if budget == 0 else n - 1
            assert timings["fasa_sparse_n"] == sparse and timings["fasa_dense_n"] == n - 1 - sparse
        assert s.complete(prompt, n, **anew)[0] == said[BUDGET]  # a request that says nothing gets the server's
        for bad in (-1, 2**24 + 1, N_SINK + N_RECENT, "many"):
            status, error = s.request("/completion", dict(prompt=prompt, n_predict=1, fasa_budget=bad))
            assert status == 400 and "budget" in error, (bad, error)
        assert s.get("/props")["fasa"]["budget"] == BUDGET


def test_budgets_in_one_batch(server, text):
    """While a request for dense decoding runs, its neighbours are dense too."""
    dense, sparse = (dict(prompt=text(400), n=n) for n in (40, 300))
    with server(*FASA) as s:
        (_, first), (_, second) = s.complete_all([dict(dense, fasa_budget=0), sparse])
        assert first["fasa_sparse_n"] == 0 and first["fasa_dense_n"] == 39
        assert second["fasa_sparse_n"] > 0 and second["fasa_sparse_n"] + second["fasa_dense_n"] == 299


def test_chat_route_takes_a_budget(server, text):
    with server(*FASA, "--chat-template", "chatml", n_slot=1) as s:
        body = dict(messages=[{"role": "user", "content": "x" * 600}], max_tokens=8, temperature=0, ignore_eos=True)
        for budget, sparse in ((BUDGET, 7), (0, 0)):
            timings = s.post("/v1/chat/completions", fasa_budget=budget, **body)["timings"]
            assert timings["fasa_sparse_n"] == sparse and timings["fasa_dense_n"] == 7 - sparse


def test_reports(server, text):
    with server(*FASA) as s:
        s.complete(text(400), 10)
        before = s.get("/props")["fasa"]
        s.complete(text(400), 10)
        props, counts = s.get("/props")["fasa"], s.metrics()
        assert props["active"] and props["index_type"] == "q4"
        assert (props["n_layer_sparse"], props["n_layer_dense"], props["budget"]) == (2, 1, BUDGET)
        steps = [props[name] - before[name] for name in ("n_step_sparse", "n_step_mixed", "n_step_dense")]
        assert steps == [9, 0, 0] and props["n_step_prefill"] > before["n_step_prefill"]
        for name, key in [("sparse", "n_step_sparse"), ("mixed", "n_step_mixed"), ("dense", "n_step_dense")]:
            assert counts[f"steps_{name}_total"] == props[key]
        assert counts["steps_prefill_total"] == props["n_step_prefill"] and counts["rows_sparse_total"] == 18
        assert counts["budget"] == BUDGET and counts["index_bytes"] == props["index_bytes"] > 0
    with server(*OFF) as s:
        assert s.get("/props")["fasa"] == {"active": False} and s.metrics() == {}


@pytest.mark.parametrize("max_batch", [8, 2])
def test_drafts(server, model, text, max_batch):
    """Batches that verify drafts are sparse up to --fasa-max-batch. The draft model is not calibrated."""
    prompt, n = text(400), 40
    draft = ["--spec-type", "draft-simple", "--spec-draft-n-max", 4, "-md", model.parent / "plain.gguf"]
    with server(*FASA, *draft, "--fasa-max-batch", max_batch, n_slot=1) as s:
        tokens, timings = s.complete(prompt, n)
        counts = s.metrics()
        assert len(tokens) == n and timings["draft_n"] > 0
        assert (counts["rows_sparse_total"] > counts["steps_sparse_total"]) == (max_batch == 8)
        assert (timings["fasa_sparse_n"] > timings["fasa_dense_n"]) == (max_batch == 8)


def test_saved_slot(server, text, tmp_path):
    """Saved, restored by a server started anew, and gone on with: the same tokens as without the break."""
    prompt, n = text(420), 30
    args = [*FASA, "--slot-save-path", tmp_path]
    with server(*args, n_slot=1) as s:
        first = s.complete(prompt, n)[0]
        s.post("/slots/0?action=save", filename="slot.bin")
        expected = s.complete(prompt + first, n)[0]
    with server(*args, n_slot=1) as s:
        s.post("/slots/0?action=restore", filename="slot.bin")
        second, timings = s.complete(prompt + first, n)
        assert timings["cache_n"] >= len(prompt) + n - 2 and timings["fasa_sparse_n"] > 0
        assert s.get("/props")["fasa"]["n_index_rebuild"] == 1
    assert second == expected


@pytest.mark.parametrize("kv", [UNIFIED, STREAMS], ids=["unified", "streams"])
def test_shifts_and_prompt_cache(server, text, kv):
    """Context shift, reuse of cached chunks and a prompt cache in RAM: the index is that of K after every step."""
    shared, parts = text(200), [text(150) for _ in range(4)]
    args = ["--context-shift", "--cache-reuse", 32, "--cache-ram", 64]
    with server(*FASA, *kv, *args, "-np", 2, n_ctx=1536) as s:
        requests = [dict(prompt=shared + parts[i] + parts[(i + 1) % 4], n=60) for i in range(4)]
        requests += [dict(prompt=shared + parts[(i + 1) % 4], n=40) for i in range(4)]
        answers = s.complete_all(requests) + [s.complete(text(400), 1500)]
        assert [len(tokens) for tokens, _ in answers] == [r["n"] for r in requests] + [1500]
        assert s.get("/props")["fasa"]["n_index_rebuild"] > 0
        assert s.metrics()["steps_sparse_total"] > 1400


def test_embeddings_and_reranking_are_unaffected(server, text):
    """Both read prompts only, in batches that are dense."""
    prompt, documents = text(300), ["x" * 300, "a few words", "y" * 280]
    embedding, ranking = [], []
    for fasa in (FASA, OFF):
        with server(*fasa, "--embedding", "--pooling", "mean", "-ub", 512, "-b", 512) as s:
            embedding.append(s.post("/v1/embeddings", input=prompt)["data"][0]["embedding"])
        with server(*fasa, "--rerank", "-ub", 512, "-b", 512) as s:
            ranking.append(s.post("/v1/rerank", query="words", documents=documents)["results"])
    assert embedding[0] == embedding[1] and len(embedding[0]) == Shape().n_embd
    assert ranking[0] == ranking[1] and len(ranking[0]) == len(documents)
