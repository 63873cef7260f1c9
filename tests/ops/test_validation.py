"""Wrong arguments raise a Python exception that names the op and shows what was wrong; all cases run in one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import quantization_mlx as qm
from cases import FLOAT_FORMATS
from oracle import Format, Quantized

pytestmark = pytest.mark.kernels_ci

ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)
RHS_NAX = "affine_gather_qmm_rhs_nax"
AFFINE = Format("affine", 64, 4)
MXFP4, MXFP8, NVFP4 = FLOAT_FORMATS
N, K, E = 6, 128, 3


# --- Valid arguments, of which each case spoils one -------------------------------------------------------------------


def _named(weights: Quantized) -> dict[str, Any]:
    return {"w": weights.w, "scales": weights.scales, "biases": weights.biases, **weights.format.options}


def _weights(format: Format, *shape: int) -> dict[str, Any]:
    named = _named(oracle.random_quantized(format, *shape))
    return named if format.is_affine else {name: value for name, value in named.items() if name != "biases"}


def _explicit(format: Format, *shape: int, **more: Any) -> dict[str, Any]:
    """Explicit ops have no mode; those of the floating-point modes have no group_size and bits either."""
    dropped = ("mode",) if format.is_affine else ("mode", "group_size", "bits")
    arguments = {name: value for name, value in _weights(format, *shape).items() if name not in dropped}
    return {"x": oracle.random_x(2, K), **arguments, **more}


def _dequantize(format: Format) -> dict[str, Any]:
    return _weights(format, N, K)


def _matmul(format: Format) -> dict[str, Any]:
    return {"x": oracle.random_x(2, K), **_weights(format, N, K)}


def _gather(format: Format) -> dict[str, Any]:
    indices = {"lhs_indices": torch.tensor([0, 1]), "rhs_indices": torch.tensor([2, 0])}
    return {"x": oracle.random_x(2, 1, K), **_weights(format, E, N, K), **indices}


VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "quantize": lambda: {"w": oracle.random_x(N, K), **AFFINE.options},
    "quantize mxfp4": lambda: {"w": oracle.random_x(N, K), **MXFP4.options},
    "quantize nvfp4": lambda: {"w": oracle.random_x(N, K), **NVFP4.options},
    "dequantize": lambda: _dequantize(AFFINE),
    "dequantize mxfp8": lambda: _dequantize(MXFP8),
    "dequantize nvfp4": lambda: _dequantize(NVFP4),
    "quantized_matmul": lambda: _matmul(AFFINE),
    "quantized_matmul mxfp4": lambda: _matmul(MXFP4),
    "quantized_matmul nvfp4": lambda: _matmul(NVFP4),
    "gather_qmm": lambda: _gather(AFFINE),
    "gather_qmm mxfp4": lambda: _gather(MXFP4),
    "gather_qmm nvfp4": lambda: _gather(NVFP4),
    "affine_qmv": lambda: _explicit(AFFINE, N, K, output_features=N),
    "affine_qmm_t": lambda: _explicit(AFFINE, N, K),
    "affine_qmm_t_nax": lambda: _explicit(AFFINE, N, K),
    "affine_qmm_n": lambda: _explicit(AFFINE, K, 64, output_features=64),
    "affine_qmm_n_nax": lambda: _explicit(AFFINE, K, 64, output_features=64),
    RHS_NAX: lambda: _explicit(AFFINE, E, N, K, output_features=N, indices=torch.tensor([2, 0])),
    **{
        f"{format.mode}_{kind}": lambda format=format, shape=shape, more=more: _explicit(format, *shape, **more)
        for format in FLOAT_FORMATS
        for kind, shape, more in (
            ("qmv", (N, K), {"output_features": N}),
            ("qmm_t", (N, K), {}),
            ("qmm_n", (K, 64), {"output_features": 64}),
        )
    },
}


@pytest.mark.parametrize("name", VALID)
def test_valid_arguments_are_accepted(name: str) -> None:
    """So that each case below fails for its own reason."""
    getattr(qm, name.split()[0])(**VALID[name]())


# --- The cases --------------------------------------------------------------------------------------------------------


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


def _meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _reshaped(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(shape)


def _cut(columns: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[..., :-columns]


def _each(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return dict.fromkeys(("w", "scales", "biases"), change)


def _scalar(value: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


FLOAT64, INT = "(?i)double|float64", "(?i)int"
# The valid arguments; replacements by argument name, a value or a function of the valid one; and regular expressions
# of which each must be found in the message.
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # quantize
    "quantize float64": ("quantize", {"w": _as(torch.float64)}, (FLOAT64,)),
    "quantize int32": ("quantize", {"w": _as(torch.int32)}, (INT,)),
    "quantize bool": ("quantize", {"w": _as(torch.bool)}, ("(?i)bool",)),
    "quantize complex": ("quantize", {"w": _as(torch.complex64)}, ("(?i)complex",)),
    "quantize float8": ("quantize", {"w": _as(torch.float8_e4m3fn)}, ("(?i)float8",)),
    "quantize 1-D": ("quantize", {"w": _reshaped(N * K)}, (rf"\[{N * K}\]",)),
    "quantize 0-D": ("quantize", {"w": _scalar()}, (r"\[\]",)),
    "quantize ragged group": ("quantize", {"w": _cut(1)}, (str(K - 1), "64")),
    "quantize ragged group mxfp4": ("quantize mxfp4", {"w": _cut(16)}, (str(K - 16), "32")),
    "quantize group_size 16": ("quantize", {"group_size": 16}, ("16", "64")),
    "quantize group_size 256": ("quantize", {"group_size": 256}, ("256",)),
    "quantize group_size 0": ("quantize", {"group_size": 0}, (r"\b0\b",)),
    "quantize group_size negative": ("quantize", {"group_size": -64}, ("-64",)),
    "quantize group_size 2**40": ("quantize", {"group_size": 2**40}, (str(2**40),)),
    "quantize group_size float": ("quantize", {"group_size": 64.5}, ("64.5|float",)),
    "quantize bits 0": ("quantize", {"bits": 0}, (r"bits 0\b",)),
    "quantize bits 7": ("quantize", {"bits": 7}, (r"\b7\b",)),
    "quantize bits 16": ("quantize", {"bits": 16}, (r"\b16\b",)),
    "quantize bits negative": ("quantize", {"bits": -4}, ("-4",)),
    "quantize bits string": ("quantize", {"bits": "four"}, ("four|str",)),
    "quantize mode unknown": ("quantize", {"mode": "int4"}, ("int4", "affine")),
    "quantize mode empty": ("quantize", {"mode": ""}, ('""',)),
    "quantize mode upper case": ("quantize", {"mode": "Affine"}, ("Affine",)),
    "quantize mode number": ("quantize", {"mode": 4}, ("int|4",)),
    "quantize mxfp4 group_size 64": ("quantize mxfp4", {"group_size": 64}, ("64", "mxfp4", "32")),
    "quantize mxfp4 bits 8": ("quantize mxfp4", {"bits": 8}, (r"\b8\b", "mxfp4")),
    "quantize nvfp4 group_size 32": ("quantize nvfp4", {"group_size": 32}, ("32", "nvfp4", "16")),
    "quantize global_scale affine": ("quantize", {"global_scale": _scalar()}, ("affine", "nvfp4")),
    "quantize global_scale mxfp4": ("quantize mxfp4", {"global_scale": _scalar()}, ("mxfp4", "nvfp4")),
    "quantize global_scale float64": (
        "quantize nvfp4",
        {"global_scale": _scalar(dtype=torch.float64)},
        (FLOAT64, "float32"),
    ),
    "quantize global_scale int": ("quantize nvfp4", {"global_scale": _scalar(1, torch.int32)}, (INT,)),
    "quantize global_scale of two": ("quantize nvfp4", {"global_scale": torch.ones(2)}, (r"\[2\]",)),
    "quantize global_scale of none": ("quantize nvfp4", {"global_scale": torch.ones(0)}, (r"\[0\]",)),
    "quantize global_scale meta": ("quantize nvfp4", {"global_scale": _meta(_scalar())}, ("meta", "cpu")),
    "quantize global_scale number": ("quantize nvfp4", {"global_scale": 1.0}, ("float",)),
    "quantize list": ("quantize", {"w": [[1.0] * 64]}, ("list",)),
    "quantize none": ("quantize", {"w": None}, ("None|no tensor arguments",)),
    # dequantize
    "dequantize w float32": ("dequantize", {"w": _as(torch.float32)}, ("(?i)float", "uint32")),
    "dequantize w int64": ("dequantize", {"w": _as(torch.int64)}, ("(?i)long|int64", "uint32")),
    "dequantize w uint8": ("dequantize", {"w": lambda w: w.view(torch.uint8)}, ("(?i)byte|uint8", "uint32")),
    "dequantize w 1-D": ("dequantize", {"w": lambda w: w[0]}, (rf"\[{K // 8}\]",)),
    "dequantize scales 1-D": ("dequantize", {"scales": lambda s: s[0]}, (r"\[2\]",)),
    "dequantize rows differ": ("dequantize", {"w": lambda w: w[1:]}, (rf"\[{N - 1}, 16\]", rf"\[{N}, 2\]")),
    "dequantize columns differ": ("dequantize", {"w": _cut(1)}, (rf"\[{N}, 15\]", rf"\[{N}, 2\]")),
    "dequantize biases differ": ("dequantize", {"biases": _cut(1)}, (rf"\[{N}, 1\]", rf"\[{N}, 2\]")),
    "dequantize biases missing": ("dequantize", {"biases": None}, ("biases", "affine")),
    "dequantize biases superfluous": ("dequantize mxfp8", {"biases": torch.ones(N, 4)}, ("biases", "mxfp8")),
    "dequantize scales float in mxfp8": ("dequantize mxfp8", {"scales": _as(torch.float32)}, ("(?i)float", "uint8")),
    "dequantize scales uint8 in affine": ("dequantize", {"scales": _as(torch.uint8)}, ("(?i)byte|uint8", "float32")),
    "dequantize scales float64": ("dequantize", {"scales": _as(torch.float64)}, (FLOAT64,)),
    "dequantize other bits": ("dequantize", {"bits": 8}, (rf"\[{N}, 16\]", rf"\[{N}, 2\]", r"\b8\b")),
    "dequantize other group_size": ("dequantize", {"group_size": 32}, (rf"\[{N}, 16\]", rf"\[{N}, 2\]", "32")),
    "dequantize dtype int32": ("dequantize", {"dtype": torch.int32}, (INT, "float32")),
    "dequantize dtype float64": ("dequantize", {"dtype": torch.float64}, (FLOAT64, "float32")),
    "dequantize dtype name": ("dequantize", {"dtype": "float32"}, ("float32|str",)),
    "dequantize scales meta": ("dequantize", {"scales": _meta}, ("meta", "cpu")),
    "dequantize biases meta": ("dequantize", {"biases": _meta}, ("meta", "cpu")),
    "dequantize global_scale affine": ("dequantize", {"global_scale": _scalar()}, ("affine", "nvfp4")),
    "dequantize global_scale of rows": ("dequantize nvfp4", {"global_scale": torch.ones(N)}, (rf"\[{N}\]",)),
    "dequantize mode unknown": ("dequantize", {"mode": "fp4"}, ("fp4",)),
    # quantized_matmul
    "matmul x float64": ("quantized_matmul", {"x": _as(torch.float64)}, (FLOAT64,)),
    "matmul x int8": ("quantized_matmul", {"x": _as(torch.int8)}, ("(?i)char|int8",)),
    "matmul x 0-D": ("quantized_matmul", {"x": _scalar()}, ("scalar|dimension",)),
    "matmul x wrong K": ("quantized_matmul", {"x": _cut(1)}, (str(K - 1), str(K))),
    "matmul x wrong K 1-D": ("quantized_matmul", {"x": lambda x: x[0, :-8]}, (str(K - 8), str(K))),
    "matmul x transposed": ("quantized_matmul", {"x": lambda x: x.T}, (rf"\[{K}, 2\]",)),
    "matmul orientation": ("quantized_matmul", {"transpose": False}, (rf"\[2, {K}\]", "False")),
    "matmul x meta": ("quantized_matmul", {"x": _meta}, ("meta", "cpu")),
    "matmul w meta": ("quantized_matmul", {"w": _meta}, ("meta", "cpu")),
    "matmul x list": ("quantized_matmul", {"x": [1.0, 2.0]}, ("list|float",)),
    "matmul x none": ("quantized_matmul", {"x": None}, ("x.*(None|undefined)",)),
    "matmul x sparse": ("quantized_matmul", {"x": lambda x: x.to_sparse()}, ("(?i)sparse",)),
    "matmul w string": ("quantized_matmul", {"w": "weight"}, ("str|weight",)),
    "matmul w float16": ("quantized_matmul", {"w": _as(torch.float16)}, ("(?i)half|float16", "uint32")),
    "matmul w 1-D": ("quantized_matmul", {"w": lambda w: w[0]}, (rf"\[{K // 8}\]",)),
    "matmul rows differ": ("quantized_matmul", {"scales": lambda s: s[1:]}, (rf"\[{N}, 16\]", rf"\[{N - 1}, 2\]")),
    "matmul biases rows differ": ("quantized_matmul", {"biases": lambda b: b[1:]}, (rf"\[{N - 1}, 2\]",)),
    "matmul biases 1-D": ("quantized_matmul", {"biases": lambda b: b[0]}, (r"\[2\]", rf"\[{N}, 2\]")),
    "matmul biases missing": ("quantized_matmul", {"biases": None}, ("biases", "affine")),
    "matmul biases int": ("quantized_matmul", {"biases": _as(torch.int32)}, (INT,)),
    "matmul biases superfluous": ("quantized_matmul mxfp4", {"biases": torch.ones(N, 4)}, ("biases", "mxfp4")),
    "matmul scales float in mxfp4": ("quantized_matmul mxfp4", {"scales": _as(torch.float16)}, ("(?i)half", "uint8")),
    "matmul scales int8 in mxfp4": ("quantized_matmul mxfp4", {"scales": _as(torch.int8)}, ("(?i)char|int8", "uint8")),
    "matmul wrong mode for scales": ("quantized_matmul mxfp4", {"mode": "affine"}, ("affine|bits",)),
    "matmul K is 0": ("quantized_matmul", {"x": torch.ones(2, 0), **_each(lambda t: t[:, :0])}, (r"\b0\b",)),
    "matmul K is 0 without transpose": (
        "quantized_matmul",
        {"x": torch.ones(2, 0), **_each(lambda t: t[:0]), "transpose": False},
        (r"\b0\b",),
    ),
    "matmul no groups": ("quantized_matmul", {"scales": lambda s: s[:, :0], "biases": lambda b: b[:, :0]}, (r", 0\]",)),
    "matmul batches differ": (
        "quantized_matmul",
        {"x": torch.ones(4, 2, K), **_each(lambda t: t.expand(3, -1, -1))},
        (r"\[4\]", r"\[3\]"),
    ),
    "matmul batch of scales differs": (
        "quantized_matmul",
        {"w": lambda w: w.expand(3, -1, -1)},
        (rf"\[3, {N}, 16\]", rf"\[{N}, 2\]"),
    ),
    "matmul bits 7": ("quantized_matmul", {"bits": 7}, (r"\b7\b",)),
    "matmul group_size 48": ("quantized_matmul", {"group_size": 48}, ("48",)),
    "matmul mode unknown": ("quantized_matmul", {"mode": "gguf"}, ("gguf",)),
    "matmul global_scale affine": ("quantized_matmul", {"global_scale": _scalar()}, ("affine", "nvfp4")),
    "matmul global_scale float16": (
        "quantized_matmul nvfp4",
        {"global_scale": _scalar(dtype=torch.float16)},
        ("(?i)half|float16",),
    ),
    "matmul global_scale of two": ("quantized_matmul nvfp4", {"global_scale": torch.ones(2)}, (r"\[2\]",)),
    # gather_qmm
    "gather x 1-D": ("gather_qmm", {"x": lambda x: x[0, 0]}, (rf"\[{K}\]",)),
    "gather x float64": ("gather_qmm", {"x": _as(torch.float64)}, (FLOAT64,)),
    "gather x wrong K": ("gather_qmm", {"x": _cut(1)}, (str(K - 1), str(K))),
    "gather lhs float": ("gather_qmm", {"lhs_indices": _as(torch.float32)}, ("lhs_indices", "(?i)float")),
    "gather rhs float": ("gather_qmm", {"rhs_indices": _as(torch.float16)}, ("rhs_indices", "(?i)half|float16")),
    "gather rhs bool": ("gather_qmm", {"rhs_indices": _as(torch.bool)}, ("rhs_indices", "(?i)bool")),
    "gather rhs list": ("gather_qmm", {"rhs_indices": [0, 1]}, ("list",)),
    "gather rhs meta": ("gather_qmm", {"rhs_indices": _meta}, ("meta", "cpu")),
    "gather indices do not broadcast": ("gather_qmm", {"rhs_indices": torch.tensor([0, 1, 2])}, (r"\[2\]", r"\[3\]")),
    "gather default does not broadcast": ("gather_qmm", {"rhs_indices": None}, (r"\[2\]", r"\[3\]")),
    "gather rhs too large": ("gather_qmm", {"rhs_indices": torch.tensor([0, E])}, (rf"\b{E}\b", "rhs_indices")),
    "gather rhs negative": ("gather_qmm", {"rhs_indices": torch.tensor([0, -1])}, ("-1", "rhs_indices")),
    "gather lhs too large": ("gather_qmm", {"lhs_indices": torch.tensor([0, 2])}, (r"\b2\b", "lhs_indices")),
    "gather lhs negative": ("gather_qmm", {"lhs_indices": torch.tensor([-2, 0])}, ("-2", "lhs_indices")),
    "gather biases missing": ("gather_qmm", {"biases": None}, ("biases", "affine")),
    "gather biases superfluous": ("gather_qmm mxfp4", {"biases": torch.ones(E, N, 4)}, ("biases", "mxfp4")),
    "gather experts differ": (
        "gather_qmm",
        {"scales": lambda s: s[1:]},
        (rf"\[{E}, {N}, 16\]", rf"\[{E - 1}, {N}, 2\]"),
    ),
    "gather K is 0": ("gather_qmm", {"x": torch.ones(2, 1, 0), **_each(lambda t: t[..., :0])}, (r"\b0\b",)),
    "gather global_scale affine": ("gather_qmm", {"global_scale": _scalar()}, ("affine", "nvfp4")),
    "gather global_scale of two": ("gather_qmm nvfp4", {"global_scale": torch.ones(2)}, (r"\[2\]",)),
    "gather global_scale of too many": ("gather_qmm nvfp4", {"global_scale": torch.ones(E, N)}, (rf"\[{E}, {N}\]",)),
    "gather mode unknown": ("gather_qmm", {"mode": "mxfp6"}, ("mxfp6",)),
    # Explicit ops
    "qmv output_features": ("affine_qmv", {"output_features": N + 1}, (str(N + 1), rf"\b{N}\b")),
    "qmv output_features negative": ("affine_qmv", {"output_features": -1}, ("-1",)),
    "qmv x wrong K": ("affine_qmv", {"x": _cut(1)}, (str(K - 1),)),
    "qmv bits 7": ("affine_qmv", {"bits": 7}, (r"\b7\b",)),
    "qmv biases none": ("affine_qmv", {"biases": None}, ("None|biases",)),
    "qmm_t group_size": ("affine_qmm_t", {"group_size": 128}, ("128",)),
    "qmm_t x float64": ("affine_qmm_t", {"x": _as(torch.float64)}, (FLOAT64,)),
    "qmm_t w float": ("affine_qmm_t", {"w": _as(torch.float32)}, ("(?i)float", "uint32")),
    "qmm_t scales uint8": ("affine_qmm_t", {"scales": _as(torch.uint8)}, ("(?i)byte|uint8",)),
    "qmm_t_nax x wrong K": ("affine_qmm_t_nax", {"x": _cut(1)}, (str(K - 1),)),
    "qmm_n output_features": ("affine_qmm_n", {"output_features": 128}, ("128", r"\b64\b")),
    "qmm_n x wrong K": ("affine_qmm_n", {"x": _cut(1)}, (str(K - 1),)),
    "qmm_n_nax output_features": ("affine_qmm_n_nax", {"output_features": 0}, (r"\b0\b",)),
    "rhs_nax x 3-D": (RHS_NAX, {"x": torch.ones(2, 1, K)}, (rf"\[2, 1, {K}\]",)),
    "rhs_nax x 1-D": (RHS_NAX, {"x": torch.ones(K)}, (rf"\[{K}\]",)),
    "rhs_nax indices 2-D": (RHS_NAX, {"indices": torch.tensor([[0, 1]])}, (r"\[1, 2\]",)),
    "rhs_nax indices short": (RHS_NAX, {"indices": torch.tensor([0])}, (r"\[1\]", rf"\[2, {K}\]")),
    "rhs_nax indices float": (RHS_NAX, {"indices": _as(torch.float32)}, ("(?i)float",)),
    "rhs_nax index too large": (RHS_NAX, {"indices": torch.tensor([0, E])}, (rf"\b{E}\b",)),
    "rhs_nax index negative": (RHS_NAX, {"indices": torch.tensor([0, -5])}, ("-5",)),
    "rhs_nax w 2-D": (RHS_NAX, {name: lambda t: t[0] for name in ("w", "scales", "biases")}, (rf"\[{N}, 16\]",)),
    "rhs_nax output_features": (RHS_NAX, {"output_features": 7}, (r"\b7\b",)),
    "rhs_nax orientation": (RHS_NAX, {"transpose": False, "output_features": K}, ("False", rf"\[{E}, {N}, 16\]")),
    "mxfp4_qmv output_features": ("mxfp4_qmv", {"output_features": N - 1}, (str(N - 1),)),
    "mxfp4_qmv scales float": ("mxfp4_qmv", {"scales": _as(torch.float32)}, ("(?i)float", "uint8")),
    "mxfp4_qmm_t x wrong K": ("mxfp4_qmm_t", {"x": _cut(1)}, (str(K - 1),)),
    "mxfp4_qmm_n output_features": ("mxfp4_qmm_n", {"output_features": 32}, ("32", r"\b64\b")),
    "mxfp8_qmv x int": ("mxfp8_qmv", {"x": _as(torch.int32)}, (INT,)),
    "mxfp8_qmm_t columns differ": ("mxfp8_qmm_t", {"w": _cut(1)}, (rf"\[{N}, 31\]", rf"\[{N}, 4\]")),
    "mxfp8_qmm_n x meta": ("mxfp8_qmm_n", {"x": _meta}, ("meta", "cpu")),
    "nvfp4_qmv w int64": ("nvfp4_qmv", {"w": _as(torch.int64)}, ("(?i)long|int64",)),
    "nvfp4_qmm_t scales of mxfp4": ("nvfp4_qmm_t", {"scales": lambda s: s[:, ::2]}, (rf"\[{N}, 4\]",)),
    "nvfp4_qmm_n x wrong K": ("nvfp4_qmm_n", {"x": _cut(1)}, (str(K - 1),)),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments(name: str) -> None:
    valid, changes, shows = CASES[name]
    op = valid.split()[0]
    arguments = VALID[valid]()
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument]) if callable(change) else change
    with pytest.raises(ERRORS) as caught:
        getattr(qm, op)(**arguments)
    message = str(caught.value)
    assert op in message
    missing = [pattern for pattern in shows if not re.search(pattern, message)]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", VALID)
def test_every_op_names_itself(name: str) -> None:
    """The message of our own checks starts with the op in brackets."""
    op = name.split()[0]
    arguments = VALID[name]()
    spoiled = "x" if "x" in arguments else "w"
    arguments[spoiled] = arguments[spoiled].to(torch.complex64)
    with pytest.raises(ERRORS, match=rf"^\[{op}\] {spoiled} "):
        getattr(qm, op)(**arguments)


def test_enough_cases() -> None:
    assert len(CASES) >= 70
