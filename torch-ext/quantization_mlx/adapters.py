"""LoRA adapters from directories of PEFT, on models that are quantized or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import compat, peft_integration
from .stored import listed, read_json, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MLX_KEYS = {"fine_tune_type", "lora_parameters", "num_layers"}  # of mlx_lm's adapter_config.json


def load_adapter(model: PreTrainedModel, directory: str | os.PathLike[str]) -> PreTrainedModel:
    """Puts the LoRA adapter that PEFT saved in `directory` onto layers of `model`; returns the model, in eval mode.

    Raises:
        FileNotFoundError: the directory or a file of the adapter is missing.
        ImportError: peft is not installed.
        ValueError: it is an adapter of mlx_lm, or no LoRA adapter, or not one of this model.
    """
    directory = Path(directory)
    config = _read_config(directory)
    peft = require("peft", "train")
    compat.check("load_adapter")
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    patched = peft_integration._is_patched
    peft_integration.patch_peft()
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(directory))
    finally:
        if not patched:
            peft_integration.unpatch_peft()
    result = set_peft_model_state_dict(adapted, load_peft_weights(str(directory), device=str(model.device)))
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        parts = {"missing": missing, "unexpected": result.unexpected_keys}
        faults = "; ".join(f"{what} tensors: {listed(list(names))}" for what, names in parts.items() if names)
        base = config.get("base_model_name_or_path") or "another model"
        raise ValueError(f"[load_adapter] {directory} does not fit this model, it is for {base}: {faults}")
    return adapted.get_base_model().eval()


def _read_config(directory: Path) -> dict:
    if not directory.is_dir():
        raise FileNotFoundError(f"[load_adapter] there is no directory {directory}")
    if not (directory / _CONFIG).is_file():
        raise FileNotFoundError(f"[load_adapter] {directory} has no {_CONFIG} and so is no adapter")
    config = read_json(directory / _CONFIG, "load_adapter")
    if "peft_type" not in config:
        kind = "an adapter of mlx_lm" if config.keys() & _MLX_KEYS else "no adapter of PEFT"
        raise ValueError(f"[load_adapter] {directory} is {kind}; adapters that PEFT saved are supported")
    if config["peft_type"] != "LORA":
        raise ValueError(f"[load_adapter] {directory} is of type {config['peft_type']!r}; supported is 'LORA'")
    if not any((directory / name).is_file() for name in _WEIGHTS):
        raise FileNotFoundError(f"[load_adapter] {directory} has none of the files {', '.join(_WEIGHTS)}")
    return config
