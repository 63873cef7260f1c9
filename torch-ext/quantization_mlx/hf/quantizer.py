"""The quantizer that Transformers' `from_pretrained` uses for MLX checkpoints."""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.read import Checkpoint
from ..checkpoint.record import MLX_METHOD, entry_format, format_of_tensors
from ..checkpoint.validate import check_tensors
from ..families import family_of
from ..formats import MODES, Format
from ..messages import listed
from ..nn.conv1d import as_linear, finish_conv1d, place_linear
from ..nn.module import PackedModule, QuantizedModule
from ..nn.warm_up import warm_up
from ..optional import PreTrainedModel
from ..quantization.model import KINDS, dequantize_model, quantize_model
from ..quantization.replacement import Refusal, class_refusal, replace_layers
from . import compat
from .experts import FormatOf, expert_renamings, finish_experts, is_packed_router, place_experts, place_routers

# Stored by some checkpoints, computed by models.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@functools.cache
def quantizer_classes() -> tuple[type, type]:
    """`MLXConfig` and `MLXQuantizer`, made here because their bases are Transformers'."""
    from transformers.quantizers import HfQuantizer
    from transformers.utils import logging
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class MLXConfig(QuantizationConfigMixin):
        """The formats of an MLX checkpoint, as its config.json records them.

        Args:
            group_size, bits, mode: the common format.
            entries: by the path of a layer, its own format as a dict, or false if it is not quantized.
        """

        def __init__(
            self, group_size: int | None = None, bits: int | None = None, mode: str | None = None, **entries: Any
        ) -> None:
            self.quant_method = MLX_METHOD
            entries.pop("quant_method", None)
            common = {"group_size": group_size, "bits": bits, "mode": mode}
            self.record = {**{name: value for name, value in common.items() if value is not None}, **entries}
            entry_format(self.record)
            for entry in entries.values():
                if isinstance(entry, Mapping):
                    entry_format(entry)

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": self.quant_method, **self.record}

    class MLXQuantizer(HfQuantizer):
        """Loads MLX checkpoints; quantizes other ones after they are loaded."""

        requires_calibration = False
        is_trainable = True  # for adapters: gradients reach the activations
        is_compileable = True
        prefix: str | None = None  # of all names in the checkpoint, but not in the model

        def is_serializable(self) -> bool:
            # Only Transformers' own save_pretrained asks, and it cannot write the format.
            logging.get_logger("transformers").warning_once(
                "quantized models are written by save_pretrained after patch_transformers(), or by save_checkpoint"
            )
            return False

        def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
            """What `model.dequantize(dtype)` calls; without a dtype, each layer keeps its own."""
            model = dequantize_model(model)
            # Transformers' default is the dtype at load time, which may have changed since.
            return model if dtype in (None, model.config.dtype) else model.to(dtype)

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
            if self.pre_quantized:
                _place_layers(model, self, options.get("checkpoint_files"))

        def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
            """Spares packed words, whose layers say another shape, a check that `_place_layers` has made."""
            path, _, name = param_name.rpartition(".")
            return name == "weight" and isinstance(model.get_submodule(path), QuantizedModule)

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            from transformers.core_model_loading import PrefixChange

            first = [PrefixChange(prefix_to_remove=self.prefix)] if self.prefix else []
            return first + super().update_weight_conversions(weight_conversions, model) + expert_renamings(model)

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
            if not self.pre_quantized:
                record = self.quantization_config.record
                quantize_model(model, **entry_format(record), predicate=lambda path, layer: record.get(path, True))
            freeze_packed(model)
            finish_experts(model)
            finish_conv1d(model)
            if not any(isinstance(module, QuantizedModule) for module in model.modules()):
                self.remove_quantization_config(model)
            warm_up(model)

    for each in (MLXConfig, MLXQuantizer):
        each.__qualname__ = each.__name__
    return MLXConfig, MLXQuantizer


