"""Metal code of the user's on torch's MPS stream: what `fast.metal_kernel` and `marlin.dispatch_kernel` share."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._ops import ops

MATH_MODES = ("safe", "relaxed", "fast")


@dataclass(frozen=True)
class Source:
    """A library's text, and how it is compiled. The name is for errors; libraries of the same text are one."""

    name: str
    text: str
    math_mode: str = "safe"


def line_mark(number: int, name: str) -> str:
    """So that the compiler's messages name what the next line is from."""
    printable = "".join(c if c.isprintable() and c not in '"\\' else "_" for c in name)
    return f'#line {number} "{printable}"\n'


def a_tensor_of_the_gpu() -> Tensor:
    """By which torch finds what runs on it. Where there is no GPU, the CPU's answer is the error that says so."""
    return torch.empty(0, device="mps" if torch.backends.mps.is_available() else "cpu")


def function_names(op: str, source: Source) -> list[str]:
    """Of the kernels in a library, which is compiled. Raises RuntimeError with the compiler's text."""
    return ops._metal_functions(a_tensor_of_the_gpu(), op, source.name, source.text, source.math_mode)


Constants = Mapping[int | str, bool | int | float]


def constant_lists(op: str, constants: Constants | None) -> tuple[list[str], list[bool | int | float]]:
    """Names, or indices in decimals, and values. Raises TypeError for other keys and values than numbers."""
    for key, value in (constants or {}).items():
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise TypeError(f"[{op}] constants has the key {key!r}; keys are names or indices of function constants")
        if not isinstance(value, bool | int | float):
            raise TypeError(f"[{op}] function constant {key} is {value!r}; it is a bool, an int or a float")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"[{op}] function constant {key} is {value}, which no type of Metal's has")
    return [str(key) for key in constants or {}], list((constants or {}).values())


class Arguments:
    """What the buffers of a launch are bound to, by index."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.codes: list[int] = []  # csrc/custom_kernels.cpp says which

    def add_tensor(self, tensor: Tensor) -> None:
        self.codes.append(0)
        self.tensors.append(tensor.detach())

    def add_bytes(self, data: bytes) -> None:
        words = -(-len(data) // 8)
        self.codes += (1, len(data), *struct.unpack(f"={words}q", data.ljust(8 * words, b"\0")))

    def add_buffer(self, address: int, offset: int) -> None:
        self.codes += (2, address, offset)


def launch(
    op: str,
    source: Source,
    function: str,
    arguments: Arguments,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    *,
    grid_in_threads: bool,
    threadgroup_memory: Sequence[int] = (),
    wait: bool = False,
    constants: Constants | None = None,
) -> None:
    """Gives a kernel to the stream. Raises ValueError, with the function's name, for what does not fit it."""
    ops._metal_dispatch(
        *(a_tensor_of_the_gpu(), op, source.name, source.text, source.math_mode, function),
        *constant_lists(op, constants),
        *(arguments.tensors, arguments.codes, grid, threadgroup, grid_in_threads, threadgroup_memory, wait),
    )


def three_sizes(op: str, name: str, value: Any) -> tuple[int, int, int]:
    """Raises ValueError for what is not three positive integers."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"[{op}] {name} is {value!r}; it is three integers above 0")
    return sizes
