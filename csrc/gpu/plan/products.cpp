// Plans of products, plain and gathered.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <iterator>
#include <string>
#include <utility>

#include "launches.h"

namespace quantization_mlx::gpu {
namespace {

// --- What the choice of a kernel rests on --------------------------------------------------------------------------

// Row counts that a kernel has instances for, ascending: the smallest that fits serves. More rows than the last one
// hold too many accumulators for the registers of a lane.
constexpr int qmv_rows[] = {1, 2, 3, 4, 6, 8, 12};
constexpr int gather_qmv_rows[] = {1, 4, 8, 12};
constexpr int qvm_rows[] = {1, 2, 4, 8};
constexpr int gather_qvm_rows[] = {1, 4, 8};  // also where columns are packed
// Rows of a tile. 16 for what is just too much for a matvec: a tile's time is that of all its rows, used or not.
constexpr int tile_rows[] = {16, 32, 64};
constexpr int tensor_tile_rows[] = {32, 64};
// llama.cpp's pull request 20962: 26 % faster than 64 rows on M5 Max.
constexpr int large_tensor_tile_rows = 128;
constexpr int large_tiles_per_core = 4;
constexpr int gather_tile_rows = 32;
constexpr int pair_tile_rows[] = {16, 32};

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

// Pairs per expert, up to which tiles of 16 rows are as fast as those of 32 or faster: most experts then fill one or
// two of them, and a tile of 32 would be half idle. Measured on another GPU (docs/gpu-lane.md).
constexpr int64_t few_pairs_per_expert = 16;

// Parts are whole steps of a kernel along K.
constexpr int qmv_step_k = 32;
constexpr int qvm_step_k = 32;  // where columns are packed: a group

// Minimum pairs for tiles of sorted pairs, in total and per expert: with fewer, most rows of a tile are idle, and a
// matvec for each pair reads no more. sort_pairs has a thread for each expert, and one for pairs that are of none.
constexpr int64_t sorted_pairs = 16;
constexpr int64_t sorted_pairs_per_expert = 4;
constexpr int64_t sorted_experts = sort_pairs_threads() - 1;
// Of the workspace.
constexpr int64_t tile_values = sizeof(PairTile) / sizeof(int);
constexpr int64_t pair_values = sizeof(SortedPair) / sizeof(int);

template <size_t count>
int smallest_at_least(const int (&instances)[count], int64_t rows) {
  const int* found =
      std::find_if(std::begin(instances), std::end(instances), [&](int instance) { return instance >= rows; });
  return found == std::end(instances) ? instances[count - 1] : *found;
}

// --- Products ------------------------------------------------------------------------------------------------------

// The rows that one launch multiplies of each matrix of the batch.
struct Block {
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
  bool sorts_pairs = false;  // its tiles are those of sort_pairs
};

class ProductPlanner {
 public:
  ProductPlanner(const ProductFacts& facts, std::string_view op, const Target& target)
      : facts_(facts), batch_(facts.batch), format_(facts.format), op_(op), target_(target) {
    checked_int(op, "K", facts.K);
    checked_int(op, "N", facts.N);
    checked_int(op, "the number of rows of x", facts.M);
  }

  Plan matmul() && {
    const Block block{0, facts_.M};
    if (is_gated()) {
      // qmv counts in 32 bits from the rows of gates to those of values.
      const bool halves_are_near = facts_.N * (facts_.K / 16) * format_.bits <= max_size;
      if (halves_are_near && facts_.M <= matvec_rows() && available(Family::gated_matvec)) {
        matvecs();
      }
      return std::move(plan_);
    }
    switch (matmul_family()) {
      case Family::tensor: product(block, tensor_kernel("qmm", rows_of_tile(tensor_tile_rows, facts_.M))); break;
      case Family::tile: product(block, tile_kernel("qmm", rows_of_tile(tile_rows, facts_.M))); break;
      default: matvecs(); break;
    }
    return std::move(plan_);
  }

