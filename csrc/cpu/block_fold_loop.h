// The fold of accumulate_blocks on the CPU: from the sums of a token's pairs (block_sums_loop.h) to
// the metrics of BLOCK_METRICS, added to the running moments of every pair i < j. With x = h_i,
// y = h_j, d = y - x:
//   v = 1 - cos(x, y) = (sum d^2 - (|y| - |x|)^2) / (2 |x| |y|), sum d^2, sum |d| / hidden_size,
//   |d| / |x|, and the angle of v (angular_distance.h)
// Data path: sums of one row i of pairs, kPairLanes columns j side by side -> trust test, and pairs
// that fail it summed again in float64 from the hidden states -> metrics in registers -> moments of
// the chunk. All but the hidden states of such pairs stays in the cache: per pair 16 bytes are read
// (24 with sum |d|), and 9 or 11 moments of 8 bytes read and written. Arithmetic is the limit, so
// several pairs at a time: one after the other, the 465 of 31 states would take as long as their
// sums. Compiled once for each instruction set.
#pragma once

#include <cmath>

#include "../common/angular_distance.h"
#include "../common/trust.h"
#include "block_sums_loop.h"

namespace simdiff {
namespace {

// kPairLanes pairs side by side, written out: GCC makes no AVX2 code of the comparisons otherwise.
// Everything of BlockWork is aligned for them.
typedef double Doubles __attribute__((vector_size(8 * kPairLanes), may_alias));
typedef int64_t Masks __attribute__((vector_size(8 * kPairLanes)));

inline const Doubles& at(const double* pointer) {
  return *reinterpret_cast<const Doubles*>(pointer);
}

inline Doubles& at(double* pointer) { return *reinterpret_cast<Doubles*>(pointer); }

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

// Whether rows i < j are the same bytes, asked where sum d^2 is 0 and does not tell: each d may be
// too small for its square. Rows are first compared with their neighbours, once for each token, so
// that a model of many layers that do nothing costs no comparison of every pair.
[[maybe_unused]] bool same_rows(const void* const* rows, int64_t i, int64_t j, int64_t row_bytes,
                                BlockWork& work) {
  const auto same = [&](int64_t a, int64_t b) {
    return std::memcmp(rows[a], rows[b], row_bytes) == 0;
  };
  if (!work.neighbours_compared) {
    work.neighbours_compared = true;
    work.same_since[0] = 0;
    for (int64_t k = 1; k < work.num_states; ++k) {
      work.same_since[k] = same(k - 1, k) ? work.same_since[k - 1] : k;
    }
  }
  return work.same_since[j] <= i || same(i, j);
}

// norm_gap of the pairs (i, j), and what must be summed again. `first` is the column of the first
// pair, rounded down to a multiple of kPairLanes.
template <class Exact, class Element, bool with_absolute>
void check_row(const void* const* rows, int64_t i, int64_t first, const Trust& trust,
               BlockWork& work) {
  const double norm = work.norm[i], norm_squared = work.norm_squared[i];
  const int64_t row = i * work.stride;
  for (int64_t j = first; j < work.stride; j += kPairLanes) {
    const Doubles norm_gap = at(&work.norm[j]) - norm;
    at(&work.norm_gap[row + j]) = norm_gap;
    const Doubles both_norms = at(&work.norm[j]) + norm;
    const Doubles both_norms_squared = at(&work.norm_squared[j]) + norm_squared;
    const Doubles squared = at(&work.squared[row + j]);
    // Without sum |d| no pair counts as equal here.
    const Doubles absolute = with_absolute ? at(&work.absolute[row + j]) : Doubles{} + 1.0;
    Masks suffice;
    sums_suffice(trust, squared, absolute, norm_gap, both_norms, both_norms_squared, suffice);
    int64_t all = -1;
    for (int lane = 0; lane < kPairLanes; ++lane) all &= suffice[lane];
    if (all) continue;
    for (int lane = 0; lane < kPairLanes; ++lane) {
      const int64_t column = j + lane;
      if (suffice[lane] || column <= i || column >= work.num_states) continue;
      if (!with_absolute && squared[lane] == 0 &&
          same_rows(rows, i, column, work.hidden_size * sizeof(Element), work)) {
        continue;
      }
      exact_pair<Exact, Element>(rows, i, column, work);
    }
  }
}

// The same for the pairs (i, i + 1) alone; also where a state holds a NaN or Inf.
template <class Exact, class Element>
void check_neighbours(const void* const* rows, const Trust& trust, BlockWork& work) {
  for (int64_t i = 0; i + 1 < work.num_states; ++i) {
    const int64_t pair = i * work.stride + i + 1;
    bool suffice;
    sums_suffice(trust, work.squared[pair], work.absolute[pair], work.norm[i + 1] - work.norm[i],
                 work.norm[i] + work.norm[i + 1], work.norm_squared[i] + work.norm_squared[i + 1],
                 suffice);
    if (!suffice) exact_pair<Exact, Element>(rows, i, i + 1, work);
  }
}

// The row sums of every layer: of the pairs (i, i + 1), `stride` entries apart.
[[maybe_unused]] void store_row_sums(const BlockWork& work, RowSums* out, int64_t stride) {
  for (int64_t i = 0; i + 1 < work.num_states; ++i) {
    const int64_t pair = i * work.stride + i + 1;
    out[i * stride] = {work.norm_squared[i], work.norm_squared[i + 1], work.squared[pair],
                       work.absolute[pair]};
  }
}

// The cosine distances of the pairs (i, j), and of what roots are taken: for the angle, min(v, 2 -
// v) with v the cosine distance (angular_distance.h).
[[maybe_unused]] void cosine_row(BlockWork& work, int64_t i, int64_t first) {
  const int64_t row = i * work.stride;
  const double norm = work.norm[i], inverse = work.inverse_norm[i];
  const Doubles zeros = {}, ones = zeros + 1.0, twos = zeros + 2.0;
  for (int64_t j = first; j < work.stride; j += kPairLanes) {
    const Doubles squared = at(&work.squared[row + j]), gap = at(&work.norm_gap[row + j]);
    const Doubles inverses = at(&work.inverse_norm[j]);
    Doubles cosine = 0.5 * ((squared - gap * gap) * inverse) * inverses;
    cosine = cosine < zeros ? zeros : cosine;  // rounding may leave [0, 2] by an ulp
    cosine = cosine > twos ? twos : cosine;
    // A zero vector has no direction: nothing in common with anything but another zero vector.
    const Doubles undefined = at(&work.norm[j]) == norm ? zeros : ones;
    cosine = inverses * inverse == zeros ? undefined : cosine;
    at(&work.cosine[j]) = cosine;
    at(&work.angle_root[j]) = cosine > ones ? twos - cosine : cosine;
  }
  // Plain loops: GCC's vectors have no square root, its vectoriser does.
  const double* const all_squared = &work.squared[row];
  double *const lengths = work.length.get(), *const roots = work.angle_root.get();
  for (int64_t j = first; j < work.stride; ++j) lengths[j] = std::sqrt(all_squared[j]);
  for (int64_t j = first; j < work.stride; ++j) roots[j] = std::sqrt(roots[j]);
}

// Adds the metrics of the pairs (i, j) to `moments`.
template <bool with_absolute>
void fold_row(BlockWork& work, int64_t i, int64_t first, double* moments) {
  const int64_t row = i * work.stride, matrix = work.num_states * work.stride;
  const double inverse = work.inverse_norm[i];
  const double inverse_size = 1.0 / static_cast<double>(work.hidden_size);
  const Doubles zeros = {}, ones = zeros + 1.0, twos = zeros + 2.0;
  const Doubles undefined_relative = inverse == 0 ? ones : zeros;
  for (int64_t j = first; j < work.stride; j += kPairLanes) {
    const Doubles squared = at(&work.squared[row + j]), cosine = at(&work.cosine[j]);
    const Doubles relative =
        at(&work.length[j]) * inverse + (squared == zeros ? zeros : undefined_relative);
    Doubles ratio;
    angle_over_root<Doubles>(cosine > ones ? twos - cosine : cosine, ratio);
    const Doubles near = at(&work.angle_root[j]) * ratio;
    const Doubles absolute = with_absolute ? at(&work.absolute[row + j]) * inverse_size : zeros;
    const Doubles values[kNumBlockMetrics] = {cosine, squared, absolute, relative,
                                              cosine > ones ? ones - near : near};
    double* const sums = moments + row + j;
    for (int m = 0; m < kNumBlockMetrics; ++m) {
      if (m == kAbsoluteDifference && !with_absolute) continue;
      at(sums + m * matrix) += values[m];
      at(sums + (kNumBlockMetrics + m) * matrix) += values[m] * values[m];
    }
    Doubles& maximum = at(sums + 2 * kNumBlockMetrics * matrix);
    maximum = squared > maximum ? squared : maximum;
  }
}

// A BlockTokenFunction.
template <class Vector, class Exact, class Element, bool with_absolute>
bool block_token(const void* const* rows, const void* const* next_rows, BlockWork& work,
                 double* moments, RowSums* row_sums, int64_t row_sums_stride) {
  block_sums<Vector, Exact, Element, with_absolute>(
      rows, next_rows, {moments != nullptr, row_sums != nullptr}, work);
  // A NaN or Inf anywhere in a row reaches its sum of squares.
  bool finite = true;
  for (int64_t k = 0; k < work.num_states; ++k) finite &= std::isfinite(work.norm_squared[k]);
  const bool folded = finite && moments != nullptr;
  if (!folded && row_sums == nullptr) return finite;
  for (int64_t k = 0; k < work.stride; ++k) {
    const double norm = std::sqrt(work.norm_squared[k]);
    work.norm[k] = norm;
    work.inverse_norm[k] = norm == 0 ? 0.0 : 1 / norm;
  }
  constexpr Trust trust = trust_in(sizeof(typename Vector::Scalar) == sizeof(double));
  work.neighbours_compared = false;
  if (folded) {
    for (int64_t i = 0; i + 1 < work.num_states; ++i) {
      const int64_t first = (i + 1) / kPairLanes * kPairLanes;
      check_row<Exact, Element, with_absolute>(rows, i, first, trust, work);
      cosine_row(work, i, first);
      fold_row<with_absolute>(work, i, first, moments);
    }
  } else {
    check_neighbours<Exact, Element>(rows, trust, work);
  }
  if (row_sums != nullptr) store_row_sums(work, row_sums, row_sums_stride);
  return finite;
}

}  // namespace
}  // namespace simdiff

// Without sum |d| of all pairs, then with it; the order within is that of DType.
#define SIMDIFF_BLOCKS(Exact, Short) \
  {SIMDIFF_BLOCKS_OF(Exact, Short, false), SIMDIFF_BLOCKS_OF(Exact, Short, true)}
#define SIMDIFF_BLOCKS_OF(Exact, Short, absolute)            \
  {&block_token<Short, Exact, float, absolute>,              \
   &block_token<DoubleRows<Exact>, Exact, double, absolute>, \
   &block_token<Short, Exact, BFloat16, absolute>, &block_token<Short, Exact, Float16, absolute>}
