"""quantized_scaled_dot_product_attention: against float64 on what the codes stand for, torch's own op, and mlx_lm's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
from cases import DTYPES
from covering import pairwise
from oracle import Format, Quantized, name_of
from quantization_mlx import fast
from quantization_mlx._ops import ops

FORMATS = tuple(Format("affine", group_size, bits) for group_size in (32, 64) for bits in (4, 8))
HEAD_SIZES = ((64, 64), (128, 128), (192, 64), (256, 256), (576, 512))
HEADS = ((2, 2), (3, 1), (8, 2))  # of queries, of keys
MASKS = ("none", "causal", "window", "bool", "added", "sinks")


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Quantized
    v: Quantized
    mask: str | Tensor | None = None
    sinks: Tensor | None = None
    window: int | None = None

    @property
    def scale(self) -> float:
        return 1.5 * self.q.shape[-1] ** -0.5

    @property
    def options(self) -> dict[str, object]:
        return {"scale": self.scale, "mask": self.mask, "sinks": self.sinks, "window": self.window}

    def to(self, device: str) -> Case:
        mask = self.mask.to(device) if isinstance(self.mask, Tensor) else self.mask
        sinks = None if self.sinks is None else self.sinks.to(device)
        return Case(self.q.to(device), self.k.to(device), self.v.to(device), mask, sinks, self.window)

    def ours(self) -> Tensor:
        format = self.k.format
        return fast.quantized_scaled_dot_product_attention(
            self.q, self.k.tensors, self.v.tensors, **self.options, group_size=format.group_size, bits=format.bits
        )

    def shown(self) -> Tensor | None:
        """The mask as a tensor."""
        if not isinstance(self.mask, str):
            return self.mask
        queries, keys = self.q.shape[2], self.k.w.shape[2]
        own, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        return (key <= own) & (key > own - (self.window or keys + queries))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Attention in torch to the exact keys and values, rounded to this dtype; in float64, the exact result."""
        group = self.q.shape[1] // self.k.w.shape[1]
        k, v = (each.dense.to(dtype).repeat_interleave(group, 1) for each in (self.k, self.v))
        mask = self.shown()
        if self.sinks is None:
            mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
            return F.scaled_dot_product_attention(self.q.to(dtype), k, v, mask, scale=self.scale)
        scores = self.q.to(dtype) @ k.mT * self.scale
        sinks = self.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def case(
    format: Format,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (64, 64),
    queries: int = 1,
    keys: int = 40,
    kind: str = "none",
    batch: int = 1,
) -> Case:
    q = oracle.random_x(batch, heads[0], queries, sizes[0], seed=1, dtype=dtype)
    k, v = (
        oracle.random_quantized(format, batch, heads[1], keys, size, dtype=dtype, seed=seed)
        for size, seed in zip(sizes, (2, 3), strict=True)
    )
    random = oracle.random_x(heads[0], queries, keys, seed=4)
    kinds: dict[str, dict[str, object]] = {
        "none": {},
        "causal": {"mask": "causal"},
        "window": {"mask": "causal", "window": max(1, keys // 3)},
        "bool": {"mask": random > -1},
        "added": {"mask": random.to(dtype)},
        "sinks": {"sinks": oracle.random_x(heads[0], seed=5, dtype=dtype) * 3},
    }
    return replace(Case(q, k, v), **kinds[kind])


def assert_attention(case: Case, device: str) -> None:
    """Within twice the error of torch's own op on dequantized keys in this dtype, or of some roundings of float32, and
    one rounding."""
    y, dtype = case.to(device).ours(), case.q.dtype
    exact, theirs = case.dense(torch.float64), case.dense(dtype)
    shows_some = torch.ones_like(exact, dtype=torch.bool)
    if (mask := case.shown()) is not None and mask.dtype == torch.bool:
        shows_some = mask.any(-1)[..., None].expand_as(exact)
        assert not y.cpu()[~shows_some].any()
    exact, theirs = (torch.where(shows_some, each, 0.0) for each in (exact, theirs))
    assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous()
    float_rounding = torch.finfo(torch.float32).eps * float(case.v.dense.abs().max())
    bound = 2 * max(float((theirs.double() - exact).abs().max()), 2 * float_rounding)
    oracle.assert_within(y.cpu(), exact, bound + torch.finfo(dtype).eps * exact.abs() + 1e-7)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_values_on_cpu(format: Format, sizes: tuple[int, int]) -> None:
    # Of 7, 4 and 3, coprime with one another and with what is combined.
    choices = zip(*map(itertools.cycle, (MASKS + MASKS[:1], HEADS + HEADS[:1], DTYPES)), strict=True)
    for queries, keys in itertools.product((1, 2, 8, 9, 40), (1, 31, 33, 200, 1100)):
        if keys == 1100 and queries > 2 and sizes[0] > 128:
            continue  # seconds in float64
        kind, heads, dtype = next(choices)
        assert_attention(case(format, dtype, heads, sizes, queries, keys, kind), "cpu")


ON_GPUS = [
    dict(zip(("format", "dtype", "sizes", "heads", "queries", "keys", "kind"), values, strict=True))
    for values in itertools.product(FORMATS, DTYPES, HEAD_SIZES, HEADS, (1, 2, 5, 17), (1, 31, 33, 200, 1100), MASKS)
    if values[2][0] * values[3][0] * values[4] * values[5] < 300_000
]
CHOSEN = [ON_GPUS[index] for index in pairwise(ON_GPUS[::7])]


@pytest.mark.parametrize("choice", CHOSEN, ids=lambda choice: "-".join(map(name_of, choice.values())))
def test_values(device: str, choice: dict) -> None:
    assert_attention(case(**choice), device)


@pytest.mark.parametrize("queries", [3, 12])
@pytest.mark.parametrize("format", FORMATS[:2], ids=str)
def test_batches_and_strides(device: str, format: Format, queries: int) -> None:
    """Of a cache with room for more positions, of one sequence for all, and with gaps of other sizes."""
    given = case(format, torch.float16, queries=queries, keys=50, kind="causal", batch=2)
    expected = given.to(device).ours().cpu()

    def with_room(tensor: Tensor) -> Tensor:
        return F.pad(tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor, (0, 0, 0, 30))[:, :, :50]

    def with_gaps(tensor: Tensor) -> Tensor:
        tensor = tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor
        return F.pad(tensor, (3, 2))[..., 3:-2]

    def transposed(tensor: Tensor) -> Tensor:
        tensor = tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def far_apart(tensor: Tensor) -> Tensor:
        tensor = tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor
        return tensor.mT.contiguous().mT

    on = given.to(device)
    for change in (with_room, with_gaps, transposed, far_apart):
        k, v = (each.map(change) for each in (on.k, on.v))
        oracle.assert_identical(replace(on, k=k, v=v).ours().cpu(), expected, change.__name__)
    biases = replace(on, k=Quantized(format, on.k.w, on.k.scales, transposed(on.k.biases)))
    oracle.assert_identical(biases.ours().cpu(), expected)
    first = replace(on, k=on.k.map(lambda each: each[:1].expand(2, -1, -1, -1)))
    copies = replace(on, k=on.k.map(lambda each: torch.cat([each[:1].view(torch.uint8)] * 2).view(each.dtype)))
    oracle.assert_identical(first.ours().cpu(), copies.ours().cpu())


@pytest.mark.parametrize("queries, keys", [(1, 40), (6, 6), (12, 700)])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_agrees_with_mlx_lm(device: str, format: Format, queries: int, keys: int) -> None:
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as theirs_of

    mx = oracle.mlx()
    for kind in ("none", "causal", "bool", "added"):
        given = case(format, heads=(4, 2), queries=queries, keys=keys, kind=kind, batch=2)
        if isinstance(given.mask, Tensor):  # one for all heads: theirs takes no other ones where heads share keys
            given = replace(given, mask=given.mask[0])
        if kind == "bool":  # theirs is the mean of v where a query sees nothing
            given.mask[:, 0] = True
        dense = given.v.dense.float(), given.k.dense.float()
        k, v = (Quantized(format, *oracle.mlx_quantize(each, format)) for each in reversed(dense))
        mask = given.mask if given.mask is None or isinstance(given.mask, str) else oracle.to_mlx(given.mask)
        operands = oracle.to_mlx(given.q), tuple(map(oracle.to_mlx, k.tensors)), tuple(map(oracle.to_mlx, v.tensors))
        expected = oracle.from_mlx(
            theirs_of(*operands, given.scale, mask, group_size=format.group_size, bits=format.bits).astype(mx.float32)
        )
        y = replace(given, k=k, v=v).to(device).ours().cpu()
        assert y.shape == expected.shape and y.dtype == expected.dtype
        oracle.assert_within(y, expected.double(), 1e-5 * (1 + expected.double().abs()), kind)


def test_no_keys(device: str) -> None:
    given = case(FORMATS[0], keys=3)
    empty = replace(given, k=given.k.map(lambda each: each[:, :, :0]), v=given.v.map(lambda each: each[:, :, :0]))
    assert not empty.to(device).ours().any()


def test_dtypes_promote(device: str) -> None:
    given = case(FORMATS[0], torch.bfloat16)
    wide = replace(given, v=given.v.map(lambda each: each.float() if each.is_floating_point() else each))
    whole = replace(
        wide, q=given.q.float(), k=given.k.map(lambda each: each.float() if each.is_floating_point() else each)
    )
    assert wide.to(device).ours().dtype == torch.float32
    oracle.assert_identical(wide.to(device).ours().cpu(), whole.to(device).ours().cpu())


def test_results_do_not_depend_on_threads() -> None:
    for queries, keys in ((1, 3000), (70, 700)):
        given = case(FORMATS[1], torch.bfloat16, (2, 1), queries=queries, keys=keys)
        expected, threads = given.ours(), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            oracle.assert_identical(given.ours(), expected)
        finally:
            torch.set_num_threads(threads)


# --- As torch's ops ---------------------------------------------------------------------------------------------------

SMALL = case(FORMATS[0], queries=3, keys=7)


def arguments(case: Case) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Those of the op."""
    causal = isinstance(case.mask, str)
    options = case.options | {"causal": causal, "mask": None if causal else case.mask}
    options |= {"group_size": case.k.format.group_size, "bits": case.k.format.bits}
    return (case.q, *case.k.tensors, *case.v.tensors), options


@pytest.mark.parametrize("kind", ["none", "added", "window"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device: str, kind: str, grad: bool) -> None:
    tensors, options = arguments(case(FORMATS[0], queries=3, keys=7, kind=kind).to(device))
    tensors = [
        each.detach().requires_grad_(grad) if each.is_floating_point() else each.view(torch.int32) for each in tensors
    ]
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    op = ops.quantized_scaled_dot_product_attention.default
    torch.library.opcheck(op, tuple(tensors), options, test_utils=checks)


@pytest.mark.parametrize("kind", MASKS)
def test_compiles_as_one_graph(kind: str) -> None:
    given = case(FORMATS[0], queries=3, keys=7, kind=kind)
    compiled = torch.compile(Case.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    oracle.assert_identical(compiled(given), given.ours())


def test_exports_with_sizes_that_depend_on_data() -> None:
    class Module(torch.nn.Module):
        def forward(self, shown: Tensor) -> Tensor:
            k, v = (tuple(each.view(torch.int32)[:, :, shown] for each in all.tensors) for all in (SMALL.k, SMALL.v))
            k, v = ((words, *(each.view(torch.float32) for each in rest)) for words, *rest in (k, v))
            return fast.quantized_scaled_dot_product_attention(
                SMALL.q, k, v, scale=0.1, mask="causal", group_size=32, bits=4
            )

    shown = torch.tensor([True, False, True, True, False, True, True])
    program = torch.export.export(Module(), (shown,)).module()
    for each in (shown, ~shown):
        oracle.assert_identical(program(each), Module()(each))


@pytest.mark.parametrize("kind", ["none", "causal", "added", "sinks"])
def test_gradients(kind: str) -> None:
    """Those of torch's ops on dequantized keys and values."""
    given = case(FORMATS[0], queries=3, keys=7, kind=kind)
    tensors, options = arguments(given)
    floats = {i: each.clone().requires_grad_() for i, each in enumerate(tensors) if each.is_floating_point()}
    y = ops.quantized_scaled_dot_product_attention(*(floats.get(i, each) for i, each in enumerate(tensors)), **options)
    seed = oracle.random_x(*y.shape, seed=9)
    gradients = torch.autograd.grad(y, list(floats.values()), seed)

    exact = {i: each.detach().double().requires_grad_() for i, each in floats.items()}

    def heads(begin: int) -> Tensor:
        codes = torch.from_numpy(oracle.unpack(tensors[begin], 4)).double()
        scales, biases = (exact[i].repeat_interleave(32, -1) for i in (begin + 1, begin + 2))
        return (codes * scales + biases).repeat_interleave(2, 1)

    k, v = heads(1), heads(4)
    scores = exact[0] @ k.mT * given.scale
    if kind == "causal":
        scores = scores.masked_fill(~given.shown(), -torch.inf)
    elif kind == "added":
        scores = scores + given.mask
    if given.sinks is not None:
        sinks = given.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    result = scores.softmax(-1)[..., :7] @ v
    expected = torch.autograd.grad(result, list(exact.values()), seed.double())
    for mine, theirs in zip(gradients, expected, strict=True):
        oracle.assert_within(mine, theirs, 1e-5 * (theirs.abs() + theirs.abs().amax()))


def test_forward_mode_is_refused() -> None:
    tensors, options = arguments(SMALL)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], tensors[0])
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ops.quantized_scaled_dot_product_attention(dual, *tensors[1:], **options)


