// simdiff_kernels._C: importing it loads the operators; its functions tell what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>

#include "../cpu/row_sums.h"
#include "torch_threads.h"

namespace {

std::vector<std::string> names(bool only_runnable) {
  std::vector<std::string> result;
  for (const simdiff::InstructionSet* set : simdiff::compiled_instruction_sets()) {
    if (!only_runnable || set->runs_here()) result.push_back(set->name);
  }
  return result;
}

// On torch's own threads, like the scorers.
uint64_t read_memory(uintptr_t before, uintptr_t after, int64_t num_bytes) {
  constexpr int64_t kPiece = int64_t{1} << 19;  // of each: what a thread is handed at a time
  const auto read = simdiff::selected_instruction_set().read_bytes;
  const auto *x = reinterpret_cast<const char*>(before), *y = reinterpret_cast<const char*>(after);
  std::atomic<uint64_t> seen{0};
  simdiff::on_torch_threads((num_bytes + kPiece - 1) / kPiece, [&](int64_t first, int64_t last) {
    uint64_t words = 0;
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * kPiece;
      words |= read(x + begin, y + begin, std::min(num_bytes - begin, kPiece));
    }
    seen |= words;
  });
  return seen;
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
  module.def("read_memory", &read_memory, pybind11::arg("before"), pybind11::arg("after"),
             pybind11::arg("num_bytes"),
             "Load num_bytes from each of two addresses once and return the bitwise or of all "
             "64-bit words: the limit that scoring is measured against.");
  module.attr("compiler") = __VERSION__;
}
