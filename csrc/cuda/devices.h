// What was compiled for the GPU, and whether a GPU here can run it.
#pragma once

#include <string>
#include <vector>

namespace simdiff::cuda {

// Compute capabilities times ten, e.g. 80 and 90; newer GPUs compile the last one's PTX.
std::vector<int> compiled_architectures();

// Of the CUDA runtime linked here, e.g. 13000.
int runtime_version();

// Why this device cannot run the kernels, or an empty string. Creates the device's context.
std::string device_problem(int device);

}  // namespace simdiff::cuda
