"""Measure the speed of models and compare it with the ideal."""
