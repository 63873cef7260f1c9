"""Layers whose weight is packed: what all of them have in common, and those of MLX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import ops
from ..formats import MODES, complete_format
from ..ops import quantize
from .packed_weight import Packed, PackedWeight, packed_weight

# Called with every argument in place: the shortest way from Python into the dispatcher.
_quantized_matmul = ops.quantized_matmul.default


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def own(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """A copy that no change of the original reaches."""
    return None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


class PackedModule(nn.Module):
    """A layer on packed matrices, with the floating-point matrix that they stand for as its attribute `weight`.

    Subclasses have the attributes `group_size`, `bits` and `mode`, and parameters of these names:
    """

    packed_names: tuple[str, str, str]  # of the parameters for words, scales, and biases or zeros
    packed_transposed = False  # whether the matrix of the layer is the transposed one of the packed parameters

    group_size: int
    bits: int
    mode: str
    _shows_words = False

    def __init__(self, group_size: int, bits: int, mode: str) -> None:
        nn.Module.__init__(self)  # and not that of nn.Linear, which would make a floating-point weight
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.register_buffer("_like", None, persistent=False)

    def follow_dtype(self, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        """Notes the dtype of `weight` where the scales do not tell it: an empty buffer follows `.to(dtype)` and can."""
        self._like = torch.empty(0, dtype=dtype, device=device)

    @property
    def weight(self) -> Tensor:
        """The floating-point matrix [..., rows, columns], a `PackedWeight` of the model's dtype."""
        if self._shows_words:
            return self._parameters["weight"]
        packed = self.packed()
        return packed_weight(
            packed, (packed.scales if self._like is None else self._like).dtype, self.packed_transposed
        )

    def packed(self) -> Packed:
        words, *tables = self.packed_names
        # The words' name may be that of the property above.
        tensors = self._parameters[words], *(getattr(self, name) for name in tables)
        return Packed(*tensors, self.group_size, self.bits, self.mode)

    @contextmanager
    def showing_words(self) -> Iterator[None]:
        """For code that takes the attribute `weight` for the parameter of that name: while within, it is that."""
        self._shows_words = True
        try:
            yield
        finally:
            del self._shows_words

    def share(self, other: PackedModule) -> None:
        """Makes the packed parameters those of `other`, which has the same shape and format."""
        self.weight = other.weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, PackedWeight):
            self._share(value)
        elif name == "weight" and isinstance(value, Tensor) and value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            raise TypeError(
                f"[{type(self).__name__}] weight is assigned a {dtype} tensor; it takes the weight of another layer of "
                "its format. A floating-point layer is what dequantize() returns"
            )
        else:
            super().__setattr__(name, value)

    def _share(self, weight: PackedWeight) -> None:
        own, other = self.packed(), weight.packed
        if own.shape != other.shape or own[3:] != other[3:] or weight.transposed != self.packed_transposed:
            raise ValueError(
                f"[{type(self).__name__}] weight is assigned {weight!r}, which is not of its shape and format"
            )
        for name, tensor in zip(self.packed_names, other[:3], strict=True):
            self._parameters[name] = tensor

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, bits={self.bits}, mode={self.mode!r}"


class QuantizedModule(PackedModule):
    """Packed matrices [..., rows, columns], grouped along their columns, as the parameters of an MLX checkpoint:

    - "weight": uint32 [..., rows, columns * bits / 32], as the attribute `weight_packed`;
    - "scales": [..., rows, columns / group_size], of the model's dtype in mode "affine" and uint8 otherwise;
    - "biases": as `scales`; None but in mode "affine".

    All three are frozen; `scales` and `biases` of affine layers may be trained after `requires_grad_()`. Being
    parameters, they move between devices with the module and may be shared; being integers, the words and the uint8
    scales ignore a change of dtype. A module made by the constructor holds zeros.

    The attribute `weight` is a `PackedWeight`: the floating-point matrices that they stand for, for code that asks a
    layer for its weight.
    """

    packed_names = ("weight", "scales", "biases")

    def __init__(
        self,
        shape: tuple[int, ...],
        group_size: int | None,
        bits: int | None,
        mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        *rows, columns = shape
        if wrong := [size for size in shape if not isinstance(size, Integral)]:
            raise TypeError(f"[{type(self).__name__}] sizes must be whole numbers, not {wrong[0]!r}")
        try:
            format = complete_format(group_size, bits, mode)
        except ValueError as error:
            raise ValueError(f"[{type(self).__name__}] {error}") from error
        super().__init__(**format)
        if columns % self.group_size:
            raise ValueError(
                f"[{type(self).__name__}] a row of {columns} values does not divide into groups of {self.group_size}"
            )
        groups = (*rows, columns // self.group_size)
        has_biases = MODES[mode].offset == "biases"
        scale_dtype = (dtype or torch.get_default_dtype()) if self._has_real_scales else torch.uint8
        words = torch.zeros(*rows, columns * self.bits // 32, dtype=torch.uint32, device=device)
        self._parameters["weight"] = frozen(words)  # register_parameter refuses the name of a property
        self.scales = frozen(torch.zeros(groups, dtype=scale_dtype, device=device))
        self.register_parameter(
            "biases", frozen(torch.zeros(groups, dtype=scale_dtype, device=device)) if has_biases else None
        )
        if not self._has_real_scales:
            self.follow_dtype(dtype, device)

    @property
    def _has_real_scales(self) -> bool:
        """Whether the scales tell the dtype of the matrix; otherwise the module remembers it."""
        return MODES[self.mode].scale == "real"

    @property
    def weight_packed(self) -> nn.Parameter:
        """The words, uint32 [..., rows, columns * bits / 32]."""
        return self._parameters["weight"]

    def _pack(self, weight: torch.Tensor) -> None:
        """Quantizes weight [..., rows, columns] into this module's parameters."""
        self._hold(quantize(weight.detach(), self.group_size, self.bits, self.mode), weight)

    def _hold(self, packed: Iterable[torch.Tensor], weight: torch.Tensor) -> None:
        """Takes packed tensors, which were made of `weight`."""
        for name, tensor in zip(self.packed_names, packed, strict=False):
            setattr(self, name, frozen(tensor))
        if not self._has_real_scales:
            self.follow_dtype(weight.dtype, weight.device)

    def _matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., columns] -> [..., rows]."""
        # Reading a parameter as an attribute costs half a microsecond, and a step of generation reads a thousand.
        held = self._parameters
        try:
            packed = held["weight"], held["scales"], held["biases"]
        except KeyError:  # a parametrization has taken one's place
            packed = held["weight"], self.scales, self.biases
        return _quantized_matmul(x, *packed, True, self.group_size, self.bits, self.mode)
