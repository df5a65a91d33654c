// The sums of accumulate_blocks on the CPU: for every pair i < j of a token's hidden states, with
// x = h_i, y = h_j and d = y - x, sum d^2 and, where it is asked for, sum |d|; sum h_k^2 of each
// state. Compiled once for each instruction set, like row_sums_loop.h.
//
// Bytes per token: (L + 1) * hidden_size * element size read, each once; 8 written for each pair
// (16 with sum |d|) and state, in the cache. Data path: rows from memory, part by part, converted
// to float32 (float64 states stay so) -> a buffer in the second cache -> a tile of pairs in
// registers, as many rows i and j as these hold the sums of, so that a loaded register serves
// several pairs -> widened to float64 after each part -> matrices in the cache. Arithmetic is the
// limit: for each pair and register a subtraction and a multiply-add, with sum |d| a magnitude and
// an addition too. Differences are formed directly, never out of norms and products.
//
// What float32 costs is what it costs in row_sums_short.h: at most 48 additions, and 4 across a
// register, before a sum is widened.
//
// A Vector offers: Scalar (of its buffer), lanes, tile_rows and tile_columns (i and j of a tile),
// wide_tile_columns (j of one without sum |d|, whose registers hold the sums of more pairs;
// measured on Zen 4 with 31 states of 576: a tenth more pairs a second than with tile_columns),
// Register, zero(), load(pointer to 2 * lanes entries, even, odd), multiply_add, subtract, add,
// magnitude, and narrow_totals of four Registers.
#pragma once

#include <algorithm>

#include "block_sums.h"
#include "row_sums_loop.h"

namespace simdiff {
namespace {

// Float64 states: the same loops on the registers of row_sums_loop.h.
template <class Exact>
struct DoubleRows {
  using Scalar = double;
  static constexpr int lanes = Exact::lanes;
  static constexpr int tile_rows = 2, tile_columns = 2, wide_tile_columns = 3;
  using Register = typename Exact::Register;

  static Register zero() { return Exact::zero(); }
  static void load(const double* pointer, Register& even, Register& odd) {
    even = Exact::load(pointer);
    odd = Exact::load(pointer + lanes);
  }
  static Register multiply_add(Register a, Register b, Register c) {
    return Exact::multiply_add(a, b, c);
  }
  static Register subtract(Register a, Register b) { return Exact::subtract(a, b); }
  static Register add(Register a, Register b) { return Exact::add(a, b); }
  static Register magnitude(Register a) { return Exact::magnitude(a); }
  static void narrow_totals(Register a, Register b, Register c, Register d, double* out) {
    Exact::totals(a, b, c, d, out);
  }
};

// Prefetches the rows that are converted next (the next part of this token, or the first part of
// the next token) while there is arithmetic to do: without it a third of the time went by waiting
// for memory (31 states of 576 float32 entries, AVX-512). One row for each tile, one register's
// worth for each step of it.
struct PrefetchCursor {
  const void* const* rows;
  int64_t num_rows;
  int64_t offset;            // bytes into a row
  int64_t register_bytes;    // of what fills a register of the buffer
  const void* fallback_row;  // prefetched by the tiles that follow the last row: in the cache
  int64_t tile = 0;

  // Where the next tile begins to prefetch.
  inline const char* next_row() {
    const bool left = tile < num_rows;
    const auto* row = static_cast<const char*>(left ? rows[tile] : fallback_row);
    ++tile;
    return left ? row + offset : row;
  }
};

// Rows of registers in the buffer, one after the other.
template <class Vector>
struct RowPart {
  using Register = typename Vector::Register;
  const Register* registers;
  int64_t size;  // registers of a row

  const Register* row(int64_t k) const { return registers + k * size; }
};

// Where the sums of a pair (i, j) are added.
struct PairSums {
  double* squared;
  double* absolute;
  int64_t stride;

