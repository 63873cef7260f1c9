"""quantized_cache: against caches that mlx quantizes and dequantizes, in prepared models and in others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache, DynamicLayer

import oracle
import tiny
from oracle import Format, Quantized, name_of
from quantization_mlx import explain, fast, prepare_for_generation, quantize_model, quantized_cache
from quantization_mlx.hf import decoder
from quantization_mlx.hf.compat import cache_name
from tiny import VOCABULARY

SIZES = {**tiny.SIZES, "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
    "mistral-sliding": MistralConfig(**SIZES, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, head_dim=64, sliding_window=7, query_pre_attn_scalar=40, sliding_window_pattern=2
    ),
    "smollm3": transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
}
LLAMA = MODELS["llama"]


def tiny_model(config: Any = LLAMA, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return quantize_model(AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval(), group_size=32)


def pair(config: Any = LLAMA, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model and its prepared copy."""
    model = tiny_model(config, **options)
    return model, prepare_for_generation(copy.deepcopy(model))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=oracle.generator(0))


class MlxLayer(DynamicLayer):
    """Holds what mlx makes of keys and values by quantizing and dequantizing them, once there are `start` of them."""

    def __init__(self, bits: int, start: int = 0) -> None:
        super().__init__()
        self.format, self.start, self.is_packed = Format("affine", 32, bits), start, False

    def rounded(self, states: Tensor) -> Tensor:
        return oracle.mlx_dequantize(Quantized(self.format, *oracle.mlx_quantize(states, self.format)))

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_packed:
            return super().update(self.rounded(keys), self.rounded(values))
        states = super().update(keys, values)
        if self.get_seq_length() >= max(self.start, 1):
            self.keys, self.values, self.is_packed = *map(self.rounded, states), True
        return states


def mlx_cache(model: PreTrainedModel, bits: int, start: int = 0) -> dict[str, Cache]:
    return {cache_name(): Cache(layers=[MlxLayer(bits, start) for _ in range(model.config.num_hidden_layers)])}


def cache_of(model: PreTrainedModel, bits: int = 8, **options: Any) -> dict[str, Cache]:
    return quantized_cache(model, bits=bits, group_size=32, **options)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, cache: dict[str, Cache], parts: tuple[int, ...] = (5,)) -> Tensor:
    """All logits of ids, of which so many come at once and the others one by one."""
    sizes = [*parts, *[1] * (ids.shape[1] - sum(parts))]
    return torch.cat([model(part, **cache).logits.cpu() for part in ids.split(sizes, 1)], 1)


class Steps:
    """Counts the calls of the op with a packed cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.op = decoder._decoder_step
        monkeypatch.setattr(decoder, "_decoder_step", self)

    def __call__(self, *arguments: Any) -> Tensor:
        self.count += arguments[-1] != 0
        return self.op(*arguments)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def assert_same(logits: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    torch.testing.assert_close(logits, expected, rtol=relative, atol=relative * expected.abs().max().item())


# A key that the prepared model computes a rounding apart may have the next code.
NEXT_CODE = {4: 2e-2, 8: 2e-3}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("bits", [4, 8])
def test_logits_are_those_with_mlxs_keys(config: Any, bits: int, steps: Steps) -> None:
    model, prepared = pair(config)
    ids = tokens(2, 24)
    expected = logits_of(model, ids, mlx_cache(model, bits), (5, 3))
    assert_same(logits_of(model, ids, cache_of(model, bits), (5, 3)), expected, 1e-5)
    assert steps.count == 0
    logits = logits_of(prepared, ids, cache_of(prepared, bits), (5, 3))
    assert_same(logits, expected, NEXT_CODE[bits])
    assert steps.count == 17  # all but the first prompt
    plain = logits_of(model, ids, {cache_name(): transformers.DynamicCache(config=model.config)}, (5, 3))
    assert (plain - expected).abs().mean() > 4 * (logits - expected).abs().mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_on_every_device(device: str, bits: int, steps: Steps) -> None:
    prepared = prepare_for_generation(tiny_model(MODELS["qwen3"]))
    ids = tokens(2, 12)
    expected = logits_of(copy.deepcopy(prepared), ids, cache_of(prepared, bits), (5, 2))
    prepared, count = prepared.to(device), steps.count
    assert_same(logits_of(prepared, ids.to(device), cache_of(prepared, bits), (5, 2)), expected, NEXT_CODE[bits])
    assert steps.count - count == 6


def test_padded_batches() -> None:
    model, prepared = pair()
    ids = tokens(3, 14)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    results = []
    for each, cache in ((model, mlx_cache(model, 8)), (prepared, cache_of(prepared))):
        logits = []
        for begin, end in ((0, 7), (7, 8), (8, 12), (12, 14)):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
            inputs = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "position_ids": positions}
            with torch.no_grad():
                logits.append(each(**inputs, **cache).logits)
        results.append(torch.cat(logits, 1)[mask.bool()])
    assert_same(results[1], results[0], NEXT_CODE[8])


def test_quantized_from_a_position_on(steps: Steps) -> None:
    model, prepared = pair()
    ids = tokens(1, 16)
    expected = logits_of(model, ids, mlx_cache(model, 4, start=9))
    for each in (model, prepared):
        cache = cache_of(each, 4, start=9)
        logits = logits_of(each, ids, cache)
        assert_same(logits[:, :9], expected[:, :9])
        assert_same(logits[:, 9:], expected[:, 9:], NEXT_CODE[4])
        assert cache[cache_name()].get_seq_length() == 16
    assert steps.count == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_half_precision(dtype: torch.dtype, steps: Steps) -> None:
    """No further from float32 than the unprepared model with mlx's keys."""
    model, prepared = pair(MODELS["qwen3"], dtype=dtype)
    ids = tokens(2, 40)
    exact = logits_of(copy.deepcopy(model).float(), ids, mlx_cache(model, 8), (20,))
    theirs = logits_of(model, ids, mlx_cache(model, 8), (20,))
    ours = logits_of(prepared, ids, cache_of(prepared), (20,))
    errors = [(each.float() - exact).square().mean().sqrt() for each in (theirs, ours)]
    assert steps.count == 20 and errors[1] <= 1.25 * errors[0]


