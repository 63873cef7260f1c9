"""swiglu and geglu: against float64 and torch's own ops."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
from cases import DTYPES
from oracle import name_of
from quantization_mlx import fast
from quantization_mlx._ops import ops

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
GPT_OSS = {"alpha": 1.702, "limit": 7.0, "offset": 1.0}


def clamped(gates: Tensor, values: Tensor, *, alpha: float, limit: float, offset: float) -> Tensor:
    gates, values = gates.clamp(max=limit), values.clamp(-limit, limit)
    return gates * torch.sigmoid(alpha * gates) * (values + offset)


@dataclass(frozen=True)
class Gate:
    """ours(gates, values), and the same of torch's ops."""

    ours: Callable[[Tensor, Tensor], Tensor]
    torch: Callable[[Tensor, Tensor], Tensor]
    kernel: str = "swiglu"


GATES = {
    "silu": Gate(fast.swiglu, lambda gates, values: F.silu(gates) * values),
    "gpt-oss": Gate(
        lambda gates, values: fast.swiglu(gates, values, **GPT_OSS),
        lambda gates, values: clamped(gates, values, **GPT_OSS),
    ),
    "tanh": Gate(fast.geglu, lambda gates, values: F.gelu(gates, approximate="tanh") * values, "geglu_tanh"),
    "gelu": Gate(
        lambda gates, values: fast.geglu(gates, values, approximate="none"),
        lambda gates, values: F.gelu(gates) * values,
        "geglu",
    ),
}
GATE = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Of either sign, some beyond 7."""
    return tuple(4 * oracle.random_x(*shape, seed=seed, dtype=dtype) for seed in (1, 2))


def assert_gated(gate: Gate, y: Tensor, gates: Tensor, values: Tensor) -> None:
    """Within twice the error of torch's own ops in this dtype, and one rounding."""
    given = (gates.cpu(), values.cpu())
    theirs, exact = gate.torch(*given), gate.torch(*(each.double() for each in given))
    assert y.dtype == theirs.dtype and y.shape == theirs.shape and y.is_contiguous()
    bound = 2 * (theirs.double() - exact).abs().amax() if y.numel() else 0.0
    oracle.assert_within(y.cpu(), exact, bound + torch.finfo(y.dtype).eps * exact.abs() + 1e-7)


# --- Values -----------------------------------------------------------------------------------------------------------


@GATE
@DTYPE
@pytest.mark.parametrize("length", [1, 7, 16, 127, 576, 5003])
def test_values(device: str, gate: Gate, dtype: torch.dtype, length: int) -> None:
    gates, values = (each.to(device) for each in operands(3, length, dtype=dtype))
    assert_gated(gate, gate.ours(gates, values), gates, values)


@GATE
def test_every_float16(device: str, gate: Gate) -> None:
    """Each finite gate: within two roundings of the exact value, relative to it, however small."""
    gates = torch.arange(-0x8000, 0x8000, dtype=torch.int16).view(torch.float16)
    gates = gates[gates.isfinite()]
    values = torch.ones_like(gates)
    exact = gate.torch(gates.double(), values.double())
    bound = torch.finfo(torch.float16).eps * exact.abs() + 2.0**-24
    oracle.assert_within(gate.ours(gates.to(device), values.to(device)), exact, bound)


# Of gates alone, in forms that subtract nothing from what is nearly equal.
EXACT = {
    "swiglu": lambda gates: gates * torch.sigmoid(gates),
    "geglu": lambda gates: gates * torch.special.erfc(-gates / math.sqrt(2)) / 2,
    "geglu_tanh": lambda gates: gates * torch.sigmoid(math.sqrt(8 / math.pi) * (gates + 0.044715 * gates**3)),
}


@pytest.mark.parametrize("name", ["silu", "tanh", "gelu"])
def test_tails_are_accurate(device: str, name: str) -> None:
    """Relative to the value itself, where torch's own GELU is wrong by all of it."""
    gates = torch.linspace(-8.0, 8.0, 8001)
    exact = EXACT[GATES[name].kernel](gates.double())
    y = GATES[name].ours(gates.to(device), torch.ones_like(gates).to(device))
    oracle.assert_within(y, exact, 1e-5 * exact.abs())


