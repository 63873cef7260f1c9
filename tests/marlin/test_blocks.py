"""Marlin's attention, mixtures of experts and decoder layers against those of Transformers on the same values."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
from blocks import (
    BATCH,
    FAMILIES,
    GROUP_SIZE,
    HIDDEN,
    LATENT,
    MIXTURES,
    Decoder,
    assert_as_good,
    causal,
    decoder,
    greedy,
    in_chunks,
    layer_output,
    new_cache,
    randomized,
    twin,
)
from oracle import name_of
from quantization_mlx.marlin import (
    MetalAttention,
    MetalKVCache,
    MetalKVCacheConfig,
    MetalMLAAttention,
    MetalMLP,
    MetalMoELayer,
    MetalQuantizedLinear,
    MetalTransformerBlock,
    Rotary,
    load_quantized,
    save_quantized,
)
from quantization_mlx.marlin.generate import GenerationConfig, generate
from repository import load_demo

TOKENS = 20
CHUNKS = {"prompt": (20,), "tokens": (1,) * 20, "chunks": (3, 9, 1, 7)}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)


def states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return oracle.random_x(*(shape or (BATCH, TOKENS, HIDDEN)), dtype=dtype)


def block_of(family: str, dtype: torch.dtype = torch.float32, layer: int = 1, **options: Any) -> tuple[Any, ...]:
    """A block, the layer that it was made of, and the model of that."""
    model = decoder(family, **options).to(dtype)
    return MetalTransformerBlock.from_float(model.model.layers[layer], 8, GROUP_SIZE), model.model.layers[layer], model


# --- Values -----------------------------------------------------------------------------------------------------------


@DTYPE
@FAMILY
def test_block_computes_what_the_layer_does(family: str, dtype: torch.dtype) -> None:
    # In half precision rounding decides between experts that are about as good: there each token passes all.
    options = {"num_experts_per_tok": 8, "n_group": 1} if family in MIXTURES and dtype != torch.float32 else {}
    block, layer, model = block_of(family, dtype, **options)
    x = states(dtype=dtype)
    with torch.no_grad():
        exact = layer_output(copy.deepcopy(model).double(), twin(block, layer, torch.float64), x.double())
        own = layer_output(model, twin(block, layer, dtype), x)
        assert_as_good(block(x), exact, own)
        for chunks in CHUNKS.values():
            assert_as_good(in_chunks(block, x, chunks, new_cache(block.self_attn, dtype)), exact, own)


@DTYPE
@pytest.mark.parametrize("family", MIXTURES)
def test_mixture_computes_what_the_module_does(family: str, dtype: torch.dtype) -> None:
    module = decoder(family).to(dtype).model.layers[1].mlp
    ours = MetalMoELayer.from_float(module, 8, GROUP_SIZE)
    exactly, roughly = twin(ours, module, torch.float64), twin(ours, module, dtype)
    x = states(1, 80, HIDDEN, dtype=dtype)
    with torch.no_grad():
        # Not the tokens for which rounding decides between experts.
        same = [
            sorted(each) == sorted(other) for each, other in zip(chosen(exactly, x), chosen(roughly, x), strict=True)
        ]
        x = x[:, same]
        assert x.shape[1] >= 40
        assert_as_good(ours(x), exactly(x.double()), roughly(x))


def chosen(mixture: nn.Module, x: Tensor) -> list[list[int]]:
    """The experts of each token."""
    return mixture.gate(x[0].to(mixture.experts.down_proj.dtype))[2].tolist()


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("family", LATENT)
def test_latent_attention_absorbs_for_few_tokens(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what it gives with the keys and values expanded."""
    module = decoder(family).model.layers[0].self_attn
    ours = MetalMLAAttention.from_float(module, 4, GROUP_SIZE)
    calls = []
    monkeypatch.setattr(
        ours.kv_b_proj, "multiply", lambda x: calls.append(x.shape) or type(ours.kv_b_proj).multiply(ours.kv_b_proj, x)
    )
    x = states(BATCH, tokens, HIDDEN)
    with torch.no_grad():
        y = ours(x)
        assert bool(calls) == (tokens == 40)
        ours.kv_b_proj.register_forward_hook(lambda *_: None)  # is called: nothing may pass it by
        oracle.assert_within(ours(x), y.double(), 1e-5 * y.abs().max())
        assert calls


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.0},
}


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("family", ["Llama", "DeepseekV3"])
def test_rope_parameters(family: str, rope_type: str) -> None:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    block, layer, model = block_of(family, layer=0, rope_parameters=parameters)
    x = states()
    with torch.no_grad():
        exact = layer_output(copy.deepcopy(model).double(), twin(block, layer, torch.float64), x.double())
        own = layer_output(model, twin(block, layer, torch.float32), x)
        plain = decoder(family)
        assert (layer_output(plain, layer, x) - layer_output(model, layer, x)).abs().max() > 1e-3
        for chunks in CHUNKS.values():
            assert_as_good(in_chunks(block, x, chunks, new_cache(block.self_attn)), exact, own)
    half = copy.deepcopy(block).bfloat16()
    assert half.self_attn.rotary.freqs.dtype == torch.float32
    oracle.assert_identical(half.self_attn.rotary.freqs, block.self_attn.rotary.freqs)


