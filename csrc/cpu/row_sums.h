// The inner loops of all scorers on the CPU, compiled once for each instruction set and chosen at
// run time. Of a token's rows x and y, d = y - x, sum_rows forms sum x^2, sum y^2, sum d^2, sum
// |d|.
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

// Reads num_rows pairs of rows once: their sums go into the chunk. A row's result does not depend
// on the rows that it is read with.
using SumRows = void (*)(const RowPair* rows, int64_t num_rows, int64_t hidden_size, Chunk& chunk);

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  int rows_together;             // how many rows sum_rows reads side by side
  SumRows sum_rows[kNumDTypes];  // indexed by DType
  // The metrics of the first num_rows rows of a chunk, from their sums.
  void (*measure)(Chunk& chunk, int64_t num_rows, int64_t hidden_size);
  // Folds the used rows into a state that has seen none, argmax counting the chunk's rows; `padded`
  // is a multiple of kTokenLanes.
  void (*fold)(const Chunk& chunk, int64_t padded, RunningState& state);
  // The bitwise or of num_bytes bytes from each pointer: a pure read, for measurements.
  uint64_t (*read_bytes)(const void* before, const void* after, int64_t num_bytes);
  // Without and with the absolute difference of all pairs; null: that of the baseline.
  BlockTokenFunction block_token[2][kNumDTypes];
};

extern const InstructionSet kBaseline;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#elif defined(__aarch64__)
extern const InstructionSet kNeon;
#endif

// Compiled in, narrowest first; those that this processor can run are a prefix.
const std::vector<const InstructionSet*>& compiled_instruction_sets();

// The one in use: the widest that runs here, until select_instruction_set lowers it.
const InstructionSet& selected_instruction_set();

// Throws std::invalid_argument, naming the choices, when `name` is unknown or does not run here.
void select_instruction_set(const std::string& name);

}  // namespace simdiff
