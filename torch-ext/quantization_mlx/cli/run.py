"""What the commands that run a model share."""

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor

from ..hf.decoder import prepare_for_generation
from ..hf.quantized_cache import quantized_cache
from ..messages import short_name
from ..optional import PreTrainedModel
from .arguments import KV_GROUP_SIZE, KV_STARTS, refuse


def note(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)


class Clock:
    """A streamer that notes when tokens come and hands them on to another one."""

    def __init__(self, streamer: Any = None) -> None:
        self._streamer = streamer
        self._times: list[float] = []  # when the prompt was put, then each token

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


def check_cache(arguments: argparse.Namespace) -> None:
    """Raises UsageError for flags of the cache that have no effect, or none together."""
    if arguments.kv_bits is None:
        given = [("--kv-group-size", arguments.kv_group_size), ("--quantized-kv-start", arguments.quantized_kv_start)]
        refuse(given, "without --kv-bits")
    else:
        refuse([("--max-kv-size", getattr(arguments, "max_kv_size", None))], "with --kv-bits")


def cache_options(model: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `generate` for a new cache that the flags ask for."""
    if arguments.kv_bits is None:
        return {}
    group_size, start = arguments.kv_group_size, arguments.quantized_kv_start
    return quantized_cache(
        model,
        bits=arguments.kv_bits,
        group_size=KV_GROUP_SIZE if group_size is None else group_size,
        start=KV_STARTS[arguments.command] if start is None else start,
    )


def prepare(model: PreTrainedModel) -> str:
    """Makes generation fast where that is possible, and says in what way the decoder runs."""
    try:
        prepare_for_generation(model)
    except ValueError:  # an unknown decoder
        return "Transformers' own code"
    return "one op for all layers, of prepare_for_generation"


def run_generate(model: PreTrainedModel, tokens: Tensor, options: dict[str, Any]) -> None:
    if model.generation_config.pad_token_id is None:
        ends = model.generation_config.eos_token_id
        model.generation_config.pad_token_id = ends[0] if isinstance(ends, list) else ends

    def check(_: Tensor, scores: Tensor) -> Tensor:
        check_numbers(scores, model.dtype)
        return scores

    with torch.inference_mode():
        model.generate(tokens, attention_mask=torch.ones_like(tokens), logits_processor=[check], **options)


def check_numbers(logits: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if `logits`, of which excluded tokens may have -inf, are no numbers."""
    if not logits.max().isfinite():
        advice = "; its activations are too large for it, --dtype bfloat16 has their range"
        where = f"{short_name(dtype)}{advice if dtype == torch.float16 else ''}"
        raise ValueError(f"the model computes NaN or infinity in {where}")


def peak_memory() -> str:
    """A line about the memory of this process, weights in files that are mapped into it included."""
    try:
        import resource
    except ImportError:  # Windows has none
        return "Peak resident memory: unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"Peak resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.3f} GB"
