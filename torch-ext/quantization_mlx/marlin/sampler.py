"""Drawing tokens: `MetalSampler` by its documented names, on the op `sample`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..fast import sample
from ..formats import FLOATS
from .functions import check_library, check_size, check_tensor
from .library import MetalKernelLibrary

_Rule = tuple[type, Callable[[Any], bool], str]  # the type, a test, the description of valid values
_COUNT: _Rule = (Integral, lambda count: count >= 1, "a whole number of at least 1")
_COUNT_OR_NONE: _Rule = (Integral, lambda count: count >= 0, "a whole number of at least 0")
_SHARE: _Rule = (Real, lambda number: 0 < number <= 1, "a number above 0 and at most 1")
_FACTOR: _Rule = (Real, lambda number: 0 < number < math.inf, "a finite number above 0")
_TEMPERATURE: _Rule = (Real, lambda number: 0 <= number < math.inf, "a finite number of at least 0")
_RULES = {
    **dict.fromkeys(("max_tokens", "prefill_chunk_size", "k"), _COUNT),
    **dict.fromkeys(("max_new_tokens", "top_k"), _COUNT_OR_NONE),
    **dict.fromkeys(("top_p", "p"), _SHARE),
    **dict.fromkeys(("repetition_penalty", "penalty"), _FACTOR),
    "temperature": _TEMPERATURE,
}
_SEEDS = range(-(2**63), 2**63)


def usable_options(op: str, **options: Any) -> dict[str, int | float]:
    """The options, known by their documented names, as Python's numbers. Raises ValueError if one is out of its
    range."""
    for name, value in options.items():
        kind, fits, wanted = _RULES[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
            raise ValueError(f"[{op}] {name} is {value!r}; it must be {wanted}")
    return {name: int(value) if _RULES[name][0] is Integral else float(value) for name, value in options.items()}


def usable_seed(op: str, seed: int | None) -> int:
    """The seed, or one of torch's generator for None. Raises ValueError if it is not of 64 bits."""
    if seed is None:
        return int(torch.randint(2**63 - 1, ()))
    if not isinstance(seed, Integral) or isinstance(seed, bool) or int(seed) not in _SEEDS:
        raise ValueError(f"[{op}] seed is {seed!r}; it must be None or a whole number from -2**63 to 2**63 - 1")
    return int(seed)


def usable_logits(op: str, logits: Tensor, vocab_size: int) -> Tensor:
    """The logits, of a dtype that `sample` takes. Raises TypeError unless they are a tensor of floats, and ValueError
    unless they are [..., vocab_size]."""
    check_tensor(op, "logits", logits)
    if not logits.is_floating_point():
        raise TypeError(f"[{op}] logits has dtype {logits.dtype}; it must be a floating-point one")
    if logits.shape[-1:] != (vocab_size,):
        raise ValueError(
            f"[{op}] logits has shape {list(logits.shape)}; its last size must be the vocabulary's, {vocab_size}"
        )
    return logits if logits.dtype in FLOATS else logits.float()


def draw(op: str, logits: Tensor, seed: int, offset: int, **rules: Any) -> tuple[Tensor, list[int]]:
    """One token for each row of logits [rows, V], on their device and as numbers.

    Args:
        op: what errors name.
        logits, seed, offset, rules: as those of `sample`, and checked.

    Raises:
        ValueError: a row has NaN or infinity, or nothing but -infinity.
    """
    if "top_k" in rules:
        rules["top_k"] = min(rules["top_k"], logits.shape[-1])  # the op takes 64 bits
    cause = None
    try:
        tokens = sample(logits, seed, offset=offset, **rules)
        drawn = tokens.tolist()
    except ValueError as error:  # on the CPU; on a GPU the token is -1
        drawn, cause = [-1], error
    if min(drawn, default=0) < 0:
        raise ValueError(
            f"[{op}] logits are no distribution: there is NaN or infinity among them, or nothing but -infinity"
        ) from cause
    return tokens, drawn


