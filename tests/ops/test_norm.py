"""rms_norm, layer_norm and add_rms_norm: against float64, torch's own ops and mlx's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass

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
EPSILON = 1e-5
# The last size: one simdgroup and several; whole vectors and not; what a threadgroup takes at once, and more.
LENGTHS = (1, 7, 127, 576, 8192, 8195, 20001)


@dataclass(frozen=True)
class Norm:
    """ours(x, weight, bias), and the same of torch; an op without a bias drops it."""

    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    mlx: str


NORMS = {
    "rms_norm": Norm(
        lambda x, weight, bias: fast.rms_norm(x, weight, EPSILON),
        lambda x, weight, bias: F.rms_norm(x, x.shape[-1:], weight, EPSILON),
        "rms_norm",
    ),
    "layer_norm": Norm(
        lambda x, weight, bias: fast.layer_norm(x, weight, bias, EPSILON),
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, EPSILON),
        "layer_norm",
    ),
}
NORM = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())


def parameters(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return oracle.random_x(length, seed=2, dtype=dtype), oracle.random_x(length, seed=3, dtype=dtype)


def assert_norm(norm: Norm, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Within twice the error of torch's own op in this dtype, and one rounding."""
    operands = [None if each is None else each.cpu() for each in (x, weight, bias)]
    exact = norm.torch(*(None if each is None else each.double() for each in operands))
    theirs = norm.torch(*operands)
    assert y.dtype == theirs.dtype and y.shape == theirs.shape
    bound = 2 * (theirs.double() - exact).abs().amax() if y.numel() else 0.0
    oracle.assert_within(y.cpu(), exact, bound + torch.finfo(y.dtype).eps * exact.abs() + 1e-7)


# --- Values -----------------------------------------------------------------------------------------------------------


@NORM
@DTYPE
@pytest.mark.parametrize("length", LENGTHS)
def test_values(device: str, norm: Norm, dtype: torch.dtype, length: int) -> None:
    weight, bias = parameters(length, dtype)
    # With a mean, and one row without any spread.
    x = oracle.random_x(3, length, dtype=dtype) + torch.tensor([[0.0], [3.0], [-1.0]], dtype=dtype)
    x[2] = x[2, 0]
    for given in ((weight, bias), (None, None)):
        on = [None if each is None else each.to(device) for each in (x, *given)]
        assert_norm(norm, norm.ours(*on), *on)


@NORM
def test_one_parameter(device: str, norm: Norm) -> None:
    weight, bias = parameters(96, torch.float16)
    x = oracle.random_x(5, 96, dtype=torch.float16)
    for given in ((weight, None), (None, bias)):
        on = [None if each is None else each.to(device) for each in (x, *given)]
        assert_norm(norm, norm.ours(*on), *on)


@NORM
@pytest.mark.parametrize("shape", [(16,), (0, 32), (3, 0), (2, 3, 5, 96), (700, 128)], ids=str)
def test_shapes(device: str, norm: Norm, shape: tuple[int, ...]) -> None:
    weight, bias = (each.to(device) for each in parameters(shape[-1], torch.float32))
    x = oracle.random_x(*shape).to(device)
    y = norm.ours(x, weight, bias)
    assert y.shape == shape and y.is_contiguous()
    if y.numel():
        assert_norm(norm, y, x, weight, bias)


@NORM
def test_strides(device: str, norm: Norm) -> None:
    weight, bias = (each.to(device) for each in parameters(64, torch.float16))
    base = oracle.random_x(6, 8, 200, dtype=torch.float16).to(device)
    views = {
        "a part of each row": base[..., 8:72],
        "one that begins anywhere": base[..., 3:67],
        "rows swapped with others": base[:, :, :64].transpose(0, 1),
        "every other element": base[..., ::2][..., :64],
        "elements far apart": base.permute(1, 2, 0)[:, :64].transpose(1, 2),
        "one row for all": base[:1, :1, :64].expand(5, 4, 64),
    }
    for name, x in views.items():
        oracle.assert_identical(norm.ours(x, weight, bias), norm.ours(x.contiguous(), weight, bias), name)
    wide = torch.stack([weight, bias], -1)
    oracle.assert_identical(norm.ours(base[..., :64], wide[:, 0], wide[:, 1]), norm.ours(base[..., :64], weight, bias))


