"""Qwen2: its decoder layer is norm, attention, sum, norm, gated MLP, sum."""

from .family import Family


class Qwen2(Family):
    decoder = "Qwen2"
