"""prepare_for_generation against the unprepared model, on CPU and GPU."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaModel

import oracle
import tiny
from oracle import name_of
from quantization_mlx import (
    dequantize_model,
    explain,
    load_checkpoint,
    prepare_for_generation,
    quantize_model,
    save_checkpoint,
)
from quantization_mlx._ops import ops
from quantization_mlx.hf import decoder
from quantization_mlx.hf.compat import cache_name
from quantization_mlx.hf.patch import patched_transformers
from repository import load_demo
from tiny import VOCABULARY

IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES = {**tiny.SIZES, "num_hidden_layers": 3, **IDS}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-many-heads": LlamaConfig(**{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 1}, head_dim=32),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-sliding": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2-sliding": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1, layer_types=None
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
    # One layer in three does not rotate.
    "smollm3": transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "phi3": transformers.Phi3Config(**SIZES, partial_rotary_factor=0.5, resid_pdrop=0.1, sliding_window=9),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, head_dim=64, sliding_window=7, query_pre_attn_scalar=40, sliding_window_pattern=2
    ),
    "granite": transformers.GraniteConfig(
        **SIZES, residual_multiplier=0.3, embedding_multiplier=4.0, attention_multiplier=0.1, logits_scaling=2.0
    ),
    "olmo2": transformers.Olmo2Config(**SIZES, attention_bias=True),
    "gemma2": transformers.Gemma2Config(
        **SIZES, head_dim=64, sliding_window=7, query_pre_attn_scalar=40, attn_logit_softcapping=2.0
    ),
}
FAMILY = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
SHARED_EXPERTS = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
MIXTURES = {
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=64, norm_topk_prob=True),
    # An MLP in the second layer, and weights of experts that do not add up to 1.
    "qwen3_moe-some": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1], norm_topk_prob=False),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=7),
    "gpt_oss": transformers.GptOssConfig(**SIZES, num_local_experts=8, head_dim=32, sliding_window=6),
    "olmoe": transformers.OlmoeConfig(**{**SIZES, "intermediate_size": 64}, num_experts=8, num_experts_per_tok=3),
    # An MLP in the first layer.
    "glm4_moe": transformers.Glm4MoeConfig(
        **SIZES, **SHARED_EXPERTS, **GROUPS, first_k_dense_replace=1, head_dim=32, use_qk_norm=True, attention_bias=True
    ),
}
LATENT = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 64, "v_head_dim": 32}
LATENT |= {**SIZES, **SHARED_EXPERTS, **GROUPS, "num_key_value_heads": 4}
MIXTURES |= {
    "deepseek_v3": transformers.DeepseekV3Config(**LATENT, q_lora_rank=64, first_k_dense_replace=1),
    "deepseek_v3-queries": transformers.DeepseekV3Config(
        **LATENT, q_lora_rank=None, first_k_dense_replace=1, rope_interleave=False
    ),
    "glm4_moe_lite": transformers.Glm4MoeLiteConfig(
        **LATENT, q_lora_rank=64, mlp_layer_types=["dense", "sparse", "sparse"]
    ),
}
MIXTURE = pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES.keys())


# --- Models -----------------------------------------------------------------------------------------------------------


def tiny_model(config, dtype: torch.dtype = torch.float32, quantized: bool = True, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")) or "norm" in name:  # ones and zeros would hide a mix-up
            nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.uniform_(buffer, -0.2, 0.2)
    return quantize_model(model, group_size=32) if quantized else model


def pair(config, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model and its prepared copy."""
    model = tiny_model(config, **options)
    return model, prepare_for_generation(copy.deepcopy(model))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=oracle.generator(seed))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, prompt: int, **options: Any) -> Tensor:
    """All logits of ids, of which the first `prompt` come at once and the others one by one."""
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    return torch.cat([model(part, **{cache_name(): cache}, **options).logits for part in parts], 1)


