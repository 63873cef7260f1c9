"""quantized_gated_matmul: against float64 on dequantized weights, and against the ops that it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
import quantization_mlx as qm
from cases import DTYPES, FORMATS, SOME_FORMATS
from oracle import Format, name_of
from quantization_mlx import fast
from quantization_mlx._ops import ops

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
FORMAT = Format("affine", 64, 4)


def arguments(weights: oracle.Quantized) -> tuple[Any, ...]:
    return (weights.w, weights.scales, weights.biases, *weights.format.options.values())


def gated(x: Tensor, matrix: Tensor, activation: str) -> Tensor:
    gates, values = (x @ matrix.mT).chunk(2, -1)
    return ACTIVATIONS[activation](gates) * values


def assert_gated(y: Tensor, x: Tensor, matrix: Tensor, activation: str, dtype: torch.dtype) -> None:
    """Within what gates and values may be wrong by, as results of a product each, and one rounding."""
    x, matrix = x.double().cpu(), matrix.double().cpu()
    gates, values = (x @ matrix.mT).chunk(2, -1)
    exact = gated(x, matrix, activation)
    product_bound = oracle.error_bound(x, matrix.mT, dtype)
    # No activation is steeper than 1.13.
    bound = 1.13 * product_bound * (values.abs() + product_bound) + gates.abs() * product_bound
    assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous()
    oracle.assert_within(y.cpu(), exact, bound + 2 * torch.finfo(dtype).eps * exact.abs() + 1e-6)


# --- Values -----------------------------------------------------------------------------------------------------------


@ACTIVATION
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", SOME_FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 12, 40])
@pytest.mark.parametrize("N, K", [(33, 128), (64, 1152), (4, 2560)])
def test_values(device: str, activation: str, dtype: torch.dtype, format: Format, rows: int, N: int, K: int) -> None:
    weights = oracle.random_quantized(format, 2 * N, K, dtype=dtype)
    x = oracle.random_x(rows, K, dtype=dtype)
    moved = weights.to(device)
    y = fast.quantized_gated_matmul(x.to(device), *arguments(moved), activation=activation)
    assert_gated(y, x, weights.dense, activation, dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_format(device: str, format: Format) -> None:
    weights = oracle.random_quantized(format, 48, 384, dtype=torch.float16)
    x = oracle.random_x(2, 384, dtype=torch.float16)
    y = fast.quantized_gated_matmul(x.to(device), *arguments(weights.to(device)))
    assert_gated(y, x, weights.dense, "silu", torch.float16)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("x_batch, w_batch", [((2, 3), ()), ((3,), (3,)), ((2, 1), (3,)), ((), (2,))], ids=str)
def test_batches(device: str, rows: int, x_batch: tuple[int, ...], w_batch: tuple[int, ...]) -> None:
    weights = oracle.random_quantized(FORMAT, *w_batch, 20, 128)
    x = oracle.random_x(*x_batch, rows, 128)
    y = fast.quantized_gated_matmul(x.to(device), *arguments(weights.to(device)))
    assert_gated(y, x, weights.dense, "silu", torch.float32)


def test_other_operands(device: str) -> None:
    """Vectors, x with gaps, weights that begin anywhere, a global scale and no rows at all."""
    weights = oracle.random_quantized(FORMAT, 40, 128)
    matrix = weights.dense
    x = oracle.random_x(4, 130)
    moved = weights.to(device)

    y = fast.quantized_gated_matmul(x[0, 1:129].to(device), *arguments(moved))
    assert_gated(y, x[0, 1:129], matrix, "silu", torch.float32)
    y = fast.quantized_gated_matmul(x.to(device)[::2, 1:129], *arguments(moved))
    assert_gated(y, x[::2, 1:129], matrix, "silu", torch.float32)
    part = (moved.w[2:32], moved.scales[2:32], moved.biases[2:32])
    y = fast.quantized_gated_matmul(x[:1, :128].to(device), *part, 64, 4)
    assert_gated(y, x[:1, :128], matrix[2:32], "silu", torch.float32)
    assert fast.quantized_gated_matmul(x[:0, :128].to(device), *arguments(moved)).shape == (0, 20)

    scale = torch.tensor([1500.0])
    quantized = qm.quantize(oracle.random_x(32, 64), mode="nvfp4", global_scale=scale)
    matrix = qm.dequantize(*quantized, mode="nvfp4", global_scale=scale, dtype=torch.float32)
    on_device = [each.to(device) for each in quantized]
    y = fast.quantized_gated_matmul(
        x[:2, :64].to(device), *on_device, mode="nvfp4", activation="gelu", global_scale=scale.to(device)
    )
    assert_gated(y, x[:2, :64], matrix, "gelu", torch.float32)


def test_scales_of_another_dtype(device: str) -> None:
    weights = oracle.random_quantized(FORMAT, 40, 128)
    x = oracle.random_x(2, 128, dtype=torch.float16)
    y = fast.quantized_gated_matmul(x.to(device), *arguments(weights.to(device)))
    assert_gated(y, x, weights.dense, "silu", torch.float32)


# --- Gradients --------------------------------------------------------------------------------------------------------


@ACTIVATION
def test_gradients(device: str, activation: str) -> None:
    weights = oracle.random_quantized(FORMAT, 24, 128).to(device)
    x, scales, biases = (
        each.detach().to(device).requires_grad_() for each in (oracle.random_x(3, 128), weights.scales, weights.biases)
    )
    fast.quantized_gated_matmul(x, weights.w, scales, biases, 64, 4, activation=activation).square().sum().backward()

    codes = torch.from_numpy(oracle.unpack(weights.w, 4)).double().view(24, 2, 64)
    exact = [each.detach().cpu().double().requires_grad_() for each in (x, scales, biases)]
    matrix = (codes * exact[1][..., None] + exact[2][..., None]).flatten(1)
    gated(exact[0], matrix, activation).square().sum().backward()
    for mine, theirs in zip((x, scales, biases), exact, strict=True):
        oracle.assert_within(mine.grad.cpu(), theirs.grad, 1e-4 * theirs.grad.abs().amax())


def test_forward_mode_is_refused() -> None:
    weights = oracle.random_quantized(FORMAT, 24, 128)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(oracle.random_x(1, 128), oracle.random_x(1, 128))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            fast.quantized_gated_matmul(x, *arguments(weights))


# --- As torch's ops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device: str, grad: bool) -> None:
    weights = oracle.random_quantized(FORMAT, 24, 128).to(device)
    x = oracle.random_x(2, 3, 128).to(device).requires_grad_(grad)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    torch.library.opcheck(ops.quantized_gated_matmul.default, (x, *arguments(weights), "gelu_tanh"), test_utils=checks)


@ACTIVATION
def test_compiles_as_one_graph(activation: str) -> None:
    weights = oracle.random_quantized(FORMAT, 24, 128)

    def call(x: Tensor) -> Tensor:
        return fast.quantized_gated_matmul(x, *arguments(weights), activation=activation)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (1, 5):
        x = oracle.random_x(rows, 128)
        oracle.assert_identical(compiled(x), call(x))


def test_exports_with_sizes_that_depend_on_data() -> None:
    weights = oracle.random_quantized(FORMAT, 24, 128)

    class Module(torch.nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return fast.quantized_gated_matmul(torch.arange(6.0)[mask][:, None] * torch.ones(128), *arguments(weights))

    mask = torch.tensor([True, False, True, True, False, True])
    program = torch.export.export(Module(), (mask,)).module()
    for each in (mask, ~mask):
        oracle.assert_identical(program(each), Module()(each))


def test_autocast(device: str) -> None:
    weights = oracle.random_quantized(FORMAT, 24, 128).to(device)
    x = oracle.random_x(2, 128).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = fast.quantized_gated_matmul(x, *arguments(weights))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("gpu, rows, families", [
    ("applegpu_g15s", 1, ["gated_matvec"]),
    ("applegpu_g15s", 12, ["gated_matvec"]),
    ("applegpu_g13s", 12, ["tile", "gate"]),
    ("applegpu_g17s", 64, ["tensor", "gate"]),
])  # fmt: skip
def test_launches(gpu: str, rows: int, families: list[str]) -> None:
    """One for few rows; where the GPU's row limit for as many rows of w is passed, those of product and activation."""
    w, scales, biases = (each.to("meta") for each in oracle.random_quantized(FORMAT, 2 * 4096, 64).tensors)
    x = torch.empty(rows, 64, dtype=torch.float16, device="meta")
    [plan] = qm.explain(fast.quantized_gated_matmul, x, w, scales.half(), biases.half(), gpu=gpu)
    assert [launch.family for launch in plan.launches] == families


