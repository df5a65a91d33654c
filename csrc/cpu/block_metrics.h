// The CPU implementation of accumulate_blocks over all tokens of one batch. Raw pointers, int64
// sizes; threads come from the caller's pool.
#pragma once

#include "../common/block_states.h"
#include "layer_metrics.h"

namespace simdiff {

// Folds all tokens with mask[token] != 0 (null: all) into `moments`, (kNumBlockMoments, L + 1,
// L + 1), and `tallies`: tokens averaged, left out as not finite, seen in all. Bitwise the same
// result for any number of threads: tokens are summed in chunks of a fixed size, and the chunks are
// joined in order.
void accumulate_blocks(const BlockStates& states, const bool* mask, double* moments,
                       int64_t* tallies, const ParallelFor& parallel_for);

}  // namespace simdiff
