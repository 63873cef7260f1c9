// Working memory.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace quantization_mlx::cpu {

// That of one call: floats that are not initialised, aligned for any vector. The thread keeps a little for its next
// call, so that products of few rows allocate none.
class WorkingMemory {
 public:
  // What all threads of a call read, and what each of them writes. In one piece of memory, what all read would begin at
  // another place for each shape, where another core has just written.
  enum class Use { read_by_all, written_by_each };

  explicit WorkingMemory(Use use) : use_(use) {}
  WorkingMemory(const WorkingMemory&) = delete;
  WorkingMemory& operator=(const WorkingMemory&) = delete;
  ~WorkingMemory() {
    if (kept().count > most_kept) {
      kept() = {};
    }
  }

  // Those of the last request are lost.
  float* floats(int64_t count) {
    if (count > kept().count) {
      kept() = {};
      kept().floats.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64))));
      kept().count = count;
    }
    return kept().floats.get();
  }

 private:
  static constexpr int64_t most_kept = 1 << 21;

  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  struct Kept {
    std::unique_ptr<float[], Free> floats;
    int64_t count = 0;
  };

  Kept& kept() const {
    static thread_local Kept kept[2];
    return kept[static_cast<int>(use_)];
  }

  const Use use_;
};

}  // namespace quantization_mlx::cpu
