"""What becomes of layers when a model's are replaced: options, state and hooks, and what stays in floating point."""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import marlin_models
import oracle
import quantization_mlx as qm
import tiny
from command import Run
from quantization_mlx import QuantizedLinear, dequantize_model, load_checkpoint, marlin, quantize_model, save_checkpoint
from quantization_mlx.checkpoint.read import Checkpoint
from quantization_mlx.families.llama4 import Llama4Experts
from quantization_mlx.hf.metal_config import metal_to_mlx, mlx_to_metal
from quantization_mlx.hf.patch import patched_transformers
from quantization_mlx.hf.quantizer import MLXConfig, columns_of_layers
from quantization_mlx.marlin.experts import ColumnPackedSwitchLinear
from quantization_mlx.marlin.layers import MarlinLinear, MetalQuantizedLinear
from quantization_mlx.marlin.saved import load_quantized, save_quantized
from quantization_mlx.nn.switch import SwitchLinear
from quantization_mlx.quantization.report import QuantizationReport
from tiny import GPT2, SMALL, TOKENS, assert_close, causal_lm, logits, only_experts, relative_error

# --- Layers that are left alone ---------------------------------------------------------------------------------------


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Tagged(Tensor):
    """A tensor subclass that a module may hold as its parameter."""


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 64)


def edited(edit: Callable[[nn.Linear], Any]) -> nn.Linear:
    layer = linear()
    edit(layer)
    return layer


def nothing(*arguments: Any) -> None:
    """A hook."""


def set_forward(layer: nn.Module) -> None:
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)


def set_weight(layer: nn.Module, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)


def tagged(layer: nn.Module) -> None:
    parameter = layer.weight.detach().as_subclass(Tagged)
    parameter._is_param = True
    layer._parameters["weight"] = parameter


def parametrized(name: str) -> Callable[[nn.Linear], Any]:
    return lambda layer: nn.utils.parametrize.register_parametrization(layer, name, Doubling())


# What is done to a linear layer, and why it stays.
EDITS: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "parametrization": (parametrized("weight"), "has parametrizations of weight"),
    "weight_norm": (parametrizations.weight_norm, "has parametrizations of weight"),
    "spectral_norm": (parametrizations.spectral_norm, "has parametrizations of weight"),
    "bias-parametrization": (parametrized("bias"), "has parametrizations of bias"),
    "old-weight_norm": (weight_norm, "has no parameter as its weight"),
    "old-spectral_norm": (nn.utils.spectral_norm, "has no parameter as its weight"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "has no parameter as its weight"),
    "pruned-bias": (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "has no parameter as its bias"),
    "own-forward": (set_forward, "has a forward of its own"),
    "compiled": (lambda layer: layer.compile(backend="eager"), "is compiled by its method"),
    "float8": (lambda layer: set_weight(layer, layer.weight.to(torch.float8_e4m3fn)), "its weight is float8_e4m3fn"),
    "float64": (lambda layer: set_weight(layer, layer.weight.double()), "its weight is float64"),
    "sparse": (lambda layer: set_weight(layer, layer.weight.to_sparse()), "its weight is sparse_coo"),
    "tensor-subclass": (tagged, "its weight is of type Tagged"),
    "further-parameter": (
        lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(64))),
        "has further state: gain",
    ),
    "further-buffer": (lambda layer: layer.register_buffer("mask", torch.ones(64)), "further state: mask"),
    "child": (lambda layer: layer.add_module("adapter", nn.Linear(128, 64)), "further state: adapter"),
    "state_dict-hook": (lambda layer: layer.register_state_dict_post_hook(nothing), "has a state_dict hook"),
    "state_dict-pre-hook": (lambda layer: layer.register_state_dict_pre_hook(nothing), "has a state_dict pre-hook"),
    "load-pre-hook": (lambda layer: layer.register_load_state_dict_pre_hook(nothing), "has a load_state_dict pre-hook"),
    "load-post-hook": (lambda x: x.register_load_state_dict_post_hook(nothing), "has a load_state_dict post-hook"),
    "old-backward-hook": (lambda layer: layer.register_backward_hook(nothing), "register_backward_hook"),
}
LEFT_LINEAR: dict[str, tuple[Callable[[], nn.Module], str]] = {
    kind: (functools.partial(edited, edit), reason) for kind, (edit, reason) in EDITS.items()
}
LEFT_EMBEDDING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (lambda: nn.Embedding(32, 64, max_norm=1.0), "has max_norm=1.0"),
    "max_norm-0": (lambda: nn.Embedding(32, 64, max_norm=0.0), "has max_norm=0.0"),
    "scale_grad_by_freq": (lambda: nn.Embedding(32, 64, scale_grad_by_freq=True), "has scale_grad_by_freq=True"),
}


