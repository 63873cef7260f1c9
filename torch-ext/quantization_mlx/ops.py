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
from .formats import FLOATS, MODES
from .messages import short_name

__all__ = [
    "affine_gather_qmm_rhs_nax",
    "affine_qmm_n",
    "affine_qmm_n_nax",
    "affine_qmm_t",
    "affine_qmm_t_nax",
    "affine_qmv",
    "dequantize",
    "gather_qmm",
    "gather_qqmm",
    "mxfp4_qmm_n",
    "mxfp4_qmm_t",
    "mxfp4_qmv",
    "mxfp8_qmm_n",
    "mxfp8_qmm_t",
    "mxfp8_qmv",
    "nvfp4_qmm_n",
    "nvfp4_qmm_t",
    "nvfp4_qmv",
    "qqmm",
    "quantize",
    "quantized_matmul",
]


def quantize(
    w: Tensor,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
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
    sorted_indices: bool = False,
) -> Tensor:
    """``quantized_matmul`` of chosen matrices: result ``i`` is ``x[lhs_indices[i]]`` times ``w[rhs_indices[i]]``.

    Args:
        x: ``[..., M, K]``; w, scales, biases: as in :func:`quantized_matmul`, usually ``[E, N, ...]``, or
            ``[E, ..., N]`` in the marlin modes.
        lhs_indices, rhs_indices: integer tensors that broadcast, counting the matrices of ``x`` and of ``w`` in
            row-major order of their leading sizes. One that is missing counts through its operand.
        global_scale: nvfp4 only, float32, one element or one per matrix of ``w``.
        sorted_indices: a promise that ``rhs_indices`` ascend, as MLX takes it. Nothing depends on it: pairs of a matrix
            are brought together wherever they stand.

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


# --- Products of two quantized operands -------------------------------------------------------------------------------
# Functions of the ops above, so that each device has them. The values of a quantized operand are few bits wide, and
# bfloat16 holds them exactly: x is quantized, expanded again, and multiplied like any other activations.

_QQ_MODES = tuple(mode.name for mode in MODES.values() if mode.packing == "rows" and mode.offset == "none")
# The largest scale times the largest element, E4M3's 448 and E2M1's 6, to which a global scale is relative.
_GLOBAL_SCALE_UNIT = 448 * 6


def qqmm(
    x: Tensor,
    w: Tensor,
    scales: Tensor | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "nvfp4",
    global_scale_x: Tensor | None = None,
    global_scale_w: Tensor | None = None,
) -> Tensor:
    """``x @ w.T`` with both operands quantized: ``dequantize(quantize(x)) @ dequantize(w).T``, in one format.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16; it is quantized as :func:`quantize` does, K by K.
        w, scales: packed ``[N, K * bits / 32]`` with uint8 ``[N, K / group_size]``; or ``[N, K]`` of float32, float16
            or bfloat16 without scales, which is quantized first.
        group_size, bits, mode: the format, mode "nvfp4", "mxfp8" or "mxfp4"; see the module's table.
        global_scale_x, global_scale_w: both or neither, nvfp4 only: float32 tensors with one element, meant to be
            ``x.abs().max()`` and the one that ``w`` was, or is to be, quantized with.

    Returns:
        ``[..., N]`` of the dtype of ``x``, or of autocast's, which does not concern how ``x`` is quantized. There are
        no gradients, as MLX has none with packed ``w``: an argument that requires one raises ValueError.
    """
    format = _check_qq("qqmm", x, w, scales, (group_size, bits, mode), global_scale_x, global_scale_w)
    if w.dim() != 2:
        raise ValueError(
            f"[qqmm] w of shape {list(w.shape)} must have two dimensions; gather_qqmm takes more matrices."
        )
    rows = x if x.dim() > 1 else x.unsqueeze(0)
    x_values, w_q, scales, scale = _qq_operands(rows, w, scales, format, global_scale_x, global_scale_w)
    y = ops.quantized_matmul(x_values, w_q, scales, None, True, *format, global_scale=scale, op="qqmm")
    return _rounded(y if x.dim() > 1 else y.squeeze(0), x)


def gather_qqmm(
    x: Tensor,
    w: Tensor,
    scales: Tensor | None = None,
    lhs_indices: Tensor | None = None,
    rhs_indices: Tensor | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "nvfp4",
    global_scale_x: Tensor | None = None,
    global_scale_w: Tensor | None = None,
    sorted_indices: bool = False,
) -> Tensor:
    """:func:`qqmm` of chosen matrices: result ``i`` is that of ``x[lhs_indices[i]]`` and ``w[rhs_indices[i]]``.

    Args:
        x: ``[..., M, K]``; w, scales: as in :func:`qqmm` with leading sizes, usually ``[E, N, ...]``.
        lhs_indices, rhs_indices, sorted_indices: as in :func:`gather_qmm`.
        group_size, bits, mode, global_scale_x, global_scale_w: as in :func:`qqmm`; a global scale is that of all
            matrices of an operand. (MLX passes over one that is given without the other.)

    Returns:
        ``[*indices, M, N]``; dtype, gradients and indices out of range are as in :func:`qqmm` and :func:`gather_qmm`.
    """
    format = _check_qq("gather_qqmm", x, w, scales, (group_size, bits, mode), global_scale_x, global_scale_w)
    if x.dim() < 2:
        raise ValueError(f"[gather_qqmm] x of shape {list(x.shape)} must have two or more dimensions.")
    x_values, w_q, scales, scale = _qq_operands(x, w, scales, format, global_scale_x, global_scale_w)
    indices = (lhs_indices, rhs_indices)
    options = {"sorted_indices": sorted_indices, "op": "gather_qqmm"}
    return _rounded(ops.gather_qmm(x_values, w_q, scales, None, *indices, True, *format, scale, **options), x)


# What the ops do not check themselves, or would under another name. ValueError for shapes, devices, options and
# gradients that do not fit, TypeError for dtypes.


def _check_qq(
    op: str,
    x: Tensor,
    w: Tensor,
    scales: Tensor | None,
    format: tuple[int | None, int | None, str],
    global_scale_x: Tensor | None,
    global_scale_w: Tensor | None,
) -> tuple[int, int, str]:
    """Returns the format without Nones."""
    for name, tensor in (("x", x), ("w", w)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"[{op}] {name} is {tensor!r}; it must be a tensor.")
    known = _check_qq_format(op, *format)
    _check_quantizable(op, "x", x, 1, known[0])
    if scales is None and not w.is_floating_point():
        raise ValueError(f"[{op}] w has dtype {short_name(w.dtype)} and scales are missing; packed w needs them.")
    if scales is None:
        _check_quantizable(op, "w", w, 2, known[0])
    _check_global_scales(op, known[2], x, {"global_scale_x": global_scale_x, "global_scale_w": global_scale_w})
    return known


def _check_qq_format(op: str, group_size: int | None, bits: int | None, mode: str) -> tuple[int, int, str]:
    if mode not in _QQ_MODES:
        raise ValueError(f"[{op}] mode is {mode!r}; supported are {', '.join(map(repr, _QQ_MODES))}.")
    (known_size,), (known_bits,) = MODES[mode].group_sizes, MODES[mode].bits  # each of these modes has one format
    if group_size not in (None, known_size) or bits not in (None, known_bits):
        raise ValueError(
            f"[{op}] mode {mode!r} with bits {bits} and group_size {group_size} is not supported; {mode} takes bits "
            f"{known_bits} and group_size {known_size}."
        )
    return known_size, known_bits, mode


def _check_quantizable(op: str, name: str, tensor: Tensor, dimensions: int, group_size: int) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"[{op}] {name} has dtype {short_name(tensor.dtype)}; supported are float32, float16 and bfloat16."
        )
    if tensor.dim() < dimensions or tensor.shape[-1] % group_size:
        raise ValueError(
            f"[{op}] {name} of shape {list(tensor.shape)} must have {dimensions} or more dimensions, the last of a "
            f"size divisible by group_size {group_size}."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"[{op}] {name} requires a gradient, which quantizing does not have: call this under torch.no_grad() or "
            f"pass {name}.detach()."
        )


def _check_global_scales(op: str, mode: str, x: Tensor, global_scales: dict[str, Tensor | None]) -> None:
    given = {name: tensor for name, tensor in global_scales.items() if tensor is not None}
    if given and mode != "nvfp4":
        raise ValueError(f"[{op}] {' and '.join(given)} given with mode {mode!r}; only mode 'nvfp4' has global scales.")
    if len(given) == 1:
        raise ValueError(f"[{op}] {', '.join(given)} given alone; give both {' and '.join(global_scales)}, or neither.")
    for name, tensor in given.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"[{op}] {name} has dtype {short_name(tensor.dtype)}; it must be float32.")
        if tensor.numel() != 1:
            raise ValueError(f"[{op}] {name} has shape {list(tensor.shape)}; it must have one element.")
        if tensor.device != x.device:
            raise ValueError(f"[{op}] {name} is on device {tensor.device}; it must be on that of x, {x.device}.")


def _qq_operands(
    x: Tensor,
    w: Tensor,
    scales: Tensor | None,
    format: tuple[int, int, str],
    global_scale_x: Tensor | None,
    global_scale_w: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The values of quantized x, but for its global scale; w packed; its scales; the product of the global scales."""
    x_q, x_scales, _ = ops.quantize(x, *format, global_scale=global_scale_x)
    # In the mx modes the largest float16 numbers are rounded to 65536, for which float16 has no room.
    is_wide = x.dtype == torch.float16 and format[2] != "nvfp4"
    x_values = ops.dequantize(x_q, x_scales, None, *format, None, torch.float32 if is_wide else x.dtype)
    if scales is None:
        w, scales, _ = ops.quantize(w, *format, global_scale=global_scale_w)
    # Applied to w, in float32 and to the unrounded sum, the global scale of x costs nothing and is not rounded away.
    scale = None if global_scale_x is None else global_scale_x.reshape(()) / _GLOBAL_SCALE_UNIT * global_scale_w
    return x_values, w, scales, scale


def _rounded(y: Tensor, x: Tensor) -> Tensor:
    """y of x's dtype where it is of a wider one."""
    return y.to(x.dtype) if x.dtype == torch.float16 and y.dtype == torch.float32 else y


# --- Explicit ops -----------------------------------------------------------------------------------------------------
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
