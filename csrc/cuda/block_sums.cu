// What every block of layers does to each token, in one pass over the hidden states:
//   sum d^2 and 1 - cos of every pair i < j, d = h_j - h_i, as in common/pair_trust.h, and
//   sum h_k^2, sum h_(k+1)^2, sum d^2, sum |d| of every layer, as in common/short_sums.h.
// Bytes per token: (L + 1) * hidden_size * element size read, each byte once; 16 written for each
// pair and 32 for each layer.
//
// The way of the data: a thread block takes consecutive tokens. Slices of all rows, 1 KB of each,
// go to one half of shared memory (cp.async) while its warps sum the slice in the other half, the
// next token's first slice while this token is finished. Eight lanes add up a tile of pairs in
// registers (block_tiles.cuh), are joined after each slice and add, as float64, to words of their
// own in global memory, which stay in L1 and L2. After the last slice a thread each turns the sums
// of a pair into its distance. Layers and pairs for which float32 is not enough are read again, out
// of L2, and summed in float64 by a warp.
//
// Instructions a warp issues per token of 33 states of 4096 bf16 entries, from the machine code for
// sm_90: tests/test_cuda_compile.py counts them.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "block_stages.h"
#include "block_tiles.cuh"
#include "block_token.cuh"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

// 128 registers a thread. While one block waits at a barrier or finishes a token the other
// computes.
constexpr int kBlocksPerMultiprocessor = 2;

// Goes over the slices of the tokens that are read. Lane l of a warp knows where the row of state
// warp + kWarps * l begins.
template <class T>
struct SliceReader {
  const BlockArguments& args;
  int64_t token, end;
  int64_t begin = 0;  // bytes of the rows
  const char* row = nullptr;
  int warp, lane;

  __device__ SliceReader(const BlockArguments& arguments, int64_t first, int64_t last)
      : args(arguments), token(first - 1), end(last) {
    warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    find_token();
  }

  __device__ void find_token() {
    do {
      ++token;
    } while (token < end && !is_read(args, token));
    const int state = warp + kWarps * lane;
    if (token < end && state < args.num_states) {
      row = reinterpret_cast<const char*>(row_of<T>(args, state, token));
    }
  }

  __device__ void advance() {
    begin += args.slice_bytes;
    if (begin < args.row_bytes) return;
    begin = 0;
    find_token();
  }

  // Starts copies of this slice, filled up with zeros to whole steps, as one group.
  __device__ void copy_to(char* slice) const {
    if (token < end) {
      const int count = static_cast<int>(min(int64_t{args.slice_bytes}, args.row_bytes - begin));
      const int padded = (count + kStepBytes - 1) / kStepBytes * kStepBytes;
#pragma unroll 1
      for (int state = warp, holder = 0; state < args.num_states; state += kWarps, ++holder) {
        const auto bits = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(row), holder);
        const char* const source = reinterpret_cast<const char*>(bits) + begin;
        copy_row(source, count, padded, slice + state * args.slice_bytes);
      }
    }
    commit_copies();
  }

  __device__ void copy_row(const char* source, int count, int padded, char* target) const {
    if (reinterpret_cast<uint64_t>(source) % kVectorBytes == 0) {
#pragma unroll 2
      for (int at = lane * kVectorBytes; at < padded; at += kLanes * kVectorBytes) {
        const int present = max(0, min(kVectorBytes, count - at));
        copy_async(target + at, source + (present ? at : 0), present);
      }
    } else {
      constexpr int kSize = sizeof(T);
#pragma unroll 4
      for (int at = lane * kSize; at < padded; at += kLanes * kSize) {
        T entry{};
        if (at < count) entry = *reinterpret_cast<const T*>(source + at);
        *reinterpret_cast<T*>(target + at) = entry;
      }
    }
  }
};

