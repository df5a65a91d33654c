// The scorers of one layer on the CPU: row sums of all its tokens, their fold into running states,
// and both at once. Raw pointers, int64 sizes; threads come from the caller's pool.
#pragma once

#include <functional>

#include "../common/layer_states.h"
#include "../common/metrics.h"

namespace simdiff {

// Calls body(begin, end) for disjoint ranges that cover [0, count).
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>&)>;

// The sums of every token with mask[token] != 0 (null: all), zeros for the others.
void row_sums(const LayerStates& states, const bool* mask, RowSums* sums,
              const ParallelFor& parallel_for);

// Folds row sums (num_layers, num_tokens) into the running states of all layers: `moments`
// (num_states, num_layers, 3, kNumMetrics), `counts` (num_states, num_layers, kNumMetrics + 3).
// Bitwise the same result for any number of threads.
void fold_sums(const RowSums* sums, int64_t num_layers, int64_t num_tokens, int64_t hidden_size,
               const TokenPlaces& places, double* moments, int64_t* counts,
               const ParallelFor& parallel_for);

// The metrics of every token from its sums, (num_layers, kNumMetrics, num_tokens).
void token_metrics(const RowSums* sums, int64_t num_layers, int64_t num_tokens, int64_t hidden_size,
                   PerToken out, bool float64, const ParallelFor& parallel_for);

void token_metrics(const LayerStates& states, PerToken out, const ParallelFor& parallel_for);

// Folds all tokens with mask[token] != 0 (null: all) into `state`. Bitwise the same result for any
// number of threads: tokens are summed in chunks whose size depends on hidden_size alone, and the
// chunks are joined in order.
void accumulate(const LayerStates& states, const bool* mask, RunningState& state, PerToken out,
                const ParallelFor& parallel_for);

}  // namespace simdiff
