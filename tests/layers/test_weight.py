"""`layer.weight` of quantized layers, which code of models reads: beside the matrix itself, and in such models."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
import quantization_mlx as qm
from cases import SOME_FORMATS
from oracle import name_of
from quantization_mlx import QuantizedEmbedding, QuantizedLinear, dequantize_model, quantize_model
from quantization_mlx.marlin.layers import MarlinLinear, MetalQuantizedLinear
from quantization_mlx.marlin.models import replace_linear_layers
from quantization_mlx.nn.linear import PackedLinear
from quantization_mlx.nn.module import PackedModule
from quantization_mlx.nn.packed_weight import PackedWeight
from tiny import causal_lm, random_model

IN, OUT = 256, 48
replace_groups_of_64 = functools.partial(replace_linear_layers, group_size=64)

LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    **{name_of(format): functools.partial(QuantizedLinear.from_linear, **format.options) for format in SOME_FORMATS},
    "marlin-int4": lambda linear: MarlinLinear.from_linear(linear, "int4"),
    "marlin-fp8": lambda linear: MetalQuantizedLinear.from_float(linear, 8),
}
LAYER = pytest.mark.parametrize("name", LAYERS)


def layer_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name](nn.Linear(IN, OUT, dtype=dtype))


def exact(layer: nn.Module) -> Tensor:
    """The matrix [OUT, IN] in float64, by way of the layer's products with unit vectors."""
    with torch.no_grad():
        return (layer(torch.eye(IN)) - layer.bias).T.double()


# What a weight is


@LAYER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_a_weight_says_what_the_float_one_would(name: str, dtype: torch.dtype) -> None:
    weight, dense = layer_of(name, dtype).weight, nn.Linear(IN, OUT, dtype=dtype).weight
    assert (weight.dtype, weight.shape, weight.device) == (dtype, dense.shape, dense.device)
    assert weight.is_floating_point() and weight.numel() == dense.numel() and weight.dim() == 2
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert f"{list(dense.shape)}" in repr(weight)


@LAYER
def test_layers_are_linear_ones_whose_parameters_are_packed(name: str) -> None:
    layer = layer_of(name)
    assert isinstance(layer, nn.Linear)
    assert layer.weight_packed.dtype == torch.uint32
    assert any(parameter is layer.weight_packed for parameter in layer.parameters())
    assert layer.half().weight.dtype == torch.float16


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda w, x: F.linear(x, w),
    "linear with bias": lambda w, x: F.linear(x, w, torch.ones(OUT)),
    "x @ T": lambda w, x: x @ w.T,
    "matmul t": lambda w, x: torch.matmul(x, w.t()),
    "mm transpose": lambda w, x: torch.mm(x, w.transpose(0, 1)),
    "w @ x": lambda w, x: w @ x.T,
    "w @ vector": lambda w, x: w @ x[0],
    "batch": lambda w, x: w @ x.T.expand(2, -1, -1),
    "rows": lambda w, x: x[:, :OUT] @ w,
    "index": lambda w, x: w[torch.tensor([[1, 0], [5, 5]])],
    "list": lambda w, x: w[[3, 1]],
    "full mask": lambda w, x: w[torch.arange(OUT * IN).view(OUT, IN) % 7 == 0],
    "keywords": lambda w, x: torch.matmul(input=x, other=w.T) + torch.mm(x, mat2=w.T),
    "copy": lambda w, x: F.linear(x, w.to(torch.float32, copy=True)),
    "one row": lambda w, x: w[-3],
    "slice": lambda w, x: w[4:9],
    "element": lambda w, x: w[3, 7],
    "mask": lambda w, x: w[torch.arange(OUT) % 3 == 0],
    "embedding": lambda w, x: F.embedding(torch.tensor([3, 1]), w),
    "cat": lambda w, x: x.matmul(torch.cat([w.t(), w.t()], 1)),
    "addmm": lambda w, x: torch.addmm(torch.zeros(len(x), OUT), x, w.T),
    "einsum": lambda w, x: torch.einsum("mk,nk->mn", x, w),
    "norm": lambda w, x: w.norm(dim=1),
    "to": lambda w, x: F.linear(x, w.to(torch.float32)),
    "cast back": lambda w, x: F.linear(x, w.half().float()),
    "cast input": lambda w, x: F.linear(x.double().to(w), w),
    "detach": lambda w, x: F.linear(x, w.detach().data),
}


