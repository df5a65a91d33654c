// Row sums of a layer on a GPU. With a token's rows x = before, y = after and d = y - x:
//   sum x^2, sum y^2, sum d^2, sum |d|   over the hidden dimension, in float64.
// Bytes per token: 2 * hidden_size * element size read, 32 written. Memory is the limit.
//
// Data path: global memory -> a ring in shared memory that belongs to one lane, 16 bytes of each
// row at a time (cp.async: no registers wait, no barrier is needed, and the next rows are on their
// way while this one is reduced) -> registers, float32 sums of the lane, widened to float64 once
// per kShortSteps vectors -> over the lanes that share the row, in float64 -> 8 bytes of the token
// by each of four lanes (row_token.cuh).
//
// Per pair of entries, all float32: d = y - x, three multiply-adds (x^2, x d, d^2), one addition
// (|d|). What that costs in accuracy is bounded: at most kShortSteps * 8 terms follow each other
// before a sum is widened, so that it is off by at most 32 * 2^-24 of the sum of its absolute
// terms, and typically by 1e-8. A row for which that is not enough (common/trust.h) is read again,
// out of L2, and summed in float64, as float64 states are from the beginning.
//
// Rows that do not start and end at multiples of 16 bytes, and GPUs without cp.async, take
// row_sums_direct: the same sums from loads into registers.
//
// A multiprocessor runs one CTA, or two, of as many warps as share its rows evenly: 62 rows are
// four rounds of 16 warps. With 24 warps they are three rounds and a half of the last stands idle;
// on an H200 that was 0.84 of a pure read where 16 warps reach 0.90 (8192 x 4096 bfloat16).
#include <cuda_runtime.h>

#include <algorithm>

#include "entries.cuh"
#include "row_sums.h"
#include "row_token.cuh"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

// Of a multiprocessor. More are no faster: 128 KB on their way are enough for an H200.
constexpr int kMaxWarps = 16;
constexpr int kMinWarps = 8;
constexpr int kMaxThreads = kMaxWarps * kLanes;
constexpr int kSharedWarps = 8;  // of a CTA all of whose lanes share a row
constexpr int kSharedLanes = kSharedWarps * kLanes;
// 16-byte vectors of each row that a lane has on the way.
template <int row_lanes>
constexpr int kStages = row_lanes < kLanes ? 4 : 8;
constexpr int ring_bytes(int stages) { return 2 * kVectorBytes * kLanes * stages; }  // of a warp

constexpr int kDirectWarps = 8;
constexpr int kDirectLoads = 4;  // of each row in flight, 16 bytes a lane: 4 KB a warp

template <class T, int row_lanes>
__global__ void __launch_bounds__(kMaxThreads, 1)
    row_sums_ring(const __grid_constant__ RowArguments args) {
  constexpr bool kSharedRows = row_lanes == kSharedLanes;
  constexpr int num_stages = kStages<row_lanes>;
  static_assert(kSharedRows || row_lanes <= kLanes);
  extern __shared__ uint4 rings[];  // (warps, num_stages, before and after, kLanes)
  const int thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  const int group = thread / row_lanes, row_lane = thread % row_lanes;
  const int groups = blockDim.x / row_lanes;  // rows of a CTA at a time
  uint4* const ring = rings + warp * num_stages * 2 * kLanes + lane;

  const int row_bytes = args.hidden_size * static_cast<int>(sizeof(T));
  const int num_steps = (row_bytes + kVectorBytes * row_lanes - 1) / (kVectorBytes * row_lanes);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * groups;
  const Place stride_place(args, stride);
  // Of this warp's first row, so that all of its lanes go round equally often.
  const int64_t first_of_warp =
      static_cast<int64_t>(blockIdx.x) * groups + (kSharedRows ? 0 : warp * kLanes / row_lanes);

  // The copies to start next: step `copy_step` of a row of this lane's group.
  RowCursor copied(args, static_cast<int64_t>(blockIdx.x) * groups + group);
  RowPair rows = copied.rows(args);
  bool wanted = is_wanted(args, copied.token), next_wanted = is_wanted(args, copied.token + stride);
  int64_t copied_of_warp = first_of_warp;
  int copy_step = 0, copy_stage = 0;
  const auto start_copies = [&] {
    if (copied_of_warp < args.num_tokens) {
      const int at = (copy_step * row_lanes + row_lane) * kVectorBytes;
      const bool exists = wanted && at < row_bytes;
      uint4* slot = ring + copy_stage * 2 * kLanes;
      copy_async(slot, rows.before + at, exists);
      copy_async(slot + kLanes, rows.after + at, exists);
      if (++copy_step == num_steps) {
        copy_step = 0;
        copied_of_warp += stride;
        copied.advance(args, stride, stride_place);
        rows = copied.rows(args);
        wanted = next_wanted;
        // Read one row early: a load of the mask takes as long as one of the row.
        next_wanted = is_wanted(args, copied.token + stride);
      }
    }
    commit_copies();  // an empty group too: they are counted
    copy_stage = (copy_stage + 1) % num_stages;
  };

#pragma unroll 1
  for (int i = 0; i < num_stages - 1; ++i) start_copies();
  int stage = 0;
  bool odd = false;
#pragma unroll 1
  for (int64_t token = first_of_warp; token < args.num_tokens; token += stride) {
    double sums[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int left = num_steps; left > 0; left -= kShortSteps) {
      LaneSums<T> part;
#pragma unroll
      for (int i = 0; i < kShortSteps; ++i) {
        if (i >= left) break;
        start_copies();
        wait_for_copies<num_stages - 1>();
        const uint4* slot = ring + stage * 2 * kLanes;
        const uint4 x = slot[0], y = slot[kLanes];
        stage = (stage + 1) % num_stages;
        part.add(&x.x, &y.x);
      }
      part.widen_into(sums);
    }
    if constexpr (kSharedRows) {
      __shared__ double parts[2][kSharedWarps][4];  // by turns, so that one barrier is enough
      finish_shared_row<T, kSharedWarps>(args, group_sums<kLanes>(sums, lane), token, parts[odd],
                                         warp, lane);
      odd = !odd;
    } else {
      finish_row<T, row_lanes>(args, group_sums<row_lanes>(sums, lane), token + lane / row_lanes,
                               lane);
    }
  }
}

