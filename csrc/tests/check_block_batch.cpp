// All tokens of a batch by accumulate_blocks, for every instruction set that runs here against long
// double: running states, all kinds of tokens, any number of threads. Prints what failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../cpu/block_metrics.h"
#include "../cpu/row_sums.h"
#include "checks.h"
#include "exact_pairs.h"

namespace {

using namespace simdiff;

struct Totals {
  std::vector<double> moments;
  std::vector<int64_t> counts;
  std::vector<RowSums> sums;

  explicit Totals(int64_t num_running, int64_t num_states, int64_t num_tokens)
      : moments(num_running * kNumBlockMoments * num_states * num_states),
        sums((num_states - 1) * num_tokens) {
    for (int64_t r = 0; r < num_running; ++r) {
      for (const int64_t earlier : {7, 5, 1000}) counts.push_back(earlier);
    }
    std::fill(sums.begin(), sums.end(), RowSums{NAN, NAN, NAN, NAN});
  }
};

bool same_sums(const std::vector<RowSums>& a, const std::vector<RowSums>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(RowSums)) == 0;
}

Totals totals_of(const BlockStates& states, const TokenPlaces& places, bool absolute,
                 int num_threads) {
  Totals totals(places.num_states, states.num_states(), states.num_tokens());
  accumulate_blocks(states, places, absolute, totals.moments.data(), totals.counts.data(),
                    totals.sums.data(), on_threads(num_threads));
  return totals;
}

struct Batch {
  static constexpr int64_t outer = 3, size = 20, nonfinite = 8;
  int64_t num_states, inner;
  std::vector<std::vector<float>> values;
  std::vector<uint8_t> kinds;
  BlockStates states;

  Batch(int64_t num_states, int64_t inner)
      : num_states(num_states),
        inner(inner),
        values(num_states, std::vector<float>(outer * inner * size)),
        states{{}, outer, inner, size, DType::kFloat32} {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (auto& state : values) {
      for (float& value : state) value = normal(random);
      states.states.push_back({state.data(), inner * size, size});
    }
    values[num_states / 2][nonfinite * size + 5] = NAN;
    for (int64_t t = 0; t < outer * inner; ++t) {
      kinds.push_back(t % 7 == 0 ? kLeftOut : t % 7 == 3 ? kApart : kCounted);
    }
  }

  int64_t num_tokens() const { return outer * inner; }
  std::vector<float> row(int64_t k, int64_t token) const {
    return std::vector<float>(&values[k][token * size], &values[k][(token + 1) * size]);
  }
  // Tokens [begin, end) as a batch of their own.
  BlockStates part(int64_t begin, int64_t end) const {
    BlockStates found{{}, 1, end - begin, size, DType::kFloat32};
    for (const auto& state : values) found.states.push_back({&state[begin * size], 0, size});
    return found;
  }
};

