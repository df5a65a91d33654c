// How the pairs i < j of a token's hidden states h_0 ... h_L are dealt out to lanes and warps of a
// CTA: integers only, nothing of the states is read here.
//
// h_0, mostly far shorter than the others, stands alone; the others form groups of four, the last
// one filled up with h_L. There are two kinds of tiles:
//   a square, two groups g < g': 16 pairs;
//   a triangle, one group: its 6 pairs, its 4 pairs with h_0, and the sums of the 4 layers that
//   lead to its states (the first of them from the last state of the group before).
// Eight lanes work on a tile and a warp on four tiles, a quad, all of one kind: lanes read 16 bytes
// in a row, eight 128, so that no two of them meet in a bank of shared memory, and only the lanes
// of a tile must be added up. L = 32 gives 28 squares and 8 triangles: 9 quads.
//
// Units are what a warp does at a time: a quad, or a share of the entries of a quad where the
// number of quads leaves warps without one. L = 32: 8 quads, and 4 shares of the ninth.
#pragma once

#include <cmath>

#include "../common/metrics.h"

namespace simdiff::cuda {

inline constexpr int kGroup = 4;      // states
inline constexpr int kTileLanes = 8;  // of a warp
inline constexpr int kQuad = 4;       // tiles
inline constexpr int kSquareSums = 16;
inline constexpr int kTriangleSums = 24;
inline constexpr int kUnitSums = kQuad * kTriangleSums;
inline constexpr int kStepBytes = 128;  // of a row that the lanes of a tile read at a time
// 64 entries of 2 bytes for each lane: block_tiles.cuh says what that means for the error.
inline constexpr int kMaxSliceBytes = 1024;
inline constexpr int kWarps = 8;  // of a CTA

// Where the sums of a triangle lie; of each kind four but for the last two.
enum TriangleSum {
  kLayerSquared,                      // sum d^2 of the layer that leads to each state
  kLayerProduct = kLayerSquared + 4,  // sum h d, h the state that it starts from
  kLayerAbsolute = kLayerProduct + 4,
  kStateSquared = kLayerAbsolute + 4,  // sum h^2 of each state
  kInnerPair = kStateSquared + 4,      // pairs (0, 2), (1, 3), (0, 3) of the group
  kFirstPair = kInnerPair + 3,         // of h_0 with each state
  kFirstSquared = kFirstPair + 4,      // sum h_0^2
};
static_assert(kFirstSquared + 1 == kTriangleSums);

// Pairs i < j in the order (0, 1), (0, 2), (1, 2), (0, 3) ...
SIMDIFF_INLINE int pair_number(int i, int j) { return j * (j - 1) / 2 + i; }

struct Pair {
  int i, j;

  // With 3 for 1 the root is far enough above (2 j - 1) and below the next to need no exact one.
  SIMDIFF_INLINE explicit Pair(int number) {
    const auto square = static_cast<float>(8 * number + 3);
#ifdef __CUDA_ARCH__
    const float root = square * rsqrtf(square);
#else
    const float root = std::sqrt(square);
#endif
    j = static_cast<int>((1 + root) / 2);
    i = number - pair_number(0, j);
  }
};

struct Unit {
  int quad;
  int share;
  int share_bits;  // log2 of the shares of the quad
};

struct BlockLayout {
  int num_states;
  int groups;
  int squares;
  int square_quads;  // triangles follow
  int whole;         // quads that are units; the rest is shared
  int share_bits;    // log2 of the shares of each
  int units;

  BlockLayout() = default;

  // `steps`: of kStepBytes in a slice of a row.
  SIMDIFF_INLINE BlockLayout(int states, int steps) : num_states(states) {
    groups = (states - 1 + kGroup - 1) / kGroup;
    squares = groups * (groups - 1) / 2;
    square_quads = (squares + kQuad - 1) / kQuad;
    const int quads = square_quads + (groups + kQuad - 1) / kQuad;
    const int left = quads % kWarps;
    // As few shares as give all four schedulers of a multiprocessor equally much: warp w and w + 4
    // have the same. Of seven quads one warp has none: shares would add up more than that is worth.
    share_bits = 0;
    while (left != 0 && left != kWarps - 1 && (share_bits == 0 || (left << share_bits) % 4 != 0) &&
           (2 << share_bits) <= steps) {
      ++share_bits;
    }
    whole = share_bits == 0 ? quads : quads - left;
    units = whole + ((quads - whole) << share_bits);
  }

  SIMDIFF_INLINE Unit unit(int number) const {
    if (number < whole) return {number, 0, 0};
    const int shared = number - whole;
    return {whole + (shared >> share_bits), shared & ((1 << share_bits) - 1), share_bits};
  }

  SIMDIFF_INLINE int first_unit(int quad) const {
    return quad < whole ? quad : whole + ((quad - whole) << share_bits);
  }
};

}  // namespace simdiff::cuda
