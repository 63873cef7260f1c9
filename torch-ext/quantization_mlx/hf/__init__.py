"""Transformers, PEFT and accelerate: what replacing layers of their models takes, and a module for each subject."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..checkpoint.record import MARLIN_METHOD, MARLIN_RECORD, MLX_METHOD
from ..nn.module import PackedModule
from ..quantization.replacement import integrations
from . import compat
from .experts import fuse, unfuse


@contextmanager
def _around_surgery(model: nn.Module) -> Iterator[None]:
    compat.adapt_accelerate()
    unfuse(model)
    try:
        yield
    finally:
        fuse(model)
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        _forget_format(model)


def _forget_format(model: nn.Module) -> None:
    """What is saved from now on is in floating point."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method in (MLX_METHOD, MARLIN_METHOD):
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        if getattr(config := getattr(module, "config", None), "quantization_config", None) == MARLIN_RECORD:
            del config.quantization_config


integrations.append(_around_surgery)
