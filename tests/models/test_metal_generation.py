"""Whole models on a GPU: `generate`, the pipelines on their default device and the command, against the CPU's text."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from command import Run
from devices import DEVICES, SOFTWARE_GPUS
from marlin_models import MESSAGES, PROMPTS, chat_tokenizer, greedy, quantized, tiny_model
from quantization_mlx import prepare_for_generation, quantize_model, save_checkpoint
from quantization_mlx.marlin import MarlinPipeline, TransformersMarlinPipeline
from repository import load_demo
from tiny import TOKENS

NEW_TOKENS = 12
MPS = pytest.mark.parametrize("device", [device for device in DEVICES if device != "cpu"], indirect=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with no token that ends a text."""
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


@MPS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str
)
def test_generate(device: str, attention: str, options: dict[str, Any]) -> None:
    model = endless(quantize_model(tiny_model("qwen2", attn_implementation=attention), bits=4, group_size=32))
    expected = model.generate(TOKENS, max_new_tokens=NEW_TOKENS, **options)
    found = model.to(device).generate(TOKENS.to(device), max_new_tokens=NEW_TOKENS, **options)
    assert found.device.type == device
    assert torch.equal(found.cpu(), expected)


@MPS
@pytest.mark.filterwarnings("ignore:MarlinPipeline is deprecated")
@pytest.mark.parametrize("pipeline_class", [TransformersMarlinPipeline, MarlinPipeline], ids=lambda each: each.__name__)
@pytest.mark.parametrize("way", ["bits-8", "int4"])
def test_pipelines_run_on_their_default_device(
    device: str, way: str, pipeline_class: type[TransformersMarlinPipeline], tokenizer: Tokenizer
) -> None:
    model = endless(quantized(way=way))
    on_cpu = TransformersMarlinPipeline(copy.deepcopy(model), tokenizer, "cpu")
    pipeline = pipeline_class(model, tokenizer)
    assert pipeline.device.type == pipeline.model.device.type == device
    assert greedy(pipeline, PROMPTS) == greedy(on_cpu, PROMPTS)
    reply = on_cpu.chat(MESSAGES, NEW_TOKENS, temperature=0)
    assert pipeline.chat(MESSAGES, NEW_TOKENS, temperature=0) == reply
    assert "".join(pipeline.chat(MESSAGES, NEW_TOKENS, temperature=0, stream=True)) == reply
    # One token to sample from is the likeliest one.
    assert pipeline.chat(MESSAGES, NEW_TOKENS, top_k=1) == reply


@MPS
def test_command(device: str, tmp_path: Path, run: Run, tokenizer: Tokenizer) -> None:
    model = endless(quantize_model(tiny_model(), bits=4, group_size=32))
    save_checkpoint(model, tmp_path, tokenizer)
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True)
    prompt = torch.tensor([tokens["input_ids"]])
    expected = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :]
    flags = ["--prompt", PROMPTS[0], "--max-tokens", NEW_TOKENS, "--temp", 0, "--device", device, "--dtype", "float32"]
    out, _ = run("generate", "--model", tmp_path, *flags)
    assert out.splitlines()[0] == tokenizer.decode(expected, skip_special_tokens=True) != ""


@pytest.mark.exhaustive  # small models decode on these in every run
@pytest.mark.parametrize("gpu", [device for device in DEVICES if device != "cpu"])
@torch.no_grad()
def test_real_model_answers(gpu: str) -> None:
    import software_gpu
    from softmetal import mps

    software_gpu.install()
    demo = load_demo()
    tokenizer, model = demo.load_gguf()
    prepared = prepare_for_generation(quantize_model(model.half(), group_size=demo.GROUP_SIZE))
    prompt = demo.chat(tokenizer, "What is the capital of France?").to("mps")
    with mps.gpu(SOFTWARE_GPUS[gpu]) if gpu in SOFTWARE_GPUS else nullcontext():
        answer = prepared.to("mps").generate(prompt, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt.shape[1] :].cpu())
