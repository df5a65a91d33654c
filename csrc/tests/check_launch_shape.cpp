// Every token is dealt to exactly one group of warps, within the limits of a launch; and without a
// GPU a launch reports what the CUDA runtime says, and does nothing else.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "../cuda/devices.h"
#include "../cuda/layer_metrics.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what, int64_t num_tokens, int64_t hidden_size) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (%lld tokens of %lld)\n", what, static_cast<long long>(num_tokens),
              static_cast<long long>(hidden_size));
}

void check_shape(int64_t num_tokens, int64_t hidden_size, simdiff::DType dtype) {
  const auto shape = simdiff::cuda::launch_shape(num_tokens, hidden_size, dtype);
  const int64_t groups_per_block = shape.threads / 32 / shape.warps_per_row;
  const int64_t groups = shape.blocks * groups_per_block;
  expect(shape.threads % 32 == 0 && shape.threads <= 1024, "whole warps", num_tokens, hidden_size);
  expect(shape.threads / 32 % shape.warps_per_row == 0, "whole groups", num_tokens, hidden_size);
  expect(shape.blocks >= 1, "at least one block", num_tokens, hidden_size);
  expect(groups * shape.tokens_per_group >= num_tokens, "no token left", num_tokens, hidden_size);
  expect((groups - groups_per_block) * shape.tokens_per_group < num_tokens, "no idle block",
         num_tokens, hidden_size);
  const int64_t states = simdiff::cuda::kScratchWords - 1;
  expect(shape.blocks <= states / 26, "room for the partial states", num_tokens, hidden_size);
}

void check_reported_problem() {
  if (simdiff::cuda::device_problem(0).empty()) return;  // a GPU is here
  float row[4] = {};
  const simdiff::LayerStates states{{row, 4, 4}, {row, 4, 4}, 1, 1, 4, simdiff::DType::kFloat32};
  try {
    simdiff::cuda::token_metrics(states, row, 0, nullptr);
    expect(false, "a launch without a GPU must fail", 1, 4);
  } catch (const std::runtime_error& error) {
    std::printf("without a GPU: %s\n", error.what());
  }
}

}  // namespace

int main() {
  const std::vector<int64_t> tokens = {1,
                                       2,
                                       31,
                                       32,
                                       33,
                                       511,
                                       512,
                                       513,
                                       1023,
                                       1024,
                                       1025,
                                       4095,
                                       4096,
                                       4097,
                                       8192,
                                       131072,
                                       131073,
                                       INT64_C(2147483647),
                                       INT64_C(2147483649),
                                       INT64_C(5000000000)};
  for (int64_t num_tokens : tokens) {
    for (int64_t hidden_size : {1, 7, 64, 576, 1024, 4096, 8192, 16384}) {
      for (int dtype = 0; dtype < simdiff::kNumDTypes; ++dtype) {
        check_shape(num_tokens, hidden_size, static_cast<simdiff::DType>(dtype));
      }
    }
  }
  check_reported_problem();
  std::printf(failures ? "%d checks failed\n" : "launch shapes are sound\n", failures);
  return failures != 0;
}
