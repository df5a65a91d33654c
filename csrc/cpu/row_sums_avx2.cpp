// Row sums and pairs (row_sums_short.h, block_sums_loop.h) with AVX2, FMA and F16C: four doubles or
// eight floats a register.
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

#include "block_fold_loop.h"
#include "chunk_loops.h"
#include "read_loop.h"
#include "row_sums_short.h"

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
  static void totals(Register a, Register b, Register c, Register d, double* out) {
    const __m256d ab = _mm256_hadd_pd(a, b), cd = _mm256_hadd_pd(c, d);
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20),
                                        _mm256_permute2f128_pd(ab, cd, 0x31)));
  }
};

struct Avx2Short {
  using Scalar = float;
  static constexpr int lanes = 8, rows = 2;
  static constexpr int tile_rows = 2, tile_columns = 3, wide_tile_columns = 5;
  using Register = __m256;
  using Wide = __m256d;

  static Register zero() { return _mm256_setzero_ps(); }
  static Wide wide_zero() { return _mm256_setzero_pd(); }

  // Which entry goes where does not matter, as long as it is the same for both rows.
  static void load(const float* pointer, Register& even, Register& odd) {
    even = _mm256_loadu_ps(pointer);
    odd = _mm256_loadu_ps(pointer + lanes);
  }
  static void load(const BFloat16* pointer, Register& even, Register& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pointer));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000u)));
  }
  static void load(const Float16* pointer, Register& even, Register& odd) {
    const auto* halves = reinterpret_cast<const __m128i*>(pointer);
    even = _mm256_cvtph_ps(_mm_loadu_si128(halves));
    odd = _mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
  }

  static Register multiply_add(Register a, Register b, Register c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static Register subtract(Register a, Register b) { return _mm256_sub_ps(a, b); }
  static Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static Register magnitude(Register a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Wide widen_add(Register a, Wide sum) {
    sum = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)), sum);
    return _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)), sum);
  }
  static void totals(Wide a, Wide b, Wide c, Wide d, double* out) { Avx2::totals(a, b, c, d, out); }
  static void narrow_totals(Register a, Register b, Register c, Register d, double* out) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    _mm256_storeu_pd(out, _mm256_cvtps_pd(sums));
  }
};

bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

const InstructionSet kAvx2 = {
    "avx2",   &runs_here, Avx2Short::rows, SIMDIFF_SUM_ROWS_SHORT(Avx2, Avx2Short),
    &measure, &fold,      &read_bytes,     SIMDIFF_BLOCKS(Avx2, Avx2Short)};

}  // namespace simdiff
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
