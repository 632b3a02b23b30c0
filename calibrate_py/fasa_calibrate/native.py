"""llama.cpp as this package uses it: the stock ctypes package, plus a view of graph tensors in evaluation callbacks."""

import ctypes
import importlib

import numpy as np

from .errors import CalibrateError

GGML_TYPE_F32 = 0
GGML_TYPE_F16 = 1
_DTYPES = {GGML_TYPE_F32: np.dtype(np.float32), GGML_TYPE_F16: np.dtype(np.float16)}

_MAX_DIMS = 4
_MAX_SRC = 10
_OBJECT_SIZE = 32  # what ggml_tensor_overhead() counts beside the tensor itself


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of the pinned llama.cpp; Tensors checks it against the library before use."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * _MAX_DIMS),
    ("nb", ctypes.c_size_t * _MAX_DIMS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * _MAX_SRC),
    ("view_src", ctypes.POINTER(_Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


def load_llama_cpp():
    """The low-level llama_cpp module: FASA's own when `fasa` is installed, else any llama-cpp-python."""
    try:
        native = importlib.import_module("fasa._native")
    except ImportError:
        native = None
    try:
        package = importlib.import_module("llama_cpp") if native is None else native.import_llama_cpp()
        return importlib.import_module(package.__name__ + ".llama_cpp")
    except Exception as err:  # whatever a broken installation raises, the user gets one sentence
        raise CalibrateError(f"llama.cpp could not be loaded: {err}") from err


def c_function(llama_cpp, name, argtypes, restype):
    """A function of libllama, or of what it links, that the ctypes package does not bind; AttributeError if none."""
    return llama_cpp.ctypes_function(name, argtypes, restype)(lambda: None)


class Tensors:
    """Reads ggml tensors by address. Only valid inside an evaluation callback."""

    def __init__(self, llama_cpp):
        address, size = ctypes.c_void_p, ctypes.c_size_t
        try:
            self._get = c_function(llama_cpp, "ggml_backend_tensor_get", [address, address, size, size], None)
            self._op = c_function(llama_cpp, "ggml_op_desc", [address], ctypes.c_char_p)
            self._nbytes = c_function(llama_cpp, "ggml_nbytes", [address], size)
            overhead = c_function(llama_cpp, "ggml_tensor_overhead", [], size)()
            get_name = c_function(llama_cpp, "ggml_get_name", [address], address)
        except AttributeError as err:
            raise CalibrateError(f"this llama.cpp lacks a function that calibration needs: {err}") from err
        # a layout that drifted must be caught before a pointer is followed
        probe = _Tensor()
        name_at = get_name(ctypes.addressof(probe)) - ctypes.addressof(probe)
        if overhead != ctypes.sizeof(_Tensor) + _OBJECT_SIZE or name_at != _Tensor.name.offset:
            raise CalibrateError("this llama.cpp has another tensor layout than the pinned version of FASA")

    def at(self, address):
        return ctypes.cast(address, ctypes.POINTER(_Tensor)).contents

    def op(self, address):
        return self._op(address).decode()

    def read(self, tensor, offset, shape, strides):
        """Copies a strided part of an F16 or F32 tensor; offset and strides in bytes."""
        dtype = _DTYPES.get(tensor.type)
        if dtype is None:
            raise CalibrateError("attention runs on a data type that calibration does not know")
        size = sum((n - 1) * s for n, s in zip(shape, strides)) + dtype.itemsize
        if min(shape) < 1 or offset + size > self._nbytes(ctypes.addressof(tensor)):
            raise CalibrateError("the attention tensors have an unexpected shape")
        raw = np.empty(size, np.uint8)
        self._get(ctypes.addressof(tensor), raw.ctypes.data, offset, size)
        return np.ndarray(shape, dtype, raw, 0, strides)
