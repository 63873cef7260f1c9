// Kernels that users write (schemas: csrc/custom_kernels.cpp), on torch's MPS stream. Who calls these ops has made the
// arguments; what could end the process or reach other memory is checked here all the same.
#include <ATen/core/Formatting.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/mps/MPSStream.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../namespace.h"
#include "compile.h"
#include "once.h"
#include "shader_source.h"

namespace quantization_mlx::metal {
namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t max_buffers = 31;
constexpr int64_t max_bytes = 4096;

// --- Libraries and pipelines ---------------------------------------------------------------------------------------

// A library as its user sees it; op and name are for errors alone.
struct Source {
  std::string_view op;
  std::string_view name;
  std::string_view text;
  std::string_view math_mode;

  std::string key() const { return c10::str(math_mode, '\n', text); }
};

struct CustomPipeline {
  id<MTLComputePipelineState> state;
  int64_t buffer_count = 0;  // the last argument's index, and one
  uint32_t used = 0;  // bit i: the compiled kernel uses buffer i
  uint32_t written = 0;
};

struct CustomShaders {
  Once<std::string, id<MTLLibrary>> libraries;
  Once<std::string, const CustomPipeline*> pipelines;
};

NSString* text(std::string_view value) { return [NSString stringWithUTF8String:std::string(value).c_str()]; }

id<MTLLibrary> new_library(const Source& source) {
  NSError* error = nil;
  id<MTLLibrary> library = [mtl_device() newLibraryWithSource:text(source.text)
                                                      options:compile_options(source.math_mode)
                                                        error:&error];
  TORCH_CHECK(library != nil, "[", source.op, "] Metal does not compile ", source.name, ":\n", text_of(error));
  return library;
}

id<MTLLibrary> library_of(const Source& source) {
  return of_current_gpu<CustomShaders>().libraries.get(source.key(), [&] { return new_library(source); });
}

std::vector<std::string> functions_of(const Source& source) {
  std::vector<std::string> names;
  NSArray* all = library_of(source).functionNames;
  for (NSUInteger i = 0; i < all.count; ++i) {
    names.emplace_back(static_cast<NSString*>([all objectAtIndex:i]).UTF8String);
  }
  return names;
}

// Says in errors where they belong.
struct Call {
  std::string_view op;
  std::string_view function;

  template <typename... Parts>
  void check(bool holds, const Parts&... parts) const {
    TORCH_CHECK_VALUE(holds, "[", op, "] ", function, ": ", parts...);
  }
};

// --- Function constants --------------------------------------------------------------------------------------------

// As given: names, or indices in decimals.
struct Constants {
  std::vector<std::string> names;
  at::ArrayRef<at::Scalar> values;

