"""Linear layers on packed weights."""

from __future__ import annotations

import torch
from torch import nn

from .module import PackedModule, QuantizedModule, new_bias, own


class PackedLinear(PackedModule, nn.Linear):
    """What linear layers on packed matrices have in common; they are `nn.Linear` ones to whoever asks."""

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A floating-point layer with the values of `weight`, of its dtype or this one, and a copy of the bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = self.values(dtype), own(self.bias)
        return layer.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features], of x's dtype, promoted with that of affine scales."""
        y = self.multiply(x)
        try:
            bias = self._parameters["bias"]
        except KeyError:
            bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{super().extra_repr()}"
        )


class QuantizedLinear(QuantizedModule, PackedLinear):
    """`torch.nn.Linear` on a packed weight: y = x @ dequantize(weight).T + bias.

    Args:
        in_features, out_features: the two sizes; in_features is a multiple of group_size.
        bias: whether there is a `bias` [out_features].
        group_size, bits, mode: the format; what is None takes the mode's default (affine 64/4, mxfp4 32/4, mxfp8
            32/8, nvfp4 16/4).
        device, dtype: where the parameters live, and the dtype of the floating-point ones.

    Raises:
        TypeError: a size is no whole number.
        ValueError: the format is not supported, or in_features does not divide into groups.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), group_size, bits, mode, device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", new_bias(bias, out_features, device=device, dtype=dtype))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedLinear:
        """Quantizes `linear`, which shares nothing with the layer that is returned; hooks are copied.

        Raises:
            TypeError: it is no `nn.Linear`, or of a subclass with a forward of its own.
            ValueError: an option or a state of it, such as a parametrization, cannot be kept.
        """
        return cls.quantized("from_linear", linear, nn.Linear, group_size=group_size, bits=bits, mode=mode)
