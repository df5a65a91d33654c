"""Measure the quality of models: losses, perplexity, tasks, intervals, a journal of evaluations."""
