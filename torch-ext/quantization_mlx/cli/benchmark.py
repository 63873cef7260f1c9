"""The command `benchmark`."""

import argparse
import statistics
from collections.abc import Mapping

import torch

from ..optional import progress
from .models import load_model
from .run import Clock, cache_options, check_cache, note, peak_memory, prepare, run_generate


def run(arguments: argparse.Namespace) -> None:
    """Times prompts of random tokens, and greedy generation after them."""
    check_cache(arguments)
    model = load_model(arguments)
    way = prepare(model)
    cache_options(model, arguments)  # whatever it raises, before the first trial
    shape = (arguments.batch_size, arguments.prompt_tokens)
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, shape, device=arguments.device)
    count = arguments.generation_tokens
    rates: dict[str, list[float]] = {"prompt_tps": [], "generation_tps": []}
    note(f"{peak_memory()} after loading; decoder: {way}")
    for trial in progress(list(range(arguments.num_trials + 1)), "Timing"):
        clock = Clock()
        new = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "streamer": clock}
        run_generate(model, tokens, {**new, **cache_options(model, arguments)})
        if trial == 0:  # warms up
            continue
        rates["prompt_tps"].append(tokens.numel() / clock.prompt_seconds)
        if clock.tokens_per_second is not None:
            rates["generation_tps"].append(arguments.batch_size * clock.tokens_per_second)
        print(f"Trial {trial}: {_listed({name: values[-1] for name, values in rates.items() if values})}", flush=True)
    print(f"Medians: {_listed({name: statistics.median(values) for name, values in rates.items() if values})}")
    note(peak_memory())


def _listed(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={rate:.3f}" for name, rate in rates.items())
