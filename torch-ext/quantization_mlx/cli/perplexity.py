"""The command `perplexity`."""

import argparse
import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from ..optional import PreTrainedModel, PreTrainedTokenizerBase, progress
from .models import load_model, load_tokenizer, read_text
from .run import check_numbers, note, peak_memory


def run(arguments: argparse.Namespace) -> None:
    """Measures how well a model predicts a text: exp of the mean negative log-likelihood of its tokens.

    The text is cut into sequences, of which a remainder is left out. Each begins with the token that the tokenizer puts
    in front of a text, if it does.
    """
    text = read_text(arguments.data_path, "--data-path")
    wanted = None if arguments.num_samples == -1 else arguments.num_samples
    sequences = _sequences(load_tokenizer(arguments), text, arguments.sequence_length)[:wanted]
    model = load_model(arguments)
    start = time.perf_counter()
    batches = progress(list(sequences.split(arguments.batch_size)), "Perplexity")
    losses = torch.cat([_token_losses(model, batch.to(arguments.device)).flatten() for batch in batches])
    seconds = time.perf_counter() - start
    mean = losses.mean().item()
    spread = losses.std().item() if losses.numel() > 1 else math.inf  # unknown from one token
    print(f"Perplexity: {math.exp(mean):.3f} ± {math.exp(mean) * spread / math.sqrt(losses.numel()):.3f}")
    note(f"{losses.numel()} tokens in {len(sequences)} sequences, {losses.numel() / seconds:.1f} tokens-per-sec")
    note(peak_memory())


def _sequences(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """The text's tokens [sequences, length]."""
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    first = tokens[:1] if len(tokens) and tokens[0].item() == tokenizer.bos_token_id else tokens[:0]
    body, step = tokens[len(first) :], length - len(first)
    count = len(body) // step if step > 0 else 0
    if count == 0:
        raise ValueError(f"a text of {len(tokens)} tokens has no sequence of {length}; see --sequence-length")
    body = body[: count * step].view(count, step)
    return torch.cat([first.expand(count, -1), body], 1)


@torch.inference_mode()
def _token_losses(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """The negative log-likelihoods [batch, length - 1] of each token after the first of sequences [batch, length]."""
    logits = model(sequences[:, :-1], use_cache=False).logits
    check_numbers(logits, model.dtype)
    # One sequence at a time in float32: with large vocabularies, logits take more memory than all else.
    rows = zip(logits, sequences[:, 1:], strict=True)
    return torch.stack([F.cross_entropy(row.float(), targets, reduction="none").cpu() for row, targets in rows])