@NORM
def test_dtypes_promote(device: str, norm: Norm) -> None:
    x = oracle.random_x(2, 96, dtype=torch.bfloat16).to(device)
    weight, bias = (each.to(device) for each in parameters(96, torch.float32))
    y = norm.ours(x, weight, bias)
    assert y.dtype == torch.float32
    oracle.assert_identical(y, norm.ours(x.float(), weight, bias))


@NORM
@pytest.mark.parametrize("length", [64, 300])
def test_agrees_with_mlx(device: str, norm: Norm, length: int) -> None:
    import mlx.core as mx

    x = oracle.random_x(4, length)
    weight, bias = parameters(length, torch.float32)
    for w, b in ((weight, bias), (None, None)):
        arguments = [oracle.to_mlx(each) for each in ((x, w, b) if norm.mlx == "layer_norm" else (x, w))]
        theirs = oracle.from_mlx(getattr(mx.fast, norm.mlx)(*arguments, EPSILON))
        on = [None if each is None else each.to(device) for each in (x, w, b)]
        ours = norm.ours(*on)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        oracle.assert_within(ours.cpu(), theirs.double(), 2e-6 * (1 + theirs.double().abs()))


@NORM
def test_dtypes_of_results_are_those_of_mlx(norm: Norm) -> None:
    import mlx.core as mx

    for x, weight, bias in itertools.product(DTYPES, (None, *DTYPES), (None, *DTYPES)):
        tensors = [None if dtype is None else torch.ones(8, dtype=dtype) for dtype in (x, weight, bias)]
        given = tensors if norm.mlx == "layer_norm" else tensors[:2]
        theirs = getattr(mx.fast, norm.mlx)(*map(oracle.to_mlx, given), EPSILON)
        assert norm.ours(*tensors).dtype == oracle.from_mlx(theirs).dtype, (x, weight, bias)


def test_add_rms_norm_on_any_strides(device: str) -> None:
    base, other = (oracle.random_x(6, 5, 200, seed=seed, dtype=torch.float16).to(device) for seed in range(2))
    x = base[..., :64]
    for residual in (other[..., 3:67], other[:, :, 8:72].flip(0), other[:1, :1, :64].expand(6, 5, 64), x):
        ours = fast.add_rms_norm(x, residual, None, EPSILON)
        for mine, expected in zip(
            ours, fast.add_rms_norm(x.contiguous(), residual.contiguous(), None, EPSILON), strict=True
        ):
            oracle.assert_identical(mine, expected)


@DTYPE
@pytest.mark.parametrize("length", [48, 96, 8200])
def test_add_rms_norm_normalises_the_stored_sum(device: str, dtype: torch.dtype, length: int) -> None:
    x, residual = (oracle.random_x(2, 13, length, seed=seed, dtype=dtype).to(device) for seed in range(2))
    weight = oracle.random_x(length, seed=2, dtype=dtype).to(device)
    for w in (weight, None):
        total, y = fast.add_rms_norm(x, residual.mT.contiguous().mT, w, EPSILON)
        oracle.assert_identical(total.cpu(), x.cpu() + residual.cpu())
        assert_norm(NORMS["rms_norm"], y, total, w, None)


