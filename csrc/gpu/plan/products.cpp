// Plans of products, plain and gathered.
#include <c10/util/Exception.h>

#include <iterator>
#include <string>
#include <utility>

#include "batches.h"
#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

// --- What the choice of a kernel rests on --------------------------------------------------------------------------

// Row counts that a kernel has instances for, ascending: the smallest that fits serves. More rows than the last one
// hold too many accumulators for the registers of a lane.
constexpr int qmv_rows[] = {1, 2, 3, 4, 6, 8, 12};
constexpr int gather_qmv_rows[] = {1, 4, 8, 12};
constexpr int qvm_rows[] = {1, 2, 3, 4, 8};
constexpr int gather_qvm_rows[] = {1, 4, 8};  // also where columns are packed
// Rows of a tile. 16 for what is just too much for a matvec: a tile's time is that of all its rows, used or not.
constexpr int tile_rows[] = {16, 32, 64};
constexpr int tensor_tile_rows[] = {32, 64};
// llama.cpp's pull request 20962: 26 % faster than 64 rows on M5 Max.
constexpr int large_tensor_tile_rows = 128;
constexpr int large_tiles_per_core = 4;
constexpr int gather_tile_rows[] = {32};

// The most rows of x for which qmv is chosen, from a generation of GPUs on, where K and N are at most 2048, at most
// 4096, or more. MLX's limits, which were found on these GPUs (get_qmv_batch_limit in mlx/backend/metal/quantized.cpp),
// as far as qmv has instances, but for the largest matrices on M1 and M2: MLX's 6 are of a kernel that reads w again
// for each row. This one reads it once, as that of llama.cpp does, which takes its tiles beyond 8 (ggml-metal-ops.cpp).
struct RowLimits {
  int generation;
  bool ultra;
  int rows[3];
};
constexpr int small_matrix = 2048;
constexpr int medium_matrix = 4096;
constexpr RowLimits row_limits[] = {
    {17, false, {12, 12, 12}},  // M5; MLX: 33, 25, 13
    {15, false, {12, 12, 12}},  // M3, M4; MLX: 13, 15, 13
    {13, false, {12, 10, 8}},  // M1, M2; MLX: 14, 10, 6
    {13, true, {12, 12, 12}},  // any Ultra; MLX: 32, 18, 12
};

// Where K is split: a core hides the latency of memory with about so many threadgroups, and with fewer, parts of K make
// more of them. A shorter part than `least_part` costs more in partial sums, written and read again, than it gains.
struct SplitK {
  int threadgroups_per_core;
  int least_part;
};
constexpr SplitK no_split{0, 0};
constexpr SplitK qvm_split{8, 128};  // of 128 threads
constexpr SplitK column_qvm_split{4, 1024};  // of 256 threads, with a group of 128 for each simdgroup
constexpr SplitK tile_split{4, 512};  // of 128 threads, with 6 to 18 KiB of threadgroup memory

// Tensor operations, of 128 threads: MLX has about 512 threadgroups then (quantized.cpp), on whatever GPU; this is as
// many on one of 40 cores. The sums of a part, written and read again, are no more bytes than its weights at 4 bits.
constexpr SplitK tensor_split(int rows) { return {12, 16 * rows}; }

// Parts are whole steps of a kernel along K.
constexpr int qmv_step_k = 32;
constexpr int qvm_step_k = 32;  // where columns are packed: a group

// Minimum pairs for the sorted-expert form, in total and per expert: with fewer, most rows of a tile are idle, and a
// matvec for each pair reads no more.
constexpr int64_t sorted_pairs = 16;
constexpr int64_t sorted_pairs_per_expert = 4;

template <size_t count>
int smallest_at_least(const int (&instances)[count], int64_t rows) {
  const int* found =
      std::find_if(std::begin(instances), std::end(instances), [&](int instance) { return instance >= rows; });
  return found == std::end(instances) ? instances[count - 1] : *found;
}

// --- Products ------------------------------------------------------------------------------------------------------

// The matrices that one launch multiplies: `rows` rows of each from row `first_row` on.
struct Block {
  BatchPart batch;
  int64_t first_row;
  int64_t rows;
};

