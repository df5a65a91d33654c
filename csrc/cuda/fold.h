// The fold of row sums into running states, and the metrics of every token, on a GPU (fold.cu):
// device pointers, int64 sizes, the caller's stream.
#pragma once

#include "../common/layer_states.h"
#include "row_sums.h"

namespace simdiff::cuda {

// One launch for all layers and running states. Folds the row sums `sums` (num_layers, num_tokens,
// 4) into `moments` (num_states, num_layers, 3, kNumMetrics) and `counts` (num_states, num_layers,
// kNumMetrics + 3), laid out as in simdiff_kernels/reference.py. Throws std::runtime_error with the
// words of the CUDA runtime; a launch that failed changed nothing.
void fold(const double* sums, int64_t num_layers, int64_t num_tokens, int64_t hidden_size,
          const TokenPlaces& places, double* moments, int64_t* counts, int device, Stream stream);

// One launch. The metrics of every token, (num_layers, kNumMetrics, num_tokens), float64 or
// float32.
void token_metrics(const double* sums, int64_t num_layers, int64_t num_tokens, int64_t hidden_size,
                   void* per_token, bool float64, int device, Stream stream);

}  // namespace simdiff::cuda