  Plan gather() && {
    checked_int(op_, "the number of pairs of indices", facts_.pairs);
    checked_int(op_, "the number of matrices of x", facts_.x.count);
    checked_int(op_, "the number of matrices of w", facts_.words.count);
    require_any();
    const bool tiles = available(Family::tile);
    if (has_tiles_of_pairs() && (has_tensor_ops() || tiles)) {
      const Kernel kernel = pair_kernel();
      sort_pairs(kernel);
      batch_ = {};  // all pairs are the rows of one product
      product({0, facts_.pairs}, kernel);
    } else if (tiles && (facts_.M > matvec_rows() || !available(Family::matvec))) {
      product({0, facts_.M}, unsplit(tile_kernel("gather_qmm", gather_tile_rows)));
    } else {
      // Tensor operations alone are left for tiles of pairs only.
      TORCH_CHECK(available(Family::matvec), no_family_left(op_, target_));
      matvecs();
    }
    return std::move(plan_);
  }

 private:
  // --- Which family ---

  bool available(Family family) const { return !target_.excluded.contains(family); }

  // Matrix units take float32 as 10 bits of mantissa or not at all.
  bool has_tensor_ops() const { return target_.gpu.tensor_ops && dtype() != at::kFloat && available(Family::tensor); }

  int64_t matvec_rows() const {
    if (!facts_.transpose) {
      return std::end(qvm_rows)[-1];
    }
    const GpuTraits& gpu = target_.gpu;
    const auto found = std::find_if(std::begin(row_limits), std::end(row_limits), [&](const RowLimits& limits) {
      return gpu.generation >= limits.generation && limits.ultra == (gpu.variant == 'd');
    });
    const int64_t size = std::max(facts_.K, facts_.N * halves());
    const int column = (size > small_matrix) + (size > medium_matrix);
    return found == std::end(row_limits) ? std::end(qmv_rows)[-1] : found->rows[column];
  }

  void require_any() const {
    TORCH_CHECK(has_tensor_ops() || available(Family::tile) || available(Family::matvec), no_family_left(op_, target_));
  }

  Family matmul_family() const {
    require_any();
    const bool tiles = has_tensor_ops() || available(Family::tile);
    if (!tiles || (facts_.M <= matvec_rows() && available(Family::matvec))) {
      return Family::matvec;
    }
    return has_tensor_ops() ? Family::tensor : Family::tile;
  }

  bool has_tiles_of_pairs() const {
    const int64_t experts = facts_.words.count;
    return facts_.M == 1 && facts_.pairs >= sorted_pairs && facts_.pairs >= sorted_pairs_per_expert * experts &&
        experts <= sorted_experts;
  }

  // --- Which kernel ---

  // Few rows of any number of matrices, in shares of about the same size.
  void matvecs() {
    // qmv counts in 32 bits from a row of x, and from a row of w, to the last one that it takes at a time.
    if (facts_.transpose) {
      checked_int(op_, "K times bits", facts_.K * format_.bits);
    }
    const bool rows_are_near = !facts_.transpose || facts_.x.row_stride < max_size / matvec_rows();
    const int64_t shares = rows_are_near ? ceil_div(facts_.M, matvec_rows()) : facts_.M;
    for (int64_t i = 0; i < shares; ++i) {
      const int64_t first = i * facts_.M / shares;
      const int64_t rows = (i + 1) * facts_.M / shares - first;
      product({first, rows}, facts_.transpose ? qmv_kernel(rows) : qvm_kernel(rows));
    }
  }

  Kernel qmv_kernel(int64_t rows) const {
    const bool gathered = is_gathered();
    const int instance = gathered ? smallest_at_least(gather_qmv_rows, rows) : smallest_at_least(qmv_rows, rows);
    const char* op = gathered ? "gather_qmv" : "qmv";
    const int element_size = static_cast<int>(c10::elementSize(dtype()));
    const int elements = qmv_elements(instance, format_.group_size, element_size);
    const int along = qmv_simdgroups_along(static_cast<int>(facts_.K / elements), static_cast<int>(facts_.N));
    const int columns = qmv_columns(along) / halves();
    const Family family = is_gated() ? Family::gated_matvec : Family::matvec;
    return {family, op, instance, columns, qmv_step_k, 32u * qmv_simdgroups(), no_split};
  }

