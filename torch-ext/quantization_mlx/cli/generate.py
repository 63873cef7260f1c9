"""The command `generate`."""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..hf.bounded_cache import bounded_cache
from ..optional import PreTrainedModel, PreTrainedTokenizerBase
from .arguments import SAMPLING, UsageError, refuse
from .models import load_model, load_tokenizer, read_text
from .run import Clock, cache_options, check_cache, note, peak_memory, prepare, run_generate


def run(arguments: argparse.Namespace) -> None:
    """Answers a prompt, as the text comes; figures about the run go to stderr."""
    _check_generation(arguments)
    tokenizer = load_tokenizer(arguments)
    extra = [_token_of(tokenizer, text) for text in arguments.extra_eos_token or ()]
    tokens = _encode(tokenizer, arguments).to(arguments.device)
    model = load_model(arguments)
    from transformers import TextStreamer

    way = prepare(model)
    _set_ends(model, tokenizer, extra)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    streamer = Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    options = {"max_new_tokens": arguments.max_tokens, "streamer": streamer, **_sampling(arguments)}
    if arguments.max_kv_size is not None:
        options.update(bounded_cache(model, arguments.max_kv_size))
    options.update(cache_options(model, arguments))
    run_generate(model, tokens, options)
    if arguments.verbose:
        note("=" * 10)
        note(f"Prompt: {tokens.shape[1]} tokens, {tokens.shape[1] / streamer.prompt_seconds:.3f} tokens-per-sec")
        rate = "" if streamer.tokens_per_second is None else f", {streamer.tokens_per_second:.3f} tokens-per-sec"
        note(f"Generation: {streamer.count} tokens{rate}")
        note(f"Decoder: {way}")
        note(peak_memory())


def _check_generation(arguments: argparse.Namespace) -> None:
    if arguments.temp == 0:
        sampling = [(f"--{name.replace('_', '-')}", getattr(arguments, name)) for name in (*SAMPLING, "seed")]
        refuse(sampling, "without --temp above 0: otherwise the likeliest token is taken")
    if arguments.ignore_chat_template:
        refuse(_template_flags(arguments), "with --ignore-chat-template")
    check_cache(arguments)


def _template_flags(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    return [("--system-prompt", arguments.system_prompt), ("--chat-template-config", arguments.chat_template_config)]


# Options of apply_chat_template that decide the type of its result.
_RESULT = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def _encode(tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> Tensor:
    r"""The prompt's tokens [1, length]; typed, \n and \t stand for what a shell makes hard to type."""
    typed = arguments.prompt.replace("\\n", "\n").replace("\\t", "\t")
    prompt = read_text("-", "--prompt") if typed == "-" else typed
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
        note("neither the checkpoint nor its tokenizer names a token that ends a text; --extra-eos-token does")


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