  std::string key() const {
    std::string result;
    for (size_t i = 0; i < names.size(); ++i) {
      const at::Scalar& value = values[i];
      // Text would round.
      const auto bits = value.isFloatingPoint() ? __builtin_bit_cast(int64_t, value.toDouble()) : value.to<int64_t>();
      result += c10::str(names[i], '=', static_cast<int>(value.type()), ':', bits, '\n');
    }
    return result;
  }
};

// Those of a kernel, by index.
using KnownConstants = std::map<NSUInteger, MTLFunctionConstant*>;

KnownConstants constants_of(id<MTLFunction> function) {
  KnownConstants result;
  NSDictionary* all = function.functionConstantsDictionary;
  NSArray* names = all.allKeys;
  for (NSUInteger i = 0; i < names.count; ++i) {
    MTLFunctionConstant* constant = [all objectForKey:[names objectAtIndex:i]];
    result[constant.index] = constant;
  }
  return result;
}

// Whether the type has the value, which is then in `to`.
template <typename T>
bool store(const at::Scalar& value, void* to) {
  T converted{};
  if constexpr (std::is_same_v<T, bool>) {
    if (!value.isBoolean()) {
      return false;
    }
    converted = value.toBool();
  } else if constexpr (std::is_integral_v<T>) {
    if (!value.isIntegral(false) || !std::in_range<T>(value.toLong())) {
      return false;
    }
    converted = static_cast<T>(value.toLong());
  } else {
    if (value.isBoolean() || value.isComplex()) {
      return false;
    }
    const double given = value.toDouble();
    converted = static_cast<T>(static_cast<float>(given));
    if (std::isfinite(given) && !std::isfinite(static_cast<float>(converted))) {
      return false;
    }
  }
  std::memcpy(to, &converted, sizeof(T));
  return true;
}

struct ConstantType {
  MTLDataType type;
  const char* name;
  bool (*store)(const at::Scalar&, void*);
};

constexpr ConstantType constant_types[] = {
    {MTLDataTypeBool, "bool", store<bool>},         {MTLDataTypeChar, "char", store<int8_t>},
    {MTLDataTypeUChar, "uchar", store<uint8_t>},    {MTLDataTypeShort, "short", store<int16_t>},
    {MTLDataTypeUShort, "ushort", store<uint16_t>}, {MTLDataTypeInt, "int", store<int32_t>},
    {MTLDataTypeUInt, "uint", store<uint32_t>},     {MTLDataTypeHalf, "half", store<c10::Half>},
    {MTLDataTypeFloat, "float", store<float>},
};

const ConstantType* type_of(MTLFunctionConstant* constant) {
  for (const ConstantType& type : constant_types) {
    if (type.type == constant.type) {
      return &type;
    }
  }
  return nullptr;
}

std::string described(const KnownConstants& constants) {
  std::vector<std::string> result;
  for (const auto& [index, constant] : constants) {
    const ConstantType* type = type_of(constant);
    result.push_back(
        c10::str(constant.name.UTF8String, " (", index, ", ", type != nullptr ? type->name : "of another type", ")"));
  }
  return result.empty() ? "none" : c10::Join(", ", result);
}

MTLFunctionConstant* constant_named(const KnownConstants& known, const std::string& name) {
  for (const auto& [index, constant] : known) {
    if (name == std::to_string(index) || name == constant.name.UTF8String) {
      return constant;
    }
  }
  return nil;
}

MTLFunctionConstantValues* constant_values(const Call& call, const KnownConstants& known, const Constants& given) {
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
  KnownConstants missing = known;
  for (size_t i = 0; i < given.names.size(); ++i) {
    MTLFunctionConstant* constant = constant_named(known, given.names[i]);
    call.check(
        constant != nil, "the kernel has no function constant '", given.names[i], "'; it has ", described(known), ".");
    call.check(missing.erase(constant.index) == 1, "function constant ", constant.name.UTF8String, " is given twice.");
    const ConstantType* type = type_of(constant);
    call.check(
        type != nullptr, "function constant ", constant.name.UTF8String,
        " is neither a bool nor a number; these can be given.");
    std::array<std::byte, 8> bytes{};
    call.check(
        type->store(given.values[i], bytes.data()), "function constant ", constant.name.UTF8String, " is ",
        given.values[i], "; it has the type ", type->name, ".");
    [values setConstantValue:bytes.data() type:type->type atIndex:constant.index];
  }
  std::erase_if(missing, [](const auto& each) { return !each.second.required; });
  call.check(missing.empty(), "the kernel needs values of the function constants ", described(missing), ".");
  return values;
}

// --- Pipelines -----------------------------------------------------------------------------------------------------

void note_buffers(CustomPipeline& pipeline, NSArray* bindings) {
  for (NSUInteger i = 0; i < bindings.count; ++i) {
    const id<MTLBinding> binding = [bindings objectAtIndex:i];
    if (binding.type != MTLBindingTypeBuffer || binding.index >= max_buffers) {
      continue;
    }
    pipeline.buffer_count = std::max<int64_t>(pipeline.buffer_count, binding.index + 1);
    pipeline.used |= static_cast<uint32_t>(binding.used) << binding.index;
    pipeline.written |= static_cast<uint32_t>(binding.access != MTLBindingAccessReadOnly) << binding.index;
  }
}

id<MTLFunction> function_of(const Source& source, const std::string& function, const Constants& constants) {
  id<MTLFunction> found = [[library_of(source) newFunctionWithName:text(function)] autorelease];
  TORCH_CHECK_VALUE(
      found != nil, "[", source.op, "] ", source.name, " has no kernel '", function, "'; it has ",
      c10::Join(", ", functions_of(source)));
  const KnownConstants known = constants_of(found);
  if (known.empty() && constants.names.empty()) {
    return found;
  }
  NSError* error = nil;
  id<MTLFunction> specialised =
      [[library_of(source) newFunctionWithName:text(function)
                                constantValues:constant_values({source.op, function}, known, constants)
                                         error:&error] autorelease];
  TORCH_CHECK(
      specialised != nil, "[", source.op, "] Metal does not specialise ", source.name, "'s kernel ", function, ":\n",
      text_of(error));
  return specialised;
}

const CustomPipeline* new_pipeline(const Source& source, const std::string& function, const Constants& constants) {
  id<MTLFunction> found = function_of(source, function, constants);
  NSError* error = nil;
  MTLComputePipelineReflection* reflection = nil;
  // The names of this option differ between SDKs.
  constexpr auto with_bindings = static_cast<MTLPipelineOption>(1);
  id<MTLComputePipelineState> state = [mtl_device() newComputePipelineStateWithFunction:found
                                                                                options:with_bindings
                                                                             reflection:&reflection
                                                                                  error:&error];
  TORCH_CHECK(
      state != nil, "[", source.op, "] Metal makes no pipeline of ", source.name, "'s kernel ", function, ":\n",
      text_of(error));
  auto pipeline = std::make_unique<CustomPipeline>(CustomPipeline{state});
  note_buffers(*pipeline, reflection.bindings);
  return pipeline.release();
}

const CustomPipeline& pipeline_of(const Source& source, const std::string& function, const Constants& constants) {
  const std::string key = c10::str(function, '\n', constants.key(), source.key());
  return *of_current_gpu<CustomShaders>().pipelines.get(key, [&] { return new_pipeline(source, function, constants); });
}

// --- Arguments -----------------------------------------------------------------------------------------------------

// What a buffer index is bound to: bytes where there is no buffer.
struct Argument {
  id<MTLBuffer> buffer = nil;
  int64_t offset = 0;
  std::vector<int64_t> words;
  int64_t bytes = 0;
};

// The data pointer of an MPS tensor's storage is the buffer.
id<MTLBuffer> buffer_of(const Tensor& tensor) { return __builtin_bit_cast(id<MTLBuffer>, tensor.storage().data()); }

class ArgumentReader {
 public:
  ArgumentReader(const Call& call, IntArrayRef codes, at::TensorList tensors)
      : call_(call), codes_(codes), tensors_(tensors) {}

