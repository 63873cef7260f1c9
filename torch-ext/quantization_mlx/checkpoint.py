"""Transformers models into and out of MLX checkpoint directories.

A directory holds `config.json`, `model*.safetensors`, an index and the tokenizer's files. Quantized layers are stored
as `<path>.weight`, `<path>.scales` and, in mode "affine", `<path>.biases`; `config.json` has their format twice, as
"quantization" and as "quantization_config", with an entry for each layer that differs from the default.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .modules import SUPPORTED, QuantizedEmbedding, QuantizedLinear, complete_format, row_scale
from .recipes import mixed_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Format = dict[str, Any]  # keyword arguments group_size, bits and mode of the quantized modules
Predicate = Callable[[str, nn.Module], "bool | Format"]
OnLayer = Callable[[str, torch.Tensor, Any], None]

_WEIGHT_FILES = "model*.safetensors"
_INDEX = "model.safetensors.index.json"
_RECORDS = ("quantization", "quantization_config")  # the names under which config.json has the format
_SHOWN_NAMES = 8  # as many tensor names as an error message lists


def quantize_model(
    model: nn.Module,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    predicate: Predicate | str | None = None,
    on_layer: OnLayer | None = None,
) -> nn.Module:
    """Quantizes the `nn.Linear` and `nn.Embedding` layers of `model` in place, one after the other, and returns it.

    Layers whose rows do not divide into groups, and subclasses of the two, which may compute something else, are left
    alone, and so is a layer that shares its weight with one; embeddings that scale their rows, as Gemma's do, are
    quantized. Layers that share a weight, as tied embeddings do, go on sharing one packed copy; the first decides for
    all.

    Args:
        model: any module; a layer by itself is not changed, its quantized form is returned.
        group_size, bits, mode: the format; what is None takes the mode's default.
        predicate: called with the path and the layer; a false value leaves the layer alone, a dict with any of
            group_size, bits and mode quantizes it in that format, and any other true value in the common one. The
            name of a mixed recipe, such as "mixed_4_6", stands for `mixed_recipe(name, model, group_size)`.
        on_layer: called with the path, the weight [..., rows, columns] and the quantized module of each layer, while
            both exist; a `QuantizationReport`'s `add` for example.

    Raises:
        TypeError: the predicate's dict has other keys.
        ValueError: the format or the recipe is not supported.
    """
    default = complete_format(group_size, bits, mode)
    if isinstance(predicate, str):
        if mode != "affine":
            raise ValueError(f"[quantize_model] the recipe {predicate!r} is for mode 'affine', not for {mode!r}")
        predicate = mixed_recipe(predicate, model, default["group_size"])

    def format_of(path: str, layer: nn.Module) -> Format | None:
        choice = True if predicate is None else predicate(path, layer)
        if not choice:
            return None
        chosen = complete_format(**{"mode": mode, **choice}) if isinstance(choice, Mapping) else default
        return chosen if layer.weight.shape[-1] % chosen["group_size"] == 0 else None

    return _replace_layers(model, format_of, _quantized, on_layer)


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
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the directory, because a rename cannot leave its file system.
    with tempfile.TemporaryDirectory(prefix=".save-", dir=directory) as scratch:
        staged = Path(scratch)
        weight_files = _write_weights(_distinct_tensors(model), staged, max_shard_bytes)
        _write_json(staged / "config.json", _config_record(model))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        _move_files(staged, directory)
    for file in directory.glob(_WEIGHT_FILES):
        if file.name not in weight_files:
            file.unlink()


def load_checkpoint(
    directory: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Reads an MLX checkpoint of a dense decoder (Llama and its relatives) as a Transformers model in eval mode.

    A layer is quantized if config.json has an entry for it that is not false, or else if its scales are stored. The
    index is not consulted: the tensors are those that the `model*.safetensors` files hold. The model is built without
    memory for its floating-point weights.

    Args:
        directory: holds config.json and the weights.
        device: where the model is put; the CPU if None.
        dtype: what floating-point tensors are converted to; None keeps them as they are stored.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ImportError: transformers or safetensors is not installed.
        ValueError: the checkpoint is of another kind, or lacks tensors, or has unknown ones, or ones of a wrong shape
            or dtype; the message names them.
    """
    transformers = _require("transformers")
    directory = Path(directory)
    stored_config = _read_config(directory)
    record = _quantization_record(directory, stored_config)
    tensors = _read_tensors(directory, torch.device(device or "cpu"), dtype)
    dtype = dtype or next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)

    config = transformers.AutoConfig.from_pretrained(directory)
    for name in _RECORDS:
        if hasattr(config, name):
            delattr(config, name)
    if "tie_word_embeddings" not in stored_config:  # MLX ties by default, Transformers does not
        config.tie_word_embeddings = not any(name.startswith("lm_head.") for name in tensors)

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    _replace_layers(
        model,
        lambda path, layer: _stored_format(path, layer, record, tensors),
        lambda layer, format: _shell(layer, format, dtype),
    )
    _restore_buffers(model, torch.device(device or "cpu"))
    _assign(model, tensors, directory)
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval()


