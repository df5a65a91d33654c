// The fold of accumulate_blocks on a GPU: from sum d^2 and v = 1 - cos(x, y) of each token and pair
// x = h_i, y = h_j (block_sums.cu) to v, sum d^2, sum |d| / hidden_size, |d| / |x| and the angle of
// v (common/angular_distance.h), and from these to the running states: sums and sums of squares,
// the maximum of sum d^2, counts of tokens.
// Bytes per token: 16 read for each pair (24 with the absolute difference), 8 for each state.
//
// Data path: a CTA takes four pairs and the tokens of one running state, a consecutive range.
// Global memory, 64 bytes in a row by four lanes -> registers: the eight such groups of a warp and
// all warps take tokens in turns -> groups, by shuffles -> warps, by shared memory, always in the
// same order -> the state, by one thread each. By their counts (not measured) float64 operations
// are the limit: two roots, a division and the 18 terms of the angle for each token and pair.
#include <cuda_runtime.h>

#include <algorithm>

#include "../common/angular_distance.h"
#include "block_layout.h"
#include "block_stages.h"
#include "entries.cuh"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

constexpr int kFoldWarps = 8;
constexpr int kFoldThreads = kFoldWarps * kLanes;
constexpr int kFoldPairs = 4;  // of a CTA
constexpr int kFoldTokens = kFoldThreads / kFoldPairs;
constexpr int kNumValues = kNumBlockMoments + 2;  // behind the moments: tokens averaged, not finite

struct Arguments {
  TokenPlaces places;
  BlockTokens tokens;
  double* moments;
  int64_t* counts;
  int64_t num_tokens;  // of the update
  int64_t hidden_size;
  int64_t first_state;  // running states from here on have blocks
  int num_states;       // L + 1
  int pair_ctas;        // for each running state
};

struct PairMoments {
  double values[kNumValues] = {};

  __device__ void add(double value, int metric) {
    values[metric] += value;
    values[kNumBlockMetrics + metric] += value * value;
  }

  __device__ void append(const double (&next)[kNumValues]) {
#pragma unroll
    for (int v = 0; v < kNumValues; ++v) {
      values[v] = v == 2 * kNumBlockMetrics ? fmax(values[v], next[v]) : values[v] + next[v];
    }
  }
};

// One pair over every kFoldTokens-th token of the range.
__device__ PairMoments fold_tokens(const Arguments& args, int number, const TokenRange& range) {
  const Pair pair(number);
  const int64_t num_pairs = pair_number(0, args.num_states);
  PairMoments sums;
#pragma unroll 1
  for (int64_t token = range.begin + threadIdx.x / kFoldPairs; token < range.end;
       token += kFoldTokens) {
    if (args.places.kinds != nullptr && args.places.kinds[token] != kCounted) continue;
    const int64_t index = token - args.tokens.first;
    const double norm = args.tokens.norms[index * args.num_states + pair.i];
    const bool finite = !isnan(norm);
    sums.values[kNumBlockMoments] += finite;
    sums.values[kNumBlockMoments + 1] += !finite;
    if (!finite) continue;
    const double2 measured = args.tokens.pairs[index * num_pairs + number];
    sums.add(measured.y, kCosineDistance);
    sums.add(measured.x, kSquaredDifference);
    if (args.tokens.absolute != nullptr) {
      const double absolute = args.tokens.absolute[index * num_pairs + number];
      sums.add(absolute / static_cast<double>(args.hidden_size), kAbsoluteDifference);
    }
    sums.add(relative_difference(measured.x, norm), kRelativeDifference);
    sums.add(angular_distance(measured.y), kAngularDistance);
    double& maximum = sums.values[2 * kNumBlockMetrics];
    maximum = fmax(maximum, measured.x);
  }
  return sums;
}

