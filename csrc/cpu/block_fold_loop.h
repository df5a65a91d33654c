// From the sums of a token's pairs to metrics, folded into the running moments of every pair;
// compiled once for each instruction set. Loops run over pairs side by side, without branches, so
// that they become vector code: 465 roots a token would else take as long as the sums.
#pragma once

#include <cmath>

#include "block_sums_loop.h"

namespace simdiff {
namespace {

// What the sums of a pair must satisfy to be used as they are; else they are formed again.
struct Trust {
  double smallest, largest;  // of sum d^2: far from the ends of what it was summed in
  // Of sum d^2 to the sum of both squared norms: below it |h_j| - |h_i| is no longer as exact as d.
  double nearest;
};

// Whether errors of some 1e-8 in the sums make errors of some 1e-7 in the metrics; cf.
// float32_is_enough in row_sums_short.h. norm_gap has an absolute error of some 1e-15 |h|, so that
// its share in the error of sum d^2 - norm_gap^2 is below 1e-13 |h| / |d|.
inline bool sums_suffice(const Trust& trust, double squared, double absolute, double norm_gap,
                         double both_norms_squared) {
  const bool equal = (squared == 0) & (absolute == 0);
  const bool in_range = (squared >= trust.smallest) & (squared < trust.largest);
  const bool apart = squared >= trust.nearest * both_norms_squared;
  const bool turned = norm_gap * norm_gap <= 0.9375 * squared;
  return equal | (in_range & apart & turned);
}

// One pair in float64. |h_j|^2 - |h_i|^2 is summed as d (x + y), as exact relative to d as d is.
template <class Exact, class Element>
void exact_pair(const void* const* rows, int64_t i, int64_t j, BlockWork& work) {
  constexpr int64_t lanes = Exact::lanes;
  const auto* before = static_cast<const Element*>(rows[i]);
  const auto* after = static_cast<const Element*>(rows[j]);
  auto squared = Exact::zero(), absolute = Exact::zero(), growth = Exact::zero();
  const auto step = [&](const Element* x_pointer, const Element* y_pointer) {
    const auto x = Exact::load(x_pointer), y = Exact::load(y_pointer);
    const auto d = Exact::subtract(y, x);
    squared = Exact::multiply_add(d, d, squared);
    absolute = Exact::add(absolute, Exact::magnitude(d));
    growth = Exact::multiply_add(d, Exact::add(x, y), growth);
  };
  int64_t e = 0;
  for (; e + lanes <= work.hidden_size; e += lanes) step(before + e, after + e);
  if (e < work.hidden_size) {
    Element x_tail[lanes] = {}, y_tail[lanes] = {};
    std::memcpy(x_tail, before + e, (work.hidden_size - e) * sizeof(Element));
    std::memcpy(y_tail, after + e, (work.hidden_size - e) * sizeof(Element));
    step(x_tail, y_tail);
  }
  double total[4];
  Exact::totals(squared, absolute, growth, Exact::zero(), total);
  const int64_t pair = i * work.stride + j;
  const double both_norms = work.norm[i] + work.norm[j];
  work.squared[pair] = total[0];
  work.absolute[pair] = total[1];
  work.norm_gap[pair] = total[2] / (both_norms == 0 ? 1.0 : both_norms);
}

// norm_gap of the pairs (i, j), and what must be summed again. `first` is the column of the first
// pair, rounded down to a multiple of kPairLanes.
template <class Exact, class Element>
void check_row(const void* const* rows, int64_t i, int64_t first, const Trust& trust,
               BlockWork& work) {
  const int64_t stride = work.stride;
  const double norm = work.norm[i], norm_squared = work.norm_squared[i];
  const double *norms = work.norm.get(), *norms_squared = work.norm_squared.get();
  const double* squared = work.squared.get() + i * stride;
  const double* absolute = work.absolute.get() + i * stride;
  double* norm_gap = work.norm_gap.get() + i * stride;
  int64_t num_inexact = 0;
  for (int64_t j = first; j < stride; ++j) {
    norm_gap[j] = norms[j] - norm;
    num_inexact +=
        !sums_suffice(trust, squared[j], absolute[j], norm_gap[j], norm_squared + norms_squared[j]);
  }
  if (num_inexact == 0) return;
  for (int64_t j = i + 1; j < work.num_states; ++j) {
    if (!sums_suffice(trust, squared[j], absolute[j], norm_gap[j],
                      norm_squared + norms_squared[j])) {
      exact_pair<Exact, Element>(rows, i, j, work);
    }
  }
}

[[maybe_unused]] void fold_row(const BlockWork& work, int64_t i, int64_t first, double* moments) {
  const int64_t stride = work.stride, matrix = work.num_states * stride;
  const double norm = work.norm[i], inverse = work.inverse_norm[i];
  const double inverse_size = 1.0 / static_cast<double>(work.hidden_size);
  const double *norms = work.norm.get(), *inverses = work.inverse_norm.get();
  const double* all_squared = work.squared.get() + i * stride;
  const double* all_absolute = work.absolute.get() + i * stride;
  const double* norm_gap = work.norm_gap.get() + i * stride;
  double* const sums = moments + i * stride;
  double* const squares = sums + kNumBlockMetrics * matrix;
  double* const maxima = squares + kNumBlockMetrics * matrix;
  // Fifteen arrays are too many to compare for overlaps at run time: there are none.
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t j = first; j < stride; ++j) {
    const double squared = all_squared[j], absolute = all_absolute[j] * inverse_size;
    double cosine = 0.5 * ((squared - norm_gap[j] * norm_gap[j]) * inverse) * inverses[j];
    cosine = cosine < 0 ? 0.0 : cosine;  // rounding may leave [0, 2] by an ulp
    cosine = cosine > 2 ? 2.0 : cosine;
    // A zero vector has no direction: nothing in common with anything but another zero vector.
    const double undefined_cosine = norm == norms[j] ? 0.0 : 1.0;
    const bool has_zero = (inverse == 0) | (inverses[j] == 0);
    cosine = has_zero ? undefined_cosine : cosine;
    const double undefined_relative = squared == 0 ? 0.0 : 1.0;
    double relative = std::sqrt(squared) * inverse;
    relative = inverse == 0 ? undefined_relative : relative;
    sums[j] += cosine;
    sums[matrix + j] += squared;
    sums[2 * matrix + j] += absolute;
    sums[3 * matrix + j] += relative;
    squares[j] += cosine * cosine;
    squares[matrix + j] += squared * squared;
    squares[2 * matrix + j] += absolute * absolute;
    squares[3 * matrix + j] += relative * relative;
    maxima[j] = squared > maxima[j] ? squared : maxima[j];
  }
}

// A BlockTokenFunction.
template <class Vector, class Exact, class Element>
bool block_token(const void* const* rows, const void* const* next_rows, BlockWork& work,
                 double* moments) {
  block_sums<Vector, Exact, Element>(rows, next_rows, work);
  // A NaN or Inf anywhere in a row reaches its sum of squares.
  bool finite = true;
  for (int64_t k = 0; k < work.num_states; ++k) finite &= std::isfinite(work.norm_squared[k]);
  if (!finite) return false;
  for (int64_t k = 0; k < work.stride; ++k) {
    const double norm = std::sqrt(work.norm_squared[k]);
    work.norm[k] = norm;
    work.inverse_norm[k] = norm == 0 ? 0.0 : 1 / norm;
  }
  constexpr bool narrow = sizeof(typename Vector::Scalar) == sizeof(float);
  const Trust trust = narrow ? Trust{1e-24, 1e+30, 1e-10} : Trust{1e-300, 1e+300, 1e-2};
  for (int64_t i = 0; i + 1 < work.num_states; ++i) {
    const int64_t first = (i + 1) / kPairLanes * kPairLanes;
    check_row<Exact, Element>(rows, i, first, trust, work);
    fold_row(work, i, first, moments);
  }
  return true;
}

}  // namespace
}  // namespace simdiff

// The order is that of DType.
#define SIMDIFF_BLOCKS(Exact, Short)                                                  \
  {&block_token<Short, Exact, float>, &block_token<DoubleRows<Exact>, Exact, double>, \
   &block_token<Short, Exact, BFloat16>, &block_token<Short, Exact, Float16>}
