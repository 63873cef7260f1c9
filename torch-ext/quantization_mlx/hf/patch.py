"""After `patch_transformers()`, Transformers reads and writes MLX checkpoints, and runs `MetalConfig` on any device.

What loads is Transformers' own `from_pretrained`. The patch lets it find the quantizer (quantizer.py, or that of
marlin/saved.py) of a config without `quant_method`, and all weight files of an MLX checkpoint.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..checkpoint.read import WEIGHT_FILES, Checkpoint, reading_once
from ..checkpoint.record import MARLIN_FILE, MARLIN_METHOD, MLX_METHOD, RECORDS, find_record, own_method
from ..families import family_of
from ..nn.module import QuantizedModule
from ..optional import PreTrainedConfig, PreTrainedModel
from . import compat
from .patching import Patch, replace, wrap
from .quantizer import quantizer_classes
from .save import save_checkpoint


class StoredKind(NamedTuple):
    """Quantized models of a kind that `from_pretrained` and `save_pretrained` know."""

    quantizer_classes: Callable[[], tuple[type, type]]  # makes those of config and quantizer
    layer: type[nn.Module]  # the class of its layers
    write: Callable[..., None]  # called with the model, the directory, max_shard_bytes and state_dict


STORED_KINDS = {MLX_METHOD: StoredKind(quantizer_classes, QuantizedModule, save_checkpoint)}  # by the quantizer's name


def patch_transformers() -> None:
    """Makes Transformers read and write MLX checkpoints, until `unpatch_transformers()`; a second call does nothing.

    - `from_pretrained` loads MLX checkpoints, by the name of a repository or of a directory, with their layers
      quantized: config.json needs no `quant_method`, and the index of the weight files is not used.
      It raises ValueError if tensors are missing, unknown, damaged or of a wrong shape or dtype, or scales not finite.
      Directories that `marlin.save_quantized` wrote load as well.
    - `save_pretrained` writes models that have quantized layers as MLX checkpoints, which mlx_lm loads, and models with
      layers of Marlin as `marlin.save_quantized` does. A save that fails leaves an older checkpoint in the directory as
      it was.
    - Models with the `MetalConfig` of Transformers run on this package's kernels, on any device.

    Raises:
        ImportError: transformers or safetensors is not installed, or transformers is older than the tested versions or
            lacks a name that is needed.
    """
    _patch.install()


def unpatch_transformers() -> None:
    """Undoes `patch_transformers()`; without it, does nothing. MLX models that were loaded go on working."""
    _patch.remove()


def patched_transformers() -> AbstractContextManager[None]:
    """As between `patch_transformers()` and `unpatch_transformers()`; may be nested, and used by several threads."""
    return _patch.applied()


def _apply(stack: ExitStack) -> None:
    compat.require("transformers")
    compat.check("patch_transformers")
    from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils, quantizers
    from transformers.integrations import metal_quantization
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_metal import MetalHfQuantizer

    for method, kind in STORED_KINDS.items():
        config_class, quantizer_class = kind.quantizer_classes()
        quantizers.register_quantization_config(method)(config_class)
        stack.callback(auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop, method)
        quantizers.register_quantizer(method)(quantizer_class)
        stack.callback(auto.AUTO_QUANTIZER_MAPPING.pop, method)

    wrap(stack, PreTrainedConfig, "get_config_dict", _get_config_dict)
    wrap(stack, PreTrainedModel, "from_pretrained", _from_pretrained)
    wrap(stack, PreTrainedModel, "save_pretrained", _save_pretrained)
    wrap(stack, modeling_utils, "get_hf_quantizer", _get_hf_quantizer)
    wrap(stack, modeling_utils, "_get_resolved_checkpoint_files", _get_resolved_checkpoint_files)
    replace(stack, MetalHfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    replace(stack, MetalHfQuantizer, "update_device_map", _metal_device_map)
    replace(stack, metal_quantization, "_metal_kernel", ops)


_patch = Patch(_apply)


def _metal_device_map(self: Any, device_map: Any) -> Any:
    """Where a model with MetalConfig goes: to the GPU of a Mac if the user does not say, and else to the CPU."""
    return {"": "mps"} if device_map is None and torch.backends.mps.is_available() else device_map


def _get_config_dict(original: Any, cls: type[PreTrainedConfig], *args: Any, **kwargs: Any) -> Any:
    """Writes the record of formats into the parts of config.json too.

    The class of a part, of the text of a model that sees images for example, is given that part alone.
    """
    config, unused = original(cls, *args, **kwargs)
    if own_method(config) is not None:
        record = {name: config[name] for name in RECORDS if config.get(name)}
        for name, part in config.items():
            if isinstance(part, dict) and (name == cls.base_config_key or part.get("model_type") == cls.model_type):
                config[name] = {**record, **part}
    return config, unused


def _from_pretrained(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Lets the functions below share what they read."""
    with reading_once():
        return original(*args, **kwargs)


