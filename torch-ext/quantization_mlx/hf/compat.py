"""The versions of Transformers, PEFT and accelerate that the package is tested with, and all that it needs of them
beyond what they document.

Nothing else in the package knows of versions. What a function needs is looked up when it is first called, so that a
name which another version lacks is an error there and not a wrong result later. Accelerate is called
by Transformers alone, and patched so that it moves packed words.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, is_typeddict

from .. import optional
from .patching import wrap

# The oldest and the newest minor version: the bounds in pyproject.toml, and `make test` runs on both.
TESTED = {"transformers": ("5.23", "5.24"), "peft": ("0.20", "0.21"), "accelerate": ("1.14", "1.15")}


def _rows(table: str) -> dict[str, list[tuple[str, tuple[str, ...], str]]]:
    """The rows of `PRIVATE` by function: "module:name", parameters or keys, and what it is for."""
    rows: dict[str, list[tuple[str, tuple[str, ...], str]]] = {}
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            of_function = rows[line] = []
        elif not line.startswith("    "):
            module = line.strip()
        else:
            name, _, purpose = line.strip().partition(": ")
            name, _, parameters = name.removesuffix(")").partition("(")
            of_function.append((f"{module}:{name}", tuple(filter(None, parameters.split(", "))), purpose))
    return rows


# Function that relies on it -> module -> name(parameters or keys that are relied on): what it is for.
PRIVATE = _rows("""
patch_transformers
  transformers.modeling_utils
    get_hf_quantizer(config, user_agent): patched: finds the quantizer of a config; its name is quant in user_agent
    _get_resolved_checkpoint_files(pretrained_model_name_or_path, download_kwargs): patched: finds the weight files
    _get_resolved_checkpoint_files(user_agent): its quant names the quantizer
    _get_resolved_checkpoint_files(variant, gguf_file, transformers_explicit_filename): files of another kind
  transformers
    PreTrainedConfig.get_config_dict: patched: gives parts of a config the record of formats
    PreTrainedConfig.base_config_key: which part a class reads
    PreTrainedModel.save_pretrained(save_directory, is_main_process, state_dict): patched: writes MLX checkpoints
    PreTrainedModel.save_pretrained(push_to_hub, max_shard_size, variant): options that it takes
    PreTrainedModel._hf_peft_config_loaded: whether a model has adapters
    PreTrainedModel._tied_weights_keys: which weights are tied
    PreTrainedModel.from_pretrained: patched: reads each file once
    PreTrainedModel.get_expanded_tied_weights_keys(all_submodels): which weights are tied
    PreTrainedModel._keys_to_ignore_on_load_missing: which tensors a checkpoint may lack
    PreTrainedModel._keys_to_ignore_on_load_unexpected: which tensors a model does without
  transformers.utils.hub
    DownloadKwargs(subfolder, revision, cache_dir, force_download, local_files_only, token): where a checkpoint is
    cached_files(_raise_exceptions_for_missing_entries): looks for config.json without an error
  transformers.quantizers.auto
    AUTO_QUANTIZER_MAPPING: quantizers by name
    AUTO_QUANTIZATION_CONFIG_MAPPING: their configs by name
  transformers.utils.quantization_config
    QuantizationConfigMixin: their base
  transformers.quantizers
    HfQuantizer._process_model_before_weight_loading(model): overridden: places quantized layers
    HfQuantizer._process_model_after_weight_loading(model): overridden: finishes them
    HfQuantizer.update_weight_conversions(weight_conversions, model): overridden: MLX's names of tensors
    HfQuantizer.get_new_dtype(converter, param, dtype): overridden by Marlin's
    HfQuantizer.param_needs_quantization(model, param_name): overridden: packed words have a shape of their own
    HfQuantizer.dequantize(model, dtype): calls `_dequantize`, which is ours
    HfQuantizer.is_serializable: overridden
    HfQuantizer.is_trainable: overridden
    HfQuantizer.is_compileable: overridden
    HfQuantizer.remove_quantization_config(model): forgets the format
  transformers.conversion_mapping
    get_model_conversion_mapping(model, key_mapping, hf_quantizer): rules from stored names to those in the model
  transformers.core_model_loading
    rename_source_key(source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict): applies them
    WeightRenaming(source_patterns, target_patterns): such a rule
    WeightConverter(source_patterns, target_patterns): such a rule
    PrefixChange(prefix_to_remove): such a rule
    dot_natural_key: the order in which they are applied
  transformers.integrations.metal_quantization
    _metal_kernel: patched: runs MetalConfig here
  transformers.quantizers.quantizer_metal
    MetalHfQuantizer.validate_environment: patched: any device
    MetalHfQuantizer.update_device_map(device_map): patched
