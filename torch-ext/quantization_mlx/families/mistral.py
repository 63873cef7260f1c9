"""Mistral: its decoder layer is norm, attention, sum, norm, gated MLP, sum."""

from .family import Family


class Mistral(Family):
    decoder = "Mistral"
