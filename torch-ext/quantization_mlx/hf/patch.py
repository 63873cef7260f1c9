"""After `patch_transformers()`, Transformers reads and writes MLX checkpoints, and runs `MetalConfig` on any device.

What loads is Transformers' own `from_pretrained`. The patch lets it find the quantizer (quantizer.py, or that of
marlin/saved.py) of a config without `quant_method`, and all weight files of an MLX checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..checkpoint.read import WEIGHT_FILES, Checkpoint, reading_once
from ..checkpoint.record import MARLIN_FILE, MARLIN_METHOD, MLX_METHOD, RECORDS, find_record, own_method
from ..families import family_of
from ..nn.module import QuantizedModule
from ..optional import require
from . import compat
from .quantizer import quantizer_classes
from .save import write_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class StoredKind(NamedTuple):
    """Quantized models of a kind that `from_pretrained` and `save_pretrained` know.

    quantizer_classes: makes the classes of config and quantizer. layer: the class of its layers. write: called with the
    model, the directory, max_shard_size and state_dict.
    """

    quantizer_classes: Callable[[], tuple[type, type]]
    layer: type[nn.Module]
    write: Callable[..., None]


STORED_KINDS = {MLX_METHOD: StoredKind(quantizer_classes, QuantizedModule, write_checkpoint)}  # by the quantizer's name

# Patching


class _Patch:
    """The state of the patch: how many hold it, and how it is undone."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.holders = 0
        self.permanent = False
        self.undo = contextlib.ExitStack()

    def acquire(self) -> None:
        if self.holders == 0:
            with contextlib.ExitStack() as stack:
                _apply(stack)
                self.undo = stack.pop_all()
        self.holders += 1

    def release(self) -> None:
        self.holders -= 1
        if self.holders == 0:
            self.undo.close()


_patch = _Patch()


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
    with _patch.lock:
        if not _patch.permanent:
            _patch.acquire()
            _patch.permanent = True


def unpatch_transformers() -> None:
    """Undoes `patch_transformers()`; without it, does nothing. MLX models that were loaded go on working."""
    with _patch.lock:
        if _patch.permanent:
            _patch.permanent = False
            _patch.release()


@contextlib.contextmanager
def patched_transformers() -> Iterator[None]:
    """As between `patch_transformers()` and `unpatch_transformers()`; may be nested, and used by several threads."""
    with _patch.lock:
        _patch.acquire()
    try:
        yield
    finally:
        with _patch.lock:
            _patch.release()


def _apply(stack: contextlib.ExitStack) -> None:
    """Patches; `stack` gets what undoes it."""
    compat.require("transformers")
    require("safetensors")
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

    for target, name, replacement in (
        (PreTrainedConfig, "get_config_dict", _gives_parts_the_record(PreTrainedConfig.get_config_dict)),
        (PreTrainedModel, "from_pretrained", _reads_files_once(PreTrainedModel.from_pretrained)),
        (modeling_utils, "get_hf_quantizer", _reads_mlx_configs(modeling_utils.get_hf_quantizer)),
        (
            modeling_utils,
            "_get_resolved_checkpoint_files",
            _takes_all_weight_files(modeling_utils._get_resolved_checkpoint_files),
        ),
        (PreTrainedModel, "save_pretrained", _writes_quantized_models(PreTrainedModel.save_pretrained)),
        (MetalHfQuantizer, "validate_environment", lambda self, *args, **kwargs: None),
        (MetalHfQuantizer, "update_device_map", _metal_device_map),
        (metal_quantization, "_metal_kernel", ops),
    ):
        stack.callback(setattr, target, name, inspect.getattr_static(target, name))
        setattr(target, name, replacement)


def _metal_device_map(self: Any, device_map: Any) -> Any:
    """Where a model with MetalConfig goes: to the GPU of a Mac if the user does not say, and else to the CPU."""
    return {"": "mps"} if device_map is None and torch.backends.mps.is_available() else device_map


