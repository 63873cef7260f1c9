"""moe_router and moe_combine: against Transformers' routers, float64 and torch's own ops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
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


# --- Transformers' routers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A router of Transformers by its module and class, and what its configuration has; ours does the same."""

    module: str
    router: str
    config: dict[str, Any]
    options: dict[str, Any]
    has_bias: bool = False

    def build(self, experts: int, k: int) -> torch.nn.Module:
        """With logits equal to hidden states."""
        sizes = {"hidden_size": experts, "num_local_experts": experts, "num_experts": experts}
        config = SimpleNamespace(**sizes, num_experts_per_tok=k, **self.config)
        modeling = import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        router = getattr(modeling, self.router)(config)
        with torch.no_grad():
            router.weight.copy_(torch.eye(experts))
            if self.has_bias:
                router.e_score_correction_bias.copy_(0.2 * oracle.random_x(experts, seed=5))
        return router


def grouped(groups: int, used: int, normalise: bool, scale: float) -> dict[str, dict[str, Any]]:
    config = {"n_group": groups, "topk_group": used, "norm_topk_prob": normalise, "routed_scaling_factor": scale}
    options = {"groups": groups, "groups_used": used, "normalise": normalise, "scale": scale, "scoring": "sigmoid"}
    return {"config": config, "options": options}


FAMILIES = {
    "mixtral": Family("mixtral", "MixtralTopKRouter", {}, {"normalise": True}),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": True}, {"normalise": True}),
    "qwen3_moe not normalised": Family("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": False}, {}),
    "gpt_oss": Family("gpt_oss", "GptOssTopKRouter", {}, {"scoring": "softmax_of_selected"}),
    "deepseek_v3": Family("deepseek_v3", "DeepseekV3TopkRouter", **grouped(8, 4, True, 2.5), has_bias=True),
    "deepseek_v3 not normalised": Family(
        "deepseek_v3", "DeepseekV3TopkRouter", **grouped(4, 1, False, 1.0), has_bias=True
    ),
    "glm4_moe": Family("glm4_moe", "Glm4MoeTopkRouter", **grouped(1, 1, True, 1.5), has_bias=True),
}


def by_expert(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    """[tokens, count], 0 for experts that are not chosen."""
    return torch.zeros(len(experts), count).scatter(1, experts.cpu(), weights.detach().cpu().float())


@pytest.mark.parametrize("experts, k", [(8, 2), (64, 6), (160, 8), (256, 8)])
@pytest.mark.parametrize("name", FAMILIES)
def test_routes_as_transformers(device: str, name: str, experts: int, k: int) -> None:
    family = FAMILIES[name]
    if experts // family.options.get("groups", 1) * family.options.get("groups_used", 1) < k or (
        experts == family.options.get("groups")
    ):
        experts, k = 32, 4
    router = family.build(experts, k)
    logits = 2 * oracle.random_x(37, experts)
    with torch.no_grad():
        _, weights, chosen = router(logits)
    bias = router.e_score_correction_bias.to(device) if family.has_bias else None
    our_experts, our_weights = fast.moe_router(logits.to(device), k, bias=bias, **family.options)
    assert our_experts.dtype == torch.int64 and our_weights.dtype == torch.float32
    expected = by_expert(chosen, weights, experts)
    ours = by_expert(our_experts, our_weights, experts)
    assert torch.equal(ours != 0, expected != 0)
    oracle.assert_within(ours, expected.double(), 2e-6 * expected.abs())


@pytest.mark.parametrize("k", [1, 2])
def test_routes_as_llama4(device: str, k: int) -> None:
    modeling = import_module("transformers.models.llama4.modeling_llama4")
    router = modeling.Llama4Router(SimpleNamespace(hidden_size=16, num_local_experts=16, num_experts_per_tok=k))
    logits = oracle.random_x(21, 16)
    with torch.no_grad():
        router.weight.copy_(torch.eye(16))
        expected, _ = router(logits)
    ours = by_expert(*fast.moe_router(logits.to(device), k, scoring="sigmoid"), 16)
    oracle.assert_within(ours, expected.double(), 1e-6)