  Kernel qvm_kernel(int64_t rows) const {
    const bool gathered = is_gathered();
    const int instance = gathered || is_column_packed(format_.mode) ? smallest_at_least(gather_qvm_rows, rows)
                                                                    : smallest_at_least(qvm_rows, rows);
    const char* op = gathered ? "gather_qvm" : "qvm";
    if (is_column_packed(format_.mode)) {
      const uint32_t threads = 32u * column_qvm_simdgroups();
      const SplitK split = gathered ? no_split : column_qvm_split;
      return {Family::matvec, op, instance, column_qvm_columns(), format_.group_size, threads, split};
    }
    const SplitK split = gathered && instance > 1 ? no_split : qvm_split;
    return {Family::matvec, op, instance, qvm_columns(), qvm_step_k, 32u * qvm_simdgroups(), split};
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
    const int depth = tile_k(rows, static_cast<int>(c10::elementSize(dtype())));
    return {Family::tile, op + side(), rows, tile_columns(), depth, 32u * tile_simdgroups(), tile_split};
  }

  // A larger tile than that of `rows` where there are many, none of its rows would be idle, and every core has as many
  // tiles as it can hide latency with.
  Kernel tensor_kernel(const char* op, int rows) const {
    const int64_t large = ceil_div(facts_.M, large_tensor_tile_rows);
    const int64_t tiles = large * ceil_div(facts_.N, tensor_tile_columns());
    const bool fits = rows == std::end(tensor_tile_rows)[-1] &&
        2 * large == ceil_div(facts_.M, large_tensor_tile_rows / 2) &&
        tiles >= static_cast<int64_t>(target_.gpu.cores) * large_tiles_per_core;
    const int instance = fits ? large_tensor_tile_rows : rows;
    const SplitK split = fits ? no_split : tensor_split(rows);
    const uint32_t threads = 32u * tensor_tile_simdgroups();
    return {Family::tensor, op + side() + "_nax", instance, tensor_tile_columns(), tensor_tile_k(), threads, split};
  }

  static Kernel unsplit(Kernel kernel) {
    kernel.split = no_split;
    return kernel;
  }

  Kernel pair_kernel() const {
    constexpr const char* op = "gather_qmm_rhs";
    const bool few = facts_.pairs <= few_pairs_per_expert * facts_.words.count;
    Kernel kernel =
        unsplit(has_tensor_ops() ? tensor_kernel(op, gather_tile_rows) : tile_kernel(op, pair_tile_rows[few ? 0 : 1]));
    kernel.sorts_pairs = true;
    return kernel;
  }

  std::string side() const { return facts_.transpose ? "_t" : "_n"; }

  // --- How a kernel is launched ---

  int64_t row_tiles(const Block& block, const Kernel& kernel) const {
    const bool is_matvec = kernel.family == Family::matvec || kernel.family == Family::gated_matvec;
    return is_matvec ? 1 : kernel.sorts_pairs ? most_tiles_of_pairs(kernel) : ceil_div(block.rows, kernel.rows);
  }

  // However the pairs are distributed: each matrix, and those that are of none, have one tile that may not be full.
  int64_t most_tiles_of_pairs(const Kernel& kernel) const {
    const int64_t begun = std::min(facts_.pairs, facts_.words.count + 1);
    return begun + (facts_.pairs - begun) / kernel.rows;
  }

  // Of K.
  int64_t parts_of(const Block& block, const Kernel& kernel) const {
    const bool has_gaps = batch_.count() > 1 && block.rows < facts_.M;  // which sum_parts does not write
    if (kernel.split.least_part == 0 || has_gaps) {
      return 1;
    }
    const int64_t threadgroups = ceil_div(facts_.N, kernel.columns) * row_tiles(block, kernel) * batch_.count();
    const int64_t wanted = static_cast<int64_t>(target_.gpu.cores) * kernel.split.threadgroups_per_core / threadgroups;
    const int64_t most = std::max<int64_t>(facts_.K / kernel.split.least_part, 1);
    return ceil_div(facts_.K, part_k(kernel, std::clamp<int64_t>(wanted, 1, most)));
  }

  int64_t part_k(const Kernel& kernel, int64_t parts) const {
    return ceil_div(ceil_div(facts_.K, parts), kernel.depth) * kernel.depth;
  }

