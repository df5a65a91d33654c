// Calls of the CUDA runtime that every launcher makes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

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

// Kernels count the entries of a row in int.
inline void check_hidden_size(int64_t hidden_size) {
  if (hidden_size > (int64_t{1} << 30)) {
    throw std::runtime_error("simdiff_kernels (CUDA): hidden_size must be at most 2^30, got " +
                             std::to_string(hidden_size));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace simdiff::cuda
