"""NVIDIA's driver by ctypes: memory, modules, launches. Nothing else is needed where a GPU is, not even torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np


class DriverError(Exception):
    """The driver refused a call, or a kernel failed."""


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: object) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


def start() -> None:
    """Makes the first GPU's primary context, which is also torch's, current in this thread."""
    call("cuInit", 0)
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)


def synchronize() -> None:
    call("cuCtxSynchronize")


class Memory:
    """Bytes on the GPU, as long as it lives; their contents are undefined."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._address = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(self._address), ctypes.c_size_t(max(size, 1)))

    @classmethod
    def of(cls, array: np.ndarray) -> Memory:
        array = np.ascontiguousarray(array)
        memory = cls(array.nbytes)
        call("cuMemcpyHtoD_v2", memory._address, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))
        return memory

    def copy(self) -> Memory:
        other = Memory(self.size)
        call("cuMemcpyDtoD_v2", other._address, self._address, ctypes.c_size_t(self.size))
        return other

    def fill(self, byte: int) -> None:
        call("cuMemsetD8_v2", self._address, ctypes.c_ubyte(byte), ctypes.c_size_t(self.size))

    def read(self) -> np.ndarray:
        array = np.empty(self.size, np.uint8)
        call("cuMemcpyDtoH_v2", array.ctypes.data_as(ctypes.c_void_p), self._address, ctypes.c_size_t(self.size))
        return array

    @property
    def address(self) -> int:
        return self._address.value

    def __del__(self) -> None:
        if self._address.value:
            _library().cuMemFree_v2(self._address)


class Module:
    """A loaded cubin."""

    def __init__(self, cubin: bytes) -> None:
        self._module = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._module), cubin)

    def function(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        return function

    def __del__(self) -> None:
        if self._module.value:
            _library().cuModuleUnload(self._module)


class Kernel:
    """A function with its arguments, ready to launch: addresses as int, structs as bytes."""

    def __init__(self, module: Module, name: str, threads: Sequence[int], arguments: Sequence[int | bytes]) -> None:
        self._module = module
        self._function = module.function(name)
        self._threads = tuple(map(ctypes.c_uint, threads))
        self._values = [
            ctypes.create_string_buffer(value, len(value)) if isinstance(value, bytes) else ctypes.c_uint64(value)
            for value in arguments
        ]
        self._pointers = (ctypes.c_void_p * len(self._values))(*map(ctypes.addressof, self._values))

    def launch(self, threadgroups: Sequence[int], stream: int = 0) -> None:
        grid = map(ctypes.c_uint, threadgroups)
        nothing = ctypes.c_void_p()
        shared = ctypes.c_uint(0)
        on = ctypes.c_void_p(stream)
        call("cuLaunchKernel", self._function, *grid, *self._threads, shared, on, self._pointers, nothing)
