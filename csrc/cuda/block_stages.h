// What block_sums.cu hands over to block_fold.cu, for some of the tokens of an update.
#pragma once

#include <cuda_runtime.h>

#include "block_metrics.h"

namespace simdiff::cuda {

// The tokens `first` ... `last` - 1 and what was measured of each.
struct BlockTokens {
  int64_t first, last;
  double* norms;     // (tokens, L + 1): of each state; NaN for a token that is not finite
  double2* pairs;    // (tokens, pairs): sum d^2 and the cosine distance
  double* absolute;  // (tokens, pairs): sum |d|; or null
};

// Counts of block_launch_shape.
void sum_blocks(const BlockStates& states, const BlockFold& fold, const BlockTokens& tokens,
                const BlockLaunchShape& shape, double* unit_sums, Stream stream);
void fold_blocks(const BlockStates& states, const BlockFold& fold, const BlockTokens& tokens,
                 Stream stream);

}  // namespace simdiff::cuda
