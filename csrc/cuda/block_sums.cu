// What every block of layers does to each token, in one pass over the hidden states:
//   sum d^2 and 1 - cos(x, y) of every pair x = h_i, y = h_j, i < j, d = y - x, by the formula of
//   common/scaled_pair.h, sum |d| where it is wanted, and
//   sum x^2, sum y^2, sum d^2, sum |d| of every layer, x = h_k, y = h_(k+1).
// Bytes per token: (L + 1) * hidden_size * element size read, each byte once; 16 written for each
// pair (24 with sum |d|), 8 for each state and 32 for each layer.
//
// Data path: a CTA takes consecutive tokens. Global memory -> slices of all rows, 1 KB of each, in
// one half of shared memory, by cp.async, while the warps sum the slice in the other half ->
// registers, a tile of pairs to eight lanes (block_tiles.cuh) -> joined after each slice and added,
// as float64, to words of their own in global memory, which stay in L1 and L2 -> after the last
// slice, while the next token's first slice arrives, a thread for each pair forms its distance
// (block_token.cuh). Layers and pairs for which float32 is not enough (common/trust.h,
// scaled_pair.h) are read again, out of L2, and summed in float64 by a warp. Issue is the limit:
//
// Warp instructions per token of 33 states of 4096 bf16 entries, from the machine code for sm_90:
//   loops over tiles   196,000   of which 151,000 are the float32 operations of 7 quads of squares
//                                and 2 of triangles (135,000 of the 528 pairs); counted by
//                                tests/kernels/test_cuda_compile.py
//   units beside them   20,000   12 a slice: where rows lie, ratios, adding up lanes
//   copies              11,000   first slices once more for lengths, barriers: 3,000
//   end of the token    11,000   float64: 528 pairs, 32 layers
// 241,000 in all: 3.8 ms for 8 x 2048 tokens on an H200 (528 schedulers at 1.98 GHz) if every cycle
// issues one, 4.4 ms at 86%. Predicted, not measured. Memory needs 1.0 ms of that.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "block_stages.h"
#include "block_tiles.cuh"
#include "block_token.cuh"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

// 128 registers a thread. While one CTA waits at a barrier or finishes a token the other computes.
constexpr int kCtasPerMultiprocessor = 2;
// Vectors that a lane copies of each row.
constexpr int kCopies = kMaxSliceBytes / (kLanes * kVectorBytes);

// Goes over the slices of the tokens that are read. Lane l of a warp knows where the row of state
// warp + kWarps * l begins.
template <class T>
struct SliceReader {
  const BlockArguments& args;
  int token, count;  // of the tokens of this CTA
  int slice = 0;     // of the token
  const char* row = nullptr;

  __device__ explicit SliceReader(const BlockArguments& arguments) : args(arguments), token(-1) {
    count =
        static_cast<int>(min(int64_t{args.tokens_per_cta}, args.tokens.last - first_token(args)));
    find_token();
  }

  __device__ bool at_end() const { return token >= count; }

  __device__ void find_token() {
    do {
      ++token;
    } while (!at_end() && !is_read(args, first_token(args) + token));
    const int state = threadIdx.x / kLanes + kWarps * (threadIdx.x % kLanes);
    if (!at_end() && state < args.num_states) {
      row = reinterpret_cast<const char*>(row_of<T>(args, state, first_token(args) + token));
    }
  }

  __device__ int64_t begin() const { return int64_t{slice} * args.slice_bytes; }

  __device__ void advance() {
    ++slice;
    if (begin() < args.row_bytes) return;
    slice = 0;
    find_token();
  }

  // Starts copies of this slice, filled up with zeros to whole steps, as one group.
  __device__ void copy_to(char* target_rows) const {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    if (!at_end()) {
      const int64_t start = begin(), left = args.row_bytes - start;
      const int size = static_cast<int>(min(int64_t{args.slice_bytes}, left));
      const int padded = (size + kStepBytes - 1) / kStepBytes * kStepBytes;
      int places[kCopies];  // of this lane, in any row
#pragma unroll
      for (int k = 0; k < kCopies; ++k) places[k] = (k * kLanes + lane) * kVectorBytes;
#pragma unroll 1
      for (int state = warp, holder = 0; state < args.num_states; state += kWarps, ++holder) {
        const auto bits = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(row), holder);
        const char* const source = reinterpret_cast<const char*>(bits) + start;
        char* const target = target_rows + state * args.slice_bytes;
        if ((bits | size) % kVectorBytes != 0) {
          copy_unaligned(source, size, padded, target, lane);
          continue;
        }
#pragma unroll
        for (int k = 0; k < kCopies; ++k) {
          if (places[k] < padded) {
            const bool exists = places[k] < size;
            copy_async(target + places[k], source + (exists ? places[k] : 0), exists);
          }
        }
      }
    }
    commit_copies();
  }

  __device__ void copy_unaligned(const char* source, int size, int padded, char* target,
                                 int lane) const {
    constexpr int kSize = sizeof(T);
#pragma unroll 4
    for (int at = lane * kSize; at < padded; at += kLanes * kSize) {
      T entry{};
      if (at < size) entry = *reinterpret_cast<const T*>(source + at);
      *reinterpret_cast<T*>(target + at) = entry;
    }
  }
};

