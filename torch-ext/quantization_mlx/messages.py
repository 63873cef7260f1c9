"""How names, dtypes and tables are shown."""

from collections.abc import Iterable
from typing import Any

_SHOWN_NAMES = 8


def listed(names: list[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def short_name(of_torch: Any) -> str:
    """Of a dtype or a layout: "float32" for torch.float32."""
    return str(of_torch).removeprefix("torch.")


def aligned(rows: Iterable[tuple[str, ...]]) -> list[list[str]]:
    """The cells of a table, those of a column as wide as its widest."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
