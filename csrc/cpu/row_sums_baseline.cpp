// Row sums and pairs (row_sums_loop.h, block_sums_loop.h) in portable C++: four independent lanes
// that any compiler can vectorise without reordering sums.
#include <cmath>

#include "block_fold_loop.h"
#include "chunk_loops.h"
#include "read_loop.h"
#include "row_sums_loop.h"

namespace simdiff {
namespace {

double widen(float value) { return value; }
double widen(double value) { return value; }

double widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

double widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // Inf and NaN: the exponent field goes from all ones to all ones
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x0400u) {  // normal: exponent bias 15 to 127
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // zero and subnormal: magnitude units of 2^-24, exact in float32
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
  }
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

struct Baseline {
  static constexpr int lanes = 4;
  struct Register {
    double lane[lanes];
  };

  static Register zero() { return {}; }

  template <class Element>
  static Register load(const Element* pointer) {
    Register r;
    for (int i = 0; i < lanes; ++i) r.lane[i] = widen(pointer[i]);
    return r;
  }
  static Register multiply_add(const Register& a, const Register& b, Register c) {
    for (int i = 0; i < lanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static Register subtract(Register a, const Register& b) {
    for (int i = 0; i < lanes; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static Register add(Register a, const Register& b) {
    for (int i = 0; i < lanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Register magnitude(Register a) {
    for (int i = 0; i < lanes; ++i) a.lane[i] = std::fabs(a.lane[i]);
    return a;
  }
  static void totals(const Register& a, const Register& b, const Register& c, const Register& d,
                     double* out) {
    const Register* registers[] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; ++i) {
      const double* lane = registers[i]->lane;
      out[i] = (lane[0] + lane[1]) + (lane[2] + lane[3]);
    }
  }
};

// Four float32 at a time, for the blocks, where arithmetic is the limit and not the memory.
struct BaselineShort {
  using Scalar = float;
  static constexpr int lanes = 4;
  static constexpr int tile_rows = 2, tile_columns = 2, wide_tile_columns = 4;
  typedef float Register __attribute__((vector_size(16), may_alias));

  static Register zero() { return Register{}; }

  template <class Element>
  static void load(const Element* pointer, Register& even, Register& odd) {
    for (int i = 0; i < lanes; ++i) {
      even[i] = static_cast<float>(widen(pointer[i]));
      odd[i] = static_cast<float>(widen(pointer[lanes + i]));
    }
  }
  static Register multiply_add(Register a, Register b, Register c) { return c + a * b; }
  static Register subtract(Register a, Register b) { return a - b; }
  static Register add(Register a, Register b) { return a + b; }
  static Register magnitude(Register a) {
    typedef uint32_t Bits __attribute__((vector_size(16)));
    return (Register)((Bits)a & 0x7fffffffu);
  }
  static void narrow_totals(Register a, Register b, Register c, Register d, double* out) {
    const Register registers[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
      const Register& r = registers[i];
      out[i] = (r[0] + r[1]) + (r[2] + r[3]);
    }
  }
};

bool runs_here() { return true; }

}  // namespace

const InstructionSet kBaseline = {
    "baseline", &runs_here, 1,           SIMDIFF_SUM_ROWS(Baseline),
    &measure,   &fold,      &read_bytes, SIMDIFF_BLOCKS(Baseline, BaselineShort)};

}  // namespace simdiff
