"""Text from any causal language model: `generate` by its documented names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..optional import PreTrainedModel
from .cache import KVCacheTorch
from .functions import check_size, check_tensor
from .sampler import draw, usable_logits, usable_options, usable_seed
from .transformers_lm import TransformersLM, is_of_transformers

__all__ = ["CacheFullError", "CausalLM", "GenerationConfig", "KVCacheTorch", "generate", "generate_stream"]

_IDS = (torch.int64, torch.int32)
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


class CausalLM(Protocol):
    """What `generate` asks of a model."""

    def __call__(self, input_ids: Tensor, kv_cache: KVCacheTorch) -> Tensor:
        """Logits [B, S or 1, vocab_size] of tokens [B, S] that follow those in the cache, to which every layer writes.
        The cache is not advanced."""

    def create_kv_cache(self) -> KVCacheTorch:
        """An empty cache. For batches of several rows it takes the keyword argument batch_size; and max_seq_len, the
        positions that will do, where it can make use of that."""

    @property
    def vocab_size(self) -> int:
        """The number of logits of a token."""


@dataclass
class GenerationConfig:
    """How `generate` chooses tokens, and where it ends.

    max_new_tokens: as many at most.
    temperature, top_p, top_k, repetition_penalty: as in `MetalSampler.sample`; the penalty is for tokens that were
        generated, not for the prompt's. A temperature of 0 takes the likeliest token after the penalty.
    eos_token_id: the token that ends a text, or several such; None for none.
    pad_token_id: what fills up rows of a batch that have ended.
    do_sample: False takes the likeliest token and passes over all of the above numbers but max_new_tokens.
    seed: of the draws, as that of `MetalSampler`.
    prefill_chunk_size: how many tokens of the prompt go through the model at once; None for all of them.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.1
    eos_token_id: int | Sequence[int] | None = 2
    pad_token_id: int = 0
    do_sample: bool = True
    seed: int | None = None
    prefill_chunk_size: int | None = None


class CacheFullError(ValueError):
    """There is no room in the cache for another token. output_ids: the prompt with what was generated, [B, S + new]."""

    def __init__(self, message: str, output_ids: Tensor) -> None:
        super().__init__(message)
        self.output_ids = output_ids


def generate(
    model: CausalLM | PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig | None = None,
    kv_cache: KVCacheTorch | None = None,
    streamer: Callable[[int], None] | None = None,
) -> Tensor:
    """Continues a text, token by token.

    Args:
        model: has what `CausalLM` says, such as `MetalGLM47Model`; or is a causal language model of Transformers,
            quantized, prepared or neither.
        input_ids: prompts [B, S] of equal length, int64 or int32; they are moved to the device of the model's
            parameters.
        config: None for the defaults of `GenerationConfig`.
        kv_cache: with tokens in it, the prompt follows those. None makes one; for a model of Transformers it may be one
            of its caches, such as a `DynamicCache`. At the end it holds the whole result, as far as it has room.
        streamer: called with each new token, that of the end too; of one prompt only.

    Returns:
        int64 [B, S + new], the prompts with what follows, without the token that ends a text. Where texts of a batch
        differ in length, the shorter ones are filled up with pad_token_id.

    Raises:
        CacheFullError: a ValueError: the cache has no room for the prompt or for another token.
        IndexError: a token of the prompt is not in the vocabulary.
        TypeError: the model is none that is known, or an argument is of another type.
        ValueError: an argument does not fit; the logits are not of the model's vocabulary, or no distribution.
    """
    text = _Text("generate", model, input_ids, config, kv_cache)
    if streamer is not None and len(text.output_ids) > 1:
        raise ValueError(f"[generate] streamer takes one prompt, and input_ids has {len(text.output_ids)} rows")
    for tokens in text.grow():
        if streamer is not None:
            streamer(tokens[0])
    return text.output_ids


def generate_stream(
    model: CausalLM | PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig | None = None,
    kv_cache: KVCacheTorch | None = None,
) -> Iterator[int]:
    """The tokens that `generate` appends to one prompt, each as soon as it is known, without the one of the end.

    Raises:
        CacheFullError, IndexError, TypeError, ValueError: as `generate`; what is wrong with arguments at once.
    """
    text = _Text("generate_stream", model, input_ids, config, kv_cache)
    if len(text.output_ids) > 1:
        raise ValueError(f"[generate_stream] input_ids has {len(text.output_ids)} rows; there must be one prompt")
    return (token for (token,) in text.grow() if token not in text.ends)


