// Examples of products and of what makes their weights.
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#include "../ops.h"
#include "self_check_examples.h"

namespace quantization_mlx::metal {
namespace {

using at::Tensor;
using namespace gpu;
using OptionalTensor = std::optional<Tensor>;

// --- Problems that are the same every time --------------------------------------------------------------------------

struct Shape {
  int64_t M;
  int64_t K;
  int64_t N;
  bool shifts_x;  // so that no row begins at a multiple of 16 bytes
  bool shifts_w;
};

// Operands of a product or, without x, of dequantize. Each is part of a larger tensor where it is shifted.
struct Example {
  Tensor x;
  Tensor w;
  Tensor scales;
  OptionalTensor biases;
  OptionalTensor global_scale;
  OptionalTensor lhs_indices;
  OptionalTensor rhs_indices;
  Format format;
  bool transpose;
  std::optional<Gate> gate;

  // What `check` or an op makes of it.
  template <typename Function>
  auto product(const Function& function) const {
    return function(
        x, w, scales, biases, transpose, format.group_size, format.bits, name_of(format.mode), global_scale,
        "self-check");
  }

  template <typename Function>
  auto gated(const Function& function) const {
    return function(
        x, w, scales, biases, format.group_size, format.bits, name_of(format.mode),
        activations[static_cast<int>(*gate)], global_scale);
  }

  template <typename Function>
  auto gathered(const Function& function) const {
    return function(
        x, w, scales, biases, lhs_indices, rhs_indices, transpose, format.group_size, format.bits, name_of(format.mode),
        global_scale, /*sorted_indices=*/false, "self-check");
  }

