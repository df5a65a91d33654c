// accumulate_blocks on the CPU: deals the tokens of a batch out to threads in chunks, sums and
// folds each token (block_sums_loop.h, block_fold_loop.h) into moments of its chunk, and joins the
// chunks in order. Per token (L + 1) * hidden_size * element size bytes are read once; per chunk of
// 64 tokens 11 (L + 1)^2 moments of 8 bytes are cleared, filled and joined: 87 KB for 31 states.
#include "block_metrics.h"

#include <algorithm>
#include <vector>

#include "block_sums.h"
#include "row_sums.h"

namespace simdiff {
namespace {

// A millisecond of work at 31 states of 576 entries: enough chunks for many threads out of 8 x 512
// tokens, and each is cleared and joined for a hundredth of that.
constexpr int64_t kTokensPerChunk = 64;
// The moments of chunks that wait to be joined: 87 KB each at 31 states.
constexpr int64_t kWaitingBytes = int64_t{16} << 20;

BlockTokenFunction block_token(DType dtype, bool absolute) {
  const auto& set = selected_instruction_set();
  const BlockTokenFunction own = set.block_token[absolute][static_cast<int>(dtype)];
  return own != nullptr ? own : kBaseline.block_token[absolute][static_cast<int>(dtype)];
}

// Consecutive tokens of one running state; -1 or beyond the last one: of none that there is.
struct TokenChunk {
  int64_t begin;
  int64_t end;
  int64_t running;
};

struct ChunkCounts {
  int64_t used = 0;
  int64_t nonfinite = 0;
};

// All tokens in chunks, none of which straddles two running states. Tokens that nothing is to be
// known of are left out.
std::vector<TokenChunk> chunks_of(int64_t num_tokens, const TokenPlaces& places, bool row_sums) {
  std::vector<TokenChunk> chunks;
  const int64_t length = places.tokens_per_state;
  int64_t running = places.first_state + places.offset / length;
  int64_t left = length - places.offset % length;  // tokens of this running state
  for (int64_t begin = 0; begin < num_tokens; ++running, left = length) {
    const int64_t end = begin + std::min(left, num_tokens - begin);
    const bool exists = running >= 0 && running < places.num_states;
    if (exists || row_sums) {
      for (; begin < end; begin += kTokensPerChunk) {
        chunks.push_back({begin, std::min(end, begin + kTokensPerChunk), exists ? running : -1});
      }
    }
    begin = end;
  }
  return chunks;
}

// Where the rows of one token lie, state by state.
void find_rows(const BlockStates& states, int64_t token, const void** rows) {
  const int64_t bytes = element_bytes(states.dtype);
  const int64_t outer = token / states.inner, inner = token % states.inner;
  for (int64_t k = 0; k < states.num_states(); ++k) {
    const HiddenStates& state = states.states[k];
    rows[k] = static_cast<const char*>(state.data) +
              (outer * state.outer_stride + inner * state.inner_stride) * bytes;
  }
}

// One update: what its threads share.
struct Job {
  const BlockStates& states;
  const uint8_t* kinds;
  RowSums* row_sums;  // (L, tokens) or null
  BlockTokenFunction token_function;

  int64_t num_tokens() const { return states.num_tokens(); }
  TokenKind kind(int64_t token) const {
    return kinds == nullptr ? kCounted : static_cast<TokenKind>(kinds[token]);
  }

  void clear_row_sums(int64_t token) const {
    for (int64_t layer = 0; layer + 1 < states.num_states(); ++layer) {
      row_sums[layer * num_tokens() + token] = {};
    }
  }

