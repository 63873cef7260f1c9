// The classes of apple/Metal/Metal.h on top of the shader runtime. What a real device would take for granted, and
// answer with undefined behaviour or the end of the process, is checked here: see softmetal::misuse.
#import <Metal/Metal.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "device.h"

namespace softmetal {
namespace {

constexpr NSUInteger max_buffers = 31;
constexpr NSUInteger max_bytes = 4096;
constexpr NSUInteger max_threads = 1024;
constexpr NSUInteger max_threadgroup_memory = 32768;
constexpr double max_seconds = 300;

std::string text_of(MTLSize size) {
  return std::to_string(size.width) + " x " + std::to_string(size.height) + " x " + std::to_string(size.depth);
}

size_t size_of(MTLDataType type) {
  switch (type) {
    case MTLDataTypeBool:
    case MTLDataTypeChar:
    case MTLDataTypeUChar: return 1;
    case MTLDataTypeShort:
    case MTLDataTypeUShort:
    case MTLDataTypeHalf:
    case MTLDataTypeBFloat: return 2;
    case MTLDataTypeInt:
    case MTLDataTypeUInt:
    case MTLDataTypeFloat: return 4;
    default: misuse("function constants of MTLDataType " + std::to_string(type) + " are not provided");
  }
}

// Of a function constant, by its name in the source; none for vectors.
MTLDataType type_of(const std::string& name) {
  static const std::map<std::string, MTLDataType> types{
      {"bool", MTLDataTypeBool},     {"char", MTLDataTypeChar},     {"int8_t", MTLDataTypeChar},
      {"uchar", MTLDataTypeUChar},   {"uint8_t", MTLDataTypeUChar}, {"short", MTLDataTypeShort},
      {"int16_t", MTLDataTypeShort}, {"ushort", MTLDataTypeUShort}, {"uint16_t", MTLDataTypeUShort},
      {"int", MTLDataTypeInt},       {"int32_t", MTLDataTypeInt},   {"uint", MTLDataTypeUInt},
      {"uint32_t", MTLDataTypeUInt}, {"half", MTLDataTypeHalf},     {"bfloat", MTLDataTypeBFloat},
      {"float", MTLDataTypeFloat},
  };
  const auto found = types.find(name);
  return found != types.end() ? found->second : MTLDataTypeNone;
}

NSError* error(NSString* domain, NSInteger code, const std::string& text) {
  NSString* description = [NSString stringWithUTF8String:text.c_str()];
  return [NSError errorWithDomain:domain
                             code:code
                         userInfo:[NSDictionary dictionaryWithObject:description forKey:NSLocalizedDescriptionKey]];
}

// Leaves an error where the caller wants one, and is the nil that goes with it. Also kept in the log: whoever asks for
// what there is not may go on without it.
std::nullptr_t fail(NSError** destination, NSString* domain, NSInteger code, const std::string& text) {
  record_error(text);
  if (destination != nullptr) {
    *destination = error(domain, code, text);
  }
  return nullptr;
}

// The newest version of the language that a release of macOS compiles and loads.
int language_of(int macos) { return macos >= 2600 ? 400 : (macos >= 1500 ? 320 : 310); }

}  // namespace
}  // namespace softmetal

using namespace softmetal;

// --- Buffers --------------------------------------------------------------------------------------------------------

@interface SoftmetalBuffer : NSObject <MTLBuffer> {
 @public
  Memory* _memory;
}
@end

@implementation SoftmetalBuffer
- (NSUInteger)length {
  return _memory->size();
}
- (void*)contents {
  return _memory->data();
}
- (MTLStorageMode)storageMode {
  return MTLStorageModeShared;
}
- (void)dealloc {
  if (!is_idle() && !_memory->guards_intact()) {
    record_error("something wrote past the ends of a buffer of " + std::to_string(_memory->size()) + " bytes");
  }
  delete _memory;
  [super dealloc];
}
@end

void* softmetal::new_buffer(size_t size) {
  SoftmetalBuffer* buffer = [SoftmetalBuffer new];
  buffer->_memory = new Memory(size);
  return buffer;
}

void softmetal::release_buffer(void* buffer) { [static_cast<SoftmetalBuffer*>(buffer) release]; }

Memory& softmetal::memory_of(void* buffer) { return *static_cast<SoftmetalBuffer*>(buffer)->_memory; }