@pytest.mark.parametrize("kind", [*LEFT_LINEAR, *LEFT_EMBEDDING])
def test_a_layer_with_what_a_quantized_one_has_not_is_left_alone(kind: str) -> None:
    make, reason = {**LEFT_LINEAR, **LEFT_EMBEDDING}[kind]
    layer = make()
    model = nn.ModuleDict({"kept": layer, "other": nn.Linear(128, 64)})
    report = QuantizationReport()
    with pytest.warns(UserWarning, match="kept: .*" + reason.replace("(", r"\(")):
        quantize_model(model, report=report)
    assert model["kept"] is layer
    assert type(model["other"]) is QuantizedLinear
    [skipped] = [each for each in report.skipped if each.path == "kept"]
    assert reason in skipped.reason and not skipped.is_asked_for
    assert reason in report.table()


NOT_MARLINS = [kind for kind in LEFT_LINEAR if kind != "float64"]  # which its packers take


@pytest.mark.parametrize("kind", NOT_MARLINS)
def test_marlin_leaves_the_same_layers_alone(kind: str) -> None:
    make, reason = LEFT_LINEAR[kind]
    for replace in (marlin.replace_linear_layers, marlin.quantize_model):
        layer = make()
        model = nn.ModuleDict({"kept": layer, "other": nn.Linear(128, 64)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = replace(model)
        assert model["kept"] is layer
        assert isinstance(model["other"], marlin.ColumnPackedLinear)
        if replace is marlin.replace_linear_layers:
            assert "other" in stats.replaced and reason in stats.skipped["kept"]


@pytest.mark.parametrize("kind", [*LEFT_LINEAR, *LEFT_EMBEDDING])
def test_converting_such_a_layer_by_itself_is_refused(kind: str) -> None:
    make, reason = {**LEFT_LINEAR, **LEFT_EMBEDDING}[kind]
    ways = (QuantizedLinear.from_linear, MarlinLinear.from_linear, MetalQuantizedLinear.from_float)
    ways = ways[:1] if kind not in NOT_MARLINS else ways
    for way in (qm.QuantizedEmbedding.from_embedding,) if kind in LEFT_EMBEDDING else ways:
        with pytest.raises(ValueError, match=rf"\[\w+\.from_\w+\] this \w+ cannot be quantized: .*{reason}"):
            way(make())


def test_marlin_packs_float64() -> None:
    layer = linear().double()
    exact = MarlinLinear.from_linear(linear()).weight.dequantize()
    for made in (MarlinLinear.from_linear(layer), marlin.quantize_model(nn.Sequential(layer))[0]):
        assert torch.equal(made.weight.dequantize().float(), exact.float())


def test_subclasses_with_a_forward_of_their_own_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    for way in (QuantizedLinear.from_linear, MarlinLinear.from_linear, MetalQuantizedLinear.from_float):
        with pytest.raises(TypeError, match="Doubled has a forward of its own"):
            way(Doubled(128, 64))
        way(Named(128, 64))
    report = QuantizationReport()
    model = nn.ModuleDict({"doubled": Doubled(128, 64), "named": Named(128, 64)})
    quantize_model(model, report=report)
    reasons = {each.path: each.reason for each in report.skipped}
    assert reasons == {"doubled": "a subclass of Linear: Doubled", "named": "a subclass of Linear: Named"}


@pytest.mark.filterwarnings("ignore:.*floating point")
def test_max_norm_goes_on_limiting_rows() -> None:
    model = nn.Sequential(nn.Embedding(32, 64, max_norm=1.0))
    rows = quantize_model(model)(torch.arange(32))
    assert rows.norm(dim=-1).max() < 1 + 1e-6


def test_options_of_gradients_do_not_matter() -> None:
    """padding_idx and sparse concern the gradient of a weight that has none any more; the row of zeros stays one."""
    table = nn.Embedding(32, 64, padding_idx=3, sparse=True)
    quantized = quantize_model(copy.deepcopy(table), bits=8)
    assert type(quantized) is qm.QuantizedEmbedding
    assert not quantized(torch.tensor([3])).any()
    oracle.assert_within(quantized(torch.arange(32)), table.weight.double(), 0.02)


@pytest.mark.filterwarnings("ignore:.*floating point")
def test_a_layer_that_torch_compile_holds_goes_on_computing() -> None:
    """The compiled code calls the layer itself: another one in its place would never run."""
    layer = linear()
    report = QuantizationReport()
    model = quantize_model(nn.Sequential(torch.compile(layer, backend="eager")), report=report)
    assert model[0]._orig_mod is layer
    assert [each.reason for each in report.skipped] == ["is compiled by torch.compile"]


@pytest.mark.filterwarnings("ignore:.*floating point")
def test_a_weight_that_a_module_holds_by_another_name_stays_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()
            self.kernel = self.layer.weight

    for quantize in (quantize_model, marlin.quantize_model):
        model = quantize(Tied())
        assert model.layer.weight is model.kernel
    report = QuantizationReport()
    quantize_model(Tied(), report=report)
    reasons = {each.path: each.reason for each in report.skipped}
    assert reasons == {"kernel": "a parameter of Tied", "layer": "shares its weight with kernel"}
    assert report.skipped_share == 128 * 64 / (128 * 64 + 64)


# --- Hooks ------------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "mlx": quantize_model,
    "marlin": marlin.quantize_model,
    "replace_linear_layers": marlin.replace_linear_layers,
}


@pytest.mark.parametrize("way", WAYS)
def test_hooks_move_to_the_new_layer(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64))
    layer = model[0]
    seen: dict[str, list[Any]] = {name: [] for name in ("pre", "kwargs", "post", "always", "backward", "backward-pre")}

    def note(name: str, result: Any = None) -> Callable[..., Any]:
        def hook(module: nn.Module, *arguments: Any) -> Any:
            seen[name].append(module)
            return result(arguments) if result else None

        return hook

    handles = [
        layer.register_forward_pre_hook(note("pre", lambda arguments: (3 * arguments[0][0],))),
        layer.register_forward_pre_hook(note("kwargs"), with_kwargs=True),
        layer.register_forward_hook(note("post", lambda arguments: arguments[1] + 1)),
        layer.register_forward_hook(note("always"), always_call=True),
        layer.register_full_backward_hook(note("backward")),
        layer.register_full_backward_pre_hook(note("backward-pre")),
    ]
    WAYS[way](model)
    made = model[0]
    assert made is not layer and not made._parameters.get("weight", made.weight_packed).is_floating_point()
    x = torch.randn(5, 128, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert seen == {name: [made] for name in seen}
    assert x.grad.abs().sum() > 0
    for handle in handles:
        handle.remove()
    plain = model(x)
    assert all(len(calls) == 1 for calls in seen.values())
    with torch.no_grad():
        expected = 3 * (plain - made.bias) + made.bias + 1
    oracle.assert_within(y, expected.double(), 1e-4)


def test_hooks_of_embeddings_and_conv1d_move() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(32, 64), "conv": Conv1D(64, 128)})
    for layer in model.values():
        layer.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))
    quantize_model(model)
    assert [type(layer) for layer in model.values()] == [qm.QuantizedEmbedding, QuantizedLinear]
    assert not model["table"](torch.arange(3)).any() and not model["conv"](torch.randn(2, 128)).any()


