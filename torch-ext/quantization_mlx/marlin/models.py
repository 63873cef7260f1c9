"""Models with Marlin's linear layers: made of other models, saved and loaded.

A saved directory holds `config.json`, `model*.safetensors` with an index, `generation_config.json` and
`quantization_config.json`:

    {"format": "marlin",
     "layers": {path: {"class": "MarlinLinear" or "MetalQuantizedLinear", "mode": …, "group_size": …, "bits": …}},
     "tied": {name of a tensor: name that the same tensor is stored under}}

The tensors of a layer are stored as `<path>.weight_packed`, `<path>.scales`, `<path>.zeros` in mode "marlin_int4", and
`<path>.bias`; all others under their names in the model.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint import config_record, distinct_tensors, replace_layers, write_directory
from ..modules import _QuantizedModule
from ..quantizer import align_parameters
from ..stored import (
    is_mlx_directory,
    judge,
    listed,
    other_method,
    read_config,
    read_headers,
    read_json,
    require,
    weight_files,
)
from .functions import check_group_size
from .layers import ColumnPackedLinear, MarlinLinear, MetalQuantizedLinear, check_bits, check_quant_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LayerFilter = Callable[[str, nn.Module], bool]

RECORD = "quantization_config.json"
FORMAT = "marlin"  # what the record says
METHOD = "quantization_mlx_marlin"  # the quantizer's name in Transformers, in config.json too
_HEAD_AND_TABLE = frozenset({"lm_head", "embed_tokens"})
_IN_SKIP_LAYERS = "in skip_layers"

# What a layer's constructor takes besides its sizes, its bias, its device and its dtype; by the name of its class.
_CLASSES: dict[str, tuple[type[ColumnPackedLinear], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "MarlinLinear": (MarlinLinear, lambda entry: {"quant_type": str(entry["mode"]).removeprefix("marlin_")}),
    "MetalQuantizedLinear": (MetalQuantizedLinear, lambda entry: {"bits": entry["bits"]}),
}


# Quantizing


class ReplacementStats(dict[str, int]):
    """How many layers were replaced, as "replaced_count", and how many were not, as "skipped_count".

    replaced: the paths of the former.
    skipped: by the paths of the latter, the reasons.
    """

    def __init__(self, replaced: Iterable[str], skipped: Mapping[str, str]) -> None:
        self.replaced = list(replaced)
        self.skipped = dict(skipped)
        super().__init__(replaced_count=len(self.replaced), skipped_count=len(self.skipped))


def quantize_model(
    model: nn.Module,
    quant_type: str = "fp4",
    group_size: int = 128,
    skip_layers: Iterable[str] | None = _HEAD_AND_TABLE,
) -> nn.Module:
    """Makes the `nn.Linear` layers of `model` `MarlinLinear` ones, in place and one after the other; returns the model.

    Left alone, with a warning that says why, are layers whose in_features do not divide into groups, subclasses of
    `nn.Linear`, which may compute something else, and layers that share their weight with a module of another type, as
    a tied output head does with an embedding: they stay tied. Linear layers that share a weight go on sharing one
    packed copy. Layers of other types, GPT-2's `Conv1D` for example, are not looked at.

    Args:
        model: any module; a layer by itself is not changed, its quantized form is returned.
        quant_type: "fp4", "int4" or "int4_sym".
        group_size: 128, 64 or 32.
        skip_layers: names of layers to leave alone. A name is one or more whole components of a dotted path:
            "lm_head", "layers.0" and "model.layers.0.mlp.up_proj" are names, "head" is none of "lm_head". An empty
            set, like None, skips nothing.

    Raises:
        TypeError: model is no module, or skip_layers is a string.
        ValueError: quant_type or group_size is not supported, or a weight has infinities or NaN; nothing has changed.
    """
    op = "quantize_model"
    check_quant_type(op, quant_type)
    convert = functools.partial(MarlinLinear.from_linear, quant_type=quant_type, group_size=group_size)
    model, stats = _replace(op, model, convert, group_size, skip_layers, None)
    unasked = [f"{path}: {reason}" for path, reason in stats.skipped.items() if reason != _IN_SKIP_LAYERS]
    if unasked or not stats.replaced:
        of_which = f"; left alone: {listed(unasked)}" if unasked else ""
        warnings.warn(f"[{op}] {len(stats.replaced)} layers were replaced{of_which}", stacklevel=2)
    return model


def replace_linear_layers(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    skip_layers: Iterable[str] | None = None,
    layer_filter: LayerFilter | None = None,
) -> ReplacementStats:
    """Makes the `nn.Linear` layers of `model` `MetalQuantizedLinear` ones, in place and one after the other.

    Left alone are layers as `quantize_model` leaves alone, an output head that is tied to an embedding among them; the
    result has the reason for each. Linear layers that share a weight go on sharing one packed copy.

    Args:
        model: a module with layers in it.
        bits: 4, 8 or 2.
        group_size: 128, 64 or 32.
        skip_layers: names of layers to leave alone, as in `quantize_model`; None skips nothing by name.
        layer_filter: called with the path and the layer; a false value leaves the layer alone.

    Returns:
        {"replaced_count": …, "skipped_count": …}, with the paths in its attributes `replaced` and `skipped`.

    Raises:
        TypeError: model is no module, or is itself a linear layer, or skip_layers is a string.
        ValueError: bits or group_size is not supported, or a weight has infinities or NaN; nothing has changed.
    """
    op = "replace_linear_layers"
    check_bits(op, bits)
    if isinstance(model, nn.Linear):
        raise TypeError(f"[{op}] a layer by itself is not replaced in place; use MetalQuantizedLinear.from_float")
    convert = functools.partial(MetalQuantizedLinear.from_float, bits=bits, group_size=group_size)
    return _replace(op, model, convert, group_size, skip_layers, layer_filter)[1]


def _replace(
    op: str,
    model: nn.Module,
    convert: Callable[[nn.Linear], ColumnPackedLinear],
    group_size: int,
    skip_layers: Iterable[str] | None,
    layer_filter: LayerFilter | None,
) -> tuple[nn.Module, ReplacementStats]:
    """Puts what `convert` makes of a layer in its place; returns the model, or what took its place, and the counts."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{op}] model is of type {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(skip_layers, str):
        raise TypeError(f"[{op}] skip_layers is the string {skip_layers!r}; it must be a set of names")
    check_group_size(op, group_size)
    names = list(skip_layers or ())
    replaced: list[str] = []
    skipped: dict[str, str] = {}

    def choose(holders: Mapping[str, nn.Module]) -> bool | None:
        linear = {path: layer for path, layer in holders.items() if isinstance(layer, nn.Linear)}
        reasons = {path: _why_not(path, layer, group_size, names, layer_filter) for path, layer in linear.items()}
        others = [path for path in holders if path not in linear]
        obstacles = others + [path for path, reason in reasons.items() if reason is not None]
        if not obstacles:
            path, layer = next(iter(linear.items()))
            if not layer.weight.is_meta and not layer.weight.isfinite().all():
                raise ValueError(f"[{op}] {path}.weight has values that are not finite numbers")
            replaced.extend(linear)
            return True
        for path, reason in reasons.items():
            skipped[path] = reason or f"shares its weight with {obstacles[0]}"
        return None

    model = replace_layers(model, choose, lambda layer, _: convert(layer), _tied)
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, nn.Linear):
            skipped.setdefault(path, "has no parameter as its weight")  # a parametrization computes it, for example
    return model, ReplacementStats(replaced, skipped)