  void product(const Block& block, const Kernel& kernel) {
    const int64_t parts = parts_of(block, kernel);
    const int64_t x_offset = batch_.x * facts_.x.matrix_stride + block.first_row * facts_.x.row_stride;
    const int64_t y_offset = (batch_.y * facts_.M + block.first_row) * facts_.N;
    const bool split = parts > 1;

    Launch launch = launch_of(kernel.family, kernel.op + (split ? "_splitk" : ""), kernel.rows, format_, facts_.dtype);
    launch.kernel.constants = constants_of(kernel, x_offset);
    launch.kernel.threads = kernel.threads;
    launch.threadgroups = {
        static_cast<uint32_t>(ceil_div(facts_.N, kernel.columns)),
        static_cast<uint32_t>(row_tiles(block, kernel) * parts), static_cast<uint32_t>(batch_.count())};

    const ProductParams params = params_of(block, kernel, parts);
    const Argument y = split ? Argument{Role::workspace, 0} : Argument{Role::y, y_offset};
    const Argument unused{};
    const Argument biases =
        facts_.biases.is_given() ? Argument{Role::biases, batch_.w * facts_.biases.matrix_stride} : unused;
    const Argument global_scale = facts_.global_scales > 0 ? Argument{Role::global_scale, 0} : unused;
    const Argument w{Role::w, batch_.w * facts_.words.matrix_stride};
    const Argument scales{Role::scales, batch_.w * facts_.scales.matrix_stride};
    const Argument x{Role::x, x_offset};
    if (kernel.sorts_pairs) {
      const Argument tiles{Role::workspace, 0};
      const Argument pairs{Role::workspace, most_tiles_of_pairs(kernel) * tile_values};
      set_arguments(launch, {x, w, scales, biases, global_scale, y, unused, tiles, pairs});
      set_params(launch, params, 6);
    } else if (is_gathered()) {
      const GatherParams gather{params, static_cast<int>(facts_.x.count), static_cast<int>(facts_.words.count)};
      set_arguments(launch, {x, w, scales, biases, global_scale, y, unused, {Role::lhs_indices}, {Role::rhs_indices}});
      set_params(launch, gather, 6);
    } else {
      set_arguments(launch, {x, w, scales, biases, global_scale, y});
      set_params(launch, params, 6);
    }
    plan_.launches.push_back(launch);
    if (split) {
      sum_parts(kernel.family, block, parts, y_offset);
    }
  }

  void sort_pairs(const Kernel& kernel) {
    const int64_t tiles = checked_int(op_, "the number of tiles", most_tiles_of_pairs(kernel));
    // One kernel for all formats and types; part of the family's product.
    Launch launch = launch_of(kernel.family, "sort_pairs", 1, {}, static_cast<int32_t>(at::kFloat));
    launch.kernel.threads = sort_pairs_threads();
    launch.threadgroups = {1, 1, 1};
    set_arguments(launch, {{Role::lhs_indices}, {Role::rhs_indices}, {Role::workspace}});
    const SortPairsParams params{
        static_cast<int>(facts_.pairs), static_cast<int>(facts_.x.count), static_cast<int>(facts_.words.count),
        kernel.rows, static_cast<int>(tiles)};
    set_params(launch, params, 3);
    plan_.launches.push_back(launch);
    plan_.workspace = tiles * tile_values + facts_.pairs * pair_values;
  }

  // Of scales or zeros, whose rows are as long as those of words.
  bool are_aligned_columns(const OperandFacts& values) const {
    constexpr int columns = column_qvm_lane_columns();
    return !values.is_given() ||
        (is_aligned(values, batch_.w * values.matrix_stride, 2 * columns) &&
         (values.count == 1 || values.matrix_stride % columns == 0));
  }

  uint32_t constants_of(const Kernel& kernel, int64_t x_offset) const {
    const OperandFacts& words = facts_.words;
    const OperandFacts& x = facts_.x;
    const int64_t word_bytes = load_bytes(format_);
    const auto whole_words = [&](int64_t count) { return count * 4 % word_bytes == 0; };
    const auto whole_x = [&](int64_t elements) { return elements * x.element_size % 16 == 0; };
    const bool aligned_weights = is_aligned(words, batch_.w * words.matrix_stride, word_bytes) &&
        whole_words(words.row_stride) && (words.count == 1 || whole_words(words.matrix_stride)) &&
        (!is_column_packed(format_.mode) || (are_aligned_columns(facts_.scales) && are_aligned_columns(facts_.biases)));
    const bool aligned_x = is_aligned(x, x_offset, 16) && (x.count == 1 || whole_x(x.matrix_stride)) &&
        (facts_.M == 1 || whole_x(x.row_stride));
    return constant(QUANTIZATION_MLX_ALIGNED_OUTPUTS, facts_.N % kernel.columns == 0) |
        constant(QUANTIZATION_MLX_ALIGNED_WEIGHTS, aligned_weights) | constant(QUANTIZATION_MLX_ALIGNED_X, aligned_x) |
        constant(QUANTIZATION_MLX_ALIGNED_K, facts_.K % kernel.depth == 0) |
        constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE, facts_.global_scales > 0) |
        constant(QUANTIZATION_MLX_IS_GATED, is_gated());
  }

