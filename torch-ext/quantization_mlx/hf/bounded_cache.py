"""A cache that keeps no more than so many positions, for long answers in little memory."""

import functools
from typing import Any

import torch

from ..optional import PreTrainedModel
from . import compat

KEPT = 4  # first positions, never dropped: attention needs them most


def bounded_cache(model: PreTrainedModel, size: int) -> dict[str, Any]:
    """The option of `model.generate` that bounds its cache, as `max_kv_size` does in mlx_lm.

    A prompt is attended to as a whole. From then on, each new token sees the first 4 positions and the size - 4 latest
    ones, its own among them; positions keep their numbers.

    Raises:
        ValueError: size is not above 4, or the model has layers that do not attend to all positions.
    """
    if size <= KEPT:
        raise ValueError(f"[bounded_cache] size is {size!r}; it must be above {KEPT}")
    compat.check("bounded_cache")
    from transformers.cache_utils import Cache, DynamicCache

    usual = DynamicCache(config=model.config).layers
    if other := sorted({type(layer).__name__ for layer in usual} - {"DynamicLayer"}):
        raise ValueError(
            f"[bounded_cache] {type(model).__name__} has layers that do not attend to all positions, "
            f"with a cache of their own: {', '.join(other)}"
        )
    name = compat.cache_name(type(model).forward)
    return {name: Cache(layers=[_layer_class()(size) for _ in usual])}


@functools.cache
def _layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class BoundedLayer(DynamicLayer):
        """Keys and values [batch, heads, at most size, head_dim]."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size
            self.seen = 0  # positions so far, kept or not

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            count = key_states.shape[-2]
            if self.seen and count == 1:  # drops a position first
                self._keep(self.size - 1)
            self.seen += count
            return super().update(key_states, value_states, *args, **kwargs)

        def _keep(self, count: int) -> None:
            """The first positions and the latest ones, `count` in all."""
            if self.keys.shape[-2] > count:
                self.keys, self.values = (
                    torch.cat([states[..., :KEPT, :], states[..., KEPT - count :, :]], -2)
                    for states in (self.keys, self.values)
                )

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            held = 0 if not self.seen else self.keys.shape[-2]
            if held and query_length == 1:
                held = min(held, self.size - 1)
            return held + query_length, self.seen - held

        def get_seq_length(self) -> int:
            return self.seen

    return BoundedLayer
