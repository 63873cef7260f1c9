"""mlx.core.array in place of torch.Tensor. mlx is imported for callers that have imported it: those with an array."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    f"mlx.core.{name}": getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "uint32", "int32")
}


def is_mlx_array(value: Any) -> bool:
    return type(value).__module__ == "mlx.core" and type(value).__name__ == "array"


def to_torch(array: Any) -> Tensor:
    """The values of an mlx array, on the device that MLX computes on where torch has it too ("mps"), else on the CPU.
    Raises TypeError if the array's dtype is none of float16, bfloat16, float32, float64, uint32 and int32."""
    import mlx.core as mx

    dtype = _DTYPES.get(str(array.dtype))
    if dtype is None:
        raise TypeError(f"an mlx array of dtype {array.dtype} is not supported; supported are {', '.join(_DTYPES)}")
    # The tensor keeps the array of `contiguous` alive, which nobody else can write to. MLX has the buffer protocol
    # for every dtype and device, but torch takes no empty buffer.
    tensor = torch.frombuffer(mx.contiguous(array), dtype=dtype) if array.size else torch.empty(0, dtype=dtype)
    on_gpu = mx.default_device().type == mx.gpu and torch.backends.mps.is_available()
    return tensor.reshape(array.shape).to("mps" if on_gpu else "cpu")


def to_mlx(tensor: Tensor) -> Any:
    """An mlx array of the tensor's values, without its gradient."""
    import mlx.core as mx

    return mx.array(tensor.detach().cpu())


def accepts_mlx_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function of tensors, which returns one or a tuple of them, take mlx arrays and return what it was given.
    Raises TypeError if a call has both tensors and mlx arrays."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if not any(is_mlx_array(value) for value in values):
            return function(*args, **kwargs)
        if any(isinstance(value, Tensor) for value in values):
            raise TypeError(f"[{function.__name__}] got torch tensors and mlx arrays; they must be of one kind")
        args = tuple(to_torch(value) if is_mlx_array(value) else value for value in args)
        kwargs = {name: to_torch(value) if is_mlx_array(value) else value for name, value in kwargs.items()}
        result = function(*args, **kwargs)
        return tuple(map(to_mlx, result)) if isinstance(result, tuple) else to_mlx(result)

    return call
