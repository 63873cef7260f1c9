"""Mixtral and its like: `mlp` of Transformers is `block_sparse_moe` in an MLX checkpoint."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .family import Family


class Mixtral(Family):
    also = ("phimoe", "minimax_m2")
    experts = "block_sparse_moe.switch_mlp"
    decoders: Mapping[str, str] = {"mixtral": "Mixtral"}

    def routing(self, router: nn.Module) -> dict[str, Any]:
        return {"k": router.top_k, "normalise": True}
