"""Stage loader: every way in which fasa.* keys can be wrong, each from a hand-made file, has a sentence of its own."""

import contextlib
import math
import subprocess

import numpy as np
import pytest

from fasa_calibrate.gguf_file import ARRAY, read_gguf
from fasa_calibrate.metadata import U32, fingerprint
from fasa_calibrate.write import write_sidecar
from support import gguf_keys
from support.gguf_keys import F32, I32, STRING, U64, array, scalar, with_keys
from support.runtime import AUTO, INDEX_TYPES, OFF, ON, Model, fasa_api, fasa_params, last_error, log_lines
from support.tiny_gguf import Shape, write_tiny_gguf

SHAPE = Shape()  # 4 layers, 2 KV heads of 32 dims: 16 FCs a head
N_TIP = [3, 0, 5, 1]
N_FC = 2 * sum(N_TIP)


def valid(rope_type="norm"):
    fcs = gguf_keys.random_fcs(np.random.default_rng(7), SHAPE.n_head_kv, SHAPE.head_size, N_TIP)
    return gguf_keys.fasa_keys(SHAPE.n_layer, SHAPE.n_head_kv, SHAPE.head_size, N_TIP, fcs, rope_type)


def changed(key, at, value):
    """The valid array of a key with one element replaced."""
    values = list(valid()[key])
    values[at] = value
    return {key: values}