// How a pair of rows is read: `num_vectors` times 16 bytes from entry `head` on, the rest entry by
// entry. Rows that start unaligned, but both by the same number of bytes, lose only their ends.
template <class T>
struct RowSplit {
  int head = 0;
  int num_vectors = 0;

  __device__ RowSplit(const T* before, const T* after, int hidden_size) {
    const unsigned offset = reinterpret_cast<uintptr_t>(before) % kVectorBytes;
    if (reinterpret_cast<uintptr_t>(after) % kVectorBytes != offset) return;
    head = min(hidden_size, static_cast<int>((kVectorBytes - offset) % kVectorBytes / sizeof(T)));
    num_vectors = (hidden_size - head) / kVector<T>;
  }
};

template <class T>
__global__ void __launch_bounds__(kDirectWarps* kLanes, 4)
    row_sums_direct(const __grid_constant__ RowArguments args) {
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kDirectWarps;
  const Place stride_place(args, stride);
  RowCursor cursor(args, static_cast<int64_t>(blockIdx.x) * kDirectWarps + threadIdx.x / kLanes);
#pragma unroll 1
  for (; cursor.token < args.num_tokens; cursor.advance(args, stride, stride_place)) {
    double sums[4] = {0, 0, 0, 0};
    if (is_wanted(args, cursor.token)) {
      const RowPair rows = cursor.rows(args);
      const T* before = reinterpret_cast<const T*>(rows.before);
      const T* after = reinterpret_cast<const T*>(rows.after);
      const RowSplit<T> split(before, after, args.hidden_size);
      const int num_singles = args.hidden_size - split.num_vectors * kVector<T>;
#pragma unroll 1
      for (int single = lane; single < num_singles; single += kShortSteps * 8 * kLanes) {
        LaneSums<T> part;
#pragma unroll 4
        for (int i = 0; i < kShortSteps * 8; ++i) {
          const int at = single + i * kLanes;
          if (at >= num_singles) break;
          const int entry = at < split.head ? at : at + split.num_vectors * kVector<T>;
          part.add(single_value(before[entry]), single_value(after[entry]));
        }
        part.widen_into(sums);
      }
      before += split.head;
      after += split.head;
#pragma unroll 1
      for (int vector = lane; vector < split.num_vectors; vector += kDirectLoads * kLanes) {
        Words x[kDirectLoads], y[kDirectLoads];
#pragma unroll
        for (int u = 0; u < kDirectLoads; ++u) {
          x[u] = y[u] = {};  // adds nothing
          const int64_t at = static_cast<int64_t>(vector + u * kLanes) * kVector<T>;
          if (vector + u * kLanes < split.num_vectors) {
            x[u] = load_words(before + at);
            y[u] = load_words(after + at);
          }
        }
        LaneSums<T> part;
#pragma unroll
        for (int u = 0; u < kDirectLoads; ++u) part.add(x[u].words, y[u].words);
        part.widen_into(sums);
      }
    }
    __syncwarp();
    finish_row<T, kLanes>(args, group_sums<kLanes>(sums, lane), cursor.token, lane);
  }
}

struct Kernel {
  void (*function)(RowArguments);
  RowShape shape;
  int rows_of_cta() const { return kLanes * shape.warps / shape.row_lanes; }
};

template <class T>
Kernel kernel_of(const RowShape& shape) {
  if (shape.stages == 0) return {row_sums_direct<T>, shape};
  if (shape.row_lanes == 8) return {row_sums_ring<T, 8>, shape};
  if (shape.row_lanes == kSharedLanes) return {row_sums_ring<T, kSharedLanes>, shape};
  return {row_sums_ring<T, kLanes>, shape};
}

