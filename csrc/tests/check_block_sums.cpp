// The blocks of layers, every instruction set that runs here against long double: numbers of states
// that leave every remainder of a tile, sizes that end in every place of a register, rows that
// start unaligned; all angles from 1e-9 to pi; then all tokens of a batch, in running states, of
// all kinds and on any number of threads. Prints what failed, and how exact the angles are.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../cpu/block_metrics.h"
#include "../cpu/block_sums.h"
#include "../cpu/row_sums.h"

namespace {

using namespace simdiff;

int failures = 0;
int checks = 0;

void expect(bool holds, const char* what, const char* set, int dtype, int64_t states,
            int64_t size) {
  ++checks;
  if (holds) return;
  if (++failures > 40) return;
  std::printf("FAILED %s: instruction set %s, dtype %d, %lld states of %lld\n", what, set, dtype,
              static_cast<long long>(states), static_cast<long long>(size));
}

bool close(long double got, long double wanted, long double relative) {
  return std::fabs(got - wanted) <= relative * std::fabs(wanted) + 1e-300L;
}

// Multiples of 1/16 below 8 with 7 significant bits: exact in every dtype.
float small_value(std::mt19937& random) {
  return static_cast<float>(static_cast<int>(random() % 255) - 127) / 16;
}

void write(DType dtype, float value, unsigned char* place) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const double wide = value;
  const auto bfloat16 = static_cast<uint16_t>(bits >> 16);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const auto float16 = static_cast<uint16_t>(
      (bits >> 16 & 0x8000u) | (magnitude == 0 ? 0 : (magnitude - (112u << 23)) >> 13));
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(place, &value, 4);
      break;
    case DType::kFloat64:
      std::memcpy(place, &wide, 8);
      break;
    case DType::kBFloat16:
      std::memcpy(place, &bfloat16, 2);
      break;
    case DType::kFloat16:
      std::memcpy(place, &float16, 2);
      break;
  }
}

// The hidden states of one token: their bytes, each `k` elements into its buffer, and values.
struct Token {
  std::vector<std::vector<unsigned char>> bytes;
  std::vector<const void*> rows;
  std::vector<std::vector<float>> values;
};

Token make_token(DType dtype, int64_t num_states, int64_t size, std::mt19937& random) {
  const int64_t width = kElementBytes[static_cast<int>(dtype)];
  Token token;
  for (int64_t k = 0; k < num_states; ++k) {
    token.bytes.emplace_back((size + k) * width);
    token.values.emplace_back(size);
    for (int64_t e = 0; e < size; ++e) {
      // Half of the entries are those of the state before.
      const float value = k > 0 && random() % 2 ? token.values[k - 1][e] : small_value(random);
      token.values[k][e] = value;
      write(dtype, value, token.bytes[k].data() + (k + e) * width);
    }
    token.rows.push_back(token.bytes[k].data() + k * width);
  }
  return token;
}

long double angle(long double v) {
  return 2 * std::atan2(std::sqrt(v), std::sqrt(2 - v)) / std::acos(-1.0L);
}

// What one pair adds to its moments; false where the cosine distance is not determined to 1e-6.
bool pair_metrics(const std::vector<float>& x, const std::vector<float>& y, long double* out) {
  long double xx = 0, yy = 0, xy = 0, dd = 0, absolute = 0;
  for (size_t e = 0; e < x.size(); ++e) {
    const long double a = x[e], b = y[e];
    xx += a * a;
    yy += b * b;
    xy += a * b;
    dd += (b - a) * (b - a);
    absolute += std::fabs(b - a);
  }
  const bool zero = xx == 0 || yy == 0;
  out[0] = zero ? (xx == yy ? 0 : 1) : 1 - xy / std::sqrt(xx * yy);
  out[1] = dd;
  out[2] = absolute / x.size();
  out[3] = xx == 0 ? dd != 0 : std::sqrt(dd / xx);
  out[4] = angle(std::min(std::max(out[0], 0.0L), 2.0L));
  return out[0] > 1e-9L || out[0] == 0;
}

// The sums of two rows, in the order of RowSums.
void exact_row_sums(const std::vector<float>& x, const std::vector<float>& y, long double* out) {
  std::fill_n(out, 4, 0.0L);
  for (size_t e = 0; e < x.size(); ++e) {
    const long double a = x[e], b = y[e];
    out[0] += a * a;
    out[1] += b * b;
    out[2] += (b - a) * (b - a);
    out[3] += std::fabs(b - a);
  }
}

