#include "linear_experts.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/matmul.h>

#include <algorithm>
#include <initializer_list>

#include "cpu/fast/router_logits.h"
#include "gradients.h"
#include "ops.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

struct RouterLogits {
  static constexpr const char* name = "_router_logits";
  static Tensor meta(const Tensor& x, const Tensor& router);
};
constexpr ops::Op<RouterLogits> router_logits;

constexpr std::string_view mode = "marlin_fp4";
constexpr int64_t bits = 4;

// Autocast would round them.
Tensor logits_of_copies(const Tensor& x, const Tensor& router) {
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  return at::matmul(x.to(at::kFloat), router.to(at::kFloat));
}

Tensor logits_on_cpu(const Tensor& x, const Tensor& router) {
  return cpu::multiplies_without_copies(x, router) ? cpu::product_without_copies(x, router)
                                                   : logits_of_copies(x, router);
}

Tensor recorded_logits(const Tensor& x, const Tensor& router) {
  autograd::refuse_tangents(RouterLogits::name, {&x, &router});
  if (at::GradMode::is_enabled() && (autograd::wants_gradient(x) || autograd::wants_gradient(router))) {
    return logits_of_copies(x, router);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return router_logits(x, router);
}

bool has_sizes(const Tensor& tensor, std::initializer_list<SymInt> sizes) {
  return same_sizes(tensor.sym_sizes(), c10::SymIntArrayRef(sizes));
}

bool has_dtype(const Tensor& tensor, std::initializer_list<ScalarType> dtypes) {
  return std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end();
}

struct Arguments {
  const Tensor& activations;
  const Tensor& router;
  const Tensor& words;
  const Tensor& scales;
  const OptionalTensor& shared_words;
  const OptionalTensor& shared_scales;
  const std::optional<SymInt>& tokens;
  const SymInt& K;
  const SymInt& N;
  const SymInt& experts;
  int64_t group_size;

  bool are_on_one_device() const {
    const auto device = activations.device();
    const auto is_there = [&](const OptionalTensor& tensor) { return !tensor || tensor->device() == device; };
    return router.device() == device && words.device() == device && scales.device() == device &&
        is_there(shared_words) && is_there(shared_scales);
  }

  bool have_dtypes() const {
    const auto are_packed = [](const Tensor& words, const Tensor& scales) {
      return has_dtype(words, {at::kUInt32, at::kInt}) && has_dtype(scales, {at::kHalf});
    };
    const auto is_real = [](const Tensor& tensor) { return has_dtype(tensor, {at::kFloat, at::kHalf, at::kBFloat16}); };
    return is_real(activations) && is_real(router) && are_packed(words, scales) &&
        (!shared_words || are_packed(*shared_words, *shared_scales));
  }

  bool have_sizes() const {
    if (group_size < 1 || !holds(K.sym_ge(1))) {
      return false;
    }
    const SymInt words_of_column = K * bits / 32;
    const SymInt groups = K / group_size;
    const bool tokens_fit = tokens ? has_sizes(activations, {*tokens, K}) : has_sizes(activations, {K});
    return tokens_fit && has_sizes(router, {K, experts}) && has_sizes(words, {experts, words_of_column, N}) &&
        has_sizes(scales, {experts, groups, N}) &&
        (!shared_words || (has_sizes(*shared_words, {words_of_column, N}) && has_sizes(*shared_scales, {groups, N})));
  }

  // What the ops that follow do not check themselves.
  bool fit() const {
    return shared_words.has_value() == shared_scales.has_value() && are_on_one_device() && have_dtypes() &&
        have_sizes();
  }
};

Tensor linear_experts(
    const Tensor& activations,
    const Tensor& router,
    const Tensor& words,
    const Tensor& scales,
    const OptionalTensor& shared_words,
    const OptionalTensor& shared_scales,
    std::optional<SymInt> tokens,
    SymInt K,
    SymInt N,
    SymInt experts,
    int64_t top_k,
    int64_t group_size) {
  const Arguments arguments{activations, router, words, scales,  shared_words, shared_scales,
                            tokens,      K,      N,     experts, group_size};
  TORCH_CHECK_VALUE(arguments.fit(), "[_linear_experts] the arguments do not fit each other.");
  const Tensor x = tokens ? activations : activations.unsqueeze(0);
  const auto [indices, weights] = ops::moe_router(
      router_logits(x, router), top_k, "softmax_of_selected", std::nullopt, /*groups=*/1, /*groups_used=*/1,
      /*normalise=*/false, /*scale=*/1.0);
  const Tensor products = ops::gather_qmm(
      x.unsqueeze(1).unsqueeze(1), words, scales, std::nullopt, std::nullopt, indices, /*transpose=*/false, group_size,
      bits, mode, std::nullopt, /*sorted_indices=*/false, GatherProblem::name);
  OptionalTensor shared;
  if (shared_words) {
    shared = ops::quantized_matmul(
        x, *shared_words, *shared_scales, std::nullopt, /*transpose=*/false, group_size, bits, mode, std::nullopt,
        MatmulProblem::name);
  }
  const Tensor y = ops::moe_combine(products.squeeze(2), weights, shared, std::nullopt, std::nullopt);
  return tokens ? y : y.squeeze(0);
}

}  // namespace

void define_linear_experts(torch::Library& library) {
  library.def((std::string(RouterLogits::name) + "(Tensor x, Tensor router) -> Tensor").c_str());
  // Without a number of tokens, activations are those of one.
  library.def(
      "_linear_experts(Tensor activations, Tensor router, Tensor words, Tensor scales, Tensor? shared_words, "
      "Tensor? shared_scales, SymInt? tokens, SymInt K, SymInt N, SymInt experts, int top_k, int group_size) -> Tensor",
      linear_experts);
}

void implement_linear_experts(torch::Library& library) { library.impl(RouterLogits::name, logits_of_copies); }

void implement_linear_experts_cpu(torch::Library& library) { library.impl(RouterLogits::name, logits_on_cpu); }

void implement_linear_experts_autograd(torch::Library& library) { library.impl(RouterLogits::name, recorded_logits); }

}  // namespace quantization_mlx