def _why_not(
    path: str, layer: nn.Linear, group_size: int, skip_layers: list[str], layer_filter: LayerFilter | None
) -> str | None:
    """The reason to leave a layer alone, if there is one."""
    if any(f".{name}." in f".{path}." for name in skip_layers):
        return _IN_SKIP_LAYERS
    if type(layer) is not nn.Linear:
        return f"a subclass of Linear: {type(layer).__name__}"
    if not layer.weight.is_floating_point():
        return f"its weight is {str(layer.weight.dtype).removeprefix('torch.')}"
    if layer.in_features % group_size:
        return f"in_features {layer.in_features} is not divisible by group_size {group_size}"
    if layer_filter is not None and not layer_filter(path, layer):
        return "refused by layer_filter"
    return None


def _tied(layer: nn.Linear, twin: ColumnPackedLinear) -> ColumnPackedLinear:
    """`layer` on the packed weight of `twin`, which had the same floating-point weight."""
    tied = _shell(layer, _entry(twin))
    for name, parameter in twin.named_parameters(recurse=False):
        if name != "bias":
            setattr(tied, name, parameter)
    tied.bias = layer.bias
    return tied.train(layer.training)


# Loading models that are not quantized


def load_and_quantize(
    model_id_or_path: str | os.PathLike[str],
    bits: int = 4,
    group_size: int = 128,
    device: torch.device | str = "mps",
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, ReplacementStats]:
    """Loads a causal language model with Transformers, in the dtype that it is stored in, and replaces its layers.

    The floating-point weights never reach `device`.

    Args:
        model_id_or_path: of a model that is not quantized, on the Hugging Face Hub or in a directory.
        bits, group_size: as in `replace_linear_layers`.
        device: where the quantized model is put: "mps" or "cpu".
        trust_remote_code: whether Python code that comes with the model may run.

    Returns:
        The model in eval mode, and what `replace_linear_layers` returns.

    Raises:
        ImportError: transformers or safetensors is not installed.
        ValueError: bits, group_size or the device is not supported, or the model is already quantized.
    """
    op = "load_and_quantize"
    check_bits(op, bits)
    check_group_size(op, group_size)
    device = usable_device(device, op)
    model = load_dense(model_id_or_path, op, dtype="auto", trust_remote_code=trust_remote_code)
    stats = replace_linear_layers(model, bits, group_size)
    return model.to(device), stats


