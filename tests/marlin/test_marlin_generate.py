"""generate: a model made by hand against a loop without a cache, and models of Transformers against their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import blocks
import marlin_models
import oracle
import tiny
from process import printed
from quantization_mlx import load_checkpoint, prepare_for_generation, quantize_model, save_checkpoint
from quantization_mlx.marlin import (
    CacheFullError,
    MetalKVCache,
    MetalKVCacheConfig,
    MetalSampler,
    MetalTransformerBlock,
    generate_stream,
    replace_linear_layers,
)
from quantization_mlx.marlin.generate import CausalLM, GenerationConfig, KVCacheTorch, generate

V = 61
PROMPT = torch.tensor([[5, 17, 3, 40, 44]])
ROWS = torch.tensor([[5, 17, 3, 40, 44], [1, 2, 3, 4, 5], [60, 0, 60, 0, 60]])
NO_END = {"eos_token_id": None}
GREEDY = {**NO_END, "do_sample": False}


# --- A model whose logits depend on every token before, and on their order ------------------------------------------

TABLE = 3 * torch.randn(V, V, generator=oracle.generator(4))


def logits_of(tokens: list[int]) -> Tensor:
    """[V], for the token after these."""
    return TABLE[sum((place + 1) * token for place, token in enumerate(tokens)) % V]


class Handmade:
    """Keys are the tokens themselves. What it was called with is recorded."""

    vocab_size = V

    def __init__(self, capacity: int = 64, device: str = "cpu", all_logits: bool = True) -> None:
        self.capacity, self.device, self.all_logits = capacity, device, all_logits
        self.calls: list[list[int]] = []
        self.caches: list[MetalKVCache] = []

    def create_kv_cache(self, batch_size: int = 1) -> MetalKVCache:
        self.caches.append(MetalKVCache(MetalKVCacheConfig(1, 1, 1, self.capacity, torch.float32), batch_size))
        return self.caches[-1]

    def __call__(self, input_ids: Tensor, kv_cache: MetalKVCache) -> Tensor:
        assert input_ids.dtype == torch.int64 and not torch.is_grad_enabled()
        self.calls.append(input_ids[0].tolist())
        new = input_ids[:, None, :, None].float()
        keys, _ = kv_cache.update(0, new, new)
        seen = [[int(token) for token in row] for row in keys[:, 0, :, 0].tolist()]
        new_tokens = input_ids.shape[1]
        lengths = range(keys.shape[2] - new_tokens + 1, keys.shape[2] + 1)
        rows = [torch.stack([logits_of(row[:length]) for length in lengths]) for row in seen]
        logits = torch.stack(rows).to(self.device)
        return logits if self.all_logits else logits[:, -1:]


def continued(prompt: list[int], count: int, choose: Callable[[Tensor, list[int]], int], ends: set[int]) -> list[int]:
    """The new tokens, that of the end too, of a loop that computes everything anew for each."""
    new: list[int] = []
    while len(new) < count and not (new and new[-1] in ends):
        new.append(choose(logits_of([*prompt, *new]), new))
    return new


def likeliest(logits: Tensor, _: list[int]) -> int:
    return int(logits.argmax())


def test_greedy_text(device: str) -> None:
    model = Handmade(device=device)
    expected = continued(PROMPT[0].tolist(), 20, likeliest, set())
    result = generate(model, PROMPT.to(device), GenerationConfig(20, **GREEDY))
    assert result.dtype == torch.int64 and result.device.type == device
    assert result.tolist() == [PROMPT[0].tolist() + expected]
    assert model.calls == [PROMPT[0].tolist(), *([token] for token in expected[:-1])]
    assert model.caches[0].seq_len == 5 + 19
    assert torch.equal(generate(Handmade(all_logits=False), PROMPT, GenerationConfig(20, **GREEDY)), result.cpu())
    assert torch.equal(generate(Handmade(), PROMPT.int(), GenerationConfig(20, **GREEDY)), result.cpu())
    without_penalty = GenerationConfig(20, temperature=0, repetition_penalty=1.0, **NO_END)
    assert torch.equal(generate(Handmade(), PROMPT, without_penalty), result.cpu())


def test_sampled_text(device: str) -> None:
    """The defaults, but for a seed: penalty for what was generated, and not for the prompt."""
    defaults = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    texts = []
    for seed in (1, 2):
        sampler = MetalSampler(V, seed=seed)
        expected = continued(
            PROMPT[0].tolist(), 30, lambda logits, new, s=sampler: s.sample(logits, **defaults, generated_ids=new), {2}
        )
        streamed: list[int] = []
        config = GenerationConfig(30, seed=seed)
        result = generate(Handmade(device=device), PROMPT.to(device), config, streamer=streamed.append)
        assert streamed == expected
        kept = expected[:-1] if expected[-1] == 2 else expected
        assert result.tolist() == [PROMPT[0].tolist() + kept]
        texts.append(expected)
    assert texts[0] != texts[1]


def test_a_temperature_of_0_has_the_penalty() -> None:
    """do_sample=False has not."""

    def choose(logits: Tensor, new: list[int]) -> int:
        return int(MetalSampler(V).apply_repetition_penalty(logits, new, 3.0).argmax())

    config = GenerationConfig(20, temperature=0.0, repetition_penalty=3.0, **NO_END)
    expected = continued(PROMPT[0].tolist(), 20, choose, set())
    assert generate(Handmade(), PROMPT, config)[0, 5:].tolist() == expected
    config.do_sample = False
    assert generate(Handmade(), PROMPT, config)[0, 5:].tolist() == continued(PROMPT[0].tolist(), 20, likeliest, set())
    assert expected != continued(PROMPT[0].tolist(), 20, likeliest, set())


def test_seeds() -> None:
    def text(seed: int | None) -> list[int]:
        return generate(Handmade(), PROMPT, GenerationConfig(12, temperature=3.0, seed=seed, **NO_END))[0].tolist()

    state = torch.get_rng_state()
    assert text(3) == text(3) != text(4)
    torch.manual_seed(5)
    first, second = text(None), text(None)
    torch.manual_seed(5)
    assert text(None) == first != second
    torch.set_rng_state(state)


def test_the_end_is_streamed_and_not_appended() -> None:
    expected = continued(PROMPT[0].tolist(), 20, likeliest, set())
    end = expected[6]
    before = expected[: expected.index(end)]
    for ends in (end, [end], (V - 1 if V - 1 not in expected else 10**6, end)):
        streamed: list[int] = []
        model, config = Handmade(), GenerationConfig(20, **{**GREEDY, "eos_token_id": ends})
        assert generate(model, PROMPT, config, streamer=streamed.append)[0, 5:].tolist() == before
        assert streamed == [*before, end]
        assert list(generate_stream(Handmade(), PROMPT, config)) == before
        assert model.caches[0].seq_len == 5 + len(before)  # the end has not gone through the model


def test_tokens_are_streamed_as_they_come() -> None:
    model = Handmade()
    calls: list[int] = []
    generate(model, PROMPT, GenerationConfig(6, **GREEDY), streamer=lambda _: calls.append(len(model.calls)))
    assert calls == [1, 2, 3, 4, 5, 6]
    tokens = generate_stream(model, PROMPT, GenerationConfig(6, **GREEDY))
    next(tokens)
    assert len(model.calls) == 7
    with pytest.raises(ZeroDivisionError):
        generate(model, PROMPT, GenerationConfig(6, **GREEDY), streamer=lambda token: token // 0)


def test_no_new_tokens() -> None:
    model = Handmade()
    assert torch.equal(generate(model, PROMPT, GenerationConfig(0)), PROMPT)
    assert model.caches[0].seq_len == 5


def test_a_new_cache_has_the_room_that_is_needed() -> None:
    """Where the model can be told; the last token does not go through it."""

    class Told(Handmade):
        def create_kv_cache(self, batch_size: int = 1, max_seq_len: int = 64) -> MetalKVCache:
            self.capacity = max_seq_len
            return super().create_kv_cache(batch_size)

    for rows in (PROMPT, ROWS):
        for count, positions in ((0, 5), (1, 5), (20, 24)):
            model = Told()
            result = generate(model, rows, GenerationConfig(count, **GREEDY))
            assert torch.equal(result, generate(Handmade(), rows, GenerationConfig(count, **GREEDY)))
            assert model.caches[0].max_seq_len == model.caches[0].seq_len == positions


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_a_prompt_in_chunks(chunk: int) -> None:
    model = Handmade()
    result = generate(model, PROMPT, GenerationConfig(8, prefill_chunk_size=chunk, **GREEDY))
    assert torch.equal(result, generate(Handmade(), PROMPT, GenerationConfig(8, **GREEDY)))
    assert model.calls[: -(-5 // chunk)] == [PROMPT[0, start : start + chunk].tolist() for start in range(0, 5, chunk)]


def test_a_conversation_in_one_cache() -> None:
    """Turn by turn; the cache has the whole result, and the next turn follows."""
    model = Handmade()
    cache: KVCacheTorch = model.create_kv_cache()
    text: list[int] = []
    for turn in ([5, 17], [3], [44, 8, 9]):
        result = generate(model, torch.tensor([turn]), GenerationConfig(4, **GREEDY), cache)[0].tolist()
        assert result == turn + continued([*text, *turn], 4, likeliest, set())
        text += result
        assert cache.seq_len == len(text)
    cache.reset()
    assert torch.equal(
        generate(model, PROMPT, GenerationConfig(4, **GREEDY), cache),
        generate(Handmade(), PROMPT, GenerationConfig(4, **GREEDY)),
    )
    assert len(model.caches) == 1


# --- Several prompts --------------------------------------------------------------------------------------------------


def test_several_prompts(device: str) -> None:
    """Each row as alone; those that have ended are filled up."""
    alone = [continued(row, 20, likeliest, set()) for row in ROWS.tolist()]
    ends = [next(token for token in alone[1] if token not in alone[0]), V + 5]
    config = GenerationConfig(20, **{**GREEDY, "eos_token_id": ends, "pad_token_id": 7})
    model = Handmade(device=device)
    result = generate(model, ROWS.to(device), config).tolist()
    wanted = [continued(row, 20, likeliest, set(ends)) for row in ROWS.tolist()]
    wanted = [tokens[:-1] if tokens[-1] in ends else tokens for tokens in wanted]
    width = max(map(len, wanted))
    assert result == [
        [*row, *tokens, *[7] * (width - len(tokens))] for row, tokens in zip(ROWS.tolist(), wanted, strict=True)
    ]
    assert len({len(tokens) for tokens in wanted}) > 1


def test_rows_draw_for_themselves() -> None:
    same = PROMPT.expand(8, -1)
    result = generate(Handmade(), same, GenerationConfig(10, temperature=3.0, seed=1, **NO_END))
    assert len({tuple(row) for row in result.tolist()}) == 8
    alone = generate(Handmade(), PROMPT, GenerationConfig(10, temperature=3.0, seed=1, **NO_END))
    assert torch.equal(result[:1], alone)


def test_what_follows_the_end_of_a_row_does_no_harm() -> None:
    class Broken(Handmade):
        def __call__(self, input_ids: Tensor, kv_cache: MetalKVCache) -> Tensor:
            logits = super().__call__(input_ids, kv_cache)
            return torch.where((input_ids == 7)[:, :, None], torch.nan, logits)

    first = [continued(row, 1, likeliest, set())[0] for row in ROWS.tolist()]
    config = GenerationConfig(5, **{**GREEDY, "eos_token_id": first[0], "pad_token_id": 7})
    result = generate(Broken(), ROWS, config)
    assert result[0].tolist() == [*ROWS[0].tolist(), *[7] * 5]


# --- The end of the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps", [True, False])
def test_a_full_cache(keeps: bool) -> None:
    """It has room for the prompt and for two tokens more, so a third one is known before it is full."""
    model = Handmade(capacity=7)
    expected = continued(PROMPT[0].tolist(), 3, likeliest, set())

    def run(count: int, **options: Any) -> Tensor:
        cache = model.create_kv_cache() if keeps else None
        return generate(model, PROMPT, GenerationConfig(count, **GREEDY), cache, **options)

    assert run(3)[0, 5:].tolist() == expected
    streamed: list[int] = []
    message = "[generate] the cache has 7 positions, and 7 of them are taken: there is no room for another token; 3 new"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        run(4, streamer=streamed.append)
    assert streamed == expected
    assert isinstance(caught.value, CacheFullError)
    assert caught.value.output_ids.tolist() == [PROMPT[0].tolist() + expected]
    end = {**GREEDY, "eos_token_id": expected[2]}
    assert generate(model, PROMPT, GenerationConfig(100, **end))[0, 5:].tolist() == expected[:2]


def test_a_prompt_that_is_too_long() -> None:
    model = Handmade(capacity=4)
    with pytest.raises(CacheFullError, match=r"has 4 positions, and 0 of them are taken: .* the prompt of 5 tokens"):
        generate(model, PROMPT, GenerationConfig(1, prefill_chunk_size=2))
    assert model.calls == [] and model.caches[0].seq_len == 0


# --- What is refused --------------------------------------------------------------------------------------------------


class Wrong(Handmade):
    """With other logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def __call__(self, input_ids: Tensor, kv_cache: MetalKVCache) -> Any:
        return self.change(super().__call__(input_ids, kv_cache))


