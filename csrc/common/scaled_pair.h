// The cosine distance of two hidden states x and y of unlike length from short float32 sums, and
// whether it may be used (trust.h); on a GPU, where all pairs of a token's states are measured.
//
// With d = y - x, a = |x|, b = |y| and a ratio r that brings both to like lengths, t = r a:
//   1 - cos(x, y) = (sum (r x - y)^2 - (b - t)^2) / (2 t b)
// whatever r is; only how much of the sum is cancelled depends on it. r x - y is rounded once. Of
// orthogonal vectors of like lengths nothing is cancelled, where for r = 1 and a = b / 100 all but
// 2% is; of nearly parallel ones, the embeddings before and after a factor, nearly all is unless r
// is as near to b / a as they are to each other: a power of two is not enough.
// Where r is not 1, sum (y - x)^2 = (b - a)^2 + 2 a b (1 - cos), all of whose terms are positive.
//
// The gap b - t is formed in two ways. From the two lengths, which is off by some 1e-8 of them; and
// where r is 1 as (sum of the growths between) / (a + b), the growth of a layer being
// |h'|^2 - |h|^2 = 2 sum h d + sum d^2: off by some 1e-8 of its terms, as exact as d is. For
// sums in float64 read 1e-16 wherever it says 1e-8. No memory is read or written here.
#pragma once

#include <cmath>

#include "metrics.h"
#include "trust.h"

namespace simdiff {

// A squared length as length_ratio takes it: no product with another's inverse overflows. 2^-40 for
// NaN.
SIMDIFF_INLINE float usual_length(float squared) {
  return std::fmin(std::fmax(squared, 0x1p-40f), 0x1p+40f);
}

// The root of the quotient of two squared lengths, estimates of any kind. 1 where it lies between
// the roots of 1/2 and 2: then nothing is scaled, and growths tell the gap better than lengths.
SIMDIFF_INLINE float length_ratio(float quotient) {
  if (quotient >= 0.5f && quotient < 2.0f) return 1.0f;
#ifdef __CUDA_ARCH__
  return quotient * rsqrtf(quotient);
#else
  return std::sqrt(quotient);
#endif
}

struct ScaledPair {
  double squared;    // sum (r x - y)^2
  double before;     // t = r |x|
  double after;      // b = |y|
  double gap;        // b - t
  double gap_scale;  // the gap is off by some 1e-8 of this
};

// `growth`: |y|^2 - |x|^2 as the sum of the growths between, which is off by some 1e-8 of the root
// of `growth_scale_squared`; used where `plain`, that is r = 1, and better than the lengths.
SIMDIFF_INLINE ScaledPair scaled_pair(double squared, double before, double after, bool plain,
                                      double growth, double growth_scale_squared) {
  const double total = before + after, inverse = 1 / total;
  const double by_lengths = (before * before + after * after) * inverse;
  const double by_growth = std::sqrt(growth_scale_squared) * inverse;
  const bool grown = plain && by_growth < by_lengths;
  return {squared, before, after, grown ? growth * inverse : after - before,
          grown ? by_growth : by_lengths};
}

// What the growth of one layer is off by, squared: some 1e-8 of 2 |h| |d| + |d|^2.
SIMDIFF_INLINE double growth_scale_squared(double before_squared, double difference_squared) {
  const double scale = 2 * std::sqrt(before_squared * difference_squared) + difference_squared;
  return scale * scale;
}

// Whether errors of some 1e-8 in the sums make errors of at most kMostMagnified times as much in
//   v = (squared - gap^2) / (2 t b)   and   2 - v = ((t + b)^2 - squared) / (2 t b).
// Else the pair is summed again in float64. False for NaN and Inf, and for a sum of zero, which may
// hide differences below 1e-23.
SIMDIFF_INLINE bool float32_is_enough(const ScaledPair& pair) {
  const double total = pair.before + pair.after;
  const double apart = pair.squared - pair.gap * pair.gap;
  const double opposite = total * total - pair.squared;
  const double error = pair.squared + 2 * std::fabs(pair.gap) * pair.gap_scale;
  const bool in_range = (pair.squared >= kSmallestShort) & (pair.squared < kLargestShort);
  return in_range & (error <= kMostMagnified * apart) & (error <= kMostMagnified * opposite);
}

SIMDIFF_INLINE double cosine_distance(const ScaledPair& pair) {
  return cosine_distance(pair.squared, pair.gap, pair.before, pair.after);
}

// sum (y - x)^2 from the lengths of both and 1 - cos(x, y).
SIMDIFF_INLINE double squared_difference(double norm_before, double norm_after,
                                         double cosine_distance) {
  const double gap = norm_after - norm_before;
  return gap * gap + 2 * norm_before * norm_after * cosine_distance;
}

}  // namespace simdiff