# --- Values of moe_router ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    scoring: str = "softmax"
    groups: int = 1
    groups_used: int = 1
    normalise: bool = False
    scale: float = 1.0
    bias: bool = False
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        names = ("scoring", "groups", "groups_used", "normalise", "scale")
        object.__setattr__(self, "options", {name: getattr(self, name) for name in names})


RULES = {
    "softmax": Rules(),
    "softmax, normalised": Rules(normalise=True, scale=3.0),
    "softmax with bias": Rules(bias=True),
    "sigmoid": Rules("sigmoid"),
    "sigmoid with bias": Rules("sigmoid", bias=True, normalise=True),
    "sigmoid in groups": Rules("sigmoid", 4, 2, True, 2.5, bias=True),
    "softmax in groups": Rules("softmax", 2, 1),
    "selected": Rules("softmax_of_selected"),
    "selected with bias": Rules("softmax_of_selected", bias=True, scale=0.5),
}
RULE = pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())


def scores_of(logits: Tensor, scoring: str) -> Tensor:
    return {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}.get(scoring, logits)


def routed(logits: Tensor, k: int, rules: Rules, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """In the dtype of logits; stable sorting puts the lower of equal indices first."""
    scores = scores_of(logits, rules.scoring)
    choice = scores if bias is None else scores + bias.to(logits.dtype)
    if rules.groups > 1:
        in_groups = choice.unflatten(-1, (rules.groups, -1))
        order = in_groups.topk(2).values.sum(-1).argsort(dim=-1, descending=True, stable=True)
        unused = torch.ones_like(order, dtype=torch.bool).scatter(-1, order[..., : rules.groups_used], False)
        choice = in_groups.masked_fill(unused[..., None], -torch.inf).flatten(-2)
    experts = choice.argsort(dim=-1, descending=True, stable=True)[..., :k]
    weights = scores.gather(-1, experts)
    if rules.scoring == "softmax_of_selected":
        weights = weights.softmax(-1)
    if rules.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * rules.scale


def assert_routed(ours: tuple[Tensor, Tensor], logits: Tensor, k: int, rules: Rules, bias: Tensor | None) -> None:
    """The experts of float64; weights within twice the error of torch's float32 and one rounding to their dtype."""
    logits = logits.cpu()
    experts, exact = routed(logits.double(), k, rules, bias)
    assert torch.equal(ours[0].cpu(), experts)
    assert ours[1].dtype == logits.dtype
    _, theirs = routed(logits.float(), k, rules, bias)
    bound = 2 * (theirs.double() - exact).abs().amax() if exact.numel() else 0.0
    oracle.assert_within(ours[1], exact, bound + torch.finfo(logits.dtype).eps * exact.abs() + 1e-7)


def random_logits(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Without ties."""
    order = [torch.randperm(experts, generator=oracle.generator(token)) for token in range(tokens)]
    return ((torch.stack(order) - experts // 2) / 64).to(dtype)


@RULE
@DTYPE
@pytest.mark.parametrize("experts, k", [(8, 3), (60, 4), (128, 8), (512, 32)])
def test_router(device: str, rules: Rules, dtype: torch.dtype, experts: int, k: int) -> None:
    logits = random_logits(9, experts, dtype)
    bias = 0.05 * oracle.random_x(experts, seed=4) if rules.bias else None
    ours = fast.moe_router(logits.to(device), k, bias=None if bias is None else bias.to(device), **rules.options)
    assert_routed(ours, logits, k, rules, bias)


def test_ties_go_to_the_lower_index(device: str) -> None:
    logits = torch.zeros(3, 70)
    logits[1, 40:] = 1.0
    logits[2, [69, 3, 35]] = 2.0
    for rules in (Rules(), Rules("sigmoid", bias=True), Rules("sigmoid", 7, 3), Rules("softmax_of_selected")):
        bias = torch.zeros(70) if rules.bias else None
        ours = fast.moe_router(logits.to(device), 6, bias=None if bias is None else bias.to(device), **rules.options)
        assert torch.equal(ours[0].cpu(), routed(logits.double(), 6, rules, bias)[0])


def test_all_experts_and_one(device: str) -> None:
    logits = random_logits(5, 32, torch.float32)
    assert_routed(fast.moe_router(logits.to(device), 32), logits, 32, Rules(), None)
    experts, weights = fast.moe_router(torch.tensor([[3.0]]).to(device), 1)
    assert experts.tolist() == [[0]] and weights.tolist() == [[1.0]]


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 3, 8), (1, 1, 8), (1000, 8)], ids=str)
def test_shapes_of_router(device: str, shape: tuple[int, ...]) -> None:
    logits = oracle.random_x(*shape)
    ours = fast.moe_router(logits.to(device), 2)
    assert all(each.shape == (*shape[:-1], 2) and each.is_contiguous() for each in ours)
    assert_routed(ours, logits, 2, Rules(), None)


def test_strides_of_router(device: str) -> None:
    base = oracle.random_x(6, 8, 200, dtype=torch.float16).to(device)
    views = {
        "a part of each row": base[..., 8:72],
        "one that begins anywhere": base[..., 3:67],
        "rows swapped with others": base[:, :, :64].transpose(0, 1),
        "every other element": base[..., ::2][..., :64],
        "one row for all": base[:1, :1, :64].expand(5, 4, 64),
    }
    bias = oracle.random_x(128).to(device)[::2]
    for name, logits in views.items():
        ours = fast.moe_router(logits, 4, bias=bias)
        for mine, expected in zip(ours, fast.moe_router(logits.contiguous(), 4, bias=bias.contiguous()), strict=True):
            oracle.assert_identical(mine, expected, name)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_of_selected"])
def test_what_is_not_finite(device: str, scoring: str) -> None:
    """Indices are those of experts, whatever the logits; NaN is above all."""
    logits = oracle.random_x(4, 40)
    logits[0, 7] = torch.nan
    logits[1, :] = -torch.inf
    logits[2, ::2] = -torch.inf
    logits[3, :] = torch.nan
    experts, weights = (each.cpu() for each in fast.moe_router(logits.to(device), 24, scoring=scoring))
    assert (experts.sort(-1).values.diff() > 0).all() and experts.min() >= 0 and experts.max() < 40
    assert experts[0, 0] == 7 and weights[0, 0].isnan()
    assert experts[1].tolist() == experts[3].tolist() == list(range(24))
    assert set(experts[2, :20].tolist()) == set(range(1, 40, 2))
    assert weights[2].isfinite().all() and (weights[2, 20:] == 0).all()


# --- Values of moe_combine --------------------------------------------------------------------------------------------


def combined(y: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
    result = (y * weights[..., None]).sum(-2)
    return result if residual is None else result + residual


def assert_combined(ours: Tensor, y: Tensor, weights: Tensor, residual: Tensor | None) -> None:
    """Within twice the error of torch in float32, and one rounding to the result's dtype."""
    given = [None if each is None else each.detach().cpu() for each in (y, weights, residual)]
    exact = combined(*(None if each is None else each.double() for each in given))
    theirs = combined(*(None if each is None else each.float() for each in given))
    bound = 2 * (theirs.double() - exact).abs().amax() if exact.numel() else 0.0
    oracle.assert_within(ours, exact, bound + torch.finfo(ours.dtype).eps * exact.abs() + 1e-7)


@DTYPE
@pytest.mark.parametrize("weights_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_combine(device: str, dtype: torch.dtype, weights_dtype: torch.dtype, length: int) -> None:
    y = oracle.random_x(5, 4, length, dtype=dtype)
    weights = oracle.random_x(5, 4, seed=2).softmax(-1).to(weights_dtype)
    residual = oracle.random_x(5, length, seed=3, dtype=dtype)
    for added in (residual, None):
        ours = fast.moe_combine(y.to(device), weights.to(device), residual=None if added is None else added.to(device))
        assert ours.dtype == dtype
        assert_combined(ours, y, weights, added)


def test_dtypes_of_combine_promote(device: str) -> None:
    y = oracle.random_x(3, 2, 40, dtype=torch.bfloat16)
    weights = oracle.random_x(3, 2, seed=2)
    residual = oracle.random_x(3, 40, seed=3)
    ours = fast.moe_combine(y.to(device), weights.to(device), residual=residual.to(device))
    assert ours.dtype == torch.float32
    assert_combined(ours, y, weights, residual)


@pytest.mark.parametrize("shape", [(2, 16), (0, 2, 16), (3, 2, 0), (2, 3, 1, 16), (700, 2, 8)], ids=str)
def test_shapes_of_combine(device: str, shape: tuple[int, ...]) -> None:
    y = oracle.random_x(*shape)
    weights = oracle.random_x(*shape[:-1], seed=2)
    ours = fast.moe_combine(y.to(device), weights.to(device))
    assert ours.shape == (*shape[:-2], shape[-1])
    assert_combined(ours, y, weights, None)


def test_strides_of_combine(device: str) -> None:
    base = oracle.random_x(6, 8, 200, dtype=torch.float16).to(device)
    weights = oracle.random_x(8, 6, seed=2, dtype=torch.float16).to(device)
    residual = oracle.random_x(64, 6, seed=3, dtype=torch.float16).to(device).T
    views = {
        "a part of each row": base[..., 8:72],
        "one that begins anywhere": base[..., 3:67],
        "every other element": base[..., ::2][..., :64],
        "one expert for all": base[:, :1, :64].expand(6, 8, 64),
    }
    for name, y in views.items():
        ours = fast.moe_combine(y, weights.T, residual=residual)
        expected = fast.moe_combine(y.contiguous(), weights.T.contiguous(), residual=residual.contiguous())
        oracle.assert_identical(ours, expected, name)


EXPERTS = torch.tensor([[0, 3, 1], [2, 2, 3], [1, 0, 2], [3, 1, 0], [2, 3, 1]])


@DTYPE
@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_combine_with_biases_of_experts(device: str, dtype: torch.dtype, length: int) -> None:
    y = oracle.random_x(5, 3, length, dtype=dtype)
    weights = oracle.random_x(5, 3, seed=2).softmax(-1).to(dtype)
    residual = oracle.random_x(5, length, seed=3, dtype=dtype)
    bias = oracle.random_x(4, length, seed=4, dtype=dtype)
    for added in (residual, None):
        options = {"bias": bias.to(device), "experts": EXPERTS.to(device)}
        ours = fast.moe_combine(
            y.to(device), weights.to(device), residual=None if added is None else added.to(device), **options
        )
        assert ours.dtype == dtype
        exact = combined((y.double() + bias.double()[EXPERTS]), weights.double(), None if added is None else added)
        oracle.assert_within(ours, exact, torch.finfo(dtype).eps * exact.abs() + 2e-6)


def test_biases_on_any_strides(device: str) -> None:
    y, weights = oracle.random_x(5, 3, 40).to(device), oracle.random_x(5, 3, seed=2).to(device)
    base = oracle.random_x(8, 100, seed=4).to(device)
    experts = EXPERTS.to(device)
    for bias in (base[:4, 8:48], base[:4, 3:43], base[::2, ::2][:, :40], base[:1, :40].expand(4, 40)):
        ours = fast.moe_combine(y, weights, bias=bias, experts=experts.T.contiguous().T)
        oracle.assert_identical(ours, fast.moe_combine(y, weights, bias=bias.contiguous(), experts=experts))


def test_experts_that_do_not_exist(device: str) -> None:
    y, weights, bias = oracle.random_x(5, 3, 8), oracle.random_x(5, 3), oracle.random_x(3, 8)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"\[moe_combine\] experts holds 3 at position 1"):
            fast.moe_combine(y, weights, bias=bias, experts=EXPERTS)
        return
    given = (each.to(device) for each in (y, weights))
    ours = fast.moe_combine(*given, bias=bias.to(device), experts=EXPERTS.to(device)).cpu()
    missing = (EXPERTS == 3).any(-1)
    assert ours[missing].isnan().all() and ours[~missing].isfinite().all()


# --- Gradients --------------------------------------------------------------------------------------------------------


@RULE
def test_gradients_of_router(device: str, rules: Rules) -> None:
    logits = random_logits(5, 24, torch.float32)
    bias = 0.05 * oracle.random_x(24, seed=4) if rules.bias else None
    seed = oracle.random_x(5, 6, seed=9)

    def gradient(given: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        given = given.detach().requires_grad_()
        experts, weights = function(given)
        assert not experts.requires_grad
        (weights * seed.to(weights)).sum().backward()
        return given.grad

    on_device = None if bias is None else bias.to(device)
    ours = gradient(logits.to(device), lambda x: fast.moe_router(x, 6, bias=on_device, **rules.options))
    exact = gradient(logits.double(), lambda x: routed(x, 6, rules, bias))
    oracle.assert_within(ours, exact, 1e-6 * (1 + exact.abs().amax()))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_of_selected"])
def test_gradients_of_gradients_of_router(scoring: str) -> None:
    rules = Rules(scoring, normalise=True)

    def squared_gradient(x: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        (first,) = torch.autograd.grad(function(x)[1].square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    x = random_logits(3, 16, torch.float32).requires_grad_()
    ours = squared_gradient(x, lambda x: fast.moe_router(x, 4, **rules.options))
    exact = squared_gradient(x.detach().double().requires_grad_(), lambda x: routed(x, 4, rules, None))
    oracle.assert_within(ours, exact, 1e-5 * (1 + exact.abs().amax()))


@DTYPE
def test_gradients_of_combine(device: str, dtype: torch.dtype) -> None:
    y = oracle.random_x(5, 3, 40, dtype=dtype)
    weights = oracle.random_x(5, 3, seed=2, dtype=dtype)
    residual = oracle.random_x(5, 40, seed=3, dtype=dtype)
    seed = oracle.random_x(5, 40, seed=9, dtype=dtype)

    def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(each.detach().requires_grad_() for each in inputs)
        result = function(*inputs)
        return torch.autograd.grad(result, inputs, seed.to(result))

    inputs = (y, weights, residual)
    ours = gradients(lambda y, w, r: fast.moe_combine(y, w, residual=r), *(each.to(device) for each in inputs))
    exact = gradients(combined, *(each.double() for each in inputs))
    for mine, expected, given in zip(ours, exact, inputs, strict=True):
        assert mine.dtype == dtype and mine.shape == given.shape
        oracle.assert_within(mine, expected, 2 * torch.finfo(dtype).eps * (expected.abs() + expected.abs().amax()))


def test_gradients_reach_biases(device: str) -> None:
    inputs = [oracle.random_x(5, 3, 40), oracle.random_x(5, 3, seed=2), oracle.random_x(4, 40, seed=4)]
    ours = [each.detach().clone().to(device).requires_grad_() for each in inputs]
    fast.moe_combine(ours[0], ours[1], bias=ours[2], experts=EXPERTS.to(device)).square().sum().backward()
    exact = [each.double().requires_grad_() for each in inputs]
    combined(exact[0] + exact[2][EXPERTS], exact[1], None).square().sum().backward()
    for mine, expected in zip(ours, exact, strict=True):
        oracle.assert_within(mine.grad, expected.grad, 1e-5 * (1 + expected.grad.abs().amax()))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_of_some(wanted: tuple[bool, ...]) -> None:
    inputs = [oracle.random_x(4, 2, 8), oracle.random_x(4, 2), oracle.random_x(4, 8)]
    inputs = [each.requires_grad_(wants) for each, wants in zip(inputs, wanted, strict=True)]
    fast.moe_combine(*inputs[:2], residual=inputs[2]).square().sum().backward()
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in inputs]
    combined(*exact).square().sum().backward()
    for mine, expected in zip(inputs, exact, strict=True):
        assert (mine.grad is None) == (expected.grad is None)
        if mine.grad is not None:
            oracle.assert_within(mine.grad, expected.grad, 1e-5 * (1 + expected.grad.abs().amax()))


def test_forward_mode_is_refused() -> None:
    x = oracle.random_x(2, 32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=r"\[moe_router\] forward-mode"):
            fast.moe_router(dual, 2)
        with pytest.raises(NotImplementedError, match=r"\[moe_combine\] forward-mode"):
            fast.moe_combine(dual, x[:, 0])


# --- As torch's ops ---------------------------------------------------------------------------------------------------

LOGITS, BIAS = oracle.random_x(2, 3, 48), oracle.random_x(48, seed=2)
CALLS: dict[str, tuple[Any, ...]] = {
    "moe_router": (LOGITS, 6, "sigmoid", BIAS, 4, 2, True, 2.5),
    "moe_combine": (oracle.random_x(2, 3, 4, 48), oracle.random_x(2, 3, 4), LOGITS),
    "moe_combine with biases": (
        *(oracle.random_x(2, 3, 4, 48), oracle.random_x(2, 3, 4), LOGITS, oracle.random_x(5, 48, seed=6)),
        torch.arange(24).view(2, 3, 4) % 5,
    ),
}
CALL = pytest.mark.parametrize("name", CALLS)


@CALL
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device: str, name: str, grad: bool) -> None:
    arguments = tuple(
        each.detach().to(device).requires_grad_(grad and each is not BIAS and each.is_floating_point())
        if isinstance(each, Tensor)
        else each
        for each in CALLS[name]
    )
    checks = ["test_schema", "test_faketensor"]
    if not (grad and name == "moe_router"):  # of whose first result, of integers, it cannot add gradients
        checks.append("test_aot_dispatch_dynamic")
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    torch.library.opcheck(getattr(ops, name.split()[0]).default, arguments, test_utils=checks)


def test_compiles_as_one_graph() -> None:
    def block(logits: Tensor, y: Tensor) -> Tensor:
        _, weights = fast.moe_router(logits, 4, normalise=True)
        return fast.moe_combine(y, weights, residual=logits)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (compiled, block):
        logits, y = (each.clone().requires_grad_() for each in (LOGITS, CALLS["moe_combine"][0]))
        result = function(logits, y)
        results.append([result.detach(), *torch.autograd.grad(result.square().sum(), (logits, y))])
    for mine, expected in zip(*results, strict=True):
        oracle.assert_within(mine, expected.double(), 1e-6 * (1 + expected.abs().amax()))


def test_exports_with_sizes_that_depend_on_data() -> None:
    class Module(torch.nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            x = torch.arange(6.0)[mask][:, None] * torch.ones(16)
            experts, weights = fast.moe_router(x.cumsum(-1), 3, scoring="sigmoid")
            return fast.moe_combine(x[:, None, :] + experts[..., None], weights, residual=x)

    mask = torch.tensor([True, False, True, True, False, True])
    program = torch.export.export(Module(), (mask,)).module()
    for each in (mask, ~mask):
        oracle.assert_identical(program(each), Module()(each))


@pytest.mark.parametrize("experts, width", [(8, 32), (60, 64), (128, 128), (160, 256), (512, 512)])
def test_explain(experts: int, width: int) -> None:
    logits = torch.empty(5, 3, experts, dtype=torch.float16, device="meta")
    plan = json.loads(ops.explain_moe_router(logits, 4, "softmax", None, 1, 1, False, 1.0, "applegpu_g15s", 1500))
    (launch,) = plan["launches"]
    assert (launch["kernel"], launch["threads"]) == (f"moe_router_{width}_float16", 128)
    assert launch["threadgroups"] == [4, 1, 1]
    y = torch.empty(5, 3, 2, 520, dtype=torch.float16, device="meta")
    plan = json.loads(ops.explain_moe_combine(y, y[..., 0].float(), None, None, None, "applegpu_g15s", 1500))
    (launch,) = plan["launches"]
    assert (launch["kernel"], launch["threadgroups"]) == ("moe_combine_float32_weights_float16", [3, 15, 1])
    assert json.loads(ops.explain_moe_router(*CALLS["moe_router"], "", 0))["device"] == "cpu"


# --- Errors -----------------------------------------------------------------------------------------------------------

Y, WEIGHTS, RESIDUAL = CALLS["moe_combine"]
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dtype": (lambda: fast.moe_router(LOGITS.double(), 2), TypeError, r"\[moe_router\] logits has dtype Double"),
    "scalar": (lambda: fast.moe_router(torch.tensor(1.0), 1), ValueError, r"\[moe_router\] logits is a scalar"),
    "scoring": (
        lambda: fast.moe_router(LOGITS, 2, scoring="tanh"),
        ValueError,
        r'scoring is "tanh"; supported are "softmax", "sigmoid" and',
    ),
    "experts": (lambda: fast.moe_router(torch.zeros(2, 513), 2), ValueError, "has 513 experts; there must be 1 to 512"),
    "k": (lambda: fast.moe_router(LOGITS, 33), ValueError, "k is 33 of 48 experts to choose from; .* at most 32"),
    "k of groups": (
        lambda: fast.moe_router(LOGITS, 13, groups=4, groups_used=1),
        ValueError,
        "k is 13 of 12 experts to choose from",
    ),
    "groups": (lambda: fast.moe_router(LOGITS, 2, groups=5), ValueError, "groups is 5 with 48 experts"),
    "groups of one": (lambda: fast.moe_router(LOGITS[..., :8], 2, groups=8), ValueError, "groups of 2 or more"),
    "groups_used": (
        lambda: fast.moe_router(LOGITS, 2, groups=4, groups_used=5),
        ValueError,
        "groups_used is 5 of 4 groups",
    ),
    "bias": (lambda: fast.moe_router(LOGITS, 2, bias=BIAS[:3]), ValueError, r"bias of shape \[3\] must be one number"),
    "bias device": (lambda: fast.moe_router(LOGITS, 2, bias=BIAS.to("meta")), ValueError, "bias is on meta and logits"),
    "y": (lambda: fast.moe_combine(BIAS, BIAS), ValueError, r"\[moe_combine\] y of shape \[48\] must be \[..., k, H\]"),
    "no experts": (lambda: fast.moe_combine(Y[..., :0, :], WEIGHTS[..., :0]), ValueError, "k at least 1"),
    "y dtype": (lambda: fast.moe_combine(Y.int(), WEIGHTS), TypeError, r"\[moe_combine\] y has dtype Int"),
    "weights": (
        lambda: fast.moe_combine(Y, WEIGHTS[..., :1]),
        ValueError,
        r"weights of shape \[2, 3, 1\] must have the leading sizes of y",
    ),
    "bias alone": (lambda: fast.moe_combine(Y, WEIGHTS, bias=Y[0, 0]), ValueError, "bias and experts must be given"),
    "bias of combine": (
        lambda: fast.moe_combine(Y, WEIGHTS, bias=Y[0, 0, :, 1:], experts=torch.zeros(2, 3, 4, dtype=torch.int64)),
        ValueError,
        r"bias of shape \[4, 47\] must be \[experts, 48\]",
    ),
    "experts of combine": (
        lambda: fast.moe_combine(Y, WEIGHTS, bias=Y[0, 0], experts=torch.zeros(2, 3, 4)),
        TypeError,
        r"\[moe_combine\] experts have dtype Float; they must be int64",
    ),
    "residual": (
        lambda: fast.moe_combine(Y, WEIGHTS, residual=RESIDUAL[..., :1]),
        ValueError,
        r"residual of shape \[2, 3, 1\] must have the sizes of y but for k, \[2, 3, 48\]",
    ),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_fake_tensors_raise_the_same() -> None:
    with pytest.raises(ValueError, match=r"\[moe_router\] k is 33 of 48 experts"):
        fast.moe_router(LOGITS.to("meta"), 33)
    with pytest.raises(ValueError, match=r"\[moe_combine\] weights of shape \[2, 3, 1\]"):
        fast.moe_combine(Y.to("meta"), WEIGHTS[..., :1].to("meta"))