metal_to_mlx
  transformers.integrations.metal_quantization
    MetalLinear(in_features, out_features, bits, group_size): the layer of MetalConfig
  transformers.quantizers.quantizer_metal
    MetalHfQuantizer: its quantizer
experts
  transformers.integrations.moe
    use_experts_implementation(is_concatenated, is_transposed): marks modules of experts, says how they store parameters
    use_experts_implementation(has_bias, has_gate, has_post_expert_norm): and which ones
    ALL_EXPERTS_FUNCTIONS.register(key, value): adds ours
    _default_apply_gate: what experts without a gate of their own call
  transformers
    PreTrainedModel.set_experts_implementation: chooses it
    PreTrainedConfig._experts_implementation: which one is chosen
  transformers.models.llama4.modeling_llama4
    Llama4TextExperts.forward(hidden_states): known by its name; has num_experts, hidden_size and act_fn
  transformers.pytorch_utils
    Conv1D(nf, nx): known by its name: a linear layer, transposed
save_checkpoint
  transformers
    LlamaConfig(rope_parameters, tie_word_embeddings): what MLX reads at the top
    Gemma3TextConfig(rope_parameters, layer_types): what MLX reads at the top
    PreTrainedConfig.attribute_map: names that MLX does not know
    PreTrainedConfig.standardize_rope_params: what models make of rope_parameters beside MLX's names
convert_gguf_checkpoint
  transformers.modeling_gguf_pytorch_utils
    get_gguf_hf_weights_map(hf_model, processor): GGUF's names of a model's tensors
    TensorProcessor(config): the processor that changes no name
save_quantized
  transformers.dynamic_module_utils
    custom_object_save(obj, folder, config): copies the code of a model that came with its own
  transformers
    PreTrainedModel._auto_class: whether it did
    PreTrainedConfig._auto_class: whether it did
prepare_for_generation
  transformers.models.llama.modeling_llama
    LlamaModel.forward(input_ids, attention_mask, position_ids, use_cache): overridden, as in other families
    LlamaModel.forward(inputs_embeds): one more; `forward_options` compares all of them
  transformers.utils
    TransformersKwargs(is_causal, position_ids): documented options of forward
  transformers.generation.continuous_batching.input_outputs
    PagedAttentionArgs(read_index, write_index, logits_indices): further ones, of continuous batching
  transformers.modeling_outputs
    BaseModelOutputWithPast(last_hidden_state): the output
    MoeModelOutputWithPast(last_hidden_state): that of mixtures of experts
  transformers.integrations.moe
    use_experts_implementation(is_concatenated, has_gate, has_post_expert_norm): says how experts compute
  transformers.cache_utils
    Cache(offloading): whether its layers move to the CPU
    DynamicLayer.get_seq_length: overridden: how many positions are taken
    DynamicLayer.crop(tokens_to_remove): overridden: forgets the last ones
    DynamicLayer.update(key_states, value_states): assigns keys and values
    DynamicSlidingWindowLayer.get_seq_length: whether it is empty, and may become a DynamicLayer
    DynamicSlidingWindowLayer.activate_past_recording: sets record_past, and then it may not
  transformers
    MistralConfig(sliding_window): the keys that attention sees
from_float
  transformers.models.llama.modeling_llama
    LlamaRotaryEmbedding(config): the frequencies of rope_parameters, as in other families; has attention_scaling
  transformers
    LlamaConfig(rope_parameters, max_position_embeddings): which frequencies
    MistralConfig(sliding_window): the keys that attention sees
  transformers.integrations.moe
    use_experts_implementation(is_concatenated, is_transposed): says how experts store their weights
offload
  accelerate.utils.modeling
    set_module_tensor_to_device(module, tensor_name): patched: moves a parameter by the attribute of its name
  accelerate.hooks
    set_module_tensor_to_device(module, tensor_name): patched: the same function
patch_peft
  peft
    LoraConfig.__post_init__: patched: declares our layer
    LoraConfig._register_custom_module(mapping): declares it
    LoraConfig(init_lora_weights, lora_bias): options that it refuses
  peft.tuners.lora
    Linear.lora_variants: overridden: refuses the variants of LoRA
    Linear._get_in_out_features(module): overridden: sizes of a packed layer
    Linear.update_layer(adapter_name, r, lora_alpha, config): overridden
    Linear.merge(safe_merge, adapter_names): overridden: quantizes the sum
    Linear.unmerge: overridden: brings back the old layer
    Linear.get_delta_weight(adapter): what is merged
    Linear.get_base_layer: the layer with an adapter
  peft.tuners.tuners_utils
    check_adapters_to_merge(module, adapter_names): what is merged
  peft.utils.other
    ModulesToSaveWrapper.update(adapter_name): patched: copies a floating-point layer
