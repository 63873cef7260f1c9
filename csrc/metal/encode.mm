#include "encode.h"

#import <Metal/Metal.h>

#include <ATen/mps/MPSStream.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include "library.h"

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
  const at::Tensor& tensor = operand(operands, argument.role);
  if (!tensor.defined()) {
    // Every op of torch uses this encoder, and what the last one bound here is still bound.
    [encoder setBuffer:nil offset:0 atIndex:index];
    return;
  }
  const int64_t elements = tensor.storage_offset() + argument.offset;
  [encoder setBuffer:buffer_of(tensor) offset:static_cast<NSUInteger>(elements) * tensor.element_size() atIndex:index];
}

void encode_launch(
    id<MTLComputeCommandEncoder> encoder,
    id<MTLComputePipelineState> pipeline,
    const Launch& launch,
    const Operands& operands) {
  [encoder setComputePipelineState:pipeline];
  for (int i = 0; i < launch.argument_count; ++i) {
    if (i != launch.params_index) {
      set_argument(encoder, operands, launch.arguments[i], i);
    }
  }
  [encoder setBytes:launch.params.data() length:launch.params_size atIndex:launch.params_index];
  const auto [x, y, z] = launch.threadgroups;
  [encoder dispatchThreadgroups:MTLSizeMake(x, y, z) threadsPerThreadgroup:MTLSizeMake(launch.threads, 1, 1)];
}

}  // namespace

void prepare(const gpu::Plan& plan) {
  for (const Launch& launch : plan.launches) {
    pipeline(launch);
  }
}

void encode(const gpu::Plan& plan, Operands operands) {
  if (plan.launches.empty()) {
    return;
  }
  if (plan.workspace > 0) {
    const at::Tensor& y = operand(operands, Role::y);
    operand(operands, Role::partial_sums) = at::empty({plan.workspace}, y.options().dtype(at::kFloat));
  }
  // Compiling takes long and must not hold the stream's queue.
  c10::SmallVector<id<MTLComputePipelineState>, 4> pipelines;
  for (const Launch& launch : plan.launches) {
    pipelines.push_back(pipeline(launch));
  }
  const auto& states = pipelines;  // a block would copy them otherwise
  const auto& tensors = operands;
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  at::mps::dispatch_sync_with_rethrow(stream->queue(), ^() {
    @autoreleasepool {
      id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();
      for (size_t i = 0; i < plan.launches.size(); ++i) {
        encode_launch(encoder, states[i], plan.launches[i], tensors);
      }
    }
  });
}

}  // namespace quantization_mlx::metal
