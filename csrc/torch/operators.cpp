// Registers the CPU implementations with torch.
#include <algorithm>

#include "../cpu/block_metrics.h"
#include "../cpu/layer_metrics.h"
#include "hidden_states.h"
#include "torch_threads.h"

void simdiff::on_torch_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

namespace {

using namespace simdiff;

Tensor token_metrics_cpu(const Tensor& before, const Tensor& after) {
  const auto states = layer_states(before, after);
  Tensor out = empty_token_metrics(before, states);
  token_metrics(states, out.mutable_data_ptr(), &on_torch_threads);
  return out;
}

void accumulate_cpu(Tensor moments, Tensor tallies, const Tensor& before, const Tensor& after,
                    const std::optional<Tensor>& mask, std::optional<Tensor> per_token,
                    std::optional<Tensor> /*scratch*/) {
  const auto update = checked_update(moments, tallies, before, after, mask, per_token);
  double* floats = update.moments;
  int64_t* integers = update.tallies;
  RunningState state;
  std::copy_n(floats, kNumMetrics, state.sum);
  std::copy_n(floats + kNumMetrics, kNumMetrics, state.sum_of_squares);
  std::copy_n(floats + 2 * kNumMetrics, kNumMetrics, state.maximum);
  std::copy_n(integers, kNumMetrics, state.argmax);
  state.num_tokens = integers[kNumMetrics];
  state.num_nonfinite = integers[kNumMetrics + 1];
  state.num_seen = integers[kNumMetrics + 2];

  accumulate(update.states, update.mask, state, update.per_token, &on_torch_threads);

  std::copy_n(state.sum, kNumMetrics, floats);
  std::copy_n(state.sum_of_squares, kNumMetrics, floats + kNumMetrics);
  std::copy_n(state.maximum, kNumMetrics, floats + 2 * kNumMetrics);
  std::copy_n(state.argmax, kNumMetrics, integers);
  integers[kNumMetrics] = state.num_tokens;
  integers[kNumMetrics + 1] = state.num_nonfinite;
  integers[kNumMetrics + 2] = state.num_seen;
}

void accumulate_blocks_cpu(Tensor moments, Tensor tallies, const std::vector<Tensor>& states,
                           const std::optional<Tensor>& mask, std::optional<Tensor> /*scratch*/) {
  const BlockUpdate update = checked_block_update(moments, tallies, states, mask);
  accumulate_blocks(update.states, update.mask, update.moments, update.tallies, &on_torch_threads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simdiff_kernels, CPU, library) {
  library.impl("token_metrics.cpu", TORCH_BOX(&token_metrics_cpu));
  library.impl("accumulate.cpu", TORCH_BOX(&accumulate_cpu));
  library.impl("accumulate_blocks.cpu", TORCH_BOX(&accumulate_blocks_cpu));
}
