// simdiff_kernels._C_cuda: importing it loads the CUDA operators; its functions tell what was
// built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/devices.h"
#include "../cuda/layer_metrics.h"

namespace cuda = simdiff::cuda;

PYBIND11_MODULE(SIMDIFF_EXTENSION_NAME, module) {
  module.doc() = "CUDA scorers of simdiff_kernels and what is known about their build.";
  module.def("compiled_architectures", &cuda::compiled_architectures);
  module.def("device_problem", &cuda::device_problem,
             "Why a GPU, given by its index, cannot run the kernels; empty where it can.");
  module.def(
      "launch_shape",
      [](int64_t num_tokens, int64_t hidden_size, const std::string& dtype) {
        const char* names[] = {"float32", "float64", "bfloat16", "float16"};
        for (int i = 0; i < simdiff::kNumDTypes; ++i) {
          if (dtype != names[i]) continue;
          const auto type = static_cast<simdiff::DType>(i);
          const auto shape = cuda::launch_shape(num_tokens, hidden_size, type);
          return pybind11::dict(pybind11::arg("blocks") = shape.blocks,
                                pybind11::arg("threads") = shape.threads,
                                pybind11::arg("warps_per_row") = shape.warps_per_row,
                                pybind11::arg("tokens_per_group") = shape.tokens_per_group);
        }
        throw pybind11::value_error("dtype must be float32, float64, bfloat16 or float16, got " +
                                    dtype);
      },
      "How the tokens are dealt out to blocks and warps.");
  module.attr("runtime_version") = cuda::runtime_version();
  module.attr("scratch_words") = cuda::kScratchWords;
}