  std::vector<Argument> read() {
    std::vector<Argument> arguments;
    while (next_ < codes_.size()) {
      switch (number()) {
        case 0: arguments.push_back(tensor(arguments.size())); break;
        case 1: arguments.push_back(bytes(arguments.size())); break;
        case 2: arguments.push_back(buffer(arguments.size())); break;
        default: call_.check(false, "argument ", arguments.size(), " is of no known kind.");
      }
    }
    return arguments;
  }

 private:
  int64_t number() {
    call_.check(next_ < codes_.size(), "the list of arguments ends too early.");
    return codes_[next_++];
  }

  Argument tensor(size_t index) {
    call_.check(next_tensor_ < tensors_.size(), "there is no tensor for argument ", index, ".");
    const Tensor& tensor = tensors_[next_tensor_++];
    call_.check(tensor.is_mps(), "argument ", index, " is on ", tensor.device(), ", not on mps.");
    call_.check(tensor.numel() > 0, "argument ", index, " has no elements.");
    return {buffer_of(tensor), static_cast<int64_t>(tensor.storage_offset() * tensor.element_size()), {}, 0};
  }

  Argument bytes(size_t index) {
    Argument argument;
    argument.bytes = number();
    call_.check(
        argument.bytes > 0 && argument.bytes <= max_bytes, "argument ", index, " has ", argument.bytes, " bytes; 1 to ",
        max_bytes, " can be given without a tensor.");
    for (int64_t i = 0; i < (argument.bytes + 7) / 8; ++i) {
      argument.words.push_back(number());
    }
    return argument;
  }

  Argument buffer(size_t index) {
    const int64_t address = number();
    const int64_t offset = number();
    const auto buffer = __builtin_bit_cast(id<MTLBuffer>, address);
    call_.check(buffer != nil, "argument ", index, " is no MTLBuffer.");
    const NSUInteger length = buffer.length;
    call_.check(
        offset >= 0 && static_cast<NSUInteger>(offset) < length, "argument ", index, " starts at byte ", offset,
        " of an MTLBuffer of ", length, ".");
    return {buffer, offset, {}, 0};
  }