// Many chunks, which wait all at once to be joined or, with many states, not.
void check_batch(int64_t num_states, int64_t inner) {
  const Batch batch(num_states, inner);
  const int64_t size = batch.size, num_tokens = batch.num_tokens();
  const TokenPlaces one{batch.kinds.data(), 1, 0, 0, int64_t{1} << 62, false};
  const Totals got = totals_of(batch.states, one, true, 1);
  const int64_t counted = std::count(batch.kinds.begin(), batch.kinds.end(), kCounted);
  expect(got.counts == std::vector<int64_t>{7 + counted - 1, 5 + 1, 1000 + num_tokens}, "counts",
         "batch", 0, num_states, size);
  for (const int num_threads : {2, 5}) {
    const Totals again = totals_of(batch.states, one, true, num_threads);
    expect(again.moments == got.moments && same_sums(again.sums, got.sums), "bitwise", "batch",
           num_threads, num_states, size);
  }
  // One pair in the corner of the matrix and one inside, out of the values themselves.
  const int64_t j = num_states - 1;
  for (const int64_t i : {int64_t{0}, j - 1}) {
    long double sums[kNumBlockMetrics] = {}, squares[kNumBlockMetrics] = {}, maximum = 0;
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (batch.kinds[t] != kCounted || t == batch.nonfinite) continue;
      long double token[kNumBlockMetrics];
      pair_metrics(batch.row(i, t), batch.row(j, t), token);
      for (int m = 0; m < kNumBlockMetrics; ++m) {
        sums[m] += token[m];
        squares[m] += token[m] * token[m];
      }
      maximum = std::max(maximum, token[1]);
    }
    const auto moment = [&](int m) { return got.moments[(m * num_states + i) * num_states + j]; };
    for (int m = 0; m < kNumBlockMetrics; ++m) {
      expect(close(moment(m), sums[m], 1e-6), "sum", "batch", m, num_states, size);
      expect(close(moment(kNumBlockMetrics + m), squares[m], 1e-6), "squares", "batch", m,
             num_states, size);
    }
    expect(close(moment(kNumBlockMoments - 1), maximum, 1e-6), "maximum", "batch", 0, num_states,
           size);
  }
  // The row sums of every token and layer.
  for (int64_t layer = 0; layer + 1 < num_states; ++layer) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (t == batch.nonfinite) continue;
      long double wanted[4] = {};
      if (batch.kinds[t] != kLeftOut) {
        exact_row_sums(batch.row(layer, t), batch.row(layer + 1, t), wanted);
      }
      double found[4];
      std::memcpy(found, &got.sums[layer * num_tokens + t], sizeof found);
      for (int k = 0; k < 4; ++k) {
        expect(close(found[k], wanted[k], 1e-6), "row sums", "batch", k, layer, t);
      }
    }
  }
}

// Running states of 150 tokens that begin within the first and end beyond the last: bitwise what
// updates of their tokens alone give, each of its own state.
void check_running_states(bool absolute) {
  const Batch batch(6, 300);
  const int64_t num_states = batch.num_states, num_tokens = batch.num_tokens();
  constexpr int64_t length = 150, offset = 40, first = -1, num_running = 5;
  const int64_t size = kNumBlockMoments * num_states * num_states;
  const TokenPlaces places{batch.kinds.data(), num_running, first, offset, length, false};
  const Totals got = totals_of(batch.states, places, absolute, 3);
  for (int64_t r = 0; r < num_running; ++r) {
    const int64_t begin = std::max<int64_t>(0, (r - first) * length - offset);
    const int64_t end = std::min(num_tokens, (r - first + 1) * length - offset);
    const TokenPlaces own{&batch.kinds[begin], 1, 0, 0, int64_t{1} << 62, false};
    const Totals wanted = totals_of(batch.part(begin, end), own, absolute, 1);
    expect(std::equal(wanted.moments.begin(), wanted.moments.end(), &got.moments[r * size]),
           "moments", "running state", absolute, r, length);
    const int64_t* counts = &got.counts[r * kNumBlockCounts];
    expect(counts[0] == wanted.counts[0] && counts[1] == wanted.counts[1] &&
               counts[2] == 1000 + num_tokens,
           "counts", "running state", absolute, r, length);
  }
  const TokenPlaces one{batch.kinds.data(), 1, 0, 0, int64_t{1} << 62, false};
  expect(same_sums(got.sums, totals_of(batch.states, one, true, 2).sums), "row sums",
         "running state", absolute, num_states, length);
}

}  // namespace

int main() {
  for (const InstructionSet* set : compiled_instruction_sets()) {
    if (!set->runs_here() || set->block_token[0][0] == nullptr) {
      std::printf("skipped %s: not of this processor, or served by the baseline\n", set->name);
      continue;
    }
    select_instruction_set(set->name);
    for (const bool absolute : {false, true}) check_running_states(absolute);
    check_batch(5, 1400);
    check_batch(70, 1400);
  }
  return report();
}