struct Kernel {
  Family family;
  std::string op;
  int rows;  // that it has an instance for
  int64_t columns;  // of a threadgroup
  int64_t depth;  // of K that a threadgroup takes at a time
  uint32_t threads;
  SplitK split;
};

class ProductPlanner {
 public:
  ProductPlanner(const MatmulProblem& problem, const Target& target)
      : problem_(problem), target_(target), shape_(problem.shape), format_(problem.weights.format) {
    checked_int(problem.op, "K", shape_.K);
    checked_int(problem.op, "N", shape_.N);
    checked_int(problem.op, "the number of rows of x", shape_.M);
  }

  Plan matmul() && {
    for (const BatchPart& batch : batch_parts(shape_)) {
      const Block block{batch, 0, shape_.M};
      switch (matmul_family()) {
        case Family::tensor: product(block, tensor_kernel("qmm", rows_of_tile(tensor_tile_rows, shape_.M))); break;
        case Family::tile: product(block, tile_kernel("qmm", rows_of_tile(tile_rows, shape_.M))); break;
        default: matvecs(batch); break;
      }
    }
    return std::move(plan_);
  }

  Plan gather(const GatherProblem& problem) && {
    pairs_ = checked_int(problem_.op, "the number of pairs of indices", problem.lhs_indices.numel());
    checked_int(problem_.op, "the number of matrices of x", problem_.x.count);
    checked_int(problem_.op, "the number of matrices of w", problem_.weights.words.count);
    // Gathered matrices are chosen by their index, so all that a launch steps over is y.
    const BatchPart batch{{pairs_, 0, 0, 1}, {1, 0, 0, 0}, 0, 0, 0};
    require_any();
    const bool tiles = available(Family::tile);
    if (is_sorted_product(problem) && (has_tensor_ops() || tiles)) {
      constexpr const char* op = "gather_qmm_rhs";
      product(
          {{}, 0, pairs_},
          has_tensor_ops() ? tensor_kernel(op, gather_tile_rows[0]) : tile_kernel(op, gather_tile_rows[0]));
    } else if (tiles && (shape_.M > matvec_rows() || !available(Family::matvec))) {
      product({batch, 0, shape_.M}, tile_kernel("gather_qmm", gather_tile_rows[0]));
    } else {
      // Tensor operations alone are left for sorted pairs only.
      TORCH_CHECK(available(Family::matvec), no_family_left());
      matvecs(batch);
    }
    return std::move(plan_);
  }

 private:
  // --- Which family ---

  bool available(Family family) const { return !target_.excluded.contains(family); }

  // Matrix units take float32 as 10 bits of mantissa or not at all.
  bool has_tensor_ops() const {
    return target_.gpu.tensor_ops && problem_.dtype != at::kFloat && available(Family::tensor);
  }

  int64_t matvec_rows() const {
    if (!problem_.transpose) {
      return std::end(qvm_rows)[-1];
    }
    const GpuTraits& gpu = target_.gpu;
    const auto found = std::find_if(std::begin(row_limits), std::end(row_limits), [&](const RowLimits& limits) {
      return gpu.generation >= limits.generation && limits.ultra == (gpu.variant == 'd');
    });
    const int64_t size = std::max(shape_.K, shape_.N);
    const int column = (size > small_matrix) + (size > medium_matrix);
    return found == std::end(row_limits) ? std::end(qmv_rows)[-1] : found->rows[column];
  }

  std::string no_family_left() const {
    return c10::str(
        "[", problem_.op, "] every kernel family that could serve failed its self-check on this GPU (",
        target_.gpu.architecture, ").");
  }

  void require_any() const {
    TORCH_CHECK(has_tensor_ops() || available(Family::tile) || available(Family::matvec), no_family_left());
  }

  Family matmul_family() const {
    require_any();
    const bool tiles = has_tensor_ops() || available(Family::tile);
    if (!tiles || (shape_.M <= matvec_rows() && available(Family::matvec))) {
      return Family::matvec;
    }
    return has_tensor_ops() ? Family::tensor : Family::tile;
  }

  bool is_sorted_product(const GatherProblem& problem) const {
    return shape_.M == 1 && problem.sorted_indices && pairs_ >= sorted_pairs &&
        pairs_ >= sorted_pairs_per_expert * problem_.weights.words.count;
  }

  // --- Which kernel ---

