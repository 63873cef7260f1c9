"""What stands between the products of a model: ops with the names, arguments and results of ``mlx.core.fast``.

Tensors are float32, float16 or bfloat16, on any strides. Those of one call may differ in dtype, and the result has the
one that they promote to. Every value is computed in float32 and rounded once, where MLX rounds before it multiplies by
a norm's weight, too. Gradients reach every tensor argument, except where an op says that it has none.

Every op raises ``ValueError`` for shapes and devices that do not fit, ``TypeError`` for dtypes, and on Apple GPUs
``NotImplementedError`` for more than 2**30 rows or elements of a row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import ops
from .metal_kernel import metal_kernel as metal_kernel

__all__ = [
    *("add_rms_norm", "geglu", "layer_norm", "metal_kernel", "moe_combine", "moe_router", "resample_image", "rms_norm"),
    *("quantized_gated_matmul", "quantized_scaled_dot_product_attention", "rope", "rope_into_cache", "sample"),
    *("scaled_dot_product_attention", "swiglu"),
]


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


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    x_weight: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``scale * x + residual`` and its ``rms_norm``, in one pass; not in MLX.

    Args:
        x, residual: ``[..., K]`` of one shape.
        weight: as that of ``rms_norm``; its dtype must not widen the sum.
        eps: as that of ``rms_norm``.
        x_weight: ``[K]``: with it, ``rms_norm(x, x_weight, eps)`` takes the place of x, as behind the attention and the
            MLP of Gemma 2 and 3.
        scale: of x beside residual, as Granite has it.

    Returns:
        The sum, rounded to its dtype, and the norm of that.
    """
    return ops.add_rms_norm(x, residual, weight, eps, x_weight=x_weight, scale=scale)


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
        keys, values: ``[B, Hk, capacity, D]``, contiguous, of memory of their own; changed.
        position: of the first token in the caches; ``position + T <= capacity``.
        bias: ``[(Hq + 2 * Hk) * D]``.
        query_norm, key_norm: the weights of these norms, ``[D]``; or ``[Hq * D]`` and ``[Hk * D]``, with which all
            heads of queries, or of keys, are normalised together, as in OLMo 2.
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


