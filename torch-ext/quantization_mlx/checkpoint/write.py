"""Writing a checkpoint directory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..optional import PreTrainedModel, PreTrainedTokenizerBase, progress, require
from .staging import staged


def write_directory(
    model: PreTrainedModel,
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    records: Callable[[Path], Mapping[str, Mapping[str, Any]]],
    format: str,
    max_shard_size: int | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes tensors, JSON files and what else belongs to `model` into a `staged` directory.

    Args:
        tensors: by the names that they are stored under.
        records: returns what the JSON files hold, by their names, config.json among them; is called with the directory
            in which everything is gathered, for what else it may put there.
        format: what the weight files say that their format is.
        max_shard_size: tensors beyond this size are split over several files; in bytes, or a string such as "5GB".
    """
    with staged(directory) as scratch:
        write_weights(scratch, _shards(tensors, max_shard_size), format)
        for name, record in records(scratch).items():
            write_json(scratch / name, record)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)


def distinct_tensors(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The model's tensors under their first names: tied ones are stored once, as MLX does."""
    tensors = model.state_dict() if state_dict is None else state_dict
    return {name: tensors[name].detach() for name, first in first_names(model).items() if name == first}


def first_names(model: nn.Module) -> dict[str, str]:
    """By each name of each of the model's tensors, the first name of the same one."""
    first: dict[torch.Tensor, str] = {}
    return {name: first.setdefault(tensor, name) for name, tensor in model.state_dict(keep_vars=True).items()}


def _shards(
    tensors: Mapping[str, torch.Tensor], max_shard_size: int | str
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    split = require("huggingface_hub").split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in progress(list(split.filename_to_tensors.items()), "Writing"):
        yield file, {name: tensors[name].cpu().contiguous() for name in names}


def write_weights(directory: Path, shards: Iterable[tuple[str, dict[str, torch.Tensor]]], format: str) -> None:
    """Writes weight files, given as their names and tensors, one after the other, and their index."""
    save_file = require("safetensors.torch").save_file
    weight_map: dict[str, str] = {}
    total_size = 0
    for file, tensors in shards:
        save_file(tensors, directory / file, metadata={"format": format})
        weight_map.update(dict.fromkeys(tensors, file))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