  inline int64_t at(int64_t i, int64_t j) const { return i * stride + j; }
};

// The sums of `count` pairs, sum |d| among them or not.
template <class Vector, int count, bool with_absolute>
struct TileSums {
  using Register = typename Vector::Register;
  Register squared[count], absolute[with_absolute ? count : 1];

  TileSums() {
    for (int p = 0; p < count; ++p) squared[p] = Vector::zero();
    if constexpr (with_absolute) {
      for (int p = 0; p < count; ++p) absolute[p] = Vector::zero();
    }
  }

  inline void add(int p, Register x, Register y) {
    const Register d = Vector::subtract(y, x);
    squared[p] = Vector::multiply_add(d, d, squared[p]);
    if constexpr (with_absolute) absolute[p] = Vector::add(absolute[p], Vector::magnitude(d));
  }

  // Adds the sums of pair p to entry place(p) of both matrices.
  template <class Place>
  inline void add_to(const PairSums& out, const Place& place) const {
    add_totals(squared, out.squared, place);
    if constexpr (with_absolute) add_totals(absolute, out.absolute, place);
  }

 private:
  // Four registers at a time.
  template <class Place>
  static inline void add_totals(const Register* sums, double* out, const Place& place) {
#pragma GCC unroll 4
    for (int p = 0; p < count; p += 4) {
      const auto at = [&](int k) { return p + k < count ? p + k : p; };
      double total[4];
      Vector::narrow_totals(sums[p], sums[at(1)], sums[at(2)], sums[at(3)], total);
      for (int k = 0; k < 4 && p + k < count; ++k) out[place(p + k)] += total[k];
    }
  }
};

// The pairs (i + a, j + b) with a < num_i and b < num_j.
template <class Vector, bool with_absolute, int num_i, int num_j>
inline void tile(const RowPart<Vector>& part, int64_t i, int64_t j, PrefetchCursor& prefetch,
                 const PairSums& out) {
  using Register = typename Vector::Register;
  TileSums<Vector, num_i * num_j, with_absolute>
      sums;  // in registers: all loops over pairs are unrolled
  const Register *x = part.row(i), *y = part.row(j);
  const char* prefetch_at = prefetch.next_row();
  for (int64_t s = 0; s < part.size; ++s, prefetch_at += prefetch.register_bytes) {
    __builtin_prefetch(prefetch_at);
    Register rows[num_i];
#pragma GCC unroll 8
    for (int a = 0; a < num_i; ++a) rows[a] = x[a * part.size + s];
#pragma GCC unroll 8
    for (int b = 0; b < num_j; ++b) {
      const Register column = y[b * part.size + s];
#pragma GCC unroll 8
      for (int a = 0; a < num_i; ++a) sums.add(b * num_i + a, rows[a], column);
    }
  }
  sums.add_to(out, [&](int p) { return out.at(i + p % num_i, j + p / num_i); });
}

// The pairs i <= a < b < i + num.
template <class Vector, bool with_absolute, int num>
inline void diagonal_tile(const RowPart<Vector>& part, int64_t i, PrefetchCursor& prefetch,
                          const PairSums& out) {
  using Register = typename Vector::Register;
  if constexpr (num > 1) {
    TileSums<Vector, num*(num - 1) / 2, with_absolute> sums;
    const Register* x = part.row(i);
    const char* prefetch_at = prefetch.next_row();
    for (int64_t s = 0; s < part.size; ++s, prefetch_at += prefetch.register_bytes) {
      __builtin_prefetch(prefetch_at);
      Register rows[num];
#pragma GCC unroll 8
      for (int a = 0; a < num; ++a) rows[a] = x[a * part.size + s];
#pragma GCC unroll 8
      for (int b = 1; b < num; ++b) {
#pragma GCC unroll 8
        for (int a = 0; a < b; ++a) sums.add(b * (b - 1) / 2 + a, rows[a], rows[b]);
      }
    }
    sums.add_to(out, [&](int p) {
      const int b = p < 1 ? 1 : p < 3 ? 2 : 3;
      static_assert(num <= 4, "p counts (0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)");
      return out.at(i + p - b * (b - 1) / 2, i + b);
    });
  }
}

// The pairs of rows i ... i + num_i - 1 with the rows from j on, num_j at a time, then fewer.
template <class Vector, bool with_absolute, int num_i, int num_j>
inline void tiles(const RowPart<Vector>& part, int64_t i, int64_t j, int64_t num_states,
                  PrefetchCursor& prefetch, const PairSums& out) {
  for (; j + num_j <= num_states; j += num_j) {
    tile<Vector, with_absolute, num_i, num_j>(part, i, j, prefetch, out);
  }
  if constexpr (num_j > 1) {
    constexpr int fewer = num_j > 3 ? num_j / 2 : num_j - 1;
    tiles<Vector, with_absolute, num_i, fewer>(part, i, j, num_states, prefetch, out);
  }
}

template <class Vector, bool with_absolute>
inline void all_pairs(const RowPart<Vector>& part, int64_t num_states, PrefetchCursor prefetch,
                      const PairSums& out) {
  constexpr int rows = Vector::tile_rows;
  constexpr int columns = with_absolute ? Vector::tile_columns : Vector::wide_tile_columns;
  static_assert(rows <= 4, "what is left over is enumerated here");
  int64_t i = 0;
  for (; i + rows <= num_states; i += rows) {
    diagonal_tile<Vector, with_absolute, rows>(part, i, prefetch, out);
    tiles<Vector, with_absolute, rows, columns>(part, i, i + rows, num_states, prefetch, out);
  }
  switch (num_states - i) {  // these rows are the last ones
    case 3:
      return diagonal_tile<Vector, with_absolute, 3>(part, i, prefetch, out);
    case 2:
      return diagonal_tile<Vector, with_absolute, 2>(part, i, prefetch, out);
  }
}

// The pairs (k, k + 1): sum |d|, and sum d^2 where no tile has formed it. The order of additions is
// that of a tile, so that both ways give the same sums.
template <class Vector, bool with_squared>
inline void neighbours(const RowPart<Vector>& part, int64_t num_states, const PairSums& out) {
  using Register = typename Vector::Register;
  for (int64_t k = 0; k + 1 < num_states; k += 4) {
    const Register* rows[5];
    Register squared[with_squared ? 4 : 1], absolute[4];
    for (int r = 0; r < 5; ++r) rows[r] = part.row(std::min(k + r, num_states - 1));
    for (int r = 0; r < 4; ++r) absolute[r] = Vector::zero();
    if constexpr (with_squared) {
      for (int r = 0; r < 4; ++r) squared[r] = Vector::zero();
    }
    for (int64_t s = 0; s < part.size; ++s) {
      Register x = rows[0][s];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Register y = rows[r + 1][s], d = Vector::subtract(y, x);
        absolute[r] = Vector::add(absolute[r], Vector::magnitude(d));
        if constexpr (with_squared) squared[r] = Vector::multiply_add(d, d, squared[r]);
        x = y;
      }
    }
    const auto add_totals = [&](const Register* sums, double* target) {
      double total[4];
      Vector::narrow_totals(sums[0], sums[1], sums[2], sums[3], total);
      for (int r = 0; r < 4 && k + r + 1 < num_states; ++r) {
        target[out.at(k + r, k + r + 1)] += total[r];
      }
    };
    add_totals(absolute, out.absolute);
    if constexpr (with_squared) add_totals(squared, out.squared);
  }
}

// Entries [begin, end) of a row into the buffer, padded with zeros, which add nothing to any sum.
template <class Vector, class Element>
inline void convert(const Element* row, int64_t begin, int64_t end,
                    typename Vector::Register* out) {
  constexpr int64_t step = 2 * Vector::lanes;
  int64_t i = begin;
  for (; i + step <= end; i += step, out += 2) Vector::load(row + i, out[0], out[1]);
  if (i < end) {
    Element tail[step] = {};
    std::memcpy(tail, row + i, (end - i) * sizeof(Element));
    Vector::load(tail, out[0], out[1]);
  }
}

// Adds sum x^2 of every row of the buffer to norm_squared; in float64 the products are exact.
template <class Vector, class Exact>
inline void add_norms(const RowPart<Vector>& part, int64_t num_states, double* norm_squared) {
  using Scalar = typename Vector::Scalar;
  for (int64_t k = 0; k < num_states; k += 4) {
    const Scalar* rows[4];
    typename Exact::Register sums[4];
    for (int r = 0; r < 4; ++r) {
      rows[r] = reinterpret_cast<const Scalar*>(part.row(std::min(k + r, num_states - 1)));
      sums[r] = Exact::zero();
    }
    for (int64_t e = 0; e < part.size * Vector::lanes; e += Exact::lanes) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const auto x = Exact::load(rows[r] + e);
        sums[r] = Exact::multiply_add(x, x, sums[r]);
      }
    }
    double total[4];
    Exact::totals(sums[0], sums[1], sums[2], sums[3], total);
    for (int r = 0; r < 4 && k + r < num_states; ++r) norm_squared[k + r] += total[r];
  }
}

