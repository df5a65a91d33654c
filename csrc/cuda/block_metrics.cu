// accumulate_blocks on a GPU: deals the tokens of an update out to launches of block_sums.cu and
// block_fold.cu, and the scratch memory between them out to both: for each token 16 bytes a pair
// (24 with sum |d|) and 8 a state, 256 MB at most; for each CTA its sums in progress, 64 MB at
// most.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "block_layout.h"
#include "block_metrics.h"
#include "block_stages.h"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

// Two slices of all rows for one of two CTAs: a multiprocessor of an A100 has 164 KB, of which each
// CTA takes 1 KB besides and 7712 bytes for the state of a token.
constexpr int64_t kSliceBytes = 73 * 1024;
// Four waves of two CTAs on an H200 (132 multiprocessors): on other GPUs, with less of a wave left
// over, not many multiprocessors run dry before the last CTA ends.
constexpr int64_t kMaxCtas = 1056;
constexpr int64_t kMinCtas = 132;
constexpr int64_t kUnitBytes = int64_t{64} << 20;
constexpr int64_t kTokenBytes = int64_t{256} << 20;

int64_t words_of_token(int64_t num_states, bool absolute) {
  return num_states + num_states * (num_states - 1) / 2 * (absolute ? 3 : 2);
}

int64_t words_of_cta(const BlockLaunchShape& shape, bool absolute) {
  return int64_t{shape.units} * kUnitSums * (absolute ? 2 : 1);
}

}  // namespace

BlockLaunchShape block_launch_shape(int64_t num_tokens, int64_t num_states, int64_t hidden_size,
                                    DType dtype, bool absolute) {
  const int64_t row_bytes = hidden_size * element_bytes(dtype);
  const int64_t room = kSliceBytes / (2 * num_states) / kStepBytes * kStepBytes;
  const int64_t slices = ceil_div(row_bytes, std::min<int64_t>(room, kMaxSliceBytes));
  const int64_t slice_bytes = ceil_div(ceil_div(row_bytes, slices), kStepBytes) * kStepBytes;
  const BlockLayout layout(static_cast<int>(num_states),
                           static_cast<int>(slice_bytes / kStepBytes));
  BlockLaunchShape shape{0, 0, 0, static_cast<int>(slice_bytes), layout.units};

  const int64_t most = kTokenBytes / 8 / words_of_token(num_states, absolute);
  shape.tokens_at_once = std::min(num_tokens, most);
  const int64_t max_ctas =
      std::clamp(kUnitBytes / 8 / words_of_cta(shape, absolute), kMinCtas, kMaxCtas);
  shape.tokens_per_cta =
      static_cast<int>(std::max<int64_t>(1, ceil_div(shape.tokens_at_once, max_ctas)));
  shape.num_ctas = static_cast<int>(ceil_div(shape.tokens_at_once, shape.tokens_per_cta));
  return shape;
}

int64_t block_scratch_words(int64_t num_tokens, int64_t num_states, int64_t hidden_size,
                            DType dtype, bool absolute) {
  const auto shape = block_launch_shape(num_tokens, num_states, hidden_size, dtype, absolute);
  return shape.tokens_at_once * words_of_token(num_states, absolute) +
         shape.num_ctas * words_of_cta(shape, absolute);
}

void accumulate_blocks(const BlockStates& states, const BlockFold& fold, int64_t* scratch,
                       int device, Stream stream) {
  const int64_t num_states = states.num_states(), num_tokens = states.num_tokens();
  if (num_tokens == 0) return;
  if (num_states > kMaxStates) {
    throw std::runtime_error("simdiff_kernels (CUDA): accumulate_blocks takes at most " +
                             std::to_string(kMaxStates) + " hidden states, got " +
                             std::to_string(num_states));
  }
  check_hidden_size(states.hidden_size);
  const auto shape =
      block_launch_shape(num_tokens, num_states, states.hidden_size, states.dtype, fold.absolute);
  const int64_t at_once = shape.tokens_at_once, num_pairs = num_states * (num_states - 1) / 2;
  BlockTokens tokens{};
  tokens.pairs = reinterpret_cast<double2*>(scratch);
  tokens.norms = reinterpret_cast<double*>(scratch) + 2 * num_pairs * at_once;
  double* unit_sums = tokens.norms + num_states * at_once;
  if (fold.absolute) {
    tokens.absolute = unit_sums;
    unit_sums += num_pairs * at_once;
  }
  const CurrentDevice current(device);
  for (tokens.first = 0; tokens.first < num_tokens; tokens.first = tokens.last) {
    tokens.last = std::min(num_tokens, tokens.first + at_once);
    sum_blocks(states, fold, tokens, shape, unit_sums, stream);
    fold_blocks(states, fold, tokens, stream);
  }
}

}  // namespace simdiff::cuda
