// All blocks of layers in one pass over the hidden states, two launches.
//
// A thread block takes consecutive tokens, one after the other. It brings every state of the token
// into shared memory once, slice by slice; its warps sum the pairs of a slice, 4 x 4 at a time
// (block_tiles.cuh), and after the last slice turn the sums into metrics and fold these into the
// block's partial sums, each lane into words of its own. The second kernel adds up the partial sums
// of all blocks, always in the order of the tokens: the result is bitwise the same in every run.
//
// Bytes moved per token: (L + 1) * hidden_size * element size read, each byte once. Partial sums:
// 1792 bytes for each tile of 4 x 4 pairs and block, 21 MB at L = 32, most of which stays in L2.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/angular_distance.h"
#include "block_metrics.h"
#include "block_tiles.cuh"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
// 128 registers a thread. One block computes while another waits for its slices.
constexpr int kBlocksPerMultiprocessor = 2;
// One wave on an H100 (132 multiprocessors).
constexpr int64_t kMaxBlocks = 264;
// Slices of one of two blocks: an A100's multiprocessor has 164 KB, of which each block takes 1 KB
// besides and the norms 1280 bytes.
constexpr int64_t kSharedBytes = 79 * 1024;
// 32 entries of 2 bytes for each lane: block_tiles.cuh says what that means for the error.
constexpr int64_t kMaxSliceBytes = 2048;
// For partial sums. With more than 64 states fewer blocks than kMaxBlocks share it, but never fewer
// than an H100 has multiprocessors.
constexpr int64_t kPartialBytes = int64_t{64} << 20;
constexpr int64_t kMinBlocks = 132;

// What a block keeps of a tile: lane p for pair p and lane 16 + p.
struct TileSums {
  double moments[kNumBlockMetrics][kLanes];  // sums; sums of squares
  double maximum[kLanes];                    // of sum d^2; the same
  double token[kLanes];                      // sum d^2; sum |d|, of the token in progress
};

struct BlockCounts {
  int64_t num_tokens;     // averaged
  int64_t num_nonfinite;  // left out because of a NaN or Inf
};

struct Arguments {
  HiddenStates states[kMaxStates];
  const bool* mask;
  double* moments;
  int64_t* tallies;
  TileSums* partials;   // (blocks, num_tiles)
  BlockCounts* counts;  // (blocks)
  int64_t num_tokens;
  int64_t inner;
  int64_t tokens_per_block;
  int num_states;
  int num_tiles;
  int hidden_size;
  int slice_size;  // entries of each row in shared memory
};
static_assert(sizeof(Arguments) <= 4096);

template <class T>
__device__ const T* row_of(const Arguments& args, int state, int64_t outer, int64_t inner) {
  const HiddenStates& states = args.states[state];
  return static_cast<const T*>(states.data) + outer * states.outer_stride +
         inner * states.inner_stride;
}

struct Token {
  int64_t outer;
  int64_t inner;
};

// Rows `first` ... `first` + 3 of the slice, as this lane reads them; states that do not exist are
// read as the last one.
template <class T>
__device__ void find_rows(const Arguments& args, const T* slice, int first, int lane,
                          const T* (&rows)[kTileSide]) {
#pragma unroll
  for (int k = 0; k < kTileSide; ++k) {
    rows[k] =
        slice + min(first + k, args.num_states - 1) * args.slice_size + lane * kStepEntries<T>;
  }
}

// Adds a slice of the token to the sums of this warp's tiles and to the norms of their states.
template <class T>
__device__ void add_slice(const Arguments& args, const T* slice, int num_steps, bool first_slice,
                          TileSums* partials, double* norms_squared, int warp, int lane) {
  Tile tile(warp);
#pragma unroll 1
  for (int t = warp; t < args.num_tiles; t += kWarps, tile.advance(kWarps)) {
    const double earlier = first_slice ? 0.0 : partials[t].token[lane];
    const T* rows[kTileSide];
    find_rows(args, slice, kTileSide * tile.column, lane, rows);
    double sum;
    if (tile.row == tile.column) {
      double norm_squared;
      sum = diagonal_sums(rows, num_steps, lane, norm_squared);
      const int state = kTileSide * tile.row + lane / 8;
      if (lane % 8 == 0 && state < args.num_states) {
        norms_squared[state] = (first_slice ? 0.0 : norms_squared[state]) + norm_squared;
      }
    } else {
      const T* before[kTileSide];
      find_rows(args, slice, kTileSide * tile.row, lane, before);
      sum = tile_sums(before, rows, num_steps, lane);
    }
    partials[t].token[lane] = earlier + sum;
  }
}