// --- Libraries and pipelines ----------------------------------------------------------------------------------------

@implementation MTLArchitecture
- (NSString*)name {
  return [NSString stringWithUTF8String:settings().gpu.c_str()];
}
@end

struct CompileOptions {
  NSDictionary* macros = nil;
  MTLLanguageVersion version;
  bool fast = true;
  bool precise_functions = false;  // before macOS 15, fast decides that too
};

static CompileOptions& state(MTLCompileOptions* options) { return *static_cast<CompileOptions*>(options->_state); }

@implementation MTLCompileOptions
- (instancetype)init {
  const int version = language_of(settings().macos);
  _state = new CompileOptions{nil, static_cast<MTLLanguageVersion>((version / 100) << 16 | version / 10 % 10)};
  return self;
}
- (NSDictionary*)preprocessorMacros {
  return state(self).macros;
}
- (void)setPreprocessorMacros:(NSDictionary*)macros {
  [state(self).macros release];
  state(self).macros = [macros copy];
}
- (MTLLanguageVersion)languageVersion {
  return state(self).version;
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
  state(self).version = version;
}
- (BOOL)fastMathEnabled {
  return state(self).fast;
}
- (void)setFastMathEnabled:(BOOL)enabled {
  state(self).fast = enabled;
}
- (MTLMathMode)mathMode {
  return state(self).fast ? MTLMathModeFast : MTLMathModeSafe;
}
- (void)setMathMode:(MTLMathMode)mode {
  if (settings().macos < 1500) {
    misuse("MTLCompileOptions has no mathMode before macOS 15");
  }
  state(self).fast = mode != MTLMathModeSafe;
}
- (MTLMathFloatingPointFunctions)mathFloatingPointFunctions {
  return state(self).precise_functions ? MTLMathFloatingPointFunctionsPrecise : MTLMathFloatingPointFunctionsFast;
}
- (void)setMathFloatingPointFunctions:(MTLMathFloatingPointFunctions)functions {
  if (settings().macos < 1500) {
    misuse("MTLCompileOptions has no mathFloatingPointFunctions before macOS 15");
  }
  state(self).precise_functions = functions == MTLMathFloatingPointFunctionsPrecise;
}
- (void)dealloc {
  [state(self).macros release];
  delete &state(self);
  [super dealloc];
}
@end

static std::map<int, std::string>& state(MTLFunctionConstantValues* values) {
  return *static_cast<std::map<int, std::string>*>(values->_state);
}

@implementation MTLFunctionConstantValues
- (instancetype)init {
  _state = new std::map<int, std::string>;
  return self;
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  state(self)[static_cast<int>(index)] = std::string(static_cast<const char*>(value), size_of(type));
}
- (void)reset {
  state(self).clear();
}
- (void)dealloc {
  delete &state(self);
  [super dealloc];
}
@end

static const FunctionConstant& state(MTLFunctionConstant* constant) {
  return *static_cast<FunctionConstant*>(constant->_state);
}

@implementation MTLFunctionConstant
- (NSString*)name {
  return [NSString stringWithUTF8String:state(self).name.c_str()];
}
- (MTLDataType)type {
  return type_of(state(self).type);
}
- (NSUInteger)index {
  return state(self).index;
}
- (BOOL)required {
  return state(self).required;
}
- (void)dealloc {
  delete static_cast<FunctionConstant*>(_state);
  [super dealloc];
}
@end

@interface SoftmetalFunction : NSObject <MTLFunction> {
 @public
  std::string* _name;
  std::map<int, std::string>* _constants;
  std::shared_ptr<Shaders>* _shaders;
}
@end

@implementation SoftmetalFunction
- (NSString*)name {
  return [NSString stringWithUTF8String:_name->c_str()];
}
- (MTLFunctionType)functionType {
  return MTLFunctionTypeKernel;
}
- (NSDictionary*)functionConstantsDictionary {
  std::vector<id> names, constants;
  std::vector<FunctionConstant> used;
  try {
    used = (*_shaders)->constants(*_name);
  } catch (const CompileFailure&) {
    // Which whoever makes a pipeline of it is told.
  }
  for (FunctionConstant& each : used) {
    names.push_back([NSString stringWithUTF8String:each.name.c_str()]);
    MTLFunctionConstant* constant = [[MTLFunctionConstant new] autorelease];
    constant->_state = new FunctionConstant(std::move(each));
    constants.push_back(constant);
  }
  return [NSDictionary dictionaryWithObjects:constants.data() forKeys:names.data() count:names.size()];
}
- (void)dealloc {
  delete _name;
  delete _constants;
  delete _shaders;
  [super dealloc];
}
@end

