// What the check programs of the CPU share: counted checks, printed where they fail, comparison
// with a relative bound, and threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "../cpu/layer_metrics.h"

namespace simdiff {

inline int failures = 0;
inline int checks = 0;

// Counts a check and prints the first 40 that fail: what was checked, for which instruction set or
// part, and up to three numbers that tell the case.
inline void expect(bool holds, const char* what, const char* where, int64_t a, int64_t b,
                   int64_t c = 0) {
  ++checks;
  if (holds) return;
  if (++failures > 40) return;
  std::printf("FAILED %s: %s, case %lld %lld %lld\n", what, where, static_cast<long long>(a),
              static_cast<long long>(b), static_cast<long long>(c));
}

inline bool close(long double got, long double wanted, long double relative) {
  return std::fabs(got - wanted) <= relative * std::fabs(wanted) + 1e-300L;
}

// Ranges of equal length on threads of their own, the last range first.
inline ParallelFor on_threads(int num_threads) {
  return [=](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> threads;
    for (int64_t i = num_threads - 1; i >= 0; --i) {
      threads.emplace_back(body, count * i / num_threads, count * (i + 1) / num_threads);
    }
    for (auto& thread : threads) thread.join();
  };
}

// Prints how many checks passed and failed; what main returns.
inline int report() {
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}

}  // namespace simdiff