  const Call& call_;
  IntArrayRef codes_;
  at::TensorList tensors_;
  size_t next_ = 0;
  size_t next_tensor_ = 0;
};

void check_arguments(const Call& call, const CustomPipeline& pipeline, const std::vector<Argument>& arguments) {
  const auto count = static_cast<int64_t>(arguments.size());
  call.check(count <= max_buffers, count, " arguments; Metal has ", max_buffers, " buffers.");
  call.check(
      count <= pipeline.buffer_count, count, " arguments are given and the kernel takes ", pipeline.buffer_count, ".");
  for (int64_t i = 0; i < max_buffers; ++i) {
    call.check(
        i < count || !(pipeline.used >> i & 1u), "the kernel uses buffer ", i, ", and ", count,
        " arguments are given.");
    call.check(
        i >= count || arguments[i].buffer != nil || !(pipeline.written >> i & 1u), "the kernel takes buffer ", i,
        " to write to it, so that it has to be a tensor or an MTLBuffer.");
  }
}

// --- Sizes ---------------------------------------------------------------------------------------------------------

MTLSize size_of(const Call& call, const char* name, IntArrayRef size) {
  call.check(
      size.size() == 3 && size[0] > 0 && size[1] > 0 && size[2] > 0, name, " is ", size,
      "; it is three sizes above 0.");
  return MTLSizeMake(size[0], size[1], size[2]);
}

void check_sizes(const Call& call, const CustomPipeline& pipeline, MTLSize grid, MTLSize group, bool in_threads) {
  const MTLSize most = mtl_device().maxThreadsPerThreadgroup;
  const NSUInteger limit = pipeline.state.maxTotalThreadsPerThreadgroup;
  const bool fits = group.width <= most.width && group.height <= most.height && group.depth <= most.depth;
  call.check(
      fits && group.width * group.height * group.depth <= limit, "a threadgroup of ", group.width, " x ", group.height,
      " x ", group.depth, " threads; this kernel runs with at most ", limit, " on this GPU, and at most ", most.width,
      " x ", most.height, " x ", most.depth, ".");
  constexpr NSUInteger most_threads = 0xFFFFFFFF;
  const auto threads = [&](NSUInteger size, NSUInteger of_group) { return in_threads ? size : size * of_group; };
  const NSUInteger sizes[] = {grid.width, grid.height, grid.depth};
  const NSUInteger groups[] = {group.width, group.height, group.depth};
  for (int i = 0; i < 3; ++i) {
    call.check(
        sizes[i] <= most_threads && threads(sizes[i], groups[i]) <= most_threads, "a grid of ", sizes[i],
        in_threads ? " threads" : " threadgroups", " along one axis; there can be ", most_threads, " threads.");
  }
}

void check_memory(const Call& call, IntArrayRef lengths) {
  const auto limit = static_cast<int64_t>(mtl_device().maxThreadgroupMemoryLength);
  int64_t sum = 0;
  for (const int64_t length : lengths) {
    call.check(
        length > 0 && length % 16 == 0 && length <= limit, "threadgroup_memory is ", lengths,
        "; lengths are multiples of 16 bytes.");
    sum += length;
  }
  call.check(
      sum <= limit && lengths.size() <= static_cast<size_t>(max_buffers), "threadgroup_memory is ", lengths,
      "; there are ", limit, " bytes.");
}

// --- The ops -------------------------------------------------------------------------------------------------------

std::vector<std::string> functions(
    const Tensor&,
    std::string_view op,
    std::string_view name,
    std::string_view source,
    std::string_view math_mode) {
  @autoreleasepool {
    return functions_of({op, name, source, math_mode});
  }
}

Constants given_constants(const Call& call, const c10::List<std::string>& names, at::ArrayRef<at::Scalar> values) {
  call.check(names.size() == values.size(), names.size(), " function constants and ", values.size(), " values.");
  return {names.vec(), values};
}

// Its address, the most threads of a threadgroup, and the threads of a simdgroup.
std::vector<int64_t> pipeline(
    const Tensor&,
    std::string_view op,
    std::string_view name,
    std::string_view source,
    std::string_view math_mode,
    std::string_view function,
    const c10::List<std::string>& constants,
    at::ArrayRef<at::Scalar> values) {
  @autoreleasepool {
    const Source where{op, name, source, math_mode};
    const Constants given = given_constants({op, function}, constants, values);
    const id<MTLComputePipelineState> state = pipeline_of(where, std::string(function), given).state;
    return {
        __builtin_bit_cast(int64_t, state), static_cast<int64_t>(state.maxTotalThreadsPerThreadgroup),
        static_cast<int64_t>(state.threadExecutionWidth)};
  }
}

void bind(id<MTLComputeCommandEncoder> encoder, const std::vector<Argument>& arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Argument& argument = arguments[i];
    if (argument.buffer != nil) {
      [encoder setBuffer:argument.buffer offset:argument.offset atIndex:i];
    } else {
      [encoder setBytes:argument.words.data() length:argument.bytes atIndex:i];
    }
  }
}