class _Text:
    """Prompts with what was generated.

    output_ids: int64 [B, S + new].
    ends: the tokens that end a text.
    """

    def __init__(self, op: str, model: Any, input_ids: Tensor, config: GenerationConfig | None, cache: Any) -> None:
        config = GenerationConfig() if config is None else config
        if not isinstance(config, GenerationConfig):
            kind = f"{type(config).__module__}.{type(config).__name__}"
            raise TypeError(f"[{op}] config is of type {kind}; it must be the GenerationConfig of this module")
        self.op = op
        self.rules = _rules(op, config)
        self.count = self.rules.pop("max_new_tokens")
        self.chunk = self.rules.pop("prefill_chunk_size", None)
        self.seed = usable_seed(op, config.seed)
        self.ends = _ends(op, config)
        _check_ids(op, input_ids)
        self.model = _usable_model(op, model)
        self.output_ids = input_ids.to(_device_of(model, input_ids), torch.int64)
        _check_vocabulary(op, self.output_ids, self.model.vocab_size)
        self.prompt_length = input_ids.shape[1]
        self.pad = _usable_padding(op, config, self.model.vocab_size) if len(input_ids) > 1 else None
        self.keeps_cache = cache is not None
        positions = self.prompt_length + max(self.count - 1, 0)  # the last token does not go through the model
        self.cache = _usable_cache(op, self.model, len(input_ids), positions, cache)

    @torch.no_grad()
    def grow(self) -> Iterator[list[int]]:
        """Appends to output_ids; yields the tokens of a step first, those that end texts among them."""
        rows = len(self.output_ids)
        has_ended = [False] * rows
        logits = self._logits_of_prompt()
        for step in range(self.count):
            tokens, drawn = self._choose(logits, step, has_ended)
            yield drawn
            has_ended = [over or token in self.ends for over, token in zip(has_ended, drawn, strict=True)]
            if all(has_ended):
                return
            if any(has_ended):
                tokens = tokens.masked_fill(torch.tensor(has_ended, device=tokens.device), self.pad)
            self.output_ids = torch.cat([self.output_ids, tokens[:, None]], 1)
            is_last = step + 1 == self.count
            if not is_last:
                self._require_room(1)
            if not is_last or (self.keeps_cache and self._room() >= 1):
                logits = self._logits(tokens[:, None])

    def _choose(self, logits: Tensor, step: int, has_ended: list[bool]) -> tuple[Tensor, list[int]]:
        if any(has_ended):  # what follows their end may be anything
            logits = logits.masked_fill(torch.tensor(has_ended, device=logits.device)[:, None], 0.0)
        previous = self.output_ids[:, self.prompt_length :] if step and self.rules["repetition_penalty"] != 1 else None
        return draw(self.op, logits, self.seed, step, previous=previous, **self.rules)

    def _logits_of_prompt(self) -> Tensor:
        self._require_room(self.prompt_length)
        for chunk in self.output_ids.split(self.chunk or self.prompt_length, 1):
            logits = self._logits(chunk)
        return logits

    def _logits(self, tokens: Tensor) -> Tensor:
        """Of the last of these tokens, [B, V]."""
        logits = self.model(tokens, kv_cache=self.cache)
        self.cache.advance(tokens.shape[1])
        logits = usable_logits(self.op, logits, self.model.vocab_size)
        if logits.dim() != 3 or len(logits) != len(tokens) or logits.shape[1] == 0:
            raise ValueError(
                f"[{self.op}] logits of {list(tokens.shape)} tokens have shape {list(logits.shape)}; they must be "
                f"{[*tokens.shape, self.model.vocab_size]}, or those of the last token"
            )
        return logits[:, -1]

    def _room(self) -> float:
        most = self.cache.max_seq_len
        return math.inf if most is None else most - self.cache.seq_len

    def _require_room(self, tokens: int) -> None:
        if self._room() >= tokens:
            return
        new = self.output_ids.shape[1] - self.prompt_length
        raise CacheFullError(
            f"[{self.op}] the cache has {self.cache.max_seq_len} positions, and {self.cache.seq_len} of them are "
            f"taken: there is no room for {f'the prompt of {tokens} tokens' if not new else 'another token'}; "
            f"{new} new tokens were generated before, which output_ids of this exception has",
            self.output_ids,
        )


