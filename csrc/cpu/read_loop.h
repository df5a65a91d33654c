// The limit that scoring is measured against: every byte loaded once, and as little done with it as
// keeps the compiler from leaving it out. Compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace simdiff {
namespace {

[[maybe_unused]] uint64_t read_bytes(const void* data, int64_t num_bytes) {
  typedef uint64_t Words __attribute__((vector_size(64)));
  constexpr int kUnroll = 4;
  const auto* bytes = static_cast<const char*>(data);
  Words seen[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * int64_t{sizeof(Words)} <= num_bytes; i += kUnroll * sizeof(Words)) {
    for (int u = 0; u < kUnroll; ++u) {
      Words words;
      std::memcpy(&words, bytes + i + u * sizeof(Words), sizeof words);
      seen[u] |= words;
    }
  }
  uint64_t result = 0;
  for (const Words& words : seen) {
    for (int lane = 0; lane < 8; ++lane) result |= words[lane];
  }
  for (; i < num_bytes; ++i) result |= static_cast<unsigned char>(bytes[i]);
  return result;
}

}  // namespace
}  // namespace simdiff