def _get_hf_quantizer(original: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
    """Knows the quantizer of a config without `quant_method`, as MLX and Marlin write it."""
    mark_as_mlx(config)
    for holder in (config, config.get_text_config(decoder=True)):
        if own_method(_records_of(holder)) == MARLIN_METHOD:
            config.quantization_config = {"quant_method": MARLIN_METHOD}
    return original(config, *args, **kwargs)


def _records_of(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in RECORDS}


def mark_as_mlx(config: PreTrainedConfig, always: bool = False) -> None:
    """Gives the record of formats in `config` the `quant_method` by which Transformers finds the quantizer.

    The record of gpt-oss as OpenAI stores it, in mode mxfp4 by another name, becomes one of MLX where Transformers
    would dequantize the experts, which is without a GPU of the kinds that its own kernels are for. A config without any
    record is left alone, or `always` becomes that of a checkpoint without quantized layers. Raises ValueError if the
    checkpoint quantizes activations.
    """
    for holder in (config, config.get_text_config(decoder=True)):
        record = find_record(_records_of(holder)) or family_of(holder).record(holder)
        if record is not None or always:
            break
    else:
        return
    if getattr(config, "quantize_activations", False):
        raise ValueError("[from_pretrained] the checkpoint asks for quantized activations, which are not supported")
    for name in RECORDS:
        if hasattr(holder, name):
            delattr(holder, name)
    config.quantization_config = {**(record or {}), "quant_method": MLX_METHOD}


def _get_resolved_checkpoint_files(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes all files `model*.safetensors` of an MLX checkpoint, and not those that an index names.

    Raises ValueError if config.json has a record of formats, and the config of the model has none.
    """
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    source = given.get("pretrained_model_name_or_path")
    plain = not any(given.get(name) for name in ("gguf_file", "variant", "transformers_explicit_filename"))
    options = given.get("download_kwargs") or {}
    known = plain and source is not None and not os.path.isfile(source)
    checkpoint = _stored_checkpoint(source, options) if known else None
    if checkpoint is None:
        return original(*args, **kwargs)
    is_local = os.path.isdir(source)
    if (method := own_method(checkpoint.config or {})) is not None:
        if (given.get("user_agent") or {}).get("quant") != method:
            raise ValueError(
                f"[from_pretrained] config.json of {source} says that the weights are quantized, which the config "
                "of the model does not; load with the class that config.json names, without a config of your own"
            )
        if method == MARLIN_METHOD and not is_local:
            _cached(source, MARLIN_FILE, options)  # downloaded into the directory of the weights
    if not checkpoint.is_mlx if is_local else checkpoint.record is None:
        return original(*args, **kwargs)
    if not is_local:
        checkpoint = Checkpoint.at(_downloaded(source, options))
    return [str(file) for file in checkpoint.files], None


def _stored_checkpoint(source: str | os.PathLike[str], options: Mapping[str, Any]) -> Checkpoint | None:
    """The directory, or that in the cache into which config.json of a repository is downloaded; None if it has none."""
    if os.path.isdir(source):
        return Checkpoint.at(Path(source, options.get("subfolder") or ""))
    file = _cached(source, "config.json", options)
    return None if file is None else Checkpoint.at(Path(file).parent)


def _cached(source: str | os.PathLike[str], name: str, options: Mapping[str, Any]) -> str | None:
    """The path of a repository's file, after its download; None if there is none of that name."""
    from transformers.utils import cached_file

    return cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **_given(options))


def _downloaded(source: str | os.PathLike[str], options: Mapping[str, Any]) -> Path:
    """Where the weights of an MLX checkpoint on the Hub are, after their download."""
    from huggingface_hub import snapshot_download

    subfolder = options.get("subfolder") or ""
    names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
    snapshot = snapshot_download(
        str(source),
        allow_patterns=[f"{subfolder}/{WEIGHT_FILES}" if subfolder else WEIGHT_FILES],
        **{name: value for name, value in _given(options).items() if name in names},
    )
    return Path(snapshot, subfolder)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _save_pretrained(
    original: Any,
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str | None = None,
    **kwargs: Any,
) -> None:
    """Writes models with quantized layers of this package in their own formats."""
    kinds = () if model._hf_peft_config_loaded else STORED_KINDS.values()
    write = next((kind.write for kind in kinds if any(isinstance(each, kind.layer) for each in model.modules())), None)
    if write is None:
        options = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        return original(model, save_directory, **options, **_given({"max_shard_size": max_shard_size}))
    max_shard_size = max_shard_size or "5GB"
    if kwargs.get("variant") is not None or kwargs.get("distributed_checkpoint"):
        raise ValueError("[save_pretrained] a quantized model is written without variant and distributed_checkpoint")
    if is_main_process:
        write(model, save_directory, max_shard_bytes=max_shard_size, state_dict=state_dict)
        if push_to_hub:
            names = ("commit_message", "private", "token", "revision", "create_pr")
            model.push_to_hub(
                kwargs.get("repo_id") or Path(save_directory).name,
                max_shard_size=max_shard_size,
                **{name: kwargs[name] for name in names if name in kwargs},
            )