@GATE
def test_the_ends(device: str, gate: Gate) -> None:
    gates = torch.tensor([-3e38, -1e30, -1e4, -200, -100, -88.5, -1e-30, -0.0, 0.0, 1e-30, 88, 100, 1e4, 1e30, 3e38])
    y = gate.ours(gates.to(device), torch.full_like(gates, 0.5).to(device)).cpu()
    exact = gate.torch(gates.double(), torch.full_like(gates, 0.5).double())
    oracle.assert_within(y, exact.nan_to_num(0.0), 1e-36 + 1e-6 * exact.nan_to_num(0.0).abs())


@GATE
def test_what_is_not_finite(device: str, gate: Gate) -> None:
    nan, inf = torch.nan, torch.inf
    gates = torch.tensor([nan, 1.0, nan, inf, 2.0, 1.0, -1.0, 0.5, 3.0])
    values = torch.tensor([1.0, nan, nan, 2.0, inf, -inf, 1.0, 0.5, 4.0])
    y = gate.ours(gates.to(device), values.to(device)).cpu()
    assert y[:3].isnan().all() and y[6:].isfinite().all()
    if gate is GATES["gpt-oss"]:  # what is too large stands for the limit
        assert_gated(gate, y[3:], gates[3:], values[3:])
    else:
        assert y[3:6].tolist() == [inf, inf, -inf]


@GATE
@pytest.mark.parametrize("shape", [(), (16,), (0, 32), (3, 0), (2, 3, 5, 96), (700, 128)], ids=str)
def test_shapes(device: str, gate: Gate, shape: tuple[int, ...]) -> None:
    gates, values = (each.to(device) for each in operands(*shape))
    assert_gated(gate, gate.ours(gates, values), gates, values)


@GATE
def test_strides(device: str, gate: Gate) -> None:
    base = oracle.random_x(6, 8, 1300, dtype=torch.float16).to(device)
    views = {
        "halves": base[..., :640].chunk(2, -1),
        "parts that begin anywhere": (base[..., 3:643], base[..., 646:1286]),
        "even and odd columns": (base[..., ::2], base[..., 1::2]),
        "elements far apart": (base.transpose(0, 2)[:640], base.transpose(0, 2)[640:1280]),
        "rows swapped with others": (base[..., :64].transpose(0, 1), base[..., 64:128].transpose(0, 1)),
        "rows in reverse": (base[..., :64], base[..., 64:128].flip(0)),
        "one row for all": (base[:1, :1, :64].expand(5, 4, 64), base[:5, :4, :64]),
        "one value for all": (base[:, :, :1].expand(6, 8, 77), base[:, :, 1:78]),
    }
    for name, (gates, values) in views.items():
        expected = gate.ours(gates.contiguous(), values.contiguous())
        oracle.assert_identical(gate.ours(gates, values), expected, name)


