"""Qwen3: its decoder layer is norm, attention, sum, norm, gated MLP, sum."""

from .family import Family


class Qwen3(Family):
    decoder = "Qwen3"