void check_token(const InstructionSet& set, DType dtype, bool absolute, int64_t num_states,
                 int64_t size, std::mt19937& random) {
  const int index = static_cast<int>(dtype);
  const Token token = make_token(dtype, num_states, size, random);
  const BlockTokenFunction fold = set.block_token[absolute][index];
  const void* const* rows = token.rows.data();
  BlockWork work(num_states, size);
  const int64_t stride = work.stride, matrix = num_states * stride;
  const auto moments = aligned_array<double>(kNumBlockMoments * matrix);
  // Folded with row sums and without, and summed alone: whatever one leaves in `work` must not
  // matter to the next, nor what else is asked for.
  constexpr int64_t apart = 3;  // entries between the sums of two layers
  std::vector<RowSums> folded(apart * num_states), alone(apart * num_states);
  fold(rows, rows, work, nullptr, alone.data(), apart);
  expect(fold(rows, rows, work, moments.get(), folded.data(), apart), "finite", set.name, index,
         num_states, size);
  const std::vector<double> first(moments.get(), moments.get() + kNumBlockMoments * matrix);
  std::fill_n(moments.get(), kNumBlockMoments * matrix, 0.0);
  fold(rows, rows, work, moments.get(), nullptr, 0);
  expect(std::equal(first.begin(), first.end(), moments.get()), "the same again", set.name, index,
         num_states, size);
  expect(std::memcmp(folded.data(), alone.data(), folded.size() * sizeof(RowSums)) == 0,
         "the same sums alone", set.name, index, num_states, size);

  const bool exact = dtype == DType::kFloat64;
  const double bound = exact ? (size + 16) * 0x1p-50 : 52 * 0x1p-24;
  for (int64_t i = 0; i + 1 < num_states; ++i) {
    long double wanted[4];
    exact_row_sums(token.values[i], token.values[i + 1], wanted);
    const RowSums& got = folded[apart * i];
    const bool norms = close(got.before_squared, wanted[0], (size + 16) * 0x1p-50) &&
                       close(got.after_squared, wanted[1], (size + 16) * 0x1p-50);
    expect(norms && close(got.difference_squared, wanted[2], bound) &&
               close(got.difference_absolute, wanted[3], bound),
           "row sums", set.name, index, num_states, size);
  }
  // Of sum d^2 a sixteenth may be left; of float64 norms, ten times as long as d, the errors too.
  // The angle depends on 2 - v as well, of which for opposite states nothing is left.
  const double cosine_bound = (exact ? 160 : 16) * bound;
  for (int64_t i = 0; i < num_states; ++i) {
    for (int64_t j = i + 1; j < num_states; ++j) {
      long double wanted[kNumBlockMetrics];
      const bool determined = pair_metrics(token.values[i], token.values[j], wanted);
      if (!absolute) wanted[kAbsoluteDifference] = 0;
      for (int m = 0; m < kNumBlockMetrics; ++m) {
        const bool turned = m == kCosineDistance || m == kAngularDistance;
        if (turned && !determined) continue;
        const double got = moments[m * matrix + i * stride + j];
        const double square = moments[(kNumBlockMetrics + m) * matrix + i * stride + j];
        const long double limit = turned ? cosine_bound : bound;
        const bool parallel = turned && wanted[0] == 0 && std::fabs(got) < (m == 0 ? 1e-13 : 1e-7);
        const bool opposite = m == kAngularDistance && 2 - wanted[0] < 1e-9L && 1 - got < 1e-7;
        expect(parallel || opposite || close(got, wanted[m], limit), "sum", set.name, index,
               num_states, size);
        expect(close(square, static_cast<long double>(got) * got, 1e-15L), "sum of squares",
               set.name, index, num_states, size);
      }
      const int64_t pair = i * stride + j;
      expect(moments[(kNumBlockMoments - 1) * matrix + pair] == moments[matrix + pair], "maximum",
             set.name, index, num_states, size);
    }
  }
}

