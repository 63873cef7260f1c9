// Cuts a checked problem into products of one matrix with many rows, and those into tasks for the kernels.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "ops.h"
#include "parallel.h"

namespace quantization_mlx::cpu {

Real real_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf: return Real::float16;
    case at::kBFloat16: return Real::bfloat16;
    default: return Real::float32;
  }
}

namespace {

using at::Tensor;

// The most rows that are packed and multiplied at once. Bounds the working memory; decoding a panel costs little beside
// multiplying it by this many rows.
constexpr int64_t max_rows = 512;
// The fewest weights of a task, and the fewest values of x that are packed by several threads: less work takes less
// time than handing it to another thread.
constexpr int64_t task_weights = 1 << 14;
constexpr int64_t parallel_values = 1 << 16;

// Rows first <= i < first + rows of a plan, which are multiplied by the same matrix.
struct Run {
  int64_t matrix;
  int64_t first;
  int64_t rows;
};

// x_rows[i] and y_rows[i] number rows of x and of the result; empty where both are i.
struct Plan {
  c10::SmallVector<Run, 1> runs;
  std::vector<int64_t> x_rows;
  std::vector<int64_t> y_rows;
};

int64_t quotient_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

// All rows with one matrix, in order: no lists are needed.
Plan single_run(int64_t rows) { return {{{0, 0, rows}}, {}, {}}; }

// Pair i multiplies matrix lhs(i) of x, of M rows, with matrix rhs(i) of w. Pairs of one matrix of w become one run.
template <typename Lhs, typename Rhs>
Plan grouped_runs(int64_t pairs, int64_t matrices, int64_t M, const Lhs& lhs, const Rhs& rhs) {
  std::vector<int64_t> ends(matrices + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    ++ends[rhs(i) + 1];
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  Plan plan;
  for (int64_t matrix = 0; matrix < matrices; ++matrix) {
    const int64_t count = ends[matrix + 1] - ends[matrix];
    if (count > 0) {
      plan.runs.push_back({matrix, ends[matrix] * M, count * M});
    }
  }
  plan.x_rows.resize(pairs * M);
  plan.y_rows.resize(pairs * M);
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t position = ends[rhs(i)]++ * M;
    for (int64_t m = 0; m < M; ++m) {
      plan.x_rows[position + m] = lhs(i) * M + m;
      plan.y_rows[position + m] = i * M + m;
    }
  }
  return plan;
}

// The rows of one run.
struct Rows {
  const Plan& plan;
  int64_t first;

  int64_t x(int64_t m) const { return plan.x_rows.empty() ? first + m : plan.x_rows[first + m]; }
  int64_t y(int64_t m) const { return plan.y_rows.empty() ? first + m : plan.y_rows[first + m]; }
};

// What stays the same for every run of one op call.
class Multiplication {
 public:
  Multiplication(const MatmulProblem& problem, Tensor& y)
      : problem_(problem),
        weights_(problem.weights),
        y_(y),
        kernels_(activations_of(problem) == Activations::int8 ? *kernels().int8 : kernels().exact) {
    product_.format = weight_format(weights_.format, real_of(weights_.scales.tensor.scalar_type()));
    product_.x_type = real_of(problem.dtype);
    product_.bfloat16 = kernels().bfloat16;
    product_.split = kernels().split;
    product_.K = problem.shape.K;
    product_.N = problem.shape.N;
  }

  void run(const Plan& plan) const {
    Memory memory;
    Batch batch;
    int64_t batch_rows = 0;
    for (const Run& run : plan.runs) {
      // In even parts, so that the same kernel serves all rows of a run.
      const int64_t parts = quotient_up(run.rows, max_rows);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * run.rows / parts;
        const int64_t rows = (part + 1) * run.rows / parts - begin;
        if (batch_rows + rows > max_rows) {
          multiply(batch, memory);
          batch.clear();
          batch_rows = 0;
        }
        batch.push_back(share(plan, {run.matrix, run.first + begin, rows}));
        batch_rows += rows;
      }
    }
    multiply(batch, memory);
  }

 private:
  // A run, or a part of one, and how it is computed.
  struct Share {
    Product product;
    Rows rows;
    Layout layout;
    int64_t columns;  // of a task
    float factor;
    int64_t packed_row;  // floats
    int64_t workspace;  // floats
  };
  using Batch = c10::SmallVector<Share, 1>;

  struct Memory {
    WorkingMemory packed{WorkingMemory::Use::read_by_all};
    WorkingMemory scratch{WorkingMemory::Use::written_by_each};
  };