@interface SoftmetalPipelineState : NSObject <MTLComputePipelineState> {
 @public
  std::string* _name;
  std::map<int, std::string>* _constants;
  std::shared_ptr<Kernel>* _kernel;
}
@end

@implementation SoftmetalPipelineState
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return (*_kernel)->pipeline()->max_threads;
}
- (NSUInteger)threadExecutionWidth {
  return 32;
}
- (void)dealloc {
  delete _name;
  delete _constants;
  delete _kernel;
  [super dealloc];
}
@end

// An argument [[buffer(index)]], as the compiled kernel has it.
@interface SoftmetalBufferBinding : NSObject <MTLBinding> {
 @public
  NSUInteger _index;
  bool _writable;
}
@end

@implementation SoftmetalBufferBinding
- (MTLBindingType)type {
  return MTLBindingTypeBuffer;
}
- (MTLBindingAccess)access {
  return _writable ? MTLBindingAccessReadWrite : MTLBindingAccessReadOnly;
}
- (NSUInteger)index {
  return _index;
}
- (BOOL)isUsed {
  return YES;
}
- (BOOL)isArgument {
  return YES;
}
@end

@implementation MTLComputePipelineReflection
- (NSArray*)bindings {
  const auto& pipeline = *static_cast<const SoftmetalPipeline*>(_state);
  std::vector<id> found;
  for (NSUInteger index = 0; index < max_buffers; ++index) {
    if (pipeline.buffers >> index & 1u) {
      SoftmetalBufferBinding* binding = [[SoftmetalBufferBinding new] autorelease];
      binding->_index = index;
      binding->_writable = pipeline.writable_buffers >> index & 1u;
      found.push_back(binding);
    }
  }
  return [NSArray arrayWithObjects:found.data() count:found.size()];
}
@end

@interface SoftmetalLibrary : NSObject <MTLLibrary> {
 @public
  std::shared_ptr<Shaders>* _shaders;
}
@end

@implementation SoftmetalLibrary
- (NSArray*)functionNames {
  std::vector<id> names;
  for (const std::string& name : (*_shaders)->kernels()) {
    names.push_back([NSString stringWithUTF8String:name.c_str()]);
  }
  return [NSArray arrayWithObjects:names.data() count:names.size()];
}
- (id<MTLFunction>)newFunctionWithName:(NSString*)name {
  const auto names = (*_shaders)->kernels();
  if (std::find(names.begin(), names.end(), name.UTF8String) == names.end()) {
    return nil;
  }
  SoftmetalFunction* function = [SoftmetalFunction new];
  function->_name = new std::string(name.UTF8String);
  function->_constants = new std::map<int, std::string>;
  function->_shaders = new std::shared_ptr<Shaders>(*_shaders);
  return function;
}
- (id<MTLFunction>)newFunctionWithName:(NSString*)name
                        constantValues:(MTLFunctionConstantValues*)values
                                 error:(NSError**)error {
  SoftmetalFunction* function = static_cast<SoftmetalFunction*>([self newFunctionWithName:name]);
  if (function == nil) {
    return fail(
        error, @"MTLLibraryErrorDomain", MTLLibraryErrorFunctionNotFound,
        std::string("Function ") + name.UTF8String + " was not found in the library");
  }
  *function->_constants = state(values);
  return function;
}
- (void)dealloc {
  delete _shaders;
  [super dealloc];
}
@end

// --- Encoders -------------------------------------------------------------------------------------------------------

namespace softmetal {
namespace {

enum class Bound { nothing, null, buffer, bytes };

struct Slot {
  Bound bound = Bound::nothing;
  SoftmetalBuffer* buffer = nil;
  uint64_t offset = 0;
  std::string bytes;
  uint64_t block = 0;

