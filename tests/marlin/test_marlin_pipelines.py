"""Pipelines: text from models with Marlin's layers, against the model's own most likely tokens."""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerFast as Tokenizer

import marlin_models
from marlin_models import MESSAGES, NEW_TOKENS, PROMPT, PROMPTS, greedy, layers_of, quantized, tiny_model
from quantization_mlx import marlin, save_checkpoint
from quantization_mlx import quantize_model as quantize_to_mlx
from quantization_mlx.marlin import MarlinPipeline, replace_linear_layers, save_quantized
from quantization_mlx.marlin import TransformersMarlinPipeline as Pipeline
from tiny import VOCABULARY

UNKNOWN = 0  # the only special token


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return marlin_models.chat_tokenizer()


@pytest.fixture(scope="module")
def shared_pipeline(tokenizer: Tokenizer) -> Pipeline:
    model = quantized()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    # What a model may ask for by itself, and a pipeline was told otherwise.
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=2, top_p=0.5)
    return Pipeline(model, tokenizer, "cpu")


@pytest.fixture
def pipeline(shared_pipeline: Pipeline) -> Iterator[Pipeline]:
    """It and its tokenizer are found as they were."""
    names = ("padding_side", "pad_token", "eos_token", "truncation_side", "chat_template")
    before = {name: getattr(shared_pipeline.tokenizer, name) for name in names}
    yield shared_pipeline
    assert {name: getattr(shared_pipeline.tokenizer, name) for name in names} == before
    assert not [thread.name for thread in threading.enumerate() if "generate" in thread.name]


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A model in bfloat16 that is not quantized, with its tokenizer."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@torch.no_grad()
def likeliest(model: nn.Module, words: str, count: int = NEW_TOKENS) -> str:
    """The likeliest continuation without special tokens, one token and one whole pass at a time."""
    tokens = torch.tensor([[int(word[1:]) for word in words.split()]])
    begin = tokens.shape[1]
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return " ".join(f"w{token}" for token in tokens[0, begin:].tolist() if token != UNKNOWN)


# --- Text -------------------------------------------------------------------------------------------------------------


def test_the_text_is_the_prompt_and_its_likeliest_continuation(pipeline: Pipeline) -> None:
    assert greedy(pipeline, PROMPT) == f"{PROMPT} {likeliest(pipeline.model, PROMPT)}"


def test_a_batch_is_each_prompt_by_itself(pipeline: Pipeline) -> None:
    expected = [f"{prompt} {likeliest(pipeline.model, prompt)}" for prompt in PROMPTS]
    assert greedy(pipeline, PROMPTS) == expected
    assert greedy(pipeline, tuple(PROMPTS)) == expected
    assert pipeline.batch_generate(PROMPTS, NEW_TOKENS, temperature=0) == expected
    assert greedy(pipeline, [PROMPT]) == expected[:1]
    assert greedy(pipeline, []) == pipeline.batch_generate([]) == []


@pytest.mark.parametrize("pad_token", [None, "w95"])
def test_a_row_of_a_batch_that_ends_early_has_no_filling(
    pad_token: str | None, pipeline: Pipeline, tokenizer: Tokenizer
) -> None:
    """Whatever the tokenizer pads with, and on whichever side."""
    own = copy.deepcopy(tokenizer)
    continuations = [likeliest(pipeline.model, prompt).split() for prompt in PROMPTS]
    end = next(word for word in continuations[0] if word not in " ".join(PROMPTS).split())
    own.add_special_tokens({"eos_token": end, **({} if pad_token is None else {"pad_token": pad_token})})
    own.padding_side = "right"

    def ended(prompt: str, words: list[str]) -> str:
        stop = words.index(end) if end in words else len(words)
        return " ".join([prompt, *(word for word in words[:stop] if word != pad_token)])

    batch = Pipeline(pipeline.model, own, "cpu")
    expected = [ended(prompt, words) for prompt, words in zip(PROMPTS, continuations, strict=True)]
    assert len({len(text.split()) - len(prompt.split()) for text, prompt in zip(expected, PROMPTS, strict=True)}) > 1
    assert greedy(batch, PROMPTS, eos_token_id=own.eos_token_id) == expected
    assert (own.pad_token, own.padding_side) == (pad_token, "right")


