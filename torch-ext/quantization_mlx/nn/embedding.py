"""Embeddings on packed tables, and the factors by which some models scale their rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .._ops import ops
from .module import QuantizedModule

# Called with all arguments: the fastest way from Python into the dispatcher.
_dequantize = ops.dequantize.default


def row_scale(layer: nn.Module) -> float | None:
    """The factor between the rows that an embedding looks up and what comes out of it.

    That is 1 for `nn.Embedding`, and the square root of the width or the like for what Transformers calls a
    ScaledWordEmbedding. None for any other layer: it may do something else to its rows.
    """
    if type(layer) is nn.Embedding:
        return 1.0
    if not isinstance(layer, nn.Embedding) or not type(layer).__name__.endswith("ScaledWordEmbedding"):
        return None
    # Where embed_scale is a buffer, its value is lost on the meta device; scalar_embed_scale has it.
    scale = getattr(layer, "scalar_embed_scale", getattr(layer, "embed_scale", None))
    return float(scale) if isinstance(scale, (int, float)) else None


@cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return torch.tensor(scale, dtype=dtype).item()


class ScaledWordEmbedding(nn.Embedding):
    """`nn.Embedding` whose rows are multiplied by `embed_scale`, rounded to their dtype, as those of Gemma are.

    Args:
        num_embeddings, embedding_dim: the two sizes; there is no memory for the weight.
        embed_scale: the factor.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim, device="meta")
        self.embed_scale = embed_scale

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return super().forward(indices) * _rounded(self.embed_scale, self.weight.dtype)


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """`torch.nn.Embedding` on a packed table; only the rows that are looked up are dequantized.

    Args:
        num_embeddings, embedding_dim: the two sizes; embedding_dim is a multiple of group_size.
        group_size, bits, mode: the format, as in QuantizedLinear.
        device, dtype: where the parameters live, and the dtype of the rows that come out.
        scale: what the rows are multiplied by, rounded to their dtype, as Gemma does; `as_linear` leaves it out.

    Raises:
        TypeError: a size is no whole number.
        ValueError: the format is not supported, or embedding_dim does not divide into groups.
    """

    # Options of nn.Embedding, all off.
    padding_idx = max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = sparse = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), group_size, bits, mode, device, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.scale = scale
        self._is_scaled = scale != 1  # torch.compile treats a float attribute as dynamic

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedEmbedding:
        """Quantizes `embedding`; hooks are copied.

        Raises:
            TypeError: it is of a subclass of `nn.Embedding` that may do more than scale its rows.
            ValueError: an option or a state of it, such as `max_norm`, cannot be kept.
        """
        if row_scale(embedding) is None:
            raise TypeError(f"[QuantizedEmbedding] {type(embedding).__name__} may do more than look up and scale rows")
        return cls.quantized("from_embedding", embedding, None, group_size=group_size, bits=bits, mode=mode)

    @classmethod
    def shell(cls, layer: nn.Embedding, dtype: torch.dtype | None = None, **format: Any) -> QuantizedEmbedding:
        sizes = layer.num_embeddings, layer.embedding_dim
        return cls(*sizes, **format, device="meta", dtype=dtype, scale=row_scale(layer))

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A floating-point layer with the values of `weight`, of its dtype or this one."""
        sizes = self.num_embeddings, self.embedding_dim
        layer = ScaledWordEmbedding(*sizes, self.scale) if self._is_scaled else nn.Embedding(*sizes, device="meta")
        layer.weight = self.values(dtype)
        return layer.train(self.training)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices of any shape, int32 or int64, -> indices.shape + [embedding_dim].

        Raises:
            IndexError: an index is negative or not below num_embeddings (on the CPU).
            NotImplementedError: `torch.jit.trace`, which cannot record that words are seen as int32.
        """
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "[QuantizedEmbedding] torch.jit.trace is not supported; supported are torch.export and torch.compile"
            )
        flat = indices.reshape(-1)
        # Torch cannot gather uint32 rows on the CPU; int32 has the same bits.
        words = F.embedding(flat, self.weight_packed.view(torch.int32))
        scales = F.embedding(flat, self.scales)
        biases = None if self.biases is None else F.embedding(flat, self.biases)
        dtype = self.weight_dtype if self.biases is None else None
        rows = _dequantize(words, scales, biases, self.group_size, self.bits, self.mode, None, dtype)
        if self._is_scaled:
            rows = rows * _rounded(self.scale, rows.dtype)
        return rows.view(*indices.shape, self.embedding_dim)

    def as_linear(self, x: torch.Tensor) -> torch.Tensor:
        """The table as an output head: x [..., embedding_dim] -> [..., num_embeddings]."""
        return self.multiply(x)

    def extra_repr(self) -> str:
        scale = f", scale={self.scale:.6g}" if self.scale != 1 else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}{scale}"
