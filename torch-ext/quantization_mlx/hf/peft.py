"""Adapters of PEFT on quantized layers.

PEFT takes quantized layers for the `nn.Linear` and `nn.Embedding` ones that they are, and trains adapters on them as
they come. What it does with a layer's own weight, to merge an adapter or to train a copy of the layer, is here.
"""

import functools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.read import read_json
from ..messages import listed
from ..nn.conv1d import conv1d_of
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import PackedLinear, QuantizedLinear
from ..nn.obstacles import move_hooks
from ..optional import PreTrainedModel
from . import compat
from .patching import Patch, wrap

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MLX_KEYS = {"fine_tune_type", "lora_parameters", "num_layers"}  # of mlx_lm's adapter_config.json

# All others start from the float weight, which does not exist.
_INITIALISATIONS = ("gaussian", "orthogonal")


def patch_peft() -> None:
    """Lets PEFT merge LoRA adapters into `QuantizedLinear` layers, and train quantized layers named in
    `modules_to_save`, with configs and models that are made from now on.

    Merging an adapter quantizes the sum in the layer's own format, which rounds; unmerging brings back the old layer,
    bit for bit. A layer in `modules_to_save` is trained as a floating-point copy. DoRA and the other variants of LoRA,
    adapter biases, and initialisations that need the float weight raise a ValueError on these layers. Adapters on
    embeddings and trainable tokens are trained without the patch as well; merging them raises NotImplementedError.
    Calling it again changes nothing; `unpatch_peft` takes it back.

    Raises:
        ImportError: peft is not installed, or older than the tested versions, or lacks a name that is needed.
    """
    _patch.install()


def unpatch_peft() -> None:
    """Takes back `patch_peft`; layers that have adapters keep them."""
    _patch.remove()


def _apply(stack: ExitStack) -> None:
    peft = compat.require("peft", "train")
    compat.check("patch_peft")
    from peft.utils.other import ModulesToSaveWrapper

    wrap(stack, peft.LoraConfig, "__post_init__", _declare_quantized_layers)
    wrap(stack, ModulesToSaveWrapper, "update", _train_a_float_copy)


_patch = Patch(_apply)


def _declare_quantized_layers(original: Any, config: Any) -> None:
    original(config)
    # PEFT's way to register further layer classes.
    config._register_custom_module({QuantizedLinear: _lora_layer_class()})


def _train_a_float_copy(original: Any, wrapper: Any, *args: Any, **kwargs: Any) -> None:
    layer = wrapper.original_module
    if not isinstance(layer, PackedLinear | QuantizedEmbedding):
        return original(wrapper, *args, **kwargs)
    wrapper.original_module = layer.dequantize()  # update() copies it
    try:
        return original(wrapper, *args, **kwargs)
    finally:
        wrapper.original_module = layer.requires_grad_(False)


@functools.cache
def _lora_layer_class() -> type:
    """Made on demand: importing PEFT takes seconds."""
    from peft.tuners import lora
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class LoraQuantizedLinear(lora.Linear):
        """y = base_layer(x) + B(A(dropout(x))) * scaling"""

        @property
        def lora_variants(self) -> dict[tuple[str, ...], None]:
            return {(): None}

        def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
            return module.in_features, module.out_features

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
            start = config.init_lora_weights
            if isinstance(start, str) and start.lower() not in _INITIALISATIONS:
                raise ValueError(
                    f"[LoraConfig] init_lora_weights={start!r} needs a floating-point weight; on quantized layers it "
                    f"is True, False or one of {_INITIALISATIONS}"
                )
            if config.lora_bias:
                raise ValueError("[LoraConfig] lora_bias=True is not supported on quantized layers")
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            if not names:
                return
            base = self.get_base_layer()
            merged = base.packed().dequantize(torch.float32)
            for name in names:
                merged += self.get_delta_weight(name).to(merged)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"[merge] the adapters {names} are not finite")
            if not self.merged_adapters:
                self.unmerged_layer = [base]  # in a list, so that it is not a submodule
            self.base_layer = _quantized_like(base, merged)
            self.base_layer.conv1d_class = conv1d_of(base)
            move_hooks(base, self.base_layer)
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            if self.merged:
                (self.base_layer,) = self.unmerged_layer
                del self.unmerged_layer
                self.merged_adapters.clear()

    return LoraQuantizedLinear


def _quantized_like(layer: QuantizedLinear, values: Tensor) -> QuantizedLinear:
    """values [out_features, in_features] in the format of `layer`, with its bias."""
    quantized = QuantizedLinear(layer.in_features, layer.out_features, False, **layer.format, device="meta")
    quantized.pack(values)
    quantized.to(layer.weight.dtype)
    quantized.bias = layer.bias
    return quantized.train(layer.training)


# Saved adapters


def load_adapter(model: PreTrainedModel, directory: str | os.PathLike[str]) -> PreTrainedModel:
    """Puts the LoRA adapter that PEFT saved in `directory` onto layers of `model`; returns the model, in eval mode.

    Raises:
        FileNotFoundError: the directory or a file of the adapter is missing.
        ImportError: peft is not installed.
        ValueError: it is an adapter of mlx_lm, or no LoRA adapter, or not one of this model.
    """
    directory = Path(directory)
    config = _read_config(directory)
    peft = compat.require("peft", "train")
    compat.check("load_adapter")
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    with _patch.applied():
        adapted = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(directory))
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
