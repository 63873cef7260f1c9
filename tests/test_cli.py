"""The command line on a tiny model: what it writes, prints and refuses, beside mlx-lm and plain Transformers."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import oracle
from quantization_mlx import load_checkpoint
from quantization_mlx.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent

VOCABULARY = 96
TEXT = " ".join(f"w{i * i % VOCABULARY}" for i in range(100))
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}w90 {% endif %}{{ message.content }} {% endfor %}w91"
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformers directory: a bfloat16 Llama with a tokenizer of one token for each word "w0", "w1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.1, eos_token_id=1, tie_word_embeddings=False)
    directory = tmp_path_factory.mktemp("models") / "dense"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def converted(dense: Path) -> Path:
    target = dense.parent / "converted"
    assert main(["convert", "--hf-path", str(dense), "--mlx-path", str(target), "-q"]) == 0
    return target


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    """What the command prints, after checking its exit code."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


# --- Convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-q"], ["-q", "--q-bits", "3", "--q-group-size", "32"]], ids=" ".join)
def test_convert_writes_what_mlx_lm_writes(
    flags: list[str], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_lm.convert import configure_parser, convert

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    convert(**vars(configure_parser().parse_args(["--hf-path", str(dense), "--mlx-path", str(theirs), *flags])))
    out, err = run(capsys, "convert", "--model", dense, "--mlx-path", ours, *flags)
    expected, found = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        oracle.assert_identical(found[name], tensor, name)
    configs = [json.loads((directory / "config.json").read_text()) for directory in (ours, theirs)]
    assert configs[0].get("quantization") == configs[1].get("quantization")
    weights = sum(parameter.numel() for parameter in LlamaForCausalLM.from_pretrained(dense).parameters())
    bits = 8 * sum(tensor.nbytes for tensor in expected.values()) / weights
    assert f"{weights / 1e6:.1f} million weights" in out and f"{bits:.2f} bits per weight" in out
    assert re.fullmatch(r"Peak resident memory: \d+\.\d+ GB", err.splitlines()[-1])


def test_convert_reports_and_draws_errors(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, report, plot = tmp_path / "mixed", tmp_path / "report.md", tmp_path / "plot.png"
    flags = ["-q", "--quant-predicate", "mixed_4_6", "--report", report, "--plot", plot]
    out, _ = run(capsys, "convert", "--hf-path", dense, "--mlx-path", target, *flags)
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


def test_generate_streams_the_greedy_text(
    converted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(converted, "w5 w17 w3", 12)
    flags = ["generate", "--model", converted, "--dtype", "float32", "-m", "12"]
    out, err = run(capsys, *flags, "-p", "w5 w17 w3")
    assert out.strip() == expected and len(expected.split()) > 1
    length = len(AutoTokenizer.from_pretrained(converted)("w5 w17 w3").input_ids)
    assert re.search(rf"^Prompt: {length} tokens, \d+\.\d+ tokens-per-sec$", err, re.M)
    # The text, and what ended it if that was a token.
    words = len(expected.split())
    assert re.search(rf"^Generation: ({words}|{words + 1}) tokens, \d+\.\d+ tokens-per-sec$", err, re.M)
    assert re.search(r"^Decoder: fused ops of prepare_for_generation$", err, re.M)
    assert re.search(r"^Peak resident memory: \d+\.\d+ GB$", err, re.M)

    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w17 w3\n"))
    assert run(capsys, *flags, "-p", "-", "--verbose", "F") == (out, "")
    # Of one token, the likeliest, sampling takes no other.
    assert run(capsys, *flags, "-p", "w5 w17 w3", "--temp", "2", "--top-k", "1")[0] == out


def test_sampling_follows_the_seed(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["generate", "--model", converted, "-m", "12", "-p", "w5", "--temp", "1.5", "--top-p", "0.99", "--seed"]
    first, again, other = (run(capsys, *flags, seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_chat_templates(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    out, err = run(capsys, *flags)
    assert out.strip() == greedy(converted, "w5 w6 w91", 6) and "Prompt: 3 tokens" in err
    out, err = run(capsys, *flags, "--system-prompt", "w7")
    assert out.strip() == greedy(converted, "w90 w7 w5 w6 w91", 6) and "Prompt: 5 tokens" in err
    out, err = run(capsys, *flags, "--ignore-chat-template")
    assert out.strip() == greedy(converted, "w5 w6", 6) and "Prompt: 2 tokens" in err


# --- Perplexity and benchmark -----------------------------------------------------------------------------------------


def test_perplexity_is_mlx_lms(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_lm import load
    from mlx_lm.perplexity import eval_ppl

    mx = oracle.mlx()
    model, _ = load(str(converted))
    model.set_dtype(mx.float32)
    tokens = AutoTokenizer.from_pretrained(converted)(TEXT).input_ids
    expected, error = eval_ppl(model, mx.array(tokens[:96]).reshape(6, 16), batch_size=4)
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["perplexity", "--model", converted, "--dtype", "float32", "--data-path", tmp_path / "text.txt"]
    out, err = run(capsys, *flags, "--sequence-length", "16", "--batch-size", "4")
    found = re.fullmatch(r"Perplexity: ([\d.]+) ± ([\d.]+)\n", out)
    assert float(found[1]) == pytest.approx(expected, rel=1e-4)
    assert float(found[2]) == pytest.approx(error, rel=1e-3)
    assert "90 tokens in 6 sequences" in err
    out, err = run(capsys, *flags, "--sequence-length", "16", "--num-samples", "2")
    expected, _ = eval_ppl(model, mx.array(tokens[:32]).reshape(2, 16))
    assert float(re.search(r"[\d.]+", out)[0]) == pytest.approx(expected, rel=1e-4)
    assert "30 tokens in 2 sequences" in err


def test_benchmark_times_what_was_asked_for(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "benchmark", "--model", converted, "-p", 8, "-g", 4, "-b", 2, "-n", 3)
    rates = re.findall(r"^Trial (\d): prompt_tps=([\d.]+), generation_tps=([\d.]+)$", out, re.M)
    assert [trial for trial, *_ in rates] == ["1", "2", "3"]
    for column, name in ((1, "prompt_tps"), (2, "generation_tps")):
        values = sorted(float(rate[column]) for rate in rates)
        median = float(re.search(rf"^Medians: .*{name}=([\d.]+)", out, re.M)[1])
        assert 0 < values[0] <= values[1] == median and math.isfinite(median)
    assert "Peak resident memory" in err


# --- Info -------------------------------------------------------------------------------------------------------------


def test_info_adds_up(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(converted / "model.safetensors")
    out, err = run(capsys, "info", "--model", converted, "--json")
    record = json.loads(out)
    assert err == "" and record["model"] == "LlamaForCausalLM"
    packed, rest = record["parts"]
    assert packed["tensors"] == 3 * 7 + 2 and rest["tensors"] == 3 * 2 + 1
    assert (packed["group_size"], packed["bits"], packed["mode"]) == (64, 4, "affine")
    assert packed["bits_per_weight"] == pytest.approx(4.5) and rest["bits_per_weight"] == 16
    assert packed["bytes"] + rest["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert packed["largest"] in ([256, 128], [128, 256])

    out, _ = run(capsys, "info", "--model", converted, "--gpu", "applegpu_g17s")
    assert "affine, 4 bits, group_size 64" in out
    assert re.search(r"^cpu +1 row +(baseline|avx2|avx512|amx|neon)$", out, re.M)
    assert re.search(r"^applegpu_g17s +1 row +affine_qmv_bfloat16_gs_64_b_4 \[matvec\]$", out, re.M)
    assert re.search(r"^applegpu_g17s +512 rows +affine_qmm_t\S* \[(tile|tensor)\]$", out, re.M)


def test_info_reads_headers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    out, _ = run(capsys, "info", "--model", tmp_path)
    assert f"llama, {rows * columns / 1e6:.1f} million weights, {end / 1e6:.1f} MB in 1 file(s), 4.25 bits" in out
    assert f"mxfp4, 4 bits, group_size 32: kernels for its largest matrix, {rows} x {columns}" in out


# --- Help -------------------------------------------------------------------------------------------------------------


def test_documentation_shows_the_help_of_today(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```text\n\$ quantization-mlx ?(\w*) --help\n(.*?)^```$", page, re.M | re.S))
    assert set(blocks) == {"", *COMMANDS}
    monkeypatch.setenv("COLUMNS", "100")
    for command, text in blocks.items():
        out, _ = run(capsys, *command.split(), "--help")
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
    ("generate --model MLX --max-tokens 0", 2, "0 is not positive"),
    ("generate --model MLX --verbose maybe", 2, "'maybe' is neither T nor F"),
    ("generate --model MLX --system-prompt x -p w1", 2, "--system-prompt needs a model with a chat template"),
    ("perplexity --model MLX --data-path TMP/none.txt", 1, r"No such file.*none\.txt"),
    ("info --model TMP/none", 1, "there is no directory"),
    ("info --model MLX --gpu applegpu_x", 1, "applegpu_x"),
    ("convert --hf-path TMP/none -q", 1, "there is no directory"),
    ("convert --hf-path DENSE --gguf-file a.gguf -q", 1, "there is no file a.gguf in"),
    ("convert --hf-path DENSE --mlx-path MLX -q", 1, "already exists"),
    ("convert --hf-path MLX --mlx-path TMP/out -q", 1, "is a quantized MLX checkpoint already"),
    ("convert --hf-path DENSE --mlx-path TMP/out --quant-predicate mixed_5_6 -q", 2, "invalid choice: 'mixed_5_6'"),
    ("convert --hf-path DENSE --mlx-path TMP/out --q-bits 4", 2, "--q-bits without -q"),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --q-bits 7", 2, r"bits 7 is not supported; it takes .*\[2, 3, 4"),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --q-mode mxfp4 --quant-predicate mixed_4_6", 2, "of mode affine"),
    ("convert --hf-path DENSE --mlx-path TMP/out -q --plot TMP/plot.xyz", 2, r"should end with one of \.png"),
]


@pytest.mark.parametrize(("line", "code", "message"), ERRORS, ids=[line or "nothing" for line, *_ in ERRORS])
def test_errors_are_one_line(
    line: str, code: int, message: str, dense: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, directory in (("DENSE", dense), ("MLX", converted), ("TMP", tmp_path)):
        line = line.replace(name, str(directory))
    out, err = run(capsys, *line.split(), code=code)
    assert out == ""
    *usage, last = err.splitlines()
    assert re.match(r"quantization-mlx( \w+)?: error: ", last) and re.search(message, last)
    assert not any("Traceback" in line for line in usage) and (code == 2 or not usage)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "info", "convert"])
def test_checkpoints_of_other_methods_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = broken(tmp_path, **AWQ)
    _, err = run(capsys, command, "--model", directory, code=1)
    assert re.fullmatch(rf"quantization-mlx {command}: error: \S+ is quantized (already, )?by 'awq'.*\n", err)


def test_damaged_weights_and_wrong_formats(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = broken(tmp_path)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-5])
    _, err = run(capsys, "info", "--model", directory, code=1)
    assert "is damaged or no safetensors file" in err and len(err.splitlines()) == 1
    (directory / "config.json").write_text("{")
    _, err = run(capsys, "info", "--model", directory, code=1)
    assert "is not JSON" in err and len(err.splitlines()) == 1
    config = json.loads((converted / "config.json").read_text())
    config["quantization"]["mode"] = "int4"
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes((converted / "model.safetensors").read_bytes())
    _, err = run(capsys, "info", "--model", directory, code=1)
    assert "mode 'int4' is not supported; supported are affine" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("package", "extra"), [("transformers", "transformers"), ("matplotlib", "plot")])
def test_missing_extras_are_named(
    package: str,
    extra: str,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    flags = ["-q", "--plot", tmp_path / "plot.png"]
    _, err = run(capsys, "convert", "--hf-path", dense, "--mlx-path", tmp_path / "out", *flags, code=1)
    install = f'pip install "quantization-mlx[{extra}]"'
    assert err == f"quantization-mlx convert: error: this needs the package {package}: {install}\n"


def test_debug_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["info", "--model", str(tmp_path / "none"), "--debug"])


def test_module_runs_as_a_command(converted: Path, tmp_path: Path) -> None:
    """A process of its own, in which importing Transformers fails: `info` needs safetensors alone."""
    (tmp_path / "transformers.py").write_text("raise ImportError('blocked')")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "quantization_mlx", "info", "--model", str(converted)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{converted}: LlamaForCausalLM, ") and done.stderr == ""
