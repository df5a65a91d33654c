"""What several test files need: models, files, texts and plans, and what looks at results."""