load_adapter
  peft.utils
    load_peft_weights(model_id, device): reads an adapter's file
    set_peft_model_state_dict(model, peft_model_state_dict): says which tensors do not fit
bounded_cache
  transformers.cache_utils
    Cache(layers): a cache of layers that are ours
    DynamicCache(config): the layers that the model would have
    DynamicLayer.update(key_states, value_states): overridden
    DynamicLayer.get_mask_sizes(query_length): overridden
    DynamicLayer.get_seq_length: overridden
quantized_cache
  transformers.cache_utils
    Cache(layers): a cache of layers that are ours
    DynamicCache(config): the layers that the model would have
    DynamicLayer.update(key_states, value_states): overridden
    DynamicLayer.get_seq_length: overridden: how many positions are taken
    DynamicLayer.crop(tokens_to_remove): overridden: forgets the last ones
    DynamicLayer.reorder_cache(beam_idx): overridden: moves what is packed
    DynamicLayer.batch_repeat_interleave(repeats): overridden: repeats it
    DynamicLayer.batch_select_indices(indices): overridden: chooses from it
    DynamicLayer.reset: overridden: forgets it
""")


# Parts of the decoders that `prepare_for_generation` knows -> (submodules, attributes that are read). Submodules may be
# missing, but there may be no others: they would be left out of the computation.
DECODERS = {
    "model": (("embed_tokens", "layers", "norm", "rotary_emb"), ("config",)),
    "layer": (
        (
            "self_attn",
            "mlp",
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "resid_attn_dropout",
            "resid_mlp_dropout",
        ),
        (),
    ),
    "mixture": (("gate", "router", "experts", "shared_experts"), ("experts",)),
    "router": ((), ("weight", "top_k")),
    "experts": (
        ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn"),
        ("num_experts", "has_gate", "has_post_expert_norm", "is_concatenated", "_is_expert_parallel"),
    ),
    "attention": (
        ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"),
        ("attention_dropout", "config", "head_dim", "is_causal", "layer_idx", "scaling"),
    ),
    # With one latent vector for the keys and values of all heads, which the cache holds.
    "latent attention": (
        (
            *("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj"),
            *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"),
        ),
        (
            *("attention_dropout", "config", "is_causal", "layer_idx", "scaling", "num_heads", "expand_kv"),
            *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        ),
    ),
    "mlp": (("gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"), ()),
}
# Attributes of a cache's layer that holds all positions. Others would not be updated.
CACHE_STATE = ("keys", "values", "is_initialized", "device", "dtype")

# Attributes of a loaded quantized model. The package assigns to them, and would not notice if a version renamed them; a
# test does.
LOADED_MODEL = ("_is_hf_initialized", "all_tied_weights_keys", "hf_quantizer", "is_quantized", "quantization_method")


def require(name: str, extra: str = "transformers") -> Any:
    """Imports an optional package, which `extra` of this package has. Raises ImportError if it is not installed, and
    then the message names the extra, or older than what is supported."""
    module = optional.require(name, extra)
    if name == "transformers":
        optional.require("safetensors")  # for loading and saving
    check_version(name)
    return module


@functools.cache
def check(op: str) -> None:
    """Looks up, once, what the function `op` needs according to `PRIVATE`. Raises ImportError if a version is older
    than the tested ones, or lacks a name or a parameter; the message has both."""
    library = PRIVATE[op][0][0].partition(":")[0].partition(".")[0]
    check_version(library)
    if library == "transformers" and importlib.util.find_spec("accelerate") is not None:
        check_version("accelerate")
    if missing := [lack for name, parameters, _ in PRIVATE[op] for lack in missing_parts(name, parameters)]:
        raise ImportError(
            f"[{op}] {library} {_version(library)} lacks {', '.join(missing)}, which this version of quantization-mlx "
            f"relies on; it is tested with {_tested(library)}"
        )


@functools.cache
def check_version(library: str) -> None:
    """Compares, once, the installed version of a library with those in `TESTED`; warns where it is newer. Raises
    ImportError if it is older."""
    oldest, newest = map(_minor, TESTED[library])
    installed = _version(library)
    if _minor(installed) < oldest:
        raise ImportError(
            f"{library} {installed} is older than what quantization-mlx supports; it is tested with {_tested(library)}"
        )
    if _minor(installed) > newest:
        warnings.warn(
            f"{library} {installed} is newer than what quantization-mlx is tested with, which is {_tested(library)}",
            stacklevel=3,
        )


def missing_parts(name: str, parameters: Iterable[str]) -> list[str]:
    """What is missing of `name`, "module:attribute.attribute", and of its parameters or, in a TypedDict, keys."""
    module, _, path = name.partition(":")
    try:
        found = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return [f"{module}.{path}"]
    if not parameters:
        return []
    known = found.__annotations__ if is_typeddict(found) else inspect.signature(found).parameters
    return [f"the parameter {each!r} of {module}.{path}" for each in parameters if each not in known]


def is_known_part(module: Any, part: str) -> bool:
    """Whether a module consists of what `DECODERS` says of that part of a decoder, and has its attributes."""
    submodules, attributes = DECODERS[part]
    return all(name in submodules for name, _ in module.named_children()) and all(
        hasattr(module, name) for name in attributes
    )


def output_class(forward: Callable[..., Any]) -> type:
    """The class of what `forward` of a stack of decoder layers returns, as it is annotated."""
    from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

    annotated = inspect.signature(forward).return_annotation
    return MoeModelOutputWithPast if annotated is MoeModelOutputWithPast else BaseModelOutputWithPast


def _version(library: str) -> str:
    return importlib.metadata.version(library)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _tested(library: str) -> str:
    oldest, newest = TESTED[library]
    return oldest if oldest == newest else f"{oldest} to {newest}"


# Names that differ between the tested versions

# The cache's keyword argument in `forward` of models, decoder layers and attention: today, and before
# Transformers 5.24.
_CACHE_NAMES = ("cache", "past_key_values")


def paged_cache_name(options: Mapping[str, Any]) -> str | None:
    """The same in every version where these are keyword arguments of continuous batching, else None."""
    return "cache" if "read_index" in options else None


def holds_all_positions(layer: Any) -> type | None:
    """The class of cache layers that hold all positions, if this is one, or could be, being yet empty."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) is DynamicLayer and all(name in CACHE_STATE for name in vars(layer)):
        return DynamicLayer
    if type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() == 0 and not layer.record_past:
        return DynamicLayer
    return None