// Pairs that short sums say nothing of: equal states, next to each other or not, and states so near
// that sum d^2 underflows in float32.
void check_nearly_equal(const InstructionSet& set, bool absolute) {
  constexpr int64_t size = 40, num_states = 4;
  constexpr float tiny = 0x1p-80f;
  float values[num_states][size];
  const void* rows[num_states];
  for (int64_t k = 0; k < num_states; ++k) {
    for (int64_t e = 0; e < size; ++e) values[k][e] = tiny * (e + 1);
    rows[k] = values[k];
  }
  const float d = values[2][7];
  values[2][7] += d;
  BlockWork work(num_states, size);
  const int64_t matrix = num_states * work.stride;
  const auto moments = aligned_array<double>(kNumBlockMoments * matrix);
  RowSums sums[num_states - 1];
  // First a token of equal states, which adds nothing and whose equality the next must not inherit.
  const void* const equal[num_states] = {rows[0], rows[0], rows[0], rows[0]};
  set.block_token[absolute][0](equal, rows, work, moments.get(), nullptr, 0);
  for (const bool folded : {true, false}) {
    set.block_token[absolute][0](rows, rows, work, folded ? moments.get() : nullptr, sums, 1);
    for (int64_t i = 0; i + 1 < num_states; ++i) {
      const long double gap = i == 0 ? 0 : d;
      expect(close(sums[i].difference_squared, gap * gap, 1e-14L) &&
                 close(sums[i].difference_absolute, gap, 1e-14L),
             "near, row sums", set.name, folded, i, absolute);
    }
  }
  for (int64_t i = 0; i < num_states; ++i) {
    for (int64_t j = i + 1; j < num_states; ++j) {
      const double* sum = moments.get() + i * work.stride + j;
      const long double gap = i == 2 || j == 2 ? d : 0, absolute_gap = absolute ? gap / size : 0;
      expect(close(sum[kSquaredDifference * matrix], gap * gap, 1e-14L), "near", set.name, 0, i, j);
      expect(close(sum[kAbsoluteDifference * matrix], absolute_gap, 1e-14L), "near, absolute",
             set.name, absolute, i, j);
      expect((sum[kCosineDistance * matrix] > 1e-4) == (gap > 0), "near, turned", set.name, 0, i,
             j);
    }
  }
}

// Angles of vectors in the plane, each against long double from the very cosine distance that it
// was computed from: 6e-16 are proven in angular_distance.h.
void check_angles(const InstructionSet& set, std::mt19937& random) {
  constexpr int64_t num_states = 40;
  constexpr long double pi = 3.14159265358979323846L;
  std::uniform_real_distribution<double> uniform;
  BlockWork work(num_states, 2);
  const int64_t matrix = num_states * work.stride;
  const auto moments = aligned_array<double>(kNumBlockMoments * matrix);
  long double worst = 0;
  for (int turn = 0; turn < 400; ++turn) {
    double values[num_states][2];
    const void* rows[num_states];
    for (int64_t k = 0; k < num_states; ++k) {
      // Half of them anywhere, half near the first axis, on either end of it.
      const long double share = k % 2 ? uniform(random) : std::pow(2.0, -30 * uniform(random));
      const int end = k % 4 == 2 ? -1 : 1;
      values[k][0] = static_cast<double>(end * std::cos(pi * share));
      values[k][1] = static_cast<double>(std::sin(pi * share));
      rows[k] = values[k];
    }
    std::fill_n(moments.get(), kNumBlockMoments * matrix, 0.0);
    set.block_token[turn % 2][static_cast<int>(DType::kFloat64)](rows, rows, work, moments.get(),
                                                                 nullptr, 0);
    for (int64_t i = 0; i < num_states; ++i) {
      for (int64_t j = i + 1; j < num_states; ++j) {
        const int64_t pair = i * work.stride + j;
        const double v = moments[kCosineDistance * matrix + pair];
        const double got = moments[kAngularDistance * matrix + pair];
        const long double wanted = angle(v);
        expect(close(got, wanted, 6e-16L), "angle", set.name, 1, i, j);
        if (wanted > 0) worst = std::max(worst, std::fabs(got / wanted - 1));
      }
    }
  }
  std::printf("%s: angular distance, worst relative error %.1Le\n", set.name, worst);
}

