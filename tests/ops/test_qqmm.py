"""qqmm and gather_qqmm: x quantized by mlx and both operands expanded, in float64; and mlx itself where it runs them.

mlx's CPU back end has qqmm for a single row and packed w, without global scales (it passes over them), and no
gather_qqmm; each row of a gathered product is a call of its qqmm.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import quantization_mlx as qm
from cases import DTYPES, FLOAT_FORMATS
from oracle import Format, Quantized, name_of

pytestmark = pytest.mark.kernels_ci

FORMAT = pytest.mark.parametrize("format", FLOAT_FORMATS, ids=name_of)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
PACKED = pytest.mark.parametrize("packed", [True, False], ids=["packed", "float"])
MXFP4, MXFP8, NVFP4 = FLOAT_FORMATS
N, K, E = 24, 192, 5


def quantized(tensor: Tensor, format: Format, global_scale: Tensor | None = None) -> Quantized:
    """By mlx."""
    return Quantized(format, *oracle.mlx_quantize(tensor, format, global_scale), None, global_scale)


def random_w(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return oracle.random_x(*shape, dtype=dtype, seed=7)


def weight_arguments(w: Tensor, weights: Quantized, packed: bool, device: str) -> dict[str, Tensor]:
    return {"w": weights.w.to(device), "scales": weights.scales.to(device)} if packed else {"w": w.to(device)}


def mlx_qqmm(row: Tensor, weights: Quantized) -> Tensor:
    """Of a single row, [..., K] with leading sizes of 1."""
    operands = map(oracle.to_mlx, (row, weights.w, weights.scales))
    return oracle.from_mlx(oracle.mlx().qqmm(*operands, **weights.format.options))


# --- Values -----------------------------------------------------------------------------------------------------------


@FORMAT
def test_agrees_with_mlx(device: str, format: Format) -> None:
    weights = quantized(random_w(N, K), format)
    on = weights.to(device)
    for shape in ((K,), (1, K), (1, 1, K)):
        x = oracle.random_x(*shape)
        theirs = mlx_qqmm(x, weights)
        ours = qm.qqmm(x.to(device), on.w, on.scales, **format.options)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == (*shape[:-1], N)
        bound = 2 * oracle.error_bound(quantized(x.reshape(1, K), format).dense.float(), weights.dense.T, x.dtype)
        oracle.assert_within(ours, theirs.double(), bound, str(shape))


@PACKED
@DTYPE
@FORMAT
def test_qqmm(device: str, format: Format, dtype: torch.dtype, packed: bool) -> None:
    w = random_w(N, K, dtype=dtype)
    weights = quantized(w, format)
    for shape in ((K,), (3, K), (2, 3, K), (40, K), (2, 1, 5, K)):
        x = oracle.random_x(*shape, dtype=dtype)
        values = quantized(x.reshape(-1, K), format).dense.reshape(shape)
        arguments = weight_arguments(w, weights, packed, device)
        ours = qm.qqmm(x.to(device), **arguments, **format.options)
        oracle.assert_product(ours, values, weights.dense.T, dtype, f"{format} {shape}")


@PACKED
@DTYPE
def test_global_scales(device: str, dtype: torch.dtype, packed: bool) -> None:
    """Of both operands, also far from one, and not only the largest magnitudes."""
    for magnitude, factor, shape in ((1.0, 1.0, ()), (1e-3, 1.0, (1,)), (30.0, 0.5, ()), (1.0, 3.0, (1, 1))):
        x = (oracle.random_x(3, K) * magnitude).to(dtype)
        w = (random_w(N, K) * magnitude).to(dtype)
        scale_x, scale_w = (factor * t.float().abs().max() for t in (x, w))
        weights = quantized(w, NVFP4, scale_w)
        scales = {"global_scale_x": scale_x.reshape(shape), "global_scale_w": scale_w.reshape(shape)}
        scales = {name: scale.to(device) for name, scale in scales.items()}
        ours = qm.qqmm(x.to(device), **weight_arguments(w, weights, packed, device), **scales)
        values = quantized(x, NVFP4, scale_x).dense
        oracle.assert_product(ours, values, weights.dense.T, dtype, f"{magnitude} {factor}")


def test_global_scale_of_an_all_zero_tensor(device: str) -> None:
    x, w = torch.zeros(2, K, device=device), random_w(N, K).to(device)
    scales = {"global_scale_x": x.abs().max(), "global_scale_w": w.abs().max()}
    assert torch.equal(qm.qqmm(x, w, **scales).cpu(), torch.zeros(2, N))


@FORMAT
def test_the_largest_float16_numbers(device: str, format: Format) -> None:
    """The mx formats round 65504 to 65536, for which float16 has no room; nvfp4 saturates at 2688."""
    x = torch.full((2, K), 65504.0).half()
    weight = 6 * 2.0**-6  # which the formats hold exactly
    ours = qm.qqmm(x.to(device), (torch.eye(K)[:N] * weight).to(device), **format.options)
    value = {"mxfp4": 65536, "mxfp8": 65536, "nvfp4": 2688}[format.mode] * weight
    oracle.assert_within(ours, torch.full((2, N), value, dtype=torch.float64), 0, str(format))


# x's batch, w's batch, lhs_indices and rhs_indices
INDEXING: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any, Any]] = {
    "rhs": ((2,), (E,), None, [4, 1]),
    "rhs with two axes": ((2, 1), (E,), None, [[4, 1, 0], [0, 2, 3]]),
    "lhs": ((4,), (3,), [3, 0, 0], None),
    "both": ((4,), (E,), [3, 0, 1], [4, 4, 2]),
    "both broadcast": ((4,), (E,), [[3], [0]], [[4, 4, 2]]),
    "neither": ((E,), (E,), None, None),
    "two batch axes": ((2, 3), (2, 2), [5, 0, 4], [3, 0, 1]),
    "no pairs": ((3,), (4,), [], []),
}


@PACKED
@pytest.mark.parametrize("case", INDEXING)
@FORMAT
def test_gather_qqmm(device: str, format: Format, case: str, packed: bool) -> None:
    x_batch, w_batch, lhs, rhs = INDEXING[case]
    w = random_w(*w_batch, N, K)
    weights = quantized(w, format)
    lhs, rhs = (None if index is None else torch.tensor(index, dtype=torch.int64) for index in (lhs, rhs))
    indices = {"lhs_indices": lhs, "rhs_indices": rhs}
    for M in (1, 3):
        x = oracle.random_x(*x_batch, M, K)
        arguments = weight_arguments(w, weights, packed, device)
        arguments |= {name: index if index is None else index.to(device) for name, index in indices.items()}
        ours = qm.gather_qqmm(x.to(device), **arguments, **format.options)
        theirs, bound = gathered_by_mlx(x, weights, lhs, rhs)
        assert ours.dtype == x.dtype
        oracle.assert_within(ours, theirs, bound, f"{format} {case} M {M}")


def gathered_by_mlx(x: Tensor, weights: Quantized, lhs: Tensor | None, rhs: Tensor | None) -> tuple[Tensor, Tensor]:
    """A call of mlx's qqmm for each row, and the largest error."""
    x_flat, w_flat, scales = (t.flatten(0, -3) for t in (x, weights.w, weights.scales))
    lhs = torch.arange(len(x_flat)).reshape(x.shape[:-2]) if lhs is None else lhs
    rhs = torch.arange(len(w_flat)).reshape(weights.w.shape[:-2]) if rhs is None else rhs
    lhs, rhs = torch.broadcast_tensors(lhs, rhs)
    results = torch.empty(lhs.numel(), x.shape[-2], N, dtype=torch.float64)
    bound = torch.zeros((), dtype=torch.float64)
    for position, (i, j) in enumerate(zip(lhs.flatten().tolist(), rhs.flatten().tolist(), strict=True)):
        matrix = Quantized(weights.format, w_flat[j], scales[j], None)
        for row in range(x.shape[-2]):
            values = quantized(x_flat[i, row : row + 1], weights.format).dense.float()
            results[position, row] = mlx_qqmm(x_flat[i, row : row + 1], matrix)[0]
            bound = torch.maximum(bound, 2 * oracle.error_bound(values, matrix.dense.T, x.dtype))
    return results.reshape(*lhs.shape, x.shape[-2], N), bound


