#include "layer_metrics.h"

#include <algorithm>
#include <vector>

#include "row_sums.h"

namespace simdiff {
namespace {

// About 64 Ki elements of each input: large enough to outweigh handing a chunk to a thread
// (~5 us), small enough to balance threads over 8 x 512 tokens; and a multiple of the rows that are
// read side by side and measured together.
int64_t tokens_per_chunk(int64_t hidden_size) {
  constexpr int64_t together = kMaxRowsTogether * kTokenLanes;
  const int64_t wanted = (65536 / hidden_size + together - 1) / together * together;
  return std::clamp<int64_t>(wanted, together, kMaxChunk);
}

const char* row(const HiddenStates& states, int64_t outer, int64_t inner, int64_t element_bytes) {
  return static_cast<const char*>(states.data) +
         (outer * states.outer_stride + inner * states.inner_stride) * element_bytes;
}

// The rows of a chunk, one after the other.
struct Rows {
  RowPair pairs[kMaxChunk];
  int64_t tokens[kMaxChunk];
  int64_t count = 0;
};

// The rows of tokens [begin, end) that are wanted, one run of `inner` after the other.
template <class Wanted>
void collect_rows(const LayerStates& states, int64_t begin, int64_t end, Rows& rows,
                  const Wanted& wanted) {
  const int64_t bytes = kElementBytes[static_cast<int>(states.dtype)];
  const int64_t before_step = states.before.inner_stride * bytes;
  const int64_t after_step = states.after.inner_stride * bytes;
  int64_t count = 0;
  for (int64_t token = begin; token < end;) {
    const int64_t outer = token / states.inner, inner = token % states.inner;
    const int64_t run_end = std::min(end, token + states.inner - inner);
    auto before = row(states.before, outer, inner, bytes);
    auto after = row(states.after, outer, inner, bytes);
    for (; token < run_end; ++token, before += before_step, after += after_step) {
      rows.pairs[count] = {before, after};
      rows.tokens[count] = token;
      count += wanted(token);  // without a branch: what is not wanted is written over
    }
  }
  rows.count = count;
}

// Where the rows lie that are read first when [begin, end) is the next chunk of this thread.
void announce(const LayerStates& states, int64_t begin, int64_t end, Chunk& chunk) {
  const int together = selected_instruction_set().rows_together;
  const int64_t bytes = kElementBytes[static_cast<int>(states.dtype)];
  const int64_t stride = (end - begin) / together;
  chunk.num_upcoming = 0;
  for (int r = 0; r < together && stride > 0; ++r) {
    const int64_t token = begin + r * stride;
    const int64_t outer = token / states.inner, inner = token % states.inner;
    for (const HiddenStates& side : {states.before, states.after}) {
      chunk.upcoming[chunk.num_upcoming++] = row(side, outer, inner, bytes);
    }
  }
}

void measure(const LayerStates& states, const Rows& rows, Chunk& chunk) {
  const auto& measure_rows = selected_instruction_set().measure_rows;
  measure_rows[static_cast<int>(states.dtype)](rows.pairs, rows.count, states.hidden_size, chunk);
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

// The state of the rows that have been measured, of which `counted` tells those to average.
template <class Counted>
RunningState fold(Chunk& chunk, const Rows& rows, int64_t first_index, const Counted& counted) {
  RunningState state;
  for (int64_t r = 0; r < rows.count; ++r) {
    const bool counts = counted(rows.tokens[r]), finite = is_finite(chunk.sums[r]);
    chunk.used[r] = -static_cast<int64_t>(counts && finite);
    state.num_tokens += counts && finite;
    state.num_nonfinite += counts && !finite;
  }
  const int64_t padded = (rows.count + kTokenLanes - 1) / kTokenLanes * kTokenLanes;
  for (int64_t r = rows.count; r < padded; ++r) {
    chunk.used[r] = 0;
    for (int m = 0; m < kNumMetrics; ++m) chunk.values[m][r] = 0;
  }
  selected_instruction_set().fold(chunk, padded, state);
  for (int64_t& argmax : state.argmax) {
    if (argmax >= 0) argmax = first_index + rows.tokens[argmax];
  }
  return state;
}

struct Work {
  Rows rows;
  Chunk chunk;
};

template <class Body>
void for_each_chunk(const LayerStates& states, const ParallelFor& parallel_for, const Body& body) {
  const int64_t size = tokens_per_chunk(states.hidden_size);
  const int64_t num_tokens = states.num_tokens();
  const auto run = [&](int64_t first, int64_t last) {
    Work work;  // on the thread's stack, not cleared: every chunk writes what it reads
    for (int64_t c = first; c < last; ++c) {
      const int64_t next = std::min(num_tokens, (c + 1) * size);
      announce(states, next, c + 1 < last ? std::min(num_tokens, next + size) : next, work.chunk);
      body(c, c * size, std::min(num_tokens, (c + 1) * size), work);
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
  for_each_chunk(states, parallel_for, [&](int64_t, int64_t begin, int64_t end, Work& work) {
    collect_rows(states, begin, end, work.rows, [](int64_t) { return true; });
    measure(states, work.rows, work.chunk);
    store(work.chunk, states, out, begin, end);
  });
}

void accumulate(const LayerStates& states, const bool* mask, RunningState& state, PerToken out,
                const ParallelFor& parallel_for) {
  const int64_t size = tokens_per_chunk(states.hidden_size);
  const int64_t first_index = state.num_seen, num_tokens = states.num_tokens();
  std::vector<RunningState> parts((num_tokens + size - 1) / size);
  const auto counted = [&](int64_t token) { return mask == nullptr || mask[token]; };
  for_each_chunk(states, parallel_for, [&](int64_t c, int64_t begin, int64_t end, Work& work) {
    // Padding is not even read, except where its metrics are stored.
    collect_rows(states, begin, end, work.rows,
                 [&](int64_t token) { return out != nullptr || counted(token); });
    measure(states, work.rows, work.chunk);
    if (out != nullptr) store(work.chunk, states, out, begin, end);
    parts[c] = fold(work.chunk, work.rows, first_index, counted);
  });
  for (const RunningState& part : parts) state.append(part);
  state.num_seen += num_tokens;
}

}  // namespace simdiff
