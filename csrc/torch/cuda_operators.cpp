// Registers the CUDA implementations with torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "../cuda/block_metrics.h"
#include "../cuda/layer_metrics.h"
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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cuda::Stream>(stream);
}

Tensor token_metrics_cuda(const Tensor& before, const Tensor& after) {
  const auto states = layer_states(before, after);
  const int32_t device = before.get_device_index();
  Tensor out = empty_token_metrics(before, states);
  cuda::token_metrics(states, out.mutable_data_ptr(), device, current_stream(device));
  return out;
}

void accumulate_cuda(Tensor moments, Tensor tallies, const Tensor& before, const Tensor& after,
                     const std::optional<Tensor>& mask, std::optional<Tensor> per_token,
                     std::optional<Tensor> scratch) {
  const auto update = checked_update(moments, tallies, before, after, mask, per_token);
  const int32_t device = before.get_device_index();
  if (!scratch) {
    const auto size = cuda::kScratchWords;
    scratch = torch::stable::new_zeros(tallies, {size}, ScalarType::Long);
  }
  check_buffer(*scratch, before, ScalarType::Long, cuda::kScratchWords, "scratch");
  cuda::accumulate(update.states, update.mask, update.moments, update.tallies,
                   static_cast<int64_t*>(scratch->mutable_data_ptr()), update.per_token, device,
                   current_stream(device));
}

void accumulate_blocks_cuda(Tensor moments, Tensor tallies, const std::vector<Tensor>& states,
                            const std::optional<Tensor>& kinds, int64_t first_state, int64_t offset,
                            int64_t tokens_per_state, bool absolute, std::optional<Tensor> sums,
                            std::optional<Tensor> scratch) {
  const BlockUpdate update = checked_block_update(moments, tallies, states, kinds, first_state,
                                                  offset, tokens_per_state, absolute, sums);
  const auto num_states = update.states.num_states(), num_tokens = update.states.num_tokens();
  if (num_tokens == 0) return;
  STD_TORCH_CHECK(num_states <= cuda::kMaxStates, "accumulate_blocks (CUDA) takes at most ",
                  cuda::kMaxStates, " hidden states, got ", num_states);
  const int32_t device = states[0].get_device_index();
  const int64_t words = cuda::block_scratch_words(num_tokens, num_states, update.states.hidden_size,
                                                  update.states.dtype, absolute);
  if (!scratch) scratch = torch::stable::new_empty(tallies, {words}, ScalarType::Long);
  STD_TORCH_CHECK(scratch->scalar_type() == ScalarType::Long && scratch->is_contiguous() &&
                      scratch->numel() >= words,
                  "scratch must be contiguous int64 with at least ", words, " entries");
  check_same_device(*scratch, states[0], "scratch");
  cuda::accumulate_blocks(
      update.states, {update.places, absolute, update.moments, update.tallies, update.sums},
      static_cast<int64_t*>(scratch->mutable_data_ptr()), device, current_stream(device));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simdiff_kernels, CUDA, library) {
  library.impl("token_metrics.cuda", TORCH_BOX(&token_metrics_cuda));
  library.impl("accumulate.cuda", TORCH_BOX(&accumulate_cuda));
  library.impl("accumulate_blocks.cuda", TORCH_BOX(&accumulate_blocks_cuda));
}