@PACKED
@DTYPE
def test_gather_with_global_scales(device: str, dtype: torch.dtype, packed: bool) -> None:
    x, w = (oracle.random_x(4, 1, K) * 0.1).to(dtype), random_w(E, N, K, dtype=dtype)
    scale_x, scale_w = (t.float().abs().max() for t in (x, w))
    weights = quantized(w, NVFP4, scale_w)
    rhs = torch.tensor([0, 2, 2, 4])
    scales = {"global_scale_x": scale_x.to(device), "global_scale_w": scale_w.to(device)}
    arguments = {**weight_arguments(w, weights, packed, device), "rhs_indices": rhs.to(device), **scales}
    ours = qm.gather_qqmm(x.to(device), **arguments, sorted_indices=True)
    values = quantized(x, NVFP4, scale_x).dense
    for i, expert in enumerate(rhs.tolist()):
        oracle.assert_product(ours[i], values[i], weights.dense[expert].T, dtype, f"pair {i}")


@DTYPE
@FORMAT
def test_sorted_indices(device: str, format: Format, dtype: torch.dtype) -> None:
    """Many rows for few experts, as in a mixture's layer."""
    rhs = torch.arange(E).repeat_interleave(16)
    x, w = oracle.random_x(len(rhs), 1, K, dtype=dtype), random_w(E, N, K)
    weights = quantized(w, format)
    on = weights.to(device)
    for promised in (True, False):
        operands = (x.to(device), on.w, on.scales, None, rhs.to(device))
        ours = qm.gather_qqmm(*operands, **format.options, sorted_indices=promised)
        values = quantized(x, format).dense
        for expert in range(E):
            rows = slice(16 * expert, 16 * (expert + 1))
            oracle.assert_product(ours[rows, 0], values[rows, 0], weights.dense[expert].T, dtype, f"expert {expert}")


