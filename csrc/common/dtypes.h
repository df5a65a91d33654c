// The dtypes of hidden states: their sizes, names and C++ types, and the only switch over them.
#pragma once

#include <cstdint>

namespace simdiff {

// Tables of functions, one for each dtype, are in this order.
enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
inline constexpr int kNumDTypes = 4;
inline constexpr int64_t kElementBytes[kNumDTypes] = {4, 8, 2, 2};
inline constexpr const char* kDTypeNames[kNumDTypes] = {"float32", "float64", "bfloat16",
                                                        "float16"};

// Entries of 16 bits; each implementation converts them in its own way.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int64_t element_bytes(DType dtype) { return kElementBytes[static_cast<int>(dtype)]; }

// Returns function(Element{}), where Element is the C++ type of an entry: float, double, BFloat16
// or Float16.
template <class Function>
auto with_element(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat64:
      return function(double{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      break;
  }
  return function(Float16{});
}

}  // namespace simdiff
