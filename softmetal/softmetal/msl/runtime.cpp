// The software GPU: runs one compiled kernel over a grid and checks every memory access and every collective.
//
// A GPU thread is a fiber with its own stack, 32 fibers are a simdgroup, and threadgroups run one after another. A
// fiber runs until it reaches a collective (barrier, simdgroup operation) and continues when all its partners arrived.
// Kernels are compiled with clang's ThreadSanitizer instrumentation; the hooks it calls before each access are
// implemented here (no sanitizer runtime is linked), so the checker sees what the optimized kernel really loads and
// stores.
//
// Ordering rule of the race check: two accesses of one location, one of them a write, by different threads are ordered
// only if a barrier with the memory flag of that address space lies between them, of the threadgroup, or of the
// simdgroup where both threads are in one. Nothing orders two threadgroups of a launch.
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(__x86_64__)
#error "the software Metal device switches fibers with x86-64 instructions"
#endif

#include "runtime.h"

#define CALLER (reinterpret_cast<uint64_t>(__builtin_return_address(0)))

namespace {

constexpr uint32_t simd_width = 32;
constexpr uint32_t max_threads = 1024;
constexpr uint64_t threadgroup_memory_limit = 32768;
constexpr uint64_t stack_bytes = 256 * 1024;
constexpr uint64_t page_bytes = 4096;
constexpr uint64_t stack_stride = stack_bytes + page_bytes;
// Filled with poison and verified after the launch, so that even an access that no hook saw is noticed.
constexpr uint64_t guard_bytes = 16 * 1024;
constexpr uint64_t arena_bytes = 1 << 20;
constexpr uint64_t red_zone = 1024;
constexpr uint8_t poison = 0xFF;
constexpr size_t max_errors = 64;
constexpr uint32_t max_cell_shift = 2;
constexpr uint32_t slot_bytes = 32;
constexpr uint32_t slot_count = 256;

}  // namespace

// The values of function constants, and whether they have one. Kernels refer to slot i as softmetal_slot_i.
asm(R"(
.altmacro
.macro softmetal_symbol prefix, number, bytes
.globl softmetal_\prefix\()_\number
.type softmetal_\prefix\()_\number, @object
.size softmetal_\prefix\()_\number, \bytes
softmetal_\prefix\()_\number:
.zero \bytes
.endm
.macro softmetal_symbols prefix, bytes
.set softmetal_next, 0
.rept 256
softmetal_symbol \prefix, %softmetal_next, \bytes
.set softmetal_next, softmetal_next + 1
.endr
.endm
.data
.balign 32
softmetal_symbols slot, 32
softmetal_symbols defined, 1
.text
)");
extern "C" uint8_t softmetal_slot_0[slot_count * slot_bytes];
extern "C" uint8_t softmetal_defined_0[slot_count];

namespace {

enum Space { space_device = 0, space_threadgroup = 1 };
enum MemoryFlags { flag_device = 1, flag_threadgroup = 2 };
enum class State : uint8_t { running, in_collective, in_barrier, done };

// The codes that the shim headers pass.
enum class Collective : int { reduce, shuffle, vote, quad, multiply, matrix_load, matrix_store, barrier, tensor };

// What is remembered of one cell of memory: its last write and the reads since. Epochs are numbers of a clock that
// never goes back: a barrier with the memory flag of the space begins a new one, and so does a threadgroup. One
// simdgroup's lane mask is enough for an exact answer: a reader in another simdgroup conflicts with any writer here
// whatever its lane was.
struct Shadow {
  uint32_t write_epoch, read_epoch;
  uint32_t read_simdgroups, read_lanes;
  uint16_t write_simd_epoch, read_simd_epoch;
  uint16_t writer;
  uint8_t read_simdgroup;
  uint8_t write_atomic : 1, read_by_groups : 1;
};

// The shadow of a piece of memory, in cells as wide as its narrowest access so far.
struct ShadowMap {
  Shadow* cells = nullptr;
  uint64_t size = 0;  // bytes of memory
  uint32_t shift = 0;  // a cell is 1 << shift bytes
};

struct Fiber {
  void* stack_pointer;
  uint64_t site;
  Collective collective;
  uint32_t index, lane, simdgroup;
  uint32_t operand;
  uint32_t participants;
  uint32_t barrier_flags;
  // Matrix loads and stores so far. They need no meeting of the lanes; the next meeting compares them.
  uint32_t matrix_count;
  uint64_t matrix_trace, matrix_site;
  bool first_resumed;
  State state;
};

struct Simdgroup {
  uint32_t lanes;  // that exist; a partial simdgroup has fewer than 32
  uint32_t alive, runnable, waiting;
  uint32_t round;
  bool resumed;
  uint32_t epoch[2];
  // Two sets of slots: a lane may publish for the next collective before the last one has read this one's result.
  alignas(32) uint8_t slot[2][simd_width][64];
  alignas(32) uint8_t result[2][512];
};

struct Region {
  uint64_t begin, end;
  uint64_t guard;  // bytes on both sides that may be touched
  ShadowMap shadow;  // without cells: nothing can be written, so nothing can race
  uint8_t* written;  // null: all bytes hold values
  bool writable;
  SoftmetalAllocation* allocation;
};

struct ThreadgroupVariable {
  int id;
  uint64_t offset, size;
};

// Where a byte lies, for messages.
struct Place {
  const char* what;
  size_t number;
  uint64_t offset;
};

struct Error {
  std::string kind, message;
  uint64_t site;
  uint64_t count;
};

struct Device {
  char* stacks = nullptr;
  uint8_t* arena = nullptr;
  ShadowMap arena_shadow;
  uint8_t* arena_owner = nullptr;
  Fiber fibers[max_threads];
  Simdgroup simdgroups[max_threads / simd_width];

  // One launch.
  const SoftmetalLaunch* launch = nullptr;
  SoftmetalCounters counters{};
  std::vector<Error> errors;
  std::vector<Region> regions;
  std::vector<uint64_t> addresses, threadgroup_addresses;
  uint8_t* memory = nullptr;
  uint64_t memory_bytes = 0;
  std::vector<uint8_t> written;
  uint32_t clock = 0;
  uint32_t launch_epoch = 0;  // epochs before it belong to earlier launches, whose shadows are still there
  Shadow* shadow = nullptr;
  uint64_t shadow_bytes = 0;
  uint64_t memory_capacity = 0;
  uint64_t module_begin = 0, module_end = 0;
  uint64_t random = 0;
  uint64_t steps = 0;
  std::chrono::steady_clock::time_point deadline;
  size_t last_region = 0;
  bool abandoned = false;

