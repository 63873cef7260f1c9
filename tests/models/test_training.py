"""LoRA on quantized models with PEFT: gradients, training on a real text, adapters that come and go."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import oracle
import quantization_mlx as qm
from cases import SOME_FORMATS
from oracle import name_of
from quantization_mlx import QuantizedLinear, load_checkpoint, patch_peft, quantize_model, save_checkpoint, unpatch_peft
from repository import ROOT, load_demo
from tiny import TOKENS, assert_close, logits, mlx_logits, tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    patch_peft()
    yield
    unpatch_peft()


def with_adapter(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    return get_peft_model(model, config)


def randomise_adapter(model: nn.Module, scale: float = 0.1) -> None:
    """B starts as zeros, with which an adapter changes nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=scale)


def dense_twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A float32 model with the values of the quantized one's linear layers."""
    twin = tiny_model()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            twin.get_submodule(path).weight.data = values_of(module)
    embedding = model.model.embed_tokens
    twin.model.embed_tokens.weight.data = embedding(torch.arange(embedding.num_embeddings)).float()
    return twin


def values_of(layer: QuantizedLinear) -> Tensor:
    packed = (layer.weight_packed, layer.scales, layer.biases)
    return qm.dequantize(*packed, layer.group_size, layer.bits, layer.mode, dtype=torch.float32)