class Steps:
    """Counts the calls of the op."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.op = decoder._decoder_step
        monkeypatch.setattr(decoder, "_decoder_step", self)

    def __call__(self, *arguments: Any) -> Tensor:
        self.count += 1
        return self.op(*arguments)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def assert_same(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@FAMILY
@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "dense"])
@pytest.mark.parametrize("batch", [1, 3])
def test_same_logits(device: str, config, quantized: bool, batch: int, steps: Steps) -> None:
    model, prepared = pair(config, quantized=quantized)
    ids = tokens(batch, 24)
    expected = logits_of(model, ids, 5)
    assert steps.count == 0
    assert_same(logits_of(prepared.to(device), ids.to(device), 5), expected)
    assert steps.count == 20


@MIXTURE
@pytest.mark.parametrize("batch", [1, 3])
def test_same_logits_of_mixtures(device: str, config, batch: int, steps: Steps) -> None:
    model, prepared = pair(config)
    ids = tokens(batch, 24)
    expected = logits_of(model, ids, 5)
    assert_same(logits_of(prepared.to(device), ids.to(device), 5), expected)
    assert steps.count == 20


@MIXTURE
def test_greedy_tokens_of_mixtures(config) -> None:
    model, prepared = pair(config)
    options = {"max_new_tokens": 64, "do_sample": False}
    texts = [each.generate(tokens(1, 9), **options) for each in (model, prepared)]
    assert torch.equal(*texts) and texts[0].shape == (1, 73)


@MIXTURE
def test_mixtures_are_as_exact_as_the_unprepared_model(config) -> None:
    """Against the values of the quantized weights, in float64."""
    model, prepared = pair(config)
    exact = dequantize_model(copy.deepcopy(model)).double()
    exact.set_experts_implementation("eager")
    ids = tokens(2, 30)
    expected = logits_of(exact, ids, 20)
    errors = [(logits_of(each, ids, 20) - expected).abs().max() for each in (model, prepared)]
    assert errors[1] <= 2 * errors[0] + torch.finfo(torch.float32).eps * expected.abs().max()


@torch.no_grad()
@MIXTURE
def test_experts_in_floating_point_run_as_before(config, steps: Steps) -> None:
    model = tiny_model(config, quantized=False)
    quantize_model(model, group_size=32, predicate=lambda path, _: ".experts." not in path)
    prepared = prepare_for_generation(copy.deepcopy(model))
    assert_same(logits_of(prepared, tokens(2, 9), 5), logits_of(model, tokens(2, 9), 5))
    assert steps.count == 0


@torch.no_grad()
@MIXTURE
def test_formats_of_experts_may_differ(config, steps: Steps) -> None:
    """Where gates and values are no longer one product."""

    def predicate(path: str, layer: nn.Module) -> dict[str, int]:
        return {"bits": 8 if "up_proj" in path else 4}

    model = quantize_model(tiny_model(config, quantized=False), group_size=32, predicate=predicate)
    prepared = prepare_for_generation(copy.deepcopy(model))
    assert_same(logits_of(prepared, tokens(2, 12), 5), logits_of(model, tokens(2, 12), 5))
    assert steps.count == 8


@torch.no_grad()
def test_experts_whose_gates_and_values_take_turns(tmp_path: Path, steps: Steps) -> None:
    """As OpenAI stores those of gpt-oss."""
    dense = tiny_model(MIXTURES["gpt_oss"], quantized=False)
    tiny.openai_checkpoint(dense, tmp_path)
    with patched_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert hasattr(model.model.layers[0].mlp.experts, "gate_up_proj")
    prepared = prepare_for_generation(copy.deepcopy(model))
    assert_same(logits_of(prepared, tokens(2, 12), 5), logits_of(model, tokens(2, 12), 5))
    assert steps.count == 8


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False])
def test_norms_in_a_wider_dtype(exact: bool, steps: Steps) -> None:
    """Transformers keeps those of gpt-oss in float32. The op takes them where bfloat16 has their values."""
    model = tiny_model(MIXTURES["gpt_oss"], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + (0.0 if exact else 1e-5)
    prepared = prepare_for_generation(copy.deepcopy(model))
    ids = tokens(1, 12)
    logits, expected = (logits_of(each, ids, 5) for each in (prepared, model))
    assert logits.dtype == torch.bfloat16 and steps.count == (8 if exact else 0)
    assert (logits.float() - expected.float()).square().mean() < 0.01 * expected.float().square().mean()
    if exact:  # and notices that they change
        for each in (prepared, model):
            each.model.norm.weight.mul_(2.0)
        changed = logits_of(prepared, ids, 5).float()
        assert (changed - 2.0 * logits.float()).abs().max() < 0.02 * changed.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("part", ["gate", "experts", "router logits", "config"])
def test_what_asks_for_more_of_a_mixture_gets_it(part: str, steps: Steps) -> None:
    _, prepared = pair(MIXTURES["qwen3_moe"])
    ids, calls, options = tokens(1, 4), [], {}
    if part == "router logits":
        options["output_router_logits"] = True
    elif part == "config":
        prepared.config.output_router_logits = True
    else:
        module = getattr(prepared.model.layers[1].mlp, part)
        module.register_forward_hook(lambda *_: calls.append(1))
    output = prepared(ids, **options)
    assert steps.count == 0
    assert len(calls) == 1 if not options and part != "config" else len(output.router_logits) == 3


@torch.no_grad()
def test_the_output_is_that_of_the_class() -> None:
    for config in (MIXTURES["mixtral"], FAMILIES["llama"]):
        model, prepared = pair(config)
        assert type(prepared.model(tokens(1, 4))) is type(model.model(tokens(1, 4)))


@pytest.mark.parametrize(
    "config",
    [
        *(FAMILIES[name] for name in ("llama", "mistral-sliding", "olmo2", "gemma2")),
        *(MIXTURES[name] for name in ("gpt_oss", "deepseek_v3")),
    ],
    ids=("all", "window", "norms", "softcap", "mixture", "latent"),
)
def test_same_logits_of_padded_batches(device: str, config, steps: Steps) -> None:
    """Single tokens and several, of sequences that begin at other positions."""
    model, prepared = pair(config)
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    results = []
    for each, where in ((model, "cpu"), (prepared.to(device), device)):
        cache = DynamicCache(config=each.config)
        logits = []
        for begin, end in itertools.pairwise((0, 7, 8, 9, 13, 14, 20)):
            inputs = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
            inputs["position_ids"] = positions[:, begin:end]
            inputs = {name: tensor.to(where) for name, tensor in inputs.items()}
            with torch.no_grad():
                logits.append(each(**inputs, **{cache_name(): cache}).logits.cpu())
        results.append(torch.cat(logits, 1)[mask.bool()])
    assert_same(results[1], results[0])
    assert steps.count == 6


def test_without_a_cache(device: str, steps: Steps) -> None:
    model, prepared = pair(FAMILIES["qwen3"])
    ids = tokens(2, 11)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert_same(prepared.to(device)(ids.to(device), use_cache=False).logits, expected)
        embeddings = prepared.model.embed_tokens(ids.to(device))
        assert_same(prepared(inputs_embeds=embeddings, use_cache=False).logits, expected)
    assert steps.count == 2


@FAMILY
def test_same_logits_of_long_prompts(config) -> None:
    model, prepared = pair(config)
    with torch.no_grad():
        for length in (255, 256, 300):
            ids = tokens(2, length)
            expected, logits = (each(ids).logits for each in (model, prepared))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_no_further_from_float32_than_the_unprepared_model(dtype: torch.dtype, steps: Steps) -> None:
    model, prepared = pair(FAMILIES["qwen3"], dtype=dtype)
    ids = tokens(2, 60)
    exact = logits_of(copy.deepcopy(model).float(), ids, 20)
    errors = [(logits_of(each, ids, 20).float() - exact).square().mean().sqrt() for each in (model, prepared)]
    assert steps.count > 0
    assert errors[1] <= 1.25 * errors[0]


def test_mixed_formats_of_one_input(steps: Steps) -> None:
    def predicate(path: str, layer: nn.Module) -> bool | dict[str, int]:
        return "k_proj" not in path and {"bits": 8 if "v_proj" in path or "up_proj" in path else 4}

    model = quantize_model(tiny_model(FAMILIES["llama"], quantized=False), group_size=32, predicate=predicate)
    prepared = prepare_for_generation(copy.deepcopy(model))
    ids = tokens(1, 12)
    torch.testing.assert_close(logits_of(prepared, ids, 5), logits_of(model, ids, 5), rtol=1e-4, atol=1e-3)
    assert steps.count > 0


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 20},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},  # crops the cache
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked prompt": {"prefill_chunk_size": 4},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE.keys())
def test_generate_gives_the_same_tokens(options: dict[str, Any]) -> None:
    attention = {"attn_implementation": "eager"} if "output_attentions" in options else {}
    model, prepared = pair(FAMILIES["llama"], **attention)
    prompt = tokens(1, 6).repeat(1, 3)
    results = []
    for each in (model, prepared):
        torch.manual_seed(1)
        result = each.generate(prompt, max_new_tokens=300 if not options else 20, **options)
        if "output_attentions" in options:
            assert len(result.attentions[1]) == each.config.num_hidden_layers
        results.append(result if isinstance(result, Tensor) else result.sequences)
    assert torch.equal(*results)


def test_padded_batches() -> None:
    model, prepared = pair(FAMILIES["llama"])
    prompt = tokens(2, 8)
    mask = torch.ones_like(prompt)
    prompt[0, :3] = mask[0, :3] = 0
    texts = [each.generate(prompt, attention_mask=mask, max_new_tokens=12) for each in (model, prepared)]
    assert torch.equal(*texts)


def test_a_cache_that_others_change(steps: Steps) -> None:
    """Tokens that come several at once, and a cache that is cropped, reordered, copied and continued."""
    model, prepared = pair(FAMILIES["llama"])
    ids = tokens(2, 16)
    results = []
    with torch.no_grad():
        for each in (model, prepared):
            cache = DynamicCache(config=each.config)
            logits = [each(part, **{cache_name(): cache}).logits for part in ids.split([4, 1, 1, 3, 1, 6], 1)]
            cache.crop(-5)
            logits += [each(ids[:, 11:12], **{cache_name(): cache}).logits]
            twin = copy.deepcopy(cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            logits += [each(ids[:, 12:13], **{cache_name(): each_cache}).logits for each_cache in (cache, twin, cache)]
            assert cache.get_seq_length() == 14 and twin.get_seq_length() == 13
            results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-3)
    assert steps.count == 10


class TorchKernels(TorchDispatchMode):
    """Counts the ops of torch within the op that compute anything."""

    allocating = ("empty", "empty_like", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ops.decoder_step.default:
            self.is_inside = True
            with self:
                result = func.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *args, **kwargs
                )
            self.is_inside = False
            return result
        computes = func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ not in self.allocating
        self.count += self.is_inside and computes
        return func(*args, **kwargs)


def launches_of_one_token(config: Any) -> tuple[set[str], int]:
    """The ops that run, and their launches with those of torch's ops within the decoder."""
    _, prepared = pair(config, dtype=torch.float16)
    cache = DynamicCache(config=config)
    prepared(tokens(1, 5), **{cache_name(): cache})
    plans = explain(prepared, tokens(1, 1), **{cache_name(): cache}, gpu="applegpu_g15s")
    with TorchKernels() as kernels:
        prepared(tokens(1, 1), **{cache_name(): cache})
    return {plan.op for plan in plans}, sum(len(plan.launches) for plan in plans) + kernels.count


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma2", "gemma3", "granite"]
)
def test_launches_of_one_token(name: str) -> None:
    """Beside those of all layers: embedding, first norm and the product with the vocabulary."""
    config = FAMILIES[name]
    ops_that_run, launches = launches_of_one_token(config)
    assert {"rope_into_cache", "scaled_dot_product_attention", "quantized_gated_matmul"} < ops_that_run
    assert launches == 8 * config.num_hidden_layers + 3