@pytest.mark.parametrize("step", [1, 2], ids=["halves", "even and odd columns"])
def test_parts_of_a_product_are_read_where_they_are(step: int) -> None:
    both = oracle.random_x(2, 3, 96)
    gates, values = both.chunk(2, -1) if step == 1 else (both[..., ::2], both[..., 1::2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast.swiglu(gates, values)
    names = {event.key for event in profile.key_averages()}
    assert "aten::empty" in names and not {"aten::clone", "aten::copy_", "aten::contiguous"} & names


@GATE
def test_dtypes_promote(device: str, gate: Gate) -> None:
    gates, values = (each.to(device) for each in operands(2, 96))
    for one, other in itertools.permutations(DTYPES, 2):
        y = gate.ours(gates.to(one), values.to(other))
        assert y.dtype == torch.promote_types(one, other) == (gates.to(one) * values.to(other)).dtype
        oracle.assert_identical(y, gate.ours(gates.to(one).to(y.dtype), values.to(other).to(y.dtype)))


@pytest.mark.parametrize("alpha, limit, offset", [(0.0, None, 0.0), (-2.0, 3.0, -0.5), (1.0, 0.0, 2.0)], ids=str)
def test_options_of_swiglu(device: str, alpha: float, limit: float | None, offset: float) -> None:
    options = {"alpha": alpha, "limit": limit, "offset": offset}
    gate = Gate(
        lambda gates, values: fast.swiglu(gates, values, **options),
        lambda gates, values: clamped(gates, values, **options | {"limit": 1e30 if limit is None else limit}),
    )
    gates, values = (each.to(device) for each in operands(5, 33))
    assert_gated(gate, gate.ours(gates, values), gates, values)


# --- Biases of experts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Biased:
    """Gates and values of 7 tokens, 3 experts to each, of 5 experts with biases."""

    gates: Tensor
    values: Tensor
    gate_bias: Tensor
    value_bias: Tensor
    experts: Tensor

    def to(self, *args: Any) -> Biased:
        *floats, experts = (getattr(self, each.name) for each in fields(self))
        device = next((each for each in args if not isinstance(each, torch.dtype)), "cpu")
        return Biased(*(each.to(*args) for each in floats), experts.to(device))

    def ours(self, **options: Any) -> Tensor:
        biases = {"gate_bias": self.gate_bias, "value_bias": self.value_bias}
        return fast.swiglu(self.gates, self.values, **biases, experts=self.experts, **options)

    def exact(self) -> Tensor:
        gates, values = self.gates.double(), self.values.double()
        gates, values = gates + self.gate_bias.double()[self.experts], values + self.value_bias.double()[self.experts]
        return clamped(gates, values, **GPT_OSS)


def biased(length: int, dtype: torch.dtype = torch.float32, in_turns: bool = False) -> Biased:
    def parts(both: Tensor) -> tuple[Tensor, Tensor]:
        return (both[..., ::2], both[..., 1::2]) if in_turns else both.chunk(2, -1)

    gates, values = parts(4 * oracle.random_x(7, 3, 2 * length, dtype=dtype))
    gate_bias, value_bias = parts(2 * oracle.random_x(5, 2 * length, seed=2, dtype=dtype))
    return Biased(gates, values, gate_bias, value_bias, torch.arange(21).view(7, 3) % 5)


@DTYPE
@pytest.mark.parametrize("in_turns", [False, True], ids=["halves", "in turns"])
@pytest.mark.parametrize("length", [1, 40, 576, 1003])
def test_biases_of_experts(device: str, dtype: torch.dtype, in_turns: bool, length: int) -> None:
    given = biased(length, dtype, in_turns)
    ours, exact = given.to(device).ours(**GPT_OSS), given.exact()
    assert ours.dtype == dtype and ours.is_contiguous()
    oracle.assert_within(ours, exact, (torch.finfo(dtype).eps + 2e-6) * exact.abs() + 1e-5)


def test_biases_promote_to_the_results_dtype(device: str) -> None:
    given = biased(16)
    half = given.to(torch.float16)
    mixed = replace(given, gate_bias=half.gate_bias, value_bias=half.value_bias)
    exact = mixed.exact()
    oracle.assert_within(mixed.to(device).ours(**GPT_OSS), exact, 2e-6 * exact.abs() + 1e-5)
    with pytest.raises(TypeError, match=r"\[swiglu\] gate_bias has dtype Float, which does not promote"):
        replace(half, gate_bias=given.gate_bias).ours()


def test_gradients_reach_biases(device: str) -> None:
    given = biased(24).to(device)
    inputs = [getattr(given, each.name).detach().clone().requires_grad_() for each in fields(given)[:-1]]
    Biased(*inputs, given.experts).ours(**GPT_OSS).square().sum().backward()
    exact = [each.detach().cpu().double().requires_grad_() for each in inputs]
    Biased(*exact, given.experts.cpu()).exact().square().sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        oracle.assert_within(mine.grad, theirs.grad, 1e-5 * theirs.grad.abs().amax())


def test_experts_that_do_not_exist(device: str) -> None:
    given = biased(8)
    given.experts[2, 1], given.experts[3, 0] = 5, -1
    if device == "cpu":
        with pytest.raises(IndexError, match=r"\[swiglu\] experts holds 5 at position 7"):
            given.ours()
        return
    ours = given.to(device).ours(**GPT_OSS).cpu()
    missing = (given.experts < 0) | (given.experts > 4)
    assert ours[missing].isnan().all() and ours[~missing].isfinite().all()


BIAS_ERRORS = {
    "some": (lambda b: fast.swiglu(b.gates, b.values, experts=b.experts), "must be given together"),
    "length": (lambda b: replace(b, gate_bias=b.gate_bias[:, 1:]).ours(), r"of shape \[5, 7\] must be \[experts, 8\]"),
    "count": (lambda b: replace(b, value_bias=b.value_bias[1:]).ours(), "must be of as many experts"),
    "experts": (lambda b: replace(b, experts=b.experts[1:]).ours(), r"experts of shape \[6, 3\] must have the leading"),
}


@pytest.mark.parametrize("call, message", BIAS_ERRORS.values(), ids=BIAS_ERRORS.keys())
def test_refuses_biases_that_do_not_fit(call: Callable[[Biased], Tensor], message: str) -> None:
    for given in (biased(8), biased(8).to("meta")):
        with pytest.raises(ValueError, match=rf"\[swiglu\] .*{message}"):
            call(given)


# --- Gradients --------------------------------------------------------------------------------------------------------


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(each.detach().requires_grad_() for each in inputs)
    result = function(*inputs)
    seed = oracle.random_x(*result.shape, seed=9).to(result.device, result.dtype)
    return [each.cpu() for each in torch.autograd.grad(result, inputs, seed)]


@GATE
@DTYPE
def test_gradients(device: str, gate: Gate, dtype: torch.dtype) -> None:
    inputs = operands(5, 3, 40, dtype=dtype)
    ours = gradients(gate.ours, *(each.to(device) for each in inputs))
    exact = gradients(gate.torch, *(each.double() for each in inputs))
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        oracle.assert_within(mine, theirs, 4 * torch.finfo(dtype).eps * (theirs.abs() + theirs.abs().amax()))


@GATE
@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["gates", "values"])
def test_gradients_of_one(gate: Gate, wanted: tuple[bool, bool]) -> None:
    """The other of another dtype."""
    dtypes = (torch.float16, torch.float32)
    inputs = [
        each.to(dtype).requires_grad_(wants) for each, dtype, wants in zip(operands(4, 8), dtypes, wanted, strict=True)
    ]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    gate.ours(*inputs).sum().backward()
    gate.torch(*exact).sum().backward()
    for mine, theirs, wants in zip(inputs, exact, wanted, strict=True):
        assert (mine.grad is not None) == wants
        if wants:
            assert mine.grad.dtype == mine.dtype
            bound = 2 * torch.finfo(mine.dtype).eps * (1 + theirs.grad.abs().amax())
            oracle.assert_within(mine.grad, theirs.grad, bound)


@GATE
def test_gradients_of_gradients(gate: Gate) -> None:
    def squared_gradient(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(each.detach().requires_grad_() for each in inputs)
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), inputs)

    inputs = operands(3, 7)
    exact = squared_gradient(gate.torch, *(each.double() for each in inputs))
    for mine, theirs in zip(squared_gradient(gate.ours, *inputs), exact, strict=True):
        oracle.assert_within(mine, theirs, 1e-5 * theirs.abs().amax())


