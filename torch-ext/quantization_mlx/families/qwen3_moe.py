"""Qwen3-MoE: Qwen3 with experts in all or some layers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .family import Family


class Qwen3MoE(Family):
    decoders: Mapping[str, str] = {"qwen3_moe": "Qwen3Moe"}

    def routing(self, router: nn.Module) -> dict[str, Any]:
        return {"k": router.top_k, "normalise": router.norm_topk_prob}
