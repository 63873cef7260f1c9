"""AFMoE and dots.llm1: the experts of a layer are `mlp.experts` in an MLX checkpoint."""

from .family import Family


class AFMoE(Family):
    also = ("dots1",)
    experts = "mlp.experts"
