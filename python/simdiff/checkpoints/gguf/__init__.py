"""Apply a plan to a GGUF file."""
