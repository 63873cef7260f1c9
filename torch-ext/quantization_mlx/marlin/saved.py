"""Saving models with Marlin's linear layers, and loading what was saved.

A saved directory holds `config.json`, `model*.safetensors` with an index, `generation_config.json` if the model has
one, and `quantization_config.json`:

    {"format": "marlin",
     "layers": {path: {"class": the name of one of the classes below, "group_size": …, "bits": …, "mode": …}},
     "tied": {name of a tensor: name that the same tensor is stored under}}

The tensors of a layer are stored as `<path>.weight_packed`, `<path>.scales`, `<path>.zeros` in mode "marlin_int4", and
`<path>.bias`; all others under their names in the model. `config.json`, and each part of it, has `MARLIN_RECORD`, by
which Transformers refuses the directory unless `patch_transformers()` or `load_quantized` lets it read the layers.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.read import Checkpoint, reading_once
from ..checkpoint.record import MARLIN_FILE, MARLIN_METHOD, MARLIN_RECORD, other_method
from ..checkpoint.validate import check_tensors
from ..checkpoint.write import distinct_tensors, first_names, write_directory
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
from ..optional import PreTrainedModel, require
from ..quantization.replacement import why_not
from .experts import ColumnPackedSwitchLinear
from .layers import DTYPES, ColumnPackedModule, MarlinLinear, MetalQuantizedLinear

FORMAT = "marlin"  # the record's "format"
_LOAD = "load_quantized"  # the op that loading errors name

_CLASSES = {each.__name__: each for each in (MarlinLinear, MetalQuantizedLinear, ColumnPackedSwitchLinear)}


def usable_device(device: torch.device | str | None, op: str) -> torch.device:
    """The device of that name; for None the GPU of a Mac, and the CPU where there is none. Raises ValueError if it is
    not here, or this package has no kernels for it."""
    here = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    found = torch.device(here[0] if device is None else device)
    if found.type not in here:
        raise ValueError(f"[{op}] device is {str(device)!r}; usable here: {', '.join(map(repr, here))}")
    return found


# Saving


def save_quantized(
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    *,
    max_shard_bytes: int | str = 5 * 1024**3,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a model with layers of Marlin, for `load_quantized`; the opening comment of this module has the layout.

    Everything is written beside its final place first and then renamed, so a save that fails leaves an older directory
    as it was. Weight files of an older model are removed, other files are kept. The tokenizer is not written; its own
    `save_pretrained(output_dir)` does that.

    Args:
        model: any module after `quantize_model` or `replace_linear_layers`, or from `load_quantized`. Only a
            `transformers.PreTrainedModel` has a config, of which `load_quantized` makes the model again; for others it
            has to be given one.
        output_dir: made if it does not exist.
        max_shard_bytes: weights beyond this size are split over several files; a number, or a string such as "5GB".
        state_dict: the model's tensors, if they are not those that it holds.

    Raises:
        ImportError: transformers or safetensors is not installed.
        TypeError: model is no module.
        ValueError: model has no layers of Marlin, or layers of other quantized kinds, or state that is no tensor.
    """
    op = "save_quantized"
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{op}] model is of type {type(model).__name__}; it must be a torch.nn.Module")
    transformers = compat.require("transformers")
    compat.check(op)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {path: module for path, module in modules.items() if isinstance(module, ColumnPackedModule)}
    if not layers:
        raise ValueError(
            f"[{op}] the model has no layers of Marlin; quantize_model and replace_linear_layers make them"
        )
    if strange := [path for path, layer in layers.items() if type(layer) not in _CLASSES.values()]:
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
            config = config_record(model)
            for part in config.values():  # the class of a part reads that one alone
                if isinstance(part, dict) and "model_type" in part:
                    part["quantization_config"] = MARLIN_RECORD
        entries = {path: _entry_of(layer) for path, layer in layers.items()}
        tied = {name: first for name, first in first_names(model).items() if first != name}
        record = {"format": FORMAT, "layers": entries, "tied": tied}
        return {
            "config.json": dict(sorted({**config, "quantization_config": MARLIN_RECORD}.items())),
            MARLIN_FILE: record,
        }

    write_directory(model, Path(output_dir), distinct_tensors(model, state_dict), records, "pt", max_shard_bytes)


def mark_configs(model: nn.Module) -> None:
    """Lets the configs in `model` say that it has layers of Marlin: what Transformers' own `save_pretrained` writes has
    no record of them, and with this, loading it raises."""
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


def _entry_of(layer: ColumnPackedModule) -> dict[str, Any]:
    """What the record says of a layer."""
    return {"class": type(layer).__name__, **layer.format}


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
        model: made by the code that made the saved model, with its `nn.Linear` layers or with packed ones, such as
            those of `MetalTransformerBlock`, maybe on the meta device. It is changed in place and returned. None
            builds the model of Transformers that config.json describes.
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
    compat.check("patch_transformers")
    with reading_once():
        checkpoint = Checkpoint.at(path, _LOAD)
        record = _read_record(checkpoint)
        if model is None:
            model = _build(checkpoint, trust_remote_code)
        else:
            _fill(model, record, checkpoint)
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


