// Row sums in float64: sum x^2, sum y^2, sum d^2, sum |d| of a token's rows x and y, d = y - x. For
// float64 states, for the baseline, and for rows that short sums do not serve (row_sums_short.h).
// Bytes per token: 2 * hidden_size * element size read, once; 32 written, in the cache. Data path:
// memory -> widened in registers -> two sets of four sums in registers -> one RowSums. Converting
// entries of less than 64 bits takes longer than reading them.
//
// Each instruction set includes this file after its own `#pragma GCC target` and passes its vector
// type, so everything here has internal linkage: the linker must never merge copies compiled for
// different processors.
//
// A Vector offers: lanes, Register (lanes doubles), zero(), load(pointer to the element type),
// multiply_add(a, b, c) = a * b + c, subtract, add, magnitude, and totals(a, b, c, d, out): the sum
// of the lanes of each.
#pragma once

#include <cstring>

#include "chunk_loops.h"
#include "row_sums.h"

namespace simdiff {
namespace {

template <class Vector>
struct Accumulators {
  using Register = typename Vector::Register;
  Register before_squared, after_squared, difference_squared, difference_absolute;

  // Written out: GCC compiles an implicit constructor without the `#pragma GCC target` around it.
  Accumulators()
      : before_squared(Vector::zero()),
        after_squared(Vector::zero()),
        difference_squared(Vector::zero()),
        difference_absolute(Vector::zero()) {}

  template <class Element>
  inline void step(const Element* before, const Element* after) {
    const auto x = Vector::load(before);
    const auto y = Vector::load(after);
    const auto d = Vector::subtract(y, x);
    before_squared = Vector::multiply_add(x, x, before_squared);
    after_squared = Vector::multiply_add(y, y, after_squared);
    difference_squared = Vector::multiply_add(d, d, difference_squared);
    difference_absolute = Vector::add(difference_absolute, Vector::magnitude(d));
  }
};

template <class Vector, class Element>
RowSums row_sums(const void* before_row, const void* after_row, int64_t hidden_size) {
  constexpr int64_t lanes = Vector::lanes;
  const auto* before = static_cast<const Element*>(before_row);
  const auto* after = static_cast<const Element*>(after_row);
  // Two sets of sums: with four chains each, enough to hide the latency of a fused multiply-add.
  Accumulators<Vector> even, odd;
  int64_t i = 0;
  for (; i + 2 * lanes <= hidden_size; i += 2 * lanes) {
    even.step(before + i, after + i);
    odd.step(before + i + lanes, after + i + lanes);
  }
  if (i + lanes <= hidden_size) {
    even.step(before + i, after + i);
    i += lanes;
  }
  if (i < hidden_size) {
    // The tail, padded with zeros, which add nothing to any sum.
    Element before_tail[lanes] = {}, after_tail[lanes] = {};
    std::memcpy(before_tail, before + i, (hidden_size - i) * sizeof(Element));
    std::memcpy(after_tail, after + i, (hidden_size - i) * sizeof(Element));
    odd.step(before_tail, after_tail);
  }
  double totals[4];
  Vector::totals(Vector::add(even.before_squared, odd.before_squared),
                 Vector::add(even.after_squared, odd.after_squared),
                 Vector::add(even.difference_squared, odd.difference_squared),
                 Vector::add(even.difference_absolute, odd.difference_absolute), totals);
  return {totals[0], totals[1], totals[2], totals[3]};
}

template <class Vector, class Element>
void sum_rows(const RowPair* rows, int64_t num_rows, int64_t hidden_size, Chunk& chunk) {
  for (int64_t r = 0; r < num_rows; ++r) {
    chunk.sums[r] = row_sums<Vector, Element>(rows[r].before, rows[r].after, hidden_size);
  }
}

}  // namespace
}  // namespace simdiff

// The order is that of DType.
#define SIMDIFF_SUM_ROWS(Vector)                                                     \
  {&sum_rows<Vector, float>, &sum_rows<Vector, double>, &sum_rows<Vector, BFloat16>, \
   &sum_rows<Vector, Float16>}
