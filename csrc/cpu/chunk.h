// The tokens that a thread measures together. First all rows are read, then one loop turns sums
// into metrics and one folds them, metric by metric: vector code, where one token after the other
// would take as long as reading a row of 576 bfloat16 entries.
#pragma once

#include <cstdint>

#include "../common/metrics.h"

namespace simdiff {

inline constexpr int64_t kMaxChunk = 1024;
inline constexpr int kTokenLanes = 8;  // tokens folded together
static_assert(kMaxChunk % kTokenLanes == 0);

struct Chunk {
  RowSums sums[kMaxChunk];
  double values[kNumMetrics][kMaxChunk];
  int64_t used[kMaxChunk];  // counted and finite: all bits set, else none
};

}  // namespace simdiff
