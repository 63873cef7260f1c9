// The steps of a transformer decoder between its products, for few rows: one op for what takes torch many small ones.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "../kernels.h"
#include "../memory.h"
#include "../ops.h"
#include "../parallel.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

void check_real(const char* op, const char* name, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, "[", op, "] ", name, " has dtype ", dtype,
      "; supported are float32, float16 and bfloat16.");
}

void check_row(const char* op, const char* name, const Tensor& tensor, int64_t multiple) {
  check_real(op, name, tensor);
  TORCH_CHECK_VALUE(
      tensor.dim() > 0 && tensor.size(-1) > 0 && tensor.size(-1) % multiple == 0, "[", op, "] ", name, " of shape ",
      tensor.sizes(), " must have a last size that is a multiple of ", multiple, ".");
}

void check_same(const char* op, const char* name, const Tensor& tensor, const Tensor& x, c10::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == x.scalar_type(), "[", op, "] ", name, " has dtype ", tensor.scalar_type(), " and x ",
      x.scalar_type(), "; they must be the same.");
  TORCH_CHECK_VALUE(
      tensor.sizes() == sizes && tensor.is_contiguous(), "[", op, "] ", name, " has shape ", tensor.sizes(),
      " and strides ", tensor.strides(), "; it must be contiguous, of shape ", sizes, ".");
}

const void* row_of(const Tensor& tensor, int64_t row, int64_t length) {
  return static_cast<const uint8_t*>(tensor.const_data_ptr()) + row * length * tensor.element_size();
}

void* mutable_row_of(const Tensor& tensor, int64_t row, int64_t length) {
  return static_cast<uint8_t*>(tensor.mutable_data_ptr()) + row * length * tensor.element_size();
}

void load_row(const Tensor& tensor, int64_t row, int64_t length, float* destination) {
  kernels().to_float32(real_of(tensor.scalar_type()), row_of(tensor, row, length), length, destination);
}

void store_row(const float* source, const Tensor& tensor, int64_t row, int64_t length) {
  kernels().from_float32(source, 1.0f, length, real_of(tensor.scalar_type()), mutable_row_of(tensor, row, length));
}

}  // namespace