def test_long_texts_grow_the_buffers() -> None:
    model, prepared = pair(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    ids = tokens(1, 290)
    cache = cache_of(prepared)
    logits = logits_of(prepared, ids, cache, (250, 8))
    (layer,) = cache[cache_name()].layers
    assert [buffer.shape[3] for buffer in layer.buffers] == [506] * 3
    assert_same(logits, logits_of(model, ids, mlx_cache(model, 8), (250, 8)), NEXT_CODE[8])
    logits_of(prepared, tokens(1, 220), cache, (220,))
    assert [buffer.shape[3] for buffer in layer.buffers] == [1012] * 3


@torch.no_grad()
def test_cropped_caches_keep_their_memory() -> None:
    model, prepared = pair()
    ids = tokens(1, 8)
    expected = logits_of(model, ids, mlx_cache(model, 8), (6, 2))
    cache = cache_of(prepared)
    prepared(ids[:, :6], **cache)
    layers = cache[cache_name()].layers
    memory = [buffer.data_ptr() for layer in layers for buffer in layer.buffers]
    for _ in range(3):
        assert_same(prepared(ids[:, 6:], **cache).logits, expected[:, 6:], NEXT_CODE[8])
        cache[cache_name()].crop(-2)
        assert cache[cache_name()].get_seq_length() == 6
    assert [buffer.data_ptr() for layer in layers for buffer in layer.buffers] == memory


@torch.no_grad()
def test_a_cache_that_others_change(steps: Steps) -> None:
    """Reordered, copied, repeated, chosen from, reset and continued as others, without a further rounding."""
    model, prepared = pair()
    ids = tokens(2, 16)
    results = []
    for each, kwargs in ((model, mlx_cache(model, 8)), (prepared, cache_of(prepared))):
        cache = kwargs[cache_name()]
        logits = [each(part, **kwargs).logits for part in ids[:, :6].split([4, 1, 1], 1)]
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        logits += [each(ids[:, 6:7], **{cache_name(): each_cache}).logits for each_cache in (cache, twin, cache)]
        cache.batch_repeat_interleave(2)
        logits += [each(ids.repeat_interleave(2, 0)[:, 7:8], **kwargs).logits]
        cache.batch_select_indices(torch.tensor([3]))
        logits += [each(ids[:1, 8:9], **kwargs).logits]
        keys, values = cache.layers[0].keys, cache.layers[0].values
        assert keys.shape == values.shape == (1, 2, 10, 32)
        logits += [keys.transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2)]
        results.append([each.flatten() for each in logits])
        cache.layers[1].keys, cache.layers[1].values = cache.layers[1].keys, cache.layers[1].values
        results[-1].append(each(ids[:1, 9:10], **kwargs).logits.flatten())
        cache.reset()
        assert cache.get_seq_length() == 0
    for mine, theirs in zip(*reversed(results), strict=True):
        assert_same(mine, theirs, NEXT_CODE[8])
    assert steps.count == 7


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},  # crops the cache
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE.keys())
def test_generate(options: dict[str, Any], steps: Steps) -> None:
    """The tokens of the unprepared model with mlx's keys."""
    model, prepared = pair()
    prompt = tokens(1, 6).repeat(1, 3)
    calls = ((model, mlx_cache(model, 8)), (model, cache_of(model)), (prepared, cache_of(prepared)))
    texts = [each.generate(prompt, max_new_tokens=24, **options, **cache) for each, cache in calls]
    assert torch.equal(texts[1], texts[0]) and torch.equal(texts[2], texts[0])
    assert steps.count > 0


