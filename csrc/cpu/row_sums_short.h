// Row sums for float32, bfloat16 and float16: of a token's rows x and y, d = y - x, short sums of
// x^2, x d, d^2 and |d| in float32, added up in float64; sum y^2 follows (trust.h).
//
// Bytes per token: 2 * hidden_size * element size read, once; 32 written, in the cache. Data path:
// memory, several tokens side by side, prefetched 256 bytes ahead -> converted in registers ->
// float32 sums in registers, widened every kShortSteps steps -> one RowSums. Memory is the limit.
//
// Converting every entry to float64, as row_sums_loop.h does, takes longer than reading it; here
// the memory is the limit again. What float32 costs is bounded: at most 52 additions, of terms
// that are all positive but in sum x d, follow each other before a sum is widened, so that it is
// off by at most 52 * 2^-24 of the sum of its absolute terms (3.1e-6), and typically by 1e-8.
// Differences y - x of neighbouring values are exact. A row for which that is not enough is summed
// again in float64, out of the cache: where the cosine distance is a small difference of large
// numbers, or where float32 over- or underflows.
//
// Several rows are read side by side, step by step. Processors prefetch within a page of memory, so
// that more pages in progress mean more bytes on the way: a fifth to a third more a second than one
// row after the other. And the sums of one row need not be split into independent chains, which
// would have to be added up at its end.
//
// A Vector offers: lanes (of float32), rows (read side by side: as many as its registers hold the
// sums of), Register, Wide (lanes doubles), zero(), wide_zero(), load(pointer to 2 * lanes entries,
// even, odd), multiply_add, subtract, add, magnitude, widen_add(Register, Wide), totals of four
// Wide, as in row_sums_loop.h, and narrow_totals of four Registers.
#pragma once

#include <algorithm>

#include "../common/trust.h"
#include "row_sums_loop.h"

namespace simdiff {
namespace {

inline constexpr int64_t kShortSteps = 24;
// How far ahead of a load its cache line is prefetched, in each row: with 8 rows, 32 lines.
// Measured on Zen 4: 128 to 320 bytes are alike, 512 reads a tenth less a second, 1024 a fifth.
inline constexpr int64_t kPrefetchBytes = 256;
// Rows of 16-bit entries take longer to measure than to read where memory is fast. For them lines
// further ahead are brought into the second cache, so that the memory does not wait: on Zen 4, 2 to
// 3% more a second with rows of 576 entries at 35 GB/s, 10% at 54 GB/s; 4 KiB ahead is alike, 1 KiB
// brings nothing.
inline constexpr int64_t kFarPrefetchBytes = 2048;

template <class Element>
inline void prefetch_line(const char* line) {
  __builtin_prefetch(line + kPrefetchBytes);
  if (sizeof(Element) == 2) __builtin_prefetch(line + kFarPrefetchBytes, 0, 2);
}

template <class Vector>
struct ShortSums {
  using Register = typename Vector::Register;
  Register before_squared, before_difference, difference_squared, difference_absolute;

  ShortSums()
      : before_squared(Vector::zero()),
        before_difference(Vector::zero()),
        difference_squared(Vector::zero()),
        difference_absolute(Vector::zero()) {}

  inline void add(Register x, Register y) {
    const Register d = Vector::subtract(y, x);
    before_squared = Vector::multiply_add(x, x, before_squared);
    before_difference = Vector::multiply_add(x, d, before_difference);
    difference_squared = Vector::multiply_add(d, d, difference_squared);
    difference_absolute = Vector::add(difference_absolute, Vector::magnitude(d));
  }

  // One step: 2 * lanes entries of both rows.
  template <class Element>
  inline void step(const Element* before, const Element* after) {
    Register x_even, x_odd, y_even, y_odd;
    Vector::load(before, x_even, x_odd);
    Vector::load(after, y_even, y_odd);
    add(x_even, y_even);
    add(x_odd, y_odd);
  }
};

template <class Vector>
struct LongSums {
  using Wide = typename Vector::Wide;
  Wide before_squared, before_difference, difference_squared, difference_absolute;

  LongSums()
      : before_squared(Vector::wide_zero()),
        before_difference(Vector::wide_zero()),
        difference_squared(Vector::wide_zero()),
        difference_absolute(Vector::wide_zero()) {}