Tensor decode_attention(
    const Tensor& x,
    const Tensor& cosines,
    const Tensor& sines,
    const Tensor& keys,
    const Tensor& values,
    int64_t position,
    double scaling,
    const std::optional<Tensor>& query_norm,
    const std::optional<Tensor>& key_norm,
    double epsilon) {
  constexpr const char* op = "decode_attention";
  check_row(op, "x", x, 32);
  TORCH_CHECK_VALUE(
      keys.dim() == 4 && keys.size(0) > 0 && keys.size(1) > 0 && keys.size(3) > 0 && keys.size(3) % 32 == 0 &&
          position >= 0 && position < keys.size(2),
      "[", op, "] keys of shape ", keys.sizes(),
      " must be [batch, key heads, capacity, head size], the head size a "
      "multiple of 32, and their capacity above the position ",
      position, ".");
  check_same(op, "keys", keys, x, keys.sizes());
  check_same(op, "values", values, x, keys.sizes());
  const int64_t batch = keys.size(0);
  const int64_t key_heads = keys.size(1);
  const int64_t capacity = keys.size(2);
  const int64_t dim = keys.size(3);
  const int64_t query_heads = x.size(-1) / dim - 2 * key_heads;
  TORCH_CHECK_VALUE(
      x.numel() == batch * (query_heads + 2 * key_heads) * dim && query_heads > 0 && query_heads % key_heads == 0, "[",
      op, "] x of shape ", x.sizes(), " does not fit keys of shape ", keys.sizes(),
      ": it must be [batch, 1, (query heads + 2 * key heads) * head size], the query heads a multiple of the key "
      "heads.");
  TORCH_CHECK_VALUE(
      cosines.numel() == sines.numel() && (cosines.numel() == dim || cosines.numel() == batch * dim), "[", op,
      "] cosines and sines of shapes ", cosines.sizes(), " and ", sines.sizes(), " must be [1 or batch, 1, ", dim,
      "].");
  check_same(op, "cosines", cosines, x, cosines.sizes());
  check_same(op, "sines", sines, x, sines.sizes());
  for (const auto* norm : {&query_norm, &key_norm}) {
    if (norm->has_value()) {
      check_same(op, "norm", **norm, x, {dim});
    }
  }
  const Tensor input = x.contiguous();
  const Tensor y = at::empty({batch, 1, query_heads * dim}, x.options());
  const Kernels& all = kernels();
  const DecoderKernels& kernel = all.decoder;
  const Real type = real_of(x.scalar_type());
  const int64_t heads = query_heads / key_heads;
  const int64_t length = position + 1;

  // One task for each head of keys.
  const auto attend = [&](int64_t task, int) {
    const int64_t sequence = task / key_heads;
    const int64_t key_head = task % key_heads;
    const int64_t angles = cosines.numel() == dim ? 0 : sequence;
    Floats memory = floats(dim * (3 + 2 * heads) + 2 * heads);
    WorkingMemory workspace(WorkingMemory::Use::written_by_each);
    float* const cosine = memory.data();
    float* const sine = cosine + dim;
    float* const row = sine + dim;
    float* const queries = row + dim;
    float* const results = queries + heads * dim;
    float* const maxima = results + heads * dim;
    float* const sums = maxima + heads;
    load_row(cosines, angles, dim, cosine);
    load_row(sines, angles, dim, sine);

    const int64_t first = sequence * (query_heads + 2 * key_heads);
    const auto rotated = [&](int64_t head, const std::optional<Tensor>& norm, float* destination) {
      load_row(input, first + head, dim, row);
      if (norm.has_value()) {
        load_row(*norm, 0, dim, destination);
        kernel.rms_norm(row, destination, static_cast<float>(epsilon), dim, row);
      }
      kernel.rotate(row, cosine, sine, dim, destination);
    };
    const int64_t place = task * capacity + position;
    rotated(query_heads + key_head, key_norm, queries);
    store_row(queries, keys, place, dim);
    std::memcpy(
        mutable_row_of(values, place, dim), row_of(input, first + query_heads + key_heads + key_head, dim),
        dim * input.element_size());
    for (int64_t head = 0; head < heads; ++head) {
      float* const query = queries + head * dim;
      rotated(key_head * heads + head, query_norm, query);
      for (int64_t d = 0; d < dim; ++d) {
        query[d] *= static_cast<float>(scaling);
      }
    }
    for (int64_t head = 0; head < heads; head += attention_rows) {
      Attention attention{};
      attention.type = type;
      attention.rows = std::min(heads - head, attention_rows);
      attention.dim = attention.value_dim = attention.key_stride = attention.value_stride = dim;
      attention.end = length;
      attention.queries = queries + head * dim;
      attention.keys = row_of(keys, task * capacity, dim);
      attention.values = row_of(values, task * capacity, dim);
      attention.workspace = workspace.floats(attention_workspace(dim, dim));
      attention.maxima = maxima + head;
      attention.sums = sums + head;
      attention.result = results + head * dim;
      kernel.attend(attention);
    }
    for (int64_t head = 0; head < heads; ++head) {
      all.from_float32(results + head * dim, 1.0f / sums[head], dim, type, mutable_row_of(y, task * heads + head, dim));
    }
  };
  parallel_tasks(batch * key_heads, attend, batch * query_heads * length * dim >= task_multiplications);
  return y;
}

namespace {

// The lists of decoder_steps, cut into what one layer needs.
constexpr int64_t layer_products = 4;
constexpr int64_t product_tensors = 4;
constexpr int64_t product_numbers = 3;
constexpr const char* steps_op = "decoder_steps";

struct LayerLists {
  const c10::List<std::optional<Tensor>>& products;
  at::IntArrayRef formats;
  int64_t layer;

