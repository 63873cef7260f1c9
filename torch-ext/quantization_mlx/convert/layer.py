"""Linear layers of other quantizers into MLX's affine format, without going through floating point.

All of these store value = (code - zero) * scale with one scale and one integer zero for each group of inputs. In MLX's
affine form that is value = code * scale + bias with bias = -zero * scale: the codes are repacked, bit for bit. Two
things may not carry over exactly:

- a bias needs up to 8 bits more than its scale. float32 always has them, float16 and bfloat16 where the zero is a power
  of two, as in symmetric quantization, and by chance elsewhere;
- MLX's groups are runs of 32, 64 or 128 consecutive inputs. Longer groups are split; act-order ("desc_act"), which
  spreads a group over all inputs, and shorter groups cannot be expressed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import MODES

OP = "convert_foreign_checkpoint"  # what its errors name
_GROUP_SIZES = sorted(MODES["affine"].group_sizes, reverse=True)


class ConvertedLinear(NamedTuple):
    """A linear layer in MLX's affine format; the first three are what `quantized_matmul` takes.

    - `weight`: uint32 [out, in * bits / 32];
    - `scales`, `biases`: [out, in / group_size];
    - `permutation`: None, or int64 [in], and then the layer is applied to `x[..., permutation]`.
    """

    weight: Tensor
    scales: Tensor
    biases: Tensor
    group_size: int
    bits: int
    permutation: Tensor | None


class StoredLayer(NamedTuple):
    """value[o, i] = (code[o, i] - zeros[o, g]) * scales[o, g] with g = input_groups[i], whoever stored it."""

    bits: int
    zeros: Tensor  # int32 [out, groups]
    scales: Tensor  # [out, groups]
    input_groups: Tensor  # int64 [in]
    words: Callable[[], Tensor]  # uint32 [out, in * bits / 32]; called once, when the layer is converted


class Method(NamedTuple):
    """What is known of a quantization method by its name in config.json."""

    read: Callable[[Mapping[str, Tensor], str, Mapping[str, Any]], StoredLayer]
    tensors: tuple[str, ...]  # names in a layer; the first has the codes and is always there
    variant_keys: tuple[str, ...]  # of config.json, in which the variant is looked for
    variants: tuple[str, ...]  # supported; the first is the default


@dataclass
class ConversionReport:
    """What `convert_foreign_checkpoint` or `convert_gguf_checkpoint` did.

    - `formats`: group_size, bits and mode by the path of each quantized layer;
    - `dtype`: that of the scales and biases;
    - `rounding`: the largest difference that rounding scales and biases made to any value, in steps of its group;
    - `requantized`: the paths of the layers that were quantized anew, with the relative error of each in the Frobenius
      norm;
    - `rounded`: of GGUF, the tensors without codes whose values `dtype` does not hold exactly.
    """

    formats: dict[str, dict[str, Any]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    rounding: float = 0.0
    requantized: dict[str, float] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    @property
    def lossless(self) -> bool:
        """Whether every layer of the new checkpoint has the very values of the old one."""
        return self.rounding == 0.0 and not self.requantized and not self.rounded


# Codes


def unpack(words: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., words * 32 / bits] of int32 or uint32 words: code i is bits [i * bits, (i + 1) * bits)."""
    eights = words.contiguous().view(torch.uint8).unflatten(-1, (-1, bits))  # eight codes are `bits` bytes
    stream = torch.zeros(*eights.shape[:-1], 8, dtype=torch.uint8)
    stream[..., :bits] = eights
    stream = stream.view(torch.int64)
    mask = (1 << bits) - 1
    return torch.cat([(stream >> (bits * i) & mask).to(torch.uint8) for i in range(8)], -1).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint32 words [..., codes * bits / 32] of uint8 codes."""
    eights = codes.unflatten(-1, (-1, 8))
    stream = torch.zeros(*eights.shape[:-1], 1, dtype=torch.int64)
    for i in range(8):
        stream |= eights[..., i : i + 1].to(torch.int64) << (bits * i)
    return stream.view(torch.uint8)[..., :bits].flatten(-2).contiguous().view(torch.uint32)


# Layers


def checked(bits: int, zeros: Tensor, scales: Tensor, input_groups: Tensor, words: Callable[[], Tensor]) -> StoredLayer:
    check(scales.is_floating_point(), f"the scales are {scales.dtype} and should be floating-point")
    check(bool(scales.isfinite().all()), "some scales are infinite or NaN")
    check(not input_groups.is_floating_point(), f"the groups of the inputs are {input_groups.dtype}, not integers")
    in_range = (input_groups >= 0) & (input_groups < scales.shape[1])
    check(bool(in_range.all()), f"the groups of the inputs go beyond the {scales.shape[1]} groups of the scales")
    return StoredLayer(bits, zeros, scales, input_groups.to(torch.int64), words)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"[convert] {message}")


def check_words(name: str, words: Tensor, shape: tuple[int, ...]) -> None:
    fits = words.dtype == torch.int32 and tuple(words.shape) == shape
    check(fits, f"{name} is {words.dtype} {list(words.shape)} and should be int32 {list(shape)}")


def equal_runs(columns: int, groups: int) -> Tensor:
    """The group of each input where all groups are runs of one length."""
    check(groups > 0 and columns % groups == 0, f"{columns} inputs do not divide into {groups} groups")
    return torch.arange(columns) // (columns // groups)


class _Groups(NamedTuple):
    size: int
    stored: Tensor  # int64 [in / size], the stored group of each
    permutation: Tensor | None  # of the inputs


def affine_groups(layer: StoredLayer) -> _Groups | None:
    """MLX groups of which each lies in one stored group, permuted only if need be; None if there are none."""
    for permutation in (None, torch.argsort(layer.input_groups, stable=True)):
        ordered = layer.input_groups if permutation is None else layer.input_groups[permutation]
        for group_size in _GROUP_SIZES:
            if len(ordered) % group_size == 0:
                runs = ordered.view(-1, group_size)
                if torch.equal(runs, runs[:, :1].expand_as(runs)):
                    return _Groups(group_size, runs[:, 0], permutation)
    return None


def _scales_and_biases(layer: StoredLayer) -> tuple[Tensor, Tensor]:
    """Both in float32, exact: a scale has at most 11 significant bits, a zero at most 9."""
    scales = layer.scales.to(torch.float32)
    return scales, -layer.zeros.to(torch.float32) * scales


def is_exact(layer: StoredLayer) -> bool:
    """Whether the dtype of the scales holds the biases."""
    biases = _scales_and_biases(layer)[1]
    return torch.equal(biases.to(layer.scales.dtype).to(torch.float32), biases)


def rounding(layer: StoredLayer, dtype: torch.dtype) -> float:
    """The largest change to a value by scales and biases in `dtype`, in steps of its group."""
    return step_error(*_scales_and_biases(layer), layer.bits, dtype)


def step_error(scales: Tensor, biases: Tensor, bits: int, dtype: torch.dtype) -> float:
    """`rounding` of exact scales and biases."""
    exact_scales, exact_biases = scales.double(), biases.double()
    scale_error = exact_scales.to(dtype).double() - exact_scales
    bias_error = exact_biases.to(dtype).double() - exact_biases
    # The error is linear in the code, so it is largest at one end.
    ends = torch.maximum(bias_error.abs(), (((1 << bits) - 1) * scale_error + bias_error).abs())
    steps = exact_scales.abs()
    return float(torch.where(steps > 0, ends / steps, 0.0).max())


def in_mlx_format(layer: StoredLayer, dtype: torch.dtype | None) -> ConvertedLinear:
    groups = affine_groups(layer)
    if groups is None:
        sizes = sorted(set(layer.input_groups.bincount().tolist()))
        raise ValueError(f"[convert] groups of {sizes} inputs do not divide into groups of {_GROUP_SIZES[::-1]}")
    weight = layer.words()
    if groups.permutation is not None:
        weight = pack(unpack(weight, layer.bits)[:, groups.permutation], layer.bits)
    dtype = dtype or (layer.scales.dtype if is_exact(layer) else torch.float32)
    scales, biases = (each[:, groups.stored].to(dtype).contiguous() for each in _scales_and_biases(layer))
    check(bool(biases.isfinite().all() and scales.isfinite().all()), f"some scales or biases overflow {dtype}")
    return ConvertedLinear(weight, scales, biases, groups.size, layer.bits, groups.permutation)


def values_of(layer: StoredLayer) -> Tensor:
    """The layer's values [out, in] in float32, exact."""
    steps = unpack(layer.words(), layer.bits).to(torch.float32)
    steps -= layer.zeros.to(torch.float32)[:, layer.input_groups]
    return steps.mul_(layer.scales.to(torch.float32)[:, layer.input_groups])
