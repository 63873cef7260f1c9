"""Gemma 2: as Gemma 3, with scores of attention that are capped."""

from collections.abc import Mapping

from .gemma3_text import Gemma3


class Gemma2(Gemma3):
    decoders: Mapping[str, str] = {"gemma2": "Gemma2"}
    rotates_by_type = False
