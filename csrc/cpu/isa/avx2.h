// Eight lanes of AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace quantization_mlx::cpu {
namespace {

struct Vector {
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  static constexpr bool has_bfloat16 = false;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float value) { return _mm256_set1_ps(value); }
  static F load(const float* source) { return _mm256_loadu_ps(source); }
  static void store(float* destination, F value) { _mm256_storeu_ps(destination, value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(F value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static __m128i load_half(const uint8_t* source) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source)); }
  static void copy_below_64(uint8_t* destination, const uint8_t* source, int64_t count) {
    std::memcpy(destination, source, static_cast<size_t>(count));
  }
  static I load_bytes(const uint8_t* source) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
  }
  static F load_float16(const uint8_t* source) { return _mm256_cvtph_ps(load_half(source)); }
  static void store_float16(void* destination, F value) {
    _mm_storeu_si128(static_cast<__m128i*>(destination), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_bfloat16(const uint8_t* source) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(source)), 16));
  }

  // Eight units of `bytes` bytes, one per lane, from byte `skip` of each on. Overlapping loads stay inside the units.
  template <int bytes, int skip>
  static I load_units(const uint8_t* source) {
    if constexpr (bytes == 4) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    } else if constexpr (bytes == 3) {
      // Units 0..3 from byte 0 of the lower half, units 4..7 from byte 4 of the upper half.
      const I packed = _mm256_set_m128i(load_half(source + 8), load_half(source));
      return _mm256_shuffle_epi8(
          packed,
          _mm256_setr_epi8(
              0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14,
              15, -1));
    } else {
      // Two units from each of four loads, the odd loads six bytes in.
      const I first = _mm256_set_m128i(load_half(source + 4), load_half(source));
      const I second = _mm256_set_m128i(load_half(source + 24), load_half(source + 20));
      constexpr int a = skip;
      constexpr int b = skip + 6;
      const I low = _mm256_setr_epi8(
          a, a + 1, a + 2, a + 3, a + 5, a + 6, a + 7, a + 8, -1, -1, -1, -1, -1, -1, -1, -1, b, b + 1, b + 2, b + 3,
          b + 5, b + 6, b + 7, b + 8, -1, -1, -1, -1, -1, -1, -1, -1);
      const I high = _mm256_setr_epi8(
          -1, -1, -1, -1, -1, -1, -1, -1, a, a + 1, a + 2, a + 3, a + 5, a + 6, a + 7, a + 8, -1, -1, -1, -1, -1, -1,
          -1, -1, b, b + 1, b + 2, b + 3, b + 5, b + 6, b + 7, b + 8);
      // Quarters now hold units 0 1 | 4 5 | 2 3 | 6 7.
      return _mm256_permute4x64_epi64(
          _mm256_or_si256(_mm256_shuffle_epi8(first, low), _mm256_shuffle_epi8(second, high)), 0b11011000);
    }
  }

  template <int width, int shift>
  static F unsigned_code(I units) {
    const I shifted = shift == 0 ? units : _mm256_srli_epi32(units, shift);
    return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32((1 << width) - 1)));
  }
  // The look-up uses the low three bits of each lane; the fourth becomes the sign.
  template <int shift>
  static F e2m1(I units) {
    const I shifted = shift == 0 ? units : _mm256_srli_epi32(units, shift);
    const F size = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6), shifted);
    const I sign = _mm256_and_si256(_mm256_slli_epi32(shifted, 28), _mm256_set1_epi32(INT32_MIN));
    return _mm256_or_ps(size, _mm256_castsi256_ps(sign));
  }
  template <int shift>
  static F e4m3(I units) {
    const I shifted = shift == 0 ? units : _mm256_srli_epi32(units, shift);
    const I low = _mm256_and_si256(shifted, _mm256_set1_epi32(0x7F));
    const I normal = _mm256_add_epi32(_mm256_slli_epi32(low, 20), _mm256_set1_epi32(120 << 23));
    const F subnormal = _mm256_mul_ps(_mm256_cvtepi32_ps(low), _mm256_set1_ps(0.001953125f));
    const I is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), low);
    const I is_nan = _mm256_cmpeq_epi32(low, _mm256_set1_epi32(0x7F));
    const F finite = _mm256_blendv_ps(_mm256_castsi256_ps(normal), subnormal, _mm256_castsi256_ps(is_subnormal));
    const I nan = _mm256_and_si256(is_nan, _mm256_set1_epi32(0x7FC00000));
    const I sign = _mm256_slli_epi32(_mm256_and_si256(shifted, _mm256_set1_epi32(0x80)), 24);
    return _mm256_or_ps(finite, _mm256_castsi256_ps(_mm256_or_si256(sign, nan)));
  }

  static F middle_swapped(F value) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(value), 0b11011000));
  }
  static void unzip(F a, F b, F& even, F& odd) {
    even = middle_swapped(_mm256_shuffle_ps(a, b, 0b10001000));
    odd = middle_swapped(_mm256_shuffle_ps(a, b, 0b11011101));
  }
  static void sum_each(const F (&values)[4], float* sums) {
    const F halves = _mm256_hadd_ps(_mm256_hadd_ps(values[0], values[1]), _mm256_hadd_ps(values[2], values[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }

  static I lane_groups(int shift) {
    return _mm256_srlv_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(shift));
  }
  static I later_groups(I index, int count) { return _mm256_add_epi32(index, _mm256_set1_epi32(count)); }
  static F lookup(F table, I index) { return _mm256_permutevar8x32_ps(table, index); }
};

}  // namespace
}  // namespace quantization_mlx::cpu