// Sums of all pairs and norms of one token. The barriers order each use of shared memory after the
// one before, of the norms too.
template <class T>
__device__ void measure_token(const Arguments& args, Token token, T* slice, TileSums* partials,
                              double* norms_squared, int warp, int lane) {
  constexpr int kWarpStep = kLanes * kStepEntries<T>;
#pragma unroll 1
  for (int begin = 0; begin < args.hidden_size; begin += args.slice_size) {
    const int count = min(args.slice_size, args.hidden_size - begin);
    const int num_steps = (count + kWarpStep - 1) / kWarpStep;
    __syncthreads();
#pragma unroll 1
    for (int state = warp; state < args.num_states; state += kWarps) {
      const T* row = row_of<T>(args, state, token.outer, token.inner) + begin;
      load_row(row, count, num_steps * kWarpStep, slice + state * args.slice_size, lane);
    }
    __syncthreads();
    add_slice(args, slice, num_steps, begin == 0, partials, norms_squared, warp, lane);
  }
  __syncthreads();
}

__device__ bool all_finite(const double* norms_squared, int num_states, int lane) {
  bool finite = true;
  for (int state = lane; state < num_states; state += kLanes) {
    finite = finite && isfinite(norms_squared[state]);
  }
  return __all_sync(kAllLanes, finite);
}

// The sums of this lane's pair, in float64 where they must be.
template <class T>
__device__ PairSums pair_sums(const Arguments& args, Token token, const Tile& tile, bool exists,
                              double own_sum, const double* norms_squared, int lane) {
  const double other_sum = __shfl_xor_sync(kAllLanes, own_sum, kTilePairs);
  const int pair = lane % kTilePairs, last = args.num_states - 1;
  const double before_squared = norms_squared[min(tile.before(pair), last)];
  const double after_squared = norms_squared[min(tile.after(pair), last)];
  PairSums sums;
  sums.squared = lane < kTilePairs ? own_sum : other_sum;
  sums.absolute = lane < kTilePairs ? other_sum : own_sum;
  const double before_norm = sqrt(before_squared), after_norm = sqrt(after_squared);
  sums.norm_gap = after_norm - before_norm;
  constexpr Trust trust = trust_in(std::is_same_v<T, double>);
  bool suffice;
  sums_suffice(trust, sums.squared, sums.absolute, sums.norm_gap, before_norm + after_norm,
               before_squared + after_squared, suffice);
  const bool inexact = exists && !suffice;
#pragma unroll 1
  for (unsigned left = __ballot_sync(kAllLanes, inexact) & ((1u << kTilePairs) - 1); left;
       left &= left - 1) {
    const int p = __ffs(left) - 1, i = tile.before(p), j = tile.after(p);
    const PairSums exact = exact_pair(
        row_of<T>(args, i, token.outer, token.inner), row_of<T>(args, j, token.outer, token.inner),
        args.hidden_size, sqrt(norms_squared[i]) + sqrt(norms_squared[j]), lane);
    if (p == pair) sums = exact;
  }
  return sums;
}

