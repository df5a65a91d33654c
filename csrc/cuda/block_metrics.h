// accumulate_blocks on a GPU, the metrics of every block of layers (a pair i < j of the hidden
// states h_0 ... h_L): device pointers, int64 sizes, the caller's stream.
//
// Data path: block_sums.cu reads every state of a token once and writes, for each pair i < j,
// sum d^2 and the cosine distance, and the row sums of every layer; block_fold.cu reads these 16
// bytes of each token and pair and adds them to the running states.
#pragma once

#include "../common/block_states.h"

struct CUstream_st;

namespace simdiff::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Pointers and strides of the states are passed by value: 4 KB of kernel parameters.
inline constexpr int64_t kMaxStates = 160;

// How tokens are dealt out. It depends on the sizes alone, so that sums are formed in the same
// order in every run and on every GPU; what is measured of a token does not even depend on them.
struct BlockLaunchShape {
  int64_t tokens_at_once;  // by one pair of launches, as many as the scratch holds
  int num_ctas;            // for that many
  int tokens_per_cta;
  int slice_bytes;  // of each row, in shared memory twice
  int units;        // block_layout.h
};
BlockLaunchShape block_launch_shape(int64_t num_tokens, int64_t num_states, int64_t hidden_size,
                                    DType dtype, bool absolute);

// int64 words that `accumulate_blocks` needs beside the state, of any value: about 256 MB, or what
// fewer tokens take. Two updates may share them if one follows the other.
int64_t block_scratch_words(int64_t num_tokens, int64_t num_states, int64_t hidden_size,
                            DType dtype, bool absolute);

// One update by all tokens of `states`; tokens of kind kLeftOut are not read, and those of kind
// kApart only for their row sums.
struct BlockFold {
  TokenPlaces places;
  bool absolute;
  double* moments;  // (places.num_states, kNumBlockMoments, L + 1, L + 1)
  int64_t* counts;  // (places.num_states, kNumBlockCounts)
  double* sums;     // (L, num_tokens, 4), the row sums of each layer; or null
};

// Two launches for each `tokens_at_once`. Throws std::runtime_error with the words of the CUDA
// runtime, or for more than kMaxStates states; where the first launch fails nothing is changed.
void accumulate_blocks(const BlockStates& states, const BlockFold& fold, int64_t* scratch,
                       int device, Stream stream);

}  // namespace simdiff::cuda
