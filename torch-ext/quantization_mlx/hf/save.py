"""Transformers models into MLX checkpoint directories.

A directory holds `config.json`, `model*.safetensors`, an index and the tokenizer's files. Quantized layers are stored
as `<path>.weight`, `<path>.scales` and, in mode "affine", `<path>.biases`; `config.json` has their format twice, as
"quantization" and as "quantization_config", with an entry for each layer that differs from the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.config import in_mlx_terms
from ..checkpoint.record import RECORDS
from ..checkpoint.write import distinct_tensors, write_directory
from ..families import family_of
from ..messages import listed, short_name
from ..nn.module import PackedModule, QuantizedModule
from . import compat
from .experts import split_experts, stored_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_checkpoint(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = 5 * 1024**3,
) -> None:
    """Writes `model` as an MLX checkpoint.

    Everything is written beside its final place first and then renamed, so a save that fails leaves an older checkpoint
    in `directory` as it was. Weight files of an older checkpoint are removed, other files are kept.

    Args:
        model: a Transformers model, quantized by `quantize_model` or not at all.
        directory: made if it does not exist.
        tokenizer: saved along if given.
        max_shard_bytes: weights beyond this size are split over several files.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: model has layers of `quantization_mlx.marlin`, which an MLX checkpoint cannot describe.
    """
    write_checkpoint(model, Path(directory), tokenizer, max_shard_bytes)


def write_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = 5 * 1024**3,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`save_checkpoint`, where a size may be a string such as "5GB", and the model's tensors may be given."""
    if marlin := [path for path, module in model.named_modules() if _is_of_marlin(module)]:
        raise ValueError(
            f"[save_checkpoint] layers are of Marlin's formats, which marlin.save_quantized writes: {listed(marlin)}"
        )
    tensors = family_of(model).stored_tensors(model, split_experts(model, distinct_tensors(model, state_dict)))
    records = {"config.json": _mlx_config(model)}
    write_directory(model, directory, tensors, lambda staged: records, "mlx", max_shard_size, tokenizer)


def config_record(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of `model` in Transformers' terms, without a record of quantization."""
    config = model.config.to_diff_dict()
    config.pop("_name_or_path", None)
    for part in (config, *config.values()):
        for name in RECORDS if isinstance(part, dict) else ():
            part.pop(name, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = short_name(model.dtype)
    config["tie_word_embeddings"] = bool(getattr(model.config, "tie_word_embeddings", False))
    return config


def _mlx_config(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of `model` in an MLX checkpoint."""
    compat.check("save_checkpoint")
    config = config_record(model)
    family, names_of = family_of(model), stored_paths(model)
    formats = {
        family.stored_name(model, stored): module.format
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for stored in names_of(path)
    }
    family.complete_config(config)
    return in_mlx_terms(config, formats, type(model.config))


def _is_of_marlin(module: Any) -> bool:
    return isinstance(module, PackedModule) and not isinstance(module, QuantizedModule)
