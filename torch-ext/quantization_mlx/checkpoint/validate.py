"""Stored tensors are compared with those of the model, all together and before any is loaded."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..messages import listed, short_name


def check_tensors(
    model: nn.Module,
    stored: Mapping[str, torch.Tensor],
    source: str,
    may_be_missing: Iterable[str] = (),
    exact: Iterable[str] = (),
    op: str = "from_pretrained",
) -> None:
    """Compares the stored tensors, by their names in the model, with those that the model wants, whose quantized layers
    are in place. They must be exactly these, but for those that `may_be_missing` because they come from elsewhere, and
    those in `exact` may not even be of another floating-point dtype. Raises ValueError for tensors that are missing,
    unknown, or of another shape or kind of dtype; the message names them, `op`, and `source` as the checkpoint."""
    wanted: dict[torch.Tensor, list[str]] = {}  # parameter -> its names
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


def _fits(tensor: torch.Tensor, placeholder: torch.Tensor, exact: bool) -> bool:
    both_float = tensor.is_floating_point() and placeholder.is_floating_point()
    same_kind = tensor.dtype == placeholder.dtype or (both_float and not exact)
    return same_kind and tensor.shape == placeholder.shape


def _described(tensor: torch.Tensor) -> str:
    return f"{short_name(tensor.dtype)} {list(tensor.shape)}"