  // x times one of the layer's matrices, plus its bias.
  Tensor product(const Tensor& x, int64_t number) const {
    const int64_t which = layer * layer_products + number;
    const auto tensor = [&](int64_t i) -> std::optional<Tensor> { return products.get(which * product_tensors + i); };
    const auto weight = tensor(0);
    const auto scales = tensor(1);
    TORCH_CHECK_VALUE(
        weight.has_value() && scales.has_value(), "[", steps_op, "] product ", which, " has no weight or no scales.");
    const int64_t* numbers = formats.data() + which * product_numbers;
    TORCH_CHECK_VALUE(
        numbers[2] >= 0 && numbers[2] < mode_count(), "[", steps_op, "] mode ", numbers[2], " of product ", which,
        " is unknown.");
    const Tensor y =
        run(MatmulProblem::check(
            x, *weight, *scales, tensor(2), /*transpose=*/true, numbers[0], numbers[1],
            name_of(static_cast<Mode>(numbers[2])), std::nullopt, steps_op));
    const auto bias = tensor(3);
    return bias.has_value() ? y.add(*bias) : y;
  }
};

}  // namespace

Tensor decoder_steps(
    const Tensor& x,
    const Tensor& cosines,
    const Tensor& sines,
    at::TensorList keys,
    at::TensorList values,
    int64_t position,
    at::TensorList norms,
    const c10::List<std::optional<Tensor>>& products,
    at::IntArrayRef formats,
    double scaling,
    double epsilon) {
  const int64_t layers = static_cast<int64_t>(keys.size());
  const int64_t norms_of_layer = layers > 0 ? static_cast<int64_t>(norms.size()) / layers : 0;
  TORCH_CHECK_VALUE(
      layers > 0 && static_cast<int64_t>(values.size()) == layers && (norms_of_layer == 2 || norms_of_layer == 4) &&
          static_cast<int64_t>(norms.size()) == layers * norms_of_layer &&
          static_cast<int64_t>(products.size()) == layers * layer_products * product_tensors &&
          static_cast<int64_t>(formats.size()) == layers * layer_products * product_numbers,
      "[", steps_op, "] lists of ", keys.size(), " keys, ", values.size(), " values, ", norms.size(), " norms, ",
      products.size(), " tensors of products and ", formats.size(), " numbers of formats do not fit.");
  Tensor sum = x;
  Tensor normal = run(RmsNormProblem::check(x, norms[0], epsilon));
  const auto add_rms_norm = [&](const Tensor& y, const Tensor& weight) {
    return run(AddRmsNormProblem::check(y, sum, weight, epsilon));
  };
  const auto gated = [](const Tensor& y) {
    const int64_t length = y.size(-1) / 2;
    return run(SwigluProblem::check(y.narrow(-1, 0, length), y.narrow(-1, length, length), 1.0, std::nullopt, 0.0));
  };
  for (int64_t layer = 0; layer < layers; ++layer) {
    const auto own = norms.slice(layer * norms_of_layer, norms_of_layer);
    const LayerLists lists{products, formats, layer};
    const auto norm = [&](int i) { return norms_of_layer == 4 ? std::optional<Tensor>(own[i]) : std::nullopt; };
    normal = decode_attention(
        lists.product(normal, 0), cosines, sines, keys[layer], values[layer], position, scaling, norm(2), norm(3),
        epsilon);
    std::tie(sum, normal) = add_rms_norm(lists.product(normal, 1), own[1]);
    normal = lists.product(gated(lists.product(normal, 2)), 3);
    if (layer + 1 < layers) {
      std::tie(sum, normal) = add_rms_norm(normal, norms[(layer + 1) * norms_of_layer]);
    }
  }
  return sum.add(normal);
}

}  // namespace quantization_mlx::cpu
