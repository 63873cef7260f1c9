"""GLM-4.5 and its like: experts beside one that every token passes, but in the first layers; scores of the router are
sigmoids, to which a bias is added for choosing alone."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .family import Family


def sigmoid_routing(router: nn.Module) -> dict[str, Any]:
    """That of DeepSeek-V3 and of those that have it from there."""
    return {
        "k": router.top_k,
        "scoring": "sigmoid",
        "bias": router.e_score_correction_bias,
        "groups": router.num_group,
        "groups_used": router.topk_group,
        "normalise": router.norm_topk_prob,
        "scale": router.routed_scaling_factor,
    }


class Glm4Moe(Family):
    decoders: Mapping[str, str] = {"glm4_moe": "Glm4Moe"}
    routes_in_float32 = True

    def routing(self, router: nn.Module) -> dict[str, Any]:
        return sigmoid_routing(router)
