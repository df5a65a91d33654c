// Whether sums formed in float32 (short sums) may be used as they are, or must be formed again in
// float64: the constants of every such test, with their derivation, and the tests of a token's two
// rows and of a pair of hidden states; scaled_pair.h has that of scaled pairs. Triton and the tests
// take the same constants from simdiff_kernels/trust.py; tests/kernels/test_trust.py compares.
//
// With two rows x and y, d = y - x, a = |x|, b = |y| and v = 1 - cos(x, y):
//       v = (sum d^2 - (b - a)^2) / (2 a b)
//   2 - v = ((a + b)^2 - sum d^2) / (2 a b)
// A short sum is off by some 1e-8 of the sum of its absolute terms (4e-6 at most: row_sums_short.h,
// row_sums.cu, block_tiles.cuh say for how many additions). The metrics shall be off by some 1e-7.
//
// Cancellation. An error of sum d^2 grows, relative to v, by sum d^2 / (sum d^2 - (b - a)^2): by at
// most kMostMagnified = 16 where (b - a)^2 <= kMostCancelled sum d^2, which is 15/16. The angle
// depends on 2 - v as well (angular_distance.h), which asks for sum d^2 <= 15/16 (a + b)^2.
//
// Range. An entry's product that underflows in float32 is off by at most 2^-126 = 1.2e-38, whether
// subnormal numbers are kept or flushed to zero: of 800,000 entries by less than 1e-8 of
// kSmallestShort = 1e-24. Sums up to kLargestShort = 1e30 leave the partial sums, and the test
// itself where it is evaluated in float32 (Triton), a factor of 3e8 below overflow.
//
// A sum of zero. Differences whose squares all underflow are not zero: sum d^2 = 0 is believed only
// where sum |d| = 0 too, and never where sum |d| is not at hand.
#pragma once

#include "metrics.h"

namespace simdiff {

inline constexpr double kSmallestShort = 1e-24;  // of sums of squares in float32
inline constexpr double kLargestShort = 1e+30;
inline constexpr double kSmallestExact = 1e-300;  // of those in float64
inline constexpr double kLargestExact = 1e+300;
inline constexpr double kMostMagnified = 16;
inline constexpr double kMostCancelled = 1 - 1 / kMostMagnified;
static_assert(kMostCancelled == 0.9375, "exact in binary, in float32 too");

// Of |y|^2 to |x|^2 where |y|^2 is formed as |x|^2 + 2 sum x d + sum d^2. With r = a / b its terms
// are up to (2 a + b)^2 = (2 r + 1)^2 |y|^2: 81 |y|^2 for the 1/16 of an update of layers, where
// |y| is then off by some 4e-7 at worst, and 25 |y|^2 for the 1/4 of the CUDA kernel for blocks,
// which has sum y^2 as well and takes that instead.
inline constexpr double kShortestAfter = 1.0 / 16;
inline constexpr double kShortestLayer = 1.0 / 4;

// Of sum d^2 to |x|^2 + |y|^2 where b - a is the difference of two lengths summed in float64, off
// by some 1e-15 a: its share in the error of sum d^2 - (b - a)^2, of which a sixteenth may be left,
// is at most 16 * 2 |b - a| 1e-15 a / sum d^2 <= 3.2e-14 a / |d|. With 1e-10 that is 3e-9 beside
// the 1e-8 of short sums; with 1e-2 it is 3e-13 where sum d^2 is in float64.
inline constexpr double kNearestShort = 1e-10;
inline constexpr double kNearestExact = 1e-2;

// What a growth |y|^2 - |x|^2 is off by when it was summed in float64, squared, in units of what it
// is off by in float32 (scaled_pair.h): (1e-16 / 1e-8)^2.
inline constexpr double kExactGrowth = 1e-16;

// sum y^2 from sum x^2, sum x d and sum d^2, which a short pass reads instead: what the two norms
// differ by is then as exact as d is.
SIMDIFF_INLINE double after_squared(double before_squared, double before_difference,
                                    double difference_squared) {
  return before_squared + (2 * before_difference + difference_squared);
}

// Whether the short sums of a token's two rows, sum y^2 from after_squared, suffice. Without
// branches, so that a loop over tokens is vector code; false for NaN and Inf.
SIMDIFF_INLINE bool float32_is_enough(const RowSums& sums) {
  const double x = sums.before_squared, y = sums.after_squared, d = sums.difference_squared;
  const bool in_range = (x > kSmallestShort) & (x < kLargestShort) & (y > kShortestAfter * x) &
                        (y < kLargestShort) & (d < kLargestShort);
  const bool equal = (d == 0) & (sums.difference_absolute == 0);
  // (|y| - |x|)^2 <= (y - x)^2 / (x + y), which spares two roots
  const bool turned = (d >= kSmallestShort) & ((y - x) * (y - x) <= kMostCancelled * d * (x + y));
  return in_range & (equal | turned);
}

// The limits for a pair of hidden states, by what its sum d^2 was formed in; its norms are always
// summed in float64.
struct Trust {
  double smallest, largest;  // of sum d^2
  double nearest;            // of sum d^2 to the sum of both squared norms
};

SIMDIFF_INLINE constexpr Trust trust_in(bool float64) {
  return float64 ? Trust{kSmallestExact, kLargestExact, kNearestExact}
                 : Trust{kSmallestShort, kLargestShort, kNearestShort};
}

// Whether the sums of a pair suffice; where not, the CPU forms them again in float64, and
// |y|^2 - |x|^2 as sum d (x + y). norm_gap is |y| - |x|. A Value is a double or several side by
// side, a Flag what comparing them gives.
template <class Value, class Flag>
SIMDIFF_INLINE void sums_suffice(const Trust& trust, const Value& squared, const Value& absolute,
                                 const Value& norm_gap, const Value& both_norms,
                                 const Value& both_norms_squared, Flag& result) {
  const Flag equal = (squared == 0.0) & (absolute == 0.0);
  const Flag in_range = (squared >= trust.smallest) & (squared < trust.largest);
  const Flag apart = squared >= trust.nearest * both_norms_squared;
  const Flag turned = norm_gap * norm_gap <= kMostCancelled * squared;
  const Flag not_opposite = squared <= kMostCancelled * (both_norms * both_norms);
  result = equal | (in_range & apart & turned & not_opposite);
}

}  // namespace simdiff
