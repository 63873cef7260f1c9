"""Models with Marlin's linear layers, made of other models. `saved.py` saves and loads them."""

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hf import compat
from ..nn.conv1d import as_linear
from ..nn.switch import SwitchLinear
from ..optional import PreTrainedModel
from ..quantization.replacement import Refusal, Replacement, class_refusal, replace_layers, share, surgery
from .experts import ColumnPackedSwitchLinear
from .layers import DTYPES, ColumnPackedModule, MarlinLinear, MetalQuantizedLinear, mode_of_bits, mode_of_quant_type
from .saved import is_saved, mark_configs, refuse_mlx, usable_device

LayerFilter = Callable[[str, nn.Module], bool]

_HEAD_AND_TABLE = frozenset({"lm_head", "embed_tokens"})

# Quantizing


class ReplacementStats(dict[str, int]):
    """How many layers were replaced, as "replaced_count", and how many matrices remain in floating point, as
    "skipped_count".

    replaced: the paths of the former.
    skipped: by the paths of the latter, the reasons; norms and biases are not among them.
    skipped_share: their part of the model's parameters.
    """

    def __init__(self, done: Replacement) -> None:
        self.replaced = done.replaced
        self.skipped = {each.path: each.reason for each in done.left}
        self.skipped_share = share(done.left, done.parameters)
        super().__init__(replaced_count=len(self.replaced), skipped_count=len(self.skipped))


def quantize_model(
    model: nn.Module,
    quant_type: str = "fp4",
    group_size: int = 128,
    skip_layers: Iterable[str] | None = _HEAD_AND_TABLE,
) -> nn.Module:
    """Makes the `nn.Linear` layers of `model` and the `Conv1D` ones of Transformers `MarlinLinear` ones, in place and
    one after the other; returns the model.

    Forward and backward hooks move to the new layer. Left alone are layers whose in_features do not divide into
    groups, subclasses of `nn.Linear`, which may compute something else, layers with what the new ones have not, such as
    parametrizations, hooks on the state_dict, or a forward of their own, and layers that share their weight with a
    module of another type, as a tied output head does with an embedding: they stay tied. Linear layers that share a
    weight go on sharing one packed copy. Embeddings stay as they are. A warning says why layers were left alone, and
    what else remains in floating point if that is 1 % of the parameters or more, but for embeddings.

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
    mode = mode_of_quant_type(op, quant_type, group_size)
    done = _replace(op, model, MarlinLinear, mode, group_size, skip_layers)
    if not done.replaced:
        warnings.warn(f"[{op}] 0 layers were replaced", stacklevel=2)
    done.warn(op)
    return done.model


def replace_linear_layers(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    skip_layers: Iterable[str] | None = None,
    layer_filter: LayerFilter | None = None,
) -> ReplacementStats:
    """Makes the `nn.Linear` layers of `model` `MetalQuantizedLinear` ones, in place and one after the other.

    Left alone are layers as `quantize_model` leaves alone, an output head that is tied to an embedding among them; the
    result has the reason for each, and for all other matrices that remain in floating point. Linear layers that share
    a weight go on sharing one packed copy.

    Args:
        model: a module with layers in it.
        bits: 4, 8 or 2.
        group_size: 128, 64 or 32.
        skip_layers: names of layers to leave alone, as in `quantize_model`; None skips nothing by name.
        layer_filter: called with the path and the layer; a false value leaves the layer alone.

    Returns:
        {"replaced_count": …, "skipped_count": …}, with the paths in its attributes `replaced` and `skipped`, and the
        part of the parameters that remains in floating point in `skipped_share`.

    Raises:
        TypeError: model is no module, or is itself a linear layer, or skip_layers is a string.
        ValueError: bits or group_size is not supported, or a weight has infinities or NaN; nothing has changed.
    """
    op = "replace_linear_layers"
    mode = mode_of_bits(op, bits, group_size)
    if isinstance(model, nn.Linear):
        raise TypeError(f"[{op}] a layer by itself is not replaced in place; use MetalQuantizedLinear.from_float")
    done = _replace(op, model, MetalQuantizedLinear, mode, group_size, skip_layers, layer_filter)
    return ReplacementStats(done)


def _replace(
    op: str,
    model: nn.Module,
    linear: type[ColumnPackedModule],
    mode: str,
    group_size: int,
    skip_layers: Iterable[str] | None,
    layer_filter: LayerFilter | None = None,
) -> Replacement:
    """Puts layers of the class `linear`, and such of experts, in the place of those of `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{op}] model is of type {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(skip_layers, str):
        raise TypeError(f"[{op}] skip_layers is the string {skip_layers!r}; it must be a set of names")
    names = list(skip_layers or ())

    def refuse(path: str, layer: nn.Module) -> Refusal | None:
        """The reason to leave alone a module that holds a weight, if there is one."""
        if any(f".{name}." in f".{path}." for name in names):
            return Refusal("in skip_layers", is_asked_for=True)
        if isinstance(layer, nn.Embedding):
            return Refusal("an embedding; Marlin's formats are for linear layers", is_asked_for=True)
        if (refusal := class_refusal(path, layer, DTYPES, embeddings=False)) is not None:
            return refusal
        in_features = as_linear(layer).in_features
        if in_features % group_size:
            return Refusal(f"in_features {in_features} is not divisible by group_size {group_size}")
        if layer_filter is not None and not layer_filter(path, layer):
            return Refusal("refused by layer_filter", is_asked_for=True)
        return None

    def choose(path: str, layer: nn.Module) -> dict[str, Any]:
        if not layer.weight.is_meta and not layer.weight.isfinite().all():
            raise ValueError(f"[{op}] {path}.weight has values that are not finite numbers")
        packed = ColumnPackedSwitchLinear if isinstance(layer, SwitchLinear) else linear
        return {**packed.options_of(mode), "group_size": group_size}

    kinds = (SwitchLinear, ColumnPackedSwitchLinear), (nn.Linear, linear)
    with surgery(model):
        done = replace_layers(model, refuse, choose, kinds, op)
    mark_configs(done.model)
    return done


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
    mode_of_bits(op, bits, group_size)  # raises before anything is loaded
    device = usable_device(device, op)
    model = load_dense(model_id_or_path, op, dtype="auto", trust_remote_code=trust_remote_code)
    stats = replace_linear_layers(model, bits, group_size)
    return model.to(device), stats


def load_dense(source: str | os.PathLike[str], op: str, **options: Any) -> PreTrainedModel:
    """A causal language model that is not quantized; `options` are those of Transformers' `from_pretrained`. Raises
    ValueError if the model is quantized; the message says what loads it."""
    transformers = compat.require("transformers")
    directory = Path(source)
    if directory.is_dir():
        if is_saved(directory):
            raise ValueError(f"[{op}] {source} is quantized already; load_quantized loads it")
        refuse_mlx(directory, op)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "unknown")
        raise ValueError(f"[{op}] {source} is quantized already, by {str(method)!r}; from_pretrained loads it")
    return model
