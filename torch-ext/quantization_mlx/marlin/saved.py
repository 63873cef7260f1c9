"""Saving models with Marlin's linear layers, and loading what was saved.

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import compat
from ..checkpoint import config_record, distinct_tensors, write_directory
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
from .layers import ColumnPackedLinear, MarlinLinear, MetalQuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "quantization_config.json"
FORMAT = "marlin"  # what the record says
METHOD = "quantization_mlx_marlin"  # the quantizer's name in Transformers, in config.json too

# What a layer's constructor takes besides its sizes, its bias, its device and its dtype; by the name of its class.
_CLASSES: dict[str, tuple[type[ColumnPackedLinear], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "MarlinLinear": (MarlinLinear, lambda entry: {"quant_type": str(entry["mode"]).removeprefix("marlin_")}),
    "MetalQuantizedLinear": (MetalQuantizedLinear, lambda entry: {"bits": entry["bits"]}),
}


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
    compat.check(op)
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
        entries = {path: entry_of(layer) for path, layer in layers.items()}
        record = {"format": FORMAT, "layers": entries, "tied": _aliases(model)}
        return {"config.json": dict(sorted(config.items())), RECORD: record}

    write_directory(model, Path(output_dir), distinct_tensors(model), records, "pt", max_shard_bytes)


def _copy_remote_code(model: PreTrainedModel, directory: Path) -> None:
    """Copies the Python files of a model that came with its own, and lets its config name them."""
    from transformers.dynamic_module_utils import custom_object_save

    for each in (model, model.config):
        if each._auto_class is not None:
            custom_object_save(each, directory, config=model.config)


def entry_of(layer: ColumnPackedLinear) -> dict[str, Any]:
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
    compat.check("patch_transformers")
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
    refuse_mlx(directory, op)
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


def refuse_mlx(directory: Path, op: str) -> None:
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
            layer = shell(linear[path], entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"[{op}] {directory / RECORD}: {path} is {entry!r}, which is not supported") from error
        model.set_submodule(path, layer)
        packed += [f"{path}.{name}" for name in layer.state_dict() if name != "bias"]
    _tie(model, record["tied"], op, directory / RECORD)
    judge(model, read_headers(files, op), str(directory), exact=packed, op=op)


def shell(layer: nn.Linear, entry: Mapping[str, Any]) -> ColumnPackedLinear:
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
    if entry_of(made) != dict(entry):
        raise ValueError(f"an entry would be {entry_of(made)}")
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