def _require(name: str, extra: str = "transformers") -> Any:
    """Imports an optional package, which the extra has."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f'this needs the package {package}: pip install "quantization-mlx[{extra}]"') from error


def _progress(items: list[Any], what: str) -> Iterable[Any]:
    """`items` with a progress bar, where tqdm is installed, that appears after two seconds."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, delay=2, leave=False)


# Formats


def _entry_format(entry: Mapping[str, Any]) -> Format:
    """The format of an entry of config.json, which may have other keys and lack these."""
    return complete_format(entry.get("group_size"), entry.get("bits"), entry.get("mode") or "affine")


def _stored_format(
    path: str, layer: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Format | None:
    """The format of one layer of a checkpoint, None if it is not quantized."""
    entry = record.get(path)
    if isinstance(entry, Mapping):
        return _entry_format(entry)
    scales = tensors.get(f"{path}.scales")
    if entry is False or (scales is None and entry is None):
        return None
    weight = tensors.get(f"{path}.weight")
    if scales is None or weight is None:
        return _entry_format(record)
    # The shapes tell more than the default: mixed checkpoints exist that have no entry for their exceptions.
    columns = layer.weight.shape[-1]
    group_size, bits = columns // scales.shape[-1], weight.shape[-1] * 32 // columns
    if scales.is_floating_point():
        return {"group_size": group_size, "bits": bits, "mode": "affine"}
    modes = [mode for mode, known in SUPPORTED.items() if mode != "affine" and known == ((group_size,), (bits,))]
    return {"group_size": group_size, "bits": bits, "mode": modes[0]} if modes else _entry_format(record)


def _format_of(module: QuantizedLinear | QuantizedEmbedding) -> Format:
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


# Layers


def _quantized(layer: nn.Linear | nn.Embedding, format: Format) -> QuantizedLinear | QuantizedEmbedding:
    if isinstance(layer, nn.Linear):
        return QuantizedLinear.from_linear(layer, **format)
    return QuantizedEmbedding.from_embedding(layer, **format)


def _shell(
    layer: nn.Linear | nn.Embedding, format: Format, dtype: torch.dtype | None
) -> QuantizedLinear | QuantizedEmbedding:
    """A quantized layer of the same sizes that waits for its tensors."""
    if isinstance(layer, nn.Linear):
        has_bias = layer.bias is not None
        return QuantizedLinear(layer.in_features, layer.out_features, has_bias, **format, device="meta", dtype=dtype)
    sizes = (layer.num_embeddings, layer.embedding_dim)
    return QuantizedEmbedding(*sizes, **format, device="meta", dtype=dtype, scale=row_scale(layer))


def _replace_layers(
    model: nn.Module,
    format_of: Callable[[str, nn.Module], Format | None],
    convert: Callable[[Any, Format], QuantizedLinear | QuantizedEmbedding],
    on_layer: OnLayer | None = None,
) -> nn.Module:
    """Puts convert(layer, format) in the place of every layer that has a format; returns the model.

    All formats are settled before the first layer changes. A float weight is let go once its last layer is replaced.
    """
    holders: dict[int, list[str]] = {}  # the paths of all modules with a weight, by the weight's identity
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            holders.setdefault(id(weight), []).append(path)
    plan: list[tuple[list[str], Format]] = []
    for paths in holders.values():
        layers = [model.get_submodule(path) for path in paths]
        plain = all(type(layer) is nn.Linear or row_scale(layer) is not None for layer in layers)
        if plain and (format := format_of(paths[0], layers[0])) is not None:
            plan.append((paths, format))
    for paths, format in _progress(plan, "Quantizing"):
        layers = [model.get_submodule(path) for path in paths]  # that share this weight, or are one and the same
        replaced: dict[int, QuantizedLinear | QuantizedEmbedding] = {}
        for path, layer in zip(paths, layers, strict=True):
            if id(layer) not in replaced:
                twin = next(iter(replaced.values()), None)
                replaced[id(layer)] = convert(layer, format) if twin is None else _tied(layer, twin)
                if twin is None and on_layer is not None:
                    on_layer(path, layer.weight.detach(), replaced[id(layer)])
            if not path:
                return replaced[id(layer)]
            model.set_submodule(path, replaced[id(layer)])
    return model


def _tied(
    layer: nn.Linear | nn.Embedding, twin: QuantizedLinear | QuantizedEmbedding
) -> QuantizedLinear | QuantizedEmbedding:
    """`layer` on the packed weight of `twin`, which had the same floating-point weight."""
    tied = _shell(layer, _format_of(twin), layer.weight.dtype)
    tied.share(twin)
    if isinstance(tied, QuantizedLinear):
        tied.bias = layer.bias
    else:
        tied.follow_dtype(layer.weight)
    return tied.train(layer.training)


# Loading


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"[load_checkpoint] {directory} has no config.json")
    return json.loads(file.read_text(encoding="utf-8"))


