// Row sums and pairs (row_sums_short.h, block_sums_loop.h) with AVX-512 (F, DQ, BW, VL): eight
// doubles or sixteen floats a register.
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
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header makes registers whose content does not matter from themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "block_fold_loop.h"
#include "chunk_loops.h"
#include "read_loop.h"
#include "row_sums_short.h"

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
  // The totals of four registers, all at once: half of the work of one after the other.
  static void totals(Register a, Register b, Register c, Register d, double* out) {
    const __m256d ab = _mm256_hadd_pd(halves(a), halves(b)),
                  cd = _mm256_hadd_pd(halves(c), halves(d));
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20),
                                        _mm256_permute2f128_pd(ab, cd, 0x31)));
  }

 private:
  static __m256d halves(Register a) {
    return _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
  }
};

struct Avx512Short {
  using Scalar = float;
  static constexpr int lanes = 16, rows = 4;
  static constexpr int tile_rows = 4, tile_columns = 3, wide_tile_columns = 5;
  using Register = __m512;
  using Wide = __m512d;

  static Register zero() { return _mm512_setzero_ps(); }
  static Wide wide_zero() { return _mm512_setzero_pd(); }

  // Which entry goes where does not matter, as long as it is the same for both rows.
  static void load(const float* pointer, Register& even, Register& odd) {
    even = _mm512_loadu_ps(pointer);
    odd = _mm512_loadu_ps(pointer + lanes);
  }
  static void load(const BFloat16* pointer, Register& even, Register& odd) {
    const __m512i pairs = _mm512_loadu_si512(pointer);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000u)));
  }
  static void load(const Float16* pointer, Register& even, Register& odd) {
    const auto* halves = reinterpret_cast<const __m256i*>(pointer);
    even = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
    odd = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
  }

  static Register multiply_add(Register a, Register b, Register c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static Register subtract(Register a, Register b) { return _mm512_sub_ps(a, b); }
  static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static Register magnitude(Register a) { return _mm512_abs_ps(a); }
  static Wide widen_add(Register a, Wide sum) {
    sum = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)), sum);
    return _mm512_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)), sum);
  }
  static void totals(Wide a, Wide b, Wide c, Wide d, double* out) {
    Avx512::totals(a, b, c, d, out);
  }
  static void narrow_totals(Register a, Register b, Register c, Register d, double* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm256_storeu_pd(out, _mm256_cvtps_pd(sums));
  }
};

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

const InstructionSet kAvx512 = {
    "avx512", &runs_here, Avx512Short::rows, SIMDIFF_SUM_ROWS_SHORT(Avx512, Avx512Short),
    &measure, &fold,      &read_bytes,       SIMDIFF_BLOCKS(Avx512, Avx512Short)};

}  // namespace simdiff
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
