"""The functions of Marlin's documentation: packing by columns, and products with packed weights.

M rows of activations A, K the inner size, N output features. The marlin modes, which the table in `ops.py` describes,
pack `weights` [K, N] into words of 32 / bits elements along K, with one float16 scale for each `group_size` elements
of a column. What was packed can be given to `dequantize` and `quantized_matmul(..., transpose=False)` as well. The
functions without `lib` take mlx arrays, too, and then return such.

Every function raises `ValueError` for shapes, values and options that do not fit and `TypeError` for dtypes and for
what is no tensor; the message names the function and shows what was given and what is supported.
"""

import time
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..formats import FLOATS, MARLIN_MODES
from ..ops import dequantize, quantize
from .arrays import accepts_mlx_arrays
from .library import MetalKernelLibrary

BITS = {name: mode.bits[0] for name, mode in MARLIN_MODES.items()}
GROUP_SIZES = tuple(sorted(MARLIN_MODES["marlin_fp4"].group_sizes, reverse=True))  # the same in all modes
_MOST_EXPERTS, _MOST_CHOSEN = 512, 32  # of moe_router

# Called with all arguments: the fastest way from Python into the dispatcher.
_quantized_matmul = ops.quantized_matmul.default


# Checking, with the names of the documented arguments


def check_group_size(function: str, group_size: int) -> None:
    """Raises ValueError unless groups of this size are supported."""
    if group_size not in GROUP_SIZES or isinstance(group_size, float):
        raise ValueError(f"[{function}] group_size is {group_size!r}; supported are {', '.join(map(str, GROUP_SIZES))}")


def check_size(function: str, name: str, size: int, least: int = 0) -> None:
    """Raises TypeError unless a size is a whole number, and ValueError if it is less than `least`."""
    if not isinstance(size, (int, torch.SymInt)) and not isinstance(size, Integral):
        raise TypeError(f"[{function}] {name} is {size!r}; it must be a whole number")
    if size < least:
        raise ValueError(f"[{function}] {name} is {size!r}; it must be at least {least}")


def check_groups(function: str, what: str, K: int, group_size: int) -> None:
    """Raises ValueError unless `what`, of size K, divides into one or more groups of a size that is supported."""
    check_group_size(function, group_size)
    check_size(function, what, K, 1)
    if K % group_size:
        raise ValueError(f"[{function}] {what} is {K}, which does not divide into groups of {group_size}")


def check_choice(function: str, num_experts: Any, top_k: Any) -> None:
    """Raises TypeError unless both are whole numbers, and ValueError unless `moe_router` chooses so many of so many."""
    check_size(function, "num_experts", num_experts, 1)
    check_size(function, "top_k", top_k, 1)
    if num_experts > _MOST_EXPERTS:
        raise ValueError(f"[{function}] num_experts is {num_experts}; it must be at most {_MOST_EXPERTS}")
    if top_k > min(num_experts, _MOST_CHOSEN):
        raise ValueError(
            f"[{function}] top_k is {top_k} of {num_experts} experts; it must be at most that, and {_MOST_CHOSEN}"
        )


