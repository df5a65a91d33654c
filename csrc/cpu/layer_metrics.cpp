#include "layer_metrics.h"

#include <algorithm>
#include <vector>

#include "row_sums.h"

namespace simdiff {
namespace {

// About 64 Ki elements of each input: large enough to outweigh handing a chunk to a thread
// (~5 us), small enough to balance two threads over 8 x 512 tokens; and never fewer rows than are
// read side by side.
int64_t tokens_per_chunk(int64_t hidden_size) {
  return std::clamp<int64_t>(65536 / hidden_size, 4, kMaxChunk);
}

const void* row(const HiddenStates& states, int64_t outer, int64_t inner, int64_t element_bytes) {
  return static_cast<const char*>(states.data) +
         (outer * states.outer_stride + inner * states.inner_stride) * element_bytes;
}

// Reads the rows of tokens [begin, end) that are wanted; the others' sums are zero.
template <class Wanted>
void read_rows(const LayerStates& states, int64_t begin, int64_t end, Chunk& chunk,
               const Wanted& wanted) {
  const int dtype = static_cast<int>(states.dtype);
  const RowSumsFunction row_sums = selected_instruction_set().row_sums[dtype];
  const int64_t bytes = kElementBytes[dtype];
  RowPair rows[kMaxChunk];
  int64_t tokens[kMaxChunk], num_rows = 0;
  int64_t outer = begin / states.inner, inner = begin % states.inner;
  for (int64_t token = begin; token < end; ++token) {
    if (wanted(token)) {
      rows[num_rows] = {row(states.before, outer, inner, bytes),
                        row(states.after, outer, inner, bytes)};
      tokens[num_rows++] = token - begin;
    }
    if (++inner == states.inner) {
      inner = 0;
      ++outer;
    }
  }
  row_sums(rows, num_rows, states.hidden_size, chunk.sums);
  if (num_rows == end - begin) return;
  // To their tokens, from the last, so that none is overwritten before it has moved.
  for (int64_t token = end - begin - 1, r = num_rows - 1; token >= 0; --token) {
    chunk.sums[token] = r >= 0 && tokens[r] == token ? chunk.sums[r--] : RowSums{};
  }
}

template <class Value>
void store(const Chunk& chunk, Value* out, int64_t num_tokens, int64_t begin, int64_t end) {
  for (int m = 0; m < kNumMetrics; ++m) {
    Value* target = out + m * num_tokens + begin;
    for (int64_t t = 0; t < end - begin; ++t) target[t] = static_cast<Value>(chunk.values[m][t]);
  }
}

void store(const Chunk& chunk, const LayerStates& states, PerToken out, int64_t begin,
           int64_t end) {
  if (states.dtype == DType::kFloat64) {
    store(chunk, static_cast<double*>(out), states.num_tokens(), begin, end);
  } else {
    store(chunk, static_cast<float*>(out), states.num_tokens(), begin, end);
  }
}

// The state of the tokens of a chunk, of which `counted` tells those to average.
template <class Counted>
RunningState fold(Chunk& chunk, int64_t num_tokens, int64_t first_index, const Counted& counted) {
  RunningState state;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const bool counts = counted(t), finite = is_finite(chunk.sums[t]);
    chunk.used[t] = -static_cast<int64_t>(counts && finite);
    state.num_tokens += counts && finite;
    state.num_nonfinite += counts && !finite;
  }
  const int64_t padded = (num_tokens + kTokenLanes - 1) / kTokenLanes * kTokenLanes;
  for (int64_t t = num_tokens; t < padded; ++t) {
    chunk.used[t] = 0;
    for (int m = 0; m < kNumMetrics; ++m) chunk.values[m][t] = 0;
  }
  selected_instruction_set().fold(chunk, padded, first_index, state);
  state.num_seen = num_tokens;
  return state;
}

template <class Body>
void for_each_chunk(const LayerStates& states, const ParallelFor& parallel_for, const Body& body) {
  const int64_t size = tokens_per_chunk(states.hidden_size);
  const int64_t num_tokens = states.num_tokens();
  const auto run = [&](int64_t first, int64_t last) {
    Chunk chunk;  // on the thread's stack, not cleared: every chunk writes what it reads
    for (int64_t c = first; c < last; ++c) {
      body(c, c * size, std::min(num_tokens, (c + 1) * size), chunk);
    }
  };
  const int64_t num_chunks = (num_tokens + size - 1) / size;
  if (num_chunks == 1) {
    run(0, 1);  // a few tokens: not worth the caller's pool
  } else {
    parallel_for(num_chunks, run);
  }
}

}  // namespace

void token_metrics(const LayerStates& states, PerToken out, const ParallelFor& parallel_for) {
  for_each_chunk(states, parallel_for, [&](int64_t, int64_t begin, int64_t end, Chunk& chunk) {
    read_rows(states, begin, end, chunk, [](int64_t) { return true; });
    selected_instruction_set().measure(chunk, end - begin, states.hidden_size);
    store(chunk, states, out, begin, end);
  });
}

void accumulate(const LayerStates& states, const bool* mask, RunningState& state, PerToken out,
                const ParallelFor& parallel_for) {
  const int64_t size = tokens_per_chunk(states.hidden_size);
  const int64_t first_index = state.num_seen;
  std::vector<RunningState> parts((states.num_tokens() + size - 1) / size);
  for_each_chunk(states, parallel_for, [&](int64_t c, int64_t begin, int64_t end, Chunk& chunk) {
    const auto counted = [&](int64_t token) { return mask == nullptr || mask[token]; };
    // Padding is not even read, except where its metrics are stored.
    read_rows(states, begin, end, chunk,
              [&](int64_t token) { return out != nullptr || counted(token); });
    selected_instruction_set().measure(chunk, end - begin, states.hidden_size);
    if (out != nullptr) store(chunk, states, out, begin, end);
    parts[c] = fold(chunk, end - begin, first_index + begin,
                    [&](int64_t t) { return counted(begin + t); });
  });
  for (const RunningState& part : parts) state.append(part);
}

}  // namespace simdiff