@torch.no_grad()
def test_launches_of_one_token_of_olmo2() -> None:
    """No first norm."""
    config = transformers.Olmo2Config(**SIZES)
    _, launches = launches_of_one_token(config)
    assert launches == 8 * config.num_hidden_layers + 2


@torch.no_grad()
@pytest.mark.parametrize("name, per_layer", [("qwen3_moe", 12), ("mixtral", 12), ("gpt_oss", 13)])
def test_launches_of_one_token_of_a_mixture(name: str, per_layer: int) -> None:
    """Those of torch among them: the router's product and, in gpt-oss, a bias."""
    config = MIXTURES[name]
    ops_that_run, launches = launches_of_one_token(config)
    assert {"moe_router", "swiglu", "moe_combine"} < ops_that_run
    assert launches == per_layer * config.num_hidden_layers + 3


@torch.no_grad()
def test_cropped_caches_keep_their_memory() -> None:
    """As in speculative decoding, where every step crops."""
    _, prepared = pair(FAMILIES["llama"])
    cache = DynamicCache(config=prepared.config)
    prepared(tokens(1, 6), **{cache_name(): cache})
    memory = [layer.buffers[0].data_ptr() for layer in cache.layers]
    for _ in range(3):
        cache.crop(-2)
        assert cache.get_seq_length() == 4
        prepared(tokens(1, 2), **{cache_name(): cache})
    assert [layer.buffers[0].data_ptr() for layer in cache.layers] == memory
    cache.crop(-6)
    assert cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3-queries", "glm4_moe_lite"])
