"""Linear and embedding layers that hold their weights as MLX checkpoints do."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._ops import ops
from .obstacles import check_class, check_state, copy_hooks
from .ops import quantize
from .packed_weight import PackedLinear, PackedModule, frozen, own

# mode -> (group sizes, bits) that it knows, the default first.
SUPPORTED = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}

# The overloads themselves, called with every argument in place: the shortest way from Python into the dispatcher,
# which a decoding step takes a few hundred times.
_dequantize = ops.dequantize.default
_quantized_matmul = ops.quantized_matmul.default


def complete_format(group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> dict[str, Any]:
    """The keyword arguments group_size, bits and mode of a format, with the mode's defaults for what is None.

    Raises:
        ValueError: the mode is unknown, or does not know the group_size or the bits.
    """
    if not isinstance(mode, str) or mode not in SUPPORTED:
        raise ValueError(f"mode {mode!r} is not supported; supported are {', '.join(SUPPORTED)}")
    group_sizes, widths = SUPPORTED[mode]
    format = {
        "group_size": group_sizes[0] if group_size is None else group_size,
        "bits": widths[0] if bits is None else bits,
        "mode": mode,
    }
    if not _is_one_of(format["group_size"], group_sizes) or not _is_one_of(format["bits"], widths):
        raise ValueError(
            f"mode {mode!r} with group_size {format['group_size']!r} and bits {format['bits']!r} is not supported; "
            f"it takes a group_size of {sorted(group_sizes)} and bits of {sorted(widths)}"
        )
    return format


def _is_one_of(value: Any, supported: tuple[int, ...]) -> bool:
    """Whether it is one of these whole numbers, and not only equal to one, as 64.0 is."""
    return value in supported and not isinstance(value, float)


def row_scale(layer: nn.Module) -> float | None:
    """The factor between the rows that an embedding looks up and what comes out of it.

    That is 1 for `nn.Embedding`, and the square root of the width or the like for what Transformers calls a
    ScaledWordEmbedding. None for any other layer: it may do something else to its rows.
    """
    if type(layer) is nn.Embedding:
        return 1.0
    if not isinstance(layer, nn.Embedding) or not type(layer).__name__.endswith("ScaledWordEmbedding"):
        return None
    # Where embed_scale is a buffer, it is lost on the meta device, and the number stands beside it.
    scale = getattr(layer, "scalar_embed_scale", getattr(layer, "embed_scale", None))
    return float(scale) if isinstance(scale, (int, float)) else None


@cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return torch.tensor(scale, dtype=dtype).item()


class ScaledWordEmbedding(nn.Embedding):
    """`nn.Embedding` whose rows are multiplied by `embed_scale`, rounded to their dtype, as those of Gemma are.

    Args:
        num_embeddings, embedding_dim: the two sizes; there is no memory for the weight.
        embed_scale: the factor.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim, device="meta")
        self.embed_scale = embed_scale

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return super().forward(indices) * _rounded(self.embed_scale, self.weight.dtype)


class _QuantizedModule(PackedModule):
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
        affine = mode == "affine"
        scale_dtype = (dtype or torch.get_default_dtype()) if affine else torch.uint8
        words = torch.zeros(*rows, columns * self.bits // 32, dtype=torch.uint32, device=device)
        self._parameters["weight"] = frozen(words)  # register_parameter refuses the name of a property
        self.scales = frozen(torch.zeros(groups, dtype=scale_dtype, device=device))
        self.register_parameter(
            "biases", frozen(torch.zeros(groups, dtype=scale_dtype, device=device)) if affine else None
        )
        if not affine:
            self.follow_dtype(dtype, device)

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
        if self.mode != "affine":
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


class QuantizedLinear(_QuantizedModule, PackedLinear):
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
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedLinear:
        """Quantizes `linear`, which shares nothing with the layer that is returned; hooks are copied.

        Raises:
            TypeError: it is no `nn.Linear`, or of a subclass with a forward of its own.
            ValueError: an option or a state of it, such as a parametrization, cannot be kept.
        """
        check_class("QuantizedLinear.from_linear", linear, nn.Linear)
        check_state("QuantizedLinear.from_linear", linear)
        module = cls(linear.in_features, linear.out_features, False, group_size, bits, mode, device="meta")
        module._pack(linear.weight)
        module.bias = own(linear.bias)
        copy_hooks(linear, module)
        return module.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features], of x's dtype promoted with that of affine scales."""
        y = self._matmul(x)
        try:
            bias = self._parameters["bias"]
        except KeyError:
            bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)


