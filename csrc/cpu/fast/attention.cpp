// scaled_dot_product_attention: blocks of rows, the queries of heads that share keys and values, and for few rows parts
// of the keys, become tasks; what the tasks of one block have is put together at the end.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../kernels.h"
#include "../memory.h"
#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

constexpr float lowest = std::numeric_limits<float>::lowest();

// Keys of a part, and the blocks of rows from which on the keys are not cut up. None depends on the number of threads,
// so that results do not.
constexpr int64_t least_part_keys = 64;
constexpr int64_t most_part_keys = 512;
constexpr int64_t enough_blocks = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of one call of the kernel: `heads` query heads from `head` on, which share a head of keys, times `queries`
// queries from `query` on.
struct Block {
  int64_t batch;
  int64_t head;
  int64_t heads;
  int64_t query;
  int64_t queries;
  int64_t begin;  // of the keys that any row sees
  int64_t end;

  int64_t rows() const { return heads * queries; }
  int64_t head_of(int64_t row) const { return head + row % heads; }
  int64_t query_of(int64_t row) const { return query + row / heads; }
};

// What a task has found for its rows.
struct Partial {
  float* maxima;  // [rows]
  float* sums;  // [rows]
  float* result;  // [rows, value_dim]
};

class AttentionTasks {
 public:
  explicit AttentionTasks(const AttentionProblem& problem)
      : problem_(problem),
        type_(real_of(problem.q.scalar_type())),
        group_(problem.query_heads() / problem.key_heads()),
        block_heads_(std::min(group_, attention_rows)),
        block_queries_(std::min(problem.queries(), attention_rows / block_heads_)),
        head_blocks_(ceil_div(group_, block_heads_)),
        query_blocks_(ceil_div(problem.queries(), block_queries_)),
        blocks_(problem.batch() * problem.key_heads() * head_blocks_ * query_blocks_),
        part_keys_(keys_of_part()),
        sinks_(problem.sinks.defined() ? floats(problem.query_heads() + 16) : Floats()) {
    if (problem.sinks.defined()) {
      kernels().to_float32(type_, problem.sinks.const_data_ptr(), problem.query_heads(), sinks_.data());
    }
  }

  void run(const Tensor& y) const {
    const int64_t multiplications = problem_.batch() * problem_.query_heads() * problem_.queries() * problem_.keys() *
        (problem_.dim() + problem_.value_dim());
    const bool worth_it = multiplications >= task_multiplications;
    const int64_t parts = std::max<int64_t>(ceil_div(problem_.keys(), part_keys_), 1);
    if (parts == 1) {
      parallel_tasks(
          blocks_,
          [&](int64_t task, int) {
            const Block block = block_of(task);
            Floats memory = floats(partial_floats());
            const Partial partial = partial_of(memory.data());
            attend(block, block.begin, block.end, partial);
            store(block, {partial}, y);
          },
          worth_it);
      return;
    }
    const Tensor memory = at::empty({blocks_ * parts, partial_floats()}, at::TensorOptions().dtype(at::kFloat));
    const auto partial = [&](int64_t task) {
      return partial_of(static_cast<float*>(memory.mutable_data_ptr()) + task * partial_floats());
    };
    parallel_tasks(
        blocks_ * parts,
        [&](int64_t task, int) {
          const Block block = block_of(task / parts);
          const int64_t begin = std::max(block.begin, task % parts * part_keys_);
          const int64_t end = std::min(block.end, (task % parts + 1) * part_keys_);
          attend(block, begin, std::max(begin, end), partial(task));
        },
        worth_it);
    parallel_tasks(
        blocks_,
        [&](int64_t number, int) {
          std::vector<Partial> all;
          for (int64_t part = 0; part < parts; ++part) {
            all.push_back(partial(number * parts + part));
          }
          store(block_of(number), all, y);
        },
        blocks_ * parts * partial_floats() >= task_multiplications);
  }

 private:
  // So that there are enough tasks, of a size that is worth one.
  int64_t keys_of_part() const {
    return blocks_ >= enough_blocks
        ? std::max<int64_t>(problem_.keys(), 1)
        : std::clamp(ceil_div(problem_.keys() * blocks_, enough_blocks), least_part_keys, most_part_keys);
  }

  int64_t partial_floats() const { return block_heads_ * block_queries_ * (2 + problem_.value_dim()); }

  Partial partial_of(float* memory) const {
    const int64_t rows = block_heads_ * block_queries_;
    return {memory, memory + rows, memory + 2 * rows};
  }

  // Causal blocks have more keys the later they are: of those of a head, the next is the first and the last in turn, so
  // that a thread that takes half of them has half of the work.
  int64_t query_block(int64_t number) const { return number % 2 == 0 ? number / 2 : query_blocks_ - 1 - number / 2; }

  Block block_of(int64_t number) const {
    Block block{};
    block.query = query_block(number % query_blocks_) * block_queries_;
    number /= query_blocks_;
    const int64_t first = number % head_blocks_ * block_heads_;  // of the group
    number /= head_blocks_;
    block.head = number % problem_.key_heads() * group_ + first;
    block.batch = number / problem_.key_heads();
    block.heads = std::min(block_heads_, group_ - first);
    block.queries = std::min(block_queries_, problem_.queries() - block.query);
    block.begin = first_key(block.query);
    block.end = std::max(block.begin, last_key(block.query + block.queries - 1));
    return block;
  }

