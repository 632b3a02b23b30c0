"""FASA (Frequency-Aware Sparse Attention) for llama.cpp, from Python.

>>> from fasa import Llama
>>> llm = Llama("model.gguf", n_ctx=8192, fasa=True, fasa_budget=256)

`Llama` is llama-cpp-python's class of that name plus FASA; `LlamaRAMCache`, `LlamaDiskCache` and `LlamaState` are its
own. Importing this package loads nothing; the first use of one of them loads the libraries and llama-cpp-python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _stock
from .config import FasaInfo, FasaParams, FasaRowStats, FasaStats
from .errors import (
    FasaConfigError,
    FasaContextError,
    FasaError,
    FasaImportError,
    FasaMetadataError,
    FasaUncalibratedError,
    FasaVersionError,
)

if TYPE_CHECKING:
    from llama_cpp.llama import LlamaState
    from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache

    from .llama import Llama

__version__ = "0.1.0"

__all__ = [
    "FasaConfigError",
    "FasaContextError",
    "FasaError",
    "FasaImportError",
    "FasaInfo",
    "FasaMetadataError",
    "FasaParams",
    "FasaRowStats",
    "FasaStats",
    "FasaUncalibratedError",
    "FasaVersionError",
    "Llama",
    "LlamaDiskCache",
    "LlamaRAMCache",
    "LlamaState",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "Llama":
        from .llama import Llama

        return Llama
    if name in ("LlamaDiskCache", "LlamaRAMCache", "LlamaState"):
        return getattr(_stock.load(), name)
    raise AttributeError(f"module 'fasa' has no attribute {name!r}")
