"""AWQ, GPTQ and compressed-tensors checkpoints into MLX checkpoints."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config import in_mlx_terms
from ..checkpoint.read import Checkpoint
from ..checkpoint.staging import staged
from ..checkpoint.write import write_json, write_weights
from ..formats import complete_format
from ..hf import compat
from ..hf.quantizer import check_checkpoint
from ..messages import listed, short_name
from ..ops import dequantize, quantize
from ..optional import progress, require
from . import awq, compressed_tensors, gptq
from .experts import StackedExperts
from .layer import OP, ConversionReport, StoredLayer, affine_groups, in_mlx_format, is_exact, rounding, values_of

# By their names in config.json.
_METHODS = {"awq": awq.METHOD, "gptq": gptq.METHOD, "compressed-tensors": compressed_tensors.METHOD}
_CODES = {method.tensors[0] for method in _METHODS.values()}
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # beside the weights: the tokenizer and its relatives
_OLD_RECORDS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # older files with the record -> method


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
        raise ValueError(f"[{OP}] source and target are the same directory: {source}")
    foreign = Checkpoint(source, OP)
    if (config := foreign.config) is None:
        raise FileNotFoundError(f"[{OP}] {source} has no config.json")
    record = _foreign_record(foreign)
    if requantize is not None:
        requantize = complete_format(**requantize)
    with ExitStack() as files:
        stored = _StoredTensors(source, files)
        layers = _described_layers(stored, record)
        scale_dtypes = {layer.scales.dtype for layer in layers.values()}
        if dtype is None and (len(scale_dtypes) > 1 or not all(map(is_exact, layers.values()))):
            dtype = torch.float32
        experts = StackedExperts(stored, layers, config)
        with staged(target) as scratch:
            report = _write_converted(source, stored, layers, experts, scratch, dtype, requantize)
            write_json(scratch / "config.json", _mlx_config(config, report, stored))
            _copy_companions(source, scratch)
            check_that_it_loads(scratch, OP)
    return report


class _StoredTensors(Mapping[str, Tensor]):
    """The tensors of all safetensors files of a directory, read when they are asked for."""

    def __init__(self, directory: Path, open_files: ExitStack) -> None:
        safetensors = require("safetensors")
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"[{OP}] {directory} has no *.safetensors")
        self.names: list[list[str]] = []  # by file
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = open_files.enter_context(safetensors.safe_open(path, framework="pt"))
            except safetensors.SafetensorError as error:
                raise ValueError(f"[{OP}] {path} cannot be read: {error}") from error
            self.names.append(list(file.keys()))
            if twice := sorted(self._files.keys() & set(self.names[-1])):
                raise ValueError(f"[{OP}] {path} repeats tensors of another file: {listed(twice)}")
            self._files.update(dict.fromkeys(self.names[-1], file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def get(self, name: str) -> Tensor | None:
        return self._files[name].get_tensor(name) if name in self._files else None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ValueError(f"[convert] {name} is missing")
        return self._files[name].get_tensor(name)


def _foreign_record(foreign: Checkpoint) -> dict[str, Any]:
    """{"method", "variant", "bits"} of a checkpoint that can be read."""
    source, config = foreign.directory, foreign.config
    record = config.get("quantization_config") or config.get("compression_config")
    name = (record or {}).get("quant_method")
    for file, old_name in _OLD_RECORDS.items():
        if record is None and (record := foreign.json(file)) is not None:
            name = old_name
    if name not in _METHODS:
        found = "is not quantized" if record is None else f"is quantized by {name!r}"
        raise ValueError(f"[{OP}] {source} {found}; supported are {', '.join(_METHODS)}")
    method = _METHODS[name]
    told = [str(record[key]).lower() for key in method.variant_keys if record.get(key)]
    variant = told[0] if told else method.variants[0]
    if variant not in method.variants:
        raise ValueError(
            f"[{OP}] {source} is {name} in the variant {variant!r}; supported are {', '.join(method.variants)}"
        )
    bits = record.get("bits", record.get("w_bit", 4))
    if name == "awq" and bits != 4:
        raise ValueError(f"[{OP}] {source} is awq with {bits!r} bits; supported are 4")
    return {"method": name, "variant": variant, "bits": bits}


def _described_layers(stored: _StoredTensors, record: Mapping[str, Any]) -> dict[str, StoredLayer]:
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
        raise ValueError(f"[{OP}] no tensor is named *{codes}")
    for name in stored:
        path, _, attribute = name.rpartition(".")
        if path in layers and attribute not in (*method.tensors, "bias"):
            raise ValueError(f"[{OP}] {name} is not known in a layer of {record['method']}")
    return layers


def _of_layer(path: str, error: ValueError) -> ValueError:
    return ValueError(f"[{OP}] {path}: {str(error).removeprefix('[convert] ')}")


def _write_converted(
    source: Path,
    stored: _StoredTensors,
    layers: Mapping[str, StoredLayer],
    experts: StackedExperts,
    directory: Path,
    dtype: torch.dtype | None,
    requantize: Mapping[str, Any] | None,
) -> ConversionReport:
    """Writes the weight files and their index."""
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

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        count = len(stored.names)
        for number, names in enumerate(progress(stored.names, "Converting"), 1):
            shard: dict[str, Tensor] = {}
            for name in names:
                shard.update(experts.stacked(name, convert, report) if name in experts else convert(name))
            yield "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors", shard

    write_weights(directory, shards(), "mlx")
    return report


def _converted(
    path: str, layer: StoredLayer, requantize: Mapping[str, Any] | None, report: ConversionReport
) -> dict[str, Tensor]:
    """The tensors of one layer in MLX's layout; what was done is noted in the report."""
    groups = affine_groups(layer)
    if groups is not None and groups.permutation is None:
        converted = in_mlx_format(layer, report.dtype)
        format = {"group_size": converted.group_size, "bits": converted.bits, "mode": "affine"}
        packed = converted[:3]
        report.rounding = max(report.rounding, rounding(layer, report.dtype))
    else:
        if requantize is None:
            reason = "act-order spreads its groups" if groups else "its groups are no runs of 32, 64 or 128 inputs"
            raise ValueError(
                f"[convert] {reason}, which MLX checkpoints cannot express; requantize={{'bits': 8, 'group_size': 32}} "
                "quantizes such layers anew, with a small loss"
            )
        values = values_of(layer)
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


def check_that_it_loads(directory: Path, op: str) -> None:
    """Raises ValueError, naming `op`, if Transformers knows the model, and the written tensors are not those that it
    wants."""
    try:
        check_checkpoint(Checkpoint.at(directory))
    except ValueError as error:
        message = str(error).removeprefix(f"[from_pretrained] {directory}: ")
        raise ValueError(f"[{op}] the converted checkpoint would not load: {message}") from error


def _mlx_config(config: Mapping[str, Any], report: ConversionReport, stored: _StoredTensors) -> dict[str, Any]:
    """config.json with the record of formats in MLX's place and words."""
    foreign = ("quantization_config", "compression_config", "torch_dtype", "dtype")
    result = {name: value for name, value in config.items() if name not in foreign}
    result["dtype"] = short_name(report.dtype)
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
