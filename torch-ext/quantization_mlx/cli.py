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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checkpoint import _progress, load_checkpoint, quantize_model, save_checkpoint
from .generation import prepare_for_generation
from .modules import SUPPORTED, complete_format
from .ops import quantize, quantized_matmul
from .plans import explain
from .quantizer import columns_of_layers
from .recipes import RECIPES, QuantizationReport, format_name
from .staging import is_vacant
from .stored import (
    find_record,
    format_of_tensors,
    other_method,
    read_config,
    read_headers,
    require,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROGRAM = "quantization-mlx"
_DTYPES = ("float32", "float16", "bfloat16")
_PLOTS = (".png", ".svg", ".pdf")
_ROWS = (1, 512)  # of x, for which `info` shows kernels: a step of generation and a prompt
_GPU = "applegpu_g16s"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, those of the process if None, and returns its exit code."""
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
    except _UsageError as error:
        return _fail(arguments.command, error, 2)
    except Exception as error:
        if arguments.debug:
            raise
        return _fail(arguments.command, error, 1)
    return 0


class _UsageError(Exception):
    """Arguments that are right one by one and make no sense together."""


def _fail(command: str, error: Exception, code: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"{PROGRAM} {command}: error: {message}", file=sys.stderr)
    return code


def _note(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)


# Arguments


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, the same from every version of Python."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(action.option_strings) + value

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or isinstance(action.default, bool) or action.required
        return action.help if hidden else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with one subparser for each of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="MLX-format quantized models in PyTorch.", formatter_class=_Formatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, describe, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=run.__doc__, formatter_class=_Formatter)
        subparser.set_defaults(run=run)
        describe(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="directory of an MLX checkpoint")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu or mps")
    parser.add_argument("--dtype", choices=_DTYPES, help="of activations; as stored if left out")


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-path",
        "--model",
        dest="hf_path",
        required=True,
        metavar="PATH",
        help="directory of a Transformers model, its id on the Hub, or a GGUF file",
    )
    parser.add_argument("--gguf-file", metavar="NAME", help="GGUF file inside of --hf-path to read")
    parser.add_argument("--mlx-path", default="mlx_model", metavar="DIR", help="directory to write, not there yet")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize linear layers and embeddings")
    parser.add_argument("--q-bits", type=int, metavar="BITS", help="bits of a code; 4 for affine if left out")
    parser.add_argument("--q-group-size", type=int, metavar="SIZE", help="weights that share a scale; 64 for affine")
    parser.add_argument("--q-mode", default="affine", choices=list(SUPPORTED), help="kind of the format")
    parser.add_argument("--quant-predicate", choices=list(RECIPES), help="recipe that mixes two numbers of bits")
    parser.add_argument("--dtype", choices=_DTYPES, help="of what stays in floating point; as stored, GGUF: bfloat16")
    parser.add_argument("--report", metavar="FILE", help="write bits per weight and error of each layer, in Markdown")
    parser.add_argument("--plot", metavar="FILE", help="draw the error of each layer, as .png, .svg or .pdf")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("-p", "--prompt", default="hello", metavar="TEXT", help="what to answer; - reads stdin")
    parser.add_argument("--system-prompt", metavar="TEXT", help="system message of the chat template")
    parser.add_argument("--ignore-chat-template", action="store_true", help="continue the bare prompt")
    parser.add_argument("-m", "--max-tokens", type=_positive, default=100, metavar="N", help="tokens at most")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature; 0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from tokens of this joint probability")
    parser.add_argument("--top-k", type=int, default=0, help="sample from that many tokens; 0: from all")
    parser.add_argument("--min-p", type=float, default=0.0, help="least probability relative to the likeliest token's")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random numbers")
    parser.add_argument("--verbose", type=_truth, default=True, metavar="T|F", help="figures about the run on stderr")


def _perplexity_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--data-path", required=True, metavar="FILE", help="text file in UTF-8; - reads stdin")
    parser.add_argument("--sequence-length", type=_positive, default=512, metavar="N", help="tokens of a sequence")
    parser.add_argument("--num-samples", type=int, default=-1, metavar="N", help="sequences to use; -1: all")
    parser.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="sequences at once")


def _benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("-p", "--prompt-tokens", type=_positive, default=512, metavar="N", help="length of the prompt")
    parser.add_argument(
        "-g", "--generation-tokens", type=_positive, default=128, metavar="N", help="tokens to generate"
    )
    parser.add_argument("-b", "--batch-size", type=_positive, default=1, metavar="N", help="sequences at once")
    parser.add_argument("-n", "--num-trials", type=_positive, default=5, metavar="N", help="timed runs")


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="directory of an MLX checkpoint")
    parser.add_argument("--gpu", default=_GPU, metavar="NAME", help="Metal's name of the Apple GPU to plan for")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _truth(text: str) -> bool:
    truths = {"t": True, "true": True, "f": False, "false": False}
    if text.lower() not in truths:
        raise argparse.ArgumentTypeError(f"{text!r} is neither T nor F")
    return truths[text.lower()]


def _transformers() -> Any:
    """The package, whose progress bars are for people."""
    transformers = require("transformers")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


# Convert


def convert(arguments: argparse.Namespace) -> None:
    """Writes a Transformers model, or a GGUF file, as an MLX checkpoint, quantized with -q."""
    _check_conversion(arguments)
    target = Path(arguments.mlx_path)
    if not is_vacant(target):
        raise FileExistsError(f"{target} already exists; choose another --mlx-path or remove it")
    model, tokenizer = _read_source(arguments)
    report = QuantizationReport() if arguments.report or arguments.plot else None
    if arguments.quantize:
        quantize_model(
            model,
            arguments.q_group_size,
            arguments.q_bits,
            arguments.q_mode,
            arguments.quant_predicate,
            report.add if report else None,
        )
    save_checkpoint(model, target, tokenizer)
    summary = _Summary.read(target)
    print(f"{target}: {summary.headline()}")
    if report is not None:
        print(f"relative error of the quantized weights: {report.relative_error:.2%}")
        if arguments.report:
            Path(arguments.report).write_text(report.table() + "\n", encoding="utf-8")
        if arguments.plot:
            report.plot(arguments.plot)
    _note(_peak_memory())


def _check_conversion(arguments: argparse.Namespace) -> None:
    """Looks at all that can be wrong with the flags before anything is loaded."""
    if not arguments.quantize:
        given = [
            flag
            for flag, value in (
                ("--q-bits", arguments.q_bits),
                ("--q-group-size", arguments.q_group_size),
                ("--quant-predicate", arguments.quant_predicate),
                ("--report", arguments.report),
                ("--plot", arguments.plot),
            )
            if value is not None
        ]
        if given:
            raise _UsageError(f"{', '.join(given)} without -q, which quantizes")
    try:
        complete_format(arguments.q_group_size, arguments.q_bits, arguments.q_mode)
    except ValueError as error:
        raise _UsageError(str(error)) from error
    if arguments.quant_predicate and (arguments.q_mode != "affine" or arguments.q_bits is not None):
        raise _UsageError(f"--quant-predicate {arguments.quant_predicate} decides the bits, of mode affine")
    if arguments.plot:
        if Path(arguments.plot).suffix not in _PLOTS:
            raise _UsageError(f"--plot {arguments.plot} should end with one of {', '.join(_PLOTS)}")
        require("matplotlib", "plot")


def _read_source(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in floating point and its tokenizer."""
    transformers = _transformers()
    source, gguf = arguments.hf_path, arguments.gguf_file
    if gguf is None and source.endswith(".gguf"):
        source, gguf = str(Path(source).parent), Path(source).name
    is_hub_id = source.count("/") <= 1 and not source.startswith((".", "~", "/")) and gguf is None
    if not Path(source).is_dir() and not is_hub_id:
        raise FileNotFoundError(f"there is no directory {source}")
    options: dict[str, Any] = {"dtype": arguments.dtype or "auto"}
    files: dict[str, Any] = {}
    if gguf is not None:
        if not (Path(source) / gguf).is_file():
            raise FileNotFoundError(f"there is no file {gguf} in {source}")
        require("gguf", "cli")
        files = {"gguf_file": gguf}
        dtype = getattr(torch, arguments.dtype or "bfloat16")
        options = {"dtype": dtype, "quantization_config": transformers.GgufConfig(dequantize=True)}
    elif Path(source).is_dir():
        _check_float(_read_config(Path(source)), source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **files)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **files, **options)
    return model.eval(), tokenizer