// Which pairs of a token are summed.
struct WantedPairs {
  bool all;         // sum d^2 of all pairs, and sum |d| in a kernel that has it
  bool neighbours;  // both sums of the pairs (k, k + 1)
};

// The sums of one token: norm_squared, squared and absolute of `work`. The token that follows has
// `next_rows`.
template <class Vector, class Exact, class Element, bool with_absolute>
void block_sums(const void* const* rows, const void* const* next_rows, WantedPairs wanted,
                BlockWork& work) {
  using Register = typename Vector::Register;
  constexpr int64_t step = 2 * Vector::lanes;
  static_assert(sizeof(Register) <= kLargestRegister);
  const int64_t num_states = work.num_states;
  const PairSums out{work.squared.get(), work.absolute.get(), work.stride};
  std::fill_n(work.norm_squared.get(), work.stride, 0.0);
  std::fill_n(work.squared.get(), num_states * work.stride, 0.0);
  if (with_absolute || wanted.neighbours) {
    std::fill_n(work.absolute.get(), num_states * work.stride, 0.0);
  }

  // Parts of equal length: few additions in a row make small errors.
  const int64_t num_steps = (work.hidden_size + step - 1) / step;
  const int64_t num_parts = (num_steps + kPartSteps - 1) / kPartSteps;
  const int64_t part_steps = (num_steps + num_parts - 1) / num_parts;
  auto* buffer = reinterpret_cast<Register*>(work.rows.get());
  for (int64_t begin = 0; begin < work.hidden_size; begin += part_steps * step) {
    const int64_t end = std::min(begin + part_steps * step, work.hidden_size);
    const RowPart<Vector> part{buffer, (end - begin + step - 1) / step * 2};
    for (int64_t k = 0; k < num_states; ++k) {
      convert<Vector>(static_cast<const Element*>(rows[k]), begin, end, buffer + k * part.size);
    }
    add_norms<Vector, Exact>(part, num_states, work.norm_squared.get());
    if (!wanted.all) {
      neighbours<Vector, true>(part, num_states, out);
      continue;
    }
    const bool last = end == work.hidden_size;
    const int64_t offset = last ? 0 : end * static_cast<int64_t>(sizeof(Element));
    const PrefetchCursor prefetch{last ? next_rows : rows, num_states, offset,
                                  Vector::lanes * static_cast<int64_t>(sizeof(Element)), buffer};
    all_pairs<Vector, with_absolute>(part, num_states, prefetch, out);
    if (!with_absolute && wanted.neighbours) neighbours<Vector, false>(part, num_states, out);
  }
}

}  // namespace
}  // namespace simdiff
