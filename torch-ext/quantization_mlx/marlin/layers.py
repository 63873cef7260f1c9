"""Linear layers that hold their weights packed by columns, as Marlin's kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..formats import FLOATS
from ..nn.linear import PackedLinear
from ..nn.module import PackedModule, new_bias
from .functions import BITS, check_group_size, check_groups, check_size, pack

_QUANT_TYPES = {"fp4": "marlin_fp4", "int4": "marlin_int4", "int4_sym": "marlin_int4_sym"}
_MODE_OF_BITS = {4: "marlin_fp4", 8: "marlin_fp8", 2: "marlin_int2"}
DTYPES = (*FLOATS, torch.float64)  # of weights that can be packed


def mode_of_quant_type(function: str, quant_type: str, group_size: int) -> str:
    """The mode of `MarlinLinear`. Raises ValueError unless it has this format."""
    if quant_type not in _QUANT_TYPES:
        raise ValueError(f"[{function}] quant_type is {quant_type!r}; supported are {', '.join(_QUANT_TYPES)}")
    check_group_size(function, group_size)
    return _QUANT_TYPES[quant_type]


def mode_of_bits(function: str, bits: int, group_size: int) -> str:
    """The mode of `MetalQuantizedLinear`. Raises ValueError unless it has this format."""
    if bits not in _MODE_OF_BITS or isinstance(bits, float):
        raise ValueError(f"[{function}] bits is {bits!r}; supported are {sorted(_MODE_OF_BITS)}")
    check_group_size(function, group_size)
    return _MODE_OF_BITS[bits]


class ColumnPackedModule(PackedModule):
    """W [..., in_features, out_features], packed by columns, and a bias; there is never an unpacked copy. Its tensors:

    - `weight_packed`: uint32 [..., in_features * bits / 32, out_features];
    - `scales`: float16 [..., in_features / group_size, out_features];
    - `zeros`: as `scales`; None but in mode "marlin_int4";
    - `bias`: [..., out_features] or None.

    The first three are frozen, and keep their dtypes when the module changes its own. A module made by the constructor
    holds zeros. The attribute `weight` is a `PackedWeight` [..., out_features, in_features]: the floating-point matrix
    that they stand for, for code that asks a layer for its weight.
    """

    packed_names = ("weight_packed", "scales", "zeros")
    packed_transposed = True
    float_dtypes = DTYPES

    def __init__(
        self,
        shape: tuple[int, ...],
        mode: str,
        group_size: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        *batch, in_features, out_features = shape
        if mode not in BITS:
            raise ValueError(f"[{type(self).__name__}] mode is {mode!r}; supported are {', '.join(BITS)}")
        check_groups(type(self).__name__, "in_features", in_features, group_size)
        check_size(type(self).__name__, "out_features", out_features)
        format = {"group_size": group_size, "bits": BITS[mode], "mode": mode}
        super().__init__((*batch, out_features, in_features), format, device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", new_bias(bias, *batch, out_features, device=device, dtype=dtype))

    @staticmethod
    def options_of(mode: str) -> dict[str, Any]:
        """The argument by which the constructor takes the mode."""
        return {"mode": mode}

    def pack_matrix(self, matrix: torch.Tensor, op: str) -> tuple[torch.Tensor, ...]:
        return pack(op, self.mode, matrix.T, self.group_size, "linear.weight")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ColumnPackedModule:
        """Moves everything, but lets a change of dtype leave the packed weight alone: the format has its dtypes."""
        packed = [self._parameters.get(name) for name in self.packed_names]

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is parameter for parameter in packed):
                return tensor.to(moved.device)
            return moved

        return super()._apply(apply, recurse)


class ColumnPackedLinear(ColumnPackedModule, PackedLinear):
    """y = x @ W + bias on packed W [in_features, out_features]; `ColumnPackedModule` has its tensors.

    Args:
        in_features, out_features: the two sizes; in_features is a multiple of group_size.
        mode: "marlin_fp4", "marlin_fp8", "marlin_int2", "marlin_int4" or "marlin_int4_sym".
        group_size: 128, 64 or 32.
        bias: whether there is a `bias` [out_features].
        device, dtype: where the parameters live, and the dtype of the bias.

    Raises:
        ValueError: the mode or the group_size is not supported, or in_features does not divide into groups.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mode: str,
        group_size: int = 128,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((in_features, out_features), mode, group_size, bias, device, dtype)


class MarlinLinear(ColumnPackedLinear):
    """`torch.nn.Linear` on packed 4-bit weights.

    Args:
        quant_type: "fp4", "int4" (with zero points) or "int4_sym", packed as by `pack_fp4_weights` and its like.
        in_features, out_features, bias, group_size, device, dtype: as in `ColumnPackedLinear`.

    Raises:
        ValueError: quant_type or group_size is not supported, or in_features does not divide into groups.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "fp4",
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mode = mode_of_quant_type(type(self).__name__, quant_type, group_size)
        super().__init__(in_features, out_features, mode, group_size, bias, device, dtype)
        self.quant_type = quant_type

    @staticmethod
    def options_of(mode: str) -> dict[str, Any]:
        return {"quant_type": str(mode).removeprefix("marlin_")}

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant_type: str = "fp4", group_size: int = 128) -> MarlinLinear:
        """Quantizes `linear`, which shares nothing with the layer that is returned."""
        return cls.quantized("from_linear", linear, nn.Linear, quant_type=quant_type, group_size=group_size)


class MetalQuantizedLinear(ColumnPackedLinear):
    """`torch.nn.Linear` on packed weights of 4 bits (E2M1), 8 bits (E4M3) or 2 bits (-1.5, -0.5, 0.5, 1.5).

    Args:
        bits: 4, 8 or 2, packed as by `pack_fp4_weights`, `pack_fp8_weights` and `pack_int2_weights`.
        in_features, out_features, group_size, bias, device, dtype: as in `ColumnPackedLinear`.

    Raises:
        ValueError: bits or group_size is not supported, or in_features does not divide into groups.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 4,
        group_size: int = 128,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mode = mode_of_bits(type(self).__name__, bits, group_size)
        super().__init__(in_features, out_features, mode, group_size, bias, device, dtype)

    @staticmethod
    def options_of(mode: str) -> dict[str, Any]:
        return {"bits": BITS[mode]}

    @classmethod
    def from_float(cls, linear: nn.Linear, bits: int = 4, group_size: int = 128) -> MetalQuantizedLinear:
        """Quantizes `linear`, which shares nothing with the layer that is returned."""
        return cls.quantized("from_float", linear, nn.Linear, bits=bits, group_size=group_size)


def packed_linear(linear: nn.Module, bits: int, group_size: int) -> nn.Module:
    """`MetalQuantizedLinear.from_float`, but that a layer which is packed already is taken as it is."""
    if isinstance(linear, ColumnPackedLinear):
        return linear
    return MetalQuantizedLinear.from_float(linear, bits, group_size)
