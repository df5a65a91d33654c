// The pieces of every data path on a GPU: 16 bytes of a row from global memory, to registers or by
// cp.async to shared memory; entries of any dtype out of these 16 bytes, as float or double; sums
// of lanes over a warp, by shuffles.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../common/dtypes.h"

namespace simdiff::cuda {

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = ~0u;
inline constexpr int kVectorBytes = 16;

template <class T>
inline constexpr int kVector = kVectorBytes / sizeof(T);  // entries

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

// Copies 16 bytes to shared memory without waiting; zeros, and the source is not read, where it
// does not exist. Never a part of the 16: compute-sanitizer counts that as a read of all of them.
// Before compute capability 8.0 it waits.
__device__ inline void copy_async(void* shared, const void* source, bool exists) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  // "memory": what was read of the target before may not be read after.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(exists ? kVectorBytes : 0)
               : "memory");
#else
  *static_cast<Words*>(shared) = exists ? load_words(source) : Words{};
#endif
}

__device__ inline void commit_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies, but for those of the `newest` groups committed last.
template <int newest>
__device__ void wait_for_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
#endif
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

// An entry that lies alone.
__device__ inline double single_value(double value) { return value; }
__device__ inline float single_value(float value) { return value; }
__device__ inline float single_value(Float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}
__device__ inline float single_value(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

// Adds each of four sums over groups of `num_lanes` lanes; lane l of a group returns sum number
// l / (num_lanes / 4). Half of the sums go to the other half of the lanes at each of the first two
// steps: 6 exchanges for 32 lanes, not 20.
template <int num_lanes>
__device__ double group_sums(const double (&sums)[4], int lane) {
  const bool upper = lane & (num_lanes / 2), odd = lane & (num_lanes / 4);
  double first = upper ? sums[2] : sums[0], second = upper ? sums[3] : sums[1];
  first += __shfl_xor_sync(kAllLanes, upper ? sums[0] : sums[2], num_lanes / 2);
  second += __shfl_xor_sync(kAllLanes, upper ? sums[1] : sums[3], num_lanes / 2);
  double sum = odd ? second : first;
  sum += __shfl_xor_sync(kAllLanes, odd ? first : second, num_lanes / 4);
#pragma unroll
  for (int distance = num_lanes / 8; distance; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

}  // namespace simdiff::cuda