def test_forward_mode_is_refused() -> None:
    x = oracle.random_x(2, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        for function, given in itertools.product((fast.swiglu, fast.geglu), ((dual, x), (x, dual))):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                function(*given)


# --- As torch's ops ---------------------------------------------------------------------------------------------------

X, Y = oracle.random_x(2, 3, 48), oracle.random_x(2, 3, 48, seed=2)
CALLS: dict[str, tuple[Any, ...]] = {
    "swiglu": (X, Y, 1.702, 7.0, 1.0),
    "swiglu without a limit": (X, Y),
    "swiglu with biases": (X, Y, 1.702, 7.0, 1.0, X[0], Y[0], torch.arange(6).view(2, 3) % 3),
    "geglu": (X, Y, "tanh"),
    "geglu of the distribution": (X, Y, "none"),
}
CALL = pytest.mark.parametrize("name", CALLS)


@CALL
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device: str, name: str, grad: bool) -> None:
    arguments = tuple(
        each.detach().to(device).requires_grad_(grad and each.is_floating_point()) if isinstance(each, Tensor) else each
        for each in CALLS[name]
    )
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    torch.library.opcheck(getattr(ops, name.split()[0]).default, arguments, test_utils=checks)


@GATE
def test_compiles_as_one_graph(gate: Gate) -> None:
    compiled = torch.compile(gate.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    oracle.assert_identical(compiled(X, Y), gate.ours(X, Y))


@GATE
def test_exports_with_sizes_that_depend_on_data(gate: Gate) -> None:
    class Module(torch.nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            x = torch.arange(6.0)[mask][:, None] * torch.ones(48)
            return gate.ours(*x.chunk(2, -1))

    mask = torch.tensor([True, False, True, True, False, True])
    program = torch.export.export(Module(), (mask,)).module()
    for each in (mask, ~mask):
        oracle.assert_identical(program(each), Module()(each))


@GATE
def test_explain(gate: Gate) -> None:
    x = torch.empty(4, 7, 2 * 1536, dtype=torch.float16, device="meta")
    explained = {
        "swiglu": lambda *on: ops.explain_swiglu(*x.chunk(2, -1), 1.0, None, 0.0, None, None, None, *on),
        "geglu": lambda *on: ops.explain_geglu(*x.chunk(2, -1), "none", *on),
        "geglu_tanh": lambda *on: ops.explain_geglu(*x.chunk(2, -1), "tanh", *on),
    }
    (launch,) = json.loads(explained[gate.kernel]("applegpu_g15s", 1500))["launches"]
    assert (launch["kernel"], launch["file"], launch["threads"]) == (f"{gate.kernel}_float16", "gates", 64)
    assert (launch["threadgroups"], launch["constants"]) == ([3, 28, 1], ["aligned_x"])
    assert json.loads(ops.explain_swiglu(X, Y, gpu=""))["device"] == "cpu"


# --- Errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "shape": (lambda: fast.swiglu(X, Y[0]), ValueError, r"\[swiglu\] values of shape \[3, 48\] must have the shape of"),
    "size": (
        lambda: fast.geglu(X, Y[..., :1]),
        ValueError,
        r"\[geglu\] values of shape \[2, 3, 1\] must have the shape",
    ),
    "gates dtype": (lambda: fast.swiglu(X.double(), Y), TypeError, r"\[swiglu\] gates has dtype Double; supported"),
    "values dtype": (lambda: fast.geglu(X, Y.int()), TypeError, r"\[geglu\] values has dtype Int; supported are"),
    "device": (lambda: fast.swiglu(X, Y.to("meta")), ValueError, r"values is on meta and gates on cpu"),
    "limit": (lambda: fast.swiglu(X, Y, limit=-1.0), ValueError, r"\[swiglu\] limit is -1; it must not be negative"),
    "nan": (
        lambda: fast.swiglu(X, Y, limit=torch.nan),
        ValueError,
        r"\[swiglu\] limit is nan; it must not be negative",
    ),
    "approximate": (
        lambda: fast.geglu(X, Y, approximate="erf"),
        ValueError,
        r"\[geglu\] approximate is \"erf\"; supported are \"none\" and \"tanh\"",
    ),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_fake_tensors_raise_the_same() -> None:
    with pytest.raises(ValueError, match=r"\[swiglu\] values of shape \[3, 48\] must have the shape of"):
        fast.swiglu(X.to("meta"), Y[0].to("meta"))