  // Few rows of any number of matrices, in shares of about the same size.
  void matvecs(const BatchPart& batch) {
    // qmv counts in 32 bits from a row of x, and from a row of w, to the last one that it takes at a time.
    if (problem_.transpose) {
      checked_int(problem_.op, "K times bits", shape_.K * format_.bits);
    }
    const bool rows_are_near = !problem_.transpose || problem_.x.row_stride < max_size / matvec_rows();
    const int64_t shares = rows_are_near ? ceil_div(shape_.M, matvec_rows()) : shape_.M;
    for (int64_t i = 0; i < shares; ++i) {
      const int64_t first = i * shape_.M / shares;
      const int64_t rows = (i + 1) * shape_.M / shares - first;
      product({batch, first, rows}, problem_.transpose ? qmv_kernel(rows) : qvm_kernel(rows));
    }
  }

  Kernel qmv_kernel(int64_t rows) const {
    const bool gathered = pairs_ > 0;
    const int instance = gathered ? smallest_at_least(gather_qmv_rows, rows) : smallest_at_least(qmv_rows, rows);
    const char* op = gathered ? "gather_qmv" : "qmv";
    const int element_size = static_cast<int>(c10::elementSize(problem_.dtype));
    const int elements = qmv_elements(instance, format_.group_size, element_size);
    const int columns = qmv_columns(qmv_simdgroups_along(static_cast<int>(shape_.K / elements)));
    return {Family::matvec, op, instance, columns, qmv_step_k, 32u * qmv_simdgroups(), no_split};
  }

  Kernel qvm_kernel(int64_t rows) const {
    const bool gathered = pairs_ > 0;
    const int instance = gathered || is_column_packed(format_.mode) ? smallest_at_least(gather_qvm_rows, rows)
                                                                    : smallest_at_least(qvm_rows, rows);
    const char* op = gathered ? "gather_qvm" : "qvm";
    if (is_column_packed(format_.mode)) {
      const uint32_t threads = 32u * column_qvm_simdgroups();
      return {Family::matvec, op, instance, column_qvm_columns(), format_.group_size, threads, column_qvm_split};
    }
    return {Family::matvec, op, instance, qvm_columns(), qvm_step_k, 32u * qvm_simdgroups(), qvm_split};
  }

  // The larger tile reads and unpacks each weight for more rows; the smaller one computes fewer unused rows.
  template <size_t count>
  static int rows_of_tile(const int (&instances)[count], int64_t rows) {
    const int fitting = smallest_at_least(instances, rows);
    const int64_t half = fitting / 2;
    const bool mostly_idle =
        rows > fitting && rows < 2 * fitting && ceil_div(rows, half) * half < ceil_div(rows, fitting) * fitting;
    return mostly_idle ? static_cast<int>(half) : fitting;
  }

  // op: without its side.
  Kernel tile_kernel(const char* op, int rows) const {
    const int depth = tile_k(rows, static_cast<int>(c10::elementSize(problem_.dtype)));
    return {Family::tile, op + side(), rows, tile_columns(), depth, 32u * tile_simdgroups(), tile_split};
  }

  // A larger tile than that of `rows` where there are many, none of its rows would be idle, and every core has as many
  // tiles as it can hide latency with.
  Kernel tensor_kernel(const char* op, int rows) const {
    const int64_t large = ceil_div(shape_.M, large_tensor_tile_rows);
    const int64_t tiles = large * ceil_div(shape_.N, tensor_tile_columns());
    const bool fits = rows == std::end(tensor_tile_rows)[-1] &&
        2 * large == ceil_div(shape_.M, large_tensor_tile_rows / 2) &&
        tiles >= static_cast<int64_t>(target_.gpu.cores) * large_tiles_per_core;
    const int instance = fits ? large_tensor_tile_rows : rows;
    const SplitK split = fits || pairs_ > 0 ? no_split : tensor_split(rows);
    const uint32_t threads = 32u * tensor_tile_simdgroups();
    return {Family::tensor, op + side() + "_nax", instance, tensor_tile_columns(), tensor_tile_k(), threads, split};
  }

  std::string side() const { return problem_.transpose ? "_t" : "_n"; }

  // --- How a kernel is launched ---

  static int64_t row_tiles(const Block& block, const Kernel& kernel) {
    return kernel.family == Family::matvec ? 1 : ceil_div(block.rows, kernel.rows);
  }

