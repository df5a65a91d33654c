// The scorers of one layer on the CPU, in chunks of tokens that are dealt out to threads.
//
// Formula: of each token the four sums of row_sums.h, from these the metrics of common/metrics.h,
// from these the running state. Bytes per token: 2 * hidden_size * element size read once; 32
// written by row_sums, 24 or 48 where the metrics are stored, nothing else leaves the cache.
// Data path: rows of a chunk, several side by side -> sums in registers -> Chunk (second cache) ->
// metrics -> state of the chunk on the thread's stack -> joined in order. Memory is the limit.
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
  const int64_t bytes = element_bytes(states.dtype);
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

// Sets what is prefetched while a chunk is measured: the rows that are read first when [begin, end)
// is the next chunk of this thread.
void set_prefetch_targets(const LayerStates& states, int64_t begin, int64_t end, Chunk& chunk) {
  const int together = selected_instruction_set().rows_together;
  const int64_t bytes = element_bytes(states.dtype);
  const int64_t stride = (end - begin) / together;
  chunk.num_prefetch_rows = 0;
  for (int r = 0; r < together && stride > 0; ++r) {
    const int64_t token = begin + r * stride;
    const int64_t outer = token / states.inner, inner = token % states.inner;
    for (const HiddenStates& side : {states.before, states.after}) {
      chunk.prefetch_rows[chunk.num_prefetch_rows++] = row(side, outer, inner, bytes);
    }
  }
}

void sum(const LayerStates& states, const Rows& rows, Chunk& chunk) {
  const auto& sum_rows = selected_instruction_set().sum_rows;
  sum_rows[static_cast<int>(states.dtype)](rows.pairs, rows.count, states.hidden_size, chunk);
}

void measure(const LayerStates& states, const Rows& rows, Chunk& chunk) {
  sum(states, rows, chunk);
  selected_instruction_set().measure(chunk, rows.count, states.hidden_size);
}

template <class Value>
void store(const Chunk& chunk, Value* out, int64_t num_tokens, int64_t begin, int64_t end) {
  for (int m = 0; m < kNumMetrics; ++m) {
    Value* target = out + m * num_tokens + begin;
    for (int64_t t = 0; t < end - begin; ++t) target[t] = static_cast<Value>(chunk.values[m][t]);
  }
}

void store(const Chunk& chunk, PerToken out, bool float64, int64_t num_tokens, int64_t begin,
           int64_t end) {
  if (float64) {
    store(chunk, static_cast<double*>(out), num_tokens, begin, end);
  } else {
    store(chunk, static_cast<float*>(out), num_tokens, begin, end);
  }
}