// Turns the sums of a finite token into metrics and folds them into the partial sums.
template <class T>
__device__ void fold_token(const Arguments& args, Token token, TileSums* partials,
                           const double* norms_squared, int warp, int lane) {
  const int pair = lane % kTilePairs;
  Tile tile(warp);
#pragma unroll 1
  for (int t = warp; t < args.num_tiles; t += kWarps, tile.advance(kWarps)) {
    TileSums& partial = partials[t];
    const int i = tile.before(pair), j = tile.after(pair);
    const bool exists = i < j && j < args.num_states;
    const PairSums sums =
        pair_sums<T>(args, token, tile, exists, partial.token[lane], norms_squared, lane);
    if (!exists) continue;
    const double before = sqrt(norms_squared[i]), after = sqrt(norms_squared[j]);
    double metrics[kNumBlockMetrics];
    metrics[kCosineDistance] = cosine_distance(sums.squared, sums.norm_gap, before, after);
    metrics[kSquaredDifference] = sums.squared;
    metrics[kAbsoluteDifference] = sums.absolute / args.hidden_size;
    metrics[kRelativeDifference] = relative_difference(sums.squared, before);
    metrics[kAngularDistance] = angular_distance(metrics[kCosineDistance]);
#pragma unroll
    for (int m = 0; m < kNumBlockMetrics; ++m) {
      partial.moments[m][lane] += lane < kTilePairs ? metrics[m] : metrics[m] * metrics[m];
    }
    partial.maximum[lane] = fmax(partial.maximum[lane], sums.squared);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    block_metrics_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ uint4 shared[];
  __shared__ double norms_squared[kMaxStates];
  T* const slice = reinterpret_cast<T*>(shared);  // (num_states, slice_size)
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  TileSums* const partials = args.partials + static_cast<int64_t>(blockIdx.x) * args.num_tiles;
  for (int t = warp; t < args.num_tiles; t += kWarps) {
    for (int m = 0; m < kNumBlockMetrics; ++m) partials[t].moments[m][lane] = 0;
    partials[t].maximum[lane] = 0;
  }
  BlockCounts counts = {0, 0};
  const int64_t begin = blockIdx.x * args.tokens_per_block;
  const int64_t end = min(args.num_tokens, begin + args.tokens_per_block);
#pragma unroll 1
  for (int64_t index = begin; index < end; ++index) {
    if (args.mask != nullptr && !args.mask[index]) continue;  // padding is not even read
    const int64_t outer = index / args.inner;
    const Token token{outer, index - outer * args.inner};
    measure_token<T>(args, token, slice, partials, norms_squared, warp, lane);
    if (all_finite(norms_squared, args.num_states, lane)) {
      fold_token<T>(args, token, partials, norms_squared, warp, lane);
      ++counts.num_tokens;
    } else {
      ++counts.num_nonfinite;
    }
  }
  if (threadIdx.x == 0) args.counts[blockIdx.x] = counts;
}

struct JoinedSums {
  double moments[kNumBlockMetrics];
  double maximum;

  __device__ void append(const JoinedSums& next) {
#pragma unroll
    for (int m = 0; m < kNumBlockMetrics; ++m) moments[m] += next.moments[m];
    maximum = fmax(maximum, next.maximum);
  }
};

__device__ JoinedSums load_sums(const TileSums& tile, int lane) {
  JoinedSums sums;
#pragma unroll
  for (int m = 0; m < kNumBlockMetrics; ++m) sums.moments[m] = tile.moments[m][lane];
  sums.maximum = tile.maximum[lane];
  return sums;
}

__device__ void join_counts(const Arguments& args, int num_blocks, int lane) {
  int64_t num_tokens = 0, num_nonfinite = 0;
  for (int block = lane; block < num_blocks; block += kLanes) {
    num_tokens += args.counts[block].num_tokens;
    num_nonfinite += args.counts[block].num_nonfinite;
  }
  for (int distance = kLanes / 2; distance; distance /= 2) {
    num_tokens += __shfl_xor_sync(kAllLanes, num_tokens, distance);
    num_nonfinite += __shfl_xor_sync(kAllLanes, num_nonfinite, distance);
  }
  if (lane != 0) return;
  args.tallies[0] += num_tokens;
  args.tallies[1] += num_nonfinite;
  args.tallies[2] += args.num_tokens;
}

// One thread block for each tile: its warps join shares of the blocks, the first one the shares.
__global__ void __launch_bounds__(kThreads)
    join_blocks_kernel(const __grid_constant__ Arguments args, int num_blocks) {
  __shared__ JoinedSums shares[kWarps][kLanes];
  const int t = blockIdx.x, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int share = (num_blocks + kWarps - 1) / kWarps;
  JoinedSums sums = {};
#pragma unroll 4
  for (int block = warp * share; block < min(num_blocks, (warp + 1) * share); ++block) {
    sums.append(load_sums(args.partials[static_cast<int64_t>(block) * args.num_tiles + t], lane));
  }
  shares[warp][lane] = sums;
  __syncthreads();
  if (t == 0 && warp == 1) join_counts(args, num_blocks, lane);
  if (warp != 0) return;
  for (int next = 1; next < kWarps; ++next) sums.append(shares[next][lane]);

  const Tile tile(t);
  const int pair = lane % kTilePairs, i = tile.before(pair), j = tile.after(pair);
  if (i >= j || j >= args.num_states) return;
  const int64_t matrix = static_cast<int64_t>(args.num_states) * args.num_states;
  double* const target = args.moments + static_cast<int64_t>(i) * args.num_states + j;
  double* const ours = target + (lane < kTilePairs ? 0 : kNumBlockMetrics * matrix);
#pragma unroll
  for (int m = 0; m < kNumBlockMetrics; ++m) ours[m * matrix] += sums.moments[m];
  double& maximum = target[2 * kNumBlockMetrics * matrix];
  if (lane < kTilePairs) maximum = fmax(maximum, sums.maximum);
}

template <class T>
void launch_as(const Arguments& args, const BlockLaunchShape& shape, Stream stream) {
  const int shared_bytes = args.num_states * shape.slice_bytes;
  check(cudaFuncSetAttribute(block_metrics_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared_bytes),
        "shared memory of block_metrics_kernel");
  block_metrics_kernel<T><<<shape.blocks, shape.threads, shared_bytes, stream>>>(args);
  check(cudaGetLastError(), "launch of block_metrics_kernel");
  join_blocks_kernel<<<shape.num_tiles, shape.threads, 0, stream>>>(args, shape.blocks);
  check(cudaGetLastError(), "launch of join_blocks_kernel");
}

int64_t count_tiles(int64_t num_states) {
  const int64_t groups = ceil_div(num_states, kTileSide);
  return groups * (groups + 1) / 2;
}

int64_t max_blocks(int64_t num_states) {
  const int64_t bytes = count_tiles(num_states) * static_cast<int64_t>(sizeof(TileSums));
  return std::clamp(kPartialBytes / bytes, kMinBlocks, kMaxBlocks);
}

}  // namespace

