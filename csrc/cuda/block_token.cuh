// How block_sums.cu finishes a token: from the sums of the units (block_layout.h), which lie in
// global memory and the caches, to the row sums of every layer, the norm of every state, and
// sum d^2 and the cosine distance of every pair (common/scaled_pair.h), in float64.
//
// Data path: a lane for each layer -> norms and growths in shared memory -> a thread for each pair
// -> global memory. What fails a trust test is summed again by all lanes of its warp.
#pragma once

#include <type_traits>

#include "../common/scaled_pair.h"
#include "../common/trust.h"
#include "block_layout.h"
#include "block_stages.h"
#include "block_tiles.cuh"

namespace simdiff::cuda {

inline constexpr int kThreads = kWarps * kLanes;

struct BlockArguments {
  HiddenStates states[kMaxStates];
  const uint8_t* kinds;
  double* sums;
  double* unit_sums;  // (CTAs, 1 or 2 times units, kUnitSums)
  BlockTokens tokens;
  int64_t num_tokens;  // of the update
  int64_t inner;
  int64_t row_bytes;
  int tokens_per_cta;
  int num_states;
  int slice_bytes;
  int units;  // all of a CTA, those of the absolute difference too
};
static_assert(sizeof(BlockArguments) <= 4096);

// The squared length of a row in the token's first slice, by which it is scaled, and its inverse.
struct Length {
  float squared, inverse;
};

// What is known of the token in progress.
struct TokenState {
  Length lengths[kMaxStates];
  double norms[kMaxStates];    // of h_k
  double growth[kMaxStates];   // |h_k|^2 - |h_(k-1)|^2
  double scales[kMaxStates];   // growth_scale_squared of it
  double growths[kMaxStates];  // the sums of both up to k
  double scale_sums[kMaxStates];
};

template <class T>
__device__ const T* row_of(const BlockArguments& args, int state, int64_t token) {
  const HiddenStates& states = args.states[state];
  const int64_t outer = token / args.inner, inner = token - outer * args.inner;
  return static_cast<const T*>(states.data) + outer * states.outer_stride +
         inner * states.inner_stride;
}

// Of this CTA.
__device__ inline int64_t first_token(const BlockArguments& args) {
  return args.tokens.first + static_cast<int64_t>(blockIdx.x) * args.tokens_per_cta;
}

__device__ inline bool is_read(const BlockArguments& args, int64_t token) {
  if (args.kinds == nullptr) return true;
  return args.kinds[token] == kCounted || (args.kinds[token] == kApart && args.sums != nullptr);
}

__device__ inline int first_of(int group) { return 1 + kGroup * group; }
__device__ inline int group_of(int state) { return (state - 1) / kGroup; }

// The ratio by which h_i is scaled beside h_j: the same for all j of a group.
template <class T>
__device__ float ratio_of(const Length* lengths, int i, int group) {
  if constexpr (std::is_same_v<T, double>) return 1;
  return length_ratio(lengths[first_of(group)].squared * lengths[i].inverse);
}

// Finds sums among those of the units; the shares of a quad are added up, always in one order.
struct UnitSums {
  const BlockLayout& layout;
  const double* sums;

  __device__ double sum(int quad, int place) const {
    const int first = layout.first_unit(quad),
              shares = quad < layout.whole ? 1 : 1 << layout.share_bits;
    double total = 0;
#pragma unroll 1
    for (int share = 0; share < shares; ++share) total += sums[(first + share) * kUnitSums + place];
    return total;
  }

  __device__ double triangle(int group, int number) const {
    return sum(layout.square_quads + group / kQuad, group % kQuad * kTriangleSums + number);
  }

  __device__ double state_squared(int state) const {
    if (state == 0) return triangle(0, kFirstSquared);
    return triangle(group_of(state), kStateSquared + (state - 1) % kGroup);
  }

  __device__ double layer(TriangleSum kind, int layer) const {
    return triangle(layer / kGroup, kind + layer % kGroup);
  }