  void set(Bound kind) {
    [buffer release];
    buffer = nil;
    bound = kind;
    block = block_number();
  }
};

struct EncoderState {
  dispatch_queue_t queue;
  bool ended = false;
  SoftmetalPipelineState* pipeline = nil;
  uint64_t pipeline_block = 0;
  std::array<Slot, max_buffers> slots;
  std::array<uint64_t, max_buffers> threadgroup_lengths{};

  ~EncoderState() {
    [pipeline release];
    for (Slot& slot : slots) {
      slot.set(Bound::nothing);
    }
  }

  void use() const {
    if (ended) {
      misuse("a command is given to an encoder that has ended");
    }
    if (!on_queue(queue)) {
      misuse("torch's encoder is used outside of dispatch_sync on its stream's queue");
    }
  }

  Slot& slot(NSUInteger index) {
    if (index >= max_buffers) {
      misuse("buffer index " + std::to_string(index) + ": there are 31 buffers");
    }
    return slots[index];
  }
};

// The launch's memory: a buffer that is bound at several indices is one allocation.
struct Allocations {
  std::vector<SoftmetalAllocation> list;
  std::vector<SoftmetalBinding> bindings;
  std::vector<SoftmetalBuffer*> buffers;  // by allocation; nil for bytes
  std::vector<std::string> names;  // by allocation, for messages
};

Allocations gather(EncoderState& state, const std::string& kernel, const SoftmetalPipeline& pipeline) {
  Allocations result;
  for (NSUInteger index = 0; index < max_buffers; ++index) {
    SoftmetalBinding binding{-1, 0, 0};
    Slot& slot = state.slots[index];
    const bool declared = pipeline.buffers >> index & 1u;
    const bool writable = pipeline.writable_buffers >> index & 1u;
    if (declared) {
      const std::string where = "kernel " + kernel + " takes buffer " + std::to_string(index);
      if (slot.bound == Bound::nothing) {
        misuse(where + ", to which nothing is bound");
      }
      if (slot.block != block_number()) {
        misuse(where + ", which another op has bound; unused slots are to be set to nil");
      }
      if (slot.bound == Bound::bytes) {
        if (writable) {
          misuse(where + " as writable, but it was set with setBytes");
        }
        binding.allocation = static_cast<int32_t>(result.list.size());
        auto* data = reinterpret_cast<uint8_t*>(slot.bytes.data());
        result.list.push_back({data, slot.bytes.size(), 0, 1, 0, 0, nullptr, 0, 0});
        result.buffers.push_back(nil);
        result.names.push_back("buffer " + std::to_string(index));
      } else if (slot.bound == Bound::buffer) {
        const auto found = std::find(result.buffers.begin(), result.buffers.end(), slot.buffer);
        if (found == result.buffers.end()) {
          Memory& memory = *slot.buffer->_memory;
          result.list.push_back(
              {memory.data(), memory.size(), 0, 0, 1, static_cast<uint32_t>(Memory::guard), memory.written(), 0, 0});
          result.buffers.push_back(slot.buffer);
          result.names.push_back("buffer " + std::to_string(index));
          binding.allocation = static_cast<int32_t>(result.list.size() - 1);
        } else {
          binding.allocation = static_cast<int32_t>(found - result.buffers.begin());
          result.names[binding.allocation] += " and " + std::to_string(index);
          if (writable || result.list[binding.allocation].writable) {
            misuse(
                "kernel " + kernel + " writes to memory that two of its arguments share, " +
                result.names[binding.allocation]);
          }
        }
        if (writable) {
          result.list[binding.allocation].writable = 1;
        }
        binding.offset = slot.offset;
      }
    }
    result.bindings.push_back(binding);
  }
  return result;
}

// As a shader that was compiled wrongly might leave them.
void corrupt(const Allocations& allocations) {
  for (const SoftmetalAllocation& allocation : allocations.list) {
    for (uint64_t i = 1; allocation.writable && i < allocation.size; i += 2) {
      allocation.data[i] ^= 0x40;
    }
  }
}

void run(EncoderState& state, MTLSize threads, MTLSize threads_per_threadgroup) {
  state.use();
  if (state.pipeline == nil || state.pipeline_block != block_number()) {
    misuse("a dispatch without a pipeline state of this op");
  }
  if (is_idle()) {
    return;
  }
  const std::string& name = *state.pipeline->_name;
  const SoftmetalPipeline& pipeline = *(*state.pipeline->_kernel)->pipeline();
  const MTLSize size = threads_per_threadgroup;
  const NSUInteger count = size.width * size.height * size.depth;
  if (count == 0 || count > std::min<NSUInteger>(max_threads, pipeline.max_threads)) {
    misuse(
        "kernel " + name + " with " + text_of(size) + " threads per threadgroup; it takes 1 to " +
        std::to_string(std::min<NSUInteger>(max_threads, pipeline.max_threads)));
  }
  if (threads.width == 0 || threads.height == 0 || threads.depth == 0) {
    misuse("kernel " + name + " with an empty grid, " + text_of(threads) + " threads");
  }
  const uint64_t memory = [&] {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < pipeline.threadgroup_arguments; ++i) {
      sum += state.threadgroup_lengths[i];
    }
    return sum;
  }();
  if (memory > max_threadgroup_memory) {
    misuse("kernel " + name + " with " + std::to_string(memory) + " bytes of threadgroup memory; there are 32768");
  }
  Allocations allocations = gather(state, name, pipeline);
  SoftmetalLaunch launch{};
  launch.pipeline = &pipeline;
  launch.allocations = allocations.list.data();
  launch.bindings = allocations.bindings.data();
  launch.threadgroup_lengths = state.threadgroup_lengths.data();
  launch.allocation_count = static_cast<uint32_t>(allocations.list.size());
  launch.binding_count = static_cast<uint32_t>(allocations.bindings.size());
  launch.threadgroup_length_count = pipeline.threadgroup_arguments;
  const NSUInteger sizes[] = {size.width, size.height, size.depth};
  const NSUInteger grid[] = {threads.width, threads.height, threads.depth};
  LaunchRecord record{name, *state.pipeline->_constants, {}, {}, {}, {}};
  for (int i = 0; i < 3; ++i) {
    launch.threads_per_threadgroup[i] = static_cast<uint32_t>(sizes[i]);
    launch.threads[i] = static_cast<uint32_t>(grid[i]);
    record.threads[i] = sizes[i];
    record.threadgroups[i] = (grid[i] + sizes[i] - 1) / sizes[i];
  }
  launch.seconds = max_seconds;
  launch.seed = settings().seed;
  const std::unique_ptr<SoftmetalReport, decltype(&softmetal_free_report)> report(
      runtime().launch(&launch), runtime().free_report);
  record.counters = report->counters;
  // Of arguments that share memory, the first has its bytes.
  std::set<int32_t> counted;
  for (size_t index = 0; index < allocations.bindings.size(); ++index) {
    const int32_t number = allocations.bindings[index].allocation;
    if (number >= 0 && allocations.buffers[number] != nil) {
      const bool is_first = counted.insert(number).second;
      record.bytes_read[static_cast<int>(index)] = is_first ? allocations.list[number].bytes_read : 0;
    }
  }
  add(std::move(record));
  const std::string corrupted = settings().corrupted;
  if (!corrupted.empty() && name.find(corrupted) != std::string::npos) {
    corrupt(allocations);
  }
  std::string first;
  for (uint32_t i = 0; i < report->error_count; ++i) {
    std::string text = "kernel " + name + ": " + (*state.pipeline->_kernel)->describe(report->errors[i]);
    for (size_t number = 0; number < allocations.names.size(); ++number) {
      const std::string memory_name = "memory " + std::to_string(number);
      for (size_t at = text.find(memory_name); at != std::string::npos; at = text.find(memory_name)) {
        text.replace(at, memory_name.size(), allocations.names[number]);
      }
    }
    record_error(text);
    first = first.empty() ? text : first;
  }
  if (!first.empty()) {
    throw Misuse("software Metal device: " + first);
  }
}

}  // namespace
}  // namespace softmetal

