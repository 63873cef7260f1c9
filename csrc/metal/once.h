// What is made once: by its key, and for each GPU. Plain C++.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "device.h"

namespace quantization_mlx::metal {

// One object (a pointer) by its key, made by the first thread that asks: others wait for this one alone.
template <typename Key, typename Object, typename Hash = std::hash<Key>, typename Equal = std::equal_to<Key>>
class Once {
 public:
  template <typename Make>
  Object get(const Key& key, const Make& make) {
    Entry& entry = entry_of(key);
    const std::lock_guard lock(entry.mutex);
    if (entry.object == nullptr) {
      entry.object = make();
    }
    return entry.object;
  }

 private:
  struct Entry {
    std::mutex mutex;
    Object object = nullptr;
  };

  Entry& entry_of(const Key& key) {
    const std::lock_guard lock(mutex_);
    std::unique_ptr<Entry>& entry = entries_[key];
    if (entry == nullptr) {
      entry = std::make_unique<Entry>();
    }
    return *entry;
  }

  std::mutex mutex_;
  std::unordered_map<Key, std::unique_ptr<Entry>, Hash, Equal> entries_;
};

// The State of the GPU that torch runs on. Never freed.
template <typename State>
State& of_current_gpu() {
  static std::mutex mutex;
  static auto* by_gpu = new std::map<const void*, std::unique_ptr<State>>;
  const std::lock_guard lock(mutex);
  std::unique_ptr<State>& found = (*by_gpu)[current_gpu()];
  if (found == nullptr) {
    found = std::make_unique<State>();
  }
  return *found;
}

}  // namespace quantization_mlx::metal
