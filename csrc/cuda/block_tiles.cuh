// The inner loops of block_sums.cu: the sums of a tile of pairs (block_layout.h) over a slice of
// its rows, by eight lanes. With rows x = h_i, y = h_j and a ratio r: sum (r x - y)^2 of a
// pair (common/scaled_pair.h), sum |y - x| where it is wanted, and in a triangle also sum d^2,
// sum h d and sum |d| of its layers and sum h^2 of its states.
//
// Data path: shared memory, 16 bytes of each row of the tile -> registers, where they stay as they
// were loaded -> converted and summed there -> joined over the eight lanes, by shuffles. Bytes: a
// square reads 8 rows of its slice for 16 pairs, a triangle 6 rows for 10 pairs and 4 layers.
//
// Entries stay as they were loaded, 16 bytes at a time, and are converted in registers. Per entry a
// square costs 8 conversions and 16 times two float32 operations, d = r x - y and d d added, with a
// ratio r of each row x (common/scaled_pair.h); a triangle costs 6 and 35.
//
// What float32 costs is bounded: a lane adds at most 64 terms, and 3 more additions join the lanes,
// before a sum is widened to float64. A sum of positive terms is off by at most 67 * 2^-24 of
// itself; of 4096 entries typically by 1e-8, as the errors of 64 such sums do not add up.
#pragma once

#include <type_traits>

#include "block_layout.h"
#include "entries.cuh"

namespace simdiff::cuda {

// What differences are formed and summed in, for a few dozen entries.
template <class T>
using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A slice of all rows of a token.
struct Slice {
  const char* rows;
  int row_bytes;  // from one to the next
  int first_step;
  int last_step;  // past the end

  __device__ const uint4* row(int state, int lane) const {
    const char* address = rows + state * row_bytes + first_step * kStepBytes;
    return reinterpret_cast<const uint4*>(address) + lane % kTileLanes;
  }
};

template <class T>
__device__ Value<T> value_of(const uint4& vector, int entry) {
  const unsigned words[] = {vector.x, vector.y, vector.z, vector.w};
  return entry_value<T>(words, entry);
}

template <bool absolute, class V>
__device__ void add_difference(V& sum, V difference) {
  if constexpr (absolute) {
    sum += fabs(difference);
  } else {
    sum = fma(difference, difference, sum);
  }
}

// sum (r x - y)^2; sums of |y - x| and of float64 are of the states as they are.
template <class T, bool absolute>
__device__ void add_scaled(Value<T>& sum, Value<T> x, float ratio, Value<T> y) {
  if constexpr (absolute || std::is_same_v<T, double>) {
    add_difference<absolute>(sum, x - y);
  } else {
    add_difference<false>(sum, fma(x, ratio, -y));
  }
}

// sums[4 * i + j] of states x_i and y_j. Of the last group some states may be missing.
template <class T, bool absolute>
__device__ void add_square(const Slice& slice, int row_group, int column_group, int last_state,
                           const float (&ratios)[kGroup], int lane, Value<T> (&sums)[kSquareSums]) {
  const uint4 *x_rows[kGroup], *y_rows[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    x_rows[k] = slice.row(1 + kGroup * row_group + k, lane);
    y_rows[k] = slice.row(min(1 + kGroup * column_group + k, last_state), lane);
  }
#pragma unroll 1
  for (int step = 0; step < slice.last_step - slice.first_step; ++step) {
    uint4 x[kGroup], y[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      x[k] = x_rows[k][step * kTileLanes];
      y[k] = y_rows[k][step * kTileLanes];
    }
#pragma unroll
    for (int entry = 0; entry < kVector<T>; ++entry) {
      Value<T> y_values[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) y_values[j] = value_of<T>(y[j], entry);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const Value<T> x_value = value_of<T>(x[i], entry);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          add_scaled<T, absolute>(sums[kGroup * i + j], x_value, ratios[i], y_values[j]);
        }
      }
    }
  }
}