  // One threadgroup.
  void* scheduler_stack = nullptr;
  Fiber* current = nullptr;
  uint32_t group_epoch = 0;
  uint32_t group[3] = {}, size[3] = {}, groups[3] = {};
  uint32_t thread_count = 0, simdgroup_count = 0, alive = 0, waiting = 0;
  uint32_t epoch[2] = {};
  uint64_t arena_used = 0, arena_declared = 0;
  std::vector<ThreadgroupVariable> variables;  // arena_owner holds a variable's number here plus 1
};

Device gpu;
sigjmp_buf crash_return;
volatile sig_atomic_t crash_handled = 0;

extern "C" void softmetal_switch(void** save, void* load);
asm(R"(
.globl softmetal_switch
.hidden softmetal_switch
.type softmetal_switch, @function
softmetal_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// --- Errors --------------------------------------------------------------------------------------------------------

__attribute__((format(printf, 3, 4))) void report(const char* kind, uint64_t site, const char* format, ...) {
  for (Error& error : gpu.errors) {
    if (error.site == site && error.kind == kind) {
      error.count++;
      return;
    }
  }
  if (gpu.errors.size() >= max_errors) {
    return;
  }
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string place;
  if (gpu.current) {
    char buffer[128];
    snprintf(
        buffer, sizeof buffer, " [threadgroup (%u, %u, %u), thread %u]", gpu.group[0], gpu.group[1], gpu.group[2],
        gpu.current->index);
    place = buffer;
  }
  gpu.errors.push_back({kind, text + place, site, 1});
}

// Leaves the launch: no fiber runs again. Kernels own nothing that would have to be destroyed.
[[noreturn]] void abandon() {
  Fiber* fiber = gpu.current;
  gpu.abandoned = true;
  gpu.current = nullptr;
  softmetal_switch(&fiber->stack_pointer, gpu.scheduler_stack);
  abort();
}

void check_time(uint64_t site) {
  if ((++gpu.steps & 0xFFFF) == 0 && std::chrono::steady_clock::now() > gpu.deadline) {
    report("timeout", site, "the launch takes longer than %.0f s", gpu.launch->seconds);
    abandon();
  }
}

// --- Scheduler -----------------------------------------------------------------------------------------------------

uint32_t next_random() {
  gpu.random ^= gpu.random << 13;
  gpu.random ^= gpu.random >> 7;
  gpu.random ^= gpu.random << 17;
  return static_cast<uint32_t>(gpu.random >> 16);
}

void resume(Fiber* next) {
  Fiber* previous = gpu.current;
  if (next == previous) {
    return;
  }
  gpu.current = next;
  softmetal_switch(&previous->stack_pointer, next->stack_pointer);
}

void set_runnable(Fiber& fiber) {
  fiber.state = State::running;
  gpu.simdgroups[fiber.simdgroup].runnable |= 1u << fiber.lane;
}

void release_lanes(Simdgroup& simdgroup, uint32_t lanes) {
  uint32_t base = static_cast<uint32_t>(&simdgroup - gpu.simdgroups) * simd_width;
  simdgroup.round++;
  simdgroup.resumed = false;
  simdgroup.waiting &= ~lanes;
  uint32_t flags = ~0u;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    Fiber& fiber = gpu.fibers[base + __builtin_ctz(rest)];
    fiber.participants = lanes;
    flags &= fiber.collective == Collective::barrier ? fiber.barrier_flags : 0;
    set_runnable(fiber);
  }
  simdgroup.epoch[space_device] += (flags & flag_device) != 0;
  simdgroup.epoch[space_threadgroup] += (flags & flag_threadgroup) != 0;
}

// All lanes must have made the same matrix loads and stores.
void compare_matrix_accesses(const Simdgroup& simdgroup, uint32_t lanes) {
  uint32_t base = static_cast<uint32_t>(&simdgroup - gpu.simdgroups) * simd_width;
  const Fiber* most = &gpu.fibers[base + __builtin_ctz(lanes)];
  bool equal = true;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const Fiber& fiber = gpu.fibers[base + __builtin_ctz(rest)];
    equal = equal && fiber.matrix_trace == most->matrix_trace;
    most = fiber.matrix_count > most->matrix_count ? &fiber : most;
  }
  if (equal) {
    return;
  }
  uint32_t together = 0;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    Fiber& fiber = gpu.fibers[base + __builtin_ctz(rest)];
    together |= (fiber.matrix_trace == most->matrix_trace) << fiber.lane;
  }
  report(
      "divergent-simd", most->matrix_site, "only lanes 0x%08x of 0x%08x reach this simdgroup operation", together,
      simdgroup.lanes);
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    Fiber& fiber = gpu.fibers[base + __builtin_ctz(rest)];
    fiber.matrix_trace = most->matrix_trace;
    fiber.matrix_count = most->matrix_count;
  }
}

// Every living lane waits somewhere. Those at one place go on; without the others, be they elsewhere or at their end,
// it was a divergent operation.
void complete_collective(Simdgroup& simdgroup) {
  if (!simdgroup.waiting) {
    return;
  }
  uint32_t base = static_cast<uint32_t>(&simdgroup - gpu.simdgroups) * simd_width;
  const Fiber& first = gpu.fibers[base + __builtin_ctz(simdgroup.waiting)];
  uint32_t together = 0;
  for (uint32_t rest = simdgroup.waiting; rest; rest &= rest - 1) {
    const Fiber& fiber = gpu.fibers[base + __builtin_ctz(rest)];
    if (fiber.collective == first.collective && fiber.site == first.site) {
      together |= 1u << fiber.lane;
    }
  }
  // A vote asks which lanes are active, so it may be asked by some of them.
  if (together != simdgroup.lanes && first.collective != Collective::vote) {
    bool barrier = first.collective == Collective::barrier;
    report(
        barrier ? "divergent-barrier" : "divergent-simd", first.site, "only lanes 0x%08x of 0x%08x reach this %s",
        together, simdgroup.lanes, barrier ? "simdgroup_barrier" : "simdgroup operation");
  }
  compare_matrix_accesses(simdgroup, together);
  release_lanes(simdgroup, together);
}

bool release_threadgroup() {
  if (!gpu.alive || gpu.waiting != gpu.alive) {
    return false;
  }
  const Fiber* first = nullptr;
  uint32_t flags = ~0u;
  bool diverged = false;
  for (uint32_t i = 0; i < gpu.thread_count; i++) {
    Fiber& fiber = gpu.fibers[i];
    if (fiber.state != State::in_barrier) {
      continue;
    }
    first = first ? first : &fiber;
    if (fiber.site != first->site && !diverged) {
      diverged = true;
      report("divergent-barrier", fiber.site, "thread %u waits at another threadgroup_barrier", first->index);
    }
    flags &= fiber.barrier_flags;
    set_runnable(fiber);
  }
  if (gpu.alive != gpu.thread_count) {
    report(
        "divergent-barrier", first->site, "threadgroup_barrier reached by %u of %u threads, the others returned",
        gpu.alive, gpu.thread_count);
  }
  gpu.clock++;
  for (int space : {space_device, space_threadgroup}) {
    gpu.epoch[space] = flags & (space == space_device ? flag_device : flag_threadgroup) ? gpu.clock : gpu.epoch[space];
  }
  gpu.waiting = 0;
  return true;
}

Fiber* runnable_in(uint32_t simdgroup, uint32_t after_lane) {
  uint32_t lanes = gpu.simdgroups[simdgroup].runnable;
  if (!lanes) {
    return nullptr;
  }
  uint32_t later = after_lane >= simd_width - 1 ? 0 : lanes & ~((2u << after_lane) - 1);
  return &gpu.fibers[simdgroup * simd_width + __builtin_ctz(later ? later : lanes)];
}

// Seed 0 stays in the current simdgroup as long as it can; any other seed draws simdgroup and lane.
Fiber* pick_runnable() {
  uint32_t start = gpu.current->simdgroup;
  uint32_t lane = gpu.current->lane;
  if (gpu.launch->seed) {
    uint64_t random = next_random();
    start = static_cast<uint32_t>(((random >> 8) & 0xFFFFFF) * gpu.simdgroup_count >> 24);
    lane = random % simd_width;
  }
  for (uint32_t step = 0; step < gpu.simdgroup_count; step++) {
    uint32_t number = start + step;
    number -= number >= gpu.simdgroup_count ? gpu.simdgroup_count : 0;
    if (Fiber* fiber = runnable_in(number, lane)) {
      return fiber;
    }
  }
  return nullptr;
}

Fiber* pick() {
  check_time(gpu.current->site);
  for (;;) {
    if (Fiber* fiber = pick_runnable()) {
      return fiber;
    }
    if (release_threadgroup()) {
      continue;
    }
    auto end = gpu.simdgroups + gpu.simdgroup_count;
    auto blocked = std::find_if(gpu.simdgroups, end, [](const Simdgroup& s) { return s.waiting != 0; });
    if (blocked == end) {
      abort();  // the scheduler lost a fiber
    }
    complete_collective(*blocked);
  }
}

void run_fiber() {
  gpu.launch->pipeline->entry();
  Fiber* fiber = gpu.current;
  Simdgroup& simdgroup = gpu.simdgroups[fiber->simdgroup];
  fiber->state = State::done;
  simdgroup.runnable &= ~(1u << fiber->lane);
  simdgroup.alive &= ~(1u << fiber->lane);
  if (!simdgroup.alive) {
    compare_matrix_accesses(simdgroup, simdgroup.lanes);
  }
  gpu.alive--;
  if (!gpu.alive) {
    gpu.current = nullptr;
    softmetal_switch(&fiber->stack_pointer, gpu.scheduler_stack);
  }
  resume(pick());
  abort();
}

void count_collective(const Fiber& fiber) {
  Simdgroup& simdgroup = gpu.simdgroups[fiber.simdgroup];
  if (fiber.lane != static_cast<uint32_t>(__builtin_ctz(simdgroup.alive))) {
    return;
  }
  SoftmetalCounters& counters = gpu.counters;
  switch (fiber.collective) {
    case Collective::reduce: counters.simd_reductions++; break;
    case Collective::shuffle: counters.simd_shuffles++; break;
    case Collective::vote: counters.simd_votes++; break;
    case Collective::quad: counters.quad_operations++; break;
    case Collective::multiply: counters.simdgroup_multiplies++; break;
    case Collective::matrix_load: counters.simdgroup_loads++; break;
    case Collective::matrix_store: counters.simdgroup_stores++; break;
    case Collective::barrier: counters.simdgroup_barriers++; break;
    case Collective::tensor: break;
  }
}