def test_latent_attention_with_prompts_of_any_length(name: str, steps: Steps) -> None:
    """Few tokens in the absorbed form, many with keys and values; a cache that the model's own code goes on with."""
    model, prepared = pair(MIXTURES[name])
    ids = tokens(2, 90)
    results = []
    for each in (model, prepared):
        cache = DynamicCache(config=each.config)
        logits = [each(part, **{cache_name(): cache}).logits for part in ids.split([16, 17, 40, 5, 1, 11], 1)]
        cache.crop(-3)
        logits.append(each(ids[:, 87:88], **{cache_name(): cache}).logits)
        with torch.enable_grad():
            logits.append(each(ids[:, 88:89], **{cache_name(): cache}).logits.detach())
        logits.append(each(ids[:, 89:], **{cache_name(): cache}).logits)
        results.append(torch.cat(logits, 1))
    assert_same(results[1], results[0])
    assert steps.count == 8


@torch.no_grad()
def test_embeddings_are_looked_up_once(steps: Steps) -> None:
    """Also where the model's own code does the rest."""
    _, prepared = pair(FAMILIES["llama"])
    calls = []
    prepared.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    prepared(tokens(1, 4), **{cache_name(): transformers.StaticCache(config=prepared.config, max_cache_len=8)})
    assert (len(calls), steps.count) == (1, 0)
    prepared(tokens(1, 4))
    assert (len(calls), steps.count) == (2, 1)


