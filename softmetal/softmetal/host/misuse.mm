// What a Metal host file can do wrong, one function each: tests/test_host.py sees to it that the software device
// notices. Written with its own shaders, and with nothing of the project.
#import <Metal/Metal.h>

#include <ATen/mps/MPSDevice.h>
#include <ATen/mps/MPSStream.h>

#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"

namespace {

constexpr const char* source = R"metal(
#include <metal_stdlib>
using namespace metal;

constant bool doubled [[function_constant(3)]];

kernel void fill(
    device float* y [[buffer(0)]],
    device const float* x [[buffer(1)]],
    constant uint& count [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  if (i < count) {
    y[i] = doubled ? 2.0f * x[i] : x[i];
  }
}

kernel void plain(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = 1.0f; }

[[max_total_threads_per_threadgroup(64)]] kernel void narrow(
    device float* y [[buffer(0)]],
    uint i [[thread_position_in_grid]]) {
  y[i] = 1.0f;
}

kernel void scratch(
    device float* y [[buffer(0)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint i [[thread_position_in_grid]]) {
  shared[i] = 1.0f;
  y[i] = shared[i];
}

kernel void racing(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[0] = float(i); }
)metal";

using at::mps::MPSDevice;
using at::mps::MPSStream;
using Encoder = id<MTLComputeCommandEncoder>;
using Pipeline = id<MTLComputePipelineState>;

MPSStream* stream() { return at::mps::getCurrentMPSStream(); }

id<MTLDevice> device() { return MPSDevice::getInstance()->device(); }

[[noreturn]] void fail(NSError* error) {
  throw std::runtime_error(error != nil ? error.localizedDescription.UTF8String : "no error is given");
}

id<MTLLibrary> library() {
  static id<MTLLibrary> library = [] {
    NSError* error = nil;
    id<MTLLibrary> made = [device() newLibraryWithSource:@(source) options:nil error:&error];
    return made != nil ? made : (fail(error), made);
  }();
  return library;
}

Pipeline pipeline_with(const char* name, MTLFunctionConstantValues* values) {
  NSError* error = nil;
  id<MTLFunction> function = [[library() newFunctionWithName:@(name) constantValues:values error:&error] autorelease];
  if (function == nil) {
    fail(error);
  }
  Pipeline pipeline = [[device() newComputePipelineStateWithFunction:function error:&error] autorelease];
  return pipeline != nil ? pipeline : (fail(error), pipeline);
}

Pipeline pipeline(const char* name) {
  const bool value = true;
  MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
  [values setConstantValue:&value type:MTLDataTypeBool atIndex:3];
  return pipeline_with(name, values);
}

id<MTLBuffer> buffer(NSUInteger length) {
  id<MTLBuffer> made = [[device() newBufferWithLength:length options:MTLResourceStorageModeShared] autorelease];
  return made;
}

void encode(const std::function<void(Encoder)>& commands) {
  at::mps::dispatch_sync_with_rethrow(stream()->queue(), ^{
    commands(stream()->commandEncoder());
  });
}

void dispatch(Encoder encoder, NSUInteger threads = 32, NSUInteger threadgroups = 1) {
  [encoder dispatchThreadgroups:MTLSizeMake(threadgroups, 1, 1) threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
}

id<MTLBuffer> filled(NSUInteger length) {
  id<MTLBuffer> made = buffer(length);
  encode([&](Encoder encoder) {
    [encoder setComputePipelineState:pipeline("plain")];
    [encoder setBuffer:made offset:0 atIndex:0];
    dispatch(encoder, 32, length / 128);
  });
  return made;
}

struct Fill {
  uint32_t count = 32;
  id<MTLBuffer> x = filled(128);
  id<MTLBuffer> y = buffer(128);

  void bind(Encoder encoder) const {
    [encoder setComputePipelineState:pipeline("fill")];
    [encoder setBuffer:y offset:0 atIndex:0];
    [encoder setBuffer:x offset:0 atIndex:1];
    [encoder setBytes:&count length:sizeof count atIndex:2];
  }
};

void run(const char* kernel, const std::function<void(Encoder)>& commands, NSUInteger threads = 32) {
  encode([&](Encoder encoder) {
    [encoder setComputePipelineState:pipeline(kernel)];
    [encoder setBuffer:buffer(4096) offset:0 atIndex:0];
    commands(encoder);
    dispatch(encoder, threads);
  });
}

using Function = std::function<void()>;

Function encoded(std::function<void(Encoder)> commands) {
  return [commands] { encode(commands); };
}

Function plain(NSUInteger length, NSUInteger offset = 0, NSUInteger threadgroups = 1) {
  return encoded([=](Encoder encoder) {
    [encoder setComputePipelineState:pipeline("plain")];
    [encoder setBuffer:buffer(length) offset:offset atIndex:0];
    dispatch(encoder, 32, threadgroups);
  });
}

// A right use but for what is changed before the dispatch.
Function fill_but(std::function<void(Encoder, const Fill&)> change) {
  return [change] {
    const Fill fill;
    encode([&](Encoder encoder) {
      fill.bind(encoder);
      change(encoder, fill);
      dispatch(encoder);
    });
  };
}

const std::map<std::string, Function>& functions() {
  static const std::map<std::string, Function> functions = {
      {"nothing",
       [] {
         const Fill fill;
         encode([&](Encoder encoder) {
           fill.bind(encoder);
           dispatch(encoder);
         });
         if (static_cast<float*>([fill.y contents])[31] != 2.0f) {
           throw std::runtime_error("wrong result");
         }
       }},
      // --- The queue and the encoder ---
      {"nested dispatch_sync", encoded([](Encoder) {
         dispatch_sync(
             stream()->queue(),
             ^{
             });
       })},
      {"encoder taken off the queue", [] { stream()->commandEncoder(); }},
      {"encoder used off the queue",
       [] {
         Encoder kept = nil;
         Encoder* place = &kept;
         encode([&](Encoder encoder) { *place = encoder; });
         [kept setBuffer:nil offset:0 atIndex:0];
       }},
      {"encoder used after it ended", encoded([](Encoder encoder) {
         [encoder retain];
         stream()->endKernelCoalescing();
         [encoder setBuffer:nil offset:0 atIndex:0];
       })},
      {"endEncoding", encoded([](Encoder encoder) { [encoder endEncoding]; })},
      {"command buffer", [] { stream()->commandBuffer(); }},
      {"exception leaves dispatch_sync",
       [] {
         dispatch_sync(stream()->queue(), ^{
           throw std::runtime_error("thrown in a block");
         });
       }},
      // --- Bindings ---
      {"offset past the end", encoded([](Encoder encoder) { [encoder setBuffer:buffer(128) offset:128 atIndex:0]; })},
      {"buffer index 31", encoded([](Encoder encoder) { [encoder setBuffer:nil offset:0 atIndex:31]; })},
      {"setBytes of 5000 bytes", encoded([](Encoder encoder) {
         const std::vector<char> bytes(5000);
         [encoder setBytes:bytes.data() length:bytes.size() atIndex:0];
       })},
      {"unbound buffer",
       [] {
         const Fill fill;
         stream()->synchronize(at::mps::SyncType::COMMIT_AND_WAIT);
         encode([&](Encoder encoder) {
           [encoder setComputePipelineState:pipeline("fill")];
           [encoder setBuffer:fill.y offset:0 atIndex:0];
           dispatch(encoder);
         });
       }},
      {"stale buffer",
       [] {
         const Fill fill;
         encode([&](Encoder encoder) {
           fill.bind(encoder);
           dispatch(encoder);
         });
         encode([&](Encoder encoder) {
           [encoder setComputePipelineState:pipeline("plain")];
           dispatch(encoder);
         });
       }},
      {"stale pipeline",
       [] {
         const Fill fill;
         encode([&](Encoder encoder) { fill.bind(encoder); });
         encode([&](Encoder encoder) { dispatch(encoder); });
       }},
      {"nil that the kernel reads",
       fill_but([](Encoder encoder, const Fill&) { [encoder setBuffer:nil offset:0 atIndex:1]; })},
      {"setBytes for a writable argument", encoded([](Encoder encoder) {
         const float value = 0;
         [encoder setComputePipelineState:pipeline("plain")];
         [encoder setBytes:&value length:sizeof value atIndex:0];
         dispatch(encoder);
       })},
      {"setBytes shorter than the argument",
       fill_but([](Encoder encoder, const Fill& fill) { [encoder setBytes:&fill.count length:2 atIndex:2]; })},
      {"misaligned offset", plain(4096, 2)},
      {"output that is also an input",
       fill_but([](Encoder encoder, const Fill& fill) { [encoder setBuffer:fill.y offset:0 atIndex:1]; })},
      // --- Grids ---
      {"2048 threads", [] { run("plain", [](Encoder) {}, 2048); }},
      {"no threads", [] { run("plain", [](Encoder) {}, 0); }},
      {"more threads than the pipeline takes", [] { run("narrow", [](Encoder) {}, 128); }},
      {"no threadgroups", plain(4096, 0, 0)},
      {"dispatch without a pipeline",
       [] {
         stream()->synchronize(at::mps::SyncType::COMMIT_AND_WAIT);
         encode([](Encoder encoder) { dispatch(encoder); });
       }},
      {"threadgroup memory of 24 bytes",
       [] { run("scratch", [](Encoder encoder) { [encoder setThreadgroupMemoryLength:24 atIndex:0]; }); }},
      {"threadgroup memory of 40000 bytes",
       [] { run("scratch", [](Encoder encoder) { [encoder setThreadgroupMemoryLength:40000 atIndex:0]; }); }},
      {"too little threadgroup memory",
       [] { run("scratch", [](Encoder encoder) { [encoder setThreadgroupMemoryLength:64 atIndex:0]; }); }},
      // --- What the shader does wrong ---
      {"write past the end", plain(64)},
      {"read of uninitialised memory",
       [] {
         Fill fill;
         fill.x = buffer(128);
         encode([&](Encoder encoder) {
           fill.bind(encoder);
           dispatch(encoder);
         });
       }},
      {"race", [] { run("racing", [](Encoder) {}); }},
      // --- Libraries and pipelines ---
      {"unknown function", [] { pipeline("absent"); }},
      {"function constant without a value",
       [] { pipeline_with("fill", [[MTLFunctionConstantValues new] autorelease]); }},
      {"function constant of the wrong type",
       [] {
         const float value = 1;
         MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
         [values setConstantValue:&value type:MTLDataTypeFloat atIndex:3];
         pipeline_with("fill", values);
       }},
      {"source that does not compile",
       [] {
         NSError* error = nil;
         if ([device() newLibraryWithSource:@"kernel void broken() { nonsense; }" options:nil error:&error] == nil) {
           fail(error);
         }
       }},
      {"language of a later macOS",
       [] {
         NSError* error = nil;
         MTLCompileOptions* options = [[MTLCompileOptions new] autorelease];
         options.languageVersion = MTLLanguageVersion4_0;
         if ([device() newLibraryWithSource:@(source) options:options error:&error] == nil) {
           fail(error);
         }
       }},
      {"mathFloatingPointFunctions before macOS 15",
       [] { [[MTLCompileOptions new] autorelease].mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise; }},
      {"mathMode before macOS 15", [] { [[MTLCompileOptions new] autorelease].mathMode = MTLMathModeSafe; }},
      {"library data that is none",
       [] {
         NSError* error = nil;
         dispatch_data_t data = dispatch_data_create("text", 4, nullptr, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
         id<MTLLibrary> made = [device() newLibraryWithData:data error:&error];
         dispatch_release(data);
         if (made == nil) {
           fail(error);
         }
       }},
      // --- Objects ---
      {"method that the class does not have",
       [] { [static_cast<NSMutableDictionary*>(static_cast<id>(@"text")) setObject:@"a" forKey:@"b"]; }},
      {"autorelease without a pool", [] { [NSString stringWithUTF8String:"text"]; }},
  };
  return functions;
}

}  // namespace

std::vector<std::string> softmetal_misuses() {
  std::vector<std::string> names;
  for (const auto& [name, function] : functions()) {
    names.push_back(name);
  }
  return names;
}

void softmetal_misuse(const std::string& name) {
  if (name == "autorelease without a pool") {
    functions().at(name)();
    return;
  }
  NSAutoreleasePool* pool = [NSAutoreleasePool new];
  try {
    functions().at(name)();
  } catch (...) {
    [pool drain];
    throw;
  }
  [pool drain];
}