// Waits for the simdgroup.
void meet(Fiber& fiber, Simdgroup& simdgroup, Collective collective, uint64_t site) {
  fiber.collective = collective;
  fiber.site = site;
  fiber.state = State::in_collective;
  count_collective(fiber);
  simdgroup.waiting |= 1u << fiber.lane;
  simdgroup.runnable &= ~(1u << fiber.lane);
  if (simdgroup.waiting == simdgroup.alive) {
    complete_collective(simdgroup);
  }
  if (fiber.state != State::running || gpu.launch->seed) {
    resume(pick());
  }
  fiber.first_resumed = !simdgroup.resumed;
  simdgroup.resumed = true;
}

// Publishes `size` bytes, waits for the simdgroup, and returns the set of slots to read from.
uint32_t rendezvous(Collective collective, uint64_t site, const void* source, uint32_t size) {
  Fiber& fiber = *gpu.current;
  Simdgroup& simdgroup = gpu.simdgroups[fiber.simdgroup];
  uint32_t set = simdgroup.round & 1;
  memcpy(simdgroup.slot[set][fiber.lane], source, size);
  meet(fiber, simdgroup, collective, site);
  return set;
}

// The same for up to three words, which stay in registers.
uint32_t rendezvous(Collective collective, uint64_t site, uint64_t a, uint64_t b = 0, uint64_t c = 0) {
  Fiber& fiber = *gpu.current;
  Simdgroup& simdgroup = gpu.simdgroups[fiber.simdgroup];
  uint32_t set = simdgroup.round & 1;
  auto* slot = reinterpret_cast<uint64_t*>(simdgroup.slot[set][fiber.lane]);
  slot[0] = a;
  slot[1] = b;
  slot[2] = c;
  meet(fiber, simdgroup, collective, site);
  return set;
}

// --- Memory checks -------------------------------------------------------------------------------------------------

bool is_other_group(uint32_t epoch, Space space) {
  return space == space_device && epoch >= gpu.launch_epoch && epoch < gpu.group_epoch;
}

bool conflicts_with_write(const Shadow& shadow, Space space, bool atomic) {
  if (shadow.write_epoch != gpu.epoch[space]) {
    return is_other_group(shadow.write_epoch, space) && !(atomic && shadow.write_atomic);
  }
  const Fiber& me = *gpu.current;
  bool same_simdgroup = shadow.writer / simd_width == me.simdgroup;
  uint32_t simd_epoch = gpu.simdgroups[me.simdgroup].epoch[space];
  return shadow.writer != me.index && !(atomic && shadow.write_atomic) &&
      !(same_simdgroup && shadow.write_simd_epoch != static_cast<uint16_t>(simd_epoch));
}

// The thread of a read that the current thread's write is not ordered with, or -1.
int conflicting_reader(const Shadow& shadow, Space space) {
  const Fiber& me = *gpu.current;
  if (shadow.read_epoch < (space == space_device ? gpu.launch_epoch : gpu.group_epoch)) {
    return -1;
  }
  int reader = static_cast<int>(shadow.read_simdgroup * simd_width + __builtin_ctz(shadow.read_lanes));
  if (shadow.read_epoch != gpu.epoch[space]) {
    return shadow.read_epoch < gpu.group_epoch || shadow.read_by_groups ? reader : -1;
  }
  if (shadow.read_simdgroup != me.simdgroup) {
    return reader;
  }
  uint32_t others = shadow.read_lanes & ~(1u << me.lane);
  if (others && shadow.read_simd_epoch == static_cast<uint16_t>(gpu.simdgroups[me.simdgroup].epoch[space])) {
    return static_cast<int>(shadow.read_simdgroup * simd_width + __builtin_ctz(others));
  }
  uint32_t other_simdgroups = shadow.read_simdgroups & ~(1u << me.simdgroup);
  if (other_simdgroups) {
    return __builtin_ctz(other_simdgroups) * static_cast<int>(simd_width);
  }
  return shadow.read_by_groups ? reader : -1;
}

void remember_write(Shadow& shadow, Space space, bool atomic) {
  const Fiber& me = *gpu.current;
  shadow.write_epoch = gpu.epoch[space];
  shadow.write_simd_epoch = static_cast<uint16_t>(gpu.simdgroups[me.simdgroup].epoch[space]);
  shadow.writer = static_cast<uint16_t>(me.index);
  shadow.write_atomic = atomic;
  shadow.read_epoch = 0;
  shadow.read_by_groups = 0;
}

void remember_read(Shadow& shadow, Space space) {
  const Fiber& me = *gpu.current;
  auto simd_epoch = static_cast<uint16_t>(gpu.simdgroups[me.simdgroup].epoch[space]);
  bool same_epoch = shadow.read_epoch == gpu.epoch[space];
  if (same_epoch && shadow.read_simdgroup == me.simdgroup && shadow.read_simd_epoch == simd_epoch) {
    shadow.read_lanes |= 1u << me.lane;
    return;
  }
  if (is_other_group(shadow.read_epoch, space)) {
    shadow.read_by_groups = 1;
  } else if (shadow.read_epoch < gpu.launch_epoch) {
    shadow.read_by_groups = 0;
  }
  shadow.read_simdgroups = (same_epoch ? shadow.read_simdgroups : 0) | 1u << me.simdgroup;
  shadow.read_lanes = 1u << me.lane;
  shadow.read_epoch = gpu.epoch[space];
  shadow.read_simdgroup = static_cast<uint8_t>(me.simdgroup);
  shadow.read_simd_epoch = simd_epoch;
}

struct Access {
  uint64_t address;
  uint32_t size;
  bool write;
  bool aligned;
  bool atomic;
  uint64_t site;
};

// Halves the cells until none is wider than an access: what was known of a cell holds for each part of it.
void split_cells(ShadowMap& map, uint32_t shift) {
  uint64_t count = (map.size >> map.shift) + 1;
  uint32_t parts = 1u << (map.shift - shift);
  for (uint64_t i = count; i-- > 0;) {
    std::fill_n(map.cells + i * parts, parts, Shadow(map.cells[i]));
  }
  map.shift = shift;
}

uint32_t cell_shift(uint64_t offset, uint32_t size) {
  return std::min(static_cast<uint32_t>(__builtin_ctzll(offset | size)), max_cell_shift);
}

__attribute__((noinline)) void report_race(const Shadow& cell, const Access& access, Space space, const Place& place) {
  const char* race = space == space_device ? "device-race" : "threadgroup-race";
  if (conflicts_with_write(cell, space, access.atomic)) {
    report(
        race, access.site, "%s of %s %zu byte %lu, written by thread %u%s with no barrier between",
        access.write ? "write" : "read", place.what, place.number, place.offset, cell.writer,
        cell.write_epoch < gpu.group_epoch ? " of another threadgroup" : "");
    return;
  }
  report(
      race, access.site, "write of %s %zu byte %lu, read by thread %d%s with no barrier between", place.what,
      place.number, place.offset, conflicting_reader(cell, space),
      cell.read_epoch < gpu.group_epoch ? " of another threadgroup" : "");
}

// `offset` is that of the access in the map.
void check_shadow(ShadowMap& map, uint64_t offset, const Access& access, Space space, const Place& place) {
  if ((offset | access.size) & ((1u << map.shift) - 1)) {
    split_cells(map, cell_shift(offset, access.size));
  }
  Shadow* cell = map.cells + (offset >> map.shift);
  Shadow* end = map.cells + ((offset + access.size) >> map.shift);
  bool reported = false;
  for (Shadow* first = cell; cell < end; cell++) {
    if (!reported &&
        (conflicts_with_write(*cell, space, access.atomic) ||
         (access.write && !access.atomic && conflicting_reader(*cell, space) >= 0))) {
      uint64_t byte = place.offset + (static_cast<uint64_t>(cell - first) << map.shift);
      report_race(*cell, access, space, {place.what, place.number, byte});
      reported = true;
    }
    if (access.write) {
      remember_write(*cell, space, access.atomic);
    } else if (!access.atomic) {
      remember_read(*cell, space);
    }
  }
}

void report_uninitialized(const Access& access, Space space, const Place& place, uint32_t byte) {
  report(
      space == space_device ? "device-uninitialized" : "threadgroup-uninitialized", access.site,
      "read of %s %zu byte %lu, which nothing has written", place.what, place.number, place.offset + byte);
}

void check_alignment(const Access& access, const Place& place) {
  if (access.aligned && access.size > 1 && access.address % access.size) {
    report(
        "misaligned", access.site, "%u-byte %s at %s %zu byte %lu, %lu past its alignment", access.size,
        access.write ? "store" : "load", place.what, place.number, place.offset, access.address % access.size);
  }
}