PLANS = {
    "one query": ((1, 32, 1, 128), 4096, ["attention_128_float16_rows_4", "attention_combine_float16"]),
    "a prompt": ((1, 32, 512, 128), 512, ["attention_tile_128_float16"]),
}


@pytest.mark.parametrize("shape, keys, kernels", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("bits", [4, 8])
def test_explain(shape: tuple[int, ...], keys: int, kernels: list[str], bits: int) -> None:
    q = torch.empty(shape, dtype=torch.float16, device="meta")
    words = torch.empty(1, 8, keys, 4 * bits, dtype=torch.uint32, device="meta")
    groups = torch.empty(1, 8, keys, 2, dtype=torch.float16, device="meta")
    heads = (words, groups, groups)
    op = ops.explain_quantized_scaled_dot_product_attention
    plan = json.loads(op(q, *heads, *heads, scale=1.0, group_size=64, bits=bits, gpu="applegpu_g15s", macos=1500))
    assert [launch["kernel"] for launch in plan["launches"]] == kernels
    constants = plan["launches"][0]["constants"]
    assert "packed_keys" in constants and ("eight_bits" in constants) == (bits == 8)
    tensors, options = arguments(SMALL)
    assert json.loads(op(*tensors, **options, gpu="", macos=0))["device"] == "cpu"


# --- Errors -----------------------------------------------------------------------------------------------------------


def call(case: Case = SMALL, **options: object) -> Tensor:
    return fast.quantized_scaled_dot_product_attention(
        case.q, case.k.tensors, case.v.tensors, **{"scale": 1.0, "group_size": 32, "bits": 4, **options}
    )


def with_keys(change: Callable[[Tensor], Tensor]) -> Case:
    return replace(SMALL, k=SMALL.k.map(change))


ERRORS = {
    "bits": (lambda: call(bits=5), ValueError, r"bits is 5; supported are keys and values of 4 and of 8 bits"),
    "group size": (lambda: call(group_size=48), ValueError, r"group_size.*48"),
    "other group size": (
        lambda: call(group_size=64),
        ValueError,
        r"k of shape \[1, 2, 7, 8\] and its scales of shape \[1, 2, 7, 2\] do not belong together: 8 words of 4-bit "
        r"codes hold 64 elements, and 2 groups of 64 hold 128",
    ),
    "dtype of words": (
        lambda: call(replace(SMALL, v=SMALL.v.map(lambda each: each.float()))),
        TypeError,
        r"v has dtype Float; it must be packed words of uint32 or int32",
    ),
    "dtype of scales": (
        lambda: call(replace(SMALL, k=Quantized(SMALL.k.format, SMALL.k.w, SMALL.k.scales.double(), SMALL.k.biases))),
        TypeError,
        r"scales of k has dtype Double; supported are float32",
    ),
    "biases": (
        lambda: call(replace(SMALL, k=Quantized(SMALL.k.format, SMALL.k.w, SMALL.k.scales, SMALL.k.biases[:, :1]))),
        ValueError,
        r"biases of k of shape \[1, 1, 7, 2\] must have the shape of its scales, \[1, 2, 7, 2\]",
    ),
    "rank": (lambda: call(with_keys(lambda each: each[0])), ValueError, r"must have four dimensions"),
    "head sizes": (lambda: call(replace(SMALL, q=SMALL.q[..., :32])), ValueError, r"q of shape .* do not fit"),
    "lengths": (lambda: call(with_keys(lambda each: each[:, :, :2])), ValueError, r"k of shape .* do not fit"),
    "mask": (lambda: call(mask="full"), ValueError, r'mask is "full"; it must be "causal"'),
    "window": (lambda: call(window=3), ValueError, r'window is 3; it needs mask="causal"'),
    "device": (lambda: call(with_keys(lambda each: each.to("meta"))), ValueError, r"k is on meta and q on cpu"),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"\[quantized_scaled_dot_product_attention\].*{message}"):
        call()


def test_fake_tensors_raise_the_same() -> None:
    fake = SMALL.to("meta")
    with pytest.raises(ValueError, match="bits is 3"):
        call(fake, bits=3)
    with pytest.raises(ValueError, match="do not belong together"):
        call(fake, group_size=64)
    assert call(fake).shape == SMALL.q.shape
