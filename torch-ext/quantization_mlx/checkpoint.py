"""Transformers models into and out of MLX checkpoint directories.

A directory holds `config.json`, `model*.safetensors`, an index and the tokenizer's files. Quantized layers are stored
as `<path>.weight`, `<path>.scales` and, in mode "affine", `<path>.biases`; `config.json` has their format twice, as
"quantization" and as "quantization_config", with an entry for each layer that differs from the default.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import compat
from .conv1d import as_conv1d, as_linear, has_mlx_names, in_mlx_layout, is_conv1d, mlx_name, stands_for_conv1d
from .experts import QuantizedSwitchLinear, SwitchLinear, fuse, split_experts, stored_paths, unfused
from .modules import QuantizedEmbedding, QuantizedLinear, _QuantizedModule, complete_format, row_scale
from .obstacles import copy_hooks, move_hooks
from .packed_weight import PackedModule
from .recipes import QuantizationReport, mixed_recipe
from .replacement import (
    Left,
    OnLayer,
    Refusal,
    Replacement,
    float_weights,
    parameter_count,
    reason_of_class,
    replace_layers,
    shared_refusals,
    warn_of_float_weights,
    why_not,
)
from .staging import staged
from .stored import (
    MARLIN_METHOD,
    MARLIN_RECORD,
    MLX_METHOD,
    RECORDS,
    Format,
    listed,
    other_method,
    read_config,
    read_headers,
    require,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Predicate = Callable[[str, nn.Module], "bool | Format"]
_INDEX = "model.safetensors.index.json"


def quantize_model(
    model: nn.Module,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    predicate: Predicate | str | None = None,
    on_layer: OnLayer | None = None,
    report: QuantizationReport | None = None,
) -> nn.Module:
    """Quantizes the `nn.Linear` and `nn.Embedding` layers, the `Conv1D` ones of Transformers and the fused experts of
    `model` in place, one after the other, and returns it.

    Fused experts of Transformers count as layers `….experts.gate_proj`, `up_proj` and `down_proj`, of type
    `SwitchLinear`, and become `QuantizedSwitchLinear`; `quantization_mlx.experts` has both. A `Conv1D` becomes a
    `QuantizedLinear` of the transposed weight. Embeddings that scale their rows, as Gemma's do, are quantized. Layers
    that share a weight, as tied embeddings do, go on sharing one packed copy; the first decides for all.

    Forward and backward hooks move to the quantized layer. Left alone are layers whose rows do not divide into groups,
    subclasses, which may compute something else, and layers with what a quantized one has not: `max_norm`,
    `scale_grad_by_freq`, parametrizations, a forward of their own, hooks on the state_dict, weights of other dtypes or
    tensor types; and so is a layer that shares its weight with one. `report.skipped` has them and all other matrices
    that remain in floating point, with the reasons; a warning lists the first ones if they are 1 % of the parameters
    or more, those aside that the predicate has refused.

    Args:
        model: any module; a layer by itself is not changed, its quantized form is returned.
        group_size, bits, mode: the format; what is None takes the mode's default.
        predicate: called with the path and the layer; a false value leaves the layer alone, a dict with any of
            group_size, bits and mode quantizes it in that format, and any other true value in the common one. The
            name of a mixed recipe, such as "mixed_4_6", stands for `mixed_recipe(name, model, group_size)`.
        on_layer: called with the path, the weight [..., rows, columns] and the quantized module of each layer, while
            both exist.
        report: gets the error of each layer, and what remains in floating point.

    Raises:
        TypeError: the predicate is no function, or returns a string, or a dict with other keys; the message names the
            layer.
        ValueError: the format or the recipe is not supported.
    """
    default = _checked_format("[quantize_model]", {"group_size": group_size, "bits": bits, "mode": mode})
    if predicate is not None and not isinstance(predicate, str) and not callable(predicate):
        raise TypeError(f"[quantize_model] predicate is {predicate!r}; it must be a function or a recipe's name")
    if isinstance(predicate, str):
        if mode != "affine":
            raise ValueError(f"[quantize_model] the recipe {predicate!r} is for mode 'affine', not for {mode!r}")
        predicate = mixed_recipe(predicate, model, default["group_size"])

    def format_of(path: str, layer: nn.Module) -> Format | Refusal:
        choice = True if predicate is None else predicate(path, layer)
        if not choice:
            return Refusal("refused by the predicate", is_asked_for=True)
        if isinstance(choice, str):
            raise TypeError(f"[quantize_model] the predicate gives {choice!r} for {path!r}; wanted: a truth or a dict")
        chosen = default
        if isinstance(choice, Mapping):
            chosen = _checked_format(f"[quantize_model] the predicate's dict for {path!r}:", {"mode": mode, **choice})
        columns = as_linear(layer).weight.shape[-1]
        if columns % chosen["group_size"]:
            return Refusal(f"a row of {columns} values does not divide into groups of {chosen['group_size']}")
        return chosen

    def collect(path: str, weight: torch.Tensor, quantized: nn.Module) -> None:
        for each in (on_layer, report.add if report is not None and report.with_errors else None):
            if each is not None:
                each(path, weight, quantized)

    with unfused(model):
        done = _replace_layers(model, format_of, _quantized, collect)
        left, parameters = float_weights(done.model, done.refusals), parameter_count(done.model)
    if report is not None:
        report.skip(left, parameters)
    warn_of_float_weights("quantize_model", left, parameters)
    return done.model


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Puts floating-point layers in the place of the quantized ones of `model`, in place, and returns it.

    Layers that share a packed weight share the floating-point one.

    Args:
        model: with layers of `quantize_model` or of `quantization_mlx.marlin`; a layer by itself is not changed, its
            floating-point form is returned.
        dtype: of the weights that are made; that of each layer's `weight` if None.
    """
    dense: dict[int, nn.Parameter] = {}  # by the identity of the packed words
    done: dict[int, nn.Module] = {}  # by the identity of the layer, which may have several paths
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, PackedModule):
            continue
        if id(layer) in done:
            model.set_submodule(path, done[id(layer)])
            continue
        bias, made = getattr(layer, "bias", None), layer.dequantize()
        made._stands_for_conv1d = stands_for_conv1d(layer)
        if dtype not in (None, made.weight.dtype):  # rounded once, from the packed values
            packed = layer.packed()
            values = packed.dequantize(dtype).detach()
            made.weight = nn.Parameter(values.mT.contiguous() if packed.by_columns else values)
        made = as_conv1d(made)
        made.weight = dense.setdefault(id(layer.packed().words), made.weight)
        done[id(layer)] = made
        if not path:
            copy_hooks(layer, made)
            return made
        if bias is not None:
            made.bias = bias
        move_hooks(layer, made)
        model.set_submodule(path, made)
    fuse(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method in (MLX_METHOD, MARLIN_METHOD):
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        if getattr(config := getattr(module, "config", None), "quantization_config", None) == MARLIN_RECORD:
            del config.quantization_config  # what is saved from now on is in floating point
    return model


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


def load_checkpoint(
    directory: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Reads an MLX checkpoint as a Transformers model in eval mode.

    It is what `AutoModelForCausalLM.from_pretrained(directory)` does after `patch_transformers()`, without patching
    beyond this call, and as strict with checkpoints that are not quantized.

    A layer is quantized if config.json has an entry for it that is not false, or else if its scales are stored. The
    index is not consulted: the tensors are those that the `model*.safetensors` files hold. The model is built without
    memory for its floating-point weights.

    Args:
        directory: holds config.json and the weights.
        device: where the model is put; the CPU if None.
        dtype: what floating-point tensors are converted to; None takes that of the first one stored.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ImportError: transformers or safetensors is not installed.
        ValueError: the checkpoint is of another kind, or lacks tensors, or has unknown or damaged ones, or ones of a
            wrong shape or dtype, or scales that are not finite numbers; the message names them.
    """
    transformers = require("transformers")
    require("safetensors")
    from .transformers_integration import mark_as_mlx, patched_transformers

    directory = Path(directory)
    stored_config = read_config(directory)
    if stored_config is None:
        raise FileNotFoundError(f"[load_checkpoint] {directory} has no config.json")
    if (method := other_method(stored_config)) is not None:
        raise ValueError(f"[load_checkpoint] {directory} is quantized by {method!r}, which is not the MLX format")
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    mark_as_mlx(config, always=True)
    if dtype is None:
        stored = read_headers(weight_files(directory)).values()
        dtype = next((tensor.dtype for tensor in stored if tensor.is_floating_point()), None)
    with patched_transformers():
        options = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    return model if device is None else model.to(device)


def _progress(items: list[Any], what: str) -> Iterable[Any]:
    """`items` with a progress bar, where tqdm is installed, that appears after two seconds."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, delay=2, leave=False)


# Formats


def _checked_format(where: str, given: Mapping[str, Any]) -> Format:
    """The format that is given in part; errors begin with `where`."""
    if unknown := [key for key in given if key not in ("group_size", "bits", "mode")]:
        keys = ", ".join(map(repr, unknown))
        raise TypeError(f"{where} unknown key {keys}; supported are 'group_size', 'bits' and 'mode'")
    try:
        return complete_format(**given)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _format_of(module: _QuantizedModule) -> Format:
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


# Layers


def _quantized(layer: nn.Linear | nn.Embedding | SwitchLinear, format: Format) -> _QuantizedModule:
    if isinstance(layer, SwitchLinear):
        return QuantizedSwitchLinear.from_switch_linear(layer, **format)
    if isinstance(layer, nn.Linear):
        return QuantizedLinear.from_linear(layer, **format)
    return QuantizedEmbedding.from_embedding(layer, **format)


def _shell(
    layer: nn.Linear | nn.Embedding | SwitchLinear, format: Format, dtype: torch.dtype | None
) -> _QuantizedModule:
    """A quantized layer of the same sizes that waits for its tensors."""
    if isinstance(layer, SwitchLinear):
        return QuantizedSwitchLinear.shell(layer, dtype, **format)
    if isinstance(layer, nn.Linear):
        has_bias = layer.bias is not None
        return QuantizedLinear(layer.in_features, layer.out_features, has_bias, **format, device="meta", dtype=dtype)
    sizes = (layer.num_embeddings, layer.embedding_dim)
    return QuantizedEmbedding(*sizes, **format, device="meta", dtype=dtype, scale=row_scale(layer))


def _replace_layers(
    model: nn.Module,
    format_of: Callable[[str, nn.Module], Format | Refusal],
    convert: Callable[[Any, Format], _QuantizedModule],
    on_layer: OnLayer | None = None,
) -> Replacement:
    """Puts convert(layer, format) in the place of every layer that has a format and can be replaced."""

    def choose(holders: Mapping[str, nn.Module]) -> Format | Left:
        reasons = {path: _refusal(path, layer) for path, layer in holders.items()}
        if (left := shared_refusals(holders, reasons)) is not None:
            return left
        format = format_of(*next(iter(holders.items())))
        return Left(dict.fromkeys(holders, format)) if isinstance(format, Refusal) else format

    return replace_layers(model, choose, convert, _tied, on_layer, _progress)


def _refusal(path: str, layer: nn.Module) -> Refusal | None:
    """Why a module that holds a weight is left alone whatever its format would be."""
    if type(layer) in (nn.Linear, SwitchLinear) or is_conv1d(layer) or row_scale(layer) is not None:
        reason = why_not(path, layer)
    else:
        reason = reason_of_class(path, layer)
    return None if reason is None else Refusal(reason)


def _tied(
    layer: nn.Linear | nn.Embedding, twin: QuantizedLinear | QuantizedEmbedding
) -> QuantizedLinear | QuantizedEmbedding:
    """`layer` on the packed weight of `twin`, which had the same floating-point weight."""
    tied = _shell(layer, _format_of(twin), layer.weight.dtype)
    tied.share(twin)
    if isinstance(tied, QuantizedLinear):
        tied.bias = layer.bias
    return tied.train(layer.training)


# Saving


def write_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = 5 * 1024**3,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`save_checkpoint`, where a size may be a string such as "5GB", and the model's tensors may be given."""
    from .marlin.layers import ColumnPackedModule  # its package imports this module

    if marlin := [path for path, module in model.named_modules() if isinstance(module, ColumnPackedModule)]:
        raise ValueError(
            f"[save_checkpoint] layers are of Marlin's formats, which marlin.save_quantized writes: {listed(marlin)}"
        )
    tensors = in_mlx_layout(model, split_experts(model, distinct_tensors(model, state_dict)))
    records = {"config.json": _mlx_config(model)}
    write_directory(model, directory, tensors, lambda staged: records, "mlx", max_shard_size, tokenizer)


def write_directory(
    model: PreTrainedModel,
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    records: Callable[[Path], Mapping[str, Mapping[str, Any]]],
    format: str,
    max_shard_size: int | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes tensors, JSON files and what else belongs to `model`: all beside their final places first, then renamed.

    Args:
        directory: made if it does not exist; weight files in it that are not overwritten are removed.
        tensors: by the names that they are stored under.
        records: returns what the JSON files hold, by their names, config.json among them; is called with the directory
            in which everything is gathered, for what else it may put there.
        format: what the weight files say that their format is.
        max_shard_size: tensors beyond this size are split over several files; in bytes, or a string such as "5GB".
    """
    with staged(directory) as scratch:
        _write_weights(tensors, scratch, max_shard_size, format)
        for name, record in records(scratch).items():
            _write_json(scratch / name, record)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)


def distinct_tensors(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The model's tensors under their first names: tied ones are stored once, as MLX does."""
    distinct: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        distinct.setdefault(tensor, name)
    return {name: (tensor if state_dict is None else state_dict[name]).detach() for tensor, name in distinct.items()}


def _write_weights(
    tensors: Mapping[str, torch.Tensor], directory: Path, max_shard_size: int | str, format: str
) -> None:
    """Writes the weight files and their index."""
    save_file = require("safetensors.torch").save_file
    split = require("huggingface_hub").split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in _progress(list(split.filename_to_tensors.items()), "Writing"):
        on_host = {name: tensors[name].cpu().contiguous() for name in names}
        save_file(on_host, directory / file, metadata={"format": format})
    weight_map = {name: file for file, names in split.filename_to_tensors.items() for name in names}
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / _INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    )


def config_record(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of `model` in Transformers' terms, without a record of quantization."""
    config = model.config.to_diff_dict()
    config.pop("_name_or_path", None)
    for part in (config, *config.values()):
        for name in RECORDS if isinstance(part, dict) else ():
            part.pop(name, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = bool(getattr(model.config, "tie_word_embeddings", False))
    return config


def _mlx_config(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of `model` in an MLX checkpoint."""
    compat.check("save_checkpoint")
    config = config_record(model)
    names_of = stored_paths(model)
    formats = {
        mlx_name(model, stored): _format_of(module)
        for path, module in model.named_modules()
        if isinstance(module, _QuantizedModule)
        for stored in names_of(path)
    }
    if has_mlx_names(model):
        config["n_ctx"] = config["n_positions"]
    return _in_mlx_terms(config, formats, type(model.config))


def _in_mlx_terms(
    config: dict[str, Any], formats: Mapping[str, Format], reader: type[PreTrainedConfig] | None
) -> dict[str, Any]:
    """`config` with what MLX looks for in it, among that the formats by the paths of the layers.

    Args:
        config: the content of config.json in Transformers' terms.
        formats: by the paths of the layers in the checkpoint.
        reader: the class by which Transformers reads `config`; None if it is not known.
    """
    # Transformers knows some of these by other names than MLX.
    for name, own_name in getattr(reader, "attribute_map", {}).items():
        if own_name in config:
            config.setdefault(name, config[own_name])
    config.update(_harmless(_attention_record(config), config, reader))
    if formats:
        (common, _), *_ = Counter(tuple(format.items()) for format in formats.values()).most_common(1)
        exceptions = {path: format for path, format in formats.items() if tuple(format.items()) != common}
        config.update({name: {**dict(common), **exceptions} for name in RECORDS})
    return dict(sorted(config.items()))


def _harmless(
    added: Mapping[str, Any], config: Mapping[str, Any], reader: type[PreTrainedConfig] | None
) -> dict[str, Any]:
    """Those entries of `added` beside which Transformers reads the others of `config` as they are.

    Some classes read what MLX calls rope_scaling or partial_rotary_factor as the rope_parameters of every layer.
    """
    if reader is None:
        nested = any(isinstance(value, dict) for value in (config.get("rope_parameters") or {}).values())
        return {name: value for name, value in added.items() if not nested or "rope" not in name}

    def read(record: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            with warnings.catch_warnings():  # of names that are out of use
                warnings.simplefilter("ignore")
                config = reader.from_dict(copy.deepcopy(dict(record)))
                config.standardize_rope_params()  # as models do when they are made
                return config.to_dict()
        except Exception:  # whatever the class has against it
            return None

    kept: dict[str, Any] = {}
    for name, value in added.items():
        expected, found = read({**config, **kept}), read({**config, **kept, name: value})
        if expected is None or (found is not None and {**found, name: value} == {**expected, name: value}):
            kept[name] = value
    return kept


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
