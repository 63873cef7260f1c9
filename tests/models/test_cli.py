"""The command line on a tiny model: what it writes, prints and refuses, beside mlx-lm and plain Transformers."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, ViTConfig

import oracle
from command import Run
from process import python
from quantization_mlx import load_checkpoint, quantize_model, save_checkpoint
from quantization_mlx.cli import COMMANDS, main
from repository import ROOT
from tiny import SIZES, VOCABULARY, assert_same_tensors, causal_lm, edit_config

ADAPTER = "adapter_model.safetensors"
TEXT = " ".join(f"w{i * i % VOCABULARY}" for i in range(100))
TEMPLATE = (
    "{% if extra %}{{ extra }} {% endif %}"
    "{% for message in messages %}{% if message.role == 'system' %}w90 {% endif %}{{ message.content }} {% endfor %}w91"
)


def write_tokenizer(directory: Path, eos_token: str | None = "w1") -> PreTrainedTokenizerFast:
    """One token for each word "w0", "w1", ... and for the end of a line."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({**{f"w{i}": i for i in range(VOCABULARY - 1)}, "\n": 95}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    end = None if eos_token is None else AddedToken(eos_token, single_word=True)  # "w1" is no part of "w17"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, unk_token="w0")
    tokenizer.save_pretrained(directory)
    return tokenizer


