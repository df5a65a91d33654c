// What follows the rows of a chunk; compiled once for each instruction set, like row_sums_loop.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "chunk.h"

namespace simdiff {
namespace {

[[maybe_unused]] void measure(Chunk& chunk, int64_t num_tokens, int64_t hidden_size) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    const TokenMetrics metrics = token_metrics(chunk.sums[t], hidden_size);
    for (int m = 0; m < kNumMetrics; ++m) chunk.values[m][t] = metrics.values[m];
  }
}

// One metric of the used tokens, the first of which is `first_index`; `padded` is a multiple of
// kTokenLanes and the tokens beyond the last are not used.
inline void fold_metric(const double* values, const int64_t* used, int64_t padded,
                        int64_t first_index, RunningState& state, int m) {
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
      state.argmax[m] = first_index + t;
      return;
    }
  }
}

[[maybe_unused]] void fold(const Chunk& chunk, int64_t padded, int64_t first_index,
                           RunningState& state) {
  for (int m = 0; m < kNumMetrics; ++m) {
    fold_metric(chunk.values[m], chunk.used, padded, first_index, state, m);
  }
}

}  // namespace
}  // namespace simdiff
