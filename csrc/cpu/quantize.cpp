// quantize and dequantize: scalar code straight from format.h, one row of groups per task.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "ops.h"
#include "parallel.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

constexpr int max_group_size = 128;

// Groups of one task: long enough to outweigh handing it out.
constexpr int64_t task_groups = 256;

// Packs count codes into a little-endian bit stream that starts at a byte; count * bits is a multiple of 8.
void pack_codes(const uint32_t* codes, int count, int bits, uint8_t* destination) {
  uint64_t pending = 0;
  int held = 0;
  for (int i = 0; i < count; ++i) {
    pending |= static_cast<uint64_t>(codes[i]) << held;
    held += bits;
    while (held >= 8) {
      *destination++ = static_cast<uint8_t>(pending);
      pending >>= 8;
      held -= 8;
    }
  }
}

void unpack_codes(const uint8_t* source, int count, int bits, uint32_t* codes) {
  uint64_t pending = 0;
  int held = 0;
  for (int i = 0; i < count; ++i) {
    while (held < bits) {
      pending |= static_cast<uint64_t>(*source++) << held;
      held += 8;
    }
    codes[i] = static_cast<uint32_t>(pending) & ((1u << bits) - 1);
    pending >>= bits;
    held -= bits;
  }
}

float decode_scale(Scale type, uint8_t scale) {
  return type == Scale::e4m3 ? e4m3_to_float(scale) : e8m0_to_float(scale);
}

// The value of each code before it is scaled.
struct CodeValues {
  float of[256];

  explicit CodeValues(Format format) {
    for (uint32_t code = 0; code < 1u << format.bits; ++code) {
      of[code] = element_value(format.mode, code);
    }
  }
};

template <typename T>
void quantize_affine(const float* values, Format format, uint32_t* codes, T* scale, T* bias) {
  const auto [minimum, maximum] = std::minmax_element(values, values + format.group_size);
  const AffineParameters parameters = affine_parameters(*minimum, *maximum, format.bits);
  for (int i = 0; i < format.group_size; ++i) {
    codes[i] = affine_code(values[i], parameters, format.bits);
  }
  *scale = static_cast<T>(parameters.scale);
  *bias = static_cast<T>(parameters.bias);
}

// `encode` is nvfp4_encode_factor of the global scale, or 1. Quotients round to T, the type of w, as in MLX: that
// matters where they are subnormal in float16, and with E4M3 scales.
template <typename T>
void quantize_fp(const float* values, Format format, float encode, uint32_t* codes, uint8_t* scale) {
  const auto rounded = [](float quotient) { return static_cast<float>(static_cast<T>(quotient)); };
  float absmax = 0.0f;
  for (int i = 0; i < format.group_size; ++i) {
    absmax = std::max(absmax, magnitude(values[i]));
  }
  const ModeTraits traits = traits_of(format.mode);
  const bool e4m3_scale = traits.scale == Scale::e4m3;
  const float ratio = rounded(fp_scale_ratio(format.mode, absmax));
  *scale = static_cast<uint8_t>(e4m3_scale ? e4m3_from_float(ratio * encode) : e8m0_from_ratio(ratio));
  const float decoded = decode_scale(traits.scale, *scale);
  for (int i = 0; i < format.group_size; ++i) {
    // A group too small for any E4M3 scale becomes zeros.
    const float value = decoded == 0.0f ? 0.0f
        : e4m3_scale                    ? rounded(values[i] / decoded) * encode
                                        : values[i] / decoded;
    codes[i] = traits.element == Element::e4m3 ? e4m3_from_float(value) : e2m1_from_float(value);
  }
}

template <typename T>
void quantize_groups(const QuantizeProblem& problem, Tensor& words, Tensor& scales, Tensor& biases) {
  const Format format = problem.format;
  const int64_t group_bytes = format.group_size * format.bits / 8;
  const T* w = problem.w.const_data_ptr<T>();
  uint8_t* packed = static_cast<uint8_t*>(words.mutable_data_ptr());
  const float encode =
      problem.global_scale.defined() ? nvfp4_encode_factor(*problem.global_scale.const_data_ptr<float>()) : 1.0f;
  parallel_chunks(scales.numel(), task_groups, [&](int64_t group) {
    float values[max_group_size];
    uint32_t codes[max_group_size];
    std::copy_n(w + group * format.group_size, format.group_size, values);
    if (has_biases(format.mode)) {
      quantize_affine(
          values, format, codes, scales.mutable_data_ptr<T>() + group, biases.mutable_data_ptr<T>() + group);
    } else {
      quantize_fp<T>(values, format, encode, codes, scales.mutable_data_ptr<uint8_t>() + group);
    }
    pack_codes(codes, format.group_size, format.bits, packed + group * group_bytes);
  });
}

