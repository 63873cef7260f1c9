"""Marlin's launch of any kernel on any buffers, and buffers as Metal has them."""

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..metal import Arguments, Constants, Source, launch, three_sizes
from ..optional import require
from .library import MetalKernelLibrary, MetalObject


class MetalBuffer(MetalObject):
    """An MTLBuffer that a tensor shares, and the byte at which the tensor starts. It keeps the memory alive."""

    def __init__(self, tensor: Tensor, address: int, length: int, offset: int) -> None:
        super().__init__(address)
        self.tensor = tensor
        self.offset = offset
        self._length = length

    def length(self) -> int:
        """Bytes of the whole buffer."""
        return self._length

    def __repr__(self) -> str:
        return f"MetalBuffer(length={self._length}, offset={self.offset})"


def dispatch_kernel(
    lib: MetalKernelLibrary,
    function_name: str,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    buffers: Sequence[Any],
    wait: bool = True,
    *,
    threadgroup_memory: Sequence[int] = (),
    constants: Constants | None = None,
) -> None:
    """Runs a kernel of `lib` on torch's MPS stream, behind what torch has given to it before.

    Args:
        lib: has the kernel in a library.
        function_name: its name.
        grid: how many threadgroups there are along x, y and z.
        threadgroup: how many threads one has.
        buffers: the arguments, in order. Contiguous tensors on "mps", which the kernel reads and writes in place;
            `MetalBuffer` and PyObjC's MTLBuffer; and values that are copied, at most 4096 bytes: `bytes`, numpy
            scalars, and Python's: an int is an int32 (or an uint32, where it does not fit), a float a float32, a bool
            a bool. Autograd does not see what is written.
        wait: returns when the kernel is done. False returns at once, and torch's ops wait for it as for each other.
        threadgroup_memory: bytes of each ``[[threadgroup(i)]]`` argument, multiples of 16.
        constants: values of the kernel's function constants, as `MetalKernelLibrary.get_pipeline` takes them. An
            argument that they leave out keeps its place among the buffers, where any tensor will do.

    Raises:
        ValueError: names, counts, sizes and constants that do not fit the kernel or the GPU, tensors that are not
            contiguous, or elsewhere than on "mps".
        TypeError: something else among the buffers or the constants.
        NotImplementedError: there is no Apple GPU.
    """
    op = "dispatch_kernel"
    source = lib.source_of(op, function_name)
    arguments = Arguments()
    for index, value in enumerate(buffers):
        _add(arguments, value, f"[{op}] {function_name}: buffer {index}")
    launch(
        *(op, source, function_name, arguments),
        *(
            three_sizes(op, f"{function_name}'s grid", grid),
            three_sizes(op, f"{function_name}'s threadgroup", threadgroup),
        ),
        grid_in_threads=False,
        threadgroup_memory=list(threadgroup_memory),
        wait=wait,
        constants=constants,
    )


def _add(arguments: Arguments, value: Any, where: str) -> None:
    if isinstance(value, Tensor):
        arguments.add_tensor(_shareable(value, where))
    elif isinstance(value, MetalBuffer):
        arguments.add_buffer(value.address, value.offset)
    elif (address := _address_of(value)) is not None:
        arguments.add_buffer(address, 0)
    else:
        data = _bytes_of(value, where)
        if not 0 < len(data) <= 4096:
            raise ValueError(f"{where} has {len(data)} bytes; 1 to 4096 can be given without a tensor")
        arguments.add_bytes(data)


def _shareable(tensor: Tensor, where: str) -> Tensor:
    if tensor.device.type != "mps":
        raise ValueError(f"{where} is a tensor on {tensor.device}, not on mps")
    if tensor.layout is not torch.strided or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        layout = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}" if tensor.layout is torch.strided else ""
        raise ValueError(f"{where} is a tensor of {layout or tensor.layout} that is not contiguous; copy it first")
    if tensor.numel() == 0:
        raise ValueError(f"{where} is a tensor of shape {tuple(tensor.shape)}, which has no memory")
    return tensor


