// AVX-512 (F, BW, DQ, VL). The BF16 instructions stand only in the bfloat16 tile, which runs where the machine has
// them.
#include "kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header leaves the masked-off operand of its intrinsics uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

namespace {

struct Vector {
  static constexpr bool has_bfloat16 = true;
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  using F = __m512;
  using I = __m512i;
  using Pairs = __m512bh;

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
  static F load_bfloat16(const uint8_t* source) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  // Byte 0 is the subnormal 2^-127, the only value whose exponent bits alone do not say it.
  static F load_e8m0(const uint8_t* source) {
    return _mm512_castsi512_ps(
        _mm512_max_epi32(_mm512_slli_epi32(load_bytes(source), 23), _mm512_set1_epi32(0x00400000)));
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
  static F lookup(F table, I index) { return _mm512_permutexvar_ps(index, table); }

  // Two vectors as one of bfloat16 lanes.
  static void store_pairs(void* destination, F first, F second) {
    const Pairs pairs = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(destination, &pairs, sizeof pairs);
  }
  static Pairs load_pairs(const void* source) {
    Pairs pairs;
    std::memcpy(&pairs, source, sizeof pairs);
    return pairs;
  }
  static F dot_pairs(Pairs a, Pairs b, F sum) { return _mm512_dpbf16_ps(sum, a, b); }
};

}  // namespace

#include "product.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quantization_mlx::cpu {

const Kernels* avx512_kernels() {
  static const Kernels table = make_table("avx512", __builtin_cpu_supports("avx512bf16"));
  const bool present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma");
  return present ? &table : nullptr;
}

}  // namespace quantization_mlx::cpu

#else

const quantization_mlx::cpu::Kernels* quantization_mlx::cpu::avx512_kernels() { return nullptr; }

#endif
