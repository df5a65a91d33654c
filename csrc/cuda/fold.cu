// The fold of row sums on a GPU. With a = |x|, b = |y| from the sums of a token (row_sums.cu):
//   1 - cos(x, y) = (sum d^2 - (b - a)^2) / (2 a b),   sum d^2,   sum |d| / hidden_size,   |d| / a,
//   a, b   (common/metrics.h), and from these the running states: sums, sums of squares, maxima and
//   their tokens, counts.
// Bytes per token and layer: 32 read; 24 or 48 written where the metrics themselves are wanted.
//
// Data path: a CTA for each running state and layer goes over the state's own tokens, a consecutive
// range (TokenPlaces), or over all of them for the state of tokens kept apart. Global memory ->
// registers, every kThreads-th token to a thread, in float64 -> lanes of a warp, by shuffles ->
// warps, by shared memory -> the state, by one thread for each number. The order is always the
// same, and so are the bits. Latency is the limit, predicted and not measured: three roots and four
// divisions in float64 a token, and one CTA for a layer where there is one state.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "../common/metrics.h"
#include "entries.cuh"
#include "fold.h"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Arguments {
  const double* sums;
  double* moments;
  int64_t* counts;
  int64_t num_layers;
  int64_t num_tokens;
  int64_t hidden_size;
  TokenPlaces places;
};

__device__ RowSums load_sums(const double* sums, int64_t token) {
  const double2* address = reinterpret_cast<const double2*>(sums + 4 * token);
  const double2 norms = address[0], differences = address[1];
  return {norms.x, norms.y, differences.x, differences.y};
}

// One metric over some tokens; `index` is that of the earliest token with the maximum.
struct MetricState {
  double sum = 0;
  double sum_of_squares = 0;
  double maximum = -kInfinity;
  int64_t index = -1;

  __device__ void add(double value, int64_t token) {
    sum += value;
    sum_of_squares += value * value;
    if (value > maximum) {
      maximum = value;
      index = token;
    }
  }

  // Their tokens may lie before ours, or among them.
  __device__ void append(const MetricState& other) {
    sum += other.sum;
    sum_of_squares += other.sum_of_squares;
    if (other.maximum > maximum ||
        (other.maximum == maximum &&
         static_cast<uint64_t>(other.index) < static_cast<uint64_t>(index))) {  // -1 is the largest
      maximum = other.maximum;
      index = other.index;
    }
  }

  __device__ MetricState from_lane(int lane_mask) const {
    return {__shfl_xor_sync(kAllLanes, sum, lane_mask),
            __shfl_xor_sync(kAllLanes, sum_of_squares, lane_mask),
            __shfl_xor_sync(kAllLanes, maximum, lane_mask),
            __shfl_xor_sync(kAllLanes, index, lane_mask)};
  }
};

