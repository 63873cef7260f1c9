"""dots.llm1."""

from .family import Family


class Dots1(Family):
    experts = "mlp.experts"
