// What is measured of one token, and the running reduction over tokens. Plain C++, no torch; the
// formulas are compiled by nvcc for the GPU as well. Nothing here reads a hidden state: from four
// sums of a token (32 bytes) come its six metrics, three square roots and four divisions.
//
// For a layer with input x and output y (hidden_size entries each) and d = y - x:
//   cosine distance      1 - cos(x, y) = (|d|^2 - (|y| - |x|)^2) / (2 |x| |y|)
//   squared difference   sum d^2
//   absolute difference  sum |d| / hidden_size
//   relative difference  |d| / |x|
// simdiff_kernels/reference.py is the specification; names and order follow
// simdiff_kernels/metrics.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

// Inlined always: the linker must not merge copies compiled for different processors.
#ifdef __CUDACC__
#define SIMDIFF_INLINE __host__ __device__ __forceinline__
#else
#define SIMDIFF_INLINE __attribute__((always_inline)) inline
#endif

namespace simdiff {

inline constexpr int kNumMetrics = 6;
enum Metric : int {
  kCosineDistance,
  kSquaredDifference,
  kAbsoluteDifference,
  kRelativeDifference,
  kNormBefore,
  kNormAfter,
};

// Everything that one read of the two rows has to yield; all in float64, where the product of two
// float32 values is exact.
struct RowSums {
  double before_squared = 0;       // sum x^2
  double after_squared = 0;        // sum y^2
  double difference_squared = 0;   // sum (y - x)^2
  double difference_absolute = 0;  // sum |y - x|
};

struct TokenMetrics {
  double values[kNumMetrics];
};

// A NaN or Inf anywhere in the row reaches its sum of squares (no float32 square overflows
// float64).
SIMDIFF_INLINE bool is_finite(const RowSums& sums) {
  return std::isfinite(sums.before_squared + sums.after_squared);
}

// Without branches, so that a loop over tokens becomes vector instructions: where a zero vector
// leaves a quotient undefined, its divisor is replaced by one and the result afterwards.
// norm_gap is norm_after - norm_before, formed without loss.
SIMDIFF_INLINE double cosine_distance(double difference_squared, double norm_gap,
                                      double norm_before, double norm_after) {
  const double product = norm_before * norm_after;
  double distance = (difference_squared - norm_gap * norm_gap) / (product == 0 ? 1.0 : 2 * product);
  // Rounding may leave [0, 2] by an ulp; a NaN passes both comparisons unchanged.
  distance = distance < 0 ? 0.0 : distance;
  distance = distance > 2 ? 2.0 : distance;
  // A zero vector has no direction: nothing in common with anything but another zero vector.
  const double undefined = norm_before == norm_after ? 0.0 : 1.0;
  return product == 0 ? undefined : distance;
}

SIMDIFF_INLINE double cosine_distance(const RowSums& sums, double norm_before, double norm_after) {
  const double total = norm_before + norm_after;
  const double gap = (sums.after_squared - sums.before_squared) / (total == 0 ? 1.0 : total);
  return cosine_distance(sums.difference_squared, gap, norm_before, norm_after);
}

SIMDIFF_INLINE double relative_difference(double difference_squared, double norm_before) {
  const double relative = std::sqrt(difference_squared) / (norm_before == 0 ? 1.0 : norm_before);
  const double undefined = difference_squared == 0 ? 0.0 : 1.0;
  return norm_before == 0 ? undefined : relative;
}

SIMDIFF_INLINE TokenMetrics token_metrics(const RowSums& sums, int64_t hidden_size) {
  const double norm_before = std::sqrt(sums.before_squared);
  const double norm_after = std::sqrt(sums.after_squared);
  TokenMetrics metrics;
  metrics.values[kCosineDistance] = cosine_distance(sums, norm_before, norm_after);
  metrics.values[kSquaredDifference] = sums.difference_squared;
  metrics.values[kAbsoluteDifference] = sums.difference_absolute / static_cast<double>(hidden_size);
  metrics.values[kRelativeDifference] = relative_difference(sums.difference_squared, norm_before);
  metrics.values[kNormBefore] = norm_before;
  metrics.values[kNormAfter] = norm_after;
  return metrics;
}

// The reduction over tokens. The same layout as the state tensors `moments` (3, kNumMetrics) and
// `counts` (kNumMetrics + 3) in simdiff_kernels/running_states.py.
struct RunningState {
  double sum[kNumMetrics] = {};
  double sum_of_squares[kNumMetrics] = {};
  double maximum[kNumMetrics];
  int64_t argmax[kNumMetrics];
  int64_t num_tokens = 0;     // averaged
  int64_t num_nonfinite = 0;  // left out because of a NaN or Inf
  int64_t num_seen = 0;       // all, masked ones too: the index of the next token

  RunningState() {
    for (int m = 0; m < kNumMetrics; ++m) {
      maximum[m] = -std::numeric_limits<double>::infinity();
      argmax[m] = -1;
    }
  }

  RunningState(const double* moments, const int64_t* counts) {
    for (int m = 0; m < kNumMetrics; ++m) {
      sum[m] = moments[m];
      sum_of_squares[m] = moments[kNumMetrics + m];
      maximum[m] = moments[2 * kNumMetrics + m];
      argmax[m] = counts[m];
    }
    num_tokens = counts[kNumMetrics];
    num_nonfinite = counts[kNumMetrics + 1];
    num_seen = counts[kNumMetrics + 2];
  }

  void store(double* moments, int64_t* counts) const {
    for (int m = 0; m < kNumMetrics; ++m) {
      moments[m] = sum[m];
      moments[kNumMetrics + m] = sum_of_squares[m];
      moments[2 * kNumMetrics + m] = maximum[m];
      counts[m] = argmax[m];
    }
    counts[kNumMetrics] = num_tokens;
    counts[kNumMetrics + 1] = num_nonfinite;
    counts[kNumMetrics + 2] = num_seen;
  }

  void add(const TokenMetrics& token, int64_t index) {
    for (int m = 0; m < kNumMetrics; ++m) {
      const double value = token.values[m];
      sum[m] += value;
      sum_of_squares[m] += value * value;
      if (value > maximum[m]) {
        maximum[m] = value;
        argmax[m] = index;
      }
    }
    ++num_tokens;
  }

  // `other` saw the tokens that follow those of *this; its indices already continue ours.
  void append(const RunningState& other) {
    for (int m = 0; m < kNumMetrics; ++m) {
      sum[m] += other.sum[m];
      sum_of_squares[m] += other.sum_of_squares[m];
      if (other.maximum[m] > maximum[m]) {
        maximum[m] = other.maximum[m];
        argmax[m] = other.argmax[m];
      }
    }
    num_tokens += other.num_tokens;
    num_nonfinite += other.num_nonfinite;
    num_seen += other.num_seen;
  }
};

}  // namespace simdiff