void access_threadgroup(const Access& access) {
  uint64_t offset = access.address - reinterpret_cast<uint64_t>(gpu.arena);
  (access.write ? gpu.counters.threadgroup_bytes_written : gpu.counters.threadgroup_bytes_read) += access.size;
  uint8_t owner = gpu.arena_owner[offset];
  if (!owner || gpu.arena_owner[offset + access.size - 1] != owner) {
    report(
        "threadgroup-out-of-bounds", access.site, "%s of %u bytes outside every threadgroup variable",
        access.write ? "write" : "read", access.size);
    return;
  }
  const ThreadgroupVariable& variable = gpu.variables[owner - 1];
  Place place{"threadgroup variable", owner - 1u, offset - variable.offset};
  check_alignment(access, place);
  check_shadow(gpu.arena_shadow, offset, access, space_threadgroup, place);
  if (!access.write) {
    const ShadowMap& map = gpu.arena_shadow;
    for (uint64_t i = 0; i < access.size; i += 1u << map.shift) {
      if (map.cells[(offset + i) >> map.shift].write_epoch < gpu.group_epoch) {
        report_uninitialized(access, space_threadgroup, place, static_cast<uint32_t>(i));
        break;
      }
    }
  }
}

Region* find_region(uint64_t address) {
  if (gpu.last_region < gpu.regions.size()) {
    Region& last = gpu.regions[gpu.last_region];
    if (address >= last.begin && address < last.end) {
      return &last;
    }
  }
  for (Region& region : gpu.regions) {
    if (address >= region.begin && address < region.end) {
      gpu.last_region = static_cast<size_t>(&region - gpu.regions.data());
      return &region;
    }
  }
  return nullptr;
}

void report_outside(const Access& access) {
  const char* action = access.write ? "write" : "read";
  for (const Region& region : gpu.regions) {
    if (access.address + access.size > region.begin - region.guard && access.address < region.end + region.guard) {
      int64_t past = static_cast<int64_t>(access.address - region.begin);
      report(
          "device-out-of-bounds", access.site, "%s of %u bytes at byte %ld of memory %zu, which has %lu bytes", action,
          access.size, static_cast<long>(past), static_cast<size_t>(&region - gpu.regions.data()),
          region.end - region.begin);
      return;  // lands in the guard zone, so the kernel may go on
    }
  }
  report("device-out-of-bounds", access.site, "%s of %u bytes at an address of no buffer", action, access.size);
  abandon();
}

void access_device(const Access& access) {
  Region* region = find_region(access.address);
  uint64_t slots = reinterpret_cast<uint64_t>(softmetal_slot_0);
  if (!region && access.address - slots < slot_count * (slot_bytes + 1)) {
    gpu.counters.constant_bytes_read += access.size;  // function constants
    return;
  }
  if (!region || access.address + access.size > region->end) {
    report_outside(access);
    return;
  }
  SoftmetalAllocation& allocation = *region->allocation;
  uint64_t offset = access.address - region->begin;
  Place place{"memory", static_cast<size_t>(region - gpu.regions.data()), offset};
  check_alignment(access, place);
  if (!access.write) {
    allocation.bytes_read += access.size;
    gpu.counters.device_bytes_read += access.size;
    gpu.counters.device_loads++;
    if (region->written) {
      const void* missing = memchr(region->written + offset, 0, access.size);
      if (missing) {
        uint64_t byte = static_cast<const uint8_t*>(missing) - region->written;
        report_uninitialized(access, space_device, place, static_cast<uint32_t>(byte - offset));
      }
    }
  }
  if (access.write) {
    allocation.bytes_written += access.size;
    gpu.counters.device_bytes_written += access.size;
    gpu.counters.device_stores++;
    if (!region->writable) {
      report("readonly-write", access.site, "write to byte %lu of a buffer that the kernel takes as const", offset);
    }
    if (region->written) {
      memset(region->written + offset, 1, access.size);
    }
  }
  if (region->shadow.cells) {
    check_shadow(region->shadow, offset + region->begin % 16, access, space_device, place);
  }
}

void check_access(const Access& access) {
  if (!gpu.current) {
    return;
  }
  check_time(access.site);
  if (access.address - reinterpret_cast<uint64_t>(gpu.stacks) < stack_stride * max_threads) {
    return;  // thread address space
  }
  if (access.address - reinterpret_cast<uint64_t>(gpu.arena) < arena_bytes) {
    access_threadgroup(access);
  } else if (access.address - gpu.module_begin < gpu.module_end - gpu.module_begin) {
    gpu.counters.constant_bytes_read += access.size;  // program-scope constants
  } else {
    access_device(access);
  }
}

// --- Launch --------------------------------------------------------------------------------------------------------

void forget_shadows() {
  if (gpu.shadow) {
    memset(gpu.shadow, 0, gpu.shadow_bytes);
  }
  memset(gpu.arena_shadow.cells, 0, arena_bytes * sizeof(Shadow));
  gpu.clock = 0;
}

uint8_t* map_memory(uint64_t size) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("softmetal: mmap");
    abort();
  }
  return static_cast<uint8_t*>(memory);
}

void create_device() {
  if (gpu.stacks) {
    return;
  }
  gpu.stacks = reinterpret_cast<char*>(map_memory(stack_stride * max_threads));
  for (uint32_t i = 0; i < max_threads; i++) {
    mprotect(gpu.stacks + i * stack_stride, page_bytes, PROT_NONE);
  }
  gpu.arena = map_memory(arena_bytes);
  gpu.arena_owner = map_memory(arena_bytes);
  gpu.arena_shadow = {reinterpret_cast<Shadow*>(map_memory((arena_bytes + 8) * sizeof(Shadow))), arena_bytes, 0};
}

int find_module(dl_phdr_info* info, size_t, void* entry) {
  uint64_t address = reinterpret_cast<uint64_t>(entry);
  uint64_t begin = ~0ull, end = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD) {
      begin = std::min<uint64_t>(begin, info->dlpi_addr + header.p_vaddr);
      end = std::max<uint64_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    }
  }
  if (address < begin || address >= end) {
    return 0;
  }
  gpu.module_begin = begin;
  gpu.module_end = end;
  return 1;
}

// Which allocations the kernel may write: those that some argument takes as writable.
std::vector<bool> find_writable(const SoftmetalLaunch& launch) {
  std::vector<bool> writable(launch.allocation_count);
  for (uint32_t i = 0; i < launch.binding_count; i++) {
    int32_t owner = launch.bindings[i].allocation;
    if (owner >= 0 && (launch.pipeline->writable_buffers >> i) & 1 && launch.allocations[owner].writable) {
      writable[owner] = true;
    }
  }
  return writable;
}

// Shadows outlive the launch: what earlier threadgroups left in them is recognized by its epoch.
void reserve_shadow(uint64_t bytes) {
  if (bytes > gpu.shadow_bytes) {
    if (gpu.shadow) {
      munmap(gpu.shadow, gpu.shadow_bytes);
    }
    gpu.shadow_bytes = std::max(bytes, 2 * gpu.shadow_bytes);
    gpu.shadow = reinterpret_cast<Shadow*>(map_memory(gpu.shadow_bytes));
  }
}

void reserve_memory(uint64_t bytes) {
  if (bytes > gpu.memory_capacity) {
    if (gpu.memory) {
      munmap(gpu.memory, gpu.memory_capacity);
    }
    gpu.memory_capacity = bytes;
    gpu.memory = map_memory(bytes);
  }
}

uint64_t padded(uint64_t size) { return (size + 255) / 256 * 256 + 256; }

// Copies have guard zones. They keep the host address modulo 16, so a view stays as misaligned as it is.
void upload(const SoftmetalLaunch& launch) {
  gpu.memory_bytes = 256;  // never nothing
  uint64_t shadow_count = 0, written_count = 0;
  const std::vector<bool> writable = find_writable(launch);
  for (uint32_t i = 0; i < launch.allocation_count; i++) {
    const SoftmetalAllocation& allocation = launch.allocations[i];
    gpu.memory_bytes += allocation.in_place ? 0 : guard_bytes + padded(allocation.size) + guard_bytes;
    shadow_count += writable[i] ? allocation.size + 32 : 0;
    written_count += allocation.initialized || allocation.written ? 0 : allocation.size;
  }
  reserve_memory(gpu.memory_bytes);
  reserve_shadow(shadow_count * sizeof(Shadow));
  gpu.written.assign(written_count, 0);
  gpu.regions.clear();
  Shadow* shadow = gpu.shadow;
  uint8_t* written = gpu.written.data();
  uint64_t next = reinterpret_cast<uint64_t>(gpu.memory);
  for (uint32_t i = 0; i < launch.allocation_count; i++) {
    SoftmetalAllocation& allocation = launch.allocations[i];
    allocation.bytes_read = allocation.bytes_written = 0;
    uint64_t begin = reinterpret_cast<uint64_t>(allocation.data);
    if (!allocation.in_place) {
      uint64_t shift = begin % 16;
      memset(reinterpret_cast<void*>(next), poison, guard_bytes + shift);
      begin = next + guard_bytes + shift;
      next += guard_bytes + padded(allocation.size) + guard_bytes;
      if (allocation.initialized || allocation.written) {
        memcpy(reinterpret_cast<void*>(begin), allocation.data, allocation.size);
      } else {
        memset(reinterpret_cast<void*>(begin), poison, allocation.size);
      }
      memset(reinterpret_cast<void*>(begin + allocation.size), poison, next - begin - allocation.size);
    }
    bool own = !allocation.written && !allocation.initialized;
    gpu.regions.push_back(
        {begin, begin + allocation.size, allocation.in_place ? allocation.guard : guard_bytes,
         ShadowMap{writable[i] ? shadow : nullptr, allocation.size + 16, max_cell_shift},
         own ? written : allocation.written, writable[i], &allocation});
    shadow += writable[i] ? allocation.size + 32 : 0;
    written += own ? allocation.size : 0;
  }
  gpu.addresses.assign(launch.binding_count, 0);
  for (uint32_t i = 0; i < launch.binding_count; i++) {
    if (launch.bindings[i].allocation >= 0) {
      gpu.addresses[i] = gpu.regions[launch.bindings[i].allocation].begin + launch.bindings[i].offset;
    }
  }
}

