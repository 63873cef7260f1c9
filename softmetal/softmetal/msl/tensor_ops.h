// Tensor operations of the software GPU, a part of runtime.cpp: the product of two matrices in memory, computed by a
// scope of threads together.
//
// All threads of the scope meet at the call; the first one to go on does the work for all. Operands are read through
// the memory checks, each element by two threads of the scope: which of them reads it is not specified, so a writer is
// in order only if a barrier lies between it and every one. A destination is written by the threads that own its
// elements. The meeting orders no memory.
#pragma once

namespace {

// Layouts repeated in include/metal_tensor and MetalPerformancePrimitives.h.
struct TensorOperand {
  uint64_t address;
  int64_t extents[2];  // of dimension 0, the contiguous one, and of dimension 1
  int64_t limits[2];
  int64_t strides[2];
  uint32_t type;
  uint32_t fixed;
  uint32_t is_cooperative;
  uint32_t reserved;
};

struct MatmulRequest {
  int32_t m, n, k;  // k is negative where the operands' extents tell it
  int32_t simdgroups;
  uint32_t transpose_left, transpose_right, relaxed, accumulate;
  int32_t layout;
  uint32_t reserved;
  TensorOperand left, right, destination;
};

constexpr uint32_t never_written_float = 0x7FBADBADu;
constexpr uint32_t never_written_int = 0xBADBADBAu;
constexpr uint16_t never_written_half = 0x7D5A;
constexpr uint16_t never_written_bfloat = 0x7FAD;

// By thread: what it asks for, until it has been done.
const MatmulRequest* matmul_requests[max_threads];

uint32_t element_size(uint32_t type) {
  uint32_t size = 0;
  with_type(static_cast<int>(type), [&](auto zero) { size = sizeof zero; });
  return size;
}

bool is_never_written(uint64_t address, uint32_t type) {
  uint32_t word = 0;
  memcpy(&word, reinterpret_cast<void*>(address), element_size(type));
  switch (type) {
    case 4: return word == never_written_int;
    case 6: return word == never_written_float;
    case 7: return word == never_written_half;
    case 8: return word == never_written_bfloat;
    default: return false;
  }
}

// What the operation computes with: float32, or integers that wrap.
template <class Sum>
Sum as_sum(double value) {
  if constexpr (std::is_integral_v<Sum>) {
    return static_cast<Sum>(static_cast<int64_t>(value));
  } else {
    return static_cast<Sum>(value);
  }
}

double load_element(uint64_t address, uint32_t type) {
  double value = 0;
  with_type(static_cast<int>(type), [&](auto zero) {
    memcpy(&zero, reinterpret_cast<void*>(address), sizeof zero);
    value = static_cast<float>(zero);
    if constexpr (std::is_same_v<decltype(zero), int32_t>) {
      value = zero;
    }
  });
  return value;
}

void store_element(uint64_t address, uint32_t type, double value) {
  with_type(static_cast<int>(type), [&](auto zero) {
    if constexpr (std::is_integral_v<decltype(zero)>) {
      zero = static_cast<decltype(zero)>(static_cast<int64_t>(value));  // wraps
    } else {
      zero = static_cast<decltype(zero)>(static_cast<float>(value));
    }
    memcpy(reinterpret_cast<void*>(address), &zero, sizeof zero);
  });
}

// Which thread of a scope holds which element of a matrix.
struct Distribution {
  int32_t rows, columns, simdgroups;
  int32_t layout;

  int32_t across() const { return (columns + 15) / 16; }
  int32_t fragments() const { return across() * ((rows + 15) / 16); }
  int32_t capacity() const {
    if (simdgroups == 0) {
      return rows * columns;
    }
    int32_t threads = simdgroups * static_cast<int32_t>(simd_width);
    return layout == 0 ? (fragments() + simdgroups - 1) / simdgroups * 8 : (rows * columns + threads - 1) / threads + 1;
  }

