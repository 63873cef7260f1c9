"""dispatch_moe_optimized and dispatch_moe_decode: against the formula in float64, on every device."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import oracle
from cases import DTYPES
from oracle import Quantized, name_of
from packed_columns import format_of
from quantization_mlx import explain
from quantization_mlx._ops import ops
from quantization_mlx.marlin import dispatch_moe_decode, dispatch_moe_optimized, get_default_library, pack_fp4_weights

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@dataclass(frozen=True)
class Sizes:
    tokens: int = 5
    K: int = 256
    N: int = 40
    experts: int = 8
    top_k: int = 2
    group_size: int = 128
    has_shared: bool = True


# The documented mixture has 64 experts, of which a token has 4, and a shared one.
SIZES = {
    "documented": Sizes(experts=64, top_k=4),
    "one token": Sizes(tokens=1),
    "more tokens than experts": Sizes(tokens=33, top_k=3, group_size=32, has_shared=False),
    "one expert": Sizes(experts=1, top_k=1, group_size=64),
    "all experts": Sizes(experts=6, top_k=6, has_shared=False),
    "no tokens": Sizes(tokens=0),
}


@dataclass(frozen=True)
class Mixture:
    """Operands, and which experts a token has: those of the largest logits, which differ by more than roundings."""

    sizes: Sizes
    activations: Tensor
    router: Tensor
    experts: Quantized
    shared: Quantized | None

    @classmethod
    def of(cls, sizes: Sizes, dtype: torch.dtype) -> Mixture:
        format = format_of("fp4", sizes.group_size)
        experts = oracle.random_quantized(format, sizes.experts, sizes.K, sizes.N)
        shared = oracle.random_quantized(format, sizes.K, sizes.N, seed=5) if sizes.has_shared else None
        router = oracle.random_x(sizes.K, sizes.experts, dtype=dtype, seed=3) / 8
        return cls(sizes, oracle.random_x(sizes.tokens, sizes.K, dtype=dtype), router, experts, shared)

    @property
    def logits(self) -> Tensor:
        return self.activations.double() @ self.router.double()

    def expected(self, activations: Tensor, router: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """By the formula, an expert after the other, in this dtype."""
        logits, chosen = (activations @ router).topk(self.sizes.top_k)
        weights = torch.zeros(len(activations), self.sizes.experts, dtype=dtype).scatter(1, chosen, logits.softmax(-1))
        result = torch.zeros(len(activations), self.sizes.N, dtype=dtype)
        if self.shared is not None:
            result = activations @ self.shared.dense.to(dtype)
        for expert, matrix in enumerate(self.experts.dense.to(dtype)):
            result = result + weights[:, expert, None] * (activations @ matrix)
        return result

    def arguments(self, device: str = "cpu") -> list[Any]:
        """Those before the sizes."""
        shared = (None, None) if self.shared is None else self.shared.tensors[:2]
        tensors = [self.activations, self.router, *self.experts.tensors[:2], *shared]
        return [get_default_library(), *(None if each is None else each.to(device) for each in tensors)]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The sizes behind batch_size."""
        sizes = self.sizes
        return sizes.K, sizes.N, sizes.experts, sizes.top_k, sizes.group_size

    def run(self, device: str = "cpu") -> Tensor:
        return dispatch_moe_optimized(*self.arguments(device), self.sizes.tokens, *self.numbers)

    def bound(self, dtype: torch.dtype) -> Tensor:
        """Of each expert's product, as for a product by itself, and of the sum; weights of float32 add little."""
        terms = [self.experts.dense, *([] if self.shared is None else [self.shared.dense[None]])]
        x, matrices = self.activations, torch.cat(terms)
        products = sum(oracle.error_bound(x, matrix, dtype) for matrix in matrices) / len(matrices)
        largest = max((x.double() @ matrix).abs().max() for matrix in matrices)
        weights = 16 * torch.finfo(torch.float32).eps * self.sizes.K**0.5 * largest * self.logits.abs().max()
        return (1 + self.sizes.has_shared) * (products + weights) + 4 * torch.finfo(dtype).eps * largest


