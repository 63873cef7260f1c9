"""Packages that are used where they are installed."""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
else:  # in annotations alone: importing Transformers takes seconds
    PreTrainedConfig = PreTrainedModel = PreTrainedTokenizerBase = Any


def require(name: str, extra: str = "transformers") -> Any:
    """Imports an optional package, which `extra` of this package has. Raises ImportError if it is not installed; the
    message names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f'this needs the package {package}: pip install "quantization-mlx[{extra}]"') from error


def progress(items: list[Any], what: str) -> Iterable[Any]:
    """`items` with a progress bar, where tqdm is installed, that appears after two seconds."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, delay=2, leave=False)
