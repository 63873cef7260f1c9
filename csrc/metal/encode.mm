#include "encode.h"

#import <Metal/Metal.h>

#include <ATen/mps/MPSStream.h>
#include <ATen/ops/empty.h>

namespace quantization_mlx::metal {
namespace {

using namespace gpu;

// The data pointer of an MPS tensor's storage is the buffer.
id<MTLBuffer> buffer_of(const at::Tensor& tensor) { return __builtin_bit_cast(id<MTLBuffer>, tensor.storage().data()); }

void set_argument(
    id<MTLComputeCommandEncoder> encoder,
    const Operands& operands,
    const Argument& argument,
    NSUInteger index) {
  if (argument.role == Role::none) {
    // Every op of torch uses this encoder, and what the last one bound here is still bound. No kernel that runs has
    // this argument: its mode or a function constant leaves it out.
    [encoder setBuffer:nil offset:0 atIndex:index];
    return;
  }
  if (argument.role == Role::numbers) {
    [encoder setBytes:&operands.numbers length:sizeof operands.numbers atIndex:index];
    return;
  }
  const at::Tensor& tensor = *operands[argument.role];
  const int64_t elements = tensor.storage_offset() + argument.offset;
  [encoder setBuffer:buffer_of(tensor) offset:static_cast<NSUInteger>(elements) * tensor.element_size() atIndex:index];
}

void encode_launch(
    id<MTLComputeCommandEncoder> encoder,
    Pipeline pipeline,
    const Launch& launch,
    const Operands& operands) {
  [encoder setComputePipelineState:static_cast<id<MTLComputePipelineState>>(pipeline)];
  for (int i = 0; i < launch.argument_count; ++i) {
    if (i != launch.params_index) {
      set_argument(encoder, operands, launch.arguments[i], i);
    }
  }
  [encoder setBytes:launch.params.data() length:launch.params_size atIndex:launch.params_index];
  const auto [x, y, z] = launch.threadgroups;
  [encoder dispatchThreadgroups:MTLSizeMake(x, y, z) threadsPerThreadgroup:MTLSizeMake(launch.kernel.threads, 1, 1)];
}

}  // namespace

void encode(const PreparedPlan& prepared, Operands operands) {
  const Plan& plan = prepared.plan;
  at::Tensor workspace;
  if (plan.workspace > 0) {
    workspace = at::empty({plan.workspace}, operands[Role::y]->options().dtype(at::kFloat));
    operands[Role::workspace] = &workspace;
  }
  const auto& pipelines = prepared.pipelines;  // a block would copy what it captures by value
  const auto& launches = plan.launches;
  const auto& tensors = operands;
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  at::mps::dispatch_sync_with_rethrow(stream->queue(), ^() {
    @autoreleasepool {
      id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();
      for (size_t i = 0; i < launches.size(); ++i) {
        encode_launch(encoder, pipelines[i], launches[i], tensors);
      }
    }
  });
}

}  // namespace quantization_mlx::metal