def llama(heads: int = 4, **options: object) -> LlamaForCausalLM:
    """With random weights; with 8 heads, which are small, it runs as Transformers' own code runs it."""
    options = {"num_attention_heads": heads, "eos_token_id": 1, "tie_word_embeddings": False, **options}
    return causal_lm("Llama", **{**SIZES, "num_hidden_layers": 3, **options}).to(torch.bfloat16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformers directory: a bfloat16 Llama with a tokenizer of words."""
    directory = tmp_path_factory.mktemp("models") / "dense"
    llama().save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def small_heads(dense: Path) -> Path:
    """An MLX checkpoint, quantized, of a model that names no token that ends a text; its tokenizer names "w1"."""
    directory = dense.parent / "small_heads"
    save_checkpoint(quantize_model(llama(8, eos_token_id=None)), directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def converted(dense: Path) -> Path:
    target = dense.parent / "converted"
    assert main(["convert", "--hf-path", str(dense), "--mlx-path", str(target), "-q"]) == 0
    return target


# --- Convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-q"], ["-q", "--q-bits", "3", "--q-group-size", "32"]], ids=" ".join)
def test_convert_writes_what_mlx_lm_writes(flags: list[str], dense: Path, tmp_path: Path, run: Run) -> None:
    from mlx_lm.convert import configure_parser, convert

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    convert(**vars(configure_parser().parse_args(["--hf-path", str(dense), "--mlx-path", str(theirs), *flags])))
    out, err = run("convert", "--model", dense, "--mlx-path", ours, *flags)
    assert_same_tensors(ours, theirs)
    expected = load_file(theirs / "model.safetensors")
    configs = [json.loads((directory / "config.json").read_text()) for directory in (ours, theirs)]
    assert configs[0].get("quantization") == configs[1].get("quantization")
    weights = sum(parameter.numel() for parameter in LlamaForCausalLM.from_pretrained(dense).parameters())
    bits = 8 * sum(tensor.nbytes for tensor in expected.values()) / weights
    assert f"{weights / 1e6:.1f} million weights" in out and f"{bits:.2f} bits per weight" in out
    assert re.fullmatch(r"Peak resident memory: \d+\.\d+ GB", err.splitlines()[-1])


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_dequantize_writes_what_mlx_lm_writes(dtype: str | None, converted: Path, tmp_path: Path, run: Run) -> None:
    from mlx_lm.convert import configure_parser, convert

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    flags = ["-d"] if dtype is None else ["-d", "--dtype", dtype]
    convert(**vars(configure_parser().parse_args(["--hf-path", str(converted), "--mlx-path", str(theirs), *flags])))
    out, _ = run("convert", "--hf-path", converted, "--mlx-path", ours, *flags)
    expected, found = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert found.keys() == expected.keys()
    packed = load_file(converted / "model.safetensors")
    for name, tensor in expected.items():
        exact = tensor
        if (path := name.removesuffix(".weight")) + ".scales" in packed:
            # mlx rounds scale * code before it adds the bias, where values are bfloat16.
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2**-7 * tensor.abs().max().item())
            parts = (packed[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
            exact = oracle.dequantize(*parts, oracle.Format("affine", 64, 4)).to(tensor.dtype)
        oracle.assert_identical(found[name], exact, name)
    config = json.loads((ours / "config.json").read_text())
    assert not config.keys() & {"quantization", "quantization_config"}
    assert f"{32 if dtype else 16}.00 bits per weight" in out
    # It is an ordinary model again, for Transformers without this package.
    model = LlamaForCausalLM.from_pretrained(ours)
    oracle.assert_identical(model.model.layers[0].mlp.up_proj.weight, found["model.layers.0.mlp.up_proj.weight"])


def test_code_that_comes_with_a_model(tmp_path: Path, run: Run) -> None:
    """A model of a class that only its directory has: trusted, it is converted with its code, and runs."""
    source, target = tmp_path / "source", tmp_path / "target"
    llama(8).save_pretrained(source)
    write_tokenizer(source)
    (source / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    names = {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": code}
    edit_config(source, lambda config: config.update(names))
    flags = ["convert", "--hf-path", source, "--mlx-path", target, "-q"]
    _, err = run(*flags, code=1)
    assert "comes with Python code of its own, which --trust-remote-code lets run" in err and len(err.splitlines()) == 1
    assert not target.exists()
    run(*flags, "--trust-remote-code")
    _, err = run("generate", "--model", target, "-m", 3, code=1)
    assert "--trust-remote-code" in err and len(err.splitlines()) == 1
    out, _ = run("generate", "--model", target, "-m", 3, "-p", "w5 w6", "--trust-remote-code")
    plain = quantize_model(llama(8)).generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert out.split() == [f"w{token}" for token in plain[0, 2:].tolist()]


def test_convert_reports_and_draws_errors(dense: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "mixed"
    report, plot = target / "report.md", tmp_path / "plot.PNG"  # one into the directory that convert makes
    flags = ["-q", "--quant-predicate", "mixed_4_6", "--report", report, "--plot", plot]
    out, _ = run("convert", "--hf-path", dense, "--mlx-path", target, *flags)
    tensors = load_file(target / "model.safetensors")
    original = load_file(dense / "model.safetensors")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.read_text().splitlines()]
    layers = {path: (format, float(error.rstrip("%"))) for path, _, format, _, error in rows[2:-1]}
    assert {f"{path}.scales" for path in layers} == {name for name in tensors if name.endswith(".scales")}
    for path, (format, error) in layers.items():
        weight, scales, biases = (tensors[f"{path}.{name}"] for name in ("weight", "scales", "biases"))
        bits = weight.shape[-1] * 32 // (scales.shape[-1] * 64)
        assert format == f"affine, {bits} bits, group_size 64"
        exact = oracle.dequantize(weight, scales, biases, oracle.Format("affine", 64, bits))
        dense_weight = original[f"{path}.weight"].double()
        assert error == pytest.approx(100 * ((exact - dense_weight).norm() / dense_weight.norm()).item(), abs=0.0051)
    assert {format for format, _ in layers.values()} == {f"affine, {bits} bits, group_size 64" for bits in (4, 6)}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"relative error of the quantized weights: {rows[-1][-1]}" in out


# --- Generate ---------------------------------------------------------------------------------------------------------


def greedy(directory: Path, prompt: str, count: int) -> str:
    """What Transformers generates without this package's decoder and without a streamer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    model = load_checkpoint(directory, dtype=torch.float32)
    output = model.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=1)
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def test_generate_streams_the_greedy_text(converted: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy(converted, "w5 w17 w3", 12)
    flags = ["generate", "--model", converted, "--dtype", "float32", "-m", "12"]
    out, err = run(*flags, "-p", "w5 w17 w3")
    assert out.strip() == expected and len(expected.split()) > 1
    length = len(AutoTokenizer.from_pretrained(converted)("w5 w17 w3").input_ids)
    assert re.search(rf"^Prompt: {length} tokens, \d+\.\d+ tokens-per-sec$", err, re.M)
    # The text, and what ended it if that was a token.
    words = len(expected.split())
    assert re.search(rf"^Generation: ({words}|{words + 1}) tokens, \d+\.\d+ tokens-per-sec$", err, re.M)
    assert re.search(r"^Decoder: one op for all layers, of prepare_for_generation$", err, re.M)
    assert re.search(r"^Peak resident memory: \d+\.\d+ GB$", err, re.M)

    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w17 w3"))
    assert run(*flags, "-p", "-", "--verbose", "F") == (out, "")
    # Of one token, the likeliest, sampling takes no other.
    assert run(*flags, "-p", "w5 w17 w3", "--temp", "2", "--top-k", "1")[0] == out


def test_sampling_follows_the_seed(converted: Path, run: Run) -> None:
    flags = ["generate", "--model", converted, "-m", "12", "-p", "w5", "--temp", "1.5", "--top-p", "0.99", "--seed"]
    first, again, other = (run(*flags, seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_chat_templates(converted: Path, tmp_path: Path, run: Run) -> None:
    directory = tmp_path / "chat"
    directory.mkdir()
    for file in converted.iterdir():
        (directory / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokenizer.chat_template = TEMPLATE
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    tokenizer.save_pretrained(directory)
    flags = ["generate", "--model", directory, "--dtype", "float32", "-m", "6", "-p", "w5 w6"]
    out, err = run(*flags)
    assert out.strip() == greedy(converted, "w5 w6 w91", 6) and "Prompt: 3 tokens" in err
    out, err = run(*flags, "--system-prompt", "w7")
    assert out.strip() == greedy(converted, "w90 w7 w5 w6 w91", 6) and "Prompt: 5 tokens" in err
    out, err = run(*flags, "--ignore-chat-template")
    assert out.strip() == greedy(converted, "w5 w6", 6) and "Prompt: 2 tokens" in err

    _, err = run(*flags, "--chat-template-config", '{"tokenize": false}', code=2)
    assert "--chat-template-config sets variables of the template, and 'tokenize' is none" in err
    out, err = run(*flags, "--chat-template-config", '{"extra": "w8"}')
    assert out.strip() == greedy(converted, "w8 w5 w6 w91", 6) and "Prompt: 4 tokens" in err


def continuation(directory: Path, prompt: list[int], count: int) -> list[str]:
    """The words that Transformers generates, whatever they are."""
    model = load_checkpoint(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return [f"w{token}" for token in tokens[0, len(prompt) :].tolist()]


def test_generation_ends_at_every_token_that_ends_a_text(small_heads: Path, tmp_path: Path, run: Run) -> None:
    """At that of the tokenizer where config.json has none, and at those of config.json, a list, and of the flag."""
    words = continuation(small_heads, [5, 17], 30)
    first = {word: words.index(word) for word in dict.fromkeys(words)}  # where each is first met
    early, late = [word for word, place in first.items() if place > 2][:2]
    directory = tmp_path / "model"
    shutil.copytree(small_heads, directory)
    flags = ["generate", "--model", directory, "--dtype", "float32", "-m", 30, "-p", "w5 w17"]

    write_tokenizer(directory, eos_token=late)
    _, err = run(*flags)
    assert f"Generation: {first[late] + 1} tokens" in err
    _, err = run(*flags, "--extra-eos-token", "w0", early)
    assert f"Generation: {first[early] + 1} tokens" in err
    _, err = run(*flags, "--extra-eos-token", early[1:])  # by its number
    assert f"Generation: {first[early] + 1} tokens" in err
    edit_config(directory, lambda config: config.update(eos_token_id=[int(early[1:]), 0]))
    (directory / "generation_config.json").unlink()
    _, err = run(*flags)
    assert f"Generation: {first[early] + 1} tokens" in err
    _, err = run(*flags, "--extra-eos-token", "word", code=1)
    assert err == "quantization-mlx generate: error: --extra-eos-token 'word' is no token of this model's tokenizer\n"


def test_prompts_have_escapes(small_heads: Path, run: Run) -> None:
    flags = ["generate", "--model", small_heads, "--dtype", "float32", "-m", 4]
    out, err = run(*flags, "-p", r"w5\nw6")
    assert out.split() == continuation(small_heads, [5, 95, 6], 4) and "Prompt: 3 tokens" in err


def test_a_gpu_that_is_not_here_is_named(converted: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for command in (["generate"], ["benchmark"], ["perplexity", "--data-path", converted / "config.json"]):
        _, err = run(*command, "--model", converted, "--device", "mps", code=2)
        assert err == f"quantization-mlx {command[0]}: error: --device mps needs the GPU of a Mac, which is not here\n"


def test_one_token_has_no_rate(small_heads: Path, run: Run) -> None:
    _, err = run("generate", "--model", small_heads, "-m", 1)
    assert re.search("^Generation: 1 tokens$", err, re.M) and "nan" not in err
    out, _ = run("benchmark", "--model", small_heads, "-p", 4, "-g", 1, "-n", 2)
    assert len(re.findall(r"^(?:Trial \d|Medians): prompt_tps=[\d.]+$", out, re.M)) == 3


@pytest.mark.parametrize("prompt", [3, 8])
def test_bounded_caches_are_mlx_lms(prompt: int, small_heads: Path, tmp_path: Path, run: Run) -> None:
    """The text that mlx_lm generates with the cache of `max_kv_size`, another one than without; nothing ends it."""
    from mlx_lm import load, stream_generate
    from mlx_lm.models.cache import RotatingKVCache

    directory = tmp_path / "model"
    shutil.copytree(small_heads, directory)
    write_tokenizer(directory, eos_token=None)
    mx = oracle.mlx()
    model, tokenizer = load(str(directory))
    model.set_dtype(mx.float32)
    tokens = [(7 * i + 5) % 90 for i in range(prompt)]

    def theirs(**options: object) -> list[str]:
        found = stream_generate(model, tokenizer, tokens, max_tokens=40, **options)
        return [f"w{each.token}" for each in found if each.token != 0]  # that of unknown words, which is not printed

    words = " ".join(f"w{token}" for token in tokens)
    flags = ["generate", "--model", directory, "--dtype", "float32", "-m", 40, "-p", words]
    unbounded, bounded = theirs(), theirs(prompt_cache=[RotatingKVCache(8, keep=4) for _ in model.layers])
    assert unbounded != bounded
    out, err = run(*flags)
    assert out.split() == unbounded and "neither the checkpoint nor its tokenizer names a token that ends a text" in err
    assert run(*flags, "--max-kv-size", 8)[0].split() == bounded


@pytest.mark.parametrize("start", [0, 12])
def test_quantized_caches_are_mlx_lms(start: int, converted: Path, run: Run) -> None:
    """The text that mlx_lm's model writes when its cache is quantized behind each step, another one than without."""
    from mlx_lm import load
    from mlx_lm.generate import maybe_quantize_kv_cache
    from mlx_lm.models.cache import make_prompt_cache

    mx = oracle.mlx()
    model, _ = load(str(converted))
    model.set_dtype(mx.float32)
    tokens = [5, 17, 3, 90, 44]

    def theirs(bits: int | None) -> list[str]:
        cache, new, found = make_prompt_cache(model), tokens, []
        while len(found) < 30:
            token = int(mx.argmax(model(mx.array([new]), cache=cache)[0, -1]).item())
            maybe_quantize_kv_cache(cache, start, 32, bits)
            if token == 1:
                break
            new = [token]
            found.append(token)
        return [f"w{token}" for token in found if token not in (0, 95)]  # no unknown words, and no ends of lines

    flags = ["--model", converted, "--dtype", "float32", "-m", 30, "-p", " ".join(f"w{token}" for token in tokens)]
    packed = ["--kv-bits", 4, "--kv-group-size", 32]
    assert theirs(None) != theirs(4)
    assert run("generate", *flags)[0].split() == theirs(None)
    assert run("generate", *flags, *packed)[0].split() == theirs(None)  # from 5000 positions on
    out, err = run("generate", *flags, *packed, "--quantized-kv-start", start)
    assert out.split() == theirs(4) and "one op for all layers" in err


def test_flags_of_quantized_caches(converted: Path, small_heads: Path, run: Run) -> None:
    out, _ = run("benchmark", "--model", converted, "-p", 4, "-g", 3, "-n", 1, "--kv-bits", 8, "--kv-group-size", 32)
    assert "generation_tps" in out
    errors = [
        ("generate", ["--kv-bits", 3], 2, "argument --kv-bits: invalid choice: 3"),
        ("generate", ["--kv-group-size", 32], 2, "--kv-group-size without --kv-bits"),
        ("benchmark", ["--quantized-kv-start", 0], 2, "--quantized-kv-start without --kv-bits"),
        ("generate", ["--kv-bits", 8, "--max-kv-size", 16], 2, "--max-kv-size with --kv-bits"),
        ("generate", ["--kv-bits", 8, "--kv-group-size", 48], 1, "group_size is 48; supported are 32, 64, 128"),
        ("benchmark", ["--kv-bits", 8], 1, "has heads of size 16, which are no whole groups of 64 elements"),
    ]
    for command, flags, code, message in errors:
        assert message in run(command, "--model", small_heads, *flags, code=code)[1]


def test_caches_of_sliding_windows_are_not_bounded(tmp_path: Path, run: Run) -> None:
    save_checkpoint(causal_lm("Mistral", **SIZES, sliding_window=8), tmp_path)
    write_tokenizer(tmp_path)
    _, err = run("generate", "--model", tmp_path, "--max-kv-size", 16, code=1)
    assert re.search(r"MistralForCausalLM has layers that do not attend to all positions.*DynamicSlidingWindow", err)


# --- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(dense: Path) -> Path:
    """A LoRA adapter as PEFT saves it, of the dense model with small heads and with random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    directory = dense.parent / "adapter"
    get_peft_model(llama(8), config).save_pretrained(directory)
    return directory


def test_adapters_add_to_the_quantized_layers(small_heads: Path, adapter: Path, tmp_path: Path, run: Run) -> None:
    """Compared with a dense model whose weights are those of the quantized one and the adapter's products."""
    flags = ["generate", "--model", small_heads, "--dtype", "float32", "-m", 8, "-p", "w5 w17"]
    without = run(*flags)[0].split()
    found = run(*flags, "--adapter-path", adapter)[0].split()
    tensors = load_file(adapter / "adapter_model.safetensors")
    stored = load_file(small_heads / "model.safetensors")
    model = llama(8).float()
    for path, module in model.named_modules():
        if f"{path}.scales" not in stored:
            continue
        packed = (stored[f"{path}.{name}"] for name in ("weight", "scales", "biases"))
        weight = oracle.dequantize(*packed, oracle.Format("affine", 64, 4)).float()
        if (name := f"base_model.model.{path}.lora_A.weight") in tensors:
            weight += 16 / 4 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        module.weight.data = weight
    model.generation_config.eos_token_id = None
    tokens = model.generate(torch.tensor([[5, 17]]), max_new_tokens=8, do_sample=False)
    assert found == [f"w{token}" for token in tokens[0, 2:].tolist()] != without

    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["perplexity", "--model", small_heads, "--dtype", "float32", "--data-path", tmp_path / "text.txt"]
    out, _ = run(*flags, "--sequence-length", 16, "--adapter-path", adapter)
    tokens = AutoTokenizer.from_pretrained(small_heads)(TEXT, return_tensors="pt").input_ids[0, :96].view(6, 16)
    expected = math.exp(model(tokens, labels=tokens).loss.item())
    assert float(re.search(r"[\d.]+", out)[0]) == pytest.approx(expected, rel=1e-3)


def test_adapters_that_do_not_fit_are_refused(small_heads: Path, adapter: Path, tmp_path: Path, run: Run) -> None:
    def refused(message: str) -> None:
        _, err = run("generate", "--model", small_heads, "--adapter-path", tmp_path / "adapter", code=1)
        assert re.search(message, err) and len(err.splitlines()) == 1, err

    refused("there is no directory")
    (tmp_path / "adapter").mkdir()
    refused("has no adapter_config.json")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8}}))
    refused("is an adapter of mlx_lm; adapters that PEFT saved are supported")
    file.write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    refused("is of type 'PROMPT_TUNING'; supported is 'LORA'")
    config = json.loads((adapter / "adapter_config.json").read_text())
    file.write_text(json.dumps(config))
    refused("has none of the files adapter_model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    lost = next(name for name in tensors if "layers.1" in name and "lora_A" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file.parent / ADAPTER)
    refused(r"does not fit this model.*missing tensors: \S*layers\.1")
    save_file({**tensors, lost.replace("layers.1", "layers.9"): tensors[lost].clone()}, file.parent / ADAPTER)
    refused(r"does not fit this model.*unexpected tensors: \S*layers\.9")


# --- Perplexity and benchmark -----------------------------------------------------------------------------------------


def test_perplexity_is_mlx_lms(converted: Path, tmp_path: Path, run: Run) -> None:
    from mlx_lm import load
    from mlx_lm.perplexity import eval_ppl

    mx = oracle.mlx()
    model, _ = load(str(converted))
    model.set_dtype(mx.float32)
    tokens = AutoTokenizer.from_pretrained(converted)(TEXT).input_ids
    expected, error = eval_ppl(model, mx.array(tokens[:96]).reshape(6, 16), batch_size=4)
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["perplexity", "--model", converted, "--dtype", "float32", "--data-path", tmp_path / "text.txt"]
    out, err = run(*flags, "--sequence-length", "16", "--batch-size", "4")
    found = re.fullmatch(r"Perplexity: ([\d.]+) ± ([\d.]+)\n", out)
    assert float(found[1]) == pytest.approx(expected, rel=1e-4)
    assert float(found[2]) == pytest.approx(error, rel=1e-3)
    assert "90 tokens in 6 sequences" in err
    out, err = run(*flags, "--sequence-length", "16", "--num-samples", "2")
    expected, _ = eval_ppl(model, mx.array(tokens[:32]).reshape(2, 16))
    assert float(re.search(r"[\d.]+", out)[0]) == pytest.approx(expected, rel=1e-4)
    assert "30 tokens in 2 sequences" in err
    out, err = run(*flags, "--sequence-length", "2", "--num-samples", "1")
    assert re.fullmatch(r"Perplexity: [\d.]+ ± inf\n", out) and "1 tokens in 1 sequences" in err


def test_benchmark_times_what_was_asked_for(converted: Path, run: Run) -> None:
    out, err = run("benchmark", "--model", converted, "-p", 8, "-g", 4, "-b", 2, "-n", 3)
    rates = re.findall(r"^Trial (\d): prompt_tps=([\d.]+), generation_tps=([\d.]+)$", out, re.M)
    assert [trial for trial, *_ in rates] == ["1", "2", "3"]
    for column, name in ((1, "prompt_tps"), (2, "generation_tps")):
        values = sorted(float(rate[column]) for rate in rates)
        median = float(re.search(rf"^Medians: .*{name}=([\d.]+)", out, re.M)[1])
        assert 0 < values[0] <= values[1] == median and math.isfinite(median)
    assert "Peak resident memory" in err


# --- Info -------------------------------------------------------------------------------------------------------------


def test_info_adds_up(converted: Path, run: Run) -> None:
    tensors = load_file(converted / "model.safetensors")
    out, err = run("info", "--model", converted, "--json")
    record = json.loads(out)
    assert err == "" and record["model"] == "LlamaForCausalLM"
    packed, rest = record["parts"]
    assert packed["tensors"] == 3 * 7 + 2 and rest["tensors"] == 3 * 2 + 1
    assert (packed["group_size"], packed["bits"], packed["mode"]) == (64, 4, "affine")
    assert packed["bits_per_weight"] == pytest.approx(4.5) and rest["bits_per_weight"] == 16
    assert packed["bytes"] + rest["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert packed["largest"] in ([256, 128], [128, 256])

    out, _ = run("info", "--model", converted, "--gpu", "applegpu_g17s")
    assert "affine, 4 bits, group_size 64" in out
    assert re.search(r"^cpu +1 row +(baseline|avx2|avx512|amx|neon)$", out, re.M)
    assert re.search(r"^applegpu_g17s +1 row +affine_qmv_bfloat16_gs_64_b_4 \[matvec\]$", out, re.M)
    assert re.search(r"^applegpu_g17s +512 rows +affine_qmm_t\S* \[(tile|tensor)\]$", out, re.M)


def test_info_reads_headers_alone(tmp_path: Path, run: Run) -> None:
    """A file of 9 GB, of which all but the header is a hole."""
    rows, columns = 1 << 19, 1 << 15
    tensors = {
        "weight": ("U32", [rows, columns // 8], 4 * rows * columns // 8),
        "scales": ("U8", [rows, columns // 32], rows * columns // 32),
    }
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[f"lm_head.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}})
    )
    out, _ = run("info", "--model", tmp_path)
    assert f"llama, {rows * columns / 1e6:.1f} million weights, {end / 1e6:.1f} MB in 1 file(s), 4.25 bits" in out
    assert f"mxfp4, 4 bits, group_size 32: kernels for its largest matrix, {rows} x {columns}" in out


# --- Help -------------------------------------------------------------------------------------------------------------


def test_documentation_shows_the_help_of_today(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```text\n\$ quantization-mlx ?(\w*) --help\n(.*?)^```$", page, re.M | re.S))
    assert set(blocks) == {"", *COMMANDS}
    monkeypatch.setenv("COLUMNS", "100")
    for command, text in blocks.items():
        out, _ = run(*command.split(), "--help")
        assert out == text, "python benchmarks/quantization_error.py --help-only writes the page anew"


# --- Errors -----------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path, **config: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file({"lm_head.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    return tmp_path


AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4}}
# what is typed, the exit code, what the message says; DENSE, MLX and TMP stand for directories
ERRORS = [
    ("", 2, "required: COMMAND"),
    ("unknown", 2, "invalid choice: 'unknown'"),
    ("generate", 2, "required: --model"),
    ("generate --model TMP/none", 1, r"there is no directory \S*/none"),
    ("generate --model TMP", 1, "has no config.json"),
    ("generate --model MLX/config.json", 1, "is a file; a model is the directory"),
    ("generate --model some/model", 1, "there is no directory some/model; models on the Hub are downloaded by convert"),
    ("generate --model MLX --max-tokens 0", 2, "'0' is not a whole number of at least 1"),
    ("generate --model MLX --max-tokens x", 2, "'x' is not a whole number of at least 1"),
    ("generate --model MLX --verbose maybe", 2, "'maybe' is not T or F"),
    ("generate --model MLX --system-prompt x -p w1", 2, "--system-prompt needs a model with a chat template"),
    ('generate --model MLX --chat-template-config {"a":1}', 2, "--chat-template-config needs a model with a chat temp"),
    ("generate --model MLX --chat-template-config [1]", 2, r"'\[1\]' is not a JSON object"),
    ("generate --model MLX --chat-template-config {", 2, "'{' is not a JSON object"),
    ("generate --model MLX --system-prompt x --ignore-chat-template", 2, "--system-prompt with --ignore-chat-template"),
    ("generate --model MLX --top-p 0.9 --seed 0", 2, "--top-p, --seed without --temp above 0"),
    ("generate --model MLX --top-k 5 --min-p 0.0", 2, "--top-k, --min-p without --temp above 0"),
    ("generate --model MLX --temp -1", 2, "'-1' is not a finite number of at least 0"),
    ("generate --model MLX --temp nan", 2, "'nan' is not a finite number"),
    ("generate --model MLX --temp 1 --top-p 1.5", 2, "'1.5' is not a number above 0 and at most 1"),
    ("generate --model MLX --temp 1 --top-k -1", 2, "'-1' is not a whole number of at least 0"),
    ("generate --model MLX --temp 1 --min-p 2", 2, "'2' is not a number from 0 to 1"),
    ("generate --model MLX --max-kv-size 4", 2, "'4' is not a whole number above 4"),
    ("generate --model MLX --device cuda", 2, "invalid choice: 'cuda'"),
    ("generate --model VIT", 1, r"is a model of type 'vit' \(ViTForImageClassification\), which is no causal language"),
    ("perplexity --model MLX --data-path TMP/none.txt", 1, r"No such file.*none\.txt"),
    ("perplexity --model MLX --data-path MLX/model.safetensors", 1, r"--data-path \S+model.safetensors is not text"),
    (
        "perplexity --model MLX --data-path DENSE/config.json --num-samples 0",
        2,
        "'0' is not a whole number of at least 1",
    ),
    ("perplexity --model MLX --data-path DENSE/config.json --num-samples -2", 2, "'-2' is not .* or -1 for all"),
    ("perplexity --model MLX --data-path DENSE/config.json --sequence-length 1", 2, "'1' is not .* of at least 2"),
    ("benchmark --model MLX -g 0", 2, "'0' is not a whole number of at least 1"),
    ("info --model TMP/none", 1, "there is no directory"),
    ("info --model MLX --gpu applegpu_x", 1, "applegpu_x"),
    ("info --model DENSE --gpu applegpu_g17s", 2, "--gpu plans products with quantized weights, of which"),
    ("convert --hf-path BARE -q --mlx-path TMP/out", 1, r"\S+BARE has no tokenizer; save one there"),
    ("convert --hf-path TMP/none -q", 1, "there is no directory"),
    ("convert --hf-path none -q", 1, "there is no directory none, and no model of that name that can be reached"),
    (
        "convert --hf-path some/none -q",
        1,
        "there is no directory some/none, and no model of that name that can be reached",
    ),
    ("convert --hf-path DENSE/config.json -q --mlx-path TMP/out", 1, "config.json is a file; a model is the directory"),
    ("convert --hf-path DENSE --gguf-file a.gguf -q --mlx-path TMP/out", 1, "there is no file a.gguf in"),
    ("convert --hf-path some/none --gguf-file a.gguf -q --mlx-path TMP/out", 1, "GGUF files are read from directories"),
    ("convert --hf-path EMPTY.gguf -q --mlx-path TMP/out", 1, r"EMPTY\.gguf is empty and so is no GGUF file"),
    ("convert --hf-path TEXT.gguf -q --mlx-path TMP/out", 1, r"TEXT\.gguf begins with b'text' instead of b'GGUF'"),
    ("convert --hf-path CUT.gguf -q --mlx-path TMP/out", 1, r"CUT\.gguf cannot be read, it may be cut off"),
    ("convert --hf-path CUT.gguf --gguf-file a.gguf --mlx-path TMP/out", 2, "needs a directory as --hf-path"),
    ("convert --hf-path CUT.gguf -q --trust-remote-code --mlx-path TMP/out", 2, "has no effect on a GGUF file"),
    ("convert --hf-path CUT.gguf --lossless --mlx-path TMP/out", 1, r"CUT\.gguf cannot be read, it may be cut off"),
    ("convert --hf-path DENSE --lossless --mlx-path TMP/out", 2, "--lossless keeps the codes of GGUF files, and"),
    ("convert --hf-path MLX --lossless -d --mlx-path TMP/out", 2, "-d with --lossless, which keeps the codes"),
    ("convert --hf-path CUT.gguf --lossless --q-bits 8 --mlx-path TMP/out", 2, "--q-bits without -q"),
    ("convert --hf-path CUT.gguf --lossless -q --report r --plot p.png", 2, "--report, --plot with --lossless"),
    ("convert --hf-path VIT -q --mlx-path TMP/out", 1, "is a model of type 'vit' .* no causal language model"),
    ("convert --hf-path T5 -q --mlx-path TMP/out", 1, "is a model of type 't5' .* no causal language model"),
    ("convert --hf-path DENSE --mlx-path MLX -q", 1, "already exists"),
    ("convert --hf-path DENSE --mlx-path DENSE/config.json/out", 1, "--mlx-path .* is no directory"),
    ("convert --hf-path MLX --mlx-path TMP/out -q", 1, "is a quantized MLX checkpoint already"),
    ("convert --hf-path DENSE --mlx-path TMP/out -d", 1, "is not quantized, so there is nothing that -d could do"),
    ("convert --hf-path MLX --mlx-path TMP/out -d -q", 2, "-q with -d, which dequantizes"),
    ("convert --hf-path MLX --mlx-path TMP/out -d --q-bits 4", 2, "--q-bits with -d, which dequantizes"),
    ("convert --hf-path TMP --gguf-file a --mlx-path TMP/out -d", 2, "--gguf-file with -d, which reads MLX"),
    ("convert --hf-path DENSE --mlx-path TMP/out --quant-predicate mixed_5_6 -q", 2, "invalid choice: 'mixed_5_6'"),
    ("convert --hf-path DENSE --mlx-path TMP/out --q-bits 4", 2, "--q-bits without -q"),
    ("convert --hf-path DENSE --mlx-path TMP/out --q-mode mxfp4", 2, "--q-mode without -q, which quantizes"),
    ("convert --hf-path DENSE --mlx-path TMP/out --q-mode affine --plot a.png", 2, "--q-mode, --plot without -q"),
    (
        "convert --hf-path DENSE --mlx-path TMP/out -q --q-bits 7",
        2,
        r"bits 7 is not supported; it takes .*\[1, 2, 3, 4",
    ),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --q-mode mxfp4 --quant-predicate mixed_4_6", 2, "of mode affine"),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --plot TMP/plot.xyz", 2, r"should end with one of \.png"),
    (
        "convert --hf-path DENSE --mlx-path TMP/out -q --plot TMP/none/p.png",
        1,
        r"--plot \S+: there is no directory \S+",
    ),
    (
        "convert --hf-path DENSE --mlx-path TMP/out -q --report TMP/none/r",
        1,
        r"--report \S+: there is no directory \S+",
    ),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --report TMP", 1, r"--report \S+ is a directory"),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --report=", 1, r"--report '' is a directory"),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --plot=", 2, r"--plot '' should end with one of"),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --report /proc/r", 1, "--report /proc/r cannot be written"),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --report TMP/a.png --plot TMP/a.png", 2, "name the same file"),
    ("convert --hf-path WIDE --mlx-path TMP/out -q", 1, "has no layer that can be quantized.* into groups of 64"),
]
DENSE_KINDS = {
    "VIT": ViTConfig(hidden_size=32, architectures=["ViTForImageClassification"]),
    "T5": T5Config(architectures=["T5ForConditionalGeneration"]),
}


@pytest.fixture(scope="module")
def places(dense: Path, converted: Path) -> dict[str, str]:
    """What the capital words in ERRORS stand for, but for TMP."""
    root = dense.parent
    for name, config in DENSE_KINDS.items():
        config.save_pretrained(root / name)
        write_tokenizer(root / name)
    for name, content in {"EMPTY": b"", "TEXT": b"text", "CUT": b"GGUF\x03\0\0\0"}.items():
        (root / f"{name}.gguf").write_bytes(content)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(root / "WIDE")
    write_tokenizer(root / "WIDE")
    (root / "BARE").mkdir()
    for name in ("config.json", "model.safetensors"):
        (root / "BARE" / name).symlink_to(dense / name)
    found = {"DENSE": str(dense), "MLX": str(converted), "WIDE": str(root / "WIDE"), "BARE": str(root / "BARE")}
    return {**found, **{name: str(root / name) for name in (*DENSE_KINDS, "EMPTY", "TEXT", "CUT")}}


@pytest.mark.parametrize(("line", "code", "message"), ERRORS, ids=[line or "nothing" for line, *_ in ERRORS])
def test_errors_are_one_line(
    line: str, code: int, message: str, places: dict[str, str], tmp_path: Path, run: Run
) -> None:
    named = {**places, "TMP": str(tmp_path)}
    words = [re.sub(rf"^({'|'.join(named)})\b", lambda found: named[found[1]], word) for word in line.split()]
    out, err = run(*words, code=code)
    assert out == ""
    assert re.match(r"quantization-mlx( \w+)?: error: ", err) and re.search(message, err) and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_version(run: Run) -> None:
    out, _ = run("--version")
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert out.startswith(f"quantization-mlx {version} (torch {torch.__version__}, transformers ")


def flags_of_mlx_lm(command: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    parsers: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(InterruptedError):
        importlib.import_module(f"mlx_lm.{command}").main()
    monkeypatch.undo()
    return [flag for action in parsers[0]._actions for flag in action.option_strings]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "info"])
def test_flags_of_mlx_lm_are_here_or_refused(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = flags_of_mlx_lm(command, monkeypatch)
    help, _ = run(command, "--help")
    ours = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help))
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert len(theirs) > 5
    for flag in theirs:
        if flag in ours:
            continue
        _, err = run(command, flag, "1", code=2)
        assert re.match(rf"quantization-mlx {command}: error: --\S+ of mlx_lm is not supported: ", err), err
        assert len(err.splitlines()) == 1
        assert f"`{flag}`" in page, flag


def test_commands_of_mlx_lm_are_here_or_refused(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm import cli

    monkeypatch.setattr(sys, "argv", ["mlx_lm", "--help"])
    cli.main()
    theirs = re.findall(r"'(\w+)'", capsys.readouterr().out)
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert {"convert", "lora", "server"} <= set(theirs)
    for command in theirs:
        if command in COMMANDS:
            continue
        _, err = run(command, "--model", "x", code=2)
        assert err.startswith(f"quantization-mlx {command}: error: mlx_lm's command is not here: ")
        assert f"`{command}`" in page, command


@pytest.mark.parametrize("command", ["generate", "info", "convert"])
def test_checkpoints_of_other_methods_are_refused(command: str, tmp_path: Path, run: Run) -> None:
    directory = broken(tmp_path, **AWQ)
    _, err = run(command, "--model", directory, code=1)
    assert re.fullmatch(rf"quantization-mlx {command}: error: \S+ is quantized (already, )?by 'awq'.*\n", err)


def test_damaged_weights_and_wrong_formats(converted: Path, tmp_path: Path, run: Run) -> None:
    directory = broken(tmp_path)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-5])
    _, err = run("info", "--model", directory, code=1)
    assert "is damaged or no safetensors file" in err and len(err.splitlines()) == 1
    (directory / "config.json").write_text("{")
    _, err = run("info", "--model", directory, code=1)
    assert "is not JSON" in err and len(err.splitlines()) == 1
    config = json.loads((converted / "config.json").read_text())
    config["quantization"]["mode"] = "int4"
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes((converted / "model.safetensors").read_bytes())
    _, err = run("info", "--model", directory, code=1)
    assert "mode 'int4' is not supported; supported are affine" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("package", "extra"), [("transformers", "transformers"), ("matplotlib", "plot")])
def test_missing_extras_are_named(
    package: str, extra: str, dense: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    flags = ["-q", "--plot", tmp_path / "plot.png"]
    _, err = run("convert", "--hf-path", dense, "--mlx-path", tmp_path / "out", *flags, code=1)
    install = f'pip install "quantization-mlx[{extra}]"'
    assert err == f"quantization-mlx convert: error: this needs the package {package}: {install}\n"


def test_debug_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["info", "--model", str(tmp_path / "none"), "--debug"])


def test_module_runs_as_a_command(converted: Path, tmp_path: Path) -> None:
    """A process of its own, in which importing Transformers fails: `info` needs safetensors alone."""
    (tmp_path / "transformers.py").write_text("raise ImportError('blocked')")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = ("-m", "quantization_mlx", "info", "--model", converted)
    done = python(*command, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{converted}: LlamaForCausalLM, ") and done.stderr == ""
