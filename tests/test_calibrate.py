"""Stage calibrate: what is observed, how FCs are chosen, and the command."""

import re
import signal
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

from fasa_calibrate.calibrate import query_positions, worst_layers
from fasa_calibrate.cli import build_parser, main
from fasa_calibrate.criteria import CHOOSE, RECALL_BUDGETS, Group, Rules, fc_planes, quality, tip_rank, top_sum
from fasa_calibrate.native import load_llama_cpp
from fasa_calibrate.observe import Model, _FasaParams
from oracle import fasa_oracle as oracle
from support.tiny_gguf import Shape, write_tiny_gguf

RULES = Rules(budget=64, n_sink=4, n_recent=8)
TEXT = "All work and no play makes a model dull, but 17 seals on a sandbank do not mind. " * 12
FAST = ["--quiet", "--n-query", "4", "--n-ctx", "400", "--budget", "96"]


# --- criteria: NumPy only ---


def lay_out(planes, rope, n_pass=0):
    """Rows [..., D] from rotary planes [F, ..., 2], and n_pass dims without rotation after them."""
    x, y = planes[..., 0], planes[..., 1]
    rows = np.stack([x, y], axis=1).reshape(-1, *x.shape[1:]) if rope == "norm" else np.concatenate([x, y])
    return np.concatenate([np.moveaxis(rows, 0, -1), np.zeros((*x.shape[1:], n_pass))], axis=-1).astype(np.float32)


def planted(rng, informative, n_fc=16, n_tokens=500, n_query=6, n_head=3):
    """Planes of q [F, Q, R, 2] and k [F, N, 2] whose scores differ between tokens in the informative FCs only.

    The other FCs have larger keys, the same for all tokens but for a little noise: size alone must not count.
    """
    k = 5 * np.ones((n_fc, n_tokens, 2)) + 0.02 * rng.standard_normal((n_fc, n_tokens, 2))
    k[informative] = rng.standard_normal((len(informative), n_tokens, 2))
    return 3 * rng.standard_normal((n_fc, n_query, n_head, 2)), k, np.linspace(200, n_tokens - 1, n_query).astype(int)


def group(q, k, positions, rope="norm", n_pass=0):
    n_rot = 2 * len(k)
    k = lay_out(k, rope, n_pass).astype(np.float16)
    v = np.random.default_rng(5).standard_normal(k.shape).astype(np.float16)
    return Group(lay_out(q, rope, n_pass), k, v, positions, rope, n_rot, 0.25)


def captured(group, fcs, rules):
    """Dense attention mass on the tokens that the oracle's stages select with these FCs, averaged."""
    total = 0
    for i, t in enumerate(group.positions):
        mask = np.zeros(t + 1)
        mask[: rules.n_sink] = mask[t + 1 - rules.n_recent :] = -0.0
        rank = oracle_rank(group.fc_scores(i)[list(fcs)].sum(axis=0), mask)
        kept = oracle.select(rank, rules.budget)
        total += group.attention(i)[:, kept].sum(axis=1).mean()
    return total / len(group.positions)