def load_dense(source: str | os.PathLike[str], op: str, **options: Any) -> PreTrainedModel:
    """A causal language model that is not quantized; `options` are those of Transformers' `from_pretrained`.

    Raises:
        ValueError: the model is quantized; the message says what loads it.
    """
    transformers = require("transformers")
    require("safetensors")
    directory = Path(source)
    if directory.is_dir():
        if is_saved(directory):
            raise ValueError(f"[{op}] {source} is quantized already; load_quantized loads it")
        _refuse_mlx(directory, op)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "unknown")
        raise ValueError(f"[{op}] {source} is quantized already, by {str(method)!r}; from_pretrained loads it")
    return model


def usable_device(device: torch.device | str | None, op: str) -> torch.device:
    """The device of that name; for None the GPU of a Mac, and the CPU where there is none.

    Raises:
        ValueError: it is not here, or this package has no kernels for it.
    """
    here = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    found = torch.device(here[0] if device is None else device)
    if found.type not in here:
        raise ValueError(f"[{op}] device is {str(device)!r}; usable here: {', '.join(map(repr, here))}")
    return found


# Saving


def save_quantized(
    model: PreTrainedModel, output_dir: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 1024**3
) -> None:
    """Writes a model with layers of Marlin, for `load_quantized`; the opening comment of this module has the layout.

    Everything is written beside its final place first and then renamed, so a save that fails leaves an older directory
    as it was. Weight files of an older model are removed, other files are kept. The tokenizer is not written; its own
    `save_pretrained(output_dir)` does that.

    Args:
        model: a Transformers model after `quantize_model` or `replace_linear_layers`, or from `load_quantized`.
        output_dir: made if it does not exist.
        max_shard_bytes: weights beyond this size are split over several files.

    Raises:
        ImportError: transformers or safetensors is not installed.
        TypeError: model is no `transformers.PreTrainedModel`.
        ValueError: model has no layers of Marlin, or has layers of other quantized kinds.
    """
    op = "save_quantized"
    transformers = require("transformers")
    require("safetensors")
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"[{op}] model is of type {type(model).__name__}; it must be a transformers.PreTrainedModel")
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {path: module for path, module in modules.items() if isinstance(module, ColumnPackedLinear)}
    if not layers:
        raise ValueError(
            f"[{op}] the model has no layers of Marlin; quantize_model and replace_linear_layers make them"
        )
    known = {layer_class for layer_class, _ in _CLASSES.values()}
    if strange := [path for path, layer in layers.items() if type(layer) not in known]:
        raise ValueError(f"[{op}] layers are of no known class, which is {' or '.join(_CLASSES)}: {listed(strange)}")
    if mlx := [path for path, module in modules.items() if isinstance(module, _QuantizedModule)]:
        raise ValueError(f"[{op}] layers are of MLX's formats, which save_checkpoint writes: {listed(mlx)}")

    def records(directory: Path) -> dict[str, dict[str, Any]]:
        _copy_remote_code(model, directory)
        config = {**config_record(model), "quantization_config": {"quant_method": METHOD}}
        entries = {path: _entry(layer) for path, layer in layers.items()}
        record = {"format": FORMAT, "layers": entries, "tied": _aliases(model)}
        return {"config.json": dict(sorted(config.items())), RECORD: record}

    write_directory(model, Path(output_dir), distinct_tensors(model), records, "pt", max_shard_bytes)