__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ Arguments args) {
  __shared__ MetricState shared[kWarps][kNumMetrics];
  __shared__ int64_t warp_counts[kWarps][2];  // averaged, left out as not finite
  const int thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  const int64_t state = blockIdx.x, layer = blockIdx.y;
  const bool apart = args.places.apart && state == args.places.num_states - 1;
  const TokenKind own_kind = apart ? kApart : kCounted;
  const TokenRange range =
      apart ? TokenRange{0, args.num_tokens} : tokens_of(args.places, state, args.num_tokens);
  const double* const sums = args.sums + 4 * layer * args.num_tokens;

  MetricState metrics[kNumMetrics];
  int64_t num_used = 0, num_nonfinite = 0;
#pragma unroll 2
  for (int64_t token = range.begin + thread; token < range.end; token += kThreads) {
    const TokenKind kind =
        args.places.kinds == nullptr ? kCounted : static_cast<TokenKind>(args.places.kinds[token]);
    if (kind != own_kind) continue;
    const RowSums row = load_sums(sums, token);
    const bool finite = is_finite(row);
    num_used += finite;
    num_nonfinite += !finite;
    if (!finite) continue;
    const TokenMetrics values = token_metrics(row, args.hidden_size);
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) metrics[m].add(values.values[m], token);
  }
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) {
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) metrics[m].append(metrics[m].from_lane(distance));
    num_used += __shfl_xor_sync(kAllLanes, num_used, distance);
    num_nonfinite += __shfl_xor_sync(kAllLanes, num_nonfinite, distance);
  }
  if (lane == 0) {
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) shared[warp][m] = metrics[m];
    warp_counts[warp][0] = num_used;
    warp_counts[warp][1] = num_nonfinite;
  }
  __syncthreads();

  // A thread for each metric and each count joins the warps, and these with the state.
  double* const moments = args.moments + (state * args.num_layers + layer) * 3 * kNumMetrics;
  int64_t* const counts = args.counts + (state * args.num_layers + layer) * (kNumMetrics + 3);
  const int64_t num_seen = counts[kNumMetrics + 2];
  __syncthreads();  // read by all of these before one of them replaces it
  if (thread < kNumMetrics) {
    MetricState joined = shared[0][thread];
    for (int w = 1; w < kWarps; ++w) joined.append(shared[w][thread]);
    moments[thread] += joined.sum;
    moments[kNumMetrics + thread] += joined.sum_of_squares;
    if (joined.maximum > moments[2 * kNumMetrics + thread]) {
      moments[2 * kNumMetrics + thread] = joined.maximum;
      counts[thread] = num_seen + joined.index;
    }
  } else if (thread < kNumMetrics + 2) {
    int64_t count = 0;
    for (int w = 0; w < kWarps; ++w) count += warp_counts[w][thread - kNumMetrics];
    counts[thread] += count;
  } else if (thread == kNumMetrics + 2) {
    counts[thread] = num_seen + args.num_tokens;
  }
}

template <class Value>
__global__ void __launch_bounds__(kThreads)
    token_metrics_kernel(const double* sums, int64_t num_tokens, int64_t hidden_size, Value* out) {
  const int64_t layer = blockIdx.y;
  sums += 4 * layer * num_tokens;
  out += kNumMetrics * layer * num_tokens;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       token < num_tokens; token += stride) {
    const TokenMetrics metrics = token_metrics(load_sums(sums, token), hidden_size);
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m) {
      out[m * num_tokens + token] = static_cast<Value>(metrics.values[m]);
    }
  }
}

// The y size of a grid; no model has as many layers.
constexpr int64_t kMaxLayers = 65535;

void check_layers(int64_t num_layers) {
  if (num_layers > kMaxLayers) {
    throw std::runtime_error("simdiff_kernels (CUDA): there may be at most 65535 layers, got " +
                             std::to_string(num_layers));
  }
}

dim3 grid_of(int64_t num_ctas, int64_t num_layers) {
  return dim3(static_cast<unsigned>(num_ctas), static_cast<unsigned>(num_layers));
}

}  // namespace

void fold(const double* sums, int64_t num_layers, int64_t num_tokens, int64_t hidden_size,
          const TokenPlaces& places, double* moments, int64_t* counts, int device, Stream stream) {
  if (num_layers == 0 || num_tokens == 0) return;
  check_layers(num_layers);
  const CurrentDevice current(device);
  fold_kernel<<<grid_of(places.num_states, num_layers), kThreads, 0, stream>>>(
      {sums, moments, counts, num_layers, num_tokens, hidden_size, places});
  check(cudaGetLastError(), "launch of fold");
}

void token_metrics(const double* sums, int64_t num_layers, int64_t num_tokens, int64_t hidden_size,
                   void* per_token, bool float64, int device, Stream stream) {
  if (num_layers == 0 || num_tokens == 0) return;
  check_layers(num_layers);
  const CurrentDevice current(device);
  constexpr int64_t kMaxCtas = 4096;  // of a layer: they go round
  const dim3 grid = grid_of(std::min(ceil_div(num_tokens, kThreads), kMaxCtas), num_layers);
  if (float64) {
    token_metrics_kernel<<<grid, kThreads, 0, stream>>>(sums, num_tokens, hidden_size,
                                                        static_cast<double*>(per_token));
  } else {
    token_metrics_kernel<<<grid, kThreads, 0, stream>>>(sums, num_tokens, hidden_size,
                                                        static_cast<float*>(per_token));
  }
  check(cudaGetLastError(), "launch of token_metrics");
}

}  // namespace simdiff::cuda