def oracle_rank(tip, mask):
    """The oracle's stage tip, given scores: an index of one dim per head, in which that head's query is 1."""
    index = np.zeros((oracle.new_index(1, 1, -(-len(mask) // oracle.TILE) * oracle.TILE, len(tip)))[0, 0].shape)
    cells = np.arange(len(mask))
    index[cells // oracle.TILE, :, cells % oracle.TILE] = tip.T
    return oracle.tip(np.eye(len(tip)), index, mask)


@pytest.mark.parametrize("rope", ["norm", "neox"])
@pytest.mark.parametrize("criterion", ["mass", "overlap", "error", "ca"])
def test_finds_the_planted_fcs(rng, criterion, rope):
    informative = sorted(rng.choice(16, 4, replace=False).tolist())
    head = group(*planted(rng, informative), rope=rope)
    assert CHOOSE[criterion](head, 4, RULES, rng) == informative


def test_random_misses_planted_fcs_and_captures_less(rng):
    informative = [1, 6, 9, 14]
    head = group(*planted(rng, informative))
    chosen = CHOOSE["random"](head, 4, RULES, np.random.default_rng(0))
    assert chosen != informative
    assert captured(head, chosen, RULES) < 0.8 * captured(head, informative, RULES)


@pytest.mark.parametrize("criterion", ["mass", "overlap", "error", "ca"])
@pytest.mark.parametrize("n_pass", [0, 8])
def test_pairing_does_not_change_the_ids(rng, criterion, n_pass):
    q, k, positions = rng.standard_normal((12, 5, 2, 2)), rng.standard_normal((12, 300, 2)), np.arange(150, 300, 30)
    norm, neox = (group(q, k, positions, rope, n_pass) for rope in ("norm", "neox"))
    assert CHOOSE[criterion](norm, 5, RULES, rng) == CHOOSE[criterion](neox, 5, RULES, rng)
    assert np.array_equal(norm.attention(0), neox.attention(0)) or np.allclose(norm.attention(0), neox.attention(0))


@pytest.mark.parametrize("rope", ["norm", "neox"])
def test_planes_are_the_dims_of_the_contract(rng, rope):
    x = rng.standard_normal((7, 40)).astype(np.float32)
    planes = fc_planes(x, rope, 24)
    for fc in range(12):
        assert np.array_equal(planes[fc], x[:, oracle.fc_dims([fc], 24, rope)])


def test_fc_scores_add_up_to_the_logits_of_the_rotated_dims(rng):
    head = group(rng.standard_normal((8, 2, 3, 2)), rng.standard_normal((8, 50, 2)), [30, 49], n_pass=6)
    np.testing.assert_allclose(head.fc_scores(1).sum(axis=0), head.logits(1), rtol=2e-5, atol=2e-5)


def test_attention_has_softcap_and_sinks(rng):
    q, k = rng.standard_normal((1, 2, 8)).astype(np.float32), rng.standard_normal((20, 8)).astype(np.float16)
    sinks = np.array([0.5, -1.0], np.float32)
    got = Group(q, k, k, [19], "norm", 8, 0.7, softcap=3.0, sinks=sinks).attention(0)
    logits = 3.0 * np.tanh(0.7 * (q[0].astype(float) @ k.astype(float).T) / 3.0)
    e = np.exp(np.concatenate([logits, sinks[:, None]], axis=1))
    np.testing.assert_allclose(got, (e / e.sum(axis=1, keepdims=True))[:, :-1], rtol=1e-5)


def test_mass_is_the_greedy_choice_by_the_oracle(rng):
    """FCs 0 to 3 are nearly the same: whoever scores each FC on its own takes them all."""
    q, k = rng.standard_normal((10, 6, 3, 2)), rng.standard_normal((10, 300, 2))
    q[:4], k[:4] = 1.5 * q[0], k[0] + 0.05 * rng.standard_normal((4, 300, 2))
    head = group(q, k, np.arange(140, 300, 30))
    chosen = list(range(10))
    while len(chosen) > 4:
        chosen.remove(max(chosen, key=lambda fc: captured(head, [c for c in chosen if c != fc], RULES)))
    assert CHOOSE["mass"](head, 4, RULES, rng) == chosen
    alone = sorted(range(10), key=lambda fc: -captured(head, [fc], RULES))[:4]
    assert chosen != sorted(alone)


def test_mass_captures_more_than_ca_and_random(rng):
    """Four kinds of FCs, three of each, one kind stronger than the other: it agrees best with the full score, but its
    FCs add nothing to each other."""
    q, k = rng.standard_normal((12, 8, 3, 2)), rng.standard_normal((12, 600, 2))
    for i in range(0, 12, 3):
        q[i : i + 3], k[i : i + 3] = (1 + i / 12) * q[i], k[i] + 0.05 * rng.standard_normal((3, 600, 2))
    head = group(q, k, np.arange(200, 600, 50))
    mass, ca, *random = (captured(head, CHOOSE[c](head, 4, RULES, rng), RULES) for c in ("mass", "ca", *8 * ["random"]))
    assert mass > ca and mass > np.mean(random), (mass, ca, random)


def test_center_is_the_mean_in_the_order_of_the_index(rng):
    q, k = rng.standard_normal((6, 1, 2, 2)), 3 + rng.standard_normal((6, 100, 2))
    for rope in ("norm", "neox"):
        head = group(q, k, [99], rope)
        dims = oracle.fc_dims([1, 4], 12, rope).reshape(-1, 2).T.ravel()
        rows = lay_out(k, rope).astype(np.float16).astype(np.float64)
        np.testing.assert_allclose(head.center([1, 4]), rows.mean(axis=0)[dims], rtol=1e-6)


def test_quality_is_that_of_the_oracle(rng):
    head = group(rng.standard_normal((8, 4, 2, 2)), rng.standard_normal((8, 300, 2)), [150, 200, 250, 299])
    fcs = [0, 3, 5]
    error = size = recall = 0.0
    for i, t in enumerate(head.positions):
        mask = np.zeros(t + 1)
        mask[: RULES.n_sink] = mask[t + 1 - RULES.n_recent :] = -0.0
        kept = oracle.select(oracle_rank(head.fc_scores(i)[fcs].sum(axis=0), mask), RULES.budget)
        weights, v = head.attention(i), np.random.default_rng(5).standard_normal((300, 16)).astype(np.float16)[: t + 1]
        dense = weights @ v
        recall += weights[:, kept].sum(axis=1).mean() / 4
        sparse = weights[:, kept] @ v[kept] / weights[:, kept].sum(axis=1, keepdims=True)
        error, size = error + np.square(sparse - dense).sum(), size + np.square(dense).sum()
    got = quality(head, fcs, RULES)
    np.testing.assert_allclose((got.error, got.size, got.mean_recall[0]), (error, size, recall), rtol=1e-4)
    assert RULES.budget == RECALL_BUDGETS[0] and got.mean_recall[-1] == pytest.approx(1)
    assert (np.diff(got.mean_recall) >= 0).all()
    assert quality(head, fcs, Rules(400, 4, 8)).error < 1e-9 * size


@pytest.mark.filterwarnings("error")
def test_quality_where_no_mass_is_selected(rng):
    """Sharp heads give most tokens a weight of 0 in float32."""
    q, k = np.ones((4, 1, 2, 2)), rng.uniform(-0.1, 0.1, (4, 300, 2))
    q[0], k[0], k[0, 100] = 100, 0, 100  # only token 100 has weight, and FC 3 does not see it
    head = group(q, k, [299])
    got = quality(head, [3], RULES)
    assert got.relative_error == 1 and got.mean_recall[0] == 0
    assert CHOOSE["error"](head, 1, RULES, rng) == [0]


def test_rank_equals_the_oracle(rng):
    scores = 4 * rng.standard_normal((3, 2, 77)).astype(np.float32)
    expected = [oracle_rank(s.astype(np.float64), np.zeros(77)) for s in scores]
    np.testing.assert_allclose(tip_rank(scores.copy()), expected, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 9, 39, 40, 60])
def test_top_sum_breaks_ties_toward_the_lower_token(rng, n):
    rank, values = rng.integers(0, 4, (5, 40)).astype(np.float32), rng.random(40).astype(np.float32)
    expected = [values[np.argsort(-r, kind="stable")[:n]].sum() for r in rank]
    np.testing.assert_allclose(top_sum(rank, values, n), expected, rtol=1e-5)


def test_query_positions():
    positions = query_positions(2048, 32, 256, seed=3)
    assert len(positions) == 32 and positions[0] >= 512 and positions[-1] < 2048
    assert (np.diff(positions) > 0).all()
    assert np.array_equal(positions, query_positions(2048, 32, 256, seed=3))
    assert not np.array_equal(positions, query_positions(2048, 32, 256, seed=4))
    assert query_positions(515, 32, 256, seed=0).tolist() == [512, 513, 514]


# --- observe: what llama.cpp runs, against NumPy ---


def rotate(x, positions, rope, base=10000.0):
    """RoPE of rows x [T, H, D] in float64."""
    n_rot = x.shape[-1]
    dims = oracle.fc_dims(np.arange(n_rot // 2), n_rot, rope).reshape(-1, 2)
    angle = positions[:, None, None] * base ** (-2.0 * np.arange(n_rot // 2) / n_rot)
    a, b = x[..., dims[:, 0]], x[..., dims[:, 1]]
    out = np.empty_like(x)
    out[..., dims[:, 0]] = a * np.cos(angle) - b * np.sin(angle)
    out[..., dims[:, 1]] = a * np.sin(angle) + b * np.cos(angle)
    return out


def first_layer_qk(path, tokens, shape, rope):
    """Post-RoPE q [T, H, D] and k [T, G, D] of layer 0, from the weights."""
    weights = {t.name: np.array(t.data, np.float64) for t in gguf.GGUFReader(path).tensors}
    x = weights["token_embd.weight"][tokens]
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weights["blk.0.attn_norm.weight"]
    positions = np.arange(len(tokens), dtype=np.float64)
    return [
        rotate(
            (x @ weights[f"blk.0.attn_{name}.weight"].T + weights.get(f"blk.0.attn_{name}.bias", 0)).reshape(
                len(tokens), -1, shape.head_size
            ),
            positions,
            rope,
        )
        for name in "qk"
    ]


@pytest.mark.parametrize("arch,rope", [("llama", "norm"), ("qwen2", "neox")])
def test_observed_q_and_k_equal_numpy(tmp_path, arch, rope):
    shape = Shape(n_layer=3, n_head=6, n_head_kv=2, head_size=32, n_embd=192)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", arch, shape, sharpness=1.0)
    positions, seen = [0, 17, 299], []
    with Model(load_llama_cpp(), path) as model:
        tokens = model.tokenize(TEXT)[:300]
        assert (model.n_layer, model.rope) == (3, rope)
        model.attentions(tokens, positions, seen.append, n_threads=2)
    assert [a.layer for a in seen] == [0, 1, 2]
    first = seen[0]
    q, k = first_layer_qk(path, tokens, shape, rope)
    np.testing.assert_allclose(first.q, q[positions], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(first.k, np.moveaxis(k, 0, 1), rtol=2e-3, atol=2e-3)  # F16
    for a in seen:
        assert (a.rope, a.n_rot, a.full, a.sinks, a.softcap) == (rope, 32, True, None, 0)
        assert a.scale == pytest.approx(32**-0.5)


def test_an_exception_while_observing_reaches_the_caller(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    seen = []

    def visit(attention):
        seen.append(attention.layer)
        if attention.layer == 1:
            raise KeyboardInterrupt

    with Model(load_llama_cpp(), path) as model, pytest.raises(KeyboardInterrupt):
        model.attentions(model.tokenize(TEXT)[:64], [60], visit, n_threads=1)
    assert seen == [0, 1]


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where tests run as a background job, for which a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_at_any_moment_ends_the_evaluation(tmp_path, rng, interruptible):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", shape=Shape(n_layer=40))

    def evaluate():
        seen = []
        timer = threading.Timer(rng.uniform(0, 0.1), signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
        with Model(load_llama_cpp(), path) as model:
            tokens = model.tokenize(TEXT)[:64]
            try:
                timer.start()
                model.attentions(tokens, [60], lambda attention: seen.append(attention.layer), n_threads=1)
                timer.join()
            except KeyboardInterrupt:
                return True
        assert seen == list(range(40))
        return False

    assert any([evaluate() for _ in range(20)])


# --- the command ---


def stored(path):
    return {
        name[len("fasa.") :]: field.contents()
        for name, field in gguf.GGUFReader(path).fields.items()
        if name.startswith("fasa.")
    }


def run(model, *args, text=TEXT):
    file = model.parent / "text.txt"
    file.write_text(text)
    return main([str(model), "--text", str(file), *FAST, *args])


@pytest.mark.parametrize(
    "arch,n_tip",
    [
        ("llama", [5] * 8),
        ("qwen2", [5] * 8),
        ("smollm3", [5, 5, 5, 0, 5, 5, 5, 0]),  # layers 3 and 7 have no rotary embedding
        ("gemma3", [0, 0, 0, 0, 0, 5, 0, 0]),  # only layer 5 has no sliding window
    ],
)
def test_command_on_architectures(tmp_path, arch, n_tip):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", arch, Shape(n_layer=8))
    assert run(model, "--n-tip", "5", "--dense-layers", "0") == 0
    keys = stored(model)
    assert keys["n_tip"] == n_tip
    assert keys["n_rot"] == [32] * 8 and keys["n_head_kv"] == [2] * 8
    assert len(keys["fc"]) == sum(n_tip) * 2
    heads = np.array(keys["fc"]).reshape(-1, 5)
    assert (heads >= 0).all() and (heads < 16).all() and (np.diff(heads) > 0).all()


def test_a_window_longer_than_the_text_is_still_recognised(tmp_path):
    model = write_tiny_gguf(
        tmp_path / "tiny.gguf", "gemma3", Shape(n_layer=6), extra={"gemma3.attention.sliding_window": 1024}
    )
    assert run(model) == 0
    assert [n > 0 for n in stored(model)["n_tip"]] == [False] * 5 + [True]


def test_same_seed_same_result(tmp_path):
    def fcs(*args):
        model = write_tiny_gguf(tmp_path / "tiny.gguf")
        assert run(model, "--n-tip", "12", *args) == 0  # of 16
        return stored(model)["fc"]

    assert fcs() == fcs("--threads", "1")
    assert fcs("--criterion", "random") == fcs("--criterion", "random")
    assert fcs("--criterion", "random") != fcs("--criterion", "random", "--seed", "1")
    assert fcs() != fcs("--criterion", "ca") != fcs("--criterion", "random")


def test_dense_layers_and_defaults(tmp_path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", shape=Shape(n_layer=3, head_size=96, n_head=2))
    assert run(model) == 0
    assert stored(model)["n_tip"] == [24] * 3  # one layer in fifteen would be none
    assert "index_type" not in stored(model)
    for n_dense in (1, 2, 9):  # one layer at least is left to FASA
        assert run(model, "--dense-layers", str(n_dense)) == 0
        assert stored(model)["n_tip"].count(0) == min(n_dense, 2)


def test_defaults_of_large_heads(tmp_path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", shape=Shape(n_layer=2, head_size=256, n_head=2))
    assert run(model) == 0
    assert stored(model)["n_tip"] == [48] * 2 and stored(model)["index_type"] == "q8"
    assert run(model, "--index-type", "f16") == 0
    assert stored(model)["n_tip"] == [64] * 2 and stored(model)["index_type"] == "f16"
    assert run(model, "--n-tip", "20") == 0
    assert stored(model)["n_tip"] == [20] * 2 and "index_type" not in stored(model)


def test_target_kld_stores_the_smallest_budget_that_meets_it(tmp_path, capsys):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", shape=Shape(n_layer=2))
    assert run(model, "--target-kld", "100") == 0
    loose = stored(model)
    assert loose["budget"] == 64 and loose["calibration.n_tokens"] == 300  # the last quarter was held out
    before = model.read_bytes()
    assert run(model, "--target-kld", "1e-12") == 1
    found = re.search(r"no budget up to 128 .* within 1e-12: it is (\S+) at (\d+)", capsys.readouterr().err)
    assert found and float(found[1]) > 1e-6
    assert model.read_bytes() == before
    assert run(model, "--target-kld", str(1.1 * float(found[1])), "--sidecar") == 0
    assert stored(model.with_suffix(".fasa.gguf"))["budget"] == int(found[2])
    assert run(model, "--target-kld", "1", "--store-budget", "64") == 1
    assert "both name a budget" in capsys.readouterr().err


def test_target_kld_without_a_place_for_temporary_files(tmp_path, capsys, monkeypatch):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", shape=Shape(n_layer=2))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert "TMPDIR" in fails(capsys, model, "--target-kld", "100")


def test_params_are_those_of_the_header():
    root = Path(__file__).resolve().parent.parent
    header = (root / "ggml_fasa" / "include" / "llama-fasa.h").read_text()
    struct = re.search(r"^struct llama_fasa_params [{](.*?)^[}];", header, re.S | re.M)[1]
    assert re.findall(r"^    (\w+) +(\w+);", struct, re.M) == [("int32_t", name) for name, _ in _FasaParams._fields_]


def test_the_worst_layers_stay_dense():
    errors = {0: 0.3, 4: 0.1, 5: 0.5, 9: 0.2}
    assert worst_layers(errors, 2) == [5, 0]
    assert worst_layers(errors, None) == []
    assert len(worst_layers(dict.fromkeys(range(30), 0.1), None)) == 2


def test_an_invalid_calibration_can_be_replaced(tmp_path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", extra={"fasa.version": 1, "fasa.n_tip": [99]})
    assert run(model) == 0
    assert stored(model)["n_tip"] == [8] * 4


def fails(capsys, model, *args, **kwargs):
    before = model.read_bytes()
    assert run(model, *args, **kwargs) == 1
    assert model.read_bytes() == before
    message = capsys.readouterr().err
    assert message.startswith("fasa-calibrate: error: ") and message.count("\n") == 1
    return message


def test_errors_of_text_and_options(tmp_path, capsys):
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert "too few" in fails(capsys, model, text="short")
    assert "larger than" in fails(capsys, model, "--budget", "36")
    assert "larger than" in fails(capsys, model, "--store-budget", "20")
    missing = str(tmp_path / "missing.txt")
    assert main([str(model), "--text", missing]) == 1
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert main([str(model), "--text", str(tmp_path / "latin.txt")]) == 1
    assert "not UTF-8" in capsys.readouterr().err


def test_a_model_that_llama_cpp_refuses(tmp_path, capsys):
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    data = model.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight")
    model.write_bytes(data)
    assert "cannot load" in fails(capsys, model)


@pytest.mark.parametrize("value", [np.nan, 1e6])  # K in f16 holds 65504 at most
def test_a_model_whose_k_is_not_finite(tmp_path, capsys, value):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", "qwen2")
    next(t for t in gguf.GGUFReader(model, "r+").tensors if t.name == "blk.1.attn_k.bias").data[0] = value
    assert "layer 1 has q, K or V that are not finite" in fails(capsys, model)


def test_a_second_run_in_the_same_process_gives_the_same_file(tmp_path):
    first, second = (write_tiny_gguf(tmp_path / f"{n}.gguf") for n in "ab")
    assert run(first) == 0 and run(second) == 0
    assert first.read_bytes() == second.read_bytes()


def test_every_option_has_help():
    for action in build_parser()._actions:
        assert action.help, action
        if action.dest == "criterion":
            assert all(f" {criterion}, " in action.help for criterion in CHOOSE)


def test_the_builtin_text_is_long_enough():
    from fasa_calibrate.cli import _read_text

    text, name = _read_text(None)
    assert text.isascii() and len(text.split()) > 2000 and name.startswith("built-in")