  Layout layout(int64_t rows) const {
    if (!problem_.transpose && !product_.format.is_column_packed()) {
      return Layout::plain;
    }
    if (rows <= max_streamed_rows) {
      return Layout::streamed;
    }
    Product product = product_;
    product.rows = rows;
    if (kernels_.broadcast_is_faster(product)) {
      return Layout::broadcast;
    }
    return product_.format.is_column_packed() ? Layout::streamed : Layout::tiled;
  }

  // Columns of one task: whole kernel steps, and enough tasks for the threads.
  int64_t task_columns(Layout layout) const {
    if (layout == Layout::plain) {
      return plain_columns(product_.format.bits);
    }
    const int64_t threads = at::get_num_threads();
    if (layout == Layout::broadcast) {
      // The columns of the busiest thread.
      const auto columns_of = [&](int64_t task) { return quotient_up(quotient_up(product_.N, task), threads) * task; };
      return columns_of(max_tiled_columns) <= columns_of(broadcast_columns) ? max_tiled_columns : broadcast_columns;
    }
    const int64_t most = layout == Layout::streamed ? product_.N : max_tiled_columns;
    const int64_t even = std::max(quotient_up(product_.N, threads), task_weights / product_.K);
    // The same number of tasks for each thread, where each has several.
    const int64_t rounds = quotient_up(product_.N, most * threads);
    const int64_t columns = even <= most ? even : quotient_up(product_.N, rounds * threads);
    const int64_t multiple = product_.format.is_column_packed() ? broadcast_columns : column_multiple;
    return quotient_up(columns, multiple) * multiple;
  }

  float factor(int64_t matrix) const {
    if (!weights_.global_scale.defined()) {
      return 1.0f;
    }
    const float* scales = weights_.global_scale.const_data_ptr<float>();
    return nvfp4_decode_factor(scales[weights_.global_scale.numel() == 1 ? 0 : matrix]);
  }

  static const uint8_t* matrix_data(const Matrices& matrices, int64_t matrix) {
    return static_cast<const uint8_t*>(matrices.tensor.const_data_ptr()) +
        matrix * matrices.matrix_stride * matrices.tensor.element_size();
  }

  const uint8_t* x_row(int64_t row) const {
    const int64_t M = problem_.shape.M;
    return matrix_data(problem_.x, row / M) + row % M * problem_.x.row_stride * problem_.x.tensor.element_size();
  }

  Share share(const Plan& plan, const Run& run) const {
    Share share{product_, {plan, run.first}, layout(run.rows), 0, factor(run.matrix), 0, 0};
    Product& product = share.product;
    share.columns = task_columns(share.layout);
    product.rows = run.rows;
    product.words = matrix_data(weights_.words, run.matrix);
    product.scales = matrix_data(weights_.scales, run.matrix);
    product.biases = weights_.biases.tensor.defined() ? matrix_data(weights_.biases, run.matrix) : nullptr;
    product.y_row = share.columns;
    share.packed_row = kernels_.packed_row(product, share.layout);
    share.workspace = share.layout == Layout::streamed ? 0 : kernels_.workspace(product);
    return share;
  }

  void pack(Batch& batch, float* packed) const {
    int64_t rows = 0;
    float* rows_of_share = packed;
    for (Share& share : batch) {
      share.product.x = rows_of_share;
      rows_of_share += share.product.rows * share.packed_row;
      rows += share.product.rows;
    }
    const auto pack_row = [&](int64_t row, int) {
      const Share* share = batch.begin();
      float* destination = packed;
      for (; row >= share->product.rows; ++share) {
        row -= share->product.rows;
        destination += share->product.rows * share->packed_row;
      }
      kernels_.pack_row(
          share->product, share->layout, x_row(share->rows.x(row)), destination + row * share->packed_row);
    };
    parallel_tasks(rows, pack_row, rows * product_.K > parallel_values);
  }

  void store(const Share& share, const float* source, int64_t begin, int64_t columns) const {
    const Product& product = share.product;
    uint8_t* y = static_cast<uint8_t*>(y_.mutable_data_ptr());
    for (int64_t m = 0; m < product.rows; ++m) {
      const int64_t element = share.rows.y(m) * product.N + begin;
      kernels().from_float32(
          source + m * product.y_row, share.factor, columns, product.x_type, y + element * y_.element_size());
    }
  }

  void multiply_columns(const Share& share, int64_t begin, float* workspace) const {
    const Product& product = share.product;
    const int64_t end = std::min(begin + share.columns, product.N);
    float* result = workspace + share.workspace;
    kernels_.multiply[static_cast<int>(share.layout)](product, begin, end, workspace, result);
    store(share, result, begin, end - begin);
  }