class OneRow(Handmade):
    def create_kv_cache(self) -> MetalKVCache:
        return super().create_kv_cache()


def run(model: Any = None, input_ids: Any = PROMPT, cache: Any = None, streamer: Any = None, **options: Any) -> Tensor:
    return generate(
        model or Handmade(), input_ids, GenerationConfig(**{"max_new_tokens": 2, **options}), cache, streamer
    )


def nan(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.arange(V) == 3, torch.nan)


VALUE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "one dimension": (lambda: run(input_ids=PROMPT[0]), "input_ids has shape [5]; it must be [batch, tokens]"),
    "no tokens": (lambda: run(input_ids=PROMPT[:, :0]), "input_ids has shape [1, 0]; it must be [batch, tokens]"),
    "no rows": (lambda: run(input_ids=PROMPT[:0]), "input_ids has shape [0, 5]; it must be [batch, tokens]"),
    "vocabulary": (
        lambda: run(Wrong(lambda logits: logits[..., :-1])),
        f"logits has shape [1, 5, {V - 1}]; its last size must be the vocabulary's, {V}",
    ),
    "two dimensions of logits": (
        lambda: run(Wrong(lambda logits: logits[0])),
        f"logits of [1, 5] tokens have shape [5, {V}]; they must be [1, 5, {V}], or those of the last token",
    ),
    "rows of logits": (lambda: run(Wrong(lambda logits: logits.expand(2, -1, -1))), "logits of [1, 5] tokens have"),
    "no logits": (lambda: run(Wrong(lambda logits: logits[:, :0])), "logits of [1, 5] tokens have shape [1, 0,"),
    "NaN": (lambda: run(Wrong(nan)), "logits are no distribution: there is NaN or infinity among them"),
    "NaN, greedy": (lambda: run(Wrong(nan), do_sample=False), "logits are no distribution"),
    "temperature": (lambda: run(temperature=-0.1), "temperature is -0.1; it must be a finite number of at least 0"),
    "top_p": (lambda: run(top_p=0.0), "top_p is 0.0; it must be a number above 0 and at most 1"),
    "top_k": (lambda: run(top_k=-1), "top_k is -1; it must be a whole number of at least 0"),
    "penalty": (lambda: run(repetition_penalty=0.0), "repetition_penalty is 0.0; it must be a finite number above 0"),
    "numbers that do not matter": (lambda: run(top_k=-1, do_sample=False), "top_k is -1"),
    "max_new_tokens": (lambda: run(max_new_tokens=-1), "max_new_tokens is -1; it must be a whole number of at least 0"),
    "prefill_chunk_size": (lambda: run(prefill_chunk_size=0), "prefill_chunk_size is 0; it must be a whole number of"),
    "seed": (lambda: run(seed="x"), "seed is 'x'; it must be None or a whole number"),
    "pad_token_id": (
        lambda: run(input_ids=ROWS, pad_token_id=V),
        f"pad_token_id is {V}; for several prompts it must be from 0 to {V - 1}",
    ),
    "streamer": (lambda: run(input_ids=ROWS, streamer=print), "streamer takes one prompt, and input_ids has 3 rows"),
    "cache for one row": (
        lambda: run(OneRow(), ROWS),
        "input_ids has 3 rows, and create_kv_cache of OneRow has no batch_size; give one row, or a kv_cache",
    ),
}
OTHER_ERRORS: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "token": (IndexError, lambda: run(input_ids=PROMPT + 20), "input_ids holds 64; it must be from 0 to 60"),
    "negative token": (IndexError, lambda: run(input_ids=PROMPT - 5), "input_ids holds -2; it must be from 0 to"),
    "dtype": (TypeError, lambda: run(input_ids=PROMPT.float()), "input_ids has dtype torch.float32; supported are"),
    "list": (TypeError, lambda: run(input_ids=[[1, 2]]), "input_ids is of type list; it must be a tensor"),
    "model": (
        TypeError,
        lambda: run(nn.Linear(2, 2)),
        "model is a Linear without create_kv_cache and vocab_size; it must be a causal language model of Transformers",
    ),
    "cache": (TypeError, lambda: run(cache=[]), "kv_cache is of type list; it must have what KVCacheTorch says"),
    "config": (
        TypeError,
        lambda: generate(Handmade(), PROMPT, transformers.GenerationConfig()),
        "config is of type transformers.generation.configuration_utils.GenerationConfig; it must be the",
    ),
    "eos_token_id": (TypeError, lambda: run(eos_token_id=["2"]), "eos_token_id holds '2'; it must be a token"),
    "one eos_token_id": (TypeError, lambda: run(eos_token_id=2.0), "eos_token_id is 2.0; it must be a token, several"),
    "output": (
        TypeError,
        lambda: run(Wrong(lambda logits: (logits,))),
        "logits is of type tuple; it must be a tensor",
    ),
}


