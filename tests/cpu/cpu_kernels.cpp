// The kernels of every instruction set that this machine has, without torch, against float64 on decoded weights.
//
// Small enough to compile for another architecture and run in an emulator, and to run under sanitizers. Every buffer
// ends where the kernels may not go any further. Prints one line per instruction set; exits with 1 when a result is
// outside the bound. With the argument "brief", long sums, which take most of the time, meet only the fewest and the
// most rows, and x of one type.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/kernels.h"

using namespace quantization_mlx;
using namespace quantization_mlx::cpu;

namespace {

struct Case {
  Format format;
  Real scales;  // their type where the mode leaves it open
  Real x_type;
  int64_t rows;
  int64_t K;
  int64_t N;
  bool transpose;

  ScaleType scale_type() const { return weight_format(format, scales).scale_type; }
};

std::mt19937 random_bits(1);

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_bits); }

// Rounds toward zero: any value of the type will do.
uint16_t bfloat16_bits(float value) { return static_cast<uint16_t>(bits_from_float(value) >> 16); }

uint16_t float16_bits(float value) {
  const uint32_t bits = bits_from_float(value);
  const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 112;
  const uint32_t sign = bits >> 16 & 0x8000u;
  return static_cast<uint16_t>(exponent <= 0 ? sign : sign | exponent << 10 | (bits >> 13 & 0x3FFu));
}

void append_real(std::vector<uint8_t>& bytes, Real type, float value) {
  const uint16_t half = type == Real::bfloat16 ? bfloat16_bits(value) : float16_bits(value);
  const auto* source =
      type == Real::float32 ? reinterpret_cast<const uint8_t*>(&value) : reinterpret_cast<const uint8_t*>(&half);
  bytes.insert(bytes.end(), source, source + (type == Real::float32 ? 4 : 2));
}

