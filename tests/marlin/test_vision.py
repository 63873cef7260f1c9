"""VisionMetal and preprocess_for_vit: against torch's own operators, PIL and the image processors of Transformers."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import oracle
from devices import NATIVE_DEVICES
from quantization_mlx.marlin.vision.vision_metal import VisionMetal, preprocess_for_vit

NHWC = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
# 1 to 5 channels, single images, and no image.
SHAPES = pytest.mark.parametrize(
    "shape", [(2, 3, 15, 22), (1, 30, 17), (2, 11, 9), (1, 4, 13, 8), (3, 5, 17, 11), (0, 5, 9, 8)], ids=str
)
# Smaller, larger and wider, and larger.
SIZES = pytest.mark.parametrize("new", [(7, 5), (9, 31), (33, 35)], ids=str)
# PIL rounds to uint8 after rows and again after columns; bicubic weights grow the first of these by up to a quarter.
ROUNDED = 1.15 / 255


def drawing(height: int, width: int) -> Tensor:
    """uint8 [3, height, width]: waves, a disc with a sharp edge, and noise."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    planes = torch.stack([torch.sin(9 * x + 3 * y), torch.cos(14 * y), x * y])
    planes = torch.where(x**2 + y**2 < 0.4, -planes, planes)
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)) - 0.5
    return ((planes + 0.3 * noise) * 100 + 128).clamp(0, 255).to(torch.uint8)


def pixels(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def laid_out(image: Tensor, nhwc: bool) -> Tensor:
    return image.movedim(-3, -1) if nhwc else image


def planes_of(result: Tensor, nhwc: bool) -> Tensor:
    return (result.movedim(-1, -3) if nhwc else result).cpu()


def interpolated(image: Tensor, size: tuple[int, int], **options: object) -> Tensor:
    batch = image.double().reshape(-1, *image.shape[-3:])
    return interpolate(batch, size, align_corners=False, **options).reshape(*image.shape[:-2], *size)


# --- VisionMetal ------------------------------------------------------------------------------------------------------


@NHWC
@SHAPES
@SIZES
def test_methods(device: str, shape: tuple[int, ...], new: tuple[int, int], nhwc: bool) -> None:
    """The image is moved where the class works, and then stays there."""
    vision = VisionMetal(device)
    image = pixels(shape)
    given = laid_out(image, nhwc)
    channels = shape[-3]
    statistics = torch.linspace(10, 90, channels).tolist(), torch.linspace(2, 70, channels)
    mean, std = (torch.as_tensor(each).double().reshape(-1, 1, 1) for each in statistics)
    statistics = statistics[0], statistics[1].to(device)
    bilinear = interpolated(image, new, mode="bilinear")
    expected: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "bytes": (lambda: vision.uint8_to_float(given), image.double() / 255),
        "crop": (lambda: vision.center_crop(given, (7, 8), nhwc), cropped(image, 7, 8).double()),
        "bilinear": (lambda: vision.resize_bilinear(given, new, nhwc), bilinear),
        "bicubic": (lambda: vision.resize_bicubic(given, new, nhwc), interpolated(image, new, mode="bicubic")),
        "antialias": (
            lambda: vision.resize_bicubic(given, new, nhwc, antialias=True),
            interpolated(image, new, mode="bicubic", antialias=True),
        ),
        "normalize": (lambda: vision.normalize(given, *statistics, nhwc), (image.double() - mean) / std),
        "both": (lambda: vision.resize_and_normalize(given, new, *statistics, nhwc), (bilinear - mean) / std),
    }
    for name, (function, exact) in expected.items():
        result = function()
        assert result.dtype == torch.float32 and result.device.type == device
        oracle.assert_within(planes_of(result, nhwc), exact, 1e-3 if name != "bytes" else 1e-7, name)


