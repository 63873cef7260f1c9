"""GGUF files into MLX checkpoints, code for code.

The kinds below are MLX's affine format in another order: groups of 32 weights with value = code * scale + bias. Q*_0
stores the scale d alone, and -8 d, -16 d or -128 d as the bias: powers of two times d, which float16 holds unless they
overflow. Q*_K stores products of a float16 and a whole number of six bits, which float32 holds and float16 mostly not.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.config import in_mlx_terms
from ..checkpoint.staging import staged
from ..checkpoint.write import first_names, write_json, write_weights
from ..formats import complete_format
from ..hf import compat
from ..hf.save import config_record
from ..messages import listed, short_name
from ..ops import dequantize, quantize
from ..optional import PreTrainedModel, progress, require
from .checkpoint import check_that_it_loads
from .layer import ConversionReport, pack, step_error

OP = "convert_gguf_checkpoint"  # what its errors name
_MAGIC = b"GGUF"  # the first bytes of a file
_GROUP_SIZE = 32
_ROWS = 4096  # that are decoded at a time
_SHARD_BYTES = 5 * 1024**3
_ANEW = "requantize={'bits': 8, 'group_size': 32}"


def convert_gguf_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    requantize: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Writes a GGUF file as an MLX checkpoint with the same codes, and its tokenizer, if it has one.

    Tensors of the types Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q5_K become affine groups of 32, those of F32, F16 and
    BF16 stay in floating point. One weight file of at most 5 GB is in memory at a time. Files are written beside their
    final place and then renamed, so a failure leaves `target` as it was.

    Args:
        source: a file of one of the architectures llama, qwen2, qwen3, gemma2 and gemma3.
        target: a directory, made if it does not exist.
        dtype: of scales, biases and all that stays in floating point. None for float16 if that holds all of them
            exactly, and float32, which always does, otherwise.
        requantize: a format (any of group_size, bits, mode) for tensors of other types, such as Q6_K; they are
            quantized anew, which is not lossless. None refuses such files.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: Transformers, safetensors or gguf is not installed.
        ValueError: it is no GGUF file, is cut off or one part of several; its architecture or a type is not supported;
            tensors are missing, unknown or of a wrong shape; numbers are not finite or overflow `dtype`.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"[{OP}] there is no file {source}")
    if (problem := not_gguf(source)) is not None:
        raise ValueError(f"[{OP}] {problem}")
    if requantize is not None:
        requantize = complete_format(**requantize)
    reader = _opened(source)
    architecture = _architecture(reader, source)
    _check_rope(reader, source)
    model = _meta_model(source, reader, architecture)
    tensors = _tensors(reader, model, architecture, source)
    _check_types(tensors, requantize)
    if dtype is None:
        dtype = torch.float16 if all(tensor.fits(torch.float16) for tensor in tensors) else torch.float32
    report = ConversionReport(dtype=dtype)
    with staged(target) as scratch:
        write_weights(scratch, _shards(tensors, dtype, requantize, report), "mlx")
        write_json(scratch / "config.json", _mlx_config(model, report))
        if model.generation_config is not None:
            model.generation_config.save_pretrained(scratch)
        if "tokenizer.ggml.tokens" in reader.fields:
            _from_gguf(compat.require("transformers").AutoTokenizer, source).save_pretrained(scratch)
        check_that_it_loads(scratch, OP)
    return report


def not_gguf(file: Path) -> str | None:
    """Why a file is no GGUF file, by how it begins; None if it may be one."""
    with file.open("rb") as opened:
        begin = opened.read(len(_MAGIC))
    if begin == _MAGIC:
        return None
    return f"{file} {f'begins with {begin!r} instead of {_MAGIC!r}' if begin else 'is empty'} and so is no GGUF file"


# Blocks


class _Kind(NamedTuple):
    """How blocks of a type are stored; the functions take uint8 [rows, blocks, size]."""

    bits: int
    size: int  # bytes of a block
    scales: Callable[[Tensor], tuple[Tensor, Tensor]]  # scales and biases, exact, float32 [rows, groups]
    codes: Callable[[Tensor], Tensor]  # uint8 [rows, columns]


def _halves(blocks: Tensor, begin: int) -> Tensor:
    """The float16 of each block at a byte, as float32 [rows, blocks]."""
    return blocks[..., begin : begin + 2].contiguous().view(torch.float16).squeeze(-1).to(torch.float32)


def _symmetric(zero: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
        scale = _halves(blocks, 0)
        return scale, -zero * scale

    return scales


def _with_minimum(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _halves(blocks, 0), _halves(blocks, 2)


def _products(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d * sc and -dmin * m of eight groups a block. Twelve bytes hold sc and m: of the first four groups in the low six
    bits of bytes 0 to 3 and 4 to 7; of the others four bits in bytes 8 to 11, and two above those six."""
    low_scales, low_minima, rest = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([low_scales & 63, (rest & 15) | (low_scales >> 6 << 4)], -1)
    minima = torch.cat([low_minima & 63, (rest >> 4) | (low_minima >> 6 << 4)], -1)
    scale, minimum = _halves(blocks, 0).unsqueeze(-1), _halves(blocks, 2).unsqueeze(-1)
    return (scale * scales).flatten(-2), (-minimum * minima).flatten(-2)


