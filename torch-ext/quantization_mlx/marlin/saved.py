"""Saving models with Marlin's linear layers, and loading what was saved.

A saved directory holds `config.json`, `model*.safetensors` with an index, `generation_config.json` if the model has
one, and `quantization_config.json`:

    {"format": "marlin",
     "layers": {path: {"class": the name of one of the classes below, "mode": …, "group_size": …, "bits": …}},
     "tied": {name of a tensor: name that the same tensor is stored under}}

The tensors of a layer are stored as `<path>.weight_packed`, `<path>.scales`, `<path>.zeros` in mode "marlin_int4", and
`<path>.bias`; all others under their names in the model. `config.json`, and each part of it, has `MARLIN_RECORD`, by
which Transformers refuses the directory unless `patch_transformers()` or `load_quantized` lets it read the layers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.read import Checkpoint, reading_once
from ..checkpoint.record import MARLIN_FILE, MARLIN_METHOD, MARLIN_RECORD, other_method
from ..checkpoint.validate import check_tensors
from ..checkpoint.write import distinct_tensors, write_directory
from ..hf import compat
from ..hf.experts import fuse, unfuse
from ..hf.patch import STORED_KINDS, StoredKind, patched_transformers
from ..hf.quantizer import align_parameters, freeze_packed, quantizer_classes
from ..hf.save import config_record
from ..messages import listed
from ..nn.conv1d import as_linear, conv1d_of, is_conv1d
from ..nn.module import QuantizedModule
from ..nn.obstacles import move_hooks
from ..nn.switch import SwitchLinear
from ..optional import require
from ..quantization.replacement import why_not
from .experts import ColumnPackedSwitchLinear
from .layers import DTYPES, ColumnPackedModule, MarlinLinear, MetalQuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "marlin"  # the record's "format"
_LOAD = "load_quantized"  # the op that loading errors name

# Class name -> (class, the constructor's arguments beyond sizes, group_size, bias, device and dtype).
_CLASSES: dict[str, tuple[type[ColumnPackedModule], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "MarlinLinear": (MarlinLinear, lambda entry: {"quant_type": str(entry["mode"]).removeprefix("marlin_")}),
    "MetalQuantizedLinear": (MetalQuantizedLinear, lambda entry: {"bits": entry["bits"]}),
    "ColumnPackedSwitchLinear": (ColumnPackedSwitchLinear, lambda entry: {"mode": entry["mode"]}),
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


def save_quantized(model: nn.Module, output_dir: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 1024**3) -> None:
    """Writes a model with layers of Marlin, for `load_quantized`; the opening comment of this module has the layout.

    Everything is written beside its final place first and then renamed, so a save that fails leaves an older directory
    as it was. Weight files of an older model are removed, other files are kept. The tokenizer is not written; its own
    `save_pretrained(output_dir)` does that.

    Args:
        model: any module after `quantize_model` or `replace_linear_layers`, or from `load_quantized`. Only a
            `transformers.PreTrainedModel` has a config, of which `load_quantized` makes the model again; for others it
            has to be given one.
        output_dir: made if it does not exist.
        max_shard_bytes: weights beyond this size are split over several files.

    Raises:
        ImportError: transformers or safetensors is not installed.
        TypeError: model is no module.
        ValueError: model has no layers of Marlin, or layers of other quantized kinds, or state that is no tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"[save_quantized] model is of type {type(model).__name__}; it must be a torch.nn.Module")
    write_quantized(model, Path(output_dir), max_shard_bytes)


def write_quantized(
    model: nn.Module,
    directory: Path,
    max_shard_size: int | str = 5 * 1024**3,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`save_quantized`, where a size may be a string such as "5GB", and the model's tensors may be given."""
    op = "save_quantized"
    transformers = compat.require("transformers")
    require("safetensors")
    compat.check(op)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {path: module for path, module in modules.items() if isinstance(module, ColumnPackedModule)}
    if not layers:
        raise ValueError(
            f"[{op}] the model has no layers of Marlin; quantize_model and replace_linear_layers make them"
        )
    known = {layer_class for layer_class, _ in _CLASSES.values()}
    if strange := [path for path, layer in layers.items() if type(layer) not in known]:
        raise ValueError(f"[{op}] layers are of no known class, which is {' or '.join(_CLASSES)}: {listed(strange)}")
    if mlx := [path for path, module in modules.items() if isinstance(module, QuantizedModule)]:
        raise ValueError(f"[{op}] layers are of MLX's formats, which save_checkpoint writes: {listed(mlx)}")
    state = model.state_dict(keep_vars=True)
    if others := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"[{op}] state is no tensor and cannot be written: {listed(others)}")

    def records(staged: Path) -> dict[str, dict[str, Any]]:
        config: dict[str, Any] = {"architectures": [type(model).__name__]}
        if isinstance(model, transformers.PreTrainedModel):
            _copy_remote_code(model, staged)
            config = _marked(config_record(model))
        entries = {path: entry_of(layer) for path, layer in layers.items()}
        record = {"format": FORMAT, "layers": entries, "tied": _aliases(model)}
        return {
            "config.json": dict(sorted({**config, "quantization_config": MARLIN_RECORD}.items())),
            MARLIN_FILE: record,
        }

    write_directory(model, directory, distinct_tensors(model, state_dict), records, "pt", max_shard_size)


