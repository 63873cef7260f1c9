"""Attention whose keys and values are made of one latent vector for each token, on packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._ops import ops
from ..nn.buffers import side_by_side
from ..nn.obstacles import HOOKS
from ..ops import dequantize
from .cache import MetalKVCache
from .layers import MetalQuantizedLinear, packed_linear
from .origins import check_origin, norm_of, rotary_of
from .parts import (
    MOST_DIM,
    MOST_VALUE_DIM,
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

_quantized_matmul = ops.quantized_matmul.default

_MOST_ABSORBED = 16  # new tokens: of more, expanding the keys is less work


class MetalMLAAttention(nn.Module):
    """Multi-head latent attention as of DeepSeek-V2 and V3 and GLM-4.7-Flash (DeepSeek-AI, arXiv:2405.04434).

    Queries are `q_b_proj(q_a_layernorm(q_a_proj(x)))`, or `q_proj(x)`. `kv_a_proj_with_mqa` gives the latent vector of
    a token, of which `kv_a_layernorm` and `kv_b_proj` make its keys and values, and the part of the keys that is
    rotated, one for all heads. A cache holds these two. All projections are `MetalQuantizedLinear` layers.

    Up to 16 new tokens attend to the latent vectors themselves: `kv_b_proj` is applied to queries and results.

    Args:
        hidden_size, num_heads: as in `MetalAttention`.
        kv_lora_rank: of the latent vector.
        q_lora_rank: of that of queries; None for `q_proj`.
        qk_rope_head_dim: how many elements of queries and keys are rotated.
        head_dim: of queries and keys; None for hidden_size / num_heads, or for what the two parts sum up to.
        rope_theta, rope_ratio, max_position_embeddings: as in `MetalAttention`.
        bits, group_size: of the projections; group_size divides hidden_size, the ranks and num_heads * v_head_dim.
        bias: whether q_a_proj, kv_a_proj_with_mqa and o_proj have biases.
        qk_nope_head_dim: how many elements of queries and keys are not rotated; None for those that are left.
        v_head_dim: of values; None for head_dim.
        rms_norm_eps: of the norms.
        interleaved: whether neighbours are rotated together, as these models have it, or the elements of two halves.
        scale: of the scores; None for head_dim ** -0.5.
        rotary, device, dtype: as in `MetalAttention`.

    Raises:
        TypeError: a size is no whole number.
        ValueError: sizes do not fit, or bits or group_size is not supported.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kv_lora_rank: int = 512,
        q_lora_rank: int | None = 1536,
        qk_rope_head_dim: int = 64,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
        rope_ratio: float = 1.0,
        max_position_embeddings: int = 4096,
        bits: int = 4,
        group_size: int = 128,
        bias: bool = False,
        *,
        qk_nope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        rms_norm_eps: float = 1e-6,
        interleaved: bool = True,
        scale: float | None = None,
        rotary: Rotary | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_sizes(op, hidden_size=hidden_size, num_heads=num_heads, kv_lora_rank=kv_lora_rank)
        check_sizes(op, qk_rope_head_dim=qk_rope_head_dim, q_lora_rank=1 if q_lora_rank is None else q_lora_rank)
        head_dim = _head_dim(op, hidden_size, num_heads, qk_rope_head_dim, head_dim, qk_nope_head_dim)
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_sizes(op, v_head_dim=v_head_dim)
        check_positive(op, "rms_norm_eps", rms_norm_eps)
        check_heads(op, head_dim, v_head_dim)
        self.hidden_size, self.num_heads, self.head_dim, self.v_head_dim = hidden_size, num_heads, head_dim, v_head_dim
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.qk_nope_head_dim = head_dim - qk_rope_head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        check_positive(op, "scale", self.scale)
        make = Projections(op, bits, group_size, device, dtype).linear
        for_norm = rms_norm_eps, device, dtype
        if q_lora_rank is None:
            self.q_proj = make("q_proj", hidden_size, num_heads * head_dim)
            self.q_a_proj = self.q_a_layernorm = self.q_b_proj = None
        else:
            self.q_proj = None
            self.q_a_proj = make("q_a_proj", hidden_size, q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, *for_norm)
            self.q_b_proj = make("q_b_proj", q_lora_rank, num_heads * head_dim)
        self.kv_a_proj_with_mqa = make("kv_a_proj_with_mqa", hidden_size, kv_lora_rank + qk_rope_head_dim, bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, *for_norm)
        self.kv_b_proj = make("kv_b_proj", kv_lora_rank, num_heads * (self.qk_nope_head_dim + v_head_dim))
        self.o_proj = make("o_proj", num_heads * v_head_dim, hidden_size, bias)
        described = op, qk_rope_head_dim, rope_theta, rope_ratio, max_position_embeddings, interleaved
        self.rotary = new_rotary(*described) if rotary is None else rotary

    @property
    def cache_sizes(self) -> dict[str, int]:
        """What `MetalKVCacheConfig` is told of such a layer."""
        return {"num_kv_heads": 1, "head_dim": self.kv_lora_rank, "v_head_dim": self.qk_rope_head_dim}

    @classmethod
    def from_float(cls, module: nn.Module, bits: int = 4, group_size: int = 128) -> MetalMLAAttention:
        """Quantizes the attention of a DeepSeek-V3 or GLM-4.7-Flash model of Transformers, which shares nothing with
        the result but layers that are packed already.

        Raises:
            TypeError, ValueError: as `MetalAttention.from_float`.
        """
        op = f"{cls.__name__}.from_float"
        check_origin(op, module, "latent attention")
        interleaved = bool(module.config.rope_interleave)
        made = cls(
            module.config.hidden_size,
            module.num_heads,
            module.kv_lora_rank,
            module.q_lora_rank,
            module.qk_rope_head_dim,
            bits=bits,
            group_size=group_size,
            qk_nope_head_dim=module.qk_nope_head_dim,
            v_head_dim=module.v_head_dim,
            scale=module.scaling,
            rotary=rotary_of(op, module, module.o_proj.weight.device, interleaved),
            device="meta",
        )
        for name, layer in made.named_children():
            if isinstance(layer, MetalQuantizedLinear):
                setattr(made, name, packed_linear(getattr(module, name), bits, group_size))
            elif isinstance(layer, RMSNorm):
                setattr(made, name, norm_of(op, getattr(module, name)))
        return made.train(module.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        kv_cache: MetalKVCache | None = None,
        layer_idx: int = 0,
    ) -> Tensor:
        """As `MetalAttention.forward`. The cache has one head, of kv_lora_rank elements as keys and of qk_rope_head_dim
        as values (`cache_sizes`)."""
        op = type(self).__name__
        check_hidden_states(op, hidden_states, self.hidden_size)
        batch, tokens, _ = hidden_states.shape
        first = taken_positions(op, kv_cache)
        self.rotary.check_positions(op, first, tokens)
        q = self._queries(hidden_states).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        q, q_turned = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        latent, k_turned = (
            self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        )
        latent = self.kv_a_layernorm(latent)
        q_turned, k_turned = self.rotary(q_turned, first), self.rotary(k_turned, first)
        if kv_cache is not None:
            latent, k_turned = kv_cache.update(layer_idx, latent, k_turned)
        form = self._absorbed if self._absorbs(tokens) else self._expanded
        y = form(op, q, q_turned, latent, k_turned, attention_mask)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(hidden_states.dtype))

    def _queries(self, hidden_states: Tensor) -> Tensor:
        if self.q_proj is not None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def _absorbs(self, tokens: int) -> bool:
        """Whether so many new tokens attend to latent vectors, which takes the place of calling `kv_b_proj`."""
        layer = self.kv_b_proj
        is_plain = type(layer) is MetalQuantizedLinear and layer.bias is None and "forward" not in vars(layer)
        fits = self.kv_lora_rank <= MOST_VALUE_DIM and self.kv_lora_rank + self.qk_rope_head_dim <= MOST_DIM
        return tokens <= _MOST_ABSORBED and fits and is_plain and not any(getattr(layer, table) for table in HOOKS)

    def _expanded(
        self, op: str, q: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention to the keys and values [B, num_heads, keys, ...] that the latent vectors stand for."""
        latent = latent.to(torch.promote_types(q.dtype, latent.dtype))
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        k, v = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split(sizes, -1)
        k = torch.cat((k, k_turned.to(k.dtype).expand(-1, self.num_heads, -1, -1)), -1)
        return attend(op, torch.cat((q, q_turned), -1), k, v, self.scale, mask)

    def _absorbed(
        self, op: str, q: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention to the latent vectors: the product of a query with the keys is that of another query with these."""
        batch, _, tokens, _ = q.shape
        words, scales, *format = self.kv_b_proj.packed()
        # Packed along the rank, which runs over the keys' matrix [rank, n] but is what its transpose is to give.
        (k_words, v_words), (k_scales, v_scales) = self._by_head(words.view(torch.int32)), self._by_head(scales)
        group_size, bits, mode = format[1:]
        keys = dequantize(k_words, k_scales, None, group_size, bits, mode, dtype=q.dtype)
        q = torch.bmm(_heads_first(q), keys.mT).unflatten(1, (batch, tokens)).transpose(0, 1)
        y = attend(op, torch.cat((q, q_turned), -1), side_by_side(latent, k_turned), latent, self.scale, mask)
        y = _quantized_matmul(_heads_first(y), v_words, v_scales, None, False, group_size, bits, mode)
        return y.unflatten(1, (batch, tokens)).transpose(0, 1)

    def _by_head(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of keys and of values in a table [rows, num_heads * both] of kv_b_proj: [num_heads, rows, n]."""
        keys, values = (
            table.unflatten(-1, (self.num_heads, -1))
            .transpose(0, 1)
            .split([self.qk_nope_head_dim, self.v_head_dim], -1)
        )
        return keys, values

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kv_lora_rank={self.kv_lora_rank}, qk_nope_head_dim={self.qk_nope_head_dim}, "
            f"qk_rope_head_dim={self.qk_rope_head_dim}, v_head_dim={self.v_head_dim}"
        )


def _head_dim(op: str, hidden_size: int, num_heads: int, rotated: int, head_dim: int | None, others: int | None) -> int:
    """Of queries and keys. Raises ValueError unless it has room for the elements that are rotated and further ones."""
    if head_dim is None:
        head_dim = size_of_heads(op, hidden_size, num_heads) if others is None else rotated + others
    check_sizes(op, head_dim=head_dim, qk_nope_head_dim=1 if others is None else others)
    if head_dim <= rotated or (others is not None and head_dim != rotated + others):
        raise ValueError(
            f"[{op}] head_dim is {head_dim}, qk_rope_head_dim {rotated} and qk_nope_head_dim {others}; the first is "
            "the sum of the others"
        )
    return head_dim


def _heads_first(x: Tensor) -> Tensor:
    """[B, heads, S, n] as [heads, B * S, n]."""
    return x.transpose(0, 1).flatten(1, 2)
