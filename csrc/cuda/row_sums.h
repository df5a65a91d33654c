// Row sums of a layer on a GPU (row_sums.cu): device pointers, int64 sizes, the caller's stream.
#pragma once

#include "../common/layer_states.h"

struct CUstream_st;

namespace simdiff::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// What a launch asks of the GPU.
struct RowDevice {
  int multiprocessors;
  int shared_bytes;  // that one CTA may have
  bool copies_asynchronously;
};

// How rows are dealt out. Only row_lanes changes the order in which a sum is formed, and it depends
// on the sizes and on alignment alone: sums are the same in every run and on every GPU.
struct RowShape {
  int row_lanes;  // that share a row: 8, 32 or all of a CTA
  int stages;     // 16-byte vectors of each input that a lane has on the way; 0: no ring
  int warps;      // of a CTA
  int ctas;       // of a multiprocessor at a time, which go round
};
RowShape row_shape(int64_t num_tokens, int64_t hidden_size, DType dtype, bool aligned,
                   const RowDevice& device);

// One launch. Writes sum x^2, sum y^2, sum d^2 and sum |d| of every token with mask[token] != 0
// (null: all) to sums[4 * token], zeros for the others, whose rows are not read. Throws
// std::runtime_error with the words of the CUDA runtime; a launch that failed changed nothing.
void row_sums(const LayerStates& states, const bool* mask, double* sums, int device, Stream stream);

}  // namespace simdiff::cuda
