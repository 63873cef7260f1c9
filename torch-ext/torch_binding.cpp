// Schemas, and which function serves which dispatch key. Nothing is computed or checked here.
#include <Python.h>

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <array>

#include "../csrc/autocast.h"
#include "../csrc/autograd.h"
#include "../csrc/cpu/ops.h"
#include "../csrc/custom_kernels.h"
#include "../csrc/decoder.h"
#include "../csrc/gpu/describe.h"
#include "../csrc/linear_experts.h"
#include "../csrc/namespace.h"
#include "../csrc/ops.h"

namespace quantization_mlx {
namespace {

using at::Tensor;

// What would run on the named GPU or, without one, on this CPU.
struct Cpu {
  template <typename Problem>
  static auto run(const Problem& problem) {
    return cpu::run(problem);
  }

  template <typename Problem>
  static std::string explain(const Problem& problem, std::string_view gpu, int64_t macos) {
    if (gpu.empty()) {
      TORCH_CHECK_VALUE(
          !problem.device().is_meta(),
          "[explain] the tensors are on device meta, so a GPU must be named: \"applegpu_g16s\".");
      return cpu::describe(problem);
    }
    return gpu::explain(problem, {gpu::GpuTraits::parse(gpu, static_cast<int>(macos)), {}});
  }
};

// --- The explicit ops: one fixed form each of the two products, and the same on every device ------------------------

// output_features is redundant; a wrong one is an error of the caller's. Weights too malformed to compare with are left
// to the product's own checks.
void check_output_features(
    const char* op,
    const c10::SymInt& output_features,
    const Tensor& w,
    const Tensor& scales,
    bool transpose,
    int64_t group_size) {
  if (w.dim() < 2 || scales.dim() < 2 || group_size < 1 || group_size > 1024) {
    return;
  }
  const c10::SymInt columns = transpose ? w.sym_size(-2) : scales.sym_size(-1) * group_size;
  TORCH_CHECK_VALUE(
      holds(output_features.sym_eq(columns)), "[", op, "] output_features is ", output_features, " but w of shape ",
      w.sym_sizes(), " and scales of shape ", scales.sym_sizes(), " give ", columns, ".");
}

struct Explicit {
  const char* op;
  Mode mode;
  bool transpose;
  bool has_output_features;
};

constexpr std::array explicit_ops{
    Explicit{"affine_qmv", Mode::affine, true, true},        Explicit{"affine_qmm_t", Mode::affine, true, false},
    Explicit{"affine_qmm_n", Mode::affine, false, true},     Explicit{"affine_qmm_t_nax", Mode::affine, true, false},
    Explicit{"affine_qmm_n_nax", Mode::affine, false, true}, Explicit{"mxfp4_qmv", Mode::mxfp4, true, true},
    Explicit{"mxfp4_qmm_t", Mode::mxfp4, true, false},       Explicit{"mxfp4_qmm_n", Mode::mxfp4, false, true},
    Explicit{"mxfp8_qmv", Mode::mxfp8, true, true},          Explicit{"mxfp8_qmm_t", Mode::mxfp8, true, false},
    Explicit{"mxfp8_qmm_n", Mode::mxfp8, false, true},       Explicit{"nvfp4_qmv", Mode::nvfp4, true, true},
    Explicit{"nvfp4_qmm_t", Mode::nvfp4, true, false},       Explicit{"nvfp4_qmm_n", Mode::nvfp4, false, true},
};

template <size_t index>
void define_explicit(torch::Library& m) {
  static constexpr Explicit form = explicit_ops[index];
  const auto define = [&m](const char* arguments, auto* function) {
    m.def((form.op + std::string(arguments) + " -> Tensor").c_str(), function);
  };
  static constexpr auto affine_product = [](const Tensor& x, const Tensor& w, const Tensor& scales,
                                            const Tensor& biases, int64_t group_size, int64_t bits) {
    return ops::quantized_matmul(
        x, w, scales, biases, form.transpose, group_size, bits, name_of(form.mode), std::nullopt, form.op);
  };
  static constexpr auto fp_product = [](const Tensor& x, const Tensor& w, const Tensor& scales) {
    return ops::quantized_matmul(
        x, w, scales, std::nullopt, form.transpose, std::nullopt, std::nullopt, name_of(form.mode), std::nullopt,
        form.op);
  };
  if constexpr (has_biases(form.mode) && form.has_output_features) {
    define(
        "(Tensor x, Tensor w, Tensor scales, Tensor biases, SymInt output_features, int group_size=128, int bits=4)",
        +[](const Tensor& x, const Tensor& w, const Tensor& scales, const Tensor& biases, c10::SymInt output_features,
            int64_t group_size, int64_t bits) {
          check_output_features(form.op, output_features, w, scales, form.transpose, group_size);
          return affine_product(x, w, scales, biases, group_size, bits);
        });
  } else if constexpr (has_biases(form.mode)) {
    define("(Tensor x, Tensor w, Tensor scales, Tensor biases, int group_size=128, int bits=4)", +affine_product);
  } else if constexpr (form.has_output_features) {
    define(
        "(Tensor x, Tensor w, Tensor scales, SymInt output_features)",
        +[](const Tensor& x, const Tensor& w, const Tensor& scales, c10::SymInt output_features) {
          check_output_features(form.op, output_features, w, scales, form.transpose, default_group_size(form.mode));
          return fp_product(x, w, scales);
        });
  } else {
    define("(Tensor x, Tensor w, Tensor scales)", +fp_product);
  }
}

Tensor affine_gather_qmm_rhs_nax(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const Tensor& biases,
    const Tensor& indices,
    c10::SymInt output_features,
    int64_t group_size,
    int64_t bits,
    bool transpose) {
  constexpr const char* op = "affine_gather_qmm_rhs_nax";
  check_output_features(op, output_features, w, scales, transpose, group_size);
  TORCH_CHECK_VALUE(
      x.dim() == 2 && w.dim() == 3 && indices.dim() == 1 && holds(x.sym_size(0).sym_eq(indices.sym_size(0))), "[", op,
      "] x of shape ", x.sym_sizes(), ", w of shape ", w.sym_sizes(), " and indices of shape ", indices.sym_sizes(),
      " do not fit: x must be [M, K] with one index for each of its rows, and w a batch of matrices.");
  return ops::gather_qmm(
             x.unsqueeze(1), w, scales, biases, std::nullopt, indices, transpose, group_size, bits, "affine",
             std::nullopt, /*sorted_indices=*/false, op)
      .squeeze(1);
}

// Of a twin, which changes no tensor.
std::string without_aliases(std::string arguments) {
  for (const std::string_view alias : {"(a!)", "(b!)"}) {
    if (const auto place = arguments.find(alias); place != std::string::npos) {
      arguments.erase(place, alias.size());
    }
  }
  return arguments;
}

// The ops that convert weights, and the explicit ops, which are products themselves, fall through.
void implement_autocast(torch::Library& m) {
  for (const char* op : {"quantized_matmul", "gather_qmm", "quantized_gated_matmul"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&autocast::product>());
  }
}

}  // namespace
}  // namespace quantization_mlx

