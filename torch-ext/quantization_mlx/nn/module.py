"""Layers whose weight is packed: what all of them have in common, and those of MLX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import ops
from ..formats import FLOATS, MODES, Format, complete_format
from ..messages import short_name
from ..ops import quantize
from .obstacles import check_class, check_state, copy_hooks
from .packed_weight import Packed, PackedWeight, packed_weight

# Called with all arguments: the fastest way from Python into the dispatcher.
_quantized_matmul = ops.quantized_matmul.default

_SCALE_DTYPES = {"float16": torch.float16, "e8m0": torch.uint8, "e4m3": torch.uint8}  # "real": that of the model


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def new_bias(wanted: bool, *sizes: int, **options: Any) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(sizes, **options)) if wanted else None


def own(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """A copy that no change of the original reaches."""
    return None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


class PackedModule(nn.Module):
    """A layer on packed matrices, with the floating-point matrix that they stand for as its attribute `weight`.

    Args:
        shape: of `weight`, [..., rows, columns].
        format: group_size, bits and mode, which have been checked.
        device, dtype: where the parameters live, and the dtype of `weight`.
    """

    packed_names: tuple[str, str, str]  # parameters of words, scales, and biases or zeros
    packed_transposed = False  # whether `weight` is the transposed matrix of the packed parameters
    float_dtypes = FLOATS  # of weights that can be packed
    size_names: tuple[str, ...] = ("in_features", "out_features")  # first arguments of the constructor

    group_size: int
    bits: int
    mode: str
    _shows_words = False

    def __init__(
        self, shape: tuple[int, ...], format: Format, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a floating-point weight
        self.group_size, self.bits, self.mode = format["group_size"], format["bits"], format["mode"]
        *batch, rows, columns = shape
        mode = MODES[self.mode]

        def zeros(length: int, dtype: torch.dtype) -> nn.Parameter:
            sizes = (length, rows) if mode.packing == "columns" else (rows, length)
            return frozen(torch.zeros(*batch, *sizes, dtype=dtype, device=device))

        scale_dtype = _SCALE_DTYPES.get(mode.scale) or dtype or torch.get_default_dtype()
        words, scales, third = self.packed_names
        # register_parameter refuses a property's name.
        self._parameters[words] = zeros(columns * self.bits // 32, torch.uint32)
        for name, is_there in ((scales, True), (third, mode.offset != "none")):
            self.register_parameter(name, zeros(columns // self.group_size, scale_dtype) if is_there else None)
        self.register_buffer("_like", None, persistent=False)
        if mode.scale != "real":  # real scales tell the dtype of `weight`
            self.follow_dtype(dtype, device)

    def follow_dtype(self, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        """Notes the dtype of `weight` where the scales do not tell it: an empty buffer follows `.to(dtype)` and can."""
        self._like = torch.empty(0, dtype=dtype, device=device)

    @property
    def weight(self) -> Tensor:
        """The floating-point matrix [..., rows, columns], a `PackedWeight` of the model's dtype."""
        if self._shows_words:
            return self._parameters["weight"]
        return packed_weight(self.packed(), self.weight_dtype, self.packed_transposed)

    @property
    def weight_dtype(self) -> torch.dtype:
        return (self.scales if self._like is None else self._like).dtype

    @property
    def format(self) -> Format:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def packed(self) -> Packed:
        words, *tables = self.packed_names
        # In MLX's layers, the words have the name of the property above.
        tensors = self._parameters[words], *(getattr(self, name) for name in tables)
        return Packed(*tensors, self.group_size, self.bits, self.mode)

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]."""
        words, scales, third = self.packed_names
        # Attribute access to a parameter costs 0.5 us, and a generation step reads a thousand.
        held = self._parameters
        try:
            packed = held[words], held[scales], held[third]
        except KeyError:  # one of them is parametrized
            packed = self.weight_packed, getattr(self, scales), getattr(self, third)
        return _quantized_matmul(x, *packed, not self.packed_transposed, self.group_size, self.bits, self.mode)

    @contextmanager
    def showing_words(self) -> Iterator[None]:
        """For code that takes the attribute `weight` for the parameter of that name: while within, it is that."""
        self._shows_words = True
        try:
            yield
        finally:
            del self._shows_words

    @classmethod
    def shell(cls, layer: Any, dtype: torch.dtype | None = None, **format: Any) -> PackedModule:
        """A layer of the sizes of `layer` on device "meta" that waits for its tensors; `format` are the constructor's
        arguments that say how weights are packed."""
        sizes = (getattr(layer, name) for name in cls.size_names)
        return cls(*sizes, bias=layer.bias is not None, **format, device="meta", dtype=dtype)

    @classmethod
    def quantized(cls, function: str, layer: nn.Module, base: type[nn.Module] | None, **format: Any) -> PackedModule:
        """A layer with the quantized weight of `layer`, which shares nothing with it and must have the forward pass of
        `base`, unless that is None; errors name the method `function`, and `format` is as in `shell`."""
        op = f"{cls.__name__}.{function}"
        if base is not None:
            check_class(op, layer, base)
        check_state(op, layer, cls.float_dtypes)
        made = cls.shell(layer, **format)
        made.pack(layer.weight, op)
        made.resemble(layer)
        return made

    def pack(self, weight: Tensor, op: str = "pack") -> None:
        """Quantizes weight [rows, columns] or [num_experts, rows, columns] into this module's parameters; errors name
        `op`."""
        matrices = weight.detach()
        if matrices.dim() == 2:
            packed = self.pack_matrix(matrices, op)
        else:  # one by one: quantizing copies what is not contiguous
            packed = map(torch.stack, zip(*(self.pack_matrix(matrix, op) for matrix in matrices), strict=True))
        self.take(packed, weight)

    def pack_matrix(self, matrix: Tensor, op: str) -> tuple[Tensor, ...]:
        return quantize(matrix, **self.format)

    def values(self, dtype: torch.dtype | None = None) -> nn.Parameter:
        """`weight` as a floating-point parameter, of its own dtype or of this one, to which it is rounded once."""
        return nn.Parameter(self.weight.to(dtype or self.weight_dtype).dequantize().detach().contiguous())

    def take(self, packed: Iterable[Tensor], weight: Tensor) -> None:
        """Takes packed tensors, which were made of `weight`."""
        for name, tensor in zip(self.packed_names, packed, strict=False):
            setattr(self, name, frozen(tensor))
        if self._like is not None:  # a dtype that products take
            self.follow_dtype(weight.dtype if weight.dtype in FLOATS else torch.float32, weight.device)

    def resemble(self, layer: nn.Module) -> None:
        """Takes a copy of the bias of the layer that it was made of, its hooks, and whether it is in training."""
        if "bias" in self._parameters:
            self.bias = own(layer.bias)
        copy_hooks(layer, self)
        self.train(layer.training)

    def share(self, other: PackedModule) -> None:
        """Makes the packed parameters those of `other`, which has the same shape and format."""
        self.weight = other.weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, PackedWeight):
            self._share(value)
        elif name == "weight" and isinstance(value, Tensor) and value.is_floating_point():
            raise TypeError(
                f"[{type(self).__name__}] weight is assigned a {short_name(value.dtype)} tensor; it takes the weight "
                "of another layer of its format. A floating-point layer is what dequantize() returns"
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
        if wrong := [size for size in shape if not isinstance(size, Integral)]:
            raise TypeError(f"[{type(self).__name__}] sizes must be whole numbers, not {wrong[0]!r}")
        try:
            format = complete_format(group_size, bits, mode)
        except ValueError as error:
            raise ValueError(f"[{type(self).__name__}] {error}") from error
        if shape[-1] % format["group_size"]:
            raise ValueError(
                f"[{type(self).__name__}] a row of {shape[-1]} values does not divide into groups of "
                f"{format['group_size']}"
            )
        super().__init__(shape, format, device, dtype)

    @property
    def weight_packed(self) -> nn.Parameter:
        """The words, uint32 [..., rows, columns * bits / 32]."""
        return self._parameters["weight"]