// The squared lengths of all rows in the token's first slice, by which the rows are scaled.
template <class T>
__device__ void estimate_lengths(const BlockArguments& args, const char* slice, int steps,
                                 float* lengths, int warp, int lane) {
#pragma unroll 1
  for (int state = warp; state < args.num_states; state += kWarps) {
    const char* const row = slice + state * args.slice_bytes;
    float sum = 0;
#pragma unroll 1
    for (int at = lane * kVectorBytes; at < steps * kStepBytes; at += kLanes * kVectorBytes) {
      const uint4 vector = *reinterpret_cast<const uint4*>(row + at);
#pragma unroll
      for (int entry = 0; entry < kVector<T>; ++entry) {
        const float value = value_of<T>(vector, entry);
        sum = fma(value, value, sum);
      }
    }
#pragma unroll
    for (int distance = kLanes / 2; distance; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    if (lane == 0) lengths[state] = sum;
  }
}

// The sums of a lane's tile in a slice, joined and added to `target`.
template <int count, class V>
__device__ void store_sums(V (&sums)[count], double* target, bool first_slice, int lane) {
  constexpr int kOwn = count / kTileLanes;
  double earlier[kOwn];
#pragma unroll
  for (int k = 0; k < kOwn; ++k) earlier[k] = first_slice ? 0.0 : target[lane * kOwn + k];
  join_lanes<count>(sums, lane);
#pragma unroll
  for (int k = 0; k < kOwn; ++k) target[lane * kOwn + k] = earlier[k] + sums[k];
}

template <class T, bool absolute>
__device__ void sum_unit(const BlockLayout& layout, const Unit& unit, const Slice& slice,
                         const float* lengths, double* target, bool first_slice, int lane) {
  const int last_state = layout.num_states - 1, place = lane / kTileLanes;
  if (unit.quad < layout.square_quads) {
    const Pair groups(min(kQuad * unit.quad + place, layout.squares - 1));
    float ratios[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      ratios[k] = ratio_of<T>(lengths, first_of(groups.i) + k, groups.j);
    }
    Value<T> sums[kSquareSums] = {};
    add_square<T, absolute>(slice, groups.i, groups.j, last_state, ratios, lane, sums);
    store_sums(sums, target, first_slice, lane);
  } else {
    const int number = kQuad * (unit.quad - layout.square_quads) + place;
    const int group = min(number, layout.groups - 1);
    Value<T> sums[kTriangleSums] = {};
    add_triangle<T, absolute>(slice, group, last_state, ratio_of<T>(lengths, 0, group), lane, sums);
    store_sums(sums, target, first_slice, lane);
  }
}

// All sums of one token. `turn` goes on with every slice: units that take longer than others go
// from one warp, and scheduler, to the next.
template <class T, bool absolute>
__device__ void sum_slice(const BlockArguments& args, const BlockLayout& layout, const char* rows,
                          int steps, const float* lengths, double* unit_sums, bool first_slice,
                          int turn, int lane) {
  constexpr int kKinds = absolute ? 2 : 1;
#pragma unroll 1
  for (int number = turn % kWarps; number < kKinds * layout.units; number += kWarps) {
    const bool second = absolute && number >= layout.units;
    const Unit unit = layout.unit(second ? number - layout.units : number);
    const Slice slice{rows, args.slice_bytes, steps * unit.share / unit.shares,
                      steps * (unit.share + 1) / unit.shares};
    double* const target = unit_sums + number * kUnitSums;
    if (absolute && second) {
      sum_unit<T, true>(layout, unit, slice, lengths, target, first_slice, lane);
    } else {
      sum_unit<T, false>(layout, unit, slice, lengths, target, first_slice, lane);
    }
  }
}

// Row sums of tokens that are not read.
__device__ void clear_sums(const BlockArguments& args, int64_t first, int64_t end) {
  if (args.kinds == nullptr || args.sums == nullptr) return;
  const int num_words = 4 * (args.num_states - 1);
  for (int64_t token = first; token < end; ++token) {
    if (is_read(args, token)) continue;
    for (int word = threadIdx.x; word < num_words; word += kThreads) {
      args.sums[4 * (word / 4 * args.num_tokens + token) + word % 4] = 0;
    }
  }
}

template <class T, bool absolute>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    block_sums_kernel(const __grid_constant__ BlockArguments args) {
  extern __shared__ uint4 shared[];  // two slices of all rows
  __shared__ TokenState state;
  char* const slices = reinterpret_cast<char*>(shared);
  const int slot_bytes = args.num_states * args.slice_bytes;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const BlockLayout layout(args.num_states, args.slice_bytes / kStepBytes);
  double* const unit_sums = args.unit_sums + static_cast<int64_t>(blockIdx.x) * layout.units *
                                                 (absolute ? 2 : 1) * kUnitSums;
  const UnitSums units{layout, unit_sums};
  const int64_t first =
      args.tokens.first + static_cast<int64_t>(blockIdx.x) * args.tokens_per_block;
  const int64_t end = min(args.tokens.last, first + args.tokens_per_block);
  clear_sums(args, first, end);

  SliceReader<T> reader(args, first, end);
  int slot = 0, turn = warp;
  reader.copy_to(slices);
#pragma unroll 1
  while (reader.token < end) {
    const int64_t token = reader.token;
#pragma unroll 1
    for (int64_t begin = 0; begin < args.row_bytes; begin += args.slice_bytes) {
      // This slice is here, and nobody reads the one before any more.
      wait_for_copies<0>();
      __syncthreads();
      const char* const rows = slices + slot * slot_bytes;
      const int64_t left = min(int64_t{args.slice_bytes}, args.row_bytes - begin);
      const int steps = (static_cast<int>(left) + kStepBytes - 1) / kStepBytes;
      slot ^= 1;
      reader.advance();
      reader.copy_to(slices + slot * slot_bytes);
      if (!std::is_same_v<T, double> && begin == 0) {
        estimate_lengths<T>(args, rows, steps, state.lengths, warp, lane);
        __syncthreads();
      }
      sum_slice<T, absolute>(args, layout, rows, steps, state.lengths, unit_sums, begin == 0,
                             turn++, lane);
    }
    __syncthreads();
    finish_layers<T>(args, token, units, state, warp, lane);
    __syncthreads();
    const bool finite = finish_states(args, token, state);
    const bool counted = args.kinds == nullptr || args.kinds[token] == kCounted;
    if (finite && counted) finish_pairs<T, absolute>(args, token, units, state, lane);
  }
}

template <class T, bool absolute>
void launch_as(const BlockArguments& args, const BlockLaunchShape& shape, Stream stream) {
  const auto kernel = block_sums_kernel<T, absolute>;
  const int shared_bytes = 2 * args.num_states * args.slice_bytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "shared memory of block_sums_kernel");
  const int64_t count = args.tokens.last - args.tokens.first;
  const auto blocks = static_cast<unsigned>(ceil_div(count, shape.tokens_per_block));
  kernel<<<blocks, kThreads, shared_bytes, stream>>>(args);
  check(cudaGetLastError(), "launch of block_sums_kernel");
}

