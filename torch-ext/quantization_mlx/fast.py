"""What stands between the products of a model: ops with the names, arguments and results of ``mlx.core.fast``.

Tensors are float32, float16 or bfloat16, on any strides. Those of one call may differ in dtype, and the result has the
one that they promote to. Every value is computed in float32 and rounded once, where MLX rounds before it multiplies by
a norm's weight, too. Gradients reach every tensor argument, except for those of ``rope`` besides x.

Every op raises ``ValueError`` for shapes and devices that do not fit, ``TypeError`` for dtypes, and on Apple GPUs
``NotImplementedError`` for more than 2**30 rows or elements of a row.
"""

from torch import Tensor

from ._ops import ops

__all__ = ["add_rms_norm", "geglu", "layer_norm", "rms_norm", "rope", "rope_into_cache", "swiglu"]


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


def rope_into_cache(
    x: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: int,
    *,
    bias: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """What stands between the product that gives queries, keys and values and ``scaled_dot_product_attention``.

    To `x` the bias is added; each head of queries and keys is normalised, as by ``rms_norm``, and rotated; keys and
    values are written into their caches, `position` to ``position + T - 1``. All of that is float32, rounded once.
    Tensors have one dtype. There are no gradients.

    Args:
        x: ``[B, T, (Hq + 2 * Hk) * D]``, the heads of queries, of keys and of values, D even.
        cosines, sines: ``[1 or B, T, R]`` of the angles of every token, R even and at most D: as Transformers' rotary
            embeddings give them. Element i and ``i + R / 2`` of a head are rotated together, and those behind R not at
            all. None for heads that are not rotated.
        keys, values: ``[B, Hk, capacity, D]``, contiguous; changed.
        position: of the first token in the caches; ``position + T <= capacity``.
        bias: ``[(Hq + 2 * Hk) * D]``.
        query_norm, key_norm: ``[D]``, the weights of these norms.
        eps: of these norms.

    Returns:
        The queries ``[B, Hq, T, D]``.
    """
    return ops.rope_into_cache(
        x,
        cosines,
        sines,
        keys,
        values,
        position,
        bias=bias,
        query_norm=query_norm,
        key_norm=key_norm,
        eps=eps,
    )


def rope(
    x: Tensor,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | Tensor,
    freqs: Tensor | None = None,
) -> Tensor:
    """Rotary position embedding (Su et al., arXiv:2104.09864): pairs of elements turned by angles that grow with their
    position.

    With t the index along T, pair i of the first dims elements turns by ``(offset + t) * scale`` times
    ``base**(-2 * i / dims)`` or ``1 / freqs[i]``, in radians: ``(a, b)`` becomes
    ``(a * cos - b * sin, a * sin + b * cos)``. The other elements are copied.

    Sines and cosines are within 2e-7 of the exact ones at positions of up to 2**24, and up to 2**31 on CPU and within
    2e-5 on Apple GPUs; MLX, which multiplies in float32, is off by about 1e-7 times the angle.

    Args:
        x: ``[B, ..., T, D]``, at least three dimensions. Only elements that are not adjacent, and dimensions between B
            and T without a common stride, are copied first: the heads of a joint product are read where they are.
        dims: how many elements of each vector turn; even, at most D.
        traditional: whether pairs are neighbours, ``(x[2 * i], x[2 * i + 1])``, or ``(x[i], x[dims / 2 + i])``.
        base: of the frequencies, positive; None with freqs.
        scale: of the positions.
        offset: the first position, or a tensor of integers, a scalar or ``[B]``, which stays on its device.
        freqs: ``[dims / 2]``, what positions are divided by; infinity leaves a pair as it is.

    Raises:
        NotImplementedError: freqs require a gradient; on Apple GPUs, dims are above 8192 with base.
    """
    first, offsets = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    return ops.rope(x, dims, traditional, base, scale, first, offsets, freqs)


def swiglu(
    gates: Tensor, values: Tensor, *, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0
) -> Tensor:
    """``gates * sigmoid(alpha * gates) * (values + offset)`` (Shazeer, arXiv:2002.05202); not in MLX.

    The defaults are SiLU's; gpt-oss has alpha 1.702, limit 7 and offset 1.

    Args:
        gates, values: of one shape, on any strides: parts of one product's result, its halves or its even and odd
            columns, are read where they are.
        alpha: what gates are multiplied by within the sigmoid.
        limit: the most that gates may be, and values of either sign; beyond it their gradient is zero. None for none.
        offset: added to values.
    """
    return ops.swiglu(gates, values, alpha, limit, offset)


def geglu(gates: Tensor, values: Tensor, *, approximate: str = "tanh") -> Tensor:
    """``gelu(gates) * values`` (Shazeer, arXiv:2002.05202); not in MLX.

    Args:
        gates, values: as those of ``swiglu``.
        approximate: of GELU (Hendrycks and Gimpel, arXiv:1606.08415), "tanh" or, for the normal distribution itself,
            "none", as in ``torch.nn.functional.gelu``.
    """
    return ops.geglu(gates, values, approximate)
