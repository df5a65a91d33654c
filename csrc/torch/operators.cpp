// Registers the CPU implementations with torch.

#include "../cpu/block_metrics.h"
#include "../cpu/layer_metrics.h"
#include "hidden_states.h"
#include "torch_threads.h"

void simdiff::on_torch_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

namespace {

using namespace simdiff;

void row_sums_cpu(Tensor sums, const Tensor& before, const Tensor& after,
                  const std::optional<Tensor>& mask) {
  const auto states = layer_states(before, after);
  check_buffer(sums, before, ScalarType::Double, 4 * states.num_tokens(), "sums");
  row_sums(states, checked_mask(mask, before, states.num_tokens()),
           static_cast<RowSums*>(sums.mutable_data_ptr()), &on_torch_threads);
}

void fold_cpu(Tensor moments, Tensor counts, const Tensor& sums, int64_t hidden_size,
              const std::optional<Tensor>& kinds, int64_t first_state, int64_t offset,
              int64_t tokens_per_state, bool apart, std::optional<Tensor> per_token) {
  const Fold fold = checked_fold(moments, counts, sums, hidden_size, kinds, first_state, offset,
                                 tokens_per_state, apart, per_token);
  const auto* rows = reinterpret_cast<const RowSums*>(fold.sums);
  fold_sums(rows, fold.num_layers, fold.num_tokens, hidden_size, fold.places, fold.moments,
            fold.counts, &on_torch_threads);
  if (fold.per_token != nullptr) {
    token_metrics(rows, fold.num_layers, fold.num_tokens, hidden_size, fold.per_token,
                  fold.float64_tokens, &on_torch_threads);
  }
}

Tensor token_metrics_cpu(const Tensor& before, const Tensor& after) {
  const auto states = layer_states(before, after);
  Tensor out = empty_token_metrics(before, states);
  token_metrics(states, out.mutable_data_ptr(), &on_torch_threads);
  return out;
}

void accumulate_cpu(Tensor moments, Tensor counts, const Tensor& before, const Tensor& after,
                    const std::optional<Tensor>& mask, std::optional<Tensor> per_token,
                    std::optional<Tensor> /*scratch*/) {
  const auto update = checked_update(moments, counts, before, after, mask, per_token);
  RunningState state(update.moments, update.counts);
  accumulate(update.states, update.mask, state, update.per_token, &on_torch_threads);
  state.store(update.moments, update.counts);
  for (int64_t part = 1; part < update.num_parts; ++part) {  // these took none of the tokens
    update.counts[(part + 1) * (kNumMetrics + 3) - 1] += update.states.num_tokens();
  }
}

void accumulate_blocks_cpu(Tensor moments, Tensor counts, const std::vector<Tensor>& states,
                           const std::optional<Tensor>& kinds, int64_t first_state, int64_t offset,
                           int64_t tokens_per_state, bool absolute, std::optional<Tensor> sums,
                           std::optional<Tensor> /*scratch*/) {
  const BlockUpdate update = checked_block_update(moments, counts, states, kinds, first_state,
                                                  offset, tokens_per_state, absolute, sums);
  accumulate_blocks(update.states, update.places, update.absolute, update.moments, update.counts,
                    reinterpret_cast<RowSums*>(update.sums), &on_torch_threads);
}

}  // namespace

SIMDIFF_OPERATORS(SIMDIFF_NAMESPACE, CPU, library) {
  library.impl("row_sums.cpu", TORCH_BOX(&row_sums_cpu));
  library.impl("fold.cpu", TORCH_BOX(&fold_cpu));
  library.impl("token_metrics.cpu", TORCH_BOX(&token_metrics_cpu));
  library.impl("accumulate.cpu", TORCH_BOX(&accumulate_cpu));
  library.impl("accumulate_blocks.cpu", TORCH_BOX(&accumulate_blocks_cpu));
}
