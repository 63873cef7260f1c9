"""scaled_dot_product_attention: against float64, torch's own and mlx's."""

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
from oracle import name_of
from quantization_mlx import fast
from quantization_mlx._ops import ops

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
HEAD_SIZES = ((32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (576, 512))
HEADS = ((2, 2), (3, 1), (8, 2), (8, 1))  # of queries, of keys
QUERIES = (1, 2, 7, 8, 9, 40)
CONTEXTS = (1, 31, 32, 33, 1000, 5000)
GPU_CONTEXTS = (1, 31, 33, 200, 1100)


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: str | Tensor | None = None
    sinks: Tensor | None = None
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        return 1.5 * self.q.shape[-1] ** -0.5

    def to(self, *target: object) -> Case:
        def moved(value: object) -> object:
            return value.to(*target) if isinstance(value, Tensor) and value.dtype != torch.bool else value

        case = Case(*map(moved, (self.q, self.k, self.v, self.mask, self.sinks)), self.window, self.softcap)
        has_bools = isinstance(case.mask, Tensor) and not isinstance(target[0], torch.dtype)
        return replace(case, mask=case.mask.to(*target)) if has_bools else case

    def ours(self) -> Tensor:
        return fast.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            scale=self.scale,
            mask=self.mask,
            sinks=self.sinks,
            window=self.window,
            softcap=self.softcap,
        )

    def visible(self) -> Tensor:
        """What a causal mask shows, as Transformers writes it."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        own, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        return (key <= own) & (key > own - (self.window or keys + queries))

    def torch(self) -> Tensor:
        """torch's op or, where it has none, its ops."""
        mask = self.visible() if isinstance(self.mask, str) else self.mask
        mask = None if mask is None else mask.expand(*self.q.shape[:3], self.k.shape[2])
        if self.sinks is None and self.softcap is None:
            return F.scaled_dot_product_attention(
                self.q, self.k, self.v, mask, scale=self.scale, enable_gqa=True
            ).nan_to_num()
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (each.repeat_interleave(group, 1) for each in (self.k, self.v))
        scores = self.q @ k.mT * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if self.sinks is None:
            return (scores.softmax(-1) @ v).nan_to_num()
        sinks = self.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def case(
    dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int], queries: int, keys: int, batch: int = 1
) -> Case:
    q = oracle.random_x(batch, heads[0], queries, sizes[0], seed=1, dtype=dtype)
    k = oracle.random_x(batch, heads[1], keys, sizes[0], seed=2, dtype=dtype)
    v = oracle.random_x(batch, heads[1], keys, sizes[1], seed=3, dtype=dtype)
    return Case(q, k, v)


