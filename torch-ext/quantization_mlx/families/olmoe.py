"""OLMoE: experts in all layers, and norms of queries and keys over all heads."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .family import Family


class Olmoe(Family):
    decoders: Mapping[str, str] = {"olmoe": "Olmoe"}

    def routing(self, router: nn.Module) -> dict[str, Any]:
        return {"k": router.top_k, "normalise": router.norm_topk_prob}
