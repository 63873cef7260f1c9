"""AWQ, GPTQ and compressed-tensors checkpoints into MLX checkpoints, without going through floating point.

All of these store value = (code - zero) * scale with one scale and one integer zero for each group of inputs. In MLX's
affine form that is value = code * scale + bias with bias = -zero * scale: the codes are repacked, bit for bit. Two
things may not carry over exactly:

- a bias needs up to 8 bits more than its scale. float32 always has them, float16 and bfloat16 where the zero is a power
  of two, as in symmetric quantization, and by chance elsewhere;
- MLX's groups are runs of 32, 64 or 128 consecutive inputs. Longer groups are split; act-order ("desc_act"), which
  spreads a group over all inputs, and shorter groups cannot be expressed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.config import in_mlx_terms
from ..checkpoint.read import read_json
from ..checkpoint.staging import staged
from ..checkpoint.write import INDEX, write_json
from ..families import family_of
from ..formats import MODES, complete_format
from ..hf import compat
from ..hf.quantizer import check_checkpoint
from ..messages import listed
from ..ops import dequantize, quantize
from ..optional import progress, require

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, that each 4-bit field of a word holds
_GROUP_SIZES = sorted(MODES["affine"].group_sizes, reverse=True)
_BITS = (2, 3, 4, 8)
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # beside the weights: the tokenizer and its relatives
# A layer of one expert among the tensors of such a checkpoint, and MLX's names of the projections.
_OF_AN_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
_OLD_RECORDS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # where config.json was silent


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


@dataclass
class ConversionReport:
    """What `convert_foreign_checkpoint` did.

    - `formats`: group_size, bits and mode by the path of each quantized layer;
    - `dtype`: that of the scales and biases;
    - `rounding`: the largest difference that rounding scales and biases made to any value, in steps of its group;
    - `requantized`: the paths of the layers that were quantized anew, with the relative error of each in the Frobenius
      norm.
    """

    formats: dict[str, dict[str, Any]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    rounding: float = 0.0
    requantized: dict[str, float] = field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether every layer of the new checkpoint has the very values of the old one."""
        return self.rounding == 0.0 and not self.requantized


def convert_awq(
    qweight: Tensor, qzeros: Tensor | None, scales: Tensor, dtype: torch.dtype | None = None
) -> ConvertedLinear:
    """A 4-bit AWQ layer (version "gemm") in MLX's format.

    Args:
        qweight: int32 [in, out / 8], eight columns per word in the order 0, 2, 4, 6, 1, 3, 5, 7.
        qzeros: int32 [groups, out / 8], packed alike; None if all zeros are 8.
        scales: [groups, out]; the groups are runs of in / groups inputs.
        dtype: of the new scales and biases; None for that of `scales` if it holds the biases exactly, or else float32.

    Raises:
        ValueError: a shape or dtype is another, a scale is not finite, or the groups do not divide into groups of 32.
    """
    return _in_mlx_format(_awq_layer(qweight, qzeros, scales), dtype)


def convert_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    bits: int = 4,
    zeros_minus_one: bool = True,
    dtype: torch.dtype | None = None,
) -> ConvertedLinear:
    """A GPTQ layer of 2, 3, 4 or 8 bits in MLX's format.

    Args:
        qweight: int32 [in * bits / 32, out], the inputs packed into words from the lowest bits up.
        qzeros: int32 [groups, out * bits / 32], packed likewise along the outputs.
        scales: [groups, out].
        g_idx: integers [in], the group of each input; None for runs of equal length. With act-order the result has a
            permutation.
        bits: of a code.
        zeros_minus_one: whether `qzeros` holds zero - 1, as the format "gptq" does and "gptq_v2" does not.
        dtype: of the new scales and biases; None for that of `scales` if it holds the biases exactly, or else float32.

    Raises:
        ValueError: a shape or dtype is another, a scale is not finite, a group has a number of inputs that is no
            multiple of 32, or zeros_minus_one finds the largest code, from which readers make different zeros.
    """
    return _in_mlx_format(_gptq_layer(qweight, qzeros, scales, g_idx, bits, zeros_minus_one), dtype)