  // False where this slot of a thread holds nothing.
  bool place(uint32_t thread, int32_t slot, int32_t& row, int32_t& column) const {
    if (simdgroups == 0) {
      return place_in_line(slot, row, column);
    }
    auto lane = static_cast<int32_t>(thread % simd_width);
    int32_t simdgroup = simdgroups > 1 ? static_cast<int32_t>(thread / simd_width) : 0;
    if (layout == 0) {
      return place_in_fragment(lane, slot / 8 * simdgroups + simdgroup, slot % 8, row, column);
    }
    int32_t threads = simdgroups * static_cast<int32_t>(simd_width);
    return place_in_line((slot - 1) * threads + simdgroup * static_cast<int32_t>(simd_width) + lane, row, column);
  }

 private:
  bool place_in_line(int32_t element, int32_t& row, int32_t& column) const {
    row = element / columns;
    column = element % columns;
    return element >= 0 && element < rows * columns;
  }

  // Fragments of 16 x 16, numbered row by row and dealt to the simdgroups in turn; in each, 8 elements of a lane as on
  // an M5.
  bool place_in_fragment(int32_t lane, int32_t fragment, int32_t slot, int32_t& row, int32_t& column) const {
    row = fragment / across() * 16 + 4 * (lane / 16) + lane / 2 % 4 + 8 * (slot / 4);
    column = fragment % across() * 16 + 8 * (lane / 8 % 2) + 4 * (lane % 2) + slot % 4;
    return fragment < fragments() && row < rows && column < columns;
  }
};

struct MatmulScope {
  std::vector<uint32_t> threads;
  uint64_t site;
  Fiber* leader;

  // Checks an access as if `thread` made it.
  void access(uint32_t thread, uint64_t address, uint32_t size, bool write) const {
    if (!gpu.launch->pipeline->checked) {
      return;
    }
    gpu.current = &gpu.fibers[thread];
    check_access({address, size, write, false, false, site});
    gpu.current = leader;
  }

  void read(uint32_t number, uint64_t address, uint32_t size) const {
    size_t count = threads.size();
    access(threads[number % count], address, size, false);
    if (count > 1) {
      // Another simdgroup, where there is one. The bytes count once.
      SoftmetalCounters counters = gpu.counters;
      Region* region = find_region(address);
      uint64_t bytes = region ? region->allocation->bytes_read : 0;
      access(threads[(number + count / 2) % count], address, size, false);
      gpu.counters = counters;
      if (region) {
        region->allocation->bytes_read = bytes;
      }
    }
  }
};

// Elements of an operand, `rows` by `columns` as they lie in memory, in a dense matrix. A dimension is checked against
// the operand's extent, and what lies outside is zero, unless its size is static or the operation's own.
struct OperandReader {
  const MatmulScope& scope;
  const char* name;
  bool unchecked_k;  // with a static k, nothing compares it to the extents
  int k_dimension;
  bool relaxed;
  int32_t layout;

  int64_t limit(const TensorOperand& operand, int dimension, int64_t count) const {
    bool is_fixed = (operand.fixed >> dimension) & 1;
    int64_t limit = operand.extents[dimension];
    if (is_fixed) {
      limit = std::min(limit, operand.limits[dimension]);
    }
    limit = std::max<int64_t>(limit, 0);
    if (count > limit && (is_fixed || (unchecked_k && dimension == k_dimension))) {
      report(
          "tensor-out-of-extents", scope.site,
          "the %s operand has %ld elements in dimension %d, which nothing checks, and the operation reads %ld", name,
          static_cast<long>(limit), dimension, static_cast<long>(count));
    }
    return std::min(limit, count);
  }

  float rounded(double value, uint32_t type) const {
    auto result = static_cast<float>(value);
    if (relaxed && type == 6) {  // 10 bits of mantissa
      uint32_t bits;
      memcpy(&bits, &result, sizeof bits);
      bits &= 0xFFFFE000u;
      memcpy(&result, &bits, sizeof bits);
    }
    return result;
  }

