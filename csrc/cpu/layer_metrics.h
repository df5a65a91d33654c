// The CPU implementation of both operators over all tokens of one layer. Raw pointers, int64
// sizes; threads come from the caller's pool.
#pragma once

#include <functional>

#include "../common/layer_states.h"
#include "../common/metrics.h"

namespace simdiff {

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