def _check_float(config: Mapping[str, Any], source: str) -> None:
    if find_record(config) is not None:
        raise ValueError(f"{source} is a quantized MLX checkpoint already; convert the original")
    if (method := other_method(config)) is not None:
        raise ValueError(f"{source} is quantized already, by {method!r}; convert the original")


# Generate, perplexity, benchmark


def generate(arguments: argparse.Namespace) -> None:
    """Answers a prompt, as the text comes; figures about the run go to stderr."""
    model, tokenizer = _load(arguments)
    from transformers import TextStreamer

    way = _prepare(model)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    tokens = _encode(tokenizer, prompt, arguments).to(arguments.device)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    streamer = _Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    options = {"max_new_tokens": arguments.max_tokens, "streamer": streamer, **_sampling(arguments)}
    _run_generate(model, tokens, options)
    if arguments.verbose:
        _note("=" * 10)
        _note(f"Prompt: {tokens.shape[1]} tokens, {tokens.shape[1] / streamer.prompt_seconds:.3f} tokens-per-sec")
        _note(f"Generation: {streamer.count} tokens, {streamer.tokens_per_second:.3f} tokens-per-sec")
        _note(f"Decoder: {way}")
        _note(_peak_memory())


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, arguments: argparse.Namespace) -> Tensor:
    """The prompt's tokens [1, length]."""
    if tokenizer.chat_template is None or arguments.ignore_chat_template:
        if arguments.system_prompt is not None:
            raise _UsageError("--system-prompt needs a model with a chat template, and that it is not ignored")
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        system = [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt else []
        messages = [*system, {"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    if tokens.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    return tokens


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of Transformers' generate; None takes back what the checkpoint recommends."""
    if arguments.temp == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    return {
        "do_sample": True,
        "temperature": arguments.temp,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "min_p": arguments.min_p or None,
    }


def perplexity(arguments: argparse.Namespace) -> None:
    """Measures how well a model predicts a text: exp of the mean negative log-likelihood of its tokens.

    The text is cut into sequences, of which a remainder is left out. Each begins with the token that the tokenizer puts
    in front of a text, if it does.
    """
    from_stdin = arguments.data_path == "-"
    text = sys.stdin.read() if from_stdin else Path(arguments.data_path).read_text(encoding="utf-8")
    model, tokenizer = _load(arguments)
    sequences = _sequences(tokenizer, text, arguments.sequence_length)[: max(arguments.num_samples, 0) or None]
    start = time.perf_counter()
    losses = torch.cat(
        [
            _token_losses(model, batch.to(arguments.device)).flatten()
            for batch in _progress(list(sequences.split(arguments.batch_size)), "Perplexity")
        ]
    )
    seconds = time.perf_counter() - start
    mean = losses.mean().item()
    error = math.exp(mean) * losses.std().item() / math.sqrt(losses.numel())
    print(f"Perplexity: {math.exp(mean):.3f} ± {error:.3f}")
    _note(f"{losses.numel()} tokens in {len(sequences)} sequences, {losses.numel() / seconds:.1f} tokens-per-sec")
    _note(_peak_memory())


def _sequences(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """The text's tokens [sequences, length]."""
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    first = tokens[:1] if len(tokens) and tokens[0].item() == tokenizer.bos_token_id else tokens[:0]
    body, step = tokens[len(first) :], length - len(first)
    count = len(body) // step if step > 0 else 0
    if count == 0 or length < 2:
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
    model, _ = _load(arguments, with_tokenizer=False)
    way = _prepare(model)
    shape = (arguments.batch_size, arguments.prompt_tokens)
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, shape, device=arguments.device)
    count = arguments.generation_tokens
    prompt_rates, rates = [], []
    _note(f"{_peak_memory()} after loading; decoder: {way}")
    for trial in _progress(list(range(arguments.num_trials + 1)), "Timing"):
        clock = _Clock()
        new = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "streamer": clock}
        _run_generate(model, tokens, new)
        if trial == 0:  # warms up
            continue
        prompt_rates.append(tokens.numel() / clock.prompt_seconds)
        rates.append(arguments.batch_size * clock.tokens_per_second)
        print(f"Trial {trial}: prompt_tps={prompt_rates[-1]:.3f}, generation_tps={rates[-1]:.3f}", flush=True)
    print(f"Medians: prompt_tps={statistics.median(prompt_rates):.3f}, generation_tps={statistics.median(rates):.3f}")
    _note(_peak_memory())


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
    def tokens_per_second(self) -> float:
        """After the first token; NaN if there is no other one."""
        return (self.count - 1) / (self._times[-1] - self._times[1]) if self.count > 1 else math.nan


def _load(
    arguments: argparse.Namespace, with_tokenizer: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    directory = Path(arguments.model)
    _read_mlx_config(directory)
    transformers = _transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory) if with_tokenizer else None
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return load_checkpoint(directory, arguments.device, dtype), tokenizer


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
    kernels = {format_name(**each.format): _kernels(each, arguments.gpu) for each in summary.quantized}
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


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    config = read_config(directory)
    if config is None:
        raise FileNotFoundError(f"{directory} has no config.json and so is no checkpoint")
    return config


def _read_mlx_config(directory: Path) -> dict[str, Any]:
    config = _read_config(directory)
    if (method := other_method(config)) is not None:
        raise ValueError(f"{directory} is quantized by {method!r} and no MLX checkpoint")
    return config


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
        config = _read_mlx_config(directory)
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
                format = _format_of(path, columns.get(path), find_record(config) or {}, stored)
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


def _format_of(
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


# name -> (what it does, what describes its arguments, one line of help)
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], Callable[[argparse.ArgumentParser], None], str]] = {
    "convert": (convert, _convert_arguments, "write a model as an MLX checkpoint, quantized or not"),
    "generate": (generate, _generate_arguments, "answer a prompt"),
    "perplexity": (perplexity, _perplexity_arguments, "measure how well a model predicts a text"),
    "benchmark": (benchmark, _benchmark_arguments, "time prompts and generation"),
    "info": (info, _info_arguments, "describe a checkpoint without loading it"),
}