const RowDevice& row_device(int device) {
  return asked_once(device, [&] {
    return RowDevice{attribute_of(device, cudaDevAttrMultiProcessorCount),
                     attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                     attribute_of(device, cudaDevAttrComputeCapabilityMajor) >= 8};
  });
}

bool is_aligned(const HiddenStates& states, const LayerStates& all) {
  const int64_t bytes = element_bytes(all.dtype);
  int64_t bits = reinterpret_cast<int64_t>(states.data) | (all.hidden_size * bytes);
  if (all.outer > 1) bits |= states.outer_stride * bytes;
  if (all.inner > 1) bits |= states.inner_stride * bytes;
  return bits % kVectorBytes == 0;
}

// Leading dimensions that lie one behind the other become one: no row then starts with a jump.
bool is_one_run(const HiddenStates& states, int64_t outer, int64_t inner) {
  return outer == 1 || states.outer_stride == inner * states.inner_stride;
}

}  // namespace

RowShape row_shape(int64_t num_tokens, int64_t hidden_size, DType dtype, bool aligned,
                   const RowDevice& device) {
  if (!aligned) return {kLanes, 0, kDirectWarps, 4};
  const int64_t row_bytes = hidden_size * element_bytes(dtype);
  // Shares of a pure read on an H200, bfloat16. 64 x 4096: a CTA a row 0.62, a warp a row 0.40.
  if (num_tokens <= 256 && row_bytes >= kVectorBytes * kSharedLanes) {
    return {kSharedLanes, kStages<kSharedLanes>, kSharedWarps, 2};
  }
  // 32768 x 576: 8 lanes a row 0.87, a warp 0.77; 8192 x 2048: 0.89 and 0.86; 2048 x 576: 0.68 and
  // 0.70.
  const int row_lanes = num_tokens >= 4096 && row_bytes <= 4096 ? 8 : kLanes;
  const int64_t per_multiprocessor =
      ceil_div(ceil_div(num_tokens, kLanes / row_lanes), device.multiprocessors);
  const int stages = row_lanes == kLanes ? kStages<kLanes> : kStages<8>;
  const int64_t fit = device.shared_bytes / ring_bytes(stages);
  int64_t most = std::min<int64_t>(kMaxWarps, fit);
  // Two rounds rather than one, so that loads are in flight while the first is reduced: 2048 x 4096
  // by 8 warps 0.88, by 16 warps 0.86. Of short rows as many as fit at once: 8192 x 576 in two CTAs
  // of 8 warps 0.87, in one of 16 0.86, in one of 8 0.81.
  if (row_lanes == kLanes) {
    most = std::min(most, std::max<int64_t>(kMinWarps, ceil_div(per_multiprocessor, 2)));
  }
  const int64_t warps = ceil_div(per_multiprocessor, ceil_div(per_multiprocessor, most));
  const int ctas = row_lanes == kLanes ? 1 : 2;
  return {row_lanes, stages, static_cast<int>(ceil_div(warps, ctas)), ctas};
}

void row_sums(const LayerStates& states, const bool* mask, double* sums, int device,
              Stream stream) {
  if (states.num_tokens() == 0) return;
  check_hidden_size(states.hidden_size);
  const int64_t bytes = element_bytes(states.dtype);
  const CurrentDevice current(device);
  const RowDevice& limits = row_device(device);
  const bool aligned = limits.copies_asynchronously && is_aligned(states.before, states) &&
                       is_aligned(states.after, states);
  const RowShape shape =
      row_shape(states.num_tokens(), states.hidden_size, states.dtype, aligned, limits);
  const Kernel kernel =
      with_element(states.dtype, [&](auto element) { return kernel_of<decltype(element)>(shape); });
  const bool one_run = is_one_run(states.before, states.outer, states.inner) &&
                       is_one_run(states.after, states.outer, states.inner);
  RowArguments args{};
  args.before = static_cast<const char*>(states.before.data);
  args.after = static_cast<const char*>(states.after.data);
  args.mask = mask;
  args.sums = sums;
  args.before_outer_stride = states.before.outer_stride * bytes;
  args.before_inner_stride = states.before.inner_stride * bytes;
  args.after_outer_stride = states.after.outer_stride * bytes;
  args.after_inner_stride = states.after.inner_stride * bytes;
  args.num_tokens = states.num_tokens();
  args.inner = one_run ? states.num_tokens() : states.inner;
  args.hidden_size = static_cast<int>(states.hidden_size);
  const int threads = shape.warps * kLanes, shared_bytes = shape.warps * ring_bytes(shape.stages);
  allow_shared_memory(reinterpret_cast<const void*>(kernel.function), device, limits.shared_bytes);
  const int64_t num_ctas = std::min(ceil_div(args.num_tokens, kernel.rows_of_cta()),
                                    int64_t{shape.ctas} * limits.multiprocessors);
  kernel.function<<<static_cast<unsigned>(num_ctas), threads, shared_bytes, stream>>>(args);
  check(cudaGetLastError(), "launch of row_sums");
}

}  // namespace simdiff::cuda
