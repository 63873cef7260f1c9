"""Lists of names and of dtypes in error messages."""

from typing import Any

_SHOWN_NAMES = 8


def listed(names: list[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def short_name(of_torch: Any) -> str:
    """Of a dtype or a layout: "float32" for torch.float32."""
    return str(of_torch).removeprefix("torch.")
