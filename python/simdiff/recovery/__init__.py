"""Recover quality after a cut: correct the kept weights in closed form, or train them."""
