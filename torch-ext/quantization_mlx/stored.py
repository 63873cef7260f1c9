"""What an MLX checkpoint says about itself: the record of formats in config.json and the headers of its weight files.

The tensors of a model are those that its `model*.safetensors` files hold. The index is not read: it may be stale, and
it may name files outside of the directory. Here stored tensors are judged, all together and before any is loaded; they
are described by tensors on the meta device.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compat import TESTED, check_version
from .modules import SUPPORTED, complete_format

Format = dict[str, Any]  # keyword arguments group_size, bits and mode of the quantized modules

RECORDS = ("quantization", "quantization_config")  # the names under which config.json has the formats
MLX_METHOD = "mlx"  # the quantizer of MLX's formats by its name in Transformers
MARLIN_METHOD = "quantization_mlx_marlin"  # that of Marlin's formats
# What config.json has as quantization_config beside weights of Marlin. Transformers refuses what has no `quant_method`,
# where it would pass over a method that it does not know and make random layers.
MARLIN_RECORD = {"format": "marlin"}
MARLIN_FILE = "quantization_config.json"  # has the layers of Marlin, beside the weights
WEIGHT_FILES = "model*.safetensors"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
_SHOWN_NAMES = 8  # as many tensor names as an error message lists

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def require(name: str, extra: str = "transformers") -> Any:
    """Imports an optional package, which `extra` of this package has.

    Raises:
        ImportError: it is not installed, and then the message names the extra, or older than what is supported.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f'this needs the package {package}: pip install "quantization-mlx[{extra}]"') from error
    if name in TESTED:
        check_version(name)
    return module


# The record of formats


def find_record(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record of formats in the content of an MLX checkpoint's config.json; None if it is none, or of another kind.

    MLX writes it twice, and without the `quant_method` that Transformers' formats have.
    """
    name, record = next(((name, config[name]) for name in RECORDS if config.get(name)), ("", None))
    if not isinstance(record, Mapping) or record.get("quant_method", MLX_METHOD) != MLX_METHOD:
        return None
    return record if name == "quantization" or record.keys() & {"quant_method", "group_size", "bits"} else None


def other_method(config: Mapping[str, Any]) -> str | None:
    """The name of the method by which a checkpoint is quantized if that is not MLX's; `config` as in `find_record`."""
    record = next(filter(None, map(config.get, RECORDS)), None)
    if record is None or find_record(config) is not None:
        return None
    if record == MARLIN_RECORD:
        return MARLIN_METHOD
    return record.get("quant_method", "unknown") if isinstance(record, Mapping) else str(record)


def own_method(config: Mapping[str, Any]) -> str | None:
    """The name of this package's quantizer in Transformers that loads a checkpoint, None for a checkpoint of another
    kind; `config` as in `find_record`."""
    if find_record(config) is not None:
        return MLX_METHOD
    return MARLIN_METHOD if other_method(config) == MARLIN_METHOD else None


def entry_format(entry: Mapping[str, Any]) -> Format:
    """The format of an entry of the record, which may have other keys and lack these.

    Raises:
        ValueError: the format is not supported.
    """
    return complete_format(entry.get("group_size"), entry.get("bits"), entry.get("mode") or "affine")


def stored_format(
    path: str, layer: nn.Module, record: Mapping[str, Any], stored: Mapping[str, torch.Tensor]
) -> Format | None:
    """The format of one layer of a checkpoint, in floating point still, as `format_of_tensors` finds it."""
    return format_of_tensors(path, layer.weight.shape[-1], record, stored)


def format_of_tensors(
    path: str, columns: int | None, record: Mapping[str, Any], stored: Mapping[str, torch.Tensor]
) -> Format | None:
    """The format of one layer of a checkpoint, None if it is not quantized.

    An entry of the record decides, which may be false; else the layer is quantized if its scales are stored, and then
    the shapes tell more than the record's default: mixed checkpoints exist that have no entry for their exceptions.

    Args:
        path: of the layer, in the record and in the names of the tensors.
        columns: of the layer's weight in floating point. None if they are not known: of the formats that the shapes
            allow, the record's default is then taken for granted.
        record: the record of formats.
        stored: the tensors, which may be on the meta device.

    Raises:
        ValueError: the entry's format is not supported, or the columns are not known and the shapes allow several
            formats.
    """
    entry = record.get(path)
    if isinstance(entry, Mapping):
        return entry_format(entry)
    scales, weight = stored.get(f"{path}.scales"), stored.get(f"{path}.weight")
    if entry is False or (scales is None and entry is None):
        return None
    default = entry_format(record)
    if scales is None or weight is None or 0 in (scales.ndim, scales.numel(), weight.ndim):
        return default
    formats = [
        {"group_size": group_size, "bits": bits, "mode": mode}
        for mode, (group_sizes, widths) in SUPPORTED.items()
        for group_size in group_sizes
        for bits in widths
        if (mode == "affine") == scales.is_floating_point()
        and weight.shape[-1] * 32 == scales.shape[-1] * group_size * bits
        and columns in (None, scales.shape[-1] * group_size)
    ]
    if default in formats or not formats:
        return default
    if len(formats) > 1:
        raise ValueError(f"{path}: its tensors have the shapes of several formats, {listed(list(map(str, formats)))}")
    return formats[0]


# Weight files


def weight_files(directory: Path, op: str = "from_pretrained") -> list[Path]:
    """The files that hold the tensors.

    Raises:
        FileNotFoundError: there are none; the message begins with the name of `op`.
    """
    files = sorted(directory.glob(WEIGHT_FILES))
    if not files:
        raise FileNotFoundError(f"[{op}] {directory} has no {WEIGHT_FILES}")
    return files


def is_mlx_directory(directory: Path, op: str = "from_pretrained") -> bool:
    """Whether MLX wrote the files: config.json has a record of formats, or else the first weight file says so.

    Raises:
        ValueError: config.json or that file is damaged; the message begins with the name of `op`.
    """
    config = read_config(directory, op)
    if config is None:
        return False
    if find_record(config) is not None:
        return True
    first = next(iter(sorted(directory.glob(WEIGHT_FILES))), None)
    return first is not None and (_open(first, op).metadata() or {}).get("format") == "mlx"


def read_config(directory: Path, op: str = "from_pretrained") -> dict[str, Any] | None:
    """The content of config.json, None if there is none.

    Raises:
        ValueError: it is no JSON object; the message begins with the name of `op`.
    """
    file = directory / "config.json"
    return read_json(file, op) if file.exists() else None


def has_tokenizer(directory: Path) -> bool:
    """Whether any file of a tokenizer is there: of some models, Transformers would make one without a vocabulary."""
    return any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES)