  // Folds a chunk into `moments`.
  ChunkCounts fold(const TokenChunk& chunk, BlockWork& work, double* moments) const {
    int64_t read[kTokensPerChunk], num_read = 0;  // what is left out is not even read
    for (int64_t token = chunk.begin; token < chunk.end; ++token) {
      const bool counted = kind(token) == kCounted && chunk.running >= 0;
      const bool summed = kind(token) != kLeftOut && row_sums != nullptr;
      if (counted || summed) {
        read[num_read++] = token;
      } else if (row_sums != nullptr) {
        clear_row_sums(token);
      }
    }
    ChunkCounts counts;
    std::vector<const void*> rows(states.num_states()), next_rows(states.num_states());
    if (num_read > 0) find_rows(states, read[0], next_rows.data());
    for (int64_t t = 0; t < num_read; ++t) {
      rows.swap(next_rows);
      find_rows(states, read[std::min(t + 1, num_read - 1)], next_rows.data());
      const bool counted = kind(read[t]) == kCounted && chunk.running >= 0;
      RowSums* const sums = row_sums == nullptr ? nullptr : row_sums + read[t];
      const bool finite = token_function(rows.data(), next_rows.data(), work,
                                         counted ? moments : nullptr, sums, num_tokens());
      counts.used += counted && finite;
      counts.nonfinite += counted && !finite;
    }
    return counts;
  }
};

// Adds the padded matrices of a chunk to a running state.
void join(const double* chunk, int64_t num_states, bool absolute, double* moments) {
  const int64_t stride = pair_stride(num_states);
  for (int m = 0; m < kNumBlockMoments; ++m) {
    const bool is_maximum = m == kNumBlockMoments - 1;
    if (!is_maximum && m % kNumBlockMetrics == kAbsoluteDifference && !absolute) continue;
    for (int64_t i = 0; i < num_states; ++i) {
      const double* theirs = chunk + (m * num_states + i) * stride;
      double* ours = moments + (m * num_states + i) * num_states;
      for (int64_t j = i + 1; j < num_states; ++j) {
        ours[j] = is_maximum ? std::max(ours[j], theirs[j]) : ours[j] + theirs[j];
      }
    }
  }
}

}  // namespace

void accumulate_blocks(const BlockStates& states, const TokenPlaces& places, bool absolute,
                       double* moments, int64_t* counts, RowSums* row_sums,
                       const ParallelFor& parallel_for) {
  const int64_t num_states = states.num_states(), num_tokens = states.num_tokens();
  const int64_t size = kNumBlockMoments * num_states * pair_stride(num_states);
  const int64_t running_size = kNumBlockMoments * num_states * num_states;
  const auto chunks = chunks_of(num_tokens, places, row_sums != nullptr);
  const auto num_chunks = static_cast<int64_t>(chunks.size());
  const int64_t most = std::max<int64_t>(1, kWaitingBytes / (size * sizeof(double)));
  const int64_t at_a_time = std::min(num_chunks, most);
  const auto waiting = aligned_array<double>(at_a_time * size);
  std::vector<ChunkCounts> waiting_counts(at_a_time);
  const Job job{states, places.kinds, row_sums, block_token(states.dtype, absolute)};

  for (int64_t done = 0; done < num_chunks; done += at_a_time) {
    const int64_t count = std::min(at_a_time, num_chunks - done);
    const auto run = [&](int64_t first, int64_t last) {
      BlockWork work(num_states, states.hidden_size);
      for (int64_t c = first; c < last; ++c) {
        double* const chunk = waiting.get() + c * size;
        std::fill_n(chunk, size, 0.0);
        waiting_counts[c] = job.fold(chunks[done + c], work, chunk);
      }
    };
    if (count == 1) {
      run(0, 1);  // a few tokens: not worth the caller's pool
    } else {
      parallel_for(count, run);
    }
    for (int64_t c = 0; c < count; ++c) {
      const int64_t running = chunks[done + c].running;
      if (running < 0) continue;
      join(waiting.get() + c * size, num_states, absolute, moments + running * running_size);
      counts[running * kNumBlockCounts] += waiting_counts[c].used;
      counts[running * kNumBlockCounts + 1] += waiting_counts[c].nonfinite;
    }
  }
  for (int64_t running = 0; running < places.num_states; ++running) {
    counts[running * kNumBlockCounts + 2] += num_tokens;
  }
}

}  // namespace simdiff
