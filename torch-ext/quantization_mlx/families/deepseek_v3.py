"""DeepSeek-V3 and its like: MLX stores `kv_b_proj` of attention as two layers of one matrix for each head, `embed_q`
with the transposed matrices of the keys and `unembed_out` with those of the values.

Known by these names, since models of many families have such attention.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.switch import QuantizedSwitchLinear, SwitchLinear
from .family import Family


class DeepSeekV3(Family):
    decoders: Mapping[str, str] = {"deepseek_v3": "DeepseekV3", "glm4_moe_lite": "Glm4MoeLite"}
    routes_in_float32 = True

    def routing(self, router: nn.Module) -> dict[str, Any]:
        return sigmoid_routing(router)

    def place(self, path: str, module: nn.Module, stored: set[str]) -> None:
        if f"{path}.embed_q.weight" not in stored or not isinstance(getattr(module, "kv_b_proj", None), nn.Linear):
            return
        weight = module.kv_b_proj.weight
        heads, rank = module.num_heads, weight.shape[1]
        module.embed_q = SwitchLinear(weight.new_empty(heads, rank, module.qk_nope_head_dim))
        module.unembed_out = SwitchLinear(weight.new_empty(heads, module.v_head_dim, rank))
        module._kv_b_dtype = weight.dtype
        del module.kv_b_proj

    def finish(self, module: nn.Module) -> None:
        if (dtype := module.__dict__.pop("_kv_b_dtype", None)) is None:
            return
        keys, values = (_float_weight(getattr(module, name), dtype) for name in ("embed_q", "unembed_out"))
        weight = torch.cat((keys.mT, values), 1).flatten(0, 1)
        del module.embed_q, module.unembed_out
        module.kv_b_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.kv_b_proj.weight = nn.Parameter(weight, requires_grad=False)


def sigmoid_routing(router: nn.Module) -> dict[str, Any]:
    """Of scores, to which a bias is added for choosing alone: among the best groups of experts the best ones."""
    return {
        "k": router.top_k,
        "scoring": "sigmoid",
        "bias": router.e_score_correction_bias,
        "groups": router.num_group,
        "groups_used": router.topk_group,
        "normalise": router.norm_topk_prob,
        "scale": router.routed_scaling_factor,
    }


def _float_weight(layer: SwitchLinear | QuantizedSwitchLinear, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(layer, SwitchLinear):
        return layer.weight.detach()
    return layer.packed().dequantize(dtype).detach()
