// The CUDA implementation of both operators: device pointers, int64 sizes, the caller's stream.
#pragma once

#include "../common/layer_states.h"
#include "../common/metrics.h"

struct CUstream_st;

namespace simdiff::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// How tokens are dealt out. It depends on the sizes alone, so that sums are formed in the same
// order in every run and on every GPU.
struct LaunchShape {
  int blocks;
  int threads;
  int warps_per_row;
  int64_t tokens_per_group;  // consecutive tokens of the warps that share a row
};
LaunchShape launch_shape(int64_t num_tokens, int64_t hidden_size, DType dtype);

// int64 words that `accumulate` needs beside the state, zero before its first use; it leaves them
// ready for the next. They belong to the state: two updates may share them if they may share it.
extern const int64_t kScratchWords;

// One launch each. Throws std::runtime_error with the words of the CUDA runtime; a launch that
// failed changed nothing.
void token_metrics(const LayerStates& states, PerToken out, int device, Stream stream);

// Folds all tokens with mask[token] != 0 (null: all) into `moments` (3, kNumMetrics) and `tallies`
// (kNumMetrics + 3), laid out as in simdiff_kernels/running.py.
void accumulate(const LayerStates& states, const bool* mask, double* moments, int64_t* tallies,
                int64_t* scratch, PerToken out, int device, Stream stream);

}  // namespace simdiff::cuda
