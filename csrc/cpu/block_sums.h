// What one token adds to the blocks of layers, every pair i < j of its hidden states h_0 ... h_L:
// the memory that a thread needs for it, and the signature of the function that does it. Its two
// halves are block_sums_loop.h and block_fold_loop.h, compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../common/block_states.h"
#include "../common/metrics.h"

namespace simdiff {

inline constexpr int64_t kPairLanes = 8;  // pairs folded together
// Of a row, as much as is converted at a time, in steps of two registers: as many additions follow
// each other in float32 as in row_sums_short.h, and 31 rows take 95 KB at most, which a
// second-level cache holds.
inline constexpr int64_t kPartSteps = 24;
inline constexpr int64_t kLargestRegister = 64;
inline constexpr int64_t kRowPartBytes = 2 * kPartSteps * kLargestRegister;
inline constexpr int64_t kAlignment = 64;

// A matrix of pairs: row i, column j, rows padded to a multiple of kPairLanes. Entries with j <= i
// hold what nobody reads.
inline int64_t pair_stride(int64_t num_states) {
  return (num_states + kPairLanes - 1) / kPairLanes * kPairLanes;
}

template <class Value>
struct FreeAligned {
  void operator()(Value* pointer) const { std::free(pointer); }
};

// Zeros.
template <class Value>
std::unique_ptr<Value[], FreeAligned<Value>> aligned_array(int64_t count) {
  const int64_t bytes = (count * sizeof(Value) + kAlignment - 1) / kAlignment * kAlignment;
  auto* memory = static_cast<Value*>(std::aligned_alloc(kAlignment, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  for (int64_t i = 0; i < count; ++i) memory[i] = Value{};
  return std::unique_ptr<Value[], FreeAligned<Value>>(memory);
}

// What a thread needs for one token; every token writes what it reads.
struct BlockWork {
  BlockWork(int64_t num_states, int64_t hidden_size)
      : num_states(num_states),
        hidden_size(hidden_size),
        stride(pair_stride(num_states)),
        rows(aligned_array<char>(num_states * kRowPartBytes)),
        norm_squared(aligned_array<double>(stride)),
        norm(aligned_array<double>(stride)),
        inverse_norm(aligned_array<double>(stride)),
        length(aligned_array<double>(stride)),
        cosine(aligned_array<double>(stride)),
        angle_root(aligned_array<double>(stride)),
        squared(aligned_array<double>(num_states * stride)),
        absolute(aligned_array<double>(num_states * stride)),
        norm_gap(aligned_array<double>(num_states * stride)),
        same_since(aligned_array<int64_t>(num_states)) {}

  template <class Value>
  using Array = std::unique_ptr<Value[], FreeAligned<Value>>;

  int64_t num_states;
  int64_t hidden_size;
  int64_t stride;
  Array<char> rows;            // a part of each row, converted
  Array<double> norm_squared;  // |h_k|^2, exact products in float64
  Array<double> norm;
  Array<double> inverse_norm;        // 0 for a zero vector
  Array<double> length;              // of the differences of one row of pairs
  Array<double> cosine;              // distances v of one row of pairs
  Array<double> angle_root;          // sqrt(min(v, 2 - v)) of one row of pairs
  Array<double> squared;             // matrix: sum d^2 with d = h_j - h_i
  Array<double> absolute;            // matrix: sum |d|, where it is asked for
  Array<double> norm_gap;            // matrix: |h_j| - |h_i|
  Array<int64_t> same_since;         // of the rows up to k that are the same bytes, the first
  bool neighbours_compared = false;  // whether same_since is this token's
};

// Folds one token into `moments`, kNumBlockMoments matrices, and returns true; leaves them as they
// are and returns false if one of its rows holds a NaN or Inf. rows[k] are the hidden_size
// contiguous entries of h_k, next_rows[k] those of the token that follows: read ahead, never used.
// Without `moments` (null) nothing is folded. `row_sums` (or null) receives the sums of every pair
// (h_k, h_(k+1)), those of a NaN or Inf too, row_sums_stride entries apart.
using BlockTokenFunction = bool (*)(const void* const* rows, const void* const* next_rows,
                                    BlockWork& work, double* moments, RowSums* row_sums,
                                    int64_t row_sums_stride);

}  // namespace simdiff
