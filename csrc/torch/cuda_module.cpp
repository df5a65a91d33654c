// simdiff_kernels._C_cuda: importing it loads the CUDA operators; its functions tell what was
// built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/block_metrics.h"
#include "../cuda/devices.h"
#include "../cuda/row_sums.h"

namespace cuda = simdiff::cuda;
namespace py = pybind11;

namespace {

simdiff::DType dtype_of(const std::string& dtype) {
  for (int i = 0; i < simdiff::kNumDTypes; ++i) {
    if (dtype == simdiff::kDTypeNames[i]) return static_cast<simdiff::DType>(i);
  }
  throw py::value_error("dtype must be float32, float64, bfloat16 or float16, got " + dtype);
}

py::dict row_shape(int64_t num_tokens, int64_t hidden_size, const std::string& dtype,
                   bool aligned) {
  const auto shape = cuda::row_shape(num_tokens, hidden_size, dtype_of(dtype), aligned);
  return py::dict(py::arg("row_lanes") = shape.row_lanes, py::arg("stages") = shape.stages,
                  py::arg("warps") = shape.warps);
}

py::dict block_launch_shape(int64_t num_tokens, int64_t num_states, int64_t hidden_size,
                            const std::string& dtype, bool absolute) {
  const auto shape =
      cuda::block_launch_shape(num_tokens, num_states, hidden_size, dtype_of(dtype), absolute);
  return py::dict(py::arg("tokens_at_once") = shape.tokens_at_once,
                  py::arg("num_ctas") = shape.num_ctas,
                  py::arg("tokens_per_cta") = shape.tokens_per_cta,
                  py::arg("slice_bytes") = shape.slice_bytes, py::arg("units") = shape.units);
}

int64_t block_scratch_words(int64_t num_tokens, int64_t num_states, int64_t hidden_size,
                            const std::string& dtype, bool absolute) {
  return cuda::block_scratch_words(num_tokens, num_states, hidden_size, dtype_of(dtype), absolute);
}

}  // namespace

PYBIND11_MODULE(SIMDIFF_EXTENSION_NAME, module) {
  module.doc() = "CUDA scorers of simdiff_kernels and what is known about their build.";
  module.def("compiled_architectures", &cuda::compiled_architectures);
  module.def("device_problem", &cuda::device_problem,
             "Why a GPU, given by its index, cannot run the kernels; empty where it can.");
  module.def("row_shape", &row_shape,
             "How rows are dealt out to lanes: row_lanes, stages (0: no ring), warps.");
  module.def("block_launch_shape", &block_launch_shape,
             "How accumulate_blocks deals the tokens out to CTAs (blocks of threads).");
  module.def("block_scratch_words", &block_scratch_words,
             "int64 words that accumulate_blocks needs: the larger of two calls serves both.");
  module.attr("max_states") = cuda::kMaxStates;
  module.attr("runtime_version") = cuda::runtime_version();
}