double read_real(const std::vector<uint8_t>& bytes, Real type, int64_t index) {
  if (type == Real::float32) {
    float value;
    std::memcpy(&value, bytes.data() + index * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, bytes.data() + index * 2, 2);
  return type == Real::bfloat16 ? float_from_bits(static_cast<uint32_t>(half) << 16) : float16_to_float(half);
}

struct Weights {
  std::vector<uint8_t> words;
  std::vector<uint8_t> scales;
  std::vector<uint8_t> biases;
};

Weights random_weights(const Case& test, int64_t elements) {
  Weights weights;
  weights.words.resize(elements * test.format.bits / 8);
  for (auto& byte : weights.words) {
    byte = static_cast<uint8_t>(random_bits());
    if (is_e4m3(test.format.mode) && (byte & 0x7F) == 0x7F) {
      byte = 0;  // NaN
    }
  }
  for (int64_t group = 0; group < elements / test.format.group_size; ++group) {
    switch (test.scale_type()) {
      case ScaleType::e8m0: weights.scales.push_back(static_cast<uint8_t>(120 + random_bits() % 12)); break;
      case ScaleType::e4m3: weights.scales.push_back(static_cast<uint8_t>(random_bits() % 0x7F)); break;
      default:
        append_real(weights.scales, test.scales, uniform());
        if (has_biases(test.format.mode)) {
          append_real(weights.biases, test.scales, uniform() * 8);
        } else if (has_zeros(test.format.mode)) {
          append_real(weights.biases, test.scales, std::nearbyint(uniform() * 20));
        }
    }
  }
  return weights;
}

// Where element (k, n) of the product's right operand is.
struct Place {
  int64_t bit;
  int64_t group;
};

Place place_of(const Case& test, int64_t k, int64_t n) {
  const Format format = test.format;
  if (is_column_packed(format.mode)) {
    const int64_t word_codes = 32 / format.bits;
    return {(k / word_codes * test.N + n) * 32 + k % word_codes * format.bits, k / format.group_size * test.N + n};
  }
  const int64_t element = test.transpose ? n * test.K + k : k * test.N + n;
  return {element * format.bits, element / format.group_size};
}

// A weight, and how large the bias is that its product with x may cancel.
struct Weight {
  double value;
  double bias;
};

Weight decoded(const Case& test, const Weights& weights, const Place& place) {
  uint32_t code = 0;
  for (int64_t bit = 0; bit < test.format.bits; ++bit) {
    const int64_t position = place.bit + bit;
    code |= (weights.words[position / 8] >> position % 8 & 1u) << bit;
  }
  const double element = element_value(test.format.mode, code);
  const Real type = test.scales;
  switch (test.scale_type()) {
    case ScaleType::e8m0: return {element * e8m0_to_float(weights.scales[place.group]), 0.0};
    case ScaleType::e4m3: return {element * e4m3_to_float(weights.scales[place.group]), 0.0};
    default: break;
  }
  const double scale = read_real(weights.scales, type, place.group);
  const double third = weights.biases.empty() ? 0.0 : read_real(weights.biases, type, place.group);
  const double bias =
      is_column_packed(test.format.mode) ? -scale * column_zero(test.format.mode, static_cast<float>(third)) : third;
  return {element * scale + bias, bias};
}

// Elements with nothing behind them: the page that follows the last one may not be accessed. With a sanitizer, which
// looks after the heap, they are there.
template <typename T>
class Exactly {
 public:
  // Operands are aligned as their elements are, buffers between kernels to 16 bytes.
  explicit Exactly(size_t count, size_t alignment = 16) {
#ifdef __SANITIZE_ADDRESS__
    data_ = new T[count]();
    (void)alignment;
#else
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t bytes = count * sizeof(T);
    size_ = (bytes + page - 1) / page * page + page;
    block_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (block_ == MAP_FAILED || mprotect(block_ + size_ - page, page, PROT_NONE) != 0) {
      std::abort();
    }
    data_ = reinterpret_cast<T*>(block_ + (size_ - page - bytes) / alignment * alignment);
#endif
  }
  explicit Exactly(const std::vector<T>& values, size_t alignment) : Exactly(values.size(), alignment) {
    std::copy(values.begin(), values.end(), data_);
  }
  ~Exactly() {
#ifdef __SANITIZE_ADDRESS__
    delete[] data_;
#else
    munmap(block_, size_);
#endif
  }
  Exactly(const Exactly&) = delete;

  T* get() const { return data_; }

 private:
  T* data_;
  char* block_ = nullptr;
  size_t size_ = 0;
};

// A row of x as the kernels multiply it. A value that lies between two integers of int8, up to float32's rounding, may
// become either: `doubt` is then the step between them, else 0.
struct Activation {
  double value;
  double doubt;
};

std::vector<Activation> exact_activations(const Case& test, const std::vector<uint8_t>& x) {
  std::vector<Activation> result;
  for (int64_t i = 0; i < test.rows * test.K; ++i) {
    result.push_back({read_real(x, test.x_type, i), 0.0});
  }
  return result;
}

std::vector<Activation> int8_activations(const Case& test, const std::vector<uint8_t>& x) {
  std::vector<Activation> result = exact_activations(test, x);
  for (size_t group = 0; group < result.size(); group += test.format.group_size) {
    double largest = 0.0;
    for (int i = 0; i < test.format.group_size; ++i) {
      largest = std::fmax(largest, std::fabs(result[group + i].value));
    }
    const double scale = largest / 127;
    for (int i = 0; i < test.format.group_size && scale > 0.0; ++i) {
      const double steps = result[group + i].value / scale;
      const bool between = std::fabs(steps - std::floor(steps) - 0.5) < 1e-4;
      result[group + i] = {std::nearbyint(steps) * scale, between ? scale : 0.0};
    }
  }
  return result;
}

// The largest error relative to the bound; at most 1 is right. Of a case that is skipped only the operands are drawn,
// so that all others have the same ones, and the result is negative.
double run(const Kernels& kernels, const Case& test, Layout layout, bool int8, bool skipped) {
  const ProductKernels& products = int8 ? *kernels.int8 : kernels.exact;
  const Weights weights = random_weights(test, test.K * test.N);
  std::vector<uint8_t> x;
  for (int64_t i = 0; i < test.rows * test.K; ++i) {
    append_real(x, test.x_type, uniform());
  }
  if (skipped) {
    return -1.0;
  }
  const Exactly words(weights.words, 4);
  const Exactly scales(weights.scales, 1);
  const Exactly biases(weights.biases, 1);
  const Exactly activations(x, 1);

  Product product{};
  product.format = weight_format(test.format, test.scales);
  product.x_type = test.x_type;
  product.bfloat16 = kernels.bfloat16;
  product.split = kernels.split;
  product.K = test.K;
  product.N = test.N;
  product.words = words.get();
  product.scales = scales.get();
  product.biases = weights.biases.empty() ? nullptr : biases.get();
  product.rows = test.rows;
  const int64_t packed_row = products.packed_row(product, layout);
  const int64_t row_bytes = test.K * (test.x_type == Real::float32 ? 4 : 2);
  const Exactly<float> packed(product.rows * packed_row);
  for (int64_t m = 0; m < product.rows; ++m) {
    products.pack_row(product, layout, activations.get() + m * row_bytes, packed.get() + m * packed_row);
  }
  product.x = packed.get();
  const Exactly<float> workspace(products.workspace(product));
  product.y_row = (test.N + broadcast_columns - 1) / broadcast_columns * broadcast_columns;
  const Exactly<float> y(test.rows * product.y_row);
  products.multiply[static_cast<int>(layout)](product, 0, test.N, workspace.get(), y.get());

  // Float32 sums of K terms, which one lane adds where x is broadcast; a bfloat16 tile also rounds each weight.
  const bool one_lane = layout == Layout::broadcast || is_column_packed(test.format.mode);
  const bool rounds = !int8 && (layout == Layout::tiled || layout == Layout::broadcast) && product.bfloat16 &&
      test.x_type == Real::bfloat16;
  const double epsilon = std::ldexp(1.0, rounds ? -8 : one_lane ? -20 : -21);
  const std::vector<Activation> multiplied = int8 ? int8_activations(test, x) : exact_activations(test, x);
  double worst = 0.0;
  for (int64_t n = 0; n < test.N; ++n) {
    std::vector<Weight> column;
    for (int64_t k = 0; k < test.K; ++k) {
      column.push_back(decoded(test, weights, place_of(test, k, n)));
    }
    for (int64_t m = 0; m < test.rows; ++m) {
      double expected = 0.0;
      double magnitudes = 0.0;
      double doubt = 0.0;
      for (int64_t k = 0; k < test.K; ++k) {
        const auto [activation, step] = multiplied[m * test.K + k];
        expected += activation * column[k].value;
        magnitudes += std::fabs(activation) * (std::fabs(column[k].value) + 2 * std::fabs(column[k].bias));
        doubt += step * std::fabs(column[k].value);
      }
      const double error =
          std::fabs(y.get()[m * product.y_row + n] - expected) / (epsilon * (magnitudes + 1e-30) + doubt);
      worst = error > worst || std::isnan(error) ? error : worst;
    }
  }
  return worst;
}

// Whether a half-precision type's bits are the nearest to a value, the even ones of two.
bool nearest(Real type, uint32_t bits, float exact) {
  const uint32_t infinity = type == Real::float16 ? 0x7C00u : 0x7F80u;
  const uint32_t size = bits & 0x7FFFu;
  if (std::isnan(exact)) {
    return size > infinity;
  }
  const auto value = [&](uint32_t of) -> double {
    return type == Real::float16 ? float16_to_float(of) : float_from_bits(of << 16);
  };
  // Infinity is as far as the power of two that would follow.
  const auto magnitude = [&](uint32_t of) {
    return of == infinity ? 2 * value(infinity - 1) - value(infinity - 2) : value(of);
  };
  const double wanted = std::fmin(std::fabs(static_cast<double>(exact)), magnitude(infinity));
  const double distance = std::fabs(magnitude(size) - wanted);
  const auto beaten_by = [&](uint32_t neighbor) {
    const double other = std::fabs(magnitude(neighbor) - wanted);
    return other < distance || (other == distance && size % 2 != 0);
  };
  return std::signbit(exact) == (bits >> 15 != 0) && size <= infinity && !(size > 0 && beaten_by(size - 1)) &&
      !(size < infinity && beaten_by(size + 1));
}

bool rounds_to_nearest(const Kernels& kernels, Real type) {
  const float factor = 2.0f;
  std::vector<float> source{0.0f, -0.0f, INFINITY, -INFINITY, 32760.0f, 32759.998f, NAN, -NAN};
  for (int exponent = -150; exponent < 127; ++exponent) {
    for (const float mantissa : {1.0f, -1.00048828125f, 1.00146484375f, -1.00390625f, 1.01171875f, 1.998046875f}) {
      for (const float step : {-1.1920929e-7f, 0.0f, 1.1920929e-7f}) {
        source.push_back(std::ldexp(mantissa + step, exponent));
      }
    }
  }
  const size_t bytes = type == Real::float32 ? 4 : 2;
  const Exactly<uint8_t> result(source.size() * bytes, 1);
  kernels.from_float32(source.data(), factor, static_cast<int64_t>(source.size()), type, result.get());
  for (size_t i = 0; i < source.size(); ++i) {
    const float exact = source[i] * factor;
    uint32_t bits = 0;
    std::memcpy(&bits, result.get() + i * bytes, bytes);
    const bool right = type == Real::float32
        ? std::isnan(exact) ? std::isnan(float_from_bits(bits)) : bits_from_float(exact) == bits
        : nearest(type, bits, exact);
    if (!right) {
      std::printf("%s: %g rounded to type %d is %x\n", kernels.name, exact, static_cast<int>(type), bits);
      return false;
    }
  }
  return true;
}

// Of column-packed weights the smallest and the largest groups.
std::vector<Format> formats() {
  std::vector<Format> all;
  for (int mode = 0; mode < mode_count(); ++mode) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (int group_size : {16, 32, 64, 128}) {
        const Format format{static_cast<Mode>(mode), bits, group_size};
        if (is_supported(format) && !(is_column_packed(format.mode) && group_size == 64)) {
          all.push_back(format);
        }
      }
    }
  }
  return all;
}