def __getattr__(name: str) -> Any:
    """The two classes, as attributes of the module, where pickle and users look for them."""
    names = ("MLXConfig", "MLXQuantizer")
    if name in names:
        return quantizer_classes()[names.index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _place_layers(model: PreTrainedModel, quantizer: Any, checkpoint_files: list[str] | None) -> None:
    """Puts quantized layers that wait for their tensors into `model`, which is on the meta device. Raises ValueError if
    the stored tensors are not those of the model."""
    if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
        raise ValueError("[from_pretrained] an MLX checkpoint is read from safetensors files, not from a state_dict")
    files = [Path(file) for file in checkpoint_files]
    checkpoint = Checkpoint.at(files[0].parent)
    headers = checkpoint.tensors(files)
    names, converted = _place_unusual(model, quantizer, headers)
    if twice := sorted(name for name, count in Counter(names.values()).items() if count > 1):
        raise ValueError(f"[from_pretrained] {files[0].parent} has tensors under several names: {listed(twice)}")
    stored = {names[name]: tensor for name, tensor in headers.items() if name in names}
    record = {
        names.get(f"{key}.weight", f"{key}.weight").removesuffix(".weight"): entry
        for key, entry in quantizer.quantization_config.record.items()
    }
    _settle_tying(model, checkpoint.config or {}, stored)

    def format_of(path: str, layer: nn.Module) -> Format | None:
        return format_of_tensors(path, as_linear(layer).weight.shape[-1], record, stored)

    def choose(path: str, layer: nn.Module) -> Format | Refusal:
        return format_of(path, layer) or Refusal("not quantized in the checkpoint", is_asked_for=True)

    compat.adapt_accelerate()
    done = replace_layers(model, class_refusal, choose, KINDS)
    place_routers(model, format_of)
    _refuse_obstacles(model, done.refusals, format_of, files[0].parent)
    _tie_packed(model, stored)
    check_tensors(model, _without_ignored(model, stored), str(files[0].parent), converted | _may_be_missing(model))


def _tie_packed(model: PreTrainedModel, stored: Mapping[str, torch.Tensor]) -> None:
    """Lets Transformers tie the scales and biases with the words, and tie to what is stored."""
    for target, source in list(model.all_tied_weights_keys.items()):
        layer_path, _, attribute = target.rpartition(".")
        if not isinstance(layer := model.get_submodule(layer_path), QuantizedModule):
            continue
        if attribute != "weight":
            setattr(layer, attribute, model.get_parameter(source))
            continue
        for name in ("scales", "biases"):
            if getattr(layer, name) is not None:
                model.all_tied_weights_keys[f"{layer_path}.{name}"] = f"{source.removesuffix('weight')}{name}"
    for target, source in list(model.all_tied_weights_keys.items()):
        if source not in stored and target in stored:  # else Transformers makes a new source
            model.all_tied_weights_keys[source] = target
            del model.all_tied_weights_keys[target]


def _refuse_obstacles(model: nn.Module, refusals: Mapping[str, Refusal], format_of: FormatOf, directory: Path) -> None:
    """Raises ValueError for layers that the checkpoint has quantized and that cannot be so in `model`, with reasons."""
    obstructed = [
        f"{path}: {refusal.reason}"
        for path, refusal in refusals.items()
        if not refusal.is_asked_for
        and not is_packed_router(layer := model.get_submodule(path))
        and format_of(path, layer) is not None
    ]
    if obstructed:
        raise ValueError(f"[from_pretrained] {directory} has layers quantized that cannot be: {listed(obstructed)}")


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Compares the headers of an MLX checkpoint with the model that config.json describes; does nothing if Transformers
    does not know that. Raises ValueError if the stored tensors are not those of the model."""
    if (model := _meta_model(checkpoint.directory)) is not None:
        _place_layers(model, _quantizer_of(checkpoint), [str(file) for file in checkpoint.files])


def columns_of_layers(checkpoint: Checkpoint) -> dict[str, int]:
    """The columns of the weights in the model that config.json describes, by their paths in the checkpoint; empty if
    Transformers is not installed or does not know the model."""
    if (model := _meta_model(checkpoint.directory)) is None:
        return {}
    headers = checkpoint.tensors()
    names, _ = _place_unusual(model, _quantizer_of(checkpoint), headers)
    layers = dict(model.named_modules(remove_duplicate=False))
    columns = {}
    for name in headers:
        if name.endswith(".weight") and name in names:
            weight = getattr(as_linear(layers.get(names[name].removesuffix(".weight"))), "weight", None)
            if weight is not None and weight.dim():
                columns[name.removesuffix(".weight")] = weight.shape[-1]
    return columns


def _meta_model(directory: Path) -> PreTrainedModel | None:
    """The model that config.json describes, on the meta device; None if Transformers cannot make it."""
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(directory)
        known = [name for name in config.architectures or () if hasattr(transformers, name)]
        with torch.device("meta"):
            if known:
                return getattr(transformers, known[0])(config)
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception:  # an unknown family, remote code, or a config that the class rejects
        return None


def _quantizer_of(checkpoint: Checkpoint) -> Any:
    config_class, quantizer_class = quantizer_classes()
    return quantizer_class(config_class(**checkpoint.record or {}), pre_quantized=True)


def _foreign_prefix(model: nn.Module, names: Iterable[str]) -> str | None:
    """The first part of all stored names that a language model does not have: that of the model with other parts; or
    the one that MLX gives to the model without its head, and Transformers does not."""
    first = {name.partition(".")[0] for name in names}
    if (prefix := family_of(model).prefix(model)) is not None:
        return prefix if prefix in first else None
    return "language_model" if first == {"language_model"} and not hasattr(model, "language_model") else None


def _place_unusual(model: PreTrainedModel, quantizer: Any, stored: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Gives `model` layers for what an MLX checkpoint stores in other ways than Transformers; returns the names in the
    model of stored tensors, and the names that are computed of several."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    quantizer.prefix = _foreign_prefix(model, stored)
    if quantizer.prefix is not None and quantizer.prefix == family_of(model).prefix(model):
        place_linear(model)
    place_experts(model, (name.removeprefix(f"{quantizer.prefix or ''}.") for name in stored))
    return _names_in_model(model, stored, get_model_conversion_mapping(model, None, quantizer))


def _names_in_model(
    model: PreTrainedModel, stored: Iterable[str], conversions: list[Any]
) -> tuple[dict[str, str], set[str]]:
    """By Transformers' own rules: the names in the model of stored tensors, and the names that are computed of several.

    The rules know a name if the model has it, so layers that may be quantized are given the names that they would have.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    known = dict.fromkeys(model.state_dict(), True)
    for name in list(known):
        if name.endswith(".weight"):
            known.update(dict.fromkeys((f"{name.removesuffix('weight')}{part}" for part in ("scales", "biases")), True))
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = {
        pattern: rule for rule in conversions if isinstance(rule, WeightConverter) for pattern in rule.source_patterns
    }
    names: dict[str, str] = {}
    converted: set[str] = set()
    for name in sorted(stored, key=dot_natural_key):
        arguments = (model.base_model_prefix, known)
        renamed, pattern = rename_source_key(name, renamings, list(converters.values()), *arguments)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], *arguments)
        if pattern is None:
            names[name] = renamed
        else:
            first, *_ = targets = converters[pattern].target_patterns
            converted.update(renamed.replace(first, target) for target in targets)
    return names, converted