def convert_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    bits: int = 4,
    dtype: torch.dtype | None = None,
) -> ConvertedLinear:
    """A layer of the compressed-tensors format "pack-quantized" in MLX's.

    Args:
        weight_packed: int32 [out, in * bits / 32], the values plus 2^(bits - 1).
        weight_scale: [out, groups].
        weight_zero_point: int32 [out * bits / 32, groups], packed along the outputs; None if symmetric.
        weight_g_idx: as in `convert_gptq`.
        bits: 2, 4 or 8.
        dtype: of the new scales and biases; None for that of `weight_scale` if it holds the biases exactly, or else
            float32.

    Raises:
        ValueError: as in `convert_gptq`.
    """
    layer = _compressed_tensors_layer(weight_packed, weight_scale, weight_zero_point, weight_g_idx, bits)
    return _in_mlx_format(layer, dtype)


def convert_foreign_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    requantize: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Writes the AWQ, GPTQ or compressed-tensors checkpoint in `source` as an MLX checkpoint into `target`.

    One weight file is in memory at a time. Nothing in `source` is executed: weights are read from safetensors files
    alone. Files are written beside their final place and then renamed, so a failure leaves `target` as it was.

    Args:
        source: holds config.json, `*.safetensors` and the tokenizer.
        target: another directory, made if it does not exist.
        dtype: of all floating-point tensors. None keeps what is stored if the biases are exact in the dtype of the
            scales, and makes everything float32 otherwise; float16 then rounds at most 1/128 of a 4-bit step.
        requantize: a format (any of group_size, bits, mode) for the layers whose groups MLX cannot express, act-order
            above all; they are quantized anew, which is not lossless. None refuses such checkpoints.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ImportError: safetensors is not installed.
        ValueError: the method or its variant is not supported, a tensor is missing or of a wrong shape or dtype, or a
            layer cannot be expressed; the message names it.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"[convert_foreign_checkpoint] source and target are the same directory: {source}")
    config = _read_json(source / "config.json")
    record = _foreign_record(source, config)
    if requantize is not None:
        requantize = complete_format(**requantize)
    with ExitStack() as files:
        stored = _StoredTensors(source, files)
        layers = _described_layers(stored, record)
        scale_dtypes = {layer.scales.dtype for layer in layers.values()}
        if dtype is None and (len(scale_dtypes) > 1 or not all(map(_is_exact, layers.values()))):
            dtype = torch.float32
        experts = _Experts(stored, layers, config)
        with staged(target) as scratch:
            report = _write_converted(source, stored, layers, experts, scratch, dtype, requantize)
            write_json(scratch / "config.json", _mlx_config(config, report, stored))
            _copy_companions(source, scratch)
            _check_that_it_loads(scratch)
    return report


# Codes


def _unpack(words: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., words * 32 / bits] of int32 or uint32 words: code i is bits [i * bits, (i + 1) * bits)."""
    eights = words.contiguous().view(torch.uint8).unflatten(-1, (-1, bits))  # eight codes are `bits` bytes
    stream = torch.zeros(*eights.shape[:-1], 8, dtype=torch.uint8)
    stream[..., :bits] = eights
    stream = stream.view(torch.int64)
    mask = (1 << bits) - 1
    return torch.cat([(stream >> (bits * i) & mask).to(torch.uint8) for i in range(8)], -1).flatten(-2)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint32 words [..., codes * bits / 32] of uint8 codes."""
    eights = codes.unflatten(-1, (-1, 8))
    stream = torch.zeros(*eights.shape[:-1], 1, dtype=torch.int64)
    for i in range(8):
        stream |= eights[..., i : i + 1].to(torch.int64) << (bits * i)
    return stream.view(torch.uint8)[..., :bits].flatten(-2).contiguous().view(torch.uint32)


def _unpack_awq(words: Tensor) -> Tensor:
    """uint8 codes [..., 8 * words] in the order of the columns."""
    fields = _unpack(words, 4).unflatten(-1, (-1, 8))
    return fields[..., [_AWQ_ORDER.index(column) for column in range(8)]].flatten(-2)


# Layers


class _Layer(NamedTuple):
    """value[o, i] = (code[o, i] - zeros[o, g]) * scales[o, g] with g = input_groups[i], whoever stored it."""

    bits: int
    zeros: Tensor  # int32 [out, groups]
    scales: Tensor  # [out, groups]
    input_groups: Tensor  # int64 [in]
    words: Callable[[], Tensor]  # uint32 [out, in * bits / 32]; called once, when the layer is converted


