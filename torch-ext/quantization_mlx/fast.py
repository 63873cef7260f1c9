"""What stands between the products of a model: ops with the names, arguments and results of ``mlx.core.fast``.

Tensors are float32, float16 or bfloat16, on any strides. Those of one call may differ in dtype, and the result has the
one that they promote to. Every value is computed in float32 and rounded once, where MLX rounds before it multiplies by
the weight, too. Gradients reach every tensor argument.

Every op raises ``ValueError`` for shapes and devices that do not fit, ``TypeError`` for dtypes, and on Apple GPUs
``NotImplementedError`` for more than 2**30 rows or elements of a row.
"""

from torch import Tensor

from ._ops import ops

__all__ = ["add_rms_norm", "layer_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight``, the mean along the last dimension.

    Args:
        x: ``[..., K]``.
        weight: ``[K]``; None for 1.
        eps: added to the mean, so that a vector of zeros stays one.
    """
    return ops.rms_norm(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias``, along the last dimension.

    Args:
        x: ``[..., K]``.
        weight: ``[K]``; None for 1.
        bias: ``[K]``; None for 0. Without a weight, its dtype does not widen the result, as in MLX.
        eps: added to the variance, which is that of all K values (not corrected by K - 1).
    """
    return ops.layer_norm(x, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``x + residual`` and its ``rms_norm``, in one pass; not in MLX.

    Args:
        x, residual: ``[..., K]`` of one shape.
        weight: as that of ``rms_norm``; its dtype must not widen the sum.
        eps: as that of ``rms_norm``.

    Returns:
        The sum, rounded to its dtype, and the norm of that.
    """
    return ops.add_rms_norm(x, residual, weight, eps)
