// Registers the CPU implementations with torch. Written against torch's stable ABI, so that one
// build serves torch 2.10 and later; schemas live in simdiff_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../cpu/layer_metrics.h"

namespace {

using simdiff::kNumMetrics;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

simdiff::DType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return simdiff::DType::kFloat32;
    case ScalarType::Double:
      return simdiff::DType::kFloat64;
    case ScalarType::BFloat16:
      return simdiff::DType::kBFloat16;
    case ScalarType::Half:
      return simdiff::DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "hidden states must be float32, float64, bfloat16 or float16");
  }
}

simdiff::HiddenStates hidden_states(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have 3 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(2) <= 1 || tensor.stride(2) == 1, name,
                  " must be contiguous in its last dimension");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

simdiff::LayerStates layer_states(const Tensor& before, const Tensor& after) {
  const auto x = hidden_states(before, "before");
  const auto y = hidden_states(after, "after");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(before.size(dim) == after.size(dim),
                    "before and after must have the same shape");
  }
  STD_TORCH_CHECK(before.scalar_type() == after.scalar_type(),
                  "before and after must have the same dtype");
  STD_TORCH_CHECK(before.size(2) > 0, "hidden_size must not be 0");
  return {x, y, before.size(0), before.size(1), before.size(2), element_type(before)};
}

// torch's own thread pool: torch.set_num_threads is obeyed and no second pool spins beside it.
void on_torch_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

Tensor token_metrics_cpu(const Tensor& before, const Tensor& after) {
  const auto states = layer_states(before, after);
  const auto dtype =
      states.dtype == simdiff::DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(before, {kNumMetrics, states.outer, states.inner}, dtype);
  simdiff::token_metrics(states, out.mutable_data_ptr(), &on_torch_threads);
  return out;
}

void check_buffer(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous(), name,
      " must be contiguous, of its documented dtype and with ", numel, " entries");
}

void accumulate_cpu(Tensor moments, Tensor tallies, const Tensor& before, const Tensor& after,
                    const std::optional<Tensor>& mask, std::optional<Tensor> per_token) {
  const auto states = layer_states(before, after);
  check_buffer(moments, ScalarType::Double, 3 * kNumMetrics, "moments");
  check_buffer(tallies, ScalarType::Long, kNumMetrics + 3, "tallies");
  if (mask) check_buffer(*mask, ScalarType::Bool, states.num_tokens(), "mask");
  if (per_token) {
    const bool wide = states.dtype == simdiff::DType::kFloat64;
    check_buffer(*per_token, wide ? ScalarType::Double : ScalarType::Float,
                 kNumMetrics * states.num_tokens(), "per_token");
  }

  auto* floats = static_cast<double*>(moments.mutable_data_ptr());
  auto* integers = static_cast<int64_t*>(tallies.mutable_data_ptr());
  simdiff::RunningState state;
  std::copy_n(floats, kNumMetrics, state.sum);
  std::copy_n(floats + kNumMetrics, kNumMetrics, state.sum_of_squares);
  std::copy_n(floats + 2 * kNumMetrics, kNumMetrics, state.maximum);
  std::copy_n(integers, kNumMetrics, state.argmax);
  state.num_tokens = integers[kNumMetrics];
  state.num_nonfinite = integers[kNumMetrics + 1];
  state.num_seen = integers[kNumMetrics + 2];

  simdiff::accumulate(states, mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
                      state, per_token ? per_token->mutable_data_ptr() : nullptr,
                      &on_torch_threads);

  std::copy_n(state.sum, kNumMetrics, floats);
  std::copy_n(state.sum_of_squares, kNumMetrics, floats + kNumMetrics);
  std::copy_n(state.maximum, kNumMetrics, floats + 2 * kNumMetrics);
  std::copy_n(state.argmax, kNumMetrics, integers);
  integers[kNumMetrics] = state.num_tokens;
  integers[kNumMetrics + 1] = state.num_nonfinite;
  integers[kNumMetrics + 2] = state.num_seen;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(simdiff_kernels, CPU, library) {
  library.impl("token_metrics.cpu", TORCH_BOX(&token_metrics_cpu));
  library.impl("accumulate.cpu", TORCH_BOX(&accumulate_cpu));
}
