"""What may be typed after `quantization-mlx`: its commands' flags, and the flags of mlx_lm that it does not have."""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..formats import MLX_MODES
from ..hf.bounded_cache import KEPT
from ..hf.quantized_cache import BITS
from ..quantization.recipes import RECIPES

PROGRAM = "quantization-mlx"
GPU = "applegpu_g16s"
PLOTS = (".png", ".svg", ".pdf")
SAMPLING = ("top_p", "top_k", "min_p")  # flags that restrict which tokens are sampled
KV_GROUP_SIZE = 64  # as in mlx_lm
KV_STARTS = {"generate": 5000, "benchmark": 0}  # as in mlx_lm, whose benchmark has no such flag
_DTYPES = ("float32", "float16", "bfloat16")
_DEVICES = ("cpu", "mps")

# name -> (what runs it, one line of help)
Commands = Mapping[str, tuple[Callable[[argparse.Namespace], None], str]]
AddFlag = Callable[..., argparse.Action]  # `add_argument` of a parser
T = TypeVar("T")


class UsageError(Exception):
    """Arguments that are right one by one and make no sense together."""


# Flags and commands of mlx_lm that are not supported -> what to do instead.

_QUANTIZED_ACTIVATIONS = "activations stay in --dtype"
_WHOLE_PROMPT = "a prompt is processed as a whole"
_ONE_MODEL = "there is no speculative decoding"
_NOT_HERE: dict[str, dict[tuple[str, ...], str]] = {
    "convert": {("--upload-repo",): "convert writes a directory; upload it with: hf upload REPO DIR"},
    "generate": {
        ("--image",): "prompts are text",
        ("--prefill-response",): "a reply begins with the model's own first token",
        ("--xtc-probability",): "sampling has --temp, --top-p, --top-k and --min-p",
        ("--xtc-threshold",): "sampling has --temp, --top-p, --top-k and --min-p",
        ("--min-tokens-to-keep",): "--min-p always keeps the likeliest token",
        ("--use-default-chat-template",): "a tokenizer's own template is used; without one, the prompt is bare",
        ("--prefill-step-size",): _WHOLE_PROMPT,
        ("--prompt-cache-file",): "each run processes its whole prompt",
        ("-qa", "--quantize-activations"): _QUANTIZED_ACTIVATIONS,
        ("--draft-model",): _ONE_MODEL,
        ("--num-draft-tokens",): _ONE_MODEL,
    },
    "perplexity": {("--seed",): "sequences are taken in the order of the text, none at random"},
    "benchmark": {
        ("--pipeline",): "a model runs on one device",
        ("-qa", "--quantize-activations"): _QUANTIZED_ACTIVATIONS,
        ("--prefill-step-size",): _WHOLE_PROMPT,
        ("--delay",): "trials follow each other at once",
    },
}
_SERVED = "`transformers serve` runs converted models; see docs/serve.md"
_QUANTIZES = "checkpoints that mlx_lm writes with it are read here; see also docs/convert.md"
_HUB = "the Hub's own command does that: hf"
COMMANDS_NOT_HERE = {
    "awq": _QUANTIZES,
    "cache_prompt": "each run processes its whole prompt",
    "chat": _SERVED,
    "dwq": _QUANTIZES,
    "dynamic_quant": _QUANTIZES,
    "evaluate": "perplexity measures how well a model predicts a text",
    "fuse": "PEFT merges adapters; see docs/train.md",
    "gptq": _QUANTIZES,
    "lora": "PEFT trains adapters; see docs/train.md",
    "manage": _HUB,
    "server": _SERVED,
    "share": "a checkpoint is a directory; copy it",
    "upload": _HUB,
}


class _NotHere(argparse.Action):
    """A flag of mlx_lm, which the help leaves out and whose use is an error."""

    def __init__(self, option_strings: list[str], dest: str, advice: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs="*", help=argparse.SUPPRESS)
        self.advice = advice

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"{self.option_strings[-1]} of mlx_lm is not supported: {self.advice}")


