// Rows are dealt out to whole groups of lanes; and without a GPU a launch reports what the CUDA
// runtime says, and does nothing else.
#include <cstdio>
#include <stdexcept>

#include "../cuda/devices.h"
#include "../cuda/fold.h"
#include "../cuda/row_sums.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what, int64_t num_tokens, int64_t hidden_size) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (%lld tokens of %lld)\n", what, static_cast<long long>(num_tokens),
              static_cast<long long>(hidden_size));
}

// Multiprocessors and shared memory of a CTA of an L4, an A100, an H100 and a B200.
const simdiff::cuda::RowDevice kDevices[] = {{58, 99 * 1024, true},
                                             {108, 163 * 1024, true},
                                             {132, 227 * 1024, true},
                                             {148, 227 * 1024, true}};

void check_shape(int64_t num_tokens, int64_t hidden_size, simdiff::DType dtype, bool aligned,
                 const simdiff::cuda::RowDevice& device) {
  const auto shape = simdiff::cuda::row_shape(num_tokens, hidden_size, dtype, aligned, device);
  const auto other = simdiff::cuda::row_shape(num_tokens, hidden_size, dtype, aligned, kDevices[0]);
  expect(shape.row_lanes == other.row_lanes, "the same sums on every GPU", num_tokens, hidden_size);
  const int threads = 32 * shape.warps;
  expect(threads <= 512 && threads % shape.row_lanes == 0, "whole groups of lanes", num_tokens,
         hidden_size);
  expect(shape.row_lanes <= 32 || shape.row_lanes == threads, "groups within a warp, or a CTA",
         num_tokens, hidden_size);
  expect(2 * 16 * threads * shape.stages <= device.shared_bytes, "a ring that fits", num_tokens,
         hidden_size);
  expect(aligned || shape.stages == 0, "no ring for unaligned rows", num_tokens, hidden_size);
}

template <class Call>
void check_reported(const Call& call, const char* what) {
  try {
    call();
    expect(false, what, 1, 4);
  } catch (const std::runtime_error& error) {
    std::printf("reported, as it must be: %s\n", error.what());
  }
}

void check_reported_problems() {
  if (simdiff::cuda::device_problem(0).empty()) return;  // a GPU is here
  float row[4] = {};
  double sums[4] = {1, 1, 1, 1}, moments[18] = {};
  int64_t counts[9] = {};
  const simdiff::LayerStates states{{row, 4, 4}, {row, 4, 4}, 1, 1, 4, simdiff::DType::kFloat32};
  check_reported([&] { simdiff::cuda::row_sums(states, nullptr, sums, 0, nullptr); },
                 "row_sums without a GPU must throw");
  const simdiff::TokenPlaces places{nullptr, 1, 0, 0, 1, false};
  check_reported([&] { simdiff::cuda::fold(sums, 1, 1, 4, places, moments, counts, 0, nullptr); },
                 "fold without a GPU must throw");
  expect(sums[0] == 1 && moments[0] == 0 && counts[8] == 0, "nothing may change", 1, 4);
}

}  // namespace

int main() {
  for (const int64_t num_tokens : {int64_t{1}, int64_t{100}, int64_t{4096}, int64_t{1} << 31}) {
    for (const int64_t hidden_size : {1, 64, 576, 1024, 4096, 16384}) {
      for (int dtype = 0; dtype < simdiff::kNumDTypes; ++dtype) {
        for (const auto& device : kDevices) {
          check_shape(num_tokens, hidden_size, static_cast<simdiff::DType>(dtype), true, device);
          check_shape(num_tokens, hidden_size, static_cast<simdiff::DType>(dtype), false, device);
        }
      }
    }
  }
  check_reported_problems();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
