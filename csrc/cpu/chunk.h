// The tokens ("rows") that a thread measures together. Sums are turned into metrics several rows at
// a time and folded metric by metric: vector code, where one row after the other would take as long
// as reading a row of 576 bfloat16 entries. A chunk is 32 bytes of sums, 48 of metrics and 8 of a
// mask for each of at most 1024 rows: 90 KB, in the second cache.
#pragma once

#include <cstdint>

#include "../common/metrics.h"

namespace simdiff {

inline constexpr int64_t kCacheLine = 64;   // bytes
inline constexpr int64_t kMaxChunk = 1024;  // rows
inline constexpr int kMaxRowsTogether = 4;  // read side by side
inline constexpr int kTokenLanes = 8;       // rows turned into metrics, and folded, together
static_assert(kMaxChunk % kTokenLanes == 0);

// Room for the rows with which the last kTokenLanes are filled up.
struct Chunk {
  RowSums sums[kMaxChunk + kTokenLanes];
  double values[kNumMetrics][kMaxChunk + kTokenLanes];
  int64_t used[kMaxChunk + kTokenLanes];  // counted and finite: all bits set, else none
  // The rows that are read first with the next chunk: prefetched while this one is measured.
  const char* prefetch_rows[2 * kMaxRowsTogether];
  int num_prefetch_rows = 0;
};

}  // namespace simdiff
