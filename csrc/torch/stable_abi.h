// Torch's stable ABI as of 2.10, so that one build serves torch 2.10 and later. The version is set
// here and not for the whole build: torch carries a copy of pybind11, first on the include path,
// and in 2.10 and 2.11 that copy refuses it. Files with operators include this, files with modules
// pybind11, none both.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