class QuantizedEmbedding(_QuantizedModule, nn.Embedding):
    """`torch.nn.Embedding` on a packed table; only the rows that are looked up are dequantized.

    Args:
        num_embeddings, embedding_dim: the two sizes; embedding_dim is a multiple of group_size.
        group_size, bits, mode: the format, as in QuantizedLinear.
        device, dtype: where the parameters live, and the dtype of the rows that come out.
        scale: what the rows are multiplied by, rounded to their dtype, as Gemma does; `as_linear` leaves it out.

    Raises:
        TypeError: a size is no whole number.
        ValueError: the format is not supported, or embedding_dim does not divide into groups.
    """

    # Options of nn.Embedding that this layer does without.
    padding_idx = max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = sparse = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), group_size, bits, mode, device, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.scale = scale
        self._is_scaled = scale != 1  # torch.compile takes a float attribute that is read for a variable

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedEmbedding:
        """Quantizes `embedding`; hooks are copied.

        Raises:
            TypeError: it is of a subclass of `nn.Embedding` that may do more than scale its rows.
            ValueError: an option or a state of it, such as `max_norm`, cannot be kept.
        """
        scale = row_scale(embedding)
        if scale is None:
            raise TypeError(f"[QuantizedEmbedding] {type(embedding).__name__} may do more than look up and scale rows")
        check_state("QuantizedEmbedding.from_embedding", embedding)
        sizes = (embedding.num_embeddings, embedding.embedding_dim)
        module = cls(*sizes, group_size, bits, mode, device="meta", scale=scale)
        module._pack(embedding.weight)
        copy_hooks(embedding, module)
        return module.train(embedding.training)

    def dequantize(self) -> nn.Embedding:
        """A floating-point layer with the values of `weight`, of its dtype."""
        sizes = self.num_embeddings, self.embedding_dim
        layer = ScaledWordEmbedding(*sizes, self.scale) if self._is_scaled else nn.Embedding(*sizes, device="meta")
        layer.weight = nn.Parameter(self.weight.dequantize().detach())
        return layer.train(self.training)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices of any shape, int32 or int64, -> indices.shape + [embedding_dim].

        Raises:
            IndexError: an index is negative or not below num_embeddings (on the CPU).
            NotImplementedError: `torch.jit.trace`, which cannot record that words are seen as int32.
        """
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "[QuantizedEmbedding] torch.jit.trace is not supported; supported are torch.export and torch.compile"
            )
        flat = indices.reshape(-1)
        # Torch has no gather of uint32 rows on the CPU; int32 has the same bits.
        words = F.embedding(flat, self.weight_packed.view(torch.int32))
        scales = F.embedding(flat, self.scales)
        biases = None if self.biases is None else F.embedding(flat, self.biases)
        dtype = None if self._like is None else self._like.dtype
        rows = _dequantize(words, scales, biases, self.group_size, self.bits, self.mode, None, dtype)
        if self._is_scaled:
            rows = rows * _rounded(self.scale, rows.dtype)
        return rows.view(*indices.shape, self.embedding_dim)

    def as_linear(self, x: torch.Tensor) -> torch.Tensor:
        """The table as an output head: x [..., embedding_dim] -> [..., num_embeddings]."""
        return self._matmul(x)

    def extra_repr(self) -> str:
        scale = f", scale={self.scale:.6g}" if self.scale != 1 else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}{scale}"