# --- Ways to call -----------------------------------------------------------------------------------------------------


def test_positions_are_those_of_mlx_and_the_hub(device: str) -> None:
    x, w = oracle.random_x(3, K).to(device), random_w(N, K).to(device)
    scale = torch.tensor(3.0, device=device)
    by_keyword = qm.qqmm(x=x, w=w, group_size=16, bits=4, mode="nvfp4", global_scale_x=scale, global_scale_w=scale)
    oracle.assert_identical(qm.qqmm(x, w, None, 16, 4, "nvfp4", scale, scale), by_keyword)
    x, w = oracle.random_x(2, 1, K).to(device), random_w(E, N, K).to(device)
    lhs, rhs = torch.tensor([1, 0, 1], device=device), torch.tensor([0, 3, 4], device=device)
    indices = {"lhs_indices": lhs, "rhs_indices": rhs, "sorted_indices": True}
    by_keyword = qm.gather_qqmm(x=x, w=w, **indices, global_scale_x=scale, global_scale_w=scale)
    by_position = qm.gather_qqmm(x, w, None, lhs, rhs, None, None, "nvfp4", scale, scale, True)
    oracle.assert_identical(by_position, by_keyword)


def test_any_strides_and_words_of_int32(device: str) -> None:
    base = oracle.random_x(2 * K, 6).to(device)
    weights = quantized(random_w(N, K), NVFP4).to(device)
    expected = qm.qqmm(base[::2].T.contiguous(), weights.w, weights.scales)
    oracle.assert_identical(qm.qqmm(base[::2].T, weights.w.view(torch.int32), weights.scales), expected)
    transposed = base[:K].T
    oracle.assert_identical(qm.qqmm(base[::2].T, transposed), qm.qqmm(base[::2].T, transposed.contiguous()))


def test_no_rows(device: str) -> None:
    w = random_w(N, K).to(device)
    assert qm.qqmm(torch.empty(0, K, device=device), w).shape == (0, N)
    assert qm.qqmm(torch.empty(2, 0, K, device=device), w).shape == (2, 0, N)
    assert qm.gather_qqmm(torch.empty(2, 0, K, device=device), w.expand(2, N, K)).shape == (2, 0, N)


def calls(x: Tensor, w: Tensor, scales: Tensor) -> dict[str, Tensor]:
    experts, experts_scales = w.expand(E, *w.shape), scales.expand(E, *scales.shape)
    rhs, scale = torch.arange(E, device=x.device), x.float().abs().max()
    return {
        "packed": qm.qqmm(x, w, scales),
        "gathered": qm.gather_qqmm(x.unsqueeze(0), experts, experts_scales, rhs_indices=rhs),
        "float": qm.qqmm(x, qm.dequantize(w, scales, mode="nvfp4")),
        "global scales": qm.qqmm(x, w, scales, global_scale_x=scale, global_scale_w=scale),
    }