// T is the result's type, S the type of affine scales and biases.
template <typename T, typename S>
void dequantize_groups(const DequantizeProblem& problem, Tensor& result) {
  const QuantizedMatrices& weights = problem.weights;
  const Format format = weights.format;
  const Tensor words = weights.words.tensor.contiguous();
  const Tensor scales = weights.scales.tensor.contiguous();
  const Tensor biases = weights.biases.tensor.defined() ? weights.biases.tensor.contiguous() : Tensor();
  const int64_t group_bytes = format.group_size * format.bits / 8;
  const uint8_t* packed = static_cast<const uint8_t*>(words.const_data_ptr());
  const float factor =
      weights.global_scale.defined() ? nvfp4_decode_factor(*weights.global_scale.const_data_ptr<float>()) : 1.0f;
  T* destination = result.mutable_data_ptr<T>();
  const CodeValues code_values(format);
  const Scale scale_type = traits_of(format.mode).scale;
  parallel_chunks(scales.numel(), task_groups, [&](int64_t group) {
    uint32_t codes[max_group_size];
    unpack_codes(packed + group * group_bytes, format.group_size, format.bits, codes);
    float scale;
    float bias = 0.0f;
    if (biases.defined()) {
      scale = static_cast<float>(scales.const_data_ptr<S>()[group]);
      bias = static_cast<float>(biases.const_data_ptr<S>()[group]);
    } else {
      scale = decode_scale(scale_type, scales.const_data_ptr<uint8_t>()[group]) * factor;
    }
    T* values = destination + group * format.group_size;
    for (int i = 0; i < format.group_size; ++i) {
      values[i] = static_cast<T>(code_values.of[codes[i]] * scale + bias);
    }
  });
}

// --- Column-packed matrices ----------------------------------------------------------------------------------------
// Rows of a few columns at a time, so that every pass over them reads and writes whole cache lines.

constexpr int64_t columns_at_once = 64;

// The columns [begin, end) of one group of one matrix.
struct ColumnGroup {
  int64_t matrix_group;  // counted through all matrices
  int64_t begin;
  int64_t end;

  int64_t count() const { return end - begin; }
};

template <typename Function>
void for_column_groups(int64_t groups, int64_t columns, const Function& function) {
  const int64_t parts = (columns + columns_at_once - 1) / columns_at_once;
  parallel_tasks(groups * parts, [&](int64_t task, int) {
    const int64_t begin = task % parts * columns_at_once;
    function(ColumnGroup{task / parts, begin, std::min(begin + columns_at_once, columns)});
  });
}

template <typename T>
void quantize_columns(const QuantizeProblem& problem, Tensor& words, Tensor& scales, Tensor& zeros) {
  const Format format = problem.format;
  const int64_t N = problem.w.size(-1);
  const int word_codes = 32 / format.bits;
  const int64_t group_words = format.group_size / word_codes;
  uint32_t* packed = static_cast<uint32_t*>(words.mutable_data_ptr());
  c10::Half* group_scales = scales.mutable_data_ptr<c10::Half>();
  c10::Half* group_zeros = has_zeros(format.mode) ? zeros.mutable_data_ptr<c10::Half>() : nullptr;
  for_column_groups(scales.numel() / N, N, [&](const ColumnGroup& columns) {
    const T* w = problem.w.const_data_ptr<T>() + columns.matrix_group * format.group_size * N + columns.begin;
    float minimum[columns_at_once];
    float maximum[columns_at_once];
    std::fill_n(minimum, columns.count(), std::numeric_limits<float>::infinity());
    std::fill_n(maximum, columns.count(), -std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < format.group_size; ++k) {
      for (int64_t c = 0; c < columns.count(); ++c) {
        const float value = static_cast<float>(w[k * N + c]);
        minimum[c] = value < minimum[c] ? value : minimum[c];
        maximum[c] = value > maximum[c] ? value : maximum[c];
      }
    }
    float scale[columns_at_once];
    float zero[columns_at_once];
    for (int64_t c = 0; c < columns.count(); ++c) {
      const int64_t position = columns.matrix_group * N + columns.begin + c;
      const uint32_t bits = column_scale_bits(format.mode, minimum[c], maximum[c]);
      scale[c] = float16_to_float(bits);
      zero[c] = column_stored_zero(format.mode, minimum[c], scale[c]);
      group_scales[position] = c10::Half(static_cast<uint16_t>(bits), c10::Half::from_bits());
      if (group_zeros != nullptr) {
        group_zeros[position] = zero[c];
      }
    }
    for (int64_t row = 0; row < group_words; ++row) {
      uint32_t* destination = packed + (columns.matrix_group * group_words + row) * N + columns.begin;
      for (int64_t c = 0; c < columns.count(); ++c) {
        uint32_t word = 0;
        for (int i = 0; i < word_codes; ++i) {
          const float value = static_cast<float>(w[(row * word_codes + i) * N + c]);
          word |= column_code(format.mode, value, scale[c], zero[c]) << (i * format.bits);
        }
        destination[c] = word;
      }
    }
  });
}

