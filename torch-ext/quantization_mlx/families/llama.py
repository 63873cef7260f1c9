"""Llama and its like: the decoder layer is norm, attention, sum, norm, gated MLP, sum."""

from .family import Family


class Llama(Family):
    also = ("mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite")
    decoders = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Granite")