def test_compile_without_breaks_or_recompilation(device: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(calls, backend=counter, fullgraph=True, dynamic=True)
    weights = quantized(random_w(N, K), NVFP4).to(device)
    for rows in (3, 5, 8):
        x = oracle.random_x(rows, K).to(device)
        expected = calls(x, weights.w, weights.scales)
        for name, result in compiled(x, weights.w, weights.scales).items():
            oracle.assert_identical(result, expected[name], name)
    assert counter.frame_count == 1


def test_export(device: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, scales: Tensor) -> dict[str, Tensor]:
            return calls(x, w, scales)

    weights = quantized(random_w(N, K), NVFP4).to(device)
    x = oracle.random_x(4, K).to(device)
    dynamic = ({0: torch.export.Dim("rows")}, None, None)
    program = torch.export.export(Module(), (x, weights.w, weights.scales), dynamic_shapes=dynamic).module()
    x = oracle.random_x(7, K).to(device)
    expected = calls(x, weights.w, weights.scales)
    for name, result in program(x, weights.w, weights.scales).items():
        oracle.assert_identical(result, expected[name], name)


def test_meta_results_describe_the_real_ones(device: str) -> None:
    weights = quantized(random_w(N, K), NVFP4)
    for dtype in DTYPES:
        x = oracle.random_x(3, K, dtype=dtype)
        real = calls(*(t.to(device) for t in (x, weights.w, weights.scales)))
        meta = calls(*(t.to("meta") for t in (x, weights.w, weights.scales)))
        for name, result in real.items():
            assert (meta[name].shape, meta[name].dtype) == (result.shape, result.dtype), name


@FORMAT
def test_autocast(device: str, format: Format) -> None:
    """The product is autocast's, of x as it was quantized."""
    x, weights = oracle.random_x(3, K), quantized(random_w(N, K), format)
    on = weights.to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y = qm.qqmm(x.to(device), on.w, on.scales, **format.options)
        gathered = qm.gather_qqmm(x[None].to(device), on.w[None], on.scales[None], **format.options)
    values = quantized(x, format).dense
    for ours in (y, gathered[0]):
        oracle.assert_product(ours, values, weights.dense.T, torch.bfloat16)


def test_plans_name_the_op(device: str) -> None:
    x, w = oracle.random_x(3, K).to(device), random_w(N, K).to(device)
    assert [plan.op for plan in qm.explain(qm.qqmm, x, w)] == ["quantize", "dequantize", "quantize", "qqmm"]
    plans = qm.explain(qm.gather_qqmm, x[None], *quantized(random_w(1, N, K), NVFP4).to(device).tensors[:2])
    assert [plan.op for plan in plans] == ["quantize", "dequantize", "gather_qqmm"]


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "w"])
@pytest.mark.parametrize("op", ["qqmm", "gather_qqmm"])
def test_gradients_are_refused_and_not_dropped(op: str, name: str) -> None:
    arguments = {"x": oracle.random_x(1, 3, K), "w": random_w(1, N, K)}
    if op == "qqmm":
        arguments = {key: tensor[0] for key, tensor in arguments.items()}
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"^\[{op}\] {name} requires a gradient.*no_grad"):
        getattr(qm, op)(**arguments)
    with torch.no_grad():
        assert not getattr(qm, op)(**arguments).requires_grad
    arguments[name] = arguments[name].detach()
    assert not getattr(qm, op)(**arguments).requires_grad


# --- Wrong arguments --------------------------------------------------------------------------------------------------

