"""GPT-2's linear layers: Transformers' `Conv1D` holds its weight as [in_features, out_features], MLX the other way.

A quantized layer in the place of a `Conv1D` has the rows of MLX.
"""

import torch
from torch import nn

from .obstacles import copy_hooks


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is the `Conv1D` of Transformers, a linear layer whose weight is [in_features, out_features]."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def conv1d_of(layer: nn.Module) -> type[nn.Module] | None:
    """The class `Conv1D` if the layer has taken the place of one."""
    return getattr(layer, "conv1d_class", None)


def as_linear(layer: nn.Module) -> nn.Module:
    """For a `Conv1D`, an `nn.Linear` on its transposed weight and its bias, which are not copied, with its hooks; any
    other layer as it is."""
    if not is_conv1d(layer):
        return layer
    in_features, out_features = layer.weight.shape
    linear = nn.Linear(in_features, out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    linear.conv1d_class = type(layer)
    copy_hooks(layer, linear)
    return linear.train(layer.training)


def as_conv1d(linear: nn.Module) -> nn.Module:
    """For an `nn.Linear` that stands for a `Conv1D`, that, with its hooks; any other layer as it is."""
    if (conv1d := conv1d_of(linear)) is None:
        return linear
    with torch.device("meta"):
        layer = conv1d(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=linear.weight.requires_grad)
    layer.bias = linear.bias
    copy_hooks(linear, layer)
    return layer.train(linear.training)


def place_linear(model: nn.Module) -> None:
    """Puts an `nn.Linear` in the place of each `Conv1D` of `model`, for tensors that lie as MLX has them."""
    for path, layer in list(model.named_modules()):
        if path and is_conv1d(layer):
            model.set_submodule(path, as_linear(layer))


def finish_conv1d(model: nn.Module) -> None:
    """Puts a `Conv1D` in the place of each floating-point layer that stands for one."""
    for path, layer in list(model.named_modules()):
        if path and type(layer) is nn.Linear and conv1d_of(layer) is not None:
            model.set_submodule(path, as_conv1d(layer))