// The first byte from begin on that is no longer poison, or end.
uint64_t first_overwritten(uint64_t begin, uint64_t end) {
  while (begin < end && *reinterpret_cast<const uint8_t*>(begin) == poison) {
    begin++;
  }
  return begin;
}

void check_guard_zones() {
  for (size_t i = 0; i < gpu.regions.size(); i++) {
    const Region& region = gpu.regions[i];
    uint64_t end = region.end + region.guard;
    uint64_t found = first_overwritten(region.end, end);
    if (found != end) {
      report(
          "device-out-of-bounds", 0, "overwritten guard zone: %lu bytes past the end of memory %zu", found - region.end,
          i);
    }
    found = first_overwritten(region.begin - region.guard, region.begin);
    if (found != region.begin) {
      report(
          "device-out-of-bounds", 0, "overwritten guard zone: %lu bytes before the start of memory %zu",
          region.begin - found, i);
    }
  }
}

// Copies written buffers back.
void download() {
  check_guard_zones();
  for (Region& region : gpu.regions) {
    SoftmetalAllocation& allocation = *region.allocation;
    if (region.writable && !allocation.in_place) {
      memcpy(allocation.data, reinterpret_cast<void*>(region.begin), allocation.size);
    }
  }
  gpu.regions.clear();
}

uint64_t allocate_threadgroup(int id, uint64_t size, uint64_t site) {
  uint64_t base = reinterpret_cast<uint64_t>(gpu.arena);
  for (const ThreadgroupVariable& variable : gpu.variables) {
    if (variable.id == id) {
      return base + variable.offset;
    }
  }
  uint64_t offset = gpu.arena_used;
  uint64_t used = (offset + size + 255) / 256 * 256 + red_zone;
  gpu.arena_declared += (size + 15) / 16 * 16;
  gpu.counters.threadgroup_bytes = std::max(gpu.counters.threadgroup_bytes, gpu.arena_declared);
  if (gpu.arena_declared > threadgroup_memory_limit) {
    report(
        "threadgroup-memory-limit", site, "%lu bytes of threadgroup memory, the limit is %lu", gpu.arena_declared,
        threadgroup_memory_limit);
  }
  if (used > arena_bytes || gpu.variables.size() >= 254) {
    abandon();
  }
  gpu.arena_used = gpu.arena_shadow.size = used;
  gpu.variables.push_back({id, offset, size});
  memset(gpu.arena_owner + offset, static_cast<int>(gpu.variables.size()), size);
  memset(gpu.arena + offset, poison, gpu.arena_used - offset);
  return base + offset;
}

void check_red_zones() {
  uint64_t base = reinterpret_cast<uint64_t>(gpu.arena);
  for (size_t i = 0; i < gpu.variables.size(); i++) {
    uint64_t begin = gpu.variables[i].offset + gpu.variables[i].size;
    uint64_t end = i + 1 < gpu.variables.size() ? gpu.variables[i + 1].offset : gpu.arena_used;
    uint64_t found = first_overwritten(base + begin, base + end);
    if (found != base + end) {
      report(
          "threadgroup-out-of-bounds", 0, "overwritten guard zone: %lu bytes past the end of threadgroup variable %zu",
          found - base - begin, i);
    }
  }
}

void reset_arena() {
  memset(gpu.arena_owner, 0, gpu.arena_used);
  gpu.variables.clear();
  gpu.arena_used = red_zone;
  gpu.arena_declared = 0;
}

void start_fiber(Fiber& fiber, uint32_t index) {
  fiber = Fiber{};
  fiber.index = index;
  fiber.lane = index % simd_width;
  fiber.simdgroup = index / simd_width;
  fiber.state = State::running;
  // The first switch pops six registers and returns into run_fiber, which expects rsp 8 mod 16 as after a call.
  // Stacks begin at different cache lines, or they would all compete for the same few.
  auto* stack = reinterpret_cast<uint64_t*>(gpu.stacks + (index + 1) * stack_stride - index * 7 % 64 * 64) - 1;
  *stack = 0;
  *--stack = reinterpret_cast<uint64_t>(run_fiber);
  stack -= 6;
  memset(stack, 0, 48);
  fiber.stack_pointer = stack;
}

void run_threadgroup(const SoftmetalLaunch& launch) {
  for (int i = 0; i < 3; i++) {
    uint32_t origin = gpu.group[i] * launch.threads_per_threadgroup[i];
    gpu.size[i] = std::min(launch.threads_per_threadgroup[i], launch.threads[i] - origin);
  }
  gpu.thread_count = gpu.alive = gpu.size[0] * gpu.size[1] * gpu.size[2];
  gpu.simdgroup_count = (gpu.thread_count + simd_width - 1) / simd_width;
  gpu.waiting = 0;
  gpu.epoch[0] = gpu.epoch[1] = gpu.group_epoch = ++gpu.clock;
  reset_arena();
  for (uint32_t s = 0; s < gpu.simdgroup_count; s++) {
    uint32_t lanes = std::min(gpu.thread_count - s * simd_width, simd_width);
    Simdgroup& simdgroup = gpu.simdgroups[s];
    simdgroup.lanes = simdgroup.alive = simdgroup.runnable = lanes == simd_width ? ~0u : (1u << lanes) - 1;
    simdgroup.waiting = 0;
    simdgroup.round = 0;
    simdgroup.epoch[0] = simdgroup.epoch[1] = 1;
  }
  for (uint32_t i = 0; i < gpu.thread_count; i++) {
    start_fiber(gpu.fibers[i], i);
  }
  for (uint32_t i = 0; i < launch.pipeline->threadgroup_arguments; i++) {
    uint64_t length = i < launch.threadgroup_length_count ? launch.threadgroup_lengths[i] : 0;
    gpu.threadgroup_addresses[i] = length ? allocate_threadgroup(-1 - static_cast<int>(i), length, 0) : 0;
  }
  gpu.current = &gpu.fibers[launch.seed ? next_random() % gpu.thread_count : 0];
  softmetal_switch(&gpu.scheduler_stack, gpu.current->stack_pointer);
  if (!gpu.abandoned) {
    check_red_zones();
  }
}

void run_grid(const SoftmetalLaunch& launch) {
  for (int i = 0; i < 3; i++) {
    gpu.groups[i] = (launch.threads[i] + launch.threads_per_threadgroup[i] - 1) / launch.threads_per_threadgroup[i];
  }
  std::vector<uint32_t> order(static_cast<size_t>(gpu.groups[0]) * gpu.groups[1] * gpu.groups[2]);
  for (size_t i = 0; i < order.size(); i++) {
    order[i] = static_cast<uint32_t>(i);
  }
  if (launch.seed) {
    for (size_t i = order.size(); i > 1; i--) {
      std::swap(order[i - 1], order[next_random() % i]);
    }
  }
  for (uint32_t number : order) {
    gpu.group[0] = number % gpu.groups[0];
    gpu.group[1] = number / gpu.groups[0] % gpu.groups[1];
    gpu.group[2] = number / (gpu.groups[0] * gpu.groups[1]);
    run_threadgroup(launch);
    if (gpu.abandoned) {
      return;
    }
  }
}