def _quantization_record(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of formats in `config`, empty if nothing is quantized."""
    record = config.get("quantization") or config.get("quantization_config") or {}
    if "quant_method" in record:
        raise ValueError(
            f"[load_checkpoint] {directory} is quantized by {record['quant_method']!r}, which is not the MLX format"
        )
    if config.get("quantize_activations"):
        raise ValueError(f"[load_checkpoint] {directory} asks for quantized activations, which are not supported")
    return record


def _read_tensors(directory: Path, device: torch.device, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    safetensors_torch = _require("safetensors.torch")
    files = sorted(directory.glob(_WEIGHT_FILES))
    if not files:
        raise FileNotFoundError(f"[load_checkpoint] {directory} has no {_WEIGHT_FILES}")
    tensors: dict[str, torch.Tensor] = {}
    for file in _progress(files, "Reading"):
        shard = safetensors_torch.load_file(file, device=str(device))
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"[load_checkpoint] {file} repeats tensors of another file: {_listed(twice)}")
        tensors.update(shard)
    if dtype is None:
        return tensors
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes the buffers that no checkpoint stores, such as rotary frequencies, by the model's own initialisation."""
    for path, module in model.named_modules():
        lost = [name for name in module._non_persistent_buffers_set if getattr(module._buffers[name], "is_meta", False)]
        for name in lost:
            old = module._buffers[name]
            fill = torch.nan if old.is_floating_point() else 0
            module._buffers[name] = torch.full_like(old, fill, device=device)
        if lost:
            model._init_weights(module)
        if any(module._buffers[name].isnan().any() for name in lost):
            raise ValueError(f"[load_checkpoint] {path} ({type(module).__name__}) does not initialise {lost}")


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Puts the tensors into the model, which must want exactly these."""
    wanted: dict[torch.Tensor, list[str]] = {}  # several names where parameters are shared
    for name, placeholder in model.state_dict(keep_vars=True).items():
        wanted.setdefault(placeholder, []).append(name)
    # Whoever stores a tied tensor twice stores it under the later name, too; old checkpoints store rotary frequencies.
    names = {name for aliases in wanted.values() for name in aliases}
    unexpected = [name for name in tensors if name not in names and not name.endswith("rotary_emb.inv_freq")]
    missing = [aliases[0] for aliases in wanted.values() if aliases[0] not in tensors]
    wrong = [
        f"{aliases[0]} is {_described(tensors[aliases[0]])} and should be {_described(placeholder)}"
        for placeholder, aliases in wanted.items()
        if aliases[0] in tensors and not _fits(tensors[aliases[0]], placeholder)
    ]
    faults = [
        f"{fault}: {_listed(found)}"
        for fault, found in (("missing tensors", missing), ("unexpected tensors", unexpected), ("wrong tensors", wrong))
        if found
    ]
    if faults:
        raise ValueError(f"[load_checkpoint] {directory}: {'; '.join(faults)}")
    for placeholder, aliases in wanted.items():
        tensor = tensors[aliases[0]]
        if isinstance(placeholder, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=placeholder.requires_grad)
        for alias in aliases:
            path, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(path), attribute, tensor)


def _fits(tensor: torch.Tensor, placeholder: torch.Tensor) -> bool:
    same_kind = tensor.dtype == placeholder.dtype or (tensor.is_floating_point() and placeholder.is_floating_point())
    return same_kind and tensor.shape == placeholder.shape


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


# Saving


def _distinct_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under their first names: tied ones are stored once, as MLX does."""
    distinct: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        distinct.setdefault(tensor, name)
    return {name: tensor.detach() for tensor, name in distinct.items()}


def _write_weights(tensors: Mapping[str, torch.Tensor], directory: Path, max_shard_bytes: int) -> set[str]:
    """Writes the weight files and their index, and returns the names of the files."""
    save_file = _require("safetensors.torch").save_file
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    files = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, shard in _progress(list(zip(files, shards, strict=True)), "Writing"):
        on_host = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        save_file(on_host, directory / file, metadata={"format": "mlx"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / _INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    )
    return set(files)


def _config_record(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of `model`."""
    config = model.config.to_diff_dict()
    for name in ("_name_or_path", *_RECORDS):
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = bool(model.config.tie_word_embeddings)
    config.update(_attention_record(config))
    formats = {
        path: _format_of(module)
        for path, module in model.named_modules()
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding))
    }
    if formats:
        (common, _), *_ = Counter(tuple(format.items()) for format in formats.values()).most_common(1)
        exceptions = {path: format for path, format in formats.items() if tuple(format.items()) != common}
        config.update({name: {**dict(common), **exceptions} for name in _RECORDS})
    return dict(sorted(config.items()))


def _attention_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """What MLX reads at the top of config.json and Transformers keeps inside rope_parameters and layer_types."""
    rope = config.get("rope_parameters") or {}
    record: dict[str, Any] = {}
    if "rope_theta" in (sliding := rope.get("sliding_attention") or {}):
        record["rope_local_base_freq"] = sliding["rope_theta"]
    rope = rope.get("full_attention") or rope
    record.update({name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope})
    if rope.get("rope_type", "default") != "default":
        record["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    kinds = config.get("layer_types") or []
    if {"sliding_attention", "full_attention"} <= set(kinds):
        record["sliding_window_pattern"] = kinds.index("full_attention") + 1
    return record


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move_files(source: Path, target: Path) -> None:
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