  template <typename Function>
  auto dequantized(const Function& function, at::ScalarType dtype) const {
    return function(w, scales, biases, format.group_size, format.bits, name_of(format.mode), global_scale, dtype);
  }
};

constexpr int64_t gathered_matrices = 3;

// In an order that mixes the experts. For tiles of pairs, one expert has more than a tile takes, and the others fewer.
std::vector<int64_t> expert_of_pair(int tile_rows) {
  std::vector<int64_t> experts{2, 0, 1, 2, 0};
  if (tile_rows > 0) {
    experts.insert(experts.end(), tile_rows / 4, 1);
    experts.insert(experts.end(), tile_rows, 2);
    experts.insert(experts.end(), tile_rows / 4, 0);
  }
  return experts;
}

void add_scales(Example& example, Maker& make, c10::IntArrayRef groups, at::ScalarType dtype) {
  const Format format = example.format;
  const Scale scale = traits_of(format.mode).scale;
  if (has_biases(format.mode)) {
    const float steps = static_cast<float>(1 << format.bits);
    example.scales = make.uniform(groups, dtype, 0.5f / steps, 2.0f / steps);
    example.biases = make.uniform(groups, dtype, -1.0f, 0.0f);
  } else if (scale == Scale::float16) {
    example.scales = make.uniform(groups, at::kHalf, 0.1f, 0.5f);
    if (has_zeros(format.mode)) {
      example.biases = make.uniform(groups, at::kHalf, 0.0f, 15.0f);
    }
  } else {
    // Powers of two from 2^-7 to 1, as E8M0; of E4M3, values from 0.5 to 1.875.
    const uint32_t first = scale == Scale::e4m3 ? 0x30u : 120u;
    const uint32_t count = scale == Scale::e4m3 ? 16u : 8u;
    example.scales = make.tensor<uint8_t>(groups, at::kByte, at::kByte, [&] { return first + make.bits() % count; });
  }
}

Example weights(Format format, bool transpose, bool gathered, const Shape& shape, at::ScalarType dtype, Maker& make) {
  Example example{};
  example.format = format;
  example.transpose = transpose;
  const bool columns = is_column_packed(format.mode);
  const int64_t length = transpose || columns ? shape.K : shape.N;
  const int64_t others = transpose || columns ? shape.N : shape.K;
  const auto sizes = [&](int64_t packed) {
    std::vector<int64_t> result = columns ? std::vector{packed, others} : std::vector{others, packed};
    if (gathered) {
      result.insert(result.begin(), gathered_matrices);
    }
    return result;
  };
  // Any code, except in E4M3 those of 2 and more, which include NaN.
  const uint32_t mask = is_e4m3(format.mode) ? 0xBFBFBFBFu : 0xFFFFFFFFu;
  const int64_t words = (gathered ? gathered_matrices : 1) * others * length * format.bits / 32;
  example.w = make.tensor<uint32_t>({words + shape.shifts_w}, at::kInt, at::kInt, [&] { return make.bits() & mask; })
                  .narrow(0, shape.shifts_w, words)
                  .view(sizes(length * format.bits / 32));
  add_scales(example, make, sizes(length / format.group_size), dtype);
  return example;
}

Example product_example(const ProductFacts& facts, int pair_tile_rows, const Shape& shape, at::Device device) {
  Maker make(device);
  const at::ScalarType dtype = facts.scalar_type();
  const bool gathered = facts.pairs > 0;
  Shape of_weights = shape;
  of_weights.N *= facts.gate > 0 ? 2 : 1;
  Example example = weights(facts.format, facts.transpose != 0, gathered, of_weights, dtype, make);
  if (facts.gate > 0) {
    example.gate = static_cast<Gate>(facts.gate - 1);
  }
  const std::vector<int64_t> experts = expert_of_pair(pair_tile_rows);
  // Whole rows of 16 bytes, or none.
  const int64_t row = shape.shifts_x ? shape.K + 1 : (shape.K + 7) / 8 * 8;
  std::vector<int64_t> sizes{shape.M, row};
  if (gathered) {
    const int64_t pairs = static_cast<int64_t>(experts.size());
    sizes.insert(sizes.begin(), pairs);
    const auto indices = [&](const auto& values) {
      const int64_t* next = values.data();
      return make.tensor<int64_t>({pairs}, at::kLong, at::kLong, [&] { return *next++; });
    };
    std::vector<int64_t> counting(experts.size());
    std::generate(counting.begin(), counting.end(), [i = int64_t{0}]() mutable { return i++; });
    example.lhs_indices = indices(counting);
    example.rhs_indices = indices(experts);
  }
  example.x = make.uniform(sizes, dtype, -1.0f, 1.0f).narrow(-1, shape.shifts_x, shape.K);
  if (facts.global_scales > 0) {
    example.global_scale = make.uniform({1}, at::kFloat, 1000.0f, 3000.0f);
  }
  return example;
}

// --- The problem that runs a kernel ---------------------------------------------------------------------------------

// visit(op, problem): those that the example is of.
template <typename Visitor>
auto with_problem(const Example& host, const Example& device, const Visitor& visit) {
  if (host.gate.has_value()) {
    return visit([&] { return host.gated(ops::quantized_gated_matmul); }, device.gated(GatedMatmulProblem::check));
  }
  if (host.rhs_indices.has_value()) {
    return visit([&] { return host.gathered(ops::gather_qmm); }, device.gathered(GatherProblem::check));
  }
  return visit([&] { return host.product(ops::quantized_matmul); }, device.product(MatmulProblem::check));
}

ProductFacts facts_of(const Example& example) {
  return with_problem(example, example, [](const auto&, const auto& problem) {
    return gpu::facts_of(with_kernel_dtype(problem)).front();
  });
}

// The launch of this kernel in the example's plan, or null.
const Launch* launch_in(const Plan& plan, const KernelInstance& kernel) {
  const auto found = std::find_if(plan.launches.begin(), plan.launches.end(), [&](const Launch& launch) {
    return Bytewise()(launch.kernel, kernel);
  });
  return found == plan.launches.end() ? nullptr : &*found;
}

// Sizes to try, the telling ones first; the plan of the first that leads to a launch's kernel is run.
struct Candidates {
  std::vector<int64_t> M;
  std::vector<int64_t> K;
  std::vector<int64_t> N;
};

Candidates candidates(const ProductFacts& facts, const Launch& launch) {
  ProductParams params;
  std::memcpy(&params, launch.params.data(), sizeof params);
  const bool matvec = launch.family == Family::matvec || launch.family == Family::gated_matvec;
  Candidates result;
  // Of tiles: several, and a last one that is not full.
  result.M = matvec ? std::vector<int64_t>{params.rows} : std::vector<int64_t>{230, 97, 70, 40, 20, 14, 1};
  if (facts.M == 1) {
    result.M.insert(result.M.begin(), 1);
  }
  const bool packs_k = facts.transpose != 0 || is_column_packed(facts.format.mode);
  const auto whole = [&](int64_t size, bool packed) {
    const int64_t unit = packed ? std::max(facts.format.group_size, 32) : 1;
    return (size + unit - 1) / unit * unit;
  };
  // Of a matvec: enough for all its simdgroups, and more; less where that would be split.
  for (const int64_t base :
       matvec ? std::vector<int64_t>{2304, 320, 64, 4352, 8448} : std::vector<int64_t>{160, 1088, 4352}) {
    for (const int64_t more : {5, 32, 64, 96, 0, 128, 192, 256}) {
      result.K.push_back(whole(base + more, packs_k));
    }
  }
  for (const int64_t N : {73, 72, 74, 130, 128, 136, 264, 260, 262, 261, 320, 384, 512, 576, 640}) {
    result.N.push_back(whole(N, !packs_k));
  }
  if (facts.format.group_size < 32 && !packs_k) {
    result.N.insert(result.N.begin(), {80, 144, 272, 336, 528});
  }
  return result;
}

// Of a product of pairs in tiles; 0 of others.
int pair_tile_rows(const KernelInstance& kernel) {
  constexpr std::string_view rows = "_rows_";
  const std::string_view name = kernel.name_pattern;
  return name.find("gather_qmm_rhs") == 0 ? std::atoi(name.data() + name.find(rows) + rows.size()) : 0;
}

struct Found {
  Shape shape;
  int pair_tile_rows;
  Target target;  // that the shape is planned for
};

std::optional<Found> find_shape(
    const ProductFacts& facts,
    const Launch& launch,
    const Candidates& sizes,
    Target target) {
  const KernelInstance& kernel = launch.kernel;
  const bool shifts_x = !is_set(kernel, QUANTIZATION_MLX_ALIGNED_X);
  const bool shifts_w = !is_set(kernel, QUANTIZATION_MLX_ALIGNED_WEIGHTS);
  const int tile_rows = pair_tile_rows(kernel);
  // As for a GPU of one core: it is busy with few large tiles.
  for (const int cores : {target.gpu.cores, 1}) {
    target.gpu.cores = cores;
    for (const uint32_t least_threadgroups : {2, 1}) {
      for (const int64_t M : sizes.M) {
        for (const int64_t K : sizes.K) {
          for (const int64_t N : sizes.N) {
            const Shape shape{M, K, N, shifts_x, shifts_w};
            const Example example = product_example(facts, tile_rows, shape, at::Device(at::kMeta));
            const Plan plan = gpu::plan(facts_of(example), "self-check", target);
            const Launch* found = launch_in(plan, kernel);
            if (found != nullptr && found->threadgroups[0] >= least_threadgroups) {
              return Found{shape, tile_rows, target};
            }
          }
        }
      }
    }
  }
  return std::nullopt;
}

// None where no size leads to the kernel.
std::vector<Found> find_shapes(const ProductFacts& facts, const Launch& launch, const Target& target) {
  Candidates sizes = candidates(facts, launch);
  std::vector<Found> result;
  const auto add = [&](const Candidates& wanted) {
    if (auto found = find_shape(facts, launch, wanted, target)) {
      result.push_back(*std::move(found));
    }
  };
  add(sizes);
  if (result.empty() || launch.family != Family::tile) {
    return result;
  }
  // Beside a tile that is not full, the smallest one that is; beside an odd N, an even one: a tile writes pairs.
  const Shape first = result.front().shape;
  if (first.M < 16) {
    Candidates whole = sizes;
    whole.M = {16};
    add(whole);
  }
  if (first.N % 2 != 0) {
    sizes.N.erase(std::remove_if(sizes.N.begin(), sizes.N.end(), [](int64_t N) { return N % 2 != 0; }), sizes.N.end());
    add(sizes);
  }
  return result;
}

Reason failure(const ProductFacts& facts, const Found& found) {
  const Example host = product_example(facts, found.pair_tile_rows, found.shape, at::Device(at::kCPU));
  const Example device = product_example(facts, found.pair_tile_rows, found.shape, mps);
  return with_problem(host, device, [&](const auto& op, const auto& given) {
    const Tensor expected = op();
    const auto problem = with_kernel_dtype(given);
    const Tensor y = at::empty(expected.sizes(), device.x.options());
    run(gpu::plan(problem, found.target), operands_of(problem, y));
    return judged(y, expected, facts.scalar_type());
  });
}

}  // namespace

Reason failure(const ProductFacts& facts, const Launch& launch, const Target& target) {
  const std::vector<Found> shapes = find_shapes(facts, launch, target);
  if (shapes.empty()) {
    TORCH_WARN("[quantization_mlx] Kernel ", launch.kernel.name(), " has no self-check and is used without one.");
  }
  for (const Found& found : shapes) {
    if (Reason reason = failure(facts, found)) {
      return reason;
    }
  }
  return std::nullopt;
}

// Whole groups along both sizes.
static constexpr Shape conversion_shape{1, 512, 256, false, false};

Reason failure(const DequantizeFacts& facts, const Launch& launch, const Target& target) {
  Shape shape = conversion_shape;
  shape.shifts_w = !is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_WEIGHTS);
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const auto example_on = [&](at::Device device) {
    Maker make(device);
    Example example = weights(facts.format, /*transpose=*/true, /*gathered=*/false, shape, dtype, make);
    if (facts.global_scales > 0) {
      example.global_scale = make.uniform({1}, at::kFloat, 1000.0f, 3000.0f);
    }
    return example;
  };
  const Example host = example_on(at::Device(at::kCPU));
  const Example device = example_on(mps);
  const Tensor expected = host.dequantized(ops::dequantize, dtype);
  const Tensor y = at::empty(expected.sizes(), device.w.options().dtype(dtype));
  const DequantizeProblem problem = device.dequantized(DequantizeProblem::check, dtype);
  run(gpu::plan(problem, target), operands_of(problem, y));
  return judged(y, expected, dtype);
}

