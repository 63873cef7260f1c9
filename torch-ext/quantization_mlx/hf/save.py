"""Transformers models into MLX checkpoint directories.

A directory holds `config.json`, `model*.safetensors`, an index and the tokenizer's files. Quantized layers are stored
as `<path>.weight`, `<path>.scales` and, in mode "affine", `<path>.biases`; `config.json` has their format twice, as
"quantization" and as "quantization_config", with an entry for each layer that differs from the default.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.config import in_mlx_terms
from ..checkpoint.record import RECORDS
from ..checkpoint.write import distinct_tensors, write_directory
from ..families import family_of
from ..messages import listed, short_name
from ..nn.module import PackedModule, QuantizedModule
from ..optional import PreTrainedModel, PreTrainedTokenizerBase
from . import compat
from .experts import split_experts, stored_paths


def save_checkpoint(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int | str = 5 * 1024**3,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes `model` as an MLX checkpoint.

    Everything is written beside its final place first and then renamed, so a save that fails leaves an older checkpoint
    in `directory` as it was. Weight files of an older checkpoint are removed, other files are kept.

    Args:
        model: a Transformers model, quantized by `quantize_model` or not at all.
        directory: made if it does not exist.
        tokenizer: saved along if given.
        max_shard_bytes: weights beyond this size are split over several files; a number, or a string such as "5GB".
        state_dict: the model's tensors, if they are not those that it holds.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: model has layers of `quantization_mlx.marlin`, which an MLX checkpoint cannot describe.
    """
    packed = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedModule)]
    if marlin := [path for path, module in packed if not isinstance(module, QuantizedModule)]:
        raise ValueError(
            f"[save_checkpoint] layers are of Marlin's formats, which marlin.save_quantized writes: {listed(marlin)}"
        )
    tensors = family_of(model).stored_tensors(model, split_experts(model, distinct_tensors(model, state_dict)))
    records = {"config.json": _mlx_config(model)}
    write_directory(model, Path(directory), tensors, lambda staged: records, "mlx", max_shard_bytes, tokenizer)


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
