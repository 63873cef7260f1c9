"""The gated MLP of a decoder's layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import fast
from .layers import packed_linear
from .origins import check_activation, check_origin
from .parts import Projections, check_sizes


class MetalMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` on packed weights.

    Args:
        hidden_size, intermediate_size: the sizes, multiples of group_size.
        bits, group_size: as in `MetalQuantizedLinear`.
        bias: whether the projections have biases.
        device, dtype: where the parameters live, and the dtype of the biases.

    Raises:
        TypeError, ValueError: as `MetalQuantizedLinear`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bits: int = 4,
        group_size: int = 128,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_sizes(op, hidden_size=hidden_size, intermediate_size=intermediate_size)
        make = Projections(op, bits, group_size, device, dtype).linear
        self.gate_proj = make("gate_proj", hidden_size, intermediate_size, bias)
        self.up_proj = make("up_proj", hidden_size, intermediate_size, bias)
        self.down_proj = make("down_proj", intermediate_size, hidden_size, bias)

    @classmethod
    def from_float(cls, module: nn.Module, bits: int = 4, group_size: int = 128) -> MetalMLP:
        """Quantizes the MLP of a decoder's layer of Transformers, which shares nothing with the result but layers that
        are packed already.

        Raises:
            TypeError: it is none of a known kind; the message lists these.
            ValueError: bits or group_size is not supported, or its activation is not SiLU, or a layer cannot be
                quantized.
        """
        op = f"{cls.__name__}.from_float"
        check_origin(op, module, "mlp")
        check_activation(op, module)
        in_features, out_features = module.gate_proj.in_features, module.gate_proj.out_features
        made = cls(in_features, out_features, bits, group_size, device="meta")
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(made, name, packed_linear(getattr(module, name), bits, group_size))
        return made.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        return self.down_proj(fast.swiglu(self.gate_proj(x), self.up_proj(x)))
