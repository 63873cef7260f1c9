#include "custom_kernels.h"

#include <string>

namespace quantization_mlx {
namespace {

// The first argument says where: any tensor of the GPU. `op` is the name that errors carry. A library is its source and
// its math_mode, and is compiled once, so that no handle can outlive what it stands for.
//
// arguments, by buffer index: 0 for the next one of the tensors; 1, a number of bytes, and the 64-bit words that hold
// them; or 2, the address of an MTLBuffer, and an offset in bytes.
//
// constants: the names of function constants, or their indices in decimals, and as many values.
constexpr const char* schemas[] = {
    "_metal_functions(Tensor gpu, str op, str name, str source, str math_mode) -> str[]",
    "_metal_pipeline(Tensor gpu, str op, str name, str source, str math_mode, str function, "
    "str[] constants, Scalar[] values) -> int[]",
    "_metal_dispatch(Tensor gpu, str op, str name, str source, str math_mode, str function, "
    "str[] constants, Scalar[] values, Tensor(a!)[] tensors, int[] arguments, int[] grid, int[] threadgroup, "
    "bool grid_in_threads, int[] threadgroup_memory, bool wait) -> ()",
    "_metal_buffer(Tensor tensor, str op) -> int[]",
    "_metal_queue(Tensor gpu, str op) -> int",
    "_metal_shaders(Tensor gpu, str op) -> str[]",
};

// op is the first string of every schema.
void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "[", arguments[1].toStringRef(),
      "] runs Metal code, which needs an Apple GPU: device 'mps', on a build of this package with Metal.");
}

std::string name_of(const std::string& schema) { return schema.substr(0, schema.find('(')); }

}  // namespace

void define_custom_kernels(torch::Library& library) {
  for (const char* schema : schemas) {
    library.def(schema);
  }
}

void refuse_custom_kernels(torch::Library& library) {
  for (const char* schema : schemas) {
    library.impl(name_of(schema).c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace quantization_mlx
