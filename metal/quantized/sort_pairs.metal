// sort_pairs: pairs of indices by their matrix of w, cut up into tiles, for gather_qmm_rhs.
//
//   rhs_indices   2  0  2  1  2  0  2          tiles of two:  matrix   0     1     2     2     none
//   pairs         1  5 | 3 | 0  2 | 4  6                      first    0     2     3     5
//
// One threadgroup. Its threads share out the pairs twice: first they count those of each matrix, in threadgroup memory,
// then they put each at the next free place of its matrix. In between, a thread for each matrix adds up the pairs and
// the tiles of those before it, by sums over simdgroups. The pair at the beginning of a tile describes it. So no tile
// has pairs of two matrices, each weight is unpacked once for as many pairs as a tile has rows, and pairs may come in
// any order. The order of a matrix's own pairs is left to chance: what is computed of one depends on no other.

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "../../csrc/gpu/launch.h"
#include "../common/metal.h"

namespace quantization_mlx {

static constant constexpr const int sorting_threads = sort_pairs_threads();
static constant constexpr const int sorting_simdgroups = sorting_threads / 32;

// The matrix of a pair, or the number after the last one where an index is out of range.
template <typename Index>
METAL_FUNC int matrix_of_pair(Index lhs, Index rhs, constant SortPairsParams& params) {
  const bool is_valid = lhs >= 0 && lhs < params.lhs_count && rhs >= 0 && rhs < params.rhs_count;
  return is_valid ? static_cast<int>(rhs) : params.rhs_count;
}

// The sum of `value` over all threads before this one. shared: an int for each simdgroup.
METAL_FUNC int sum_before(int value, threadgroup int* shared, uint simdgroup, uint lane) {
  int sum = value;  // of this lane and those before it
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = simd_shuffle_up(sum, static_cast<ushort>(distance));
    sum += static_cast<int>(lane) >= distance ? other : 0;
  }
  if (lane == 31) {
    shared[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int before = sum - value;
  for (uint i = 0; i < simdgroup; ++i) {
    before += shared[i];
  }
  return before;
}

// Adds one to a count, and returns what it was.
METAL_FUNC int count_one(threadgroup int* count) {
  return atomic_fetch_add_explicit((threadgroup atomic_int*)count, 1, memory_order_relaxed);
}

template <typename Index>
[[kernel, max_total_threads_per_threadgroup(sorting_threads)]] void sort_pairs(
    const device Index* lhs_indices [[buffer(0)]],
    const device Index* rhs_indices [[buffer(1)]],
    device PairTile* tiles [[buffer(2)]],  // and after them the list of pairs
    constant SortPairsParams& params [[buffer(3)]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup int counts[sorting_threads];  // pairs of the matrix with this number, so far
  threadgroup int placed[sorting_threads];  // in the second pass
  threadgroup int first_pairs[sorting_threads];
  threadgroup int first_tiles[sorting_threads];
  threadgroup int pair_sums[sorting_simdgroups];
  threadgroup int tile_sums[sorting_simdgroups];
  threadgroup int used_tiles;
  device SortedPair* pairs = (device SortedPair*)(tiles + params.tiles);
  const int own = static_cast<int>(thread_index);  // matrix, and first pair

  counts[own] = 0;
  placed[own] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int pair = own; pair < params.pairs; pair += sorting_threads) {
    count_one(counts + matrix_of_pair(lhs_indices[pair], rhs_indices[pair], params));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int count = counts[own];
  const int own_tiles = (count + params.tile_rows - 1) / params.tile_rows;
  const int first_pair = sum_before(count, pair_sums, simdgroup, lane);
  const int first_tile = sum_before(own_tiles, tile_sums, simdgroup, lane);
  first_pairs[own] = first_pair;
  first_tiles[own] = first_tile;
  if (own == sorting_threads - 1) {
    used_tiles = first_tile + own_tiles;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int pair = own; pair < params.pairs; pair += sorting_threads) {
    const Index lhs = lhs_indices[pair];
    const int matrix = matrix_of_pair(lhs, rhs_indices[pair], params);
    const bool is_valid = matrix < params.rhs_count;
    const int number = count_one(placed + matrix);  // among those of the matrix
    const int place = first_pairs[matrix] + number;
    pairs[place].pair = pair;
    pairs[place].lhs = is_valid ? static_cast<int>(lhs) : 0;
    if (number % params.tile_rows == 0) {
      device PairTile& tile = tiles[first_tiles[matrix] + number / params.tile_rows];
      tile.matrix = is_valid ? matrix : -1;
      tile.first = place;
      tile.count = min(params.tile_rows, counts[matrix] - number);
    }
  }
  for (int i = used_tiles + own; i < params.tiles; i += sorting_threads) {
    tiles[i].matrix = -1;
    tiles[i].first = 0;
    tiles[i].count = 0;
  }
}

}  // namespace quantization_mlx

// --- Instances -----------------------------------------------------------------------------------------------------

#include "../../csrc/gpu/kernels.h"
#include "../common/instantiate.h"

namespace quantization_mlx {

PAIR_KERNELS(INSTANTIATE)

}  // namespace quantization_mlx
