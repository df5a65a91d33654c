// What was compiled for the GPU, and whether a GPU here can run it: an empty kernel is looked up,
// not launched.
#include <cuda_runtime.h>

#include "devices.h"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

__global__ void empty_kernel() {}

}  // namespace

std::vector<int> compiled_architectures() {
  std::vector<int> architectures = {__CUDA_ARCH_LIST__};  // 800, 900, ...
  for (int& architecture : architectures) architecture /= 10;
  return architectures;
}

int runtime_version() { return CUDART_VERSION; }

std::string device_problem(int device) {
  try {
    const CurrentDevice current(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, empty_kernel), "no kernel to run");
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // the next call must not report it again
    return error.what();
  }
  return "";
}

}  // namespace simdiff::cuda
