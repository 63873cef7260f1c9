"""Mixtures of experts that are one linear map each: routing, products and their sum, by their documented names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._ops import ops
from ..formats import FLOATS
from .functions import (
    BITS,
    check_choice,
    check_devices,
    check_dtype,
    check_library,
    check_packed,
    check_shape,
    check_size,
)
from .library import MetalKernelLibrary

_MODE = "marlin_fp4"

# Called with all arguments: the fastest way from Python into the dispatcher.
_moe_router = ops.moe_router.default
_moe_combine = ops.moe_combine.default
_gather_qmm = ops.gather_qmm.default
_quantized_matmul = ops.quantized_matmul.default


def dispatch_moe_optimized(
    lib: MetalKernelLibrary,
    activations: Tensor,
    router_weights: Tensor,
    expert_weights: Tensor,
    expert_scales: Tensor,
    shared_weights: Tensor | None,
    shared_scales: Tensor | None,
    batch_size: int,
    hidden_dim: int,
    out_dim: int,
    num_experts: int = 64,
    top_k: int = 4,
    group_size: int = 128,
) -> Tensor:
    """For each token a, ``a @ shared + sum(weight[e] * (a @ W[e]))`` over the top_k experts with the largest logits
    ``a @ router_weights``; the weights are the softmax of these logits.

    An expert is one matrix. Products take the weights as they are packed, and sums are float32. The experts are chosen
    on the device, so nothing waits for it. With K the hidden_dim and N the out_dim:

    Args:
        lib: a handle, such as `get_default_library()`.
        activations: [batch_size, K], float16 as documented, or bfloat16 or float32.
        router_weights: [K, num_experts] of any of these dtypes. Logits are computed and compared in float32.
        expert_weights, expert_scales: uint32 [num_experts, K / 8, N] and float16 [num_experts, K / group_size, N], each
            expert as of `pack_fp4_weights`.
        shared_weights, shared_scales: of an expert that every token has, with weight 1: [K / 8, N] and
            [K / group_size, N]; both None for none.
        batch_size, hidden_dim, out_dim: the sizes, which those of the tensors must be.
        num_experts: up to 512.
        top_k: of them for each token, up to 32.
        group_size: 128, 64 or 32.

    Returns:
        [batch_size, out_dim] of the dtype of activations. Gradients reach activations and router_weights.

    Raises:
        ValueError: a size, a shape or a device does not fit, or one of shared_weights and shared_scales is missing.
        TypeError: a dtype is not supported, or something is no tensor, or no MetalKernelLibrary.
    """
    function = "dispatch_moe_optimized"
    check_size(function, "batch_size", batch_size)
    tokens = {"batch_size": batch_size, "hidden_dim": hidden_dim}
    experts = (expert_weights, expert_scales), (shared_weights, shared_scales)
    sizes = (hidden_dim, out_dim, num_experts, top_k, group_size)
    return _mixed(function, lib, activations, tokens, router_weights, *experts, *sizes)


def dispatch_moe_decode(
    lib: MetalKernelLibrary,
    activations: Tensor,
    router_weights: Tensor,
    expert_weights: Tensor,
    expert_scales: Tensor,
    shared_weights: Tensor | None,
    shared_scales: Tensor | None,
    hidden_dim: int,
    out_dim: int,
    num_experts: int = 64,
    top_k: int = 4,
    group_size: int = 128,
) -> Tensor:
    """`dispatch_moe_optimized` of one token: activations [hidden_dim] give [out_dim], and [1, hidden_dim] give
    [1, out_dim]."""
    function = "dispatch_moe_decode"
    is_row = isinstance(activations, Tensor) and activations.dim() == 2
    tokens = {"batch_size": 1, "hidden_dim": hidden_dim} if is_row else {"hidden_dim": hidden_dim}
    experts = (expert_weights, expert_scales), (shared_weights, shared_scales)
    sizes = (hidden_dim, out_dim, num_experts, top_k, group_size)
    return _mixed(function, lib, activations, tokens, router_weights, *experts, *sizes)


def _mixed(
    function: str,
    lib: Any,
    activations: Tensor,
    tokens: Mapping[str, int],
    router_weights: Tensor,
    experts: tuple[Tensor, Tensor],
    shared: tuple[Tensor | None, Tensor | None],
    hidden_dim: int,
    out_dim: int,
    num_experts: int,
    top_k: int,
    group_size: int,
) -> Tensor:
    """tokens: the sizes of activations, by name."""
    check_library(function, lib)
    check_choice(function, num_experts, top_k)
    check_size(function, "hidden_dim", hidden_dim, 1)
    check_shape(function, "activations", activations, tuple(tokens.values()), tokens)
    router = {"hidden_dim": hidden_dim, "num_experts": num_experts}
    check_shape(function, "router_weights", router_weights, (hidden_dim, num_experts), router)
    tensors = {"activations": activations, "router_weights": router_weights}
    for name, tensor in tensors.items():
        check_dtype(function, name, tensor, FLOATS)
    sizes = {"hidden_dim": hidden_dim, "out_dim": out_dim, "group_size": group_size}
    packed = dict(zip(("expert_weights", "expert_scales"), experts, strict=True))
    check_packed(function, _MODE, {"num_experts": num_experts, **sizes}, packed)
    tensors |= packed
    has_shared = shared != (None, None)
    if has_shared:
        packed = dict(zip(("shared_weights", "shared_scales"), shared, strict=True))
        check_packed(function, _MODE, sizes, packed)
        tensors |= packed
    check_devices(function, **tensors)

    format = (group_size, BITS[_MODE], _MODE)
    rows = activations if activations.dim() == 2 else activations[None]
    # Rounded to half precision, logits would be wrong by as much as the weights of experts differ.
    logits = rows.float() @ router_weights.float()
    indices, weights = _moe_router(logits, top_k, "softmax_of_selected", None, 1, 1, False, 1.0)
    products = _gather_qmm(rows[:, None, None], *experts, None, None, indices, False, *format)
    residual = _quantized_matmul(rows, *shared, None, False, *format) if has_shared else None
    mixed = _moe_combine(products.squeeze(-2), weights, residual, None, None)
    return mixed if activations.dim() == 2 else mixed[0]
