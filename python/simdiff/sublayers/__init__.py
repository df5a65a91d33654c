"""Attention and MLP sub-layers: find them, score them, plan with them, remove them in memory."""
