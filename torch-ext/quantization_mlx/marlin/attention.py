"""Attention with several heads, on packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache import MetalKVCache
from .layers import packed_linear
from .origins import check_origin, norm_of, rotary_of, window_of
from .parts import (
    Projections,
    RMSNorm,
    Rotary,
    attend,
    check_heads,
    check_hidden_states,
    check_positive,
    check_sizes,
    new_rotary,
    size_of_heads,
    taken_positions,
)


class MetalAttention(nn.Module):
    """Attention with rotary embeddings, whose projections are `MetalQuantizedLinear` layers: `q_proj`, `k_proj`,
    `v_proj` and `o_proj`.

    Heads are rotated as Transformers does it for Llama: element i with element i + head_dim / 2.

    Args:
        hidden_size: of hidden states.
        num_heads, num_kv_heads: heads of queries, and of keys and values (None for as many), which divide those.
        head_dim: even; None for hidden_size / num_heads.
        bits, group_size: of the projections, as in `MetalQuantizedLinear`; group_size divides hidden_size and
            num_heads * head_dim.
        rope_theta, rope_ratio: the base of the frequencies, and what positions are multiplied by.
        max_position_embeddings: how many positions there are.
        bias: whether the projections have biases.
        out_bias: whether o_proj has one; None for `bias`.
        qk_norm: whether each head of queries and keys is normalised before it is rotated, by `q_norm` and `k_norm`.
        rms_norm_eps: of these.
        scale: of the scores; None for head_dim ** -0.5.
        window: a query sees the last so many keys up to its own; None for all.
        rotary: in the place of what rope_theta, rope_ratio and max_position_embeddings describe.
        device, dtype: where the parameters live, and the dtype of norms and biases.

    Raises:
        TypeError: a size is no whole number.
        ValueError: sizes do not fit, or bits or group_size is not supported.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bits: int = 4,
        group_size: int = 128,
        rope_theta: float = 10000.0,
        rope_ratio: float = 1.0,
        max_position_embeddings: int = 4096,
        bias: bool = False,
        *,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        rms_norm_eps: float = 1e-6,
        scale: float | None = None,
        window: int | None = None,
        rotary: Rotary | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(op, hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"[{op}] num_heads is {num_heads}, which is no multiple of num_kv_heads, {num_kv_heads}")
        head_dim = size_of_heads(op, hidden_size, num_heads) if head_dim is None else head_dim
        check_sizes(op, head_dim=head_dim, window=1 if window is None else window)
        check_heads(op, head_dim, head_dim)
        check_positive(op, "rms_norm_eps", rms_norm_eps)
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.window = head_dim, window
        self.scale = head_dim**-0.5 if scale is None else scale
        check_positive(op, "scale", self.scale)
        make = Projections(op, bits, group_size, device, dtype).linear
        self.q_proj = make("q_proj", hidden_size, num_heads * head_dim, bias)
        self.k_proj = make("k_proj", hidden_size, num_kv_heads * head_dim, bias)
        self.v_proj = make("v_proj", hidden_size, num_kv_heads * head_dim, bias)
        self.o_proj = make("o_proj", num_heads * head_dim, hidden_size, bias if out_bias is None else out_bias)
        self.q_norm = RMSNorm(head_dim, rms_norm_eps, device, dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, rms_norm_eps, device, dtype) if qk_norm else None
        described = op, head_dim, rope_theta, rope_ratio, max_position_embeddings
        self.rotary = new_rotary(*described) if rotary is None else rotary

    @property
    def cache_sizes(self) -> dict[str, int]:
        """What `MetalKVCacheConfig` is told of such a layer."""
        return {"num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim, "v_head_dim": self.head_dim}

    @classmethod
    def from_float(cls, module: nn.Module, bits: int = 4, group_size: int = 128) -> MetalAttention:
        """Quantizes the attention of a Llama, Mistral, Qwen2, Qwen3, SmolLM3, Mixtral or Qwen3-MoE model of
        Transformers, which shares nothing with the result but layers that are packed already.

        Raises:
            TypeError: it is none of these, or has a forward of its own.
            ValueError: bits or group_size is not supported, or its rotary embedding depends on the length of the text,
                or it has hooks, or a layer cannot be quantized.
        """
        op = f"{cls.__name__}.from_float"
        check_origin(op, module, "attention")
        config, weight = module.config, module.q_proj.weight
        made = cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            module.head_dim,
            bits,
            group_size,
            scale=module.scaling,
            window=window_of(module),
            rotary=rotary_of(op, module, weight.device),
            device="meta",
        )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(made, name, packed_linear(getattr(module, name), bits, group_size))
        if hasattr(module, "q_norm"):
            made.q_norm, made.k_norm = norm_of(op, module.q_norm), norm_of(op, module.k_norm)
        return made.train(module.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        kv_cache: MetalKVCache | None = None,
        layer_idx: int = 0,
    ) -> Tensor:
        """Attention of S new tokens to themselves and to those that the cache holds.

        Args:
            hidden_states: [B, S, hidden_size], float32, float16 or bfloat16.
            attention_mask: None for causal, also behind the tokens of a cache. [B, keys], of bool or of 0 and 1 as
                tokenizers give it, hides padding as well. Otherwise it is the whole mask, which broadcasts to [B,
                num_heads, S, keys]: of bool, True for the keys that a query sees, or floating point that is added to
                the scores. Keys are those of the cache and the new ones; a token that sees none gets zeros.
            kv_cache: its layer `layer_idx` is given the new keys and values. Whoever calls the model advances it.

        Returns:
            [B, S, hidden_size], of the dtype of hidden_states.

        Raises:
            IndexError: the cache has no layer `layer_idx`.
            TypeError: a dtype is not supported, or kv_cache is no cache.
            ValueError: shapes or devices do not fit, or there is no room for the tokens in the cache or in
                max_position_embeddings.
        """
        op = type(self).__name__
        check_hidden_states(op, hidden_states, self.hidden_size)
        batch, tokens, _ = hidden_states.shape
        first = taken_positions(op, kv_cache)
        self.rotary.check_positions(op, first, tokens)
        q, k, v = (
            projection(hidden_states).view(batch, tokens, heads, self.head_dim)
            for projection, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.rotary(q.transpose(1, 2), first), self.rotary(k.transpose(1, 2), first), v.transpose(1, 2)
        if kv_cache is not None:
            k, v = kv_cache.update(layer_idx, k, v)
        y = attend(op, q, k, v, self.scale, attention_mask, self.window)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(hidden_states.dtype))

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}{window}"
