"""Instructions, faults and whole kernels of ptxcheck itself."""