def _nibbles(blocks: Tensor, begin: int, run: int) -> Tensor:
    """The codes of the bytes from `begin` on, uint8 [rows, blocks, codes]: each run of bytes has its low nibbles first,
    then its high ones."""
    runs = blocks[..., begin:].unflatten(-1, (-1, run))
    return torch.stack([runs & 15, runs >> 4], -2).flatten(-3)


_EIGHT = torch.arange(8, dtype=torch.uint8)


def _four_bits(begin: int, run: int) -> Callable[[Tensor], Tensor]:
    return lambda blocks: _nibbles(blocks, begin, run).flatten(-2)


def _five_bits(begin: int) -> Callable[[Tensor], Tensor]:
    """Four bytes with the fifth bit of each code in its place come first."""

    def codes(blocks: Tensor) -> Tensor:
        fifth = blocks[..., begin : begin + 4].unsqueeze(-1) >> _EIGHT & 1
        return (_nibbles(blocks, begin + 4, 16) | fifth.flatten(-2) << 4).flatten(-2)

    return codes


def _five_bits_of_super_blocks(blocks: Tensor) -> Tensor:
    """32 bytes, one for each place in a group, have the fifth bits of the eight groups."""
    fifth = blocks[..., 16:48].unsqueeze(-2) >> _EIGHT.unsqueeze(-1) & 1
    return (_nibbles(blocks, 48, 32) | fifth.flatten(-2) << 4).flatten(-2)


def _eight_bits(blocks: Tensor) -> Tensor:
    return (blocks[..., 2:] ^ 128).flatten(-2)  # signed, plus 128


