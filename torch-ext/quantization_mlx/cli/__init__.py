"""The command `quantization-mlx`: converts models to MLX checkpoints, runs, measures and describes them.

Flags have the names that users of mlx_lm know. Results go to the standard output, figures about the run and errors to
the standard error; the exit code is 1 for what failed and 2 for arguments that make no sense.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint.read import read_headers, weight_files
from ..checkpoint.record import find_record, format_of_tensors
from ..checkpoint.staging import is_vacant
from ..formats import complete_format, format_name
from ..hf.bounded_cache import bounded_cache
from ..hf.decoder import prepare_for_generation
from ..hf.quantizer import columns_of_layers
from ..hf.save import save_checkpoint
from ..ops import quantize, quantized_matmul
from ..optional import progress, require
from ..plans import explain
from ..quantization.model import quantize_model
from ..quantization.report import QuantizationReport
from .arguments import (
    COMMANDS_NOT_HERE,
    GPU,
    PLOTS,
    PROGRAM,
    SAMPLING,
    Commands,
    UsageError,
    check_output_directory,
    check_output_file,
    parser_of,
    refuse,
)
from .models import (
    copy_code,
    load_model,
    load_tokenizer,
    read_mlx_directory,
    read_source,
    read_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = (1, 512)  # of x, for which `info` shows kernels: a step of generation and a prompt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, those of the process if None, and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and (advice := COMMANDS_NOT_HERE.get(argv[0])):
        return _fail(argv[0], UsageError(f"mlx_lm's command is not here: {advice}"), 2)
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as exit:  # argparse has said why
        return exit.code if isinstance(exit.code, int) else 2
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _fail(arguments.command, error, 2)
    except Exception as error:
        if arguments.debug:
            raise
        return _fail(arguments.command, error, 1)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with one subparser for each of COMMANDS."""
    return parser_of(COMMANDS)


# Errors whose text is the value that was wrong.
_BARE = (KeyError, IndexError, AttributeError, AssertionError)


def _fail(command: str, error: Exception, code: int) -> int:
    message = " ".join(str(error).split())
    if not message or isinstance(error, _BARE):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    print(f"{PROGRAM} {command}: error: {message}", file=sys.stderr)
    return code


def _note(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)


# Convert


def convert(arguments: argparse.Namespace) -> None:
    """Writes a Transformers model, or a GGUF file, as an MLX checkpoint, quantized with -q; -d does the reverse."""
    target = Path(arguments.mlx_path)
    _check_conversion(arguments, target)
    model, tokenizer = read_source(arguments)
    with_errors = not (arguments.report is None and arguments.plot is None)
    report = QuantizationReport(with_errors)
    if arguments.quantize:
        _quantize(model, arguments, report)
    save_checkpoint(model, target, tokenizer)
    if arguments.trust_remote_code:
        copy_code(arguments.hf_path, target)
    summary = _Summary.read(target)
    print(f"{target}: {summary.headline()}")
    if report.skipped:
        print(f"left in floating point: {report.skipped_summary()}" + ("" if with_errors else "; --report names them"))
    if with_errors:
        print(f"relative error of the quantized weights: {report.relative_error:.2%}")
        if arguments.report is not None:
            Path(arguments.report).write_text(report.table() + "\n", encoding="utf-8")
        if arguments.plot is not None:
            report.plot(arguments.plot)
    _note(_peak_memory())


