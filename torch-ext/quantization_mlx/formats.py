"""The formats of MLX checkpoints: what there is, and the defaults of what is left open."""

from __future__ import annotations

from typing import Any

Format = dict[str, Any]  # the keyword arguments group_size, bits and mode of ops and layers

# mode -> (group sizes, bits) that it knows, the default first.
SUPPORTED = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


def complete_format(group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> Format:
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


def format_name(group_size: int, bits: int, mode: str) -> str:
    return f"{mode}, {bits} bits, group_size {group_size}"


def _is_one_of(value: Any, supported: tuple[int, ...]) -> bool:
    """Whether it is one of these whole numbers, and not only equal to one, as 64.0 is."""
    return value in supported and not isinstance(value, float)
