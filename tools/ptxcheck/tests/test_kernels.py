"""Row reductions as nvcc compiles them, executed and compared with float64."""

from __future__ import annotations

import numpy as np
import pytest

from ptxcheck import Gpu
from ptxcheck.compilers import find_nvcc, nvcc_ptx

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

CUDA_ROWS = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

__device__ double wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ double wide(__half x) { return __half2float(x); }
__device__ double wide(float x) { return x; }

template <class T>
__device__ void row_sums(const T* x, double* out, int hidden, long long stride) {
    constexpr int group = 16 / sizeof(T);
    __shared__ double sums[32], peaks[32];
    const T* row = x + blockIdx.x * stride;
    double sum = 0, peak = 0;
    auto add = [&](T entry) {
        double value = wide(entry);
        sum = fma(value, value, sum);
        peak = fmax(peak, fabs(value));
    };
    // Entries before the first aligned group, aligned groups, entries after the last.
    int head = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
    head = min(head, hidden);
    int groups = (hidden - head) / group;
    if (threadIdx.x < head) add(row[threadIdx.x]);
    for (int i = threadIdx.x; i < groups; i += blockDim.x) {
        uint4 loaded = __ldg(reinterpret_cast<const uint4*>(row + head) + i);
        T entries[group];
        memcpy(entries, &loaded, 16);
#pragma unroll
        for (int k = 0; k < group; ++k) add(entries[k]);
    }
    for (int i = head + groups * group + threadIdx.x; i < hidden; i += blockDim.x) add(row[i]);

    for (int offset = 16; offset; offset /= 2) {
        sum += __shfl_xor_sync(~0u, sum, offset);
        peak = fmax(peak, __shfl_down_sync(~0u, peak, offset));
    }
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
        peaks[threadIdx.x / 32] = peak;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < blockDim.x / 32; ++warp) {
            sum += sums[warp];
            peak = fmax(peak, peaks[warp]);
        }
        out[2 * blockIdx.x] = sum;
        out[2 * blockIdx.x + 1] = peak;
    }
}

#define ROWS(name, T) \
    extern "C" __global__ void name(const T* x, double* out, int hidden, long long stride) { \
        row_sums<T>(x, out, hidden, stride); \
    }
ROWS(rows_bf16, __nv_bfloat16)
ROWS(rows_fp16, __half)
ROWS(rows_fp32, float)

extern "C" __global__ void combine(const double* rows, double* total, int count) {
    extern __shared__ double scratch[];
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += rows[2 * i];
    scratch[threadIdx.x] = sum;
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *total = scratch[0];
}

struct Series { const float* x; int count; double scale; };

// A structure passed by value, an array indexed at run time and a loop of different lengths.
extern "C" __global__ void histogram(Series series, int* counts) {
    __shared__ int shared_counts[4];
    if (threadIdx.x < 4) shared_counts[threadIdx.x] = 0;
    int local_counts[4] = {0, 0, 0, 0};
    for (int i = threadIdx.x * threadIdx.x; i < series.count; i += 977)
        ++local_counts[static_cast<int>(series.x[i] * series.scale) & 3];
    __syncthreads();
    for (int i = 0; i < 4; ++i)
        if (local_counts[(i + threadIdx.x) & 3])
            atomicAdd(&shared_counts[(i + threadIdx.x) & 3], local_counts[(i + threadIdx.x) & 3]);
    __syncthreads();
    if (threadIdx.x < 4) counts[threadIdx.x] = shared_counts[threadIdx.x];
}
"""


def rows(count: int, hidden: int, element: str, stride: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states in memory, with a gap after each row, and their values in float64."""
    rng = np.random.default_rng(hidden)
    values = rng.standard_normal((count, stride or hidden)).astype(np.float32) * 3
    if element == "bf16":
        memory = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        values = (memory.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        memory = values.astype(np.float16 if element == "fp16" else np.float32)
        values = memory
    return memory[:, :hidden], values[:, :hidden].astype(np.float64)


def check_rows(result: np.ndarray, values: np.ndarray) -> None:
    np.testing.assert_allclose(result[:, 0], (values**2).sum(1), rtol=1e-13)
    np.testing.assert_array_equal(result[:, 1], np.abs(values).max(1))


@pytest.fixture(scope="module", params=["sm_80", "sm_90a", "sm_100"])
def cuda_rows(request: pytest.FixtureRequest) -> str:
    return nvcc_ptx(CUDA_ROWS, request.param)


@needs_nvcc
@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("hidden", [1, 7, 576, 577, 4095])
def test_cuda_rows(cuda_rows: str, element: str, hidden: int) -> None:
    memory, values = rows(6, hidden, element, hidden + 1)
    out, total = np.zeros((6, 2)), np.zeros(1)
    gpu = Gpu(cuda_rows)
    x = gpu.buffer(memory, "x", align=memory.itemsize)
    y = gpu.buffer(out, "out", initialised=False)
    report = gpu.launch(f"rows_{element}", 6, 96, [x, y, hidden, hidden + 1])
    check_rows(out, values)
    assert report.load_counts(x).max() == 1
    assert report.loaded_bytes(x) == memory.size * memory.itemsize
    if hidden >= 576:
        assert report.load_widths(x) == {128, 8 * memory.itemsize}
    gpu.launch("combine", 1, 64, [y, gpu.buffer(total, initialised=False), 6], 64 * 8)
    np.testing.assert_allclose(total[0], (values**2).sum(), rtol=1e-13)


@needs_nvcc
def test_aligned_cuda_rows_use_wide_loads_once(cuda_rows: str) -> None:
    memory, values = rows(100, 4096, "bf16")
    out = np.zeros((100, 2))
    gpu = Gpu(cuda_rows, kernels=["rows_bf16"])
    x, y = gpu.buffer(memory, "x"), gpu.buffer(out, "out", initialised=False)
    report = gpu.launch("rows_bf16", 100, 128, [x, y, 4096, 4096])
    check_rows(out, values)
    assert (report.load_counts(x) == 1).all()
    assert report.load_widths(x) == {128}


@needs_nvcc
def test_structures_local_arrays_and_shared_atomics(cuda_rows: str) -> None:
    x = np.random.default_rng(0).uniform(0, 4, 3000).astype(np.float32)
    counts = np.zeros(4, np.int32)
    gpu = Gpu(cuda_rows, kernels=["histogram"])
    series = gpu.buffer(x, "x").address.to_bytes(8, "little")
    series += np.int64(x.size).tobytes() + np.float64(1.5).tobytes()
    gpu.launch("histogram", 1, 64, [series, gpu.buffer(counts, initialised=False)])
    visits = np.concatenate([np.arange(t * t, x.size, 977) for t in range(64)])
    bins = (x[visits] * 1.5).astype(int) & 3
    np.testing.assert_array_equal(counts, np.bincount(bins, minlength=4))