  std::vector<float> read(const TensorOperand& operand, int64_t rows, int64_t columns) const {
    std::vector<float> result(static_cast<size_t>(rows * columns), 0.0f);
    if (operand.is_cooperative) {
      read_cooperative(operand, static_cast<int32_t>(rows), static_cast<int32_t>(columns), result);
      return result;
    }
    if (operand.strides[0] != 1) {
      report(
          "tensor-stride", scope.site, "dimension 0 of the %s operand has stride %ld, not 1", name,
          static_cast<long>(operand.strides[0]));
      return result;
    }
    int64_t available_columns = limit(operand, 0, columns);
    int64_t available_rows = limit(operand, 1, rows);
    uint32_t size = element_size(operand.type);
    for (int64_t row = 0; row < available_rows; row++) {
      for (int64_t column = 0; column < available_columns; column += 8) {
        int64_t count = std::min<int64_t>(8, available_columns - column);
        uint64_t address = operand.address + static_cast<uint64_t>(row * operand.strides[1] + column) * size;
        scope.read(static_cast<uint32_t>(row * 5 + column / 8), address, static_cast<uint32_t>(count) * size);
        for (int64_t i = 0; i < count; i++) {
          double value = load_element(address + static_cast<uint64_t>(i) * size, operand.type);
          result[static_cast<size_t>(row * columns + column + i)] = rounded(value, operand.type);
        }
      }
    }
    return result;
  }

  void read_cooperative(const TensorOperand& operand, int32_t rows, int32_t columns, std::vector<float>& result) const;
};

const TensorOperand& operand_of(uint32_t thread, const char* name) {
  const MatmulRequest& request = *matmul_requests[thread];
  return *name == 'l' ? request.left : *name == 'r' ? request.right : request.destination;
}

// Calls action(thread, address, row, column) for every element that the threads of the scope hold.
template <class Action>
void for_each_element(
    const MatmulScope& scope,
    const char* name,
    const Distribution& distribution,
    uint32_t size,
    Action action) {
  for (uint32_t thread : scope.threads) {
    uint64_t elements = operand_of(thread, name).address;
    for (int32_t slot = 0; slot < distribution.capacity(); slot++) {
      int32_t row, column;
      if (distribution.place(thread, slot, row, column)) {
        action(thread, elements + static_cast<uint64_t>(slot) * size, row, column);
      }
    }
  }
}

void report_never_written(const MatmulScope& scope, const char* name, int32_t row, int32_t column) {
  report(
      "tensor-uninitialized", scope.site, "element (column %d, row %d) of the %s operand, which nothing has written",
      column, row, name);
}

void OperandReader::read_cooperative(
    const TensorOperand& operand,
    int32_t rows,
    int32_t columns,
    std::vector<float>& result) const {
  uint32_t size = element_size(operand.type);
  auto load = [&](uint32_t, uint64_t address, int32_t row, int32_t column) {
    if (is_never_written(address, operand.type)) {
      report_never_written(scope, name, row, column);
    }
    result[static_cast<size_t>(row) * columns + column] = rounded(load_element(address, operand.type), operand.type);
  };
  for_each_element(scope, name, {rows, columns, 1, layout}, size, load);
}

std::vector<float> transposed(const std::vector<float>& matrix, int64_t rows, int64_t columns) {
  std::vector<float> result(matrix.size());
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t column = 0; column < columns; column++) {
      result[static_cast<size_t>(column * rows + row)] = matrix[static_cast<size_t>(row * columns + column)];
    }
  }
  return result;
}

// K in ascending order, in float32 or in wrapping integers.
template <class Sum>
void multiply_add(
    const std::vector<float>& left,
    const std::vector<float>& right,
    int64_t m,
    int64_t n,
    int64_t k,
    std::vector<Sum>& sums) {
  for (int64_t i = 0; i < m; i++) {
    Sum* row = &sums[static_cast<size_t>(i * n)];
    for (int64_t p = 0; p < k; p++) {
      Sum factor = as_sum<Sum>(left[static_cast<size_t>(i * k + p)]);
      const float* other = &right[static_cast<size_t>(p * n)];
      for (int64_t j = 0; j < n; j++) {
        row[j] += factor * as_sum<Sum>(other[j]);
      }
    }
  }
}