@torch.no_grad()
def test_gradients_are_refused() -> None:
    for each in pair():
        with torch.enable_grad(), pytest.raises(ValueError, match="gradients do not pass a quantized cache"):
            each(tokens(1, 4), **cache_of(each))


@torch.no_grad()
def test_kernels_of_one_token() -> None:
    """One more launch for each layer than with a cache in floating point, which quantizes keys and values at once."""
    prepared = prepare_for_generation(tiny_model(dtype=torch.float16))
    cache = cache_of(prepared)
    prepared(tokens(1, 5), **cache)
    plans = explain(prepared, tokens(1, 1), **cache, gpu="applegpu_g15s")
    assert {"rope_into_cache", "quantize", "quantized_scaled_dot_product_attention"} < {plan.op for plan in plans}
    assert sum(len(plan.launches) for plan in plans) == 9 * prepared.config.num_hidden_layers + 3


def test_packed_keys_are_those_of_the_op() -> None:
    """The layer's tensors are what the attention op takes."""
    _, prepared = pair()
    cache = cache_of(prepared, 4)
    logits_of(prepared, tokens(2, 7), cache)
    layer = cache[cache_name()].layers[0]
    k, v = (tuple(buffer[which, :, :, :7] for buffer in layer.buffers) for which in (0, 1))
    q = oracle.random_x(2, 4, 1, 32)
    y = fast.quantized_scaled_dot_product_attention(q, k, v, scale=0.2, group_size=32, bits=4)
    keys, values = (each.double().repeat_interleave(2, 1) for each in (layer.keys, layer.values))
    exact = (q.double() @ keys.mT * 0.2).softmax(-1) @ values
    oracle.assert_within(y, exact, 1e-5 * (1 + exact.abs()))


# --- Errors -----------------------------------------------------------------------------------------------------------


def latent() -> PreTrainedModel:
    sizes = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
    sizes |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1}
    return tiny.causal_lm("DeepseekV3", **sizes)


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "bits": (lambda: quantized_cache(tiny_model(), bits=3), r"bits is 3; supported are 4 and 8"),
    "group size": (
        lambda: quantized_cache(tiny_model(), group_size=48),
        r"group_size is 48; supported are 32, 64, 128",
    ),
    "start": (lambda: quantized_cache(tiny_model(), group_size=32, start=-1), r"start is -1; it must be at least 0"),
    "heads": (
        lambda: quantized_cache(tiny_model()),
        r"LlamaForCausalLM has heads of size 32, which are no whole groups of 64 elements",
    ),
    "other caches": (
        lambda: quantized_cache(tiny.wrapper("qwen3_5")[0], group_size=32),
        r"Qwen3_5ForConditionalGeneration has layers with a cache of their own, which is not quantized: Linear",
    ),
    "latent keys": (
        lambda: quantized_cache(latent(), group_size=32),
        r"DeepseekV3ForCausalLM has keys and values of different head sizes, whose cache is not quantized",
    ),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"\[quantized_cache\] {message}"):
        call()


OP_ERRORS = {
    "count": (lambda all: all[1:], r"8 keys and 0 values do not fit 3 layers with a packed cache"),
    "shape": (lambda all: [each[0] for each in all], r"packed keys and values of shape .* must be \[2, batch, heads"),
}


@torch.no_grad()
@pytest.mark.parametrize("change, message", OP_ERRORS.values(), ids=OP_ERRORS.keys())
def test_op_refuses_what_does_not_fit(change: Callable[[list], list], message: str) -> None:
    stack = pair()[1].model
    x = torch.ones(1, 1, SIZES["hidden_size"])
    cosines, sines = stack.rotary_emb(x, torch.arange(1)[None])
    of_layer = [torch.zeros(2, 1, 2, 5, 8, dtype=torch.int32), *(torch.zeros(2, 1, 2, 5, 1) for _ in range(2))]
    packed = [each.clone() for _ in stack.layers for each in of_layer]
    arguments = (stack._decoder().decoder, x, [cosines], [sines], change(packed), [], 0, None, 32, 8)
    with pytest.raises(ValueError, match=rf"\[decoder_step\] {message}"):
        decoder._decoder_step(*arguments)