def test_a_layer_by_itself_keeps_its_hooks_and_its_copy_has_them_too() -> None:
    calls = []
    for way in (quantize_model, QuantizedLinear.from_linear, MarlinLinear.from_linear, MetalQuantizedLinear.from_float):
        layer = linear()
        layer.register_forward_hook(lambda module, arguments, output: calls.append(type(module)))
        made = way(layer)
        layer(torch.randn(1, 128)), made(torch.randn(1, 128))
        assert calls == [nn.Linear, type(made)]
        calls.clear()
        made.register_forward_hook(lambda *arguments: calls.append("made"))
        layer(torch.randn(1, 128))
        assert calls == [nn.Linear]
        calls.clear()


@pytest.mark.parametrize("way", WAYS)
def test_the_bias_stays_the_parameter_that_an_optimizer_knows(way: str) -> None:
    model = nn.Sequential(nn.Linear(128, 64))
    bias = model[0].bias
    WAYS[way](model)
    assert model[0].bias is bias


def test_hooks_of_llama4_experts_run_and_their_handles_remove_them() -> None:
    model = mixture("Llama4")
    calls = []
    experts = model.model.layers[0].feed_forward.experts
    handle = experts.register_forward_hook(lambda module, arguments, output: calls.append(type(module)))
    quantize_model(model)
    logits(model)
    assert calls == [Llama4Experts]
    handle.remove()
    logits(model)
    assert calls == [Llama4Experts]


def test_hooks_go_to_metal_layers_and_back() -> None:
    model = quantize_model(causal_lm("Llama", **DECODER), predicate=lambda path, _: "proj" in path)
    layer = model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, arguments, output: 2 * output)
    expected = logits(model)
    metal_to_mlx(mlx_to_metal(model))
    assert model.model.layers[0].mlp.down_proj is not layer
    assert_close(logits(model), expected, 1e-5)
    handle.remove()
    assert relative_error(logits(model), expected) > 1e-3


def test_hooks_stay_when_an_adapter_is_merged() -> None:
    import peft

    model = quantize_model(causal_lm("Llama", **DECODER), predicate=lambda path, _: "proj" in path)
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, *_: calls.append(type(module)))
    qm.patch_peft()
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    finally:
        qm.unpatch_peft()
    adapted.merge_adapter()
    logits(adapted)
    adapted.unmerge_adapter()
    logits(adapted)
    assert calls == [QuantizedLinear] * 2


LARGER_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}  # as the fused ops want them


