// The limit that scoring is measured against: every byte loaded once, and as little done with it as
// keeps the compiler from leaving it out. Eight sections of the memory are read side by side: as
// many as give the most bytes a second (one after the other gives a fifth to a third less; that the
// processor asks for more pages at once is what helps). Compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace simdiff {
namespace {

[[maybe_unused]] uint64_t read_bytes(const void* data, int64_t num_bytes) {
  typedef uint64_t Words __attribute__((vector_size(64)));
  constexpr int kSections = 8;
  const auto* bytes = static_cast<const char*>(data);
  const int64_t section = num_bytes / (kSections * sizeof(Words)) * sizeof(Words);
  Words seen[kSections] = {};
  for (int64_t i = 0; i < section; i += sizeof(Words)) {
#pragma GCC unroll 8
    for (int s = 0; s < kSections; ++s) {
      Words words;
      std::memcpy(&words, bytes + s * section + i, sizeof words);
      seen[s] |= words;
    }
  }
  uint64_t result = 0;
  for (const Words& words : seen) {
    for (int lane = 0; lane < 8; ++lane) result |= words[lane];
  }
  for (int64_t i = kSections * section; i < num_bytes; ++i) {
    result |= static_cast<unsigned char>(bytes[i]);
  }
  return result;
}

}  // namespace
}  // namespace simdiff
