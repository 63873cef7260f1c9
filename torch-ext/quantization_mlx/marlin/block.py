"""A layer of a decoder on packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import MetalAttention
from .cache import MetalKVCache
from .latent_attention import MetalMLAAttention
from .mixture import MetalMoELayer
from .mlp import MetalMLP
from .origins import check_origin, is_origin, norm_of
from .parts import RMSNorm, check_hidden_states, check_positive, check_sizes


class MetalTransformerBlock(nn.Module):
    """A decoder's layer: ``h = x + self_attn(input_layernorm(x))``, and ``h + mlp(post_attention_layernorm(h))``.

    Args:
        hidden_size, num_heads, num_kv_heads: of `self_attn`, a `MetalAttention`.
        intermediate_size: of `mlp`, a `MetalMLP`.
        bits, group_size: of all projections, as in `MetalQuantizedLinear`.
        rms_norm_eps: of the norms.
        rope_theta, rope_ratio, max_position_embeddings: as in `MetalAttention`.
        self_attn, mlp: in the place of those that the sizes describe, such as a `MetalMLAAttention` or a
            `MetalMoELayer`.
        device, dtype: where the parameters live, and the dtype of the norms.

    Raises:
        TypeError: a size is no whole number.
        ValueError: sizes do not fit, or bits or group_size is not supported.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        num_kv_heads: int | None = None,
        bits: int = 4,
        group_size: int = 128,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_ratio: float = 1.0,
        max_position_embeddings: int = 4096,
        *,
        self_attn: MetalAttention | MetalMLAAttention | None = None,
        mlp: MetalMLP | MetalMoELayer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_sizes(op, hidden_size=hidden_size, num_heads=num_heads, intermediate_size=intermediate_size)
        check_positive(op, "rms_norm_eps", rms_norm_eps)
        place = {"device": device, "dtype": dtype}
        packed = {"bits": bits, "group_size": group_size, **place}
        if self_attn is None:
            rope = rope_theta, rope_ratio, max_position_embeddings
            self_attn = MetalAttention(hidden_size, num_heads, num_kv_heads, None, bits, group_size, *rope, **place)
        elif (self_attn.hidden_size, self_attn.num_heads) != (hidden_size, num_heads):
            raise ValueError(
                f"[{op}] hidden_size is {hidden_size} and num_heads {num_heads}, and those of self_attn are "
                f"{self_attn.hidden_size} and {self_attn.num_heads}"
            )
        if mlp is None:
            mlp = MetalMLP(hidden_size, intermediate_size, **packed)
        self.hidden_size = hidden_size
        self.input_layernorm = RMSNorm(hidden_size, rms_norm_eps, **place)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(hidden_size, rms_norm_eps, **place)
        self.mlp = mlp

    @classmethod
    def from_float(cls, module: nn.Module, bits: int = 4, group_size: int = 128) -> MetalTransformerBlock:
        """Quantizes a decoder's layer of a Llama, Mistral, Qwen2, Qwen3, SmolLM3, Mixtral, Qwen3-MoE, DeepSeek-V3 or
        GLM-4.7-Flash model of Transformers, which shares nothing with the result but layers that are packed already.

        Raises:
            TypeError, ValueError: as `MetalAttention.from_float` and `MetalMLP.from_float`.
        """
        op = f"{cls.__name__}.from_float"
        check_origin(op, module, "layer")
        kind = MetalMLAAttention if is_origin(module.self_attn, "latent attention") else MetalAttention
        attention = kind.from_float(module.self_attn, bits, group_size)
        kind = MetalMoELayer if is_origin(module.mlp, "mixture") else MetalMLP
        mlp = kind.from_float(module.mlp, bits, group_size)
        sizes = attention.hidden_size, attention.num_heads, 1
        made = cls(*sizes, bits=bits, group_size=group_size, self_attn=attention, mlp=mlp, device="meta")
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(made, name, norm_of(op, getattr(module, name)))
        return made.train(module.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        kv_cache: MetalKVCache | None = None,
        layer_idx: int = 0,
    ) -> Tensor:
        """hidden_states [B, S, hidden_size] -> the same shape and dtype; the other arguments, and what is raised, as in
        `MetalAttention.forward`."""
        check_hidden_states(type(self).__name__, hidden_states, self.hidden_size)
        attended = self.self_attn(self.input_layernorm(hidden_states), attention_mask, kv_cache, layer_idx)
        hidden_states, normed = self.post_attention_layernorm.of_sum(attended, hidden_states)
        return hidden_states + self.mlp(normed)
