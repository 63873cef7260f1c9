"""What the layers of a decoder have in common: norms, rotary embeddings, masks, and checks of what they are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import fast
from ..formats import FLOATS
from .functions import check_groups, check_size
from .layers import MetalQuantizedLinear, mode_of_bits

MOST_DIM, MOST_VALUE_DIM = 576, 512  # of heads of keys and of values, in the attention op

# Checking


def check_sizes(op: str, **sizes: int) -> None:
    """Raises TypeError unless all are whole numbers, and ValueError if one is less than 1."""
    for name, size in sizes.items():
        check_size(op, name, size, 1)


def check_positive(op: str, name: str, value: float) -> None:
    """Raises TypeError unless it is a number, and ValueError unless it is finite and above 0."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"[{op}] {name} is {value!r}; it must be a number")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"[{op}] {name} is {value!r}; it must be finite and above 0")


def size_of_heads(op: str, hidden_size: int, num_heads: int) -> int:
    """hidden_size / num_heads. Raises ValueError if that is no whole number."""
    if hidden_size % num_heads:
        raise ValueError(f"[{op}] hidden_size is {hidden_size}, which is no multiple of num_heads, {num_heads}")
    return hidden_size // num_heads


def check_heads(op: str, head_dim: int, v_head_dim: int) -> None:
    """Raises ValueError if heads of these sizes are more than the attention op takes."""
    if head_dim > MOST_DIM or v_head_dim > MOST_VALUE_DIM:
        raise ValueError(
            f"[{op}] heads of queries and keys have {head_dim} elements and those of values {v_head_dim}; supported "
            f"are up to {MOST_DIM} and {MOST_VALUE_DIM}"
        )


def check_hidden_states(op: str, hidden_states: Any, hidden_size: int) -> None:
    """Raises TypeError unless it is a floating-point tensor, and ValueError unless it is [B, S, hidden_size]."""
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"[{op}] hidden_states are of type {type(hidden_states).__name__}; they must be a tensor")
    if hidden_states.dim() != 3 or hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"[{op}] hidden_states have shape {list(hidden_states.shape)}; they must be [batch, tokens, {hidden_size}]"
        )
    if hidden_states.dtype not in FLOATS:
        raise TypeError(
            f"[{op}] hidden_states have dtype {hidden_states.dtype}; supported are {', '.join(map(str, FLOATS))}"
        )


def taken_positions(op: str, kv_cache: Any) -> int:
    """How many positions a cache holds; 0 without one. Raises TypeError if it is none."""
    if kv_cache is None:
        return 0
    if not (hasattr(kv_cache, "seq_len") and hasattr(kv_cache, "update")):
        raise TypeError(
            f"[{op}] kv_cache is of type {type(kv_cache).__name__}; it must have seq_len and update, as MetalKVCache"
        )
    return kv_cache.seq_len


# Modules


class Projections(NamedTuple):
    """What the linear layers of a module have in common."""

    op: str
    bits: int
    group_size: int
    device: torch.device | str | None
    dtype: torch.dtype | None

    def linear(self, name: str, in_features: int, out_features: int, bias: bool = False) -> MetalQuantizedLinear:
        """One of them, of zeros; errors carry its name."""
        mode_of_bits(self.op, self.bits, self.group_size)
        check_groups(self.op, f"in_features of {name}", in_features, self.group_size)
        options = {"bias": bias, "device": self.device, "dtype": self.dtype}
        return MetalQuantizedLinear(in_features, out_features, self.bits, self.group_size, **options)


