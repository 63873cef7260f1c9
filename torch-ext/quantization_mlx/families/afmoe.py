"""AFMoE."""

from .family import Family


class AFMoE(Family):
    experts = "mlp.experts"
