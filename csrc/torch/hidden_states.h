// What both operator files need: tensors to raw pointers, with checks. What an operator's arguments
// mean is said in simdiff_kernels/reference.py, whose signatures are the schemas.
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

inline void check_buffer(const Tensor& tensor, const Tensor& before, ScalarType dtype,
                         int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous(), name,
      " must be contiguous, of its documented dtype and with ", numel, " entries");
  check_same_device(tensor, before, name);
}

inline const uint8_t* checked_kinds(const std::optional<Tensor>& kinds, const Tensor& before,
                                    int64_t num_tokens) {
  if (!kinds) return nullptr;
  check_buffer(*kinds, before, ScalarType::Byte, num_tokens, "kinds");
  return static_cast<const uint8_t*>(kinds->const_data_ptr());
}

inline const bool* checked_mask(const std::optional<Tensor>& mask, const Tensor& before,
                                int64_t num_tokens) {
  if (!mask) return nullptr;
  check_buffer(*mask, before, ScalarType::Bool, num_tokens, "mask");
  return static_cast<const bool*>(mask->const_data_ptr());
}

inline TokenPlaces checked_places(const uint8_t* kinds, int64_t num_states, int64_t first_state,
                                  int64_t offset, int64_t tokens_per_state, bool apart) {
  STD_TORCH_CHECK(num_states > 0 && offset >= 0 && tokens_per_state > 0,
                  "there must be a running state, an offset of at least 0 and at least one token "
                  "per state, got ",
                  num_states, " states, offset ", offset, ", ", tokens_per_state, " per state");
  return {kinds, num_states, first_state, offset, tokens_per_state, apart};
}

// The tensors of one update, checked; the state is `num_parts` parts.
struct Update {
  LayerStates states;
  double* moments;
  int64_t* counts;
  int64_t num_parts;
  const bool* mask;
  void* per_token;
};

inline Update checked_update(Tensor& moments, Tensor& counts, const Tensor& before,
                             const Tensor& after, const std::optional<Tensor>& mask,
                             std::optional<Tensor>& per_token) {
  const auto states = layer_states(before, after);
  const int64_t num_tokens = states.num_tokens();
  STD_TORCH_CHECK(moments.dim() == 3 && moments.size(0) > 0, "moments must be (parts, 3, ",
                  kNumMetrics, ")");
  const int64_t num_parts = moments.size(0);
  check_buffer(moments, before, ScalarType::Double, num_parts * 3 * kNumMetrics, "moments");
  check_buffer(counts, before, ScalarType::Long, num_parts * (kNumMetrics + 3), "counts");
  if (per_token) {
    check_buffer(*per_token, before, result_type(states), kNumMetrics * num_tokens, "per_token");
  }
  return {states,
          static_cast<double*>(moments.mutable_data_ptr()),
          static_cast<int64_t*>(counts.mutable_data_ptr()),
          num_parts,
          checked_mask(mask, before, num_tokens),
          per_token ? per_token->mutable_data_ptr() : nullptr};
}

// The row sums of some layers and the running states that they are folded into, checked.
struct Fold {
  const double* sums;  // (num_layers, num_tokens, 4)
  int64_t num_layers;
  int64_t num_tokens;
  int64_t hidden_size;
  TokenPlaces places;
  double* moments;  // (num_states, num_layers, 3, kNumMetrics)
  int64_t* counts;  // (num_states, num_layers, kNumMetrics + 3)
  void* per_token;  // (num_layers, kNumMetrics, num_tokens) or null
  bool float64_tokens;
};

inline Fold checked_fold(Tensor& moments, Tensor& counts, const Tensor& sums, int64_t hidden_size,
                         const std::optional<Tensor>& kinds, int64_t first_state, int64_t offset,
                         int64_t tokens_per_state, bool apart, std::optional<Tensor>& per_token) {
  STD_TORCH_CHECK(sums.dim() == 4 && sums.size(3) == 4 && hidden_size > 0,
                  "sums must be (layers, outer, inner, 4) and hidden_size at least 1");
  STD_TORCH_CHECK(moments.dim() == 4 && moments.size(1) == sums.size(0),
                  "moments must be (states, layers, 3, ", kNumMetrics, ") with the layers of sums");
  const int64_t num_layers = sums.size(0), num_tokens = sums.size(1) * sums.size(2);
  const int64_t num_states = moments.size(0), count = num_states * num_layers;
  check_buffer(sums, sums, ScalarType::Double, 4 * num_layers * num_tokens, "sums");
  check_buffer(moments, sums, ScalarType::Double, count * 3 * kNumMetrics, "moments");
  check_buffer(counts, sums, ScalarType::Long, count * (kNumMetrics + 3), "counts");
  const bool float64_tokens = per_token && per_token->scalar_type() == ScalarType::Double;
  if (per_token) {
    check_buffer(*per_token, sums, float64_tokens ? ScalarType::Double : ScalarType::Float,
                 num_layers * kNumMetrics * num_tokens, "per_token");
  }
  return {static_cast<const double*>(sums.const_data_ptr()),
          num_layers,
          num_tokens,
          hidden_size,
          checked_places(checked_kinds(kinds, sums, num_tokens), num_states, first_state, offset,
                         tokens_per_state, apart),
          static_cast<double*>(moments.mutable_data_ptr()),
          static_cast<int64_t*>(counts.mutable_data_ptr()),
          per_token ? per_token->mutable_data_ptr() : nullptr,
          float64_tokens};
}

// The tensors of one update of all blocks, checked; h_0 ... h_L are `states`.
struct BlockUpdate {
  BlockStates states;
  double* moments;  // (num_states of places, kNumBlockMoments, L + 1, L + 1)
  int64_t* counts;
  TokenPlaces places;
  bool absolute;
  double* sums;  // (L, num_tokens, 4) or null
};

inline BlockUpdate checked_block_update(Tensor& moments, Tensor& counts,
                                        const std::vector<Tensor>& states,
                                        const std::optional<Tensor>& kinds, int64_t first_state,
                                        int64_t offset, int64_t tokens_per_state, bool absolute,
                                        std::optional<Tensor>& sums) {
  STD_TORCH_CHECK(states.size() >= 2, "states must hold at least 2 tensors, got ", states.size());
  STD_TORCH_CHECK(moments.dim() == 4, "moments must be (running states, ", kNumBlockMoments,
                  ", L + 1, L + 1)");
  const Tensor& first = states[0];
  const auto num_states = static_cast<int64_t>(states.size());
  BlockStates rows{{}, first.size(0), first.size(1), first.size(2), element_type(first)};
  for (const Tensor& state : states) {
    rows.states.push_back(layer_states(first, state).after);  // one shape, dtype and device
  }
  const int64_t num_running = moments.size(0), num_tokens = rows.num_tokens();
  const int64_t num_moments = num_running * kNumBlockMoments * num_states * num_states;
  check_buffer(moments, first, ScalarType::Double, num_moments, "moments");
  check_buffer(counts, first, ScalarType::Long, num_running * kNumBlockCounts, "counts");
  if (sums) {
    check_buffer(*sums, first, ScalarType::Double, 4 * (num_states - 1) * num_tokens, "sums");
  }
  return {rows,
          static_cast<double*>(moments.mutable_data_ptr()),
          static_cast<int64_t*>(counts.mutable_data_ptr()),
          checked_places(checked_kinds(kinds, first, num_tokens), num_running, first_state, offset,
                         tokens_per_state, false),
          absolute,
          sums ? static_cast<double*>(sums->mutable_data_ptr()) : nullptr};
}

}  // namespace simdiff