@pytest.mark.parametrize("name", [*VALUE_ERRORS, *OTHER_ERRORS])
def test_wrong_arguments_are_named(name: str) -> None:
    error, call, message = OTHER_ERRORS.get(name) or (ValueError, *VALUE_ERRORS[name])
    with pytest.raises(error, match=re.escape(f"[generate] {message}")):
        call()


def test_streams_take_one_prompt() -> None:
    with pytest.raises(ValueError, match=r"^\[generate_stream\] input_ids has 3 rows; there must be one prompt"):
        generate_stream(Handmade(), ROWS)
    with pytest.raises(ValueError, match=r"^\[generate_stream\] top_k is -1"):
        generate_stream(Handmade(), PROMPT, GenerationConfig(top_k=-1))


def test_a_cache_of_other_sizes() -> None:
    other = MetalKVCache(MetalKVCacheConfig(1, 1, 1, 64, torch.float32), batch_size=2)
    with pytest.raises(ValueError, match=r"^\[MetalKVCache.update\] k_new has shape \[1, 1, 5, 1\]"):
        generate(Handmade(), PROMPT, kv_cache=other)


# --- Models of Transformers -------------------------------------------------------------------------------------------


def own_text(model: nn.Module, prompt: Tensor, count: int, **options: Any) -> Tensor:
    """What Transformers' own loop makes of the likeliest tokens."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options},
    )


def mlx_checkpoint(model: nn.Module, directory: Path) -> nn.Module:
    save_checkpoint(quantize_model(model, bits=4, group_size=64), directory)
    return load_checkpoint(directory)


MODELS: dict[str, Callable[[Path], nn.Module]] = {
    "dense": lambda _: marlin_models.tiny_model(),
    "marlin": lambda _: marlin_models.quantized("llama"),
    "prepared": lambda _: prepare_for_generation(quantize_model(marlin_models.tiny_model(), bits=8)),
    "mlx checkpoint": lambda path: mlx_checkpoint(marlin_models.tiny_model(), path),
    "gpt2": lambda _: marlin_models.tiny_model("gpt2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    model = MODELS[name](tmp_path)
    expected = own_text(model, tiny.TOKENS, 16)
    for config in (GenerationConfig(16, **GREEDY), GenerationConfig(16, prefill_chunk_size=3, **GREEDY)):
        assert torch.equal(generate(model, tiny.TOKENS, config), expected)
    end = expected[0, 14].item()
    config = GenerationConfig(16, **{**GREEDY, "eos_token_id": end})
    streamed: list[int] = []
    shorter = generate(model, tiny.TOKENS, config, streamer=streamed.append)
    assert torch.equal(own_text(model, tiny.TOKENS, 16, eos_token_id=end)[:, :-1], shorter)
    assert streamed[-1] == end


def test_several_prompts_of_a_model_of_transformers() -> None:
    model = marlin_models.quantized("llama")
    rows = torch.stack([tiny.TOKENS[0], tiny.TOKENS[0].flip(0)])
    expected = own_text(model, rows, 12)
    assert torch.equal(generate(model, rows, GenerationConfig(12, **GREEDY)), expected)
    end = next(token for token in expected[1, 12:].tolist() if token not in expected[0, 10:])
    found = generate(model, rows, GenerationConfig(12, **{**GREEDY, "eos_token_id": end, "pad_token_id": end}))
    assert torch.equal(found, own_text(model, rows, 12, eos_token_id=end, pad_token_id=end))


def test_caches_of_transformers() -> None:
    model = marlin_models.quantized("llama")
    expected = own_text(model, tiny.TOKENS, 8)
    caches = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)
    for cache in caches:
        first = generate(model, tiny.TOKENS[:, :4], GenerationConfig(0), cache)
        assert cache.get_seq_length() == 4 and torch.equal(first, tiny.TOKENS[:, :4])
        second = generate(model, tiny.TOKENS[:, 4:], GenerationConfig(8, **GREEDY), cache)
        assert torch.equal(torch.cat([first, second], 1), expected)
        assert cache.get_seq_length() == 18
    with pytest.raises(
        TypeError, match=r"\[generate\] kv_cache is of type MetalKVCache; a model of Transformers takes"
    ):
        generate(model, PROMPT, kv_cache=Handmade().create_kv_cache())


def in_static_cache(model: nn.Module, room: int) -> Tensor:
    """The prompt with 8 new tokens."""
    cache = StaticCache(config=model.config, max_cache_len=room)
    return generate(model, tiny.TOKENS, GenerationConfig(8, **GREEDY), cache)


def test_a_full_static_cache() -> None:
    model = marlin_models.quantized("llama")
    expected = own_text(model, tiny.TOKENS, 8)
    assert torch.equal(in_static_cache(model, 17), expected)
    with pytest.raises(CacheFullError, match=r"has 12 positions, and 12 of them are taken: .* 3 new") as caught:
        in_static_cache(model, 12)
    assert torch.equal(caught.value.output_ids, expected[:, :13])
    with pytest.raises(CacheFullError, match=r"has 4 positions, and 0 of them are taken: .* the prompt of 10 tokens"):
        in_static_cache(model, 4)


def test_a_static_cache_of_windows_is_never_full() -> None:
    model = tiny.tiny_model(family="Mistral", sliding_window=4)
    assert torch.equal(in_static_cache(model, 12), own_text(model, tiny.TOKENS, 8))


def test_positions_of_a_model_of_transformers() -> None:
    """GPT-2's embedding has 32 of them."""
    model = marlin_models.tiny_model("gpt2")
    assert generate(model, tiny.TOKENS, GenerationConfig(23, **GREEDY)).shape == (1, 33)
    with pytest.raises(CacheFullError, match="the cache has 32 positions, and 32 of them are taken") as caught:
        generate(model, tiny.TOKENS, GenerationConfig(24, **GREEDY))
    assert torch.equal(caught.value.output_ids, own_text(model, tiny.TOKENS, 23))


