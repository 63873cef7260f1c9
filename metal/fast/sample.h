// sample: draws a token for every row of logits.
//
//   threadgroup = row
//   simdgroup      0            1        ...     31        an equal part of the tokens each, in their order
//   lane       8 of 256 adjacent tokens, then the next 256, ...
//
// The row is read a few times, from a cache after the first, and nothing is sorted. top_k and top_p are thresholds: the
// logits' bits, as integers in their order, are searched from the highest on, eleven at a time, by a histogram of the
// tokens' number or weight in threadgroup memory. Without them a row takes three readings: for the greatest logit, for
// the sum of weights, and one of ever smaller parts to find the token at the random place in that sum. Sums are
// integers (csrc/sampling.h), so the order in which threads add does not matter.
#pragma once

#include "../../csrc/gpu/launch.h"
#include "../../csrc/sampling.h"
#include "../common/load.h"
#include "../common/metal.h"

namespace quantization_mlx {

constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool has_seeds [[function_constant(QUANTIZATION_MLX_HAS_SEEDS)]];
constant bool has_previous [[function_constant(QUANTIZATION_MLX_HAS_PREVIOUS)]];

static constant constexpr const int sample_threads = sample_max_threads();
static constant constexpr const int sample_width = sample_elements();
static constant constexpr const int sample_bins = key_bins();
static constant constexpr const int bin_groups = 32;  // one for each lane, of
static constant constexpr const int bins_per_group = sample_bins / bin_groups;

struct Position {
  int thread_index;
  int simdgroup;
  int simdgroups;
  int lane;
};

// --- Sums of 64 bits over a simdgroup: in words of 22 bits, whose sums 32 bits hold
// -----------------------------------

METAL_FUNC ulong joined_words(uint low, uint middle, uint high) {
  return static_cast<ulong>(low) + (static_cast<ulong>(middle) << 22) + (static_cast<ulong>(high) << 44);
}

METAL_FUNC uint low_word(ulong value) { return static_cast<uint>(value) & 0x3FFFFFu; }

METAL_FUNC ulong wide_simd_sum(ulong value) {
  return joined_words(
      simd_sum(low_word(value)), simd_sum(low_word(value >> 22)), simd_sum(static_cast<uint>(value >> 44)));
}

// Of this lane and those before.
METAL_FUNC ulong wide_prefix_sum(ulong value) {
  return joined_words(
      simd_prefix_inclusive_sum(low_word(value)), simd_prefix_inclusive_sum(low_word(value >> 22)),
      simd_prefix_inclusive_sum(static_cast<uint>(value >> 44)));
}

METAL_FUNC ulong wide_shuffle(ulong value, int lane) {
  const uint high = simd_shuffle(static_cast<uint>(value >> 32), static_cast<ushort>(lane));
  const uint low = simd_shuffle(static_cast<uint>(value), static_cast<ushort>(lane));
  return static_cast<ulong>(high) << 32 | low;
}

// The first lane of which the condition holds, or the last one.
METAL_FUNC int first_lane(bool condition, int lane) { return simd_min(condition ? lane : 31); }

// --- Tokens
// -----------------------------------------------------------------------------------------------------------

// Keys of a lane's tokens from `first` on, 0 behind the last one.
template <typename T>
METAL_FUNC void load_keys(
    const device T* logits,
    device atomic_uint* penalised,
    constant SampleParams& params,
    int first,
    thread uint* keys) {
  const int vocabulary = params.vocabulary;
  if (first >= vocabulary) {
#pragma unroll
    for (int i = 0; i < sample_width; ++i) {
      keys[i] = 0u;
    }
    return;
  }
  float values[sample_width];
  if (aligned_x) {
    load_values<sample_width>(logits + first, true, values);
  } else {
#pragma unroll
    for (int i = 0; i < sample_width; ++i) {
      values[i] = first + i < vocabulary ? static_cast<float>(logits[first + i]) : 0.0f;
    }
  }
  uint bits = 0u;
  if (has_previous) {
    bits = atomic_load_explicit(penalised + first / 32, memory_order_relaxed) >> (first % 32);
  }
#pragma unroll
  for (int i = 0; i < sample_width; ++i) {
    const float value = (bits >> i & 1u) != 0u ? penalised_logit(values[i], params.penalty) : values[i];
    keys[i] = aligned_x || first + i < vocabulary ? key_of_logit(value) : 0u;
  }
}

// Which tokens are kept so far.
struct Kept {
  float greatest;  // logit
  uint last;  // the least key
  uint farthest;  // distance
};

METAL_FUNC uint weight_of(uint key, Kept kept, float scale) {
  const uint distance = logit_distance(kept.greatest, logit_of_key(key), scale);
  const bool is_kept = key != 0u && key >= kept.last && distance <= kept.farthest;
  return is_kept ? weight_at_distance(distance) : 0u;
}

// The tokens of a simdgroup's part of [begin, end): whole steps.
METAL_FUNC int part_of(int tokens, int simdgroups) {
  const int steps = (tokens + sample_step() - 1) / sample_step();
  return (steps + simdgroups - 1) / simdgroups * sample_step();
}

// Marks the previous tokens in this row's bits. False where one is no token.
METAL_FUNC bool mark_previous(
    const device long* previous,
    device atomic_uint* penalised,
    constant SampleParams& params,
    Position at) {
  const int threads = at.simdgroups * 32;
  for (int i = at.thread_index; i < (params.vocabulary + 31) / 32; i += threads) {
    atomic_store_explicit(penalised + i, 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_device);
  bool is_valid = true;
  for (int i = at.thread_index; i < params.previous; i += threads) {
    const long token = previous[i];
    if (token >= params.vocabulary) {
      is_valid = false;
    } else if (token >= 0) {
      atomic_fetch_or_explicit(penalised + token / 32, 1u << (token % 32), memory_order_relaxed);
    }
  }
  threadgroup_barrier(mem_flags::mem_device);
  return is_valid;
}

// --- Thresholds
// -------------------------------------------------------------------------------------------------------

struct Histogram {
  threadgroup atomic_uint* low;  // [sample_bins], and the upper words of the same numbers
  threadgroup atomic_uint* high;
  threadgroup ulong* groups;  // [bin_groups], sums
};

METAL_FUNC void add_to(Histogram histogram, uint bin, uint weight) {
  const uint before = atomic_fetch_add_explicit(histogram.low + bin, weight, memory_order_relaxed);
  if (before + weight < before) {
    atomic_fetch_add_explicit(histogram.high + bin, 1u, memory_order_relaxed);
  }
}

METAL_FUNC ulong in_bin(Histogram histogram, int bin) {
  const uint high = atomic_load_explicit(histogram.high + bin, memory_order_relaxed);
  return static_cast<ulong>(high) << 32 | atomic_load_explicit(histogram.low + bin, memory_order_relaxed);
}

// The key such that the tokens of greater ones number or weigh less than a limit, and with its own at least that: top_k
// or, with weighs, what top_p is of the sum. To all threads alike.
template <typename T, bool weighs>
METAL_FUNC uint last_kept(
    const device T* logits,
    device atomic_uint* penalised,
    constant SampleParams& params,
    Kept kept,
    Histogram histogram,
    Position at) {
  const int part = part_of(params.vocabulary, at.simdgroups);
  const int begin = at.simdgroup * part;
  const int end = min(begin + part, params.vocabulary);
  ulong left = static_cast<ulong>(params.top_k);
  uint found = 0u;
  uint known = 0u;  // bits of it
  for (int level = 0; level < key_levels(); ++level) {
    const int shift = key_shift(level);
    for (int bin = at.thread_index; bin < sample_bins; bin += at.simdgroups * 32) {
      atomic_store_explicit(histogram.low + bin, 0u, memory_order_relaxed);
      atomic_store_explicit(histogram.high + bin, 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int first = begin + at.lane * sample_width; first < end; first += sample_step()) {
      uint keys[sample_width];
      load_keys(logits, penalised, params, first, keys);
      for (int i = 0; i < sample_width; ++i) {
        if (keys[i] != 0u && (keys[i] & known) == found) {
          const uint weight = weighs ? weight_of(keys[i], kept, params.scale) : 1u;
          if (weight != 0u) {
            add_to(histogram, keys[i] >> shift & key_mask(level), weight);
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int group = at.simdgroup; group < bin_groups; group += at.simdgroups) {
      const int bin = group * bins_per_group + 2 * at.lane;
      const ulong sum = wide_simd_sum(in_bin(histogram, bin) + in_bin(histogram, bin + 1));
      if (at.lane == 0) {
        histogram.groups[group] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // From the greatest keys on: the group of bins, then the pair of bins, then the bin.
    ulong own = histogram.groups[bin_groups - 1 - at.lane];
    if (weighs && level == 0) {
      left = top_p_weight(wide_simd_sum(own), static_cast<ulong>(params.top_p));
    }
    ulong sum = wide_prefix_sum(own);
    int chosen = first_lane(sum >= left, at.lane);
    left -= wide_shuffle(sum - own, chosen);
    int bin = (bin_groups - chosen) * bins_per_group - 1;
    const ulong upper = in_bin(histogram, bin - 2 * at.lane);
    own = upper + in_bin(histogram, bin - 2 * at.lane - 1);
    sum = wide_prefix_sum(own);
    chosen = first_lane(sum >= left, at.lane);
    left -= wide_shuffle(sum - own, chosen);
    bin -= 2 * chosen;
    const ulong in_upper = wide_shuffle(upper, chosen);
    if (in_upper < left) {
      left -= in_upper;
      bin -= 1;
    }
    found |= static_cast<uint>(bin) << shift;
    known |= key_mask(level) << shift;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  return found;
}

// --- The kernel
// -------------------------------------------------------------------------------------------------------

// The token at a random place in the sum of weights, in the order of tokens; valid in one lane, -1 in all others.
template <typename T>
METAL_FUNC int drawn_token(
    const device T* logits,
    device atomic_uint* penalised,
    constant SampleParams& params,
    Kept kept,
    ulong random,
    threadgroup ulong* sums,
    Position at) {
  int begin = 0;
  int end = params.vocabulary;
  ulong place = 0;
  uint keys[sample_width];
  for (bool is_first = true; is_first || end - begin > sample_step(); is_first = false) {
    const int part = part_of(end - begin, at.simdgroups);
    const int own_begin = begin + at.simdgroup * part;
    ulong own = 0;
    for (int first = own_begin + at.lane * sample_width; first < min(own_begin + part, end); first += sample_step()) {
      load_keys(logits, penalised, params, first, keys);
#pragma unroll
      for (int i = 0; i < sample_width; ++i) {
        own += weight_of(keys[i], kept, params.scale);
      }
    }
    own = wide_simd_sum(own);
    if (at.lane == 0) {
      sums[at.simdgroup] = own;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    own = at.lane < at.simdgroups ? sums[at.lane] : 0;
    const ulong sum = wide_prefix_sum(own);
    if (is_first) {
      place = fraction_of(wide_shuffle(sum, 31), random);
    }
    const int chosen = first_lane(sum > place, at.lane);
    place -= wide_shuffle(sum - own, chosen);
    begin += chosen * part;
    end = min(begin + part, end);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  load_keys(logits, penalised, params, begin + at.lane * sample_width, keys);
  ulong own = 0;
  for (int i = 0; i < sample_width; ++i) {
    keys[i] = weight_of(keys[i], kept, params.scale);
    own += keys[i];
  }
  const ulong sum = wide_prefix_sum(own);
  const int chosen = first_lane(sum > place, at.lane);
  if (at.simdgroup != 0 || at.lane != chosen) {
    return -1;
  }
  place -= sum - own;
  int token = begin + at.lane * sample_width;
  for (int i = 0; i < sample_width - 1 && place >= keys[i]; ++i) {
    place -= keys[i];
    ++token;
  }
  return token;
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(sample_threads)]] void sample(
    const device T* x [[buffer(0)]],
    const device long* seeds [[buffer(1), function_constant(has_seeds)]],
    const device long* previous [[buffer(2), function_constant(has_previous)]],
    device atomic_uint* bits [[buffer(3), function_constant(has_previous)]],
    device long* y [[buffer(4)]],
    constant CallNumbers& numbers [[buffer(5)]],
    constant SampleParams& params [[buffer(6)]],
    uint row [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup atomic_uint low[sample_bins];
  threadgroup atomic_uint high[sample_bins];
  threadgroup ulong sums[bin_groups];
  threadgroup uint greatest_keys[bin_groups];
  threadgroup int first_tokens[bin_groups];
  const Position at{
      static_cast<int>(thread_index), static_cast<int>(simdgroup), static_cast<int>(simdgroups),
      static_cast<int>(lane)};
  const device T* logits = x + row * params.row_stride;
  device atomic_uint* penalised = nullptr;
  bool is_valid = true;
  if (has_previous) {
    penalised = bits + row * static_cast<long>((params.vocabulary + 31) / 32);
    is_valid = mark_previous(previous + row * static_cast<long>(params.previous), penalised, params, at);
  }

  // The greatest logit and, of several, the first one.
  const int part = part_of(params.vocabulary, at.simdgroups);
  const int end = min(at.simdgroup * part + part, params.vocabulary);
  uint greatest = 0u;
  int token = params.vocabulary;
  for (int first = at.simdgroup * part + at.lane * sample_width; first < end; first += sample_step()) {
    uint keys[sample_width];
    load_keys(logits, penalised, params, first, keys);
#pragma unroll
    for (int i = 0; i < sample_width; ++i) {
      token = keys[i] > greatest ? first + i : token;
      greatest = max(greatest, keys[i]);
    }
  }
  greatest = is_valid ? greatest : 0xFFFFFFFFu;
  const uint greatest_of_simdgroup = simd_max(greatest);
  const int first_of_simdgroup = simd_min(greatest == greatest_of_simdgroup ? token : params.vocabulary);
  if (at.lane == 0) {
    greatest_keys[at.simdgroup] = greatest_of_simdgroup;
    first_tokens[at.simdgroup] = first_of_simdgroup;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint greatest_there = at.lane < at.simdgroups ? greatest_keys[at.lane] : 0u;
  greatest = simd_max(greatest_there);
  if (!is_finite_key(greatest) || params.scale == 0.0f) {
    const bool has_greatest = at.lane < at.simdgroups && greatest_there == greatest;
    token = simd_min(has_greatest ? first_tokens[at.lane] : params.vocabulary);
    if (at.thread_index == 0) {
      y[row] = is_finite_key(greatest) ? token : -1;
    }
    return;
  }

  const Histogram histogram{low, high, sums};
  Kept kept{logit_of_key(greatest), 0u, far_distance()};
  if (params.top_k > 0) {
    kept.last = last_kept<T, false>(logits, penalised, params, kept, histogram, at);
  }
  if (params.top_p < 1l << 32) {
    kept.last = last_kept<T, true>(logits, penalised, params, kept, histogram, at);
  }
  kept.farthest = static_cast<uint>(params.farthest);
  long seed = numbers.seed;
  if (has_seeds) {
    seed = seeds[row * params.seed_stride];
  }
  const ulong number_of_row = params.seed_stride == 0 ? row : 0u;
  const ulong random = random_bits(static_cast<ulong>(seed), static_cast<ulong>(numbers.offset), number_of_row);
  token = drawn_token(logits, penalised, params, kept, random, sums, at);
  if (token >= 0) {
    y[row] = token;
  }
}

}  // namespace quantization_mlx
