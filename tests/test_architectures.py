"""The table of architectures covers llama.cpp's, decides at the creation of a context, and is what the docs say."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.gguf_keys import fasa_keys, random_fcs, with_keys
from support.runtime import AUTO, OFF, ON, Model, fasa_api, fasa_params, last_error, log_lines
from support.tiny_gguf import Shape, write_tiny_gguf

ROOT = Path(__file__).resolve().parent.parent


def table():
    """Name -> why it is refused, "" if it is supported, None if the table lacks it."""
    ffi, lib = fasa_api()
    refusals = map(lib.llama_fasa_arch_refusal, range(lib.llama_fasa_n_arch()))
    texts = [None if r == ffi.NULL else ffi.string(r).decode() for r in refusals]
    return {ffi.string(lib.llama_fasa_arch_name(i)).decode(): text for i, text in enumerate(texts)}


def test_every_architecture_is_listed():
    known = table()
    assert len(known) > 100 and "(unknown)" not in known
    assert [name for name, refusal in known.items() if refusal is None] == []
    assert all(not refusal.endswith(".") and "\n" not in refusal for refusal in known.values())


@pytest.mark.parametrize(
    "arch, why",
    [
        ("llama", ""), ("qwen3", ""), ("gemma3", ""), ("falcon-h1", ""), ("gpt-oss", ""),
        ("deepseek2", "latent"), ("mpt", "ALiBi"), ("gpt2", "rotary"), ("bert", "encoder"), ("mamba", "recurrent"),
        ("deepseek32", "index of its own"), ("qwen3vl", "M-RoPE"), ("eagle3", "drafts"), ("dream", "diffusion"),
        ("t5", "position bias"), ("grok", "flash attention"),
    ],
)  # fmt: skip
def test_reasons(arch, why):
    refusal = table()[arch]
    assert why in refusal if why else refusal == ""


def test_docs_are_the_table():
    command = [sys.executable, str(ROOT / "tools" / "gen_architectures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["calibrated", "plain"])
def refused(request, tmp_path, rng):
    """A model of a refused architecture, with metadata that would fit it and without."""
    shape = Shape(n_layer=2)
    plain = write_tiny_gguf(tmp_path / "plain.gguf", "refact", shape)
    if request.param == "plain":
        return plain
    fcs = random_fcs(rng, shape.n_head_kv, shape.head_size, [4, 4])
    return with_keys(plain, tmp_path / "model.gguf", fasa_keys(2, shape.n_head_kv, shape.head_size, [4, 4], fcs))


def test_refused_architecture(refused):
    """On fails with the table's sentence, auto says it once a budget is given and decodes dense."""
    with Model(refused) as model:
        with fasa_params(ON, 64, 4, 12):
            with pytest.raises(RuntimeError, match="refact cannot run it: ALiBi"):
                model.context()
            assert last_error() == "FASA: the architecture refact cannot run it: ALiBi has no rotary planes"
        n_said = len(log_lines)
        with fasa_params(AUTO, 64, 4, 12), model.context() as ctx:
            assert not ctx.info().active
        assert any("refact cannot run it" in line for line in log_lines[n_said:])
        with fasa_params(OFF), model.context() as ctx:
            assert not ctx.info().active
