// torch's MPS stream and device, as its headers declare them.
#include <ATen/mps/MPSDevice.h>
#include <ATen/mps/MPSStream.h>

#include <exception>
#include <map>
#include <mutex>
#include <string>

#include "device.h"

id<MTLComputeCommandEncoder> softmetal_new_encoder(dispatch_queue_t queue);
void softmetal_end_encoder(id<MTLComputeCommandEncoder> encoder);

namespace at::mps {

MPSDevice::MPSDevice() : _mtl_device(MTLCreateSystemDefaultDevice()) {}

MPSDevice::~MPSDevice() = default;

// Another one for each GPU that the software device claims to be, as in processes of their own.
MPSDevice* MPSDevice::getInstance() {
  static std::mutex mutex;
  static auto* devices = new std::map<std::string, MPSDevice*>;
  thread_local uint64_t version = 0;
  thread_local MPSDevice* current = nullptr;
  if (const uint64_t newest = softmetal::settings_version(); current == nullptr || version != newest) {
    const softmetal::Settings settings = softmetal::settings();
    const std::lock_guard lock(mutex);
    MPSDevice*& device = (*devices)[settings.gpu + " " + std::to_string(settings.macos)];
    device = device != nullptr ? device : new MPSDevice;
    current = device;
    version = newest;
  }
  return current;
}

bool MPSDevice::isMacOS13Plus(MacOSVersion version) const {
  constexpr int versions[] = {1404, 1500, 1501, 1502, 2600, 2604};
  return softmetal::settings().macos >= versions[static_cast<int>(version)];
}

std::string MPSDevice::getName() const { return softmetal::settings().gpu; }

bool is_available() { return true; }

bool is_macos_13_or_newer(MacOSVersion version) { return MPSDevice::getInstance()->isMacOS13Plus(version); }

bool is_apple_family_or_newer(AppleGPUFamily family) {
  return [MPSDevice::getInstance()->device() supportsFamily:static_cast<MTLGPUFamily>(family)];
}

MPSStream::MPSStream(Stream stream)
    : _stream(stream),
      _commandQueue([MPSDevice::getInstance()->device() newCommandQueue]),
      _serialQueue(dispatch_queue_create("mps", nullptr)) {}

MPSStream::~MPSStream() = default;

MTLDevice_t MPSStream::device() const { return MPSDevice::getInstance()->device(); }

MPSCommandBuffer_t MPSStream::commandBuffer() {
  softmetal::misuse("the stream's command buffer is torch's; commands go through its encoder");
}

MTLComputeCommandEncoder_t MPSStream::commandEncoder() {
  if (!softmetal::on_queue(_serialQueue)) {
    softmetal::misuse("commandEncoder() is called outside of dispatch_sync on the stream's queue");
  }
  if (_commandEncoder == nil) {
    _commandEncoder = softmetal_new_encoder(_serialQueue);
  }
  return _commandEncoder;
}

void MPSStream::endKernelCoalescing() {
  if (_commandEncoder != nil) {
    softmetal_end_encoder(_commandEncoder);
    _commandEncoder = nil;
  }
}

void MPSStream::synchronize(SyncType type) {
  endKernelCoalescing();
  if (type == SyncType::COMMIT_AND_WAIT) {
    softmetal::add_synchronization();
  }
}

MPSStream* getDefaultMPSStream() {
  static auto* stream = new MPSStream(Stream(Stream::DEFAULT, Device(kMPS, 0)));
  return stream;
}

MPSStream* getCurrentMPSStream() { return getDefaultMPSStream(); }

void dispatch_sync_with_rethrow(dispatch_queue_t queue, void (^block)()) {
  __block std::exception_ptr thrown;
  dispatch_sync(queue, ^{
    try {
      block();
    } catch (...) {
      thrown = std::current_exception();
    }
  });
  if (thrown) {
    std::rethrow_exception(thrown);
  }
}

}  // namespace at::mps

void softmetal::end_shared_encoder() {
  auto* stream = at::mps::getDefaultMPSStream();
  if (on_queue(stream->queue())) {
    stream->endKernelCoalescing();
  } else {
    dispatch_sync(stream->queue(), ^{
      stream->endKernelCoalescing();
    });
  }
}
