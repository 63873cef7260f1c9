"""The record of formats in config.json: which layers of a checkpoint are quantized, and how."""

from collections.abc import Mapping
from typing import Any

import torch

from ..formats import MLX_MODES, Format, complete_format
from ..messages import listed

RECORDS = ("quantization", "quantization_config")  # keys of the record in config.json
MLX_METHOD = "mlx"  # Transformers' name of the quantizer for MLX's formats
MARLIN_METHOD = "quantization_mlx_marlin"  # and of that for Marlin's
# quantization_config beside Marlin's weights. Without a `quant_method`, Transformers raises; an unknown one it ignores,
# and makes random layers.
MARLIN_RECORD = {"format": "marlin"}
MARLIN_FILE = "quantization_config.json"  # beside the weights; describes Marlin's layers


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
    """The format of an entry of the record, which may have other keys and lack these. Raises ValueError if the format
    is not supported."""
    return complete_format(entry.get("group_size"), entry.get("bits"), entry.get("mode") or "affine")


def format_of_tensors(
    path: str, columns: int | None, record: Mapping[str, Any], stored: Mapping[str, torch.Tensor]
) -> Format | None:
    """The format of one layer of a checkpoint, None if it is not quantized.

    An entry of the record decides, which may be false; else the layer is quantized if its scales are stored, and then
    the shapes tell more than the record's default: mixed checkpoints exist that have no entry for their exceptions.

    Args:
        path: of the layer, in the record and in the names of the tensors, which may be on the meta device.
        columns: of the layer's weight in floating point. None if they are not known: of the formats that the shapes
            allow, the record's default is then taken for granted.

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
        for mode, known in MLX_MODES.items()
        for group_size in known.group_sizes
        for bits in known.bits
        if (known.scale == "real") == scales.is_floating_point()
        and weight.shape[-1] * 32 == scales.shape[-1] * group_size * bits
        and columns in (None, scales.shape[-1] * group_size)
    ]
    if default in formats or not formats:
        return default
    if len(formats) > 1:
        raise ValueError(f"{path}: its tensors have the shapes of several formats, {listed(list(map(str, formats)))}")
    return formats[0]