def test_blocks_with_other_frequencies_are_saved_and_loaded(tmp_path: Path) -> None:
    """Into others of the same sizes, which have room for these."""
    parameters = {"rope_type": "llama3", "rope_theta": 10000.0, **ROPES["llama3"]}
    block, _, model = block_of("Llama", rope_parameters=parameters)
    save_quantized(nn.Sequential(block), tmp_path)
    positions = model.config.max_position_embeddings

    def made(**options: Any) -> nn.Module:
        attention = MetalAttention(HIDDEN, 4, 2, bits=8, group_size=GROUP_SIZE, **options)
        sizes = {"bits": 8, "group_size": GROUP_SIZE, "rms_norm_eps": block.input_layernorm.eps}
        return nn.Sequential(
            MetalTransformerBlock(HIDDEN, 4, model.config.intermediate_size, self_attn=attention, **sizes)
        )

    loaded = load_quantized(tmp_path, "cpu", model=made(rotary=Rotary(32, positions, freqs=torch.empty(16))))
    oracle.assert_identical(loaded(states()), block(states()))
    with pytest.raises(ValueError, match=r"unexpected tensors: 0\.self_attn\.rotary\.freqs"):
        load_quantized(tmp_path, "cpu", model=made())


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(rope_type: str) -> None:
    factors = {"factor": 2.0, "original_max_position_embeddings": 16}
    factors |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16} if rope_type == "longrope" else {}
    model = decoder("Llama", rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **factors})
    message = (
        f"[MetalAttention.from_float] rope_parameters have the rope_type '{rope_type}'; supported are default, lin"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        MetalTransformerBlock.from_float(model.model.layers[0], 8, GROUP_SIZE)


def test_theta_and_ratio_are_those_of_the_frequencies() -> None:
    parameters = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    module = decoder("Llama", rope_parameters=parameters).model.layers[0].self_attn
    expected = MetalAttention.from_float(module, 8, GROUP_SIZE)
    ours = MetalAttention(HIDDEN, 4, 2, bits=8, group_size=GROUP_SIZE, rope_theta=500.0, rope_ratio=0.25)
    ours.load_state_dict({name: each for name, each in expected.state_dict().items() if name != "rotary.freqs"})
    with torch.no_grad():
        oracle.assert_within(ours(states()), expected(states()).double(), 1e-5)


# --- Masks ------------------------------------------------------------------------------------------------------------


def padding() -> Tensor:
    """bool [batch, tokens]: the first text begins with six tokens of padding."""
    seen = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    seen[0, :6] = False
    return seen


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=name_of)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "DeepseekV3"])
def test_masks_of_padding(family: str, dtype: torch.dtype) -> None:
    block, layer, model = block_of(family, layer=0)
    x, seen = states(), padding()
    visible = causal(TOKENS, getattr(model.config, "sliding_window", None)) & seen[:, None, None]
    with torch.no_grad():
        expected = layer_output(model, twin(block, layer, torch.float32), x, visible).double()[seen]
        for chunks in CHUNKS.values():
            found = in_chunks(block, x, chunks, new_cache(block.self_attn), seen.to(dtype))
            oracle.assert_within(found[seen], expected, 1e-5 * expected.abs().max())
            assert found.isfinite().all()
        oracle.assert_within(block(x, seen.to(dtype))[seen], expected, 1e-5 * expected.abs().max())


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda visible: visible,
    "bool of heads": lambda visible: visible.expand(BATCH, 4, -1, -1),
    "bool, three dimensions": lambda visible: visible[0],
    "float": lambda visible: torch.zeros(visible.shape).masked_fill(~visible, -torch.inf),
    "float64": lambda visible: torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf),
    "float, two dimensions": lambda visible: torch.zeros(visible.shape[2:]).masked_fill(~visible[0, 0], -torch.inf),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("family", ["Mistral", "DeepseekV3"])
def test_other_masks_are_the_whole_mask(family: str, kind: str) -> None:
    """Tokens see later ones, and no window counts."""
    block, layer, model = block_of(family, layer=0)
    x = states()
    visible = (causal(TOKENS) | (torch.arange(TOKENS) < 9)) & (torch.arange(TOKENS) != 2)
    with torch.no_grad():
        expected = layer_output(model, twin(block, layer, torch.float32), x, visible).double()
        found = block(x, WHOLE[kind](visible))
    oracle.assert_within(found, expected, 1e-5 * expected.abs().max())


