#include "layer_metrics.h"

#include <algorithm>

#include "row_sums.h"

namespace simdiff {
namespace {

// About 64 Ki elements of each input: large enough to outweigh handing a chunk to a thread
// (~5 us), small enough to balance two threads over 8 x 512 tokens.
int64_t tokens_per_chunk(int64_t hidden_size) {
  return std::clamp<int64_t>(65536 / hidden_size, 1, 1024);
}

const void* row(const HiddenStates& states, int64_t outer, int64_t inner, int64_t element_bytes) {
  return static_cast<const char*>(states.data) +
         (outer * states.outer_stride + inner * states.inner_stride) * element_bytes;
}

template <class Value>
void store(Value* out, int64_t num_tokens, int64_t token, const TokenMetrics& metrics) {
  for (int m = 0; m < kNumMetrics; ++m) {
    out[m * num_tokens + token] = static_cast<Value>(metrics.values[m]);
  }
}

// Calls consume(token, sums) for tokens [begin, end) in order.
template <class Consume>
void for_each_token(const LayerStates& states, int64_t begin, int64_t end, const Consume& consume) {
  const int dtype = static_cast<int>(states.dtype);
  const RowSumsFunction row_sums = selected_instruction_set().row_sums[dtype];
  const int64_t bytes = kElementBytes[dtype];
  int64_t outer = begin / states.inner, inner = begin % states.inner;
  for (int64_t token = begin; token < end; ++token) {
    consume(token, [&] {
      return row_sums(row(states.before, outer, inner, bytes),
                      row(states.after, outer, inner, bytes), states.hidden_size);
    });
    if (++inner == states.inner) {
      inner = 0;
      ++outer;
    }
  }
}

void store_token(const LayerStates& states, PerToken out, int64_t token,
                 const TokenMetrics& metrics) {
  if (states.dtype == DType::kFloat64) {
    store(static_cast<double*>(out), states.num_tokens(), token, metrics);
  } else {
    store(static_cast<float*>(out), states.num_tokens(), token, metrics);
  }
}

template <class Body>
void for_each_chunk(const LayerStates& states, const ParallelFor& parallel_for, const Body& body) {
  const int64_t chunk = tokens_per_chunk(states.hidden_size);
  const int64_t num_tokens = states.num_tokens();
  parallel_for((num_tokens + chunk - 1) / chunk, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      body(c, c * chunk, std::min(num_tokens, (c + 1) * chunk));
    }
  });
}

}  // namespace

void token_metrics(const LayerStates& states, PerToken out, const ParallelFor& parallel_for) {
  for_each_chunk(states, parallel_for, [&](int64_t, int64_t begin, int64_t end) {
    for_each_token(states, begin, end, [&](int64_t token, const auto& sums) {
      store_token(states, out, token, token_metrics(sums(), states.hidden_size));
    });
  });
}

void accumulate(const LayerStates& states, const bool* mask, RunningState& state, PerToken out,
                const ParallelFor& parallel_for) {
  const int64_t chunk = tokens_per_chunk(states.hidden_size);
  const int64_t first_index = state.num_seen;
  std::vector<RunningState> chunks((states.num_tokens() + chunk - 1) / chunk);
  for_each_chunk(states, parallel_for, [&](int64_t c, int64_t begin, int64_t end) {
    RunningState partial;  // on this thread's stack: no cache line shared while it is summed
    for_each_token(states, begin, end, [&](int64_t token, const auto& sums) {
      const bool counted = mask == nullptr || mask[token];
      if (!counted && out == nullptr) return;  // padding is not even read
      const RowSums row = sums();
      const TokenMetrics metrics = token_metrics(row, states.hidden_size);
      if (out != nullptr) store_token(states, out, token, metrics);
      if (!counted) return;
      if (is_finite(row)) {
        partial.add(metrics, first_index + token);
      } else {
        ++partial.num_nonfinite;
      }
    });
    partial.num_seen = end - begin;
    chunks[c] = partial;
  });
  for (const RunningState& partial : chunks) state.append(partial);
}

}  // namespace simdiff
