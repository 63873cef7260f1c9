// Four lanes in the compiler's own vector types, which every target lowers to what it has.
#pragma once

#include <cstring>

#include "../../format.h"

namespace quantization_mlx::cpu {
namespace {

struct Vector {
  static constexpr int lanes = 4;
  static constexpr int registers = 16;
  static constexpr bool has_bfloat16 = false;
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t I __attribute__((vector_size(16)));

  template <typename Function>
  static F each(Function&& lane) {
    return F{lane(0), lane(1), lane(2), lane(3)};
  }

  static F zero() { return F{}; }
  static F set(float value) { return F{value, value, value, value}; }
  static F load(const float* source) {
    F value;
    std::memcpy(&value, source, sizeof value);
    return value;
  }
  static void store(float* destination, F value) { std::memcpy(destination, &value, sizeof value); }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static float sum(F value) { return (value[0] + value[2]) + (value[1] + value[3]); }

  static F bits(I value) {
    F result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  }
  static void copy_below_64(uint8_t* destination, const uint8_t* source, int64_t count) {
    std::memcpy(destination, source, static_cast<size_t>(count));
  }
  static I load_bytes(const uint8_t* source) { return I{source[0], source[1], source[2], source[3]}; }
  static I load_16_bits(const uint8_t* source) {
    uint16_t halves[lanes];
    std::memcpy(halves, source, sizeof halves);
    return I{halves[0], halves[1], halves[2], halves[3]};
  }
  static F load_float16(const uint8_t* source) {
    const I halves = load_16_bits(source);
    return each([&](int lane) { return float16_to_float(halves[lane]); });
  }
  static void store_float16(void* destination, F value) {
    uint16_t halves[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      halves[lane] = static_cast<uint16_t>(float16_from_float(value[lane]));
    }
    std::memcpy(destination, halves, sizeof halves);
  }
  static F load_bfloat16(const uint8_t* source) { return bits(load_16_bits(source) << 16); }

  template <int bytes, int skip>
  static I load_units(const uint8_t* source) {
    I units = {};
    for (int lane = 0; lane < lanes; ++lane) {
      uint32_t unit = 0;
      std::memcpy(&unit, source + lane * bytes + skip, bytes < 4 ? bytes : 4);
      units[lane] = unit;
    }
    return units;
  }
  template <int width, int shift>
  static F unsigned_code(I units) {
    return __builtin_convertvector((units >> shift) & ((1u << width) - 1), F);
  }
  template <int shift>
  static F e2m1(I units) {
    return each([&](int lane) { return e2m1_to_float(units[lane] >> shift); });
  }
  template <int shift>
  static F e4m3(I units) {
    return each([&](int lane) { return e4m3_to_float((units[lane] >> shift) & 0xFFu); });
  }

  static void unzip(F a, F b, F& even, F& odd) {
    even = F{a[0], a[2], b[0], b[2]};
    odd = F{a[1], a[3], b[1], b[3]};
  }
  static void sum_each(const F (&values)[4], float* sums) {
    for (int i = 0; i < 4; ++i) {
      sums[i] = sum(values[i]);
    }
  }

  static I lane_groups(int shift) { return I{0, 1, 2, 3} >> shift; }
  static I later_groups(I index, int count) { return index + static_cast<uint32_t>(count); }
  static F lookup(F table, I index) {
    return each([&](int lane) { return table[index[lane]]; });
  }
};

}  // namespace
}  // namespace quantization_mlx::cpu
