"""Transformers models: load them, find their layers, read their configs, tell them apart."""
