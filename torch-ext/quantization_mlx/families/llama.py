"""Llama and its like: the decoder layer is norm, attention, sum, norm, gated MLP, sum."""

from collections.abc import Mapping

from .family import Family


class Llama(Family):
    also = ("mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite")
    decoders: Mapping[str, str] = {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "smollm3": "SmolLM3",
        "phi3": "Phi3",
        "granite": "Granite",
    }
