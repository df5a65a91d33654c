// One read of the rows of a token by the lanes of one or several warps: the four sums in float64.
//
// Bytes: both rows once, 16 per lane and load. Arithmetic per pair of entries: two conversions to
// float64 and five additions or multiply-adds; the products of values of up to 24 bits are exact.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../common/metrics.h"

namespace simdiff::cuda {

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = ~0u;
// 16-byte loads of each row that a lane issues before it uses the first. A warp with a row to
// itself has 4 KB in flight; an H100 hides its memory's latency with 18 KB per multiprocessor,
// which here runs 24 such warps and more. Rows shared by 8 warps have as much in flight with half
// of it, and would spill registers with more.
template <int num_lanes>
inline constexpr int kUnroll = num_lanes == kLanes ? 4 : 2;

struct BFloat16 {
  uint16_t bits;
};

__device__ inline double to_double(double value) { return value; }
__device__ inline double to_double(float value) { return value; }
__device__ inline double to_double(__half value) { return __half2float(value); }
__device__ inline double to_double(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// 16 bytes of a row, kept in the four registers they were loaded to.
struct Words {
  unsigned words[4];
};

// Read once and not again here: no place in L1. In L2 it stays, for the layer that reads it next.
__device__ inline Words load_words(const void* address) {
  Words loaded;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(loaded.words[0]), "=r"(loaded.words[1]), "=r"(loaded.words[2]), "=r"(loaded.words[3])
      : "l"(address));
  return loaded;
}

// Keeps the compiler from converting to float64, which doubles the registers, before all loads are
// issued: without it the float32 kernel spills 96 bytes on sm_100 (CUDA 13.0).
__device__ inline void keep_as_loaded(Words& loaded) {
  asm(""
      : "+r"(loaded.words[0]), "+r"(loaded.words[1]), "+r"(loaded.words[2]), "+r"(loaded.words[3]));
}

// Entry i of consecutive ones, as a float where that holds it.
template <class T>
__device__ inline auto entry_value(const unsigned* words, int i) {
  if constexpr (sizeof(T) == 8) {
    return __hiloint2double(words[2 * i + 1], words[2 * i]);
  } else if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  } else {
    return __half2float(__ushort_as_half(i % 2 ? words[i / 2] >> 16 : words[i / 2]));
  }
}

// Entry i of the kVector<T> in 16 bytes.
template <class T>
__device__ inline double entry_of(const Words& loaded, int i) {
  return entry_value<T>(loaded.words, i);
}

__device__ inline void add_entry(RowSums& sums, double before, double after) {
  const double difference = after - before;
  sums.before_squared = fma(before, before, sums.before_squared);
  sums.after_squared = fma(after, after, sums.after_squared);
  sums.difference_squared = fma(difference, difference, sums.difference_squared);
  sums.difference_absolute += fabs(difference);
}

// How a pair of rows is read: `num_vectors` times 16 bytes from entry `head` on, the rest entry by
// entry. Rows that start unaligned, but both by the same number of bytes, lose only their ends.
template <class T>
struct RowSplit {
  int head;
  int num_vectors;

  __device__ RowSplit(const T* before, const T* after, int hidden_size) : head(0), num_vectors(0) {
    const unsigned offset = reinterpret_cast<uintptr_t>(before) % 16;
    if (reinterpret_cast<uintptr_t>(after) % 16 != offset) return;
    head = min(hidden_size, static_cast<int>((16 - offset) % 16 / sizeof(T)));
    num_vectors = (hidden_size - head) / kVector<T>;
  }
};

// The share of lane `lane` of `num_lanes`, a multiple of 32, in the sums of a row.
template <class T, int num_lanes>
__device__ RowSums row_sums(const T* before, const T* after, int hidden_size, int lane) {
  const RowSplit<T> split(before, after, hidden_size);
  RowSums sums;
  // The ends first: their addresses are then dead while many loads are in flight.
  const int num_singles = hidden_size - split.num_vectors * kVector<T>;
#pragma unroll 4
  for (int single = lane; single < num_singles; single += num_lanes) {
    const int entry = single < split.head ? single : single + split.num_vectors * kVector<T>;
    add_entry(sums, to_double(before[entry]), to_double(after[entry]));
  }

  before += split.head + static_cast<int64_t>(lane) * kVector<T>;
  after += split.head + static_cast<int64_t>(lane) * kVector<T>;
  constexpr int kLoads = kUnroll<num_lanes>;
  const int warp_lane = lane % kLanes;
#pragma unroll 1  // the loads of one round are what fits the registers
  for (int left = split.num_vectors - lane + warp_lane; left > 0; left -= kLoads * num_lanes) {
    Words x[kLoads], y[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      x[u] = y[u] = {};  // adds nothing
      if (u * num_lanes + warp_lane < left) {
        x[u] = load_words(before + u * num_lanes * kVector<T>);
        y[u] = load_words(after + u * num_lanes * kVector<T>);
      }
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (u * num_lanes < left) {  // not the whole warp is past the end
        keep_as_loaded(x[u]);
        keep_as_loaded(y[u]);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          add_entry(sums, entry_of<T>(x[u], i), entry_of<T>(y[u], i));
        }
      }
    }
    before += kLoads * num_lanes * kVector<T>;
    after += kLoads * num_lanes * kVector<T>;
  }
  return sums;
}

// Adds four sums over the lanes of a warp; lane 8 * i returns the i-th. Half of the sums go to the
// other half of the lanes at each of the first two steps: 6 exchanges, not 20.
__device__ inline double warp_sums(double sum0, double sum1, double sum2, double sum3, int lane) {
  const bool upper = lane & 16;
  double first = upper ? sum2 : sum0;
  double second = upper ? sum3 : sum1;
  first += __shfl_xor_sync(kAllLanes, upper ? sum0 : sum2, 16);
  second += __shfl_xor_sync(kAllLanes, upper ? sum1 : sum3, 16);
  const bool odd = lane & 8;
  double sum = odd ? second : first;
  sum += __shfl_xor_sync(kAllLanes, odd ? first : second, 8);
  for (int distance = 4; distance; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

// The sums of a row, in the order of RowSums.
__device__ inline double warp_sums(const RowSums& sums, int lane) {
  return warp_sums(sums.before_squared, sums.after_squared, sums.difference_squared,
                   sums.difference_absolute, lane);
}

}  // namespace simdiff::cuda