@DTYPE
@pytest.mark.parametrize("length", [48, 96, 8200])
@pytest.mark.parametrize("normalises, scale", [(True, 1.0), (False, 0.22), (True, 0.22)])
def test_add_rms_norm_of_a_norm_or_a_multiple(
    device: str, dtype: torch.dtype, length: int, normalises: bool, scale: float
) -> None:
    x, residual = (oracle.random_x(2, 13, length, seed=seed, dtype=dtype) for seed in range(2))
    weight, x_weight = (oracle.random_x(length, seed=seed, dtype=dtype).to(device) for seed in (2, 3))
    given = {"x_weight": x_weight if normalises else None, "scale": scale}
    total, y = fast.add_rms_norm(x.to(device), residual.to(device), weight, EPSILON, **given)
    added = F.rms_norm(x.double(), (length,), x_weight.cpu().double(), EPSILON) if normalises else x.double()
    exact = added * scale + residual.double()
    rounding = torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * (1 + added.abs())
    oracle.assert_within(total.cpu(), exact, rounding)
    assert_norm(NORMS["rms_norm"], y, total, weight, None)


@NORM
def test_what_is_not_finite(device: str, norm: Norm) -> None:
    x = torch.ones(3, 40)
    x[0, 3], x[1, 39] = torch.nan, torch.inf
    y = norm.ours(x.to(device), None, None).cpu()
    assert y[0].isnan().all() and y[1, 39].isnan() and y[2].isfinite().all()


# --- Gradients --------------------------------------------------------------------------------------------------------


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(each.detach().requires_grad_() for each in inputs)
    result = function(*inputs)
    seed = oracle.random_x(*result.shape, seed=9).to(result.device, result.dtype)
    return [each.cpu() for each in torch.autograd.grad(result, inputs, seed)]


@NORM
@DTYPE
def test_gradients(device: str, norm: Norm, dtype: torch.dtype) -> None:
    weight, bias = parameters(80, dtype)
    x = oracle.random_x(5, 3, 80, dtype=dtype) + 1
    inputs = (x, weight, bias) if norm.mlx == "layer_norm" else (x, weight)

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias=None: function(x, weight, bias)

    ours = gradients(call(norm.ours), *(each.to(device) for each in inputs))
    exact = gradients(call(norm.torch), *(each.double() for each in inputs))
    for mine, theirs, given in zip(ours, exact, inputs, strict=True):
        assert mine.dtype == given.dtype and mine.shape == given.shape
        oracle.assert_within(mine, theirs, 4 * torch.finfo(dtype).eps * (theirs.abs() + theirs.abs().amax()))


def test_gradients_of_add_rms_norm(device: str) -> None:
    x, residual, weight = oracle.random_x(4, 80), oracle.random_x(4, 80, seed=2), oracle.random_x(80, seed=3)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return torch.cat(fast.add_rms_norm(x, residual, weight, EPSILON))

    def theirs(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([x + residual, F.rms_norm(x + residual, (80,), weight, EPSILON)])

    inputs = (x, residual, weight)
    exact = gradients(theirs, *(each.double() for each in inputs))
    for mine, expected in zip(gradients(ours, *(each.to(device) for each in inputs)), exact, strict=True):
        oracle.assert_within(mine, expected, 1e-6 * (1 + expected.abs().amax()))


def test_gradients_of_a_norm_that_is_added(device: str) -> None:
    inputs = (
        *(oracle.random_x(4, 80, seed=seed) for seed in (1, 2)),
        *(oracle.random_x(80, seed=seed) for seed in (3, 4)),
    )

    def ours(x: Tensor, residual: Tensor, weight: Tensor, x_weight: Tensor) -> Tensor:
        return torch.cat(fast.add_rms_norm(x, residual, weight, EPSILON, x_weight=x_weight, scale=0.5))

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, x_weight: Tensor) -> Tensor:
        total = 0.5 * F.rms_norm(x, (80,), x_weight, EPSILON) + residual
        return torch.cat([total, F.rms_norm(total, (80,), weight, EPSILON)])

    exact = gradients(theirs, *(each.double() for each in inputs))
    for mine, expected in zip(gradients(ours, *(each.to(device) for each in inputs)), exact, strict=True):
        oracle.assert_within(mine, expected, 1e-6 * (1 + expected.abs().amax()))


