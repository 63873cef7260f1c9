// Sixteen lanes of AVX-512. The BF16, VBMI and VNNI instructions stand only in the kernels on bfloat16 pairs and on
// int8, which run where the machine has them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace quantization_mlx::cpu {
namespace {

struct Vector {
  static constexpr bool has_bfloat16 = true;
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float value) { return _mm512_set1_ps(value); }
  static F load(const float* source) { return _mm512_loadu_ps(source); }
  static void store(float* destination, F value) { _mm512_storeu_ps(destination, value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(F value) { return _mm512_reduce_add_ps(value); }

  static void copy_below_64(uint8_t* destination, const uint8_t* source, int64_t count) {
    _mm512_storeu_si512(destination, _mm512_maskz_loadu_epi8((1ull << count) - 1, source));
  }
  static I load_bytes(const uint8_t* source) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }
  static F load_float16(const uint8_t* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }
  static void store_float16(void* destination, F value) {
    _mm256_storeu_si256(static_cast<__m256i*>(destination), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_bfloat16(const uint8_t* source) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  // Sixteen units of `bytes` bytes, one per lane, from byte `skip` of each on.
  template <int bytes, int skip>
  static I load_units(const uint8_t* source) {
    if constexpr (bytes == 4) {
      return _mm512_loadu_si512(source);
    } else if constexpr (bytes == 3) {
      // Whole words first, so that 16-byte lane i has the 12 bytes of units 4i..4i+3; then bytes within the lane.
      const I packed = _mm512_maskz_loadu_epi8((1ull << 48) - 1, source);
      const I words =
          _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0), packed);
      return _mm512_shuffle_epi8(
          words, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
    } else {
      // Eight units in 64-bit lanes by 16-bit words, odd units one byte too low; then the 32 bits wanted of each.
      const I halves = _mm512_set_epi16(
          20, 19, 18, 17, 18, 17, 16, 15, 15, 14, 13, 12, 13, 12, 11, 10, 10, 9, 8, 7, 8, 7, 6, 5, 5, 4, 3, 2, 3, 2, 1,
          0);
      const I shifts = _mm512_setr_epi64(
          8 * skip, 8 * skip + 8, 8 * skip, 8 * skip + 8, 8 * skip, 8 * skip + 8, 8 * skip, 8 * skip + 8);
      const __mmask64 forty = (1ull << 40) - 1;
      const I first = _mm512_permutexvar_epi16(halves, _mm512_maskz_loadu_epi8(forty, source));
      const I second = _mm512_permutexvar_epi16(halves, _mm512_maskz_loadu_epi8(forty, source + 40));
      return _mm512_permutex2var_epi32(
          _mm512_srlv_epi64(first, shifts),
          _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          _mm512_srlv_epi64(second, shifts));
    }
  }

  template <int width, int shift>
  static F unsigned_code(I units) {
    const I shifted = shift == 0 ? units : _mm512_srli_epi32(units, shift);
    if constexpr (width <= 4) {
      // The look-up uses the low four bits of each lane; a shorter code repeats in the table.
      constexpr int last = (1 << width) - 1;
      const F table = _mm512_setr_ps(
          0, 1, 2 & last, 3 & last, 4 & last, 5 & last, 6 & last, 7 & last, 8 & last, 9 & last, 10 & last, 11 & last,
          12 & last, 13 & last, 14 & last, 15 & last);
      return _mm512_permutexvar_ps(shifted, table);
    } else if constexpr (shift + width == 32) {
      return _mm512_cvtepi32_ps(shifted);
    } else {
      return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32((1 << width) - 1)));
    }
  }

  template <int shift>
  static F e2m1(I units) {
    const F table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    return _mm512_permutexvar_ps(shift == 0 ? units : _mm512_srli_epi32(units, shift), table);
  }

