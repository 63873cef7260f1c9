// Rotary position embedding: y [sequences, heads, length, width] from x on any strides.
//
//   threads of a sequence      position 0: pairs [0, 4), [4, 8), ..., other elements by fours; position 1: ...
//   threadgroups along y       up to 8 heads each, which share the angles of a thread
//   threadgroups along z       sequences
//
// Angles cost more than what they turn: a thread computes four and uses them for all of its heads. They are counted in
// turns behind a binary point of 64 bits (csrc/functions.h), so that no sine of a large argument is needed; what a pair
// turns by for one position is known as the sum of two floats, which is exact enough up to position 2^24.
#pragma once

#include "../../csrc/functions.h"
#include "../../csrc/gpu/launch.h"
#include "../common/load.h"
#include "../common/metal.h"
#include "../common/polynomial.h"

namespace quantization_mlx {

constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool has_offsets [[function_constant(QUANTIZATION_MLX_HAS_OFFSETS)]];
constant bool has_freqs [[function_constant(QUANTIZATION_MLX_HAS_FREQS)]];

static constant constexpr const int rope_threads = elementwise_threads_per_threadgroup();
static constant constexpr const int step_pairs = rope_pairs();

// Sums of two floats, the second below the first one's last place.
METAL_FUNC float2 two_floats(constant const float* parts) { return float2(parts[0], parts[1]); }

METAL_FUNC float2 product(float2 a, float2 b) {
  const float high = a.x * b.x;
  const float rest = fma(a.x, b.x, -high) + (a.x * b.y + a.y * b.x);
  const float sum = high + rest;
  return float2(sum, rest - (sum - high));
}

METAL_FUNC float2 quotient(float2 a, float b) {
  const float high = a.x / b;
  return float2(high, (fma(-high, b, a.x) + a.y) / b);
}

// In units of 2^-64 turns, without whole ones.
METAL_FUNC ulong fraction_of(float2 turns) {
  const float unit = 4.611686018427387904e18f;  // 2^62, which halves of a turn do not lead out of 64 bits
  const long high = static_cast<long>((turns.x - rint(turns.x)) * unit);
  const long low = static_cast<long>((turns.y - rint(turns.y)) * unit);
  return static_cast<ulong>(high + low) << 2;
}

// Of an angle in units of 2^-32 turns.
METAL_FUNC void cosine_and_sine(uint fraction, thread float& cosine, thread float& sine) {
  const uint quadrant = (fraction + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int>(fraction - (quadrant << 30))) * radians_of_fraction;
  const float square = x * x;
  const float s = fma(x * square, polynomial(square, sine_coefficients), x);
  const float c = fma(square * square, polynomial(square, cosine_coefficients), fma(square, -0.5f, 1.0f));
  cosine = (quadrant & 1u) != 0 ? s : c;
  sine = (quadrant & 1u) != 0 ? c : s;
  cosine = ((quadrant + 1u) & 2u) != 0 ? -cosine : cosine;
  sine = (quadrant & 2u) != 0 ? -sine : sine;
}

// The angles of four pairs at a position.
METAL_FUNC void angles(
    constant RopeParams& params,
    const device float* freqs,
    int first,
    ulong position,
    thread float* cosines,
    thread float* sines) {
  float2 common = two_floats(params.first);
  if (!has_freqs) {
    for (int bit = 2; first >> bit != 0; ++bit) {
      if ((first >> bit & 1) != 0) {
        common = product(common, two_floats(params.powers[bit]));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < step_pairs; ++i) {
    float2 turns = common;
    if (has_freqs) {
      const float freq = first + i < params.pairs ? freqs[first + i] : 1.0f;
      turns = isinf(freq) ? float2(0.0f) : quotient(common, freq);
    } else {
      turns = (i & 1) != 0 ? product(turns, two_floats(params.powers[0])) : turns;
      turns = (i & 2) != 0 ? product(turns, two_floats(params.powers[1])) : turns;
    }
    const bool is_finite = isfinite(turns.x);
    const ulong fraction = position * fraction_of(is_finite ? turns : float2(0.0f));
    cosine_and_sine(static_cast<uint>(fraction >> 32), cosines[i], sines[i]);
    cosines[i] = is_finite ? cosines[i] : quiet_nan();
    sines[i] = is_finite ? sines[i] : quiet_nan();
  }
}

// Some of `count` values, adjacent, in fours.
template <int fours, typename T>
METAL_FUNC void load_some(const device T* source, int count, thread float* values) {
  if (aligned_x) {
    load_values<4 * fours>(source, true, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4 * fours; ++i) {
      values[i] = i < count ? static_cast<float>(source[i]) : 0.0f;
    }
  }
}

template <int fours, typename T>
METAL_FUNC void store_some(thread const float* values, device T* destination, int count) {
#pragma unroll
  for (int four = 0; four < fours; ++four) {
    if (aligned_x) {
      store_four(values + 4 * four, destination + 4 * four);
    } else {
#pragma unroll
      for (int i = 4 * four; i < 4 * four + 4; ++i) {
        if (i < count) {
          destination[i] = static_cast<T>(values[i]);
        }
      }
    }
  }
}

// Four pairs, of which `count` are there: neighbours, or `second` elements apart.
template <bool traditional, typename T>
METAL_FUNC void turn(
    const device T* source,
    device T* destination,
    int second,
    int count,
    thread const float* cosines,
    thread const float* sines) {
  constexpr int next = traditional ? 2 : 1;  // from one pair to the next
  constexpr int other = traditional ? 1 : step_pairs;  // from the first of a pair to the second
  float values[2 * step_pairs];
  if (traditional) {
    load_some<2>(source, 2 * count, values);
  } else {
    load_some<1>(source, count, values);
    load_some<1>(source + second, count, values + step_pairs);
  }
#pragma unroll
  for (int i = 0; i < step_pairs; ++i) {
    const float a = values[next * i];
    const float b = values[next * i + other];
    values[next * i] = fma(-b, sines[i], a * cosines[i]);
    values[next * i + other] = fma(a, sines[i], b * cosines[i]);
  }
  if (traditional) {
    store_some<2>(values, destination, 2 * count);
  } else {
    store_some<1>(values, destination, count);
    store_some<1>(values + step_pairs, destination + second, count);
  }
}

template <typename T, bool traditional>
[[kernel, max_total_threads_per_threadgroup(rope_threads)]] void rope(
    const device T* x [[buffer(0)]],
    const device uint* offsets [[buffer(1), function_constant(has_offsets)]],
    const device float* freqs [[buffer(2), function_constant(has_freqs)]],
    device T* y [[buffer(3)]],
    constant CallNumbers& numbers [[buffer(4)]],
    constant RopeParams& params [[buffer(5)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int pair_groups = (params.pairs + step_pairs - 1) / step_pairs;
  const int groups = pair_groups + (params.width - 2 * params.pairs + step_pairs - 1) / step_pairs;
  const int index = threadgroup_index.x * rope_threads + thread_index;
  const int t = index / groups;
  const int group = index % groups;
  if (t >= params.length) {
    return;
  }
  const long sequence = threadgroup_index.z;
  const int head = threadgroup_index.y * params.thread_heads;
  const int end = min(head + params.thread_heads, params.heads);
  const long y_head = static_cast<long>(params.length) * params.width;
  const device T* source =
      x + sequence * params.sequence_stride + head * params.head_stride + t * params.position_stride;
  device T* destination = y + (sequence * params.heads + head) * y_head + static_cast<long>(t) * params.width;

  if (group >= pair_groups) {  // elements that are copied
    const int begin = 2 * params.pairs + (group - pair_groups) * step_pairs;
    for (int i = head; i < end; ++i, source += params.head_stride, destination += y_head) {
      float values[step_pairs];
      load_some<1>(source + begin, params.width - begin, values);
      store_some<1>(values, destination + begin, params.width - begin);
    }
    return;
  }

  ulong position = static_cast<ulong>(numbers.offset) + static_cast<ulong>(t);
  if (has_offsets) {
    const device uint* words = offsets + sequence * params.offset_stride;
    position += params.offset_words == 2 ? static_cast<ulong>(words[1]) << 32 | words[0]
                                         : static_cast<ulong>(static_cast<long>(static_cast<int>(words[0])));
  }
  const int first = group * step_pairs;
  float cosines[step_pairs];
  float sines[step_pairs];
  if (has_freqs) {
    angles(params, freqs, first, position, cosines, sines);
  } else {
    angles(params, static_cast<const device float*>(nullptr), first, position, cosines, sines);
  }
  const int begin = traditional ? 2 * first : first;
  for (int i = head; i < end; ++i, source += params.head_stride, destination += y_head) {
    turn<traditional>(source + begin, destination + begin, params.pairs, params.pairs - first, cosines, sines);
  }
}

}  // namespace quantization_mlx