class MetalSampler:
    """Draws tokens from logits: on the device of the logits, and the same ones on every device.

    Logits are [V], [1, V] or [1, 1, V] of any floating-point dtype; float64 is rounded to float32. The steps are, in
    this order, the penalty, the temperature, top-k, top-p among what that leaves, and the draw. Tokens whose logits
    equal that of the last one kept are kept as well. A temperature of 0 stands for the most probable token, of several
    the first; that draws nothing.

    The n-th draw depends on the seed and on n alone, so that samplers with one seed give the same tokens.

    Args:
        vocab_size: V, the number of logits.
        lib: a handle, as the dispatch functions take it; nothing depends on it.
        seed: 64 bits; None takes a number of torch's default generator, so `torch.manual_seed` decides.

    Raises, as its methods do:
        ValueError: logits of another size, or a number out of its range. Logits with NaN or infinity, or of -infinity
            alone, which are no distribution.
        IndexError: a token of generated_ids is not in the vocabulary.
        TypeError: logits are no tensor of a floating-point dtype, or lib is no MetalKernelLibrary.
    """

    def __init__(self, vocab_size: int, lib: MetalKernelLibrary | None = None, seed: int | None = None) -> None:
        op = type(self).__name__
        check_size(op, "vocab_size", vocab_size, 1)
        if lib is not None:
            check_library(op, lib)
        self.vocab_size = int(vocab_size)
        self.lib = lib
        self.seed = usable_seed(op, seed)
        self.draws = 0  # so far

    def argmax(self, logits: Tensor) -> int:
        """The most probable token, of several the first."""
        return self._token("argmax", logits, temperature=0.0)

    def sample_categorical(self, logits: Tensor, temperature: float = 1.0) -> int:
        """A token drawn from all of them.

        Args:
            logits: of the vocabulary.
            temperature: what they are divided by, at least 0.
        """
        return self._token("sample_categorical", logits, temperature=temperature)

    def sample_top_k(self, logits: Tensor, k: int, temperature: float = 1.0) -> int:
        """A token drawn from the k most probable ones: k is at least 1, and may be more than there are."""
        usable_options(self._op("sample_top_k"), k=k)
        return self._token("sample_top_k", logits, temperature=temperature, top_k=k)

    def sample_top_p(self, logits: Tensor, p: float, temperature: float = 1.0) -> int:
        """A token drawn from the fewest, the most probable ones, whose probabilities sum up to p, above 0 and at most
        1."""
        usable_options(self._op("sample_top_p"), p=p)
        return self._token("sample_top_p", logits, temperature=temperature, top_p=p)

    def apply_repetition_penalty(self, logits: Tensor, generated_ids: Iterable[int], penalty: float) -> Tensor:
        """Logits in which those of generated_ids are divided by the penalty where they are positive, and multiplied
        by it where they are not, each once however often it is there.

        Args:
            logits: [..., vocab_size], which is not changed.
            generated_ids: token numbers, or a tensor of them.
            penalty: above 0; 1 changes nothing.

        Returns:
            A tensor of the shape and the dtype of logits (float32 for others than float32, float16 and bfloat16).
        """
        op = self._op("apply_repetition_penalty")
        logits = usable_logits(op, logits, self.vocab_size)
        penalty = usable_options(op, penalty=penalty)["penalty"]
        tokens = torch.tensor(self._known_tokens(op, generated_ids), dtype=torch.int64, device=logits.device)
        chosen = logits.index_select(-1, tokens)
        return logits.index_copy(-1, tokens, torch.where(chosen > 0, chosen / penalty, chosen * penalty))

    def sample(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        generated_ids: Iterable[int] | None = None,
    ) -> int:
        """A token drawn by all of these rules together.

        Args:
            logits: of the vocabulary.
            temperature: what they are divided by, at least 0.
            top_p: as p of `sample_top_p`; 1 for all.
            top_k: as k of `sample_top_k`; 0 for all.
            repetition_penalty: as in `apply_repetition_penalty`, for generated_ids; 1 for none.
            generated_ids: token numbers, in any order, as often as may be; or a tensor of them.
        """
        rules = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        return self._token("sample", logits, generated_ids, **rules, repetition_penalty=repetition_penalty)

    def _op(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"

    def _token(self, method: str, logits: Tensor, generated_ids: Iterable[int] | None = None, **rules: Any) -> int:
        op = self._op(method)
        row = usable_logits(op, logits, self.vocab_size)
        if logits.numel() != self.vocab_size or logits.dim() > 3:
            V = self.vocab_size
            raise ValueError(
                f"[{op}] logits has shape {list(logits.shape)}; supported are [{V}], [1, {V}] and [1, 1, {V}]"
            )
        rules = usable_options(op, **rules)
        tokens = self._known_tokens(op, () if generated_ids is None else generated_ids)
        previous = torch.tensor([tokens], device=row.device) if tokens else None
        _, (token,) = draw(op, row.reshape(1, -1), self.seed, self.draws, previous=previous, **rules)
        self.draws += rules["temperature"] > 0
        return token

    def _known_tokens(self, op: str, generated_ids: Iterable[int]) -> list[int]:
        """Each once. Raises IndexError if one is not in the vocabulary, TypeError if it is no number."""
        if not isinstance(generated_ids, Iterable):
            raise TypeError(f"[{op}] generated_ids is {generated_ids!r}; it must hold whole numbers")
        given = generated_ids.flatten().tolist() if isinstance(generated_ids, Tensor) else generated_ids
        tokens = list(dict.fromkeys(given))
        for token in tokens:
            if not isinstance(token, Integral):
                raise TypeError(f"[{op}] generated_ids holds {token!r}; it must hold whole numbers")
            if not 0 <= token < self.vocab_size:
                raise IndexError(
                    f"[{op}] generated_ids holds {token}; it must be from 0 to {self.vocab_size - 1}, the last token"
                )
        return tokens