void check_nonfinite(const InstructionSet& set, DType dtype, bool absolute, std::mt19937& random) {
  constexpr int64_t num_states = 6, size = 75;
  const int index = static_cast<int>(dtype);
  const int64_t width = kElementBytes[index];
  BlockWork work(num_states, size);
  const auto moments = aligned_array<double>(kNumBlockMoments * num_states * work.stride);
  for (int64_t k = 0; k < num_states; ++k) {
    Token token = make_token(dtype, num_states, size, random);
    std::memset(token.bytes[k].data() + (k + size - 1) * width, 0xff, width);  // a NaN
    RowSums sums[num_states];
    const bool finite = set.block_token[absolute][index](token.rows.data(), token.rows.data(), work,
                                                         moments.get(), sums, 1);
    const bool untouched =
        std::all_of(moments.get(), moments.get() + kNumBlockMoments * num_states * work.stride,
                    [](double value) { return value == 0; });
    expect(!finite && untouched, "a NaN", set.name, index, k, size);
    for (int64_t i = 0; i + 1 < num_states; ++i) {
      long double wanted[4];
      exact_row_sums(token.values[i], token.values[i + 1], wanted);
      const bool before = i == k, after = i + 1 == k, either = before || after;
      const auto right = [](double got, bool nan, long double value) {
        return nan ? std::isnan(got) : close(got, value, 52 * 0x1p-24);
      };
      expect(right(sums[i].before_squared, before, wanted[0]) &&
                 right(sums[i].after_squared, after, wanted[1]) &&
                 right(sums[i].difference_squared, either, wanted[2]) &&
                 right(sums[i].difference_absolute, either, wanted[3]),
             "row sums beside a NaN", set.name, index, k, i);
    }
  }
}

struct Totals {
  std::vector<double> moments;
  std::vector<int64_t> tallies;
  std::vector<RowSums> sums;

  explicit Totals(int64_t num_running, int64_t num_states, int64_t num_tokens)
      : moments(num_running * kNumBlockMoments * num_states * num_states),
        sums((num_states - 1) * num_tokens) {
    for (int64_t r = 0; r < num_running; ++r) {
      for (const int64_t earlier : {7, 5, 1000}) tallies.push_back(earlier);
    }
    std::fill(sums.begin(), sums.end(), RowSums{NAN, NAN, NAN, NAN});
  }
};

bool same_sums(const std::vector<RowSums>& a, const std::vector<RowSums>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(RowSums)) == 0;
}

Totals totals_of(const BlockStates& states, const TokenPlaces& places, bool absolute,
                 int num_threads) {
  const ParallelFor on_threads = [&](int64_t count, const auto& body) {
    std::vector<std::thread> threads;
    for (int64_t i = num_threads - 1; i >= 0; --i) {  // the last chunks first
      threads.emplace_back(body, count * i / num_threads, count * (i + 1) / num_threads);
    }
    for (auto& thread : threads) thread.join();
  };
  Totals totals(places.num_states, states.num_states(), states.num_tokens());
  accumulate_blocks(states, places, absolute, totals.moments.data(), totals.tallies.data(),
                    totals.sums.data(), on_threads);
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
  expect(got.tallies == std::vector<int64_t>{7 + counted - 1, 5 + 1, 1000 + num_tokens}, "tallies",
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
    const int64_t* tallies = &got.tallies[r * kNumBlockTallies];
    expect(tallies[0] == wanted.tallies[0] && tallies[1] == wanted.tallies[1] &&
               tallies[2] == 1000 + num_tokens,
           "tallies", "running state", absolute, r, length);
  }
  const TokenPlaces one{batch.kinds.data(), 1, 0, 0, int64_t{1} << 62, false};
  expect(same_sums(got.sums, totals_of(batch.states, one, true, 2).sums), "row sums",
         "running state", absolute, num_states, length);
}

}  // namespace

int main() {
  std::mt19937 random(5);
  for (const InstructionSet* set : compiled_instruction_sets()) {
    if (!set->runs_here() || set->block_token[0][0] == nullptr) {
      std::printf("skipped %s: not of this processor, or served by the baseline\n", set->name);
      continue;
    }
    for (int index = 0; index < 2 * kNumDTypes; ++index) {
      const auto dtype = static_cast<DType>(index / 2);
      const bool absolute = index % 2;
      for (int64_t num_states = 2; num_states <= 14; ++num_states) {
        check_token(*set, dtype, absolute, num_states, 37, random);
      }
      for (int64_t size = 1; size <= 70; ++size) {
        check_token(*set, dtype, absolute, 5, size, random);
      }
      for (int64_t size : {576, 768, 769, 1537, 4096}) {
        check_token(*set, dtype, absolute, 9, size, random);
      }
      check_token(*set, dtype, absolute, 33, 129, random);
      check_nonfinite(*set, dtype, absolute, random);
    }
    check_angles(*set, random);
    select_instruction_set(set->name);
    for (const bool absolute : {false, true}) {
      check_nearly_equal(*set, absolute);
      check_running_states(absolute);
    }
    check_batch(5, 1400);
    check_batch(70, 1400);
  }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