using namespace quantization_mlx;

TORCH_LIBRARY_EXPAND(QUANTIZATION_MLX_NAMESPACE, m) {
  // Every op has a twin that runs nothing and tells, in JSON, what would run on this device or on the named GPU.
  const auto define_with_twin = [&m](const std::string& name, const std::string& arguments, const char* result) {
    m.def((name + "(" + arguments + ") -> " + result).c_str());
    m.def(("explain_" + name + "(" + without_aliases(arguments) + ", str gpu='', int macos=0) -> str").c_str());
  };
  define_with_twin(
      "quantize", "Tensor w, int? group_size=None, int? bits=None, str mode='affine', *, Tensor? global_scale=None",
      "(Tensor, Tensor, Tensor)");
  define_with_twin(
      "dequantize",
      "Tensor w, Tensor scales, Tensor? biases=None, int? group_size=None, int? bits=None, str mode='affine', "
      "Tensor? global_scale=None, ScalarType? dtype=None",
      "Tensor");
  // `op` is the name that errors carry: the explicit ops below are these two under other names.
  define_with_twin(
      "quantized_matmul",
      "Tensor x, Tensor w, Tensor scales, Tensor? biases=None, bool transpose=True, int? group_size=None, "
      "int? bits=None, str mode='affine', *, Tensor? global_scale=None, str op='quantized_matmul'",
      "Tensor");
  define_with_twin(
      "gather_qmm",
      "Tensor x, Tensor w, Tensor scales, Tensor? biases=None, Tensor? lhs_indices=None, Tensor? rhs_indices=None, "
      "bool transpose=True, int? group_size=None, int? bits=None, str mode='affine', Tensor? global_scale=None, *, "
      "bool sorted_indices=False, str op='gather_qmm'",
      "Tensor");
  define_with_twin("rms_norm", "Tensor x, Tensor? weight, float eps", "Tensor");
  define_with_twin("layer_norm", "Tensor x, Tensor? weight, Tensor? bias, float eps", "Tensor");
  define_with_twin(
      "add_rms_norm", "Tensor x, Tensor residual, Tensor? weight, float eps, *, Tensor? x_weight=None, float scale=1.0",
      "(Tensor, Tensor)");
  define_with_twin(
      "rope_into_cache",
      "Tensor x, Tensor? cosines, Tensor? sines, Tensor(a!) keys, Tensor(b!) values, SymInt position, *, "
      "Tensor? bias=None, Tensor? query_norm=None, Tensor? key_norm=None, float eps=1e-6",
      "Tensor");
  define_with_twin(
      "sample",
      "Tensor logits, Tensor? seeds, SymInt seed, SymInt offset, float temperature, int top_k, float top_p, "
      "float min_p, float repetition_penalty, Tensor? previous",
      "Tensor");
  define_with_twin(
      "moe_router",
      "Tensor logits, int k, str scoring, Tensor? bias, int groups, int groups_used, bool normalise, float scale",
      "(Tensor, Tensor)");
  define_with_twin(
      "moe_combine", "Tensor y, Tensor weights, Tensor? residual, Tensor? bias=None, Tensor? experts=None", "Tensor");
  define_with_twin(
      "scaled_dot_product_attention",
      "Tensor q, Tensor k, Tensor v, *, float scale, Tensor? mask=None, bool causal=False, Tensor? sinks=None, "
      "int? window=None, float? softcap=None",
      "Tensor");
  define_with_twin(
      "quantized_scaled_dot_product_attention",
      "Tensor q, Tensor k, Tensor k_scales, Tensor k_biases, Tensor v, Tensor v_scales, Tensor v_biases, *, "
      "float scale, Tensor? mask=None, bool causal=False, Tensor? sinks=None, int? window=None, int group_size=64, "
      "int bits=8",
      "Tensor");
  // The first position of a sequence is offset and, where there are offsets, its own of these besides.
  define_with_twin(
      "rope",
      "Tensor x, int dims, bool traditional, float? base, float scale, SymInt offset=0, Tensor? offsets=None, "
      "Tensor? freqs=None",
      "Tensor");
  define_with_twin(
      "swiglu",
      "Tensor gates, Tensor values, float alpha=1.0, float? limit=None, float offset=0.0, Tensor? gate_bias=None, "
      "Tensor? value_bias=None, Tensor? experts=None",
      "Tensor");
  define_with_twin("geglu", "Tensor gates, Tensor values, str approximate='tanh'", "Tensor");
  define_with_twin(
      "quantized_gated_matmul",
      "Tensor x, Tensor w, Tensor scales, Tensor? biases=None, int? group_size=None, int? bits=None, "
      "str mode='affine', str activation='silu', *, Tensor? global_scale=None",
      "Tensor");

  define_with_twin(
      "resample_image",
      "Tensor x, SymInt height, SymInt width, str mode='bilinear', bool antialias=False, Tensor? mean=None, "
      "Tensor? std=None, float scale=1.0, bool channels_last=False",
      "Tensor");

  [&m]<size_t... index>(std::index_sequence<index...>) {
    (define_explicit<index>(m), ...);
  }(std::make_index_sequence<explicit_ops.size()>());
  m.def(
      "affine_gather_qmm_rhs_nax(Tensor x, Tensor w, Tensor scales, Tensor biases, Tensor indices, "
      "SymInt output_features, int group_size=128, int bits=4, bool transpose=True) -> Tensor",
      affine_gather_qmm_rhs_nax);

  m.def("_modes() -> str", describe_modes);

  m.def("_set_cpu_activations(str activations) -> ()", cpu::set_activations);
  m.def("_get_cpu_activations() -> str", cpu::get_activations);

  define_decoder(m);
  define_linear_experts(m);
  define_custom_kernels(m);
}

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, CPU, m) {
  implement<Cpu>(m);
  implement_linear_experts_cpu(m);
}