_KINDS = {
    "Q4_0": _Kind(4, 18, _symmetric(8), _four_bits(2, 16)),
    "Q4_1": _Kind(4, 20, _with_minimum, _four_bits(4, 16)),
    "Q5_0": _Kind(5, 22, _symmetric(16), _five_bits(2)),
    "Q5_1": _Kind(5, 24, _with_minimum, _five_bits(4)),
    "Q8_0": _Kind(8, 34, _symmetric(128), _eight_bits),
    "Q4_K": _Kind(4, 144, _products, _four_bits(16, 32)),
    "Q5_K": _Kind(5, 176, _products, _five_bits_of_super_blocks),
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# Tensors


class _Tensor(NamedTuple):
    """A tensor of the file, under its name in the checkpoint."""

    name: str
    stored: Any  # gguf's ReaderTensor
    rows: Tensor | None  # the stored row of each row, None for the same
    less: float  # what is taken off the stored values

    @property
    def type(self) -> str:
        return self.stored.tensor_type.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.stored.shape.tolist()))

    def bytes(self) -> Tensor:
        """uint8 [rows, bytes of a row], or [bytes of all] of a vector."""
        data = torch.from_numpy(self.stored.data.copy()).view(torch.uint8)
        return data if self.rows is None else data.view(len(self.rows), -1)[self.rows]

    def floats(self) -> Tensor:
        values = self.bytes().view(_FLOATS[self.type]).view(self.shape)
        return values.to(torch.float32) - self.less if self.less else values

    def blocks(self) -> Iterable[Tensor]:
        """The rows, a number at a time, as uint8 [rows, blocks, size]."""
        return self.bytes().unflatten(-1, (-1, _KINDS[self.type].size)).split(_ROWS)

    def scales(self) -> tuple[Tensor, Tensor]:
        """Scales and biases, exact, in float32 [rows, groups]."""
        parts = [_KINDS[self.type].scales(blocks) for blocks in self.blocks()]
        scales, biases = map(torch.cat, zip(*parts, strict=True))
        return scales, biases

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether `dtype` holds what is stored beside the codes; what is quantized anew does not matter."""
        if self.type in _FLOATS:
            return _holds(dtype, self.floats())
        return self.type not in _KINDS or all(_holds(dtype, each) for each in self.scales())


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return torch.equal(values.to(dtype).to(torch.float32), values.to(torch.float32))


def _in_dtype(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    if not values.isfinite().all():
        raise ValueError(f"[{OP}] {what} are infinite or NaN")
    result = values.to(dtype)
    if not result.isfinite().all():
        raise ValueError(f"[{OP}] {what} overflow {dtype}; float32 holds them")
    return result.contiguous()


def _written(
    tensor: _Tensor, dtype: torch.dtype, requantize: Mapping[str, Any] | None, report: ConversionReport
) -> dict[str, Tensor]:
    """What becomes of a tensor; what was done is noted in the report."""
    if tensor.type in _FLOATS:
        values = tensor.floats()
        if not _holds(dtype, values):
            report.rounded.append(tensor.name)
        return {tensor.name: _in_dtype(values, dtype, f"some values of {tensor.stored.name}")}
    path = tensor.name.removesuffix(".weight")
    if tensor.type in _KINDS:
        kind = _KINDS[tensor.type]
        report.formats[path] = {"group_size": _GROUP_SIZE, "bits": kind.bits, "mode": "affine"}
        weight = torch.cat([pack(kind.codes(blocks), kind.bits) for blocks in tensor.blocks()])
        scales, biases = tensor.scales()
        named = (_in_dtype(each, dtype, f"some scales of {tensor.stored.name}") for each in (scales, biases))
        packed = [weight, *named]
        report.rounding = max(report.rounding, step_error(scales, biases, kind.bits, dtype))
    else:
        packed, report.requantized[path] = _quantized_anew(tensor, dtype, requantize)
        report.formats[path] = dict(requantize)
    return {f"{path}.{name}": each for name, each in zip(("weight", "scales", "biases"), packed, strict=False)}


def _quantized_anew(tensor: _Tensor, dtype: torch.dtype, format: Mapping[str, Any]) -> tuple[list[Tensor], float]:
    """The tensors of a layer in `format`, and the relative error in the Frobenius norm."""
    dequantized = require("gguf", "cli").quants.dequantize
    parts, error, size = [], 0.0, 0.0
    try:
        for rows in tensor.bytes().split(_ROWS):
            values = torch.from_numpy(dequantized(rows.numpy(), tensor.stored.tensor_type))
            _in_dtype(values, torch.float32, f"some values of {tensor.stored.name}")
            packed = [each.to(dtype) if each.is_floating_point() else each for each in quantize(values, **format)]
            parts.append(packed)
            size += float(values.square().sum(dtype=torch.float64))
            difference = dequantize(*packed, **format, dtype=torch.float32).sub_(values)
            error += float(difference.square().sum(dtype=torch.float64))
    except NotImplementedError as unknown:
        raise ValueError(f"[{OP}] {tensor.stored.name} is {tensor.type}, which gguf cannot dequantize") from unknown
    return [torch.cat(each) for each in zip(*parts, strict=True)], (error / size) ** 0.5 if size else 0.0


def _check_types(tensors: Iterable[_Tensor], requantize: Mapping[str, Any] | None) -> None:
    others: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.type not in _FLOATS:
            if len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
                raise ValueError(f"[{OP}] {tensor.stored.name} {list(tensor.shape)} is {tensor.type} and no matrix")
            if tensor.type not in _KINDS:
                others.setdefault(tensor.type, []).append(tensor.stored.name)
    if others and requantize is None:
        found = "; ".join(f"{type} of {listed(names)}" for type, names in others.items())
        raise ValueError(
            f"[{OP}] no group of MLX's affine format holds the types {found}. Supported are "
            f"{', '.join([*_KINDS, *_FLOATS])}; {_ANEW}, in the command -q, quantizes the others anew, with a small "
            "loss"
        )


def _shards(
    tensors: Iterable[_Tensor], dtype: torch.dtype, requantize: Mapping[str, Any] | None, report: ConversionReport
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    parts: list[list[_Tensor]] = [[]]
    total = 0
    for tensor in tensors:
        size = _upper_bytes(tensor, dtype)
        if parts[-1] and total + size > _SHARD_BYTES:
            parts.append([])
            total = 0
        parts[-1].append(tensor)
        total += size
    for number, part in enumerate(progress(parts, "Converting"), 1):
        shard: dict[str, Tensor] = {}
        for tensor in part:
            shard.update(_written(tensor, dtype, requantize, report))
        name = "model" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}"
        yield f"{name}.safetensors", shard


def _upper_bytes(tensor: _Tensor, dtype: torch.dtype) -> int:
    """The bytes that a tensor takes at most."""
    if tensor.type in _FLOATS:
        return int(tensor.stored.n_elements) * dtype.itemsize
    bits = _KINDS[tensor.type].bits if tensor.type in _KINDS else 8
    return int(tensor.stored.n_elements) * bits // 8 + 2 * int(tensor.stored.n_elements) // _GROUP_SIZE * dtype.itemsize


# Names and layouts


class _Architecture(NamedTuple):
    """What llama.cpp stores in another way than Transformers, by the architecture."""

    turned: tuple[str, ...] = ()  # matrices whose rows pair the halves of a head that turn together
    one_more: bool = False  # whether norms are stored plus 1
    factors: bool = False  # whether the rotary embedding may be scaled by a tensor


_ARCHITECTURES = {
    "llama": _Architecture(turned=("attn_q", "attn_k"), factors=True),
    "qwen2": _Architecture(),
    "qwen3": _Architecture(),
    "gemma2": _Architecture(one_more=True),
    "gemma3": _Architecture(one_more=True),
}


_FACTORS = "rope_freqs.weight"  # no weights, but what the frequencies of the rotary embedding are divided by
# All of Llama 3.1, 3.2 and 3.3 have these; only the factor differs.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _opened(source: Path) -> Any:
    gguf = require("gguf", "cli")
    try:
        reader = gguf.GGUFReader(source)
    except Exception as error:  # the parser may raise anything on damaged files
        raise ValueError(f"[{OP}] {source} cannot be read, it may be cut off: {error}") from error
    if reader.byte_order != "I":
        raise ValueError(f"[{OP}] {source} is of the other byte order than this machine")
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise ValueError(f"[{OP}] {source} is one of {parts.contents()} parts; merge them by llama-gguf-split first")
    return reader


def _architecture(reader: Any, source: Path) -> _Architecture:
    field = reader.get_field("general.architecture")
    name = None if field is None else field.contents()
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"[{OP}] {source} is of the architecture {name!r}; supported are {', '.join(_ARCHITECTURES)}. Others "
            "can be quantized anew, by `quantization-mlx convert -q`"
        )
    return _ARCHITECTURES[name]


def _check_rope(reader: Any, source: Path) -> None:
    """Transformers does not read how a file scales its rotary embedding, and would leave that out."""
    for name, field in reader.fields.items():
        if name.endswith(".rope.scaling.type") and field.contents() != "none":
            raise ValueError(
                f"[{OP}] {source} scales its rotary embedding, by {field.contents()!r}, which is not supported"
            )


def _scaled_rope(factors: Tensor, config: Any) -> dict[str, Any]:
    """The rope_parameters by which Llama 3.1 and its successors divide the frequencies by these factors. Transformers
    does not read the tensor, and would leave the scaling out."""
    rope = dict(config.rope_parameters)
    if (factors == 1).all():
        return rope
    scaling = {**_LLAMA3, "rope_type": "llama3", "factor": round(float(factors.max()), 3)}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turns = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size) / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns * scaling["original_max_position_embeddings"] - low) / (high - low)).clamp(0, 1)
    expected = 1 / (kept + (1 - kept) / scaling["factor"])
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise ValueError(f"[{OP}] {_FACTORS} has other factors than Llama 3's, which are the only ones supported")
    return {**rope, **scaling}


def _from_gguf(auto_class: Any, source: Path) -> Any:
    try:
        return auto_class.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:  # as above
        raise ValueError(f"[{OP}] {source}: Transformers cannot read its metadata: {error}") from error


def _meta_model(source: Path, reader: Any, architecture: _Architecture) -> PreTrainedModel:
    compat.check(OP)
    transformers = compat.require("transformers")
    config = _from_gguf(transformers.AutoConfig, source)
    for stored in reader.tensors:
        if architecture.factors and stored.name == _FACTORS:
            config.rope_parameters = _scaled_rope(torch.from_numpy(stored.data.copy()), config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _tensors(reader: Any, model: PreTrainedModel, architecture: _Architecture, source: Path) -> list[_Tensor]:
    """The file's tensors, which are all of the model's."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    names, shapes = get_gguf_hf_weights_map(model, TensorProcessor()), model.state_dict()
    stored_tensors = [each for each in reader.tensors if not architecture.factors or each.name != _FACTORS]
    if unknown := [stored.name for stored in stored_tensors if stored.name not in names]:
        raise ValueError(f"[{OP}] {source} has tensors that {type(model).__name__} has not: {listed(unknown)}")
    tensors = [
        _Tensor(
            names[stored.name],
            stored,
            _turned_rows(stored, model.config, architecture),
            1.0 if architecture.one_more and stored.name.endswith("norm.weight") else 0.0,
        )
        for stored in stored_tensors
    ]
    first = first_names(model)
    found = {first[tensor.name] for tensor in tensors}
    if missing := [name for name in first.values() if name not in found]:
        raise ValueError(f"[{OP}] {source} lacks tensors of {type(model).__name__}: {listed(sorted(set(missing)))}")
    for tensor in tensors:
        if tensor.shape != (expected := tuple(shapes[tensor.name].shape)):
            raise ValueError(f"[{OP}] {tensor.stored.name} is {list(tensor.shape)} and should be {list(expected)}")
    return tensors


def _turned_rows(stored: Any, config: Any, architecture: _Architecture) -> Tensor | None:
    """llama.cpp turns neighbours of a head together, Transformers the element of one half with that of the other."""
    part = stored.name.split(".")[-2]
    if part not in architecture.turned:
        return None
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    return torch.arange(int(stored.shape[-1])).view(heads, -1, 2).transpose(1, 2).flatten()


def _mlx_config(model: PreTrainedModel, report: ConversionReport) -> dict[str, Any]:
    config = {**config_record(model), "dtype": short_name(report.dtype)}
    return in_mlx_terms(config, report.formats, type(model.config))
