"""Solve for output projections with which pruned layers reproduce the dense model's states."""
