"""Mixtures of experts whose matrices are packed by columns."""

from __future__ import annotations

import torch

from ..nn.switch import PackedSwitchLinear, SwitchLinear
from .layers import ColumnPackedModule


class ColumnPackedSwitchLinear(PackedSwitchLinear, ColumnPackedModule):
    """A linear map for each expert, W [num_experts, in_features, out_features]; `ColumnPackedModule` has its tensors.

    Args:
        num_experts, in_features, out_features: the sizes; in_features is a multiple of group_size.
        mode, group_size, bias, device, dtype: as in `ColumnPackedLinear`.

    Raises:
        ValueError: the mode or the group_size is not supported, or in_features does not divide into groups.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        mode: str,
        group_size: int = 128,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_experts, in_features, out_features), mode, group_size, bias, device, dtype)
        self.num_experts = num_experts

    @classmethod
    def from_switch_linear(cls, linear: SwitchLinear, mode: str, group_size: int = 128) -> ColumnPackedSwitchLinear:
        """Quantizes `linear`, one expert after the other, which shares nothing with the layer that is returned; hooks
        are copied. Raises TypeError if it is no `SwitchLinear`, or of a subclass with a forward of its own, and
        ValueError if the format is not supported, or a weight is not finite, or a state of it cannot be kept."""
        return cls.quantized("from_switch_linear", linear, SwitchLinear, mode=mode, group_size=group_size)
