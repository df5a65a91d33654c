// What row_sums.cu does with a row beside reading it: where the rows x and y of a token lie, the
// sums of one lane, and their way from the lanes of a row to memory.
//
//   sum x^2, sum x d, sum d^2, sum |d| of a lane, float32, widened every kShortSteps vectors
//   -> group_sums over the lanes of the row, float64 (entries.cuh)
//   -> sum y^2 from these and the trust test (common/trust.h)
//   -> for a row that fails it, the row once more out of L2, in float64, by a whole warp
//   -> 32 bytes of the token, 8 by each of four lanes
#pragma once

#include <type_traits>

#include "../common/layer_states.h"
#include "../common/trust.h"
#include "entries.cuh"

namespace simdiff::cuda {

inline constexpr int kShortSteps = 4;  // vectors whose terms are added in float32

struct RowArguments {
  const char* before;
  const char* after;
  const bool* mask;
  double* sums;
  int64_t before_outer_stride, before_inner_stride;  // bytes
  int64_t after_outer_stride, after_inner_stride;
  int64_t num_tokens;
  int64_t inner;
  int hidden_size;
};

// The sums of one lane. Float64 states have sum y^2 in the place of sum x d.
template <class T>
struct LaneSums {
  static constexpr bool kIsExact = std::is_same_v<T, double>;
  using Value = std::conditional_t<kIsExact, double, float>;
  Value sums[4] = {0, 0, 0, 0};

  __device__ void add(Value x, Value y) {
    const Value d = y - x;
    sums[0] = fma(x, x, sums[0]);
    sums[1] = kIsExact ? fma(y, y, sums[1]) : fma(x, d, sums[1]);
    sums[2] = fma(d, d, sums[2]);
    sums[3] += fabs(d);
  }

  __device__ void add(const unsigned* x, const unsigned* y) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) add(entry_value<T>(x, i), entry_value<T>(y, i));
  }

  __device__ void widen_into(double (&wide)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) wide[i] += static_cast<double>(sums[i]);
  }
};

struct RowPair {
  const char* before;
  const char* after;
};

// A number of tokens as so many times `inner` and the rest. Rows that lie one behind the other,
// with the largest `inner`, need no division.
struct Place {
  int64_t outer, inner;

  __device__ Place(const RowArguments& args, int64_t tokens) : outer(0), inner(tokens) {
    if (tokens < args.inner) return;
    outer = tokens / args.inner;
    inner = tokens - outer * args.inner;
  }
};

// A token and its place in (outer, inner). The next one of a warp is `step` tokens on, and found by
// additions alone: a division of 64 bits takes as long as a load from memory.
struct RowCursor {
  int64_t token, outer, inner;

  __device__ RowCursor(const RowArguments& args, int64_t first) : token(first) {
    const Place place(args, first);
    outer = place.outer;
    inner = place.inner;
  }

  __device__ void advance(const RowArguments& args, int64_t step, const Place& step_place) {
    token += step;
    outer += step_place.outer;
    inner += step_place.inner;
    if (inner >= args.inner) {
      inner -= args.inner;
      ++outer;
    }
  }

  __device__ RowPair rows(const RowArguments& args) const {
    return {args.before + outer * args.before_outer_stride + inner * args.before_inner_stride,
            args.after + outer * args.after_outer_stride + inner * args.after_inner_stride};
  }
};

__device__ inline bool is_wanted(const RowArguments& args, int64_t token) {
  return token < args.num_tokens && (args.mask == nullptr || args.mask[token]);
}

// All four sums of a group of lanes to each of its lanes, from what group_sums left.
template <int num_lanes>
__device__ void gather_sums(double own, int lane, double (&sums)[4]) {
  const int first = lane / num_lanes * num_lanes;
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = __shfl_sync(kAllLanes, own, first + i * (num_lanes / 4));
}

// The row of one token in float64, by all lanes of a warp, all of which return it.
template <class T>
__device__ RowSums exact_row(const RowArguments& args, int64_t token, int lane) {
  const RowPair rows = RowCursor(args, token).rows(args);
  const T* before = reinterpret_cast<const T*>(rows.before);
  const T* after = reinterpret_cast<const T*>(rows.after);
  LaneSums<double> exact;
#pragma unroll 4
  for (int entry = lane; entry < args.hidden_size; entry += kLanes) {
    exact.add(single_value(before[entry]), single_value(after[entry]));
  }
  double sums[4];
  gather_sums<kLanes>(group_sums<kLanes>(exact.sums, lane), lane, sums);
  return {sums[0], sums[1], sums[2], sums[3]};
}

// From what a group's lanes hold after group_sums to the row's sums in memory: `token` is the one
// of this lane's group.
template <class T, int num_lanes>
__device__ void finish_row(const RowArguments& args, double own, int64_t token, int lane) {
  double sums[4];
  gather_sums<num_lanes>(own, lane, sums);
  RowSums row{sums[0], sums[1], sums[2], sums[3]};
  if constexpr (!LaneSums<T>::kIsExact) {
    row.after_squared = after_squared(sums[0], sums[1], sums[2]);
    const bool again = !float32_is_enough(row) && is_wanted(args, token);
    for (unsigned left = __ballot_sync(kAllLanes, again && lane % num_lanes == 0); left;
         left &= left - 1) {
      const int first = __ffs(left) - 1;
      const RowSums exact = exact_row<T>(args, __shfl_sync(kAllLanes, token, first), lane);
      if (lane / num_lanes * num_lanes == first) row = exact;
    }
  }
  constexpr int kShare = num_lanes / 4;  // lanes for each of the four numbers
  if (token < args.num_tokens && lane % kShare == 0) {
    const int number = lane % num_lanes / kShare;
    const double low = number == 0 ? row.before_squared : row.after_squared;
    const double high = number == 2 ? row.difference_squared : row.difference_absolute;
    args.sums[4 * token + number] = number < 2 ? low : high;
  }
}

// Where the rows of all warps are shared by a whole CTA: the warps' sums, added in their order.
template <class T, int num_warps>
__device__ void finish_shared_row(const RowArguments& args, double own, int64_t token,
                                  double (*parts)[4], int warp, int lane) {
  if (lane % 8 == 0) parts[warp][lane / 8] = own;
  __syncthreads();
  if (warp != 0) return;
  double sum = 0;
#pragma unroll
  for (int w = 0; w < num_warps; ++w) sum += parts[w][lane / 8];
  finish_row<T, kLanes>(args, sum, token, lane);
}

}  // namespace simdiff::cuda
