#include "plan.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <sstream>

namespace quantization_mlx::metal {

const char* name_of(Family family) {
  constexpr const char* names[] = {"tensor", "tile", "matvec", "quantize"};
  return names[static_cast<int>(family)];
}

const char* name_of(Role role) {
  constexpr const char* names[role_count] = {
      "none", "x", "w", "scales", "biases", "global_scale", "y", "partial_sums", "lhs_indices", "rhs_indices"};
  return names[static_cast<int>(role)];
}

namespace {

using at::Tensor;

// --- What the choice of a kernel rests on --------------------------------------------------------------------------

// Row counts that a kernel has instances for, ascending: the smallest that fits serves. More rows than the last one
// hold too many accumulators for the registers of a lane.
constexpr int qmv_rows[] = {1, 2, 3, 4, 6, 8, 12};
constexpr int gather_qmv_rows[] = {1, 4, 8, 12};
constexpr int qvm_rows[] = {1, 4, 8};
// Rows of a tile. 16 for what is just too much for a matvec: a tile's time is that of all its rows, used or not.
constexpr int tile_rows[] = {16, 32, 64};
constexpr int tensor_tile_rows[] = {32, 64};
constexpr int gather_tile_rows[] = {32};

// GPUs by the last letter of their architecture. Cores are those of the larger common model; they only steer how far a
// small product is cut up.
struct Variant {
  char letter;
  int cores;
};
constexpr Variant variants[] = {{'p', 6}, {'g', 10}, {'s', 20}, {'c', 32}, {'d', 64}};

// A core hides the latency of memory with about this many threadgroups of each kind; below it, split-K makes more.
constexpr int qvm_threadgroups_per_core = 8;  // of 128 threads
constexpr int column_qvm_threadgroups_per_core = 4;  // of 256 threads
constexpr int tile_threadgroups_per_core = 4;  // of 128 threads, with 6 to 18 KiB of threadgroup memory
// A shorter part of K than this costs more in partial sums, written and read again, than it gains.
constexpr int qvm_part_k = 128;
constexpr int column_qvm_part_k = 1024;  // a group of 128 for each simdgroup
constexpr int tile_part_k = 512;
// Parts are whole steps of a kernel along K.
constexpr int qmv_step_k = 32;
constexpr int qvm_step_k = 32;  // where columns are packed: a group

// The sorted-expert form pays from so many pairs on, and so many for each expert: with fewer, most rows of a tile are
// idle, and a matvec for each pair reads no more.
constexpr int64_t sorted_pairs = 16;
constexpr int64_t sorted_pairs_per_expert = 4;

// --- Small helpers -------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <size_t count>
int smallest_at_least(const int (&instances)[count], int64_t rows) {
  const int* found =
      std::find_if(std::begin(instances), std::end(instances), [&](int instance) { return instance >= rows; });
  return found == std::end(instances) ? instances[count - 1] : *found;
}

const char* name_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? "float16" : dtype == at::kBFloat16 ? "bfloat16" : "float32";
}

std::string kernel_name(Format format, const char* op, at::ScalarType dtype, int rows = 0) {
  std::string name = std::string(quantization_mlx::name_of(format.mode)) + "_" + op + "_" + name_of(dtype) + "_gs_" +
      std::to_string(format.group_size) + "_b_" + std::to_string(format.bits);
  return rows > 0 ? name + "_rows_" + std::to_string(rows) : name;
}

constexpr int64_t max_size = std::numeric_limits<int>::max() / 2;

int narrow(std::string_view op, const char* what, int64_t size) {
  TORCH_CHECK_NOT_IMPLEMENTED(size <= max_size, "[", op, "] ", what, " is ", size, "; on Metal it must be below 2^30.");
  return static_cast<int>(size);
}

template <typename Params>
void set_params(Launch& launch, const Params& params, int index) {
  static_assert(sizeof(Params) <= sizeof launch.params);
  std::memcpy(launch.params.data(), &params, sizeof params);
  launch.params_size = sizeof params;
  launch.params_index = index;
}

void set_arguments(Launch& launch, std::initializer_list<Argument> arguments) {
  std::copy(arguments.begin(), arguments.end(), launch.arguments.begin());
  launch.argument_count = static_cast<int>(arguments.size());
}

uint32_t constant(int index, bool value) { return static_cast<uint32_t>(value) << index; }

// The offset of a tensor's first element is all that is asked: Metal's buffers begin at least at multiples of 16.
bool is_aligned(const Tensor& tensor, int64_t offset, int64_t bytes) {
  return (tensor.storage_offset() + offset) * static_cast<int64_t>(tensor.element_size()) % bytes == 0;
}

// Bytes that a lane loads of a run of 32 codes at once (dequantize.h); of packed columns, of a row of words
// (matvec_columns.h).
int load_bytes(Format format) {
  if (is_column_packed(format.mode)) {
    return 4 * column_qvm_lane_columns();
  }
  return format.bits % 4 == 0 ? 16 : (format.bits % 2 == 0 ? 8 : 4);
}

// --- Batches -------------------------------------------------------------------------------------------------------

// Matrices to step over in each operand from one position of a batch dimension to the next.
struct BatchDimension {
  int64_t size;
  int64_t x;
  int64_t w;
  int64_t y;
};

// At most two dimensions go into one launch; what is beyond is looped over here.
struct BatchPart {
  BatchDimension outer{1, 0, 0, 0};
  BatchDimension inner{1, 0, 0, 0};
  int64_t x = 0;  // matrices before the first
  int64_t w = 0;
  int64_t y = 0;

