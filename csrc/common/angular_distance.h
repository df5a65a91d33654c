// The angle between two hidden states as a share of pi, from their cosine distance v:
//   arccos(1 - v) / pi = 2 atan2(sqrt(v), sqrt(2 - v)) / pi
// never arccos itself, which loses half of the digits near 1. With m = min(v, 2 - v), in [0, 1],
//   2 atan2(sqrt(m), sqrt(2 - m)) / pi = sqrt(m) f(m),   f(m) = 2 asin(sqrt(m / 2)) / (pi sqrt(m))
// and the angle of v > 1 is one minus that of 2 - v: no branch and no division.
//
// f is replaced by its Chebyshev series on [0, 1] up to degree 17. All Taylor coefficients of f are
// positive, so all of its Chebyshev coefficients are; what is cut off is therefore largest at m =
// 1, where f is 1/2 and the series is short of it by 6e-17: 1.2e-16 of f. Coefficients and
// polynomial are rounded to within 2^-53 of it each, the root and its product likewise: the angle
// is off by at most 6e-16 of itself. tests/kernels/test_angular_distance.py derives the
// coefficients.
#pragma once

#include <cmath>

#include "metrics.h"

namespace simdiff {

inline constexpr int kAngleTerms = 18;

SIMDIFF_INLINE constexpr double angle_coefficient(int power) {
  constexpr double coefficients[kAngleTerms] = {
      0.450158158078553,      0.03751317983990453,   0.00844046546131523,     0.0025120434041018313,
      0.0008547900587793906,  0.0003147518162554873, 0.00012176560885061421,  5.08856774840461e-05,
      1.246856348271973e-05,  3.416325600515887e-05, -5.8616029883050776e-05, 0.000115507363395217,
      -0.0001550564393358059, 0.0001575707409999391, -0.00011390069203360194, 5.649559627774413e-05,
      -1.715654052948501e-05, 2.484236376984012e-06};
  return coefficients[power];
}

// c_k + c_(k+2) s + c_(k+4) s^2 + ... with s = m^2.
template <int k, class Value>
SIMDIFF_INLINE void angle_series(const Value& square, Value& sum) {
  constexpr double coefficient = angle_coefficient(k);
  if constexpr (k + 4 < kAngleTerms) {
    angle_series<k + 2>(square, sum);
    sum = sum * square + coefficient;
  } else {
    constexpr double last = angle_coefficient(k + 2);
    sum = square * last + coefficient;
  }
}

// f(m). A Value is a double or several side by side; even and odd powers are two chains, which
// hide each other's latency.
template <class Value>
SIMDIFF_INLINE void angle_over_root(const Value& m, Value& result) {
  const Value square = m * m;
  Value even, odd;
  angle_series<0>(square, even);
  angle_series<1>(square, odd);
  result = odd * m + even;
}

SIMDIFF_INLINE double angular_distance(double cosine_distance) {
  const double v = cosine_distance, m = v > 1 ? 2 - v : v;
  double ratio;
  angle_over_root(m, ratio);
  const double angle = std::sqrt(m) * ratio;
  return v > 1 ? 1 - angle : angle;
}

}  // namespace simdiff