  template <int shift>
  static F e4m3(I units) {
    const I shifted = shift == 0 ? units : _mm512_srli_epi32(units, shift);
    const I low = _mm512_and_si512(shifted, _mm512_set1_epi32(0x7F));
    const I normal = _mm512_add_epi32(_mm512_slli_epi32(low, 20), _mm512_set1_epi32(120 << 23));
    const F subnormal = _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(0.001953125f));
    const __mmask16 is_subnormal = _mm512_cmplt_epi32_mask(low, _mm512_set1_epi32(8));
    const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(low, _mm512_set1_epi32(0x7F));
    F value = _mm512_mask_mov_ps(_mm512_castsi512_ps(normal), is_subnormal, subnormal);
    value = _mm512_mask_mov_ps(value, is_nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
    const I sign = _mm512_slli_epi32(_mm512_and_si512(shifted, _mm512_set1_epi32(0x80)), 24);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
  }

  // Which of the groups of a block each lane belongs to, for groups of 2^shift lanes.
  static I lane_groups(int shift) {
    const I number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_srlv_epi32(number, _mm512_set1_epi32(shift));
  }
  static I later_groups(I index, int count) { return _mm512_add_epi32(index, _mm512_set1_epi32(count)); }
  static F lookup(F table, I index) { return _mm512_permutexvar_ps(index, table); }

