// AVX2 with FMA and F16C: four doubles a register.
#if defined(__x86_64__)
#include <cstring>
#include <string>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "row_sums_loop.h"

namespace simdiff {
namespace {

struct Avx2 {
  static constexpr int lanes = 4;
  using Register = __m256d;

  static Register zero() { return _mm256_setzero_pd(); }

  static Register load(const double* pointer) { return _mm256_loadu_pd(pointer); }
  static Register load(const float* pointer) { return _mm256_cvtps_pd(_mm_loadu_ps(pointer)); }
  static Register load(const BFloat16* pointer) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pointer));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16)));
  }
  static Register load(const Float16* pointer) {
    return _mm256_cvtps_pd(
        _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pointer))));
  }

  static Register multiply_add(Register a, Register b, Register c) {
    return _mm256_fmadd_pd(a, b, c);
  }
  static Register subtract(Register a, Register b) { return _mm256_sub_pd(a, b); }
  static Register add(Register a, Register b) { return _mm256_add_pd(a, b); }
  static Register magnitude(Register a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
  static double total(Register a) {
    const __m128d halves = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(halves, _mm_unpackhi_pd(halves, halves)));
  }
};

bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

const InstructionSet kAvx2 = {"avx2", &runs_here, SIMDIFF_ROW_SUMS(Avx2)};

}  // namespace simdiff
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
