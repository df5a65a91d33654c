"""Files that appear whole or not at all, JSON with a schema, progress, the machine's name."""
