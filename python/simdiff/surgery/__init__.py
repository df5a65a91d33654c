"""Remove layers from a model and its config in memory, and prove the result by the stock class."""
