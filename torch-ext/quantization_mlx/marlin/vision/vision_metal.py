"""What stands in front of a vision model: images are resized, normalised and cut into patches where they are.

Images are uint8, float32, float16 or bfloat16, on any strides. Results are float32; the crop of a float32 image is a
view of it. Everything is a launch of ``fast.resample_image`` or a few of torch's own ops, on the device of the image:
nothing travels through the CPU, and nothing waits.

Sizes are ``(height, width)``. Pixels have their centres half a pixel from their borders, so that an image that is
resized to its own size stays itself; values of uint8 stay 0 to 255 unless something says that they are divided.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from ...fast import resample_image

__all__ = ["VisionMetal", "preprocess_for_vit"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_WHITE = 255

Statistic = Sequence[float] | Tensor


class VisionMetal:
    """The steps of an image processor, one method each.

    An image is ``[C, H, W]``, a batch of them ``[N, C, H, W]``, of any number of channels and images, none included;
    with ``nhwc`` they are ``[H, W, C]`` and ``[N, H, W, C]``. Results have the layout of what is given.

    Args:
        device: where the work is done: images are moved there first. None: where each image is.

    Raises:
        ValueError: shapes and sizes that do not fit, sides of more than 32000 pixels among them.
        TypeError: dtypes that are not supported.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = None if device is None else torch.device(device)

    def uint8_to_float(self, image: Tensor) -> Tensor:
        """``image / 255`` of uint8, in either layout."""
        if image.dtype != torch.uint8:
            raise TypeError(f"[uint8_to_float] image has dtype {image.dtype}; it must be uint8.")
        # Of the same size, whichever dimensions that is taken to be.
        return resample_image(self._here(image), _sides("uint8_to_float", image, nhwc=False), scale=1 / _WHITE)

    def center_crop(self, image: Tensor, size: tuple[int, int], nhwc: bool = False) -> Tensor:
        """The middle `size` pixels; where an odd number is left over, the crop is nearer to the top and the left."""
        sides = _sides("center_crop", image, nhwc)
        if len(size) != 2 or not all(0 < new <= old for new, old in zip(size, sides, strict=True)):
            raise ValueError(
                f"[center_crop] size is {tuple(size)} of an image of {sides} pixels; it must be a height and a width "
                "from 1 to these."
            )
        cropped = self._here(image)
        for dim, new, old in zip(_side_dims(nhwc), size, sides, strict=True):
            cropped = cropped.narrow(dim, (old - new) // 2, new)
        return cropped.to(torch.float32)

    def resize_bilinear(
        self, input: Tensor, target_size: tuple[int, int], nhwc: bool = False, *, antialias: bool = False
    ) -> Tensor:
        """As ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``, and its `antialias`."""
        return resample_image(self._here(input), target_size, antialias=antialias, channels_last=nhwc)

    def resize_bicubic(
        self, input: Tensor, target_size: tuple[int, int], nhwc: bool = False, *, antialias: bool = False
    ) -> Tensor:
        """As ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``, and its `antialias`.

        The filter's coefficient a is -0.75, and -0.5 with `antialias`. Results may lie beyond the values of the image:
        nothing is clipped.
        """
        return resample_image(self._here(input), target_size, mode="bicubic", antialias=antialias, channels_last=nhwc)

    def normalize(self, image: Tensor, mean: Statistic, std: Statistic, nhwc: bool = False) -> Tensor:
        """``(image - mean) / std``, one number for each channel; uint8 is not divided by 255 before."""
        return self.resize_and_normalize(image, _sides("normalize", image, nhwc), mean, std, nhwc)

    def resize_and_normalize(
        self,
        image: Tensor,
        size: tuple[int, int],
        mean: Statistic,
        std: Statistic,
        nhwc: bool = False,
        *,
        antialias: bool = False,
    ) -> Tensor:
        """`resize_bilinear` and `normalize` in one pass."""
        return resample_image(self._here(image), size, antialias=antialias, mean=mean, std=std, channels_last=nhwc)

    def extract_patches(self, image: Tensor, patch_size: int) -> Tensor:
        """Square patches, row by row, each as one vector.

        Args:
            image: ``[N, H, W, C]`` or ``[H, W, C]``.
            patch_size: P, which divides H and W.

        Returns:
            ``[N, H / P * W / P, P * P * C]``, without N for a single image: of a patch, first its upper row of pixels.
        """
        height, width = _sides("extract_patches", image, nhwc=True)
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"[extract_patches] patch_size is {patch_size}; it must be positive and divide the image's height and "
                f"width, {(height, width)}."
            )
        rows, columns = height // patch_size, width // patch_size
        *batch, _, _, channels = image.shape
        patches = self._here(image).reshape(*batch, rows, patch_size, columns, patch_size, channels)
        vectors = patches.transpose(-4, -3).to(torch.float32)
        return vectors.reshape(*batch, rows * columns, patch_size * patch_size * channels)

    def preprocess_qwen2vl(
        self,
        image: Tensor,
        max_pixels: int = 1024 * 1024,
        patch_size: int = 14,
        nhwc: bool = False,
        *,
        antialias: bool = False,
    ) -> Tensor:
        """`resize_bilinear` to whole patches of about the image's proportions, in all of at most `max_pixels`.

        Both sides are multiplied by ``sqrt(max_pixels / (H * W))`` if there are more pixels, and rounded down to a
        multiple of `patch_size`, at least one patch. This is the documented rule. Qwen2-VL's own processor differs: it
        rounds to multiples of two patches, has a least number of pixels too, and is bicubic.
        """
        if max_pixels < 1 or patch_size < 1:
            raise ValueError(
                f"[preprocess_qwen2vl] max_pixels is {max_pixels} and patch_size {patch_size}; both must be positive."
            )
        height, width = _sides("preprocess_qwen2vl", image, nhwc)
        pixels = max(height * width, 1)
        shrink = sqrt(max_pixels / pixels) if pixels > max_pixels else 1.0
        size = tuple(max(int(side * shrink) // patch_size, 1) * patch_size for side in (height, width))
        return self.resize_bilinear(image, size, nhwc, antialias=antialias)

    def _here(self, image: Tensor) -> Tensor:
        return image if self.device is None else image.to(self.device)


def preprocess_for_vit(
    images: list[Tensor] | Tensor,
    target_size: tuple[int, int] = (224, 224),
    mean: Statistic = _IMAGENET_MEAN,
    std: Statistic = _IMAGENET_STD,
    *,
    antialias: bool = False,
) -> Tensor:
    """Images as a ViT takes them: resized, uint8 divided by 255, then ``(image - mean) / std``.

    Args:
        images: a tensor ``[C, H, W]`` or ``[N, C, H, W]``; or a list of images, of any sizes, on one device. C is the
            length of `mean`. Where it is only the last size of an image, that is ``[H, W, C]``.
        target_size: ``(height, width)`` of all of them.
        mean, std: one number for each channel, of values from 0 to 1.
        antialias: as PIL and so the image processors of Transformers resize; else as ``interpolate`` does by default.

    Returns:
        float32 ``[N, C, height, width]`` on the device of the images; N is 1 for a single one.

    Raises:
        ValueError: shapes that do not fit; an empty list, of which no device is known.
        TypeError: a dtype other than uint8, float32, float16 and bfloat16.
    """

    def prepared(image: Tensor) -> Tensor:
        scale = 1 / _WHITE if image.dtype == torch.uint8 else 1.0
        planes = _channels_first(image, len(mean))
        return resample_image(planes, target_size, antialias=antialias, mean=mean, std=std, scale=scale)

    if isinstance(images, Tensor):
        batch = prepared(images)
        return batch if batch.dim() == 4 else batch.unsqueeze(0)
    if not images:
        raise ValueError("[preprocess_for_vit] images is an empty list; it must have at least one image.")
    for image in images:
        if image.dim() != 3:
            raise ValueError(
                f"[preprocess_for_vit] an image of the list has shape {tuple(image.shape)}; it must be [C, H, W] or "
                "[H, W, C]."
            )
    return torch.stack([prepared(image) for image in images])


def _channels_first(image: Tensor, channels: int) -> Tensor:
    if image.dim() not in (3, 4) or channels not in (image.shape[-3], image.shape[-1]):
        raise ValueError(
            f"[preprocess_for_vit] an image has shape {tuple(image.shape)}; it must be [..., C, H, W] or [..., H, W, "
            f"C] with C = {channels}, the length of mean."
        )
    return image if image.shape[-3] == channels else image.movedim(-1, -3)


def _side_dims(nhwc: bool) -> tuple[int, int]:
    return (-3, -2) if nhwc else (-2, -1)


def _sides(method: str, image: Tensor, nhwc: bool) -> tuple[int, int]:
    """Height and width."""
    if image.dim() not in (3, 4):
        layout = "H, W, C" if nhwc else "C, H, W"
        raise ValueError(
            f"[{method}] the image has shape {tuple(image.shape)}; it must be [{layout}] or [N, {layout}]."
        )
    height, width = (image.shape[dim] for dim in _side_dims(nhwc))
    return height, width
