"""The patched libraries, through cffi. Nothing is loaded before the first call."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import cffi

from .errors import FasaImportError


def lib_dir() -> Path:
    """The folder of the libraries: LLAMA_CPP_LIB_PATH, which llama-cpp-python reads too, else this package's own."""
    given = os.environ.get("LLAMA_CPP_LIB_PATH")
    return Path(given) if given else Path(str(files("fasa") / "lib"))


def lib_path(name: str) -> Path:
    """The file of the library ``name`` ("llama", "ggml-cpu") in `lib_dir`."""
    if sys.platform == "win32":
        return lib_dir() / f"{name}.dll"
    return lib_dir() / f"lib{name}{'.dylib' if sys.platform == 'darwin' else '.so'}"


def backend_dir() -> Path:
    """The folder of backends that are loaded at run time (FASA_PORTABLE): ``bin`` beside `lib_dir`, or `lib_dir`."""
    beside = lib_dir().parent / "bin"
    return beside if beside.is_dir() else lib_dir()


def cpu_path() -> Path:
    """The file of the CPU backend: libggml-cpu, or the one of its variants that suits this CPU best."""
    plain = lib_path("ggml-cpu")
    variants = [] if plain.exists() else list(backend_dir().glob(f"{plain.stem}-*{plain.suffix}"))
    return max(variants, key=lambda path: ctypes.CDLL(str(path)).ggml_backend_score(), default=plain)


@cache
def ffi() -> Any:
    """The cffi instance that knows the declarations of our headers."""
    instance = cffi.FFI()
    instance.cdef((files("fasa") / "_cdef.h").read_text(encoding="ascii"))
    return instance


def _load(path: Path, symbol: str) -> Any:
    if not path.exists():
        raise FasaImportError(f"the library {path} is missing; install fasa with 'pip install .'")
    if sys.platform == "win32":
        os.add_dll_directory(str(path.parent))
    try:
        lib = ffi().dlopen(str(path))
    except OSError as error:
        raise FasaImportError(f"the library {path} cannot be loaded: {error}") from error
    if not hasattr(lib, symbol):
        raise FasaImportError(f"the library {path} was built without FASA; unset LLAMA_CPP_LIB_PATH")
    return lib


@cache
def llama() -> Any:
    """libllama: the functions of llama-fasa.h. Backends that are not linked to it are loaded, too."""
    lib = _load(lib_path("llama"), "llama_fasa_pin")
    ggml = ctypes.CDLL(str(lib_path("ggml")))
    if ggml.ggml_backend_reg_count() == 0:  # llama.cpp itself would look for them beside the Python interpreter
        ggml.ggml_backend_load_all_from_path(os.fsencode(backend_dir()))
    return lib


@cache
def stages() -> Any:
    """libggml-cpu: the stages of the op, one by one (ggml-fasa-cpu.h)."""
    return _load(cpu_path(), "ggml_fasa_cpu_tip")


def pin() -> str:
    """The version of llama-cpp-python that the libraries were built for."""
    return str(ffi().string(llama().llama_fasa_pin()).decode())


def last_error() -> str:
    """The last error of FASA on this thread, "" if none."""
    return str(ffi().string(llama().llama_fasa_last_error()).decode(errors="replace"))


def import_llama_cpp() -> ModuleType:
    """The module ``llama_cpp`` on these libraries; see `fasa._stock.load`."""
    from . import _stock

    return _stock.load()
