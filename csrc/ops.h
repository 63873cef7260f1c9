// The ops: handles that call them, and their kernels for a back end, both from the problems that their arguments make.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "problem/fast.h"
#include "problem/image.h"
#include "problem/problem.h"

namespace quantization_mlx {

// That of this build's ops.
const char* op_namespace();

namespace ops {

template <typename Problem, typename Signature = decltype(Problem::meta)>
struct Op;

// Goes through the dispatcher, so that autograd, tracing and devices apply.
template <typename Problem, typename Result, typename... Arguments>
struct Op<Problem, Result(Arguments...)> {
  Result operator()(Arguments... arguments) const {
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow((std::string(op_namespace()) + "::" + Problem::name).c_str(), "")
                                   .template typed<Result(Arguments...)>();
    return handle.call(std::forward<Arguments>(arguments)...);
  }
};

inline constexpr Op<QuantizeProblem> quantize;
inline constexpr Op<DequantizeProblem> dequantize;
inline constexpr Op<MatmulProblem> quantized_matmul;
inline constexpr Op<GatherProblem> gather_qmm;
inline constexpr Op<RmsNormProblem> rms_norm;
inline constexpr Op<LayerNormProblem> layer_norm;
inline constexpr Op<AddRmsNormProblem> add_rms_norm;
inline constexpr Op<RopeIntoCacheProblem> rope_into_cache;
inline constexpr Op<SampleProblem> sample;
inline constexpr Op<RouterProblem> moe_router;
inline constexpr Op<CombineProblem> moe_combine;
inline constexpr Op<AttentionProblem> scaled_dot_product_attention;
inline constexpr Op<QuantizedAttentionProblem> quantized_scaled_dot_product_attention;
inline constexpr Op<RopeProblem> rope;
inline constexpr Op<SwigluProblem> swiglu;
inline constexpr Op<GegluProblem> geglu;
inline constexpr Op<GatedMatmulProblem> quantized_gated_matmul;
inline constexpr Op<ImageProblem> resample_image;

// The activation of a gated product, by its name.
inline at::Tensor activated(const at::Tensor& gates, const at::Tensor& values, std::string_view activation) {
  return activation == "silu" ? swiglu(gates, values, 1.0, std::nullopt, 0.0, std::nullopt, std::nullopt, std::nullopt)
                              : geglu(gates, values, activation == "gelu" ? "none" : "tanh");
}

template <typename Visitor>
void for_each(const Visitor& visit) {
  visit(quantize);
  visit(dequantize);
  visit(quantized_matmul);
  visit(gather_qmm);
  visit(rms_norm);
  visit(layer_norm);
  visit(add_rms_norm);
  visit(rope_into_cache);
  visit(sample);
  visit(moe_router);
  visit(moe_combine);
  visit(scaled_dot_product_attention);
  visit(quantized_scaled_dot_product_attention);
  visit(rope);
  visit(swiglu);
  visit(geglu);
  visit(quantized_gated_matmul);
  visit(resample_image);
}

}  // namespace ops

// An op and its twin explain_... on a back end: `BackEnd::run(problem)` computes, and `BackEnd::explain(problem, gpu,
// macos)` tells what would run on the GPU of this name, or here where it is empty.
template <typename BackEnd, typename Problem, typename Signature = decltype(Problem::check)>
struct Kernel;

template <typename BackEnd, typename Problem, typename... Arguments>
struct Kernel<BackEnd, Problem, Problem(Arguments...)> {
  static auto run(Arguments... arguments) {
    return BackEnd::run(Problem::check(std::forward<Arguments>(arguments)...));
  }

  static std::string explain(Arguments... arguments, std::string_view gpu, int64_t macos) {
    return BackEnd::explain(Problem::check(std::forward<Arguments>(arguments)...), gpu, macos);
  }
};

template <typename BackEnd>
void implement_explain(torch::Library& library) {
  ops::for_each([&]<typename Problem>(ops::Op<Problem>) {
    library.impl((std::string("explain_") + Problem::name).c_str(), Kernel<BackEnd, Problem>::explain);
  });
}

template <typename BackEnd>
void implement(torch::Library& library) {
  ops::for_each(
      [&]<typename Problem>(ops::Op<Problem>) { library.impl(Problem::name, Kernel<BackEnd, Problem>::run); });
  implement_explain<BackEnd>(library);
}

}  // namespace quantization_mlx
