"""Quantized matrix ops with the names, arguments, defaults and results of ``mlx.core``.

Shapes: M rows of activations ``x``, K the inner size, N output features, E matrices of a batch (experts).

Formats (``mode``), with the defaults of ``group_size`` and ``bits`` in front:

=============== ============ =================== ===================== ==========================================
mode            group_size   bits                scales                value of an element
=============== ============ =================== ===================== ==========================================
affine          64, 32, 128  4, 1, 2, 3, 5, 6, 8 float, with biases    code * scale + bias
mxfp4           32           4                   uint8 E8M0            E2M1(code) * scale
mxfp8           32           8                   uint8 E8M0            E4M3(code) * scale
nvfp4           16           4                   uint8 E4M3            E2M1(code) * scale [* global_scale / 2688]
marlin_fp4      128, 64, 32  4                   float16               E2M1(code) * scale
marlin_fp8      128, 64, 32  8                   float16               E4M3(code) * scale
marlin_int2     128, 64, 32  2                   float16               (code - 1.5) * scale
marlin_int4     128, 64, 32  4                   float16, with zeros   (code - zero) * scale
marlin_int4_sym 128, 64, 32  4                   float16               (code - 8) * scale
=============== ============ =================== ===================== ==========================================

Packed weights are uint32 (or int32) words: a row of K elements is one little-endian bit stream of ``K * bits / 32``
words, with one scale (and bias) per ``group_size`` elements along the row. Float32, float16 and bfloat16 activations
are supported, on any strides; products accumulate in float32.

The marlin modes are not MLX's. Their weights are packed by columns: words run along N and the elements of a word
along K, so that word ``(r, n)`` of ``w`` ``[K * bits / 32, N]`` has rows ``r * 32 / bits`` and on of column ``n``, the
first in the lowest bits; ``scales`` (and the zeros, which take the place of ``biases``) are ``[K / group_size, N]``.

Under ``torch.autocast`` the products, the explicit ops included, compute as ``nn.Linear`` does: ``x`` and affine scales
and biases are cast to autocast's dtype for their device, which is that of the result. The other modes' scales and the
zeros keep their dtypes, and so do the operands and results of ``quantize`` and ``dequantize``. Gradients reach each
argument in its own dtype; a backward pass computes in the dtypes of its forward pass.

Sizes that depend on data, as of ``x[mask]``, can be traced by ``torch.export`` and ``torch.compile`` in every op: such
a size is taken for other than 1, and that it fits is asserted when the program runs.

Every op raises ``ValueError`` for shapes, devices or options that do not fit, ``TypeError`` for dtypes, and
``IndexError`` for an index out of range on CPU. The message names the op and shows what was given and what is
supported.
"""

import torch
from torch import Tensor

from ._ops import ops
from .formats import MODES

__all__ = [
    "affine_gather_qmm_rhs_nax",
    "affine_qmm_n",
    "affine_qmm_n_nax",
    "affine_qmm_t",
    "affine_qmm_t_nax",
    "affine_qmv",
    "dequantize",
    "gather_qmm",
    "mxfp4_qmm_n",
    "mxfp4_qmm_t",
    "mxfp4_qmv",
    "mxfp8_qmm_n",
    "mxfp8_qmm_t",
    "mxfp8_qmv",
    "nvfp4_qmm_n",
    "nvfp4_qmm_t",
    "nvfp4_qmv",
    "quantize",
    "quantized_matmul",
]


