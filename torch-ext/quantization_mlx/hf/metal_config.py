"""Models between the `MetalConfig` of Transformers and the MLX format.

Both pack affine weights alike. `MetalConfig` names the offsets `qbiases`, has one format of 2, 4 or 8 bits for all of a
model, and leaves embeddings, and heads tied to them, in floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..messages import listed
from ..nn.conv1d import conv1d_of
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLinear
from ..nn.module import QuantizedModule
from ..nn.obstacles import move_hooks
from . import compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BITS = (2, 4, 8)


def metal_to_mlx(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the layers of a model with `MetalConfig` those of this package, on the same tensors; returns it.

    `save_checkpoint`, or `save_pretrained` after `patch_transformers()`, then writes an MLX checkpoint.

    Args:
        model: changed in place.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model has no quantized layers of `MetalConfig`, or a group_size that MLX does not know.
    """
    compat.require("transformers")
    compat.check("metal_to_mlx")
    from transformers.integrations.metal_quantization import MetalLinear

    if not _convert(model, lambda path, layer: _mlx_linear(layer) if isinstance(layer, MetalLinear) else None):
        raise ValueError("[metal_to_mlx] the model has no quantized layers of MetalConfig")
    model.hf_quantizer.remove_quantization_config(model)
    return model


def mlx_to_metal(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the quantized layers of `model` those of `MetalConfig`, on the same tensors; returns it.

    Quantized embeddings, and heads that are tied to them, are dequantized: `MetalConfig` has no others.
    `save_pretrained` then writes a checkpoint that Transformers loads with `MetalConfig`.

    Args:
        model: changed in place, if all its quantized linear layers have one affine format of 2, 4 or 8 bits.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model has no quantized layers, or ones that `MetalConfig` cannot have; the message names them.
    """
    compat.require("transformers")
    compat.check("metal_to_mlx")
    from transformers import MetalConfig
    from transformers.quantizers.quantizer_metal import MetalHfQuantizer

    quantized = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedModule)}
    tied = {id(layer.weight_packed) for layer in quantized.values() if isinstance(layer, QuantizedEmbedding)}
    linear = {path: layer for path, layer in quantized.items() if id(layer.weight_packed) not in tied}
    scaled = [path for path, layer in quantized.items() if getattr(layer, "scale", 1) != 1]
    formats = {(layer.mode, layer.group_size, layer.bits) for layer in linear.values()}
    strange = [
        path for path, layer in linear.items() if type(layer) is not QuantizedLinear or conv1d_of(layer) is not None
    ] + scaled
    if not linear or strange or len(formats) > 1:
        what = f"layers of other kinds: {listed(strange)}" if strange else f"the formats {sorted(formats)}"
        raise ValueError(f"[mlx_to_metal] MetalConfig has linear layers of one format, and this model has {what}")
    ((mode, group_size, bits),) = formats
    if mode != "affine" or bits not in _BITS:
        raise ValueError(
            f"[mlx_to_metal] mode {mode!r} with {bits!r} bits is not supported by MetalConfig; it takes 'affine' with "
            f"bits of {list(_BITS)}"
        )
    dense: dict[int, nn.Parameter] = {}  # floating-point weights by the ids of packed ones

    def convert(path: str, layer: nn.Module) -> nn.Module | None:
        if path in linear:
            return _metal_linear(layer)
        return _dense(layer, dense) if path in quantized else None

    _convert(model, convert)
    plain = [path for path, layer in model.named_modules() if type(layer) is nn.Linear]
    config = MetalConfig(bits=bits, group_size=group_size, modules_to_not_convert=plain)
    model.hf_quantizer = MetalHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def _convert(model: nn.Module, convert: Callable[[str, Any], nn.Module | None]) -> int:
    """Puts what `convert` makes of a layer in its place; returns of how many."""
    made = {path: new for path, layer in model.named_modules() if (new := convert(path, layer)) is not None}
    for path, layer in made.items():
        replaced = model.get_submodule(path)
        move_hooks(replaced, layer)
        model.set_submodule(path, layer.train(replaced.training))
    return len(made)


def _mlx_linear(layer: Any) -> QuantizedLinear:
    options = {"group_size": layer.group_size, "bits": layer.bits, "device": "meta"}
    made = QuantizedLinear(layer.in_features, layer.out_features, bias=False, **options)
    made.weight, made.bias = layer.weight, layer.bias
    for name, tensor in (("scales", layer.scales), ("biases", layer.qbiases)):
        setattr(made, name, nn.Parameter(tensor.detach(), requires_grad=False))
    return made


def _metal_linear(layer: QuantizedLinear) -> nn.Module:
    from transformers.integrations.metal_quantization import MetalLinear

    with torch.device("meta"):
        made = MetalLinear(layer.in_features, layer.out_features, bits=layer.bits, group_size=layer.group_size)
    made.weight, made.scales, made.qbiases = layer.weight_packed, layer.scales, layer.biases
    made.bias = layer.bias
    return made


def _dense(layer: QuantizedEmbedding | QuantizedLinear, known: dict[int, nn.Parameter]) -> nn.Module:
    """The layer in floating point; layers with one packed weight go on sharing."""
    made = layer.dequantize()
    made.weight = known.setdefault(id(layer.weight_packed), made.weight)
    if isinstance(layer, QuantizedLinear):
        made.bias = layer.bias
    return made
