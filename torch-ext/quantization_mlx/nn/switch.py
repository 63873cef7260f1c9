"""Layers with a matrix for each expert of a mixture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from .._ops import ops
from .module import PackedModule, QuantizedModule, new_bias, own

_gather_qmm = ops.gather_qmm.default


class SwitchLinear(nn.Module):
    """A linear map for each expert, in floating point: `weight` [num_experts, out_features, in_features] and `bias`
    [num_experts, out_features] or None. It reads indices on the host, so a compiled graph breaks here.

    Args:
        weight, bias: the parameters; they may be views of fused ones.
    """

    origin: Mapping[str, nn.Parameter] = {}  # the fused parameters by name

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad))

    def forward(self, x: torch.Tensor, indices: torch.Tensor, sorted_indices: bool = False) -> torch.Tensor:
        """As `QuantizedSwitchLinear.forward`."""
        rows = x.expand(*indices.shape, self.in_features).reshape(-1, self.in_features)
        flat = indices.reshape(-1)
        y = rows.new_zeros(len(rows), self.out_features)
        for expert in flat.unique().tolist():
            chosen = (flat == expert).nonzero().squeeze(-1)
            bias = None if self.bias is None else self.bias[expert]
            y = y.index_copy(0, chosen, F.linear(rows[chosen], self.weight[expert], bias))
        return y.view(*indices.shape, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class PackedSwitchLinear(PackedModule):
    """What layers with a packed matrix for each expert have in common."""

    size_names = ("num_experts", "in_features", "out_features")

    def dequantize(self, dtype: torch.dtype | None = None) -> SwitchLinear:
        """A floating-point layer with the values of `weight`, of its dtype or this one, and a copy of the bias."""
        return SwitchLinear(self.values(dtype), own(self.bias)).train(self.training)

    def forward(self, x: torch.Tensor, indices: torch.Tensor, sorted_indices: bool = False) -> torch.Tensor:
        """Row i of x times the matrix of expert indices[i].

        Args:
            x: [*batch, in_features], whose batch broadcasts with the shape of indices and has as many dimensions.
            indices: the experts, int32 or int64.
            sorted_indices: a promise that indices ascend, as in `gather_qmm`.

        Returns:
            [*indices.shape, out_features], of x's dtype promoted with that of affine scales.
        """
        words, scales, biases, *format = self.packed()
        packed = words, scales, biases, None, indices, not self.packed_transposed, *format, None
        y = _gather_qmm(x.unsqueeze(-2), *packed, sorted_indices=sorted_indices).squeeze(-2)
        return y if self.bias is None else y + self.bias[indices].to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {super().extra_repr()}"
        )


class QuantizedSwitchLinear(PackedSwitchLinear, QuantizedModule):
    """A linear map for each expert on packed weights, as `QuantizedLinear` is one: `weight` uint32 [num_experts,
    out_features, in_features * bits / 32], `scales` and `biases` [num_experts, out_features, in_features / group_size],
    `bias` [num_experts, out_features] or None.

    Args:
        num_experts, in_features, out_features: the sizes; in_features is a multiple of group_size.
        bias: whether there is a `bias`.
        group_size, bits, mode: the format, as in QuantizedLinear.
        device, dtype: where the parameters live, and the dtype of the floating-point ones.

    Raises:
        ValueError: the format is not supported, or in_features does not divide into groups.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_experts, out_features, in_features), group_size, bits, mode, device, dtype)
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", new_bias(bias, num_experts, out_features, device=device, dtype=dtype))

    @classmethod
    def from_switch_linear(
        cls, linear: SwitchLinear, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedSwitchLinear:
        """Quantizes `linear`, one expert after the other; a bias and hooks are copied.

        Raises:
            TypeError, ValueError: as in `QuantizedLinear.from_linear`.
        """
        return cls.quantized("from_switch_linear", linear, SwitchLinear, group_size=group_size, bits=bits, mode=mode)
