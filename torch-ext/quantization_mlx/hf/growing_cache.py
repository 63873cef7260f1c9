"""A cache's layer in buffers with spare capacity, into which ops write keys and values of new tokens."""

from functools import cache as memoized
from typing import Any

from torch import Tensor

from ..nn.buffers import Buffers
from . import compat

SPARE_POSITIONS = 256  # of a new buffer, beyond what it has to hold


class GrowingLayer(Buffers):
    """What the class of a cache's layer has in front, to hold keys and values in buffers that grow by doubling.

    While there are `buffers` [batch, heads, capacity, head_dim], of keys and of values, `keys` and `values` are views
    of what is taken of them. Who assigns to either ends that.
    """

    packed_format: tuple[int, int] | None = None  # group size and bits, where the buffers are packed

    def reserve(self, tokens: int, sizes: tuple[int, int, int, int], like: Tensor) -> tuple[Tensor, ...]:
        """The buffers, with room for so many more positions.

        sizes: batch, heads and head_dim of keys and of values, of new buffers. These have the dtype and the device of
            `like`.
        """
        length = self.get_seq_length()
        if self.buffers is None or length + tokens > self.capacity:
            batch, heads, *dims = sizes
            parts = self._parts() if length else [like.new_empty(batch, heads, 0, dim) for dim in dims]
            self.hold(parts, max(2 * self.capacity, length + tokens + SPARE_POSITIONS))
            self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        return self.buffers

    def _parts(self) -> list[Tensor]:
        """What is held, [..., positions, n] each."""
        return self._states if self.buffers is None else self.held()

    def fits(self, batch: int, like: Tensor) -> bool:
        """Whether what is held is of this batch, and of the dtype and the device of `like`."""
        if self.get_seq_length() == 0:
            return True
        states = (self._states if self.buffers is None else self.buffers)[0]
        return states.shape[0] == batch and states.dtype == like.dtype and states.device == like.device

    def _state(self, which: int) -> Tensor | None:
        return self._states[which] if self.buffers is None else self.buffers[which].narrow(2, 0, self.length)

    def _assign(self, which: int, state: Tensor | None) -> None:
        if self.buffers is not None:
            self._states = [self._state(0), self._state(1)]
            self.buffers = None
        self._states[which] = state

    keys = property(lambda self: self._state(0), lambda self, state: self._assign(0, state))
    values = property(lambda self: self._state(1), lambda self, state: self._assign(1, state))

    def crop(self, tokens_to_remove: int) -> None:
        if self.buffers is None or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            self.keep(max(self.length + tokens_to_remove, 0))

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.buffers is None else self.length


@memoized
def _growing(kind: type) -> type:
    """The class of a layer that holds all positions, with GrowingLayer in front."""
    return type(kind.__name__, (GrowingLayer, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def growing_layer(cache: Any, index: int) -> GrowingLayer | None:
    """The cache's layer, replaced by a growing one where it is not; None where it holds anything else than all
    positions of a text in one piece."""
    layers = getattr(cache, "layers", ())
    if index >= len(layers):
        return None
    layer = layers[index]
    if isinstance(layer, GrowingLayer):
        return layer
    kind = compat.holds_all_positions(layer)
    if kind is None:
        return None
    growing = object.__new__(_growing(kind))
    state = {name: value for name, value in vars(layer).items() if name in compat.CACHE_STATE}
    growing.__dict__.update(state, _states=[layer.keys, layer.values])
    layers[index] = growing
    return growing