@pytest.mark.parametrize("quantized", [False, True])
def test_prepared_decoders_call_projections_with_hooks(quantized: bool) -> None:
    model = causal_lm("Llama", **{**DECODER, **LARGER_HEADS})
    if quantized:
        quantize_model(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.q_proj.register_forward_hook(lambda module, arguments, output: 2 * output)
    mlp.up_proj.register_forward_pre_hook(lambda module, arguments: (3 * arguments[0],))
    original = mlp.down_proj.forward
    mlp.down_proj.forward = lambda x: original(x) + 1
    expected = logits(model)
    ours = logits(qm.prepare_for_generation(model))
    assert_close(ours, expected)


# --- Conv1D -----------------------------------------------------------------------------------------------------------


def gpt2() -> PreTrainedModel:
    model = tiny.random_model("GPT2LMHeadModel", **{**GPT2, "n_head": 4})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def test_conv1d_becomes_a_linear_layer_of_the_transposed_weight() -> None:
    layer = Conv1D(48, 64)
    nn.init.normal_(layer.bias)
    x = torch.randn(5, 64)
    for mode, bits in (("affine", 8), ("mxfp4", 4)):
        made = quantize_model(copy.deepcopy(layer), bits=bits, mode=mode)
        assert (type(made), made.in_features, made.out_features) == (QuantizedLinear, 64, 48)
        assert (made.mode, made.bits) == (mode, bits)
        exact = oracle.values_of(made)
        assert (exact.T - layer.weight.double()).norm() < 0.2 * layer.weight.norm()
        oracle.assert_within(made(x), x.double() @ exact.T + layer.bias.double(), 1e-5)
    made = marlin.quantize_model(copy.deepcopy(layer), "int4", 32)
    assert oracle.format_of(made) == oracle.Format("marlin_int4", 32, 4)
    oracle.assert_within(made(x), x.double() @ oracle.values_of(made) + layer.bias.double(), 1e-5)


def test_gpt2_is_quantized_saved_and_loaded(tmp_path: Path) -> None:
    dense = gpt2()
    report = QuantizationReport()
    model = quantize_model(copy.deepcopy(dense), bits=8, report=report)
    assert not report.skipped and report.weights == sum(p.numel() for p in dense.parameters() if p.ndim == 2)
    assert relative_error(logits(model), logits(dense)) < 0.05
    loaded = tiny.reloaded(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.h.0.mlp.c_fc.weight"].shape == (256, 64 * 8 // 32)  # rows are outputs
    assert type(loaded.transformer.h[0].mlp.c_fc) is QuantizedLinear


@pytest.mark.parametrize("left", ["", "c_"], ids=["quantized", "dense"])
def test_mlx_lm_computes_the_same_from_gpt2(left: str, tmp_path: Path) -> None:
    """Also from layers in floating point, of which the square one would not show by its shape how it lies."""
    model = quantize_model(gpt2(), predicate=lambda path, _: not left or left not in path)
    save_checkpoint(model, tmp_path)
    assert_close(tiny.mlx_logits_of_tokens(tmp_path), logits(model))
    loaded = load_checkpoint(tmp_path)
    assert [type(layer) for layer in loaded.modules()] == [type(layer) for layer in model.modules()]
    assert_close(logits(loaded), logits(model))
    with patched_transformers():
        bare = transformers.GPT2Model.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(bare(TOKENS).last_hidden_state, model.transformer(TOKENS).last_hidden_state)


def test_gpt2_that_mlx_lm_has_quantized_is_read(tmp_path: Path) -> None:
    from mlx_lm import utils

    def predicate(path: str, layer: Any) -> bool:
        return hasattr(layer, "to_quantized") and "1.attn" not in path

    save_checkpoint(gpt2(), tmp_path / "dense")
    model, config = utils.load_model(tmp_path / "dense")
    model, config = utils.quantize_model(model, config, 64, 8, quant_predicate=predicate)
    utils.save_model(tmp_path / "theirs", model)
    utils.save_config(config, tmp_path / "theirs" / "config.json")
    loaded = load_checkpoint(tmp_path / "theirs")
    assert type(loaded.transformer.h[0].attn.c_proj) is QuantizedLinear
    assert type(loaded.transformer.h[1].attn.c_proj) is Conv1D
    assert_close(logits(loaded), tiny.mlx_logits_of_tokens(tmp_path / "theirs"))


def test_gpt2_with_the_names_of_transformers_has_its_layout(tmp_path: Path) -> None:
    model = quantize_model(gpt2(), predicate=lambda path, _: "attn" not in path)
    save_checkpoint(model, tmp_path)
    stored = {name: each.contiguous() for name, each in model.state_dict().items() if name.startswith("transformer.")}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    assert_close(logits(load_checkpoint(tmp_path)), logits(model))


@pytest.mark.parametrize("way", ["mlx", "marlin"])
def test_gpt2_comes_back_to_floating_point_as_it_was(way: str, tmp_path: Path) -> None:
    model = gpt2()
    classes = [type(layer) for layer in model.modules()]
    if way == "mlx":
        save_checkpoint(quantize_model(model, bits=8), tmp_path / "packed")
        loaded = load_checkpoint(tmp_path / "packed")
    else:
        marlin.replace_linear_layers(model, 8, 64)
        save_quantized(model, tmp_path / "packed")
        loaded = load_quantized(tmp_path / "packed", "cpu")
    for each in (model, loaded):
        expected = logits(each)
        dequantize_model(each)
        assert [type(layer) for layer in each.modules()] == classes
        assert_close(logits(each), expected)
    model.save_pretrained(tmp_path / "dense")
    assert_close(logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "dense")), logits(model))
    halved = dequantize_model(WAYS[way](nn.ModuleDict({"layer": Conv1D(64, 128)})), torch.float16)["layer"]
    assert (type(halved), halved.weight.shape, halved.weight.dtype) == (Conv1D, (128, 64), torch.float16)


