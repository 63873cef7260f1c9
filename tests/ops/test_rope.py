"""rope: against float64, complex multiplication and mlx's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from cases import DTYPES
from oracle import name_of
from quantization_mlx import fast
from quantization_mlx._ops import ops

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
TRADITIONAL = pytest.mark.parametrize("traditional", [False, True], ids=["halves", "neighbours"])
# What cosines and sines may be off by: up to position 2^24, and beyond on GPUs, where frequencies are sums of floats.
BOUND, FAR_BOUND = 2e-7, 2e-5
DEFAULTS: dict[str, Any] = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": 0}


def rotated(
    x: Tensor,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | Tensor,
    freqs: Tensor | None = None,
) -> Tensor:
    """In float64: pairs as complex numbers, times exp(i * angle)."""
    x = x.double()
    radians = 1 / freqs.double() if base is None else base ** (-torch.arange(dims // 2, dtype=torch.float64) * 2 / dims)
    first = torch.as_tensor(offset, dtype=torch.float64).reshape(-1, *[1] * (x.dim() - 1))
    angles = (first + torch.arange(x.shape[-2], dtype=torch.float64)[:, None]) * scale * radians
    turned, rest = x[..., :dims], x[..., dims:]
    parts = (turned[..., ::2], turned[..., 1::2]) if traditional else turned.chunk(2, -1)
    product = torch.complex(*parts) * torch.polar(torch.ones_like(angles), angles)
    joined = (product.real, product.imag)
    turned = torch.stack(joined, -1).flatten(-2) if traditional else torch.cat(joined, -1)
    return torch.cat([turned, rest], -1)


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: each.to(device) if isinstance(each, Tensor) else each for name, each in options.items()}


def assert_rotated(device: str, x: Tensor, dims: int, bound: float = BOUND, **options: Any) -> None:
    """Within the bound of angles, and one rounding."""
    options = DEFAULTS | options
    y = fast.rope(x.to(device), dims, **on(device, options)).cpu()
    exact = rotated(x.cpu(), dims, **options)
    assert y.dtype == x.dtype and y.shape == x.shape and y.is_contiguous()
    size = x.double().abs().amax() if x.numel() else 0.0
    oracle.assert_within(y, exact, 2 * bound * size + torch.finfo(y.dtype).eps * exact.abs())


# --- Values -----------------------------------------------------------------------------------------------------------


@TRADITIONAL
@DTYPE
@pytest.mark.parametrize(
    "dims, width", [(2, 2), (6, 6), (6, 9), (30, 37), (32, 80), (64, 64), (128, 128), (130, 136)], ids=str
)
def test_values(device: str, dtype: torch.dtype, traditional: bool, dims: int, width: int) -> None:
    x = oracle.random_x(2, 3, 5, width, dtype=dtype)
    assert_rotated(device, x, dims, traditional=traditional, offset=7)


@TRADITIONAL
@pytest.mark.parametrize("position", [0, -3, 1000, 100_000, 1_000_000, 2**24 + 1, 2**31 - 5])
def test_large_positions(device: str, traditional: bool, position: int) -> None:
    x = oracle.random_x(1, 2, 4, 64)
    bound = BOUND if device == "cpu" or position < 2**25 else FAR_BOUND
    frequencies = ({}, {"base": None, "freqs": 10000.0 ** torch.linspace(0, 1, 32)})
    for offset, given in itertools.product((position, torch.tensor(position)), frequencies):
        assert_rotated(device, x, 64, bound, traditional=traditional, offset=offset, **given)


@pytest.mark.parametrize("scale", [0.25, -1.0, 3.7, 0.0])
@pytest.mark.parametrize("base", [10000.0, 1e6, 500000.0, 2.5])
def test_scale_and_base(device: str, scale: float, base: float) -> None:
    assert_rotated(device, oracle.random_x(1, 2, 3, 32), 32, scale=scale, base=base, offset=4321)


@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 2, 5, 16), (2, 2, 3, 5, 16), (2, 1, 2, 2, 3, 16), (700, 9, 1, 16)])
def test_shapes(device: str, shape: tuple[int, ...]) -> None:
    x = oracle.random_x(*shape)
    assert_rotated(device, x, 16, offset=11)
    assert_rotated(device, x, 16, offset=torch.arange(shape[0]) * 1000)


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)], ids=str)
def test_nothing_to_turn(device: str, shape: tuple[int, ...]) -> None:
    assert_rotated(device, oracle.random_x(*shape), 16)


def test_long_prompt(device: str) -> None:
    """Many heads to a thread's angles, and many tasks."""
    assert_rotated(device, oracle.random_x(1, 40, 300, 32, dtype=torch.float16), 32, offset=5)


