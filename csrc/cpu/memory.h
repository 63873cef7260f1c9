// Working memory. A thread keeps a little of it for its next call, so that products of few rows allocate none.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace quantization_mlx::cpu {

// Aligned for any vector, and not initialised.
class WorkingMemory {
 public:
  float* floats(int64_t count) {
    if (count > count_) {
      memory_.reset();
      memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64))));
      count_ = count;
    }
    return memory_.get();
  }

  void release_beyond(int64_t count) {
    if (count_ > count) {
      memory_.reset();
      count_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t count_ = 0;
};

// One call's use of the memory of its thread.
class BorrowedMemory {
 public:
  BorrowedMemory() = default;
  BorrowedMemory(const BorrowedMemory&) = delete;
  BorrowedMemory& operator=(const BorrowedMemory&) = delete;
  ~BorrowedMemory() {
    memory().packed.release_beyond(kept_floats);
    memory().scratch.release_beyond(kept_floats);
  }

  // For rows of x.
  float* packed(int64_t floats) { return memory().packed.floats(floats); }
  // For panels and results of all threads that serve the call.
  float* scratch(int64_t floats) { return memory().scratch.floats(floats); }

 private:
  static constexpr int64_t kept_floats = 1 << 20;
  struct ThreadMemory {
    WorkingMemory packed;
    WorkingMemory scratch;
  };

  static ThreadMemory& memory() {
    static thread_local ThreadMemory memory;
    return memory;
  }
};

}  // namespace quantization_mlx::cpu
