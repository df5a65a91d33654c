// Pure reads of device memory with plain 16-byte loads: the limit of whatever must read its input.
//
// Which order and how many loads in flight are fastest depends on the GPU and on the size, so that
// the limit is the best of several; benchmarks/read_limit.py compiles this file and calls it.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

__device__ __forceinline__ uint4 load(const uint4* address) {
  uint4 value;  // nothing is read twice: it need not stay in L1
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ void fold(uint4& folded, uint4 value) {
  folded.x ^= value.x, folded.y ^= value.y, folded.z ^= value.z, folded.w ^= value.w;
}

// All blocks go through memory side by side, or each (kPieces) through a piece of its own.
template <int kLoads, bool kPieces>
__global__ void read_kernel(const uint4* data, int64_t count, uint32_t* sink) {
  int64_t index, step, stop;
  if (kPieces) {
    const int64_t piece = (count + gridDim.x - 1) / gridDim.x;
    index = blockIdx.x * piece + threadIdx.x;
    step = blockDim.x;
    stop = (blockIdx.x + 1) * piece < count ? (blockIdx.x + 1) * piece : count;
  } else {
    index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    stop = count;
  }
  uint4 folded = {0, 0, 0, 0};
  for (; index + (kLoads - 1) * step < stop; index += kLoads * step) {
    uint4 values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) values[i] = load(data + index + i * step);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) fold(folded, values[i]);
  }
  for (; index < stop; index += step) fold(folded, load(data + index));
  const uint32_t all = folded.x ^ folded.y ^ folded.z ^ folded.w;
  if (all == 0x9e3779b9u) *sink = all;  // the loads must not be optimised away
}

template <int kLoads>
void launch(const uint4* data, int64_t count, bool pieces, int blocks, int threads, uint32_t* sink,
            cudaStream_t stream) {
  if (pieces) {
    read_kernel<kLoads, true><<<blocks, threads, 0, stream>>>(data, count, sink);
  } else {
    read_kernel<kLoads, false><<<blocks, threads, 0, stream>>>(data, count, sink);
  }
}

}  // namespace

// Reads all whole 16-byte words of `bytes`; returns a cudaError_t.
extern "C" int read_memory(const void* data, int64_t bytes, int loads, int pieces, int blocks,
                           int threads, void* sink, void* stream) {
  const auto* words = static_cast<const uint4*>(data);
  auto* target = static_cast<uint32_t*>(sink);
  auto* queue = static_cast<cudaStream_t>(stream);
  if (loads == 8) {
    launch<8>(words, bytes / 16, pieces, blocks, threads, target, queue);
  } else if (loads == 4) {
    launch<4>(words, bytes / 16, pieces, blocks, threads, target, queue);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
