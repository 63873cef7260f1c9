"""A mixture of experts on packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import fast
from ..nn.module import own
from ..nn.switch import SwitchLinear
from .experts import ColumnPackedSwitchLinear
from .functions import check_choice, check_groups
from .layers import mode_of_bits
from .mlp import MetalMLP
from .origins import check_activation, check_origin, family_of_origin
from .parts import Float32Buffers, check_hidden_states


class Router(Float32Buffers, nn.Linear):
    """Chooses the experts of tokens, by `fast.moe_router`.

    Args:
        hidden_size, num_experts: `weight` is [num_experts, hidden_size], in floating point.
        top_k: experts of a token.
        routing: further options of `fast.moe_router`, but for its bias.
        has_score_bias: whether scores have a bias for choosing alone, `e_score_correction_bias` float32 [num_experts].
        in_float32: whether the product is computed in float32, whatever the dtype of x.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        routing: Mapping[str, Any],
        has_score_bias: bool = False,
        in_float32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        self.top_k, self.routing, self.in_float32 = top_k, dict(routing), in_float32
        score_bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if has_score_bias else None
        self.register_buffer("e_score_correction_bias", score_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., hidden_size] -> the numbers of experts, int64 [..., top_k], and their weights, float32."""
        x = x.float() if self.in_float32 else x
        logits = F.linear(x, self.weight.to(x.dtype)).float()
        return fast.moe_router(logits, self.top_k, bias=self.e_score_correction_bias, **self.routing)


class MetalExperts(nn.Module):
    """Gated MLPs of which each token passes some: `gate_up_proj`, the columns of gates before those of values, and
    `down_proj`, `ColumnPackedSwitchLinear` layers.

    Args:
        hidden_size, intermediate_size, num_experts: the sizes.
        bits, group_size, device, dtype: as in `MetalQuantizedLinear`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        bits: int = 4,
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"mode": mode_of_bits(type(self).__name__, bits, group_size), "group_size": group_size}
        options |= {"device": device, "dtype": dtype}
        self.gate_up_proj = ColumnPackedSwitchLinear(num_experts, hidden_size, 2 * intermediate_size, **options)
        self.down_proj = ColumnPackedSwitchLinear(num_experts, intermediate_size, hidden_size, **options)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [tokens, hidden_size], experts int64 [tokens, k] -> [tokens, k, hidden_size]."""
        gates, values = self.gate_up_proj(x.unsqueeze(1), experts).chunk(2, -1)
        return self.down_proj(fast.swiglu(gates, values), experts)


class MetalMoELayer(nn.Module):
    """Each token passes the `top_k` of `num_experts` gated MLPs that the router `gate` chooses: the result is the sum
    of theirs, weighted by the router's probabilities, which sum up to 1. Nothing waits for the device.

    Args:
        hidden_size, intermediate_size: the sizes of an expert, multiples of group_size.
        num_experts: up to 512.
        top_k: experts of a token, up to 32.
        bits, group_size: of the experts, as in `MetalQuantizedLinear`; the router is in floating point.
        routing: options of `fast.moe_router` in the place of ``{"normalise": True}``, but for k and bias.
        has_score_bias, routes_in_float32: of the router, as DeepSeek-V3 has them.
        shared_intermediate_size: of an MLP beside the experts that every token passes, `shared_experts`; None for none.
        device, dtype: where the parameters live, and the dtype of the router.

    Raises:
        TypeError: a size is no whole number.
        ValueError: sizes do not fit, or bits or group_size is not supported.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        bits: int = 4,
        group_size: int = 128,
        *,
        routing: Mapping[str, Any] | None = None,
        has_score_bias: bool = False,
        routes_in_float32: bool = False,
        shared_intermediate_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_choice(op, num_experts, top_k)
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            check_groups(op, name, size, group_size)
        mode_of_bits(op, bits, group_size)
        self.hidden_size = hidden_size
        place = {"device": device, "dtype": dtype}
        routing = {"normalise": True} if routing is None else routing
        self.gate = Router(hidden_size, num_experts, top_k, routing, has_score_bias, routes_in_float32, **place)
        self.experts = MetalExperts(hidden_size, intermediate_size, num_experts, bits, group_size, **place)
        self.shared_experts = None
        if shared_intermediate_size is not None:
            self.shared_experts = MetalMLP(hidden_size, shared_intermediate_size, bits, group_size, **place)

    @classmethod
    def from_float(cls, module: nn.Module, bits: int = 4, group_size: int = 128) -> MetalMoELayer:
        """Quantizes the mixture of experts of a Mixtral, Qwen3-MoE, DeepSeek-V3 or GLM-4.7-Flash model of Transformers,
        which shares nothing with the result but layers that are packed already. The router stays as it is.

        Raises:
            TypeError, ValueError: as `MetalMLP.from_float`.
        """
        op = f"{cls.__name__}.from_float"
        check_origin(op, module, "mixture")
        family = family_of_origin(module)
        router, experts = getattr(module, family.router), module.experts
        check_origin(op, router, "router")
        check_origin(op, experts, "experts")
        check_activation(op, experts)
        down_proj = experts.down_proj.weight if isinstance(experts.down_proj, nn.Module) else experts.down_proj
        if experts.is_transposed or not experts.is_concatenated or down_proj.dim() != 3:
            raise TypeError(f"[{op}] these {type(experts).__name__} do not hold their weights as the known ones")
        num_experts, hidden_size, intermediate_size = down_proj.shape
        if num_experts != len(router.weight):
            raise ValueError(f"[{op}] {len(router.weight)} experts can be chosen, of which {num_experts} are here")
        routing = dict(family.routing(router))
        top_k, score_bias = routing.pop("k"), routing.pop("bias", None)
        sizes = hidden_size, intermediate_size, num_experts, top_k, bits, group_size
        made = cls(*sizes, routing=routing, routes_in_float32=family.routes_in_float32, device="meta")
        made.gate.weight = own(router.weight)
        if score_bias is not None:
            made.gate.e_score_correction_bias = score_bias.detach().float().clone()
        mode = mode_of_bits(op, bits, group_size)
        for name in ("gate_up_proj", "down_proj"):
            setattr(made.experts, name, _packed_experts(op, experts, name, mode, group_size))
        if getattr(module, "shared_experts", None) is not None:
            made.shared_experts = MetalMLP.from_float(module.shared_experts, bits, group_size)
        return made.train(module.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, S, hidden_size] -> the same shape and dtype.

        Raises:
            TypeError, ValueError: their dtype or their shape is not supported.
        """
        check_hidden_states(type(self).__name__, hidden_states, self.hidden_size)
        rows = hidden_states.flatten(0, 1)
        experts, weights = self.gate(rows)
        shared = None if self.shared_experts is None else self.shared_experts(rows)
        return fast.moe_combine(self.experts(rows, experts), weights, residual=shared).view_as(hidden_states)


def _packed_experts(op: str, experts: nn.Module, name: str, mode: str, group_size: int) -> ColumnPackedSwitchLinear:
    """The projection of that name; what is packed already is taken as it is."""
    if (fused := experts._parameters.get(name)) is not None:
        return ColumnPackedSwitchLinear.from_switch_linear(SwitchLinear(fused.detach()), mode, group_size)
    parts = [getattr(experts, each) for each in (("gate_proj", "up_proj") if name == "gate_up_proj" else (name,))]
    if any(type(part) is not ColumnPackedSwitchLinear or part.bias is not None for part in parts):
        raise TypeError(f"[{op}] these {type(experts).__name__} are packed, but not by columns")
    if len({tuple(part.format.items()) for part in parts}) > 1:
        raise TypeError(f"[{op}] gates and values of these {type(experts).__name__} have different formats")
    return parts[0] if len(parts) == 1 else _side_by_side(*parts)


def _side_by_side(gates: ColumnPackedSwitchLinear, values: ColumnPackedSwitchLinear) -> ColumnPackedSwitchLinear:
    columns = gates.out_features + values.out_features
    sizes = gates.num_experts, gates.in_features, columns
    made = ColumnPackedSwitchLinear(*sizes, gates.mode, gates.group_size, device="meta")
    pairs = zip(gates.packed()[:3], values.packed()[:3], strict=True)
    made.take([torch.cat(pair, -1) for pair in pairs if pair[0] is not None], gates.weight)
    return made.train(gates.training)
