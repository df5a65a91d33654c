// Registers the CUDA implementations with torch.
#include "../cuda/block_metrics.h"
#include "../cuda/fold.h"
#include "../cuda/row_sums.h"
#include "hidden_states.h"

// Weak: a torch built without CUDA does not have it, and this module can be loaded there as well,
// to tell what was built.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using namespace simdiff;

cuda::Stream current_stream(int32_t device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
                  "simdiff_kernels (CUDA): this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cuda::Stream>(stream);
}

void row_sums_cuda(Tensor sums, const Tensor& before, const Tensor& after,
                   const std::optional<Tensor>& mask) {
  const auto states = layer_states(before, after);
  check_buffer(sums, before, ScalarType::Double, 4 * states.num_tokens(), "sums");
  const int32_t device = before.get_device_index();
  cuda::row_sums(states, checked_mask(mask, before, states.num_tokens()),
                 static_cast<double*>(sums.mutable_data_ptr()), device, current_stream(device));
}

void fold_cuda(Tensor moments, Tensor counts, const Tensor& sums, int64_t hidden_size,
               const std::optional<Tensor>& kinds, int64_t first_state, int64_t offset,
               int64_t tokens_per_state, bool apart, std::optional<Tensor> per_token) {
  const Fold fold = checked_fold(moments, counts, sums, hidden_size, kinds, first_state, offset,
                                 tokens_per_state, apart, per_token);
  const int32_t device = sums.get_device_index();
  const cuda::Stream stream = current_stream(device);
  cuda::fold(fold.sums, fold.num_layers, fold.num_tokens, hidden_size, fold.places, fold.moments,
             fold.counts, device, stream);
  if (fold.per_token != nullptr) {
    cuda::token_metrics(fold.sums, fold.num_layers, fold.num_tokens, hidden_size, fold.per_token,
                        fold.float64_tokens, device, stream);
  }
}

double* sums_of(Tensor& scratch, const Tensor& before, int64_t num_tokens) {
  STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Double && scratch.is_contiguous() &&
                      scratch.numel() >= 4 * num_tokens,
                  "scratch must be contiguous float64 with at least ", 4 * num_tokens, " entries");
  check_same_device(scratch, before, "scratch");
  return static_cast<double*>(scratch.mutable_data_ptr());
}

Tensor token_metrics_cuda(const Tensor& before, const Tensor& after) {
  const auto states = layer_states(before, after);
  const int64_t num_tokens = states.num_tokens();
  const int32_t device = before.get_device_index();
  const cuda::Stream stream = current_stream(device);
  Tensor out = empty_token_metrics(before, states);
  Tensor scratch = torch::stable::new_empty(before, {4 * num_tokens}, ScalarType::Double);
  double* const sums = sums_of(scratch, before, num_tokens);
  cuda::row_sums(states, nullptr, sums, device, stream);
  cuda::token_metrics(sums, 1, num_tokens, states.hidden_size, out.mutable_data_ptr(),
                      states.dtype == DType::kFloat64, device, stream);
  return out;
}

void accumulate_cuda(Tensor moments, Tensor counts, const Tensor& before, const Tensor& after,
                     const std::optional<Tensor>& mask, std::optional<Tensor> per_token,
                     std::optional<Tensor> scratch) {
  const auto update = checked_update(moments, counts, before, after, mask, per_token);
  const int64_t num_tokens = update.states.num_tokens(), num_parts = update.num_parts;
  if (num_tokens == 0) return;
  const int32_t device = before.get_device_index();
  const cuda::Stream stream = current_stream(device);
  if (!scratch) scratch = torch::stable::new_empty(before, {4 * num_tokens}, ScalarType::Double);
  double* const sums = sums_of(*scratch, before, num_tokens);
  // Padding is read only where its metrics are stored.
  cuda::row_sums(update.states, update.per_token ? nullptr : update.mask, sums, device, stream);
  const auto* kinds = reinterpret_cast<const uint8_t*>(update.mask);  // false and true
  const int64_t tokens_per_part = (num_tokens + num_parts - 1) / num_parts;
  cuda::fold(sums, 1, num_tokens, update.states.hidden_size,
             {kinds, num_parts, 0, 0, tokens_per_part, false}, update.moments, update.counts,
             device, stream);
  if (update.per_token != nullptr) {
    cuda::token_metrics(sums, 1, num_tokens, update.states.hidden_size, update.per_token,
                        update.states.dtype == DType::kFloat64, device, stream);
  }
}

void accumulate_blocks_cuda(Tensor moments, Tensor counts, const std::vector<Tensor>& states,
                            const std::optional<Tensor>& kinds, int64_t first_state, int64_t offset,
                            int64_t tokens_per_state, bool absolute, std::optional<Tensor> sums,
                            std::optional<Tensor> scratch) {
  const BlockUpdate update = checked_block_update(moments, counts, states, kinds, first_state,
                                                  offset, tokens_per_state, absolute, sums);
  const auto num_states = update.states.num_states(), num_tokens = update.states.num_tokens();
  if (num_tokens == 0) return;
  STD_TORCH_CHECK(num_states <= cuda::kMaxStates, "accumulate_blocks (CUDA) takes at most ",
                  cuda::kMaxStates, " hidden states, got ", num_states);
  const int32_t device = states[0].get_device_index();
  const int64_t words = cuda::block_scratch_words(num_tokens, num_states, update.states.hidden_size,
                                                  update.states.dtype, absolute);
  if (!scratch) scratch = torch::stable::new_empty(counts, {words}, ScalarType::Long);
  STD_TORCH_CHECK(scratch->scalar_type() == ScalarType::Long && scratch->is_contiguous() &&
                      scratch->numel() >= words,
                  "scratch must be contiguous int64 with at least ", words, " entries");
  check_same_device(*scratch, states[0], "scratch");
  cuda::accumulate_blocks(
      update.states, {update.places, absolute, update.moments, update.counts, update.sums},
      static_cast<int64_t*>(scratch->mutable_data_ptr()), device, current_stream(device));
}

}  // namespace

SIMDIFF_OPERATORS(SIMDIFF_NAMESPACE, CUDA, library) {
  library.impl("row_sums.cuda", TORCH_BOX(&row_sums_cuda));
  library.impl("fold.cuda", TORCH_BOX(&fold_cuda));
  library.impl("token_metrics.cuda", TORCH_BOX(&token_metrics_cuda));
  library.impl("accumulate.cuda", TORCH_BOX(&accumulate_cuda));
  library.impl("accumulate_blocks.cuda", TORCH_BOX(&accumulate_blocks_cuda));
}