def masked(case: Case, kind: str) -> Case:
    """With a mask of this kind."""
    (_, heads, queries, _), keys, dtype = case.q.shape, case.k.shape[2], case.q.dtype
    random = oracle.random_x(heads, queries, keys, seed=4)
    sinks = oracle.random_x(heads, seed=5, dtype=dtype) * 3
    kinds: dict[str, dict[str, object]] = {
        "none": {},
        "causal": {"mask": "causal"},
        "window": {"mask": "causal", "window": max(1, keys // 3)},
        "bool": {"mask": random > 0},
        "added": {"mask": random.to(dtype)},
        "padding": {"mask": torch.arange(keys) >= keys // 2},
        "sinks": {"sinks": sinks},
        "causal sinks": {"mask": "causal", "sinks": sinks, "window": keys},
        "softcap": {"softcap": 0.7},
        "window and softcap": {"mask": "causal", "window": max(1, keys // 2), "softcap": 50.0},
    }
    return replace(case, **kinds[kind])


MASKS = (
    *("none", "causal", "window", "bool", "added", "padding", "sinks", "causal sinks"),
    *("softcap", "window and softcap"),
)


def assert_attention(case: Case, device: str) -> None:
    """Within twice the error of torch's own in this dtype, or of some roundings of float32, and one rounding."""
    y = case.to(device).ours()
    exact, theirs = case.to(torch.float64).torch(), case.torch()
    assert y.dtype == theirs.dtype and y.shape == theirs.shape and y.is_contiguous()
    float_rounding = torch.finfo(torch.float32).eps * float(case.v.float().abs().max())
    bound = 2 * max(float((theirs.double() - exact).abs().max()), 2 * float_rounding)
    oracle.assert_within(y.cpu(), exact, bound + torch.finfo(y.dtype).eps * exact.abs() + 1e-7)


# --- Values -----------------------------------------------------------------------------------------------------------


@DTYPE
@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=str)
def test_values_on_cpu(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    choices = itertools.cycle(itertools.product(MASKS, HEADS + HEADS[:1]))  # coprime with what is combined
    for queries, keys in itertools.product(QUERIES, CONTEXTS):
        if keys == 5000 and queries > 2 and sizes[0] > 256:
            continue  # seconds in float64
        kind, heads = next(choices)
        assert_attention(masked(case(dtype, heads, sizes, queries, keys), kind), "cpu")


# Of all combinations of what a GPU's kernels are chosen by, some that have every pair of values; those that take the
# software device seconds are left out.
ON_GPUS = [
    dict(zip(("dtype", "sizes", "heads", "queries", "keys", "kind"), values, strict=True))
    for values in itertools.product(DTYPES, HEAD_SIZES, HEADS, (1, 2, 5, 17), GPU_CONTEXTS, MASKS)
    if values[1][0] * values[2][0] * values[3] * values[4] < 600_000
]
CHOSEN = [ON_GPUS[index] for index in pairwise(ON_GPUS)]


@pytest.mark.parametrize("choice", CHOSEN, ids=lambda choice: "-".join(map(name_of, choice.values())))
def test_values(device: str, choice: dict) -> None:
    kind = choice["kind"]
    assert_attention(masked(case(**{key: value for key, value in choice.items() if key != "kind"}), kind), device)


@pytest.mark.parametrize("queries", [3, 12])
def test_batches_and_strides(device: str, queries: int) -> None:
    """Of a cache with room for more positions, and of projections whose heads lie side by side."""
    for shift in (0, 8, 3):
        projected = oracle.random_x(2, queries, 4, 3 * 64 + shift, dtype=torch.float16).to(device)[..., shift:]
        q = projected[..., :64].transpose(1, 2)
        cache = oracle.random_x(2, 2, 2, 80, 64, seed=2, dtype=torch.float16).to(device)
        views = {
            "cache": (cache[0, :, :, :50], cache[1, :, :, :50]),
            "heads side by side": (projected[..., 64:128].transpose(1, 2), projected[..., 128:].transpose(1, 2)),
            "one batch for all": (
                cache[0, :1, :, :50].expand(2, -1, -1, -1),
                cache[1, :1, :, 7:57].expand(2, -1, -1, -1),
            ),
            "elements far apart": (cache[0, :, :, :64].mT, cache[1, :, :, :64].mT),
        }
        for name, (k, v) in views.items():
            given = Case(q, k, v, "causal")
            copies = Case(*(each.contiguous() for each in (q, k, v)), "causal")
            mine, expected = given.ours().cpu(), copies.ours().cpu()
            oracle.assert_within(mine, expected.double(), 2e-3 * (1 + expected.double().abs()), name)


def test_masks_of_any_shape(device: str) -> None:
    plain = case(torch.float32, (4, 2), (32, 32), 3, 20, batch=2)
    full = oracle.random_x(2, 4, 3, 20, seed=7)
    for mask in (
        full,
        full[:1],
        full[:, :1],
        full[0, 0],
        full[..., :1, :],
        full[..., :1],
        full[0, 0, 0],
        full[0, 0, 0, 0],
    ):
        for each in (mask, mask > 0, mask.expand(2, 4, 3, 20).mT.contiguous().mT > -1):
            assert_attention(replace(plain, mask=each), device)


def test_causal_masks_combine_with_others(device: str) -> None:
    """In the op alone: mlx has one or the other."""
    given = case(torch.float32, (4, 2), (64, 64), 5, 40)
    padding = torch.arange(40) >= 9
    on = given.to(device)
    ours = ops.scaled_dot_product_attention(
        on.q, on.k, on.v, scale=given.scale, mask=padding.to(device), causal=True, window=30
    )
    exact = replace(given.to(torch.float64), mask=padding & replace(given, mask="causal", window=30).visible()).torch()
    oracle.assert_within(ours.cpu(), exact, 1e-6 * (1 + exact.abs()))


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("kind", ["bool", "added", "lowest", "causal", "no keys"])
def test_rows_that_see_nothing(device: str, kind: str, queries: int) -> None:
    """Zeros, as in torch; what is added may be the lowest number instead, which leaves equal weights."""
    given = case(torch.float32, (2, 1), (64, 64), queries, 9)
    mask = torch.ones(queries, 9, dtype=torch.bool)
    mask[0] = False
    kinds = {
        "bool": replace(given, mask=mask),
        "added": replace(given, mask=torch.where(mask, 0.0, -torch.inf)),
        "lowest": replace(given, mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min)),
        "causal": replace(given, q=oracle.random_x(1, 2, 9 + queries, 64), mask="causal"),
        "no keys": Case(given.q, given.k[:, :, :0], given.v[:, :, :0]),
    }
    y = kinds[kind].to(device).ours().cpu()
    if kind == "lowest":
        oracle.assert_within(y[:, :, 0], given.v.double().mean(2).expand(1, 2, 64), 1e-6 * torch.ones(1, 2, 64))
    else:
        assert not y[:, :, 0].any()
    assert y.isfinite().all() and (kind == "no keys" or queries == 1 or y[:, :, -1].all())


def test_what_is_not_finite(device: str) -> None:
    given = case(torch.float32, (2, 2), (64, 64), 2, 40)
    given.q[0, 0, 0, 3], given.k[0, 1, 7, 0] = torch.nan, torch.inf
    y = given.to(device).ours().cpu()
    assert y[0, 0, 0].isnan().all() and y[0, 0, 1].isfinite().all() and y[0, 1].isnan().any()


def test_large_scores(device: str) -> None:
    given = case(torch.float32, (2, 1), (64, 64), 3, 700)
    assert_attention(Case(given.q * 40, given.k * 40, given.v), device)
    assert_attention(replace(given, sinks=torch.tensor([300.0, -300.0])), device)


@pytest.mark.parametrize("queries, keys", [(1, 40), (6, 6), (3, 700)])
def test_agrees_with_mlx(device: str, queries: int, keys: int) -> None:
    import mlx.core as mx

    for kind in ("none", "causal", "bool", "added", "sinks"):
        given = masked(case(torch.float32, (4, 2), (64, 64), queries, keys), kind)
        mask = given.mask if given.mask is None or isinstance(given.mask, str) else mx.array(given.mask.numpy())
        operands = map(oracle.to_mlx, (given.q, given.k, given.v, given.sinks))
        q, k, v, sinks = operands
        theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=given.scale, mask=mask, sinks=sinks)
        ours, theirs = given.to(device).ours().cpu(), oracle.from_mlx(theirs)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        oracle.assert_within(ours, theirs.double(), 4e-6 * (1 + theirs.double().abs()))


def test_dtypes_promote(device: str) -> None:
    given = case(torch.bfloat16, (2, 1), (32, 32), 2, 5)
    wide = replace(given, v=given.v.float())
    y = wide.to(device).ours()
    assert y.dtype == torch.float32
    oracle.assert_identical(y, given.to(torch.float32).to(device).ours())


def test_windows_are_those_of_transformers() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    shows = sliding_window_causal_mask_function(7)
    theirs = torch.tensor([[shows(0, 0, torch.tensor(i), torch.tensor(j)) for j in range(20)] for i in range(20)])
    given = Case(*(torch.zeros(1, 1, 20, 8) for _ in range(3)), "causal", window=7)
    oracle.assert_identical(given.visible(), theirs)


def test_results_do_not_depend_on_threads() -> None:
    for queries, keys in ((1, 3000), (70, 700)):
        given = case(torch.bfloat16, (2, 1), (64, 64), queries, keys)
        expected, threads = given.ours(), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            oracle.assert_identical(given.ours(), expected)
        finally:
            torch.set_num_threads(threads)


# --- Gradients --------------------------------------------------------------------------------------------------------


@DTYPE
@pytest.mark.parametrize("kind", MASKS)
def test_gradients(dtype: torch.dtype, kind: str) -> None:
    given = masked(case(dtype, (4, 2), (32, 16), 5, 9, batch=2), kind)

    def gradients(given: Case, function: Callable[[Case], Tensor]) -> list[Tensor]:
        tensors = {name: getattr(given, name) for name in ("q", "k", "v", "mask", "sinks")}
        leaves = {
            name: each.detach().requires_grad_()
            for name, each in tensors.items()
            if isinstance(each, Tensor) and each.dtype != torch.bool
        }
        result = function(replace(given, **leaves))
        seed = oracle.random_x(*result.shape, seed=9).to(result.dtype)
        return list(torch.autograd.grad(result, list(leaves.values()), seed))

    exact = gradients(given.to(torch.float64), Case.torch)
    for mine, theirs in zip(gradients(given, Case.ours), exact, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        oracle.assert_within(mine, theirs, 4 * torch.finfo(dtype).eps * (theirs.abs() + theirs.abs().amax()))


def test_gradients_of_rows_that_see_nothing() -> None:
    given = case(torch.float32, (2, 1), (16, 16), 6, 4)
    leaves = [each.requires_grad_() for each in (given.q, given.k, given.v)]
    replace(given, mask="causal").ours().sum().backward()
    assert all(each.grad.isfinite().all() for each in leaves) and not given.q.grad[:, :, 0].any()


def test_gradients_of_gradients() -> None:
    given = case(torch.float32, (2, 1), (8, 8), 3, 4)

    def squared(given: Case, function: Callable[[Case], Tensor]) -> Tensor:
        q = given.q.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(replace(given, q=q)).square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    exact = squared(
        given.to(torch.float64), lambda given: replace(given, sinks=torch.full((2,), -1e3).double()).torch()
    )
    oracle.assert_within(squared(given, Case.ours), exact, 1e-4 * exact.abs().amax())


def test_forward_mode_is_refused() -> None:
    given = case(torch.float32, (1, 1), (8, 8), 1, 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given.v, given.v)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            replace(given, v=dual).ours()


# --- As torch's ops ---------------------------------------------------------------------------------------------------

SMALL = case(torch.float32, (4, 2), (32, 16), 3, 7)


@pytest.mark.parametrize("kind", ["none", "added", "causal sinks", "softcap"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device: str, kind: str, grad: bool) -> None:
    given = masked(SMALL, kind).to(device)
    tensors = [each.detach().requires_grad_(grad) for each in (given.q, given.k, given.v)]
    options = {
        "scale": given.scale,
        "causal": isinstance(given.mask, str),
        "sinks": given.sinks,
        "window": given.window,
        "softcap": given.softcap,
    }
    options["mask"] = None if options["causal"] else given.mask
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    op = ops.scaled_dot_product_attention.default
    torch.library.opcheck(op, tuple(tensors), options, test_utils=checks)


@pytest.mark.parametrize("kind", MASKS)
def test_compiles_as_one_graph(kind: str) -> None:
    torch._dynamo.reset()  # it compiles a function for so many kinds of arguments, and then no more
    given = masked(SMALL, kind)
    compiled = torch.compile(Case.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    oracle.assert_identical(compiled(given), given.ours())


def test_exports_with_sizes_that_depend_on_data() -> None:
    class Module(torch.nn.Module):
        def forward(self, shown: Tensor) -> Tensor:
            keys = torch.arange(6.0)[shown][None, None, :, None] * torch.ones(1, 2, 1, 32)
            return fast.scaled_dot_product_attention(SMALL.q, keys, keys, scale=0.1, mask="causal")

    shown = torch.tensor([True, False, True, True, False, True])
    program = torch.export.export(Module(), (shown,)).module()
    for each in (shown, ~shown):
        oracle.assert_identical(program(each), Module()(each))


PLANS = {
    "one query": ((1, 32, 1, 128), (1, 8, 4096, 128), ["attention_128_float16_rows_4", "attention_combine_float16"]),
    "few keys": ((1, 32, 1, 128), (1, 8, 60, 128), ["attention_128_float16_rows_4"]),
    "a prompt": ((1, 32, 512, 96), (1, 8, 512, 96), ["attention_tile_128_float16"]),
    "latent": ((1, 16, 1, 576), (1, 1, 60, 576), ["attention_576_float16_rows_2"]),
}


@pytest.mark.parametrize("q, k, kernels", PLANS.values(), ids=PLANS.keys())
def test_explain(q: tuple[int, ...], k: tuple[int, ...], kernels: list[str]) -> None:
    q, k = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in (q, k))
    v = k[..., :512]
    plan = json.loads(ops.explain_scaled_dot_product_attention(q, k, v, scale=1.0, gpu="applegpu_g15s", macos=1500))
    assert [launch["kernel"] for launch in plan["launches"]] == kernels
    on_cpu = ops.explain_scaled_dot_product_attention(SMALL.q, SMALL.k, SMALL.v, scale=1.0, gpu="", macos=0)
    assert json.loads(on_cpu)["device"] == "cpu"


# --- Errors -----------------------------------------------------------------------------------------------------------

Q, K, V = SMALL.q, SMALL.k, SMALL.v


def call(q: Tensor = Q, k: Tensor = K, v: Tensor = V, **options: object) -> Tensor:
    return fast.scaled_dot_product_attention(q, k, v, scale=1.0, **options)


ERRORS = {
    "rank": (lambda: call(Q[0]), ValueError, r"must have four dimensions: \[batch, heads, length, head size\]"),
    "dtype": (lambda: call(Q.double()), TypeError, r"q has dtype Double; supported are float32"),
    "head sizes": (lambda: call(Q[..., :8]), ValueError, r"q of shape \[1, 4, 3, 8\].* do not fit"),
    "lengths": (lambda: call(v=V[:, :, :2]), ValueError, r"v of shape \[1, 2, 2, 16\] do not fit"),
    "heads": (lambda: call(Q[:, :3]), ValueError, r"3 heads of q are no multiple of 2 heads of k and v"),
    "large heads": (
        lambda: call(Q.repeat(1, 1, 1, 20), K.repeat(1, 1, 1, 20)),
        ValueError,
        r"the head size of q and k is 640 and that of v 16; supported are 1 to 576 and 1 to 512",
    ),
    "name of a mask": (lambda: call(mask="full"), ValueError, r'mask is "full"; it must be "causal"'),
    "shape of a mask": (
        lambda: call(mask=torch.zeros(2, 7)),
        ValueError,
        r"mask of shape \[2, 7\] does not broadcast to .* \[1, 4, 3, 7\]",
    ),
    "mask of integers": (lambda: call(mask=torch.zeros(7).int()), TypeError, r"mask has dtype Int; supported are bool"),
    "wide mask": (
        lambda: call(Q.half(), K.half(), V.half(), mask=torch.zeros(7)),
        TypeError,
        r"mask has dtype Float, which does not promote to that of the result, Half",
    ),
    "sinks": (
        lambda: call(sinks=torch.zeros(2)),
        ValueError,
        r"sinks of shape \[2\] must have one element for each head",
    ),
    "wide sinks": (
        lambda: call(Q.half(), K.half(), V.half(), sinks=torch.zeros(4)),
        TypeError,
        r"sinks have dtype Float, which does not promote",
    ),
    "window alone": (lambda: call(window=3), ValueError, r'window is 3; it needs mask="causal"'),
    "softcap": (lambda: call(softcap=0.0), ValueError, r"softcap is 0; it must be positive"),
    "no window": (lambda: call(mask="causal", window=0), ValueError, r"window is 0; it must be positive"),
    "device": (lambda: call(k=K.to("meta")), ValueError, r"k is on meta and q on cpu"),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_fake_tensors_raise_the_same() -> None:
    with pytest.raises(ValueError, match="3 heads of q are no multiple"):
        call(*(each.to("meta") for each in (Q[:, :3], K, V)))
