"""Llama: its decoder layer is norm, attention, sum, norm, gated MLP, sum."""

from .family import Family


class Llama(Family):
    decoder = "Llama"
