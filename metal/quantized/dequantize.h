// From packed words to numbers, for every format.
//
//   a run: 32 elements = `bits` words, whatever the width                       bits   load
//   +--------+--------+--------+--------+                                       2      uint2
//   | chunk 0| chunk 1| chunk 2| chunk 3|   chunk = 8 elements                  4      uint4
//   +--------+--------+--------+--------+                                       8      2 x uint4
//   word 0 … word bits-1, in the registers of one lane                          6      3 x uint2
//                                                                               odd    `bits` x uint
//
// A run starts and ends at a word and lies in one group (of groups of 16: in two), so a lane needs no neighbour, and
// every position within it is a compile-time constant. Adjacent lanes hold adjacent runs: a load of eight lanes covers
// whole 128-byte lines. Half a run, 16 elements, lies in one group in every format; with an odd width it begins at a
// multiple of two bytes only.
//
// Where columns are packed, a run is 32 elements of one column: `bits` words, a row of words apart, in the same order.
// Adjacent lanes take adjacent columns, so their loads of one word each are adjacent; in registers, it is a run like
// any other.
//
// Codes are unpacked two at a time in the mantissas of half numbers, with few shifts and no conversion from integers,
// both of which cost several times a mask. Other widths than 2, 4 and 8 bits are first spread, so that both codes of a
// pair are at the same position in the two halves of a word. E4M3 elements are pairs of halves except for the bias of
// their exponent. Measured against extracting and converting code by code: 24 instead of 46 us for mxfp8, 19 instead of
// 20 for 3 bits (docs/gpu-lane.md).
#pragma once

#include "../common/metal.h"
#include "../../csrc/format.h"
#include "../common/load.h"

namespace quantization_mlx {

static constant constexpr const int run_elements = 32;
static constant constexpr const int half_run_elements = 16;
static constant constexpr const int chunk_elements = 8;

// --- Loading ------------------------------------------------------------------------------------------------------

// Half a run, 16 codes. With an odd width the middle of a run is in the middle of a word.
template <int bits>
METAL_FUNC void load_half_run(const device ushort* source, bool aligned, thread uint* words) {
  if (bits % 2 == 0) {
    load_words<(bits + 1) / 2>((const device uint*)source, aligned, words);
  } else {
#pragma unroll
    for (int i = 0; i < bits / 2; ++i) {
      const uint low = source[2 * i];
      const uint high = source[2 * i + 1];
      words[i] = low | (high << 16);
    }
    words[bits / 2] = source[bits - 1];
  }
}

// The codes of any chunk of a row: every byte once, in the widest pieces that are aligned. With `aligned`, the row
// begins at a multiple of 8 bytes.
template <int bits>
METAL_FUNC void load_chunk_codes(const device uchar* source, bool aligned, thread uint* words) {
  if (bits % 4 == 0) {
    load_words<bits / 4>((const device uint*)source, aligned, words);
  } else {
    constexpr int piece_bytes = bits % 2 == 0 ? 2 : 1;
    words[0] = 0u;
    words[1] = 0u;
#pragma unroll
    for (int i = 0; i < bits / piece_bytes; ++i) {
      const int byte = i * piece_bytes;
      const uint piece = piece_bytes == 2 ? static_cast<uint>(((const device ushort*)source)[i]) : source[i];
      words[byte / 4] |= piece << (byte % 4 * 8);
    }
  }
}

// --- Elements -----------------------------------------------------------------------------------------------------

// The codes at bits [shift, shift + bits) of both halves of a word, shift + bits <= 10. Put into the mantissa of the
// half number 1024, where the lowest bit is worth 1, they need no conversion from integers; every step is exact.
METAL_FUNC float2 code_pair(uint word, int bits, int shift) {
  const uint mask = ((1u << bits) - 1u) << shift;
  const half2 raised = as_type<half2>((word & (mask | (mask << 16))) | 0x64006400u);
  const half2 codes = raised * static_cast<half>(1.0f / (1 << shift)) - static_cast<half>(1024 >> shift);
  return float2(static_cast<float>(codes.x), static_cast<float>(codes.y));
}

// The E2M1 elements in the lowest four bits of both halves of a word. As the upper bits of a half number they are too
// small by 2^14, subnormals included.
METAL_FUNC float2 e2m1_pair(uint word) {
  const half2 small = as_type<half2>(((word & 0x00070007u) << 9) | ((word & 0x00080008u) << 12));
  const half2 elements = small * static_cast<half>(16384.0f);
  return float2(static_cast<float>(elements.x), static_cast<float>(elements.y));
}

METAL_FUNC void set_pair(float2 pair, int first, int second, thread float* values) {
  values[first] = pair.x;
  values[second] = pair.y;
}

// The E4M3 elements in the lowest bytes of both halves of a word; NaN becomes 480. As the upper bits of a half number
// they are too small by 2^8, subnormals included.
METAL_FUNC float2 e4m3_pair(uint word) {
  const half2 small = as_type<half2>(((word & 0x007F007Fu) << 7) | ((word & 0x00800080u) << 8));
  const half2 elements = small * static_cast<half>(256.0f);
  return float2(static_cast<float>(elements.x), static_cast<float>(elements.y));
}

// In bit 7 of one of the bytes, whether an E4M3 element of `count` words is NaN; the other bits say nothing, so that
// those of many words are put together before they are looked at.
template <int count>
METAL_FUNC uint e4m3_nan_bits(thread const uint* words) {
  uint found = 0u;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    found |= (words[i] & 0x7F7F7F7Fu) + 0x01010101u;
  }
  return found;
}

