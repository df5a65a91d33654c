// Calls of the CUDA runtime that every launcher makes; a CTA is a block of threads, as a block is
// one of layers everywhere here.
#pragma once

#include <cuda_runtime.h>

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

inline int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "attribute of a device");
  return value;
}

// What `make` says of a key, asked once.
template <class Key, class Make>
auto& asked_once(const Key& key, const Make& make) {
  static std::mutex mutex;
  static std::map<Key, decltype(make())> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known.emplace(key, make()).first->second;
}

// Allows a kernel all dynamic shared memory of the current device, called `device`, that its own
// static arrays leave of the `bytes` which a CTA may have there.
inline void allow_shared_memory(const void* kernel, int device, int bytes) {
  asked_once(std::make_pair(kernel, device), [&] {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
    const int dynamic = bytes - static_cast<int>(attributes.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic),
          "shared memory of a kernel");
    return true;
  });
}

}  // namespace simdiff::cuda