def _address_of(value: Any) -> int | None:
    """Of an object of PyObjC's."""
    convert = getattr(value, "__c_void_p__", None)
    return None if convert is None else convert().value


def _bytes_of(value: Any, where: str) -> bytes:
    if isinstance(value, bool):
        return struct.pack("=?", value)
    if hasattr(value, "tobytes") and getattr(value, "shape", None) == () and hasattr(value, "dtype"):  # of numpy
        return value.tobytes()
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, float):
        return struct.pack("=f", value)
    if isinstance(value, int):
        if not -(2**31) <= value < 2**32:
            raise ValueError(f"{where} is {value}, which 32 bits do not hold; give numpy.int64({value})")
        return struct.pack("=i" if value < 2**31 else "=I", value)
    raise TypeError(f"{where} is a {type(value).__name__}; supported are tensors, MTLBuffers, bytes and scalars")


# --- Buffers ---------------------------------------------------------------------------------------------------------


def mps_tensor_to_metal_buffer(tensor: Tensor, device: Any = "mps") -> MetalBuffer:
    """The MTLBuffer that has a tensor's elements: nothing is copied, and `offset` says where they start.

    Args:
        tensor: contiguous, on "mps".
        device: "mps", `lib.device` or PyObjC's MTLDevice: torch has one.

    Raises:
        ValueError: a tensor elsewhere, without elements or not contiguous; another device.
        TypeError: something else than a tensor.
    """
    op = "mps_tensor_to_metal_buffer"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"[{op}] tensor is a {type(tensor).__name__}, not a torch.Tensor")
    if _address_of(device) is None and torch.device(device).type != "mps":
        raise ValueError(f"[{op}] device is {str(device)!r}; supported is 'mps'")
    shared = _shareable(tensor, f"[{op}] tensor").detach()
    return MetalBuffer(shared, *ops._metal_buffer(shared, op))


_COPY = Source(
    "metal_buffer_to_numpy",
    """#include <metal_stdlib>
kernel void copy_bytes(
    const device uchar* from [[buffer(0)]],
    device uchar* to [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  to[i] = from[i];
}
""",
)


def metal_buffer_to_numpy(buffer: Any, dtype: Any, shape: Sequence[int]) -> Any:
    """A copy of what a buffer holds from its offset on, when what was given to torch's stream before is done.

    A kernel copies it, so that the buffer may also be one that only the GPU can reach.

    Args:
        buffer: a `MetalBuffer`, or PyObjC's MTLBuffer.
        dtype: numpy's.
        shape: of the result.

    Raises:
        ValueError: more than the buffer has; a negative size.
        TypeError: something else than a buffer.
        ImportError: numpy is not installed.
    """
    op = "metal_buffer_to_numpy"
    numpy = require("numpy", "int4")
    address = buffer.address if isinstance(buffer, MetalBuffer) else _address_of(buffer)
    if address is None:
        raise TypeError(f"[{op}] buffer is a {type(buffer).__name__}; supported are MetalBuffer and PyObjC's MTLBuffer")
    offset = buffer.offset if isinstance(buffer, MetalBuffer) else 0
    sizes = tuple(shape)
    wanted = math.prod(sizes) * numpy.dtype(dtype).itemsize
    there = buffer.length() - offset
    if any(size < 0 for size in sizes) or wanted > there:
        raise ValueError(f"[{op}] {sizes} of {numpy.dtype(dtype)} are {wanted} bytes; the buffer has {there}")
    if wanted == 0:
        return numpy.empty(sizes, dtype)
    arguments = Arguments()
    arguments.add_buffer(address, offset)
    copy = torch.empty(wanted, dtype=torch.uint8, device="mps")
    arguments.add_tensor(copy)
    launch(op, _COPY, "copy_bytes", arguments, (wanted, 1, 1), (min(wanted, 256), 1, 1), grid_in_threads=True)
    return copy.cpu().numpy().view(dtype).reshape(sizes)
