"""The modes of quantized matrices and their formats, as the library's table has them (csrc/formats.h)."""

import json
from dataclasses import dataclass
from typing import Any

import torch

from ._ops import ops

Format = dict[str, Any]  # group_size, bits and mode, as keyword arguments

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of activations and of weights to quantize


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    Attributes:
        name: the argument `mode` of ops and layers.
        packing: "rows", as in MLX, or "columns", as in Marlin.
        element: what a code stands for before it is scaled: "integer", "e2m1" or "e4m3".
        scale: the type of scales: "real" (any of float32, float16 and bfloat16), "float16", "e8m0" or "e4m3".
        offset: what a group has beside its scale: "biases", "zeros" or "none".
        group_sizes, bits: those that it knows, the default first.
    """

    name: str
    packing: str
    element: str
    scale: str
    offset: str
    group_sizes: tuple[int, ...]
    bits: tuple[int, ...]


def _mode(row: dict[str, Any]) -> Mode:
    def default_first(key: str, default: int) -> tuple[int, ...]:
        return default, *(value for value in row.pop(key) if value != default)

    group_sizes = default_first("group_sizes", row.pop("default_group_size"))
    return Mode(group_sizes=group_sizes, bits=default_first("widths", row.pop("default_bits")), **row)


# In the order of their numbers in the library.
MODES = {row["name"]: _mode(row) for row in json.loads(ops._modes())}
MLX_MODES = {name: mode for name, mode in MODES.items() if mode.packing == "rows"}
MARLIN_MODES = {name: mode for name, mode in MODES.items() if mode.packing == "columns"}


def complete_format(group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> Format:
    """The keyword arguments group_size, bits and mode of a format, with the mode's defaults for what is None. Raises
    ValueError if the mode is unknown, or does not know the group_size or the bits."""
    if not isinstance(mode, str) or mode not in MLX_MODES:
        raise ValueError(f"mode {mode!r} is not supported; supported are {', '.join(MLX_MODES)}")
    known = MLX_MODES[mode]
    format = {
        "group_size": known.group_sizes[0] if group_size is None else group_size,
        "bits": known.bits[0] if bits is None else bits,
        "mode": mode,
    }
    if not _is_one_of(format["group_size"], known.group_sizes) or not _is_one_of(format["bits"], known.bits):
        raise ValueError(
            f"mode {mode!r} with group_size {format['group_size']!r} and bits {format['bits']!r} is not supported; "
            f"it takes a group_size of {sorted(known.group_sizes)} and bits of {sorted(known.bits)}"
        )
    return format


def format_name(group_size: int, bits: int, mode: str) -> str:
    return f"{mode}, {bits} bits, group_size {group_size}"


def _is_one_of(value: Any, supported: tuple[int, ...]) -> bool:
    """Whether it is one of these whole numbers, and not only equal to one, as 64.0 is."""
    return value in supported and not isinstance(value, float)