class RMSNorm(nn.Module):
    """`fast.rms_norm` with a `weight` [size], which is rounded to the dtype of activations."""

    def __init__(self, size: int, eps: float, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        return fast.rms_norm(x, self.weight.to(x.dtype), self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual, and its norm."""
        return fast.add_rms_norm(x, residual, self.weight.to(residual.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class Float32Buffers(nn.Module):
    """A module whose floating-point buffers keep their dtype when it changes its own."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class Rotary(Float32Buffers):
    """Rotary position embedding of heads, by `fast.rope`.

    Args:
        dims: how many elements of a head turn; 0 for none.
        max_position_embeddings: how many positions there are.
        base, scale: of the frequencies, and of the positions.
        freqs: float32 [dims / 2] in the place of base: what positions are divided by.
        magnitude: what the elements that turn are multiplied by.
        interleaved: whether neighbours turn together, or the elements of the two halves.
    """

    def __init__(
        self,
        dims: int,
        max_position_embeddings: int,
        base: float | None = 10000.0,
        scale: float = 1.0,
        freqs: Tensor | None = None,
        magnitude: float = 1.0,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.dims, self.max_position_embeddings = dims, max_position_embeddings
        self.base, self.scale = None if freqs is not None else base, scale
        self.register_buffer("freqs", freqs)
        self.magnitude, self.interleaved = magnitude, interleaved

    def check_positions(self, op: str, first: int, tokens: int) -> None:
        """Raises ValueError unless there are all of so many positions from `first` on; the message names `op`."""
        if first + tokens > self.max_position_embeddings:
            raise ValueError(
                f"[{op}] positions {first} to {first + tokens - 1} are asked for; max_position_embeddings is "
                f"{self.max_position_embeddings}"
            )

    def forward(self, heads: Tensor, first: int) -> Tensor:
        """heads [B, ..., S, D] at positions from `first` on."""
        if not self.dims:
            return heads
        options = {"base": self.base, "scale": self.scale, "offset": first, "freqs": self.freqs}
        turned = fast.rope(heads, self.dims, traditional=self.interleaved, **options)
        if self.magnitude == 1:
            return turned
        return torch.cat((turned[..., : self.dims] * self.magnitude, turned[..., self.dims :]), -1)

    def extra_repr(self) -> str:
        kind = f"base={self.base}" if self.freqs is None else "freqs"
        return f"{self.dims}, {kind}, scale={self.scale}, max_position_embeddings={self.max_position_embeddings}"


def new_rotary(
    op: str, dims: int, rope_theta: float, rope_ratio: float, most: int, interleaved: bool = False
) -> Rotary:
    """A `Rotary` of the documented arguments, after checking them."""
    check_positive(op, "rope_theta", rope_theta)
    check_positive(op, "rope_ratio", rope_ratio)
    check_sizes(op, max_position_embeddings=most)
    if dims % 2:
        raise ValueError(f"[{op}] {dims} elements of a head are to be rotated; their number must be even")
    return Rotary(dims, most, rope_theta, rope_ratio, interleaved=interleaved)


# Attention


def attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, window: int | None = None
) -> Tensor:
    """Attention of q [B, heads, S, D] to k and v [B, kv_heads, keys, ...] with the mask that a forward pass was given:
    [B, heads, S, Dv], of the dtype that these promote to."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    visible, window = _visible(op, mask, (*q.shape[:3], k.shape[2]), window, dtype, q.device)
    return fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=visible, window=window)


_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _visible(
    op: str,
    mask: Any,
    scores: tuple[int, int, int, int],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[str | Tensor, int | None]:
    """What `fast.scaled_dot_product_attention` takes as mask, and as window beside that."""
    if mask is None:
        return "causal", window
    if not isinstance(mask, Tensor):
        raise TypeError(f"[{op}] attention_mask is of type {type(mask).__name__}; it must be a tensor")
    if mask.device != device:
        raise ValueError(f"[{op}] attention_mask is on {mask.device} and hidden_states are on {device}")
    batch, _, queries, keys = scores
    is_padding = mask.dim() == 2 and mask.dtype in _INTEGERS
    if not is_padding and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"[{op}] attention_mask has dtype {mask.dtype}{_supported(scores)}")
    shape = tuple(mask.shape)
    # One key for all would be the mask of new tokens alone, beside a cache.
    fits = shape[0] in (1, batch) and shape[1] == keys if is_padding else _broadcasts(shape, scores)
    if not fits:
        raise ValueError(f"[{op}] attention_mask has shape {list(mask.shape)}{_supported(scores)}")
    if not is_padding:
        return (mask if mask.dtype == torch.bool else mask.to(dtype)), None
    of_keys = torch.arange(keys, device=device)
    of_queries = of_keys[keys - queries :, None]
    seen = of_keys <= of_queries
    if window is not None:
        seen &= of_keys > of_queries - window
    return seen & mask.bool()[:, None, None], None


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(size in (1, other) for size, other in pairs)


def _supported(scores: tuple[int, int, int, int]) -> str:
    return (
        f"; supported are bool or integers of [batch, keys] = {[scores[0], scores[3]]}, which hide padding, and bool "
        f"or floating point that broadcasts to [batch, heads, tokens, keys] = {list(scores)}"
    )