template <class Sum>
void matmul(const MatmulScope& scope, const MatmulRequest& request, int64_t k) {
  int64_t m = request.m, n = request.n;
  const TensorOperand& target = request.destination;
  bool static_k = request.k >= 0;
  int left_k = request.transpose_left ? 1 : 0;
  int right_k = request.transpose_right ? 0 : 1;
  OperandReader left_reader{scope, "left", static_k, left_k, request.relaxed != 0, request.layout};
  OperandReader right_reader{scope, "right", static_k, right_k, request.relaxed != 0, request.layout};
  std::vector<float> left = request.transpose_left ? transposed(left_reader.read(request.left, k, m), k, m)
                                                   : left_reader.read(request.left, m, k);
  std::vector<float> right = request.transpose_right ? transposed(right_reader.read(request.right, n, k), n, k)
                                                     : right_reader.read(request.right, k, n);
  Distribution distribution{request.m, request.n, request.simdgroups, request.layout};
  uint32_t size = element_size(target.type);
  std::vector<Sum> sums(static_cast<size_t>(m * n), Sum{});
  // Rows and columns of a destination in memory beyond its extents are left out.
  int64_t columns = n, rows = m;
  if (!target.is_cooperative) {
    OperandReader reader{scope, "destination", false, 0, false, 0};
    columns = reader.limit(target, 0, n);
    rows = reader.limit(target, 1, m);
  }
  auto place = [&](int32_t row, int32_t column) {
    return target.address + static_cast<uint64_t>(row * target.strides[1] + column * target.strides[0]) * size;
  };
  auto add_old = [&](uint32_t thread, uint64_t address, int32_t row, int32_t column) {
    if (!target.is_cooperative) {
      if (row >= rows || column >= columns) {
        return;
      }
      address = place(row, column);
      scope.access(thread, address, size, false);
    } else if (is_never_written(address, target.type)) {
      report_never_written(scope, "destination", row, column);
    }
    sums[static_cast<size_t>(row * n + column)] = as_sum<Sum>(load_element(address, target.type));
  };
  auto store = [&](uint32_t thread, uint64_t address, int32_t row, int32_t column) {
    if (!target.is_cooperative) {
      if (row >= rows || column >= columns) {
        return;
      }
      address = place(row, column);
      scope.access(thread, address, size, true);
    }
    store_element(address, target.type, static_cast<double>(sums[static_cast<size_t>(row * n + column)]));
  };
  if (request.accumulate) {
    for_each_element(scope, "destination", distribution, size, add_old);
  }
  multiply_add(left, right, m, n, k, sums);
  for_each_element(scope, "destination", distribution, size, store);
  // An operation counts as the 8x8 products that it stands for.
  gpu.counters.simdgroup_multiplies += static_cast<uint64_t>((m + 7) / 8 * ((n + 7) / 8) * ((k + 7) / 8));
}

bool same_operand(const TensorOperand& a, const TensorOperand& b) {
  return (a.is_cooperative && b.is_cooperative) ||
      (a.address == b.address && !memcmp(a.extents, b.extents, sizeof a.extents) &&
       !memcmp(a.strides, b.strides, sizeof a.strides));
}

void run_matmul(const MatmulScope& scope) {
  const MatmulRequest& request = *matmul_requests[scope.threads[0]];
  for (uint32_t thread : scope.threads) {
    const MatmulRequest& other = *matmul_requests[thread];
    if (!same_operand(request.left, other.left) || !same_operand(request.right, other.right) ||
        !same_operand(request.destination, other.destination)) {
      report("nonuniform-operand", scope.site, "threads %u and %u pass different tensors", scope.threads[0], thread);
      return;
    }
  }
  int64_t k = request.k;
  if (k < 0) {
    k = request.left.extents[request.transpose_left ? 1 : 0];
    int64_t other = request.right.extents[request.transpose_right ? 0 : 1];
    if (k != other) {
      report(
          "tensor-extents", scope.site, "the left operand has %ld elements along k, the right one %ld",
          static_cast<long>(k), static_cast<long>(other));
      k = std::min(k, other);
    }
    k = std::max<int64_t>(k, 0);
  }
  if (request.left.type == 0 && request.right.type == 0) {
    matmul<uint32_t>(scope, request, k);
  } else {
    matmul<float>(scope, request, k);
  }
}