  // A query sees keys [first_key, last_key), as far as the mask shows them.
  int64_t last_key(int64_t query) const {
    const int64_t keys = problem_.keys();
    return problem_.causal ? std::clamp<int64_t>(keys - problem_.queries() + query + 1, 0, keys) : keys;
  }
  int64_t first_key(int64_t query) const {
    const int64_t keys = problem_.keys();
    return problem_.window.has_value()
        ? std::clamp<int64_t>(keys - problem_.queries() + query + 1 - *problem_.window, 0, keys)
        : 0;
  }

  static const uint8_t* at(const Tensor& tensor, int64_t batch, int64_t head, int64_t position) {
    const int64_t element = batch * tensor.stride(0) + head * tensor.stride(1) + position * tensor.stride(2);
    return static_cast<const uint8_t*>(tensor.const_data_ptr()) + element * tensor.element_size();
  }

  static AttentionSource source_of(const KeyHeads& heads, int64_t batch, int64_t head) {
    AttentionSource source{at(heads.tensor, batch, head, 0), heads.tensor.stride(2), nullptr, nullptr, 0};
    if (heads.scales.defined()) {
      source.scales = at(heads.scales, batch, head, 0);
      source.biases = at(heads.biases, batch, head, 0);
      source.scale_stride = heads.scales.stride(2);
    }
    return source;
  }

  void attend(const Block& block, int64_t begin, int64_t end, const Partial& partial) const {
    const int64_t rows = block.rows();
    const int64_t dim = problem_.dim();
    const int64_t workspace = attention_workspace(dim, problem_.value_dim());
    WorkingMemory memory(WorkingMemory::Use::written_by_each);
    float* const work = memory.floats(workspace + rows * dim + 16);
    float* const queries = work + workspace;
    int64_t first[attention_rows];
    int64_t last[attention_rows];
    const void* mask_rows[attention_rows];
    const auto scale = static_cast<float>(problem_.scale);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = block.head_of(row);
      const int64_t query = block.query_of(row);
      kernels().to_float32(type_, at(problem_.q, block.batch, head, query), dim, queries + row * dim);
      for (int64_t d = 0; d < dim; ++d) {
        queries[row * dim + d] *= scale;
      }
      first[row] = first_key(query);
      last[row] = last_key(query);
      mask_rows[row] = problem_.mask.defined() ? at(problem_.mask, block.batch, head, query) : nullptr;
    }
    const int64_t key_head = block.head / group_;
    Attention attention{};
    attention.type = type_;
    attention.bits = problem_.bits;
    attention.group_size = problem_.group_size;
    attention.rows = rows;
    attention.dim = dim;
    attention.value_dim = problem_.value_dim();
    attention.begin = begin;
    attention.end = end;
    attention.queries = queries;
    attention.softcap = static_cast<float>(problem_.softcap);
    attention.keys = source_of(problem_.k, block.batch, key_head);
    attention.values = source_of(problem_.v, block.batch, key_head);
    attention.first = problem_.causal ? first : nullptr;
    attention.last = problem_.causal ? last : nullptr;
    if (problem_.mask.defined()) {
      const bool is_bool = problem_.mask.scalar_type() == at::kBool;
      using Kind = AttentionMask::Kind;
      attention.mask = {is_bool ? Kind::visible : Kind::added, type_, mask_rows, problem_.mask.stride(3)};
    }
    attention.workspace = work;
    attention.maxima = partial.maxima;
    attention.sums = partial.sums;
    attention.result = partial.result;
    kernels().decoder.attend(attention);
  }

  // The parts of a block's keys together, with the sink, divided by the sum of all weights.
  void store(const Block& block, c10::ArrayRef<Partial> parts, const Tensor& y) const {
    const int64_t value_dim = problem_.value_dim();
    float* const total = parts.front().result;
    for (int64_t row = 0; row < block.rows(); ++row) {
      const float sink = problem_.sinks.defined() ? sinks_[block.head_of(row)] : lowest;
      float maximum = sink;
      for (const Partial& part : parts) {
        maximum = std::max(maximum, part.maxima[row]);
      }
      float sum = problem_.sinks.defined() ? std::exp(sink - maximum) : 0.0f;
      for (const Partial& part : parts) {
        const float factor = std::exp(part.maxima[row] - maximum);
        const float* const result = part.result + row * value_dim;
        sum += part.sums[row] * factor;
        for (int64_t d = 0; d < value_dim; ++d) {
          total[row * value_dim + d] =
              &part == &parts.front() ? result[d] * factor : total[row * value_dim + d] + result[d] * factor;
        }
      }
      const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
      void* const place = const_cast<uint8_t*>(at(y, block.batch, block.head_of(row), block.query_of(row)));
      kernels().from_float32(total + row * value_dim, factor, value_dim, type_, place);
    }
  }

  const AttentionProblem& problem_;
  Real type_;
  int64_t group_;
  int64_t block_heads_;
  int64_t block_queries_;
  int64_t head_blocks_;
  int64_t query_blocks_;
  int64_t blocks_;
  int64_t part_keys_;
  Floats sinks_;
};

}  // namespace

Tensor run(const AttentionProblem& problem) {
  if (problem.is_empty()) {
    return at::zeros(problem.output(), problem.q.options());
  }
  const Tensor y = at::empty(problem.output(), problem.q.options());
  AttentionTasks(problem).run(y);
  return y;
}

}  // namespace quantization_mlx::cpu