def sampled(pipeline: Pipeline, count: int, **options: Any) -> torch.Tensor:
    """How often each token follows the prompt."""
    torch.manual_seed(0)
    texts = pipeline([PROMPT] * count, max_tokens=1, **options)
    return torch.bincount(torch.tensor([int(text.split()[-1][1:]) for text in texts]), minlength=VOCABULARY) / count


@torch.no_grad()
def probabilities(pipeline: Pipeline) -> torch.Tensor:
    tokens = torch.tensor([[int(word[1:]) for word in PROMPT.split()]])
    return pipeline.model(tokens).logits[0, -1].softmax(-1)


def test_any_temperature_samples_from_the_whole_distribution(pipeline: Pipeline) -> None:
    for temperature in (1.0, 0.5):
        expected = probabilities(pipeline) ** (1 / temperature)
        expected /= expected.sum()
        found = sampled(pipeline, 4000, temperature=temperature)
        assert (found - expected).abs().sum() / 2 < 0.1, temperature
        assert (found > 0).sum() > 20, temperature
    default = sampled(pipeline, 4000)
    assert (default - probabilities(pipeline)).abs().sum() / 2 < 0.1
    assert (default - found).abs().sum() / 2 > 0.2  # the two temperatures are told apart


def test_filters_leave_the_likeliest_tokens(pipeline: Pipeline) -> None:
    order = probabilities(pipeline).argsort(descending=True)
    masses = probabilities(pipeline)[order].cumsum(0)
    assert set(sampled(pipeline, 500, top_k=3).nonzero().flatten().tolist()) == set(order[:3].tolist())
    top_p = masses[1:3].mean().item()  # the third token's mass crosses it
    assert set(sampled(pipeline, 500, top_p=top_p).nonzero().flatten().tolist()) == set(order[:3].tolist())
    assert pipeline(PROMPT, NEW_TOKENS, top_k=1) == greedy(pipeline, PROMPT)


def test_a_seed_repeats_a_text(pipeline: Pipeline) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(pipeline(PROMPT, NEW_TOKENS, temperature=0.7))
    assert texts[0] == texts[1] != texts[2]


def test_max_tokens_and_further_options(pipeline: Pipeline) -> None:
    assert len(pipeline(PROMPT).split()) == 4 + 100
    assert len(pipeline(PROMPT, 3).split()) == 4 + 3
    texts = [greedy(pipeline, PROMPT, no_repeat_ngram_size=1).split(), greedy(pipeline, PROMPT).split()]
    assert [len(set(words)) == len(words) for words in texts] == [True, False]