def test_gpt2_does_not_become_metal_layers() -> None:
    model = quantize_model(gpt2(), predicate=lambda path, _: "c_" in path)
    with pytest.raises(ValueError, match=r"layers of other kinds: transformer\.h\.0\.attn\.c_attn"):
        mlx_to_metal(model)


def test_info_knows_the_columns_of_gpt2(tmp_path: Path) -> None:
    save_checkpoint(quantize_model(gpt2(), 32, 8), tmp_path)
    columns = columns_of_layers(Checkpoint.at(tmp_path))
    assert (columns["model.h.0.mlp.c_fc"], columns["model.h.0.mlp.c_proj"]) == (64, 256)


def test_gpt2_in_marlin_s_formats_is_saved_and_loaded(tmp_path: Path) -> None:
    dense = gpt2()
    model = copy.deepcopy(dense)
    stats = marlin.replace_linear_layers(model, 8, 64)
    assert stats["replaced_count"] == 8
    assert relative_error(logits(model), logits(dense)) < 0.1
    marlin_models.reloaded(model, tmp_path)


@pytest.mark.filterwarnings("ignore:.*floating point")
def test_conv1d_and_linear_of_one_weight_stay_as_they_are() -> None:
    model = nn.ModuleDict({"conv": Conv1D(64, 64), "linear": nn.Linear(64, 64)})
    model["linear"].weight = model["conv"].weight
    report = QuantizationReport()
    quantize_model(model, report=report)
    assert model["linear"].weight is model["conv"].weight
    assert all("transposed" in each.reason for each in report.skipped) and len(report.skipped) == 2


# --- Experts ----------------------------------------------------------------------------------------------------------