def _copy_remote_code(model: PreTrainedModel, directory: Path) -> None:
    """Copies the Python files of a model that came with its own, and lets its config name them."""
    from transformers.dynamic_module_utils import custom_object_save

    for each in (model, model.config):
        if each._auto_class is not None:
            custom_object_save(each, directory, config=model.config)


def _entry(layer: ColumnPackedLinear) -> dict[str, Any]:
    """What the record says of a layer."""
    format = {"mode": layer.mode, "group_size": layer.group_size, "bits": layer.bits}
    return {"class": type(layer).__name__, **format}


def _aliases(model: nn.Module) -> dict[str, str]:
    """The further names of tensors that have several, and the first ones, under which they are stored."""
    first: dict[torch.Tensor, str] = {}
    aliases = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(tensor, name) != name:
            aliases[name] = first[tensor]
    return aliases


# Loading what was saved


def load_quantized(
    path: str | os.PathLike[str], device: torch.device | str = "mps", *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Reads a directory that `save_quantized` wrote, as a model in eval mode; every tensor has its stored dtype.

    The model is built without memory for its floating-point weights. The index is not trusted: the tensors are those
    that the `model*.safetensors` files hold.

    Args:
        path: holds config.json, quantization_config.json and the weights.
        device: where the model is put: "mps" or "cpu".
        trust_remote_code: whether Python code that config.json names may run.

    Raises:
        FileNotFoundError: the directory, config.json or the weights are missing.
        ImportError: transformers or safetensors is not installed.
        ValueError: the device is not here, or the directory is of another kind, or lacks tensors, or has unknown or
            damaged ones, or ones of a wrong shape or dtype, or scales that are not finite numbers; the message names
            them, or the function that loads the other kind.
    """
    op = "load_quantized"
    device = usable_device(device, op)
    transformers = require("transformers")
    require("safetensors")
    directory = Path(path)
    _read_record(directory, op)
    weight_files(directory, op)
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    config.quantization_config = {"quant_method": METHOD}
    _register_quantizer()
    model = _class_of(config, trust_remote_code).from_pretrained(
        directory, config=config, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    model.hf_quantizer.remove_quantization_config(model)
    return model.to(device)


def is_saved(directory: Path) -> bool:
    """Whether `save_quantized` wrote the directory, and nothing that is of another kind since."""
    return (directory / RECORD).exists() and other_method(read_config(directory) or {}) == METHOD


def _read_record(directory: Path, op: str) -> dict[str, Any]:
    """The content of quantization_config.json.

    Raises:
        FileNotFoundError: the directory or its config.json is missing.
        ValueError: it is of another kind, or the record is damaged.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"[{op}] {directory} is no directory")
    config = read_config(directory, op)
    if config is None:
        raise FileNotFoundError(f"[{op}] {directory} has no config.json")
    _refuse_mlx(directory, op)
    file = directory / RECORD
    if not file.exists():
        method = other_method(config)
        loader = "load_and_quantize loads and quantizes it" if method is None else "Transformers' from_pretrained may"
        what = "is not quantized" if method is None else f"is quantized by {method!r}"
        raise ValueError(f"[{op}] {directory} has no {RECORD} and {what}; {loader}")
    record = read_json(file, op)
    if record.get("format") != FORMAT:
        raise ValueError(f"[{op}] {file} has the format {record.get('format')!r}; supported is {FORMAT!r}")
    for name in ("layers", "tied"):
        if not isinstance(record.setdefault(name, {}), dict):
            raise ValueError(f"[{op}] {file}: {name!r} is not a JSON object")
    return record


