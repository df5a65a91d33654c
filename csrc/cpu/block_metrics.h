// accumulate_blocks on the CPU: the metrics of every block of layers (a pair i < j of the hidden
// states h_0 ... h_L), over all tokens of one batch. Raw pointers, int64 sizes; threads come from
// the caller's pool.
#pragma once

#include "../common/block_states.h"
#include "layer_metrics.h"

namespace simdiff {

// Folds the tokens that `places` counts into its running states: `moments` (running states,
// kNumBlockMoments, L + 1, L + 1), of which the absolute difference only where `absolute` asks for
// it, and `counts` (running states, kNumBlockCounts). `row_sums` (or null), (L, tokens), receives
// the sums of every layer's pair, also of tokens that are not counted, but zeros where they are
// left out. Bitwise the same result for any number of threads, and for any division of the tokens
// into calls that ends with a running state: tokens are summed in chunks of a fixed size from the
// beginning of each running state, and the chunks are joined in order.
void accumulate_blocks(const BlockStates& states, const TokenPlaces& places, bool absolute,
                       double* moments, int64_t* counts, RowSums* row_sums,
                       const ParallelFor& parallel_for);

}  // namespace simdiff