def read_json(file: Path, op: str = "from_pretrained") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is no JSON object; the message begins with the name of `op`.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[{op}] {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"[{op}] {file} is not a JSON object")
    return content


def read_headers(files: Iterable[Path], op: str = "from_pretrained") -> dict[str, torch.Tensor]:
    """The tensors of the files, by name, without their values: on the meta device.

    Raises:
        ValueError: a file is damaged or no safetensors file, has a dtype that is not known, or repeats a tensor; the
            message begins with the name of `op`.
    """
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        opened = _open(file, op)
        names = list(opened.keys())
        if twice := sorted(stored.keys() & set(names)):
            raise ValueError(f"[{op}] {file} repeats tensors of another file: {listed(twice)}")
        for name in names:
            header = opened.get_slice(name)
            if (dtype := _DTYPES.get(header.get_dtype())) is None:
                raise ValueError(f"[{op}] {file}: {name} has the unsupported dtype {header.get_dtype()}")
            stored[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return stored


def _open(file: Path, op: str = "from_pretrained") -> Any:
    safetensors = require("safetensors")
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"[{op}] {file} is damaged or no safetensors file: {error}") from error


# Judgement


def judge(
    model: nn.Module,
    stored: Mapping[str, torch.Tensor],
    source: str,
    may_be_missing: Iterable[str] = (),
    exact: Iterable[str] = (),
    op: str = "from_pretrained",
) -> None:
    """Compares the stored tensors with those that the model wants, which must be exactly these.

    Args:
        model: its quantized layers are in place.
        stored: on the meta device, by their names in the model.
        source: what an error message names as the checkpoint.
        may_be_missing: names of tensors that come from elsewhere.
        exact: names of tensors that may not even be of another floating-point dtype.
        op: what an error message begins with.

    Raises:
        ValueError: tensors are missing, unknown, or of another shape or kind of dtype; the message names them.
    """
    wanted: dict[torch.Tensor, list[str]] = {}  # several names where parameters are shared
    for name, placeholder in model.state_dict(keep_vars=True).items():
        wanted.setdefault(placeholder, []).append(name)
    names = {name for aliases in wanted.values() for name in aliases}
    excused, strict = set(may_be_missing), set(exact)
    missing = [aliases[0] for aliases in wanted.values() if aliases[0] not in stored and aliases[0] not in excused]
    unexpected = [name for name in stored if name not in names]
    wrong = [
        f"{name} is {_described(stored[name])} and should be {_described(placeholder)}"
        for placeholder, aliases in wanted.items()
        for name in aliases
        if name in stored and not _fits(stored[name], placeholder, name in strict)
    ]
    faults = [
        f"{fault}: {listed(found)}"
        for fault, found in (("missing tensors", missing), ("unexpected tensors", unexpected), ("wrong tensors", wrong))
        if found
    ]
    if faults:
        raise ValueError(f"[{op}] {source}: {'; '.join(faults)}")


def listed(names: list[str]) -> str:
    """The first few names, for an error message."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _fits(tensor: torch.Tensor, placeholder: torch.Tensor, exact: bool) -> bool:
    both_float = tensor.is_floating_point() and placeholder.is_floating_point()
    same_kind = tensor.dtype == placeholder.dtype or (both_float and not exact)
    return same_kind and tensor.shape == placeholder.shape


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