void on_crash(int signal_number, siginfo_t* information, void* context) {
  if (!gpu.current || crash_handled) {
    signal(signal_number, SIG_DFL);
    return;
  }
  crash_handled = 1;
  auto* machine = static_cast<ucontext_t*>(context);
  report(
      "crash", static_cast<uint64_t>(machine->uc_mcontext.gregs[REG_RIP]) + 1, "signal %d at address %p", signal_number,
      information->si_addr);
  gpu.abandoned = true;
  gpu.current = nullptr;
  siglongjmp(crash_return, 1);
}

constexpr int crash_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

}  // namespace

namespace {

struct OwnedReport {
  SoftmetalReport report;
  std::vector<Error> texts;
  std::vector<SoftmetalError> errors;
};

void set_constants(const SoftmetalPipeline& pipeline) {
  memset(softmetal_slot_0, 0, slot_count * slot_bytes);
  memset(softmetal_defined_0, 0, slot_count);
  for (uint32_t i = 0; i < pipeline.constant_count; i++) {
    const SoftmetalConstant& constant = pipeline.constants[i];
    memcpy(softmetal_slot_0 + constant.slot * slot_bytes, constant.value, constant.size);
    softmetal_defined_0[constant.slot] = 1;
  }
  if (pipeline.derive) {
    pipeline.derive();
  }
}

void run_guarded(const SoftmetalLaunch& launch) {
  static char signal_stack[64 * 1024];
  stack_t alternate{}, previous_stack{};
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof signal_stack;
  sigaltstack(&alternate, &previous_stack);
  struct sigaction action{}, previous[4];
  action.sa_sigaction = on_crash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 4; i++) {
    sigaction(crash_signals[i], &action, &previous[i]);
  }
  crash_handled = 0;
  if (sigsetjmp(crash_return, 1) == 0) {
    run_grid(launch);
  }
  for (int i = 0; i < 4; i++) {
    sigaction(crash_signals[i], &previous[i], nullptr);
  }
  sigaltstack(&previous_stack, nullptr);
  gpu.current = nullptr;
}

SoftmetalReport* make_report() {
  auto* owned = new OwnedReport;
  owned->texts = std::move(gpu.errors);
  for (const Error& error : owned->texts) {
    bool in_module = error.site > gpu.module_begin && error.site <= gpu.module_end;
    // The place of the call, not of the return address.
    uint64_t offset = in_module ? error.site - 1 - gpu.module_begin : 0;
    owned->errors.push_back({error.kind.c_str(), error.message.c_str(), offset, error.count});
  }
  owned->report = {gpu.counters, owned->errors.data(), static_cast<uint32_t>(owned->errors.size())};
  return &owned->report;
}

}  // namespace

SOFTMETAL_API SoftmetalReport* softmetal_launch(const SoftmetalLaunch* launch) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  create_device();
  gpu.launch = launch;
  gpu.counters = {};
  gpu.errors.clear();
  gpu.abandoned = false;
  gpu.steps = 0;
  gpu.last_region = 0;
  if (gpu.clock > 1u << 31) {
    forget_shadows();
  }
  gpu.launch_epoch = gpu.clock + 1;
  gpu.arena_shadow.shift = max_cell_shift;
  gpu.random = 0x9E3779B97F4A7C15ull * (launch->seed + 1);
  gpu.deadline =
      std::chrono::steady_clock::now() + std::chrono::microseconds(static_cast<int64_t>(launch->seconds * 1e6));
  dl_iterate_phdr(find_module, reinterpret_cast<void*>(launch->pipeline->entry));
  gpu.threadgroup_addresses.assign(launch->pipeline->threadgroup_arguments, 0);
  set_constants(*launch->pipeline);
  upload(*launch);
  run_guarded(*launch);
  download();
  return make_report();
}

SOFTMETAL_API void softmetal_free_report(SoftmetalReport* report) { delete reinterpret_cast<OwnedReport*>(report); }

// --- Interface to the shim headers ---------------------------------------------------------------------------------

SOFTMETAL_API uint64_t __softmetal_threadgroup_variable(int id, uint64_t size) {
  return allocate_threadgroup(id, size, CALLER);
}

SOFTMETAL_API uint64_t __softmetal_constant_address(int slot) {
  return reinterpret_cast<uint64_t>(softmetal_slot_0 + slot * slot_bytes);
}

SOFTMETAL_API bool __softmetal_constant_is_defined(int slot) { return softmetal_defined_0[slot]; }

SOFTMETAL_API void __softmetal_set_constant(int slot, uint64_t value, uint32_t size) {
  if (size > slot_bytes) {
    abort();  // the rewriter takes scalars and vectors only
  }
  memcpy(softmetal_slot_0 + slot * slot_bytes, reinterpret_cast<void*>(value), size);
}

SOFTMETAL_API uint32_t __softmetal_lane() { return gpu.current->lane; }

namespace {

uint32_t position_in_group(int component) {
  uint32_t index = gpu.current->index;
  switch (component) {
    case 0: return index % gpu.size[0];
    case 1: return index / gpu.size[0] % gpu.size[1];
    default: return index / (gpu.size[0] * gpu.size[1]);
  }
}

}  // namespace

// Codes as in rewrite.py's BUILTINS.
// The address that is bound to an argument. The entry point asks where the kernel uses it.
SOFTMETAL_API uint64_t __softmetal_buffer_argument(uint32_t index) {
  const uint64_t address = index < gpu.addresses.size() ? gpu.addresses[index] : 0;
  if (address == 0) {
    report("unbound-argument", 0, "the kernel uses [[buffer(%u)]], to which nothing is bound", index);
  }
  return address;
}

SOFTMETAL_API uint64_t __softmetal_threadgroup_argument(uint32_t index) { return gpu.threadgroup_addresses[index]; }

SOFTMETAL_API uint32_t __softmetal_builtin(int which, int component) {
  const uint32_t* full_size = gpu.launch->threads_per_threadgroup;
  switch (which) {
    case 0: return gpu.group[component] * full_size[component] + position_in_group(component);
    case 1: return gpu.group[component];
    case 2: return position_in_group(component);
    case 3: return gpu.current->index;
    case 4: return gpu.current->lane;
    case 5: return gpu.current->simdgroup;
    case 6: return gpu.size[component];
    case 7: return gpu.groups[component];
    case 8: return simd_width;
    case 9: return gpu.simdgroup_count;
    case 10: return gpu.launch->threads[component];
    case 11: return full_size[component];
    case 12: return gpu.current->index / 4;
    case 13: return gpu.current->index % 4;
    case 14: return (gpu.thread_count + 3) / 4;
    case 15: return (full_size[0] * full_size[1] * full_size[2] + simd_width - 1) / simd_width;
    default: return 0;
  }
}

SOFTMETAL_API void __softmetal_threadgroup_barrier(uint32_t flags) {
  Fiber& fiber = *gpu.current;
  fiber.site = CALLER;
  fiber.barrier_flags = flags;
  fiber.state = State::in_barrier;
  gpu.simdgroups[fiber.simdgroup].runnable &= ~(1u << fiber.lane);
  gpu.counters.threadgroup_barriers += ++gpu.waiting == 1;
  resume(pick());
}

SOFTMETAL_API void __softmetal_simdgroup_barrier(uint32_t flags) {
  gpu.current->barrier_flags = flags;
  rendezvous(Collective::barrier, CALLER, &flags, 0);
}