  // Each thread takes its columns of all runs, so that threads wait for each other only once, with equal work.
  void multiply(Batch& batch, Memory& memory) const {
    int64_t packed_floats = 0;
    int64_t thread_floats = 0;
    int64_t most_tasks = 0;
    for (const Share& share : batch) {
      packed_floats += share.product.rows * share.packed_row;
      thread_floats = std::max(thread_floats, share.workspace + share.product.rows * share.columns);
      most_tasks = std::max(most_tasks, quotient_up(product_.N, share.columns));
    }
    // Whole cache lines, so that no two threads share one.
    thread_floats = quotient_up(thread_floats, 16) * 16;
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), most_tasks);
    float* scratch = memory.scratch.floats(at::get_num_threads() * thread_floats);
    pack(batch, memory.packed.floats(packed_floats));
    parallel_tasks(threads, [&](int64_t part, int thread) {
      for (const Share& share : batch) {
        const int64_t tasks = quotient_up(product_.N, share.columns);
        for (int64_t task = part * tasks / threads; task < (part + 1) * tasks / threads; ++task) {
          multiply_columns(share, task * share.columns, scratch + thread * thread_floats);
        }
      }
    });
  }

  const MatmulProblem& problem_;
  const QuantizedMatrices& weights_;
  Tensor& y_;
  const ProductKernels& kernels_;
  Product product_{};
};

Tensor empty_result(const MatmulProblem& problem) {
  return at::empty(problem.shape.output, problem.x.tensor.options().dtype(problem.dtype));
}

std::string described(const char* activations) {
  return std::string(R"({"device": "cpu", "instruction_set": ")") + kernels().name + '"' +
      (activations == nullptr ? "" : std::string(R"(, "activations": ")") + activations + '"') + "}";
}

}  // namespace

std::string describe(const MatmulProblem& problem) {
  return described(activations_of(problem) == Activations::int8 ? "int8" : "exact");
}

std::string describe(const GatherProblem& problem) { return describe(problem.matmul); }

std::string describe(const QuantizeProblem&) { return described(nullptr); }

std::string describe(const DequantizeProblem&) { return described(nullptr); }

std::string describe(const NormProblem&) { return described(nullptr); }

std::string describe(const RopeIntoCacheProblem&) { return described(nullptr); }

std::string describe(const SampleProblem&) { return described(nullptr); }

std::string describe(const RouterProblem&) { return described(nullptr); }

std::string describe(const CombineProblem&) { return described(nullptr); }
std::string describe(const AttentionProblem&) { return described(nullptr); }
std::string describe(const RopeProblem&) { return described(nullptr); }

std::string describe(const GateProblem&) { return described(nullptr); }

std::string describe(const ImageProblem&) { return described(nullptr); }

std::string describe(const GatedMatmulProblem& problem) { return describe(problem.matmul); }

Tensor run(const MatmulProblem& problem) {
  Tensor y = empty_result(problem);
  if (y.numel() == 0) {
    return y;
  }
  const auto& shape = problem.shape;
  const Multiplication multiplication(problem, y);
  if (shape.w_batch.empty()) {
    multiplication.run(single_run(shape.M));
    return y;
  }
  const auto lhs = broadcast_matrices(shape.x_batch, shape.batch);
  const auto rhs = broadcast_matrices(shape.w_batch, shape.batch);
  multiplication.run(grouped_runs(
      static_cast<int64_t>(lhs.size()), problem.weights.words.count, shape.M, [&](int64_t i) { return lhs[i]; },
      [&](int64_t i) { return rhs[i]; }));
  return y;
}

Tensor run(const GatherProblem& problem) {
  const MatmulProblem& matmul = problem.matmul;
  check_range(matmul.op, "lhs_indices", problem.lhs_indices, matmul.x.count);
  check_range(matmul.op, "rhs_indices", problem.rhs_indices, matmul.weights.words.count);
  Tensor y = empty_result(matmul);
  if (y.numel() == 0) {
    return y;
  }
  const int64_t* lhs = problem.lhs_indices.const_data_ptr<int64_t>();
  const int64_t* rhs = problem.rhs_indices.const_data_ptr<int64_t>();
  Multiplication(matmul, y).run(grouped_runs(
      problem.lhs_indices.numel(), matmul.weights.words.count, matmul.shape.M, [&](int64_t i) { return lhs[i]; },
      [&](int64_t i) { return rhs[i]; }));
  return y;
}

}  // namespace quantization_mlx::cpu
