"""The namespace in which torch holds the operators: the one place that names it.

Hugging Face's kernel-builder puts a file with `ops` and `add_op_namespace_prefix` in the place of
this one, with a namespace for every build, so that several builds can be loaded in one process
(tools/hub_kernel.py). In C++ it is SIMDIFF_NAMESPACE of csrc/torch/stable_abi.h.
"""

import torch

NAMESPACE = "simdiff_kernels"

ops = getattr(torch.ops, NAMESPACE)
"""The operators by name, each with one overload per backend."""


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator, or of an overload: `"simdiff_kernels::fold"`."""
    return f"{NAMESPACE}::{op_name}"