def test_parameters_keep_names_and_values_and_share_memory() -> None:
    model = tiny_model(FAMILIES["llama-biases"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prepare_for_generation(model)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        oracle.assert_identical(tensor, before[name], name)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    attention = model.model.layers[0].self_attn
    storages = {layer.weight_packed.untyped_storage().data_ptr() for layer in (attention.q_proj, attention.v_proj)}
    assert len(storages) == 1


def test_checkpoints_of_prepared_models(tmp_path: Path) -> None:
    model, prepared = pair(FAMILIES["llama"])
    save_checkpoint(prepared, tmp_path)
    loaded = load_checkpoint(tmp_path)
    for name, tensor in loaded.state_dict().items():
        oracle.assert_identical(tensor, model.state_dict()[name], name)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_tensors_loaded_later_count(assign: bool) -> None:
    model, prepared = pair(FAMILIES["llama"])
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0)
    prepared.load_state_dict(model.state_dict(), assign=assign)
    ids = tokens(1, 12)
    torch.testing.assert_close(logits_of(prepared, ids, 5), logits_of(model, ids, 5), rtol=1e-4, atol=1e-3)


def test_change_of_dtype(steps: Steps) -> None:
    model, prepared = pair(FAMILIES["llama"])
    ids = tokens(1, 12)
    expected = logits_of(model, ids, 5)
    logits = logits_of(prepared.bfloat16(), ids, 5)
    assert logits.dtype == torch.bfloat16 and steps.count > 0
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_gradients_are_those_of_the_unprepared_model() -> None:
    gradients = []
    for model in pair(FAMILIES["llama"], quantized=False):
        model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model, prepared = pair(FAMILIES["llama"])
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
    ids = tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-3)


