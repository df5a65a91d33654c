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

BlockTokenFunction block_token(DType dtype) {
  const auto& set = selected_instruction_set();
  const BlockTokenFunction own = set.block_token[static_cast<int>(dtype)];
  return own != nullptr ? own : kBaseline.block_token[static_cast<int>(dtype)];
}

struct ChunkTallies {
  int64_t used = 0;
  int64_t nonfinite = 0;
};

// Where the rows of one token lie, state by state.
void find_rows(const BlockStates& states, int64_t token, const void** rows) {
  const int64_t bytes = kElementBytes[static_cast<int>(states.dtype)];
  const int64_t outer = token / states.inner, inner = token % states.inner;
  for (int64_t k = 0; k < states.num_states(); ++k) {
    const HiddenStates& state = states.states[k];
    rows[k] = static_cast<const char*>(state.data) +
              (outer * state.outer_stride + inner * state.inner_stride) * bytes;
  }
}

// Folds tokens [begin, end) into `moments`.
ChunkTallies fold_tokens(const BlockStates& states, const bool* mask, int64_t begin, int64_t end,
                         BlockWork& work, double* moments) {
  const BlockTokenFunction fold = block_token(states.dtype);
  int64_t counted[kTokensPerChunk], num_counted = 0;
  for (int64_t token = begin; token < end; ++token) {
    if (mask == nullptr || mask[token]) counted[num_counted++] = token;  // padding is not even read
  }
  ChunkTallies tallies;
  std::vector<const void*> rows(states.num_states()), next_rows(states.num_states());
  if (num_counted > 0) find_rows(states, counted[0], next_rows.data());
  for (int64_t t = 0; t < num_counted; ++t) {
    rows.swap(next_rows);
    find_rows(states, counted[std::min(t + 1, num_counted - 1)], next_rows.data());
    const bool finite = fold(rows.data(), next_rows.data(), work, moments);
    tallies.used += finite;
    tallies.nonfinite += !finite;
  }
  return tallies;
}

// Adds the padded matrices of a chunk to the state.
void join(const double* chunk, int64_t num_states, double* moments) {
  const int64_t stride = pair_stride(num_states);
  for (int m = 0; m < kNumBlockMoments; ++m) {
    const bool is_maximum = m == kNumBlockMoments - 1;
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

void accumulate_blocks(const BlockStates& states, const bool* mask, double* moments,
                       int64_t* tallies, const ParallelFor& parallel_for) {
  const int64_t num_states = states.num_states(), num_tokens = states.num_tokens();
  const int64_t size = kNumBlockMoments * num_states * pair_stride(num_states);
  const int64_t num_chunks = (num_tokens + kTokensPerChunk - 1) / kTokensPerChunk;
  const int64_t most = std::max<int64_t>(1, kWaitingBytes / (size * sizeof(double)));
  const int64_t at_a_time = std::min(num_chunks, most);
  const auto waiting = aligned_array<double>(at_a_time * size);
  std::vector<ChunkTallies> waiting_tallies(at_a_time);

  for (int64_t done = 0; done < num_chunks; done += at_a_time) {
    const int64_t count = std::min(at_a_time, num_chunks - done);
    const auto run = [&](int64_t first, int64_t last) {
      BlockWork work(num_states, states.hidden_size);
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = (done + c) * kTokensPerChunk;
        const int64_t end = std::min(num_tokens, begin + kTokensPerChunk);
        double* const chunk = waiting.get() + c * size;
        std::fill_n(chunk, size, 0.0);
        waiting_tallies[c] = fold_tokens(states, mask, begin, end, work, chunk);
      }
    };
    if (count == 1) {
      run(0, 1);  // a few tokens: not worth the caller's pool
    } else {
      parallel_for(count, run);
    }
    for (int64_t c = 0; c < count; ++c) {
      join(waiting.get() + c * size, num_states, moments);
      tallies[0] += waiting_tallies[c].used;
      tallies[1] += waiting_tallies[c].nonfinite;
    }
  }
  tallies[2] += num_tokens;
}

}  // namespace simdiff