  static void unzip(F a, F b, F& even, F& odd) {
    even = _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
    odd = _mm512_permutex2var_ps(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b);
  }
  // The sums of four vectors: first to four partial sums of each in every quarter, then the quarters.
  static __m512d halved(F a, F b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  }
  static void sum_each(const F (&values)[4], float* sums) {
    const __m512d first = halved(values[0], values[1]);
    const __m512d second = halved(values[2], values[3]);
    const F quarters = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(first, second)), _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
  }

  // --- bfloat16 pairs: 32 lanes of 16 bits ---
  static I load_integers(const void* source) { return _mm512_loadu_si512(source); }
  static void store_integers(void* destination, I value) { _mm512_storeu_si512(destination, value); }
  static I broadcast_pair(const float* pair) { return _mm512_castps_si512(_mm512_set1_ps(*pair)); }
  static F dot_pairs(I a, I b, F sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

  // The bfloat16 at the top of each float32 lane, and what it leaves.
  static I truncated_pairs(F low, F high) {
    const I top = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm512_ternarylogic_epi32(
        _mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high), top, 0xF8);  // a | (b & c)
  }
  static F without_top(F value) {
    const I top = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(value), top)));
  }
  static F low_of_pairs(I pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static F high_of_pairs(I pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  // Two vectors rounded, one after the other.
  static I rounded_halves(F first, F second) { return (I)_mm512_cvtne2ps_pbh(second, first); }
  // Two vectors rounded, in pairs.
  static I rounded_pairs(F low, F high) {
    const I order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0);
    return _mm512_permutexvar_epi16(order, rounded_halves(low, high));
  }

  // Units whose halves have 16-bit lanes of their own, with the bits of all their elements; five-bit elements need two
  // such vectors, `high` from the second byte of the unit and from the second of its upper half on.
  struct HalfUnits {
    I low;
    I high;
  };
  template <int bits>
  static HalfUnits load_half_units(const uint8_t* source) {
    if constexpr (bits == 3 || bits == 6) {
      // Bytes 0, 1, 1, 2 of each unit.
      const I index = _mm512_add_epi8(
          _mm512_mullo_epi16(
              _mm512_set1_epi16(3),
              _mm512_shuffle_epi8(
                  _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                  _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)))),
          _mm512_set1_epi32(0x02010100));
      return {_mm512_permutexvar_epi8(index, _mm512_maskz_loadu_epi8((1ull << 48) - 1, source)), I()};
    } else if constexpr (bits == 5) {
      const I units = _mm512_mullo_epi32(
          _mm512_set1_epi32(0x05050505), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      const I first = _mm512_loadu_si512(source);
      const I last = _mm512_maskz_loadu_epi8(0xFFFF, source + 64);
      return {
          _mm512_permutex2var_epi8(first, _mm512_add_epi8(units, _mm512_set1_epi32(0x03020100)), last),
          _mm512_permutex2var_epi8(first, _mm512_add_epi8(units, _mm512_set1_epi32(0x04030201)), last)};
    } else {
      return {_mm512_loadu_si512(source), I()};
    }
  }
  // Element j of each half of a unit in the low bits of the lane; the other bits are anything.
  template <int bits, int j>
  static I half_codes(const HalfUnits& units) {
    if constexpr (bits == 3 || bits == 6) {
      return _mm512_srlv_epi16(units.low, _mm512_set1_epi32((4 + bits * j) << 16 | bits * j));
    } else if constexpr (bits == 5) {
      return j < 2 ? _mm512_srlv_epi16(units.low, _mm512_set1_epi32((4 + 5 * j) << 16 | 5 * j))
                   : _mm512_srlv_epi16(units.high, _mm512_set1_epi32((5 * j - 4) << 16 | (5 * j - 8)));
    } else {
      return j == 0 ? units.low : _mm512_srli_epi16(units.low, bits * j);
    }
  }
  static I lookup_half(I index, I table) { return _mm512_permutexvar_epi16(index, table); }
  static I lookup_half_in_two(I index, I low, I high) { return _mm512_permutex2var_epi16(low, index, high); }
  // Byte j of each lane in a table of 128 for its low bits; its top bit becomes the sign.
  template <int j>
  static I lookup_signed_byte(I lanes16, const uint16_t* table) {
    const I codes = j == 0 ? lanes16 : _mm512_srli_epi16(lanes16, 8);
    const I below64 = _mm512_permutex2var_epi16(load_integers(table), codes, load_integers(table + 32));
    const I above64 = _mm512_permutex2var_epi16(load_integers(table + 64), codes, load_integers(table + 96));
    const __mmask32 is_above = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
    const I sign = j == 0 ? _mm512_slli_epi16(lanes16, 8) : lanes16;
    return _mm512_ternarylogic_epi32(
        _mm512_mask_mov_epi16(below64, is_above, above64), sign, _mm512_set1_epi16(INT16_MIN), 0xF8);  // a | (b & c)
  }
  template <int bits>
  static I low_bits_or(I value, I other) {
    return _mm512_ternarylogic_epi32(value, _mm512_set1_epi16((1 << bits) - 1), other, 0xEA);  // (a & b) | c
  }
  // The number of each unit's group, for groups of 2^shift units, above `bits` bits.
  static I half_groups(int shift, int bits) {
    const I groups = _mm512_slli_epi32(lane_groups(shift), bits);
    return _mm512_or_si512(groups, _mm512_slli_epi32(groups, 16));
  }

  // --- bytes and 32-bit integers ---
  static I zero_integers() { return _mm512_setzero_si512(); }
  static I add_integers(I a, I b) { return _mm512_add_epi32(a, b); }
  static int sum_integers(I value) { return _mm512_reduce_add_epi32(value); }
  static F integers_as_floats(I value) { return _mm512_cvtepi32_ps(value); }
  static I rounded_integers(F value) { return _mm512_cvtps_epi32(value); }
  // As integers, magnitudes order like the numbers, then infinity, then NaN.
  static I magnitude_bits(F value) {
    return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF));
  }
  static I larger(I a, I b) { return _mm512_max_epi32(a, b); }
  static uint32_t largest(I value) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(value)); }
  static void store_int8(uint8_t* destination, I value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(destination), _mm512_cvtepi32_epi8(value));
  }
  static I broadcast_four_bytes(const uint8_t* source) {
    int32_t bytes;
    std::memcpy(&bytes, source, 4);
    return _mm512_set1_epi32(bytes);
  }
  static I dot_bytes(I of_unsigned, I of_signed, I sum) { return _mm512_dpbusd_epi32(sum, of_unsigned, of_signed); }

  // The units of a block in 32-bit lanes; of the five bytes of five-bit units, part 0 has the first four and part 1 the
  // last four.
  template <int bits, int part>
  static I load_byte_units(const uint8_t* source) {
    if constexpr (bits == 3 || bits == 6) {
      const I index = _mm512_add_epi8(unit_starts(3), _mm512_set1_epi32(0x02020100));
      return _mm512_permutexvar_epi8(index, _mm512_maskz_loadu_epi8((1ull << 48) - 1, source));
    } else if constexpr (bits == 5) {
      const I index = _mm512_add_epi8(unit_starts(5), _mm512_set1_epi32(part == 0 ? 0x03020100 : 0x04030201));
      return _mm512_permutex2var_epi8(_mm512_loadu_si512(source), index, _mm512_maskz_loadu_epi8(0xFFFF, source + 64));
    } else {
      return _mm512_loadu_si512(source);
    }
  }
  // In each byte of lane i the number of the first byte of unit i.
  static I unit_starts(int bytes) {
    return _mm512_mullo_epi32(
        _mm512_set1_epi32(0x01010101 * bytes), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  // Byte vector v of units, or of the part that has it.
  template <int bits, int v>
  static I code_bytes(I units) {
    if constexpr (bits == 8) {
      return units;
    } else if constexpr (bits == 2 || bits == 4) {
      const I shifted = v == 0 ? units : _mm512_srli_epi32(units, v * bits);
      return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << bits) - 1));
    } else {
      // Eight bits from any bit of 64 on; the last part of a five-bit unit begins at bit 8.
      constexpr int first = bits == 5 ? 12 * v : 4 * bits * v;
      constexpr int even = first | (first + bits) << 8 | (first + 2 * bits) << 16 | (first + 3 * bits) << 24;
      const I offsets = _mm512_set1_epi64(static_cast<int64_t>(even + 0x20202020) << 32 | even);
      return _mm512_and_si512(_mm512_multishift_epi64_epi8(offsets, units), _mm512_set1_epi8((1 << bits) - 1));
    }
  }
  static I doubled_e2m1_plus_12(I codes) {
    return _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)), codes);
  }
  // The elements of each unit in the order in which code_bytes of two or four bits yields them.
  template <int bits>
  static I order_of_shifts(I elements) {
    const __m128i order = bits == 4 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                    : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(elements, _mm512_broadcast_i32x4(order));
  }
  // Four 32-bit lanes of sixteen rows `stride` bytes apart, as four vectors whose lanes are the rows.
  static void load_transposed(const uint8_t* rows, int64_t stride, I (&columns)[4]) {
    I of_rows[4];  // in quarter q of number i, row 4 q + i
    for (int i = 0; i < 4; ++i) {
      const auto quarter = [&](int q) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (4 * q + i) * stride));
      };
      of_rows[i] = _mm512_broadcast_i32x4(quarter(0));
      of_rows[i] = _mm512_mask_broadcast_i32x4(of_rows[i], 0x00F0, quarter(1));
      of_rows[i] = _mm512_mask_broadcast_i32x4(of_rows[i], 0x0F00, quarter(2));
      of_rows[i] = _mm512_mask_broadcast_i32x4(of_rows[i], 0xF000, quarter(3));
    }
    const I low01 = _mm512_unpacklo_epi32(of_rows[0], of_rows[1]);
    const I low23 = _mm512_unpacklo_epi32(of_rows[2], of_rows[3]);
    const I high01 = _mm512_unpackhi_epi32(of_rows[0], of_rows[1]);
    const I high23 = _mm512_unpackhi_epi32(of_rows[2], of_rows[3]);
    columns[0] = _mm512_unpacklo_epi64(low01, low23);
    columns[1] = _mm512_unpackhi_epi64(low01, low23);
    columns[2] = _mm512_unpacklo_epi64(high01, high23);
    columns[3] = _mm512_unpackhi_epi64(high01, high23);
  }
};

}  // namespace
}  // namespace quantization_mlx::cpu