// The squared lengths of all rows in the token's first slice, by which the rows are scaled.
template <class T>
__device__ void estimate_lengths(const BlockArguments& args, const char* slice, int steps,
                                 Length* lengths, int warp, int lane) {
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
    sum = usual_length(sum);
    if (lane == 0) lengths[state] = {sum, __frcp_rn(sum)};
  }
}

// The sums of a lane's tile in a slice, joined and added to `target`.
template <int count, class V>
__device__ void store_sums(V (&sums)[count], double* target, bool first_slice, int lane) {
  constexpr int kOwn = count / kTileLanes;
  double earlier[kOwn];  // on its way while the lanes are joined
#pragma unroll
  for (int k = 0; k < kOwn; ++k) earlier[k] = first_slice ? 0.0 : target[lane * kOwn + k];
  join_lanes<count>(sums, lane);
#pragma unroll
  for (int k = 0; k < kOwn; ++k) target[lane * kOwn + k] = earlier[k] + sums[k];
}

template <class T, bool absolute>
__device__ void sum_unit(const BlockLayout& layout, const Unit& unit, const Slice& slice,
                         const Length* lengths, double* target, bool first_slice, int lane) {
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
                          int steps, const Length* lengths, double* unit_sums, bool first_slice,
                          int turn, int lane) {
  constexpr int kKinds = absolute ? 2 : 1;
#pragma unroll 1
  for (int number = turn % kWarps; number < kKinds * layout.units; number += kWarps) {
    const bool second = absolute && number >= layout.units;
    const Unit unit = layout.unit(second ? number - layout.units : number);
    const Slice slice{rows, args.slice_bytes, (steps * unit.share) >> unit.share_bits,
                      (steps * (unit.share + 1)) >> unit.share_bits};
    double* const target = unit_sums + number * kUnitSums;
    if (absolute && second) {
      sum_unit<T, true>(layout, unit, slice, lengths, target, first_slice, lane);
    } else {
      sum_unit<T, false>(layout, unit, slice, lengths, target, first_slice, lane);
    }
  }
}

// Row sums of tokens that are not read.
__device__ void clear_sums(const BlockArguments& args) {
  if (args.kinds == nullptr || args.sums == nullptr) return;
  const int num_words = 4 * (args.num_states - 1);
  const int64_t first = first_token(args);
  const int64_t end = min(args.tokens.last, first + args.tokens_per_cta);
  for (int64_t token = first; token < end; ++token) {
    if (is_read(args, token)) continue;
    for (int word = threadIdx.x; word < num_words; word += kThreads) {
      args.sums[4 * (word / 4 * args.num_tokens + token) + word % 4] = 0;
    }
  }
}

template <class T, bool absolute>
__global__ void __launch_bounds__(kThreads, kCtasPerMultiprocessor)
    block_sums_kernel(const __grid_constant__ BlockArguments args) {
  extern __shared__ uint4 shared[];  // two slices of all rows
  __shared__ TokenState state;
  char* const slices = reinterpret_cast<char*>(shared);
  const int slot_bytes = args.num_states * args.slice_bytes;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  // In shared memory: registers are scarce. The barrier is that before the first slice.
  __shared__ BlockLayout layout;
  const int steps_of_slice = args.slice_bytes / kStepBytes;
  if (threadIdx.x == 0) layout = BlockLayout(args.num_states, steps_of_slice);
  double* const unit_sums = args.unit_sums + int64_t{blockIdx.x} * args.units * kUnitSums;
  const UnitSums units{layout, unit_sums};
  clear_sums(args);

  SliceReader<T> reader(args);
  int slot = 0, turn = warp;
  reader.copy_to(slices);
#pragma unroll 1
  while (!reader.at_end()) {
    const int64_t token = first_token(args) + reader.token;
    int64_t left = args.row_bytes;
#pragma unroll 1
    for (bool is_first = true; left > 0; is_first = false, left -= args.slice_bytes) {
      // This slice is here, and nobody reads the one before any more.
      wait_for_copies<0>();
      __syncthreads();
      const char* const rows = slices + slot * slot_bytes;
      const int size = static_cast<int>(min(int64_t{args.slice_bytes}, left));
      const int steps = (size + kStepBytes - 1) / kStepBytes;
      slot ^= 1;
      reader.advance();
      reader.copy_to(slices + slot * slot_bytes);
      if (!std::is_same_v<T, double> && is_first) {
        estimate_lengths<T>(args, rows, steps, state.lengths, warp, lane);
        __syncthreads();
      }
      sum_slice<T, absolute>(args, layout, rows, steps, state.lengths, unit_sums, is_first, turn++,
                             lane);
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
  const auto num_ctas = static_cast<unsigned>(ceil_div(count, shape.tokens_per_cta));
  kernel<<<num_ctas, kThreads, shared_bytes, stream>>>(args);
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
  args.row_bytes = states.hidden_size * element_bytes(states.dtype);
  args.tokens_per_cta = shape.tokens_per_cta;
  args.num_states = static_cast<int>(states.num_states());
  args.slice_bytes = shape.slice_bytes;
  args.units = shape.units * (fold.absolute ? 2 : 1);
  with_element(states.dtype, [&](auto element) {
    launch<decltype(element)>(args, fold.absolute, shape, stream);
  });
}

}  // namespace simdiff::cuda