// The state of the `count` rows that have been measured; counted(r) tells whether row r is
// averaged, token_of(r) its index.
template <class Counted, class TokenOf>
RunningState fold(Chunk& chunk, int64_t count, const Counted& counted, const TokenOf& token_of) {
  RunningState state;
  for (int64_t r = 0; r < count; ++r) {
    const bool counts = counted(r), finite = is_finite(chunk.sums[r]);
    chunk.used[r] = -static_cast<int64_t>(counts && finite);
    state.num_tokens += counts && finite;
    state.num_nonfinite += counts && !finite;
  }
  const int64_t padded = (count + kTokenLanes - 1) / kTokenLanes * kTokenLanes;
  for (int64_t r = count; r < padded; ++r) {
    chunk.used[r] = 0;
    for (int m = 0; m < kNumMetrics; ++m) chunk.values[m][r] = 0;
  }
  selected_instruction_set().fold(chunk, padded, state);
  for (int64_t& argmax : state.argmax) {
    if (argmax >= 0) argmax = token_of(argmax);
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
      set_prefetch_targets(states, next, c + 1 < last ? std::min(num_tokens, next + size) : next,
                           work.chunk);
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

// Rows of sums that are folded together: as many as fit a chunk, whatever the number of threads.
void load_chunk(const RowSums* sums, int64_t begin, int64_t end, int64_t hidden_size,
                Chunk& chunk) {
  std::copy(sums + begin, sums + end, chunk.sums);
  chunk.num_prefetch_rows = 0;
  selected_instruction_set().measure(chunk, end - begin, hidden_size);
}

// Folds tokens [begin, end) of one layer that are of a kind; `state` has seen num_seen tokens.
void fold_range(const RowSums* sums, int64_t begin, int64_t end, int64_t hidden_size,
                const uint8_t* kinds, TokenKind kind, RunningState& state, Chunk& chunk) {
  for (int64_t first = begin; first < end; first += kMaxChunk) {
    const int64_t last = std::min(end, first + kMaxChunk);
    load_chunk(sums, first, last, hidden_size, chunk);
    state.append(fold(
        chunk, last - first,
        [&](int64_t r) { return kinds == nullptr ? kind == kCounted : kinds[first + r] == kind; },
        [&](int64_t r) { return state.num_seen + first + r; }));
  }
}

}  // namespace

void row_sums(const LayerStates& states, const bool* mask, RowSums* sums,
              const ParallelFor& parallel_for) {
  for_each_chunk(states, parallel_for, [&](int64_t, int64_t begin, int64_t end, Work& work) {
    collect_rows(states, begin, end, work.rows,
                 [&](int64_t token) { return mask == nullptr || mask[token]; });
    if (work.rows.count < end - begin) std::fill(sums + begin, sums + end, RowSums{});
    sum(states, work.rows, work.chunk);
    for (int64_t r = 0; r < work.rows.count; ++r) sums[work.rows.tokens[r]] = work.chunk.sums[r];
  });
}

void fold_sums(const RowSums* sums, int64_t num_layers, int64_t num_tokens, int64_t hidden_size,
               const TokenPlaces& places, double* moments, int64_t* counts,
               const ParallelFor& parallel_for) {
  parallel_for(places.num_states * num_layers, [&](int64_t first, int64_t last) {
    Chunk chunk;
    for (int64_t place = first; place < last; ++place) {
      const int64_t state = place / num_layers, layer = place % num_layers;
      const bool apart = places.apart && state == places.num_states - 1;
      const auto [begin, end] =
          apart ? TokenRange{0, num_tokens} : tokens_of(places, state, num_tokens);
      double* const own_moments = moments + place * 3 * kNumMetrics;
      int64_t* const own_counts = counts + place * (kNumMetrics + 3);
      RunningState running(own_moments, own_counts);
      fold_range(sums + layer * num_tokens, begin, end, hidden_size, places.kinds,
                 apart ? kApart : kCounted, running, chunk);
      running.num_seen += num_tokens;
      running.store(own_moments, own_counts);
    }
  });
}

void token_metrics(const RowSums* sums, int64_t num_layers, int64_t num_tokens, int64_t hidden_size,
                   PerToken out, bool float64, const ParallelFor& parallel_for) {
  const int64_t chunks = (num_tokens + kMaxChunk - 1) / kMaxChunk;
  const int64_t value_bytes = float64 ? sizeof(double) : sizeof(float);
  parallel_for(num_layers * chunks, [&](int64_t first, int64_t last) {
    Chunk chunk;
    for (int64_t c = first; c < last; ++c) {
      const int64_t layer = c / chunks, begin = c % chunks * kMaxChunk;
      const int64_t end = std::min(num_tokens, begin + kMaxChunk);
      load_chunk(sums + layer * num_tokens, begin, end, hidden_size, chunk);
      store(chunk, static_cast<char*>(out) + layer * kNumMetrics * num_tokens * value_bytes,
            float64, num_tokens, begin, end);
    }
  });
}

void token_metrics(const LayerStates& states, PerToken out, const ParallelFor& parallel_for) {
  for_each_chunk(states, parallel_for, [&](int64_t, int64_t begin, int64_t end, Work& work) {
    collect_rows(states, begin, end, work.rows, [](int64_t) { return true; });
    measure(states, work.rows, work.chunk);
    store(work.chunk, out, states.dtype == DType::kFloat64, states.num_tokens(), begin, end);
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
    if (out != nullptr) {
      store(work.chunk, out, states.dtype == DType::kFloat64, num_tokens, begin, end);
    }
    parts[c] = fold(
        work.chunk, work.rows.count, [&](int64_t r) { return counted(work.rows.tokens[r]); },
        [&](int64_t r) { return first_index + work.rows.tokens[r]; });
  });
  for (const RunningState& part : parts) state.append(part);
  state.num_seen += num_tokens;
}

}  // namespace simdiff