def _refuse_mlx(directory: Path, op: str) -> None:
    if is_mlx_directory(directory, op):
        raise ValueError(f"[{op}] {directory} is an MLX checkpoint; load_checkpoint loads it")


def _class_of(config: Any, trust_remote_code: bool) -> Any:
    """The class of the saved model, or the one that finds it among the Python code that config.json names."""
    transformers = require("transformers")
    remote = [name for name in getattr(config, "auto_map", None) or () if name.startswith("AutoModel")]
    if trust_remote_code and remote:
        return getattr(transformers, remote[0], transformers.AutoModelForCausalLM)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


@functools.cache
def _register_quantizer() -> None:
    """Lets Transformers' `from_pretrained` place the layers of a saved model before it loads the tensors."""
    from transformers.quantizers import HfQuantizer, auto
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class MarlinConfig(QuantizationConfigMixin):
        """Says that quantization_config.json, beside the weights, describes the layers."""

        def __init__(self, **_: Any) -> None:
            self.quant_method = METHOD

    class MarlinQuantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = True
        is_compileable = True

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
            _place_layers(model, [Path(file) for file in options.get("checkpoint_files") or ()])

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            return []  # the tensors are stored under their names in the model

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> None:
            return None  # as stored

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
            _finish_layers(model)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MarlinConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = MarlinQuantizer


def _place_layers(model: PreTrainedModel, files: list[Path]) -> None:
    """Puts layers that wait for their tensors into `model`, which is on the meta device.

    Raises:
        ValueError: the record or the stored tensors are not those of the model.
    """
    op = "load_quantized"
    if not files:
        raise ValueError(f"[{op}] the model is read from files, not from a state_dict")
    directory = files[0].parent
    record = _read_record(directory, op)
    if set(files) != set(weight_files(directory, op)):
        raise ValueError(f"[{op}] {directory}: the index does not name the weight files that are there")
    linear = {path: layer for path, layer in model.named_modules() if type(layer) is nn.Linear}
    if unknown := [path for path in record["layers"] if path not in linear]:
        raise ValueError(f"[{op}] {directory / RECORD} has layers that the model has not: {listed(unknown)}")
    packed = []
    for path, entry in record["layers"].items():
        try:
            layer = _shell(linear[path], entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"[{op}] {directory / RECORD}: {path} is {entry!r}, which is not supported") from error
        model.set_submodule(path, layer)
        packed += [f"{path}.{name}" for name in layer.state_dict() if name != "bias"]
    _tie(model, record["tied"], op, directory / RECORD)
    judge(model, read_headers(files, op), str(directory), exact=packed, op=op)


def _shell(layer: nn.Linear, entry: Mapping[str, Any]) -> ColumnPackedLinear:
    """A layer of the same sizes that waits for its tensors.

    Raises:
        KeyError, TypeError, ValueError: the entry is not one of a supported format.
    """
    layer_class, options = _CLASSES[entry["class"]]
    dtype = layer.weight.dtype if layer.bias is None else layer.bias.dtype
    made = layer_class(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        group_size=entry["group_size"],
        device="meta",
        dtype=dtype,
        **options(entry),
    )
    if _entry(made) != dict(entry):
        raise ValueError(f"an entry would be {_entry(made)}")
    return made


def _tie(model: PreTrainedModel, aliases: Mapping[str, str], op: str, file: Path) -> None:
    """Makes one tensor of those that are stored once; Transformers does so again after loading."""
    tensors = model.state_dict(keep_vars=True)
    for alias, name in aliases.items():
        if alias not in tensors or name not in tensors or tensors[alias].shape != tensors[name].shape:
            raise ValueError(f"[{op}] {file} ties {alias} to {name}, which the model cannot")
        path, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(path), attribute, tensors[name])
    model.all_tied_weights_keys = dict(aliases)


def _finish_layers(model: nn.Module) -> None:
    """Freezes what Transformers made trainable, and looks at the scales.

    Raises:
        ValueError: scales or zeros are not finite numbers.
    """
    align_parameters(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False) if isinstance(module, ColumnPackedLinear) else ():
            if name == "bias":
                continue
            parameter.requires_grad_(False)
            if parameter.is_floating_point() and not parameter.isfinite().all():
                raise ValueError(f"[load_quantized] {path}.{name} has values that are not finite numbers")
