// Row sums (row_sums_short.h) with NEON: two doubles a register, which come in pairs. Every AArch64
// processor has it, with fused multiply-add and the conversion of float16, so that nothing is asked
// of the compiler.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "chunk_loops.h"
#include "read_loop.h"
#include "row_sums_short.h"

namespace simdiff {
namespace {

// Four doubles: what one load of four entries of any other type widens to, and with two sets of
// sums sixteen independent chains: four pipelines times a latency of four cycles on the widest
// processors (Neoverse V1, Apple M1).
struct Neon {
  static constexpr int lanes = 4;
  struct Register {
    float64x2_t low, high;
  };

  static Register zero() { return {vdupq_n_f64(0), vdupq_n_f64(0)}; }

  static Register widen(float32x4_t a) {
    return {vcvt_f64_f32(vget_low_f32(a)), vcvt_high_f64_f32(a)};
  }
  static Register load(const double* pointer) {
    return {vld1q_f64(pointer), vld1q_f64(pointer + 2)};
  }
  static Register load(const float* pointer) { return widen(vld1q_f32(pointer)); }
  static Register load(const BFloat16* pointer) {
    return widen(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&pointer->bits), 16)));
  }
  static Register load(const Float16* pointer) {
    return widen(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&pointer->bits))));
  }

  static Register multiply_add(Register a, Register b, Register c) {
    return {vfmaq_f64(c.low, a.low, b.low), vfmaq_f64(c.high, a.high, b.high)};
  }
  static Register subtract(Register a, Register b) {
    return {vsubq_f64(a.low, b.low), vsubq_f64(a.high, b.high)};
  }
  static Register add(Register a, Register b) {
    return {vaddq_f64(a.low, b.low), vaddq_f64(a.high, b.high)};
  }
  static Register magnitude(Register a) { return {vabsq_f64(a.low), vabsq_f64(a.high)}; }
  static void totals(Register a, Register b, Register c, Register d, double* out) {
    vst1q_f64(out, vpaddq_f64(halves(a), halves(b)));
    vst1q_f64(out + 2, vpaddq_f64(halves(c), halves(d)));
  }

 private:
  static float64x2_t halves(Register a) { return vaddq_f64(a.low, a.high); }
};

struct NeonShort {
  // Eight chains hide the latency on two pipelines. The sums of more rows would fit, but GCC 12
  // then stores them in every step.
  static constexpr int lanes = 4, rows = 2;
  using Register = float32x4_t;
  using Wide = Neon::Register;

  static Register zero() { return vdupq_n_f32(0); }
  static Wide wide_zero() { return Neon::zero(); }

  // Which entry goes where does not matter, as long as it is the same for both rows.
  static void load(const float* pointer, Register& even, Register& odd) {
    even = vld1q_f32(pointer);
    odd = vld1q_f32(pointer + lanes);
  }
  static void load(const BFloat16* pointer, Register& even, Register& odd) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(&pointer->bits));
    even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    odd = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
  }
  static void load(const Float16* pointer, Register& even, Register& odd) {
    const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&pointer->bits));
    even = vcvt_f32_f16(vget_low_f16(halves));
    odd = vcvt_high_f32_f16(halves);
  }

  static Register multiply_add(Register a, Register b, Register c) { return vfmaq_f32(c, a, b); }
  static Register subtract(Register a, Register b) { return vsubq_f32(a, b); }
  static Register add(Register a, Register b) { return vaddq_f32(a, b); }
  static Register magnitude(Register a) { return vabsq_f32(a); }
  static Wide widen_add(Register a, Wide sum) { return Neon::add(Neon::widen(a), sum); }
  static void totals(Wide a, Wide b, Wide c, Wide d, double* out) { Neon::totals(a, b, c, d, out); }
  static void narrow_totals(Register a, Register b, Register c, Register d, double* out) {
    const Wide sums = Neon::widen(vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
    vst1q_f64(out, sums.low);
    vst1q_f64(out + 2, sums.high);
  }
};

bool runs_here() { return true; }

}  // namespace

const InstructionSet kNeon = {
    "neon",          &runs_here,
    NeonShort::rows, SIMDIFF_SUM_ROWS_SHORT(Neon, NeonShort),
    &measure,        &fold,
    &read_bytes,     {}};  // blocks: the baseline's vectors are NEON's too here

}  // namespace simdiff
#endif
