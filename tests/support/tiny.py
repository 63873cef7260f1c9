"""Small random models, what they compute, and the files of their checkpoints; mlx-lm's answers to the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import oracle
from oracle import Format, name_of
from quantization_mlx import load_checkpoint, save_checkpoint

VOCABULARY = 96
TOKENS = torch.tensor([[5, 17, 3, 90, 44, 8, 8, 71, 2, 60]])
# Sizes of a decoder, by the names that configs have for them.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
}
SMALL = {**SIZES, "hidden_size": 64, "intermediate_size": 128}


def random_model(class_name: str, **options: Any) -> PreTrainedModel:
    """A model of a class of Transformers, with the options of its config."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name)
    return model(model.config_class(**options)).eval()


def causal_lm(family: str, **options: Any) -> PreTrainedModel:
    """The model that Transformers has for a family, such as "Llama", with random weights."""
    return random_model(f"{family}ForCausalLM", **options)


def with_random_vectors(model: PreTrainedModel) -> PreTrainedModel:
    """As `distinct`, of models whose names do not tell."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def distinct(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random norms and biases: ones and zeros would hide a mix-up."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tiny_model(dtype: torch.dtype = torch.float32, family: str = "Llama", **options: Any) -> PreTrainedModel:
    return distinct(causal_lm(family, **{**SIZES, "tie_word_embeddings": False, **options}).to(dtype))


# Of hidden_size 64 the square root has few bits: mlx-lm rounds the scale of Gemma's embeddings to bfloat16.
TEXT = {**SMALL, "head_dim": 32, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2}
LINEAR |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32}
GEMMA4_VISION = {**VISION, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
LLAMA4 = {**TEXT, "intermediate_size_mlp": 128}
LLAMA4_VISION = {**VISION, "intermediate_size": 128, "vision_output_dim": 64}
LLAMA4_VISION |= {"projector_input_dim": 64, "projector_output_dim": 64}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY, "initializer_range": 0.1}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 1}
MISTRAL = {**TEXT, "model_type": "mistral", "tie_word_embeddings": True}
# Models that see images: the name of the class, the configs of the text and of the vision, the class of the text alone.
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "gemma3": ("Gemma3", {**TEXT, **TWO_KINDS, "sliding_window_pattern": 2}, VISION, "Gemma3ForCausalLM"),
    "gemma4": ("Gemma4", {**TEXT, **TWO_KINDS, **PER_LAYER}, GEMMA4_VISION, "Gemma4ForCausalLM"),
    "llama4": ("Llama4", {**LLAMA4, "num_local_experts": 2}, LLAMA4_VISION, "Llama4ForCausalLM"),
    "mistral3": ("Mistral3", MISTRAL, {**VISION, "model_type": "pixtral"}, "MistralForCausalLM"),
    "qwen3_5": ("Qwen3_5", {**TEXT, **LINEAR}, QWEN_VISION, "Qwen3_5ForCausalLM"),
    "qwen3_vl": ("Qwen3VL", TEXT, {**QWEN_VISION, "deepstack_visual_indexes": [0]}, "Qwen3VLTextModel"),
}


def wrapper(name: str) -> tuple[PreTrainedModel, type[PreTrainedModel]]:
    """A random model that sees images, and the class of its text."""
    class_name, text_options, vision_options, text_name = WRAPPERS[name]
    options = {"text_config": text_options, "vision_config": vision_options}
    if "tie_word_embeddings" in text_options:
        options["tie_word_embeddings"] = text_options["tie_word_embeddings"]
    model = random_model(f"{class_name}ForConditionalGeneration", **copy.deepcopy(options))
    return with_random_vectors(model), getattr(transformers, text_name)


def word_tokenizer(eos_token: str | None = "w1", **options: Any) -> PreTrainedTokenizerFast:
    """One token for each word "w0", "w1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos_token, unk_token="w0", **options)


def only_experts(path: str, layer: nn.Module) -> bool:
    return ".experts." in path


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits.float()


def assert_close(ours: Tensor, reference: Tensor, relative: float = 1e-4) -> None:
    """Differences are measured against the largest logit, which is what rounding inside the model scales with."""
    oracle.assert_within(ours, reference.double(), relative * reference.abs().max())


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def reloaded(model: nn.Module, directory: Path, tokenizer: Any = None) -> PreTrainedModel:
    """The model that was saved as a checkpoint and loaded; it computes the same, bit for bit."""
    save_checkpoint(model, directory, tokenizer)
    loaded = load_checkpoint(directory)
    assert torch.equal(logits(loaded), logits(model))
    return loaded


def converted_by_mlx(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path, quantize: bool = True, **options: Any
) -> Path:
    """The checkpoint that mlx_lm's conversion makes of a model, which it is given as Transformers saves it."""
    from mlx_lm.convert import convert

    model.save_pretrained(directory / "dense")
    tokenizer.save_pretrained(directory / "dense")
    convert(str(directory / "dense"), str(directory / "mlx"), quantize=quantize, **options)
    return directory / "mlx"


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Two checkpoints, of one file each, have the same tensors, bit for bit."""
    found, expected = (load_file(directory / "model.safetensors") for directory in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        oracle.assert_identical(found[name], tensor, name)


def openai_checkpoint(model: PreTrainedModel, directory: Path) -> None:
    """`model`, a gpt-oss, as OpenAI stores it: its experts in blocks of mode mxfp4, quantized by mlx."""
    model.save_pretrained(directory)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        words, scales = oracle.mlx_quantize(tensors.pop(name).mT.contiguous(), Format("mxfp4", 32, 4))
        tensors[f"{name}_blocks"] = words.view(torch.uint8).unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = scales
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    record = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    edit_config(directory, lambda config: config.update(quantization_config=record))


def mlx_logits(directory: Path, dtype: torch.dtype | None = None) -> Tensor:
    """What mlx-lm computes from a checkpoint, in float32 or as the checkpoint is stored."""
    from mlx_lm import load

    mx = oracle.mlx()
    model, _ = load(str(directory))
    tokens, rows = oracle.to_mlx(TOKENS), None
    if dtype is not None:
        model.set_dtype(getattr(mx, name_of(dtype)))
        # The rows of floating-point formats come out as bfloat16, which holds them exactly, and would set the dtype.
        rows = model.model.embed_tokens(tokens).astype(getattr(mx, name_of(dtype)))
    return oracle.from_mlx(model(tokens, input_embeddings=rows).astype(mx.float32))


def mlx_logits_of_tokens(directory: Path) -> Tensor:
    """As `mlx_logits` in float32, of models whose mlx-lm class takes tokens alone; a tokenizer need not be there."""
    from mlx_lm.utils import load_model

    mx = oracle.mlx()
    model, _ = load_model(directory)
    model.set_dtype(mx.float32)
    return oracle.from_mlx(model(oracle.to_mlx(TOKENS)).astype(mx.float32))


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], Any], name: str = "config.json") -> None:
    config = json.loads((directory / name).read_text())
    edit(config)
    (directory / name).write_text(json.dumps(config))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], Any], format: str = "mlx") -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": format})


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
