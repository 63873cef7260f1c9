"""Mixtures of experts: quantized layers against Transformers' own eager code on dequantized weights, and mlx-lm."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import oracle
import tiny
from oracle import Format, name_of
from quantization_mlx import QuantizedSwitchLinear, load_checkpoint, quantize_model, save_checkpoint
from quantization_mlx.hf.experts import IMPLEMENTATION, experts_forward, register_experts, split_experts
from quantization_mlx.hf.patch import patched_transformers
from quantization_mlx.nn.switch import SwitchLinear
from tiny import SMALL, TOKENS, assert_close, causal_lm, logits, mlx_logits_of_tokens, only_experts

HIDDEN, EXPERT = SMALL["hidden_size"], SMALL["intermediate_size"]
FORMATS = (Format("affine", 64, 4), Format("mxfp4", 32, 4))
LATENT = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 64, "v_head_dim": 32}
DEEPSEEK = {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "topk_group": 1}
DEEPSEEK |= {"num_key_value_heads": 4, "moe_intermediate_size": EXPERT, "first_k_dense_replace": 1}
QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}
# The class of the model, and what its config has besides the common.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", MIXTRAL),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 32}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    # mlx_lm wants YARN.
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "rope_parameters": YARN}),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": 64, "n_group": 2}),
    "gpt_oss": ("GptOss", {**MIXTRAL, **tiny.TWO_KINDS, "head_dim": 32}),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    prefix, options = FAMILIES[family]
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    common = {**SMALL, "tie_word_embeddings": False, "max_position_embeddings": 2048, "rope_parameters": rope}
    model = causal_lm(prefix, **{**common, **options}).to(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("bias"):  # zeros would hide a mix-up
            nn.init.uniform_(tensor, -0.5, 0.5)
    return model


def experts_of(model: nn.Module) -> nn.Module:
    return model.model.layers[1].mlp.experts


def dequantized(layer: SwitchLinear | QuantizedSwitchLinear) -> Tensor:
    if isinstance(layer, SwitchLinear):
        return layer.weight.detach()
    return oracle.values_of(layer)


def eager_reference(dense: nn.Module, quantized: nn.Module) -> nn.Module:
    """A copy of `dense`, run by Transformers' eager code, whose experts have what those of `quantized` stand for."""
    reference = copy.deepcopy(dense)
    for path, experts in reference.named_modules():
        ours = quantized.get_submodule(path)
        if not hasattr(experts, "is_transposed") or isinstance(ours.down_proj, nn.Parameter):
            continue
        gate, up, down = (dequantized(getattr(ours, name)) for name in ("gate_proj", "up_proj", "down_proj"))
        fused = torch.cat((gate, up), 1) if experts.is_concatenated else torch.stack((gate, up), 2).flatten(1, 2)
        for parameter, weight in ((experts.gate_up_proj, fused), (experts.down_proj, down)):
            parameter.data = (weight.mT if experts.is_transposed else weight).to(parameter.dtype)
    for module in reference.modules():
        if hasattr(module, "is_transposed"):
            module.config._experts_implementation = "eager"
    return reference


