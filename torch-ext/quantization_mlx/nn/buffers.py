"""Buffers with spare capacity, into which keys and values of new tokens are written where they stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Buffers:
    """Tensors [..., capacity, n], as of keys and of values, whose first `length` positions are taken.

    buffers: None before `hold` has made them.
    """

    buffers: tuple[Tensor, ...] | None = None
    length: int = 0

    @property
    def capacity(self) -> int:
        return 0 if self.buffers is None else self.buffers[0].shape[-2]

    def hold(self, parts: Sequence[Tensor], capacity: int) -> None:
        """Copies these parts [..., positions, n] into new buffers: parts of two sizes, as of latent attention, into
        one, side by side."""
        length = parts[0].shape[-2]
        sizes = [part.shape[-1] for part in parts]
        if len(parts) == 2 and sizes[0] != sizes[1]:
            buffers = parts[0].new_empty(*parts[0].shape[:-2], capacity, sum(sizes)).split(sizes, -1)
        else:
            buffers = tuple(part.new_empty(*part.shape[:-2], capacity, part.shape[-1]) for part in parts)
        for buffer, part in zip(buffers, parts, strict=True):
            buffer[..., :length, :] = part
        self.buffers, self.length = buffers, length

    def held(self) -> list[Tensor]:
        """Views [..., length, n] of the positions that are taken."""
        return [buffer.narrow(-2, 0, self.length) for buffer in self.buffers]

    def write(self, parts: Sequence[Tensor]) -> None:
        """Copies parts of new tokens, for which there is room, behind what is held; `advance` counts them."""
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer.narrow(-2, self.length, part.shape[-2]).copy_(part)

    def advance(self, tokens: int) -> None:
        """So many positions of the buffers have been written."""
        self.length += tokens

    def keep(self, length: int) -> None:
        """Forgets all but the first so many positions."""
        self.length = min(self.length, length)


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """The two along their last dimension: a view where `Buffers` hold them so, else a copy."""
    together = (
        not torch.compiler.is_compiling()  # a graph has no addresses
        and first.storage_offset() + first.shape[-1] == second.storage_offset()
        and first.stride() == second.stride()
        and first.stride(-1) == 1
        and first.stride(-2) >= first.shape[-1] + second.shape[-1]
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    )
    if not together:
        return torch.cat((first, second), -1)
    return first.as_strided((*first.shape[:-1], first.shape[-1] + second.shape[-1]), first.stride())
