"""Gemma 3, the text model: norms of what attention and the MLP give, too, whose weights are stored less 1."""

from collections.abc import Mapping

from .family import Family


class Gemma3(Family):
    decoders: Mapping[str, str] = {"gemma3": "Gemma3"}
    decoder_norms: Mapping[str, str] = {
        "attention": "input_layernorm",
        "attention_out": "post_attention_layernorm",
        "mlp": "pre_feedforward_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    }
    norm_offset = 1.0
    rotates_by_type = True
