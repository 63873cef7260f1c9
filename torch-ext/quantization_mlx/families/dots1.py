"""dots.llm1."""

from .family import Family

FAMILY = Family(experts="mlp.experts")
