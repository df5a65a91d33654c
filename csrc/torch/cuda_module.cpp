// simdiff_kernels._C_cuda: importing it loads the CUDA operators; its functions tell what was
// built.
// clang-format off: before any standard header, as CPython asks
#include "python_module.h"
// clang-format on

#include "../cuda/block_metrics.h"
#include "../cuda/devices.h"
#include "../cuda/row_sums.h"

namespace cuda = simdiff::cuda;

namespace {

simdiff::DType dtype_of(const std::string& dtype) {
  for (int i = 0; i < simdiff::kNumDTypes; ++i) {
    if (dtype == simdiff::kDTypeNames[i]) return static_cast<simdiff::DType>(i);
  }
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got " + dtype);
}

PyObject* compiled_architectures(PyObject*, PyObject*) {
  return simdiff::python_list(cuda::compiled_architectures(), PyLong_FromLong);
}

PyObject* device_problem(PyObject*, PyObject* arguments) {
  int index = 0;
  if (!PyArg_ParseTuple(arguments, "i", &index)) return nullptr;
  return simdiff::or_python_error(
      [&] { return PyUnicode_FromString(cuda::device_problem(index).c_str()); });
}

PyObject* row_shape(PyObject*, PyObject* arguments) {
  long long num_tokens = 0, hidden_size = 0;
  const char* dtype = nullptr;
  int aligned = 0, multiprocessors = 132, shared_bytes = 227 * 1024;
  if (!PyArg_ParseTuple(arguments, "LLsp|ii", &num_tokens, &hidden_size, &dtype, &aligned,
                        &multiprocessors, &shared_bytes)) {
    return nullptr;
  }
  return simdiff::or_python_error([&] {
    const cuda::RowDevice gpu{multiprocessors, shared_bytes, true};
    const auto shape = cuda::row_shape(num_tokens, hidden_size, dtype_of(dtype), aligned != 0, gpu);
    return Py_BuildValue("{s:i,s:i,s:i,s:i}", "row_lanes", shape.row_lanes, "stages", shape.stages,
                         "warps", shape.warps, "ctas", shape.ctas);
  });
}

struct BlockUpdate {
  long long num_tokens = 0, num_states = 0, hidden_size = 0;
  const char* dtype = nullptr;
  int absolute = 0;

  bool parse(PyObject* arguments) {
    return PyArg_ParseTuple(arguments, "LLLsp", &num_tokens, &num_states, &hidden_size, &dtype,
                            &absolute) != 0;
  }
};

PyObject* block_launch_shape(PyObject*, PyObject* arguments) {
  BlockUpdate update;
  if (!update.parse(arguments)) return nullptr;
  return simdiff::or_python_error([&] {
    const auto shape =
        cuda::block_launch_shape(update.num_tokens, update.num_states, update.hidden_size,
                                 dtype_of(update.dtype), update.absolute != 0);
    return Py_BuildValue("{s:L,s:i,s:i,s:i,s:i}", "tokens_at_once",
                         static_cast<long long>(shape.tokens_at_once), "num_ctas", shape.num_ctas,
                         "tokens_per_cta", shape.tokens_per_cta, "slice_bytes", shape.slice_bytes,
                         "units", shape.units);
  });
}

PyObject* block_scratch_words(PyObject*, PyObject* arguments) {
  BlockUpdate update;
  if (!update.parse(arguments)) return nullptr;
  return simdiff::or_python_error([&] {
    return PyLong_FromLongLong(cuda::block_scratch_words(update.num_tokens, update.num_states,
                                                         update.hidden_size, dtype_of(update.dtype),
                                                         update.absolute != 0));
  });
}

PyMethodDef functions[] = {
    {"compiled_architectures", compiled_architectures, METH_NOARGS, nullptr},
    {"device_problem", device_problem, METH_VARARGS,
     "Why a GPU, given by its index, cannot run the kernels; empty where it can."},
    {"row_shape", row_shape, METH_VARARGS,
     "row_shape(num_tokens, hidden_size, dtype, aligned, multiprocessors=132, "
     "shared_bytes=232448): "
     "how rows are dealt out on a GPU, an H100 where none is given: row_lanes, stages (0: no "
     "ring), "
     "warps of a CTA, ctas of a multiprocessor."},
    {"block_launch_shape", block_launch_shape, METH_VARARGS,
     "block_launch_shape(num_tokens, num_states, hidden_size, dtype, absolute): how "
     "accumulate_blocks deals the tokens out to CTAs (blocks of threads)."},
    {"block_scratch_words", block_scratch_words, METH_VARARGS,
     "block_scratch_words(num_tokens, num_states, hidden_size, dtype, absolute): int64 words that "
     "accumulate_blocks needs: the larger of two calls serves both."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    SIMDIFF_NAME_TEXT(SIMDIFF_EXTENSION_NAME),
    "CUDA scorers of simdiff_kernels and what is known about their build.",
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
  if (module == nullptr || PyModule_AddIntConstant(module, "max_states", cuda::kMaxStates) != 0 ||
      PyModule_AddIntConstant(module, "runtime_version", cuda::runtime_version()) != 0) {
    Py_CLEAR(module);
  }
  return module;
}
