// Every instruction set that runs here against long double, over sizes that end in every place of
// a register and rows that start unaligned; then the reduction over tokens. Prints what failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../cpu/layer_metrics.h"
#include "../cpu/row_sums.h"
#include "checks.h"

namespace {

using namespace simdiff;

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// By the definition of IEEE 754 binary16, independent of the conversion under test.
double from_float16(uint16_t value) {
  const int exponent = (value >> 10) & 31, fraction = value & 1023;
  const double sign = value & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

struct Rows {
  std::vector<unsigned char> bytes;
  std::vector<double> values;  // what the bytes mean
};

// A row of `size` entries that starts `offset` elements into its buffer, with a massive entry.
Rows make_row(DType dtype, int64_t size, int64_t offset, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> half_bits(0, 0x7bff);  // finite, subnormal ones included
  Rows rows;
  const size_t width = element_bytes(dtype);
  rows.bytes.resize((size + offset) * width);
  for (int64_t i = 0; i < size; ++i) {
    unsigned char* place = rows.bytes.data() + (offset + i) * width;
    const float value = normal(random) * (i == size / 3 ? 300.0f : 1.0f);
    const double wide = static_cast<double>(value) * 1.0000000001;
    const auto half = static_cast<uint16_t>(half_bits(random) | (i % 2 ? 0x8000 : 0));
    const auto add = [&](const auto& entry, double meant) {
      std::memcpy(place, &entry, sizeof entry);
      rows.values.push_back(meant);
    };
    with_element(dtype, [&](auto zero) {
      using Element = decltype(zero);
      if constexpr (std::is_same_v<Element, BFloat16>) {
        add(to_bfloat16(value), from_bfloat16(to_bfloat16(value)));
      } else if constexpr (std::is_same_v<Element, Float16>) {
        add(half, from_float16(half));
      } else {
        add(static_cast<Element>(std::is_same_v<Element, double> ? wide : value),
            std::is_same_v<Element, double> ? wide : value);
      }
    });
  }
  return rows;
}

RowSums sums_of_one(const InstructionSet& set, int dtype, const void* before, const void* after,
                    int64_t size) {
  static Chunk chunk;
  const RowPair row{before, after};
  set.sum_rows[dtype](&row, 1, size, chunk);
  set.measure(chunk, 1, size);
  return chunk.sums[0];
}

void check_sums(const InstructionSet& set, DType dtype, int64_t size, std::mt19937& random) {
  const int index = static_cast<int>(dtype);
  const int64_t width = element_bytes(dtype);
  const Rows before = make_row(dtype, size, 1, random), after = make_row(dtype, size, 3, random);
  const RowSums got =
      sums_of_one(set, index, before.bytes.data() + width, after.bytes.data() + 3 * width, size);
  long double xx = 0, yy = 0, dd = 0, ad = 0, xd = 0;
  for (int64_t i = 0; i < size; ++i) {
    const long double x = before.values[i], y = after.values[i], d = y - x;
    xx += x * x;
    yy += y * y;
    dd += d * d;
    ad += std::fabs(d);
    xd += std::fabs(x * d);
  }
  // Float64 throughout, or 52 additions at a time in float32 (row_sums_short.h).
  const bool is_short = &set != &kBaseline && dtype != DType::kFloat64;
  const double bound = is_short ? 52 * 0x1p-24 : (size + 4) * 0x1p-53;
  const double terms = is_short ? static_cast<double>((xx + 2 * xd + dd) / yy) : 1;
  expect(close(got.before_squared, xx, bound), "sum x^2", set.name, index, size);
  expect(close(got.after_squared, yy, bound * terms), "sum y^2", set.name, index, size);
  expect(close(got.difference_squared, dd, bound), "sum d^2", set.name, index, size);
  expect(close(got.difference_absolute, ad, bound), "sum |d|", set.name, index, size);
}

void check_float16_values(const InstructionSet& set) {
  const uint16_t zero = 0;
  for (int bits = 0; bits <= 0xffff; ++bits) {
    const uint16_t value = static_cast<uint16_t>(bits);
    const double wanted = from_float16(value);
    const RowSums got = sums_of_one(set, static_cast<int>(DType::kFloat16), &value, &zero, 1);
    const bool same =
        std::isnan(wanted) ? std::isnan(got.before_squared) : got.before_squared == wanted * wanted;
    expect(same, "float16 value", set.name, static_cast<int>(DType::kFloat16), bits);
  }
}

// A row's sums and metrics are the same bits whatever it is read with, and wherever float32 is not
// enough; so many rows that those read side by side are far apart.
void check_rows_together(const InstructionSet& set, DType dtype, int64_t size,
                         std::mt19937& random) {
  constexpr int64_t most = 4 * (kTokenLanes + 1) + 3;
  const int index = static_cast<int>(dtype);
  std::vector<Rows> before, after;
  std::vector<RowPair> pairs;
  std::vector<RowSums> alone;
  for (int64_t r = 0; r < most; ++r) {
    before.push_back(make_row(dtype, size, 0, random));
    after.push_back(make_row(dtype, size, 0, random));
    if (r == 5) std::fill(after[r].bytes.begin(), after[r].bytes.end(), 0);
    if (r == 6) std::fill(after[r].bytes.begin(), after[r].bytes.end(), 0xff);  // NaN
  }
  for (int64_t r = 0; r < most; ++r) {
    pairs.push_back({before[r].bytes.data(), after[r].bytes.data()});
    alone.push_back(sums_of_one(set, index, pairs[r].before, pairs[r].after, size));
  }
  static Chunk got;
  for (int64_t num_rows = 0; num_rows <= most; ++num_rows) {
    const RowSums untouched{-1, -2, -3, -4};
    std::fill(got.sums, got.sums + most + 1, untouched);
    for (auto& values : got.values) std::fill(values, values + most + 1, -1.0);
    set.sum_rows[index](pairs.data(), num_rows, size, got);
    set.measure(got, num_rows, size);
    bool same = true, measured = true;
    for (int64_t r = 0; r < num_rows; ++r) {
      same = same && std::memcmp(&got.sums[r], &alone[r], sizeof alone[r]) == 0;
      const TokenMetrics wanted = token_metrics(alone[r], size);
      for (int m = 0; m < kNumMetrics; ++m) {
        const double value = got.values[m][r];
        const bool both_nan = std::isnan(value) && std::isnan(wanted.values[m]);
        // A fused multiply-add rounds once where this program rounds twice; the cosine distance
        // divides the difference of two sums by the product of the norms.
        const double product = std::sqrt(alone[r].before_squared * alone[r].after_squared);
        const double magnified =
            m == kCosineDistance && product > 0 ? alone[r].difference_squared / product : 0;
        const bool near = std::fabs(value - wanted.values[m]) <=
                          1e-12 * std::fabs(wanted.values[m]) + 1e-15 * magnified;
        measured = measured && (both_nan || near);
      }
    }
    expect(same, "rows together", set.name, index, num_rows);
    expect(measured, "metrics of rows together", set.name, index, num_rows);
    expect(std::memcmp(&got.sums[num_rows], &untouched, sizeof untouched) == 0, "one row too many",
           set.name, index, num_rows);
  }
}

// Rows that float32 cannot measure are summed as in float64: hardly turned but longer, huge, tiny.
void check_exact_rows(const InstructionSet& set) {
  constexpr int64_t size = 600;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (const float scale : {1.0f, 1e-25f, 1e25f}) {
    std::vector<float> before(size), after(size);
    long double xx = 0, yy = 0, dd = 0;
    for (int64_t i = 0; i < size; ++i) {
      before[i] = scale * normal(random);
      after[i] = 1.5f * before[i] + 1e-4f * scale * normal(random);
      const long double x = before[i], y = after[i];
      xx += x * x;
      yy += y * y;
      dd += (y - x) * (y - x);
    }
    const RowSums got = sums_of_one(set, 0, before.data(), after.data(), size);
    const double bound = (size + 4) * 0x1p-53;
    expect(close(got.before_squared, xx, bound), "exact sum x^2", set.name, 0, size);
    expect(close(got.after_squared, yy, bound), "exact sum y^2", set.name, 0, size);
    expect(close(got.difference_squared, dd, bound), "exact sum d^2", set.name, 0, size);
  }
}

// The read that scoring is measured against does touch every byte of both inputs.
void check_read_bytes(const InstructionSet& set) {
  constexpr int64_t size = 1500;
  std::vector<unsigned char> bytes(2 * size, 0);
  const unsigned char *before = bytes.data(), *after = before + size;
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = 0x40;
    expect(set.read_bytes(before, after, size) != 0, "byte read", set.name, 0, i);
    bytes[i] = 0;
  }
  expect(set.read_bytes(before, after, size) == 0, "nothing read", set.name, 0, 0);
}

void check_accumulate(int num_threads) {
  constexpr int64_t outer = 3, inner = 700, hidden_size = 200;
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<float> before(outer * inner * hidden_size), after(before.size());
  for (auto* states : {&before, &after}) {
    for (float& value : *states) value = normal(random);
  }
  bool mask[outer * inner];
  for (int64_t t = 0; t < outer * inner; ++t) mask[t] = t % 7 != 0;
  after[(8 * hidden_size) + 5] = NAN;

  const HiddenStates x{before.data(), inner * hidden_size, hidden_size};
  const HiddenStates y{after.data(), inner * hidden_size, hidden_size};
  const LayerStates states{x, y, outer, inner, hidden_size, DType::kFloat32};
  RunningState got;
  got.num_seen = 1000;
  accumulate(states, mask, got, nullptr, on_threads(num_threads));

  RunningState wanted;
  for (int64_t t = 0; t < outer * inner; ++t) {
    const RowSums sums = sums_of_one(selected_instruction_set(), 0, &before[t * hidden_size],
                                     &after[t * hidden_size], hidden_size);
    if (mask[t] && is_finite(sums)) wanted.add(token_metrics(sums, hidden_size), 1000 + t);
  }
  const char* name = "accumulate";
  expect(got.num_tokens == wanted.num_tokens, "tokens", name, num_threads, got.num_tokens);
  expect(got.num_nonfinite == 1, "not finite", name, num_threads, got.num_nonfinite);
  expect(got.num_seen == 1000 + outer * inner, "seen", name, num_threads, got.num_seen);
  for (int m = 0; m < kNumMetrics; ++m) {
    expect(close(got.sum[m], wanted.sum[m], 1e-13), "sum", name, num_threads, m);
    expect(close(got.sum_of_squares[m], wanted.sum_of_squares[m], 1e-13), "squares", name,
           num_threads, m);
    expect(close(got.maximum[m], wanted.maximum[m], 1e-13), "maximum", name, num_threads, m);
    expect(got.argmax[m] == wanted.argmax[m], "argmax", name, num_threads, m);
  }
}

}  // namespace

int main() {
  std::mt19937 random(5);
  for (const InstructionSet* set : compiled_instruction_sets()) {
    if (!set->runs_here()) {
      std::printf("skipped %s: this processor does not run it\n", set->name);
      continue;
    }
    const int checks_before = checks;
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (int64_t size = 1; size <= 70; ++size) {
        check_sums(*set, static_cast<DType>(dtype), size, random);
      }
      for (int64_t size : {576, 4096, 5003}) {
        check_sums(*set, static_cast<DType>(dtype), size, random);
      }
    }
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (int64_t size : {1, 70, 577, 1537}) {
        check_rows_together(*set, static_cast<DType>(dtype), size, random);
      }
    }
    check_float16_values(*set);
    check_exact_rows(*set);
    check_read_bytes(*set);
    select_instruction_set(set->name);
    for (int num_threads : {1, 2, 5}) check_accumulate(num_threads);
    std::printf("%s: %d checks\n", set->name, checks - checks_before);
  }
  bool refused = false;
  try {
    select_instruction_set("sse9");
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("got 'sse9'") != std::string::npos;
  }
  expect(refused, "unknown instruction set", "sse9", 0, 0);
  return report();
}
