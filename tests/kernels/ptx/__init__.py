"""The GPU kernels as compiled, executed without a GPU by `tools/ptxcheck`."""
