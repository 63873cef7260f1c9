"""Floating-point models again: the way back from quantized layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .checkpoint import replace_layers
from .experts import QuantizedSwitchLinear, SwitchLinear, fuse
from .modules import QuantizedEmbedding, QuantizedLinear, _QuantizedModule
from .ops import dequantize
from .stored import listed


class ScaledWordEmbedding(nn.Embedding):
    """`nn.Embedding` whose rows are multiplied by `embed_scale`, rounded to their dtype, as Gemma does."""

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self.embed_scale = embed_scale

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices of any shape, int32 or int64, -> indices.shape + [embedding_dim]."""
        rows = super().forward(indices)
        return rows * torch.tensor(self.embed_scale, dtype=rows.dtype, device=rows.device)


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Puts floating-point layers in the place of the quantized ones of `model`, one after the other; returns the model.

    The weights are those that the packed ones stand for, rounded to `dtype`. Layers that share a packed weight share
    the floating-point one. Experts of Transformers get their fused parameters back. A layer by itself is not changed;
    what takes its place is returned.

    Args:
        model: with layers of `quantize_model` or of an MLX checkpoint.
        dtype: of the weights; None takes that of affine scales, and in other modes that of the layer's or the model's
            floating-point parameters (bfloat16 where there are none).

    Raises:
        ValueError: the model has no quantized layers, or experts in blocks, as gpt-oss stores them.
    """
    quantized = {path: module for path, module in model.named_modules() if isinstance(module, _QuantizedModule)}
    if not quantized:
        raise ValueError(f"[dequantize_model] {type(model).__name__} has no quantized layers")
    if blocks := [path for path in quantized if path.endswith("experts.gate_up_proj")]:
        raise ValueError(f"[dequantize_model] experts in blocks are not supported: {listed(blocks)}")
    others = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    common = next(others, torch.bfloat16)

    def choose(holders: Mapping[str, nn.Module]) -> bool | None:
        return True if isinstance(next(iter(holders.values())), _QuantizedModule) else None

    def convert(layer: _QuantizedModule, _: bool) -> nn.Module:
        return float_layer(layer, float_weight(layer, dtype or dtype_of(layer, common)))

    def tie(layer: _QuantizedModule, twin: nn.Module) -> nn.Module:
        return float_layer(layer, twin.weight)

    model = replace_layers(model, choose, convert, tie)
    fuse(model)
    _forget_formats(model)
    return model


def dtype_of(layer: _QuantizedModule, common: torch.dtype) -> torch.dtype:
    """The dtype in which a layer's weight was floating-point, as far as it tells; else `common`."""
    if layer.mode == "affine":
        return layer.scales.dtype
    if isinstance(layer, QuantizedEmbedding):
        return layer._like.dtype
    return common if layer.bias is None else layer.bias.dtype


def float_weight(layer: _QuantizedModule, dtype: torch.dtype) -> nn.Parameter:
    """What the packed weight stands for."""
    held = layer.weight, layer.scales, layer.biases
    return nn.Parameter(dequantize(*held, layer.group_size, layer.bits, layer.mode, dtype=dtype).detach())


def float_layer(layer: _QuantizedModule, weight: nn.Parameter) -> nn.Module:
    """A layer that does in floating point what `layer` does."""
    made: nn.Module
    if isinstance(layer, QuantizedSwitchLinear):
        made = SwitchLinear(weight, layer.bias)
        made._origin = {}  # of parameters of its own, and not of fused ones
    elif isinstance(layer, QuantizedLinear):
        made = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
        made.bias = layer.bias
    elif layer.scale != 1:
        made = ScaledWordEmbedding(layer.num_embeddings, layer.embedding_dim, layer.scale, device="meta")
    else:
        made = nn.Embedding(layer.num_embeddings, layer.embedding_dim, device="meta")
    made.weight = weight
    return made.train(layer.training)


def _forget_formats(model: nn.Module) -> None:
    """Takes back what Transformers noted about the quantized layers, and what prepare_for_generation joined."""
    for module in model.modules():
        if hasattr(module, "join_projections"):
            module.join_projections()
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in [name for name in tied if name.rpartition(".")[2] in ("scales", "biases")]:
        del tied[name]