def quantize(
    w: Tensor,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Quantize the rows of ``w``, bit for bit as ``mlx.core.quantize`` does on CPU; in the marlin modes, its columns.

    Args:
        w: float tensor ``[..., K]`` of two or more dimensions, K divisible by ``group_size``; ``[..., K, N]`` in the
            marlin modes.
        group_size, bits, mode: the format; see the module's table.
        global_scale: nvfp4 only, a float32 tensor with one element, meant to be ``w.abs().max()``.

    Returns:
        ``(w_q, scales, biases)`` in affine mode, ``(w_q, scales, zeros)`` in mode marlin_int4, else ``(w_q, scales)``:
        ``w_q`` uint32 ``[..., K * bits / 32]``; ``scales`` and ``biases`` ``[..., K / group_size]``, of the dtype of
        ``w`` in affine mode, else uint8. In the marlin modes ``w_q`` ``[..., K * bits / 32, N]``, and ``scales`` and
        ``zeros`` float16 ``[..., K / group_size, N]``.

    Where MLX's E8M0 scale would wrap around for groups below 6 * 2**-127 (mxfp4) or 448 * 2**-127 (mxfp8), and decode
    as infinity, the scale saturates at 2**-127 instead. A float16 scale saturates at 65504, and is 1e-7 or more.
    """
    w_q, scales, biases = ops.quantize(w, group_size, bits, mode, global_scale=global_scale)
    return (w_q, scales, biases) if MODES[mode].offset != "none" else (w_q, scales)


def dequantize(
    w: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The float tensor ``[..., K]`` that packed ``w`` ``[..., K * bits / 32]`` stands for.

    In the marlin modes, ``[..., K, N]`` from ``[..., K * bits / 32, N]``; ``biases`` are the zeros of marlin_int4.

    ``dtype`` defaults to the promoted dtype of ``scales`` and ``biases`` in affine mode, to float16 in the marlin modes
    and to bfloat16 otherwise. Each value is computed in float32 and rounded once. Gradients reach affine ``scales`` and
    ``biases``.
    """
    return ops.dequantize(w, scales, biases, group_size, bits, mode, global_scale, dtype)


def quantized_matmul(
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    global_scale: Tensor | None = None,
) -> Tensor:
    """``x @ dequantize(w).T``, or ``x @ dequantize(w)`` with ``transpose=False``, without unpacking ``w`` in memory.

    Args:
        x: ``[..., M, K]`` or ``[K]``.
        w: ``[..., N, K * bits / 32]``, or ``[..., K, N * bits / 32]`` with ``transpose=False``. Leading sizes of ``x``
            and of a batched ``w`` broadcast.
        scales, biases: ``[..., N, K / group_size]``, or ``[..., K, N / group_size]`` with ``transpose=False``.
        group_size, bits, mode: the format; see the module's table. The marlin modes take ``transpose=False`` alone,
            ``w`` ``[..., K * bits / 32, N]``, ``scales`` ``[..., K / group_size, N]`` and, in mode marlin_int4, the
            zeros as ``biases``.
        global_scale: nvfp4 only, the float32 tensor that ``quantize`` was given.

    Returns:
        ``[..., M, N]`` or ``[N]``, of the promoted dtype of ``x``, ``scales`` and ``biases`` in affine mode, else of
        ``x``. Gradients reach ``x`` and affine ``scales`` and ``biases``.
    """
    return ops.quantized_matmul(x, w, scales, biases, transpose, group_size, bits, mode, global_scale=global_scale)


def gather_qmm(
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    lhs_indices: Tensor | None = None,
    rhs_indices: Tensor | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: Tensor | None = None,
    *,
    sorted_indices: bool = False,
) -> Tensor:
    """``quantized_matmul`` of chosen matrices: result ``i`` is ``x[lhs_indices[i]]`` times ``w[rhs_indices[i]]``.

    Args:
        x: ``[..., M, K]``; w, scales, biases: as in :func:`quantized_matmul`, usually ``[E, N, ...]``, or
            ``[E, ..., N]`` in the marlin modes.
        lhs_indices, rhs_indices: integer tensors that broadcast, counting the matrices of ``x`` and of ``w`` in
            row-major order of their leading sizes. One that is missing counts through its operand.
        global_scale: nvfp4 only, float32, one element or one per matrix of ``w``.
        sorted_indices: a promise that ``rhs_indices`` ascend; it may save time, and changes the result by rounding at
            most, also where it is not kept.

    Returns:
        ``[*indices, M, N]``. An index out of range raises ``IndexError`` on CPU. On "mps", where that would have to
        wait for the device, the rows of such a pair are NaN; with the environment variable
        ``QUANTIZATION_MLX_DEBUG`` set, it waits and raises.
    """
    return ops.gather_qmm(
        x,
        w,
        scales,
        biases,
        lhs_indices,
        rhs_indices,
        transpose,
        group_size,
        bits,
        mode,
        global_scale,
        sorted_indices=sorted_indices,
    )


# The explicit ops of the published Hub kernel, under its names and argument orders, and the siblings it lacks. `qmv`
# and `qmm_t` take w [N, K * bits / 32]; `qmm_n` takes w [K, N * bits / 32], grouped along N. Leading sizes of x are
# rows.


def affine_qmv(
    x: Tensor, w: Tensor, scales: Tensor, biases: Tensor, output_features: int, group_size: int = 128, bits: int = 4
) -> Tensor:
    """Matrix-vector product ``[..., K] -> [..., N]`` with ``w`` ``[N, K * bits / 32]``; ``output_features`` is N."""
    return ops.affine_qmv(x, w, scales, biases, output_features, group_size, bits)


def affine_qmm_t(x: Tensor, w: Tensor, scales: Tensor, biases: Tensor, group_size: int = 128, bits: int = 4) -> Tensor:
    """Matrix product ``[..., M, K] -> [..., M, N]`` with ``w`` ``[N, K * bits / 32]``."""
    return ops.affine_qmm_t(x, w, scales, biases, group_size, bits)


def affine_qmm_n(
    x: Tensor, w: Tensor, scales: Tensor, biases: Tensor, output_features: int, group_size: int = 128, bits: int = 4
) -> Tensor:
    """Matrix product ``[..., M, K] -> [..., M, N]`` with ``w`` ``[K, N * bits / 32]``; ``output_features`` is N."""
    return ops.affine_qmm_n(x, w, scales, biases, output_features, group_size, bits)


def affine_qmm_t_nax(
    x: Tensor, w: Tensor, scales: Tensor, biases: Tensor, group_size: int = 128, bits: int = 4
) -> Tensor:
    """:func:`affine_qmm_t`, which itself takes tensor operations where the GPU has them; ``explain`` tells."""
    return ops.affine_qmm_t_nax(x, w, scales, biases, group_size, bits)


def affine_qmm_n_nax(
    x: Tensor, w: Tensor, scales: Tensor, biases: Tensor, output_features: int, group_size: int = 128, bits: int = 4
) -> Tensor:
    """:func:`affine_qmm_n`, which itself takes tensor operations where the GPU has them; ``explain`` tells."""
    return ops.affine_qmm_n_nax(x, w, scales, biases, output_features, group_size, bits)


def affine_gather_qmm_rhs_nax(
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    biases: Tensor,
    indices: Tensor,
    output_features: int,
    group_size: int = 128,
    bits: int = 4,
    transpose: bool = True,
) -> Tensor:
    """Row ``m`` of ``x`` ``[M, K]`` times matrix ``indices[m]`` of ``w`` ``[E, ...]``, in any order: ``[M, N]``."""
    return ops.affine_gather_qmm_rhs_nax(x, w, scales, biases, indices, output_features, group_size, bits, transpose)


def mxfp4_qmv(x: Tensor, w: Tensor, scales: Tensor, output_features: int) -> Tensor:
    """Matrix-vector product ``[..., K] -> [..., N]`` with mxfp4 ``w`` ``[N, K / 8]``, ``scales`` ``[N, K / 32]``."""
    return ops.mxfp4_qmv(x, w, scales, output_features)


def mxfp4_qmm_t(x: Tensor, w: Tensor, scales: Tensor) -> Tensor:
    """Matrix product ``[..., M, K] -> [..., M, N]`` with mxfp4 ``w`` ``[N, K / 8]``, ``scales`` ``[N, K / 32]``."""
    return ops.mxfp4_qmm_t(x, w, scales)


def mxfp4_qmm_n(x: Tensor, w: Tensor, scales: Tensor, output_features: int) -> Tensor:
    """Matrix product ``[..., M, K] -> [..., M, N]`` with mxfp4 ``w`` ``[K, N / 8]``, ``scales`` ``[K, N / 32]``."""
    return ops.mxfp4_qmm_n(x, w, scales, output_features)


def mxfp8_qmv(x: Tensor, w: Tensor, scales: Tensor, output_features: int) -> Tensor:
    """Matrix-vector product ``[..., K] -> [..., N]`` with mxfp8 ``w`` ``[N, K / 4]``, ``scales`` ``[N, K / 32]``."""
    return ops.mxfp8_qmv(x, w, scales, output_features)


def mxfp8_qmm_t(x: Tensor, w: Tensor, scales: Tensor) -> Tensor:
    """Matrix product ``[..., M, K] -> [..., M, N]`` with mxfp8 ``w`` ``[N, K / 4]``, ``scales`` ``[N, K / 32]``."""
    return ops.mxfp8_qmm_t(x, w, scales)


def mxfp8_qmm_n(x: Tensor, w: Tensor, scales: Tensor, output_features: int) -> Tensor:
    """Matrix product ``[..., M, K] -> [..., M, N]`` with mxfp8 ``w`` ``[K, N / 4]``, ``scales`` ``[K, N / 32]``."""
    return ops.mxfp8_qmm_n(x, w, scales, output_features)


def nvfp4_qmv(x: Tensor, w: Tensor, scales: Tensor, output_features: int) -> Tensor:
    """Matrix-vector product ``[..., K] -> [..., N]`` with nvfp4 ``w`` ``[N, K / 8]``, ``scales`` ``[N, K / 16]``."""
    return ops.nvfp4_qmv(x, w, scales, output_features)


def nvfp4_qmm_t(x: Tensor, w: Tensor, scales: Tensor) -> Tensor:
    """Matrix product ``[..., M, K] -> [..., M, N]`` with nvfp4 ``w`` ``[N, K / 8]``, ``scales`` ``[N, K / 16]``."""
    return ops.nvfp4_qmm_t(x, w, scales)


def nvfp4_qmm_n(x: Tensor, w: Tensor, scales: Tensor, output_features: int) -> Tensor:
    """Matrix product ``[..., M, K] -> [..., M, N]`` with nvfp4 ``w`` ``[K, N / 8]``, ``scales`` ``[K, N / 16]``."""
    return ops.nvfp4_qmm_n(x, w, scales, output_features)
