// Four lanes of NEON.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace quantization_mlx::cpu {
namespace {

struct Vector {
  static constexpr int lanes = 4;
  static constexpr int registers = 32;
  static constexpr bool has_bfloat16 = false;
  using F = float32x4_t;
  using I = uint32x4_t;

  static F zero() { return vdupq_n_f32(0.0f); }
  static F set(float value) { return vdupq_n_f32(value); }
  static F load(const float* source) { return vld1q_f32(source); }
  static void store(float* destination, F value) { vst1q_f32(destination, value); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static float sum(F value) { return vaddvq_f32(value); }

  static uint16x4_t load_16_bits(const uint8_t* source) { return vreinterpret_u16_u8(vld1_u8(source)); }
  static void copy_below_64(uint8_t* destination, const uint8_t* source, int64_t count) {
    std::memcpy(destination, source, static_cast<size_t>(count));
  }
  static I load_bytes(const uint8_t* source) {
    uint32_t four;
    std::memcpy(&four, source, sizeof four);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
  }
  static F load_float16(const uint8_t* source) { return vcvt_f32_f16(vreinterpret_f16_u16(load_16_bits(source))); }
  static void store_float16(void* destination, F value) {
    vst1_u8(static_cast<uint8_t*>(destination), vreinterpret_u8_f16(vcvt_f16_f32(value)));
  }
  static F load_bfloat16(const uint8_t* source) { return vreinterpretq_f32_u32(vshll_n_u16(load_16_bits(source), 16)); }

  // Four units of `bytes` bytes, one per lane, from byte `skip` of each on. Overlapping loads stay inside the units.
  template <int bytes, int skip>
  static I load_units(const uint8_t* source) {
    if constexpr (bytes == 4) {
      return vreinterpretq_u32_u8(vld1q_u8(source));
    } else if constexpr (bytes == 3) {
      const uint8x16_t packed = vcombine_u8(vld1_u8(source), vld1_u8(source + 4));
      const uint8x16_t index = {0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 12, 255, 13, 14, 15, 255};
      return vreinterpretq_u32_u8(vqtbl1q_u8(packed, index));
    } else {
      // Byte b of the units is byte b of the first load up to 15 and byte b + 12 of the pair from 16 on.
      const uint8x16x2_t packed = {vld1q_u8(source), vld1q_u8(source + 4)};
      const uint8x16_t first = {0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 28, 29, 30};
      const uint8x16_t second = {1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 28, 29, 30, 31};
      return vreinterpretq_u32_u8(vqtbl2q_u8(packed, skip == 0 ? first : second));
    }
  }

  template <int shift>
  static I shifted(I units) {
    if constexpr (shift == 0) {
      return units;
    } else {
      return vshrq_n_u32(units, shift);
    }
  }
  template <int width, int shift>
  static F unsigned_code(I units) {
    return vcvtq_f32_u32(vandq_u32(shifted<shift>(units), vdupq_n_u32((1u << width) - 1)));
  }
  // The top two bytes of an E2M1 value as float32 have one non-zero byte each: look both up.
  template <int shift>
  static F e2m1(I units) {
    const uint8x16_t high = {0,    0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40,
                             0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
    const uint8x16_t low = {0, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0, 0, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0};
    // The code in byte 0 of each lane; the other bytes index past the table and give 0.
    const I codes = vorrq_u32(vandq_u32(shifted<shift>(units), vdupq_n_u32(15)), vdupq_n_u32(0xFFFFFF00u));
    const I upper = vreinterpretq_u32_u8(vqtbl1q_u8(high, vreinterpretq_u8_u32(codes)));
    const I lower = vreinterpretq_u32_u8(vqtbl1q_u8(low, vreinterpretq_u8_u32(codes)));
    return vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32(upper, 24), vshlq_n_u32(lower, 16)));
  }
  template <int shift>
  static F e4m3(I units) {
    const I code = shifted<shift>(units);
    const I low = vandq_u32(code, vdupq_n_u32(0x7F));
    const I normal = vaddq_u32(vshlq_n_u32(low, 20), vdupq_n_u32(120u << 23));
    const F subnormal = vmulq_n_f32(vcvtq_f32_u32(low), 0.001953125f);
    const I finite = vbslq_u32(vcltq_u32(low, vdupq_n_u32(8)), vreinterpretq_u32_f32(subnormal), normal);
    const I nan = vandq_u32(vceqq_u32(low, vdupq_n_u32(0x7F)), vdupq_n_u32(0x7FC00000));
    const I sign = vshlq_n_u32(vandq_u32(code, vdupq_n_u32(0x80)), 24);
    return vreinterpretq_f32_u32(vorrq_u32(finite, vorrq_u32(nan, sign)));
  }

  static void unzip(F a, F b, F& even, F& odd) {
    even = vuzp1q_f32(a, b);
    odd = vuzp2q_f32(a, b);
  }
  static void sum_each(const F (&values)[4], float* sums) {
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32(values[0], values[1]), vpaddq_f32(values[2], values[3])));
  }

  // Byte indices into a vector of scales.
  static I lane_groups(int shift) {
    const I number = {0, 1, 2, 3};
    return vmlaq_n_u32(vdupq_n_u32(0x03020100u), vshlq_u32(number, vdupq_n_s32(-shift)), 0x04040404u);
  }
  static I later_groups(I index, int count) {
    return vaddq_u32(index, vdupq_n_u32(0x04040404u * static_cast<uint32_t>(count)));
  }
  static F lookup(F table, I index) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(table), vreinterpretq_u8_u32(index)));
  }
};

}  // namespace
}  // namespace quantization_mlx::cpu
