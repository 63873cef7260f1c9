// Schemas, and which function serves which dispatch key. Nothing is computed or judged here.
#include "torch_binding.h"

#include <Python.h>

#include "../csrc/autocast.h"
#include "../csrc/autograd.h"
#include "../csrc/cpu/ops.h"
#include "../csrc/metal/plan.h"
#include "adapters.h"

namespace quantization_mlx {
namespace ops {

#define OP(name)                                                                                    \
  c10::Dispatcher::singleton()                                                                      \
      .findSchemaOrThrow(QUANTIZATION_MLX_STRING_EXPAND(QUANTIZATION_MLX_NAMESPACE) "::" #name, "") \
      .typed<decltype(name)>()

at::Tensor quantized_matmul(
    const at::Tensor& x,
    const at::Tensor& w,
    const at::Tensor& scales,
    const std::optional<at::Tensor>& biases,
    bool transpose,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<at::Tensor>& global_scale,
    std::string_view op) {
  static const auto handle = OP(quantized_matmul);
  return handle.call(x, w, scales, biases, transpose, group_size, bits, mode, global_scale, op);
}

at::Tensor gather_qmm(
    const at::Tensor& x,
    const at::Tensor& w,
    const at::Tensor& scales,
    const std::optional<at::Tensor>& biases,
    const std::optional<at::Tensor>& lhs_indices,
    const std::optional<at::Tensor>& rhs_indices,
    bool transpose,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<at::Tensor>& global_scale,
    bool sorted_indices,
    std::string_view op) {
  static const auto handle = OP(gather_qmm);
  return handle.call(
      x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, mode, global_scale, sorted_indices,
      op);
}

at::Tensor dequantize(
    const at::Tensor& w,
    const at::Tensor& scales,
    const std::optional<at::Tensor>& biases,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<at::Tensor>& global_scale,
    std::optional<at::ScalarType> dtype) {
  static const auto handle = OP(dequantize);
  return handle.call(w, scales, biases, group_size, bits, mode, global_scale, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize(
    const at::Tensor& w,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<at::Tensor>& global_scale) {
  static const auto handle = OP(quantize);
  return handle.call(w, group_size, bits, mode, global_scale);
}

#undef OP

}  // namespace ops

namespace {

using adapters::Tensor;

// --- What would run ------------------------------------------------------------------------------------------------

// Without the name of a GPU, what runs on this CPU.
template <typename Problem>
std::string explain(const Problem& problem, std::string_view gpu, int64_t macos) {
  if (gpu.empty()) {
    TORCH_CHECK_VALUE(
        !problem.device().is_meta(),
        "[explain] the tensors are on device meta, so a GPU must be named: \"applegpu_g16s\".");
    return cpu::describe(problem);
  }
  return metal::explain(problem, {metal::GpuTraits::parse(gpu, static_cast<int>(macos)), {}});
}

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
  const char* mode;
  bool transpose;
};

constexpr Explicit affine_qmv_op{"affine_qmv", "affine", true};
constexpr Explicit affine_qmm_t_op{"affine_qmm_t", "affine", true};
constexpr Explicit affine_qmm_n_op{"affine_qmm_n", "affine", false};
constexpr Explicit affine_qmm_t_nax_op{"affine_qmm_t_nax", "affine", true};
constexpr Explicit affine_qmm_n_nax_op{"affine_qmm_n_nax", "affine", false};
constexpr Explicit mxfp4_qmv_op{"mxfp4_qmv", "mxfp4", true};
constexpr Explicit mxfp4_qmm_t_op{"mxfp4_qmm_t", "mxfp4", true};
constexpr Explicit mxfp4_qmm_n_op{"mxfp4_qmm_n", "mxfp4", false};
constexpr Explicit mxfp8_qmv_op{"mxfp8_qmv", "mxfp8", true};
constexpr Explicit mxfp8_qmm_t_op{"mxfp8_qmm_t", "mxfp8", true};
constexpr Explicit mxfp8_qmm_n_op{"mxfp8_qmm_n", "mxfp8", false};
constexpr Explicit nvfp4_qmv_op{"nvfp4_qmv", "nvfp4", true};
constexpr Explicit nvfp4_qmm_t_op{"nvfp4_qmm_t", "nvfp4", true};
constexpr Explicit nvfp4_qmm_n_op{"nvfp4_qmm_n", "nvfp4", false};

template <const Explicit& form>
Tensor affine_product(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const Tensor& biases,
    int64_t group_size,
    int64_t bits) {
  return ops::quantized_matmul(
      x, w, scales, biases, form.transpose, group_size, bits, form.mode, std::nullopt, form.op);
}

template <const Explicit& form>
Tensor affine_product_checked(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const Tensor& biases,
    c10::SymInt output_features,
    int64_t group_size,
    int64_t bits) {
  check_output_features(form.op, output_features, w, scales, form.transpose, group_size);
  return affine_product<form>(x, w, scales, biases, group_size, bits);
}

template <const Explicit& form>
Tensor fp_product(const Tensor& x, const Tensor& w, const Tensor& scales) {
  return ops::quantized_matmul(
      x, w, scales, std::nullopt, form.transpose, std::nullopt, std::nullopt, form.mode, std::nullopt, form.op);
}

template <const Explicit& form, Mode mode>
Tensor fp_product_checked(const Tensor& x, const Tensor& w, const Tensor& scales, c10::SymInt output_features) {
  check_output_features(form.op, output_features, w, scales, form.transpose, default_group_size(mode));
  return fp_product<form>(x, w, scales);
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

// They have no gradients, and whoever calls them sees to it that none are wanted.
constexpr const char* generation_ops[] = {
    "_rms_norm", "_add_rms_norm", "_silu_mul", "_decode_attention", "_decoder_steps"};

void implement_explain(torch::Library& m) {
  m.impl("explain_quantize", adapters::explain_quantize<explain<QuantizeProblem>>);
  m.impl("explain_dequantize", adapters::explain_dequantize<explain<DequantizeProblem>>);
  m.impl("explain_quantized_matmul", adapters::explain_quantized_matmul<explain<MatmulProblem>>);
  m.impl("explain_gather_qmm", adapters::explain_gather_qmm<explain<GatherProblem>>);
}

// The ops that convert weights, and the explicit ops, which are products themselves, fall through.
void implement_autocast(torch::Library& m) {
  for (const char* op : {"quantized_matmul", "gather_qmm"}) {
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
    m.def(("explain_" + name + "(" + arguments + ", str gpu='', int macos=0) -> str").c_str());
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

  const std::string affine =
      "(Tensor x, Tensor w, Tensor scales, Tensor biases, int group_size=128, int bits=4) -> Tensor";
  const std::string affine_checked =
      "(Tensor x, Tensor w, Tensor scales, Tensor biases, SymInt output_features, int group_size=128, int bits=4) "
      "-> Tensor";
  const std::string fp = "(Tensor x, Tensor w, Tensor scales) -> Tensor";
  const std::string fp_checked = "(Tensor x, Tensor w, Tensor scales, SymInt output_features) -> Tensor";
  const auto define = [&m](const Explicit& form, const std::string& signature, auto* function) {
    m.def((form.op + signature).c_str(), function);
  };
  define(affine_qmv_op, affine_checked, affine_product_checked<affine_qmv_op>);
  define(affine_qmm_t_op, affine, affine_product<affine_qmm_t_op>);
  define(affine_qmm_n_op, affine_checked, affine_product_checked<affine_qmm_n_op>);
  define(affine_qmm_t_nax_op, affine, affine_product<affine_qmm_t_nax_op>);
  define(affine_qmm_n_nax_op, affine_checked, affine_product_checked<affine_qmm_n_nax_op>);
  define(mxfp4_qmv_op, fp_checked, fp_product_checked<mxfp4_qmv_op, Mode::mxfp4>);
  define(mxfp4_qmm_t_op, fp, fp_product<mxfp4_qmm_t_op>);
  define(mxfp4_qmm_n_op, fp_checked, fp_product_checked<mxfp4_qmm_n_op, Mode::mxfp4>);
  define(mxfp8_qmv_op, fp_checked, fp_product_checked<mxfp8_qmv_op, Mode::mxfp8>);
  define(mxfp8_qmm_t_op, fp, fp_product<mxfp8_qmm_t_op>);
  define(mxfp8_qmm_n_op, fp_checked, fp_product_checked<mxfp8_qmm_n_op, Mode::mxfp8>);
  define(nvfp4_qmv_op, fp_checked, fp_product_checked<nvfp4_qmv_op, Mode::nvfp4>);
  define(nvfp4_qmm_t_op, fp, fp_product<nvfp4_qmm_t_op>);
  define(nvfp4_qmm_n_op, fp_checked, fp_product_checked<nvfp4_qmm_n_op, Mode::nvfp4>);
  m.def(
      "affine_gather_qmm_rhs_nax(Tensor x, Tensor w, Tensor scales, Tensor biases, Tensor indices, "
      "SymInt output_features, int group_size=128, int bits=4, bool transpose=True) -> Tensor",
      affine_gather_qmm_rhs_nax);

  m.def("_modes() -> str", describe_modes);

  m.def("_set_cpu_activations(str activations) -> ()", cpu::set_activations);
  m.def("_get_cpu_activations() -> str", cpu::get_activations);

  // For one step of generation, by generation.py: on CPU alone, without gradients.
  m.def("_rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
  m.def("_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)");
  m.def("_silu_mul(Tensor x) -> Tensor");
  m.def(
      "_decode_attention(Tensor x, Tensor cosines, Tensor sines, Tensor(a!) keys, Tensor(b!) values, int position, "
      "float scaling, Tensor? query_norm=None, Tensor? key_norm=None, float epsilon=0.0) -> Tensor");
  m.def(
      "_decoder_steps(Tensor x, Tensor cosines, Tensor sines, Tensor(a!)[] keys, Tensor(b!)[] values, int position, "
      "Tensor[] norms, Tensor?[] products, int[] formats, float scaling, float epsilon) -> Tensor");
}

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, CPU, m) {
  m.impl("quantize", adapters::quantize<cpu::quantize>);
  m.impl("dequantize", adapters::dequantize<cpu::dequantize>);
  m.impl("quantized_matmul", adapters::quantized_matmul<cpu::quantized_matmul>);
  m.impl("gather_qmm", adapters::gather_qmm<cpu::gather_qmm>);
  m.impl("_rms_norm", cpu::rms_norm);
  m.impl("_add_rms_norm", cpu::add_rms_norm);
  m.impl("_silu_mul", cpu::silu_mul);
  m.impl("_decode_attention", cpu::decode_attention);
  m.impl("_decoder_steps", cpu::decoder_steps);
  implement_explain(m);
}

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, Meta, m) {
  m.impl("quantize", adapters::quantize_meta);
  m.impl("dequantize", adapters::dequantize_meta);
  m.impl("quantized_matmul", adapters::quantized_matmul_meta);
  m.impl("gather_qmm", adapters::gather_qmm_meta);
  implement_explain(m);
}

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, Autograd, m) {
  m.impl("quantize", autograd::quantize);
  m.impl("dequantize", autograd::dequantize);
  m.impl("quantized_matmul", autograd::quantized_matmul);
  m.impl("gather_qmm", autograd::gather_qmm);
  for (const char* op : generation_ops) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
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