  int64_t count() const { return outer.size * inner.size; }
};

int64_t broadcast_size(c10::IntArrayRef own, size_t rank, size_t i) {
  return i + own.size() < rank ? 1 : own[i + own.size() - rank];
}

std::vector<BatchDimension> batch_dimensions(const MatmulShape<int64_t>& shape) {
  const size_t rank = shape.batch.size();
  std::vector<BatchDimension> dimensions;  // innermost first
  int64_t x_step = 1;
  int64_t w_step = 1;
  int64_t y_step = 1;
  for (size_t i = rank; i-- > 0;) {
    const int64_t size = shape.batch[i];
    const int64_t x_size = broadcast_size(shape.x_batch, rank, i);
    const int64_t w_size = broadcast_size(shape.w_batch, rank, i);
    const BatchDimension next{size, x_size == 1 ? 0 : x_step, w_size == 1 ? 0 : w_step, y_step};
    x_step *= x_size;
    w_step *= w_size;
    y_step *= size;
    if (size == 1) {
      continue;
    }
    if (!dimensions.empty()) {
      BatchDimension& last = dimensions.back();
      if (next.x == last.x * last.size && next.w == last.w * last.size) {  // one dimension could have been both
        last.size *= size;
        continue;
      }
    }
    dimensions.push_back(next);
  }
  return dimensions;
}

std::vector<BatchPart> batch_parts(const MatmulShape<int64_t>& shape) {
  const auto dimensions = batch_dimensions(shape);
  std::vector<BatchPart> parts(1);
  for (size_t i = 0; i < dimensions.size(); ++i) {
    const BatchDimension& dimension = dimensions[i];
    if (i < 2) {
      (i == 0 ? parts[0].inner : parts[0].outer) = dimension;
      continue;
    }
    std::vector<BatchPart> next;
    for (const BatchPart& part : parts) {
      for (int64_t j = 0; j < dimension.size; ++j) {
        next.push_back(part);
        next.back().x += j * dimension.x;
        next.back().w += j * dimension.w;
        next.back().y += j * dimension.y;
      }
    }
    parts = std::move(next);
  }
  return parts;
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
  const char* file;
  const char* op;
  int rows;  // instance; 0 where the name has none
  int64_t columns;  // of a threadgroup
  int64_t depth;  // of K that a threadgroup takes at a time
  uint32_t threads;
};

class ProductPlanner {
 public:
  ProductPlanner(const MatmulProblem& problem, const Target& target)
      : problem_(problem), target_(target), shape_(problem.shape), format_(problem.weights.format) {
    narrow(problem.op, "K", shape_.K);
    narrow(problem.op, "N", shape_.N);
    narrow(problem.op, "the number of rows of x", shape_.M);
  }

