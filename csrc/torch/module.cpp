// simdiff_kernels._C: importing it loads the operators; its functions tell what was built.
// clang-format off: before any standard header, as CPython asks
#include "python_module.h"
// clang-format on

#include <algorithm>
#include <atomic>

#include "../cpu/row_sums.h"
#include "torch_threads.h"

namespace {

PyObject* names(bool only_runnable) {
  std::vector<const char*> result;
  for (const simdiff::InstructionSet* set : simdiff::compiled_instruction_sets()) {
    if (!only_runnable || set->runs_here()) result.push_back(set->name);
  }
  return simdiff::python_list(result, PyUnicode_FromString);
}

PyObject* compiled_instruction_sets(PyObject*, PyObject*) { return names(false); }

PyObject* available_instruction_sets(PyObject*, PyObject*) { return names(true); }

PyObject* selected_instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(simdiff::selected_instruction_set().name);
}

PyObject* select_instruction_set(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(arguments, "s", &name)) return nullptr;
  return simdiff::or_python_error([&] {
    simdiff::select_instruction_set(name);
    return Py_BuildValue("");
  });
}

// On torch's own threads, like the scorers.
PyObject* read_memory(PyObject*, PyObject* arguments) {
  constexpr int64_t kPiece = int64_t{1} << 19;  // of each: what a thread is handed at a time
  unsigned long long before = 0, after = 0;
  long long num_bytes = 0;
  if (!PyArg_ParseTuple(arguments, "KKL", &before, &after, &num_bytes)) return nullptr;
  const auto read = simdiff::selected_instruction_set().read_bytes;
  const auto *x = reinterpret_cast<const char*>(static_cast<uintptr_t>(before)),
             *y = reinterpret_cast<const char*>(static_cast<uintptr_t>(after));
  std::atomic<uint64_t> seen{0};
  simdiff::on_torch_threads((num_bytes + kPiece - 1) / kPiece, [&](int64_t first, int64_t last) {
    uint64_t words = 0;
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * kPiece;
      words |= read(x + begin, y + begin, std::min<int64_t>(num_bytes - begin, kPiece));
    }
    seen |= words;
  });
  return PyLong_FromUnsignedLongLong(seen);
}

PyMethodDef functions[] = {
    {"compiled_instruction_sets", compiled_instruction_sets, METH_NOARGS, nullptr},
    {"available_instruction_sets", available_instruction_sets, METH_NOARGS, nullptr},
    {"selected_instruction_set", selected_instruction_set, METH_NOARGS, nullptr},
    {"select_instruction_set", select_instruction_set, METH_VARARGS,
     "Use the named instruction set; ValueError names the choices."},
    {"read_memory", read_memory, METH_VARARGS,
     "read_memory(before, after, num_bytes): load num_bytes from each of two addresses once and "
     "return the bitwise or of all 64-bit words: the limit that scoring is measured against."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    SIMDIFF_NAME_TEXT(SIMDIFF_EXTENSION_NAME),
    "Compiled scorers of simdiff_kernels and what is known about their build.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC SIMDIFF_INIT_NAME(SIMDIFF_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "compiler", __VERSION__) != 0) {
    Py_CLEAR(module);
  }
  return module;
}