def test_autocast_gives_what_it_gives_unprepared() -> None:
    model, prepared = pair(FAMILIES["llama"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = (logits_of(each, tokens(1, 9), 5) for each in (prepared, model))
    assert torch.equal(ours, expected) and ours.dtype == torch.bfloat16


def test_parameters_that_take_the_place_of_others_are_read() -> None:
    plain, prepared = pair(LlamaConfig(**SIZES), quantized=False)
    tokens = torch.tensor([[1, 2, 3]])
    for name in ("input_layernorm", "mlp.down_proj"):
        with torch.no_grad():
            prepared(tokens)
            for model in (plain, prepared):
                module = model.model.layers[0].get_submodule(name)
                for seed in (1, 2):
                    values = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(seed))
                    module.weight = nn.Parameter(values)
            assert (prepared(tokens).logits - plain(tokens).logits).abs().max() < 1e-5


@pytest.mark.parametrize("change", ["adapters", "dequantized", "another layer"])
def test_what_takes_the_place_of_projections_is_called(change: str) -> None:
    """Also where no gradients are wanted, in steps and in prompts."""
    _, prepared = pair(FAMILIES["llama"])
    before = logits_of(prepared, tokens(1, 9), 5)
    if change == "adapters":
        config = LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False)
        prepared = get_peft_model(prepared, config).eval()
    elif change == "dequantized":
        dequantize_model(prepared)
        prepared.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    else:
        linear = nn.Linear(*prepared.model.layers[1].self_attn.o_proj.weight.shape, bias=False)
        prepared.model.layers[1].self_attn.o_proj = linear
    with torch.enable_grad():  # by Transformers' own code
        expected = logits_of(prepared, tokens(1, 9), 5).detach()
    ours = logits_of(prepared, tokens(1, 9), 5)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ours, before, rtol=1e-2, atol=1e-2)


PARTS = ["norm", *(f"layers.1{part}" for part in ("", ".self_attn", ".mlp", ".input_layernorm", ".mlp.act_fn"))]


@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", ["hook", "forward"])
@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
def test_what_changes_a_part_of_a_layer_runs(part: str, change: str, first: bool, steps: Steps) -> None:
    """Also where the op has run before, and only as long as it is there."""
    _, prepared = pair(FAMILIES["llama"])
    module = prepared.model.get_submodule(part)
    ids, calls = tokens(1, 6), []
    if first:
        logits_of(prepared, ids, 4)
    before = steps.count
    if change == "hook":
        handle = module.register_forward_hook(lambda *_: calls.append(1))
    else:  # as accelerate gives it to a module
        original = module.forward
        module.forward = lambda *arguments, **options: (calls.append(1), original(*arguments, **options))[1]
    logits_of(prepared, ids, 4)
    assert (len(calls), steps.count) == (3, before)
    if change == "hook":
        handle.remove()
    else:
        del module.forward
    logits_of(prepared, ids, 4)
    assert (len(calls), steps.count) == (3, before + 3)


def set_epsilon(model: LlamaModel, *norms: str) -> None:
    for name in norms:
        getattr(model.layers[1], name).variance_epsilon = 9.0


CHANGES = {
    "scale": ("qwen3", lambda model: setattr(model.layers[1].self_attn, "scaling", 0.3), 3),
    "epsilon": ("llama", lambda model: set_epsilon(model, "input_layernorm", "post_attention_layernorm"), 3),
    "one epsilon": ("llama", lambda model: set_epsilon(model, "input_layernorm"), 0),
    "norm": ("qwen3", lambda model: setattr(model, "norm", copy.deepcopy(model.layers[0].input_layernorm)), 3),
    "layers": ("llama", lambda model: model.layers.__delitem__(2), 3),
    "number of layers": ("llama", lambda model: setattr(model.config, "num_hidden_layers", 2), 3),
}


@torch.no_grad()
@pytest.mark.parametrize("family, change, count", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_after_the_first_step_counts(family: str, change: Any, count: int, steps: Steps) -> None:
    model, prepared = pair(FAMILIES[family])
    ids = tokens(1, 9)
    unchanged = logits_of(prepared, ids, 7)
    before = steps.count
    assert before == 3
    change(model.model)
    change(prepared.model)
    logits = logits_of(prepared, ids, 7)
    assert steps.count == before + count
    assert_same(logits, logits_of(model, ids, 7))
    assert not torch.allclose(logits, unchanged, rtol=1e-3, atol=1e-3)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


WIDE = {"hidden_size": 512, "intermediate_size": 1024}


@torch.no_grad()
def test_the_same_bits_whatever_the_number_of_threads(threads: Any) -> None:
    config = Qwen3Config(**{**SIZES, **WIDE}, head_dim=64)
    prepared = prepare_for_generation(tiny_model(config))
    ids = tokens(1, 40)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(logits_of(prepared, ids, 20))
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_several_threads_decode_at_once(threads: Any) -> None:
    config = Qwen3Config(**{**SIZES, **WIDE}, head_dim=64)
    prepared = prepare_for_generation(tiny_model(config))
    inputs = [tokens(1, 30, seed) for seed in range(6)]
    threads(2)
    expected = [logits_of(prepared, ids, 10) for ids in inputs]

    def decode(ids: Tensor) -> Tensor:
        with torch.no_grad():  # which is a thread's own
            return logits_of(prepared, ids, 10)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(decode, inputs))
    assert all(torch.equal(*each) for each in zip(results, expected, strict=True))