  Plan matmul() && {
    for (const BatchPart& batch : batch_parts(shape_)) {
      switch (matmul_family()) {
        case Family::tensor: tensor({batch, 0, shape_.M}); break;
        case Family::tile: tile({batch, 0, shape_.M}); break;
        default: matvecs(batch); break;
      }
    }
    return std::move(plan_);
  }

  Plan gather(const GatherProblem& problem) && {
    pairs_ = narrow(problem_.op, "the number of pairs of indices", problem.lhs_indices.numel());
    narrow(problem_.op, "the number of matrices of x", problem_.x.count);
    narrow(problem_.op, "the number of matrices of w", problem_.weights.words.count);
    // Gathered matrices are chosen by their index, so all that a launch steps over is y.
    const BatchPart batch{{pairs_, 0, 0, 1}, {1, 0, 0, 0}, 0, 0, 0};
    require_any();
    const bool tiles = available(Family::tile);
    if (is_sorted_product(problem) && (has_tensor_ops() || tiles)) {
      sorted(Block{{}, 0, pairs_});
    } else if (tiles && (shape_.M > matvec_rows() || !available(Family::matvec))) {
      gather_tile({batch, 0, shape_.M});
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

  int64_t matvec_rows() const { return problem_.transpose ? std::end(qmv_rows)[-1] : std::end(qvm_rows)[-1]; }

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

  // Few rows of any number of matrices, in even shares so that none is left with a single row.
  void matvecs(const BatchPart& batch) {
    // qmv counts in 32 bits from a row of x, and from a row of w, to the last one that it takes at a time.
    if (problem_.transpose) {
      narrow(problem_.op, "K times bits", shape_.K * format_.bits);
    }
    const bool rows_are_near = !problem_.transpose || problem_.x.row_stride < max_size / matvec_rows();
    const int64_t shares = rows_are_near ? ceil_div(shape_.M, matvec_rows()) : shape_.M;
    for (int64_t i = 0; i < shares; ++i) {
      const int64_t first = i * shape_.M / shares;
      matvec({batch, first, (i + 1) * shape_.M / shares - first});
    }
  }

  void matvec(const Block& block) {
    const bool gathered = pairs_ > 0;
    if (problem_.transpose) {
      const int rows =
          gathered ? smallest_at_least(gather_qmv_rows, block.rows) : smallest_at_least(qmv_rows, block.rows);
      const Kernel kernel{Family::matvec, "matvec",   gathered ? "gather_qmv" : "qmv", rows > 1 ? rows : 0,
                          qmv_columns(),  qmv_step_k, 32u * qmv_simdgroups()};
      product(block, kernel, 1, 1);
    } else {
      const Kernel kernel = qvm_kernel(gathered ? "gather_qvm" : "qvm", smallest_at_least(qvm_rows, block.rows));
      product(block, kernel, 1, gathered ? 1 : qvm_parts(block, kernel));
    }
  }

  Kernel qvm_kernel(const char* op, int rows) const {
    Kernel kernel{Family::matvec, "matvec", op, rows > 1 ? rows : 0, qvm_columns(), qvm_step_k, 32u * qvm_simdgroups()};
    if (is_column_packed(format_.mode)) {
      kernel.columns = column_qvm_columns();
      kernel.depth = format_.group_size;
      kernel.threads = 32u * column_qvm_simdgroups();
    }
    return kernel;
  }

  int64_t qvm_parts(const Block& block, const Kernel& kernel) const {
    return is_column_packed(format_.mode)
        ? parts_of(block, kernel, 1, column_qvm_threadgroups_per_core, column_qvm_part_k)
        : parts_of(block, kernel, 1, qvm_threadgroups_per_core, qvm_part_k);
  }

  // The larger tile reads and unpacks each weight for more rows; the smaller one computes fewer rows that nobody wants.
  template <size_t count>
  static int rows_of_tile(const int (&instances)[count], int64_t rows) {
    const int fitting = smallest_at_least(instances, rows);
    const int64_t half = fitting / 2;
    const bool mostly_idle =
        rows > fitting && rows < 2 * fitting && ceil_div(rows, half) * half < ceil_div(rows, fitting) * fitting;
    return mostly_idle ? static_cast<int>(half) : fitting;
  }

  Kernel tile_kernel(const char* op, int rows) const {
    const int depth = tile_k(rows, static_cast<int>(c10::elementSize(problem_.dtype)));
    return {Family::tile, "matmul", op, rows, tile_columns(), depth, 32u * tile_simdgroups()};
  }

  Kernel tensor_kernel(const char* op, int rows) const {
    return {Family::tensor,
            "matmul_tensor",
            op,
            rows,
            tensor_tile_columns(),
            tensor_tile_k(),
            32u * tensor_tile_simdgroups()};
  }

  void tile(const Block& block) {
    const Kernel kernel = tile_kernel(problem_.transpose ? "qmm_t" : "qmm_n", rows_of_tile(tile_rows, block.rows));
    const int64_t row_tiles = ceil_div(block.rows, kernel.rows);
    product(block, kernel, row_tiles, parts_of(block, kernel, row_tiles, tile_threadgroups_per_core, tile_part_k));
  }

  void tensor(const Block& block) {
    const Kernel kernel =
        tensor_kernel(problem_.transpose ? "qmm_t_nax" : "qmm_n_nax", rows_of_tile(tensor_tile_rows, block.rows));
    product(block, kernel, ceil_div(block.rows, kernel.rows), 1);
  }

  void gather_tile(const Block& block) {
    const Kernel kernel = tile_kernel(problem_.transpose ? "gather_qmm_t" : "gather_qmm_n", gather_tile_rows[0]);
    product(block, kernel, ceil_div(block.rows, kernel.rows), 1);
  }

  void sorted(const Block& block) {
    const Kernel kernel = has_tensor_ops()
        ? tensor_kernel(problem_.transpose ? "gather_qmm_rhs_t_nax" : "gather_qmm_rhs_n_nax", gather_tile_rows[0])
        : tile_kernel(problem_.transpose ? "gather_qmm_rhs_t" : "gather_qmm_rhs_n", gather_tile_rows[0]);
    product(block, kernel, ceil_div(block.rows, kernel.rows), 1);
  }

  // --- How a kernel is launched ---

  int64_t parts_of(const Block& block, const Kernel& kernel, int64_t row_tiles, int per_core, int64_t least_part)
      const {
    if (block.batch.count() > 1 && block.rows < shape_.M) {
      return 1;  // sum_parts wants a result without gaps
    }
    const int64_t threadgroups = ceil_div(shape_.N, kernel.columns) * row_tiles * block.batch.count();
    const int64_t wanted = static_cast<int64_t>(target_.gpu.cores) * per_core / threadgroups;
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(shape_.K / least_part, 1));
    return ceil_div(shape_.K, part_k(kernel, parts));
  }

  int64_t part_k(const Kernel& kernel, int64_t parts) const {
    return ceil_div(ceil_div(shape_.K, parts), kernel.depth) * kernel.depth;
  }

  void product(const Block& block, const Kernel& kernel, int64_t row_tiles, int64_t parts) {
    const auto& weights = problem_.weights;
    const BatchPart& batch = block.batch;
    const int64_t x_offset = batch.x * problem_.x.matrix_stride + block.first_row * problem_.x.row_stride;
    const int64_t y_offset = (batch.y * shape_.M + block.first_row) * shape_.N;
    const bool split = parts > 1;

    Launch launch;
    launch.kernel =
        kernel_name(format_, (std::string(kernel.op) + (split ? "_splitk" : "")).c_str(), problem_.dtype, kernel.rows);
    launch.file = kernel.file;
    launch.family = kernel.family;
    launch.format = format_;
    launch.dtype = problem_.dtype;
    launch.constants = constants_of(block, kernel, x_offset);
    launch.threadgroups = {
        static_cast<uint32_t>(ceil_div(shape_.N, kernel.columns)), static_cast<uint32_t>(row_tiles * parts),
        static_cast<uint32_t>(batch.count())};
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
    const int64_t size = narrow(problem_.op, "rows of x times columns of w", block.rows * shape_.N);
    Launch launch;
    launch.kernel = std::string("sum_parts_") + name_of(problem_.dtype);
    launch.file = "matvec";
    launch.family = family;  // it is part of that product
    launch.format = format_;
    launch.dtype = problem_.dtype;
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

// --- Whole matrices ------------------------------------------------------------------------------------------------

constexpr uint32_t matrix_threads = 64;

uint32_t threadgroups_for(std::string_view op, int64_t threads) {
  // A kernel knows its place as the number of a thread, in 32 bits.
  narrow(op, "the number of runs of elements", threads);
  return static_cast<uint32_t>(ceil_div(threads, matrix_threads));
}

// columns: of a matrix whose columns are packed.
void set_matrix_params(Launch& launch, std::string_view op, int64_t elements, int64_t columns) {
  if (is_column_packed(launch.format.mode)) {
    set_params(launch, QuantizeColumnsParams{elements, narrow(op, "the last size of w", columns)}, 5);
  } else {
    set_params(launch, QuantizeParams{elements}, 5);
  }
}

bool is_dense(const Matrices& matrices) {
  return !matrices.tensor.defined() || matrices.count == 1 ||
      matrices.matrix_stride == matrices.row_stride * matrices.tensor.size(-2);
}

std::optional<GpuTraits> known(std::string_view architecture, int macos) {
  constexpr std::string_view prefix = "applegpu_g";
  const bool complete = architecture.substr(0, prefix.size()) == prefix && architecture.size() > prefix.size() + 1;
  const std::string_view rest = complete ? architecture.substr(prefix.size()) : std::string_view();
  const bool digits = complete && rest.size() <= 4 &&
      std::all_of(rest.begin(), rest.end() - 1, [](char c) { return c >= '0' && c <= '9'; });
  const Variant* variant = digits
      ? std::find_if(std::begin(variants), std::end(variants), [&](Variant v) { return v.letter == rest.back(); })
      : std::end(variants);
  if (variant == std::end(variants)) {
    return std::nullopt;
  }
  GpuTraits traits;
  traits.architecture = std::string(architecture);
  traits.macos = macos;
  traits.generation = std::stoi(std::string(rest.substr(0, rest.size() - 1)));
  traits.variant = variant->letter;
  traits.cores = variant->cores;
  // The phone chip of generation 17 came before the matrix units.
  traits.tensor_ops = traits.generation >= (traits.variant == 'p' ? 18 : 17) && macos >= 2602;
  return traits;
}

bool is_empty(const Sizes<int64_t>& sizes) { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); }

// --- As text -------------------------------------------------------------------------------------------------------

std::string hexadecimal(const std::byte* bytes, int size) {
  constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (int i = 0; i < size; ++i) {
    const auto byte = static_cast<unsigned>(bytes[i]);
    text += {digits[byte >> 4], digits[byte & 15]};
  }
  return text;
}

std::string describe(const Plan& plan, const Target& target) {
  constexpr std::pair<int, const char*> constants[] = {
      {QUANTIZATION_MLX_ALIGNED_OUTPUTS, "aligned_outputs"},
      {QUANTIZATION_MLX_ALIGNED_WEIGHTS, "aligned_weights"},
      {QUANTIZATION_MLX_ALIGNED_X, "aligned_x"},
      {QUANTIZATION_MLX_ALIGNED_K, "aligned_k"},
      {QUANTIZATION_MLX_HAS_GLOBAL_SCALE, "has_global_scale"}};
  std::ostringstream out;
  const auto list = [&](const auto& items, const auto& write) {
    const char* separator = "";
    out << "[";
    for (const auto& item : items) {
      out << separator;
      write(item);
      separator = ", ";
    }
    out << "]";
  };
  const auto quoted = [&](std::string_view text) { out << '"' << text << '"'; };
  std::vector<Family> excluded;
  std::copy_if(all_families.begin(), all_families.end(), std::back_inserter(excluded), [&](Family family) {
    return target.excluded.contains(family);
  });
  out << "{\"device\": \"mps\", \"gpu\": \"" << target.gpu.architecture << "\", \"excluded\": ";
  list(excluded, [&](Family family) { quoted(name_of(family)); });
  out << ", \"workspace\": " << plan.workspace << ", \"launches\": ";
  list(plan.launches, [&](const Launch& launch) {
    std::vector<const char*> set;
    for (const auto& [index, name] : constants) {
      if (launch.constants >> index & 1u) {
        set.push_back(name);
      }
    }
    out << "{\"kernel\": ";
    quoted(launch.kernel);
    out << ", \"file\": ";
    quoted(launch.file);
    out << ", \"family\": ";
    quoted(name_of(launch.family));
    out << ", \"constants\": ";
    list(set, quoted);
    out << ", \"threadgroups\": ";
    list(launch.threadgroups, [&](uint32_t count) { out << count; });
    out << ", \"threads\": " << launch.threads << ", \"arguments\": ";
    const auto used = launch.arguments.begin() + launch.argument_count;
    list(std::vector<Argument>(launch.arguments.begin(), used), [&](const Argument& argument) {
      out << "[\"" << name_of(argument.role) << "\", " << argument.offset << "]";
    });
    out << ", \"params_index\": " << launch.params_index << ", \"params\": ";
    quoted(hexadecimal(launch.params.data(), launch.params_size));
    out << "}";
  });
  out << "}";
  return out.str();
}

void promote(Matrices& matrices, at::ScalarType dtype) {
  matrices.tensor = matrices.tensor.to(dtype).contiguous();
  matrices.matrix_stride = matrices.count > 1 ? matrices.row_stride * matrices.tensor.size(-2) : 0;
}

void promote_scales(QuantizedMatrices& weights, at::ScalarType dtype) {
  if (has_biases(weights.format.mode) && weights.scales.tensor.scalar_type() != dtype) {
    promote(weights.scales, dtype);
    promote(weights.biases, dtype);
  }
}

}  // namespace

MatmulProblem with_kernel_dtype(MatmulProblem problem) {
  promote_scales(problem.weights, problem.dtype);
  return problem;
}

GatherProblem with_kernel_dtype(GatherProblem problem) {
  promote_scales(problem.matmul.weights, problem.matmul.dtype);
  return problem;
}

DequantizeProblem with_kernel_dtype(DequantizeProblem problem) {
  if (has_biases(problem.weights.format.mode)) {
    problem.dtype = c10::promoteTypes(problem.weights.scales.tensor.scalar_type(), problem.dtype);
    promote_scales(problem.weights, problem.dtype);
  }
  return problem;
}

GpuTraits GpuTraits::parse(std::string_view name, int macos) {
  const size_t slash = name.find('/');
  auto traits = known(name.substr(0, slash), macos);
  const std::string_view cores = slash == std::string_view::npos ? "" : name.substr(slash + 1);
  const bool is_number = std::all_of(cores.begin(), cores.end(), [](char c) { return c >= '0' && c <= '9'; });
  const bool has_cores = slash == std::string_view::npos || (!cores.empty() && cores.size() <= 4 && is_number);
  TORCH_CHECK_VALUE(
      traits.has_value() && has_cores, "The GPU is named \"", name,
      "\"; expected is Metal's name of an architecture, applegpu_g and a generation and p, g, s, c or d, and if you "
      "like, after a slash, how many cores it has: applegpu_g16s or applegpu_g16s/16.");
  if (!cores.empty()) {
    traits->cores = std::max(1, std::stoi(std::string(cores)));
  }
  return *traits;
}

GpuTraits GpuTraits::of_device(std::string_view architecture, int macos) {
  GpuTraits plain;
  plain.architecture = std::string(architecture);
  plain.cores = 10;
  plain.macos = macos;
  return known(architecture, macos).value_or(plain);
}

Plan plan(const MatmulProblem& problem, const Target& target) {
  return is_empty(problem.shape.output) ? Plan{} : ProductPlanner(problem, target).matmul();
}

Plan plan(const GatherProblem& problem, const Target& target) {
  return is_empty(problem.matmul.shape.output) ? Plan{} : ProductPlanner(problem.matmul, target).gather(problem);
}

Plan plan(const DequantizeProblem& problem, const Target&) {
  if (is_empty(problem.output)) {
    return {};
  }
  const auto& weights = problem.weights;
  const Matrices& words = weights.words;
  // Matrices without gaps are one long row.
  const bool dense = is_dense(words) && is_dense(weights.scales) && is_dense(weights.biases);
  const int64_t matrix = words.tensor.size(-2) * words.row_stride * 32 / weights.format.bits;
  const int64_t launches = dense ? 1 : words.count;
  const int64_t elements = dense ? matrix * words.count : matrix;
  Plan plan;
  for (int64_t i = 0; i < launches; ++i) {
    const int64_t first = i * words.matrix_stride;
    Launch launch;
    launch.kernel = kernel_name(weights.format, "dequantize", problem.dtype);
    launch.file = "quantize";
    launch.family = Family::quantize;
    launch.format = weights.format;
    launch.dtype = problem.dtype;
    launch.constants =
        constant(QUANTIZATION_MLX_ALIGNED_WEIGHTS, is_aligned(words.tensor, first, load_bytes(weights.format))) |
        constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE, weights.global_scale.defined());
    launch.threads = matrix_threads;
    launch.threadgroups = {threadgroups_for("dequantize", ceil_div(elements, 32)), 1, 1};
    const bool biases = weights.biases.tensor.defined();
    set_arguments(
        launch,
        {{Role::w, first},
         {Role::scales, i * weights.scales.matrix_stride},
         biases ? Argument{Role::biases, i * weights.biases.matrix_stride} : Argument{},
         weights.global_scale.defined() ? Argument{Role::global_scale} : Argument{},
         {Role::y, i * matrix}});
    set_matrix_params(launch, "dequantize", elements, words.row_stride);
    plan.launches.push_back(std::move(launch));
  }
  return plan;
}

Plan plan(const QuantizeProblem& problem, const Target&) {
  if (problem.w.numel() == 0) {
    return {};
  }
  const int64_t elements_per_thread = is_column_packed(problem.format.mode) ? problem.format.group_size : 8;
  Launch launch;
  launch.kernel = kernel_name(problem.format, "quantize", problem.w.scalar_type());
  launch.file = "quantize";
  launch.family = Family::quantize;
  launch.format = problem.format;
  launch.dtype = problem.w.scalar_type();
  launch.constants = constant(QUANTIZATION_MLX_ALIGNED_X, is_aligned(problem.w, 0, 16)) |
      constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE, problem.global_scale.defined());
  launch.threads = matrix_threads;
  launch.threadgroups = {threadgroups_for("quantize", problem.w.numel() / elements_per_thread), 1, 1};
  set_arguments(
      launch,
      {{Role::x},
       problem.global_scale.defined() ? Argument{Role::global_scale} : Argument{},
       {Role::w},
       {Role::scales},
       has_biases(problem.format.mode) || has_zeros(problem.format.mode) ? Argument{Role::biases} : Argument{}});
  set_matrix_params(launch, "quantize", problem.w.numel(), problem.w.size(-1));
  Plan plan;
  plan.launches.push_back(std::move(launch));
  return plan;
}

std::string explain(const MatmulProblem& problem, const Target& target) {
  return describe(plan(with_kernel_dtype(problem), target), target);
}

std::string explain(const GatherProblem& problem, const Target& target) {
  return describe(plan(with_kernel_dtype(problem), target), target);
}

std::string explain(const DequantizeProblem& problem, const Target& target) {
  return describe(plan(with_kernel_dtype(problem), target), target);
}

std::string explain(const QuantizeProblem& problem, const Target& target) {
  return describe(plan(problem, target), target);
}

}  // namespace quantization_mlx::metal