def routing(experts: nn.Module, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, indices with experts that nobody chooses, and weights."""
    x = oracle.random_x(tokens, HIDDEN, dtype=dtype)
    scores = oracle.random_x(tokens, experts.num_experts, seed=2)
    scores[:, 1] = -9
    weights, indices = scores.softmax(-1).topk(2)
    return x, indices, weights.to(dtype)


# --- The forward pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@FAMILY
def test_logits_are_those_of_the_dequantized_experts(family: str, format: Format) -> None:
    dense = tiny_model(family)
    model = quantize_model(copy.deepcopy(dense), **format.options, predicate=only_experts)
    layers = [experts_of(model).get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
    assert [type(layer) for layer in layers] == [QuantizedSwitchLinear] * 3
    assert {oracle.format_of(layer) for layer in layers} == {format}
    assert model.config._experts_implementation == IMPLEMENTATION
    reference = logits(eager_reference(dense, model))
    assert not torch.allclose(reference, logits(dense), rtol=1e-2)
    assert_close(logits(model), reference, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_error_is_within_twice_that_of_the_eager_code(family: str, tokens: int, dtype: torch.dtype) -> None:
    dense = tiny_model(family, dtype)
    model = quantize_model(copy.deepcopy(dense), predicate=only_experts)
    reference = eager_reference(dense, model)
    x, indices, weights = routing(experts_of(model), tokens, dtype)
    with torch.no_grad():
        ours = experts_of(model)(x, indices, weights)
        eager = experts_of(reference)(x, indices, weights).double()
        exact = experts_of(eager_reference(dense.double(), model))(x.double(), indices, weights.double())
    assert ours.dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * math.sqrt(EXPERT)
    oracle.assert_within(ours, exact, 2 * (eager - exact).abs().max() + rounding * exact.abs().max())


class FloatTensors(TorchDispatchMode):
    """The names of the ops that ran, and the largest floating-point tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@FAMILY
def test_experts_are_never_dequantized(family: str, format: Format) -> None:
    # Embeddings dequantize the rows that are looked up.
    model = quantize_model(tiny_model(family), **format.options, predicate=lambda path, _: "embed" not in path)
    with FloatTensors() as seen, torch.no_grad():
        model(TOKENS[:, :4], use_cache=False)
    assert any("gather_qmm" in name for name in seen.names)
    assert not [name for name in seen.names if "dequantize" in name]
    assert seen.largest < EXPERT * HIDDEN


def test_experts_that_are_not_quantized_run_as_before() -> None:
    dense = tiny_model("mixtral")
    model = quantize_model(copy.deepcopy(dense), predicate=lambda path, _: "layers.0.mlp.experts" in path)
    assert isinstance(experts_of(model).gate_up_proj, nn.Parameter)
    assert_close(logits(model), logits(eager_reference(dense, model)), 1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_some_projections_may_stay_in_floating_point(family: str) -> None:
    dense = tiny_model(family)

    def predicate(path: str, layer: nn.Module) -> bool | dict[str, int]:
        return {"bits": 8} if "gate_proj" in path else "experts.up_proj" in path

    model = quantize_model(copy.deepcopy(dense), predicate=predicate)
    layers = experts_of(model)
    assert (layers.gate_proj.bits, layers.up_proj.bits, type(layers.down_proj)) == (8, 4, SwitchLinear)
    assert layers.down_proj.weight.is_contiguous()
    assert_close(logits(model), logits(eager_reference(dense, model)), 1e-5)


@FAMILY
def test_refused_experts_keep_their_parameters(family: str) -> None:
    model = tiny_model(family)
    before, implementation = dict(model.named_parameters()), model.config._experts_implementation
    expected = logits(model)

    def predicate(path: str, layer: nn.Module) -> bool:
        if isinstance(layer, SwitchLinear):
            assert layer.weight.shape == (experts_of(model).num_experts, layer.out_features, layer.in_features)
            assert {layer.out_features, layer.in_features} == {EXPERT, HIDDEN}
        return False

    quantize_model(model, predicate=predicate)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is parameter for name, parameter in before.items())
    assert model.config._experts_implementation == implementation
    with pytest.raises(ValueError, match="bits 7"):
        quantize_model(model, predicate=lambda path, layer: {"bits": 7} if "down_proj" in path else True)
    assert torch.equal(logits(model), expected)


def test_gradients_reach_hidden_states_and_router_weights() -> None:
    dense = tiny_model("gpt_oss")
    model = quantize_model(copy.deepcopy(dense), predicate=only_experts)
    gradients = []
    for each in (model, eager_reference(dense, model)):
        x, indices, weights = routing(experts_of(each), 7, torch.float32)
        x.requires_grad_(), weights.requires_grad_()
        experts_of(each)(x, indices, weights).square().sum().backward()
        gradients.append((x.grad, weights.grad))
    for ours, reference in zip(*gradients, strict=True):
        assert_close(ours, reference, 1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_full_graph(family: str) -> None:
    model = quantize_model(tiny_model(family), predicate=only_experts)
    experts = experts_of(model)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (5, 9):
            arguments = routing(experts, tokens, torch.float32)
            assert_close(compiled(*arguments), experts(*arguments), 1e-5)


def test_experts_elsewhere_count_for_nothing() -> None:
    """Under expert parallelism, their indices are the number of experts here."""
    model = quantize_model(tiny_model("mixtral"), predicate=only_experts)
    experts = experts_of(model)
    x, indices, weights = routing(experts, 6, torch.float32)
    elsewhere = indices == 2
    assert elsewhere.any()
    with torch.no_grad():
        expected = experts(x, indices, weights.masked_fill(elsewhere, 0))
        experts._is_expert_parallel = True
        ours = experts(x, indices.masked_fill(elsewhere, experts.num_experts), weights)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("tokens", [3, 8], ids=["as they come", "sorted"])
def test_devices(device: str, tokens: int) -> None:
    dense = transformers.models.mixtral.modeling_mixtral.MixtralExperts(
        transformers.MixtralConfig(hidden_size=HIDDEN, intermediate_size=HIDDEN, num_local_experts=4)
    )
    for parameter in dense.parameters():
        nn.init.normal_(parameter, generator=oracle.generator(0), std=0.1)
    experts = quantize_model(copy.deepcopy(dense))
    x, indices, weights = routing(experts, tokens, torch.float32)
    with torch.no_grad():
        expected = eager_reference(dense, experts)(x, indices, weights)
        ours = experts.to(device)(x.to(device), indices.to(device), weights.to(device))
    assert_close(ours, expected, 1e-5)


def test_registration_may_be_repeated() -> None:
    register_experts()
    register_experts()
    assert ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] is experts_forward


# --- The layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_switch_linear(format: Format) -> None:
    weight, bias = oracle.random_x(3, 5, 64), oracle.random_x(3, 5)
    dense = SwitchLinear(weight, bias)
    packed = QuantizedSwitchLinear.from_switch_linear(dense, **format.options)
    tensors = (packed.weight_packed, packed.scales, packed.biases)
    for expert in range(3):
        for ours, theirs in zip(tensors, oracle.mlx_quantize(weight[expert], format), strict=False):
            oracle.assert_identical(ours[expert], theirs, str(format))
    x, indices = oracle.random_x(4, 1, 64), torch.tensor([[2, 0], [0, 0], [1, 2], [2, 1]])
    for layer in (dense, packed):
        matrices = dequantized(layer).double()
        expected = torch.einsum("tk,tpok->tpo", x[:, 0].double(), matrices[indices]) + bias.double()[indices]
        assert_close(layer(x, indices), expected, 1e-5)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_switch_linear_has_the_dtype_and_device_of_its_weight(mode: str) -> None:
    linear = SwitchLinear(oracle.random_x(3, 5, 64, dtype=torch.bfloat16))
    layer = QuantizedSwitchLinear.from_switch_linear(linear, mode=mode)
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (3, 5, 64)
    assert not any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert layer.to("cpu", torch.float32).weight.dtype == torch.float32


def test_rows_of_experts_divide_into_groups() -> None:
    with pytest.raises(ValueError, match=r"\[QuantizedSwitchLinear\].*96 values.*groups of 64"):
        QuantizedSwitchLinear(2, 96, 8)


# --- MLX checkpoints --------------------------------------------------------------------------------------------------


def mlx_convert(source: Path, target: Path, **options: Any) -> None:
    """What mlx_lm's conversion does with a model that is already here, without a tokenizer."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    oracle.mlx()
    model, config = load_model(source)
    predicate = getattr(model, "quant_predicate", None)
    model, config = quantize_model(model, config, **options, quant_predicate=predicate)
    save_model(target, model)
    save_config(config, target / "config.json")


@FAMILY
def test_mlx_lm_computes_the_same_from_our_checkpoint(family: str, tmp_path: Path) -> None:
    # mlx_lm quantizes other matrices that it makes of kv_b_proj.
    model = quantize_model(tiny_model(family), predicate=lambda path, _: "kv_b_proj" not in path)
    tiny.reloaded(model, tmp_path)
    assert_close(logits(model), mlx_logits_of_tokens(tmp_path), 1e-4)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@FAMILY
def test_conversions_of_mlx_lm_compute_the_same(family: str, mode: str, tmp_path: Path) -> None:
    save_checkpoint(tiny_model(family), tmp_path / "dense")
    group_size, bits = {"affine": (64, 4), "mxfp4": (32, 4)}[mode]
    mlx_convert(tmp_path / "dense", tmp_path / "mlx", group_size=group_size, bits=bits, mode=mode)
    with patched_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "mlx", dtype=torch.float32)
    assert experts_of(model).down_proj.mode == mode
    assert model.config._experts_implementation == IMPLEMENTATION
    assert_close(logits(model), mlx_logits_of_tokens(tmp_path / "mlx"), 1e-4)
    tiny.reloaded(model, tmp_path / "again")


@FAMILY
def test_checkpoints_in_floating_point(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_checkpoint(model, tmp_path)
    assert_close(logits(model), mlx_logits_of_tokens(tmp_path), 1e-4)
    loaded = load_checkpoint(tmp_path)
    assert isinstance(experts_of(loaded).down_proj, nn.Parameter)
    # Torch's dense kernels round in another way where the tensors of a mapped file are aligned in another way.
    assert_close(logits(loaded), logits(model), 1e-6)


def test_formats_may_differ_between_projections(tmp_path: Path) -> None:
    def predicate(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        return {"bits": 8, "group_size": 32} if "experts.up_proj" in path else True

    model = quantize_model(tiny_model("mixtral"), predicate=predicate)
    loaded = tiny.reloaded(model, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization"]
    path = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"
    assert record[path] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert (experts_of(loaded).gate_proj.bits, experts_of(loaded).up_proj.bits) == (4, 8)
    assert_close(logits(loaded), mlx_logits_of_tokens(tmp_path), 1e-4)


def test_blocks_of_gpt_oss_are_viewed(tmp_path: Path) -> None:
    dense = tiny_model("gpt_oss")
    tiny.openai_checkpoint(dense, tmp_path / "openai")
    with patched_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "openai", dtype=torch.float32)
    layer = experts_of(model).gate_up_proj
    assert (layer.mode, layer.weight_packed.shape) == ("mxfp4", (4, 2 * EXPERT, HIDDEN // 8))
    reference = copy.deepcopy(dense)
    for path, experts in reference.named_modules():
        if hasattr(experts, "is_transposed"):
            for name in ("gate_up_proj", "down_proj"):
                weight = dequantized(model.get_submodule(f"{path}.{name}")).float()
                getattr(experts, name).data = weight.mT
    reference.set_experts_implementation("eager")
    assert_close(logits(model), logits(reference), 1e-5)
    save_checkpoint(model, tmp_path / "mlx")
    assert_close(logits(model), mlx_logits_of_tokens(tmp_path / "mlx"), 1e-4)
    assert_close(logits(load_checkpoint(tmp_path / "mlx")), logits(model), 1e-5)


@FAMILY
def test_splitting_copies_nothing(family: str) -> None:
    for model in (tiny_model(family), quantize_model(tiny_model(family))):
        state = model.state_dict()
        split = split_experts(model, state)
        storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
        assert {tensor.untyped_storage().data_ptr() for tensor in split.values()} == storages


SWITCH = "model.layers.1.mlp.switch_mlp"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(f"{SWITCH}.up_proj.biases"), "missing tensors: .*up_proj.biases"),
        (
            lambda t: t.update({f"{SWITCH}.down_proj.scales": torch.zeros(8, 64, 7)}),
            r"down_proj\.scales is float32 \[8, 64, 7\] and should be",
        ),
        (lambda t: t[f"{SWITCH}.down_proj.scales"].fill_(torch.nan), "down_proj.scales has values that are not finite"),
    ],
)
def test_faulty_experts_are_named(edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    save_checkpoint(quantize_model(tiny_model("qwen3_moe")), tmp_path)
    tiny.edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)