// As a threadgroup_barrier that orders no memory and is not counted.
void await_threadgroup() {
  Fiber& fiber = *gpu.current;
  fiber.barrier_flags = 0;
  fiber.state = State::in_barrier;
  gpu.simdgroups[fiber.simdgroup].runnable &= ~(1u << fiber.lane);
  gpu.waiting++;
  resume(pick());
}

// The threads that came to the call together.
std::vector<uint32_t> threads_of_scope(const Fiber& fiber, int32_t simdgroups) {
  std::vector<uint32_t> threads;
  if (simdgroups == 0) {
    threads.push_back(fiber.index);
  } else if (simdgroups == 1) {
    for (uint32_t rest = fiber.participants; rest; rest &= rest - 1) {
      threads.push_back(fiber.simdgroup * simd_width + static_cast<uint32_t>(__builtin_ctz(rest)));
    }
  } else {
    for (uint32_t thread = 0; thread < gpu.thread_count; thread++) {
      if (matmul_requests[thread] && gpu.fibers[thread].site == fiber.site) {
        threads.push_back(thread);
      }
    }
  }
  return threads;
}

}  // namespace

SOFTMETAL_API void __softmetal_matmul(uint64_t address) {
  Fiber& fiber = *gpu.current;
  const auto* request = reinterpret_cast<const MatmulRequest*>(address);
  uint64_t site = CALLER;
  matmul_requests[fiber.index] = request;
  fiber.site = site;
  if (request->simdgroups > 1) {
    uint32_t count = static_cast<uint32_t>(request->simdgroups);
    if (gpu.thread_count != count * simd_width) {
      report("tensor-scope", site, "execution_simdgroups<%u> in a threadgroup of %u threads", count, gpu.thread_count);
      return;
    }
    await_threadgroup();
  } else if (request->simdgroups == 1) {
    rendezvous(Collective::tensor, site, address);
  }
  if (!matmul_requests[fiber.index]) {
    return;  // another thread has done it
  }
  MatmulScope scope{threads_of_scope(fiber, request->simdgroups), site, &fiber};
  size_t expected = request->simdgroups == 0 ? 1 : static_cast<size_t>(request->simdgroups) * simd_width;
  if (scope.threads.size() == expected) {
    run_matmul(scope);
  } else if (request->simdgroups == 1) {
    report("divergent-simd", site, "a tensor operation needs all 32 lanes, not 0x%08x", fiber.participants);
  }
  for (uint32_t thread : scope.threads) {
    matmul_requests[thread] = nullptr;
  }
}

// Row and column of what a slot of the current thread holds, or -1.
SOFTMETAL_API int64_t __softmetal_element_place(int rows, int columns, int simdgroups, int layout, int slot) {
  int32_t row, column;
  Distribution distribution{rows, columns, simdgroups, layout};
  bool holds = distribution.place(gpu.current->index, slot, row, column);
  return holds ? static_cast<int64_t>(row) << 32 | column : -1;
}

// Codes as in metal_tensor.
SOFTMETAL_API void __softmetal_tensor_error(int what, int64_t index, int64_t limit) {
  const char* kinds[] = {"tensor-out-of-extents", "tensor-uninitialized", "tensor-out-of-bounds", "tensor-slice"};
  const char* texts[] = {
      "element %ld of a dimension of %ld, which nothing checks", "element %ld of %ld, which nothing has written",
      "element %ld of a thread's %ld", "a slice at index %ld with stride %ld begins more than 2 GiB away"};
  report(kinds[what], CALLER, texts[what], static_cast<long>(index), static_cast<long>(limit));
}
