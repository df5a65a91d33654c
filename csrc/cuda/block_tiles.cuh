// The work on one token's hidden states h_0 ... h_L: a slice of every row goes to shared memory
// once, and warps take 4 x 4 pairs (i, j) of it at a time, their sums in registers.
//
// Per 4 x 4 pairs and entry: 8 conversions and 48 float32 operations (subtraction, multiply-add,
// addition of a magnitude) on 8 values from shared memory. Sums of squares d^2 and of |d| come from
// the differences themselves, never from norms and products.
//
// What float32 costs is bounded: a lane adds at most 32 terms, all of them positive, and 5 more
// additions join the lanes, before a sum is widened to float64. It is off by at most 37 * 2^-24 of
// itself, and typically by 1e-8. The norms are summed in float64, where products of values of up to
// 24 bits are exact. A pair for which that is not enough is summed again in float64.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/layer_states.h"
#include "../common/pair_sums.h"
#include "row_sums.cuh"

namespace simdiff::cuda {

inline constexpr int kTileSide = 4;
inline constexpr int kTilePairs = kTileSide * kTileSide;
static_assert(2 * kTilePairs == kLanes);
// Bytes of a row that a lane takes from shared memory at a time; 32 lanes read 256 in a row.
inline constexpr int kStepBytes = 8;
inline constexpr int kWarpStepBytes = kStepBytes * kLanes;

template <class T>
inline constexpr int kStepEntries = kStepBytes / sizeof(T);

// What differences are formed and summed in, for a few entries.
template <class T>
using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 4 x 4 pairs: states 4 * row ... 4 * row + 3 before, 4 * column ... 4 * column + 3 after. Tiles
// are numbered along the columns of the triangle row <= column.
struct Tile {
  int row;
  int column;

  __device__ explicit Tile(int number) : row(0), column(0) { advance(number); }

  __device__ void advance(int count) {
    row += count;
    while (row > column) row -= ++column;
  }

