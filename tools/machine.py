"""What every measured row carries, and how the tools find the programs they measure."""

import datetime
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def commit():
    """Our commit, with "-dirty" if tracked files differ from it; outside a checkout FASA_COMMIT, else "unknown"."""
    result = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return result.stdout.strip() or os.environ.get("FASA_COMMIT", "unknown")


def cpu_model():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu():
    """The names of the NVIDIA GPUs, "" if there are none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return ", ".join(result.stdout.splitlines()) if result.returncode == 0 else ""


def gpu_field(n_gpu_layers):
    """The field of a row for a run with so many layers on GPUs, none without."""
    return {"gpu": gpu()} if n_gpu_layers > 0 else {}


def pin():
    """The llama-cpp-python version of LLAMA_CPP_PIN."""
    for line in (ROOT / "LLAMA_CPP_PIN").read_text().splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "version":
            return value.strip()
    raise ValueError("LLAMA_CPP_PIN names no version")


@functools.cache
def _sha256(path, size, mtime):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def row(kind, model=None, **settings):
    """One measured row: what was measured (settings), on what and by which code; model: the GGUF file, if one was."""
    return {
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "pin": pin(),
        "cpu": cpu_model(),
        "n_cpu": os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
        **(_describe(model) if model else {}),
        **settings,
    }


def _describe(model):
    stat = os.stat(model)
    return {
        "model": pathlib.Path(model).name,
        "model_bytes": stat.st_size,
        "model_sha256": _sha256(str(model), stat.st_size, stat.st_mtime_ns),
    }


def emit(measured, out=None):
    """Appends a row as a JSON line to the file out, or prints it, also if the file cannot be written."""
    line = json.dumps(measured)
    if not out:
        print(line, flush=True)
        return
    try:
        with open(out, "a") as file:
            file.write(line + "\n")
    except OSError as err:
        print(line, flush=True)  # it may have taken hours
        raise SystemExit(f"error: cannot write {out}: {err.strerror}; the row is printed instead") from None


def find_tool(name, given=None):
    """Path of a program: the given one, else beside this Python, else in the installed package, else on PATH."""
    if given:
        if not os.access(given, os.X_OK):
            raise SystemExit(f"error: {given} is not a program")
        return str(given)
    places = [pathlib.Path(sys.executable).parent]
    spec = importlib.util.find_spec("fasa")
    if spec and spec.submodule_search_locations:
        places += [pathlib.Path(p) / "bin" for p in spec.submodule_search_locations]
    for place in places:
        if os.access(place / name, os.X_OK):
            return str(place / name)
    found = shutil.which(name)
    if not found:
        raise SystemExit(f"error: {name} was not found; install the package (pip install .) or give its path")
    return found