  inline void add(const ShortSums<Vector>& part) {
    before_squared = Vector::widen_add(part.before_squared, before_squared);
    before_difference = Vector::widen_add(part.before_difference, before_difference);
    difference_squared = Vector::widen_add(part.difference_squared, difference_squared);
    difference_absolute = Vector::widen_add(part.difference_absolute, difference_absolute);
  }
};

// What is read: sum x^2, sum x d, sum d^2 and sum |d|. They lie where the row's RowSums will, with
// sum x d in the place of sum y^2, until finish().
template <class Vector>
inline void store_totals(const ShortSums<Vector>& sums, RowSums& out) {
  double total[4];
  Vector::narrow_totals(sums.before_squared, sums.before_difference, sums.difference_squared,
                        sums.difference_absolute, total);
  std::memcpy(&out, total, sizeof out);
}

template <class Vector>
inline void store_totals(const LongSums<Vector>& sums, RowSums& out) {
  double total[4];
  Vector::totals(sums.before_squared, sums.before_difference, sums.difference_squared,
                 sums.difference_absolute, total);
  std::memcpy(&out, total, sizeof out);
}

// Entries [begin, end) of num_rows pairs of rows: at most kShortSteps steps, the last one perhaps
// of fewer entries.
template <class Vector, class Element, int num_rows>
inline void short_sums(const RowPair* rows, int64_t begin, int64_t end, ShortSums<Vector>* out) {
  constexpr int64_t step = 2 * Vector::lanes;
  constexpr int64_t step_bytes = step * sizeof(Element);
  const Element *before[num_rows], *after[num_rows];
  for (int r = 0; r < num_rows; ++r) {
    before[r] = static_cast<const Element*>(rows[r].before);
    after[r] = static_cast<const Element*>(rows[r].after);
  }
  ShortSums<Vector> sums[num_rows];  // in registers: all loops over rows are unrolled
  int64_t i = begin;
  for (; i + step <= end; i += step) {
#pragma GCC unroll 4
    for (int r = 0; r < num_rows; ++r) {
      for (int64_t line = 0; line < step_bytes; line += kCacheLine) {
        prefetch_line<Element>(reinterpret_cast<const char*>(before[r] + i) + line);
        prefetch_line<Element>(reinterpret_cast<const char*>(after[r] + i) + line);
      }
      sums[r].step(before[r] + i, after[r] + i);
    }
  }
  if (i < end) {
    // The tail, padded with zeros, which add nothing to any sum.
#pragma GCC unroll 4
    for (int r = 0; r < num_rows; ++r) {
      Element before_tail[step] = {}, after_tail[step] = {};
      std::memcpy(before_tail, before[r] + i, (end - i) * sizeof(Element));
      std::memcpy(after_tail, after[r] + i, (end - i) * sizeof(Element));
      sums[r].step(before_tail, after_tail);
    }
  }
  for (int r = 0; r < num_rows; ++r) out[r] = sums[r];
}

// The pairs of rows 0, stride, 2 * stride, ..., (num_rows - 1) * stride, side by side.
template <class Vector, class Element, int num_rows>
inline void side_by_side(const RowPair* rows, int64_t stride, int64_t hidden_size, RowSums* out) {
  constexpr int64_t part = kShortSteps * 2 * Vector::lanes;
  RowPair chosen[num_rows];
  for (int r = 0; r < num_rows; ++r) chosen[r] = rows[r * stride];
  ShortSums<Vector> short_part[num_rows];
  if (hidden_size <= part) {
    short_sums<Vector, Element, num_rows>(chosen, 0, hidden_size, short_part);
    for (int r = 0; r < num_rows; ++r) store_totals(short_part[r], out[r * stride]);
    return;
  }
  LongSums<Vector> sums[num_rows];
  for (int64_t begin = 0; begin < hidden_size; begin += part) {
    const int64_t end = std::min(begin + part, hidden_size);
    short_sums<Vector, Element, num_rows>(chosen, begin, end, short_part);
    for (int r = 0; r < num_rows; ++r) sums[r].add(short_part[r]);
  }
  for (int r = 0; r < num_rows; ++r) store_totals(sums[r], out[r * stride]);
}

// From what is read to RowSums. Returns the number of rows for which float32 is not enough.
inline int64_t finish(RowSums* sums, int64_t num_rows) {
  int64_t num_inexact = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const double before_difference = sums[r].after_squared;  // sum x d in the place of sum y^2
    sums[r].after_squared =
        after_squared(sums[r].before_squared, before_difference, sums[r].difference_squared);
    num_inexact += !float32_is_enough(sums[r]);
  }
  return num_inexact;
}

template <class Vector, class Exact, class Element>
void sum_rows_short(const RowPair* rows, int64_t num_rows, int64_t hidden_size, Chunk& chunk) {
  constexpr int together = Vector::rows;
  RowSums* sums = chunk.sums;
  // Rows far from each other, so that each is read on where its predecessor ended.
  const int64_t stride = num_rows / together;
  for (int64_t r = 0; r < stride; ++r) {
    side_by_side<Vector, Element, together>(rows + r, stride, hidden_size, sums + r);
  }
  for (int64_t r = together * stride; r < num_rows; ++r) {
    side_by_side<Vector, Element, 1>(rows + r, 1, hidden_size, sums + r);
  }
  if (finish(sums, num_rows) > 0) {
    for (int64_t r = 0; r < num_rows; ++r) {
      if (float32_is_enough(sums[r])) continue;
      sums[r] = row_sums<Exact, Element>(rows[r].before, rows[r].after, hidden_size);
    }
  }
}

}  // namespace
}  // namespace simdiff

// The order is that of DType.
#define SIMDIFF_SUM_ROWS_SHORT(Exact, Short)                       \
  {&sum_rows_short<Short, Exact, float>, &sum_rows<Exact, double>, \
   &sum_rows_short<Short, Exact, BFloat16>, &sum_rows_short<Short, Exact, Float16>}