def test_models_without_text_of_their_own() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    for model in (
        tiny.random_model("LlamaModel", **tiny.SIZES),
        tiny.random_model("T5ForConditionalGeneration", **sizes),
    ):
        with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}, which generates no text"):
            generate(model, PROMPT)


def test_prompts_move_to_the_model(device: str) -> None:
    model = marlin_models.quantized("llama").to(device)
    result = generate(model, tiny.TOKENS, GenerationConfig(3, **GREEDY))
    assert result.device.type == device
    assert result.tolist() == own_text(marlin_models.quantized("llama"), tiny.TOKENS, 3).tolist()


# --- Models of blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Qwen3", "Mixtral", "DeepseekV3"])
def test_models_of_blocks(family: str) -> None:
    """As without a cache, of which each step sees the whole text; rows of a batch and chunks of prompts, too."""
    made = blocks.decoder(family)
    layers = [MetalTransformerBlock.from_float(layer, 4, blocks.GROUP_SIZE) for layer in made.model.layers]
    model = blocks.randomized(blocks.Decoder(layers)).eval()
    rows = torch.stack([tiny.TOKENS[0], tiny.TOKENS[0].flip(0)])
    expected = [blocks.greedy(model, row[None], 12, cached=False) for row in rows]
    config = GenerationConfig(12, prefill_chunk_size=4, **GREEDY)
    for index, row in enumerate(rows):
        assert generate(model, row[None], config)[0, 10:].tolist() == expected[index]
    assert generate(model, rows, config)[:, 10:].tolist() == expected


