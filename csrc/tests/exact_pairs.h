// The metrics of a pair of rows, and the row sums of one, in long double: what the scorers of
// blocks are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/block_states.h"

namespace simdiff {

inline long double angle(long double v) {
  return 2 * std::atan2(std::sqrt(v), std::sqrt(2 - v)) / std::acos(-1.0L);
}

// What one pair adds to its moments; false where the cosine distance is not determined to 1e-6.
inline bool pair_metrics(const std::vector<float>& x, const std::vector<float>& y,
                         long double* out) {
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
inline void exact_row_sums(const std::vector<float>& x, const std::vector<float>& y,
                           long double* out) {
  std::fill_n(out, 4, 0.0L);
  for (size_t e = 0; e < x.size(); ++e) {
    const long double a = x[e], b = y[e];
    out[0] += a * a;
    out[1] += b * b;
    out[2] += (b - a) * (b - a);
    out[3] += std::fabs(b - a);
  }
}

}  // namespace simdiff