@LAYER
@pytest.mark.parametrize("use", USES)
def test_uses_of_a_weight_give_what_the_matrix_gives(name: str, use: str) -> None:
    layer = layer_of(name)
    x = oracle.random_x(5, IN)
    ours = USES[use](layer.weight, x)
    expected = USES[use](exact(layer).float(), x)
    assert type(ours) is Tensor and ours.dtype == torch.float32
    tolerance = 2e-2 if use == "cast back" else 1e-4  # a float16 weight is not rounded as long as it is packed
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@LAYER
def test_products_stay_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedWeight, "dequantize", lambda _: pytest.fail("the weight was dequantized"))
    weight, x = layer_of(name).weight, oracle.random_x(5, IN)
    for use in ("linear", "x @ T", "matmul t", "mm transpose", "w @ x", "w @ vector", "to", "detach"):
        USES[use](weight, x)
    for dtype in (weight.dtype, weight.to(torch.float16).dtype):
        assert dtype.is_floating_point


@LAYER
def test_gradients_reach_activations_through_a_weight(name: str) -> None:
    layer = layer_of(name)
    x = oracle.random_x(5, IN).requires_grad_()
    F.linear(x, layer.weight).sum().backward()
    torch.testing.assert_close(x.grad, exact(layer).float().sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)


def test_gradients_reach_scales_through_values() -> None:
    layer = layer_of(name_of(SOME_FORMATS[0]))
    layer.scales.requires_grad_()
    (2 * layer.weight).sum().backward()
    direct = layer.scales.grad.clone()
    layer.scales.grad = None
    qm.dequantize(*layer.packed()).sum().mul(2).backward()
    assert torch.equal(direct, layer.scales.grad)


WRITES: dict[str, Callable[[Any], object]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.data.copy_(torch.ones(OUT, IN)),
    "item": lambda w: w.__setitem__(0, 1.0),
    "iadd": lambda w: w.__iadd__(1),
    "data": lambda w: setattr(w, "data", torch.ones(OUT, IN)),
    "init": nn.init.normal_,
    "out": lambda w: torch.add(torch.ones(OUT, IN), 1, out=w),
    "train": lambda w: w.requires_grad_(),
    "train by attribute": lambda w: setattr(w, "requires_grad", True),
}


@LAYER
@pytest.mark.parametrize("write", WRITES)
def test_a_weight_cannot_be_written_to(name: str, write: str) -> None:
    layer = layer_of(name)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(NotImplementedError, match="packed and cannot be written to"):
        WRITES[write](layer.weight)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


# Assignment


@LAYER
def test_assigning_a_weight_ties_layers(name: str) -> None:
    first, second = layer_of(name), copy.deepcopy(layer_of(name))
    assert second.weight is not first.weight
    second.weight = first.weight
    assert second.weight is first.weight
    assert all(second._parameters[key] is first._parameters[key] for key in first.packed_names)


def test_assignments_that_do_not_fit_are_refused() -> None:
    layer = layer_of(name_of(SOME_FORMATS[0]))
    with pytest.raises(TypeError, match=r"\[QuantizedLinear\] weight is assigned a float32 tensor"):
        layer.weight = nn.Parameter(torch.ones(OUT, IN))
    with pytest.raises(ValueError, match=r"\[QuantizedLinear\] weight is assigned PackedWeight.*mxfp4"):
        layer.weight = QuantizedLinear(IN, OUT, mode="mxfp4").weight
    square = QuantizedLinear(IN, IN)
    with pytest.raises(ValueError, match=r"\[QuantizedLinear\] weight is assigned PackedWeight"):
        square.weight = QuantizedLinear(IN, IN).weight.T
    with pytest.raises(NotImplementedError, match=r"\[data_ptr\].*no memory of its own"):
        save({"weight": layer.weight})


def test_a_weight_follows_the_tensors_of_its_layer() -> None:
    layer, other = (layer_of(name_of(SOME_FORMATS[0])) for _ in range(2))
    held = layer.weight
    layer.biases = nn.Parameter(other.biases.detach() + 1, requires_grad=False)
    assert layer.weight is not held
    assert torch.equal(layer.weight + 0, qm.dequantize(*layer.packed()))


def test_ties_survive_tie_weights_and_state_dicts() -> None:
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True)
    model = quantize_model(transformers.LlamaForCausalLM(config))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other = quantize_model(transformers.LlamaForCausalLM(config))
    other.load_state_dict(model.state_dict())
    tokens = torch.arange(8)[None]
    assert torch.equal(other(tokens).logits, model(tokens).logits)