// Made of other ops, on any device.
TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, CompositeExplicitAutograd, m) {
  implement_decoder(m);
  implement_linear_experts(m);
  refuse_custom_kernels(m);
}

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, Meta, m) {
  ops::for_each([&]<typename Problem>(ops::Op<Problem>) { m.impl(Problem::name, Problem::meta); });
  implement_explain<Cpu>(m);
}

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, Autograd, m) {
  m.impl("quantize", autograd::quantize);
  m.impl("dequantize", autograd::dequantize);
  m.impl("quantized_matmul", autograd::quantized_matmul);
  m.impl("gather_qmm", autograd::gather_qmm);
  m.impl("rms_norm", autograd::rms_norm);
  m.impl("layer_norm", autograd::layer_norm);
  m.impl("add_rms_norm", autograd::add_rms_norm);
  m.impl("rope_into_cache", torch::autograd::autogradNotImplementedFallback());
  m.impl("sample", autograd::sample);
  m.impl("moe_router", autograd::moe_router);
  m.impl("moe_combine", autograd::moe_combine);
  m.impl("scaled_dot_product_attention", autograd::scaled_dot_product_attention);
  m.impl("quantized_scaled_dot_product_attention", autograd::quantized_scaled_dot_product_attention);
  m.impl("rope", autograd::rope);
  m.impl("swiglu", autograd::swiglu);
  m.impl("geglu", autograd::geglu);
  m.impl("quantized_gated_matmul", autograd::quantized_gated_matmul);
  m.impl("resample_image", torch::autograd::autogradNotImplementedFallback());
  m.impl("decoder_step", torch::autograd::autogradNotImplementedFallback());
  implement_linear_experts_autograd(m);
}

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, AutocastCPU, m) { implement_autocast(m); }

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, AutocastMPS, m) { implement_autocast(m); }

// Importing the extension is only there to load it: the module is empty.
#define QUANTIZATION_MLX_MODULE(name) QUANTIZATION_MLX_MODULE_EXPANDED(name)
#define QUANTIZATION_MLX_MODULE_EXPANDED(name)                                                  \
  PyMODINIT_FUNC PyInit_##name() {                                                              \
    static PyModuleDef module = {                                                               \
        PyModuleDef_HEAD_INIT, #name, nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&module);                                                            \
  }
QUANTIZATION_MLX_MODULE(TORCH_EXTENSION_NAME)