METAL_FUNC bool has_nan(uint nan_bits) { return (nan_bits & 0x80808080u) != 0u; }

// Bits [first, first + count) of a run, count <= 24.
METAL_FUNC uint bits_at(thread const uint* words, int first, int count) {
  const int shift = first % 32;
  uint bits = words[first / 32] >> shift;
  if (shift + count > 32) {
    bits |= words[first / 32 + 1] << (32 - shift);
  }
  return bits & ((1u << count) - 1u);
}

// `count` codes of a run from `first` on in the lower half of a word, and as many from `first` + 4 on in the upper.
template <int bits, int count>
METAL_FUNC uint spread_codes(thread const uint* words, int first) {
  return bits_at(words, first * bits, count * bits) | (bits_at(words, (first + 4) * bits, count * bits) << 16);
}

// The elements of one chunk of a run, without scale and bias; E4M3's NaN as 480.
template <Mode mode, int bits>
METAL_FUNC void decode_finite_chunk(thread const uint* words, int chunk, thread float* values) {
  if (is_e2m1(mode)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      set_pair(e2m1_pair(words[chunk] >> (4 * i)), i, i + 4, values);
    }
  } else if (is_e4m3(mode)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint word = words[2 * chunk + i];
      set_pair(e4m3_pair(word), 4 * i, 4 * i + 2, values);
      set_pair(e4m3_pair(word >> 8), 4 * i + 1, 4 * i + 3, values);
    }
  } else if (bits == 4) {
    const uint low = words[chunk];
    const uint high = low >> 8;
    set_pair(code_pair(low, 4, 0), 0, 4, values);
    set_pair(code_pair(low, 4, 4), 1, 5, values);
    set_pair(code_pair(high, 4, 0), 2, 6, values);
    set_pair(code_pair(high, 4, 4), 3, 7, values);
  } else if (bits == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint word = words[2 * chunk + i];
      set_pair(code_pair(word, 8, 0), 4 * i, 4 * i + 2, values);
      set_pair(code_pair(word >> 8, 8, 0), 4 * i + 1, 4 * i + 3, values);
    }
  } else if (bits == 2) {
    // The halves of a word are two chunks: their pairs are computed once for both.
    const uint word = words[chunk / 2];
    const uint rest = word >> 6;
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      const float2 pair = i < 5 ? code_pair(word, 2, 2 * i) : code_pair(rest, 2, 2 * i - 6);
      values[i] = chunk % 2 == 0 ? pair.x : pair.y;
    }
  } else {
    constexpr int count = bits <= 3 ? 4 : 2;  // codes in half a word
#pragma unroll
    for (int first = 0; first < 4; first += count) {
      const uint codes = spread_codes<bits, count>(words, chunk_elements * chunk + first);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int beyond = (i + 1) * bits > 10 ? (i + 1) * bits - 10 : 0;
        set_pair(code_pair(codes >> beyond, bits, i * bits - beyond), first + i, first + i + 4, values);
      }
    }
  }
}