def _usable_model(op: str, model: Any) -> CausalLM:
    if is_of_transformers(model):
        return TransformersLM(op, model)
    if missing := [name for name in ("__call__", "create_kv_cache", "vocab_size") if not hasattr(model, name)]:
        raise TypeError(
            f"[{op}] model is a {type(model).__name__} without {' and '.join(missing)}; it must be a causal language "
            "model of Transformers, or have what CausalLM says"
        )
    check_size(op, "vocab_size of the model", model.vocab_size, 1)
    return model


def _usable_cache(op: str, model: CausalLM, rows: int, positions: int, cache: Any) -> KVCacheTorch:
    """positions: how many a new cache needs."""
    if isinstance(model, TransformersLM):
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise TypeError(
                f"[{op}] kv_cache is of type {type(cache).__name__}; a model of Transformers takes one of its caches, "
                "such as a DynamicCache"
            )
        return model.create_kv_cache() if cache is None else model.with_positions(cache)
    if cache is not None and not isinstance(cache, KVCacheTorch):
        raise TypeError(f"[{op}] kv_cache is of type {type(cache).__name__}; it must have what KVCacheTorch says")
    if cache is not None:
        return cache
    accepted = inspect.signature(model.create_kv_cache).parameters
    if rows > 1 and "batch_size" not in accepted:
        raise ValueError(
            f"[{op}] input_ids has {rows} rows, and create_kv_cache of {type(model).__name__} has no batch_size; give "
            "one row, or a kv_cache for all of them"
        )
    options = {"max_seq_len": positions} if "max_seq_len" in accepted else {}
    return model.create_kv_cache(**options, **({"batch_size": rows} if rows > 1 else {}))


def _rules(op: str, config: GenerationConfig) -> dict[str, Any]:
    """The numbers of the config, those of sampling as `draw` takes them."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "prefill_chunk_size")
    given = {name: getattr(config, name) for name in names}
    if config.prefill_chunk_size is None:
        del given["prefill_chunk_size"]
    return usable_options(op, **given) | ({} if config.do_sample else _GREEDY)


def _ends(op: str, config: GenerationConfig) -> frozenset[int]:
    given = config.eos_token_id
    if not (given is None or isinstance(given, (Integral, Iterable))):
        raise TypeError(f"[{op}] eos_token_id is {given!r}; it must be a token, several of them, or None")
    tokens = () if given is None else (given,) if isinstance(given, Integral) else tuple(given)
    if strange := [token for token in tokens if not isinstance(token, Integral)]:
        raise TypeError(f"[{op}] eos_token_id holds {strange[0]!r}; it must be a token, several of them, or None")
    return frozenset(map(int, tokens))


def _usable_padding(op: str, config: GenerationConfig, vocab_size: int) -> int:
    pad = config.pad_token_id
    if not isinstance(pad, Integral) or not 0 <= pad < vocab_size:
        raise ValueError(
            f"[{op}] pad_token_id is {pad!r}; for several prompts it must be from 0 to {vocab_size - 1}, the last token"
        )
    return int(pad)


def _check_ids(op: str, input_ids: Any) -> None:
    check_tensor(op, "input_ids", input_ids)
    if input_ids.dtype not in _IDS:
        raise TypeError(f"[{op}] input_ids has dtype {input_ids.dtype}; supported are {', '.join(map(str, _IDS))}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"[{op}] input_ids has shape {list(input_ids.shape)}; it must be [batch, tokens], at least one of each"
        )


def _check_vocabulary(op: str, input_ids: Tensor, vocab_size: int) -> None:
    outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if len(outside):
        raise IndexError(
            f"[{op}] input_ids holds {int(outside[0])}; it must be from 0 to {vocab_size - 1}, the last token"
        )


def _device_of(model: Any, input_ids: Tensor) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    # One that accelerate keeps elsewhere is on "meta"; then its hooks move the tokens.
    return input_ids.device if parameter is None or parameter.is_meta else parameter.device