def _fill(model: nn.Module, record: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Puts the layers of the record and the stored tensors into `model`, in eval mode; all of them or none.

    Raises ValueError as `_place` does, and if scales are not finite numbers.
    """
    load_file = require("safetensors.torch").load_file
    checkpoint.tensors()  # raises for files that are damaged
    state = {name: tensor for file in checkpoint.files for name, tensor in load_file(file).items()}
    packed = _packed_names(record)
    for name in packed:
        if name in state and not state[name].isfinite().all():
            raise ValueError(f"[{_LOAD}] {name} has values that are not finite numbers")
    originals = _place(model, record, checkpoint)
    dtypes = (tensor.dtype for name, tensor in state.items() if tensor.is_floating_point() and name not in packed)
    dtype = next(dtypes, None)
    for path, original in originals.items():
        layer = model.get_submodule(path)
        move_hooks(original, layer)
        layer.follow_dtype(dtype or layer.weight.dtype, "cpu")  # this buffer is not stored
    state |= {alias: state[name] for alias, name in record["tied"].items()}
    model.load_state_dict(state, assign=True)
    _share(model, record["tied"])
    align_parameters(model)
    fuse(model)
    mark_configs(model)
    model.eval()


def is_saved(directory: Path) -> bool:
    """Whether `save_quantized` wrote the directory, and nothing that is of another kind since."""
    checkpoint = Checkpoint.at(directory)
    return (directory / MARLIN_FILE).exists() and other_method(checkpoint.config or {}) == MARLIN_METHOD


def _read_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of quantization_config.json. Raises FileNotFoundError if the directory or its config.json or the
    weights are missing, and ValueError if it is of another kind, or the record is damaged."""
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


STORED_KINDS[MARLIN_METHOD] = StoredKind(marlin_quantizer_classes, ColumnPackedModule, save_quantized)


def _place_layers(model: PreTrainedModel, files: list[Path]) -> None:
    """`_place` for a model of Transformers on the meta device."""
    if not files:
        raise ValueError(f"[{_LOAD}] the model is read from files, not from a state_dict")
    directory = files[0].parent
    checkpoint = Checkpoint.at(directory, _LOAD)
    record = _read_record(checkpoint)
    if set(files) != set(checkpoint.files):
        raise ValueError(f"[{_LOAD}] {directory}: the index does not name the weight files that are there")
    for path in _place(model, record, checkpoint):
        holder = model.get_submodule(path.rpartition(".")[0])
        if not holder._parameters and not holder._buffers:
            holder._is_hf_initialized = True  # else Transformers initialises the float weights of its layers
    _share(model, record["tied"])
    model.all_tied_weights_keys = dict(record["tied"])  # Transformers ties again after loading


def _place(model: nn.Module, record: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Puts layers that wait for their tensors in the place of those of `model`, which it returns, by their paths.

    Raises ValueError if the record or the stored tensors are not those of the model, which then is as it was.
    """
    unfuse(model, record["layers"])
    originals: dict[str, nn.Module] = {}
    try:
        shells = _shells(model, record, checkpoint)
        originals = {path: model.get_submodule(path) for path in shells}
        _put(model, shells)
        tensors = model.state_dict(keep_vars=True)
        for alias, name in record["tied"].items():
            if alias not in tensors or name not in tensors or tensors[alias].shape != tensors[name].shape:
                file = checkpoint.directory / MARLIN_FILE
                raise ValueError(f"[{_LOAD}] {file} ties {alias} to {name}, which the model cannot")
        source, packed = str(checkpoint.directory), _packed_names(record)
        check_tensors(model, checkpoint.tensors(), source, record["tied"], packed, _LOAD)
    except Exception:
        _put(model, originals)
        fuse(model)
        raise
    return originals


def _shells(model: nn.Module, record: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, ColumnPackedModule]:
    """Layers that wait for their tensors, by the paths that the record has them under."""
    file = checkpoint.directory / MARLIN_FILE
    linear = {
        path: as_linear(layer)
        for path, layer in model.named_modules(remove_duplicate=False)
        if type(layer) in (nn.Linear, SwitchLinear, *_CLASSES.values()) or is_conv1d(layer)
    }
    if unknown := [path for path in record["layers"] if path not in linear]:
        raise ValueError(f"[{_LOAD}] {file} has layers that the model has not: {listed(unknown)}")
    shells = {}
    for path, entry in record["layers"].items():
        is_packed = isinstance(linear[path], ColumnPackedModule)
        if not is_packed and (reason := why_not(path, linear[path], DTYPES)) is not None:
            raise ValueError(f"[{_LOAD}] {file} has {path} as a packed layer, which it cannot be: {reason}")
        try:
            shells[path] = _shell(linear[path], entry)
            shells[path].conv1d_class = conv1d_of(linear[path])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"[{_LOAD}] {file}: {path} is {entry!r}, which is not supported") from error
    return shells


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for path, layer in layers.items():
        model.set_submodule(path, layer)


def _packed_names(record: Mapping[str, Any]) -> list[str]:
    return [f"{path}.{name}" for path in record["layers"] for name in ColumnPackedModule.packed_names]


def _shell(layer: nn.Module, entry: Mapping[str, Any]) -> ColumnPackedModule:
    """A layer of the same sizes that waits for its tensors. Raises KeyError, TypeError or ValueError unless the entry
    is one of a supported format."""
    packed = _CLASSES[entry["class"]]
    made = packed.shell(layer, layer.weight.dtype, group_size=entry["group_size"], **packed.options_of(entry["mode"]))
    if _entry_of(made) != dict(entry):
        raise ValueError(f"an entry would be {_entry_of(made)}")
    return made


def _share(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Makes one tensor of those that are stored once."""
    tensors = model.state_dict(keep_vars=True)
    for alias, name in aliases.items():
        path, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(path), attribute, tensors[name])