namespace {

enum class Reduction : int { sum, product, minimum, maximum, bit_and, bit_or, bit_xor };

template <class T>
T combine(Reduction operation, T a, T b) {
  switch (operation) {
    case Reduction::sum: return static_cast<T>(a + b);
    case Reduction::product: return static_cast<T>(a * b);
    case Reduction::minimum: return b < a ? b : a;
    case Reduction::maximum: return a < b ? b : a;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (operation) {
      case Reduction::bit_and: return static_cast<T>(a & b);
      case Reduction::bit_or: return static_cast<T>(a | b);
      default: return static_cast<T>(a ^ b);
    }
  }
  return a;
}

template <class T>
T slot_value(const uint8_t* slot, uint32_t component) {
  T value;
  memcpy(&value, slot + component * sizeof(T), sizeof(T));
  return value;
}

// A tree over the participating lanes, as the hardware's order is not specified.
template <class T>
T reduce_lanes(
    Reduction operation,
    uint8_t (*slots)[64],
    uint32_t component,
    uint32_t first,
    uint32_t width,
    uint32_t lanes) {
  T value[simd_width];
  bool present[simd_width];
  for (uint32_t i = 0; i < width; i++) {
    present[i] = (lanes >> (first + i)) & 1;
    value[i] = slot_value<T>(slots[first + i], component);
  }
  for (uint32_t stride = width / 2; stride; stride /= 2) {
    for (uint32_t i = 0; i < stride; i++) {
      if (present[i] && present[i + stride]) {
        value[i] = combine(operation, value[i], value[i + stride]);
      } else if (present[i + stride]) {
        value[i] = value[i + stride];
        present[i] = true;
      }
    }
  }
  return value[0];
}

struct ReduceRequest {
  Reduction operation;
  uint32_t components, width, lanes;
  uint8_t (*slots)[64];
};

template <class T>
void reduce_all(const ReduceRequest& request, uint8_t* result) {
  uint32_t first = request.width == simd_width ? 0 : gpu.current->lane / request.width * request.width;
  for (uint32_t c = 0; c < request.components; c++) {
    T value = reduce_lanes<T>(request.operation, request.slots, c, first, request.width, request.lanes);
    memcpy(result + c * sizeof(T), &value, sizeof(T));
  }
}

template <class T>
void scan_all(const ReduceRequest& request, bool exclusive, uint8_t* result) {
  for (uint32_t c = 0; c < request.components; c++) {
    T value = static_cast<T>(request.operation == Reduction::sum ? 0.0f : 1.0f);
    uint32_t end = gpu.current->lane + (exclusive ? 0 : 1);
    for (uint32_t lane = gpu.current->lane / request.width * request.width; lane < end; lane++) {
      if ((request.lanes >> lane) & 1) {
        value = combine(request.operation, value, slot_value<T>(request.slots[lane], c));
      }
    }
    memcpy(result + c * sizeof(T), &value, sizeof(T));
  }
}

// Codes as in types.h.
template <class Action>
void with_type(int type, Action action) {
  switch (type) {
    case 0: return action(int8_t{});
    case 1: return action(uint8_t{});
    case 2: return action(int16_t{});
    case 3: return action(uint16_t{});
    case 4: return action(int32_t{});
    case 5: return action(uint32_t{});
    case 6: return action(float{});
    case 7: return action(_Float16{});
    case 8: return action(__bf16{});
    case 9: return action(uint64_t{});
    default: abort();
  }
}

}  // namespace

SOFTMETAL_API void __softmetal_simd_reduce(
    int operation,
    int type,
    uint32_t components,
    uint32_t width,
    uint64_t source,
    uint64_t target,
    uint32_t size) {
  Collective collective = width == simd_width ? Collective::reduce : Collective::quad;
  uint32_t set = rendezvous(collective, CALLER, reinterpret_cast<void*>(source), size);
  Simdgroup& simdgroup = gpu.simdgroups[gpu.current->simdgroup];
  ReduceRequest request{
      static_cast<Reduction>(operation), components, width, gpu.current->participants, simdgroup.slot[set]};
  if (width != simd_width || gpu.current->first_resumed) {
    with_type(type, [&](auto zero) { reduce_all<decltype(zero)>(request, simdgroup.result[set]); });
  }
  memcpy(reinterpret_cast<void*>(target), simdgroup.result[set], size);
}

// The same for a value of at most eight bytes.
SOFTMETAL_API uint64_t
__softmetal_simd_reduce_word(int operation, int type, uint32_t components, uint32_t width, uint64_t value) {
  uint32_t set = rendezvous(width == simd_width ? Collective::reduce : Collective::quad, CALLER, value);
  Simdgroup& simdgroup = gpu.simdgroups[gpu.current->simdgroup];
  ReduceRequest request{
      static_cast<Reduction>(operation), components, width, gpu.current->participants, simdgroup.slot[set]};
  if (width != simd_width || gpu.current->first_resumed) {
    with_type(type, [&](auto zero) { reduce_all<decltype(zero)>(request, simdgroup.result[set]); });
  }
  return slot_value<uint64_t>(simdgroup.result[set], 0);
}

SOFTMETAL_API void __softmetal_simd_scan(
    int operation,
    int type,
    uint32_t components,
    uint32_t width,
    int exclusive,
    uint64_t source,
    uint64_t target,
    uint32_t size) {
  uint32_t set = rendezvous(Collective::reduce, CALLER, reinterpret_cast<void*>(source), size);
  ReduceRequest request{
      static_cast<Reduction>(operation), components, width, gpu.current->participants,
      gpu.simdgroups[gpu.current->simdgroup].slot[set]};
  with_type(
      type, [&](auto zero) { scan_all<decltype(zero)>(request, exclusive != 0, reinterpret_cast<uint8_t*>(target)); });
}

namespace {

// The slot that a lane reads after a shuffle, with the checks of its operands.
const uint8_t* shuffle_source(uint32_t set, uint64_t site, uint32_t from, bool varying, uint32_t width) {
  const Fiber& fiber = *gpu.current;
  uint32_t lane = fiber.lane / width * width + from % width;
  if (!((fiber.participants >> lane) & 1)) {
    report("inactive-lane", site, "lane %u reads from lane %u, which is not active", fiber.lane, lane);
  }
  const Fiber* lanes = &gpu.fibers[fiber.simdgroup * simd_width];
  for (uint32_t rest = !varying && fiber.first_resumed ? fiber.participants : 0; rest; rest &= rest - 1) {
    if (lanes[__builtin_ctz(rest)].operand != fiber.operand) {
      report("nonuniform-operand", site, "the lanes pass different lane numbers, deltas or masks");
      break;
    }
  }
  return gpu.simdgroups[fiber.simdgroup].slot[set][lane];
}

}  // namespace

// `from` is the lane to read; a lane without a source (beyond the edge) passes its own number or reads its fill value.
// `operand` must be the same in all lanes unless `varying`.
SOFTMETAL_API void __softmetal_simd_shuffle(
    uint32_t from,
    uint32_t operand,
    int varying,
    uint32_t width,
    uint64_t source,
    uint64_t target,
    uint32_t size) {
  gpu.current->operand = operand;
  uint64_t site = CALLER;
  Collective collective = width == simd_width ? Collective::shuffle : Collective::quad;
  uint32_t set = rendezvous(collective, site, reinterpret_cast<void*>(source), size);
  memcpy(reinterpret_cast<void*>(target), shuffle_source(set, site, from, varying, width), size);
}

SOFTMETAL_API uint64_t
__softmetal_simd_shuffle_word(uint32_t from, uint32_t operand, int varying, uint32_t width, uint64_t value) {
  gpu.current->operand = operand;
  uint64_t site = CALLER;
  uint32_t set = rendezvous(width == simd_width ? Collective::shuffle : Collective::quad, site, value);
  return slot_value<uint64_t>(shuffle_source(set, site, from, varying, width), 0);
}

// The lanes whose predicate holds, in the upper half the lanes that took part.
SOFTMETAL_API uint64_t __softmetal_simd_ballot(uint32_t predicate) {
  uint32_t set = rendezvous(Collective::vote, CALLER, predicate);
  Fiber& fiber = *gpu.current;
  uint32_t mask = 0;
  for (uint32_t rest = fiber.participants; rest; rest &= rest - 1) {
    uint32_t lane = static_cast<uint32_t>(__builtin_ctz(rest));
    mask |= (slot_value<uint32_t>(gpu.simdgroups[fiber.simdgroup].slot[set][lane], 0) != 0) << lane;
  }
  return static_cast<uint64_t>(fiber.participants) << 32 | mask;
}