@interface SoftmetalEncoder : NSObject <MTLComputeCommandEncoder> {
 @public
  EncoderState* _encoder;
}
@end

@implementation SoftmetalEncoder
- (MTLDispatchType)dispatchType {
  return MTLDispatchTypeSerial;
}
- (void)setComputePipelineState:(id<MTLComputePipelineState>)pipeline {
  _encoder->use();
  if (pipeline == nil) {
    misuse("setComputePipelineState with nil");
  }
  [pipeline retain];
  [_encoder->pipeline release];
  _encoder->pipeline = static_cast<SoftmetalPipelineState*>(pipeline);
  _encoder->pipeline_block = block_number();
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  _encoder->use();
  Slot& slot = _encoder->slot(index);
  if (buffer == nil) {
    slot.set(Bound::null);
    return;
  }
  SoftmetalBuffer* own = static_cast<SoftmetalBuffer*>(buffer);
  if (offset >= own->_memory->size()) {
    misuse(
        "buffer " + std::to_string(index) + ": offset " + std::to_string(offset) + " is beyond the buffer's " +
        std::to_string(own->_memory->size()) + " bytes");
  }
  [own retain];
  slot.set(Bound::buffer);
  slot.buffer = own;
  slot.offset = offset;
}
- (void)setBufferOffset:(NSUInteger)offset atIndex:(NSUInteger)index {
  _encoder->use();
  Slot& slot = _encoder->slot(index);
  if (slot.bound != Bound::buffer || slot.block != block_number()) {
    misuse("setBufferOffset for buffer " + std::to_string(index) + ", to which this op has bound no buffer");
  }
  [self setBuffer:slot.buffer offset:offset atIndex:index];
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  _encoder->use();
  Slot& slot = _encoder->slot(index);
  if (length == 0 || length > max_bytes) {
    misuse("buffer " + std::to_string(index) + ": setBytes takes 1 to 4096 bytes, not " + std::to_string(length));
  }
  slot.set(Bound::bytes);
  slot.bytes.assign(static_cast<const char*>(bytes), length);
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  _encoder->use();
  _encoder->slot(index);
  if (length % 16 != 0 || length > max_threadgroup_memory) {
    misuse(
        "threadgroup memory " + std::to_string(index) + ": " + std::to_string(length) +
        " bytes is not a multiple of 16 up to 32768");
  }
  _encoder->threadgroup_lengths[index] = length;
}
- (void)dispatchThreadgroups:(MTLSize)threadgroups threadsPerThreadgroup:(MTLSize)threads {
  run(*_encoder,
      MTLSizeMake(
          threadgroups.width * threads.width, threadgroups.height * threads.height, threadgroups.depth * threads.depth),
      threads);
}
- (void)dispatchThreads:(MTLSize)threads threadsPerThreadgroup:(MTLSize)threads_per_threadgroup {
  run(*_encoder, threads, threads_per_threadgroup);
}
- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
  _encoder->use();
}
- (void)endEncoding {
  misuse("endEncoding on the encoder that torch shares between ops");
}
- (void)dealloc {
  delete _encoder;
  [super dealloc];
}
@end