def test_strides(device: str) -> None:
    base = oracle.random_x(3, 6, 5, 100, dtype=torch.float16).to(device)
    views = {
        "a part of each row": base[..., 8:72],
        "one that begins anywhere": base[..., 3:67],
        "heads swapped with positions": base[..., :64].transpose(1, 2),
        "sequences swapped with positions": base[..., :64].transpose(0, 2),
        "elements far apart": base.permute(1, 2, 3, 0)[:, :, :64, :2].transpose(2, 3),
        "one head for all": base[:, :1, :, :64].expand(3, 4, 5, 64),
        "dimensions without a common stride": base[..., :64].reshape(3, 2, 3, 5, 64).transpose(1, 2),
        "every other position": base[:, :, ::2, :64],
    }
    for name, x in views.items():
        for dims, traditional in itertools.product((64, 40), (False, True)):
            options = DEFAULTS | {"traditional": traditional, "offset": torch.arange(x.shape[0], device=device)}
            expected = fast.rope(x.contiguous(), dims, **options)
            oracle.assert_identical(fast.rope(x, dims, **options), expected, name)


def test_joint_product_is_read_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries of queries, keys and values side by side, as [B, H, T, D]: nothing but the result is made."""
    joint = oracle.random_x(2, 7, (4 + 2 * 2) * 64)
    queries = joint.unflatten(-1, (-1, 64))[:, :, :4].transpose(1, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = fast.rope(queries, 64, **DEFAULTS)
    names = {event.key for event in profile.key_averages()}
    assert "aten::empty" in names and not {"aten::clone", "aten::copy_", "aten::contiguous"} & names
    oracle.assert_identical(y, fast.rope(queries.contiguous(), 64, **DEFAULTS))


# --- Offsets and frequencies ------------------------------------------------------------------------------------------

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@pytest.mark.parametrize("dtype", INTEGERS, ids=name_of)
def test_offset_tensors(device: str, dtype: torch.dtype) -> None:
    x = oracle.random_x(3, 2, 4, 16)
    wide = torch.tensor([[5, 0], [200, 1], [17, 2]], dtype=dtype)
    for offset in (wide[:, 0], wide[0, 0], wide[1:2, 0], wide[:, 0].contiguous()):
        assert_rotated(device, x, 16, offset=offset)


def test_negative_offsets(device: str) -> None:
    for dtype in (torch.int32, torch.int64):
        offset = torch.tensor([-1, -100_000], dtype=dtype)
        assert_rotated(device, oracle.random_x(2, 2, 4, 16), 16, offset=offset)


@DTYPE
def test_freqs(device: str, dtype: torch.dtype) -> None:
    """Of any dtype, with pairs that do not turn, and on any stride."""
    x = oracle.random_x(2, 2, 4, 24, dtype=dtype)
    freqs = torch.tensor([[1.0, 0.3, torch.inf, 1000.0, 12.5, 1e6, torch.inf, 33.0, 7.0, 2.0]] * 2, dtype=dtype).T[:, 0]
    for scale in (1.0, 0.25):
        assert_rotated(device, x, 20, base=None, freqs=freqs.to(dtype), scale=scale, offset=99)


def test_what_is_not_finite(device: str) -> None:
    x = torch.ones(1, 1, 2, 12)
    x[0, 0, 0, 1] = torch.nan
    y = fast.rope(x.to(device), 8, **DEFAULTS).cpu()
    assert y[0, 0, 0].isnan().tolist() == [False, True, False, False, False, True, *[False] * 6]
    freqs = torch.tensor([1.0, torch.nan, 0.0, 2.0])
    y = fast.rope(torch.ones(1, 1, 2, 8).to(device), 8, **on(device, DEFAULTS | {"base": None, "freqs": freqs})).cpu()
    assert y.isnan().all(1).all(1).sum() == 4 and y[..., [0, 3, 4, 7]].isfinite().all()


# --- mlx --------------------------------------------------------------------------------------------------------------


@TRADITIONAL
@DTYPE
@pytest.mark.parametrize("shape, dims", [((2, 3, 4, 16), 16), ((2, 5, 24), 16), ((1, 2, 2, 3, 8), 6)], ids=str)
def test_agrees_with_mlx(device: str, dtype: torch.dtype, traditional: bool, shape: tuple[int, ...], dims: int) -> None:
    import mlx.core as mx

    x = oracle.random_x(*shape, dtype=dtype)
    freqs = 1.5 ** torch.arange(dims // 2, dtype=torch.float32)
    per_sequence = torch.arange(shape[0], dtype=torch.int32) + 3
    for base, given, offset, scale in itertools.product((100.0, None), (freqs,), (5, per_sequence), (1.0, 0.5)):
        options = {"traditional": traditional, "base": base, "scale": scale, "offset": offset}
        options["freqs"] = given if base is None else None
        theirs = mx.fast.rope(
            oracle.to_mlx(x),
            dims,
            **{name: oracle.to_mlx(each) if isinstance(each, Tensor) else each for name, each in options.items()},
        )
        ours = fast.rope(x.to(device), dims, **on(device, options)).cpu()
        expected = oracle.from_mlx(theirs)
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        bound = 4e-6 + 2 * torch.finfo(dtype).eps * x.double().abs().amax()  # both round, and mlx its angles, too
        oracle.assert_within(ours, expected.double(), bound)


# --- Gradients --------------------------------------------------------------------------------------------------------


@TRADITIONAL
@DTYPE
def test_gradients(device: str, dtype: torch.dtype, traditional: bool) -> None:
    x = oracle.random_x(2, 3, 5, 24, dtype=dtype)
    seed = oracle.random_x(2, 5, 3, 24, seed=2, dtype=dtype).transpose(1, 2)
    freqs = 3.0 ** torch.arange(10.0)
    for change in ({}, {"base": None, "freqs": freqs}, {"offset": torch.tensor([3, 70])}):
        options = DEFAULTS | {"traditional": traditional, "scale": 0.5} | change
        ours = x.detach().to(device).requires_grad_()
        fast.rope(ours, 20, **on(device, options)).backward(seed.to(device))
        exact = x.double().requires_grad_()
        rotated(exact, 20, **options).backward(seed.double())
        assert ours.grad.dtype == dtype
        bound = 2 * BOUND * seed.double().abs().amax() + torch.finfo(dtype).eps * exact.grad.abs()
        oracle.assert_within(ours.grad.cpu(), exact.grad, bound)


def test_gradients_of_gradients() -> None:
    x = oracle.random_x(1, 2, 3, 8).requires_grad_()

    def squared_gradient(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = function(x, 8, **DEFAULTS | {"offset": 2})
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    exact = squared_gradient(rotated, x.detach().double().requires_grad_())
    oracle.assert_within(squared_gradient(fast.rope, x), exact, 1e-5 * exact.abs().amax())


def test_gradients_that_are_refused() -> None:
    x, freqs = oracle.random_x(1, 2, 8), torch.ones(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"\[rope\] there are gradients for x only, and freqs require one"):
        fast.rope(x, 8, **DEFAULTS | {"base": None, "freqs": freqs})
    with torch.no_grad():
        fast.rope(x, 8, **DEFAULTS | {"base": None, "freqs": freqs})
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            fast.rope(dual, 8, **DEFAULTS)


# --- As torch's ops ---------------------------------------------------------------------------------------------------

X = oracle.random_x(2, 3, 5, 24)
CALLS = {
    "base": (X, 16, False, 10000.0, 1.0, 3),
    "freqs and offsets": (X, 24, True, None, 1.0, 0, torch.tensor([4, 5]), 2.0 ** torch.arange(12.0)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device: str, call: str, grad: bool) -> None:
    x, *others = CALLS[call]
    others = [each.to(device) if isinstance(each, Tensor) else each for each in others]
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    arguments = (x.detach().to(device).requires_grad_(grad), *others)
    torch.library.opcheck(ops.rope.default, arguments, test_utils=checks)


def test_compiles_once_for_all_positions() -> None:
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(fast.rope, fullgraph=True, backend=backend, dynamic=True)
    for offset in (10, 11, 12, 13):
        options = DEFAULTS | {"offset": offset}
        oracle.assert_identical(compiled(X, 16, **options), fast.rope(X, 16, **options))
    assert graphs == 1


def test_exports_with_sizes_that_depend_on_data() -> None:
    class Module(torch.nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            x = torch.arange(6.0)[mask][None, None, :, None] * torch.ones(16)
            return fast.rope(x, 16, **DEFAULTS | {"offset": mask.sum()})

    mask = torch.tensor([True, False, True, True, False, True])
    program = torch.export.export(Module(), (mask,)).module()
    for each in (mask, ~mask):
        oracle.assert_identical(program(each), Module()(each))


@pytest.mark.parametrize(
    "shape, threadgroups", [((1, 32, 1, 128), [1, 32, 1]), ((2, 32, 2048, 128), [512, 4, 2]), ((1, 5, 9), [1, 1, 1])]
)
def test_explain(shape: tuple[int, ...], threadgroups: list[int]) -> None:
    x = torch.empty(*shape, dtype=torch.float16, device="meta")
    plan = json.loads(
        ops.explain_rope(x, 8 if len(shape) == 3 else 128, False, 1e4, 1.0, 0, None, None, "applegpu_g15s", 1500)
    )
    (launch,) = plan["launches"]
    assert (launch["kernel"], launch["file"], launch["threads"]) == ("rope_float16", "rope", 64)
    assert launch["threadgroups"] == threadgroups
    assert json.loads(ops.explain_rope(X, 16, True, 1e4, 1.0, 0, None, None, "", 0))["device"] == "cpu"


# --- Errors -----------------------------------------------------------------------------------------------------------


def call(x: Tensor = X, dims: int = 16, **options: Any) -> Callable[[], Tensor]:
    return lambda: fast.rope(x, dims, **DEFAULTS | options)


FREQS = {"base": None, "freqs": torch.ones(8)}
ERRORS = {
    "vectors": (call(X[0, 0]), ValueError, r"\[rope\] x of shape \[5, 24\] must have at least three dimensions"),
    "dtype": (call(X.double()), TypeError, r"\[rope\] x has dtype Double; supported are"),
    "odd dims": (call(dims=7), ValueError, r"dims is 7; it must be positive, even and at most the last size of x, 24"),
    "no dims": (call(dims=0), ValueError, r"dims is 0; it must be positive"),
    "many dims": (call(dims=26), ValueError, r"dims is 26; it must be positive, even and at most the last size"),
    "neither": (call(base=None), ValueError, r"base and freqs are both None; exactly one"),
    "both": (call(freqs=torch.ones(8)), ValueError, r"base and freqs are both given; exactly one"),
    "base": (call(base=-1.0), ValueError, r"base is -1; it must be positive and finite"),
    "scale": (call(scale=float("nan")), ValueError, r"scale is nan; it must be finite"),
    "freqs shape": (
        call(**FREQS | {"freqs": torch.ones(9)}),
        ValueError,
        r"freqs of shape \[9\] must have one dimension, of dims / 2 = 8 elements",
    ),
    "freqs dtype": (call(**FREQS | {"freqs": torch.ones(8).int()}), TypeError, r"freqs has dtype Int; supported are"),
    "freqs device": (call(**FREQS | {"freqs": torch.ones(8, device="meta")}), ValueError, r"freqs is on meta and x on"),
    "offset count": (call(offset=torch.arange(3)), ValueError, r"offset of shape \[3\] must be a scalar or have one"),
    "offset matrix": (call(offset=torch.ones(1, 2).int()), ValueError, r"offset of shape \[1, 2\] must be a scalar"),
    "offset dtype": (call(offset=torch.ones(2)), TypeError, r"offset has dtype Float; it must be an integer"),
    "offset bool": (call(offset=torch.tensor(True)), TypeError, r"offset has dtype Bool; it must be an integer"),
    "offset device": (call(offset=torch.tensor(1, device="meta")), ValueError, r"offset is on meta and x on cpu"),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_fake_tensors_raise_the_same() -> None:
    with pytest.raises(ValueError, match=r"\[rope\] dims is 26"):
        fast.rope(X.to("meta"), 26, **DEFAULTS)


def test_wide_heads_are_refused_on_gpus() -> None:
    x = torch.empty(1, 1, 1, 8194, device="meta")
    with pytest.raises(NotImplementedError, match=r"\[rope\] dims is 8194; on Metal it must be at most 8192 with base"):
        ops.explain_rope(x, 8194, False, 1e4, 1.0, 0, None, None, "applegpu_g15s", 1500)