class _Version(argparse.Action):
    """Prints the versions that a report of a fault should name."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        others = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers"))
        print(f"{PROGRAM} {_version(PROGRAM)} ({others})")
        parser.exit()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# The parser


class _Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


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


def parser_of(commands: Commands) -> argparse.ArgumentParser:
    """The parser of the whole command, with one subparser for each of its commands."""
    parser = _Parser(prog=PROGRAM, description="MLX-format quantized models in PyTorch.", formatter_class=_Formatter)
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, text) in commands.items():
        subparser = subparsers.add_parser(name, help=text, description=run.__doc__, formatter_class=_Formatter)
        subparser.set_defaults(run=run)
        _ARGUMENTS[name](subparser.add_argument)
        for flags, advice in _NOT_HERE.get(name, {}).items():
            subparser.add_argument(*flags, action=_NotHere, advice=advice)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _model_arguments(add: AddFlag) -> None:
    add("--model", required=True, metavar="DIR", help="directory of an MLX checkpoint")
    add("--device", choices=_DEVICES, default="cpu", help="where the model runs")
    add("--dtype", choices=_DTYPES, help="of activations; as stored if left out")
    _remote_code_argument(add)


def _remote_code_argument(add: AddFlag) -> None:
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _adapter_argument(add: AddFlag) -> None:
    add("--adapter-path", metavar="DIR", help="directory of a LoRA adapter that PEFT saved")


def _convert_arguments(add: AddFlag) -> None:
    add(
        "--hf-path",
        "--model",
        dest="hf_path",
        required=True,
        metavar="PATH",
        help="directory of a Transformers model, its id on the Hub, or a GGUF file; with -d, of an MLX checkpoint",
    )
    add("--gguf-file", metavar="NAME", help="GGUF file inside of --hf-path to read")
    add("--mlx-path", default="mlx_model", metavar="DIR", help="directory to write, not there yet")
    add("-q", "--quantize", action="store_true", help="quantize linear layers and embeddings")
    add("--q-bits", type=int, metavar="BITS", help=f"bits of a code ({_defaults('bits')})")
    add("--q-group-size", type=int, metavar="SIZE", help=f"weights that share a scale ({_defaults('group_sizes')})")
    add("--q-mode", choices=list(MLX_MODES), help="kind of the format (default: affine)")
    add("--quant-predicate", choices=list(RECIPES), help="recipe that mixes two numbers of bits")
    add(
        "--lossless",
        action="store_true",
        help="keep the codes of a GGUF file; with -q, tensors that MLX's groups cannot hold are quantized anew (then "
        "default: affine 8 bits, groups of 32)",
    )
    add("-d", "--dequantize", action="store_true", help="make an MLX checkpoint floating-point again")
    add(
        "--dtype",
        choices=_DTYPES,
        help="of what stays floating point; as stored, GGUF: bfloat16, or exact if --lossless",
    )
    add("--report", metavar="FILE", help="write error of each layer, and what stays floating point, in Markdown")
    add("--plot", metavar="FILE", help="draw the error of each layer, as .png, .svg or .pdf")
    _remote_code_argument(add)


def _defaults(option: str) -> str:
    """The default of each mode, of its `group_sizes` or of its `bits`."""
    return "default: " + ", ".join(f"{name} {getattr(mode, option)[0]}" for name, mode in MLX_MODES.items())


def _generate_arguments(add: AddFlag) -> None:
    _model_arguments(add)
    _adapter_argument(add)
    add("-p", "--prompt", default="hello", metavar="TEXT", help=r"what to answer, with \n and \t; - reads stdin")
    add("--system-prompt", metavar="TEXT", help="system message of the chat template")
    add("--ignore-chat-template", action="store_true", help="continue the bare prompt")
    add("--chat-template-config", type=_json_object, metavar="JSON", help="variables of the chat template, an object")
    add("-m", "--max-tokens", type=_positive, default=100, metavar="N", help="tokens at most")
    add("--extra-eos-token", nargs="+", metavar="TOKEN", help="tokens that end the answer, too")
    add("--max-kv-size", type=_cache_size, metavar="N", help="positions that the cache keeps; all if left out")
    _cache_arguments(add, "generate")
    add("--temp", type=_temperature, default=0.0, help="temperature; 0 takes the likeliest token")
    add("--top-p", type=_share, help="sample from tokens of this joint probability (default: 1.0)")
    add("--top-k", type=_count, help="sample from that many tokens (default: 0, from all)")
    add("--min-p", type=_fraction, help="least probability relative to the likeliest token's (default: 0.0)")
    add("--seed", type=int, metavar="N", help="of the random numbers")
    add("--verbose", type=_truth, default=True, metavar="T|F", help="figures about the run on stderr")


def _cache_arguments(add: AddFlag, command: str) -> None:
    """Flags that are not given are None, so that those without effect can be refused."""
    add(
        "--kv-bits", type=int, choices=BITS, help="bits to which keys and values are quantized; as they are if left out"
    )
    add(
        "--kv-group-size",
        type=_positive,
        metavar="SIZE",
        help=f"keys or values that share a scale (default: {KV_GROUP_SIZE})",
    )
    add(
        "--quantized-kv-start",
        type=_count,
        metavar="N",
        help=f"positions from which on they are quantized (default: {KV_STARTS[command]})",
    )


def _perplexity_arguments(add: AddFlag) -> None:
    _model_arguments(add)
    _adapter_argument(add)
    add("--data-path", required=True, metavar="FILE", help="text file in UTF-8; - reads stdin")
    add("--sequence-length", type=_length, default=512, metavar="N", help="tokens of a sequence")
    add("--num-samples", type=_samples, default=-1, metavar="N", help="sequences to use; -1: all")
    add("--batch-size", type=_positive, default=1, metavar="N", help="sequences at once")


def _benchmark_arguments(add: AddFlag) -> None:
    _model_arguments(add)
    add("-p", "--prompt-tokens", type=_positive, default=512, metavar="N", help="length of the prompt")
    add(
        "-g", "--generation-tokens", type=_positive, default=128, metavar="N", help="tokens to generate; 1: prompt only"
    )
    add("-b", "--batch-size", type=_positive, default=1, metavar="N", help="sequences at once")
    add("-n", "--num-trials", type=_positive, default=5, metavar="N", help="timed runs")
    _cache_arguments(add, "benchmark")


def _info_arguments(add: AddFlag) -> None:
    add("--model", required=True, metavar="DIR", help="directory of an MLX checkpoint")
    add("--gpu", metavar="NAME", help=f"Metal's name of the Apple GPU to plan for (default: {GPU})")
    add("--json", action="store_true", help="print JSON")


_ARGUMENTS = {
    "convert": _convert_arguments,
    "generate": _generate_arguments,
    "perplexity": _perplexity_arguments,
    "benchmark": _benchmark_arguments,
    "info": _info_arguments,
}


# Values of single flags


def _value(convert: Callable[[str], T], fits: Callable[[T], bool], wanted: str) -> Callable[[str], T]:
    """What argparse calls with a flag's text; the error of a text that does not fit says what is wanted."""

    def parse(text: str) -> T:
        with contextlib.suppress(ValueError):
            if fits(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


_TRUTHS = {"t": True, "true": True, "f": False, "false": False}

_positive = _value(int, lambda number: number >= 1, "a whole number of at least 1")
_count = _value(int, lambda number: number >= 0, "a whole number of at least 0")
_length = _value(int, lambda number: number >= 2, "a whole number of at least 2, of which the first is not predicted")
_samples = _value(int, lambda number: number >= 1 or number == -1, "a whole number of at least 1, or -1 for all")
_cache_size = _value(int, lambda number: number > KEPT, f"a whole number above {KEPT}, the first ones being kept")
_temperature = _value(float, lambda number: 0 <= number < math.inf, "a finite number of at least 0")
_share = _value(float, lambda number: 0 < number <= 1, "a number above 0 and at most 1")
_fraction = _value(float, lambda number: 0 <= number <= 1, "a number from 0 to 1")
_truth = _value(lambda text: _TRUTHS.get(text.lower()), lambda truth: truth is not None, "T or F")
_json_object = _value(json.loads, lambda value: isinstance(value, dict), "a JSON object")


# Flags together


def refuse(flags: Iterable[tuple[str, Any]], why: str) -> None:
    """Raises UsageError that names those of (flag, value) that are given: neither None nor False."""
    if given := [flag for flag, value in flags if value is not None and value is not False]:
        raise UsageError(f"{', '.join(given)} {why}")


def check_output_file(flag: str, name: str, made_later: Path) -> None:
    """Sees to it that a file can be written, also one in the directory `made_later`, before what it tells is computed.
    Raises OSError if it cannot; the message names the flag."""
    file = Path(name)
    if file.is_dir():
        raise IsADirectoryError(f"{flag} {name!r} is a directory; it takes the name of a file")
    if file.parent.resolve() == made_later.resolve():
        return
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{flag} {name}: there is no directory {file.parent}")
    existed = file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise OSError(f"{flag} {name} cannot be written: {error.strerror}") from error
    if not existed:
        file.unlink()


def check_output_directory(flag: str, directory: Path) -> None:
    """Sees to it that the first directory above `directory` that exists takes new ones. Raises OSError if it does not;
    the message names the flag."""
    place = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{flag} {directory}: {place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag} {directory} cannot be written: {place} is not writable")