def check_tensor(function: str, name: str, value: Any, dimensions: int | None = None) -> None:
    """Raises TypeError unless a value is a tensor, and ValueError unless it has so many dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"[{function}] {name} is of type {type(value).__name__}; it must be a tensor")
    if dimensions is not None and value.dim() != dimensions:
        raise ValueError(f"[{function}] {name} has shape {list(value.shape)}; it must have {dimensions} dimensions")


def check_shape(function: str, name: str, tensor: Any, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    """Raises TypeError unless a value is a tensor, and ValueError unless it has this shape, which follows from `sizes`
    by their documented names."""
    if isinstance(tensor, Tensor) and tensor.shape == shape:
        return
    check_tensor(function, name, tensor, len(shape))
    *others, last = (f"{size} = {number}" for size, number in sizes.items())
    given = f"{', '.join(others)} and {last}" if others else last
    raise ValueError(f"[{function}] {name} has shape {list(tensor.shape)}; with {given} it must be {list(shape)}")


def check_packed(function: str, mode: str, sizes: Mapping[str, int], packed: Mapping[str, Any]) -> None:
    """Checks packed weights, under their documented names: first the words, then scales and maybe zeros.

    sizes: by their documented names: how many matrices there are, where that is a size of the tensors, K, N and the
        group_size.
    """
    *matrices, K, N, group_size = sizes.values()
    K_name, N_name, _ = list(sizes)[-3:]
    check_groups(function, K_name, K, group_size)
    check_size(function, N_name, N)
    rows, dtypes = K * BITS[mode] // 32, (torch.uint32, torch.int32)
    for name, tensor in packed.items():
        check_shape(function, name, tensor, (*matrices, rows, N), sizes)
        check_dtype(function, name, tensor, dtypes)
        rows, dtypes = K // group_size, (torch.float16,)
    check_devices(function, **packed)


def check_dtype(function: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError unless a tensor has one of these dtypes."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"[{function}] {name} has dtype {tensor.dtype}; supported are {', '.join(map(str, dtypes))}")


def check_devices(function: str, **tensors: Tensor) -> None:
    """Raises ValueError unless the tensors are where the first of them is."""
    (first, one), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != one.device:
            raise ValueError(
                f"[{function}] {first} is on {one.device} and {name} on {tensor.device}; all must be on one device"
            )


# Packing


def pack(function: str, mode: str, weights: Tensor, group_size: int, name: str = "weights") -> tuple[Tensor, ...]:
    """`quantize` of weights [K, N] in a marlin mode; errors carry the name of `function`, and that of its argument."""
    check_tensor(function, name, weights, 2)
    if not weights.is_floating_point():
        raise TypeError(f"[{function}] {name} has dtype {weights.dtype}; it must be a floating-point one")
    check_groups(function, f"K, the number of rows of {name},", weights.shape[0], group_size)
    weights = weights.detach()
    if weights.dtype not in FLOATS:
        weights = weights.float()
    if not weights.is_meta and not torch.isfinite(weights).all():
        raise ValueError(f"[{function}] {name} has infinities or NaN in float32; all values must be finite")
    return quantize(weights, group_size, BITS[mode], mode)


@accepts_mlx_arrays
def pack_fp4_weights(weights: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantizes weights [K, N] of any float dtype to E2M1 with scales of absmax / 6; ties go to the smaller magnitude.
    Returns (packed uint32 [K / 8, N], scales float16 [K / group_size, N])."""
    return pack("pack_fp4_weights", "marlin_fp4", weights, group_size)