  __device__ int before(int pair) const { return kTileSide * row + pair / kTileSide; }
  __device__ int after(int pair) const { return kTileSide * column + pair % kTileSide; }
};

// The first `count` entries of a row, then zeros up to `padded`, into shared memory by one warp.
template <class T>
__device__ void load_row(const T* row, int count, int padded, T* target, int lane) {
  constexpr int kLoads = 4;  // in flight: 2 KB a warp
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  const int num_vectors = aligned ? count / kVector<T> : 0;
#pragma unroll 1
  for (int first = lane; first < num_vectors; first += kLoads * kLanes) {
    Words loaded[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int vector = first + u * kLanes;
      if (vector < num_vectors) loaded[u] = load_words(row + vector * kVector<T>);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int vector = first + u * kLanes;
      if (vector >= num_vectors) continue;
      const auto& words = loaded[u].words;
      *reinterpret_cast<uint4*>(target + vector * kVector<T>) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
#pragma unroll 4
  for (int entry = num_vectors * kVector<T> + lane; entry < padded; entry += kLanes) {
    target[entry] = entry < count ? row[entry] : T{};
  }
}

// One lane's entries of four rows, `step` steps into a slice.
template <class T>
__device__ void load_step(const T* const (&rows)[kTileSide], int step,
                          Value<T> (&values)[kTileSide][kStepEntries<T>]) {
#pragma unroll
  for (int k = 0; k < kTileSide; ++k) {
    const uint2 loaded = *reinterpret_cast<const uint2*>(rows[k] + step * kLanes * kStepEntries<T>);
    const unsigned words[] = {loaded.x, loaded.y};
#pragma unroll
    for (int e = 0; e < kStepEntries<T>; ++e) values[k][e] = entry_value<T>(words, e);
  }
}

// sums[p] and sums[16 + p] are sum d^2 and sum |d| of pair p.
template <class V>
__device__ void add_pair(V (&sums)[kLanes], int pair, V before, V after) {
  const V difference = after - before;
  sums[pair] = fma(difference, difference, sums[pair]);
  sums[kTilePairs + pair] += fabs(difference);
}

// Adds each of 32 sums over the lanes of a warp; lane i returns the i-th. Half of the sums go to
// the other half of the lanes at each step: 31 exchanges, not 160.
template <int half = kLanes / 2, class V>
__device__ V spread_sums(V (&sums)[kLanes], int lane) {
  const bool upper = lane & half;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const V given = upper ? sums[i] : sums[i + half];
    const V kept = upper ? sums[i + half] : sums[i];
    sums[i] = kept + __shfl_xor_sync(kAllLanes, given, half);
  }
  if constexpr (half > 1) {
    return spread_sums<half / 2>(sums, lane);
  } else {
    return sums[0];
  }
}

// The pairs of a tile over the slices of its rows: lane p returns sum d^2 of pair p, lane 16 + p
// sum |d|.
template <class T>
__device__ double tile_sums(const T* const (&before)[kTileSide], const T* const (&after)[kTileSide],
                            int num_steps, int lane) {
  Value<T> sums[kLanes] = {};
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    Value<T> x[kTileSide][kStepEntries<T>], y[kTileSide][kStepEntries<T>];
    load_step(before, step, x);
    load_step(after, step, y);
#pragma unroll
    for (int e = 0; e < kStepEntries<T>; ++e) {
#pragma unroll
      for (int p = 0; p < kTilePairs; ++p) {
        add_pair(sums, p, x[p / kTileSide][e], y[p % kTileSide][e]);
      }
    }
  }
  return spread_sums(sums, lane);
}

// The same for a tile on the diagonal, where 6 pairs are wanted and the other sums are zero; lane
// 8 * k leaves with sum h^2 of the k-th of its states in `norm_squared`.
template <class T>
__device__ double diagonal_sums(const T* const (&rows)[kTileSide], int num_steps, int lane,
                                double& norm_squared) {
  Value<T> sums[kLanes] = {};
  double squares[kTileSide] = {};
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    Value<T> x[kTileSide][kStepEntries<T>];
    load_step(rows, step, x);
#pragma unroll
    for (int e = 0; e < kStepEntries<T>; ++e) {
#pragma unroll
      for (int i = 0; i < kTileSide; ++i) {
        const double wide = x[i][e];
        squares[i] = fma(wide, wide, squares[i]);
#pragma unroll
        for (int j = i + 1; j < kTileSide; ++j) {
          add_pair(sums, i * kTileSide + j, x[i][e], x[j][e]);
        }
      }
    }
  }
  norm_squared = warp_sums(squares[0], squares[1], squares[2], squares[3], lane);
  return spread_sums(sums, lane);
}

// What is known of one pair of one token.
struct PairSums {
  double squared;   // sum d^2
  double absolute;  // sum |d|
  double norm_gap;  // |h_j| - |h_i|
};

// One pair in float64 by all lanes of a warp, all of which return it. |h_j|^2 - |h_i|^2 is summed
// as d (x + y), as exact relative to d as d is.
template <class T>
__device__ PairSums exact_pair(const T* before, const T* after, int hidden_size, double both_norms,
                               int lane) {
  double squared = 0, absolute = 0, growth = 0;
#pragma unroll 4
  for (int entry = lane; entry < hidden_size; entry += kLanes) {
    const double x = to_double(before[entry]), y = to_double(after[entry]), d = y - x;
    squared = fma(d, d, squared);
    absolute += fabs(d);
    growth = fma(d, x + y, growth);
  }
  const double sum = warp_sums(squared, absolute, growth, 0.0, lane);
  return {__shfl_sync(kAllLanes, sum, 0), __shfl_sync(kAllLanes, sum, 8),
          __shfl_sync(kAllLanes, sum, 16) / (both_norms == 0 ? 1.0 : both_norms)};
}

}  // namespace simdiff::cuda
