"""The ops on Marlin's column-packed weights, against float64 and a quantizer written here from the formats' rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
import quantization_mlx as qm
from cases import DTYPES, MARLIN_BITS
from oracle import Format, Quantized, name_of
from packed_columns import group_sizes_of, reference_quantize

pytestmark = pytest.mark.kernels_ci

ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 17, 33, 64, 70)
# Which rows of x meet which w [K, N]. On "mps", where a software device checks every access, every kernel meets ragged
# shapes and whole ones.
PRODUCTS = {
    "cpu": {(K, N): ROWS for N in (1, 33, 64, 100, 129) for K in (128, 256, 384)},
    "mps": {(384, 33): ROWS, (128, 129): (1, 9), (256, 100): (4, 33), (256, 64): (1, 8, 64), (128, 1): (2, 17)},
}
MODES = pytest.mark.parametrize("mode", MARLIN_BITS)
# Where what an element stands for does not matter: without zeros, and with.
TWO_MODES = pytest.mark.parametrize("mode", ("marlin_fp4", "marlin_int4"))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def format_of(mode: str, group_size: int | None = None) -> Format:
    """With the group size that float16 meets on "mps", unless one is given."""
    return Format(mode, group_size or group_sizes_of("mps", mode, torch.float16)[0], MARLIN_BITS[mode])


def multiply(x: Tensor, weights: Quantized, device: str) -> Tensor:
    on = weights.to(device)
    return qm.quantized_matmul(x.to(device), *on.tensors, False, **on.format.options)


def assert_multiplies(x: Tensor, weights: Quantized, device: str, what: str = "") -> None:
    ours = multiply(x, weights, device)
    assert ours.dtype == x.dtype
    rows = x.reshape(-1, x.shape[-1])
    matrices = weights.dense.reshape(-1, *weights.dense.shape[-2:])
    bound = max(oracle.error_bound(rows, matrix, x.dtype) for matrix in matrices)
    oracle.assert_within(ours, x.double() @ weights.dense, bound, f"{weights.format} {name_of(x.dtype)} {what}")


# --- Products ---------------------------------------------------------------------------------------------------------


@EVERY_DTYPE
@MODES
def test_product(device: str, mode: str, dtype: torch.dtype) -> None:
    for group_size in group_sizes_of(device, mode, dtype):
        for (K, N), row_counts in PRODUCTS[device].items():
            weights = oracle.random_quantized(format_of(mode, group_size), K, N)
            x = oracle.random_x(max(row_counts), K, dtype=dtype)
            reference = x.double() @ weights.dense
            for rows in row_counts:
                ours = multiply(x[:rows], weights, device)
                assert ours.dtype == dtype
                bound = oracle.error_bound(x[:rows], weights.dense, dtype)
                oracle.assert_within(ours, reference[:rows], bound, f"group {group_size}, K {K}, N {N}, M {rows}")


@TWO_MODES
def test_defaults(device: str, mode: str) -> None:
    """Groups of 128, and the only width that there is."""
    weights = oracle.random_quantized(format_of(mode, 128), 256, 40).to(device)
    x = oracle.random_x(3, 256, dtype=torch.float16).to(device)
    ours = qm.quantized_matmul(x, *weights.tensors, transpose=False, mode=mode)
    oracle.assert_identical(ours, multiply(x, weights, device))


BATCHES = (((), ()), ((2, 5), ()), ((3,), (2,)), ((2, 1, 3), (2, 3)), ((2, 3), (1,)), ((3, 1, 9), (2,)))


@TWO_MODES
def test_batches(device: str, mode: str) -> None:
    for x_leading, w_leading in BATCHES:
        weights = oracle.random_quantized(format_of(mode), *w_leading, 128, 35)
        x = oracle.random_x(*x_leading, 128, dtype=torch.float16)
        assert_multiplies(x, weights, device, f"x {x_leading} w {w_leading}")


@TWO_MODES
def test_any_layout(device: str, mode: str) -> None:
    """Rows of x with gaps, columns that are not adjacent, broadcast rows; words and scales that begin anywhere."""
    weights = oracle.random_quantized(format_of(mode), 128, 64)
    wide = oracle.random_x(18, 2 * 128 + 1, dtype=torch.float16)
    strided = oracle.random_x(128, 5, dtype=torch.float16).mT
    for x in (wide[:, 1:129], wide[::2, :128], wide[:, ::2][:, :128], strided, wide[:1, :128].expand(3, 128)):
        assert_multiplies(x, weights, device, f"x {x.stride()}")
    x = wide[:3, :128]
    expected = multiply(x, weights, device)
    on = weights.to(device).tensors
    moved = {
        "not contiguous": [None if t is None else t.mT.contiguous().mT for t in on],
        "unaligned": [None if t is None else torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in on],
        "signed": [on[0].view(torch.int32), *on[1:]],
    }
    for what, tensors in moved.items():
        ours = qm.quantized_matmul(x.to(device), *tensors, False, **weights.format.options)
        oracle.assert_identical(ours, expected, what)


@TWO_MODES
def test_long_k_and_few_columns(device: str, mode: str) -> None:
    """Where a GPU cuts K into parts that are summed up afterwards."""
    weights = oracle.random_quantized(format_of(mode), 4096 + 128, 9)
    for rows in (1, 6, 20):
        assert_multiplies(oracle.random_x(rows, 4096 + 128, dtype=torch.float16), weights, device, f"M {rows}")


@TWO_MODES
def test_nan_and_infinity_stay_where_they_are(device: str, mode: str) -> None:
    weights = oracle.random_quantized(format_of(mode), 128, 35)
    for rows in (1, 4, 20):
        clean = oracle.random_x(rows, 128, dtype=torch.float16)
        poisoned = clean.clone()
        poisoned[0, 5] = torch.nan
        poisoned[rows // 2, 70] = torch.inf
        ours = multiply(poisoned, weights, device).cpu()
        untouched = torch.isfinite(poisoned).all(1)
        assert not torch.isfinite(ours[~untouched]).any()
        oracle.assert_identical(ours[untouched], multiply(clean, weights, device).cpu()[untouched], f"M {rows}")


def test_nan_codes_of_e4m3(device: str) -> None:
    """Both of them spoil their column and no other."""
    base = oracle.random_quantized(format_of("marlin_fp8"), 128, 35)
    codes = np.swapaxes(oracle.unpack(base.w.mT, 8), -2, -1)
    codes[77, 3], codes[127, 34] = 0x7F, 0xFF
    weights = Quantized(base.format, oracle.pack(codes.T, 8).mT.contiguous(), base.scales, None)
    bad = torch.zeros(35, dtype=torch.bool)
    bad[3] = bad[34] = True
    for rows in (1, 4, 20):
        x = oracle.random_x(rows, 128, dtype=torch.float16)
        ours = multiply(x, weights, device).cpu()
        assert ours[:, bad].isnan().all()
        oracle.assert_product(ours[:, ~bad], x, base.dense[:, ~bad], x.dtype, f"M {rows}")
    values = qm.dequantize(*weights.to(device).tensors, **weights.format.options).cpu()
    assert torch.equal(values.isnan(), weights.dense.isnan())


@TWO_MODES
def test_gradient_of_x(device: str, mode: str) -> None:
    weights = oracle.random_quantized(format_of(mode), 128, 35)
    x = oracle.random_x(5, 128).to(device).requires_grad_()
    y = qm.quantized_matmul(x, *weights.to(device).tensors, False, **weights.format.options)
    given = oracle.random_x(5, 35, seed=2)
    y.backward(given.to(device))
    oracle.assert_product(x.grad, given, weights.dense.mT, torch.float32)


# --- Gathered products ------------------------------------------------------------------------------------------------


def gather(x: Tensor, weights: Quantized, lhs: Any, rhs: Any, device: str, **options: Any) -> Tensor:
    on = weights.to(device)
    indices = [None if index is None else torch.as_tensor(index).to(device) for index in (lhs, rhs)]
    return qm.gather_qmm(x.to(device), *on.tensors, *indices, False, **on.format.options, **options)


def assert_gathers(x: Tensor, weights: Quantized, lhs: Any, rhs: Any, device: str, **options: Any) -> None:
    """Pair by pair, against float64."""
    ours = gather(x, weights, lhs, rhs, device, **options).cpu()
    pairs = zip(range(len(x)) if lhs is None else lhs, range(len(weights.w)) if rhs is None else rhs, strict=True)
    for pair, (left, right) in enumerate(pairs):
        what = f"{weights.format} pair {pair}"
        if 0 <= left < len(x) and 0 <= right < len(weights.w):
            oracle.assert_product(ours[pair], x[left], weights.dense[right], x.dtype, what)
        else:
            assert ours[pair].isnan().all(), what


@MODES
def test_gather(device: str, mode: str) -> None:
    """One row, a few and a tile of them to each pair; experts in any order, one of them twice and one never."""
    weights = oracle.random_quantized(format_of(mode), 4, 128, 35)
    for rows in (1, 3, 6, 20):
        x = oracle.random_x(3, rows, 128, dtype=torch.float16)
        assert_gathers(x, weights, [2, 0, 0, 1, 2], [3, 0, 3, 1, 0], device)
        assert_gathers(x, weights, None, [3, 3, 1], device)


@MODES
def test_sorted_experts(device: str, mode: str) -> None:
    """Runs of every length, experts without rows; a wrong promise costs time alone."""
    weights = oracle.random_quantized(format_of(mode), 4, 128, 70)
    rhs = [0] * 33 + [1] * 2 + [3] * 17
    x = oracle.random_x(len(rhs), 1, 128, dtype=torch.float16)
    assert_gathers(x, weights, None, rhs, device, sorted_indices=True)
    shuffled = [rhs[i] for i in torch.randperm(len(rhs), generator=oracle.generator(0)).tolist()]
    assert_gathers(x, weights, None, shuffled, device, sorted_indices=True)


@pytest.mark.parametrize("rows", (1, 20))
@pytest.mark.parametrize("sorted_indices", (True, False))
def test_index_out_of_range(device: str, rows: int, sorted_indices: bool) -> None:
    """An error on the CPU; NaN, and nothing read, on a GPU."""
    weights = oracle.random_quantized(format_of("marlin_int4"), 3, 128, 35)
    x = oracle.random_x(20, rows, 128, dtype=torch.float16)
    lhs, rhs = [*range(19), 20], [0] * 7 + [1] * 6 + [2] * 5 + [-1, 0]
    if device == "cpu":
        with pytest.raises(IndexError, match=r"\[gather_qmm\]"):
            gather(x, weights, lhs, rhs, device, sorted_indices=sorted_indices)
    else:
        assert_gathers(x, weights, lhs, rhs, device, sorted_indices=sorted_indices)


# --- Dequantize -------------------------------------------------------------------------------------------------------


@EVERY_DTYPE
@MODES
def test_dequantize(device: str, mode: str, dtype: torch.dtype) -> None:
    """Exact in float32, which is rounded once."""
    for group_size in group_sizes_of(device, mode, dtype):
        for shape in ((384, 33), (2, 128, 64), (256, 1)):
            weights = oracle.random_quantized(format_of(mode, group_size), *shape)
            assert torch.equal(weights.dense.float().double(), weights.dense)
            ours = qm.dequantize(*weights.to(device).tensors, **weights.format.options, dtype=dtype)
            oracle.assert_identical(ours.cpu(), weights.dense.float().to(dtype), f"{weights.format} {shape}")
    default = qm.dequantize(*weights.to(device).tensors, **weights.format.options)
    oracle.assert_identical(default.cpu(), weights.dense.float().half(), "float16 unless asked otherwise")


@TWO_MODES
def test_dequantize_parts_of_a_tensor(device: str, mode: str) -> None:
    """Matrices with gaps between them, each a launch of its own on a GPU."""
    weights = oracle.random_quantized(format_of(mode), 4, 128, 33).to(device)
    parts = weights.map(lambda tensor: tensor[::2])
    ours = qm.dequantize(*parts.tensors, **parts.format.options)
    oracle.assert_identical(ours.cpu(), weights.dense[::2].float().half())


# --- Quantize ---------------------------------------------------------------------------------------------------------


def hard_values(K: int, dtype: torch.dtype) -> Tensor:
    """Columns that each meet a special case of a quantizer, and columns of random numbers of many sizes."""
    generator = oracle.generator(3)
    columns = [
        torch.zeros(K),
        torch.full((K,), 0.75),
        torch.full((K,), -3.0),
        torch.arange(K) / 4 - K / 8,  # ties
        torch.arange(K) % 13 - 6.0,
        100 - torch.rand(K, generator=generator),  # far from zero
        -1000 - torch.rand(K, generator=generator),
        3e-4 + 1e-7 * torch.rand(K, generator=generator),
        0.01 + 1e-5 * torch.rand(K, generator=generator),
        1e-6 * torch.randn(K, generator=generator),
        1e-8 * torch.randn(K, generator=generator),
        torch.where(torch.arange(K) == 5, 2500.0, 0.25),
        torch.where(torch.arange(K) % 2 == 0, 60000.0, -60000.0),
    ]
    columns += [torch.randn(K, generator=generator) * 2.0**power for power in range(-10, 12)]
    if dtype != torch.float16:  # a scale beyond float16
        columns += [torch.randn(K, generator=generator) * 1e6, torch.randn(K, generator=generator) * 1e30]
    return torch.stack(columns, 1).to(dtype)


def quantize(w: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    words, scales, *zeros = (part.cpu() for part in qm.quantize(w, **format.options))
    assert len(zeros) == format.has_zeros
    return words, scales, zeros[0] if zeros else None


@EVERY_DTYPE
@MODES
def test_quantize(device: str, mode: str, dtype: torch.dtype) -> None:
    """Codes, scales and zeros bit for bit."""
    w = hard_values(256, dtype)
    for group_size in group_sizes_of(device, mode, dtype):
        format = format_of(mode, group_size)
        results = zip(quantize(w.to(device), format), reference_quantize(w, format), strict=True)
        for name, (ours, expected) in zip(("words", "scales", "zeros"), results, strict=True):
            if expected is None:
                assert ours is None
                continue
            oracle.assert_identical(ours, expected, f"{name} {format}")


@TWO_MODES
def test_quantize_a_stack(device: str, mode: str) -> None:
    """Matrix by matrix; any strides; a single column."""
    format = format_of(mode)
    K = format.group_size
    stack = oracle.random_x(3, K, K + 5, dtype=torch.float16)
    for w in (stack, stack[:, :, K : K + 1], stack.mT[:, :K], stack[:, :, ::2]):
        ours = quantize(w.to(device), format)
        for i in range(3):
            for one, expected in zip(ours, reference_quantize(w[i], format), strict=True):
                assert (one is None) == (expected is None)
                if one is not None:
                    oracle.assert_identical(one[i], expected, f"{format} {w.stride()}")


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ("quantized_matmul", "gather_qmm", "dequantize"))
@pytest.mark.parametrize("on", ("cpu", "meta"))
def test_bad_weights(op: str, on: str) -> None:
    """The same answer from every device, and it names the op."""
    weights = oracle.random_quantized(format_of("marlin_int4", 64), 2, 128, 40)
    w, scales, zeros = (tensor.to(on) for tensor in weights.tensors)
    x = oracle.random_x(2, 3, 128).to(on)

    def call(w: Tensor, scales: Tensor, zeros: Tensor | None, mode: str = "marlin_int4", transpose: bool = False):
        if op == "dequantize":
            return qm.dequantize(w, scales, zeros, 64, None, mode)
        indices = (None, None) if op == "gather_qmm" else ()
        return getattr(qm, op)(x, w, scales, zeros, *indices, transpose, 64, None, mode)

    assert call(w, scales, zeros).shape == ((2, 128, 40) if op == "dequantize" else (2, 3, 40))
    for arguments, error, message in (
        ((w, scales.float(), zeros), TypeError, "float16 scales"),
        ((w, scales, zeros.bfloat16()), TypeError, "float16 zeros"),
        ((w, scales, None), ValueError, "needs zeros"),
        ((w, scales, zeros, "marlin_int4_sym"), ValueError, "has no biases"),
        ((w, scales[:, :1], zeros[:, :1]), ValueError, "do not belong together"),
        ((w, scales[..., :39], zeros[..., :39]), ValueError, "do not belong together"),
        ((w, scales, zeros[..., :39]), ValueError, "must have the shape of scales"),
        ((w.float(), scales, zeros), TypeError, "uint32 or int32"),
    ):
        with pytest.raises(error, match=rf"\[{op}\].*{message}"):
            call(*arguments)
    if op != "dequantize":
        with pytest.raises(ValueError, match=rf"\[{op}\].*takes transpose=False"):
            call(w, scales, zeros, transpose=True)
        with pytest.raises(ValueError, match=rf"\[{op}\].*last size of x must be 128"):
            getattr(qm, op)(x[..., :96], w, scales, zeros, *((None, None) if op == "gather_qmm" else ()), False, 64,
                            None, "marlin_int4")  # fmt: skip


@pytest.mark.parametrize("format", ("bits", "group_size"))
def test_bad_formats(format: str) -> None:
    wrong = {"bits": {"bits": 3}, "group_size": {"group_size": 16}}[format]
    for mode in MARLIN_BITS:
        with pytest.raises(ValueError, match=rf'\[quantize\] mode "{mode}" with .* is not supported; {mode} takes'):
            qm.quantize(torch.zeros(128, 4), mode=mode, **wrong)
    with pytest.raises(ValueError, match=r"\[quantize\] the second to last size of w.*divisible by group_size 128"):
        qm.quantize(torch.zeros(96, 4), mode="marlin_fp4")