def cropped(image: Tensor, height: int, width: int) -> Tensor:
    """By torch's padding, of negative width: the smaller half of an odd rest is above and on the left."""
    rows, columns = image.shape[-2] - height, image.shape[-1] - width
    sides = (-(columns // 2), columns // 2 - columns, -(rows // 2), rows // 2 - rows)
    return torch.nn.functional.pad(image, sides)


@pytest.mark.parametrize(
    "shape", [(2, 12, 20, 3), (8, 4, 5), (1, 8, 8, 2), (4, 12, 4), (4, 4, 1), (0, 4, 4, 1)], ids=str
)
def test_patches(device: str, shape: tuple[int, ...]) -> None:
    """As unfold has them, which counts a patch's channels first."""
    image, size = pixels(shape), 4
    patches = VisionMetal().extract_patches(image.to(device), size)
    batch = image.reshape(-1, *shape[-3:]).movedim(-1, 1).float()
    count, channels = shape[-3] * shape[-2] // size**2, shape[-1]
    if batch.shape[0]:
        vectors = torch.nn.functional.unfold(batch, size, stride=size).mT.reshape(-1, count, channels, size**2)
        expected = vectors.mT.reshape(*shape[:-3], count, -1)
        assert torch.equal(patches.cpu(), expected)
    assert patches.shape == (*shape[:-3], count, size**2 * channels) and patches.dtype == torch.float32


@NHWC
@pytest.mark.parametrize(
    "old, max_pixels, new",
    [
        ((30, 50), 1024 * 1024, (28, 42)),
        ((70, 91), 1000, (14, 28)),
        ((9, 100), 10**6, (14, 98)),
        ((5, 60), 1, (14, 14)),
    ],
    ids=str,
)
def test_qwen2vl_sizes(device: str, old: tuple[int, int], max_pixels: int, new: tuple[int, int], nhwc: bool) -> None:
    image = pixels((3, *old))
    result = VisionMetal().preprocess_qwen2vl(laid_out(image, nhwc).to(device), max_pixels, nhwc=nhwc)
    oracle.assert_within(planes_of(result, nhwc), interpolated(image, new, mode="bilinear"), 1e-3)


@NHWC
@pytest.mark.parametrize("shape", [(1, 29, 43), (2, 2, 29, 43), (4, 29, 43), (1, 5, 29, 43), (0, 3, 29, 43)], ids=str)
def test_qwen2vl_images(device: str, shape: tuple[int, ...], nhwc: bool) -> None:
    image = pixels(shape)
    result = VisionMetal(device).preprocess_qwen2vl(laid_out(image, nhwc), nhwc=nhwc)
    oracle.assert_within(planes_of(result, nhwc), interpolated(image, (28, 42), mode="bilinear"), 1e-3)


def test_works_without_copies(device: str) -> None:
    """No operator is left to the CPU, and nothing waits for the device, which logs both."""
    if device in NATIVE_DEVICES:
        return
    from softmetal import mps

    image = pixels((2, 3, 28, 42)).to(device)
    mean = torch.ones(3).to(device)
    vision = VisionMetal()

    def everything() -> None:
        vision.uint8_to_float(image)
        vision.center_crop(image, (9, 9))
        vision.resize_and_normalize(image.movedim(1, -1), (5, 5), mean, mean, nhwc=True)
        vision.normalize(image, mean, mean)
        vision.extract_patches(image.movedim(1, -1), 14)
        vision.preprocess_qwen2vl(image)
        preprocess_for_vit(image, mean=mean, std=mean)

    def seen() -> tuple[int, int, int]:
        logs = mps.logs()
        return len(logs["fallbacks"]), logs["transfers"], logs["synchronizations"]

    everything()  # kernels are tried on examples of the host's
    before = seen()
    everything()
    assert seen() == before


IMAGE = torch.zeros(3, 8, 9)
WRONG: dict[str, tuple[type[Exception], str, Callable[[VisionMetal], object]]] = {
    "floats": (TypeError, "[uint8_to_float] image has dtype torch.float32", lambda v: v.uint8_to_float(IMAGE)),
    "crop": (ValueError, "[center_crop] size is (9, 9) of an image of (8, 9)", lambda v: v.center_crop(IMAGE, (9, 9))),
    "nothing": (ValueError, "[center_crop] size is (0, 9)", lambda v: v.center_crop(IMAGE, (0, 9))),
    "plane": (ValueError, "[center_crop] the image has shape (8, 9)", lambda v: v.center_crop(IMAGE[0], (2, 2))),
    "patches": (ValueError, "[extract_patches] patch_size is 2", lambda v: v.extract_patches(IMAGE, 2)),
    "no patch": (ValueError, "[extract_patches] patch_size is 0", lambda v: v.extract_patches(IMAGE, 0)),
    "pixels": (ValueError, "max_pixels is 0", lambda v: v.preprocess_qwen2vl(IMAGE, 0)),
    "means": (ValueError, "mean of shape [2]", lambda v: v.normalize(IMAGE, (0.0, 0.0), (1.0, 1.0, 1.0))),
    "channels": (ValueError, "the length of mean", lambda v: preprocess_for_vit(torch.zeros(4, 8, 9))),
    "no list": (ValueError, "empty list", lambda v: preprocess_for_vit([])),
    "batches": (ValueError, "an image of the list has shape (1, 3, 8, 9)", lambda v: preprocess_for_vit([IMAGE[None]])),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    kind, message, call = WRONG[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(VisionMetal())


# --- Pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "batch", "nhwc", "floats", "single"])
def test_forms_of_images(device: str, form: str) -> None:
    """By torch, from images of different sizes where they are a list."""
    first, second = drawing(40, 31), drawing(21, 60) if form == "list" else drawing(40, 31).flip(-1)
    images = {
        "list": lambda: [first.to(device), second.movedim(0, -1).to(device)],
        "batch": lambda: torch.stack([first, second]).to(device),
        "nhwc": lambda: torch.stack([first, second]).movedim(1, -1).contiguous().to(device),
        "floats": lambda: (torch.stack([first, second]) / 255).half().to(device),
        "single": lambda: first.to(device),
    }[form]()
    result = preprocess_for_vit(images, (24, 20))
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).reshape(-1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).reshape(-1, 1, 1)
    expected = torch.stack(
        [(interpolated(image, (24, 20), mode="bilinear") / 255 - mean) / std for image in (first, second)]
    )
    oracle.assert_within(result, expected[:1] if form == "single" else expected, 5e-3 if form == "floats" else 1e-5)


@pytest.mark.parametrize("nhwc", [False, True])
def test_empty_batch(device: str, nhwc: bool) -> None:
    shape = (0, 9, 8, 3) if nhwc else (0, 3, 9, 8)
    assert preprocess_for_vit(torch.empty(shape, dtype=torch.uint8, device=device)).shape == (0, 3, 224, 224)


def test_vit(device: str) -> None:
    """A drawing has the logits that it has behind Transformers' own processor."""
    image, size = drawing(150, 101), (48, 48)
    statistics = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
    processor = ViTImageProcessorPil(size=dict(zip(("height", "width"), size, strict=True)), **statistics)
    theirs = processor(Image.fromarray(image.movedim(0, -1).numpy()), return_tensors="pt")["pixel_values"]
    ours = preprocess_for_vit([image.to(device)], size, antialias=True).cpu()
    oracle.assert_within(ours, theirs.double(), ROUNDED / 0.224)

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=48, patch_size=16, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        logits, expected = (model(pixel_values=each).logits for each in (ours, theirs))
    assert (logits - expected).norm() < 0.005 * expected.norm()
    plain = preprocess_for_vit([image], size)
    assert (plain - theirs).abs().max() > 0.2  # without antialias it is another image


def test_qwen2vl_processor(device: str) -> None:
    """Its bicubic images, of whole patches, from the methods here."""
    image, patch, merge, frames = drawing(90, 130), 14, 2, 2
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=60 * 100)
    given = processor(Image.fromarray(image.movedim(0, -1).numpy()), return_tensors="pt")
    _, rows, columns = given["image_grid_thw"][0].tolist()
    size = (rows * patch, columns * patch)
    assert size != image.shape[1:]
    blocks = given["pixel_values"].reshape(rows // merge, columns // merge, merge, merge, 3, frames, patch, patch)
    expected = blocks[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, *size)

    vision = VisionMetal(device)
    pixels = vision.resize_bicubic(image, size, antialias=True).clamp(0, 255) / 255
    ours = vision.normalize(pixels, processor.image_mean, processor.image_std).cpu()
    oracle.assert_within(ours, expected.double(), ROUNDED / min(processor.image_std))
    assert np.all(np.array(size) % (patch * merge) == 0)
