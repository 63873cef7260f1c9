"""AFMoE."""

from .family import Family

FAMILY = Family(experts="mlp.experts")
