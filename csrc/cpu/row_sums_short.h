// The loop for float32, bfloat16 and float16: short sums in float32, added up in float64.
//
// Converting every entry to float64, as row_sums_loop.h does, takes longer than reading it; here
// the memory is the limit again. What float32 costs is bounded: at most 29 additions, of terms
// that are all positive but in sum x d, follow each other before a sum is widened, so that it is
// off by at most 29 * 2^-24 of the sum of its absolute terms (1.7e-6), and typically by 1e-8.
// Differences y - x of neighbouring
// values are exact. A row for which that is not enough is summed again in float64, out of the
// cache: where the cosine distance is a small difference of large numbers, or where float32 over-
// or underflows.
//
// A Vector offers: lanes (of float32), Register, Wide (lanes doubles), zero(), wide_zero(),
// load(pointer to 2 * lanes entries, even, odd), multiply_add, subtract, add, magnitude,
// widen_add(Register, Wide), totals of four Wide, as in row_sums_loop.h, and narrow_totals of four
// Registers.
#pragma once

#include "row_sums_loop.h"

namespace simdiff {
namespace {

template <class Vector>
struct ShortSums {
  using Register = typename Vector::Register;
  Register before_squared, before_difference, difference_squared, difference_absolute;

  ShortSums()
      : before_squared(Vector::zero()),
        before_difference(Vector::zero()),
        difference_squared(Vector::zero()),
        difference_absolute(Vector::zero()) {}

  inline void step(Register x, Register y) {
    const Register d = Vector::subtract(y, x);
    before_squared = Vector::multiply_add(x, x, before_squared);
    before_difference = Vector::multiply_add(x, d, before_difference);
    difference_squared = Vector::multiply_add(d, d, difference_squared);
    difference_absolute = Vector::add(difference_absolute, Vector::magnitude(d));
  }
};

// The metrics' sums from sum x^2, sum x d, sum d^2 and sum |d|: |y|^2 = |x|^2 + 2 sum x d + |d|^2,
// so that what the norms differ by is as exact as d is.
inline RowSums from_totals(const double* total) {
  return {total[0], total[0] + (2 * total[1] + total[2]), total[2], total[3]};
}

template <class Vector>
struct LongSums {
  using Wide = typename Vector::Wide;
  Wide before_squared, before_difference, difference_squared, difference_absolute;

  LongSums()
      : before_squared(Vector::wide_zero()),
        before_difference(Vector::wide_zero()),
        difference_squared(Vector::wide_zero()),
        difference_absolute(Vector::wide_zero()) {}

  inline void add(const ShortSums<Vector>& even, const ShortSums<Vector>& odd) {
    const auto widen = [](auto a, auto b, Wide sum) {
      return Vector::widen_add(Vector::add(a, b), sum);
    };
    before_squared = widen(even.before_squared, odd.before_squared, before_squared);
    before_difference = widen(even.before_difference, odd.before_difference, before_difference);
    difference_squared = widen(even.difference_squared, odd.difference_squared, difference_squared);
    difference_absolute =
        widen(even.difference_absolute, odd.difference_absolute, difference_absolute);
  }

  RowSums totals() const {
    double total[4];
    Vector::totals(before_squared, before_difference, difference_squared, difference_absolute,
                   total);
    return from_totals(total);
  }
};

// Of a row that is one short sum: the lanes, too, are added in float32.
template <class Vector>
inline RowSums short_totals(const ShortSums<Vector>& even, const ShortSums<Vector>& odd) {
  double total[4];
  Vector::narrow_totals(Vector::add(even.before_squared, odd.before_squared),
                        Vector::add(even.before_difference, odd.before_difference),
                        Vector::add(even.difference_squared, odd.difference_squared),
                        Vector::add(even.difference_absolute, odd.difference_absolute), total);
  return from_totals(total);
}

// Whether sums that are off by some 1e-8 give metrics that are off by some 1e-7.
inline bool float32_is_enough(const RowSums& sums) {
  constexpr double smallest = 1e-24, largest = 1e+30;  // products far from float32's ends
  const double x = sums.before_squared, y = sums.after_squared, d = sums.difference_squared;
  if (!(x > smallest && x < largest && y > x / 16 && y < largest && d < largest)) return false;
  if (d == 0) return sums.difference_absolute == 0;
  if (d < smallest) return false;
  // d - (|y| - |x|)^2 >= d / 16, with (|y| - |x|)^2 <= growth^2 / (x + y)
  return (y - x) * (y - x) <= 0.9375 * d * (x + y);
}

template <class Vector, class Exact, class Element>
RowSums row_sums_short(const void* before_row, const void* after_row, int64_t hidden_size) {
  constexpr int64_t step = 2 * Vector::lanes, steps = 24;
  const auto* before = static_cast<const Element*>(before_row);
  const auto* after = static_cast<const Element*>(after_row);
  LongSums<Vector> sums;
  RowSums totals;
  typename Vector::Register x_even, x_odd, y_even, y_odd;
  for (int64_t i = 0; i < hidden_size;) {
    ShortSums<Vector> even, odd;
    const int64_t full = i + (hidden_size - i) / step * step;
    const int64_t end = full < i + steps * step ? full : i + steps * step;
    for (; i < end; i += step) {
      Vector::load(before + i, x_even, x_odd);
      Vector::load(after + i, y_even, y_odd);
      even.step(x_even, y_even);
      odd.step(x_odd, y_odd);
    }
    if (hidden_size - i < step && i < hidden_size) {
      // The tail, padded with zeros, which add nothing to any sum.
      Element before_tail[step] = {}, after_tail[step] = {};
      std::memcpy(before_tail, before + i, (hidden_size - i) * sizeof(Element));
      std::memcpy(after_tail, after + i, (hidden_size - i) * sizeof(Element));
      Vector::load(before_tail, x_even, x_odd);
      Vector::load(after_tail, y_even, y_odd);
      even.step(x_even, y_even);
      odd.step(x_odd, y_odd);
      i = hidden_size;
    }
    if (hidden_size <= steps * step) {
      totals = short_totals(even, odd);
    } else {
      sums.add(even, odd);
    }
  }
  if (hidden_size > steps * step) totals = sums.totals();
  return float32_is_enough(totals) ? totals
                                   : row_sums<Exact, Element>(before_row, after_row, hidden_size);
}

}  // namespace
}  // namespace simdiff

// The order is that of DType.
#define SIMDIFF_ROW_SUMS_SHORT(Exact, Short)                       \
  {&row_sums_short<Short, Exact, float>, &row_sums<Exact, double>, \
   &row_sums_short<Short, Exact, BFloat16>, &row_sums_short<Short, Exact, Float16>}
