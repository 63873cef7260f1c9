// In the place of the header that kernel-builder generates: a library of all shaders, compiled beforehand. Here that is
// the list of their files.
#pragma once

#include <Metal/Metal.h>
#include <dispatch/dispatch.h>

#include <cstring>

extern "C" dispatch_queue_t dispatch_get_main_queue(void);

namespace softmetal_metallib {

inline id<MTLLibrary> createLibrary(id<MTLDevice> device, NSError** error = nullptr) {
  constexpr const char* data = "MTLB" SOFTMETAL_SHADERS;
  dispatch_data_t copy =
      dispatch_data_create(data, std::strlen(data), dispatch_get_main_queue(), DISPATCH_DATA_DESTRUCTOR_DEFAULT);
  NSError* reason = nil;
  id<MTLLibrary> library = [device newLibraryWithData:copy error:&reason];
  dispatch_release(copy);
  if (error != nullptr) {
    *error = reason;
  }
  return library;
}

}  // namespace softmetal_metallib