  ProductParams params_of(const Block& block, const Kernel& kernel, int64_t parts) const {
    const auto strides = [&](const OperandFacts& operand, int64_t BatchDimension::* step) {
      return is_gathered()
          ? BatchStrides{operand.matrix_stride, 0}
          : BatchStrides{batch_.outer.*step * operand.matrix_stride, batch_.inner.*step * operand.matrix_stride};
    };
    const int64_t matrix = parts > 1 ? parts * block.rows * facts_.N : facts_.M * facts_.N;
    ProductParams params{};
    params.x = strides(facts_.x, &BatchDimension::x);
    params.w = strides(facts_.words, &BatchDimension::w);
    params.scales = strides(facts_.scales, &BatchDimension::w);
    params.biases = strides(facts_.biases, &BatchDimension::w);
    params.global_scale = {facts_.global_scales > 1 ? 1 : 0, 0};  // of gathered matrices alone
    // Partial sums are those of this launch, one after the other.
    params.y = parts > 1 ? BatchStrides{batch_.inner.size * matrix, matrix}
                         : BatchStrides{batch_.outer.y * matrix, batch_.inner.y * matrix};
    params.x_row_stride = facts_.x.row_stride;
    params.y_part_stride = block.rows * facts_.N;
    params.inner_size = static_cast<int>(batch_.inner.size);
    params.rows = static_cast<int>(block.rows);
    params.k = static_cast<int>(facts_.K);
    params.n = static_cast<int>(facts_.N);
    params.parts = static_cast<int>(parts);
    params.part_k = static_cast<int>(part_k(kernel, parts));
    params.gate = is_gated() ? static_cast<int>(facts_.gate - 1) : 0;
    return params;
  }

  void sum_parts(Family family, const Block& block, int64_t parts, int64_t y_offset) {
    const int64_t size = checked_int(op_, "rows of x times columns of w", block.rows * facts_.N);
    Launch launch = launch_of(family, "sum_parts", 1, format_, facts_.dtype);  // part of that family's product
    launch.kernel.threads = elementwise_threads_per_threadgroup();
    launch.threadgroups = {
        static_cast<uint32_t>(ceil_div(size, elementwise_threads_per_threadgroup())),
        static_cast<uint32_t>(batch_.count()), 1};
    set_arguments(launch, {{Role::workspace}, {Role::y, y_offset}});
    set_params(launch, SumPartsParams{static_cast<int>(parts), static_cast<int>(size)}, 2);
    plan_.launches.push_back(launch);
    plan_.workspace = std::max(plan_.workspace, batch_.count() * parts * size);
  }

  at::ScalarType dtype() const { return facts_.scalar_type(); }
  bool is_gathered() const { return facts_.pairs > 0; }
  bool is_gated() const { return facts_.gate > 0; }
  int halves() const { return is_gated() ? 2 : 1; }  // rows of w to a column of y

  const ProductFacts& facts_;
  BatchPart batch_;
  Format format_;
  std::string_view op_;
  const Target& target_;
  Plan plan_;
};

}  // namespace

Plan plan(const ProductFacts& facts, std::string_view op, const Target& target) {
  ProductPlanner planner(facts, op, target);
  return facts.pairs > 0 ? std::move(planner).gather() : std::move(planner).matmul();
}

Plan plan(const GatedMatmulProblem& problem, const Target& target) {
  Plan all;
  for (const ProductFacts& facts : facts_of(problem)) {
    const Plan part = plan(facts, op_of(problem), target);
    all.launches.insert(all.launches.end(), part.launches.begin(), part.launches.end());
  }
  if (!all.launches.empty() || problem.length() == 0) {
    return all;
  }
  all = plan(problem.matmul, target);
  const at::Tensor both =
      at::empty(problem.matmul.shape.output, at::TensorOptions(at::kMeta).dtype(problem.matmul.dtype));
  const Plan activation = plan(problem.of_product(both), target);
  all.launches.insert(all.launches.end(), activation.launches.begin(), activation.launches.end());
  return all;
}

}  // namespace quantization_mlx::gpu
