"""GLM-4.5 and its like: experts beside one that every token passes, but in the first layers; scores of the router are
sigmoids, to which a bias is added for choosing alone."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .deepseek_v3 import sigmoid_routing
from .family import Family


class Glm4Moe(Family):
    decoders: Mapping[str, str] = {"glm4_moe": "Glm4Moe"}
    routes_in_float32 = True

    def routing(self, router: nn.Module) -> dict[str, Any]:
        return sigmoid_routing(router)
