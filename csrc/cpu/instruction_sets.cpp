// Which instruction set is used: the widest that this processor runs, or the one that was selected.
#include <stdexcept>

#include "row_sums.h"

namespace simdiff {
namespace {

const InstructionSet*& selected() {
  static const InstructionSet* choice = [] {
    const InstructionSet* widest = &kBaseline;
    for (const InstructionSet* set : compiled_instruction_sets()) {
      if (set->runs_here()) widest = set;
    }
    return widest;
  }();
  return choice;
}

}  // namespace

const std::vector<const InstructionSet*>& compiled_instruction_sets() {
  static const std::vector<const InstructionSet*> sets = {
      &kBaseline,
#if defined(__x86_64__)
      &kAvx2,
      &kAvx512,
#elif defined(__aarch64__)
      &kNeon,
#endif
  };
  return sets;
}

const InstructionSet& selected_instruction_set() { return *selected(); }

void select_instruction_set(const std::string& name) {
  std::string choices;
  for (const InstructionSet* set : compiled_instruction_sets()) {
    if (!set->runs_here()) continue;
    if (name == set->name) {
      selected() = set;
      return;
    }
    choices += choices.empty() ? set->name : std::string(", ") + set->name;
  }
  throw std::invalid_argument("instruction set must be one of " + choices +
                              " on this processor, got '" + name + "'");
}

}  // namespace simdiff
