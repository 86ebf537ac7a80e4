"""The few calls of the CUDA runtime that running engines needs, without a package: a Jetson has the library itself."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.errors import BuildError

_NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
_DRIVER = "libcuda.so.1"
_TO_DEVICE, _TO_HOST = 1, 2
# Of cudaDeviceGetAttribute.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """What engines depend on. sm: such as "87"; driver: the newest CUDA that the driver knows, such as "12.6"."""

    sm: str
    driver: str


@functools.cache
def _library() -> ctypes.CDLL:
    # Without a name CDLL gives the program itself.
    for name in filter(None, (*_NAMES, ctypes.util.find_library("cudart"))):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError(
        f"CUDA: none of {', '.join(_NAMES)} is found, so no engine can run; on a Jetson it comes with JetPack, "
        "elsewhere: pip install nvidia-cuda-runtime, and add its folder to LD_LIBRARY_PATH"
    )


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the runtime. Raises BuildError with its own words if it fails."""
    library = _library()
    status = getattr(library, name)(*arguments)
    if status:
        library.cudaGetErrorString.restype = ctypes.c_char_p
        words = library.cudaGetErrorString(status).decode(errors="replace")
        raise BuildError(
            f"CUDA: {name} failed ({words}); is a GPU there, and is its memory free? see: defaker-opt doctor"
        )


def read_gpu() -> Gpu:
    """The first GPU. Raises BuildError if there is none, or no driver for it."""
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(0))
        numbers.append(value.value)
    driver = ctypes.c_int()
    _call("cudaDriverGetVersion", ctypes.byref(driver))
    return Gpu(f"{numbers[0]}{numbers[1]}", f"{driver.value // 1000}.{driver.value % 1000 // 10}")


@functools.cache
def has_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is here and answers."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL(_DRIVER)
        return not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) and count.value > 0
    except OSError:
        return False


class Stream:
    """An order in which a GPU works; copies and engines of one stream run one after another."""

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        _call("cudaStreamCreate", ctypes.byref(self._handle))

    @property
    def handle(self) -> int:
        """What TensorRT takes."""
        return self._handle.value or 0

    def wait(self) -> None:
        """Until all that was asked of it is done."""
        _call("cudaStreamSynchronize", self._handle)

    def __del__(self) -> None:
        if self._handle:
            _library().cudaStreamDestroy(self._handle)


class Buffer:
    """Memory of the GPU that grows when it must."""

    def __init__(self) -> None:
        self._pointer, self._bytes = ctypes.c_void_p(), 0

    def reserve(self, size: int) -> int:
        """The address of at least so many bytes; what was in it may be lost. Raises BuildError without so many."""
        if size > self._bytes:
            self.free()
            _call("cudaMalloc", ctypes.byref(self._pointer), ctypes.c_size_t(size))
            self._bytes = size
        return self._pointer.value or 0

    def write(self, array: NDArray[Any], stream: Stream) -> int:
        """Copy an array there; the address. The array must stay until the stream has been waited for."""
        address = self.reserve(max(1, array.nbytes))
        if array.nbytes:
            self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE, stream)
        return address

    def read(self, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Stream) -> NDArray[Any]:
        """An array whose values are there once the stream has been waited for."""
        array: NDArray[Any] = np.empty(shape, dtype)
        if array.nbytes:
            self._copy(array.ctypes.data, self._pointer.value or 0, array.nbytes, _TO_HOST, stream)
        return array

    def free(self) -> None:
        """Give the memory back."""
        if self._pointer:
            _library().cudaFree(self._pointer)
        self._pointer, self._bytes = ctypes.c_void_p(), 0

    def __del__(self) -> None:
        self.free()

    @staticmethod
    def _copy(to: int, source: int, size: int, kind: int, stream: Stream) -> None:
        _call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            ctypes.c_int(kind),
            ctypes.c_void_p(stream.handle),
        )
