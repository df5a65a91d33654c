// One token's blocks of layers, every instruction set that runs here against long double: numbers
// of states that leave every remainder of a tile, sizes that end in every place of a register, rows
// that start unaligned; all angles from 1e-9 to pi. check_block_batch.cpp has all tokens of a
// batch. Prints what failed, and how exact the angles are.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "../cpu/block_sums.h"
#include "../cpu/row_sums.h"
#include "checks.h"
#include "exact_pairs.h"

namespace {

using namespace simdiff;

// Multiples of 1/16 below 8 with 7 significant bits: exact in every dtype.
float small_value(std::mt19937& random) {
  return static_cast<float>(static_cast<int>(random() % 255) - 127) / 16;
}

// The value as an entry of the type, exact for those of small_value.
template <class Element>
Element entry_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if constexpr (std::is_same_v<Element, BFloat16>) {
    return {static_cast<uint16_t>(bits >> 16)};
  } else if constexpr (std::is_same_v<Element, Float16>) {
    const uint32_t magnitude = bits & 0x7fffffffu;
    return {static_cast<uint16_t>((bits >> 16 & 0x8000u) |
                                  (magnitude == 0 ? 0 : (magnitude - (112u << 23)) >> 13))};
  } else {
    return value;
  }
}

void write(DType dtype, float value, unsigned char* place) {
  with_element(dtype, [&](auto zero) {
    const auto entry = entry_of<decltype(zero)>(value);
    std::memcpy(place, &entry, sizeof entry);
  });
}

// The hidden states of one token: their bytes, each `k` elements into its buffer, and values.
struct Token {
  std::vector<std::vector<unsigned char>> bytes;
  std::vector<const void*> rows;
  std::vector<std::vector<float>> values;
};

Token make_token(DType dtype, int64_t num_states, int64_t size, std::mt19937& random) {
  const int64_t width = element_bytes(dtype);
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
    for (const bool absolute : {false, true}) check_nearly_equal(*set, absolute);
  }
  return report();
}