namespace {

// Apple's 8x8 layout: lane l holds (row, column) and (row, column + 1). The shim's simdgroup.h has the same map.
uint32_t fragment_row(uint32_t lane) { return (lane / 4 & 4) + lane / 2 % 4; }
uint32_t fragment_column(uint32_t lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

void multiply_fragments(uint8_t (*slots)[64], float* result) {
  float a[8][8], b[8][8], c[8][8];
  for (uint32_t lane = 0; lane < simd_width; lane++) {
    uint32_t row = fragment_row(lane), column = fragment_column(lane);
    for (uint32_t i = 0; i < 2; i++) {
      a[row][column + i] = slot_value<float>(slots[lane], i);
      b[row][column + i] = slot_value<float>(slots[lane], 2 + i);
      c[row][column + i] = slot_value<float>(slots[lane], 4 + i);
    }
  }
  for (int i = 0; i < 8; i++) {
    for (int k = 0; k < 8; k++) {
      for (int j = 0; j < 8; j++) {
        c[i][j] += a[i][k] * b[k][j];
      }
    }
  }
  for (uint32_t lane = 0; lane < simd_width; lane++) {
    for (uint32_t i = 0; i < 2; i++) {
      result[2 * lane + i] = c[fragment_row(lane)][fragment_column(lane) + i];
    }
  }
}

}  // namespace

// Each argument is two elements as float; so is the result, of A * B + C.
SOFTMETAL_API uint64_t __softmetal_simdgroup_multiply(uint64_t a, uint64_t b, uint64_t c) {
  uint64_t site = CALLER;
  uint32_t set = rendezvous(Collective::multiply, site, a, b, c);
  Fiber& fiber = *gpu.current;
  Simdgroup& simdgroup = gpu.simdgroups[fiber.simdgroup];
  if (fiber.participants != ~0u) {
    report("divergent-simd", site, "a simdgroup matrix needs all 32 lanes, not 0x%08x", fiber.participants);
  }
  if (fiber.first_resumed) {
    multiply_fragments(simdgroup.slot[set], reinterpret_cast<float*>(simdgroup.result[set]));
  }
  return slot_value<uint64_t>(simdgroup.result[set], fiber.lane);
}

namespace {

struct MatrixAccess {
  uint64_t address[2];  // of a lane's two elements
  uint32_t size;
};

// Notes that a lane loads or stores a matrix, and finds its elements.
MatrixAccess begin_matrix_access(
    Collective collective,
    uint64_t site,
    uint64_t base,
    uint64_t row_elements,
    uint64_t x,
    uint64_t y,
    int transpose,
    uint32_t size) {
  Fiber& fiber = *gpu.current;
  fiber.collective = collective;
  fiber.matrix_count++;
  fiber.matrix_trace = (fiber.matrix_trace ^ site) * 0x9E3779B97F4A7C15ull;
  fiber.matrix_site = site;
  count_collective(fiber);
  if (gpu.simdgroups[fiber.simdgroup].lanes != ~0u) {
    report("divergent-simd", site, "a simdgroup matrix needs all 32 lanes");
  }
  uint64_t row = fragment_row(fiber.lane), column = fragment_column(fiber.lane);
  uint64_t first = transpose ? (y + column) * row_elements + x + row : (y + row) * row_elements + x + column;
  uint64_t step = transpose ? row_elements : 1;
  return {{base + first * size, base + (first + step) * size}, size};
}

void check_matrix_access(const MatrixAccess& access, bool write, uint64_t site) {
  if (!gpu.launch->pipeline->checked) {
    return;
  }
  uint32_t size = access.size;
  if (access.address[1] == access.address[0] + size && access.address[0] % size == 0) {
    check_access({access.address[0], 2 * size, write, false, false, site});
    return;
  }
  for (uint64_t address : access.address) {
    check_access({address, size, write, true, false, site});
  }
}

}  // namespace

// Two elements of `size` bytes each travel in one word. The lanes need not meet.
SOFTMETAL_API uint64_t __softmetal_simdgroup_load(
    uint64_t source,
    uint64_t row_elements,
    uint64_t x,
    uint64_t y,
    int transpose,
    uint32_t size) {
  uint64_t site = CALLER;
  MatrixAccess access = begin_matrix_access(Collective::matrix_load, site, source, row_elements, x, y, transpose, size);
  check_matrix_access(access, false, site);
  uint64_t elements[2] = {};
  for (int i = 0; i < 2; i++) {
    memcpy(&elements[i], reinterpret_cast<void*>(access.address[i]), size);
  }
  return elements[0] | elements[1] << (8 * size);
}

SOFTMETAL_API void __softmetal_simdgroup_store(
    uint64_t elements,
    uint64_t target,
    uint64_t row_elements,
    uint64_t x,
    uint64_t y,
    int transpose,
    uint32_t size) {
  uint64_t site = CALLER;
  MatrixAccess access =
      begin_matrix_access(Collective::matrix_store, site, target, row_elements, x, y, transpose, size);
  check_matrix_access(access, true, site);
  for (int i = 0; i < 2; i++) {
    uint64_t element = elements >> (8 * size * i);
    memcpy(reinterpret_cast<void*>(access.address[i]), &element, size);
  }
}

#include "tensor_ops.h"

// --- Atomics: threads are fibers, so a plain operation is atomic ----------------------------------------------------

namespace {

enum class Atomic : int { load, store, exchange, add, subtract, minimum, maximum, bit_and, bit_or, bit_xor };

template <class T>
T atomic_result(Atomic operation, T old, T operand) {
  switch (operation) {
    case Atomic::load: return old;
    case Atomic::store:
    case Atomic::exchange: return operand;
    case Atomic::add: return static_cast<T>(old + operand);
    case Atomic::subtract: return static_cast<T>(old - operand);
    case Atomic::minimum: return std::min(old, operand);
    case Atomic::maximum: return std::max(old, operand);
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (operation) {
      case Atomic::bit_and: return old & operand;
      case Atomic::bit_or: return old | operand;
      default: return old ^ operand;
    }
  }
  return operand;
}

template <class T>
void atomic_update(Atomic operation, uint64_t address, uint64_t operand, uint64_t result) {
  T old, value;
  memcpy(&old, reinterpret_cast<void*>(address), sizeof(T));
  memcpy(&value, reinterpret_cast<void*>(operand), sizeof(T));
  value = atomic_result(operation, old, value);
  memcpy(reinterpret_cast<void*>(address), &value, sizeof(T));
  memcpy(reinterpret_cast<void*>(result), &old, sizeof(T));
}

void check_atomic(uint64_t address, uint32_t size, bool reads, bool writes, uint64_t site) {
  gpu.counters.atomics++;
  // Others may run in between, so that a loop that waits for a value ends.
  resume(pick());
  if (reads) {
    check_access({address, size, false, true, true, site});
  }
  if (writes) {
    check_access({address, size, true, true, true, site});
  }
}

}  // namespace

SOFTMETAL_API void __softmetal_atomic(
    int operation,
    int type,
    uint64_t address,
    uint64_t operand,
    uint64_t result,
    uint32_t size) {
  auto kind = static_cast<Atomic>(operation);
  check_atomic(address, size, kind != Atomic::store, kind != Atomic::load, CALLER);
  with_type(type, [&](auto zero) { atomic_update<decltype(zero)>(kind, address, operand, result); });
}

SOFTMETAL_API int __softmetal_atomic_compare_exchange(
    uint64_t address,
    uint64_t expected,
    uint64_t desired,
    uint32_t size) {
  check_atomic(address, size, true, true, CALLER);
  if (memcmp(reinterpret_cast<void*>(address), reinterpret_cast<void*>(expected), size) == 0) {
    memcpy(reinterpret_cast<void*>(address), reinterpret_cast<void*>(desired), size);
    return 1;
  }
  memcpy(reinterpret_cast<void*>(expected), reinterpret_cast<void*>(address), size);
  return 0;
}

SOFTMETAL_API void __softmetal_fence() {}

// Rounds to nearest even, as compiler-rt does; here so that kernels need no runtime library of the compiler.
SOFTMETAL_API __bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  uint32_t rounded = is_nan ? bits | 0x00400000u : bits + 0x7FFFu + (bits >> 16 & 1u);
  auto upper = static_cast<uint16_t>(rounded >> 16);
  __bf16 result;
  memcpy(&result, &upper, sizeof result);
  return result;
}

// --- Instrumentation hooks -----------------------------------------------------------------------------------------

#define SOFTMETAL_HOOKS(SIZE)                                                                                          \
  SOFTMETAL_API void __tsan_read##SIZE(uint64_t a) { check_access({a, SIZE, false, true, false, CALLER}); }            \
  SOFTMETAL_API void __tsan_write##SIZE(uint64_t a) { check_access({a, SIZE, true, true, false, CALLER}); }            \
  SOFTMETAL_API void __tsan_unaligned_read##SIZE(uint64_t a) { check_access({a, SIZE, false, false, false, CALLER}); } \
  SOFTMETAL_API void __tsan_unaligned_write##SIZE(uint64_t a) { check_access({a, SIZE, true, false, false, CALLER}); }
SOFTMETAL_HOOKS(1)
SOFTMETAL_HOOKS(2)
SOFTMETAL_HOOKS(4)
SOFTMETAL_HOOKS(8)
SOFTMETAL_HOOKS(16)

SOFTMETAL_API void __tsan_init() {}
SOFTMETAL_API void* __tsan_memcpy(void* target, const void* source, uint64_t size) {
  check_access({reinterpret_cast<uint64_t>(source), static_cast<uint32_t>(size), false, false, false, CALLER});
  check_access({reinterpret_cast<uint64_t>(target), static_cast<uint32_t>(size), true, false, false, CALLER});
  return memcpy(target, source, size);
}
SOFTMETAL_API void* __tsan_memmove(void* target, const void* source, uint64_t size) {
  check_access({reinterpret_cast<uint64_t>(source), static_cast<uint32_t>(size), false, false, false, CALLER});
  check_access({reinterpret_cast<uint64_t>(target), static_cast<uint32_t>(size), true, false, false, CALLER});
  return memmove(target, source, size);
}
SOFTMETAL_API void* __tsan_memset(void* target, int value, uint64_t size) {
  check_access({reinterpret_cast<uint64_t>(target), static_cast<uint32_t>(size), true, false, false, CALLER});
  return memset(target, value, size);
}