DECODER = {**SMALL, "tie_word_embeddings": False, "pad_token_id": 0}
MIXTRAL = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {**DECODER, "num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 128, "attention_chunk_size": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 128}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
GLM4 = {**DECODER, **ROUTED, **LATENT, "num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": MIXTRAL,
    "GptOss": {**MIXTRAL, "head_dim": 16},
    "Llama4": {**LLAMA4, "interleave_moe_layer_step": 1, "attn_temperature_tuning": False},
    "Glm4MoeLite": GLM4,
}


def mixture(family: str, **options: Any) -> PreTrainedModel:
    model = causal_lm(family, **{**MIXTURES[family], **options})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith("bias"):
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def weights_of(experts: nn.Module) -> list[Tensor]:
    """What the projections of experts stand for, [num_experts, in_features, out_features] in float64."""
    weights = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(experts, name)
        values = oracle.values_of(layer)
        weights.append(values if isinstance(layer, ColumnPackedSwitchLinear) else values.mT)
    return weights


def with_experts_of(dense: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `dense` whose fused experts have the values that those of `model` stand for; run by eager code."""
    reference = copy.deepcopy(dense)
    for path, experts in dense.named_modules():
        if not isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter):
            continue
        gate, up, down = weights_of(model.get_submodule(path))
        in_turns = not getattr(experts, "is_concatenated", True)
        fused = torch.stack((gate, up), -1).flatten(-2) if in_turns else torch.cat((gate, up), -1)
        transposed = getattr(experts, "is_transposed", True)  # Llama 4's are, and have no such attribute
        twin = reference.get_submodule(path)
        for parameter, weight in ((twin.gate_up_proj, fused), (twin.down_proj, down)):
            parameter.data = (weight if transposed else weight.mT).to(parameter.dtype).contiguous()
        if hasattr(twin, "config"):
            twin.config._experts_implementation = "eager"
    return reference


def test_llama4_experts_compute_with_the_values_that_they_hold() -> None:
    dense = mixture("Llama4")
    model = quantize_model(copy.deepcopy(dense), predicate=only_experts)
    experts = model.model.layers[0].feed_forward.experts
    assert type(experts) is Llama4Experts
    assert [type(layer) for layer in experts.children() if hasattr(layer, "bits")] == [qm.QuantizedSwitchLinear] * 3
    expected = logits(with_experts_of(dense, model))
    assert relative_error(logits(dense), expected) > 0.01
    assert_close(logits(model), expected, 1e-5)


def test_llama4_at_8_bits_gives_the_logits_of_the_dense_model(tmp_path: Path) -> None:
    dense = mixture("Llama4")
    report = QuantizationReport()
    model = quantize_model(copy.deepcopy(dense), bits=8, report=report)
    assert relative_error(logits(model), logits(dense)) < 0.1
    assert {each.path.rpartition(".")[2] for each in report.skipped} == {"router"}
    loaded = tiny.reloaded(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.feed_forward.experts.gate_proj.weight"].shape == (4, 128, 64 * 8 // 32)
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(model))


def test_llama4_runs_the_experts_that_the_router_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize_model(mixture("Llama4"), bits=8)
    rows = []
    forward = qm.QuantizedSwitchLinear.forward

    def counted(self: Any, x: Tensor, indices: Tensor, sorted_indices: bool = False) -> Tensor:
        rows.append(len(indices))
        return forward(self, x, indices, sorted_indices)

    monkeypatch.setattr(qm.QuantizedSwitchLinear, "forward", counted)
    logits(model)
    assert rows == [TOKENS.numel()] * 6  # one expert for each token, in three projections of two layers


def test_llama4_compiles_in_one_graph() -> None:
    experts = quantize_model(mixture("Llama4"), bits=8).model.layers[0].feed_forward.experts
    x = torch.randn(4 * 5, 64)
    x[7:] = 0
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")(x)
        oracle.assert_within(compiled, experts(x).double(), 1e-5)
        assert not experts(torch.zeros(8, 64)).any()


def test_refused_llama4_experts_are_the_ones_that_they_were(tmp_path: Path) -> None:
    model = mixture("Llama4")
    experts, expected = model.model.layers[0].feed_forward.experts, logits(model)
    parameters = dict(model.named_parameters())
    quantize_model(model, predicate=lambda path, layer: False)
    assert model.model.layers[0].feed_forward.experts is experts
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is each for name, each in parameters.items())
    assert torch.equal(logits(model), expected)
    quantize_model(model, predicate=lambda path, layer: "experts" not in path)
    tiny.reloaded(model, tmp_path)  # with experts in their fused form


def test_llama4_of_mlx_lm_loads(tmp_path: Path) -> None:
    """Routers, which mlx_lm quantizes, and names that begin with the part's."""
    dense = mixture("Llama4")
    model = quantize_model(copy.deepcopy(dense), bits=8)
    save_checkpoint(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for index in range(2):
        path = f"model.layers.{index}.feed_forward.router"
        router = QuantizedLinear.from_linear(as_plain_linear(dense.get_submodule(path)), bits=8)
        stored.update({f"{path}.{name}": tensor for name, tensor in router.state_dict().items()})
        model.get_submodule(path).weight.data = oracle.values_of(router).float()
    save_file({f"language_model.{name}": each for name, each in stored.items()}, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path)
    assert_close(logits(loaded), logits(model), 1e-5)


def test_mlx_lm_computes_the_same_from_llama4(tmp_path: Path) -> None:
    """Of what mlx_lm reads, a model with images around this one, whose config is written here."""
    model = quantize_model(mixture("Llama4", num_hidden_layers=4), bits=8)
    save_checkpoint(model, tmp_path)
    stored = {f"language_model.{name}": each for name, each in load_file(tmp_path / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    config = {**json.loads((tmp_path / "config.json").read_text()), "rope_scaling": None, "attention_bias": False}
    config.update(attn_scale=0.1, floor_scale=8192, num_hidden_layers=4)
    quantization = config.pop("quantization")
    whole = {"model_type": "llama4", "text_config": config, "quantization": quantization}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert_close(logits(model), tiny.mlx_logits_of_tokens(tmp_path))


def as_plain_linear(router: nn.Linear) -> nn.Linear:
    layer = nn.Linear(router.in_features, router.out_features, bias=False)
    layer.weight = router.weight
    return layer


NOT_EXPERTS = {"self_attn", "lm_head", "shared_expert", "shared_experts"}
NOT_EXPERTS |= {f"0.mlp.{name}_proj" for name in ("gate", "up", "down")}
MARLIN_WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "bits-2": lambda model: marlin.replace_linear_layers(model, 2, 32, layer_filter=only_experts),
    "bits-8": lambda model: marlin.replace_linear_layers(model, 8, 64, layer_filter=only_experts),
    "int4": lambda model: marlin.quantize_model(model, "int4", 32, NOT_EXPERTS),
}


@pytest.mark.parametrize("way", MARLIN_WAYS)
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Glm4MoeLite", "Llama4"])
def test_marlin_s_experts_compute_with_the_values_that_they_hold(family: str, way: str) -> None:
    dense = mixture(family)
    model = copy.deepcopy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MARLIN_WAYS[way](model)
    expected = logits(with_experts_of(dense, model))
    assert any(isinstance(layer, ColumnPackedSwitchLinear) for layer in model.modules())
    assert relative_error(logits(dense), expected) > 1e-3
    assert_close(logits(model), expected)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Glm4MoeLite", "Llama4"])
def test_marlin_leaves_routers_and_embeddings_alone_and_says_so(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stats = marlin.replace_linear_layers(model, 4, 64)
    routers = {path for path, _ in model.named_modules() if path.endswith(("mlp.gate", ".router"))}
    assert set(stats.skipped) == {"model.embed_tokens", *routers}
    assert stats["skipped_count"] == 1 + len(routers)
    left = sum(model.get_submodule(path).weight.numel() for path in stats.skipped)
    assert stats.skipped_share == left / parameters < 0.05
    loaded = marlin_models.reloaded(model, tmp_path)
    record = json.loads((tmp_path / "quantization_config.json").read_text())["layers"]
    assert "ColumnPackedSwitchLinear" in {entry["class"] for entry in record.values()}
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_marlin_s_experts_may_be_mixed_with_others(tmp_path: Path) -> None:
    model = mixture("Mixtral")
    marlin.replace_linear_layers(model, 4, 64, layer_filter=lambda path, layer: "1.mlp.experts.up_proj" in path)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)
    experts = model.model.layers[1].mlp.experts
    kinds = [type(experts.get_submodule(name)) for name in ("gate_proj", "up_proj", "down_proj")]
    assert kinds == [SwitchLinear, ColumnPackedSwitchLinear, SwitchLinear]
    marlin_models.reloaded(model, tmp_path)
    filled = load_quantized(tmp_path, "cpu", model=mixture("Mixtral"))
    assert torch.equal(logits(filled), logits(model))


def test_a_failed_load_into_a_model_leaves_its_experts_alone(tmp_path: Path) -> None:
    model = mixture("Mixtral")
    marlin.replace_linear_layers(model, 4, 64)
    save_quantized(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    target = mixture("Mixtral")
    before, expected = dict(target.named_parameters()), logits(target)
    with pytest.raises(ValueError, match=r"missing tensors: model\.norm\.weight"):
        load_quantized(tmp_path, "cpu", model=target)
    after = dict(target.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is each for name, each in before.items())
    assert torch.equal(logits(target), expected)


@pytest.mark.parametrize("mode", ["marlin_fp4", "marlin_fp8", "marlin_int2", "marlin_int4", "marlin_int4_sym"])
def test_packed_experts_multiply_rows_by_their_matrices(mode: str) -> None:
    torch.manual_seed(1)
    switch = SwitchLinear(torch.randn(5, 48, 64), torch.randn(5, 48))
    layer = ColumnPackedSwitchLinear.from_switch_linear(switch, mode, 32)
    assert oracle.format_of(layer) == oracle.Format(mode, 32, layer.bits)
    exact = oracle.values_of(layer)
    x, indices = torch.randn(7, 1, 64), torch.tensor([[0, 4], [2, 2], [1, 0], [3, 4], [0, 0], [4, 1], [2, 3]])
    products = torch.einsum("tik,tikn->tin", x.double().expand(7, 2, 64), exact[indices])
    expected = products + switch.bias[indices].double()
    oracle.assert_within(layer(x, indices), expected, 1e-4)
    assert layer.to(torch.bfloat16).scales.dtype == torch.float16
    assert layer(x.to(torch.bfloat16), indices).dtype == torch.bfloat16
    oracle.assert_within(layer.weight.float(), exact.mT, 0.01 * exact.abs().max())


@pytest.mark.parametrize("family", ["Mixtral", "Llama4"])
@pytest.mark.parametrize("way", ["mlx", "marlin"])
def test_experts_and_hooks_come_back_to_floating_point(family: str, way: str) -> None:
    model = mixture(family)
    classes = {path: type(module) for path, module in model.named_modules()}
    if way == "mlx":
        quantize_model(model, bits=8)
    else:
        marlin.replace_linear_layers(model, 8, 64)
    model.lm_head.register_forward_hook(lambda module, arguments, output: 2 * output)
    expected = logits(model)
    dequantize_model(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert_close(logits(model), expected)


@pytest.mark.filterwarnings("ignore:.*floating point")
def test_experts_with_a_forward_of_their_own_are_left_alone() -> None:
    for quantize in (quantize_model, marlin.quantize_model):
        model = mixture("Mixtral")
        experts = model.model.layers[0].mlp.experts
        forward = experts.forward
        experts.forward = functools.partial(forward)
        quantize(model, group_size=64)
        assert isinstance(experts.gate_up_proj, nn.Parameter)
        assert not isinstance(model.model.layers[1].mlp.experts.down_proj, nn.Parameter)
        logits(model)


# --- What stays in floating point -------------------------------------------------------------------------------------


class Various(nn.Module):
    """Matrices of every kind, most of them nobody's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.ragged = nn.Linear(128, 64), nn.Linear(100, 8)
        self.norm, self.convolution = nn.LayerNorm([4, 128]), nn.Conv2d(4, 8, 3)
        self.experts = nn.Parameter(torch.randn(4, 128, 64))
        self.experts_bias = nn.Parameter(torch.randn(4, 64))
        self.attention = nn.MultiheadAttention(64, 4)


def test_everything_that_stays_is_counted_and_named() -> None:
    model = Various()
    total = sum(parameter.numel() for parameter in model.parameters())
    report = QuantizationReport()
    with pytest.warns(UserWarning, match=r"\[quantize_model\] .*% of the parameters stay in floating point: experts: "):
        quantize_model(model, report=report)
    reasons = {each.path: each.reason for each in report.skipped}
    assert reasons == {
        "experts": "a parameter of Various",
        "ragged": "a row of 100 values does not divide into groups of 64",
        "convolution": "a Conv2d, which has no quantized form",
        "attention.in_proj_weight": "a parameter of MultiheadAttention",
        "attention.out_proj": "a subclass of Linear: NonDynamicallyQuantizableLinear",
    }
    left = 4 * 128 * 64 + 8 * 100 + 8 * 4 * 9 + 4 * 64 * 64
    assert report.parameters == total
    assert sum(each.parameters for each in report.skipped) == left
    assert report.skipped_share == left / total
    last = report.table().splitlines()[-1]
    assert "left in floating point" in last and f"{left / total:.1%} of the parameters" in last
    stats = marlin.replace_linear_layers(Various())
    assert stats.skipped.keys() == reasons.keys()
    assert stats.skipped_share == left / total


def test_what_the_predicate_refuses_is_reported_without_a_warning() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    report = QuantizationReport()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model, predicate=lambda path, layer: path == "a", report=report)
    [left] = report.skipped
    assert (left.path, left.reason, left.is_asked_for) == ("b", "refused by the predicate", True)


def test_less_than_a_percent_is_reported_without_a_warning() -> None:
    report = QuantizationReport()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantize_model(mixture("Mixtral"), report=report)
    assert {each.path.rpartition(".")[2] for each in report.skipped} == {"gate"}
    assert 0 < report.skipped_share < 0.01
    again = QuantizationReport()
    quantize_model(model, report=again)  # packed layers count as what they stand for
    assert (again.parameters, again.skipped_share) == (report.parameters, report.skipped_share)


def test_a_report_may_do_without_errors() -> None:
    report = QuantizationReport(with_errors=False)
    quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(100, 64, bias=False)), report=report)
    assert not report.layers
    assert [each.path for each in report.skipped] == ["1"]


def test_convert_prints_what_stays(tmp_path: Path, run: Run, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    causal_lm("Llama", **{**DECODER, "intermediate_size": 160}).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    command = ["convert", "--hf-path", tmp_path / "source", "-q", "--mlx-path"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out, _ = run(*command, tmp_path / "a")
    assert re.search(r"left in floating point: 2 matrices, [0-9.]+% of the parameters; --report", out)
    report = tmp_path / "report.md"
    out, _ = run(*command, tmp_path / "b", "--report", report)
    assert "left in floating point: 2 matrices, " in out
    assert "model.layers.1.mlp.down_proj" in report.read_text()
    assert "a row of 160 values does not divide into groups of 64" in report.read_text()


# --- On the way through Transformers ----------------------------------------------------------------------------------


def limit_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, GPT-2 limits the rows of its embedding."""
    original = transformers.GPT2Model.__init__

    def limited(self: Any, config: Any) -> None:
        original(self, config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, max_norm=1.0)

    monkeypatch.setattr(transformers.GPT2Model, "__init__", limited)


@pytest.mark.filterwarnings("ignore:.*floating point")
def test_quantizing_while_loading_leaves_the_same_layers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path)
    limit_embeddings(monkeypatch)
    with patched_transformers():
        config = MLXConfig(bits=8, group_size=64)
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config)
    assert type(loaded.transformer.wte) is nn.Embedding and loaded.transformer.wte.max_norm == 1.0
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert type(loaded.transformer.h[0].mlp.c_fc) is QuantizedLinear


def test_a_checkpoint_that_has_such_a_layer_quantized_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(quantize_model(gpt2()), tmp_path)
    limit_embeddings(monkeypatch)
    with pytest.raises(ValueError, match=r"layers quantized that cannot be: transformer\.wte: has max_norm=1\.0"):
        load_checkpoint(tmp_path)
