"""Models of Transformers as `generate` takes models."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor

from ..hf import compat
from ..optional import PreTrainedModel


def is_of_transformers(model: Any) -> bool:
    """Whether it is a model of Transformers, without importing that: who has such a model has done so."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


class TransformersCache:
    """A cache of Transformers, which counts its positions by itself.

    max_seq_len: the positions that the model is for, or for which a static cache has room; None where nothing says so.
    """

    def __init__(self, cache: Any, max_seq_len: int | None) -> None:
        self.cache = cache
        self.max_seq_len = max_seq_len

    @property
    def seq_len(self) -> int:
        return int(self.cache.get_seq_length())  # a tensor, in static caches

    def advance(self, num_tokens: int = 1) -> None:
        """Nothing: the layers of the model have done so."""

    def reset(self) -> None:
        self.cache.reset()


class TransformersLM:
    """A causal language model of Transformers, quantized, prepared or neither, with the logits of the last token.

    Raises:
        TypeError: it is another kind of model, without a head that gives logits for each token of a text.
    """

    def __init__(self, op: str, model: PreTrainedModel) -> None:
        compat.require("transformers")
        config = model.config.get_text_config()
        if model.config.is_encoder_decoder or not model.can_generate():
            raise TypeError(f"[{op}] model is a {type(model).__name__}, which generates no text from text alone")
        self.model = model
        self.vocab_size = config.vocab_size
        self._max_seq_len = getattr(config, "max_position_embeddings", None)
        self._cache_name = compat.cache_name(type(model).forward)
        self._options = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
            self._options["logits_to_keep"] = 1

    def create_kv_cache(self, batch_size: int = 1) -> TransformersCache:
        from transformers import DynamicCache

        return self.with_positions(DynamicCache(config=self.model.config))

    def with_positions(self, cache: Any) -> TransformersCache:
        """A cache of Transformers as `generate` takes caches."""
        rooms = (
            getattr(layer, "max_cache_len", None)
            for layer in getattr(cache, "layers", ())
            if not getattr(layer, "is_sliding", False)  # these forget the first ones
        )
        known = [most for most in (self._max_seq_len, *rooms) if most is not None]
        return TransformersCache(cache, min(known, default=None))

    def __call__(self, input_ids: Tensor, kv_cache: TransformersCache) -> Tensor:
        return self.model(input_ids=input_ids, **{self._cache_name: kv_cache.cache}, **self._options).logits