def test_generate_is_that_of_the_model(pipeline: Pipeline) -> None:
    tokens = torch.tensor([[5, 17, 3, 90]])
    ours = pipeline.generate(tokens, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    expected = pipeline.model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours.sequences, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number of at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number of at least 0"),
        ({"max_tokens": "5"}, "max_tokens is '5'; it must be a whole number"),
        ({"max_tokens": 5.0}, "max_tokens is 5.0; it must be a whole number"),
        ({"temperature": "1"}, "temperature is '1'; it must be a finite number"),
        ({"top_k": None}, "top_k is None; it must be a whole number"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2; a pipeline returns one text for each prompt"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is True; a pipeline returns one text"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str, pipeline: Pipeline) -> None:
    for call in (
        lambda: pipeline(PROMPT, **options),
        lambda: pipeline(PROMPT, stream=True, **options),
        lambda: pipeline.batch_generate(PROMPTS, **options),
        lambda: pipeline.chat(MESSAGES, **options),
    ):
        with pytest.raises(ValueError, match=re.escape(f"[TransformersMarlinPipeline] {message}")):
            call()


def test_prompts_that_cannot_be_continued(pipeline: Pipeline) -> None:
    for prompt in ("", [PROMPT, " "]):
        with pytest.raises(ValueError, match=r"\[TransformersMarlinPipeline\] the prompt ' ?' has no tokens"):
            pipeline(prompt)
    with pytest.raises(ValueError, match="stream takes one prompt, not a list of 3"):
        pipeline(PROMPTS, stream=True)


# --- Pieces of text ---------------------------------------------------------------------------------------------------


def test_pieces_make_up_the_text(pipeline: Pipeline) -> None:
    pieces = greedy(pipeline, PROMPT, stream=True)
    assert iter(pieces) is pieces
    assert "".join(pieces) == greedy(pipeline, PROMPT)
    assert len([piece for piece in greedy(pipeline, PROMPT, stream=True) if piece]) > NEW_TOKENS / 2


def test_pieces_come_while_the_text_is_generated(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass after the third waits for the reader; a reader who leaves ends the generation."""
    read, passes = threading.Event(), []
    forward = pipeline.model.forward

    def waiting(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        if len(passes) == 4:
            assert read.wait(30)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.model, "forward", waiting)
    threads = threading.active_count()
    pieces = pipeline(PROMPT, 10_000, temperature=0, stream=True)
    first = next(pieces)
    assert first.startswith("w5 ")
    assert len(passes) <= 4
    read.set()
    pieces.close()
    assert threading.active_count() == threads
    assert len(passes) < 1000


class Broken(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3])
def test_what_generation_raises_reaches_the_reader(
    at: int, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = pipeline.model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        if len(passes) == at:
            raise Broken("in the other thread")
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.model, "forward", failing)
    read = []
    with pytest.raises(Broken, match="in the other thread"):
        for piece in greedy(pipeline, PROMPT, stream=True):
            read.append(piece)
    expected = f"{PROMPT} {likeliest(pipeline.model, PROMPT, at)}"
    assert expected.startswith("".join(read).strip())


def test_further_stopping_criteria_are_kept(pipeline: Pipeline) -> None:
    def after_two(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((1,), tokens.shape[1] >= 6)

    criteria = transformers.StoppingCriteriaList([after_two])
    text = "".join(greedy(pipeline, PROMPT, stream=True, stopping_criteria=criteria))
    assert text == greedy(pipeline, PROMPT, stopping_criteria=criteria)
    assert len(text.split()) == 6


# --- Conversations ----------------------------------------------------------------------------------------------------


def test_chat_returns_the_reply_alone(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = likeliest(pipeline.model, "w2 w9 w12 w2 w4 w2 w6 w3")
    assert pipeline.chat(MESSAGES, NEW_TOKENS, temperature=0) == expected
    assert "".join(pipeline.chat(MESSAGES, NEW_TOKENS, temperature=0, stream=True)) == expected
    monkeypatch.setattr(pipeline.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat_template"):
        pipeline.chat(MESSAGES)
    monkeypatch.undo()


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_a_pipeline_quantizes_what_it_loads(saved: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(saved)
    replace_linear_layers(expected, 8, 64, {"lm_head"}, lambda path, _: "q_proj" not in path)
    layers = {"skip_layers": {"lm_head"}, "layer_filter": lambda path, _: "q_proj" not in path}
    loaded = Pipeline.from_pretrained(str(saved), bits=8, group_size=64, device="cpu", **layers)
    assert layers_of(loaded.model) == layers_of(expected)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.bfloat16
    assert greedy(loaded, PROMPT) == greedy(Pipeline(expected, loaded.tokenizer, "cpu"), PROMPT)
    assert len(layers_of(Pipeline.from_pretrained(saved, device="cpu").model)) == 15
    dense = Pipeline.from_pretrained(saved, quantize=False, device="cpu", dtype=torch.float32)
    assert not layers_of(dense.model)
    assert dense.model.dtype == torch.float32
    assert greedy(dense, PROMPT) == f"{PROMPT} {likeliest(dense.model, PROMPT)}"


@pytest.mark.parametrize("load", [Pipeline.from_pretrained, MarlinPipeline.from_pretrained])
def test_saved_models_are_loaded_as_they_are(
    load: Callable[..., Pipeline], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = quantized("llama-tied", "int4")
    save_quantized(model, tmp_path)
    with pytest.raises(ValueError, match=r"from_pretrained\] .* has no tokenizer; save one there"):
        load(tmp_path, device="cpu")
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    assert layers_of(loaded.model, marlin.MarlinLinear) == layers_of(model)
    assert greedy(loaded, PROMPT, eos_token_id=None) == f"{PROMPT} {likeliest(model, PROMPT)}"
    with pytest.raises(TypeError, match="loaded as it was saved, without the options dtype"):
        load(tmp_path, device="cpu", dtype=torch.float32)


def test_what_is_refused_before_loading(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    load = Pipeline.from_pretrained
    for options, message in (
        ({"bits": 3}, r"\[TransformersMarlinPipeline\.from_pretrained\] bits is 3"),
        ({"group_size": 1}, r"group_size is 1"),
        ({}, r"device is 'mps'; usable here: 'cpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            load("nowhere", **options)
    message = r"quant_type is 'fp8'; supported are fp4, int4"
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match=message):
        MarlinPipeline.from_pretrained("nowhere", "fp8")
    with pytest.raises(ValueError, match=r"\[TransformersMarlinPipeline\] device is 'mps'"):
        Pipeline(tiny_model(), None)
    assert load(saved, device=None).device.type == "cpu"
    save_checkpoint(quantize_to_mlx(tiny_model()), saved)
    with pytest.raises(ValueError, match="is an MLX checkpoint; load_checkpoint loads it"):
        load(saved, device="cpu")


def test_remote_code_is_never_implied(
    saved: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_quantized(quantized(), tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    trusted = []

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            trusted.append(kwargs.get("trust_remote_code", "not said"))
            return original(*args, **kwargs)

        return from_pretrained

    for each in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(each, "from_pretrained", recording(each.from_pretrained))
    loaders = (Pipeline.from_pretrained, MarlinPipeline.from_pretrained)
    for options, expected in (({}, False), ({"trust_remote_code": True}, True)):
        for load in loaders:
            for directory, calls in ((saved, 2), (tmp_path / "quantized", 1)):
                trusted.clear()
                load(directory, device="cpu", **options)
                assert trusted == [expected] * calls


# --- The former name --------------------------------------------------------------------------------------------------


def test_the_former_name_warns_and_works(saved: Path) -> None:
    with pytest.warns(DeprecationWarning, match="use TransformersMarlinPipeline") as caught:
        old = MarlinPipeline.from_pretrained(saved, "int4_sym", "cpu", group_size=64)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    expected = marlin.quantize_model(AutoModelForCausalLM.from_pretrained(saved), "int4_sym", 64)
    assert layers_of(old.model, marlin.MarlinLinear) == layers_of(expected)
    assert {each.quant_type for each in old.model.modules() if isinstance(each, marlin.MarlinLinear)} == {"int4_sym"}
    assert isinstance(old, Pipeline)
    assert greedy(old, PROMPT) == greedy(Pipeline(expected, old.tokenizer, "cpu"), PROMPT)
    everything = MarlinPipeline.from_pretrained(saved, device="cpu", skip_layers=set())
    assert layers_of(everything.model) == layers_of(old.model) | {"lm_head"}


def test_the_former_name_takes_a_pipeline(pipeline: Pipeline) -> None:
    with pytest.warns(DeprecationWarning):
        old = MarlinPipeline(pipeline)
    assert (old.model, old.tokenizer, old.device) == (pipeline.model, pipeline.tokenizer, pipeline.device)
    assert greedy(old, PROMPTS) == greedy(pipeline, PROMPTS)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="needs its tokenizer"):
        MarlinPipeline(pipeline.model, device="cpu")


# --- The documented examples, with other imports and models -----------------------------------------------------------


def test_documented_examples(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_id = str(saved)

    model = AutoModelForCausalLM.from_pretrained(model_id)
    stats = replace_linear_layers(model, bits=4, group_size=128)
    print(stats)
    assert capsys.readouterr().out == "{'replaced_count': 15, 'skipped_count': 1}\n"

    model = AutoModelForCausalLM.from_pretrained(model_id)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    replace_linear_layers(model, bits=4, group_size=128)
    assert len(layers_of(model, marlin.MetalQuantizedLinear)) == 15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = Pipeline(model, tokenizer, device="cpu")("w1 w2", max_tokens=5)
    assert text.startswith("w1 w2 ")

    save_quantized(model, tmp_path / "out")
    assert layers_of(marlin.load_quantized(tmp_path / "out", device="cpu")) == layers_of(model)
