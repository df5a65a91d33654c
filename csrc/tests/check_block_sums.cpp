// The blocks of layers, every instruction set that runs here against long double: numbers of states
// that leave every remainder of a tile, sizes that end in every place of a register, rows that
// start unaligned; all angles from 1e-9 to pi; then all tokens of a batch, with a mask and any
// number of threads. Prints what failed, and how exact the angles are.
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

void check_token(const InstructionSet& set, DType dtype, int64_t num_states, int64_t size,
                 std::mt19937& random) {
  const int index = static_cast<int>(dtype);
  const Token token = make_token(dtype, num_states, size, random);
  BlockWork work(num_states, size);
  const int64_t stride = work.stride, matrix = num_states * stride;
  const auto moments = aligned_array<double>(kNumBlockMoments * matrix);
  // Twice: whatever the first time leaves in `work` must not matter.
  for (int turn = 0; turn < 2; ++turn) {
    std::fill_n(moments.get(), kNumBlockMoments * matrix, 0.0);
    const bool finite =
        set.block_token[index](token.rows.data(), token.rows.data(), work, moments.get());
    expect(finite, "finite", set.name, index, num_states, size);
  }
  const bool exact = dtype == DType::kFloat64;
  const double bound = exact ? (size + 16) * 0x1p-50 : 52 * 0x1p-24;
  // Of sum d^2 a sixteenth may be left; of float64 norms, ten times as long as d, the errors too.
  // The angle depends on 2 - v as well, of which for opposite states nothing is left.
  const double cosine_bound = (exact ? 160 : 16) * bound;
  for (int64_t i = 0; i < num_states; ++i) {
    for (int64_t j = i + 1; j < num_states; ++j) {
      long double wanted[kNumBlockMetrics];
      const bool determined = pair_metrics(token.values[i], token.values[j], wanted);
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
    set.block_token[static_cast<int>(DType::kFloat64)](rows, rows, work, moments.get());
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

void check_nonfinite(const InstructionSet& set, DType dtype, std::mt19937& random) {
  constexpr int64_t num_states = 6, size = 75;
  const int index = static_cast<int>(dtype);
  const int64_t width = kElementBytes[index];
  BlockWork work(num_states, size);
  const auto moments = aligned_array<double>(kNumBlockMoments * num_states * work.stride);
  for (int64_t k = 0; k < num_states; ++k) {
    Token token = make_token(dtype, num_states, size, random);
    std::memset(token.bytes[k].data() + (k + size - 1) * width, 0xff, width);  // a NaN
    const bool finite =
        set.block_token[index](token.rows.data(), token.rows.data(), work, moments.get());
    const bool untouched =
        std::all_of(moments.get(), moments.get() + kNumBlockMoments * num_states * work.stride,
                    [](double value) { return value == 0; });
    expect(!finite && untouched, "a NaN", set.name, index, k, size);
  }
}

struct Totals {
  std::vector<double> moments;
  int64_t tallies[kNumBlockTallies];
};

Totals totals_of(const BlockStates& states, const bool* mask, int num_threads) {
  const ParallelFor on_threads = [&](int64_t count, const auto& body) {
    std::vector<std::thread> threads;
    for (int64_t i = num_threads - 1; i >= 0; --i) {  // the last chunks first
      threads.emplace_back(body, count * i / num_threads, count * (i + 1) / num_threads);
    }
    for (auto& thread : threads) thread.join();
  };
  Totals totals{std::vector<double>(kNumBlockMoments * states.num_states() * states.num_states()),
                {7, 5, 1000}};
  accumulate_blocks(states, mask, totals.moments.data(), totals.tallies, on_threads);
  return totals;
}

// Many chunks, which wait all at once to be joined or, with many states, not.
void check_batch(int64_t num_states, int64_t inner) {
  constexpr int64_t outer = 3, size = 20;
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> values(num_states, std::vector<float>(outer * inner * size));
  BlockStates states{{}, outer, inner, size, DType::kFloat32};
  for (auto& state : values) {
    for (float& value : state) value = normal(random);
    states.states.push_back({state.data(), inner * size, size});
  }
  values[num_states / 2][8 * size + 5] = NAN;
  const std::unique_ptr<bool[]> mask(new bool[outer * inner]);
  int64_t counted = 0;
  for (int64_t t = 0; t < outer * inner; ++t) counted += mask[t] = t % 7 != 0;

  const Totals got = totals_of(states, mask.get(), 1);
  expect(got.tallies[0] == 7 + counted - 1 && got.tallies[1] == 5 + 1 &&
             got.tallies[2] == 1000 + outer * inner,
         "tallies", "batch", 0, num_states, size);
  for (const int num_threads : {2, 5}) {
    expect(totals_of(states, mask.get(), num_threads).moments == got.moments, "bitwise", "batch",
           num_threads, num_states, size);
  }
  // One pair in the corner of the matrix and one inside, out of the values themselves.
  const int64_t j = num_states - 1;
  for (const int64_t i : {int64_t{0}, j - 1}) {
    long double sums[kNumBlockMetrics] = {}, squares[kNumBlockMetrics] = {}, maximum = 0;
    for (int64_t t = 0; t < outer * inner; ++t) {
      if (!mask[t] || t == 8) continue;
      const auto row = [&](int64_t k) {
        return std::vector<float>(&values[k][t * size], &values[k][(t + 1) * size]);
      };
      long double token[kNumBlockMetrics];
      pair_metrics(row(i), row(j), token);
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
}

}  // namespace

int main() {
  std::mt19937 random(5);
  for (const InstructionSet* set : compiled_instruction_sets()) {
    if (!set->runs_here() || set->block_token[0] == nullptr) {
      std::printf("skipped %s: not of this processor, or served by the baseline\n", set->name);
      continue;
    }
    for (int index = 0; index < kNumDTypes; ++index) {
      const auto dtype = static_cast<DType>(index);
      for (int64_t num_states = 2; num_states <= 14; ++num_states) {
        check_token(*set, dtype, num_states, 37, random);
      }
      for (int64_t size = 1; size <= 70; ++size) check_token(*set, dtype, 5, size, random);
      for (int64_t size : {576, 768, 769, 1537, 4096}) check_token(*set, dtype, 9, size, random);
      check_token(*set, dtype, 33, 129, random);
      check_nonfinite(*set, dtype, random);
    }
    check_angles(*set, random);
    select_instruction_set(set->name);
    check_batch(5, 1400);
    check_batch(70, 1400);
  }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
