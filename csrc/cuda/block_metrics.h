// The CUDA implementation of accumulate_blocks: device pointers, int64 sizes, the caller's stream.
#pragma once

#include "../common/block_states.h"
#include "row_sums.h"

namespace simdiff::cuda {

// Pointers and strides of the states are passed by value: 4 KB of kernel parameters.
inline constexpr int64_t kMaxStates = 160;

// How tokens are dealt out. It depends on the sizes alone, so that sums are formed in the same
// order in every run and on every GPU.
struct BlockLaunchShape {
  int blocks;  // of threads
  int threads;
  int slice_bytes;  // of each row, in shared memory at a time
  int num_tiles;    // 4 x 4 pairs
  int64_t tokens_per_block;
};
BlockLaunchShape block_launch_shape(int64_t num_tokens, int64_t num_states, int64_t hidden_size,
                                    DType dtype);

// int64 words that `accumulate_blocks` needs beside the state, of any value. They belong to the
// state: two updates may share them if they may share it.
int64_t block_scratch_words(int64_t num_states);

// Two launches. Folds all tokens with mask[token] != 0 (null: all) into `moments`
// (kNumBlockMoments, L + 1, L + 1) and `tallies` (kNumBlockTallies). Throws std::runtime_error with
// the words of the CUDA runtime, or for more than kMaxStates states; nothing is changed then.
void accumulate_blocks(const BlockStates& states, const bool* mask, double* moments,
                       int64_t* tallies, int64_t* scratch, int device, Stream stream);

}  // namespace simdiff::cuda