// Adds value `v` of a pair to the running state.
__device__ void add_to_state(const Arguments& args, int64_t state, int number, int v,
                             double value) {
  const Pair pair(number);
  const int64_t side = args.num_states, matrix = side * side;
  if (v < kNumBlockMoments) {
    double& moment = args.moments[(state * kNumBlockMoments + v) * matrix + pair.i * side + pair.j];
    const bool wanted = args.tokens.absolute != nullptr ||
                        (v != kAbsoluteDifference && v != kNumBlockMetrics + kAbsoluteDifference);
    if (v == 2 * kNumBlockMetrics) {
      moment = fmax(moment, value);
    } else if (wanted) {
      moment += value;
    }
  } else if (number == 0) {  // whole numbers below 2^53
    args.counts[state * kNumBlockCounts + v - kNumBlockMoments] += static_cast<int64_t>(value);
  }
}

__global__ void __launch_bounds__(kFoldThreads)
    block_fold_kernel(const __grid_constant__ Arguments args) {
  __shared__ double warps[kFoldWarps][kFoldPairs][kNumValues];
  const int thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  if (blockIdx.x == 0) {  // every running state has seen all tokens
    for (int64_t state = thread; state < args.places.num_states; state += kFoldThreads) {
      args.counts[state * kNumBlockCounts + 2] += args.tokens.last - args.tokens.first;
    }
  }
  const int64_t state = args.first_state + blockIdx.x / args.pair_ctas;
  const int first_pair = static_cast<int>(blockIdx.x % args.pair_ctas) * kFoldPairs;
  const int num_pairs = pair_number(0, args.num_states);
  TokenRange range = tokens_of(args.places, state, args.num_tokens);
  range = {max(range.begin, args.tokens.first), min(range.end, args.tokens.last)};
  const int own_pair = first_pair + lane % kFoldPairs;
  PairMoments sums;
  if (own_pair < num_pairs) sums = fold_tokens(args, own_pair, range);
#pragma unroll
  for (int distance = kFoldPairs; distance < kLanes; distance *= 2) {
    double next[kNumValues];
#pragma unroll
    for (int v = 0; v < kNumValues; ++v) {
      next[v] = __shfl_xor_sync(kAllLanes, sums.values[v], distance);
    }
    sums.append(next);
  }
  if (lane < kFoldPairs) {
#pragma unroll
    for (int v = 0; v < kNumValues; ++v) warps[warp][lane][v] = sums.values[v];
  }
  __syncthreads();
  const int place = thread / kNumValues, v = thread % kNumValues;
  if (place >= kFoldPairs || first_pair + place >= num_pairs) return;
  double total = warps[0][place][v];
  for (int next = 1; next < kFoldWarps; ++next) {
    const double value = warps[next][place][v];
    total = v == 2 * kNumBlockMetrics ? fmax(total, value) : total + value;
  }
  if (state < args.places.num_states) add_to_state(args, state, first_pair + place, v, total);
}

}  // namespace

void fold_blocks(const BlockStates& states, const BlockFold& fold, const BlockTokens& tokens,
                 Stream stream) {
  const TokenPlaces& places = fold.places;
  Arguments args{
      places, tokens, fold.moments, fold.counts, states.num_tokens(), states.hidden_size};
  args.num_states = static_cast<int>(states.num_states());
  args.pair_ctas = static_cast<int>(ceil_div(pair_number(0, args.num_states), kFoldPairs));
  // Only running states that tokens of these belong to; of none, one that adds nothing.
  const int64_t first = (places.offset + tokens.first) / places.tokens_per_state;
  const int64_t last = (places.offset + tokens.last - 1) / places.tokens_per_state;
  args.first_state = std::max<int64_t>(0, places.first_state + first);
  const int64_t end = std::min(places.num_states, places.first_state + last + 1);
  const int64_t num_ctas = std::max<int64_t>(1, end - args.first_state) * args.pair_ctas;
  block_fold_kernel<<<static_cast<unsigned>(num_ctas), kFoldThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "launch of block_fold_kernel");
}

}  // namespace simdiff::cuda