def test_second_call_changes_nothing() -> None:
    _, prepared = pair(FAMILIES["llama"])
    kinds = [type(module) for module in prepared.modules()]
    assert prepare_for_generation(prepared) is prepared
    assert [type(module) for module in prepared.modules()] == kinds


def test_refuses_unknown_models() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no decoder layer of a known kind; known are .*Llama"):
        prepare_for_generation(AutoModelForCausalLM.from_config(config))


# --- Keyword arguments of forward, and other versions of Transformers ------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("part", ["token", "prompt", "gradients"])
def test_unknown_keyword_arguments_are_refused(part: str) -> None:
    """A name that another version of Transformers gives to something is not one to drop."""
    _, prepared = pair(FAMILIES["llama"])
    stack, ids = prepared.model, tokens(1, 1 if part == "token" else 5)
    call = partial(stack, ids)
    cache = DynamicCache(config=prepared.config)
    with torch.set_grad_enabled(part == "gradients"):
        call(**{cache_name(): cache})
        with pytest.raises(TypeError, match=r"\.forward\(\) got unexpected keyword arguments: kv_cache; supported are"):
            call(kv_cache=cache)


@torch.no_grad()
def test_the_cache_by_either_name() -> None:
    model, prepared = pair(FAMILIES["llama"])
    ids = tokens(1, 8)
    expected = logits_of(model, ids, 5)
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        states = [prepared.model(part, **{name: cache}).last_hidden_state for part in ids.split([5, 1, 1, 1], 1)]
        torch.testing.assert_close(prepared.lm_head(torch.cat(states, 1)), expected, rtol=1e-4, atol=1e-3)
        assert cache.get_seq_length() == 8
    with pytest.raises(TypeError, match="the cache twice, as cache and as past_key_values"):
        prepared.model(ids, cache=cache, past_key_values=cache)


@pytest.mark.exhaustive
def test_continuous_batching() -> None:
    model, prepared = pair(FAMILIES["llama"])
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 5)]
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    texts = []
    for each in (model, prepared):
        results = each.generate_batch(inputs=prompts, generation_config=config).values()
        texts.append(sorted((result.prompt_ids, result.generated_tokens) for result in results))
    assert texts[0] == texts[1]
    alone = [model.generate(torch.tensor([prompt]), generation_config=config)[0].tolist() for prompt in prompts]
    assert sorted(prompt + text for prompt, text in texts[1]) == sorted(alone)


def test_prepared_modules_are_modules() -> None:
    """Nothing of theirs has another meaning in their new class."""
    names = [name for name in dir(nn.Module) if callable(getattr(nn.Module, name))]
    for module in pair(FAMILIES["llama"])[1].modules():
        assert [name for name in names if not callable(getattr(module, name))] == []


OPTIONS = {
    "bidirectional": {"is_causal": False},
    "tuple": {"return_dict": False},
    "hidden states": {"output_hidden_states": True},
    "sequence lengths": {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 4])},
}


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_known_keyword_arguments_count(options: dict[str, Any]) -> None:
    model, prepared = pair(FAMILIES["llama"])
    ids = tokens(1, 6)
    results = []
    for each in (model.model, prepared.model):
        cache = DynamicCache(config=model.config)
        outputs = [each(part, **{cache_name(): cache}, **options) for part in ids.split([4, 1, 1], 1)]
        assert {type(output) is tuple for output in outputs} == {"return_dict" in options}
        hidden = [output.hidden_states for output in outputs if "output_hidden_states" in options]
        results.append([output[0] for output in outputs] + [state for states in hidden for state in states])
    assert len(results[0]) == len(results[1])
    for state, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