template <class T>
void launch(const BlockArguments& args, bool absolute, const BlockLaunchShape& shape,
            Stream stream) {
  absolute ? launch_as<T, true>(args, shape, stream) : launch_as<T, false>(args, shape, stream);
}

}  // namespace

void sum_blocks(const BlockStates& states, const BlockFold& fold, const BlockTokens& tokens,
                const BlockLaunchShape& shape, double* unit_sums, Stream stream) {
  BlockArguments args{};
  std::copy(states.states.begin(), states.states.end(), args.states);
  args.kinds = fold.places.kinds;
  args.sums = fold.sums;
  args.unit_sums = unit_sums;
  args.tokens = tokens;
  args.num_tokens = states.num_tokens();
  args.inner = states.inner;
  args.row_bytes = states.hidden_size * kElementBytes[static_cast<int>(states.dtype)];
  args.tokens_per_block = shape.tokens_per_block;
  args.num_states = static_cast<int>(states.num_states());
  args.slice_bytes = shape.slice_bytes;
  switch (states.dtype) {
    case DType::kFloat32:
      return launch<float>(args, fold.absolute, shape, stream);
    case DType::kFloat64:
      return launch<double>(args, fold.absolute, shape, stream);
    case DType::kBFloat16:
      return launch<BFloat16>(args, fold.absolute, shape, stream);
    case DType::kFloat16:
      return launch<__half>(args, fold.absolute, shape, stream);
  }
}

}  // namespace simdiff::cuda
