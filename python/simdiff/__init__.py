"""Depth pruning of language models: calibrate, score, plan, prune, evaluate, report."""
