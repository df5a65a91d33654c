// What follows the sums of rows, in the cache: the six metrics of each (formulas:
// common/metrics.h), then one pass over each metric for its sum, sum of squares, maximum and the
// row of the maximum. Per row 32 bytes of sums are read, 48 of metrics written and read again.
// Compiled once for each instruction set, like row_sums_loop.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "chunk.h"

namespace simdiff {
namespace {

// The metrics of the first num_rows rows, from their sums; a whole number of kTokenLanes is
// measured. Meanwhile the memory goes on with what is read next: otherwise it would stand still for
// 4% of the time with rows of 576 bfloat16 entries.
[[maybe_unused]] void measure(Chunk& chunk, int64_t num_rows, int64_t hidden_size) {
  for (int64_t begin = 0, line = 0; begin < num_rows; begin += kTokenLanes, line += kCacheLine) {
    for (int i = 0; i < chunk.num_prefetch_rows; ++i)
      __builtin_prefetch(chunk.prefetch_rows[i] + line);
    for (int64_t t = begin; t < begin + kTokenLanes; ++t) {
      const TokenMetrics metrics = token_metrics(chunk.sums[t], hidden_size);
      for (int m = 0; m < kNumMetrics; ++m) chunk.values[m][t] = metrics.values[m];
    }
  }
}

// One metric of the used rows; `padded` is a multiple of kTokenLanes and the rows beyond the last
// are not used.
inline void fold_metric(const double* values, const int64_t* used, int64_t padded,
                        RunningState& state, int m) {
  typedef double Doubles __attribute__((vector_size(8 * kTokenLanes)));
  typedef int64_t Masks __attribute__((vector_size(8 * kTokenLanes)));
  Doubles sum = {}, squares = {};
  Doubles peak = Doubles{} - std::numeric_limits<double>::infinity();
  const Doubles lowest = peak;
  for (int64_t t = 0; t < padded; t += kTokenLanes) {
    Doubles value;
    Masks mask;
    std::memcpy(&value, values + t, sizeof value);
    std::memcpy(&mask, used + t, sizeof mask);
    const Doubles counted = mask ? value : Doubles{};  // a value not used may be NaN
    sum += counted;
    squares += counted * counted;
    const Doubles candidate = mask ? value : lowest;
    peak = candidate > peak ? candidate : peak;
  }
  double maximum = peak[0];
  for (int lane = 0; lane < kTokenLanes; ++lane) {
    state.sum[m] += sum[lane];
    state.sum_of_squares[m] += squares[lane];
    maximum = std::max(maximum, peak[lane]);
  }
  for (int64_t t = 0; t < padded; ++t) {
    if (used[t] && values[t] == maximum) {
      state.maximum[m] = maximum;
      state.argmax[m] = t;
      return;
    }
  }
}

[[maybe_unused]] void fold(const Chunk& chunk, int64_t padded, RunningState& state) {
  for (int m = 0; m < kNumMetrics; ++m) {
    fold_metric(chunk.values[m], chunk.used, padded, state, m);
  }
}

}  // namespace
}  // namespace simdiff