def _gives_parts_the_record(original: Any) -> Any:
    """`get_config_dict` that writes the record of formats into the parts of config.json too.

    The class of a part, of the text of a model that sees images for example, is given that part alone.
    """

    @functools.wraps(original.__func__)
    def get_config_dict(cls: type[PreTrainedConfig], *args: Any, **kwargs: Any) -> Any:
        config, unused = original.__func__(cls, *args, **kwargs)
        if own_method(config) is not None:
            record = {name: config[name] for name in RECORDS if config.get(name)}
            for name, part in config.items():
                if isinstance(part, dict) and (name == cls.base_config_key or part.get("model_type") == cls.model_type):
                    config[name] = {**record, **part}
        return config, unused

    return classmethod(get_config_dict)


def _reads_files_once(original: Any) -> Any:
    """`from_pretrained` within which the hooks below share what they have read."""

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        with reading_once():
            return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _reads_mlx_configs(original: Any) -> Any:
    """`get_hf_quantizer` that knows the quantizer of a config without `quant_method`, as MLX and Marlin write it."""

    @functools.wraps(original)
    def get_hf_quantizer(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        mark_as_mlx(config)
        _mark_as_marlin(config)
        return original(config, *args, **kwargs)

    return get_hf_quantizer


def _mark_as_marlin(config: PreTrainedConfig) -> None:
    """Gives a config that `marlin.save_quantized` wrote the `quant_method` of the quantizer."""
    for holder in (config, config.get_text_config(decoder=True)):
        if own_method(_records_of(holder)) == MARLIN_METHOD:
            config.quantization_config = {"quant_method": MARLIN_METHOD}


def _records_of(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in RECORDS}


def mark_as_mlx(config: PreTrainedConfig, always: bool = False) -> None:
    """Gives the record of formats in `config` the `quant_method` by which Transformers finds the quantizer.

    The record of gpt-oss as OpenAI stores it, in mode mxfp4 by another name, becomes one of MLX where Transformers
    would dequantize the experts, which is without a GPU of the kinds that its own kernels are for.

    Args:
        config: of a model; left alone if it has no record of MLX.
        always: whether a config without any record becomes that of a checkpoint without quantized layers.

    Raises:
        ValueError: the checkpoint quantizes activations.
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


def _takes_all_weight_files(original: Any) -> Any:
    """The resolver of weight files, by which MLX checkpoints are all files `model*.safetensors` that there are.

    Raises:
        ValueError: config.json has a record of formats, and the config of the model has none.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _get_resolved_checkpoint_files(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        source = given.get("pretrained_model_name_or_path")
        plain = not any(given.get(name) for name in ("gguf_file", "variant", "transformers_explicit_filename"))
        options = given.get("download_kwargs") or {}
        known = plain and source is not None and not os.path.isfile(source)
        checkpoint = _stored_checkpoint(source, options) if known else None
        if checkpoint is None:
            return original(*args, **kwargs)
        is_local = os.path.isdir(source)
        if (method := own_method(checkpoint.config or {})) is not None:
            chosen = (given.get("user_agent") or {}).get("quant")
            if chosen != method:
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

    return _get_resolved_checkpoint_files


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


def _writes_quantized_models(original: Any) -> Any:
    """`save_pretrained` that writes models with quantized layers of this package in their own formats."""

    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        options = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        write = None if self._hf_peft_config_loaded else _writer(self)
        if write is None:
            return original(self, save_directory, **options, **_given({"max_shard_size": max_shard_size}))
        max_shard_size = max_shard_size or "5GB"
        if kwargs.get("variant") is not None or kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "[save_pretrained] a quantized model is written without variant and distributed_checkpoint"
            )
        if is_main_process:
            write(self, Path(save_directory), max_shard_size=max_shard_size, state_dict=state_dict)
            if push_to_hub:
                names = ("commit_message", "private", "token", "revision", "create_pr")
                self.push_to_hub(
                    kwargs.get("repo_id") or Path(save_directory).name,
                    max_shard_size=max_shard_size,
                    **{name: kwargs[name] for name in names if name in kwargs},
                )

    return save_pretrained


def _writer(model: PreTrainedModel) -> Callable[..., None] | None:
    """What writes the model with its quantized layers, None if it has none."""
    kinds = STORED_KINDS.values()
    return next((kind.write for kind in kinds if any(isinstance(each, kind.layer) for each in model.modules())), None)