# name -> (changes to the valid keys, None removes one; what the sentence must say)
BROKEN = {
    "version 0": ({"fasa.version": 0}, "fasa.version is 0"),
    "version 2": ({"fasa.version": 2}, "fasa.version is 2"),
    "version of another type": ({"fasa.version": "1"}, "fasa.version is not a u32"),
    "version signed": ({"fasa.version": scalar(I32, 1)}, "fasa.version is not a u32"),
    "no rope_type": ({"fasa.rope_type": None}, "fasa.rope_type is missing"),
    "no n_head_kv": ({"fasa.n_head_kv": None}, "fasa.n_head_kv is missing"),
    "no n_rot": ({"fasa.n_rot": None}, "fasa.n_rot is missing"),
    "no n_tip": ({"fasa.n_tip": None}, "fasa.n_tip is missing"),
    "no fc": ({"fasa.fc": None}, "fasa.fc is missing"),
    "rope_type of another type": ({"fasa.rope_type": 1}, "fasa.rope_type is not a string"),
    "rope_type unknown": ({"fasa.rope_type": "mrope"}, "fasa.rope_type is neither norm nor neox"),
    "rope_type of another model": ({"fasa.rope_type": "neox"}, "fasa.rope_type is neox, but the model has norm"),
    "n_head_kv no array": ({"fasa.n_head_kv": 2}, "fasa.n_head_kv is not an i32 array"),
    "n_head_kv too short": ({"fasa.n_head_kv": [2, 2, 2]}, "fasa.n_head_kv has 3 values instead of 4"),
    "n_head_kv of another model": (changed("fasa.n_head_kv", 2, 4), "fasa.n_head_kv is 4 in layer 2"),
    "n_rot too long": ({"fasa.n_rot": [32] * 5}, "fasa.n_rot has 5 values instead of 4"),
    "n_rot of another model": (changed("fasa.n_rot", 1, 64), "fasa.n_rot is 64 in layer 1"),
    "n_tip empty": ({"fasa.n_tip": array(I32, [])}, "fasa.n_tip has 0 values instead of 4"),
    "n_tip above n_rot / 2": (changed("fasa.n_tip", 0, 17), "fasa.n_tip is 17 in layer 0, outside [0, 16]"),
    "n_tip huge": (changed("fasa.n_tip", 0, 2**31 - 1), "fasa.n_tip is 2147483647 in layer 0"),
    "n_tip negative": (changed("fasa.n_tip", 3, -1), "fasa.n_tip is -1 in layer 3"),
    "n_tip all 0": ({"fasa.n_tip": [0] * 4, "fasa.fc": array(I32, [])}, "fasa.n_tip is 0 in every layer"),
    "n_tip of floats": ({"fasa.n_tip": array(F32, N_TIP)}, "fasa.n_tip is not an i32 array"),
    "fc of strings": ({"fasa.fc": array(STRING, ["1"] * N_FC)}, "fasa.fc is not an i32 array"),
    "fc of 64 bits": ({"fasa.fc": array(U64, [1] * N_FC)}, "fasa.fc is not an i32 array"),
    "fc too short": ({"fasa.fc": valid()["fasa.fc"][:-1]}, f"fasa.fc has {N_FC - 1} values instead of {N_FC}"),
    "fc too long": ({"fasa.fc": valid()["fasa.fc"] + [0]}, f"fasa.fc has {N_FC + 1} values instead of {N_FC}"),
    "fc out of range": (changed("fasa.fc", 5, 16), "fasa.fc names FC 16 in layer 0, outside [0, 16)"),
    "fc negative": (changed("fasa.fc", 6, -1), "fasa.fc names FC -1 in layer 2"),
    "fc twice": (changed("fasa.fc", 1, valid()["fasa.fc"][0]), "fasa.fc is not ascending in layer 0, KV head 0"),
    "fc descending": ({"fasa.fc": [2, 1, 0] + valid()["fasa.fc"][3:]}, "fasa.fc is not ascending in layer 0"),
    "budget 0": ({"fasa.budget": 0}, "fasa.budget is 0, outside"),
    "budget huge": ({"fasa.budget": 2**32 - 1}, "fasa.budget is 4294967295, outside"),
    "budget of another type": ({"fasa.budget": "256"}, "fasa.budget is not a u32"),
    "n_sink huge": ({"fasa.n_sink": 2**31}, "fasa.n_sink is 2147483648, outside"),
    "n_recent of another type": ({"fasa.n_recent": [1]}, "fasa.n_recent is not a u32"),
    "index_type unknown": ({"fasa.index_type": "q5"}, "fasa.index_type is none of f16, q8 and q4"),
    "index_type of another type": ({"fasa.index_type": 2}, "fasa.index_type is not a string"),
    "center of integers": ({"fasa.center": [0] * 2 * N_FC}, "fasa.center is not an f32 array"),
    "center too short": ({"fasa.center": array(F32, [0.0] * (2 * N_FC - 1))}, f"fasa.center has {2 * N_FC - 1} values"),
    "center NaN": ({"fasa.center": array(F32, [0.0] * (2 * N_FC - 1) + [math.nan])}, "fasa.center is nan in layer"),
    "center huge": ({"fasa.center": array(F32, [-1e6] + [0.0] * (2 * N_FC - 1))}, "fasa.center is -1e+06 in layer 0"),
}