@pytest.mark.parametrize("wanted", itertools.product((False, True), repeat=3), ids=str)
def test_gradients_of_some(wanted: tuple[bool, ...]) -> None:
    """Of every choice of inputs, with others that are not given or of another dtype."""
    x = oracle.random_x(4, 80, dtype=torch.float16)
    others = oracle.random_x(80, seed=2), oracle.random_x(80, seed=3)
    calls = {
        "layer": (
            lambda x, w, b: fast.layer_norm(x, w, b, EPSILON),
            lambda x, w, b: F.layer_norm(x, (80,), w, b, EPSILON),
        ),
        "no weight": (
            lambda x, w, b: fast.layer_norm(x, None, b, EPSILON).float() + w,
            lambda x, w, b: F.layer_norm(x, (80,), None, b, EPSILON) + w,
        ),
        "sum": (
            lambda x, w, b: fast.add_rms_norm(x, w.expand_as(x), b, EPSILON)[0],
            lambda x, w, b: x + w + 0 * b,
        ),
        "norm of the sum": (
            lambda x, w, b: fast.add_rms_norm(x, w.expand_as(x), None, EPSILON)[1] + b,
            lambda x, w, b: F.rms_norm(x + w, (80,), None, EPSILON) + b,
        ),
    }
    for name, (ours, theirs) in calls.items():
        inputs = [each.clone().requires_grad_(wants) for each, wants in zip((x, *others), wanted, strict=True)]
        exact = [each.detach().double().requires_grad_(each.requires_grad) for each in inputs]
        for function, operands in ((ours, inputs), (theirs, exact)):
            if (result := function(*operands)).requires_grad:
                result.sum().backward()
        for mine, expected in zip(inputs, exact, strict=True):
            assert (mine.grad is None) == (expected.grad is None), name
            if mine.grad is not None:
                assert mine.grad.dtype == mine.dtype
                bound = 2e-2 if mine.dtype == torch.float16 else 2e-3
                oracle.assert_within(mine.grad, expected.grad, bound * (1 + expected.grad.abs().amax()), name)


def test_gradients_of_gradients() -> None:
    x = oracle.random_x(3, 17).requires_grad_()

    def squared_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    for norm in NORMS.values():
        ours = squared_gradient(lambda x, norm=norm: norm.ours(x, None, None) * x, x)
        exact = squared_gradient(
            lambda x, norm=norm: norm.torch(x, None, None) * x, x.detach().double().requires_grad_()
        )
        oracle.assert_within(ours, exact, 1e-4 * exact.abs().amax())


def test_forward_mode_is_refused() -> None:
    x = oracle.random_x(2, 32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        for call in (lambda: fast.rms_norm(dual, None, 0.1), lambda: fast.layer_norm(dual, None, None, 0.1)):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                call()
        with pytest.raises(NotImplementedError, match="forward-mode"):
            fast.add_rms_norm(x, dual, None, 0.1)


# --- As torch's ops ---------------------------------------------------------------------------------------------------

X, WEIGHT = oracle.random_x(2, 3, 48), oracle.random_x(48, seed=2)
CALLS = {
    "rms_norm": (X, WEIGHT, EPSILON),
    "layer_norm": (X, WEIGHT, None, EPSILON),
    "add_rms_norm": (X, X + 1, WEIGHT, EPSILON),
}
CALL = pytest.mark.parametrize("name", CALLS)


@CALL
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device: str, name: str, grad: bool) -> None:
    arguments = tuple(
        each.detach().to(device).requires_grad_(grad) if isinstance(each, Tensor) else each for each in CALLS[name]
    )
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck_of_a_norm_that_is_added(device: str, grad: bool) -> None:
    x, weight = (each.detach().to(device).requires_grad_(grad) for each in (X, WEIGHT))
    torch.library.opcheck(
        ops.add_rms_norm.default,
        (x, x, weight, EPSILON),
        {"x_weight": weight, "scale": 0.5},
        test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"],
    )