// Quantization may round a value in the middle of two codes either way: at most one code in a thousand may be another
// one, and the values that the codes stand for must be as near to w as the CPU's.
Reason failure(const QuantizeFacts& facts, const Launch& launch, const Target& target) {
  const Format format = facts.format;
  const auto dtype = static_cast<at::ScalarType>(facts.dtype);
  const int64_t shift = is_set(launch.kernel, QUANTIZATION_MLX_ALIGNED_X) ? 0 : 1;
  const auto [M, K, N, shifts_x, shifts_w] = conversion_shape;
  Maker make{at::Device(at::kCPU)};
  const Tensor values = make.uniform({K * N + shift}, dtype, -1.0f, 1.0f);
  const auto matrix = [&](const Tensor& all) { return all.narrow(0, shift, K * N).view({K, N}); };
  OptionalTensor scale;
  if (facts.global_scales > 0) {
    scale = make.uniform({1}, at::kFloat, 1000.0f, 3000.0f);
  }
  const std::string_view mode = name_of(format.mode);
  const auto expected = ops::quantize(matrix(values), format.group_size, format.bits, mode, scale);
  const QuantizeProblem problem =
      QuantizeProblem::check(matrix(values.to(mps)), format.group_size, format.bits, mode, on_mps(scale));
  const auto results = empty_quantized(problem);
  run(gpu::plan(problem, target), operands_of(problem, results));

  const bool third = has_biases(format.mode) || has_zeros(format.mode);
  const auto restored = [&](const Tensor& w, const Tensor& s, const Tensor& b) {
    const OptionalTensor offsets = third ? OptionalTensor(b.cpu()) : std::nullopt;
    return ops::dequantize(w.cpu(), s.cpu(), offsets, format.group_size, format.bits, mode, scale, at::kFloat);
  };
  const auto& [words, scales, biases] = results;
  const auto& [expected_words, expected_scales, expected_biases] = expected;
  const Tensor ours = restored(words, scales, biases);
  const Tensor theirs = restored(expected_words, expected_scales, expected_biases);
  const Tensor our_codes = restored(words, expected_scales, expected_biases);
  const Tensor original = host_floats(matrix(values));
  const auto at = [](const Tensor& tensor, int64_t i) { return tensor.const_data_ptr<float>()[i]; };
  double our_error = 0.0;
  double their_error = 0.0;
  int64_t other_codes = 0;
  for (int64_t i = 0; i < K * N; ++i) {
    our_error += std::pow(static_cast<double>(at(ours, i)) - at(original, i), 2.0);
    their_error += std::pow(static_cast<double>(at(theirs, i)) - at(original, i), 2.0);
    other_codes += at(our_codes, i) != at(theirs, i);
  }
  if (other_codes * 1000 <= K * N && our_error <= 1.01 * their_error) {
    return std::nullopt;
  }
  return c10::str(
      other_codes, " of ", K * N, " codes are not the CPU's, and the squared error is ", our_error, " instead of ",
      their_error, ".");
}

}  // namespace quantization_mlx::metal
