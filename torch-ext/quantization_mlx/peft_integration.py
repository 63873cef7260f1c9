"""LoRA adapters of PEFT on quantized linear layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import compat
from .modules import QuantizedLinear
from .ops import dequantize

# Other ways to initialise an adapter start from the float weight, of which there is none.
_INITIALISATIONS = ("gaussian", "orthogonal")

_original_post_init: Any = None


def patch_peft() -> None:
    """Makes every `peft.LoraConfig` that is created from now on accept `QuantizedLinear` layers as targets.

    PEFT then wraps them as it does `nn.Linear`: the packed weight stays frozen, the adapter is trained in float32.
    Merging an adapter quantizes the sum in the layer's own format, which rounds; unmerging brings back the old layer,
    bit for bit. DoRA and the other variants of LoRA, adapter biases, and initialisations that need the float weight
    raise a ValueError, and so do quantized embeddings as targets. Calling it again changes nothing; `unpatch_peft`
    takes it back.

    Raises:
        ImportError: peft is not installed, or older than the tested versions, or lacks a name that is needed.
    """
    global _original_post_init
    if _original_post_init is not None:
        return
    config_class = _require_peft().LoraConfig
    compat.check("patch_peft")
    original = config_class.__post_init__

    @functools.wraps(original)
    def post_init(config: Any) -> None:
        original(config)
        # PEFT's way to declare layers that it does not know.
        config._register_custom_module({QuantizedLinear: _lora_layer_class()})

    config_class.__post_init__ = post_init
    _original_post_init = original


def unpatch_peft() -> None:
    """Takes back `patch_peft`; layers that have adapters keep them."""
    global _original_post_init
    if _original_post_init is not None:
        _require_peft().LoraConfig.__post_init__ = _original_post_init
        _original_post_init = None


def _require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('LoRA needs the package peft: pip install "quantization-mlx[train]"') from error
    return peft


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
            merged = _dequantized(base)
            for name in names:
                merged += self.get_delta_weight(name).to(merged)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"[merge] the adapters {names} are not finite")
            if not self.merged_adapters:
                self.unmerged_layer = [base]  # a list, so that it is no submodule and not saved
            self.base_layer = _quantized_like(base, merged)
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            if self.merged:
                (self.base_layer,) = self.unmerged_layer
                del self.unmerged_layer
                self.merged_adapters.clear()

    return LoraQuantizedLinear


def _dequantized(layer: QuantizedLinear) -> Tensor:
    """The layer's values [out_features, in_features] in float32."""
    return dequantize(
        layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits, layer.mode, dtype=torch.float32
    )


def _quantized_like(layer: QuantizedLinear, values: Tensor) -> QuantizedLinear:
    """values [out_features, in_features] in the format of `layer`, with its bias."""
    quantized = QuantizedLinear(
        layer.in_features, layer.out_features, False, layer.group_size, layer.bits, layer.mode, device="meta"
    )
    quantized._pack(values)
    if layer.mode == "affine":
        quantized.to(layer.scales.dtype)
    quantized.bias = layer.bias
    return quantized.train(layer.training)
