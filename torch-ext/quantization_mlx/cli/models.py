"""The models, tokenizers and texts that the command's flags name."""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.read import Checkpoint, has_tokenizer
from ..checkpoint.record import RECORDS, find_record, other_method
from ..convert.gguf import not_gguf
from ..hf import compat
from ..hf.load import load_checkpoint
from ..hf.peft import load_adapter
from ..optional import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, require
from ..quantization.model import dequantize_model
from .arguments import UsageError


def _transformers() -> Any:
    """The package, whose progress bars are for people."""
    transformers = compat.require("transformers")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


# Directories


def read_directory(directory: Path, hint: str = "") -> Checkpoint:
    """A checkpoint with a config.json. Raises FileNotFoundError if there is no such directory, which the hint then
    follows, or no config.json in it."""
    if directory.is_file():
        raise NotADirectoryError(f"{directory} is a file; a model is the directory that holds its config.json")
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}{hint}")
    checkpoint = Checkpoint.at(directory)
    if checkpoint.config is None:
        raise FileNotFoundError(f"{directory} has no config.json and so is no checkpoint")
    return checkpoint


def read_mlx_directory(directory: Path) -> Checkpoint:
    """`read_directory` of an MLX checkpoint, quantized or not."""
    checkpoint = read_directory(directory, "; models on the Hub are downloaded by convert")
    if (method := other_method(checkpoint.config)) is not None:
        raise ValueError(f"{directory} is quantized by {method!r} and no MLX checkpoint")
    return checkpoint


# What convert reads


def read_source(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in floating point and its tokenizer."""
    if (file := gguf_file(arguments)) is not None:
        return _read_gguf(file, arguments)
    if arguments.dequantize:
        return _read_mlx(Path(arguments.hf_path), arguments)
    return _read_transformers(arguments.hf_path, arguments)


def gguf_file(arguments: argparse.Namespace) -> Path | None:
    """The GGUF file that the flags name; None if they name another source."""
    source, name = arguments.hf_path, arguments.gguf_file
    if Path(source).is_file() and name is not None:
        raise UsageError(f"--gguf-file {name} needs a directory as --hf-path, and {source} is a file")
    if name is None:
        if not source.endswith(".gguf") or Path(source).is_dir():
            return None
        source, name = str(Path(source).parent), Path(source).name
    if given := [flag for flag in ("dequantize", "trust_remote_code") if getattr(arguments, flag)]:
        raise UsageError(f"--{given[0].replace('_', '-')} has no effect on a GGUF file")
    directory = Path(source)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}; GGUF files are read from directories alone")
    file = directory / name
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {name} in {directory}")
    if (problem := not_gguf(file)) is not None:
        raise ValueError(problem)
    require("gguf", "cli")
    return file


def _read_gguf(file: Path, arguments: argparse.Namespace) -> tuple[Any, Any]:
    transformers = _transformers()
    dtype = getattr(torch, arguments.dtype or "bfloat16")
    options = {"dtype": dtype, "quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
    except Exception as error:  # the parser may raise anything on damaged files
        raise ValueError(f"{file} cannot be read, it may be cut off: {error}") from error
    return model.eval(), tokenizer


def _read_mlx(directory: Path, arguments: argparse.Namespace) -> tuple[Any, Any]:
    if read_mlx_directory(directory).record is None:
        raise ValueError(f"{directory} is not quantized, so there is nothing that -d could do")
    tokenizer = _tokenizer(directory, arguments)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return dequantize_model(_checkpoint(directory, "cpu", arguments), dtype), tokenizer


def _read_transformers(source: str, arguments: argparse.Namespace) -> tuple[Any, Any]:
    transformers = _transformers()
    if Path(source).exists():
        _check_float(read_directory(Path(source)).config, source)
    config = _config(source, arguments)
    if not Path(source).exists():
        _check_float({name: getattr(config, name, None) for name in RECORDS}, source)
    options = {"dtype": arguments.dtype or "auto", "trust_remote_code": arguments.trust_remote_code}
    tokenizer = _tokenizer(source, arguments)
    return transformers.AutoModelForCausalLM.from_pretrained(source, **options).eval(), tokenizer


def _check_float(config: Mapping[str, Any], source: str) -> None:
    if find_record(config) is not None:
        raise ValueError(f"{source} is a quantized MLX checkpoint already; convert the original, or use -d")
    if (method := other_method(config)) is not None:
        raise ValueError(f"{source} is quantized already, by {method!r}; convert the original")


def copy_code(source: str, target: Path) -> None:
    """Copies the Python files beside a model into the directory of its checkpoint, which needs them to be loaded."""
    for file in Path(source).glob("*.py") if Path(source).is_dir() else ():
        shutil.copy(file, target)


# What the other commands load


def load_tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerBase:
    _check_model(arguments)
    return _tokenizer(arguments.model, arguments)


def load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    _check_model(arguments)
    model = _checkpoint(Path(arguments.model), arguments.device, arguments)
    adapter = getattr(arguments, "adapter_path", None)
    return model if adapter is None else load_adapter(model, adapter)


def _check_model(arguments: argparse.Namespace) -> None:
    read_mlx_directory(Path(arguments.model))
    if arguments.device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps needs the GPU of a Mac, which is not here")


def _checkpoint(directory: Path, device: str, arguments: argparse.Namespace) -> PreTrainedModel:
    _transformers()
    _config(str(directory), arguments)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return load_checkpoint(directory, device, dtype, arguments.trust_remote_code)


def _tokenizer(source: str | Path, arguments: argparse.Namespace) -> PreTrainedTokenizerBase:
    if Path(source).is_dir() and not has_tokenizer(Path(source)):
        raise FileNotFoundError(f"{source} has no tokenizer; save one there by its save_pretrained")
    with _named_flag(source):
        return _transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)


def _config(source: str, arguments: argparse.Namespace) -> PreTrainedConfig:
    """The configuration of a causal language model, in a directory or on the Hub. Raises FileNotFoundError if there is
    neither a directory nor a model on the Hub of that name, and ValueError if it is a model of another kind, or of
    Python code that is not trusted."""
    transformers = _transformers()
    is_local = Path(source).exists()
    if not is_local and (source.count("/") > 1 or source.startswith((".", "~", "/"))):
        raise FileNotFoundError(f"there is no directory {source}")
    try:
        with _named_flag(source):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=arguments.trust_remote_code)
    except OSError as error:
        if is_local:
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise FileNotFoundError(
            f"there is no directory {source}, and no model of that name that can be reached on the Hub: {reason}"
        ) from error
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        names = ", ".join(config.architectures or ()) or "no architecture named"
        raise ValueError(
            f"{source} is a model of type {config.model_type!r} ({names}), which is no causal language model; "
            "only these are supported"
        )
    return config


@contextlib.contextmanager
def _named_flag(source: str | Path) -> Iterator[None]:
    """Lets an error about code that is not trusted name the command's flag instead of Transformers' argument."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{source} comes with Python code of its own, which --trust-remote-code lets run") from error


# Texts


def read_text(name: str, flag: str) -> str:
    """The text of a file in UTF-8, or of the standard input for "-". Raises ValueError if it is not UTF-8; the message
    names the flag."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {name} is not text in UTF-8: {error}") from error