  // Of K.
  int64_t parts_of(const Block& block, const Kernel& kernel) const {
    const bool has_gaps = block.batch.count() > 1 && block.rows < shape_.M;  // which sum_parts does not write
    if (kernel.split.least_part == 0 || pairs_ > 0 || has_gaps) {
      return 1;
    }
    const int64_t threadgroups = ceil_div(shape_.N, kernel.columns) * row_tiles(block, kernel) * block.batch.count();
    const int64_t wanted = static_cast<int64_t>(target_.gpu.cores) * kernel.split.threadgroups_per_core / threadgroups;
    const int64_t most = std::max<int64_t>(shape_.K / kernel.split.least_part, 1);
    return ceil_div(shape_.K, part_k(kernel, std::clamp<int64_t>(wanted, 1, most)));
  }

  int64_t part_k(const Kernel& kernel, int64_t parts) const {
    return ceil_div(ceil_div(shape_.K, parts), kernel.depth) * kernel.depth;
  }

  void product(const Block& block, const Kernel& kernel) {
    const int64_t parts = parts_of(block, kernel);
    const auto& weights = problem_.weights;
    const BatchPart& batch = block.batch;
    const int64_t x_offset = batch.x * problem_.x.matrix_stride + block.first_row * problem_.x.row_stride;
    const int64_t y_offset = (batch.y * shape_.M + block.first_row) * shape_.N;
    const bool split = parts > 1;

    Launch launch =
        launch_of(kernel.family, kernel.op + (split ? "_splitk" : ""), kernel.rows, format_, problem_.dtype);
    launch.constants = constants_of(block, kernel, x_offset);
    launch.threadgroups = {
        static_cast<uint32_t>(ceil_div(shape_.N, kernel.columns)),
        static_cast<uint32_t>(row_tiles(block, kernel) * parts), static_cast<uint32_t>(batch.count())};
    launch.threads = kernel.threads;

    const ProductParams params = params_of(block, kernel, parts);
    const Argument y = split ? Argument{Role::partial_sums, 0} : Argument{Role::y, y_offset};
    const Argument unused{};
    const Argument biases =
        weights.biases.tensor.defined() ? Argument{Role::biases, batch.w * weights.biases.matrix_stride} : unused;
    const Argument global_scale = weights.global_scale.defined() ? Argument{Role::global_scale, 0} : unused;
    const Argument w{Role::w, batch.w * weights.words.matrix_stride};
    const Argument scales{Role::scales, batch.w * weights.scales.matrix_stride};
    const Argument x{Role::x, x_offset};
    if (pairs_ > 0) {
      const GatherParams gather{params, static_cast<int>(problem_.x.count), static_cast<int>(weights.words.count)};
      set_arguments(launch, {x, w, scales, biases, global_scale, y, unused, {Role::lhs_indices}, {Role::rhs_indices}});
      set_params(launch, gather, 6);
    } else {
      set_arguments(launch, {x, w, scales, biases, global_scale, y});
      set_params(launch, params, 6);
    }
    plan_.launches.push_back(std::move(launch));
    if (split) {
      sum_parts(kernel.family, block, parts, y_offset);
    }
  }

  // Of scales or zeros, whose rows are as long as those of words.
  static bool are_aligned_columns(const Block& block, const Matrices& values) {
    constexpr int columns = column_qvm_lane_columns();
    return !values.tensor.defined() ||
        (is_aligned(values.tensor, block.batch.w * values.matrix_stride, 2 * columns) &&
         (values.count == 1 || values.matrix_stride % columns == 0));
  }