def test_a_mask_beside_a_cache_is_of_all_keys() -> None:
    block, layer, model = block_of("Llama")
    x = states()
    visible = causal(TOKENS) & (torch.arange(TOKENS) != 2)
    with torch.no_grad():
        expected = layer_output(model, twin(block, layer, torch.float32), x, visible).double()
        cache = new_cache(block.self_attn)
        first = block(x[:, :12], visible[..., :12, :12], cache)
        cache.advance(12)
        rest = block(x[:, 12:], visible[..., 12:, :], cache)
    oracle.assert_within(torch.cat((first, rest), 1), expected, 1e-5 * expected.abs().max())


def test_a_token_that_sees_nothing_gets_zeros() -> None:
    attention = randomized(MetalAttention(HIDDEN, 4, group_size=GROUP_SIZE))
    y = attention(states(), torch.zeros(BATCH, TOKENS, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(y))


# --- Caches -----------------------------------------------------------------------------------------------------------


class Rounding:
    """A cache that rounds keys and values to float16 and holds them in float32."""

    def __init__(self) -> None:
        self.seq_len, self.held = 0, ()

    def update(self, layer_idx: int, *new: Tensor) -> tuple[Tensor, ...]:
        new = tuple(each.half().float() for each in new)
        self.held = tuple(torch.cat(pair, 2) for pair in zip(self.held, new, strict=True)) if self.held else new
        return self.held

    def advance(self, tokens: int) -> None:
        self.seq_len += tokens


@pytest.mark.parametrize("family", ["Llama", "DeepseekV3"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_cache_of_another_dtype(family: str, chunks: tuple[int, ...]) -> None:
    """Attention computes in the wider one, and the result is of that of the activations."""
    attention = block_of(family)[0].self_attn
    x = states()
    expected = in_chunks(attention, x, chunks, Rounding()).double()
    found = in_chunks(attention, x, chunks, new_cache(attention, torch.float16))
    assert found.dtype == torch.float32
    oracle.assert_within(found, expected, 1e-5 * expected.abs().max())
    wide = in_chunks(attention, x.bfloat16(), chunks, new_cache(attention, torch.float32))
    assert wide.dtype == torch.bfloat16
    oracle.assert_within(wide, attention(x).double(), 0.05 * expected.abs().max())


def small_blocks(kind: str, **place: Any) -> list[MetalTransformerBlock]:
    """Two of them, made from sizes."""
    sizes = {"bits": 4, "group_size": GROUP_SIZE, **place}
    rank = {"kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16}
    sigmoid = {"scoring": "sigmoid", "normalise": True, "scale": 1.5, "groups": 2, "groups_used": 1}
    shared = {"routing": sigmoid, "has_score_bias": True, "routes_in_float32": True, "shared_intermediate_size": 64}
    parts: dict[str, Callable[[], dict[str, nn.Module]]] = {
        "attention": dict,
        "latent": lambda: {"self_attn": MetalMLAAttention(HIDDEN, 4, **rank, **sizes)},
        "mixture": lambda: {"mlp": MetalMoELayer(HIDDEN, 64, 8, 3, **sizes)},
        "latent and mixture": lambda: {
            "self_attn": MetalMLAAttention(HIDDEN, 4, **rank, **sizes),
            "mlp": MetalMoELayer(HIDDEN, 64, 8, 2, **sizes, **shared),
        },
    }
    return [MetalTransformerBlock(HIDDEN, 4, 256, **sizes, **parts[kind]()) for _ in range(2)]


KINDS = ("attention", "latent", "mixture", "latent and mixture")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_with_and_without_a_cache(kind: str) -> None:
    """Over 300 tokens. Without one, one pass over the text shows which token follows each of its beginnings."""
    model = randomized(Decoder(small_blocks(kind))).eval()
    prompt = torch.tensor([[5, 17, 3, 90, 44, 8, 8, 71, 2, 60]])
    text = greedy(model, prompt, 300)
    assert len(set(text)) > 10  # it does not repeat a few tokens
    with torch.no_grad():
        following = model(torch.tensor([prompt[0].tolist() + text[:-1]]))[0].argmax(-1)
    assert following[prompt.shape[1] - 1 :].tolist() == text
    assert greedy(model, prompt, 12, cached=False) == text[:12]


# --- A real model -----------------------------------------------------------------------------------------------------


class Smol(nn.Module):
    """A Llama model on blocks."""

    def __init__(self, model: Any, blocks: list[MetalTransformerBlock]) -> None:
        super().__init__()
        self.blocks, self.inner, self.vocab_size = nn.ModuleList(blocks), model, model.config.vocab_size

    def forward(self, input_ids: Tensor, kv_cache: MetalKVCache | None = None) -> Tensor:
        x = self.inner.model.embed_tokens(input_ids)
        for index, block in enumerate(self.blocks):
            x = block(x, kv_cache=kv_cache, layer_idx=index)
        return self.inner.lm_head(self.inner.model.norm(x))

    def create_kv_cache(self, batch_size: int = 1) -> MetalKVCache:
        sizes = self.blocks[0].self_attn.cache_sizes
        return MetalKVCache(MetalKVCacheConfig(len(self.blocks), max_seq_len=256, dtype=torch.float32, **sizes))


@pytest.mark.exhaustive
@pytest.mark.xdist_group("real model")
@torch.no_grad()
def test_real_model_through_blocks() -> None:
    demo = load_demo()
    tokenizer, model = demo.load_gguf()
    blocks = [MetalTransformerBlock.from_float(layer, 8, 64) for layer in model.model.layers]
    ours = Smol(model, blocks)
    question = demo.chat(tokenizer, "What is the capital of France?")
    found = ours(question)
    text = generate(ours, question, GenerationConfig(12, do_sample=False, eos_token_id=None))
    answer = text[0, question.shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    for index, block in enumerate(blocks):
        model.model.layers[index] = twin(block, model.model.layers[index], torch.float32)
    expected = model(question).logits.double()
    oracle.assert_within(found, expected, 1e-4 * expected.abs().max())
    assert model(text).logits[0, question.shape[1] - 1 : -1].argmax(-1).tolist() == answer


# --- On both devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "latent and mixture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_devices_agree(kind: str, dtype: torch.dtype, device: str) -> None:
    block = randomized(nn.Sequential(*small_blocks(kind)))[0].to(dtype)
    x, seen = states(BATCH, 18, HIDDEN, dtype=dtype), torch.ones(BATCH, 18, dtype=torch.bool)
    seen[0, :3] = False
    with torch.no_grad():
        exact = copy.deepcopy(block).float()(x.float(), seen).double()
        moved = copy.deepcopy(block).to(device)
        found = in_chunks(moved, x.to(device), (17, 1), new_cache(moved.self_attn, dtype), seen.to(device))
    assert found.device.type == device
    bound = {torch.float32: 1e-5, torch.float16: 1e-2}[dtype] * exact.abs().max()
    oracle.assert_within(found[seen.to(device)], exact[seen], bound)


# --- Gradients and graphs ---------------------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("tokens", [5, 20])
def test_gradient_of_x(family: str, tokens: int) -> None:
    block, layer, model = block_of(family)
    x, upstream = states(BATCH, tokens, HIDDEN), states(BATCH, tokens, HIDDEN).flip(1)

    def gradient(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        x = x.clone().requires_grad_()
        run(x).backward(upstream.to(x.dtype))
        return x.grad

    wide, exact = copy.deepcopy(model).double(), twin(block, layer, torch.float64)
    expected = gradient(x.double(), lambda x: layer_output(wide, exact, x))
    oracle.assert_within(gradient(x, block), expected, 2e-5 * expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph_for_all_lengths(kind: str) -> None:
    torch._dynamo.reset()
    block = randomized(nn.Sequential(*small_blocks(kind)))[0]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    with torch.no_grad():
        for tokens in (20, 33, 18):
            x = states(BATCH, tokens, HIDDEN)
            oracle.assert_within(compiled(x), block(x).double(), 1e-5)
            seen = torch.ones(BATCH, tokens, dtype=torch.bool)
            oracle.assert_within(compiled(x, seen), block(x).double(), 1e-5)
            graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


@pytest.mark.parametrize("kind", ["attention", "latent"])
def test_few_tokens_compile_with_and_without_a_cache(kind: str) -> None:
    """As latent attention attends to the latent vectors themselves."""
    torch._dynamo.reset()
    block = randomized(nn.Sequential(*small_blocks(kind)))[0]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = states()
    with torch.no_grad():
        expected = block(x).double()
        oracle.assert_within(compiled(x[:, :5]), expected[:, :5], 1e-5)
        found = in_chunks(compiled, x, (3, 15, 1, 1), new_cache(block.self_attn))
    oracle.assert_within(found, expected, 1e-5)


def test_a_mixture_does_not_wait_for_the_device() -> None:
    """Tensors without values show it: reading one would raise."""
    layer = MetalMoELayer(HIDDEN, 64, 8, 3, group_size=GROUP_SIZE, shared_intermediate_size=64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(states())
        assert layer(x).shape == x.shape


# --- As modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trips(kind: str) -> None:
    block, other = (randomized(nn.Sequential(*small_blocks(kind)), seed)[0] for seed in (0, 1))
    x = states()
    assert not torch.equal(block(x), other(x))
    other.load_state_dict(copy.deepcopy(block.state_dict()))
    for each in (other, copy.deepcopy(block)):
        oracle.assert_identical(each(x), block(x))
    half = copy.deepcopy(block).half()
    assert half(x.half()).dtype == torch.float16
    assert {name: each.dtype for name, each in half.named_parameters() if name.endswith(("scales", "packed"))} == {
        name: each.dtype for name, each in block.named_parameters() if name.endswith(("scales", "packed"))
    }
    for name, buffer in half.named_buffers():
        assert buffer.dtype == torch.float32 or name.endswith("_like"), name


SIZES: dict[str, Callable[[], nn.Module]] = {
    "Qwen2": lambda: MetalAttention(HIDDEN, 4, 2, bits=8, group_size=GROUP_SIZE, bias=True, out_bias=False),
    "Qwen3": lambda: MetalAttention(HIDDEN, 4, 2, 64, 8, GROUP_SIZE, qk_norm=True),
    "Mistral": lambda: MetalAttention(HIDDEN, 4, 2, bits=8, group_size=GROUP_SIZE, window=8),
    "DeepseekV3": lambda: latent(bits=8, qk_nope_head_dim=24, v_head_dim=32),
}


@pytest.mark.parametrize("family", SIZES)
def test_attention_made_from_sizes_takes_the_state_of_a_model(family: str) -> None:
    expected, ours = block_of(family)[0].self_attn, SIZES[family]()
    ours.load_state_dict(expected.state_dict())
    oracle.assert_identical(ours(states()), expected(states()))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    block = randomized(nn.Sequential(*small_blocks(kind)))[0]
    for x in (states(), states(BATCH, 5, HIDDEN)):  # latent attention has a form for few tokens
        with torch.no_grad():
            expected = block(x).double()
            with torch.autocast("cpu", torch.bfloat16):
                found = block(x)
        assert found.dtype == torch.float32
        oracle.assert_within(found, expected, 0.05 * expected.abs().max())


@FAMILY
def test_names_are_those_of_transformers(family: str) -> None:
    block, layer, _ = block_of(family)
    ends = (".weight_packed", ".scales", ".weight")

    def names(module: nn.Module) -> set[str]:
        found = set()
        for name in module.state_dict():
            end = next((end for end in ends if name.endswith(end)), "")
            found.add(name.removesuffix(end))
        return found

    assert names(block) == names(layer)


@FAMILY
def test_blocks_share_nothing_with_what_they_are_made_of(family: str) -> None:
    block, layer, _ = block_of(family)
    x = states()
    before = block(x).detach()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(7)
    oracle.assert_identical(block(x).detach(), before)
    assert not block.training
    assert MetalTransformerBlock.from_float(decoder(family).model.layers[0].train(), 8, GROUP_SIZE).training


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_another_dtype_than_the_norms(kind: str) -> None:
    """The weights of norms and routers are rounded to it."""
    block = randomized(nn.Sequential(*small_blocks(kind)))[0]
    y = block(states(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    expected = block(states(dtype=torch.bfloat16).float()).double()
    oracle.assert_within(y, expected, 0.05 * expected.abs().max())


def test_no_tokens() -> None:
    for kind in KINDS:
        for shape in ((BATCH, 0, HIDDEN), (0, 3, HIDDEN)):
            assert small_blocks(kind)[0](states(*shape)).shape == shape


def test_defaults_are_as_documented() -> None:
    attention = MetalAttention(256, 4)
    assert (attention.num_kv_heads, attention.head_dim, attention.rotary.base) == (4, 64, 10000.0)
    assert attention.rotary.max_position_embeddings == 4096 and attention.q_proj.bias is None
    assert {
        (each.bits, each.group_size) for each in attention.children() if isinstance(each, MetalQuantizedLinear)
    } == {(4, 128)}
    latent = MetalMLAAttention(512, 4, q_lora_rank=None)
    assert (latent.kv_lora_rank, latent.qk_rope_head_dim) == (512, 64)
    assert (latent.head_dim, latent.qk_nope_head_dim, latent.v_head_dim) == (128, 64, 128)
    mixture = MetalMoELayer(128, 256, 4)
    assert mixture.gate.top_k == 2 and mixture.shared_experts is None
    block = MetalTransformerBlock(256, 4, 512, 2)
    assert block.self_attn.num_kv_heads == 2 and block.input_layernorm.eps == 1e-6


# --- Wrong arguments --------------------------------------------------------------------------------------------------


def attention(**options: Any) -> MetalAttention:
    return MetalAttention(**{"hidden_size": HIDDEN, "num_heads": 4, "group_size": GROUP_SIZE, **options})


def latent(**options: Any) -> MetalMLAAttention:
    small = {"kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16}
    return MetalMLAAttention(**{"hidden_size": HIDDEN, "num_heads": 4, "group_size": GROUP_SIZE, **small, **options})


def mixture(**options: Any) -> MetalMoELayer:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_experts": 8, "group_size": GROUP_SIZE}
    return MetalMoELayer(**{**sizes, **options})


def run(module: nn.Module, x: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: module(states() if x is None else x, **options)


def hooked() -> MetalTransformerBlock:
    layer = decoder("Llama").model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: None)
    return MetalTransformerBlock.from_float(layer, 8, GROUP_SIZE)


def hooked_activation(family: str) -> MetalTransformerBlock:
    layer = decoder(family).model.layers[1]
    (layer.mlp if family == "Llama" else layer.mlp.experts).act_fn.register_forward_hook(lambda *_: None)
    return MetalTransformerBlock.from_float(layer, 8, GROUP_SIZE)


def of_model(family: str, group_size: int = GROUP_SIZE, bits: int = 8, train: bool = False, **options: Any) -> Any:
    layer = decoder(family, **options).model.layers[1].train(train)
    return MetalTransformerBlock.from_float(layer, bits, group_size)


class Louder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def changed_norm() -> MetalTransformerBlock:
    layer = decoder("Llama").model.layers[0]
    layer.input_layernorm = Louder()
    return MetalTransformerBlock.from_float(layer, 8, GROUP_SIZE)


def changed_class() -> MetalAttention:
    module = decoder("Llama").model.layers[0].self_attn

    class Other(type(module)):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            return super().forward(*arguments, **options)

    module.__class__ = Other
    return MetalAttention.from_float(module, 8, GROUP_SIZE)


def beyond_the_cache() -> Any:
    module = attention()
    return in_chunks(module, states(), (20,), new_cache(module, most=16))


def cache_elsewhere() -> MetalKVCache:
    return MetalKVCache(MetalKVCacheConfig(1, 4, HIDDEN // 4, 64, torch.float32, device="meta"), BATCH)


VALUE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "heads": (
        lambda: attention(num_heads=3),
        "[MetalAttention] hidden_size is 128, which is no multiple of num_heads, 3",
    ),
    "kv_heads": (
        lambda: attention(num_kv_heads=3),
        "[MetalAttention] num_heads is 4, which is no multiple of num_kv_heads, 3",
    ),
    "no heads": (lambda: attention(num_heads=0), "[MetalAttention] num_heads is 0; it must be at least 1"),
    "head_dim": (
        lambda: attention(num_heads=32, head_dim=33),
        "[MetalAttention] 33 elements of a head are to be rotated; their number must be even",
    ),
    "group_size": (lambda: attention(group_size=48), "[MetalAttention] group_size is 48; supported are 128, 64, 32"),
    "groups": (
        lambda: attention(hidden_size=160, group_size=128),
        "[MetalAttention] in_features of q_proj is 160, which does not divide into groups of 128",
    ),
    "groups of the output": (
        lambda: attention(head_dim=24, group_size=64),
        "[MetalAttention] in_features of o_proj is 96, which does not divide into groups of 64",
    ),
    "bits": (lambda: attention(bits=3), "[MetalAttention] bits is 3; supported are [2, 4, 8]"),
    "theta": (lambda: attention(rope_theta=0.0), "[MetalAttention] rope_theta is 0.0; it must be finite and above 0"),
    "ratio": (lambda: attention(rope_ratio=float("nan")), "[MetalAttention] rope_ratio is nan; it must be finite"),
    "scale": (lambda: attention(scale=float("nan")), "[MetalAttention] scale is nan; it must be finite and above 0"),
    "latent scale": (lambda: latent(scale=0.0), "[MetalMLAAttention] scale is 0.0; it must be finite and above 0"),
    "positions": (
        lambda: attention(max_position_embeddings=0),
        "[MetalAttention] max_position_embeddings is 0; it must be at least 1",
    ),
    "window": (lambda: attention(window=0), "[MetalAttention] window is 0; it must be at least 1"),
    "latent heads": (
        lambda: latent(head_dim=16),
        "[MetalMLAAttention] head_dim is 16, qk_rope_head_dim 16 and qk_nope_head_dim None; the first is the sum",
    ),
    "latent sum": (lambda: latent(head_dim=32, qk_nope_head_dim=8), "head_dim is 32, qk_rope_head_dim 16 and qk_nope"),
    "latent rank": (
        lambda: latent(kv_lora_rank=60),
        "[MetalMLAAttention] in_features of kv_b_proj is 60, which does not divide into groups of 32",
    ),
    "large heads": (
        lambda: latent(qk_nope_head_dim=600),
        "[MetalMLAAttention] heads of queries and keys have 616 elements and those of values 616; supported are up to "
        "576 and 512",
    ),
    "large values": (
        lambda: attention(num_heads=1, head_dim=544),
        "[MetalAttention] heads of queries and keys have 544 elements and those of values 544; supported are up to",
    ),
    "top_k": (
        lambda: mixture(top_k=9),
        "[MetalMoELayer] top_k is 9 of 8 experts; it must be at most that, and 32",
    ),
    "no experts": (lambda: mixture(num_experts=0), "[MetalMoELayer] num_experts is 0; it must be at least 1"),
    "groups of experts": (
        lambda: mixture(intermediate_size=40),
        "[MetalMoELayer] intermediate_size is 40, which does not divide into groups of 32",
    ),
    "eps": (
        lambda: MetalTransformerBlock(HIDDEN, 4, 256, rms_norm_eps=-1.0),
        "[MetalTransformerBlock] rms_norm_eps is -1.0; it must be finite and above 0",
    ),
    "another attention": (
        lambda: MetalTransformerBlock(HIDDEN, 2, 256, self_attn=attention()),
        "[MetalTransformerBlock] hidden_size is 128 and num_heads 2, and those of self_attn are 128 and 4",
    ),
    "hidden_size of x": (
        run(attention(), states(BATCH, 3, 64)),
        "[MetalAttention] hidden_states have shape [2, 3, 64]; they must be [batch, tokens, 128]",
    ),
    "dimensions of x": (run(latent(), states(3, HIDDEN)), "[MetalMLAAttention] hidden_states have shape [3, 128]"),
    "x of a mixture": (run(mixture(), states(3, HIDDEN)), "[MetalMoELayer] hidden_states have shape [3, 128]"),
    "x of a block": (
        run(small_blocks("attention")[0], states(3, HIDDEN)),
        "[MetalTransformerBlock] hidden_states have shape [3, 128]",
    ),
    "too many positions": (
        run(attention(max_position_embeddings=16)),
        "[MetalAttention] positions 0 to 19 are asked for; max_position_embeddings is 16",
    ),
    "mask of other keys": (
        run(attention(), attention_mask=torch.ones(BATCH, 7, dtype=torch.bool)),
        "[MetalAttention] attention_mask has shape [2, 7]; supported are bool or integers of [batch, keys] = [2, 20]",
    ),
    "mask of new tokens alone": (
        run(attention(), attention_mask=torch.ones(BATCH, 1, dtype=torch.int64)),
        "[MetalAttention] attention_mask has shape [2, 1]; supported are bool or integers of [batch, keys] = [2, 20]",
    ),
    "mask of other texts": (
        run(latent(), attention_mask=torch.ones(3, TOKENS, dtype=torch.int64)),
        "[MetalMLAAttention] attention_mask has shape [3, 20]; supported are",
    ),
    "mask of tokens and keys": (
        run(attention(), attention_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool)),
        "attention_mask has shape [20, 20]; supported are bool or integers of [batch, keys] = [2, 20], which hide "
        "padding, and bool or floating point that broadcasts to [batch, heads, tokens, keys] = [2, 4, 20, 20]",
    ),
    "mask of other heads": (
        run(attention(), attention_mask=torch.zeros(1, 3, 1, TOKENS)),
        "attention_mask has shape [1, 3, 1, 20]",
    ),
    "mask elsewhere": (
        run(attention(), attention_mask=torch.ones(BATCH, TOKENS, dtype=torch.bool, device="meta")),
        "[MetalAttention] attention_mask is on meta and hidden_states are on cpu",
    ),
    "cache of other heads": (
        run(attention().requires_grad_(False), kv_cache=new_cache(attention(num_kv_heads=2))),
        "[MetalKVCache.update] k_new has shape [2, 4, 20, 32]; with batch_size = 2, num_kv_heads = 2",
    ),
    "cache of another device": (
        run(attention().requires_grad_(False), kv_cache=cache_elsewhere()),
        "[MetalKVCache.update] k_new is on cpu, and layer 0 of the cache on meta",
    ),
    "cache of another kind": (
        run(latent().requires_grad_(False), kv_cache=new_cache(attention())),
        "[MetalKVCache.update] k_new has shape [2, 1, 20, 64]; with batch_size = 2, num_kv_heads = 4",
    ),
    "full cache": (beyond_the_cache, "20 more positions are asked for, and 0 of max_seq_len = 16 are taken"),
    "gradient into a cache": (
        run(attention(), states().requires_grad_(), kv_cache=new_cache(attention())),
        "k_new requires a gradient, which does not pass a cache",
    ),
    "hooks": (hooked, "[MetalAttention.from_float] this LlamaAttention has hooks, which cannot be kept"),
    "hooks of the activation": (
        lambda: hooked_activation("Llama"),
        "[MetalMLP.from_float] the activation of this LlamaMLP has hooks or a forward of its own, which cannot be kept",
    ),
    "hooks of that of experts": (
        lambda: hooked_activation("Mixtral"),
        "[MetalMoELayer.from_float] the activation of this MixtralExperts has hooks",
    ),
    "activation": (
        lambda: of_model("Llama", hidden_act="gelu"),
        "[MetalMLP.from_float] this LlamaMLP has the activation GELUActivation; supported is SiLU",
    ),
    "activation of experts": (
        lambda: of_model("Mixtral", hidden_act="gelu"),
        "[MetalMoELayer.from_float] this MixtralExperts has the activation GELUActivation",
    ),
    "dropout": (
        lambda: of_model("Llama", train=True, attention_dropout=0.1),
        "this LlamaAttention is in training and has attention_dropout 0.1, which is not supported; eval() ends that",
    ),
    "groups of a model": (lambda: of_model("DeepseekV3", 64), "[MetalMLAAttention] in_features of q_b_proj is 96"),
    "bits of a model": (lambda: of_model("Llama", bits=5), "[MetalAttention] bits is 5; supported are [2, 4, 8]"),
}
TYPE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "size": (lambda: attention(hidden_size="128"), "[MetalAttention] hidden_size is '128'; it must be a whole number"),
    "fraction": (lambda: mixture(top_k=2.0), "[MetalMoELayer] top_k is 2.0; it must be a whole number"),
    "text as theta": (lambda: attention(rope_theta="1e4"), "[MetalAttention] rope_theta is '1e4'; it must be a number"),
    "no tensor": (run(attention(), [1.0]), "[MetalAttention] hidden_states are of type list; they must be a tensor"),
    "integers": (
        run(mixture(), states().int()),
        "[MetalMoELayer] hidden_states have dtype torch.int32; supported are torch.float32, torch.float16",
    ),
    "no mask": (
        run(attention(), attention_mask="causal"),
        "[MetalAttention] attention_mask is of type str; it must be",
    ),
    "mask of integers": (
        run(attention(), attention_mask=torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.int64)),
        "[MetalAttention] attention_mask has dtype torch.int64; supported are bool or integers of [batch, keys]",
    ),
    "no cache": (
        run(attention(), kv_cache={}),
        "[MetalAttention] kv_cache is of type dict; it must have seq_len and update, as MetalKVCache",
    ),
    "no layer": (
        lambda: MetalTransformerBlock.from_float(nn.Linear(3, 3)),
        "[MetalTransformerBlock.from_float] module is of type Linear; supported are classes of Transformers whose "
        "names end with DecoderLayer, of Llama, Mistral, Qwen2, Qwen3, SmolLM3, Mixtral, Qwen3Moe, DeepseekV3, Glm4Moe",
    ),
    "latent for the other": (
        lambda: MetalAttention.from_float(decoder("DeepseekV3").model.layers[0].self_attn),
        "[MetalAttention.from_float] module is of type DeepseekV3Attention; supported are",
    ),
    "no mixture": (
        lambda: MetalMoELayer.from_float(decoder("Llama").model.layers[0].mlp),
        "[MetalMoELayer.from_float] module is of type LlamaMLP; supported are classes of Transformers whose names end "
        "with SparseMoeBlock or MoE, of Mixtral, Qwen3Moe, DeepseekV3, Glm4MoeLite models",
    ),
    "no MLP": (lambda: MetalMLP.from_float(nn.Identity()), "[MetalMLP.from_float] module is of type Identity; supp"),
    "forward of its own": (
        changed_class,
        "[MetalAttention.from_float] Other has a forward of its own and may compute something else than LlamaAttention",
    ),
    "norm": (changed_norm, "[MetalTransformerBlock.from_float] module is of type Louder; supported are classes of Tra"),
}


@pytest.mark.parametrize("name", [*VALUE_ERRORS, *TYPE_ERRORS])
def test_wrong_arguments_are_named(name: str) -> None:
    call, message = {**VALUE_ERRORS, **TYPE_ERRORS}[name]
    with pytest.raises(ValueError if name in VALUE_ERRORS else TypeError, match=re.escape(message)):
        call()


# --- The documented names ---------------------------------------------------------------------------------------------


def test_documented_import_and_example() -> None:
    from quantization_mlx.marlin.inference_metal import MetalQuantizedLinear

    # Create from scratch
    layer = MetalQuantizedLinear(4096, 11008, bits=4, group_size=128)

    # Quantize an existing linear layer
    original = nn.Linear(4096, 11008)
    quantized = MetalQuantizedLinear.from_float(original, bits=4)

    assert layer.weight_packed.shape == quantized.weight_packed.shape


def test_inference_metal_has_the_documented_classes() -> None:
    from quantization_mlx import marlin
    from quantization_mlx.marlin import inference_metal

    for name in inference_metal.__all__:
        assert getattr(marlin, name) is getattr(inference_metal, name)
    blocks = {MetalAttention, MetalMLAAttention, MetalMoELayer, MetalTransformerBlock}
    assert blocks <= {getattr(inference_metal, name) for name in inference_metal.__all__}