def _marked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json with `MARLIN_RECORD` in its parts, of which the class of a part reads one alone."""
    return {
        name: {**value, "quantization_config": MARLIN_RECORD}
        if isinstance(value, dict) and "model_type" in value
        else value
        for name, value in config.items()
    }


def mark_configs(model: nn.Module) -> None:
    """Lets the configs in `model` say that it has layers of Marlin.

    What Transformers' own `save_pretrained` writes has no record of the layers; with this, loading it raises.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, ColumnPackedModule):
            components = path.split(".")
            for length in range(len(components)):
                config = getattr(model.get_submodule(".".join(components[:length])), "config", None)
                if hasattr(config, "to_diff_dict"):  # of Transformers, which may not be installed
                    config.quantization_config = dict(MARLIN_RECORD)


def _copy_remote_code(model: PreTrainedModel, directory: Path) -> None:
    """Copies the Python files of a model that came with its own, and lets its config name them."""
    from transformers.dynamic_module_utils import custom_object_save

    for each in (model, model.config):
        if each._auto_class is not None:
            custom_object_save(each, directory, config=model.config)


def entry_of(layer: ColumnPackedModule) -> dict[str, Any]:
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
    path: str | os.PathLike[str],
    device: torch.device | str = "mps",
    *,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Reads a directory that `save_quantized` wrote, as a model in eval mode; every tensor has its stored dtype.

    A model of Transformers is built without memory for its floating-point weights. The index is not trusted: the
    tensors are those that the `model*.safetensors` files hold.

    Args:
        path: holds config.json, quantization_config.json and the weights.
        device: where the model is put: "mps" or "cpu".
        model: made by the code that made the saved model, with its `nn.Linear` layers, maybe on the meta device. It is
            changed in place and returned. None builds the model of Transformers that config.json describes.
        trust_remote_code: whether Python code that config.json names may run.

    Raises:
        FileNotFoundError: the directory, config.json or the weights are missing.
        ImportError: transformers or safetensors is not installed.
        ValueError: the device is not here, or the directory is of another kind, or lacks tensors, or has unknown or
            damaged ones, or ones of a wrong shape or dtype, or scales that are not finite numbers; the message names
            them, or the function that loads the other kind. Then `model` is as it was. Also raised if the saved model
            was none of Transformers and `model` is None.
    """
    device = usable_device(device, _LOAD)
    compat.require("transformers")
    require("safetensors")
    compat.check("patch_transformers")
    with reading_once():
        checkpoint = Checkpoint.at(path, _LOAD)
        record = _read_record(checkpoint)
        files = checkpoint.files
        if model is None:
            model = _build(checkpoint, trust_remote_code)
        else:
            _fill(model, record, checkpoint, files)
    return model.to(device)


def _build(checkpoint: Checkpoint, trust_remote_code: bool) -> PreTrainedModel:
    """The model of Transformers that config.json describes, with its tensors."""
    import transformers

    directory = checkpoint.directory
    if "model_type" not in checkpoint.config:
        saved = (checkpoint.config.get("architectures") or ["unknown"])[0]
        raise ValueError(
            f"[{_LOAD}] {directory} holds a model of the class {saved}, which is none of Transformers; make one and "
            "give it as model"
        )
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    with patched_transformers():
        model = _class_of(config, trust_remote_code).from_pretrained(
            directory, config=config, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
        )
    model.hf_quantizer.remove_quantization_config(model)
    mark_configs(model)
    return model


def _fill(model: nn.Module, record: Mapping[str, Any], checkpoint: Checkpoint, files: Iterable[Path]) -> None:
    """Puts the layers of the record and the stored tensors into `model`, in eval mode; all of them or none.

    Raises:
        ValueError: the record or the stored tensors are not those of the model, or scales are not finite numbers.
    """
    load_file = require("safetensors.torch").load_file
    ties = record["tied"]
    unfuse(model, record["layers"])
    originals: dict[str, nn.Module] = {}
    try:
        shells = _shells(model, record, checkpoint)
        originals = {path: model.get_submodule(path) for path in shells}
        _put(model, shells)
        tensors = model.state_dict(keep_vars=True)
        _check_ties(tensors, ties, checkpoint)
        check_tensors(model, checkpoint.tensors(), str(checkpoint.directory), ties, _packed_names(shells), _LOAD)
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for name in (f"{path}.{kind}" for path in shells for kind in ("scales", "zeros")):
            if name in state and not state[name].isfinite().all():
                raise ValueError(f"[{_LOAD}] {name} has values that are not finite numbers")
    except Exception:
        _put(model, originals)
        fuse(model)
        raise
    packed = set(_packed_names(shells))
    dtypes = (tensor.dtype for name, tensor in state.items() if tensor.is_floating_point() and name not in packed)
    dtype = next(dtypes, None)
    for path, layer in shells.items():
        move_hooks(originals[path], layer)
        layer.follow_dtype(dtype or layer.weight.dtype, "cpu")  # this buffer is not stored
    state |= {alias: state[name] for alias, name in ties.items()}
    model.load_state_dict(state, assign=True)
    _share(model, ties)
    align_parameters(model)
    fuse(model)
    mark_configs(model)
    model.eval()


def is_saved(directory: Path) -> bool:
    """Whether `save_quantized` wrote the directory, and nothing that is of another kind since."""
    checkpoint = Checkpoint.at(directory)
    return (directory / MARLIN_FILE).exists() and other_method(checkpoint.config or {}) == MARLIN_METHOD


def _read_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of quantization_config.json.

    Raises:
        FileNotFoundError: the directory or its config.json or the weights are missing.
        ValueError: it is of another kind, or the record is damaged.
    """
    directory = checkpoint.directory
    if not directory.is_dir():
        raise FileNotFoundError(f"[{_LOAD}] {directory} is no directory")
    if checkpoint.config is None:
        raise FileNotFoundError(f"[{_LOAD}] {directory} has no config.json")
    refuse_mlx(directory, _LOAD)
    if (record := checkpoint.json(MARLIN_FILE)) is None:
        method = other_method(checkpoint.config)
        loader = "load_and_quantize loads and quantizes it" if method is None else "Transformers' from_pretrained may"
        what = "is not quantized" if method is None else f"is quantized by {method!r}"
        raise ValueError(f"[{_LOAD}] {directory} has no {MARLIN_FILE} and {what}; {loader}")
    file = directory / MARLIN_FILE
    if record.get("format") != FORMAT:
        raise ValueError(f"[{_LOAD}] {file} has the format {record.get('format')!r}; supported is {FORMAT!r}")
    for name in ("layers", "tied"):
        if not isinstance(record.setdefault(name, {}), dict):
            raise ValueError(f"[{_LOAD}] {file}: {name!r} is not a JSON object")
    return record