def _settle_tying(model: PreTrainedModel, config: Mapping[str, Any], stored: Mapping[str, torch.Tensor]) -> None:
    """Ties the weights of `model`, which Transformers does after loading only.

    Where config.json is silent, MLX ties and Transformers goes by the class of the model; the stored tensors decide.
    """
    head = model.get_output_embeddings()
    silent = all("tie_word_embeddings" not in each for each in (config, config.get("text_config") or {}))
    if silent and head is not None and model._tied_weights_keys:
        path = next(path for path, module in model.named_modules() if module is head)
        model.config.tie_word_embeddings = not any(name.startswith(f"{path}.") for name in stored)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in model.all_tied_weights_keys.items():
        path, _, attribute = target.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(source))


def _without_ignored(model: PreTrainedModel, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors but those that this class of models does without.

    A pattern may match more than it means, as "attn.bias" does "c_attn.bias": what the model has is kept.
    """
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED]
    if model.base_model is model:
        patterns.append(r"^lm_head\.")  # a model without a head reads a checkpoint with one
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
    wanted = model.state_dict().keys()
    return {name: tensor for name, tensor in stored.items() if name in wanted or not ignored.search(name)}


def _may_be_missing(model: PreTrainedModel) -> set[str]:
    patterns = model._keys_to_ignore_on_load_missing or ()
    return {name for name in model.state_dict() if any(re.search(pattern, name) for pattern in patterns)}


def freeze_packed(model: nn.Module, op: str = "from_pretrained") -> None:
    """Freezes the packed tensors, which Transformers made trainable, and looks at the scales. Raises ValueError if
    scales, biases or zeros are not finite numbers."""
    align_parameters(model)
    for path, module in model.named_modules():
        for name in module.packed_names if isinstance(module, PackedModule) else ():
            if (parameter := module._parameters[name]) is None or parameter.is_meta:
                continue
            parameter.requires_grad_(False)
            if name != module.packed_names[0] and not _is_finite(parameter, module.mode):
                raise ValueError(f"[{op}] {path}.{name} has values that are not finite numbers")


def align_parameters(model: nn.Module) -> None:
    """Copies the parameters that do not begin at a multiple of their element's size: in a mapped file, they may lie
    anywhere."""
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.data_ptr() % parameter.element_size():
            parameter.data = parameter.data.clone()


def _is_finite(scales: torch.Tensor, mode: str) -> bool:
    if scales.is_floating_point():
        return bool(scales.isfinite().all())
    # Bytes that stand for no number.
    return not bool(((scales & 0x7F) == 0x7F if MODES[mode].scale == "e4m3" else scales == 0xFF).any())