def sample(
    logits: Tensor,
    seed: int | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    previous: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """A token drawn for every row of logits; not in MLX. The same one on every device.

    The steps are those of Transformers' generation, in this order: the penalty, the temperature, ``top_k``, ``top_p``
    among what that leaves, ``min_p``, and the draw from what remains. Tokens whose logits equal that of the last one
    kept are kept, too.

    Args:
        logits: ``[..., V]``; of -infinity for tokens that are not to be drawn.
        seed: an int of 64 bits, or an int64 tensor on the device of ``logits``, which the host does not read: a scalar,
            or one for each row, ``[...]``. A row with a seed of its own has the same token in any batch; else rows are
            independent of one another.
        temperature: what logits are divided by; 0 for the most probable token, of several the first.
        top_k: how many of the most probable tokens to keep; 0 for all.
        top_p: keeps the most probable tokens up to the one with which their probabilities reach this sum.
        min_p: keeps tokens that are at least this many times as probable as the most probable one.
        repetition_penalty: what the logits of ``previous`` tokens are divided by where they are positive and multiplied
            by where they are not.
        previous: int64 ``[..., P]``, in any order, as often as may be; negative ones are padding.
        offset: which draw of this seed, such as the number of tokens before this one.

    Returns:
        int64 ``[...]``. It has no gradient.

    A row with NaN or infinity, or of -infinity alone, has no distribution: ``ValueError`` on CPU, and on an Apple GPU
    the token -1. The same holds where a previous token is not below V, which on CPU is an ``IndexError``.

    Probabilities are integers in units of 2**-30 of the greatest one, so that less probable tokens are never drawn.
    Their sum times a random number ``u`` is the place, in the order of tokens, of the one that is drawn. ``u`` is the
    first 64 bits of Philox-4x32-10 (Salmon et al., 2011) for the key ``seed`` and the counter ``(offset, row)``, the
    row being 0 where it has a seed of its own.

    >>> from quantization_mlx import fast
    >>> logits = torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, 3.0]])
    >>> fast.sample(logits, 0, temperature=0.0)
    tensor([2, 2])
    """
    seeds = seed if isinstance(seed, Tensor) else None
    number = 0 if isinstance(seed, Tensor) else seed
    return ops.sample(logits, seeds, number, offset, temperature, top_k, top_p, min_p, repetition_penalty, previous)


def moe_router(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    groups_used: int = 1,
    normalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The experts of every token in a mixture, and their weights, in one pass; not in MLX.

    ============================  =======================================================================
    Mixtral                       ``moe_router(logits, k, normalise=True)``
    Qwen3-MoE                     ``moe_router(logits, k, normalise=norm_topk_prob)``
    gpt-oss                       ``moe_router(logits, k, scoring="softmax_of_selected")``
    DeepSeek-V3, GLM-4.7          ``moe_router(logits, k, scoring="sigmoid", bias=e_score_correction_bias,
                                  groups=n_group, groups_used=topk_group, normalise=norm_topk_prob,
                                  scale=routed_scaling_factor)``
    Llama 4                       ``moe_router(logits, k, scoring="sigmoid")``
    ============================  =======================================================================

    Args:
        logits: ``[..., E]``, of up to 512 experts, with the bias of the router's own product, if it has one.
        k: experts of a token, up to 32.
        scoring: how logits become scores: "softmax" of all, "sigmoid", or "softmax_of_selected", the k chosen ones.
        bias: ``[E]``, added to scores for choosing alone (in "softmax_of_selected", to logits).
        groups: of experts, of equal size, side by side; up to 32. A group's score is the sum of its two best.
        groups_used: of so many best groups the experts are chosen.
        normalise: divides the weights of a token by their sum, to which 1e-20 is added.
        scale: what weights are multiplied by in the end.

    Returns:
        Indices, int64 ``[..., k]``, by descending score, of equal ones the lower index first (NaN is above all), and
        weights ``[..., k]``, of the dtype of `logits`. Gradients go from the weights to `logits` alone.
    """
    return ops.moe_router(logits, k, scoring, bias, groups, groups_used, normalise, scale)


def moe_combine(
    y: Tensor,
    weights: Tensor,
    *,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
) -> Tensor:
    """``(weights[..., None] * (y + bias[experts])).sum(-2) + residual``, in float32 and rounded once; not in MLX.

    Args:
        y: ``[..., k, H]``, what the k experts of a token give.
        weights: ``[..., k]``; their dtype does not widen the result.
        residual: ``[..., H]``, such as the result of a shared expert; None for 0.
        bias: ``[E, H]``, what each expert adds to what it gives, of a dtype that promotes to the result's; None for 0.
        experts: with bias, int64 ``[..., k]``, as `moe_router` has them. One that does not exist is an ``IndexError``
            on CPU and gives NaN on an Apple GPU.
    """
    return ops.moe_combine(y, weights, residual, bias, experts)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: str | Tensor | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
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
        softcap: scores become ``softcap * tanh(score / softcap)``, before the mask. Not in MLX; as in Gemma 2.

    Returns:
        ``[B, Hq, Tq, Dv]``, contiguous. A query that sees no key has zeros, as in torch, where MLX has the mean of v
        for a mask of bool and NaN for -inf that are added.
    """
    masked = _masked("scaled_dot_product_attention", mask)
    return ops.scaled_dot_product_attention(q, k, v, scale=scale, **masked, sinks=sinks, window=window, softcap=softcap)


def _masked(op: str, mask: str | Tensor | None) -> dict[str, Any]:
    """The two options of attention ops that a mask stands for."""
    if not isinstance(mask, str):
        return {"mask": mask, "causal": False}
    if mask != "causal":
        raise ValueError(
            f'[{op}] mask is "{mask}"; it must be "causal", a tensor of bool or of what is added to the scores, or '
            "None."
        )
    return {"mask": None, "causal": True}


def quantized_scaled_dot_product_attention(
    q: Tensor,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    mask: str | Tensor | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    group_size: int = 64,
    bits: int = 8,
) -> Tensor:
    """``scaled_dot_product_attention`` to keys and values that ``quantize`` has packed in the affine format.

    What mlx_lm's function of this name makes of three ops, in one: a code becomes a number on its way into the product,
    so that a cache is read once, in its packed form. Scores and weights are float32, where mlx_lm rounds them to the
    dtype of q. Prompts on Apple GPUs round the numbers to the dtype of the result first, all others do not.

    Args:
        q: ``[B, Hq, Tq, D]``.
        k: packed words ``[B, Hk, Tk, D * bits / 32]``, uint32 or int32, with scales and biases
            ``[B, Hk, Tk, D / group_size]``; D at most 576.
        v: likewise, of Dv at most 512 elements. Only where the words of a head, or its scales, do not lie side by side
            is anything copied.
        scale, mask, sinks, window: as those of ``scaled_dot_product_attention``; mlx_lm has no sinks and no window.
        group_size: 32, 64 or 128 elements of a head, which must divide D and Dv.
        bits: 4 or 8.

    Returns:
        ``[B, Hq, Tq, Dv]``, contiguous, of the dtype that those of q, scales and biases promote to. A query that sees
        no key has zeros.

    With gradients, which reach q, scales, biases, mask and sinks, keys and values are dequantized first.
    """
    options = _masked("quantized_scaled_dot_product_attention", mask)
    return ops.quantized_scaled_dot_product_attention(
        q, *k, *v, scale=scale, **options, sinks=sinks, window=window, group_size=group_size, bits=bits
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
    gates: Tensor,
    values: Tensor,
    *,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    experts: Tensor | None = None,
) -> Tensor:
    """``gates * sigmoid(alpha * gates) * (values + offset)`` (Shazeer, arXiv:2002.05202); not in MLX.

    The defaults are SiLU's; gpt-oss has alpha 1.702, limit 7 and offset 1.

    Args:
        gates, values: of one shape, on any strides: parts of one product's result, its halves or its even and odd
            columns, are read where they are.
        alpha: what gates are multiplied by within the sigmoid.
        limit: the most that gates may be, and values of either sign; beyond it their gradient is zero. None for none.
        offset: added to values.
        gate_bias, value_bias: ``[E, N]``, N the last size of gates: what experts add to gates and to values before all
            that, of a dtype that promotes to the result's, on any strides. None for 0.
        experts: with these, int64 of the leading sizes of gates: of which expert each row is. One that does not exist
            is an ``IndexError`` on CPU and gives NaN on an Apple GPU.
    """
    return ops.swiglu(gates, values, alpha, limit, offset, gate_bias, value_bias, experts)


def geglu(gates: Tensor, values: Tensor, *, approximate: str = "tanh") -> Tensor:
    """``gelu(gates) * values`` (Shazeer, arXiv:2002.05202); not in MLX.

    Args:
        gates, values: as those of ``swiglu``.
        approximate: of GELU (Hendrycks and Gimpel, arXiv:1606.08415), "tanh" or, for the normal distribution itself,
            "none", as in ``torch.nn.functional.gelu``.
    """
    return ops.geglu(gates, values, approximate)


def quantized_gated_matmul(
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    activation: str = "silu",
    global_scale: Tensor | None = None,
) -> Tensor:
    """``activation(gates) * values`` of the halves of ``quantized_matmul(x, w, ...)``: a gated MLP's first half, in one
    launch for few rows of ``x`` on an Apple GPU; not in MLX.

    Args:
        x: ``[..., M, K]`` or ``[K]``.
        w: ``[..., 2 * N, K * bits / 32]``, the rows of gates before those of values. Leading sizes as in
            ``quantized_matmul``.
        scales, biases: ``[..., 2 * N, K / group_size]``.
        group_size, bits, mode: the format; see the table of ``quantization_mlx.ops``. Not the marlin modes.
        activation: "silu", "gelu" (the normal distribution itself) or "gelu_tanh".
        global_scale: nvfp4 only, the float32 tensor that ``quantize`` was given.

    Returns:
        ``[..., M, N]`` or ``[N]``, of the dtype of ``quantized_matmul``. Gradients reach ``x`` and affine ``scales``
        and ``biases``.
    """
    return ops.quantized_gated_matmul(
        x, w, scales, biases, group_size, bits, mode, activation, global_scale=global_scale
    )


def resample_image(
    x: Tensor,
    size: tuple[int, int],
    *,
    mode: str = "bilinear",
    antialias: bool = False,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    scale: float = 1.0,
    channels_last: bool = False,
) -> Tensor:
    """Images of another size, normalised, in one pass: ``(resized(x) * scale - mean) / std``; not in MLX.

    Resized as by ``torch.nn.functional.interpolate`` with ``align_corners=False``: the centres of pixels lie half a
    pixel from their borders, and the size of x itself changes nothing. Nothing is clipped or rounded. There are no
    gradients.

    Args:
        x: ``[C, H, W]`` or ``[N, C, H, W]``, uint8, float32, float16 or bfloat16; N and C may be 0.
        size: height and width of the result, as those of x from 1 to 32000.
        mode: "bilinear", or "bicubic" with the coefficient -0.75, which is -0.5 with `antialias`, both as in torch.
        antialias: a smaller image is made of all pixels of x, as PIL makes it; and the filter ends at the border of x,
            where without it the border's pixels go on.
        mean, std: one number for each channel, a sequence or a tensor ``[C]``; None for 0 and 1.
        scale: of the values of x, ``1 / 255`` for those of uint8 from 0 to 1.
        channels_last: x is ``[H, W, C]`` or ``[N, H, W, C]``, and so is the result.

    Returns:
        float32, contiguous.
    """
    if len(size) != 2:
        raise ValueError(f"[resample_image] size is {tuple(size)}; it must be a height and a width.")
    mean, std = (_of_channels(x, each) for each in (mean, std))
    return ops.resample_image(x, *size, mode, antialias, mean, std, scale, channels_last)


def _of_channels(x: Tensor, given: Sequence[float] | Tensor | None) -> Tensor | None:
    if given is None or isinstance(given, Tensor):
        return given
    return torch.tensor(tuple(given), dtype=torch.float32, device=x.device)