// Whether products with x of type T take the codes of decode_small_chunk. Those with half stay normal numbers in
// float32; with the smallest numbers of bfloat and float they would not.
template <typename T, Mode mode, int bits>
struct TakesSmallCodes {
  static constexpr constant bool value = false;
};

template <>
struct TakesSmallCodes<half, Mode::affine, 4> {
  static constexpr constant bool value = true;
};

// The codes of one chunk of a run at 4 bits, where they are: as the lowest bits of half numbers, subnormal ones, which
// are exact. Those at even places are too small by 2^24, the others by 2^20. Sums of products are put right at once;
// code_pair does it for each pair, which is two operations in three.
METAL_FUNC float2 small_pair(uint word) {
  const half2 pair = as_type<half2>(word);
  return float2(static_cast<float>(pair.x), static_cast<float>(pair.y));
}

METAL_FUNC void decode_small_chunk(thread const uint* words, int chunk, thread float* values) {
  const uint low = words[chunk];
  const uint high = low >> 8;
  set_pair(small_pair(low & 0x000F000Fu), 0, 4, values);
  set_pair(small_pair(low & 0x00F000F0u), 1, 5, values);
  set_pair(small_pair(high & 0x000F000Fu), 2, 6, values);
  set_pair(small_pair(high & 0x00F000F0u), 3, 7, values);
}

// Of the sums of products at even and at odd places, the sum that whole codes have.
METAL_FUNC float sum_of_small(float even, float odd) { return fma(odd, 1048576.0f, even * 16777216.0f); }

// The elements of one chunk of a run, without scale and bias.
template <Mode mode, int bits>
METAL_FUNC void decode_chunk(thread const uint* words, int chunk, thread float* values) {
  decode_finite_chunk<mode, bits>(words, chunk, values);
  if (is_e4m3(mode) && has_nan(e4m3_nan_bits<2>(words + 2 * chunk))) {
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      values[i] = e4m3_to_float((words[2 * chunk + i / 4] >> (8 * (i % 4))) & 0xFFu);
    }
  }
}

// --- Scales -------------------------------------------------------------------------------------------------------

template <Scale scale, typename T>
struct ScaleOf {
  typedef uchar type;
};

template <typename T>
struct ScaleOf<Scale::real, T> {
  typedef T type;
};

template <typename T>
struct ScaleOf<Scale::float16, T> {
  typedef half type;
};

// Scales in memory, where x and y are of type T.
template <Mode mode, typename T>
using ScaleType = typename ScaleOf<traits_of(mode).scale, T>::type;

// Whether the kernels' argument `biases` is read: biases, or the zeros of packed columns.
inline constexpr bool reads_biases(Mode mode) { return has_biases(mode) || has_zeros(mode); }

template <Mode mode, typename T>
METAL_FUNC float decode_scale(T scale) {
  return static_cast<float>(scale);
}

template <Mode mode>
METAL_FUNC float decode_scale(uchar scale) {
  if (traits_of(mode).scale == Scale::e8m0) {
    return e8m0_to_float(scale);
  }
  return (scale & 0x7Fu) == 0x7Fu ? quiet_nan() : e4m3_pair(scale).x;
}

template <Mode mode, typename Scale>
METAL_FUNC float decode_bias(const device Scale* biases, long group) {
  return has_biases(mode) ? static_cast<float>(biases[group]) : 0.0f;
}

// The code that stands for zero in a group of a packed column.
template <Mode mode, typename Scale>
METAL_FUNC float decode_zero(const device Scale* zeros, long group) {
  return column_zero(mode, has_zeros(mode) ? static_cast<float>(zeros[group]) : 0.0f);
}

}  // namespace quantization_mlx
