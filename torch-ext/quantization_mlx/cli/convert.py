"""The command `convert`."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.staging import is_vacant
from ..convert.gguf import convert_gguf_checkpoint
from ..formats import complete_format
from ..hf.save import save_checkpoint
from ..messages import listed, short_name
from ..optional import PreTrainedModel, require
from ..quantization.model import quantize_model
from ..quantization.report import QuantizationReport
from .arguments import PLOTS, UsageError, check_output_directory, check_output_file, refuse
from .info import Summary
from .models import copy_code, gguf_file, read_source
from .run import note, peak_memory

_FEW = {"group_size": 32, "bits": 8}  # of layers whose codes --lossless cannot keep


def run(arguments: argparse.Namespace) -> None:
    """Writes a Transformers model, or a GGUF file, as an MLX checkpoint, quantized with -q; -d does the reverse."""
    target = Path(arguments.mlx_path)
    _check_conversion(arguments, target)
    if arguments.lossless:
        _keep_codes(arguments, target)
        return
    model, tokenizer = read_source(arguments)
    with_errors = not (arguments.report is None and arguments.plot is None)
    report = QuantizationReport(with_errors)
    if arguments.quantize:
        _quantize(model, arguments, report)
    save_checkpoint(model, target, tokenizer)
    if arguments.trust_remote_code:
        copy_code(arguments.hf_path, target)
    summary = Summary.read(target)
    print(f"{target}: {summary.headline()}")
    if report.skipped:
        print(f"left in floating point: {report.skipped_summary()}" + ("" if with_errors else "; --report names them"))
    if with_errors:
        print(f"relative error of the quantized weights: {report.relative_error:.2%}")
        if arguments.report is not None:
            Path(arguments.report).write_text(report.table() + "\n", encoding="utf-8")
        if arguments.plot is not None:
            report.plot(arguments.plot)
    note(peak_memory())


def _keep_codes(arguments: argparse.Namespace, target: Path) -> None:
    """Writes a GGUF file as an MLX checkpoint with the same codes."""
    if (file := gguf_file(arguments)) is None:
        raise UsageError(f"--lossless keeps the codes of GGUF files, and {arguments.hf_path} is none")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    requantize = _requested_format(arguments) if arguments.quantize else None
    report = convert_gguf_checkpoint(file, target, dtype, requantize)
    print(f"{target}: {Summary.read(target).headline()}")
    kept = len(report.formats) - len(report.requantized)
    print(f"{kept} layers have the codes of the file, with scales in {short_name(report.dtype)}")
    if report.rounding:
        print(f"their scales and biases are rounded, which moves a weight by up to {report.rounding:.1e} steps")
    if report.rounded:
        print(f"rounded without being quantized: {listed(report.rounded)}")
    if report.requantized:
        error = max(report.requantized.values())
        print(f"quantized anew, with relative errors up to {error:.2%}: {listed(list(report.requantized))}")
    elif report.lossless:
        print("lossless")
    note(peak_memory())


def _quantize(model: PreTrainedModel, arguments: argparse.Namespace, report: QuantizationReport) -> None:
    quantized: list[str] = []
    format = _requested_format(arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\[quantize_model\] .* in floating point")  # the output has it in a line
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
    mode, group_size, bits = arguments.q_mode or "affine", arguments.q_group_size, arguments.q_bits
    if arguments.lossless and mode == "affine":  # for the few layers that a file has in more bits than others
        group_size = _FEW["group_size"] if group_size is None else group_size
        bits = _FEW["bits"] if bits is None else bits
    return complete_format(group_size, bits, mode)


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
    if arguments.lossless:
        others = {flag: quantizing[flag] for flag in ("--quant-predicate", "--report", "--plot")}
        refuse([("-d", arguments.dequantize), *others.items()], "with --lossless, which keeps the codes of a GGUF file")
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
