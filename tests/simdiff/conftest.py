"""Small random-weight models, which prove plumbing, and the real demo model."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.models.loading import load_model
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from support.tiny_models import (  # noqa: F401
    make_tiny,
    tiny_checkpoint,
    tiny_checkpoint_files,
    tiny_text,
)


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny(family: str) -> PreTrainedModel:
    return make_tiny(family)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_tiny("llama")


@pytest.fixture
def token_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (size, 11), generator=generator) for size in (3, 2)]


@pytest.fixture
def llama_scores(llama: PreTrainedModel, token_batches: list[torch.Tensor]) -> LayerScores:
    return score(llama, token_batches, name="tiny", progress=False)


@pytest.fixture(scope="session")
def demo() -> tuple[PreTrainedModel, object]:
    return load_model("demo", device="cpu")  # what tests compare it with is on the CPU


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(2))