X, W = oracle.random_x(3, K), random_w(N, K)
SCALE = torch.tensor(2.0)
BOTH = {"global_scale_x": SCALE, "global_scale_w": SCALE}
# Changed arguments, and what the message shows.
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mode affine": ({"mode": "affine"}, ("'affine'", "'nvfp4'", "'mxfp8'", "'mxfp4'")),
    "mode marlin": ({"mode": "marlin_fp4"}, ("'marlin_fp4'", "'nvfp4'")),
    "mode unknown": ({"mode": "int4"}, ("'int4'", "'nvfp4'")),
    "mode none": ({"mode": None}, ("None", "'nvfp4'")),
    "group_size": ({"group_size": 32}, ("nvfp4", "32", "16")),
    "group_size mxfp8": ({"group_size": 16, "mode": "mxfp8"}, ("mxfp8", "16", "32")),
    "bits": ({"bits": 8}, ("nvfp4", "8", "4")),
    "x none": ({"x": None}, ("x is None",)),
    "x int": ({"x": X.int()}, ("x has dtype int32", "float32")),
    "x float64": ({"x": X.double()}, ("x has dtype float64", "bfloat16")),
    "x scalar": ({"x": SCALE}, (r"x of shape \[\]",)),
    "x ragged": ({"x": X[:, :-8]}, (rf"x of shape \[3, {K - 8}\]", "16")),
    "x of another length": ({"x": X[:, :-16]}, (str(K - 16), str(K))),
    "w none": ({"w": None}, ("w is None",)),
    "w float64": ({"w": W.double()}, ("w has dtype float64", "float32")),
    "w ragged": ({"w": W[:, :-8]}, (rf"w of shape \[{N}, {K - 8}\]", "16")),
    "w vector": ({"w": W[0]}, (rf"w of shape \[{K}\]", "2")),
    "w batched": ({"w": W[None]}, (rf"w of shape \[1, {N}, {K}\]", "gather_qqmm")),
    "w packed without scales": ({"w": torch.zeros(N, K // 8, dtype=torch.uint32)}, ("w has dtype uint32", "scales")),
    "w float with scales": ({"scales": torch.zeros(N, K // 16, dtype=torch.uint8)}, ("w", "(?i)float", "uint32")),
    "scales float": (
        {"w": torch.zeros(N, K // 8, dtype=torch.uint32), "scales": torch.zeros(N, K // 16)},
        ("scales", "(?i)float", "uint8"),
    ),
    "scales of another shape": (
        {"w": torch.zeros(N, K // 8, dtype=torch.uint32), "scales": torch.zeros(N, 3, dtype=torch.uint8)},
        (str(K // 8), r"\b3\b"),
    ),
    "w on another device": ({"w": W.to("meta")}, ("meta", "cpu")),
    "global scale of x alone": ({"global_scale_x": SCALE}, ("global_scale_x given alone", "global_scale_w")),
    "global scale of w alone": ({"global_scale_w": SCALE}, ("global_scale_w given alone", "global_scale_x")),
    "global scales mxfp8": ({**BOTH, "mode": "mxfp8"}, ("global_scale_x and global_scale_w", "mxfp8", "nvfp4")),
    "global scale float16": ({**BOTH, "global_scale_x": SCALE.half()}, ("global_scale_x has dtype float16", "float32")),
    "global scale of each row": ({**BOTH, "global_scale_w": torch.ones(3)}, (r"global_scale_w has shape \[3\]", "one")),
    "global scale elsewhere": (
        {**BOTH, "global_scale_w": SCALE.to("meta")},
        ("global_scale_w is on device meta", "cpu"),
    ),
}
OF_QQMM = {"w batched", "w vector"}  # gather_qqmm takes other shapes
GATHER_WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "x vector": ({"x": X[0]}, (rf"x of shape \[{K}\]", "two")),
    "w vector": ({"w": W[0]}, (rf"w of shape \[{K}\]", "2")),
    "indices float": ({"rhs_indices": torch.zeros(1)}, ("rhs_indices", "(?i)float")),
    "indices do not broadcast": (
        {"lhs_indices": torch.zeros(2, dtype=torch.int64), "rhs_indices": torch.zeros(3, dtype=torch.int64)},
        (r"\[2\]", r"\[3\]"),
    ),
    "index out of range": ({"rhs_indices": torch.tensor([1])}, ("rhs_indices holds 1",)),
    "negative index": ({"lhs_indices": torch.tensor([-1])}, ("lhs_indices holds -1",)),
}


@pytest.mark.parametrize(
    "op, case", [(op, case) for op in ("qqmm", "gather_qqmm") for case in WRONG if op == "qqmm" or case not in OF_QQMM]
)
def test_wrong_arguments(op: str, case: str) -> None:
    change, shows = WRONG[case]
    expect_error(op, {"x": X, "w": W} | change, shows)


@pytest.mark.parametrize("case", GATHER_WRONG)
def test_wrong_arguments_of_gather_qqmm(case: str) -> None:
    change, shows = GATHER_WRONG[case]
    expect_error("gather_qqmm", {"x": X[None], "w": W[None]} | change, shows)


def expect_error(op: str, arguments: dict[str, Any], shows: tuple[str, ...]) -> None:
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        getattr(qm, op)(**arguments)
    message = str(caught.value)
    assert message.startswith(f"[{op}] "), message
    missing = [pattern for pattern in shows if not re.search(pattern, message)]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("op", ["qqmm", "gather_qqmm"])
def test_the_valid_arguments_are_valid(op: str) -> None:
    """So that each case above fails for its own reason."""
    for more in ({}, BOTH):
        assert getattr(qm, op)(X, W, **more).shape == (3, N)
