// What the parts of the software device's host side share: its settings, its logs, its memory, and the way to the
// shader compiler, which is written in Python.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../msl/runtime.h"

#ifdef __OBJC__
#include <dispatch/dispatch.h>
#endif

namespace softmetal {

// --- Settings -------------------------------------------------------------------------------------------------------

struct Settings {
  std::string gpu = "applegpu_g17s";  // what MTLArchitecture.name says
  int macos = 2602;  // 26.2
  std::string corrupted;  // results of kernels whose names contain this are spoilt; empty: of none
  uint32_t seed = 0;  // of the order of threads and threadgroups; 0: in order
  bool idle = false;  // commands are taken and not run, to measure what encodes them
};
Settings settings();
void set(const Settings& settings);
uint64_t settings_version();  // another number after each change
bool is_idle();

// 13 is M1, 17 is M5.
int gpu_generation();

// --- Logs -----------------------------------------------------------------------------------------------------------

struct LaunchRecord {
  std::string kernel;
  std::map<int, std::string> constants;  // bytes by index
  uint64_t threadgroups[3];
  uint64_t threads[3];
  SoftmetalCounters counters;
  std::map<int, uint64_t> bytes_read;  // by index of a buffer; those that share one have the sum
};

struct CompileRecord {
  std::string source;
  std::map<std::string, std::string> macros;
  int version;  // 310
  bool safe_math;
};

struct Logs {
  std::vector<std::string> errors;
  std::vector<LaunchRecord> launches;
  std::vector<CompileRecord> compiles;
  std::vector<std::string> fallbacks;  // names of ops that ran on the CPU instead
  int64_t transfers = 0;  // copies between host and device
  int64_t synchronizations = 0;
  std::map<std::string, int64_t> counts;  // of what else is counted, by name
};
Logs logs();
void clear_logs();
void add(LaunchRecord record);
void add(CompileRecord record);
void add_fallback(std::string op);
void add_transfer();
void add_synchronization();
void count(const std::string& name);
std::vector<LaunchRecord>& launches_of_this_thread();

// Kept until a test asks for it, so that no caller can swallow it.
void record_error(std::string text);

// What a real device would answer with undefined behaviour or the end of the process.
class Misuse : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void misuse(const std::string& text);

std::map<std::string, int64_t> live_objects();

// --- The shader compiler --------------------------------------------------------------------------------------------

class CompileFailure : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual const SoftmetalPipeline* pipeline() const = 0;
  virtual std::string describe(const SoftmetalError& error) const = 0;
};

struct FunctionConstant {
  int index;
  std::string name;
  std::string type;  // as the source has it
  bool required;
};

class Shaders {
 public:
  virtual ~Shaders() = default;
  virtual std::vector<std::string> kernels() const = 0;
  virtual bool uses_tensor_ops(const std::string& kernel) const = 0;
  // Those that a kernel uses. Throws CompileFailure.
  virtual std::vector<FunctionConstant> constants(const std::string& kernel) const = 0;
  // Throws CompileFailure, also where a constant that the kernel uses is missing or has another size.
  virtual std::shared_ptr<Kernel> kernel(const std::string& name, const std::map<int, std::string>& constants) = 0;
};

class Compiler {
 public:
  virtual ~Compiler() = default;
  virtual std::shared_ptr<Shaders> compile(
      const std::string& source,
      const std::map<std::string, std::string>& macros,
      int version) = 0;
  // The software device's metallib: "MTLB" and the paths of .metal files, one a line.
  virtual std::shared_ptr<Shaders> load(const std::string& data) = 0;
};

struct Runtime {
  std::unique_ptr<Compiler> compiler;
  decltype(&softmetal_launch) launch = nullptr;
  decltype(&softmetal_free_report) free_report = nullptr;
};
Runtime& runtime();

// --- Memory ---------------------------------------------------------------------------------------------------------

// An MTLBuffer's memory, between guard zones and with a mark for each byte that holds a value.
class Memory {
 public:
  static constexpr size_t guard = 4096;

  explicit Memory(size_t size);
  ~Memory();
  Memory(const Memory&) = delete;

  uint8_t* data() { return block_ + guard; }
  size_t size() const { return size_; }
  uint8_t* written() { return written_.data(); }
  bool guards_intact() const;

 private:
  size_t size_;
  uint8_t* block_;
  std::vector<uint8_t> written_;
};

// An MTLBuffer, as torch's MPS tensors have it for their storage's data.
void* new_buffer(size_t size);
void release_buffer(void* buffer);
Memory& memory_of(void* buffer);

// --- Between the parts ----------------------------------------------------------------------------------------------

// A new turn of the stream's queue begins: what was bound before is another op's.
void begin_block();
uint64_t block_number();

// Ends the encoder that all ops share, as torch does before it copies.
void end_shared_encoder();

#ifdef __OBJC__
bool on_queue(dispatch_queue_t queue);
const std::string& bytes_of(dispatch_data_t data);
#endif

}  // namespace softmetal
