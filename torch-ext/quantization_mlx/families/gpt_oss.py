"""gpt-oss: OpenAI stores the experts in blocks of 16 bytes, which is mode mxfp4 by another name, with the rows of gate
and up in turns. The module of Transformers wants them so, and these layers stay fused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.fused import FUSED
from ..nn.module import frozen
from ..nn.switch import QuantizedSwitchLinear, SwitchLinear
from .family import Family

_PARTS = {"blocks": "weight", "scales": "scales", "bias": "bias"}  # OpenAI's name -> ours


class GptOss(Family):
    experts = "mlp.experts"
    decoders: Mapping[str, str] = {"gpt_oss": "GptOss"}
    halves_angles = True
    router = "router"

    def routing(self, router: nn.Module) -> dict[str, Any]:
        return {"k": router.top_k, "scoring": "softmax_of_selected"}

    def gate(self, experts: nn.Module) -> dict[str, Any]:
        return {"alpha": experts.alpha, "limit": experts.limit, "offset": 1.0}

    def record(self, config: Any) -> Mapping[str, Any] | None:
        """That of mode mxfp4 where Transformers would dequantize the experts: without a GPU for its own kernels."""
        stored = getattr(config, "quantization_config", None)
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        accelerator = torch.accelerator.current_accelerator()
        dequantized = accelerator is None or accelerator.type == "mps"
        return {"mode": "mxfp4"} if method == "mxfp4" and dequantized else None

    def place(self, path: str, module: nn.Module, stored: set[str]) -> None:
        if f"{path}.gate_up_proj_blocks" not in stored:
            return
        for name in FUSED:
            weight, bias = module._parameters.pop(name), module._parameters.pop(f"{name}_bias")
            linear = SwitchLinear(weight.mT if module.is_transposed else weight, bias)
            layer = QuantizedSwitchLinear.shell(linear, weight.dtype, mode="mxfp4")
            layer.weight = frozen(torch.empty(*layer.scales.shape, 16, dtype=torch.uint8, device="meta"))
            setattr(module, name, layer)
        module._is_hf_initialized = True

    def finish(self, module: nn.Module) -> None:
        if _has_blocks(module):
            module.weight = frozen(_words_of_blocks(module.weight_packed))

    def renamings(self, model: nn.Module) -> list[tuple[str, str]]:
        if not any(map(_has_blocks, model.modules())):
            return []
        return [
            (rf"\.experts\.{name}_{part}$", f".experts.{name}.{own}") for name in FUSED for part, own in _PARTS.items()
        ]


def _has_blocks(module: nn.Module) -> bool:
    return isinstance(module, QuantizedSwitchLinear) and module.weight_packed.dim() == 4


def _words_of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks uint8 [num_experts, rows, groups, 16] as words uint32 [num_experts, rows, groups * 4], without a copy.

    16 bytes hold 32 values, the even ones in their low halves: the order of MLX's words.
    """
    flat = blocks.detach().flatten(-2)
    return (flat.clone() if flat.data_ptr() % 4 else flat).view(torch.uint32)
