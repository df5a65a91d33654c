// The sums of one pair of hidden states x and y with d = y - x, formed in float32 (short sums) or
// in float64, and whether they may be used; the CPU tests several pairs side by side.
#pragma once

#include "metrics.h"

namespace simdiff {

// What the sums of a pair must satisfy to be used as they are; else they are formed again in
// float64, |y|^2 - |x|^2 as sum d (x + y).
struct Trust {
  double smallest, largest;  // of sum d^2: far from the ends of what it was summed in
  // Of sum d^2 to the sum of both squared norms: below it |y| - |x| is no longer as exact as d.
  double nearest;
};

// By what the sums were formed in.
SIMDIFF_INLINE constexpr Trust trust_in(bool float64) {
  return float64 ? Trust{1e-300, 1e+300, 1e-2} : Trust{1e-24, 1e+30, 1e-10};
}

// Whether errors of some 1e-8 in the sums (1e-16 in float64) make errors of some 1e-7 (1e-15) in
// the metrics. norm_gap = |y| - |x| has an absolute error of some 1e-15 |x|, so that its share in
// the error of sum d^2 - norm_gap^2 is below 1e-13 |x| / |d|. In
//   v = (sum d^2 - norm_gap^2) / (2 |x| |y|),   2 - v = ((|x| + |y|)^2 - sum d^2) / (2 |x| |y|)
// an error of sum d^2 grows by at most 16: the angle depends on both, cf. angular_distance.h.
//
// A Value is a double or several side by side, a Flag what comparing them gives.
template <class Value, class Flag>
SIMDIFF_INLINE void sums_suffice(const Trust& trust, const Value& squared, const Value& absolute,
                                 const Value& norm_gap, const Value& both_norms,
                                 const Value& both_norms_squared, Flag& result) {
  const Flag equal = (squared == 0.0) & (absolute == 0.0);
  const Flag in_range = (squared >= trust.smallest) & (squared < trust.largest);
  const Flag apart = squared >= trust.nearest * both_norms_squared;
  const Flag turned = norm_gap * norm_gap <= 0.9375 * squared;
  const Flag not_opposite = squared <= 0.9375 * (both_norms * both_norms);
  result = equal | (in_range & apart & turned & not_opposite);
}

}  // namespace simdiff