id<MTLComputeCommandEncoder> softmetal_new_encoder(dispatch_queue_t queue) {
  SoftmetalEncoder* encoder = [SoftmetalEncoder new];
  encoder->_encoder = new EncoderState{queue};
  return encoder;
}

void softmetal_end_encoder(id<MTLComputeCommandEncoder> encoder) {
  static_cast<SoftmetalEncoder*>(encoder)->_encoder->ended = true;
  [encoder release];
}

// --- The device -----------------------------------------------------------------------------------------------------

// Nothing but an identity: commands go through torch's encoder.
@interface SoftmetalCommandQueue : NSObject <MTLCommandQueue>
@end

@implementation SoftmetalCommandQueue
@end

@interface SoftmetalDevice : NSObject <MTLDevice>
@end

template <typename Make>
static id<MTLLibrary> new_library(NSError** error, const Make& make) {
  try {
    auto shaders = make();
    SoftmetalLibrary* library = [SoftmetalLibrary new];
    library->_shaders = new std::shared_ptr<Shaders>(std::move(shaders));
    return library;
  } catch (const CompileFailure& failure) {
    return fail(error, @"MTLLibraryErrorDomain", MTLLibraryErrorCompileFailure, failure.what());
  }
}

@implementation SoftmetalDevice
- (NSString*)name {
  return @"Software Metal device";
}
- (MTLArchitecture*)architecture {
  return [[MTLArchitecture new] autorelease];
}
- (MTLSize)maxThreadsPerThreadgroup {
  return MTLSizeMake(max_threads, max_threads, max_threads);
}
- (NSUInteger)maxThreadgroupMemoryLength {
  return max_threadgroup_memory;
}
- (BOOL)hasUnifiedMemory {
  return YES;
}
- (BOOL)supportsFamily:(MTLGPUFamily)family {
  const int generation = gpu_generation();
  const int apple = generation >= 17 ? 1010 : (generation >= 15 ? 1009 : 994 + generation);
  if (family == MTLGPUFamilyMetal4) {
    return settings().macos >= 2600;
  }
  return family == MTLGPUFamilyMetal3 || (family >= MTLGPUFamilyApple1 && family <= apple);
}
- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
  return static_cast<id<MTLBuffer>>(static_cast<id>(new_buffer(length)));
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source options:(MTLCompileOptions*)options error:(NSError**)error {
  options = options != nil ? options : [[MTLCompileOptions new] autorelease];
  const int version = static_cast<int>((state(options).version >> 16) * 100 + (state(options).version & 0xFFFF) * 10);
  if (version > language_of(settings().macos)) {
    return fail(
        error, @"MTLLibraryErrorDomain", MTLLibraryErrorUnsupported,
        "this release of macOS does not compile Metal " + std::to_string(version));
  }
  std::map<std::string, std::string> macros;
  NSArray* names = state(options).macros.allKeys;
  for (NSUInteger i = 0; i < names.count; ++i) {
    NSString* name = [names objectAtIndex:i];
    NSObject* value = [state(options).macros objectForKey:name];
    macros[name.UTF8String] = value.description.UTF8String;
  }
  const bool precise = settings().macos < 1500 || state(options).precise_functions;
  add(CompileRecord{source.UTF8String, macros, version, !state(options).fast && precise});
  return new_library(error, [&] { return runtime().compiler->compile(source.UTF8String, macros, version); });
}
- (id<MTLLibrary>)newLibraryWithData:(dispatch_data_t)data error:(NSError**)error {
  const std::string& bytes = bytes_of(data);
  if (bytes.rfind("MTLB", 0) != 0) {
    return fail(error, @"MTLLibraryErrorDomain", MTLLibraryErrorUnsupported, "Invalid library file");
  }
  if (settings().macos < 2600) {
    return fail(error, @"MTLLibraryErrorDomain", MTLLibraryErrorUnsupported, "The library is for macOS 26.0 and later");
  }
  return new_library(error, [&] { return runtime().compiler->load(bytes); });
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function error:(NSError**)error {
  SoftmetalFunction* own = static_cast<SoftmetalFunction*>(function);
  if (own == nil) {
    misuse("newComputePipelineStateWithFunction with nil");
  }
  const bool has_tensor_ops = gpu_generation() >= 17 && settings().macos >= 2602;
  if (!has_tensor_ops && (*own->_shaders)->uses_tensor_ops(*own->_name)) {
    misuse("tensor operations on " + settings().gpu + ", which has none, or before macOS 26.2: " + *own->_name);
  }
  try {
    auto kernel = (*own->_shaders)->kernel(*own->_name, *own->_constants);
    SoftmetalPipelineState* pipeline = [SoftmetalPipelineState new];
    pipeline->_name = new std::string(*own->_name);
    pipeline->_constants = new std::map<int, std::string>(*own->_constants);
    pipeline->_kernel = new std::shared_ptr<Kernel>(std::move(kernel));
    return pipeline;
  } catch (const CompileFailure& failure) {
    return fail(error, @"AGXMetal", 3, failure.what());
  }
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                                           options:(MTLPipelineOption)options
                                                        reflection:(MTLComputePipelineReflection**)reflection
                                                             error:(NSError**)error {
  SoftmetalPipelineState* pipeline =
      static_cast<SoftmetalPipelineState*>([self newComputePipelineStateWithFunction:function error:error]);
  if (pipeline != nil && reflection != nullptr && options != MTLPipelineOptionNone) {
    *reflection = [[MTLComputePipelineReflection new] autorelease];
    // Whoever asks looks at once: the pipeline, which has this, is theirs.
    (*reflection)->_state = const_cast<SoftmetalPipeline*>((*pipeline->_kernel)->pipeline());
  }
  return pipeline;
}
- (id<MTLCommandQueue>)newCommandQueue {
  return static_cast<id<MTLCommandQueue>>(static_cast<id>([SoftmetalCommandQueue new]));
}
@end

id<MTLDevice> MTLCreateSystemDefaultDevice() { return [SoftmetalDevice new]; }
