"""Stage calibrate against transformers: the same FCs from weights that llama.cpp never saw, by code that shares nothing."""

import importlib

import numpy as np
import pytest

from fasa_calibrate.calibrate import Options, calibrate
from fasa_calibrate.criteria import Rules
from fasa_calibrate.native import load_llama_cpp
from fasa_calibrate.observe import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RULES, N_TIP, N_TOKENS, N_QUERY = Rules(budget=48, n_sink=2, n_recent=6), 6, 400, 8
SIZES = dict(
    vocab_size=320, intermediate_size=96, max_position_embeddings=2048, tie_word_embeddings=False, hidden_size=64,
    num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
)  # fmt: skip


GEMMA3 = dict(
    num_hidden_layers=6, head_dim=16, query_pre_attn_scalar=16, sliding_window=64, tie_word_embeddings=True
)  # fmt: skip
MODELS = {  # kind -> (configuration, what differs, layers that FASA can serve)
    "Llama": ("LlamaConfig", {}, [0, 1, 2]),
    "Qwen2": ("Qwen2Config", {}, [0, 1, 2]),
    "Gemma3": ("Gemma3TextConfig", GEMMA3, [5]),  # the others have a sliding window
}


def tiny_model(kind, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    config = getattr(transformers, MODELS[kind][0])(**{**SIZES, **MODELS[kind][1]})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed" in name:
                torch.nn.init.normal_(p)
            elif p.dim() == 2:  # attention that prefers some tokens, as trained models have
                torch.nn.init.normal_(p, std=(2.0 if "q_proj" in name or "k_proj" in name else 1.0) / p.shape[1] ** 0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.5)
            else:
                torch.nn.init.normal_(p, mean=1.0, std=0.1)
    return model


def rotated_q_and_k(model, tokens, monkeypatch):
    """Of each layer: q [H, N, D] and k [G, N, D] after rotary embedding, in float64."""
    module = importlib.import_module(type(model).__module__)
    rotate, seen = module.apply_rotary_pos_emb, []

    def spy(*args, **kwargs):
        q, k = rotate(*args, **kwargs)
        seen.append((q[0].numpy(), k[0].numpy()))
        return q, k

    monkeypatch.setattr(module, "apply_rotary_pos_emb", spy)
    with torch.no_grad():
        model.double()(torch.tensor(tokens[None]))
    return seen


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def captured(q, k, positions, fcs):
    """The dense mass that tokens selected by fcs capture; q: [R, N, D], k: [N, D]."""
    d = k.shape[1]
    dims = [dim for fc in fcs for dim in (fc, fc + d // 2)]  # pairs as transformers has them
    mass = 0.0
    for t in positions:
        rank = softmax(q[:, t, dims] @ k[: t + 1, dims].T / np.sqrt(d)).sum(axis=0)
        rank[: RULES.n_sink] = rank[t + 1 - RULES.n_recent :] = np.inf
        kept = np.argsort(-rank, kind="stable")[: RULES.budget]
        mass += softmax(q[:, t] @ k[: t + 1].T / np.sqrt(d))[:, kept].sum()
    return mass


def dropped_one_by_one(q, k, positions, n_tip):
    """The FCs of one KV head that are left after dropping those without which the others capture most; every second query
    says which half of them come into question."""
    chosen = list(range(k.shape[1] // 2))

    def without(fc, at):
        return captured(q, k, at, [c for c in chosen if c != fc])

    while len(chosen) > n_tip:
        half = sorted(chosen, key=lambda fc: -without(fc, positions[::2]))[: (len(chosen) + 1) // 2]
        chosen.remove(max(sorted(half), key=lambda fc: without(fc, positions)))
    return chosen


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_same_fcs_from_transformers_weights(tmp_path, rng, monkeypatch, kind):
    from support.hf_to_gguf import hf_to_gguf

    model = tiny_model(kind, rng)
    tokens = rng.integers(0, SIZES["vocab_size"], N_TOKENS)
    path = hf_to_gguf(model, tmp_path / "tiny.gguf")
    options = Options("mass", N_TIP, RULES, N_TOKENS, N_QUERY, n_dense=0)
    positions = []
    with Model(load_llama_cpp(), path) as loaded:
        monkeypatch.setattr(loaded, "tokenize", lambda text: tokens.astype(np.int32))
        attentions = loaded.attentions
        monkeypatch.setattr(
            loaded, "attentions", lambda tokens, at, *rest: [positions.extend(at), attentions(tokens, at, *rest)]
        )
        result = calibrate(loaded, "", options, n_threads=2)
    assert len(positions) == N_QUERY and sorted(result.fcs) == MODELS[kind][2]

    seen, same = rotated_q_and_k(model, tokens, monkeypatch), []
    for layer in result.fcs:
        q, k = seen[layer]
        for head, fcs in enumerate(result.fcs[layer]):
            group = q[2 * head : 2 * head + 2], k[head], positions
            expected = dropped_one_by_one(*group, N_TIP)
            same.append(fcs == expected)
            # llama.cpp's K is rounded, so that a step may decide a near tie otherwise
            assert captured(*group, fcs) >= 0.99 * captured(*group, expected), f"layer {layer}, KV head {head}"
    assert sum(same) >= len(same) - 1, "more than a near tie"
