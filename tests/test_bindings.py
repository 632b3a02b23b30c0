"""The Python package: lazy loading, one clear exception per cause, and a drop-in llama_cpp.Llama."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fasa
from fasa import _native

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--fasa",
    "--fasa-budget",
    "--fasa-budget-schedule",
    "--fasa-sink",
    "--fasa-recent",
    "--fasa-max-batch",
    "--fasa-index-type",
    "--fasa-mode",
    "--fasa-vram",
    "--fasa-file",
]
# about 300 tokens: the cache is looked at in steps of 256, and must be larger than the budget for a sparse step
PROMPT = "The quick brown fox jumps over the lazy dog. " * 30


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that sees the same packages."""
    paths = [env.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", ""), str(Path(fasa.__file__).parent.parent)]
    environ = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


def vendored() -> Path:
    """The folder that holds the stock llama_cpp package the bindings use."""
    from fasa import _stock

    origin = _stock.load().__file__
    assert origin is not None
    return Path(origin).parent.parent


def load(path: Path, **kwargs: object) -> fasa.Llama:
    return fasa.Llama(path, **{"n_ctx": 512, "n_threads": 2, "verbose": False, **kwargs})


def greedy(llm: fasa.Llama, n: int = 16) -> list[int]:
    """The n likeliest next tokens after the prompt, decoded one by one."""
    tokens = llm.tokenize(PROMPT.encode())
    llm.reset()
    said: list[int] = []
    for token in llm.generate(tokens, temp=0.0):
        said.append(token)
        if len(said) == n:
            return said
    return said


# --- import ---------------------------------------------------------------------------------------------------------


def test_import_loads_nothing() -> None:
    done = python(
        "import sys, fasa\n"
        "assert 'llama_cpp' not in sys.modules\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'libllama' not in maps and 'libggml' not in maps\n"
        "fasa.Llama\n"
        "assert 'llama_cpp' in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_import_leaves_the_environment_alone(lib_dir: Path) -> None:
    done = python(
        "import os, sys, fasa\n"
        "before = dict(os.environ), list(sys.path)\n"
        "fasa.Llama\n"
        "assert (dict(os.environ), list(sys.path)) == before\n"
    )
    assert done.returncode == 0, done.stderr


def test_stock_first_with_other_libraries(lib_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "lib"
    shutil.copytree(lib_dir, other, ignore=lambda _, names: [n for n in names if ".so" not in n and ".dylib" not in n])
    code = "import os, llama_cpp\ndel os.environ['LLAMA_CPP_LIB_PATH']\nimport fasa\nfasa.Llama"
    keep = os.environ.get("LLAMA_CPP_LIB_PATH")
    if keep:
        code = code.replace("del os.environ['LLAMA_CPP_LIB_PATH']", f"os.environ['LLAMA_CPP_LIB_PATH'] = {keep!r}")
    message = last_line(python(code, PYTHONPATH=str(vendored()), LLAMA_CPP_LIB_PATH=str(other)))
    assert message.startswith("fasa.errors.FasaImportError")
    assert "already imported" in message and str(other) in message


def test_other_version(lib_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(vendored() / "llama_cpp", tmp_path / "llama_cpp")
    init = tmp_path / "llama_cpp" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{_native.pin()}"', '"0.0.1"'))
    message = last_line(
        python("import llama_cpp, fasa\nfasa.Llama", PYTHONPATH=str(tmp_path), LLAMA_CPP_LIB_PATH=str(lib_dir))
    )
    assert message.startswith("fasa.errors.FasaVersionError")
    assert "0.0.1" in message and _native.pin() in message


def test_missing_libraries(tmp_path: Path) -> None:
    message = last_line(python("import fasa\nfasa.Llama", LLAMA_CPP_LIB_PATH=str(tmp_path)))
    assert message.startswith("fasa.errors.FasaImportError") and "missing" in message and str(tmp_path) in message


def test_libraries_without_fasa(lib_dir: Path, tmp_path: Path) -> None:
    plain = _native.lib_path("ggml-base").resolve()  # any library will do that is not libllama
    shutil.copy(plain, tmp_path / _native.lib_path("llama").name)
    message = last_line(python("import fasa\nfasa.Llama", LLAMA_CPP_LIB_PATH=str(tmp_path)))
    assert message.startswith("fasa.errors.FasaImportError") and "without FASA" in message


def test_pin_is_the_pin_file(lib_dir: Path) -> None:
    lines = (ROOT / "LLAMA_CPP_PIN").read_text().splitlines()
    pinned = dict(line.replace(" ", "").split("=") for line in lines if "=" in line)
    assert _native.pin() == pinned["version"]
    assert _native.ffi().string(_native.llama().llama_fasa_version()).decode() == fasa.__version__


def test_stages_are_those_of_the_backend_in_use(lib_dir: Path) -> None:
    """Also where the CPU backend is one of several files (FASA_PORTABLE)."""
    assert "cpu" in _native.cpu_path().name and _native.stages().ggml_fasa_cpu_fac_scratch(1, 1, 1) > 0


def test_declarations_are_those_of_the_headers() -> None:
    command = [sys.executable, str(ROOT / "tools" / "gen_cdef.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- settings -------------------------------------------------------------------------------------------------------


def fields(c: object) -> dict[str, int]:
    return {name: getattr(c, name) for name in ("mode", "budget", "n_sink", "n_recent", "max_batch", "index_type", "vram")}


def test_unset_settings_are_left_to_the_library() -> None:
    assert fields(fasa.FasaParams().to_c()) == fields(_native.llama().llama_fasa_default_params())


def test_settings_reach_c() -> None:
    given = {"budget": 100, "n_sink": 0, "n_recent": 7, "max_batch": 3, "vram": 900}
    on, q8 = _native.llama().LLAMA_FASA_MODE_ON, _native.llama().GGML_FASA_INDEX_Q8
    assert fields(fasa.FasaParams(True, index_type="q8", **given).to_c()) == {"mode": on, "index_type": q8, **given}


@pytest.mark.parametrize(
    "setting",
    [
        {"mode": "yes"},
        {"mode": None},
        {"mode": 1.0},
        {"budget": 0},
        {"budget": -1},
        {"budget": 2**31},
        {"budget": 256.0},
        {"budget": True},
        {"n_sink": -1},
        {"n_recent": -1},
        {"max_batch": 0},
        {"index_type": "q5"},
        {"index_type": 2},
        {"variant": "x"},
        {"vram": 0},
        {"vram": 1.5},
        {"budget_schedule": 0},
        {"budget_schedule": 150.0},
    ],
    ids=str,
)
def test_bad_setting(setting: dict[str, object]) -> None:
    with pytest.raises(fasa.FasaConfigError, match="fasa" if "mode" in setting else next(iter(setting))):
        fasa.FasaParams(**setting).to_c()  # type: ignore[arg-type]


# --- models ---------------------------------------------------------------------------------------------------------


def params_in_force() -> dict[str, int]:
    return fields(_native.llama().llama_fasa_get_params())


def test_uncalibrated_model(smollm2: Path) -> None:
    before = params_in_force()
    with pytest.raises(fasa.FasaUncalibratedError, match="fasa-calibrate"):
        load(smollm2, fasa=True)
    assert params_in_force() == before


def test_uncalibrated_model_is_dense_by_default(smollm2: Path) -> None:
    auto, off = load(smollm2), load(smollm2, fasa=False)
    assert not auto.fasa_info().active and not off.fasa_info().active
    assert auto.context_params.flash_attn_type == off.context_params.flash_attn_type
    assert greedy(auto) == greedy(off)
    assert auto.fasa_stats().n_step_sparse == 0


def test_calibrated_model_without_budget_is_as_stock(calibrated: Path) -> None:
    auto, off = load(calibrated), load(calibrated, fasa=False)
    assert not auto.fasa_info().active
    assert auto.context_params.flash_attn_type == off.context_params.flash_attn_type
    assert greedy(auto) == greedy(off)


def test_invalid_metadata(calibrated: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    broken = tmp_path / "broken.gguf"
    shutil.copy(calibrated, broken)
    field = GGUFReader(broken, "r+").get_field("fasa.version")
    assert field is not None
    field.parts[field.data[0]][0] = 99
    with pytest.raises(fasa.FasaMetadataError, match="fasa.version"):
        load(broken, fasa=True)
    with pytest.raises(fasa.FasaMetadataError, match="fasa.version"):
        load(broken)
    assert not load(broken, fasa=False).fasa_info().active


def test_calibration_in_a_file_of_its_own(calibrated: Path, tmp_path: Path) -> None:
    """With a recommended budget, which switches FASA on; and no longer in force for the next model."""
    sidecar, plain = tmp_path / "keys.gguf", tmp_path / "plain.gguf"
    shutil.copy(calibrated, plain)
    command = [sys.executable, "-m", "fasa_calibrate", str(plain)]
    subprocess.run([*command, "--remove", "--quiet"], check=True)
    more = ["--sidecar", "-o", str(sidecar), "--criterion", "random", "--n-ctx", "200", "--budget", "64", "--quiet"]
    subprocess.run([*command, *more], check=True)
    llm = load(plain, fasa_file=sidecar)
    assert llm.fasa_info().active and llm.fasa_info().budget == 64
    assert pickle.loads(pickle.dumps(llm)).fasa_info() == llm.fasa_info()
    assert not load(plain).fasa_info().active
    with pytest.raises(fasa.FasaMetadataError, match="none.gguf"):
        load(plain, fasa_file=tmp_path / "none.gguf")


def test_bad_mode_is_named_as_it_was_given(calibrated: Path) -> None:
    with pytest.raises(fasa.FasaConfigError, match="fasa_mode.* not 'C'"):
        load(calibrated, fasa_mode="C")


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "no.gguf", fasa=True)


def test_flash_attention_is_needed(calibrated: Path) -> None:
    with pytest.raises(fasa.FasaConfigError, match="flash"):
        load(calibrated, fasa=True, flash_attn=False)


def test_forced_tokens_beyond_the_budget(calibrated: Path) -> None:
    before = params_in_force()
    with pytest.raises((fasa.FasaConfigError, fasa.FasaContextError), match="budget"):
        load(calibrated, fasa=True, fasa_budget=16, fasa_sink=4, fasa_recent=32)
    assert params_in_force() == before


def test_cache_type_that_is_refused(calibrated: Path) -> None:
    with pytest.raises(fasa.FasaContextError, match="iq4_nl"):
        load(calibrated, fasa=True, fasa_budget=64, type_k=20)


def test_mode_m_needs_a_cuda_device(calibrated: Path) -> None:
    with pytest.raises(fasa.FasaContextError, match="mode m needs a CUDA device"):
        load(calibrated, fasa=True, fasa_budget=64, fasa_mode="m", n_gpu_layers=0)


def test_modes_c_and_auto_without_a_device(calibrated: Path) -> None:
    for mode in ("c", "auto"):
        llm = load(calibrated, fasa=True, fasa_budget=64, fasa_mode=mode, fasa_vram=100, n_gpu_layers=0)
        info = llm.fasa_info()
        assert info.active and info.mapped_bytes == info.staging_bytes == info.rows_bytes == 0
        assert llm.fasa_row_stats() == fasa.FasaRowStats(0, 0)


@pytest.mark.parametrize("index_type", ["f16", "q8", "q4"])
def test_index_type(calibrated: Path, index_type: str) -> None:
    llm = load(calibrated, fasa=True, fasa_budget=64, fasa_index_type=index_type, type_k=8, type_v=2)
    assert llm.fasa_info().index_type == index_type
    assert len(greedy(llm)) == 16 and llm.fasa_stats().n_step_sparse >= 15


def test_decodes_sparse(calibrated: Path) -> None:
    llm = load(calibrated, fasa=True, fasa_budget=64, fasa_sink=2, fasa_recent=16, fasa_max_batch=4)
    info = llm.fasa_info()
    assert info.active is True
    assert (info.budget, info.n_sink, info.n_recent, info.max_batch) == (64, 2, 16, 4)
    assert info.n_layer_sparse > 0 and 0 < info.index_bytes < info.kv_bytes
    assert len(greedy(llm)) == 16
    stats = llm.fasa_stats()
    assert stats.n_step_prefill > 0 and stats.n_step_sparse >= 15 and stats.n_row_sparse >= stats.n_step_sparse
    llm.fasa_reset_stats()
    assert llm.fasa_stats() == fasa.FasaStats(0, 0, 0, 0, 0, 0)


def test_auto_follows_the_budget(calibrated: Path) -> None:
    assert load(calibrated, fasa_budget=64).fasa_info().active
    assert not load(calibrated, fasa=False).fasa_info().active


def test_full_budget_equals_dense(calibrated: Path) -> None:
    full = load(calibrated, fasa=True, fasa_budget=512)
    assert greedy(full) == greedy(load(calibrated, fasa=False, flash_attn=True))
    assert full.fasa_stats().n_step_sparse == 0 and full.fasa_stats().n_step_dense > 0


def test_settings_are_each_context_own(calibrated: Path) -> None:
    first = load(calibrated, fasa=True, fasa_budget=64)
    second = load(calibrated, fasa=True, fasa_budget=128)
    assert (first.fasa_info().budget, second.fasa_info().budget) == (64, 128)


def test_budget_at_run_time(calibrated: Path) -> None:
    """Each budget says what a Llama made with it says, and 0 what a dense one does; the setting survives pickling."""
    llm = load(calibrated, fasa=True, fasa_budget=64)
    expected = {64: greedy(llm), 0: greedy(load(calibrated, fasa=False, flash_attn=True))}
    expected[128] = greedy(load(calibrated, fasa=True, fasa_budget=128))
    for budget in (0, 128, 64, 0, 64):
        llm.fasa_budget = budget
        llm.fasa_reset_stats()
        assert llm.fasa_budget == llm.fasa_info().budget == budget
        assert greedy(llm) == expected[budget]
        assert (llm.fasa_stats().n_step_sparse > 0) == (budget > 0)
    llm.fasa_budget = 100
    assert pickle.loads(pickle.dumps(llm)).fasa_budget == 100


@pytest.mark.parametrize("budget", [-1, 36, 2**24 + 1, 64.0, None, True])
def test_bad_budget_at_run_time(calibrated: Path, budget: object) -> None:
    llm = load(calibrated, fasa=True, fasa_budget=64)  # forces 4 + 32 tokens
    with pytest.raises(fasa.FasaConfigError, match="budget"):
        llm.fasa_budget = budget  # type: ignore[assignment]
    assert llm.fasa_budget == 64


def test_budget_without_fasa(calibrated: Path) -> None:
    llm = load(calibrated, fasa=False)
    llm.fasa_budget = 0
    with pytest.raises(fasa.FasaConfigError, match="runs without"):
        llm.fasa_budget = 64


def test_drop_in(calibrated: Path) -> None:
    llm = load(calibrated, fasa=True, fasa_budget=64, n_ctx=1024, logits_all=True)
    completion = llm.create_completion(PROMPT[:90], max_tokens=4, logprobs=2, temperature=0.0)
    assert len(completion["choices"][0]["logprobs"]["token_logprobs"]) == 4
    messages = [{"role": "user", "content": "Say yes."}]
    answer = llm.create_chat_completion(messages, max_tokens=4)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    parts = list(llm.create_chat_completion(messages, max_tokens=4, stream=True))
    assert len(parts) > 1 and "delta" in parts[-1]["choices"][0]


def test_state_pickles(calibrated: Path) -> None:
    llm = load(calibrated, fasa=True, fasa_budget=64, fasa_recent=16, fasa_index_type="q8")
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.fasa_info() == llm.fasa_info()


def test_closed(calibrated: Path) -> None:
    llm = load(calibrated, fasa=True, fasa_budget=64)
    llm.close()
    llm.close()
    with pytest.raises(fasa.FasaError, match="closed"):
        llm.fasa_stats()


# --- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["llama-cli", "llama-server", "llama-perplexity", "llama-bench"])
def test_help_lists_the_flags(bin_dir: Path, tool: str) -> None:
    done = subprocess.run([str(bin_dir / tool), "--help"], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    for flag in FLAGS:
        assert f"{flag} " in text, f"{tool} --help has no {flag}"
        if tool != "llama-bench":  # it has no environment twins for any of its options
            assert "LLAMA_ARG_" + flag[2:].upper().replace("-", "_") in text


@pytest.mark.parametrize("name", ["bench", "cli", "perplexity", "quantize", "server"])
def test_command_starts_its_tool(name: str) -> None:
    program = _native.lib_dir().parent / "bin" / f"llama-{name}"
    if not program.parent.is_dir() or program.parent.samefile(_native.lib_dir()):
        pytest.skip("a build tree has no commands")
    code = f"import sys; sys.argv[1:] = ['--help']; from fasa._tools import llama_{name} as run; run()"
    direct = subprocess.run([str(program), "--help"], capture_output=True, text=True, check=False)
    through = python(code)
    assert through.stdout and (through.stdout, through.returncode) == (direct.stdout, direct.returncode)
