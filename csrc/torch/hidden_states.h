// What both operator files need: tensors to raw pointers, with checks; schemas live in
// simdiff_kernels/ops.py.
#pragma once

#include <optional>
#include <vector>

#include "../common/block_states.h"
#include "../common/layer_states.h"
#include "../common/metrics.h"
#include "stable_abi.h"

namespace simdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "hidden states must be float32, float64, bfloat16 or float16");
  }
}

inline HiddenStates hidden_states(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have 3 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(2) <= 1 || tensor.stride(2) == 1, name,
                  " must be contiguous in its last dimension");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

inline void check_same_device(const Tensor& tensor, const Tensor& before, const char* name) {
  STD_TORCH_CHECK(tensor.device() == before.device(), name, " must be on the device of before");
}

inline LayerStates layer_states(const Tensor& before, const Tensor& after) {
  const auto x = hidden_states(before, "before");
  const auto y = hidden_states(after, "after");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(before.size(dim) == after.size(dim),
                    "before and after must have the same shape");
  }
  STD_TORCH_CHECK(before.scalar_type() == after.scalar_type(),
                  "before and after must have the same dtype");
  STD_TORCH_CHECK(before.size(2) > 0, "hidden_size must not be 0");
  check_same_device(after, before, "after");
  return {x, y, before.size(0), before.size(1), before.size(2), element_type(before)};
}

inline ScalarType result_type(const LayerStates& states) {
  return states.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_token_metrics(const Tensor& before, const LayerStates& states) {
  return torch::stable::new_empty(before, {kNumMetrics, states.outer, states.inner},
                                  result_type(states));
}

// The tensors of one update, checked; `scratch` is for the GPU alone.
struct Update {
  LayerStates states;
  double* moments;
  int64_t* tallies;
  const bool* mask;
  void* per_token;
};

inline void check_buffer(const Tensor& tensor, const Tensor& before, ScalarType dtype,
                         int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous(), name,
      " must be contiguous, of its documented dtype and with ", numel, " entries");
  check_same_device(tensor, before, name);
}

inline Update checked_update(Tensor& moments, Tensor& tallies, const Tensor& before,
                             const Tensor& after, const std::optional<Tensor>& mask,
                             std::optional<Tensor>& per_token) {
  const auto states = layer_states(before, after);
  const int64_t num_tokens = states.num_tokens();
  check_buffer(moments, before, ScalarType::Double, 3 * kNumMetrics, "moments");
  check_buffer(tallies, before, ScalarType::Long, kNumMetrics + 3, "tallies");
  if (mask) check_buffer(*mask, before, ScalarType::Bool, num_tokens, "mask");
  if (per_token) {
    check_buffer(*per_token, before, result_type(states), kNumMetrics * num_tokens, "per_token");
  }
  return {states, static_cast<double*>(moments.mutable_data_ptr()),
          static_cast<int64_t*>(tallies.mutable_data_ptr()),
          mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
          per_token ? per_token->mutable_data_ptr() : nullptr};
}

// The tensors of one update of all blocks, checked; h_0 ... h_L are `states`.
struct BlockUpdate {
  BlockStates states;
  double* moments;
  int64_t* tallies;
  const bool* mask;
};

inline BlockUpdate checked_block_update(Tensor& moments, Tensor& tallies,
                                        const std::vector<Tensor>& states,
                                        const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(states.size() >= 2, "states must hold at least 2 tensors, got ", states.size());
  const Tensor& first = states[0];
  const auto num_states = static_cast<int64_t>(states.size());
  BlockStates rows{{}, first.size(0), first.size(1), first.size(2), element_type(first)};
  for (const Tensor& state : states) {
    rows.states.push_back(layer_states(first, state).after);  // one shape, dtype and device
  }
  const int64_t num_moments = kNumBlockMoments * num_states * num_states;
  check_buffer(moments, first, ScalarType::Double, num_moments, "moments");
  check_buffer(tallies, first, ScalarType::Long, kNumBlockTallies, "tallies");
  if (mask) check_buffer(*mask, first, ScalarType::Bool, rows.num_tokens(), "mask");
  return {rows, static_cast<double*>(moments.mutable_data_ptr()),
          static_cast<int64_t*>(tallies.mutable_data_ptr()),
          mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr};
}

}  // namespace simdiff
