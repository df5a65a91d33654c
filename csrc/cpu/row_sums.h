// The inner loop, one implementation per instruction set, chosen at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../common/layer_states.h"
#include "../common/metrics.h"
#include "block_sums.h"
#include "chunk.h"

namespace simdiff {

// Both rows of a token, of hidden_size contiguous entries each.
struct RowPair {
  const void* before;
  const void* after;
};

// Reads num_rows pairs of rows once and writes their sums. A row's sums do not depend on the rows
// that it is read with.
using RowSumsFunction = void (*)(const RowPair* rows, int64_t num_rows, int64_t hidden_size,
                                 RowSums* sums);

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  RowSumsFunction row_sums[kNumDTypes];  // indexed by DType
  // Turns the first num_tokens sums of a chunk into metrics.
  void (*measure)(Chunk& chunk, int64_t num_tokens, int64_t hidden_size);
  // Folds the used tokens into a state that has seen none; `padded` is a multiple of kTokenLanes.
  void (*fold)(const Chunk& chunk, int64_t padded, int64_t first_index, RunningState& state);
  // The bitwise or of all bytes: a pure read, for measurements.
  uint64_t (*read_bytes)(const void* data, int64_t num_bytes);
  BlockTokenFunction block_token[kNumDTypes];  // null: that of the baseline
};

extern const InstructionSet kBaseline;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

// Compiled in, narrowest first; those that this processor can run are a prefix.
const std::vector<const InstructionSet*>& compiled_instruction_sets();

// The one in use: the widest that runs here, until select_instruction_set lowers it.
const InstructionSet& selected_instruction_set();

// Throws std::invalid_argument, naming the choices, when `name` is unknown or does not run here.
void select_instruction_set(const std::string& name);

}  // namespace simdiff
