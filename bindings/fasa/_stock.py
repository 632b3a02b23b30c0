"""Imports the unmodified llama-cpp-python that this package carries, on top of the patched libraries."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from importlib.resources import files
from types import ModuleType

from . import _native
from .errors import FasaImportError, FasaVersionError

_lock = threading.Lock()


def load() -> ModuleType:
    """The module ``llama_cpp``, sure to be of the pinned version and to use the patched libraries.

    Raises:
        FasaImportError: another llama_cpp was imported first, or the libraries are missing.
        FasaVersionError: it is of another version.
    """
    with _lock:
        _native.llama()
        if "llama_cpp" not in sys.modules:
            with _our_paths():
                _import()
        module = sys.modules["llama_cpp"]
        _check(module)
        return module


def _import() -> None:
    try:
        importlib.import_module("llama_cpp")
        # It finds its library at import; a chat handler that needs it may ask for it much later.
        with contextlib.suppress(OSError):
            importlib.import_module("llama_cpp.mtmd_cpp")
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise FasaImportError(
            f"llama-cpp-python {_native.pin()} is missing from this installation; install fasa with 'pip install .'"
        ) from error


@contextlib.contextmanager
def _our_paths() -> Iterator[None]:
    """Makes ``import llama_cpp`` find our copy of it, and that copy our libraries."""
    vendor = str(files("fasa") / "_vendor")
    libraries = str(_native.lib_dir())
    before = {name: os.environ.get(name) for name in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    sys.path.insert(0, vendor)
    os.environ.update(dict.fromkeys(before, libraries))
    try:
        yield
    finally:
        sys.path.remove(vendor)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check(module: ModuleType) -> None:
    path = _native.lib_path("llama")
    library = getattr(getattr(getattr(module, "llama_cpp", None), "_lib", None), "_name", None)
    if library is None or not os.path.exists(library) or not os.path.samefile(library, path):
        raise FasaImportError(
            f"llama_cpp was already imported from {module.__file__} with the library {library}, which has no FASA; "
            "use fasa.Llama before anything imports llama_cpp: a process can hold only one of the two"
        )
    version = getattr(module, "__version__", "unknown")
    if version != _native.pin():
        raise FasaVersionError(
            f"llama-cpp-python {version} from {module.__file__} does not fit these libraries, "
            f"which were built for {_native.pin()}"
        )