def cache_name(forward: Callable[..., Any] | None = None) -> str:
    """The name of the keyword argument by which `forward`, of a model of Transformers or of a part of one, takes the
    cache; None stands for Llama's models. Raises TypeError if it has none of the known names."""
    if forward is None:
        from transformers.models.llama.modeling_llama import LlamaModel

        forward = LlamaModel.forward
    parameters = inspect.signature(forward).parameters
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    raise TypeError(
        f"{forward.__qualname__} has none of the parameters {', '.join(_CACHE_NAMES)}; it takes {', '.join(parameters)}"
    )


def forward_options(forward: Callable[..., Any], overridden: Iterable[str]) -> frozenset[str]:
    """The names of the keyword arguments that `forward`, as in `cache_name`, takes beside the cache and those that are
    `overridden`. Raises TypeError if it has other parameters than these."""
    from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
    from transformers.utils import TransformersKwargs

    parameters = inspect.signature(forward).parameters.values()
    named = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"self"}
    if different := named ^ {*overridden, cache_name(forward)}:
        raise TypeError(f"{forward.__qualname__} differs from the known one in the parameters {sorted(different)}")
    options = {"return_dict", *TransformersKwargs.__annotations__, *PagedAttentionArgs.__annotations__}
    return frozenset(options.difference(named, _CACHE_NAMES))


# What accelerate does with packed words


def adapt_accelerate() -> None:
    """Lets accelerate, where it is loaded, move the packed words of layers between devices and to disk: it takes the
    attribute `weight` of a layer for the parameter of that name."""
    if "accelerate.hooks" not in sys.modules:
        return
    from accelerate import hooks
    from accelerate.utils import modeling

    if hasattr(hooks.set_module_tensor_to_device, "__wrapped__"):
        return
    check("offload")
    for_good = ExitStack()  # never closed
    for owner in (hooks, modeling):
        wrap(for_good, owner, "set_module_tensor_to_device", _set_module_tensor_to_device)


def _set_module_tensor_to_device(original: Any, module: Any, tensor_name: str, *args: Any, **kwargs: Any) -> Any:
    path, _, name = tensor_name.rpartition(".")
    layer = module.get_submodule(path)
    shows = layer.showing_words() if name == "weight" and hasattr(layer, "showing_words") else nullcontext()
    with shows:
        return original(module, tensor_name, *args, **kwargs)