def refuse_mlx(directory: Path, op: str) -> None:
    if Checkpoint.at(directory, op).is_mlx:
        raise ValueError(f"[{op}] {directory} is an MLX checkpoint; load_checkpoint loads it")


def _class_of(config: Any, trust_remote_code: bool) -> Any:
    """The class of the saved model, or the one that finds it among the Python code that config.json names."""
    transformers = compat.require("transformers")
    remote = [name for name in getattr(config, "auto_map", None) or () if name.startswith("AutoModel")]
    if trust_remote_code and remote:
        return getattr(transformers, remote[0], transformers.AutoModelForCausalLM)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


@functools.cache
def marlin_quantizer_classes() -> tuple[type, type]:
    """`MarlinConfig` and `MarlinQuantizer`, made here because their bases are Transformers'.

    They let `from_pretrained` place the layers of a saved model before it loads the tensors.
    """
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class MarlinConfig(QuantizationConfigMixin):
        """Says that quantization_config.json, beside the weights, describes the layers."""

        def __init__(self, **_: Any) -> None:
            self.quant_method = MARLIN_METHOD

    class MarlinQuantizer(quantizer_classes()[1]):
        """Loads what `save_quantized` wrote."""

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
            _place_layers(model, [Path(file) for file in options.get("checkpoint_files") or ()])

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            return []  # the tensors are stored under their names in the model

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> None:
            return None  # as stored

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
            freeze_packed(model, _LOAD)
            for module in model.modules():
                if isinstance(module, ColumnPackedModule):
                    # The packed tensors keep their stored dtypes, so the requested dtype is noted here.
                    module.follow_dtype(model.dtype, module.scales.device)
            fuse(model)

    return MarlinConfig, MarlinQuantizer