BlockLaunchShape block_launch_shape(int64_t num_tokens, int64_t num_states, int64_t hidden_size,
                                    DType dtype) {
  const int64_t row_bytes = hidden_size * kElementBytes[static_cast<int>(dtype)];
  int64_t slice_bytes = kMaxSliceBytes;
  while (num_states * slice_bytes > kSharedBytes) slice_bytes /= 2;
  slice_bytes = std::min(slice_bytes, ceil_div(row_bytes, kWarpStepBytes) * kWarpStepBytes);
  const int64_t tokens_per_block = ceil_div(num_tokens, max_blocks(num_states));
  const int64_t blocks = ceil_div(num_tokens, tokens_per_block);
  return {static_cast<int>(blocks), kThreads, static_cast<int>(slice_bytes),
          static_cast<int>(count_tiles(num_states)), tokens_per_block};
}

int64_t block_scratch_words(int64_t num_states) {
  const int64_t tiles = count_tiles(num_states) * static_cast<int64_t>(sizeof(TileSums));
  return max_blocks(num_states) * (tiles + static_cast<int64_t>(sizeof(BlockCounts))) / 8;
}

void accumulate_blocks(const BlockStates& states, const bool* mask, double* moments,
                       int64_t* tallies, int64_t* scratch, int device, Stream stream) {
  const int64_t num_states = states.num_states(), num_tokens = states.num_tokens();
  if (num_tokens == 0) return;
  if (num_states > kMaxStates) {
    throw std::runtime_error("simdiff_kernels (CUDA): accumulate_blocks takes at most " +
                             std::to_string(kMaxStates) + " hidden states, got " +
                             std::to_string(num_states));
  }
  check_hidden_size(states.hidden_size);
  const BlockLaunchShape shape =
      block_launch_shape(num_tokens, num_states, states.hidden_size, states.dtype);
  Arguments args{};
  std::copy(states.states.begin(), states.states.end(), args.states);
  args.mask = mask;
  args.moments = moments;
  args.tallies = tallies;
  args.partials = reinterpret_cast<TileSums*>(scratch);
  args.counts = reinterpret_cast<BlockCounts*>(args.partials +
                                               max_blocks(num_states) * count_tiles(num_states));
  args.num_tokens = num_tokens;
  args.inner = states.inner;
  args.tokens_per_block = shape.tokens_per_block;
  args.num_states = static_cast<int>(num_states);
  args.num_tiles = shape.num_tiles;
  args.hidden_size = static_cast<int>(states.hidden_size);
  args.slice_size =
      static_cast<int>(shape.slice_bytes / kElementBytes[static_cast<int>(states.dtype)]);
  const CurrentDevice current(device);
  switch (states.dtype) {
    case DType::kFloat32:
      return launch_as<float>(args, shape, stream);
    case DType::kFloat64:
      return launch_as<double>(args, shape, stream);
    case DType::kBFloat16:
      return launch_as<BFloat16>(args, shape, stream);
    case DType::kFloat16:
      return launch_as<__half>(args, shape, stream);
  }
}

}  // namespace simdiff::cuda