  // Of h_i and h_j, scaled by ratio_of.
  __device__ double pair(int i, int j) const {
    const int group = group_of(j), place = (j - 1) % kGroup;
    if (i == 0) return triangle(group, kFirstPair + place);
    const int before = (i - 1) % kGroup;
    if (group_of(i) < group) {
      const int tile = pair_number(group_of(i), group);
      return sum(tile / kQuad, tile % kQuad * kSquareSums + kGroup * before + place);
    }
    if (j == i + 1) return layer(kLayerSquared, i);
    return triangle(group, kInnerPair + (j == i + 3 ? 2 : before));
  }
};

// The ratio between h_i and h_j, as it was in the tile that holds the pair.
template <class T>
__device__ float pair_ratio(const Length* lengths, int i, int j) {
  if (i > 0 && group_of(i) == group_of(j)) return 1;
  return ratio_of<T>(lengths, i, group_of(j));
}

struct LayerResult {
  RowSums sums;
  double after_squared;  // sum h_(k+1)^2 by itself
  double growth, scale;
};

// From short sums; whether they are enough is in `enough`.
template <class T>
__device__ LayerResult layer_result(const UnitSums& units, const Length* lengths, int layer,
                                    bool& enough) {
  const double before = units.state_squared(layer), after = units.state_squared(layer + 1);
  const double squared = units.layer(kLayerSquared, layer);
  const double absolute = units.layer(kLayerAbsolute, layer);
  const double growth = 2 * units.layer(kLayerProduct, layer) + squared;
  enough = true;
  if constexpr (std::is_same_v<T, double>) {
    return {
        {before, after, squared, absolute}, after, growth, growth_scale_squared(before, squared)};
  }
  const RowSums sums = {before, before + growth, squared, absolute};
  // Of a far shorter state, what is left of the long one's square is less exact than its own.
  enough = float32_is_enough(sums) && after > kShortestLayer * before;
  if (enough) return {sums, after, growth, growth_scale_squared(before, squared)};
  // Two states of unlike lengths, such as h_0 and h_1, or before and after something massive is
  // written: by their pair, scaled, and the lengths themselves.
  const float ratio = pair_ratio<T>(lengths, layer, layer + 1);
  const double a = sqrt(before), b = sqrt(after);
  const ScaledPair pair = scaled_pair(units.pair(layer, layer + 1), ratio * a, b, false, 0, 0);
  enough = before > kSmallestShort && before < kLargestShort && after > kSmallestShort &&
           after < kLargestShort && float32_is_enough(pair);
  const double whole = ratio == 1 ? squared : squared_difference(a, b, cosine_distance(pair));
  const double scale = before + after;
  return {{before, after, whole, absolute}, after, after - before, scale * scale};
}

// Row sums, norms and growths of all layers: a lane for each, layers side by side to other warps,
// so that those that must be summed again are shared out.
template <class T>
__device__ void finish_layers(const BlockArguments& args, int64_t token, const UnitSums& units,
                              TokenState& state, int warp, int lane) {
  const int layer = warp + kWarps * lane, num_layers = args.num_states - 1;
  const bool exists = layer < num_layers;
  bool enough = true;
  LayerResult result{};
  if (exists) result = layer_result<T>(units, state.lengths, layer, enough);
#pragma unroll 1
  for (unsigned left = __ballot_sync(kAllLanes, !enough); left; left &= left - 1) {
    const int owner = __ffs(left) - 1, k = warp + kWarps * owner;
    const ExactSums exact = exact_sums(row_of<T>(args, k, token), row_of<T>(args, k + 1, token),
                                       args.row_bytes / static_cast<int>(sizeof(T)), lane);
    if (lane == owner) {
      result = {{exact.before_squared, exact.after_squared, exact.squared, exact.absolute},
                exact.after_squared,
                exact.growth,
                kExactGrowth * growth_scale_squared(exact.before_squared, exact.squared)};
    }
  }
  if (!exists) return;
  state.norms[layer] = sqrt(result.sums.before_squared);
  if (layer == num_layers - 1) state.norms[layer + 1] = sqrt(result.after_squared);
  state.growth[layer + 1] = result.growth;
  state.scales[layer + 1] = result.scale;
  if (args.sums == nullptr) return;
  double2* const target =
      reinterpret_cast<double2*>(args.sums + 4 * (layer * args.num_tokens + token));
  target[0] = make_double2(result.sums.before_squared, result.sums.after_squared);
  target[1] = make_double2(result.sums.difference_squared, result.sums.difference_absolute);
}

// Sums of growths up to each state, and whether the token is finite. A barrier.
__device__ inline bool finish_states(const BlockArguments& args, int64_t token, TokenState& state) {
  const int k = threadIdx.x;
  const bool exists = k < args.num_states;
  if (exists) {
    double growth = 0, scale = 0;
    for (int layer = 1; layer <= k; ++layer) {
      growth += state.growth[layer];
      scale += state.scales[layer];
    }
    state.growths[k] = growth;
    state.scale_sums[k] = scale;
  }
  const bool finite = __syncthreads_and(!exists || isfinite(state.norms[k]));
  if (exists) {
    const int64_t index = (token - args.tokens.first) * args.num_states + k;
    args.tokens.norms[index] = finite ? state.norms[k] : nan("");
  }
  return finite;
}

// sum d^2, the cosine distance and, if it is wanted, sum |d| of one pair.
struct PairResult {
  double squared, distance, absolute;
};

template <class T>
__device__ PairResult pair_result(const UnitSums& units, const TokenState& state, const Pair& pair,
                                  bool& enough) {
  constexpr bool exact = std::is_same_v<T, double>;
  const int i = pair.i, j = pair.j;
  const float ratio = pair_ratio<T>(state.lengths, i, j);
  const double before = state.norms[i], after = state.norms[j];
  const ScaledPair scaled =
      scaled_pair(units.pair(i, j), ratio * before, after, ratio == 1,
                  state.growths[j] - state.growths[i], state.scale_sums[j] - state.scale_sums[i]);
  enough = exact || float32_is_enough(scaled);
  const double distance = cosine_distance(scaled);
  return {ratio == 1 ? scaled.squared : squared_difference(before, after, distance), distance, 0};
}

// The pairs of a finite token, a thread for each.
template <class T, bool absolute>
__device__ void finish_pairs(const BlockArguments& args, int64_t token, const UnitSums& units,
                             const TokenState& state, int lane) {
  const int num_pairs = pair_number(0, args.num_states);
  const int64_t index = (token - args.tokens.first) * num_pairs;
#pragma unroll 1
  for (int number = threadIdx.x; number - lane < num_pairs; number += kThreads) {
    const bool exists = number < num_pairs;
    const Pair pair(exists ? number : 0);
    bool enough = true;
    PairResult result{};
    if (exists) {
      result = pair_result<T>(units, state, pair, enough);
      if constexpr (absolute) {
        const UnitSums second{units.layout, units.sums + units.layout.units * kUnitSums};
        const bool neighbours = pair.j == pair.i + 1 && pair.i % kGroup != 0;
        result.absolute =
            neighbours ? units.layer(kLayerAbsolute, pair.i) : second.pair(pair.i, pair.j);
      }
    }
#pragma unroll 1
    for (unsigned left = __ballot_sync(kAllLanes, !enough); left; left &= left - 1) {
      const int owner = __ffs(left) - 1;
      const Pair failed(number - lane + owner);
      const ExactSums exact =
          exact_sums(row_of<T>(args, failed.i, token), row_of<T>(args, failed.j, token),
                     args.row_bytes / static_cast<int>(sizeof(T)), lane);
      // Of nearly parallel vectors almost all of the sum is cancelled: exact lengths as well.
      const double before = sqrt(exact.before_squared), after = sqrt(exact.after_squared);
      const double total = before + after;
      const double gap = exact.growth / (total == 0 ? 1.0 : total);
      if (lane == owner) {
        result = {exact.squared, cosine_distance(exact.squared, gap, before, after),
                  exact.absolute};
      }
    }
    if (!exists) continue;
    args.tokens.pairs[index + number] = make_double2(result.squared, result.distance);
    if constexpr (absolute) args.tokens.absolute[index + number] = result.absolute;
  }
}

}  // namespace simdiff::cuda
