"""Kernels as users write them for MLX: the body, what it is given, and what torch makes of the same.

Grids are whole threadgroups, so that a launch in threads and one in threadgroups are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Kernel:
    """inputs, outputs: by name; tensors or scalars, and like what a result is. grid: in threads.

    expected: from the inputs, in order, the results, in order; exact ones where tolerance is 0.
    """

    source: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Tensor]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    expected: Callable[..., Tensor | Sequence[Tensor]]
    tolerance: float = 0
    header: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)
    definition: Mapping[str, bool] = field(default_factory=dict)  # further options of metal_kernel
    init_value: float | None = None

    def references(self) -> list[Tensor]:
        results = self.expected(*self.inputs.values())
        return [results] if isinstance(results, Tensor) else list(results)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


ATOMIC = {"atomic_outputs": True}
STRIDED = {"ensure_row_contiguous": False}
HALF, BFLOAT, INT, UINT, LONG, BOOL = (
    *(torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.int64, torch.bool),
)

# --- One thread for an element ---------------------------------------------------------------------------------------

KERNELS: dict[str, Kernel] = {}
KERNELS["exponential"] = Kernel(
    source="uint i = thread_position_in_grid.x; out[i] = T(metal::exp(float(x[i])));",
    inputs={"x": random(4, 16, dtype=BFLOAT)},
    outputs={"out": empty(4, 16, dtype=BFLOAT)},
    grid=(64, 1, 1),
    threadgroup=(32, 1, 1),
    template={"T": BFLOAT},
    expected=lambda x: x.float().exp().to(BFLOAT),
    tolerance=1e-2,
)
KERNELS["transposed input"] = Kernel(
    source="""
        uint i = thread_position_in_grid.x;
        out[i] = 2 * x[elem_to_loc(i, x_shape, x_strides, x_ndim)];
    """,
    inputs={"x": random(4, 6, 5)[1:, ::2].transpose(0, 2)},
    outputs={"out": empty(5, 3, 3)},
    grid=(45, 1, 1),
    threadgroup=(15, 1, 1),
    definition=STRIDED,
    expected=lambda x: 2 * x,
)
KERNELS["positions of three axes"] = Kernel(
    source="""
        uint3 at = thread_position_in_grid;
        size_t row = at.y + size_t(threads_per_grid.y) * at.z;
        out[row * threads_per_grid.x + at.x] = x[elem_to_loc(at, x_shape, x_strides, x_ndim)];
    """,
    inputs={"x": random(2, 3, 5, 8).permute(3, 0, 2, 1)},
    outputs={"out": empty(8, 2, 5, 3)},
    grid=(3, 5, 16),
    threadgroup=(3, 1, 8),
    definition=STRIDED,
    expected=lambda x: x,
)
KERNELS["broadcast rows and columns"] = Kernel(
    source="""
        uint2 at = thread_position_in_grid.xy;
        float left = column[at.y * column_strides[0]], right = row[at.x * row_strides[1]];
        out[at.y * threads_per_grid.x + at.x] = left * right;
    """,
    inputs={"column": random(12, 1).expand(12, 20), "row": random(1, 20, seed=8).expand(12, 20)},
    outputs={"out": empty(12, 20)},
    grid=(20, 12, 1),
    threadgroup=(10, 4, 1),
    definition=STRIDED,
    expected=lambda column, row: column * row,
)
KERNELS["scalars, a header and numbers"] = Kernel(
    header="template <typename T> T squared(T x) { return x * x; }",
    source="""
        uint i = thread_position_in_grid.x;
        float y = scale * squared(x[i]) + shift + N;
        out[i] = (Negative && flag) ? -y : y;
    """,
    inputs={"x": random(40), "scale": 0.5, "shift": -2, "flag": True},
    outputs={"out": empty(40)},
    grid=(40, 1, 1),
    threadgroup=(8, 1, 1),
    template={"N": 3, "Negative": True},
    expected=lambda x, scale, shift, flag: -(scale * x * x + shift + 3),
    tolerance=1e-6,
)
KERNELS["outputs of other dtypes"] = Kernel(
    source="""
        uint i = thread_position_in_grid.x;
        whole[i] = int64_t(x[i]) << 33;
        is_negative[i] = x[i] < 0;
        bits[i] = as_type<uint>(x[i]);
    """,
    inputs={"x": 10 * random(33)},
    outputs={"whole": empty(33, dtype=LONG), "is_negative": empty(3, 11, dtype=BOOL), "bits": empty(33, dtype=UINT)},
    grid=(33, 1, 1),
    threadgroup=(11, 1, 1),
    expected=lambda x: (x.trunc().long() * 2**33, (x < 0).reshape(3, 11), x.view(UINT)),
)
KERNELS["vectors of four"] = Kernel(
    source="""
        uint i = thread_position_in_grid.x;
        float4 a = reinterpret_cast<const device float4*>(x)[i], b = reinterpret_cast<const device float4*>(y)[i];
        reinterpret_cast<device float4*>(out)[i] = fma(a, b, float4(alpha[0]));
    """,
    inputs={"x": random(256), "y": random(256, seed=8), "alpha": torch.tensor([0.25])},
    outputs={"out": empty(256)},
    grid=(64, 1, 1),
    threadgroup=(64, 1, 1),
    expected=lambda x, y, alpha: x * y + alpha,
    tolerance=1e-6,
)
KERNELS["gated activation"] = Kernel(
    header="inline float silu(float x) { return x / (1.0f + metal::exp(-x)); }",
    source="""
        uint2 at = thread_position_in_grid.xy;
        uint half_width = threads_per_grid.x, row = 2 * at.y * half_width;
        float gate = x[row + at.x], value = x[row + half_width + at.x];
        out[at.y * half_width + at.x] = T(silu(gate) * value);
    """,
    inputs={"x": random(6, 32, dtype=HALF)},
    outputs={"out": empty(6, 16, dtype=HALF)},
    grid=(16, 6, 1),
    threadgroup=(16, 2, 1),
    template={"T": HALF},
    expected=lambda x: (functional.silu(x[:, :16].float()) * x[:, 16:].float()).half(),
    tolerance=2e-3,
)
KERNELS["rows by index"] = Kernel(
    source="""
        uint column = thread_position_in_grid.x, row = thread_position_in_grid.y;
        int64_t from = indices[row];
        from += from < 0 ? table_shape[0] : 0;
        out[row * table_shape[1] + column] = table[from * table_shape[1] + column];
    """,
    inputs={"table": random(9, 24), "indices": torch.tensor([3, -1, 0, 8, 3, 5, -9, 2])},
    outputs={"out": empty(8, 24)},
    grid=(24, 8, 1),
    threadgroup=(24, 1, 1),
    expected=lambda table, indices: table[indices],
)


def _rotated(x: Tensor, offset: int) -> Tensor:
    length, half_width = x.shape[-2], x.shape[-1] // 2
    angles = (torch.arange(length) + offset)[:, None] * 100.0 ** (-torch.arange(half_width) / half_width)
    first, second = x[..., :half_width], x[..., half_width:]
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


KERNELS["rotary embedding"] = Kernel(
    source="""
        uint3 at = thread_position_in_grid;
        uint half_width = threads_per_grid.x;
        float angle = (at.y + offset) * metal::precise::pow(100.0f, -float(at.x) / half_width);
        float c = metal::precise::cos(angle), s = metal::precise::sin(angle);
        size_t i = (at.z * threads_per_grid.y + at.y) * 2 * half_width + at.x;
        float first = x[i], second = x[i + half_width];
        out[i] = first * c - second * s;
        out[i + half_width] = first * s + second * c;
    """,
    inputs={"x": random(3, 5, 16), "offset": 11},
    outputs={"out": empty(3, 5, 16)},
    grid=(8, 5, 3),
    threadgroup=(8, 5, 1),
    expected=_rotated,
    tolerance=1e-4,
)


def _unpacked(words: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    codes = words.view(INT).long()[..., None] >> (4 * torch.arange(8)) & 15
    codes = codes.reshape(len(words), -1, 32)
    return (codes * scales[..., None] + biases[..., None]).reshape(len(words), -1)


KERNELS["4-bit weights"] = Kernel(
    source="""
        constexpr uint per_word = 32 / Bits;
        uint word = thread_position_in_grid.x, group = word * per_word / Group;
        for (uint k = 0; k < per_word; ++k) {
          uint code = (words[word] >> (k * Bits)) & ((1u << Bits) - 1);
          out[word * per_word + k] = fma(float(code), scales[group], biases[group]);
        }
    """,
    inputs={
        "words": integers(2**31, 3, 8).view(UINT),
        "scales": random(3, 2),
        "biases": random(3, 2, seed=8),
    },
    outputs={"out": empty(3, 64)},
    grid=(24, 1, 1),
    threadgroup=(8, 1, 1),
    template={"Bits": 4, "Group": 32},
    expected=_unpacked,
    tolerance=1e-6,
)


def _hashed(start: int) -> tuple[Tensor, Tensor]:
    state = (torch.arange(64) + start) * 747796405 + 2891336453 & 0xFFFFFFFF
    word = (state >> ((state >> 28) + 4) ^ state) * 277803737 & 0xFFFFFFFF
    word = word >> 22 ^ word
    return word.to(UINT), (word >> 8).float() / 2**24


KERNELS["random numbers from a counter"] = Kernel(
    header="""
        uint hashed(uint counter) {
          uint state = counter * 747796405u + 2891336453u;
          uint word = ((state >> ((state >> 28) + 4u)) ^ state) * 277803737u;
          return (word >> 22) ^ word;
        }
    """,
    source="""
        uint i = thread_position_in_grid.x;
        uint word = hashed(i + start);
        bits[i] = word;
        uniform_[i] = float(word >> 8) * 0x1p-24f;
    """,
    inputs={"start": 12345},
    outputs={"bits": empty(64, dtype=UINT), "uniform_": empty(64)},
    grid=(64, 1, 1),
    threadgroup=(64, 1, 1),
    expected=_hashed,
)


def _steps_to_leave(most: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(12.0) / 6 - 1, torch.arange(16.0) / 6 - 2, indexing="ij")
    c, z, steps = torch.complex(x.double(), y.double()), torch.zeros(12, 16, dtype=torch.cdouble), torch.zeros(12, 16)
    for _ in range(most):
        inside = z.abs() <= 2
        z = torch.where(inside, z * z + c, z)
        steps += inside
    return steps.to(INT)


KERNELS["loops of different lengths"] = Kernel(
    source="""
        uint2 at = thread_position_in_grid.xy;
        float2 c = float2(at) / 6.0f - float2(2, 1), z = 0;
        int steps = 0;
        while (steps < most && dot(z, z) <= 4) {
          z = float2(z.x * z.x - z.y * z.y, 2 * z.x * z.y) + c;
          ++steps;
        }
        out[at.y * threads_per_grid.x + at.x] = steps;
    """,
    inputs={"most": 20},
    outputs={"out": empty(12, 16, dtype=INT)},
    grid=(16, 12, 1),
    threadgroup=(8, 4, 1),
    expected=_steps_to_leave,
)
KERNELS["bilinear samples of a grid"] = Kernel(
    header="""
        template <typename T>
        float pixel(const device T* plane, int2 at, int2 size) {
          bool inside = all(at >= 0) && all(at < size);
          return inside ? float(plane[at.y * size.x + at.x]) : 0.0f;
        }
    """,
    source="""
        uint point = thread_position_in_grid.x, plane = thread_position_in_grid.y;
        int2 size = int2(image_shape[2], image_shape[1]);
        float2 place = (float2(points[2 * point], points[2 * point + 1]) + 1) * float2(size) / 2 - 0.5f;
        float2 first = floor(place), part = place - first;
        const device float* pixels = image + plane * size.x * size.y;
        int2 at = int2(first);
        float upper = mix(pixel(pixels, at, size), pixel(pixels, at + int2(1, 0), size), part.x);
        float lower = mix(pixel(pixels, at + int2(0, 1), size), pixel(pixels, at + 1, size), part.x);
        out[plane * threads_per_grid.x + point] = mix(upper, lower, part.y);
    """,
    inputs={"image": random(3, 9, 7), "points": random(20, 2, seed=8) * 0.7},
    outputs={"out": empty(3, 20)},
    grid=(20, 3, 1),
    threadgroup=(20, 1, 1),
    expected=lambda image, points: functional.grid_sample(image[None], points[None, None], align_corners=False)[
        0, :, 0
    ],
    tolerance=1e-5,
)

# --- Threads of a simdgroup ------------------------------------------------------------------------------------------

KERNELS["sums of rows"] = Kernel(
    source="""
        uint row = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
        float sum = 0;
        for (int k = thread_index_in_simdgroup; k < x_shape[1]; k += threads_per_simdgroup) {
          sum += x[row * x_shape[1] + k];
        }
        sum = simd_sum(sum);
        if (thread_index_in_simdgroup == 0) out[row] = sum;
    """,
    inputs={"x": random(4, 70)},
    outputs={"out": empty(4)},
    grid=(128, 1, 1),
    threadgroup=(64, 1, 1),
    expected=lambda x: x.double().sum(1).float(),
    tolerance=1e-5,
)
KERNELS["largest and where"] = Kernel(
    source="""
        uint row = thread_position_in_grid.y, lane = thread_index_in_simdgroup;
        float most = -INFINITY;
        uint where = 0xFFFFFFFF;
        for (uint k = lane; k < Width; k += 32) {
          float value = x[row * Width + k];
          where = value > most ? k : where;
          most = max(most, value);
        }
        float of_all = simd_max(most);
        where = simd_min(most == of_all ? where : 0xFFFFFFFFu);
        if (lane == 0) {
          values[row] = of_all;
          places[row] = where;
        }
    """,
    inputs={"x": random(5, 75)},
    outputs={"values": empty(5), "places": empty(5, dtype=INT)},
    grid=(32, 5, 1),
    threadgroup=(32, 1, 1),
    template={"Width": 75},
    expected=lambda x: (x.max(1).values, x.argmax(1).to(INT)),
)
KERNELS["running sums"] = Kernel(
    source="""
        uint lane = thread_index_in_simdgroup;
        int before = 0;
        for (uint start = 0; start < 96; start += 32) {
          size_t i = thread_position_in_grid.y * 96 + start + lane;
          int sum = before + simd_prefix_inclusive_sum(x[i]);
          out[i] = sum;
          before = simd_broadcast(sum, 31);
        }
    """,
    inputs={"x": integers(1000, 2, 96)},
    outputs={"out": empty(2, 96, dtype=INT)},
    grid=(32, 2, 1),
    threadgroup=(32, 1, 1),
    expected=lambda x: x.cumsum(1).to(INT),
)


def _hadamard(x: Tensor) -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(5):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ matrix / math.sqrt(32)


KERNELS["Hadamard transform"] = Kernel(
    source="""
        uint i = thread_position_in_grid.x;
        ushort lane = thread_index_in_simdgroup;
        float value = x[i];
        for (ushort step = 1; step < 32; step *= 2) {
          float other = simd_shuffle_xor(value, step);
          value = (lane & step) ? other - value : value + other;
        }
        out[i] = value * metal::rsqrt(32.0f);
    """,
    inputs={"x": random(4, 32)},
    outputs={"out": empty(4, 32)},
    grid=(128, 1, 1),
    threadgroup=(64, 1, 1),
    expected=_hadamard,
    tolerance=1e-5,
)

# --- Threadgroup memory ----------------------------------------------------------------------------------------------

KERNELS["softmax"] = Kernel(
    source="""
        threadgroup float parts[4];
        uint row = threadgroup_position_in_grid.y, lane = thread_position_in_threadgroup.x;
        float value = x[row * 128 + lane];
        float most = simd_max(value);
        if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = most;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        most = max(max(parts[0], parts[1]), max(parts[2], parts[3]));
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float part = metal::precise::exp(value - most);
        float sum = simd_sum(part);
        if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[row * 128 + lane] = part / (parts[0] + parts[1] + parts[2] + parts[3]);
    """,
    inputs={"x": random(3, 128)},
    outputs={"out": empty(3, 128)},
    grid=(128, 3, 1),
    threadgroup=(128, 1, 1),
    expected=lambda x: x.double().softmax(1).float(),
    tolerance=1e-5,
)
KERNELS["root mean squares"] = Kernel(
    source="""
        threadgroup float squares[Threads];
        uint row = threadgroup_position_in_grid.x, me = thread_index_in_threadgroup;
        float mine = 0;
        for (uint k = me; k < Width; k += Threads) mine += float(x[row * Width + k]) * float(x[row * Width + k]);
        squares[me] = mine;
        for (uint half_size = Threads / 2; half_size > 0; half_size /= 2) {
          threadgroup_barrier(mem_flags::mem_threadgroup);
          if (me < half_size) squares[me] += squares[me + half_size];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float scale = metal::precise::rsqrt(squares[0] / Width + eps);
        for (uint k = me; k < Width; k += Threads) out[row * Width + k] = T(float(x[row * Width + k]) * scale) * w[k];
    """,
    inputs={"x": random(4, 100, dtype=HALF), "w": random(100, dtype=HALF, seed=8), "eps": 1e-5},
    outputs={"out": empty(4, 100, dtype=HALF)},
    grid=(256, 1, 1),
    threadgroup=(64, 1, 1),
    template={"T": HALF, "Width": 100, "Threads": 64},
    expected=lambda x, w, eps: functional.rms_norm(x.float(), (100,), w.float(), eps).half(),
    tolerance=3e-3,
)
KERNELS["transpose by tiles"] = Kernel(
    source="""
        threadgroup T tile[Tile][Tile + 1];
        uint2 me = thread_position_in_threadgroup.xy, corner = threadgroup_position_in_grid.xy * Tile;
        int rows = x_shape[0], columns = x_shape[1];
        int2 from = int2(corner + me);
        if (from.y < rows && from.x < columns) tile[me.y][me.x] = x[from.y * columns + from.x];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        int2 to = int2(corner.yx + me);
        if (to.y < columns && to.x < rows) out[to.y * rows + to.x] = tile[me.x][me.y];
    """,
    inputs={"x": integers(2**15, 21, 13, dtype=torch.int16)},
    outputs={"out": empty(13, 21, dtype=torch.int16)},
    grid=(16, 24, 1),
    threadgroup=(8, 8, 1),
    template={"T": torch.int16, "Tile": 8},
    expected=lambda x: x.mT,
)
KERNELS["product by tiles"] = Kernel(
    source="""
        threadgroup float left[8][8], right[8][8];
        uint2 me = thread_position_in_threadgroup.xy, at = thread_position_in_grid.xy;
        int rows = a_shape[0], depth = a_shape[1], columns = b_shape[1];
        float sum = 0;
        for (int start = 0; start < depth; start += 8) {
          int k = start + me.x, l = start + me.y;
          left[me.y][me.x] = int(at.y) < rows && k < depth ? float(a[at.y * depth + k]) : 0.0f;
          right[me.y][me.x] = int(at.x) < columns && l < depth ? float(b[l * columns + at.x]) : 0.0f;
          threadgroup_barrier(mem_flags::mem_threadgroup);
          for (int i = 0; i < 8; ++i) sum = fma(left[me.y][i], right[i][me.x], sum);
          threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        if (int(at.y) < rows && int(at.x) < columns) out[at.y * columns + at.x] = sum;
    """,
    inputs={"a": random(11, 19), "b": random(19, 14, seed=8)},
    outputs={"out": empty(11, 14)},
    grid=(16, 16, 1),
    threadgroup=(8, 8, 1),
    expected=lambda a, b: a @ b,
    tolerance=1e-5,
)
KERNELS["product of 8x8 matrices"] = Kernel(
    source="""
        uint2 tile = threadgroup_position_in_grid.xy;
        simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), left, right;
        for (uint k = 0; k < 24; k += 8) {
          simdgroup_load(left, a + 8 * tile.y * 24 + k, 24);
          simdgroup_load(right, b + k * 16 + 8 * tile.x, 16);
          simdgroup_multiply_accumulate(sum, left, right, sum);
        }
        simdgroup_store(sum, out + 8 * tile.y * 16 + 8 * tile.x, 16);
    """,
    inputs={"a": random(16, 24), "b": random(24, 16, seed=8)},
    outputs={"out": empty(16, 16)},
    grid=(64, 2, 1),
    threadgroup=(32, 1, 1),
    expected=lambda a, b: a @ b,
    tolerance=1e-5,
)
KERNELS["convolution with neighbours"] = Kernel(
    source="""
        constexpr int radius = Taps / 2;
        threadgroup float cells[Threads + Taps - 1];
        int me = thread_position_in_threadgroup.x, length = x_shape[0];
        int begin = int(threadgroup_position_in_grid.x) * Threads - radius;
        for (int k = me; k < Threads + Taps - 1; k += Threads) {
          int i = begin + k;
          cells[k] = i >= 0 && i < length ? x[i] : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float sum = 0;
        for (int tap = 0; tap < Taps; ++tap) sum += taps[tap] * cells[me + tap];
        if (int(thread_position_in_grid.x) < length) out[thread_position_in_grid.x] = sum;
    """,
    inputs={"x": random(75), "taps": random(5, seed=8)},
    outputs={"out": empty(75)},
    grid=(96, 1, 1),
    threadgroup=(32, 1, 1),
    template={"Taps": 5, "Threads": 32},
    expected=lambda x, taps: functional.conv1d(x[None, None], taps[None, None], padding=2)[0, 0],
    tolerance=1e-5,
)
KERNELS["sorted rows"] = Kernel(
    source="""
        threadgroup int values[64];
        uint me = thread_position_in_threadgroup.x, row = threadgroup_position_in_grid.x * 64;
        values[me] = x[row + me];
        for (uint size = 2; size <= 64; size *= 2) {
          for (uint step = size / 2; step > 0; step /= 2) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint other = me ^ step;
            if (other > me) {
              bool ascends = (me & size) == 0;
              int mine = values[me], theirs = values[other];
              if ((mine > theirs) == ascends) {
                values[me] = theirs;
                values[other] = mine;
              }
            }
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[row + me] = values[me];
    """,
    inputs={"x": integers(500, 2, 64) - 250},
    outputs={"out": empty(2, 64, dtype=INT)},
    grid=(128, 1, 1),
    threadgroup=(64, 1, 1),
    expected=lambda x: x.sort(1).values,
)

# --- Atomics ---------------------------------------------------------------------------------------------------------

KERNELS["histogram"] = Kernel(
    source="""
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&counts[bins[i]], 1, memory_order_relaxed);
    """,
    inputs={"bins": integers(7, 96, dtype=LONG)},
    outputs={"counts": empty(7, dtype=UINT)},
    grid=(96, 1, 1),
    threadgroup=(32, 1, 1),
    definition=ATOMIC,
    init_value=5,
    expected=lambda bins: (bins.bincount(minlength=7) + 5).to(UINT),
)
KERNELS["least and largest"] = Kernel(
    source="""
        int value = x[thread_position_in_grid.x];
        atomic_fetch_min_explicit(&out[0], value, memory_order_relaxed);
        atomic_fetch_max_explicit(&out[1], value, memory_order_relaxed);
    """,
    inputs={"x": integers(2000, 96) - 1000},
    outputs={"out": empty(2, dtype=INT)},
    grid=(96, 1, 1),
    threadgroup=(48, 1, 1),
    definition=ATOMIC,
    init_value=0,
    expected=lambda x: torch.stack([x.min(), x.max()]),
)
# Channels padded to whole simdgroups, and one atomic addition for each of these: as gradients of gathers are written.
KERNELS["sums before atomics"] = Kernel(
    source="""
        int C = x_shape[1];
        int padded = ceildiv(C, threads_per_simdgroup) * threads_per_simdgroup;
        uint row = thread_position_in_grid.x / padded;
        int channel = thread_position_in_grid.x % padded;
        float value = channel < C ? float(x[row * C + channel]) : 0.0f;
        value = simd_sum(value);
        if (thread_index_in_simdgroup == 0) {
          atomic_fetch_add_explicit(&sums[row], value, memory_order_relaxed);
        }
    """,
    inputs={"x": random(5, 40, dtype=HALF)},
    outputs={"sums": empty(5)},
    grid=(320, 1, 1),
    threadgroup=(64, 1, 1),
    definition=ATOMIC,
    init_value=0,
    expected=lambda x: x.double().sum(1).float(),
    tolerance=1e-4,
)
KERNELS["gradient of a gather"] = Kernel(
    source="""
        uint column = thread_position_in_grid.x, row = thread_position_in_grid.y;
        float value = gradient[row * threads_per_grid.x + column];
        atomic_fetch_add_explicit(&out[indices[row] * threads_per_grid.x + column], value, memory_order_relaxed);
    """,
    inputs={"gradient": random(12, 8), "indices": integers(5, 12)},
    outputs={"out": empty(5, 8)},
    grid=(8, 12, 1),
    threadgroup=(8, 4, 1),
    definition=ATOMIC,
    init_value=0,
    expected=lambda gradient, indices: torch.zeros(5, 8).index_add(0, indices, gradient),
    tolerance=1e-5,
)
