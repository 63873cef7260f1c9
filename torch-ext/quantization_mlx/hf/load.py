"""MLX checkpoint directories into Transformers models."""

import os

import torch

from ..checkpoint.read import Checkpoint, reading_once
from ..checkpoint.record import other_method
from ..nn.warm_up import warm_up
from ..optional import PreTrainedModel
from . import compat
from .patch import mark_as_mlx, patched_transformers


def load_checkpoint(
    directory: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Reads an MLX checkpoint as a Transformers model in eval mode.

    It is what `AutoModelForCausalLM.from_pretrained(directory)` does after `patch_transformers()`, without patching
    beyond this call, and as strict with checkpoints that are not quantized.

    A layer is quantized if config.json has an entry for it that is not false, or else if its scales are stored. The
    index is not consulted: the tensors are those that the `model*.safetensors` files hold. The model is built without
    memory for its floating-point weights.

    Args:
        directory: holds config.json and the weights.
        device: where the model is put; the CPU if None.
        dtype: what floating-point tensors are converted to; None takes that of the first one stored.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ImportError: transformers or safetensors is not installed.
        ValueError: the checkpoint is of another kind, or lacks tensors, or has unknown or damaged ones, or ones of a
            wrong shape or dtype, or scales that are not finite numbers; the message names them.
    """
    transformers = compat.require("transformers")
    with reading_once(), patched_transformers():
        checkpoint = Checkpoint.at(directory)
        if checkpoint.config is None:
            raise FileNotFoundError(f"[load_checkpoint] {directory} has no config.json")
        if (method := other_method(checkpoint.config)) is not None:
            raise ValueError(f"[load_checkpoint] {directory} is quantized by {method!r}, which is not the MLX format")
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        mark_as_mlx(config, always=True)
        if dtype is None:
            dtypes = (tensor.dtype for tensor in checkpoint.tensors().values() if tensor.is_floating_point())
            dtype = next(dtypes, None)
        options = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    if device is not None:
        model.to(device)
        warm_up(model)
    return model
