"""Quantized models under `torch.nn.parallel.DistributedDataParallel`."""

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def prepare_for_ddp(model: Module) -> Module:
    """Makes `DistributedDataParallel(model)` leave packed weights alone; returns the model.

    At its start, it sends all parameters from the first process to the others, and gloo cannot send uint32. Packed
    words are frozen, and every process has read the same checkpoint.

    Args:
        model: the very module that is then given to `DistributedDataParallel`, with its adapters if it has any.
    """
    packed = [
        name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.dtype == torch.uint32
    ]
    ignored = {*packed, *getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return model
