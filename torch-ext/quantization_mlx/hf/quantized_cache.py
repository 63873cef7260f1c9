"""A cache whose keys and values are packed in MLX's affine format, for long texts in little memory."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..formats import MLX_MODES
from ..ops import dequantize, quantize
from ..optional import PreTrainedModel
from . import compat
from .growing_cache import SPARE_POSITIONS, GrowingLayer

BITS = (4, 8)
_KNOWN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


def quantized_cache(model: PreTrainedModel, *, bits: int = 8, group_size: int = 64, start: int = 0) -> dict[str, Any]:
    """The option of `model.generate`, and of `forward`, that quantizes its cache, as mlx_lm does for `kv_bits`,
    `kv_group_size` and `quantized_kv_start`.

    >>> model.generate(**inputs, **quantized_cache(model, bits=8))

    Keys and values are kept as they are until a forward pass ends with `start` positions or more: then all of them are
    quantized, head by head, and from then on new ones as they come. So a first prompt is attended to in floating point.
    A prepared model reads the packed cache in its attention op; other models, and other forward passes, dequantize it
    for each layer. A layer with a sliding window keeps all positions.

    Args:
        model: any causal language model whose cache holds keys and values of one head size.
        bits: 4 or 8.
        group_size: 32, 64 or 128 elements of a head that share a scale and a bias; it divides the head size.
        start: positions from which on the cache is quantized; 0 stands for the end of the first forward pass.

    Returns:
        A new `Cache` of Transformers, by its name in this version. It serves one text, or one batch of them, at a time.

    Raises:
        ImportError: transformers is older than the tested versions, or lacks a name that is needed.
        ValueError: bits, group_size or start is not supported, or the model has layers with a cache of another kind, or
            heads whose size group_size does not divide.
    """
    _check_format(bits, group_size, start)
    compat.check("quantized_cache")
    from transformers.cache_utils import Cache, DynamicCache

    config = model.config.get_text_config(decoder=True)
    usual = DynamicCache(config=config).layers
    if other := sorted({type(layer).__name__ for layer in usual} - set(_KNOWN_LAYERS)):
        raise ValueError(
            f"[quantized_cache] {type(model).__name__} has layers with a cache of their own, which is not quantized: "
            f"{', '.join(other)}"
        )
    _check_heads(model, config, group_size)
    name = compat.cache_name(type(model).forward)
    return {name: Cache(layers=[_layer_class()(bits, group_size, start) for _ in usual])}


def _check_format(bits: int, group_size: int, start: int) -> None:
    sizes = MLX_MODES["affine"].group_sizes
    if bits not in BITS:
        raise ValueError(f"[quantized_cache] bits is {bits!r}; supported are 4 and 8")
    if group_size not in sizes:
        raise ValueError(
            f"[quantized_cache] group_size is {group_size!r}; supported are {', '.join(map(str, sorted(sizes)))}"
        )
    if start < 0:
        raise ValueError(f"[quantized_cache] start is {start!r}; it must be at least 0")


def _check_heads(model: PreTrainedModel, config: Any, group_size: int) -> None:
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"[quantized_cache] {type(model).__name__} has keys and values of different head sizes, whose cache is not "
            "quantized"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % group_size != 0:
        raise ValueError(
            f"[quantized_cache] {type(model).__name__} has heads of size {size}, which are no whole groups of "
            f"{group_size} elements"
        )


@functools.cache
def _layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class QuantizedLayer(GrowingLayer, DynamicLayer):
        """Keys and values [batch, heads, positions, head_dim]; once packed, in `buffers` [2, batch, heads, capacity,
        n] of words, scales and biases, keys first."""

        def __init__(self, bits: int, group_size: int, start: int) -> None:
            self._states = [None, None]
            super().__init__()
            self.format = (group_size, bits)
            self.start = start
            self.packed_format: tuple[int, int] | None = None  # of the buffers

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """What a model's own code calls: the result is in floating point."""
            if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
                raise ValueError(
                    "[quantized_cache] gradients do not pass a quantized cache; run the model under torch.no_grad(), "
                    "or with use_cache=False"
                )
            if self.packed_format is None:
                states = super().update(key_states, value_states, *args, **kwargs)
                self._pack_from_start_on()
                return states
            tokens = key_states.shape[-2]
            batch, heads, _, head_dim = key_states.shape
            self.reserve(tokens, (batch, heads, head_dim, head_dim), key_states)
            self.write(self._packed(key_states, value_states))
            self.length += tokens
            return self._state(0), self._state(1)

        def advance(self, tokens: int) -> None:
            super().advance(tokens)
            self._pack_from_start_on()

        def _packed(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if keys.shape != values.shape:
                raise ValueError(
                    f"[quantized_cache] keys of shape {list(keys.shape)} and values of shape {list(values.shape)} must "
                    "have one shape"
                )
            words, scales, biases = quantize(torch.stack([keys, values]), *self.format)
            return words.view(torch.int32), scales, biases

        def _pack_from_start_on(self) -> None:
            length = self.get_seq_length()
            if self.packed_format is not None or length < max(self.start, 1):
                return
            self.hold(self._packed(self._state(0), self._state(1)), length + SPARE_POSITIONS)
            self._states, self.packed_format = [None, None], self.format

        def fits(self, batch: int, like: Tensor) -> bool:
            if self.packed_format is None:
                return super().fits(batch, like)
            _, scales, _ = self.buffers
            return scales.shape[1] == batch and scales.dtype == like.dtype and scales.device == like.device

        def _state(self, which: int) -> Tensor | None:
            if self.packed_format is None:
                return super()._state(which)
            parts = (buffer[which].narrow(-2, 0, self.length) for buffer in self.buffers)
            return dequantize(*parts, *self.packed_format)

        def _assign(self, which: int, state: Tensor | None) -> None:
            super()._assign(which, state)
            self.packed_format = None

        # What Transformers would do by way of `keys` and `values`, which would be rounded once more when packed again.

        def _select(self, select: Any) -> None:
            self.buffers = tuple(select(buffer) for buffer in self.buffers)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if self.packed_format is None:
                return super().reorder_cache(beam_idx)
            return self._select(lambda buffer: buffer.index_select(1, beam_idx.to(buffer.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.packed_format is None:
                return super().batch_repeat_interleave(repeats)
            return self._select(lambda buffer: buffer.repeat_interleave(repeats, dim=1))

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.packed_format is None:
                return super().batch_select_indices(indices)
            return self._select(lambda buffer: buffer[:, indices])

        def reset(self) -> None:
            self._states, self.buffers, self.length, self.packed_format = [None, None], None, 0, None
            super().reset()

    return QuantizedLayer
