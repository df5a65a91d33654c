// Torch's stable ABI as of 2.10, so that one build serves torch 2.10 and later. The version is set
// here and not for the whole build, so that it comes before any header of torch. Files with
// operators include this, files with modules python_module.h, none both.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
