// AVX-512 (F, DQ, BW, VL): eight doubles a register.
#if defined(__x86_64__)
#include <cstring>
#include <string>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c")
#endif
#include <immintrin.h>

#include "row_sums_loop.h"

namespace simdiff {
namespace {

struct Avx512 {
  static constexpr int lanes = 8;
  using Register = __m512d;

  static Register zero() { return _mm512_setzero_pd(); }

  static Register load(const double* pointer) { return _mm512_loadu_pd(pointer); }
  static Register load(const float* pointer) { return _mm512_cvtps_pd(_mm256_loadu_ps(pointer)); }
  static Register load(const BFloat16* pointer) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pointer));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  }
  static Register load(const Float16* pointer) {
    return _mm512_cvtps_pd(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pointer))));
  }

  static Register multiply_add(Register a, Register b, Register c) {
    return _mm512_fmadd_pd(a, b, c);
  }
  static Register subtract(Register a, Register b) { return _mm512_sub_pd(a, b); }
  static Register add(Register a, Register b) { return _mm512_add_pd(a, b); }
  static Register magnitude(Register a) { return _mm512_abs_pd(a); }
  static double total(Register a) { return _mm512_reduce_add_pd(a); }
};

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

const InstructionSet kAvx512 = {"avx512", &runs_here, SIMDIFF_ROW_SUMS(Avx512)};

}  // namespace simdiff
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
