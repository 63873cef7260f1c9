"""Qwen3: its decoder layer is norm, attention, sum, norm, gated MLP, sum."""

from .family import Family

FAMILY = Family(decoder="Qwen3")
