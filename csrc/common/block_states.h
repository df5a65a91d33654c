// The hidden states h_0 ... h_L of one batch, between L layers, and the layout of what is
// accumulated of every pair i < j of them: the block of layers i ... j - 1 turns x = h_i into
// y = h_j. A block is a run of consecutive layers, here and everywhere.
#pragma once

#include <cstdint>
#include <vector>

#include "layer_states.h"

namespace simdiff {

// In the order of BLOCK_METRICS in simdiff_kernels/metrics.py.
inline constexpr int kNumBlockMetrics = 5;
inline constexpr int kAngularDistance = 4;  // behind the first four of Metric
// The state tensor `moments` is (kNumBlockMoments, L + 1, L + 1): sums, sums of squares, and the
// maximum of the squared difference. `counts`: tokens averaged, left out as not finite, seen.
inline constexpr int kNumBlockMoments = 2 * kNumBlockMetrics + 1;
inline constexpr int kNumBlockCounts = 3;

struct BlockStates {
  std::vector<HiddenStates> states;
  int64_t outer;
  int64_t inner;
  int64_t hidden_size;
  DType dtype;

  int64_t num_states() const { return static_cast<int64_t>(states.size()); }
  int64_t num_tokens() const { return outer * inner; }
};

}  // namespace simdiff
