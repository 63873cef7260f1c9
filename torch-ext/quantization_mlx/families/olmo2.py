"""OLMo 2: norms of what attention and the MLP give, none before them, and norms of queries and keys over all heads."""

from collections.abc import Mapping

from .family import Family


class Olmo2(Family):
    decoders: Mapping[str, str] = {"olmo2": "Olmo2"}
    decoder_norms: Mapping[str, str] = {
        "attention_out": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    }
