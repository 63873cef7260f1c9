"""The keys and values of tokens that a model has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..formats import FLOATS
from ..nn.buffers import Buffers
from .functions import check_size


@runtime_checkable
class KVCacheTorch(Protocol):
    """What `generate` asks of a cache."""

    @property
    def seq_len(self) -> int:
        """How many positions are taken."""

    @property
    def max_seq_len(self) -> int | None:
        """How many there are; None where their number is not limited."""

    def advance(self, num_tokens: int = 1) -> None:
        """Every layer has written the keys and values of so many new tokens."""

    def reset(self) -> None:
        """Forgets all positions."""


@dataclass
class MetalKVCacheConfig:
    """The sizes of a `MetalKVCache`.

    num_layers: of the model.
    num_kv_heads, head_dim: of the keys and values of a layer. The cache of latent attention (`MetalMLAAttention`) has
        one head of kv_lora_rank elements, the latent vectors, and v_head_dim = qk_rope_head_dim.
    max_seq_len: positions, for which room is made at once.
    dtype: float16, bfloat16 or float32: keys and values are rounded to it. That of the model is the fastest.
    v_head_dim: of values; None for head_dim.
    device: None for that of the first keys of each layer.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    dtype: torch.dtype = torch.float16
    v_head_dim: int | None = None
    device: torch.device | str | None = None


class MetalKVCache:
    """Keys [batch_size, num_kv_heads, max_seq_len, head_dim] and values of all layers, written in place.

    In a forward pass each layer calls `update`, which does not move the position; after the last layer whoever called
    the model calls `advance`. Attention to a cache of another dtype than the activations computes in the dtype that
    both promote to, and returns that of the activations. Magnitudes beyond 65504 are infinite in float16, the default.

    Args:
        config: the sizes.
        batch_size: texts side by side, of one length.

    Raises:
        TypeError: config is none, a size is no whole number, or dtype is not supported.
        ValueError: a size is less than 1.
    """

    def __init__(self, config: MetalKVCacheConfig, batch_size: int = 1) -> None:
        op = "MetalKVCache"
        if not isinstance(config, MetalKVCacheConfig):
            raise TypeError(f"[{op}] config is of type {type(config).__name__}; it must be a MetalKVCacheConfig")
        if config.dtype not in FLOATS:
            raise TypeError(f"[{op}] dtype is {config.dtype}; supported are {', '.join(map(str, FLOATS))}")
        values_dim = config.head_dim if config.v_head_dim is None else config.v_head_dim
        for name in ("num_layers", "num_kv_heads", "head_dim", "max_seq_len"):
            check_size(op, name, getattr(config, name), 1)
        check_size(op, "v_head_dim", values_dim, 1)
        check_size(op, "batch_size", batch_size, 1)
        self.config, self.batch_size = config, batch_size
        self._dims = config.head_dim, values_dim
        self._seq_len = 0
        self._layers = [Buffers() for _ in range(config.num_layers)]
        for layer in self._layers if config.device is not None else ():
            self._reserve(layer, torch.device(config.device))

    @property
    def seq_len(self) -> int:
        """The positions that are taken, by which `advance` was called."""
        return self._seq_len

    @property
    def max_seq_len(self) -> int:
        """How many positions there are."""
        return self.config.max_seq_len

    def update(self, layer_idx: int, k_new: Tensor, v_new: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys [batch_size, num_kv_heads, S, head_dim] and values [..., v_head_dim] of S new tokens behind the
        `seq_len` positions that are taken, which stay so many until `advance`.

        Returns:
            Keys and values [batch_size, num_kv_heads, seq_len + S, ...] of all positions, of the cache's dtype: views
            of its memory.

        Raises:
            IndexError: there is no such layer.
            TypeError: what is given is no tensor of a floating-point dtype.
            ValueError: shapes or devices do not fit, there is no room for the tokens, which leaves the cache as it was,
                the layer has not been given the tokens before, or gradients are to be computed.
        """
        op = "MetalKVCache.update"
        if not 0 <= layer_idx < len(self._layers):
            raise IndexError(f"[{op}] layer_idx is {layer_idx}; the cache has {len(self._layers)} layers")
        layer, taken = self._layers[layer_idx], self._seq_len
        self._check_new(op, k_new, v_new)
        self._check_room(op, k_new.shape[-2])
        if layer.length < taken:
            raise ValueError(
                f"[{op}] layer {layer_idx} holds {layer.length} of the {taken} positions that are taken; every layer "
                "must be updated before the cache is advanced"
            )
        if layer.buffers is None:
            self._reserve(layer, k_new.device)
        for name, new in (("k_new", k_new), ("v_new", v_new)):
            if new.device != layer.buffers[0].device:
                raise ValueError(
                    f"[{op}] {name} is on {new.device}, and layer {layer_idx} of the cache on {layer.buffers[0].device}"
                )
        layer.keep(taken)
        layer.write((k_new, v_new))
        layer.advance(k_new.shape[-2])
        keys, values = layer.held()
        return keys, values

    def advance(self, num_tokens: int = 1) -> None:
        """Takes the positions of so many tokens, which every layer has written.

        Raises:
            TypeError, ValueError: num_tokens is no whole number, or negative, or there are not so many positions.
        """
        op = "MetalKVCache.advance"
        check_size(op, "num_tokens", num_tokens)
        self._check_room(op, num_tokens)
        self._seq_len += num_tokens

    def reset(self) -> None:
        """Forgets all positions; the memory stays for other texts."""
        self._seq_len = 0
        for layer in self._layers:
            layer.keep(0)

    def _reserve(self, layer: Buffers, device: torch.device) -> None:
        """Makes room for all positions at once."""
        sizes = self.batch_size, self.config.num_kv_heads, 0
        with torch.inference_mode(False):  # else only code under inference_mode could write to them
            empty = [torch.empty(*sizes, dim, dtype=self.config.dtype, device=device) for dim in self._dims]
            layer.hold(empty, self.max_seq_len)

    def _check_new(self, op: str, k_new: Tensor, v_new: Tensor) -> None:
        new = {"k_new": k_new, "v_new": v_new}
        for (name, tensor), dim in zip(new.items(), self._dims, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"[{op}] {name} is of type {type(tensor).__name__}; it must be a tensor")
            if tensor.dtype not in FLOATS:
                raise TypeError(f"[{op}] {name} has dtype {tensor.dtype}; supported are {', '.join(map(str, FLOATS))}")
            tokens = k_new.shape[-2] if k_new.dim() == 4 else "tokens"
            if [*tensor.shape] != [self.batch_size, self.config.num_kv_heads, tokens, dim]:
                raise ValueError(
                    f"[{op}] {name} has shape {list(tensor.shape)}; with batch_size = {self.batch_size}, num_kv_heads "
                    f"= {self.config.num_kv_heads} and heads of {dim} elements it must be [{self.batch_size}, "
                    f"{self.config.num_kv_heads}, {tokens}, {dim}]"
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"[{op}] {name} requires a gradient, which does not pass a cache: call this under torch.no_grad(), "
                    "or without a cache"
                )

    def _check_room(self, op: str, tokens: int) -> None:
        if self._seq_len + tokens > self.max_seq_len:
            raise ValueError(
                f"[{op}] {tokens} more positions are asked for, and {self._seq_len} of max_seq_len = "
                f"{self.max_seq_len} are taken"
            )

    def __repr__(self) -> str:
        return f"MetalKVCache({self.config}, batch_size={self.batch_size}, seq_len={self.seq_len})"