def _awq_layer(qweight: Tensor, qzeros: Tensor | None, scales: Tensor) -> _Layer:
    _check(scales.dim() == 2, f"scales {list(scales.shape)} should be [groups, out]")
    _check(qweight.dim() == 2, f"qweight {list(qweight.shape)} should be [in, out / 8]")
    (groups, rows), columns = scales.shape, qweight.shape[0]
    _check_words("qweight", qweight, (columns, rows // 8))
    if qzeros is None:
        zeros = torch.full((rows, groups), 8, dtype=torch.int32)
    else:
        _check_words("qzeros", qzeros, (groups, rows // 8))
        zeros = _unpack_awq(qzeros).T.to(torch.int32)
    return _checked(
        4, zeros, scales.T, _equal_runs(columns, groups), lambda: _pack(_unpack_awq(qweight).T.contiguous(), 4)
    )


def _gptq_layer(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zeros_minus_one: bool
) -> _Layer:
    _check(bits in _BITS, f"{bits} bits; supported are {_BITS}")
    _check(scales.dim() == 2, f"scales {list(scales.shape)} should be [groups, out]")
    _check(qweight.dim() == 2, f"qweight {list(qweight.shape)} should be [in * {bits} / 32, out]")
    (groups, rows), columns = scales.shape, qweight.shape[0] * 32 // bits
    _check_words("qweight", qweight, (columns * bits // 32, rows))
    _check_words("qzeros", qzeros, (groups, rows * bits // 32))
    zeros = _unpack(qzeros, bits).T.to(torch.int32)
    if zeros_minus_one:
        ambiguous = (zeros == (1 << bits) - 1).any()
        _check(
            not ambiguous,
            f"qzeros holds {(1 << bits) - 1}, which readers of this format take for a zero of {1 << bits} or of 0",
        )
        zeros = zeros + 1
    if g_idx is not None:
        _check(g_idx.shape == (columns,), f"g_idx {list(g_idx.shape)} should be [{columns}]")
        if not g_idx.any():  # some writers leave it zeroed
            g_idx = None
    input_groups = _equal_runs(columns, groups) if g_idx is None else g_idx
    return _checked(bits, zeros, scales.T, input_groups, lambda: qweight.T.contiguous().view(torch.uint32))


def _compressed_tensors_layer(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_g_idx: Tensor | None,
    bits: int,
) -> _Layer:
    _check(bits in (2, 4, 8), f"{bits} bits; supported are (2, 4, 8)")
    _check(weight_scale.dim() == 2, f"weight_scale {list(weight_scale.shape)} should be [out, groups]")
    _check(weight_packed.dim() == 2, f"weight_packed {list(weight_packed.shape)} should be [out, in * {bits} / 32]")
    (rows, groups), columns = weight_scale.shape, weight_packed.shape[1] * 32 // bits
    _check_words("weight_packed", weight_packed, (rows, columns * bits // 32))
    if weight_zero_point is None:
        zeros = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.int32)
    else:
        _check_words("weight_zero_point", weight_zero_point, (rows * bits // 32, groups))
        zeros = _unpack(weight_zero_point.T, bits).T.to(torch.int32)
    if weight_g_idx is not None:
        _check(weight_g_idx.shape == (columns,), f"weight_g_idx {list(weight_g_idx.shape)} should be [{columns}]")
    input_groups = _equal_runs(columns, groups) if weight_g_idx is None else weight_g_idx
    return _checked(bits, zeros, weight_scale, input_groups, lambda: weight_packed.contiguous().view(torch.uint32))


def _checked(bits: int, zeros: Tensor, scales: Tensor, input_groups: Tensor, words: Callable[[], Tensor]) -> _Layer:
    _check(scales.is_floating_point(), f"the scales are {scales.dtype} and should be floating-point")
    _check(bool(scales.isfinite().all()), "some scales are infinite or NaN")
    _check(not input_groups.is_floating_point(), f"the groups of the inputs are {input_groups.dtype}, not integers")
    in_range = (input_groups >= 0) & (input_groups < scales.shape[1])
    _check(bool(in_range.all()), f"the groups of the inputs go beyond the {scales.shape[1]} groups of the scales")
    return _Layer(bits, zeros, scales, input_groups.to(torch.int64), words)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"[convert] {message}")


def _check_words(name: str, words: Tensor, shape: tuple[int, ...]) -> None:
    fits = words.dtype == torch.int32 and tuple(words.shape) == shape
    _check(fits, f"{name} is {words.dtype} {list(words.shape)} and should be int32 {list(shape)}")


def _equal_runs(columns: int, groups: int) -> Tensor:
    """The group of each input where all groups are runs of one length."""
    _check(groups > 0 and columns % groups == 0, f"{columns} inputs do not divide into {groups} groups")
    return torch.arange(columns) // (columns // groups)


class _Groups(NamedTuple):
    size: int
    stored: Tensor  # int64 [in / size], the stored group that each is a part of
    permutation: Tensor | None  # of the inputs


def _affine_groups(layer: _Layer) -> _Groups | None:
    """MLX groups of which each lies in one stored group, permuted only if need be; None if there are none."""
    for permutation in (None, torch.argsort(layer.input_groups, stable=True)):
        ordered = layer.input_groups if permutation is None else layer.input_groups[permutation]
        for group_size in _GROUP_SIZES:
            if len(ordered) % group_size == 0:
                runs = ordered.view(-1, group_size)
                if torch.equal(runs, runs[:, :1].expand_as(runs)):
                    return _Groups(group_size, runs[:, 0], permutation)
    return None


def _scales_and_biases(layer: _Layer) -> tuple[Tensor, Tensor]:
    """Both in float32, exact: a scale has at most 11 significant bits, a zero at most 9."""
    scales = layer.scales.to(torch.float32)
    return scales, -layer.zeros.to(torch.float32) * scales


def _is_exact(layer: _Layer) -> bool:
    """Whether the dtype of the scales holds the biases."""
    biases = _scales_and_biases(layer)[1]
    return torch.equal(biases.to(layer.scales.dtype).to(torch.float32), biases)


def _rounding(layer: _Layer, dtype: torch.dtype) -> float:
    """The largest change to a value by scales and biases in `dtype`, in steps of its group."""
    exact_scales, exact_biases = (each.double() for each in _scales_and_biases(layer))
    scale_error = exact_scales.to(dtype).double() - exact_scales
    bias_error = exact_biases.to(dtype).double() - exact_biases
    # Linear in the code, so the largest is at one of the ends.
    ends = torch.maximum(bias_error.abs(), (((1 << layer.bits) - 1) * scale_error + bias_error).abs())
    steps = exact_scales.abs()
    return float(torch.where(steps > 0, ends / steps, 0.0).max())


def _in_mlx_format(layer: _Layer, dtype: torch.dtype | None) -> ConvertedLinear:
    groups = _affine_groups(layer)
    if groups is None:
        sizes = sorted(set(layer.input_groups.bincount().tolist()))
        raise ValueError(f"[convert] groups of {sizes} inputs do not divide into groups of {_GROUP_SIZES[::-1]}")
    weight = layer.words()
    if groups.permutation is not None:
        weight = _pack(_unpack(weight, layer.bits)[:, groups.permutation], layer.bits)
    dtype = dtype or (layer.scales.dtype if _is_exact(layer) else torch.float32)
    scales, biases = (each[:, groups.stored].to(dtype).contiguous() for each in _scales_and_biases(layer))
    _check(bool(biases.isfinite().all() and scales.isfinite().all()), f"some scales or biases overflow {dtype}")
    return ConvertedLinear(weight, scales, biases, groups.size, layer.bits, groups.permutation)


def _values(layer: _Layer) -> Tensor:
    """The layer's values [out, in] in float32, exact."""
    steps = _unpack(layer.words(), layer.bits).to(torch.float32)
    steps -= layer.zeros.to(torch.float32)[:, layer.input_groups]
    return steps.mul_(layer.scales.to(torch.float32)[:, layer.input_groups])


# Checkpoints


class _StoredTensors:
    """The tensors of all safetensors files of a directory, read when they are asked for."""

    def __init__(self, directory: Path, open_files: ExitStack) -> None:
        safetensors = require("safetensors")
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"[convert_foreign_checkpoint] {directory} has no *.safetensors")
        self.names: list[list[str]] = []  # by file
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = open_files.enter_context(safetensors.safe_open(path, framework="pt"))
            except safetensors.SafetensorError as error:
                raise ValueError(f"[convert_foreign_checkpoint] {path} cannot be read: {error}") from error
            self.names.append(list(file.keys()))
            if twice := sorted(self._files.keys() & set(self.names[-1])):
                raise ValueError(
                    f"[convert_foreign_checkpoint] {path} repeats tensors of another file: {listed(twice)}"
                )
            self._files.update(dict.fromkeys(self.names[-1], file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def get(self, name: str) -> Tensor | None:
        return self._files[name].get_tensor(name) if name in self._files else None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ValueError(f"[convert] {name} is missing")
        return self._files[name].get_tensor(name)


def _read_awq(stored: _StoredTensors, path: str, record: Mapping[str, Any]) -> _Layer:
    return _awq_layer(stored[f"{path}.qweight"], stored.get(f"{path}.qzeros"), stored[f"{path}.scales"])


def _read_gptq(stored: _StoredTensors, path: str, record: Mapping[str, Any]) -> _Layer:
    qweight, g_idx = stored[f"{path}.qweight"], stored.get(f"{path}.g_idx")
    # Layers may differ in their bits, and the shapes tell.
    if g_idx is not None and not g_idx.numel():
        g_idx = None
    bits = record["bits"] if g_idx is None else qweight.shape[0] * 32 // len(g_idx)
    minus_one = record["variant"] == "gptq"
    return _gptq_layer(qweight, stored[f"{path}.qzeros"], stored[f"{path}.scales"], g_idx, bits, minus_one)


def _read_compressed_tensors(stored: _StoredTensors, path: str, record: Mapping[str, Any]) -> _Layer:
    packed, shape = stored[f"{path}.weight_packed"], stored[f"{path}.weight_shape"].tolist()
    bits = packed.shape[-1] * 32 // shape[-1]
    return _compressed_tensors_layer(
        packed,
        stored[f"{path}.weight_scale"],
        stored.get(f"{path}.weight_zero_point"),
        stored.get(f"{path}.weight_g_idx"),
        bits,
    )


class _Method(NamedTuple):
    """What is known of a quantization method by its name in config.json."""

    read: Callable[[_StoredTensors, str, Mapping[str, Any]], _Layer]
    tensors: tuple[str, ...]  # of a layer; the first, its codes, is in every one
    variant_keys: tuple[str, ...]  # where config.json tells the variant
    variants: tuple[str, ...]  # that can be read; the first where config.json is silent


_METHODS = {
    "awq": _Method(_read_awq, ("qweight", "qzeros", "scales"), ("version", "format"), ("gemm",)),
    "gptq": _Method(
        _read_gptq, ("qweight", "qzeros", "scales", "g_idx"), ("checkpoint_format", "format"), ("gptq", "gptq_v2")
    ),
    "compressed-tensors": _Method(
        _read_compressed_tensors,
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        ("format",),
        ("pack-quantized",),
    ),
}
_CODES = {method.tensors[0] for method in _METHODS.values()}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"[convert_foreign_checkpoint] {file.parent} has no {file.name}")
    return read_json(file, "convert_foreign_checkpoint")


def _foreign_record(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """{"method", "variant", "bits"} of a checkpoint that can be read."""
    record = config.get("quantization_config") or config.get("compression_config")
    name = (record or {}).get("quant_method")
    for file, old_name in _OLD_RECORDS.items():
        if record is None and (source / file).exists():
            record, name = _read_json(source / file), old_name
    if name not in _METHODS:
        found = "is not quantized" if record is None else f"is quantized by {name!r}"
        raise ValueError(f"[convert_foreign_checkpoint] {source} {found}; supported are {', '.join(_METHODS)}")
    method = _METHODS[name]
    told = [str(record[key]).lower() for key in method.variant_keys if record.get(key)]
    variant = told[0] if told else method.variants[0]
    if variant not in method.variants:
        raise ValueError(
            f"[convert_foreign_checkpoint] {source} is {name} in the variant {variant!r}; "
            f"supported are {', '.join(method.variants)}"
        )
    bits = record.get("bits", record.get("w_bit", 4))
    if name == "awq" and bits != 4:
        raise ValueError(f"[convert_foreign_checkpoint] {source} is awq with {bits!r} bits; supported are 4")
    return {"method": name, "variant": variant, "bits": bits}


def _described_layers(stored: _StoredTensors, record: Mapping[str, Any]) -> dict[str, _Layer]:
    """The quantized layers by their paths; their codes stay in the mapped files."""
    method = _METHODS[record["method"]]
    codes = f".{method.tensors[0]}"
    layers = {}
    for path in [name.removesuffix(codes) for name in stored if name.endswith(codes)]:
        try:
            layers[path] = method.read(stored, path, record)
        except ValueError as error:
            raise _of_layer(path, error) from error
    if not layers:
        raise ValueError(f"[convert_foreign_checkpoint] no tensor is named *{codes}")
    for name in stored:
        path, _, attribute = name.rpartition(".")
        if path in layers and attribute not in (*method.tensors, "bias"):
            raise ValueError(f"[convert_foreign_checkpoint] {name} is not known in a layer of {record['method']}")
    return layers


def _of_layer(path: str, error: ValueError) -> ValueError:
    return ValueError(f"[convert_foreign_checkpoint] {path}: {str(error).removeprefix('[convert] ')}")


def _write_converted(
    source: Path,
    stored: _StoredTensors,
    layers: Mapping[str, _Layer],
    experts: _Experts,
    directory: Path,
    dtype: torch.dtype | None,
    requantize: Mapping[str, Any] | None,
) -> ConversionReport:
    """Writes the weight files and their index."""
    save_file = require("safetensors.torch").save_file
    report = ConversionReport(dtype=dtype or next(iter(layers.values())).scales.dtype)
    left_out = _zero_biases_of_no_layer(source, stored, layers)

    def floating(name: str) -> Tensor:
        tensor = stored[name]
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def convert(name: str) -> dict[str, Tensor]:
        """What becomes of one stored tensor; that of the codes stands for all of its layer."""
        path, _, attribute = name.rpartition(".")
        if path not in layers or (attribute == "bias" and name not in left_out):
            return {name: floating(name)}
        if attribute not in _CODES:
            return {}
        try:
            return _converted(path, layers[path], requantize, report)
        except ValueError as error:
            raise _of_layer(path, error) from error

    weight_map: dict[str, str] = {}
    total_size = 0
    for number, names in enumerate(progress(stored.names, "Converting"), 1):
        shard: dict[str, Tensor] = {}
        for name in names:
            shard.update(experts.stacked(name, convert, report) if name in experts else convert(name))
        count = len(stored.names)
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(shard, file))
        total_size += sum(tensor.nbytes for tensor in shard.values())
    write_json(
        directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    )
    return report


class _Experts:
    """The tensors of layers that each expert has for itself, and that MLX stacks: one layer for a projection of all."""

    def __init__(self, stored: _StoredTensors, layers: Mapping[str, _Layer], config: Mapping[str, Any]) -> None:
        """Raises ValueError if the experts of a projection are not all there, or not all of one kind."""
        text = config.get("text_config") or {}
        family = family_of(text.get("model_type") or config.get("model_type") or "")
        name_of_layers = family.experts.rpartition(".")[2]
        self._paths: dict[str, list[str]] = {}  # of the experts' layers in their order, by the path of the stacked one
        self._place: dict[str, tuple[str, int]] = {}  # of an expert's layer: the stacked one, and the expert's number
        found: dict[str, dict[int, str]] = {}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in stored):
            if (match := _OF_AN_EXPERT.fullmatch(path)) is not None:
                block, index, projection = match.groups()
                stacked = f"{block}.{name_of_layers}.{family.projections[projection]}"
                found.setdefault(stacked, {})[int(index)] = path
                self._place[path] = stacked, int(index)
        for stacked, paths in found.items():
            self._paths[stacked] = [paths.get(index, "") for index in range(max(paths) + 1)]
            if missing := [str(index) for index, path in enumerate(self._paths[stacked]) if not path]:
                raise ValueError(f"[convert_foreign_checkpoint] {stacked}: experts are missing: {listed(missing)}")
            if len({path in layers for path in self._paths[stacked]}) > 1:
                floats = [path for path in self._paths[stacked] if path not in layers]
                raise ValueError(
                    f"[convert_foreign_checkpoint] {stacked}: experts that are not quantized are among others, which "
                    f"MLX checkpoints cannot express: {listed(floats)}"
                )

    def __contains__(self, name: str) -> bool:
        return name.rpartition(".")[0] in self._place

    def stacked(
        self, name: str, convert: Callable[[str], dict[str, Tensor]], report: ConversionReport
    ) -> dict[str, Tensor]:
        """What `convert` makes of the tensors of that name of all experts, stacked; nothing unless it is the first's.

        Raises:
            ValueError: experts have different formats or shapes.
        """
        path, _, attribute = name.rpartition(".")
        stacked, index = self._place[path]
        if index != 0:
            return {}
        parts: dict[str, list[Tensor]] = {}
        for each in self._paths[stacked]:
            for made, tensor in convert(f"{each}.{attribute}").items():
                parts.setdefault(made.rpartition(".")[2], []).append(tensor)
        formats = [report.formats.pop(each) for each in self._paths[stacked] if each in report.formats]
        shapes = {tuple(tensor.shape) for tensors in parts.values() for tensor in tensors[:1]}
        uneven = [part for part, tensors in parts.items() if len({tensor.shape for tensor in tensors}) > 1]
        if uneven or any(format != formats[0] for format in formats):
            what = listed(sorted({str(format) for format in formats} or {str(shape) for shape in shapes}))
            raise ValueError(
                f"[convert_foreign_checkpoint] {stacked}: the experts have different formats or shapes, which MLX "
                f"checkpoints cannot express: {what}"
            )
        if formats:
            report.formats[stacked] = formats[0]
        return {f"{stacked}.{part}": torch.stack(tensors) for part, tensors in parts.items()}


def _converted(
    path: str, layer: _Layer, requantize: Mapping[str, Any] | None, report: ConversionReport
) -> dict[str, Tensor]:
    """The tensors of one layer in MLX's layout; what was done is noted in the report."""
    groups = _affine_groups(layer)
    if groups is not None and groups.permutation is None:
        converted = _in_mlx_format(layer, report.dtype)
        format = {"group_size": converted.group_size, "bits": converted.bits, "mode": "affine"}
        packed = converted[:3]
        report.rounding = max(report.rounding, _rounding(layer, report.dtype))
    else:
        if requantize is None:
            reason = "act-order spreads its groups" if groups else "its groups are no runs of 32, 64 or 128 inputs"
            raise ValueError(
                f"[convert] {reason}, which MLX checkpoints cannot express; requantize={{'bits': 8, 'group_size': 32}} "
                "quantizes such layers anew, with a small loss"
            )
        values = _values(layer)
        format = dict(requantize)
        packed = [
            tensor.to(report.dtype) if tensor.is_floating_point() else tensor for tensor in quantize(values, **format)
        ]
        error = dequantize(*packed, **format, dtype=torch.float32).sub_(values)
        report.requantized[path] = float(error.norm() / values.norm())
    report.formats[path] = format
    return {f"{path}.{name}": tensor for name, tensor in zip(("weight", "scales", "biases"), packed, strict=False)}


def _zero_biases_of_no_layer(source: Path, stored: _StoredTensors, paths: Iterable[str]) -> set[str]:
    """The names of all-zero biases, which some writers give to every layer, of layers that have none in the model."""
    names = {name for path in paths if (name := f"{path}.bias") in stored and not stored[name].any()}
    if not names:
        return names
    transformers = compat.require("transformers")
    config = transformers.AutoConfig.from_pretrained(source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return names - model.state_dict().keys()


def _check_that_it_loads(directory: Path) -> None:
    """Raises ValueError if Transformers knows the model, and the written tensors are not those that it wants."""
    try:
        check_checkpoint(directory)
    except ValueError as error:
        message = str(error).removeprefix(f"[from_pretrained] {directory}: ")
        raise ValueError(f"[convert_foreign_checkpoint] the converted checkpoint would not load: {message}") from error


def _mlx_config(config: Mapping[str, Any], report: ConversionReport, stored: _StoredTensors) -> dict[str, Any]:
    """config.json with the record of formats in MLX's place and words."""
    foreign = ("quantization_config", "compression_config", "torch_dtype", "dtype")
    result = {name: value for name, value in config.items() if name not in foreign}
    result["dtype"] = str(report.dtype).removeprefix("torch.")
    if "tie_word_embeddings" not in result:  # MLX ties by default
        result["tie_word_embeddings"] = not any(name.startswith("lm_head.") for name in stored)
    return in_mlx_terms(result, report.formats, _config_class(config))


def _config_class(config: Mapping[str, Any]) -> Any:
    """The class by which Transformers reads config.json; None if that is unknown, or Transformers not installed."""
    try:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[config["model_type"]]
    except (ImportError, KeyError):
        return None


def _copy_companions(source: Path, directory: Path) -> None:
    """Copies what belongs to the model beside its weights; no program."""
    written = {"config.json", *_OLD_RECORDS}
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in written and not file.name.endswith(".index.json"):
                shutil.copyfile(file, directory / file.name)