  uint32_t constants_of(const Block& block, const Kernel& kernel, int64_t x_offset) const {
    const auto& weights = problem_.weights;
    const Matrices& x = problem_.x;
    const int64_t word_bytes = load_bytes(format_);
    const auto whole_words = [&](int64_t words) { return words * 4 % word_bytes == 0; };
    const auto whole_x = [&](int64_t elements) {
      return elements * static_cast<int64_t>(x.tensor.element_size()) % 16 == 0;
    };
    const bool aligned_weights =
        is_aligned(weights.words.tensor, block.batch.w * weights.words.matrix_stride, word_bytes) &&
        whole_words(weights.words.row_stride) &&
        (weights.words.count == 1 || whole_words(weights.words.matrix_stride)) &&
        (!is_column_packed(format_.mode) ||
         (are_aligned_columns(block, weights.scales) && are_aligned_columns(block, weights.biases)));
    const bool aligned_x = is_aligned(x.tensor, x_offset, 16) && (x.count == 1 || whole_x(x.matrix_stride)) &&
        (shape_.M == 1 || whole_x(x.row_stride));
    return constant(QUANTIZATION_MLX_ALIGNED_OUTPUTS, shape_.N % kernel.columns == 0) |
        constant(QUANTIZATION_MLX_ALIGNED_WEIGHTS, aligned_weights) | constant(QUANTIZATION_MLX_ALIGNED_X, aligned_x) |
        constant(QUANTIZATION_MLX_ALIGNED_K, shape_.K % kernel.depth == 0) |
        constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE, weights.global_scale.defined());
  }

  ProductParams params_of(const Block& block, const Kernel& kernel, int64_t parts) const {
    const auto& weights = problem_.weights;
    const BatchPart& batch = block.batch;
    const bool gathered = pairs_ > 0;
    const auto strides = [&](const Matrices& matrices, int64_t BatchDimension::* step) {
      return gathered
          ? BatchStrides{matrices.matrix_stride, 0}
          : BatchStrides{batch.outer.*step * matrices.matrix_stride, batch.inner.*step * matrices.matrix_stride};
    };
    const int64_t matrix = parts > 1 ? parts * block.rows * shape_.N : shape_.M * shape_.N;
    const bool scale_each = weights.global_scale.defined() && weights.global_scale.numel() > 1;
    ProductParams params{};
    params.x = strides(problem_.x, &BatchDimension::x);
    params.w = strides(weights.words, &BatchDimension::w);
    params.scales = strides(weights.scales, &BatchDimension::w);
    params.biases = strides(weights.biases, &BatchDimension::w);
    params.global_scale = {scale_each ? 1 : 0, 0};  // of gathered matrices alone
    // Partial sums are those of this launch, one after the other.
    params.y = parts > 1 ? BatchStrides{batch.inner.size * matrix, matrix}
                         : BatchStrides{batch.outer.y * matrix, batch.inner.y * matrix};
    params.x_row_stride = problem_.x.row_stride;
    params.y_part_stride = block.rows * shape_.N;
    params.inner_size = static_cast<int>(batch.inner.size);
    params.rows = static_cast<int>(block.rows);
    params.k = static_cast<int>(shape_.K);
    params.n = static_cast<int>(shape_.N);
    params.parts = static_cast<int>(parts);
    params.part_k = static_cast<int>(part_k(kernel, parts));
    return params;
  }

  void sum_parts(Family family, const Block& block, int64_t parts, int64_t y_offset) {
    const int64_t batch = block.batch.count();
    const int64_t size = checked_int(problem_.op, "rows of x times columns of w", block.rows * shape_.N);
    Launch launch = launch_of(family, "sum_parts", 1, format_, problem_.dtype);  // part of that family's product
    launch.threads = 64;
    launch.threadgroups = {static_cast<uint32_t>(ceil_div(size, 64)), static_cast<uint32_t>(batch), 1};
    set_arguments(launch, {{Role::partial_sums}, {Role::y, y_offset}});
    set_params(launch, SumPartsParams{static_cast<int>(parts), static_cast<int>(size)}, 2);
    plan_.launches.push_back(std::move(launch));
    plan_.workspace = std::max(plan_.workspace, batch * parts * size);
  }

  const MatmulProblem& problem_;
  const Target& target_;
  const MatmulShape<int64_t>& shape_;
  Format format_;
  int64_t pairs_ = 0;  // of indices; 0 where nothing is gathered
  Plan plan_;
};

}  // namespace

Plan plan(const MatmulProblem& problem, const Target& target) {
  return is_empty(problem.shape.output) ? Plan{} : ProductPlanner(problem, target).matmul();
}

Plan plan(const GatherProblem& problem, const Target& target) {
  return is_empty(problem.matmul.shape.output) ? Plan{} : ProductPlanner(problem.matmul, target).gather(problem);
}

}  // namespace quantization_mlx::gpu
