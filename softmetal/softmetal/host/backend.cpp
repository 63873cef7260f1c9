// As much of a torch backend for device "mps" as tests need: memory, views and copies; every other op of torch runs on
// the CPU. An op of anybody else's that has no kernel for MPS is an error and never runs on the CPU.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/mps/MPSDevice.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "device.h"

namespace {

using at::Tensor;

const at::Device mps(at::kMPS, 0);

// --- Memory ---------------------------------------------------------------------------------------------------------

// A storage's data is its MTLBuffer, or nil where it has no bytes.
class BufferAllocator final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t size) override {
    void* buffer = size > 0 ? softmetal::new_buffer(size) : nullptr;
    return {buffer, buffer, &release, mps};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* destination, const void* source, size_t count) const override {
    softmetal::Memory& to = softmetal::memory_of(destination);
    softmetal::Memory& from = softmetal::memory_of(const_cast<void*>(source));
    std::memcpy(to.data(), from.data(), count);
    std::memcpy(to.written(), from.written(), count);
  }

 private:
  static void release(void* buffer) {
    if (buffer != nullptr) {
      softmetal::release_buffer(buffer);
    }
  }
};

BufferAllocator allocator;

// The tensor's elements as a tensor of the host's; it must not outlive the tensor.
Tensor host_view(const Tensor& tensor) {
  if (tensor.is_cpu() || tensor.numel() == 0) {
    return tensor.is_cpu() ? tensor : at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
  }
  uint8_t* data = softmetal::memory_of(tensor.storage().mutable_data()).data();
  return at::from_blob(
      data + tensor.storage_offset() * tensor.element_size(), tensor.sizes(), tensor.strides(),
      tensor.options().device(at::kCPU).requires_grad(false));
}

void mark_written(const Tensor& tensor) {
  if (tensor.is_cpu() || tensor.numel() == 0) {
    return;
  }
  const int64_t size = tensor.element_size();
  at::DimVector sizes(tensor.sizes());
  at::DimVector strides;
  for (const int64_t stride : tensor.strides()) {
    strides.push_back(stride * size);
  }
  sizes.push_back(size);
  strides.push_back(1);
  uint8_t* written = softmetal::memory_of(tensor.storage().mutable_data()).written();
  at::from_blob(written + tensor.storage_offset() * size, sizes, strides, at::kByte).fill_(1);
}

Tensor empty(
    c10::SymIntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  TORCH_CHECK_TYPE(type != at::kDouble, "MPS has no float64");
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::MPS), type, format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  TORCH_CHECK_TYPE(type != at::kDouble, "MPS has no float64");
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::MPS), type);
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t needed = at::detail::computeStorageNbytesContiguous(sizes, self.element_size(), self.storage_offset());
  const c10::Storage& storage = self.storage();
  if (storage.nbytes() < needed) {
    at::DataPtr data = allocator.allocate(needed);
    if (storage.nbytes() > 0) {
      allocator.copy_data(data.get(), storage.data(), storage.nbytes());
    }
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_(Tensor& self) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true);
  return self.set_(std::move(storage), 0, {0}, {});
}

// --- Copies ---------------------------------------------------------------------------------------------------------

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  if (!self.is_cpu()) {
    softmetal::end_shared_encoder();
  }
  if (self.device() != source.device()) {
    softmetal::add_transfer();
  }
  host_view(self).copy_(host_view(source.expand(self.sizes())));
  mark_written(self);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& destination, bool non_blocking) {
  Tensor target = destination;
  copy_(target, self, non_blocking);
  return destination;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& destination) {
  destination.resize_(self.sizes());
  return copy_from(self, destination, false);
}

at::Scalar local_scalar_dense(const Tensor& self) {
  softmetal::add_synchronization();
  return at::native::_local_scalar_dense_cpu(host_view(self));
}

// --- Attention ------------------------------------------------------------------------------------------------------

// torch looks for its own attention kernel for MPS, and a build that has none ends there. These are the ops of which
// that kernel is made, with gradients.
Tensor attention(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const std::optional<Tensor>& mask,
    double dropout,
    bool is_causal,
    std::optional<double> scale,
    bool enable_gqa) {
  std::optional<Tensor> added = mask;
  if (mask.has_value() && mask->scalar_type() == at::kBool) {
    added = at::zeros_like(*mask, query.options()).masked_fill_(mask->logical_not(), -INFINITY);
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, added, dropout, is_causal, std::nullopt, scale, enable_gqa));
}

TORCH_LIBRARY_IMPL(aten, AutogradMPS, m) { m.impl("scaled_dot_product_attention", attention); }

// --- All other ops --------------------------------------------------------------------------------------------------

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  if (name.rfind("aten::", 0) != 0) {
    softmetal::misuse("op " + name + " has no kernel for MPS and would run on the CPU");
  }
  softmetal::add_fallback(name);
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, MPS, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("set_", set_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("scaled_dot_product_attention", attention);
}

// --- The device -----------------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  at::DeviceType type() const override { return at::kMPS; }
  at::Device exchangeDevice(at::Device) const override { return mps; }
  at::Device getDevice() const override { return mps; }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const override { return c10::Stream(c10::Stream::DEFAULT, mps); }
  c10::Stream getDefaultStream(at::Device) const override { return c10::Stream(c10::Stream::DEFAULT, mps); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  at::DeviceIndex deviceCount() const noexcept override { return 1; }
  // Commands are done when they are given, and so is whatever an event marks.
  void record(void**, const c10::Stream&, const at::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override { softmetal::add_synchronization(); }
  void synchronizeStream(const c10::Stream&) const override { softmetal::add_synchronization(); }
  void synchronizeDevice(const at::DeviceIndex) const override { softmetal::add_synchronization(); }
};

C10_REGISTER_GUARD_IMPL(MPS, Guard)

struct Hooks final : at::MPSHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasMPS() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  bool isOnMacOSorNewer(unsigned major, unsigned minor) const override {
    return softmetal::settings().macos >= static_cast<int>(100 * major + minor);
  }
  at::Allocator* getMPSDeviceAllocator() const override { return &allocator; }
  at::Device getDeviceFromPtr(void*) const override { return mps; }
  // Random numbers come from the CPU's ops.
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(at::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void deviceSynchronize() const override { softmetal::add_synchronization(); }
  void commitStream() const override {}
  void emptyCache() const override {}
};

}  // namespace

namespace at::mps {
Allocator* GetMPSAllocator() { return &allocator; }
}  // namespace at::mps

void softmetal_register_backend() {
  c10::SetAllocator(at::kMPS, &allocator);
  // torch makes its hooks when it is first asked for MPS, which may have been long ago: ours take the place of theirs.
  static_assert(sizeof(Hooks) == sizeof(at::MPSHooksInterface));
  new (const_cast<at::MPSHooksInterface*>(&at::detail::getMPSHooks())) Hooks;
}