@DTYPE
@pytest.mark.parametrize("name", SIZES)
def test_mixtures(name: str, dtype: torch.dtype, device: str) -> None:
    mixture = Mixture.of(SIZES[name], dtype)
    result = mixture.run(device)
    assert result.dtype == dtype and result.device.type == device
    expected = mixture.expected(mixture.activations.double(), mixture.router.double())
    assert result.shape == (mixture.sizes.tokens, mixture.sizes.N)
    if mixture.sizes.tokens:
        gaps = mixture.logits.sort(-1).values.diff(dim=-1)
        assert gaps.numel() == 0 or gaps[:, -mixture.sizes.top_k :].min() > 1e-5, "which experts are chosen is certain"
        oracle.assert_within(result, expected, mixture.bound(dtype), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_one_token(dtype: torch.dtype, device: str) -> None:
    mixture = Mixture.of(SIZES["documented"], dtype)
    lib, activations, *rest = mixture.arguments(device)
    together = mixture.run(device)
    for token in range(2):
        alone = dispatch_moe_decode(lib, activations[token], *rest, *mixture.numbers)
        assert alone.shape == (mixture.sizes.N,) and alone.dtype == dtype
        oracle.assert_within(alone, together[token].cpu().double(), mixture.bound(dtype))
        row = dispatch_moe_decode(lib, activations[token : token + 1], *rest, *mixture.numbers)
        assert row.shape == (1, mixture.sizes.N) and torch.equal(row[0], alone)


def test_defaults_are_those_of_the_documentation() -> None:
    """64 experts, 4 of them, groups of 128, as packed by pack_fp4_weights."""
    matrices = oracle.random_x(64, 128, 16, seed=7) * 0.1
    packed = [torch.stack(parts) for parts in zip(*map(pack_fp4_weights, matrices), strict=True)]
    x, router = oracle.random_x(3, 128, dtype=torch.float16), oracle.random_x(128, 64, dtype=torch.float16, seed=8)
    result = dispatch_moe_optimized(get_default_library(), x, router, *packed, None, None, 3, 128, 16)
    mixture = Mixture(Sizes(3, 128, 16, 64, 4), x, router, Quantized(format_of("fp4", 128), *packed, None), None)
    oracle.assert_within(result, mixture.expected(x.double(), router.double()), mixture.bound(torch.float16))
    alone = dispatch_moe_decode(get_default_library(), x[0], router, *packed, None, None, 128, 16)
    oracle.assert_within(alone, result[0].double(), mixture.bound(torch.float16))


def test_operands_of_other_strides_and_dtypes(device: str) -> None:
    mixture = Mixture.of(Sizes(), torch.float32)
    expected = mixture.run(device)
    lib, activations, router, words, *rest = mixture.arguments(device)
    activations = activations.mT.contiguous().mT
    router = router.mT.contiguous().mT
    sizes = (mixture.sizes.tokens, *mixture.numbers)
    result = dispatch_moe_optimized(lib, activations, router, words.view(torch.int32), *rest, *sizes)
    oracle.assert_within(result, expected.cpu().double(), mixture.bound(torch.float32))
    half = replace(mixture, router=mixture.router.half())
    expected = half.expected(half.activations.double(), half.router.double())
    oracle.assert_within(half.run(device), expected, half.bound(torch.float32))


def test_logits_close_to_each_other_choose_as_exact_ones(device: str) -> None:
    """They differ by less than half precision can tell at their magnitude."""
    mixture = Mixture.of(Sizes(tokens=1, experts=3, top_k=1, has_shared=False), torch.bfloat16)
    router = torch.zeros(mixture.sizes.K, 3, dtype=torch.bfloat16)
    router[0], router[1, 2] = 100.0, 0.0625
    activations = torch.zeros(1, mixture.sizes.K, dtype=torch.bfloat16)
    activations[0, :2] = 1.0
    close = replace(mixture, activations=activations, router=router)
    oracle.assert_within(close.run(device), activations.double() @ mixture.experts.dense[2], 0.05)


@pytest.mark.parametrize("tokens", [1, 5])
def test_logits_of_autocast_are_float32(tokens: int) -> None:
    """Experts that rounded logits would have in common."""
    router = torch.zeros(256, 3)
    router[0], router[1, 2] = 100.0, 0.0625
    mixture = Mixture.of(Sizes(tokens=tokens, experts=3, top_k=1, has_shared=False), torch.float32)
    activations = torch.zeros(tokens, 256)
    activations[:, :2] = 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = replace(mixture, activations=activations, router=router).run()
    assert result.dtype == torch.bfloat16, "that of the products"
    oracle.assert_within(result, activations.double() @ mixture.experts.dense[2], 0.05)


# Tokens and experts; whole vectors or not, of one part of the inner size or several, and more than a block has rows of.
LOGITS = {(1, 64): 256, (4, 64): 2048, (4, 7): 1300, (3, 512): 96, (2, 16): 512, (5, 33): 640, (1, 1): 1, (0, 8): 64}


@pytest.mark.parametrize("router_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sizes", LOGITS, ids="{0[0]} of {0[1]}".format)
def test_logits(sizes: tuple[int, int], router_dtype: torch.dtype) -> None:
    """As float32 sums of exact products, whatever the strides and the number of threads are."""
    (tokens, experts), K = sizes, LOGITS[sizes]
    router = oracle.random_x(K, experts, dtype=router_dtype, seed=3)
    threads = torch.get_num_threads()
    for dtype in DTYPES:
        x = oracle.random_x(tokens, K, dtype=dtype)
        exact = x.double() @ router.double()
        bound = 4 * torch.finfo(torch.float32).eps * (x.double().abs() @ router.double().abs()) + 1e-30
        results = [ops._router_logits(x, router)]
        torch.set_num_threads(3 - min(threads, 2))
        results.append(ops._router_logits(x, router))
        torch.set_num_threads(threads)
        results += [ops._router_logits(each, router) for each in (x.mT.contiguous().mT, torch.cat([x, x], 1)[:, :K])]
        results += [ops._router_logits(x, router.mT.contiguous().mT)]
        for result in results:
            assert result.dtype == torch.float32 and result.shape == exact.shape
            assert ((result.double() - exact).abs() <= bound).all()
        if tokens < 5 and router_dtype != torch.float32:  # others are products of torch's
            oracle.assert_identical(results[1], results[0])


def test_logits_that_are_not_finite() -> None:
    x, router = torch.ones(1, 40), torch.zeros(40, 20, dtype=torch.bfloat16)
    router[3, 5], router[4, 6], router[20, 7] = torch.inf, -torch.inf, torch.nan
    router[21, 8], x[0, 21] = 1.0, torch.inf
    expected = (x.double() @ router.double()).float()
    assert expected.isnan().sum() == 19 and expected.isposinf().sum() == 1
    torch.testing.assert_close(ops._router_logits(x, router), expected, rtol=0, atol=0, equal_nan=True)
    router[21, :8], x[0, 21] = 1.0, 0.0
    expected = (x.double() @ router.double()).float()
    assert expected.isposinf().sum() == expected.isneginf().sum() == expected.isnan().sum() == 1
    torch.testing.assert_close(ops._router_logits(x, router), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients(tokens: int, device: str) -> None:
    mixture = Mixture.of(Sizes(tokens=tokens), torch.float32)
    lib, activations, router, *rest = mixture.arguments(device)
    given = [each.clone().requires_grad_() for each in (activations, router)]
    upstream = oracle.random_x(mixture.sizes.tokens, mixture.sizes.N, seed=9)
    sizes = (mixture.sizes.tokens, *mixture.numbers)
    dispatch_moe_optimized(lib, *given, *rest, *sizes).backward(upstream.to(device))
    exact = [each.double().requires_grad_() for each in (mixture.activations, mixture.router)]
    mixture.expected(*exact).backward(upstream.double())
    for ours, theirs in zip(given, exact, strict=True):
        oracle.assert_within(ours.grad, theirs.grad, 1e-5 * theirs.grad.abs().max())


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values that the host could ask for."""
    mixture = Mixture.of(SIZES["documented"], torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        lib, *tensors = mixture.arguments()
        fake = [lib, *(mode.from_tensor(each) for each in tensors)]
        result = dispatch_moe_optimized(*fake, mixture.sizes.tokens, *mixture.numbers)
    assert result.shape == (mixture.sizes.tokens, mixture.sizes.N) and result.dtype == torch.float16


def test_plans_are_those_of_its_ops() -> None:
    mixture = Mixture.of(SIZES["one token"], torch.float16)
    plans = explain(dispatch_moe_optimized, *mixture.arguments(), 1, *mixture.numbers)
    assert [plan.op for plan in plans] == ["moe_router", "gather_qmm", "quantized_matmul", "moe_combine"]


def test_compiles_to_one_graph() -> None:
    mixture = Mixture.of(Sizes(), torch.bfloat16)
    lib, activations, *rest = mixture.arguments()
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def compiled(x: Tensor) -> Tensor:
        return dispatch_moe_optimized(lib, x, *rest, x.shape[0], *mixture.numbers).relu()

    for rows in (2, 5):  # a product that needs no copies, and torch's
        x = activations[:rows]
        oracle.assert_identical(compiled(x), dispatch_moe_optimized(lib, x, *rest, rows, *mixture.numbers).relu())


# --- What is refused --------------------------------------------------------------------------------------------------

GIVEN = {
    "lib": get_default_library(),
    "activations": torch.zeros(3, 256, dtype=torch.float16),
    "router_weights": torch.zeros(256, 8, dtype=torch.float16),
    "expert_weights": torch.zeros(8, 32, 16, dtype=torch.uint32),
    "expert_scales": torch.zeros(8, 2, 16, dtype=torch.float16),
    "shared_weights": torch.zeros(32, 16, dtype=torch.uint32),
    "shared_scales": torch.zeros(2, 16, dtype=torch.float16),
    "batch_size": 3,
    "hidden_dim": 256,
    "out_dim": 16,
    "num_experts": 8,
    "top_k": 2,
    "group_size": 128,
}


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


VALUE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "batch_size": (
        {"batch_size": 4},
        "activations has shape [3, 256]; with batch_size = 4 and hidden_dim = 256 it must be [4, 256]",
    ),
    "negative batch_size": ({"batch_size": -1}, "batch_size is -1; it must be at least 0"),
    "rank of activations": ({"activations": half(256)}, "activations has shape [256]; it must have 2 dimensions"),
    "hidden_dim": ({"hidden_dim": 128}, "activations has shape [3, 256]; with batch_size = 3 and hidden_dim = 128"),
    "ragged hidden_dim": (
        {"hidden_dim": 200, "activations": half(3, 200), "router_weights": half(200, 8)},
        "hidden_dim is 200, which does not divide into groups of 128",
    ),
    "router": (
        {"router_weights": half(8, 256)},
        "router_weights has shape [8, 256]; with hidden_dim = 256 and num_experts = 8 it must be [256, 8]",
    ),
    "out_dim": (
        {"out_dim": 17},
        "expert_weights has shape [8, 32, 16]; with num_experts = 8, hidden_dim = 256, out_dim = 17 and group_size = "
        "128 it must be [8, 32, 17]",
    ),
    "num_experts": ({"num_experts": 9}, "router_weights has shape [256, 8]; with hidden_dim = 256 and num_experts = 9"),
    "experts of words": ({"expert_weights": torch.zeros(7, 32, 16, dtype=torch.uint32)}, "it must be [8, 32, 16]"),
    "groups": ({"group_size": 64}, "expert_scales has shape [8, 2, 16]; with num_experts = 8, hidden_dim = 256"),
    "fraction as group_size": ({"group_size": 128.0}, "group_size is 128.0; supported are 128, 64, 32"),
    "group_size": ({"group_size": 48}, "group_size is 48; supported are 128, 64, 32"),
    "shape of shared words": (
        {"shared_weights": torch.zeros(32, 8, dtype=torch.uint32)},
        "shared_weights has shape [32, 8]; with hidden_dim = 256, out_dim = 16 and group_size = 128 it must be",
    ),
    "shape of shared scales": ({"shared_scales": half(4, 16)}, "shared_scales has shape [4, 16]"),
    "top_k of 0": ({"top_k": 0}, "top_k is 0; it must be at least 1"),
    "top_k of more than all": ({"top_k": 9}, "top_k is 9 of 8 experts; it must be at most that, and 32"),
    "many experts": ({"num_experts": 513}, "num_experts is 513; it must be at most 512"),
    "no experts": ({"num_experts": 0}, "num_experts is 0; it must be at least 1"),
    "device": (
        {"router_weights": half(256, 8).to("meta")},
        "activations is on cpu and router_weights on meta; all must be on one device",
    ),
    "device of shared": (
        {"shared_weights": GIVEN["shared_weights"].to("meta"), "shared_scales": half(2, 16).to("meta")},
        "activations is on cpu and shared_weights on meta",
    ),
}
TYPE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "lib": ({"lib": None}, "lib is of type NoneType; it must be a MetalKernelLibrary"),
    "activations": ({"activations": [[0.0] * 256] * 3}, "activations is of type list; it must be a tensor"),
    "dtype of activations": ({"activations": half(3, 256).double()}, "activations has dtype torch.float64; supported"),
    "dtype of router": ({"router_weights": half(256, 8).int()}, "router_weights has dtype torch.int32; supported are"),
    "dtype of words": ({"expert_weights": half(8, 32, 16)}, "expert_weights has dtype torch.float16; supported are"),
    "dtype of scales": ({"expert_scales": half(8, 2, 16).float()}, "expert_scales has dtype torch.float32; supported"),
    "shared words alone": ({"shared_scales": None}, "shared_scales is of type NoneType; it must be a tensor"),
    "shared scales alone": ({"shared_weights": None}, "shared_weights is of type NoneType; it must be a tensor"),
    "text as top_k": ({"top_k": "2"}, "top_k is '2'; it must be a whole number"),
    "no batch_size": ({"batch_size": None}, "batch_size is None; it must be a whole number"),
    "fraction as out_dim": ({"out_dim": 16.0}, "out_dim is 16.0; it must be a whole number"),
}


@pytest.mark.parametrize("name", [*VALUE_ERRORS, *TYPE_ERRORS])
def test_wrong_arguments_are_named(name: str) -> None:
    changes, message = {**VALUE_ERRORS, **TYPE_ERRORS}[name]
    error = TypeError if name in TYPE_ERRORS else ValueError
    with pytest.raises(error, match=rf"^\[dispatch_moe_optimized\] .*{re.escape(message)}"):
        dispatch_moe_optimized(**{**GIVEN, **changes})


def test_sizes_are_any_whole_numbers() -> None:
    sizes = {name: np.int64(value) for name, value in GIVEN.items() if isinstance(value, int)}
    assert dispatch_moe_optimized(**{**GIVEN, **sizes}).shape == (3, 16)


def test_the_op_alone_refuses_as_much() -> None:
    """Whoever calls it by itself: nothing is read that is not there."""
    tensors = [value for value in GIVEN.values() if isinstance(value, Tensor)]
    sizes = [3, 256, 16, 8, 2, 128]
    assert ops._linear_experts(*tensors, *sizes).shape == (3, 16)
    for place in range(len(tensors)):
        for wrong in (tensors[place][:-1], tensors[place].to("meta"), tensors[place].double()):
            given = [*tensors[:place], wrong, *tensors[place + 1 :]]
            with pytest.raises((ValueError, RuntimeError)):
                ops._linear_experts(*given, *sizes)
    for place, wrong in [(0, 4), (1, 0), (1, 128), (2, 17), (3, 9), (4, 0), (4, 9), (5, 0), (5, -128), (5, 48)]:
        with pytest.raises(ValueError):
            ops._linear_experts(*tensors, *sizes[:place], wrong, *sizes[place + 1 :])
    for router in (half(255, 8), half(257, 8), half(255)):
        with pytest.raises(RuntimeError):
            ops._router_logits(half(1, 256), router)


def test_decode_takes_one_token() -> None:
    given = {name: value for name, value in GIVEN.items() if name != "batch_size"}
    cases: dict[str, tuple[Tensor, str]] = {
        "tokens": (half(3, 256), "activations has shape [3, 256]; with batch_size = 1 and hidden_dim = 256 it must be"),
        "hidden_dim": (half(128), "activations has shape [128]; with hidden_dim = 256 it must be [256]"),
        "dimensions": (half(1, 1, 256), "activations has shape [1, 1, 256]; it must have 1 dimensions"),
    }
    for activations, message in cases.values():
        with pytest.raises(ValueError, match=re.escape(f"[dispatch_moe_decode] {message}")):
            dispatch_moe_decode(**{**given, "activations": activations})
    with pytest.raises(ValueError, match=r"^\[dispatch_moe_decode\] top_k is 9 of 8 experts"):
        dispatch_moe_decode(**{**given, "activations": half(256), "top_k": 9})
