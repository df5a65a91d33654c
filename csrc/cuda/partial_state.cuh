// The running reduction on the device: what a warp keeps, and how the parts are joined in order.
#pragma once

#include <math_constants.h>

#include <cstdint>

#include "../common/metrics.h"

namespace simdiff::cuda {

// One metric over some consecutive tokens; kNumMetrics of these and two counts are a PartialState,
// each handled by a lane of its own.
struct MetricState {
  double sum;
  double sum_of_squares;
  double maximum;
  int64_t argmax;

  __device__ static MetricState empty() { return {0, 0, -CUDART_INF, -1}; }

  __device__ void add(double value, int64_t token) {
    sum += value;
    sum_of_squares += value * value;
    if (value > maximum) {
      maximum = value;
      argmax = token;
    }
  }

  // `next` saw the tokens that follow: of equal maxima the first one stays.
  __device__ void append(const MetricState& next) {
    sum += next.sum;
    sum_of_squares += next.sum_of_squares;
    if (next.maximum > maximum) {
      maximum = next.maximum;
      argmax = next.argmax;
    }
  }
};

struct Counts {
  int64_t num_tokens;     // averaged
  int64_t num_nonfinite;  // left out because of a NaN or Inf

  __device__ static Counts empty() { return {0, 0}; }

  __device__ void append(const Counts& next) {
    num_tokens += next.num_tokens;
    num_nonfinite += next.num_nonfinite;
  }
};

struct PartialState {
  MetricState metrics[kNumMetrics];
  Counts counts;
};

// Lanes 0 to kNumMetrics of eight: one for each metric, the next for the counts.
inline constexpr int kStateLanes = 8;
static_assert(kNumMetrics < kStateLanes);

// In L2, where other multiprocessors wrote it: this one's L1 may hold older bytes.
__device__ inline double2 load_shared_by_all(const void* address) {
  return __ldcg(static_cast<const double2*>(address));
}

__device__ inline MetricState load_state(const MetricState* address) {
  const double2 sums = load_shared_by_all(address);
  const double2 peak = load_shared_by_all(&address->maximum);
  return {sums.x, sums.y, peak.x, __double_as_longlong(peak.y)};
}

__device__ inline Counts load_state(const Counts* address) {
  const double2 counts = load_shared_by_all(address);
  return {__double_as_longlong(counts.x), __double_as_longlong(counts.y)};
}

// Joins states [begin, end) in order; independent loads are issued together.
template <class State, class Get>
__device__ State join_states(int begin, int end, const Get& state_of) {
  State joined = State::empty();
#pragma unroll 4
  for (int i = begin; i < end; ++i) joined.append(state_of(i));
  return joined;
}

// Joins the partial states [begin, end) into `target`, one lane of kStateLanes each.
template <class Load>
__device__ void join_partials(int begin, int end, int state_lane, PartialState& target,
                              const PartialState* partials, const Load& load) {
  if (state_lane < kNumMetrics) {
    target.metrics[state_lane] = join_states<MetricState>(
        begin, end, [&](int i) { return load(&partials[i].metrics[state_lane]); });
  } else if (state_lane == kNumMetrics) {
    target.counts =
        join_states<Counts>(begin, end, [&](int i) { return load(&partials[i].counts); });
  }
}

}  // namespace simdiff::cuda
