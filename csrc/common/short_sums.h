// The sums of a token's two rows formed in float32 (short sums): from them to RowSums, and whether
// they may be used as they are. One table of constants for every processor.
//
// A short sum is off by some 1e-8 of the sum of its absolute terms. Instead of sum y^2, sum x d is
// read: |y|^2 = |x|^2 + 2 sum x d + |d|^2, so that what the norms differ by is as exact as d is.
#pragma once

#include "metrics.h"

namespace simdiff {

SIMDIFF_INLINE double after_squared(double before_squared, double before_difference,
                                    double difference_squared) {
  return before_squared + (2 * before_difference + difference_squared);
}

// Whether sums that are off by some 1e-8 give metrics that are off by some 1e-7; else they are
// formed again in float64. Without branches, so that a loop over tokens is vector code; false for
// NaN and Inf.
SIMDIFF_INLINE bool float32_is_enough(const RowSums& sums) {
  constexpr double smallest = 1e-24, largest = 1e+30;  // products far from float32's ends
  const double x = sums.before_squared, y = sums.after_squared, d = sums.difference_squared;
  const bool in_range =
      (x > smallest) & (x < largest) & (y > x / 16) & (y < largest) & (d < largest);
  const bool equal = (d == 0) & (sums.difference_absolute == 0);
  // d - (|y| - |x|)^2 >= d / 16, with (|y| - |x|)^2 <= (y - x)^2 / (x + y)
  const bool turned = (d >= smallest) & ((y - x) * (y - x) <= 0.9375 * d * (x + y));
  return in_range & (equal | turned);
}

}  // namespace simdiff
