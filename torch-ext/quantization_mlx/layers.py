"""Layers for `kernels.kernelize`: each lends its `forward` to an existing module that already holds the tensors.

As the Hub demands, they have no constructor and no state; the annotations name what `forward` reads from the module.
"""

import torch
from torch import nn

from .ops import quantized_matmul


class MetalLinear(nn.Module):
    """`forward` for the `MetalLinear` of Transformers (`transformers.integrations.metal_quantization`).

    The module holds `weight` [out_features, in_features * bits / 32] uint32, `scales` and `qbiases`
    [out_features, in_features / group_size], and `bias` [out_features] or None. A weight that is not uint32 is an
    ordinary one, as in Transformers.
    """

    can_torch_compile: bool = True
    has_backward: bool = True

    weight: torch.Tensor
    scales: torch.Tensor
    qbiases: torch.Tensor
    bias: torch.Tensor | None
    group_size: int
    bits: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] -> [..., out_features] of input's dtype."""
        if self.weight.dtype != torch.uint32:
            return nn.functional.linear(input, self.weight, self.bias)
        output = quantized_matmul(
            input, self.weight, self.scales, self.qbiases, group_size=self.group_size, bits=self.bits
        ).to(input.dtype)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class QuantizedLinear(nn.Module):
    """`forward` for a linear layer whose tensors are named as in MLX checkpoints, such as this package's own.

    The module holds `weight` [out_features, in_features * bits / 32], `scales`, `biases` (None in the floating-point
    modes), `bias` or None, `group_size`, `bits` and `mode`.
    """

    can_torch_compile: bool = True
    has_backward: bool = True

    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor | None
    bias: torch.Tensor | None
    group_size: int
    bits: int
    mode: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        words = self._parameters["weight"]  # the attribute may be the floating-point view
        output = quantized_matmul(
            x, words, self.scales, self.biases, group_size=self.group_size, bits=self.bits, mode=self.mode
        )
        return output if self.bias is None else output + self.bias.to(output.dtype)