# files that llama.cpp itself must refuse to read
UNREADABLE = {
    "array longer than the file": {"fasa.fc": array(I32, [1, 2, 3], length=2**40)},
    "array of a length that overflows": {"fasa.fc": array(I32, [1, 2, 3], length=2**62 + 1)},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without fasa.* keys."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "plain.gguf", "llama", SHAPE)


def calibrated(plain, path, changes=None):
    keys = {**valid(), **(changes or {})}
    return with_keys(plain, path, {name: value for name, value in keys.items() if value is not None})


def decode(ctx):
    logits = ctx.decode(np.arange(40))
    assert np.isfinite(logits).all()
    return logits


def test_valid_file(plain, tmp_path):
    with Model(calibrated(plain, tmp_path / "model.gguf")) as model:
        assert model.calibrated() == (1, "")
        with fasa_params(ON, index_type="f16"), model.context() as ctx:
            info = ctx.info()
            assert (info.active, info.n_layer_sparse, info.n_layer_dense) == (1, 3, 1)
            assert (info.n_tip_min, info.n_tip_max, info.budget) == (1, 5, 256)
            assert info.index_bytes == 2 * N_FC * 1024 * 2  # two dims of f16 for each FC and cell
            assert info.kv_bytes == 2 * 4 * 2 * 32 * 1024 * 2
            decode(ctx)


@pytest.mark.parametrize("name", INDEX_TYPES)
def test_index_type(plain, tmp_path, name):
    """The caller's, else the file's, else the default; and the log names it."""
    default = "q4"
    other = next(n for n in INDEX_TYPES if n != name)

    def tile_bytes(index_type, n_dim):  # ggml-fasa.h
        words = {"f16": n_dim / 2, "q8": 0.5 + -(-n_dim // 4), "q4": 0.5 + -(-n_dim // 8)}
        return 32 * 4 * words[index_type]

    cases = [(None, None, default), (None, name, name), (name, None, name), (other, name, name)]
    for in_file, given, expected in cases:
        changes = {} if in_file is None else {"fasa.index_type": in_file}
        with Model(calibrated(plain, tmp_path / "model.gguf", changes)) as model, fasa_params(ON, index_type=given):
            del log_lines[:]
            with model.context() as ctx:
                assert ctx.info().index_type == INDEX_TYPES[expected]
                tiles = sum(tile_bytes(expected, 2 * n) for n in N_TIP if n)
                assert ctx.info().index_bytes == tiles * SHAPE.n_head_kv * 1024 // 32
                assert f"{expected} index of " in "".join(log_lines)
                decode(ctx)


def test_file_without_calibration(plain):
    """It is no error unless FASA is asked for."""
    with Model(plain) as model:
        assert model.calibrated() == (0, "")
        for params in (fasa_params(OFF), fasa_params(AUTO), fasa_params(AUTO, 128)):
            with params, model.context() as ctx:
                assert ctx.info().active == 0
                decode(ctx)
        with fasa_params(ON), pytest.raises(RuntimeError, match="the model is not calibrated, run fasa-calibrate"):
            model.context()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata(plain, tmp_path, name):
    """One sentence per cause; FASA on and auto refuse; with FASA off the file is a model like any other."""
    changes, sentence = BROKEN[name]
    with Model(calibrated(plain, tmp_path / "model.gguf", changes)) as model, Model(plain) as plain_model:
        status, error = model.calibrated()
        assert status == -1 and sentence in error
        assert error.count(". ") == 0 and "\n" not in error and error.isascii()
        for params in (fasa_params(ON), fasa_params(AUTO), fasa_params(AUTO, 128)):
            del log_lines[:]
            with params:
                with pytest.raises(RuntimeError):
                    model.context()
                assert sentence in last_error() and sentence in "".join(log_lines)
        with fasa_params(OFF), model.context() as ctx, plain_model.context() as plain_ctx:
            assert ctx.info().active == 0
            assert np.array_equal(decode(ctx), decode(plain_ctx))


def test_no_two_causes_share_a_sentence():
    """A sentence names its cause, so different causes read differently."""
    sentences = [sentence for _, sentence in BROKEN.values()]
    shared = {s for s in sentences if sentences.count(s) > 1}
    assert shared <= {"fasa.version is not a u32", "fasa.n_tip is not an i32 array", "fasa.fc is not an i32 array"}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file(plain, tmp_path, name):
    """A length that the file cannot hold is refused with the file, at once."""
    path = calibrated(plain, tmp_path / "model.gguf", UNREADABLE[name])
    with pytest.raises(RuntimeError, match="fasa.fc|key-value"):
        Model(path)


def test_rope_of_the_other_kind(tmp_path):
    """The same check on a NEOX model."""
    plain = write_tiny_gguf(tmp_path / "plain.gguf", "qwen2", SHAPE)
    with Model(with_keys(plain, tmp_path / "neox.gguf", valid("neox"))) as model:
        assert model.calibrated() == (1, "")
    with Model(with_keys(plain, tmp_path / "norm.gguf", valid("norm"))) as model:
        status, error = model.calibrated()
        assert status == -1 and "fasa.rope_type is norm, but the model has neox" in error


@pytest.mark.parametrize("arch", ["lfm2", "gemma3"])
def test_fcs_of_a_layer_that_cannot_be_sparse(tmp_path, arch):
    """Layers with an even number have no KV heads in lfm2, which is hybrid, and a window in gemma3, as has the next."""
    shape = Shape(n_layer=6)
    plain = write_tiny_gguf(tmp_path / "plain.gguf", arch, shape)
    heads = [0, 2] * 3 if arch == "lfm2" else [2] * 6
    for il, expected in (5, (1, "")), (2, (-1, "FASA metadata: fasa.n_tip is 2 in layer 2, outside [0, 0]")):
        n_tip = [2 * (i == il) for i in range(6)]
        fcs = [np.array([[0, 1]] * heads[il])]
        keys = gguf_keys.fasa_keys(6, heads, shape.head_size, n_tip, fcs, "neox")
        with Model(with_keys(plain, tmp_path / f"{il}.gguf", keys)) as model:
            assert model.calibrated() == expected


@pytest.mark.parametrize(
    "in_file, params",
    [
        ({}, dict(budget=36)),
        ({}, dict(budget=100, n_sink=60, n_recent=40)),
        ({"fasa.budget": 20}, {}),
        ({"fasa.n_sink": 200, "fasa.n_recent": 100}, dict(budget=300)),
        ({"fasa.n_sink": 2**24, "fasa.n_recent": 2**24}, dict(budget=300)),
        ({"fasa.budget": 64}, dict(n_recent=60)),
        ({}, dict(budget=100, budget_schedule=170)),
    ],
)
def test_forced_tokens_must_fit_the_budget(plain, tmp_path, in_file, params):
    """Sinks and recents at or above the budget are refused, whoever set which."""
    with Model(calibrated(plain, tmp_path / "model.gguf", in_file)) as model:
        for mode in (ON, AUTO):
            with fasa_params(mode, **params):
                if mode == AUTO and not params.get("budget") and "fasa.budget" not in in_file:
                    continue
                with pytest.raises(RuntimeError, match="leave no room in a budget of"):
                    model.context()
        with fasa_params(OFF, **params), model.context() as ctx:
            decode(ctx)


@pytest.mark.parametrize(
    "more, sentence",
    [
        (dict(type_k=20), "KV cache type iq4_nl is not supported"),
        (dict(type_v=20), "KV cache type iq4_nl is not supported"),
        (dict(flash_attn_type=0), "flash attention is off"),
    ],
)
def test_contexts_that_cannot(plain, tmp_path, more, sentence):
    """FASA on refuses a context that it cannot serve; auto decodes it dense, with a warning."""
    with Model(calibrated(plain, tmp_path / "model.gguf")) as model:
        with fasa_params(ON), pytest.raises(RuntimeError, match=sentence):
            model.context(**more)
        del log_lines[:]
        with fasa_params(AUTO, 128), model.context(**more) as ctx:
            assert ctx.info().active == 0 and sentence in "".join(log_lines)
            decode(ctx)


@pytest.mark.parametrize(
    "params, name",
    [((3, 0, -1, -1, 0, -1), "mode"), ((-1, 0, -1, -1, 0, -1), "mode"), ((2, -1, -1, -1, 0, -1), "budget"),
     ((2, 2**24 + 1, -1, -1, 0, -1), "budget"), ((2, 0, -2, -1, 0, -1), "n_sink"), ((2, 0, -1, -2, 0, -1), "n_recent"),
     ((2, 0, -1, -1, -1, -1), "max_batch"), ((2, 0, -1, 2**31 - 1, 0, -1), "n_recent"),
     ((2, 0, -1, -1, 0, -2), "index_type"), ((2, 0, -1, -1, 0, 3), "index_type"), ((2, 0, -1, -1, 0, -1, 3), "variant"),
     ((2, 0, -1, -1, 0, -1, 0, -1), "vram"),
     ((2, 0, -1, -1, 0, -1, 0, 0, 200), "budget_schedule"), ((2, 0, -1, -1, 0, -1, 0, 0, -1), "budget_schedule")],
)  # fmt: skip
def test_params_out_of_range_change_nothing(params, name):
    ffi, lib = fasa_api()
    with fasa_params(AUTO, 100, 5, 6, 7, "q8"):
        assert lib.llama_fasa_set_params(ffi.new("struct llama_fasa_params *", params)) == -1
        assert f"FASA: {name} is " in last_error() and ", outside [" in last_error()
        now = lib.llama_fasa_get_params()
        fields = (now.mode, now.budget, now.n_sink, now.n_recent, now.max_batch, now.index_type)
        assert fields == (AUTO, 100, 5, 6, 7, INDEX_TYPES["q8"])
        assert lib.llama_fasa_set_params(ffi.new("struct llama_fasa_params *", now)) == 0 and last_error() == ""


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_the_center_is_taken_from_what_the_index_keeps(plain, tmp_path, rng, index_type):
    """A center of reasonable size changes next to nothing, one that leaves no bits for K a lot."""

    def logits(center):
        changes = {} if center is None else {"fasa.center": array(F32, center)}
        with Model(calibrated(plain, tmp_path / "model.gguf", changes)) as model:
            with fasa_params(ON, budget=200, max_batch=512, index_type=index_type), model.context() as ctx:
                result = ctx.decode(np.arange(400) % model.n_vocab)
                assert ctx.stats().n_step_sparse > 0
                return result

    def distance(a, b):
        return np.square(a - b).mean() / np.square(b).mean()

    none = logits(None)
    near = distance(logits(rng.standard_normal(2 * N_FC).astype(np.float32).tolist()), none)
    far = distance(logits([60000.0] * (2 * N_FC)), none)
    print(f"near {near:.2e}, far {far:.2e}")
    assert near < 0.5 * far


# --- sidecars ---


@contextlib.contextmanager
def fasa_file(path):
    """Models loaded inside take their calibration from path."""
    ffi, lib = fasa_api()
    lib.llama_fasa_set_file(str(path).encode())
    try:
        yield
    finally:
        lib.llama_fasa_set_file(ffi.NULL)


def sidecar(plain, path, model=None, **changes):
    """A sidecar that fits the model plain, or one that names the weights of another."""
    keys = {**valid(), "fasa.fingerprint": fingerprint([read_gguf(str(model or plain))]), **changes}
    entries = [(name, *with_kind(value)) for name, value in keys.items() if value is not None]
    write_sidecar(str(path), entries, str(plain))
    return path


def with_kind(value):
    return {int: U32, str: STRING, list: ARRAY}[type(value)], value


@pytest.fixture
def model_file(plain, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(plain.read_bytes())
    return path


def test_a_sidecar_beside_the_model_is_found(plain, model_file):
    with Model(model_file) as model:
        assert model.calibrated() == (0, "")
    sidecar(plain, model_file.with_suffix(".fasa.gguf"))
    with Model(model_file) as model:
        assert model.calibrated() == (1, "")
        with fasa_params(ON), model.context() as ctx:
            assert ctx.info().n_layer_sparse == 3
            decode(ctx)


def test_a_file_that_is_named_goes_first_and_one_beside_comes_last(plain, model_file, tmp_path):
    one = gguf_keys.random_fcs(np.random.default_rng(1), SHAPE.n_head_kv, SHAPE.head_size, [1, 0, 0, 0])
    two = gguf_keys.random_fcs(np.random.default_rng(1), SHAPE.n_head_kv, SHAPE.head_size, [1, 1, 0, 0])
    few = {"fasa.n_tip": [1, 0, 0, 0], "fasa.fc": [int(i) for layer in one for i in layer.ravel()]}
    more = {"fasa.n_tip": [1, 1, 0, 0], "fasa.fc": [int(i) for layer in two for i in layer.ravel()]}

    def n_sparse():
        with Model(model_file) as model, fasa_params(ON), model.context() as ctx:
            return ctx.info().n_layer_sparse

    named = sidecar(plain, tmp_path / "named.gguf", **few)
    sidecar(plain, model_file.with_suffix(".fasa.gguf"), **more)
    assert n_sparse() == 2
    calibrated(plain, model_file)
    assert n_sparse() == 3
    with fasa_file(named):
        assert n_sparse() == 1
    assert n_sparse() == 3


@pytest.mark.parametrize("where", ["beside", "named"])
def test_sidecars_that_must_be_refused(plain, model_file, tmp_path, where):
    path = model_file.with_suffix(".fasa.gguf") if where == "beside" else tmp_path / "named.gguf"
    other = write_tiny_gguf(tmp_path / "other.gguf", "llama", SHAPE, seed=1)
    cases = {
        "made for other weights": lambda: sidecar(plain, path, other),
        "fasa.fingerprint is missing": lambda: sidecar(plain, path, **{"fasa.fingerprint": None}),
        "fasa.fingerprint is not a string": lambda: sidecar(plain, path, **{"fasa.fingerprint": 1}),
        "carries no calibration": lambda: sidecar(plain, path, **{"fasa.version": None}),
        "fasa.n_tip is missing": lambda: sidecar(plain, path, **{"fasa.n_tip": None}),
        "cannot be read as a GGUF file": lambda: path.write_bytes(b"GGUF but not for long"),
    }
    for sentence, write in cases.items():
        write()
        with fasa_file(path) if where == "named" else contextlib.nullcontext(), Model(model_file) as model:
            state, message = model.calibrated()
            assert state == -1 and sentence in message
            with fasa_params(OFF), model.context() as ctx:
                decode(ctx)
            with pytest.raises(RuntimeError), fasa_params(AUTO, 128), model.context():
                pass


def test_a_named_file_that_does_not_exist(model_file, tmp_path):
    with fasa_file(tmp_path / "none.gguf"), Model(model_file) as model:
        assert model.calibrated()[0] == -1
        assert "none.gguf' cannot be read" in model.calibrated()[1]


def test_keys_in_the_model_are_taken_whatever_the_fingerprint(plain, tmp_path):
    """llama-quantize keeps the keys and changes the weights."""
    with Model(calibrated(plain, tmp_path / "model.gguf", {"fasa.fingerprint": "0" * 16})) as model:
        assert model.calibrated() == (1, "")


def test_quantised_weights_keep_the_keys_and_refuse_the_sidecar(bin_dir, plain, tmp_path):
    def quantise(source, name):
        out = tmp_path / name
        command = [str(bin_dir / "llama-quantize"), str(source), str(out), "q8_0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return out

    with Model(quantise(calibrated(plain, tmp_path / "model.gguf"), "model-q8.gguf")) as model:
        assert model.calibrated() == (1, "")
        with fasa_params(ON), model.context() as ctx:
            assert ctx.info().n_layer_sparse == 3
            decode(ctx)
    quantised = quantise(plain, "plain-q8.gguf")
    sidecar(plain, quantised.with_suffix(".fasa.gguf"))
    with Model(quantised) as model:
        assert model.calibrated()[0] == -1 and "other weights" in model.calibrated()[1]
    sidecar(plain, quantised.with_suffix(".fasa.gguf"), quantised)
    with Model(quantised) as model:
        assert model.calibrated() == (1, "")


def test_a_split_model_finds_its_sidecar(plain, tmp_path):
    first = gguf_keys.split_in_parts(plain, tmp_path, "llama", 3)
    sidecar(plain, first.with_suffix(".fasa.gguf"))
    with Model(first) as model, fasa_params(ON), model.context() as ctx:
        assert model.calibrated() == (1, "")
        decode(ctx)