template <typename T>
void dequantize_columns(const DequantizeProblem& problem, Tensor& result) {
  const QuantizedMatrices& weights = problem.weights;
  const Format format = weights.format;
  const Tensor words = weights.words.tensor.contiguous();
  const Tensor scales = weights.scales.tensor.contiguous();
  const Tensor zeros = has_zeros(format.mode) ? weights.biases.tensor.contiguous() : Tensor();
  const int64_t N = words.size(-1);
  const int word_codes = 32 / format.bits;
  const uint32_t mask = (1u << format.bits) - 1;
  const int64_t group_words = format.group_size / word_codes;
  const uint32_t* packed = static_cast<const uint32_t*>(words.const_data_ptr());
  const CodeValues code_values(format);
  for_column_groups(scales.numel() / N, N, [&](const ColumnGroup& columns) {
    const int64_t first = columns.matrix_group * N + columns.begin;
    float scale[columns_at_once];
    float zero[columns_at_once];
    for (int64_t c = 0; c < columns.count(); ++c) {
      scale[c] = scales.const_data_ptr<c10::Half>()[first + c];
      zero[c] = column_zero(
          format.mode, zeros.defined() ? static_cast<float>(zeros.const_data_ptr<c10::Half>()[first + c]) : 0.0f);
    }
    for (int64_t row = 0; row < group_words; ++row) {
      const int64_t word_row = columns.matrix_group * group_words + row;
      const uint32_t* source = packed + word_row * N + columns.begin;
      T* destination = result.mutable_data_ptr<T>() + word_row * word_codes * N + columns.begin;
      for (int i = 0; i < word_codes; ++i) {
        for (int64_t c = 0; c < columns.count(); ++c) {
          const float element = code_values.of[source[c] >> (i * format.bits) & mask];
          destination[i * N + c] = static_cast<T>((element - zero[c]) * scale[c]);
        }
      }
    }
  });
}

// Calls function(T()) with the C++ type of an activation dtype.
template <typename Function>
void with_type(at::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case at::kHalf: return function(c10::Half());
    case at::kBFloat16: return function(c10::BFloat16());
    default: return function(float());
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> run(const QuantizeProblem& problem) {
  auto [words, scales, biases] = empty_quantized(problem);
  with_type(problem.w.scalar_type(), [&, &words = words, &scales = scales, &biases = biases](auto type) {
    using T = decltype(type);
    if (words.numel() == 0) {
      return;
    }
    const auto run = is_column_packed(problem.format.mode) ? quantize_columns<T> : quantize_groups<T>;
    run(problem, words, scales, biases);
  });
  return {words, scales, biases};
}

Tensor run(const DequantizeProblem& problem) {
  const auto options = problem.weights.words.tensor.options().dtype(problem.dtype);
  Tensor result = at::empty(problem.output, options);
  if (result.numel() == 0) {
    return result;
  }
  with_type(problem.dtype, [&](auto type) {
    if (is_column_packed(problem.weights.format.mode)) {
      return dequantize_columns<decltype(type)>(problem, result);
    }
    with_type(problem.weights.scales.tensor.scalar_type(), [&](auto scale_type) {
      dequantize_groups<decltype(type), decltype(scale_type)>(problem, result);
    });
  });
  return result;
}

}  // namespace quantization_mlx::cpu
