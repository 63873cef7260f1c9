"""Mixed recipes: which layer of a model gets how many bits."""

from collections.abc import Callable

from torch import nn

from ..formats import Format

# Bits of most layers and of the sensitive ones, by mlx-lm's names.
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}

_SENSITIVE = ("v_proj", "v_a_proj", "v_b_proj", "down_proj")  # errors in these hurt most


def mixed_recipe(name: str, model: nn.Module, group_size: int | None = None) -> Callable[[str, nn.Module], Format]:
    """A predicate for `quantize_model` that gives sensitive layers more bits, the same ones as mlx-lm's recipe does.

    The output head gets the higher number of bits, and so do the value and down projections of the first and the last
    eighth of the decoder layers and of every third one between.

    Args:
        name: a key of RECIPES; "mixed_4_6" has 4 and 6 bits, mode "affine".
        model: a decoder whose layers have projections named down_proj.
        group_size: of all layers; 64 if None.

    Raises:
        ValueError: there is no such recipe, or the model has no such layers.
    """
    if name not in RECIPES:
        raise ValueError(f"[mixed_recipe] there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    low, high = RECIPES[name]
    position, count = _decoder_layers(model)

    def predicate(path: str, layer: nn.Module) -> Format:
        parts = path.split(".")
        index = int(parts[position]) if position < len(parts) and parts[position].isdigit() else 0
        sensitive = any(key in path for key in _SENSITIVE) and _gets_more_bits(index, count)
        return {"group_size": group_size, "bits": high if sensitive or "lm_head" in path else low}

    return predicate


def _decoder_layers(model: nn.Module) -> tuple[int, int]:
    """Where in a dotted path the number of a decoder layer stands, and how many there are."""
    modules = (path for path, _ in model.named_modules())
    parameters = (path for path, _ in model.named_parameters())  # fused experts are parameters
    for path in (*modules, *parameters):
        parts = path.split(".")
        position = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        if "down_proj" in path and position > 0:
            return position, len(model.get_submodule(".".join(parts[:position])))
    raise ValueError(f"[mixed_recipe] {type(model).__name__} has no numbered layers with a down_proj")


def _gets_more_bits(index: int, count: int) -> bool:
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2
