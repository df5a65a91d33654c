// Torch's stable ABI as of 2.10, so that one build serves torch 2.10 and later. The version is set
// here and not for the whole build, so that it comes before any header of torch. Files with
// operators include this, files with modules python_module.h, none both.
#pragma once

#ifndef TORCH_TARGET_VERSION  // kernel-builder sets the oldest torch that it builds for
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// The namespace of the operators, that of simdiff_kernels/_ops.py. Each build for Hugging Face's
// hub has another (tools/hub_kernel.py): several may be loaded at once.
#ifndef SIMDIFF_NAMESPACE
#define SIMDIFF_NAMESPACE simdiff_kernels
#endif

// What torch's macro does, of a name that is a macro itself.
#define SIMDIFF_OPERATORS(name, device, library) STABLE_TORCH_LIBRARY_IMPL(name, device, library)
