// Calls of the CUDA runtime that every launcher makes; a CTA is a block of threads, as a block is
// one of layers everywhere here.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace simdiff::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("simdiff_kernels (CUDA): ") + what + ": " +
                             cudaGetErrorString(error));
  }
}

// Makes a device current for the launch. The runtime linked here is not torch's, but both act on
// the same context of the driver.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Kernels count the bytes of a row in int.
inline void check_hidden_size(int64_t hidden_size) {
  if (hidden_size > (int64_t{1} << 27)) {
    throw std::runtime_error("simdiff_kernels (CUDA): hidden_size must be at most 2^27, got " +
                             std::to_string(hidden_size));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the current device, the one called `device`, has cp.async; asked once.
inline bool copies_asynchronously(int device) {
  static std::mutex mutex;
  static std::map<int, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "compute capability");
  return known[device] = major >= 8;
}

// How many CTAs of a kernel the current device, the one called `device`, runs at once; asked once.
// Allows the kernel its dynamic shared memory.
inline int64_t resident_ctas(const void* kernel, int device, int threads, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return found->second;
  int multiprocessors = 0, ctas = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "shared memory of a kernel");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "number of multiprocessors");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, threads, shared_bytes),
        "CTAs of a multiprocessor");
  return known[{kernel, device}] = std::max<int64_t>(1, int64_t{ctas} * multiprocessors);
}

}  // namespace simdiff::cuda
