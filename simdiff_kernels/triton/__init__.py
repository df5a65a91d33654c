"""Triton kernels, one file per operator; importing a file imports triton."""
