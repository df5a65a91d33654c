"""Errors that a user can act on; the command prints them without a traceback and exits with 2."""

from __future__ import annotations


class SimdiffError(ValueError):
    """Raised for input that cannot be used; the message says what was expected and what came."""


class SurgeryError(SimdiffError):
    """The cut would leave a model that stock transformers cannot express."""
