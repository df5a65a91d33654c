// simdiff_kernels._C: importing it loads the operators; its functions tell what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/row_sums.h"

namespace {

std::vector<std::string> names(bool only_runnable) {
  std::vector<std::string> result;
  for (const simdiff::InstructionSet* set : simdiff::compiled_instruction_sets()) {
    if (!only_runnable || set->runs_here()) result.push_back(set->name);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(SIMDIFF_EXTENSION_NAME, module) {
  module.doc() = "Compiled scorers of simdiff_kernels and what is known about their build.";
  module.def("compiled_instruction_sets", [] { return names(false); });
  module.def("available_instruction_sets", [] { return names(true); });
  module.def("selected_instruction_set",
             [] { return std::string(simdiff::selected_instruction_set().name); });
  module.def("select_instruction_set", &simdiff::select_instruction_set,
             "Use the named instruction set; ValueError names the choices.");
  module.attr("compiler") = __VERSION__;
}
