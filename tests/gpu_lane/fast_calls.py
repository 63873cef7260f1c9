"""Calls of what stands between products, the ops of quantization_mlx.fast, and of a whole decoder layer. Plain Python,
for machines with and without torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from calls import ITEM_BYTES, Call

Shaped = tuple[tuple[int, ...], str]  # a contiguous tensor: its shape and type


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies in its memory: strides in elements, and as many before its first one as `offset` says."""

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def size(self) -> int:
        """Elements of the memory."""
        return self.offset + 1 + sum((count - 1) * step for count, step in zip(self.shape, self.strides, strict=True))


def dense(shape: tuple[int, ...], dtype: str, offset: int = 0) -> Layout:
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Layout(shape, dtype, strides, offset)


@dataclass(frozen=True)
class FastCall:
    """A call of one op.

    tensors: its tensor arguments by the roles that plans give them. options: its other arguments by name.
    written: roles of tensors that are written and not read.
    """

    op: str
    tensors: tuple[tuple[str, Layout], ...]
    options: tuple[tuple[str, Any], ...] = ()
    written: tuple[str, ...] = ()

    @property
    def layouts(self) -> dict[str, Layout]:
        return dict(self.tensors)

    @property
    def keywords(self) -> dict[str, Any]:
        return dict(self.options)

    @property
    def dtype(self) -> str:
        return self.tensors[0][1].dtype

    @property
    def results(self) -> dict[str, Shaped]:
        """Shapes and types of what the kernels write, by role."""
        return RESULTS[self.op](self)

    @property
    def first_elements(self) -> dict[str, int]:
        return {role: layout.offset for role, layout in self.tensors if role not in self.written}

    @property
    def numbers(self) -> dict[str, bytes]:
        """Arguments of launches that are no tensors, by role."""
        both = (self.keywords.get(name, 0).to_bytes(8, "little", signed=True) for name in ("seed", "offset"))
        return {"numbers": b"".join(both)}

    @property
    def rotating(self) -> tuple[str, ...]:
        """What is not in the cache when a call is timed."""
        return tuple(role for role, _ in self.tensors if role not in self.written)

    @property
    def moved_bytes(self) -> int:
        """Of all tensors, each counted once."""
        read = sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for role, t in self.tensors if role not in self.written)
        return read + sum(math.prod(shape) * ITEM_BYTES[dtype] for shape, dtype in self.results.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        tensors = ", ".join(f"{role} {list(t.shape)}" for role, t in self.tensors)
        return f"{self.op}({tensors}, {self.keywords}) {self.dtype}"


def _attention_results(call: FastCall) -> dict[str, Shaped]:
    layouts = call.layouts
    return {"y": ((*layouts["queries"].shape[:3], layouts["values"].shape[3]), call.dtype)}


def _packed_attention_results(call: FastCall) -> dict[str, Shaped]:
    layouts = call.layouts
    dim = layouts["value_scales"].shape[3] * call.keywords["group_size"]
    return {"y": ((*layouts["queries"].shape[:3], dim), call.dtype)}


def _cache_results(call: FastCall) -> dict[str, Shaped]:
    batch, tokens, width = call.layouts["x"].shape
    _, key_heads, _, dim = call.layouts["keys"].shape
    y = (batch, width // dim - 2 * key_heads, tokens, dim)
    return {"y": (y, call.dtype), **{role: (call.layouts[role].shape, call.dtype) for role in ("keys", "values")}}


def _router_results(call: FastCall) -> dict[str, Shaped]:
    shape = (call.tensors[0][1].shape[0], call.keywords["k"])
    return {"experts": (shape, "int64"), "y": (shape, call.dtype)}


def _combine_results(call: FastCall) -> dict[str, Shaped]:
    tokens, _, length = call.tensors[0][1].shape
    return {"y": ((tokens, length), call.dtype)}


def _image_results(call: FastCall) -> dict[str, Shaped]:
    images, *others = call.layouts["x"].shape
    options = call.keywords
    size = (options["height"], options["width"])
    shape = (images, *size, others[2]) if options["channels_last"] else (images, others[0], *size)
    return {"y": (shape, "float32")}


def _as_first(*roles: str):
    return lambda call: {role: (call.tensors[0][1].shape, call.dtype) for role in roles}


RESULTS = {
    "rms_norm": _as_first("y"),
    "layer_norm": _as_first("y"),
    "add_rms_norm": _as_first("sum", "y"),
    "rope": _as_first("y"),
    "swiglu": _as_first("y"),
    "geglu": _as_first("y"),
    "rope_into_cache": _cache_results,
    "scaled_dot_product_attention": _attention_results,
    "sample": lambda call: {"y": (call.tensors[0][1].shape[:1], "int64")},
    "moe_router": _router_results,
    "moe_combine": _combine_results,
    "resample_image": _image_results,
    "quantized_scaled_dot_product_attention": _packed_attention_results,
}


# --- Calls of each op -------------------------------------------------------------------------------------------------
# before: elements of memory before the first one of each tensor.


def norm(
    op: str, rows: int, length: int, dtype: str = "float16", has_weight: bool = True, padding: int = 0, before: int = 0
) -> FastCall:
    """padding: elements between rows."""
    x = Layout((rows, length), dtype, (length + padding, 1), before)
    tensors = [("x", x)]
    tensors += [("residual", x)] if op == "add_rms_norm" else []
    tensors += [("weight", dense((length,), dtype, before))] if has_weight else []
    tensors += [("bias", dense((length,), dtype, before))] if op == "layer_norm" and has_weight else []
    return FastCall(op, tuple(tensors), (("eps", 1e-5),))


def gate(
    op: str, rows: int, length: int, dtype: str, step: int = 1, before: int = 0, experts: int = 0, **options: Any
) -> FastCall:
    """step: from one element to the next, 1 for the halves of a product and 2 for its even and odd columns. experts:
    that have biases; 0 for none.
    """
    strides = (2 * length, step)
    layout = Layout((rows, length), dtype, strides, before)
    tensors = [("gates", layout), ("values", layout)]
    if experts:
        tensors += [(role, Layout((experts, length), dtype, strides, before)) for role in ("bias", "value_bias")]
        tensors += [("experts", dense((rows,), "int64"))]
    return FastCall(op, tuple(tensors), tuple(options.items()))


def rope(
    heads: int,
    length: int,
    width: int,
    dims: int,
    dtype: str,
    traditional: bool = False,
    has_offsets: bool = False,
    has_freqs: bool = False,
    before: int = 0,
) -> FastCall:
    """x is a view of a joint product [batch, length, heads + 1, width]."""
    batch, row = 2, (heads + 1) * width
    x = Layout((batch, heads, length, width), dtype, (length * row, width, row, 1), before)
    tensors = [("x", x)]
    tensors += [("offsets", dense((batch,), "int32"))] if has_offsets else []
    tensors += [("freqs", dense((dims // 2,), "float32"))] if has_freqs else []
    options = {"dims": dims, "traditional": traditional, "base": None if has_freqs else 10000.0, "scale": 1.0}
    return FastCall("rope", tuple(tensors), (*options.items(), ("offset", 0 if has_offsets else 70000)))


def rope_into_cache(
    query_heads: int,
    key_heads: int,
    dim: int,
    rotated: int,
    tokens: int,
    dtype: str,
    has_all: bool = True,
    norms_all_heads: bool = False,
) -> FastCall:
    """has_all: bias and norms are given. norms_all_heads: together."""
    batch, position = 2, 3
    width = (query_heads + 2 * key_heads) * dim
    cache = dense((batch, key_heads, position + tokens + 2, dim), dtype)
    tensors = [("x", dense((batch, tokens, width), dtype))]
    if rotated:
        tensors += [(role, dense((batch, tokens, rotated), dtype)) for role in ("cosines", "sines")]
    tensors += [("keys", cache), ("values", cache)]
    if has_all:
        tensors += [("bias", dense((width,), dtype))]
        for role, heads in (("query_norm", query_heads), ("key_norm", key_heads)):
            tensors.append((role, dense((heads * dim if norms_all_heads else dim,), dtype)))
    return FastCall("rope_into_cache", tuple(tensors), (("position", position), ("eps", 1e-5)), ("keys", "values"))


def attention(
    keys: int,
    dim: int = 128,
    value_dim: int | None = None,
    queries: int = 1,
    key_heads: int = 8,
    group: int = 4,
    batch: int = 1,
    dtype: str = "float16",
    mask: str = "",
    has_sinks: bool = False,
    capacity: int | None = None,
    before: int = 0,
    window: int | None = None,
) -> FastCall:
    """mask: "", "causal", "bool" or "added". capacity: positions of the cache that keys and values are in."""
    value_dim, capacity, heads = value_dim or dim, capacity or keys, key_heads * group
    cached = [
        Layout((batch, key_heads, keys, d), dtype, (key_heads * capacity * d, capacity * d, d, 1), before)
        for d in (dim, value_dim)
    ]
    # Of a product [batch, queries, heads, dim].
    strides = (queries * heads * dim, dim, heads * dim, 1)
    q = Layout((batch, heads, queries, dim), dtype, strides, before)
    tensors = [("queries", q), ("keys", cached[0]), ("values", cached[1])]
    if mask in ("bool", "added"):
        tensors += [("mask", dense((batch, 1, queries, keys), "bool" if mask == "bool" else dtype))]
    tensors += [("sinks", dense((heads,), dtype))] if has_sinks else []
    options = (("scale", dim**-0.5), ("causal", mask == "causal"), ("window", window))
    return FastCall("scaled_dot_product_attention", tuple(tensors), options)


def sample(
    rows: int,
    vocabulary: int,
    dtype: str = "float16",
    previous: int = 0,
    has_seeds: bool = False,
    padding: int = 0,
    before: int = 0,
    **rules: Any,
) -> FastCall:
    """previous: tokens of each row. padding: elements between rows of logits."""
    tensors = [("x", Layout((rows, vocabulary), dtype, (vocabulary + padding, 1), before))]
    tensors += [("seeds", dense((rows,), "int64"))] if has_seeds else []
    tensors += [("previous", dense((rows, previous), "int64"))] if previous else []
    seed = {} if has_seeds else {"seed": -(3**39)}
    return FastCall("sample", tuple(tensors), (*rules.items(), *seed.items(), ("offset", 5 << 33)))


def router(
    tokens: int, experts: int, k: int, dtype: str = "float16", has_bias: bool = False, before: int = 0, **rules: Any
) -> FastCall:
    tensors = [("x", Layout((tokens, experts), dtype, (experts + before, 1), before))]
    tensors += [("bias", dense((experts,), "float32"))] if has_bias else []
    return FastCall("moe_router", tuple(tensors), (("k", k), *rules.items()))


def combine(
    tokens: int,
    k: int,
    length: int,
    dtype: str = "float16",
    has_residual: bool = True,
    is_wide: bool = False,
    before: int = 0,
    experts: int = 0,
) -> FastCall:
    """is_wide: weights are float32 whatever dtype is. experts: that have biases; 0 for none."""
    x = Layout((tokens, k, length), dtype, (k * (length + before), length + before, 1), before)
    tensors = [("x", x), ("weight", dense((tokens, k), "float32" if is_wide else dtype))]
    tensors += [("residual", Layout((tokens, length), dtype, (length + before, 1), before))] if has_residual else []
    if experts:
        tensors += [("bias", Layout((experts, length), dtype, (length + before, 1), before))]
        tensors += [("experts", dense((tokens, k), "int64"))]
    return FastCall("moe_combine", tuple(tensors))


def resample_image(
    old: tuple[int, int],
    new: tuple[int, int],
    channels: int,
    dtype: str,
    mode: str = "bilinear",
    antialias: bool = False,
    channels_last: bool = False,
    has_statistics: bool = False,
    before: int = 0,
) -> FastCall:
    """before: as many pixels lie between rows, too."""
    height, width = old
    row = width + before
    if channels_last:
        x = Layout((2, *old, channels), dtype, (height * row * channels, row * channels, channels, 1), before)
    else:
        x = Layout((2, channels, *old), dtype, (channels * height * row, height * row, row, 1), before)
    tensors = [("x", x)]
    tensors += [(role, dense((channels,), "float32")) for role in ("bias", "weight")] if has_statistics else []
    options = {"height": new[0], "width": new[1], "mode": mode, "antialias": antialias, "scale": 0.5}
    return FastCall("resample_image", tuple(tensors), (*options.items(), ("channels_last", channels_last)))


def packed_attention(call: FastCall, group_size: int, bits: int) -> FastCall:
    """The same attention to keys and values that are codes."""
    tensors = dict(call.tensors)
    for role, of_scales in (("keys", "key"), ("values", "value")):
        dense_heads = tensors[role]
        *others, dim = dense_heads.shape
        for name, size, dtype in (
            (role, dim * bits // 32, "uint32"),
            (f"{of_scales}_scales", dim // group_size, call.dtype),
            (f"{of_scales}_biases", dim // group_size, call.dtype),
        ):
            strides = tuple(stride // dim * size for stride in dense_heads.strides[:3])
            tensors[name] = Layout((*others, size), dtype, (*strides, 1), dense_heads.offset)
    options = (*call.options, ("group_size", group_size), ("bits", bits))
    return FastCall("quantized_scaled_dot_product_attention", tuple(tensors.items()), options)


# --- A decoder layer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCall:
    """One token through a decoder layer of Qwen3's kind and the norm behind it, with weights of 4 bits.

    context: the token's position in the cache, and one. cores: of the GPU that is planned for; 0 for the usual number.
    """

    context: int
    cores: int = 0
    hidden: int = 2560
    query_heads: int = 32
    key_heads: int = 8
    dim: int = 128
    intermediate: int = 9728
    dtype: str = "bfloat16"
    op: str = field(default="decoder_step", init=False)

    @cached_property
    def products(self) -> dict[str, Call]:
        """Of x with a quantized matrix, by name."""
        heads = (self.query_heads + 2 * self.key_heads) * self.dim
        sizes = {
            "qkv": (heads, self.hidden),
            "out": (self.hidden, self.query_heads * self.dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }
        return {name: Call(n=n, k=k, dtype=self.dtype) for name, (n, k) in sizes.items()}

    @property
    def cache(self) -> tuple[int, ...]:
        return (1, self.key_heads, self.context, self.dim)

    @property
    def dense_operands(self) -> dict[str, Shaped]:
        """What is read besides the matrices."""
        sizes = {"x": self.hidden, "first_norm": self.hidden, "second_norm": self.hidden, "last_norm": self.hidden}
        sizes |= dict.fromkeys(("query_norm", "key_norm", "cosines", "sines"), self.dim)
        vectors = {name: ((size,), self.dtype) for name, size in sizes.items()}
        return {**vectors, "keys": (self.cache, self.dtype), "values": (self.cache, self.dtype)}

    @property
    def results(self) -> dict[str, Shaped]:
        heads, hidden = self.query_heads * self.dim, self.hidden
        sizes = {"normal": hidden, "heads": self.products["qkv"].n, "queries": heads, "attended": heads}
        sizes |= {"attention_out": hidden, "middle": hidden, "middle_normal": hidden}
        sizes |= {"gated": self.intermediate, "mlp_out": hidden, "sum": hidden, "y": hidden}
        return {name: ((size,), self.dtype) for name, size in sizes.items()}

    @property
    def wiring(self) -> tuple[tuple[str, dict[str, str]], ...]:
        """The ops that run, and for each the tensors that its roles are."""
        return (
            ("rms_norm", {"x": "x", "weight": "first_norm", "y": "normal"}),
            ("decoder_step", self._product("qkv", "normal", "heads")),
            (
                "rope_into_cache",
                {"x": "heads", "y": "queries"}
                | {role: role for role in ("query_norm", "key_norm", "cosines", "sines", "keys", "values")},
            ),
            ("scaled_dot_product_attention", {"y": "attended"} | {r: r for r in ("queries", "keys", "values")}),
            ("decoder_step", self._product("out", "attended", "attention_out")),
            ("add_rms_norm", self._added("attention_out", "x", "second_norm", "middle", "middle_normal")),
            ("quantized_gated_matmul", self._product("gate_up", "middle_normal", "gated")),
            ("decoder_step", self._product("down", "gated", "mlp_out")),
            ("add_rms_norm", self._added("mlp_out", "middle", "last_norm", "sum", "y")),
        )

    @staticmethod
    def _product(name: str, x: str, y: str) -> dict[str, str]:
        return {"x": x, "y": y, **{role: f"{name}.{role}" for role in ("w", "scales", "biases")}}

    @staticmethod
    def _added(x: str, residual: str, weight: str, sum: str, y: str) -> dict[str, str]:
        return {"x": x, "residual": residual, "weight": weight, "sum": sum, "y": y}

    @property
    def first_elements(self) -> dict[str, int]:
        return {}

    @property
    def rotating(self) -> tuple[str, ...]:
        weights = (f"{name}.{role}" for name in self.products for role in ("w", "scales", "biases"))
        return (*weights, "keys", "values")

    @property
    def cache_bytes(self) -> int:
        return 2 * math.prod(self.cache) * ITEM_BYTES[self.dtype]

    @property
    def moved_bytes(self) -> int:
        """Of weights and of the cache, which the others are nothing beside."""
        return sum(product.weight_bytes for product in self.products.values()) + self.cache_bytes

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "op"}

    def __str__(self) -> str:
        return f"decoder layer, context {self.context}" + (f", {self.cores} cores" if self.cores else "")


AnyCall = Call | FastCall | LayerCall


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def from_dict(data: dict[str, Any]) -> AnyCall:
    """The call whose as_dict() this is, as JSON keeps it."""
    if "context" in data:
        return LayerCall(**data)
    if "tensors" not in data:
        return Call(**data)
    data = {name: _tuples(value) for name, value in data.items()}
    tensors = tuple((role, Layout(**{k: _tuples(v) for k, v in layout.items()})) for role, layout in data["tensors"])
    return FastCall(**{**data, "tensors": tensors})
