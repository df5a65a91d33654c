"""What trainings of the tiny model start from."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.recovery.training.data import Examples, cut_windows
from support.own_text import decided, drawn
from support.tiny_models import make_tiny


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dense() -> PreTrainedModel:
    return decided(make_tiny("llama"))


@pytest.fixture(scope="session")
def examples() -> Examples:
    """Drawn from the model of `dense`, once."""
    return cut_windows(drawn(decided(make_tiny("llama")), 80, 24), 24, {"source": "own"})


@pytest.fixture
def text(examples: Examples) -> tuple[Examples, Examples]:
    """What is trained on and what is set apart."""
    return examples.set_apart(16)