def test_explain_on_cpu() -> None:
    weights = oracle.random_quantized(FORMAT, 24, 128)
    explained = json.loads(ops.explain_quantized_gated_matmul(oracle.random_x(1, 128), *arguments(weights), "silu"))
    assert (explained["device"], explained["activations"]) == ("cpu", "exact")


# --- Errors -----------------------------------------------------------------------------------------------------------

W = oracle.random_quantized(FORMAT, 24, 128)
COLUMNS = oracle.random_quantized(Format("marlin_int4", 64, 4), 128, 24)
ERRORS = {
    "activation": (
        lambda: fast.quantized_gated_matmul(oracle.random_x(1, 128), *arguments(W), activation="relu"),
        r'\[quantized_gated_matmul\] activation is "relu"; supported are "silu", "gelu" and "gelu_tanh"',
    ),
    "odd rows": (
        lambda: fast.quantized_gated_matmul(oracle.random_x(1, 128), W.w[:23], W.scales[:23], W.biases[:23], 64, 4),
        r"\[quantized_gated_matmul\] w has 23 rows; there must be as many of gates as of values",
    ),
    "K": (
        lambda: fast.quantized_gated_matmul(oracle.random_x(1, 64), *arguments(W)),
        r"\[quantized_gated_matmul\] x .*64",
    ),
    "mode": (
        lambda: fast.quantized_gated_matmul(oracle.random_x(1, 128), *arguments(COLUMNS)),
        r"\[quantized_gated_matmul\] .*transpose",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