def test_long_texts_of_blocks() -> None:
    """Of 300 new tokens, each is the likeliest after those before it, as of a pass over the whole text without a cache.

    Positions do not see those behind them, so that is what a loop without a cache chooses.
    """
    made = blocks.decoder("Qwen3")
    layers = [MetalTransformerBlock.from_float(layer, 4, blocks.GROUP_SIZE) for layer in made.model.layers]
    model = blocks.randomized(blocks.Decoder(layers)).eval()
    assert len(layers) == 2
    text = generate(model, tiny.TOKENS, GenerationConfig(300, **GREEDY))
    assert text.shape == (1, 310) and len(text[0, 10:].unique()) > 20
    with torch.no_grad():
        logits = model(text[:, :-1])[0, 9:]
    assert torch.equal(logits.argmax(-1), text[0, 10:])


def test_no_transformers_are_needed() -> None:
    """By a process in which they cannot be imported."""
    program = """
import sys
sys.modules["transformers"] = None
import torch
from quantization_mlx.marlin.generate import GenerationConfig, generate

class Model:
    vocab_size = 8

    def create_kv_cache(self):
        from quantization_mlx.marlin import MetalKVCache, MetalKVCacheConfig
        return MetalKVCache(MetalKVCacheConfig(1, 1, 1, 16))

    def __call__(self, input_ids, kv_cache):
        return torch.nn.functional.one_hot((input_ids + 1) % 8, 8).float()

print(generate(Model(), torch.tensor([[1, 2]]), GenerationConfig(4, do_sample=False, eos_token_id=6)).tolist())
"""
    assert printed("-c", program) == "[[1, 2, 3, 4, 5]]\n"


# --- The documented example, with another model -----------------------------------------------------------------------


def test_documented_example(device: str) -> None:
    model: CausalLM = tiny.tiny_model().to(device)
    input_ids = tiny.TOKENS.to(device)
    replace_linear_layers(model, bits=4, group_size=128)

    config = GenerationConfig(max_new_tokens=128, temperature=0.7, top_p=0.9)
    output_ids = generate(model, input_ids, config=config)

    assert output_ids.shape[0] == 1 and 10 <= output_ids.shape[1] <= 138 and output_ids.device.type == device
    assert torch.equal(output_ids[:, :10], input_ids)
    assert ((output_ids >= 0) & (output_ids < tiny.VOCABULARY)).all()