def loss_of(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    predicted = model(tokens).logits[:, :-1].float()
    return F.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_gradients_are_those_of_the_dense_model(format: oracle.Format) -> None:
    quantized = quantize_model(tiny_model(), **format.options)
    dense = with_adapter(dense_twin(quantized))
    model = with_adapter(quantized)
    for each in (model, dense):
        torch.manual_seed(2)
        randomise_adapter(each)
        loss_of(each).backward()
    expected = {name: parameter.grad for name, parameter in dense.named_parameters() if "lora" in name}
    actual = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected.keys() == actual.keys()
    assert len(actual) == 2 * 2 * len(TARGETS)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        oracle.assert_within(actual[name], gradient.double(), 1e-3 * gradient.abs().max(), name)


def test_only_the_adapter_is_trained_and_in_float32() -> None:
    model = with_adapter(quantize_model(tiny_model(torch.bfloat16)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert model(TOKENS).logits.dtype == torch.bfloat16
    loss_of(model).backward()
    torch.optim.SGD(trained, lr=1.0).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_B" not in name), name


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive  # docs/train.md does the same in fewer steps
def test_loss_falls_on_a_real_text(tmp_path: Path) -> None:
    """The demo's model, 4-bit, on the start of a text that it has not seen; the adapter survives the disk."""
    text_tokenizer, dense = load_demo().load_gguf()
    base = quantize_model(dense.to(torch.bfloat16)).float()
    text = (ROOT / "examples" / "harbour.txt").read_text(encoding="utf-8")
    tokens = text_tokenizer(text, return_tensors="pt").input_ids[:, :256].reshape(4, 64)
    model = with_adapter(base, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(6):
        loss = loss_of(model, tokens)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.85 * losses[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))

    with torch.no_grad():
        after = model(tokens[:1]).logits
        model.save_pretrained(tmp_path)
        base = model.unload()
        assert (base(tokens[:1]).logits - after).abs().max() > 0.1
        again = PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(again(tokens[:1]).logits, after)


# --- Adapters come and go ---------------------------------------------------------------------------------------------


def test_adapters_save_and_load(tmp_path: Path) -> None:
    save_checkpoint(quantize_model(tiny_model()), tmp_path / "base")
    model = with_adapter(load_checkpoint(tmp_path / "base"))
    randomise_adapter(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000
    base = load_checkpoint(tmp_path / "base")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(base))
    base.load_adapter(str(tmp_path / "adapter"))  # the way of Transformers
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_merging_rounds_to_the_layers_format_and_unmerging_is_exact(format: oracle.Format) -> None:
    model = with_adapter(quantize_model(tiny_model(torch.bfloat16), **format.options), target_modules=["down_proj"])
    randomise_adapter(model)
    unmerged = logits(model)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    base = layer.base_layer
    exact = values_of(base) + layer.get_delta_weight("default")
    model.merge_adapter()
    merged = layer.base_layer
    assert type(merged) is QuantizedLinear
    assert merged.scales.dtype == base.scales.dtype
    mx = oracle.mlx()
    packed = mx.quantize(oracle.to_mlx(exact.detach()), **format.options)
    assert torch.equal(merged.weight_packed, oracle.from_mlx(packed[0]))
    assert not torch.equal(logits(model), unmerged)
    model.unmerge_adapter()
    assert layer.base_layer is base
    assert torch.equal(logits(model), unmerged)


def test_a_merged_model_is_an_mlx_checkpoint(tmp_path: Path, tokenizer: Any) -> None:
    model = with_adapter(quantize_model(tiny_model(), bits=8))
    randomise_adapter(model, 0.01)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not [name for name in merged.state_dict() if "lora" in name]
    save_checkpoint(merged, tmp_path, tokenizer)
    assert_close(mlx_logits(tmp_path, torch.float32), logits(merged))
    assert_close(logits(merged), expected, 0.05)


def test_two_adapters_on_one_layer() -> None:
    model = with_adapter(quantize_model(tiny_model()))
    base = logits(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="gaussian"))
    randomise_adapter(model)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    model.merge_adapter(["default", "second"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), second)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


# --- Other ways to say what is trained --------------------------------------------------------------------------------


def trained_step(model: nn.Module) -> set[str]:
    """Takes a step, and returns the names of the parameters that it has changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss_of(model).backward()
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0).step()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_all_linear_finds_all_linear_layers() -> None:
    quantized, dense = (with_adapter(model, target_modules="all-linear") for model in (quantized_tiny(), tiny_model()))
    targets = [name for name, _ in dense.named_modules() if name.endswith("lora_A")]
    assert [name for name, _ in quantized.named_modules() if name.endswith("lora_A")] == targets
    assert len(targets) == 2 * 7


def quantized_tiny() -> LlamaForCausalLM:
    return quantize_model(tiny_model(), bits=8)


def test_modules_to_save_are_trained_as_floating_point_copies(tmp_path: Path) -> None:
    base = quantized_tiny()
    before = logits(base)
    model = with_adapter(base, modules_to_save=["lm_head", "embed_tokens"])
    assert_close(logits(model), before, 1e-4)
    changed = trained_step(model)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in changed
    assert not any("original_module" in name for name in changed)
    expected = logits(model)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized_tiny(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_trainable_tokens_are_trained(mode: str) -> None:
    base = quantize_model(tiny_model(), bits=8, mode=mode)
    before = logits(base)
    tokens = TOKENS.unique()[:3].tolist()
    model = with_adapter(base, trainable_token_indices={"embed_tokens": tokens})
    assert_close(logits(model), before, 1e-4)
    changed = trained_step(model)
    assert any("trainable_tokens_delta" in name for name in changed)
    with pytest.raises(NotImplementedError, match="packed and cannot be written to"):
        model.merge_adapter()


def test_embeddings_take_adapters() -> None:
    base = quantized_tiny()
    before = logits(base)
    model = with_adapter(base, target_modules=["embed_tokens"])
    assert torch.equal(logits(model), before)
    assert any("lora_embedding_B" in name or "lora_embedding_A" in name for name in trained_step(model))


def train_in_a_process(rank: int, directory: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    model = qm.prepare_for_ddp(with_adapter(quantized_tiny()))
    randomise_adapter(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    loss_of(parallel, TOKENS.chunk(2, 1)[rank]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.save(gradients, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_train_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_a_process, (str(tmp_path),), nprocs=2)
    model = with_adapter(quantized_tiny())
    randomise_adapter(model)
    sum(loss_of(model, half) for half in TOKENS.chunk(2, 1)).div(2).backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
        assert len(gradients) == 2 * 2 * len(TARGETS)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' needs a floating-point weight"),
    ],
)
def test_what_needs_the_float_weight_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_adapter(quantize_model(tiny_model()), **options)


def test_an_adapter_of_nan_does_not_merge_safely() -> None:
    model = with_adapter(quantize_model(tiny_model()))
    before = logits(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    layer.lora_B["default"].weight.data.zero_()
    assert torch.equal(logits(model), before)


def test_the_patch_is_idempotent_and_reversible(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_init = LoraConfig.__post_init__
    patch_peft()
    assert LoraConfig.__post_init__ is patched_init
    unpatch_peft()
    unpatch_peft()
    assert LoraConfig.__post_init__ is patched_init.__wrapped__
    model = with_adapter(quantize_model(tiny_model()))
    assert model(TOKENS).logits.isfinite().all()
    with pytest.raises(NotImplementedError, match="packed and cannot be written to"):
        model.merge_adapter()
    assert with_adapter(tiny_model())(TOKENS).logits.isfinite().all()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install \"quantization-mlx\[train\]\""):
        patch_peft()
