"""Apply a plan to checkpoint files: read headers, stream tensors, load no weights."""