def test_another_signature_is_refused() -> None:
    """What another version of Transformers passes to its models, prepared ones would not know."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, kv: Any = None) -> Tensor:
        return input_ids

    names = {"__module__": LlamaModel.__module__, "forward": forward}
    model = tiny_model(FAMILIES["llama"])
    model.model.__class__ = type("LlamaModel", (LlamaModel,), names)
    with pytest.raises(TypeError, match=r"forward has none of the parameters cache, past_key_values; it takes .* kv"):
        prepare_for_generation(model)


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_further_submodules_are_refused(part: str) -> None:
    """They would be left out of what the ops compute."""
    model = tiny_model(FAMILIES["llama"])
    for layer in model.model.layers:
        getattr(layer, part).gate = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="no decoder layer of a known kind"):
        prepare_for_generation(model)


# --- The op -----------------------------------------------------------------------------------------------------------


def op_arguments() -> dict[str, Any]:
    """Those of two tokens of a prepared model, with an empty cache."""
    stack = pair(FAMILIES["qwen3"])[1].model
    x = torch.ones(1, 2, SIZES["hidden_size"])
    cosines, sines = stack.rotary_emb(x, torch.arange(2)[None])
    keys, values = ([torch.zeros(1, 2, 5, 64) for _ in stack.layers] for _ in range(2))
    with torch.no_grad():
        decoder_of_stack = stack._decoder().decoder
    lists = {"cosines": [cosines], "sines": [sines], "keys": keys, "values": values}
    return {"decoder": decoder_of_stack, "x": x, **lists, "position": 0, "mask": None}


OP_ERRORS = {
    "keys": ({"keys": lambda all: all[1:]}, r"2 keys and 3 values do not fit 3 layers"),
    "rotations": ({"sines": lambda all: []}, r"a layer has rotation 0, and there are 1 cosines and 0 sines"),
    "rank": ({"x": lambda x: x[0]}, r"x of shape \[2, 128\] must be \[batch, tokens, hidden size\]"),
}


@pytest.mark.parametrize("changes, message", OP_ERRORS.values(), ids=OP_ERRORS.keys())
def test_op_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    arguments = op_arguments()
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=rf"\[decoder_step\] {message}"):
        decoder._decoder_step(**arguments)


def test_op_has_no_gradients() -> None:
    arguments = op_arguments()
    y = decoder._decoder_step(**arguments | {"x": arguments["x"].requires_grad_()})
    with pytest.raises(RuntimeError, match=r"decoder_step.* is not implemented"):
        y.sum().backward()


def test_unknown_norms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[decoder_step\] norms has unknown names; known are attention, "):
        decoder._classes.DecoderLayer(
            [], None, [], [], [], None, {"other": torch.ones(8)}, None, 0.1, 1.0, None, None, 0, 1.0, "silu"
        )


# --- The demo's model -------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive  # the demo, which test_demo.py runs, compares the two answers as well
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_same_greedy_text_on_a_real_model(dtype: torch.dtype) -> None:
    """Up to ties: where the two first differ, the unprepared model takes both tokens for about equally likely."""
    demo = load_demo()
    tokenizer, model = demo.load_gguf()
    quantize_model(model.to(dtype), group_size=demo.GROUP_SIZE)
    prompt = demo.chat(tokenizer, "What is the capital of France?")
    prepared = prepare_for_generation(copy.deepcopy(model))
    texts = [each.generate(prompt, max_new_tokens=48, do_sample=False)[0] for each in (model, prepared)]
    assert "Paris" in tokenizer.decode(texts[1])
    length = min(map(len, texts))
    differs = (texts[0][:length] != texts[1][:length]).nonzero()
    if len(differs):
        first = int(differs[0])
        with torch.no_grad():
            logits = model(texts[0][None, :first]).logits[0, -1].float()
        gap = (logits[texts[0][first]] - logits[texts[1][first]]).item()
        assert 0 <= gap <= 8 * torch.finfo(dtype).eps * logits.abs().max().item()
    else:
        assert len(texts[0]) == len(texts[1])