STORED_KINDS[MARLIN_METHOD] = StoredKind(marlin_quantizer_classes, ColumnPackedModule, write_quantized)


def _place_layers(model: PreTrainedModel, files: list[Path]) -> None:
    """Puts layers that wait for their tensors into `model`, which is on the meta device.

    Raises:
        ValueError: the record or the stored tensors are not those of the model.
    """
    if not files:
        raise ValueError(f"[{_LOAD}] the model is read from files, not from a state_dict")
    directory = files[0].parent
    checkpoint = Checkpoint.at(directory, _LOAD)
    record = _read_record(checkpoint)
    if set(files) != set(checkpoint.files):
        raise ValueError(f"[{_LOAD}] {directory}: the index does not name the weight files that are there")
    unfuse(model, record["layers"])
    shells = _shells(model, record, checkpoint)
    _put(model, shells)
    for path in shells:
        holder = model.get_submodule(path.rpartition(".")[0])
        if not holder._parameters and not holder._buffers:
            holder._is_hf_initialized = True  # else Transformers initialises the float weights of its layers
    _check_ties(model.state_dict(keep_vars=True), record["tied"], checkpoint)
    _share(model, record["tied"])
    model.all_tied_weights_keys = dict(record["tied"])  # Transformers ties again after loading
    check_tensors(model, checkpoint.tensors(), str(directory), exact=_packed_names(shells), op=_LOAD)


def _shells(model: nn.Module, record: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, ColumnPackedModule]:
    """Layers that wait for their tensors, by the paths that the record has them under.

    Raises:
        ValueError: the record has layers that the model has not, or in formats that are not supported.
    """
    file = checkpoint.directory / MARLIN_FILE
    linear = {
        path: as_linear(layer)
        for path, layer in model.named_modules(remove_duplicate=False)
        if type(layer) in (nn.Linear, SwitchLinear) or is_conv1d(layer)
    }
    if unknown := [path for path in record["layers"] if path not in linear]:
        raise ValueError(f"[{_LOAD}] {file} has layers that the model has not: {listed(unknown)}")
    shells = {}
    for path, entry in record["layers"].items():
        if (reason := why_not(path, linear[path], DTYPES)) is not None:
            raise ValueError(f"[{_LOAD}] {file} has {path} as a packed layer, which it cannot be: {reason}")
        try:
            shells[path] = shell(linear[path], entry)
            shells[path].conv1d_class = conv1d_of(linear[path])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"[{_LOAD}] {file}: {path} is {entry!r}, which is not supported") from error
    return shells


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for path, layer in layers.items():
        model.set_submodule(path, layer)


def _packed_names(layers: Mapping[str, ColumnPackedModule]) -> list[str]:
    return [f"{path}.{name}" for path, layer in layers.items() for name in layer.state_dict() if name != "bias"]


def shell(layer: nn.Module, entry: Mapping[str, Any]) -> ColumnPackedModule:
    """A layer of the same sizes that waits for its tensors.

    Raises:
        KeyError, TypeError, ValueError: the entry is not one of a supported format.
    """
    layer_class, options = _CLASSES[entry["class"]]
    dtype = layer.weight.dtype if layer.bias is None else layer.bias.dtype
    experts = (layer.num_experts,) if isinstance(layer, SwitchLinear) else ()
    made = layer_class(
        *experts,
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


def shell_like(layer: nn.Module, twin: ColumnPackedModule) -> ColumnPackedModule:
    """`shell` in the format of `twin`."""
    return shell(layer, entry_of(twin))


def _check_ties(tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raises ValueError unless the tensors of a model that the record has as one can be one."""
    for alias, name in aliases.items():
        if alias not in tensors or name not in tensors or tensors[alias].shape != tensors[name].shape:
            file = checkpoint.directory / MARLIN_FILE
            raise ValueError(f"[{_LOAD}] {file} ties {alias} to {name}, which the model cannot")


def _share(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Makes one tensor of those that are stored once."""
    tensors = model.state_dict(keep_vars=True)
    for alias, name in aliases.items():
        path, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(path), attribute, tensors[name])