def _quantize(model: PreTrainedModel, arguments: argparse.Namespace, report: QuantizationReport) -> None:
    quantized: list[str] = []
    format = _requested_format(arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\[quantize_model\] .* in floating point")  # a line of the output says it
        quantize_model(
            model,
            **format,
            predicate=arguments.quant_predicate,
            on_layer=lambda path, *_: quantized.append(path),
            report=report,
        )
    if not quantized:
        raise ValueError(
            f"{arguments.hf_path} has no layer that can be quantized: linear layers and embeddings whose rows divide "
            f"into groups of {format['group_size']}"
        )


def _requested_format(arguments: argparse.Namespace) -> dict[str, Any]:
    return complete_format(arguments.q_group_size, arguments.q_bits, arguments.q_mode or "affine")


def _check_conversion(arguments: argparse.Namespace, target: Path) -> None:
    """Looks at all that can be wrong with the flags before anything is loaded."""
    quantizing = {
        "--q-mode": arguments.q_mode,
        "--q-bits": arguments.q_bits,
        "--q-group-size": arguments.q_group_size,
        "--quant-predicate": arguments.quant_predicate,
        "--report": arguments.report,
        "--plot": arguments.plot,
    }
    if arguments.dequantize:
        refuse([("-q", arguments.quantize), *quantizing.items()], "with -d, which dequantizes")
        refuse([("--gguf-file", arguments.gguf_file)], "with -d, which reads MLX checkpoints")
    if not arguments.quantize:
        refuse(quantizing.items(), "without -q, which quantizes")
    try:
        _requested_format(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if arguments.quant_predicate and (arguments.q_mode not in (None, "affine") or arguments.q_bits is not None):
        raise UsageError(f"--quant-predicate {arguments.quant_predicate} decides the bits, of mode affine")
    if arguments.plot is not None and Path(arguments.plot).suffix.lower() not in PLOTS:
        raise UsageError(f"--plot {arguments.plot!r} should end with one of {', '.join(PLOTS)}")
    files = {flag: file for flag in ("--report", "--plot") if (file := quantizing[flag]) is not None}
    if len({Path(file).resolve() for file in files.values()}) < len(files):
        raise UsageError(f"--report and --plot name the same file, {arguments.plot}")
    if not is_vacant(target):
        raise FileExistsError(f"{target} already exists; choose another --mlx-path or remove it")
    check_output_directory("--mlx-path", target)
    for flag, file in files.items():
        check_output_file(flag, file, target)
    if arguments.plot is not None:
        require("matplotlib", "plot")


# Generate, perplexity, benchmark


def generate(arguments: argparse.Namespace) -> None:
    """Answers a prompt, as the text comes; figures about the run go to stderr."""
    _check_generation(arguments)
    tokenizer = load_tokenizer(arguments)
    extra = [_token_of(tokenizer, text) for text in arguments.extra_eos_token or ()]
    tokens = _encode(tokenizer, _prompt(arguments.prompt), arguments).to(arguments.device)
    model = load_model(arguments)
    from transformers import TextStreamer

    way = _prepare(model)
    _set_ends(model, tokenizer, extra)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    streamer = _Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    options = {"max_new_tokens": arguments.max_tokens, "streamer": streamer, **_sampling(arguments)}
    if arguments.max_kv_size is not None:
        options.update(bounded_cache(model, arguments.max_kv_size))
    _run_generate(model, tokens, options)
    if arguments.verbose:
        _note("=" * 10)
        _note(f"Prompt: {tokens.shape[1]} tokens, {tokens.shape[1] / streamer.prompt_seconds:.3f} tokens-per-sec")
        _note(f"Generation: {streamer.count} tokens{_rate(streamer)}")
        _note(f"Decoder: {way}")
        _note(_peak_memory())


def _check_generation(arguments: argparse.Namespace) -> None:
    if arguments.temp == 0:
        sampling = [(f"--{name.replace('_', '-')}", getattr(arguments, name)) for name in (*SAMPLING, "seed")]
        refuse(sampling, "without --temp above 0: otherwise the likeliest token is taken")
    if arguments.ignore_chat_template:
        refuse(_template_flags(arguments), "with --ignore-chat-template")


def _template_flags(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    return [
        ("--system-prompt", arguments.system_prompt),
        ("--chat-template-config", arguments.chat_template_config),
    ]


def _prompt(text: str) -> str:
    r"""The prompt that was typed, where \n and \t stand for what a shell makes hard to type."""
    return read_text("-", "--prompt") if text == "-" else text.replace("\\n", "\n").replace("\\t", "\t")


# How a chat template's result comes.
_RESULT = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, arguments: argparse.Namespace) -> Tensor:
    """The prompt's tokens [1, length]."""
    if tokenizer.chat_template is None or arguments.ignore_chat_template:
        refuse(_template_flags(arguments), "needs a model with a chat template, which this one has not")
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        system = [] if arguments.system_prompt is None else [{"role": "system", "content": arguments.system_prompt}]
        messages = [*system, {"role": "user", "content": prompt}]
        variables = {"add_generation_prompt": True, **(arguments.chat_template_config or {})}
        if taken := sorted(variables.keys() & _RESULT):
            raise UsageError(f"--chat-template-config sets variables of the template, and {taken[0]!r} is none")
        tokens = tokenizer.apply_chat_template(messages, **variables, **_RESULT)["input_ids"]
    if tokens.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    return tokens


def _token_of(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The token that is written so, or that has this number."""
    known = tokenizer.get_vocab()
    if text in known:
        return known[text]
    if text.isdecimal() and int(text) < len(tokenizer):
        return int(text)
    raise ValueError(f"--extra-eos-token {text!r} is no token of this model's tokenizer")


def _set_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, extra: Iterable[int] = ()) -> None:
    """Lets generation end at the tokens that the checkpoint, or else its model, names, and at the tokenizer's."""
    config = model.generation_config
    named = config.eos_token_id
    if named is None:
        named = model.config.get_text_config(decoder=True).eos_token_id
    found = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id, *extra]
    config.eos_token_id = list(dict.fromkeys(int(token) for token in found if token is not None)) or None
    if config.eos_token_id is None:
        _note("neither the checkpoint nor its tokenizer names a token that ends a text; --extra-eos-token does")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of Transformers' generate; None takes back what the checkpoint recommends."""
    if arguments.temp == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    return {
        "do_sample": True,
        "temperature": arguments.temp,
        "top_p": 1.0 if arguments.top_p is None else arguments.top_p,
        "top_k": arguments.top_k or 0,
        "min_p": arguments.min_p or None,
    }


def perplexity(arguments: argparse.Namespace) -> None:
    """Measures how well a model predicts a text: exp of the mean negative log-likelihood of its tokens.

    The text is cut into sequences, of which a remainder is left out. Each begins with the token that the tokenizer puts
    in front of a text, if it does.
    """
    text = read_text(arguments.data_path, "--data-path")
    wanted = None if arguments.num_samples == -1 else arguments.num_samples
    sequences = _sequences(load_tokenizer(arguments), text, arguments.sequence_length)[:wanted]
    model = load_model(arguments)
    start = time.perf_counter()
    losses = torch.cat(
        [
            _token_losses(model, batch.to(arguments.device)).flatten()
            for batch in progress(list(sequences.split(arguments.batch_size)), "Perplexity")
        ]
    )
    seconds = time.perf_counter() - start
    mean = losses.mean().item()
    spread = losses.std().item() if losses.numel() > 1 else math.inf  # one token tells nothing about others
    print(f"Perplexity: {math.exp(mean):.3f} ± {math.exp(mean) * spread / math.sqrt(losses.numel()):.3f}")
    _note(f"{losses.numel()} tokens in {len(sequences)} sequences, {losses.numel() / seconds:.1f} tokens-per-sec")
    _note(_peak_memory())


def _sequences(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """The text's tokens [sequences, length]."""
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    first = tokens[:1] if len(tokens) and tokens[0].item() == tokenizer.bos_token_id else tokens[:0]
    body, step = tokens[len(first) :], length - len(first)
    count = len(body) // step if step > 0 else 0
    if count == 0:
        raise ValueError(f"a text of {len(tokens)} tokens has no sequence of {length}; see --sequence-length")
    body = body[: count * step].view(count, step)
    return torch.cat([first.expand(count, -1), body], 1)


@torch.inference_mode()
def _token_losses(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """The negative log-likelihoods [batch, length - 1] of each token after the first of sequences [batch, length]."""
    logits = model(sequences[:, :-1], use_cache=False).logits
    _check_numbers(logits, model.dtype)
    # One sequence at a time in float32: with large vocabularies, logits take more memory than all else.
    return torch.stack(
        [
            F.cross_entropy(row.float(), targets, reduction="none").cpu()
            for row, targets in zip(logits, sequences[:, 1:], strict=True)
        ]
    )


def benchmark(arguments: argparse.Namespace) -> None:
    """Times prompts of random tokens, and greedy generation after them."""
    model = load_model(arguments)
    way = _prepare(model)
    shape = (arguments.batch_size, arguments.prompt_tokens)
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, shape, device=arguments.device)
    count = arguments.generation_tokens
    rates: dict[str, list[float]] = {"prompt_tps": [], "generation_tps": []}
    _note(f"{_peak_memory()} after loading; decoder: {way}")
    for trial in progress(list(range(arguments.num_trials + 1)), "Timing"):
        clock = _Clock()
        new = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "streamer": clock}
        _run_generate(model, tokens, new)
        if trial == 0:  # warms up
            continue
        rates["prompt_tps"].append(tokens.numel() / clock.prompt_seconds)
        if clock.tokens_per_second is not None:
            rates["generation_tps"].append(arguments.batch_size * clock.tokens_per_second)
        print(f"Trial {trial}: {_listed({name: values[-1] for name, values in rates.items() if values})}", flush=True)
    print(f"Medians: {_listed({name: statistics.median(values) for name, values in rates.items() if values})}")
    _note(_peak_memory())


def _listed(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={rate:.3f}" for name, rate in rates.items())


def _rate(clock: _Clock) -> str:
    """Of generation, to follow the number of tokens; nothing for one token, whose time is the prompt's."""
    return "" if clock.tokens_per_second is None else f", {clock.tokens_per_second:.3f} tokens-per-sec"


class _Clock:
    """A streamer that notes when tokens come and hands them on to another one."""

    def __init__(self, streamer: Any = None) -> None:
        self._streamer = streamer
        self._times: list[float] = []  # of the prompt, then of each token

    def put(self, tokens: Tensor) -> None:
        self._times.append(time.perf_counter())
        if self._streamer is not None:
            self._streamer.put(tokens)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()

    @property
    def count(self) -> int:
        """Of tokens generated."""
        return len(self._times) - 1

    @property
    def prompt_seconds(self) -> float:
        """From the prompt to the first token."""
        return self._times[1] - self._times[0]

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None if there is no other one."""
        return (self.count - 1) / (self._times[-1] - self._times[1]) if self.count > 1 else None


def _prepare(model: PreTrainedModel) -> str:
    """Makes generation fast where that is possible, and says in what way the decoder runs."""
    if model.device.type != "cpu":
        return f"Transformers' own code on {model.device.type}"
    try:
        prepare_for_generation(model)
    except ValueError:  # a decoder of another kind
        return "Transformers' own code"
    return "fused ops of prepare_for_generation"


def _run_generate(model: PreTrainedModel, tokens: Tensor, options: dict[str, Any]) -> None:
    if model.generation_config.pad_token_id is None:
        ends = model.generation_config.eos_token_id
        model.generation_config.pad_token_id = ends[0] if isinstance(ends, list) else ends

    def check(_: Tensor, scores: Tensor) -> Tensor:
        _check_numbers(scores, model.dtype)
        return scores

    with torch.inference_mode():
        model.generate(tokens, attention_mask=torch.ones_like(tokens), logits_processor=[check], **options)


def _check_numbers(logits: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if `logits`, of which excluded tokens may have -inf, are no numbers."""
    if not logits.max().isfinite():
        name = str(dtype).removeprefix("torch.")
        advice = "; its activations are too large for it, --dtype bfloat16 has their range" if name == "float16" else ""
        raise ValueError(f"the model computes NaN or infinity in {name}{advice}")


def _peak_memory() -> str:
    """A line about the memory of this process, weights in files that are mapped into it included."""
    try:
        import resource
    except ImportError:  # Windows has none
        return "Peak resident memory: unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"Peak resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.3f} GB"


# Info


def info(arguments: argparse.Namespace) -> None:
    """Describes a checkpoint from its headers, without loading weights: formats, sizes, and which kernels would run."""
    summary = _Summary.read(Path(arguments.model))
    if not summary.quantized:
        refuse(
            [("--gpu", arguments.gpu)], f"plans products with quantized weights, of which {arguments.model} has none"
        )
    kernels = {format_name(**each.format): _kernels(each, arguments.gpu or GPU) for each in summary.quantized}
    if arguments.json:
        print(json.dumps({**summary.record(), "kernels": kernels}, indent=2))
        return
    print(f"{arguments.model}: {summary.headline()}\n")
    rows = [("weights as", "tensors", "weights", "MB", "bits per weight")]
    rows += [
        (each.name, f"{each.tensors}", f"{each.weights}", f"{each.bytes / 1e6:.1f}", f"{each.bits_per_weight:.2f}")
        for each in summary.parts
    ]
    _print_table(rows)
    for part in summary.quantized:
        shape = " x ".join(map(str, part.largest))
        print(f"\n{part.name}: kernels for its largest matrix, {shape}")
        _print_table([(name, f"{count} row{'s' * (count > 1)}", kernel) for name, count, kernel in kernels[part.name]])


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@dataclass
class _Part:
    """The weights of a checkpoint that are stored in one way: in a format, or in a dtype."""

    name: str
    format: dict[str, Any] = field(default_factory=dict)
    tensors: int = 0
    weights: int = 0
    bytes: int = 0
    largest: tuple[int, ...] = ()

    def add(self, shape: Sequence[int], stored: Iterable[Tensor]) -> None:
        self.tensors += 1
        self.weights += math.prod(shape)
        self.bytes += sum(tensor.nbytes for tensor in stored)
        self.largest = max(self.largest, tuple(shape), key=lambda each: math.prod(each) if each else 0)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(self.weights, 1)


@dataclass
class _Summary:
    """A checkpoint as its headers describe it."""

    model: str
    files: int
    parts: list[_Part]

    @classmethod
    def read(cls, directory: Path) -> _Summary:
        """Raises FileNotFoundError and ValueError, which name the directory."""
        config = read_mlx_directory(directory)
        model = (config.get("architectures") or [config.get("model_type", "a model of an unknown kind")])[0]
        files = weight_files(directory)
        stored = read_headers(files)
        columns = columns_of_layers(directory) if find_record(config) is not None else {}
        parts: dict[str, _Part] = {}
        for name, tensor in stored.items():
            path, _, kind = name.rpartition(".")
            scales = stored.get(f"{path}.scales")
            if scales is None or kind not in ("weight", "scales", "biases"):
                dtype = str(tensor.dtype).removeprefix("torch.")
                parts.setdefault(dtype, _Part(dtype)).add(tensor.shape, [tensor])
            elif kind == "weight":
                format = _stored_format(path, columns.get(path), find_record(config) or {}, stored)
                shape = (*tensor.shape[:-1], scales.shape[-1] * format["group_size"])
                biases = stored.get(f"{path}.biases")
                together = [tensor, scales] + ([] if biases is None else [biases])
                parts.setdefault(key := format_name(**format), _Part(key, format)).add(shape, together)
        return cls(model, len(files), sorted(parts.values(), key=lambda part: -part.bytes))

    @property
    def quantized(self) -> list[_Part]:
        return [part for part in self.parts if part.format]

    def headline(self) -> str:
        weights, bytes_ = (sum(getattr(part, name) for part in self.parts) for name in ("weights", "bytes"))
        size = f"{weights / 1e6:.1f} million weights, {bytes_ / 1e6:.1f} MB in {self.files} file(s)"
        return f"{self.model}, {size}, {8 * bytes_ / max(weights, 1):.2f} bits per weight"

    def record(self) -> dict[str, Any]:
        names = ("name", "tensors", "weights", "bytes", "bits_per_weight", "largest")
        return {
            "model": self.model,
            "files": self.files,
            "parts": [{**part.format, **{name: getattr(part, name) for name in names}} for part in self.parts],
        }


def _stored_format(
    path: str, columns: int | None, record: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The format of a layer whose scales are stored, as loading finds it.

    Raises:
        ValueError: the stored tensors cannot be of that format.
    """
    format = format_of_tensors(path, columns, record, stored)
    if format is None:
        raise ValueError(f"{path}: config.json says that it is not quantized, and scales are stored")
    weight, scales = stored[f"{path}.weight"], stored[f"{path}.scales"]
    if weight.shape[-1] * 32 != scales.shape[-1] * format["group_size"] * format["bits"]:
        raise ValueError(
            f"{path}: weight {list(weight.shape)} and scales {list(scales.shape)} are not of {format_name(**format)}"
        )
    return format


def _kernels(part: _Part, gpu: str) -> list[tuple[str, int, str]]:
    """(device, rows of x, kernels) for the product with the part's largest matrix."""
    format, (rows, columns) = part.format, part.largest[-2:]
    [cpu] = explain(quantized_matmul, *_small_product(format), **format)
    packed = quantize(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta"), **format)
    packed = (*packed, None)[:3]
    found = [("cpu", count, str(cpu.instruction_set)) for count in _ROWS]
    for count in _ROWS:
        x = torch.empty(count, columns, dtype=torch.bfloat16, device="meta")
        [plan] = explain(quantized_matmul, x, *packed, gpu=gpu, **format)
        found.append((gpu, count, ", ".join(f"{launch.kernel} [{launch.family}]" for launch in plan.launches)))
    return found


def _small_product(format: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """x, weights, scales and biases of the smallest product in a format: a CPU's plan takes tensors that exist."""
    x = torch.zeros(1, format["group_size"])
    return (x, *(*quantize(x.expand(2, -1).contiguous(), **format), None)[:3])


# name -> (what it does, one line of help)
COMMANDS: Commands = {
    "convert": (convert, "write a model as an MLX checkpoint, quantized or not"),
    "generate": (generate, "answer a prompt"),
    "perplexity": (perplexity, "measure how well a model predicts a text"),
    "benchmark": (benchmark, "time prompts and generation"),
    "info": (info, "describe a checkpoint without loading it"),
}
