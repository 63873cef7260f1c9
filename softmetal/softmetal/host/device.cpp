// Settings, logs and memory of the software device.
#include "device.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace softmetal {
namespace {

std::mutex mutex;
Settings current_settings;
std::atomic<uint64_t> changes{0};
std::atomic<bool> idle{false};
Logs current_logs;
uint64_t blocks = 0;

int version_of(const std::string& text) {
  const size_t dot = text.find('.');
  return std::stoi(text) * 100 + (dot == std::string::npos ? 0 : std::stoi(text.substr(dot + 1)));
}

}  // namespace

Settings settings() {
  std::lock_guard lock(mutex);
  return current_settings;
}

void set(const Settings& settings) {
  std::lock_guard lock(mutex);
  current_settings = settings;
  idle = settings.idle;
  ++changes;
}

bool is_idle() { return idle.load(std::memory_order_relaxed); }

uint64_t settings_version() { return changes.load(std::memory_order_relaxed); }

int gpu_generation() {
  const std::string name = settings().gpu;
  const size_t digits = name.find_first_of("0123456789");
  return digits == std::string::npos ? 0 : std::atoi(name.c_str() + digits);
}

Logs logs() {
  std::lock_guard lock(mutex);
  return current_logs;
}

void clear_logs() {
  std::lock_guard lock(mutex);
  current_logs = {};
}

std::vector<LaunchRecord>& launches_of_this_thread() {
  thread_local std::vector<LaunchRecord> launches;
  return launches;
}

void add(LaunchRecord record) {
  launches_of_this_thread().push_back(record);
  std::lock_guard lock(mutex);
  current_logs.launches.push_back(std::move(record));
}

void add(CompileRecord record) {
  std::lock_guard lock(mutex);
  current_logs.compiles.push_back(std::move(record));
}

void add_fallback(std::string op) {
  std::lock_guard lock(mutex);
  current_logs.fallbacks.push_back(std::move(op));
}

void add_transfer() {
  std::lock_guard lock(mutex);
  ++current_logs.transfers;
}

void add_synchronization() {
  std::lock_guard lock(mutex);
  ++current_logs.synchronizations;
}

void count(const std::string& name) {
  std::lock_guard lock(mutex);
  ++current_logs.counts[name];
}

void record_error(std::string text) {
  std::lock_guard lock(mutex);
  current_logs.errors.push_back(std::move(text));
}

void misuse(const std::string& text) {
  record_error(text);
  throw Misuse("software Metal device: " + text);
}

Runtime& runtime() {
  static auto* runtime = new Runtime;
  return *runtime;
}

void begin_block() {
  std::lock_guard lock(mutex);
  ++blocks;
}

uint64_t block_number() {
  std::lock_guard lock(mutex);
  return blocks;
}

// Guard zones and what nothing was written to hold 0xFF: NaN in every floating-point type.
Memory::Memory(size_t size) : size_(size), written_(size) {
  const size_t total = (guard + size + guard + 255) / 256 * 256;
  block_ = static_cast<uint8_t*>(std::aligned_alloc(256, total));
  if (block_ == nullptr) {
    throw std::bad_alloc();
  }
  std::memset(block_, 0xFF, total);
}

Memory::~Memory() { std::free(block_); }

bool Memory::guards_intact() const {
  // Each byte is as the one before it: memcmp looks at many at a time, and every buffer's end is checked.
  const auto intact = [](const uint8_t* begin) {
    return begin[0] == 0xFF && std::memcmp(begin, begin + 1, guard - 1) == 0;
  };
  return intact(block_) && intact(block_ + guard + size_);
}

}  // namespace softmetal

bool softmetal_available(const char* platform_and_version) {
  const std::string text = platform_and_version;
  const size_t space = text.find(' ');
  if (text.substr(0, space) != "macOS" || space == std::string::npos) {
    softmetal::misuse("__builtin_available(" + text + ") does not ask for a version of macOS");
  }
  return softmetal::settings().macos >= softmetal::version_of(text.substr(space + 1));
}
