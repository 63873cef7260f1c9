"""GPT-2: in an MLX checkpoint all names begin with "model", where Transformers has "transformer" or nothing, and the
weights of `Conv1D` layers are transposed. A checkpoint with Transformers' names has Transformers' layout.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.conv1d import is_conv1d
from .family import Family

_PREFIX = "model"


class GPT2(Family):
    def prefix(self, model: nn.Module) -> str:
        return _PREFIX

    def stored_name(self, model: nn.Module, name: str) -> str:
        own = "" if model.base_model is model else f"{model.base_model_prefix}."
        return f"{_PREFIX}.{name.removeprefix(own)}" if name.startswith(own) else name

    def stored_tensors(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        transposed = {f"{path}.weight" for path, layer in model.named_modules() if is_conv1d(layer)}
        return {self.stored_name(model, name): each.T if name in transposed else each for name, each in tensors.items()}

    def complete_config(self, config: dict[str, Any]) -> None:
        config["n_ctx"] = config["n_positions"]
