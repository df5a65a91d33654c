"""Text to token windows, and the demo's model and text."""