@LAYER
def test_layers_are_dequantized_saved_and_copied(name: str) -> None:
    layer, x = layer_of(name), oracle.random_x(5, IN)
    dense = layer.dequantize()
    assert type(dense) is nn.Linear and dense.bias is not layer.bias
    torch.testing.assert_close(dense(x), layer(x), rtol=1e-4, atol=1e-4)
    file = io.BytesIO()
    torch.save(layer, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(loaded(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_tables_are_dequantized(format: oracle.Format) -> None:
    table = nn.Embedding(10, IN, dtype=torch.bfloat16)
    quantized = QuantizedEmbedding.from_embedding(table, **format.options)
    assert isinstance(quantized, nn.Embedding) and quantized.weight.dtype == torch.bfloat16
    indices = torch.tensor([[3, 9], [0, 3]])
    dense = quantized.dequantize()
    assert type(dense) is nn.Embedding
    assert all(torch.equal(each, quantized(indices)) for each in (dense(indices), quantized.weight[indices]))


@LAYER
def test_the_original_keeps_its_own_bias(name: str) -> None:
    linear = nn.Linear(IN, OUT)
    before = linear.bias.detach().clone()
    layer = LAYERS[name](linear)
    layer.bias.data.add_(1)
    layer.to(torch.bfloat16)
    assert torch.equal(linear.bias, before) and linear.bias.dtype == torch.float32


class ReadsItsWeights(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype)) + F.linear(x, self.layer.weight)


@LAYER
def test_code_that_reads_weights_compiles(name: str) -> None:
    module, x = ReadsItsWeights(layer_of(name)), oracle.random_x(5, IN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


# Models whose code reads weights

TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
BERT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
MAMBA = {"vocab_size": 96, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "pad_token_id": 0}
SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER_DECODER = ("T5", "MT5", "UMT5", "LongT5", "SwitchTransformers", "FSMT", "NllbMoe")

# By the name of a family in Transformers: the class of the model, and the options of its config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("T5ForConditionalGeneration", T5),
    "MT5": ("MT5ForConditionalGeneration", T5),
    "UMT5": ("UMT5ForConditionalGeneration", T5),
    "LongT5": ("LongT5ForConditionalGeneration", T5),
    "SwitchTransformers": (
        "SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1},
    ),
    "FSMT": (
        "FSMTForConditionalGeneration",
        {**SEQ2SEQ, "langs": ["a", "b"], "src_vocab_size": 96, "tgt_vocab_size": 96},
    ),
    "NllbMoe": (
        "NllbMoeForConditionalGeneration", {**SEQ2SEQ, "vocab_size": 96, "num_experts": 2, "expert_capacity": 64},
    ),
    "Mamba": ("MambaForCausalLM", MAMBA),
    "FalconMamba": ("FalconMambaForCausalLM", MAMBA),
    "Mamba2": ("Mamba2ForCausalLM", {**MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "Jamba": (
        "JambaForCausalLM",
        {**TINY, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 32,
         "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 3},
    ),
    "xLSTM": (
        "xLSTMForCausalLM",
        {"vocab_size": 96, "hidden_size": 64, "num_heads": 2, "num_blocks": 2, "qk_dim_factor": 1.0},
    ),
    "MobileBert": (
        "MobileBertForMaskedLM",
        {**BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32, "intermediate_size": 64},
    ),
    "Deberta": ("DebertaForMaskedLM", BERT),
    "DebertaV2": ("DebertaV2ForMaskedLM", BERT),
    "GPTNeo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
         "max_position_embeddings": 64},
    ),
}  # fmt: skip
TOKENS = torch.randint(3, 96, (2, 16), generator=oracle.generator(1))


def model_of(family: str, dtype: torch.dtype) -> nn.Module:
    name, options = FAMILIES[family]
    model = random_model(name, **options).to(dtype)
    with torch.no_grad():  # weights of an ordinary size, so that every layer counts
        for module in model.modules():
            if type(module) is nn.Linear:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def logits_of(family: str, model: nn.Module) -> Tensor:
    inputs = {"input_ids": TOKENS}
    if family in ENCODER_DECODER:
        inputs["decoder_input_ids"] = TOKENS[:, :7]
    with torch.no_grad():
        return model(**inputs).logits


def assert_near(ours: Tensor, expected: Tensor, tolerance: float = 0.1) -> None:
    assert ours.isfinite().all()
    assert (ours.float() - expected.float()).norm() < tolerance * expected.float().norm()


def quantized_layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, PackedLinear)]


def dense_twin(model: nn.Module) -> nn.Module:
    """The model with floating-point layers of the same values."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if isinstance(module, PackedLinear | QuantizedEmbedding):
            twin.set_submodule(path, module.dequantize())
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_read_their_weights(family: str) -> None:
    model = model_of(family, torch.float32)
    expected = logits_of(family, model)
    linear = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    quantize_model(model, 32, 8)
    assert quantized_layers(model) == [path for path in linear if model.get_submodule(path).in_features % 32 == 0] != []
    assert_near(logits_of(family, model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("kind", ["mxfp8", "marlin"])
def test_models_run_as_with_the_values_of_their_weights(family: str, kind: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    if kind == "marlin":
        assert replace_linear_layers(model, 8, 32)["replaced_count"] > 0
    else:
        quantize_model(model, mode=kind)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert_near(logits_of(family, model), logits_of(family, dense_twin(model)), tolerance)


@pytest.mark.parametrize("replace", [lambda m: quantize_model(m, 32, 8), lambda m: replace_linear_layers(m, 8, 32)])
@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_layers_of_torch_that_read_weights(layer: str, replace: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    options = {"d_model": 64, "nhead": 4, "dim_feedforward": 128, "batch_first": True, "dropout": 0.0}
    if layer == "encoder":
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2).eval()
        arguments = (oracle.random_x(2, 7, 64),)
    else:
        model = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 2).eval()
        arguments = (oracle.random_x(2, 7, 64), oracle.random_x(2, 5, 64))
    with torch.no_grad():
        expected = model(*arguments)
        replace(model)
        assert_near(model(*arguments), expected)


@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "FalconMamba", "GPTNeo"])
def test_checkpoints_of_such_models_load_and_run(family: str, tmp_path) -> None:
    model = model_of(family, torch.float32)
    expected = logits_of(family, model)
    qm.save_checkpoint(quantize_model(model, 32, 8), tmp_path)
    loaded = qm.load_checkpoint(tmp_path)
    assert quantized_layers(loaded) == quantized_layers(model)
    assert_near(logits_of(family, loaded), expected)


# Back to floating point


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", [quantize_model, lambda m: quantize_model(m, mode="mxfp4"), replace_groups_of_64])
def test_models_are_dequantized(quantize: Callable[[nn.Module], object], tied: bool) -> None:
    model = causal_lm("Llama", **TINY, tie_word_embeddings=tied)
    quantize(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert dequantize_model(model) is model
        assert not any(isinstance(module, PackedModule) for module in model.modules())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-3, atol=1e-4)
    assert {parameter.dtype for parameter in dequantize_model(model, torch.bfloat16).parameters()} == {torch.float32}


def test_experts_are_dequantized() -> None:
    model = causal_lm("Mixtral", **TINY, num_local_experts=4, num_experts_per_tok=2)
    names = set(model.state_dict())
    quantize_model(model, bits=8)
    with torch.no_grad():
        expected = model(TOKENS).logits
        torch.testing.assert_close(dequantize_model(model)(TOKENS).logits, expected, rtol=1e-3, atol=1e-4)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name_of)
def test_loaded_models_change_their_dtype_and_are_dequantized_by_transformers(dtype: torch.dtype, tmp_path) -> None:
    model = causal_lm("Llama", **TINY).to(torch.bfloat16)
    qm.save_checkpoint(quantize_model(model), tmp_path)
    loaded = qm.load_checkpoint(tmp_path).to(dtype)
    with torch.no_grad():
        expected = loaded(TOKENS).logits
        assert expected.dtype == dtype
        dense = loaded.dequantize()
        assert type(dense.lm_head) is nn.Linear and not getattr(dense.config, "quantization_config", None)
        assert_near(dense(TOKENS).logits, expected, 1e-2)


def test_dequantized_models_are_ordinary_ones(tmp_path) -> None:
    model = causal_lm("Llama", **TINY)
    model.twice = model.lm_head
    qm.save_checkpoint(quantize_model(causal_lm("Llama", **TINY)), tmp_path / "mlx")
    loaded = dequantize_model(qm.load_checkpoint(tmp_path / "mlx"))
    loaded.half().save_pretrained(tmp_path / "dense")
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").lm_head) is nn.Linear
    dequantize_model(quantize_model(model))
    assert model.twice is model.lm_head


@pytest.mark.parametrize("quantize", [quantize_model, replace_groups_of_64])
def test_accelerate_offloads_quantized_layers(quantize: Callable[[nn.Module], object], tmp_path) -> None:
    import accelerate

    model = causal_lm("Llama", **TINY, tie_word_embeddings=True)
    quantize(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        on_cpu = accelerate.cpu_offload(copy.deepcopy(model), "cpu")
        assert torch.equal(on_cpu(TOKENS).logits, expected)
        on_disk = accelerate.disk_offload(copy.deepcopy(model), tmp_path, "cpu")
        assert torch.equal(on_disk(TOKENS).logits, expected)


def test_lazy_layers_stay() -> None:
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(64)))
    assert [type(layer) for layer in model] == [QuantizedLinear, nn.LazyLinear]


def test_embeddings_of_quantized_models_are_not_resized() -> None:
    model = quantize_model(causal_lm("Llama", **TINY))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match="packed and cannot be written to"):
        model.resize_token_embeddings(128)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.vocab_size == 96