std::vector<Real> scale_types(Mode mode) {
  const bool is_real = traits_of(mode).scale == Scale::real;
  return is_real ? std::vector<Real>{Real::float32, Real::float16, Real::bfloat16} : std::vector<Real>{Real::float16};
}

bool check(const Kernels& kernels, bool brief) {
  int cases = 0;
  int failures = 0;
  const auto report = [&](const Kernels& kernels, const Case& test, Layout layout, double worst, const char* what) {
    cases += worst >= 0.0 || std::isnan(worst) ? 1 : 0;
    if (!(worst <= 1.0)) {
      ++failures;
      std::printf(
          "%s%s: mode %d bits %d group_size %d scale type %d x type %d rows %d K %d N %d layout %d: %g of the bound\n",
          kernels.name, what, static_cast<int>(test.format.mode), test.format.bits, test.format.group_size,
          static_cast<int>(test.scale_type()), static_cast<int>(test.x_type), static_cast<int>(test.rows),
          static_cast<int>(test.K), static_cast<int>(test.N), static_cast<int>(layout), worst);
    }
  };
  for (const Format format : formats()) {
    for (const Real scales : scale_types(format.mode)) {
      for (const Real x_type : {Real::float32, Real::float16, Real::bfloat16}) {
        for (const int64_t rows : {1, 2, 3, 4, 7, 13}) {
          for (const int64_t groups : {1, 3, 37}) {
            const bool is_usual = x_type == scales && (rows == 1 || rows == 13);
            const bool skipped = brief && groups == 37 && !is_usual;
            const int64_t packed = groups * format.group_size;
            for (const Layout layout : {Layout::streamed, Layout::tiled, Layout::broadcast, Layout::plain}) {
              const bool columns_packed = is_column_packed(format.mode);
              const bool any_rows = layout == Layout::plain || (columns_packed && layout == Layout::streamed);
              if (!any_rows && (layout == Layout::streamed) != (rows <= max_streamed_rows)) {
                continue;
              }
              if (columns_packed && (layout == Layout::tiled || layout == Layout::plain)) {
                continue;  // not theirs
              }
              const bool transpose = layout != Layout::plain;
              // Two panels of the widest vectors, or one, and a part of one; of streamed columns all that one row takes
              // at a time, and a part.
              const bool wide = groups * format.group_size <= 128;
              const bool streamed_columns = columns_packed && layout == Layout::streamed;
              const int64_t columns = streamed_columns         ? (wide ? 139 : 21)
                  : layout == Layout::broadcast && groups < 37 ? 39
                                                               : 7;
              const Case test{format,   scales, x_type, rows, transpose ? packed : 5, transpose ? columns : packed,
                              transpose};
              report(kernels, test, layout, run(kernels, test, layout, false, skipped), "");
              const bool by_int8 = layout == Layout::streamed || layout == Layout::broadcast;
              if (kernels.int8 != nullptr && by_int8 && !is_e4m3(format.mode) && !columns_packed) {
                Case wide = test;
                wide.N = 45;
                report(kernels, wide, layout, run(kernels, wide, layout, true, skipped), " int8");
              }
            }
          }
        }
      }
    }
  }
  for (const Real type : {Real::float32, Real::float16, Real::bfloat16}) {
    ++cases;
    failures += rounds_to_nearest(kernels, type) ? 0 : 1;
  }
  std::printf("%s: %d cases, %d failures\n", kernels.name, cases, failures);
  return failures == 0;
}

}  // namespace

// "brief": fewer cases; "names": of the instruction sets that this machine has, and nothing is checked.
int main(int count, char** arguments) {
  const bool brief = count > 1 && std::strcmp(arguments[1], "brief") == 0;
  const bool names = count > 1 && std::strcmp(arguments[1], "names") == 0;
  bool right = true;
  for (const Kernels* kernels : {baseline_kernels(), avx2_kernels(), avx512_kernels(), amx_kernels(), neon_kernels()}) {
    if (kernels != nullptr && names) {
      std::printf("%s\n", kernels->name);
    } else if (kernels != nullptr) {
      right = check(*kernels, brief) && right;
    }
  }
  return right ? 0 : 1;
}