@accepts_mlx_arrays
def pack_fp8_weights(weights: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantizes weights [K, N] of any float dtype to E4M3 with scales of absmax / 448. Returns (packed uint32 [K / 4,
    N], scales float16 [K / group_size, N])."""
    return pack("pack_fp8_weights", "marlin_fp8", weights, group_size)


@accepts_mlx_arrays
def pack_int2_weights(weights: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantizes weights [K, N] of any float dtype to -1.5, -0.5, 0.5 and 1.5 times scales of absmax / 1.5. Returns
    (packed uint32 [K / 16, N], scales float16 [K / group_size, N])."""
    return pack("pack_int2_weights", "marlin_int2", weights, group_size)


@accepts_mlx_arrays
def pack_int4_weights(weights: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes weights [K, N] of any float dtype to (code - zero) * scale, from the least to the largest of a group.

    A zero point is a whole number, and outside of 0 to 15 where a group has values of one sign only; it is 2048 at
    most, so groups that vary by less than 1 / 136 of their magnitude get larger scales than their range needs. Returns
    (packed uint32 [K / 8, N], scales and zeros float16 [K / group_size, N]).
    """
    return pack("pack_int4_weights", "marlin_int4", weights, group_size)


@accepts_mlx_arrays
def pack_int4_sym_weights(weights: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantizes weights [K, N] of any float dtype to (code - 8) * scale with scales of absmax / 7. Returns (packed
    uint32 [K / 8, N], scales float16 [K / group_size, N])."""
    return pack("pack_int4_sym_weights", "marlin_int4_sym", weights, group_size)


# Products


def _multiply(
    function: str, mode: str, A: Tensor, group_size: int, K: int, N: int, B_packed: Tensor, **tables: Tensor
) -> Tensor:
    check_dtype(function, "A", A, FLOATS)
    check_packed(function, mode, {"K": K, "N": N, "group_size": group_size}, {"B_packed": B_packed, **tables})
    check_devices(function, A=A, B_packed=B_packed)
    operands = A, B_packed, tables["scales"], tables.get("zeros")
    return _quantized_matmul(*operands, False, group_size, BITS[mode], mode, op=function)


def _gemm(function: str, mode: str, A: Tensor, group_size: int, B_packed: Tensor, **tables: Tensor) -> Tensor:
    check_tensor(function, "A", A)
    check_tensor(function, "B_packed", B_packed, 2)
    if not A.dim():
        raise ValueError(f"[{function}] A has no dimensions; it must be [..., K]")
    return _multiply(function, mode, A, group_size, A.shape[-1], B_packed.shape[-1], B_packed, **tables)


@accepts_mlx_arrays
def marlin_gemm_fp4(A: Tensor, B_packed: Tensor, scales: Tensor, group_size: int = 128) -> Tensor:
    """A @ dequantized B, without unpacking B in memory; sums are float32.

    Args:
        A: [..., K], float16 as documented, or bfloat16 or float32.
        B_packed, scales: uint32 [K / 8, N] and float16 [K / group_size, N], from `pack_fp4_weights`.
        group_size: 128, 64 or 32.

    Returns:
        [..., N] of A's dtype.
    """
    return _gemm("marlin_gemm_fp4", "marlin_fp4", A, group_size, B_packed, scales=scales)


@accepts_mlx_arrays
def marlin_gemm_int4(A: Tensor, B_packed: Tensor, scales: Tensor, zeros: Tensor, group_size: int = 128) -> Tensor:
    """`marlin_gemm_fp4` with weights of `pack_int4_weights`: `zeros` is float16 [K / group_size, N], like `scales`."""
    return _gemm("marlin_gemm_int4", "marlin_int4", A, group_size, B_packed, scales=scales, zeros=zeros)


def check_library(function: str, lib: Any) -> None:
    """Raises TypeError unless it is a MetalKernelLibrary."""
    if not isinstance(lib, MetalKernelLibrary):
        raise TypeError(f"[{function}] lib is of type {type(lib).__name__}; it must be a MetalKernelLibrary")


def _dispatch(
    function: str, mode: str, lib: Any, A: Tensor, B_packed: Tensor, scales: Tensor, sizes: tuple[int, ...], group: int
) -> Tensor:
    M, N, K = sizes
    check_library(function, lib)
    check_size(function, "M", M)
    check_size(function, "K", K)
    check_shape(function, "A", A, (M, K), {"M": M, "K": K})
    return _multiply(function, mode, A, group, K, N, B_packed, scales=scales)


def dispatch_gemm_fp4(
    lib: MetalKernelLibrary, A: Tensor, B_packed: Tensor, scales: Tensor, M: int, N: int, K: int, group_size: int = 32
) -> Tensor:
    """A [M, K] @ dequantized B, [M, N] of A's dtype, on the device of the tensors: "mps" or the CPU.

    Args:
        lib: a handle, such as `get_default_library()`.
        A: float16 as documented, or bfloat16 or float32.
        B_packed, scales: uint32 [K / 8, N] and float16 [K / group_size, N].
        M, N, K: the sizes, which those of the tensors must be.
        group_size: 128, 64 or 32; the default is not that of `pack_fp4_weights`.
    """
    return _dispatch("dispatch_gemm_fp4", "marlin_fp4", lib, A, B_packed, scales, (M, N, K), group_size)


def dispatch_gemm_fp8(
    lib: MetalKernelLibrary, A: Tensor, B_packed: Tensor, scales: Tensor, M: int, N: int, K: int, group_size: int = 128
) -> Tensor:
    """`dispatch_gemm_fp4` with E4M3 weights, as of `pack_fp8_weights`: B_packed is [K / 4, N]."""
    return _dispatch("dispatch_gemm_fp8", "marlin_fp8", lib, A, B_packed, scales, (M, N, K), group_size)


def dispatch_gemm_int2(
    lib: MetalKernelLibrary, A: Tensor, B_packed: Tensor, scales: Tensor, M: int, N: int, K: int, group_size: int = 128
) -> Tensor:
    """`dispatch_gemm_fp4` with 2-bit weights, as of `pack_int2_weights`: B_packed is [K / 16, N]."""
    return _dispatch("dispatch_gemm_int2", "marlin_int2", lib, A, B_packed, scales, (M, N, K), group_size)


# Dequantization


def dispatch_dequant_fp4(
    lib: MetalKernelLibrary, packed: Tensor, scales: Tensor, K: int, N: int, group_size: int = 32
) -> Tensor:
    """The weights, float16 [K, N], of packed uint32 [K / 8, N] and scales float16 [K / group_size, N]."""
    function, mode = "dispatch_dequant_fp4", "marlin_fp4"
    check_library(function, lib)
    check_packed(function, mode, {"K": K, "N": N, "group_size": group_size}, {"packed": packed, "scales": scales})
    return dequantize(packed, scales, None, group_size, BITS[mode], mode)


def benchmark_dequant_fp4(
    lib: MetalKernelLibrary,
    num_packed: int = 16 * 1024 * 1024,
    group_size: int = 32,
    warmup_iters: int = 10,
    benchmark_iters: int = 100,
) -> dict[str, float]:
    """Times `dispatch_dequant_fp4` on the device of `lib`.

    Args:
        lib: a handle, such as `get_default_library()`.
        num_packed: words to unpack, rounded up so that they fill a matrix of whole groups.
        group_size: 128, 64 or 32.
        warmup_iters, benchmark_iters: calls before the clock starts, and calls that it measures.

    Returns:
        time_ms: milliseconds of one call; bandwidth_gb_s: 10^9 bytes per second, counting 4 read for each word, 2 for
        each scale and 16 written for each word; throughput_gop_s: 10^9 weights unpacked per second.
    """
    function = "benchmark_dequant_fp4"
    check_library(function, lib)
    check_group_size(function, group_size)
    check_size(function, "num_packed", num_packed, 1)
    check_size(function, "warmup_iters", warmup_iters)
    check_size(function, "benchmark_iters", benchmark_iters, 1)
    words_per_group = group_size // 8
    N = min(4096, -(-num_packed // words_per_group))
    groups = -(-num_packed // (words_per_group * N))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (groups * words_per_group, N), dtype=torch.int32, generator=generator)
    packed = words.to(lib.device)
    scales = torch.ones(groups, N, dtype=torch.float16, device=lib.device)

    def run(times: int) -> None:
        for _ in range(times):
            dispatch_dequant_fp4(lib, packed, scales, groups * group_size, N, group_size)
        if lib.device.type == "mps":
            torch.mps.synchronize()

    run(warmup_iters)
    start = time.perf_counter()
    run(benchmark_iters)
    seconds = (time.perf_counter() - start) / benchmark_iters
    moved = 20 * packed.numel() + 2 * scales.numel()
    return {
        "time_ms": seconds * 1e3,
        "bandwidth_gb_s": moved / seconds / 1e9,
        "throughput_gop_s": 8 * packed.numel() / seconds / 1e9,
    }