void dispatch(
    const Tensor&,
    std::string_view op,
    std::string_view name,
    std::string_view source,
    std::string_view math_mode,
    std::string_view function,
    const c10::List<std::string>& constants,
    at::ArrayRef<at::Scalar> values,
    at::TensorList tensors,
    IntArrayRef codes,
    IntArrayRef grid,
    IntArrayRef threadgroup,
    bool grid_in_threads,
    IntArrayRef threadgroup_memory,
    bool wait) {
  @autoreleasepool {
    const Call call{op, function};
    const MTLSize size = size_of(call, "grid", grid);
    const MTLSize group = size_of(call, "threadgroup", threadgroup);
    const std::vector<Argument> arguments = ArgumentReader(call, codes, tensors).read();
    const Constants given = given_constants(call, constants, values);
    const CustomPipeline& kernel = pipeline_of({op, name, source, math_mode}, std::string(function), given);
    check_arguments(call, kernel, arguments);
    check_sizes(call, kernel, size, group, grid_in_threads);
    check_memory(call, threadgroup_memory);
    at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
    const auto& bound = arguments;  // a block would copy what it captures by value
    const auto& lengths = threadgroup_memory;
    at::mps::dispatch_sync_with_rethrow(stream->queue(), ^() {
      @autoreleasepool {
        id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();
        [encoder setComputePipelineState:kernel.state];
        bind(encoder, bound);
        for (size_t i = 0; i < lengths.size(); ++i) {
          [encoder setThreadgroupMemoryLength:lengths[i] atIndex:i];
        }
        if (grid_in_threads) {
          [encoder dispatchThreads:size threadsPerThreadgroup:group];
        } else {
          [encoder dispatchThreadgroups:size threadsPerThreadgroup:group];
        }
        if (wait) {
          stream->synchronize(at::mps::SyncType::COMMIT_AND_WAIT);
        }
      }
    });
  }
}

// The address of a tensor's MTLBuffer, its length, and where the tensor starts in it.
std::vector<int64_t> buffer(const Tensor& tensor, std::string_view op) {
  TORCH_CHECK_VALUE(tensor.numel() > 0, "[", op, "] a tensor without elements has no MTLBuffer.");
  const id<MTLBuffer> found = buffer_of(tensor);
  return {
      __builtin_bit_cast(int64_t, found), static_cast<int64_t>(found.length),
      static_cast<int64_t>(tensor.storage_offset() * tensor.element_size())};
}

int64_t queue(const Tensor&, std::string_view) {
  return __builtin_bit_cast(int64_t, at::mps::getCurrentMPSStream()->commandQueue());
}

// Name and text in turns.
std::vector<std::string> shaders(const Tensor&, std::string_view) {
  std::vector<std::string> result;
  for (auto& [name, text] : all_shader_sources()) {
    result.push_back(std::move(name));
    result.push_back(std::move(text));
  }
  return result;
}

}  // namespace
}  // namespace quantization_mlx::metal

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, MPS, m) {
  using namespace quantization_mlx::metal;
  m.impl("_metal_functions", functions);
  m.impl("_metal_pipeline", pipeline);
  m.impl("_metal_dispatch", dispatch);
  m.impl("_metal_buffer", buffer);
  m.impl("_metal_queue", queue);
  m.impl("_metal_shaders", shaders);
}
