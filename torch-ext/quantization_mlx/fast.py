"""What stands between the products of a model: ops with the names, arguments and results of ``mlx.core.fast``.

Tensors are float32, float16 or bfloat16, on any strides. Those of one call may differ in dtype, and the result has the
one that they promote to. Every value is computed in float32 and rounded once, where MLX rounds before it multiplies by
the weight, too. Gradients reach every tensor argument.

Every op raises ``ValueError`` for shapes and devices that do not fit, ``TypeError`` for dtypes, and on Apple GPUs
``NotImplementedError`` for more than 2**30 rows or elements of a row.
"""

from torch import Tensor

from ._ops import ops

__all__ = ["add_rms_norm", "layer_norm", "rms_norm", "rope_into_cache", "scaled_dot_product_attention"]


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


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: str | Tensor | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """``softmax(scale * q @ k.T + mask) @ v`` for each head; scores and weights are float32.

    Adjacent heads of q share a head of k and v: Hq is a multiple of Hk, and k and v are not repeated for it. k and v
    may be parts of larger tensors, such as a cache with room for more positions, and any of the three may be
    transposed views: only where the elements of a head do not lie side by side is anything copied.

    Args:
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hk, Tk, D]``; D at most 576.
        v: ``[B, Hk, Tk, Dv]``; Dv at most 512.
        scale: of the scores, mostly ``D ** -0.5``.
        mask: None; ``"causal"``, by which query i sees keys up to ``Tk - Tq + i``, so that the last query is that of
            the last key; or what broadcasts to ``[B, Hq, Tq, Tk]``: of bool, True for the keys that a query sees, else
            added to the scores, of a dtype that promotes to the result's.
        sinks: ``[Hq]``, a score for each head that takes part in the softmax and has no value; of a dtype that promotes
            to the result's. As in gpt-oss.
        window: with ``"causal"``, a query sees the last so many keys up to its own. Not in MLX; as Transformers'
            ``sliding_window``.

    Returns:
        ``[B, Hq, Tq, Dv]``, contiguous. A query that sees no key has zeros, as in torch, where MLX has the mean of v
        for a mask of bool and NaN for -inf that are added.
    """
    is_name = isinstance(mask, str)
    if is_name and mask != "causal":
        raise ValueError(
            f'[scaled_dot_product_attention] mask is "{mask}"; it must be "causal", a tensor of bool or of what is '
            "added to the scores, or None."
        )
    return ops.scaled_dot_product_attention(
        q, k, v, scale=scale, mask=None if is_name else mask, causal=is_name, sinks=sinks, window=window
    )
