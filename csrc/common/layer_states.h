// The hidden states x and y before and after one layer, as the CPU and the CUDA implementation take
// them (raw pointers, int64 sizes), and which running state each of their tokens belongs to.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "metrics.h"

namespace simdiff {

// Hidden states (outer, inner, hidden_size); strides in elements, the last one is 1.
struct HiddenStates {
  const void* data;
  int64_t outer_stride;
  int64_t inner_stride;
};

struct LayerStates {
  HiddenStates before;
  HiddenStates after;
  int64_t outer;
  int64_t inner;
  int64_t hidden_size;
  DType dtype;

  int64_t num_tokens() const { return outer * inner; }
};

// Which running state each token t of a call belongs to, counted in row-major order over (outer,
// inner): kCounted tokens to `first_state + (offset + t) / tokens_per_state`, kApart tokens to the
// last state, which `apart` reserves for them; kLeftOut tokens to none.
enum TokenKind : uint8_t { kLeftOut, kCounted, kApart };

struct TokenPlaces {
  const uint8_t* kinds;  // of each token; null: all are counted
  int64_t num_states;
  int64_t first_state;
  int64_t offset;
  int64_t tokens_per_state;
  bool apart;
};

struct TokenRange {
  int64_t begin, end;
};

// The tokens whose place is `state`, whatever their kind.
SIMDIFF_INLINE TokenRange tokens_of(const TokenPlaces& places, int64_t state, int64_t num_tokens) {
  const int64_t place = state - places.first_state;
  // No product of these leaves int64: tokens_per_state may be any number.
  if (place < 0 || place > (places.offset + num_tokens) / places.tokens_per_state) return {0, 0};
  const int64_t begin = place * places.tokens_per_state - places.offset;
  const bool is_last = num_tokens - begin < places.tokens_per_state;
  const int64_t end = is_last ? num_tokens : begin + places.tokens_per_state;
  return {begin < 0 ? 0 : begin, end};
}

// Per-token results, metric by metric: out[metric * num_tokens + token]. Float64 states give
// float64 results, all others float32. A null pointer: not wanted.
using PerToken = void*;

}  // namespace simdiff