// sums as in TriangleSum. With `absolute` only the pairs, sum |y - x| of each.
template <class T, bool absolute>
__device__ void add_triangle(const Slice& slice, int group, int last_state, float ratio, int lane,
                             Value<T> (&sums)[kTriangleSums]) {
  // h_0, the state before the group's, these.
  const uint4* rows[2 + kGroup];
  rows[0] = slice.row(0, lane);
#pragma unroll
  for (int k = 0; k <= kGroup; ++k) {
    rows[1 + k] = slice.row(min(kGroup * group + k, last_state), lane);
  }
#pragma unroll 1
  for (int step = 0; step < slice.last_step - slice.first_step; ++step) {
    uint4 vectors[2 + kGroup];
#pragma unroll
    for (int k = 0; k < 2 + kGroup; ++k) vectors[k] = rows[k][step * kTileLanes];
#pragma unroll
    for (int entry = 0; entry < kVector<T>; ++entry) {
      const Value<T> first = value_of<T>(vectors[0], entry);
      Value<T> h[1 + kGroup];
#pragma unroll
      for (int k = 0; k <= kGroup; ++k) h[k] = value_of<T>(vectors[1 + k], entry);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        add_scaled<T, absolute>(sums[kFirstPair + k], first, ratio, h[1 + k]);
      }
      add_difference<absolute>(sums[kInnerPair + 0], h[3] - h[1]);
      add_difference<absolute>(sums[kInnerPair + 1], h[4] - h[2]);
      add_difference<absolute>(sums[kInnerPair + 2], h[4] - h[1]);
      if constexpr (!absolute) {
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          const Value<T> d = h[k + 1] - h[k];
          add_difference<false>(sums[kLayerSquared + k], d);
          add_difference<true>(sums[kLayerAbsolute + k], d);
          sums[kLayerProduct + k] = fma(h[k], d, sums[kLayerProduct + k]);
          sums[kStateSquared + k] = fma(h[k + 1], h[k + 1], sums[kStateSquared + k]);
        }
        sums[kFirstSquared] = fma(first, first, sums[kFirstSquared]);
      }
    }
  }
}

// Adds each of `count` sums over the lanes of a tile; lane l of these is left with number
// l * count / 8 and those that follow. Half of the sums go to the other half of the lanes at each
// step: 14 exchanges for 16 sums, not 48.
template <int count, int distance = kTileLanes / 2, class V>
__device__ void join_lanes(V* sums, int lane) {
  constexpr int half = count / 2;
  static_assert(2 * half == count);
  const bool upper = lane & distance;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const V given = upper ? sums[i] : sums[i + half];
    const V kept = upper ? sums[i + half] : sums[i];
    sums[i] = kept + __shfl_xor_sync(kAllLanes, given, distance);
  }
  if constexpr (distance > 1) join_lanes<half, distance / 2>(sums, lane);
}

// A pair of rows in float64.
struct ExactSums {
  double before_squared = 0;
  double after_squared = 0;
  double squared = 0;   // of d
  double absolute = 0;  // of d
  double growth = 0;    // |y|^2 - |x|^2 as sum d (x + y): as exact as d is
};

__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// By all lanes of a warp, all of which return it.
template <class T>
__device__ ExactSums exact_sums(const T* before, const T* after, int64_t hidden_size, int lane) {
  ExactSums sums;
#pragma unroll 4
  for (int64_t entry = lane; entry < hidden_size; entry += kLanes) {
    const double x = single_value(before[entry]), y = single_value(after[entry]), d = y - x;
    sums.before_squared = fma(x, x, sums.before_squared);
    sums.after_squared = fma(y, y, sums.after_squared);
    sums.squared = fma(d, d, sums.squared);
    sums.absolute += fabs(d);
    sums.growth = fma(d, x + y, sums.growth);
  }
  return {warp_sum(sums.before_squared), warp_sum(sums.after_squared), warp_sum(sums.squared),
          warp_sum(sums.absolute), warp_sum(sums.growth)};
}

}  // namespace simdiff::cuda
