"""Mixtures of experts that are one linear map each: routing, products and their sum, by their documented names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._ops import ops
from ..formats import FLOATS
from .functions import (
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
_linear_experts = ops._linear_experts.default


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
    sizes = (hidden_dim, out_dim, num_experts, top_k, group_size)
    tensors = (activations, router_weights, *experts, *shared)
    # The op refuses what does not fit. To find out what it is takes as long as a product of one token, so that waits
    # until it is needed.
    try:
        return _linear_experts(*tensors, tokens.get("batch_size"), *sizes)
    except (RuntimeError, TypeError, ValueError) as error:
        failure = error
    _check(function, activations, tokens, router_weights, experts, shared, *sizes)
    raise failure


def _check(
    function: str,
    activations: Any,
    tokens: Mapping[str, Any],
    router_weights: Any,
    experts: tuple[Any, Any],
    shared: tuple[Any, Any],
    hidden_dim: Any,
    out_dim: Any,
    num_experts: Any,
    top_k: Any,
    group_size: Any,
) -> None:
    """Raises an error for what does not fit, under its documented name."""
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
    if shared != (None, None):
        packed = dict(zip(("shared_weights", "shared_scales"), shared, strict=True))
        check_packed(function, _MODE, sizes, packed)
        tensors |= packed
    check_devices(function, **tensors)