@CALL
def test_compiles_as_one_graph(name: str) -> None:
    function = getattr(fast, name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    ours, expected = compiled(*CALLS[name]), function(*CALLS[name])
    for mine, theirs in zip(
        *((each if isinstance(each, tuple) else (each,)) for each in (ours, expected)), strict=True
    ):
        oracle.assert_identical(mine, theirs)


@CALL
def test_exports_with_sizes_that_depend_on_data(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            x = torch.arange(6.0)[mask][:, None] * torch.ones(48)
            arguments = [x if isinstance(each, Tensor) and each.dim() > 1 else each for each in CALLS[name]]
            result = getattr(fast, name)(*arguments)
            return result if isinstance(result, Tensor) else result[1]

    mask = torch.tensor([True, False, True, True, False, True])
    program = torch.export.export(Module(), (mask,)).module()
    for each in (mask, ~mask):
        oracle.assert_identical(program(each), Module()(each))


@pytest.mark.parametrize(
    "length, kernel, threads", [(96, "rms_norm", 32), (2560, "rms_norm", 320), (9000, "rms_norm_long", 1024)]
)
def test_explain(length: int, kernel: str, threads: int) -> None:
    x = torch.empty(4, 7, length, dtype=torch.float16, device="meta")
    plan = json.loads(ops.explain_rms_norm(x, None, EPSILON, "applegpu_g15s", 1500))
    (launch,) = plan["launches"]
    assert (launch["kernel"], launch["file"], launch["threads"]) == (f"{kernel}_float16", "norm", threads)
    assert launch["threadgroups"] == [28, 1, 1]
    assert json.loads(ops.explain_layer_norm(X, WEIGHT, None, EPSILON, "", 0))["device"] == "cpu"


# --- Errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "scalar": (lambda: fast.rms_norm(torch.tensor(1.0), None, 0.1), ValueError, r"\[rms_norm\] x is a scalar"),
    "x dtype": (lambda: fast.layer_norm(X.double(), None, None, 0.1), TypeError, r"\[layer_norm\] x has dtype Double"),
    "weight dtype": (lambda: fast.rms_norm(X, WEIGHT.int(), 0.1), TypeError, r"weight has dtype Int; supported are"),
    "weight shape": (lambda: fast.rms_norm(X, WEIGHT[:32], 0.1), ValueError, r"weight of shape \[32\] must have one"),
    "weight sizes": (lambda: fast.rms_norm(X, X, 0.1), ValueError, r"weight of shape \[2, 3, 48\] must have one"),
    "bias shape": (
        lambda: fast.layer_norm(X, None, WEIGHT[:1], 0.1),
        ValueError,
        r"\[layer_norm\] bias of shape \[1\]",
    ),
    "wide weight": (
        lambda: fast.add_rms_norm(X.half(), X.half(), WEIGHT, 0.1),
        TypeError,
        r"\[add_rms_norm\] weight has dtype Float and the sum of x and residual Half",
    ),
    "residual": (
        lambda: fast.add_rms_norm(X, X[:1], None, 0.1),
        ValueError,
        r"residual of shape \[1, 3, 48\] must have",
    ),
    "x_weight": (
        lambda: fast.add_rms_norm(X, X, None, 0.1, x_weight=WEIGHT[:32]),
        ValueError,
        r"\[add_rms_norm\] x_weight of shape \[32\] must have one",
    ),
    "device": (lambda: fast.rms_norm(X, WEIGHT.to("meta"), 0.1), ValueError, r"weight is on meta and x on cpu"),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_fake_tensors_raise_the_same() -> None:
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight of shape \[32\] must have one"):
        fast.rms_norm(X.to("meta"), WEIGHT[:32].to("meta"), 0.1)
