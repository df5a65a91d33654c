// The CPU implementation of both operators over all tokens of one layer. Raw pointers, int64
// sizes; threads come from the caller's pool.
#pragma once

#include <functional>

#include "row_sums.h"

namespace simdiff {

// Hidden states (outer, inner, hidden_size); strides in elements, the last one is 1.
struct HiddenStates {
  const void* data;
  int64_t outer_stride;
  int64_t inner_stride;
};

struct LayerStates {
  HiddenStates before;
  HiddenStates after;
  int64_t outer;
  int64_t inner;
  int64_t hidden_size;
  DType dtype;

  int64_t num_tokens() const { return outer * inner; }
};

// Per-token results, metric by metric: out[metric * num_tokens + token]. Float64 states give
// float64 results, all others float32. A null pointer: not wanted.
using PerToken = void*;

// Calls body(begin, end) for disjoint ranges that cover [0, count).
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>&)>;

void token_metrics(const LayerStates& states, PerToken out, const ParallelFor& parallel_for);

// Folds all tokens with mask[token] != 0 (null: all) into `state`. Bitwise the same result for any
// number of threads: tokens are summed in chunks whose size depends on hidden_size alone, and the
// chunks are joined in order.
void accumulate(const LayerStates& states, const bool* mask, RunningState& state, PerToken out,
                const ParallelFor& parallel_for);

}  // namespace simdiff
