"""What MLX reads in config.json and Transformers writes elsewhere, or not at all."""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..formats import Format
from ..optional import PreTrainedConfig
from .record import RECORDS


def in_mlx_terms(
    config: dict[str, Any], formats: Mapping[str, Format], reader: type[PreTrainedConfig] | None
) -> dict[str, Any]:
    """`config`, the content of config.json in Transformers' terms, with what MLX looks for in it, among that the
    formats by the paths of the layers in the checkpoint. `reader` is the class by which Transformers reads it, if
    known."""
    # Transformers has other names for some of these.
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
            with warnings.catch_warnings():  # about deprecated names
                warnings.simplefilter("ignore")
                config = reader.from_dict(copy.deepcopy(dict(record)))
                config.standardize_rope_params()  # as models do
                return config.to_dict()
        except Exception:  # the class rejects it
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
