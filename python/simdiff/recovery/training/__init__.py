"""Train the kept weights on text or on the dense model's predictions."""
