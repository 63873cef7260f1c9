"""resample_image: against torch's interpolate in float64, and PIL."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

import oracle
from oracle import name_of
from quantization_mlx import explain, fast
from quantization_mlx._ops import ops

DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)
MODES = ("bilinear", "bicubic")
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
MODE = pytest.mark.parametrize("mode", MODES)
ANTIALIAS = pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
CHANNELS_LAST = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
# Of float32 weights and of sums of a few dozen pixels, over the largest value.
BOUND = 4e-6


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def resized(x: Tensor, size: tuple[int, int], channels_last: bool = False, **options: Any) -> Tensor:
    """By torch, in float64."""
    batch = x.double() if x.dim() == 4 else x.double()[None]
    batch = batch.movedim(-1, 1) if channels_last else batch
    y = interpolate(batch.contiguous(), size, align_corners=False, **options)
    y = y.movedim(1, -1) if channels_last else y
    return y if x.dim() == 4 else y[0]


def assert_resized(device: str, x: Tensor, size: tuple[int, int], **options: Any) -> None:
    y = fast.resample_image(x.to(device), size, **options)
    exact = resized(x, size, **{"mode": "bilinear"} | options)
    assert y.dtype == torch.float32 and y.is_contiguous() and y.device.type == device
    oracle.assert_within(y.cpu(), exact, BOUND * float(x.double().abs().max()))


# --- Values -----------------------------------------------------------------------------------------------------------


@MODE
@ANTIALIAS
@DTYPE
@CHANNELS_LAST
@pytest.mark.parametrize(
    "channels, old, new",
    [
        (3, (13, 17), (13, 17)),
        (1, (13, 17), (29, 40)),
        (5, (31, 22), (7, 9)),
        (4, (9, 41), (20, 11)),
        (2, (1, 7), (3, 1)),
    ],
    ids=str,
)
def test_values(
    device: str,
    mode: str,
    antialias: bool,
    dtype: torch.dtype,
    channels_last: bool,
    channels: int,
    old: tuple[int, int],
    new: tuple[int, int],
) -> None:
    shape = (2, *old, channels) if channels_last else (2, channels, *old)
    x = image(*shape, dtype=dtype)
    assert_resized(device, x, new, mode=mode, antialias=antialias, channels_last=channels_last)
    assert_resized(device, x[1], new, mode=mode, antialias=antialias, channels_last=channels_last)


@MODE
@pytest.mark.parametrize("old, new", [((64, 48), (37, 61)), ((20, 30), (90, 7))], ids=str)
def test_pil(device: str, mode: str, old: tuple[int, int], new: tuple[int, int]) -> None:
    """With antialias, of float pixels, which PIL does not round."""
    x = image(*old).numpy()
    filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[mode]
    expected = np.asarray(Image.fromarray(x).resize(new[::-1], filter))
    y = fast.resample_image(torch.from_numpy(x)[None].to(device), new, mode=mode, antialias=True)
    oracle.assert_within(y[0].cpu(), torch.from_numpy(expected.copy()).double(), 1e-5)


@DTYPE
@MODE
@ANTIALIAS
def test_same_size_changes_nothing(device: str, dtype: torch.dtype, mode: str, antialias: bool) -> None:
    x = image(3, 21, 49, dtype=dtype)
    if dtype != torch.uint8:
        x[0, 3, 4], x[1, 0, 0], x[2, 20, 48] = torch.inf, torch.nan, -torch.inf
    y = fast.resample_image(x.to(device), (21, 49), mode=mode, antialias=antialias)
    assert torch.equal(y.cpu().nan_to_num(7), x.float().nan_to_num(7))


@pytest.mark.parametrize("given", ["both", "mean", "std", "tensors"])
@CHANNELS_LAST
@DTYPE
def test_normalises(device: str, given: str, channels_last: bool, dtype: torch.dtype) -> None:
    x = image(2, 10, 6, 5, dtype=dtype)
    channels = 5 if channels_last else 10
    size = (7, 9)
    mean, std = torch.linspace(-1, 2, channels), torch.linspace(0.5, 3, channels)
    if given == "mean":
        std = torch.ones(channels)
    if given == "std":
        mean = torch.zeros(channels)
    statistics = {"mean": mean, "std": std}
    names = [given] if given in statistics else list(statistics)
    options = {name: statistics[name].to(device) if given == "tensors" else statistics[name].tolist() for name in names}
    y = fast.resample_image(x.to(device), size, scale=0.125, channels_last=channels_last, **options)
    shape = (channels,) if channels_last else (channels, 1, 1)
    exact = resized(x, size, channels_last, mode="bilinear") * 0.125 - mean.double().reshape(shape)
    exact = exact / std.double().reshape(shape)
    oracle.assert_within(y.cpu(), exact, 2 * BOUND * (float(x.double().abs().max()) + 2))


@DTYPE
def test_strides(device: str, dtype: torch.dtype) -> None:
    """Nothing of a view but its own pixels: with gaps, transposed, reversed in part, one image for all."""
    x = image(3, 19, 23, 7, dtype=dtype)
    views = (x[:, 1::2, ::3, 2:5], x.permute(2, 3, 0, 1), x.transpose(1, 2)[1], x[:1].expand(2, 19, 23, 7), x[..., 3:4])
    on_device = x.to(device)
    others = (
        *(on_device[:, 1::2, ::3, 2:5], on_device.permute(2, 3, 0, 1), on_device.transpose(1, 2)[1]),
        *(on_device[:1].expand(2, 19, 23, 7), on_device[..., 3:4]),
    )
    for view, other in zip(views, others, strict=True):
        for channels_last in (False, True):
            y = fast.resample_image(other, (8, 5), mode="bicubic", channels_last=channels_last)
            exact = resized(view, (8, 5), channels_last, mode="bicubic")
            oracle.assert_within(y.cpu(), exact, BOUND * float(x.double().abs().max()))


@pytest.mark.parametrize("shape", [(0, 3, 8, 9), (2, 0, 8, 9), (0, 8, 9)], ids=str)
def test_no_images(device: str, shape: tuple[int, ...]) -> None:
    y = fast.resample_image(torch.empty(shape, dtype=torch.uint8, device=device), (4, 5))
    assert y.shape == (*shape[:-2], 4, 5) and y.dtype == torch.float32


def test_large_sides(device: str) -> None:
    """Places are exact where float32 does not hold them."""
    x = torch.arange(32000, dtype=torch.float32)[None, None]
    assert_resized(device, x, (1, 31999), mode="bicubic")
    assert_resized(device, x.mT, (11, 2), antialias=True)


def test_many_tasks() -> None:
    """Several threads, of several images each."""
    assert_resized("cpu", image(5, 3, 200, 300, dtype=torch.uint8), (150, 171), antialias=True)


# --- Errors -----------------------------------------------------------------------------------------------------------

X = torch.zeros(3, 8, 9)
WRONG: dict[str, tuple[type[Exception], str, tuple, dict]] = {
    "a plane": (ValueError, "x of shape [8, 9] must be an image or a batch", (X[0], (4, 4)), {}),
    "five dimensions": (ValueError, "[..., H, W, C]", (X[None, None], (4, 4)), {"channels_last": True}),
    "int32": (TypeError, "x has dtype Int", (X.int(), (4, 4)), {}),
    "a mode": (ValueError, 'mode is "nearest"', (X, (4, 4)), {"mode": "nearest"}),
    "no rows": (ValueError, "the height of x is 0", (X[:, :0], (4, 4)), {}),
    "to no columns": (ValueError, "the width of the result is 0", (X, (4, 0)), {}),
    "to too many rows": (ValueError, "is 32001; it must be from 1 to 32000", (X, (32001, 1)), {}),
    "one side": (ValueError, "size is (4,)", (X, (4,)), {}),
    "means": (ValueError, "mean of shape [2] must be one number for each of the 3", (X, (4, 4)), {"mean": (0, 1)}),
    "deviations": (TypeError, "std has dtype Long", (X, (4, 4)), {"std": torch.ones(3, dtype=torch.long)}),
    "a scale": (ValueError, "scale is nan", (X, (4, 4)), {"scale": float("nan")}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(device: str, name: str) -> None:
    kind, message, (x, size), options = WRONG[name]
    options = {key: each.to(device) if isinstance(each, Tensor) else each for key, each in options.items()}
    with pytest.raises(kind, match=re.escape("[resample_image] ") + ".*" + re.escape(message)):
        fast.resample_image(x.to(device), size, **options)


# --- As a torch op ----------------------------------------------------------------------------------------------------


def test_opcheck(device: str) -> None:
    x = image(2, 3, 8, 9, dtype=torch.uint8).to(device)
    mean = torch.ones(3, device=device)
    torch.library.opcheck(ops.resample_image, (x, 5, 6, "bicubic", True, mean, None, 0.5, False))
    torch.library.opcheck(
        ops.resample_image, (x.float().movedim(1, -1), 5, 6, "bilinear", False, None, None, 1.0, True)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def function(x: Tensor, height: int) -> Tensor:
        return fast.resample_image(x, (height, 6), mean=(0.5, 0.25, 0.0), std=(1.0, 2.0, 3.0)) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape, height in (((2, 3, 8, 9), 5), ((3, 3, 11, 7), 4)):
        x = image(*shape)
        assert torch.equal(compiled(x, height), function(x, height))


def test_has_no_gradient() -> None:
    y = fast.resample_image(image(3, 8, 9).requires_grad_(), (4, 4))
    with pytest.raises(RuntimeError, match=r"resample_image.*not implemented"):
        y.sum().backward()


def test_explain() -> None:
    x = torch.empty(3, 6, 500, 300, dtype=torch.uint8, device="meta")
    (plan,) = explain(fast.resample_image, x, (224, 224), gpu="applegpu_g16s")
    (launch,) = plan.launches
    assert (plan.op, launch.kernel, launch.family) == ("resample_image", "resample_image_uint8", "image")
    assert launch.threadgroups == (784, 2, 3) and launch.threads == 64
    (plan,) = explain(fast.resample_image, torch.empty(3, 5, 5), (2, 2))
    assert plan.device == "cpu"
