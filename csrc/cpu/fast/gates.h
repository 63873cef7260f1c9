// Gated activations: what becomes of gates, times what they gate.
#pragma once

#include "../isa/real.h"
#include "functions.h"

namespace quantization_mlx::cpu {
namespace {

// x * sigmoid(argument), zero where that is below what float32 can tell from it.
ALWAYS_INLINE F times_sigmoid(F x, F argument) {
  const Floats minus = -(Floats)argument;
  const Floats power = (Floats)exponential((F)minus);
  const Floats infinity = (Floats)Vector::set(__builtin_inff());
  return (F)((Floats)x / ((minus > 88.0f ? infinity : power) + 1.0f));
}

// x times the standard normal distribution, of which the tail on the side of zero is known.
ALWAYS_INLINE F times_normal(F x) {
  const Floats one = (Floats)Vector::set(1.0f);
  const Floats distance = (Floats)((Words)x & 0x7FFFFFFFu);
  const F t = (F)(one / (Floats)Vector::fma((F)distance, Vector::set(tail_rate), (F)one));
  const F density = exponential((F)(distance * distance * -0.5f));
  const Floats tail = (Floats)Vector::mul(Vector::mul(density, t), polynomial(t, tail_coefficients));
  return (F)((Floats)x * ((Floats)x < 0.0f ? tail : one - tail));
}

template <Gate kind>
ALWAYS_INLINE F activated(F x, F alpha) {
  if constexpr (kind == Gate::swiglu) {
    return times_sigmoid(x, Vector::mul(x, alpha));
  } else if constexpr (kind == Gate::geglu_tanh) {
    const F slope = Vector::fma(Vector::mul(x, x), Vector::set(tanh_third), Vector::set(tanh_first));
    return times_sigmoid(x, Vector::mul(x, slope));
  } else {
    return times_normal(x);
  }
}

// Adjacent elements of a row.
struct GateOperands {
  const uint8_t* gates;
  const uint8_t* values;
  const uint8_t* gate_bias;  // null for none, as value_bias then
  const uint8_t* value_bias;
};

// NaN passes every comparison by.
template <Gate kind, Real type>
void gate_vectors(const GatedRow& row, const GateOperands& of, int64_t count, uint8_t* y) {
  const F alpha = Vector::set(row.alpha);
  const F offset = Vector::set(row.offset);
  const Floats limit = (Floats)Vector::set(row.limit);
  for_vectors(count, [&](int64_t i, auto some) __attribute__((always_inline)) {
    const int64_t place = i * real_bytes(type);
    Floats gate = (Floats)load_some(type, of.gates + place, some);
    Floats value = (Floats)load_some(type, of.values + place, some);
    if (of.gate_bias != nullptr) {
      gate += (Floats)load_some(type, of.gate_bias + place, some);
      value += (Floats)load_some(type, of.value_bias + place, some);
    }
    gate = gate > limit ? limit : gate;
    value = value > limit ? limit : (value < -limit ? -limit : value);
    store_some(type, y + place, Vector::mul(activated<kind>((F)gate, alpha), Vector::add((F)value, offset)), some);
  });
}

// Elements that are not adjacent are made so, some at a time.
constexpr int64_t packed_elements = 512;

template <typename Element>
const uint8_t* packed(const uint8_t* first, int64_t stride, int64_t begin, int64_t count, Element* destination) {
  constexpr auto bytes = static_cast<int64_t>(sizeof(Element));
  const uint8_t* source = first == nullptr ? nullptr : first + begin * stride * bytes;
  if (stride == 1 || source == nullptr) {
    return source;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(destination + i, source + i * stride * bytes, sizeof(Element));
  }
  return reinterpret_cast<const uint8_t*>(destination);
}

template <Gate kind, Real type>
void gate_row(const GatedRow& row) {
  using Element = std::conditional_t<type == Real::float32, uint32_t, uint16_t>;
  constexpr int64_t bytes = sizeof(Element);
  if (row.gates_stride == 1 && row.values_stride == 1 && row.gate_bias_stride == 1 && row.value_bias_stride == 1) {
    return gate_vectors<kind, type>(row, {row.gates, row.values, row.gate_bias, row.value_bias}, row.count, row.y);
  }
  Element copies[4][packed_elements];
  for (int64_t i = 0; i < row.count; i += packed_elements) {
    const int64_t count = min(packed_elements, row.count - i);
    const GateOperands operands{
        packed(row.gates, row.gates_stride, i, count, copies[0]),
        packed(row.values, row.values_stride, i, count, copies[1]),
        packed(row.gate_bias, row.gate_bias_stride, i, count, copies[2]),
        packed(row.value_bias, row.value_bias_stride, i, count, copies[3])};
    gate_vectors<kind, type>(row, operands, count, row.y + i * bytes);
  }
}

void gate(const GatedRow& row) {
  with_type(row.type, [&](auto type) {
    switch (row.kind) {
      case Gate::swiglu: return gate_row<Gate::swiglu, type>(row);
      case Gate::geglu: return gate_row<Gate::geglu, type>(row);
      case Gate::geglu_tanh: return gate_row<Gate::geglu_tanh, type>(row);
    }
  });
}

}  // namespace
}  // namespace quantization_mlx::cpu
