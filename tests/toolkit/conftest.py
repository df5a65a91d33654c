"""Small random-weight models, which prove plumbing, and the real demo model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from simdiff.models import load_model
from simdiff.scores import LayerScores, score

SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}


def tiny_config(family: str) -> object:
    rope = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48}
    if family == "llama":
        return LlamaConfig(**rope)
    if family == "qwen2":  # layers 3 to 5 use a sliding window, told by layer_types
        return Qwen2Config(**rope, use_sliding_window=True, sliding_window=4, max_window_layers=3)
    return GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4)


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def make_tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(tiny_config(family)).eval()


@pytest.fixture
def tiny(family: str) -> PreTrainedModel:
    return make_tiny(family)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_tiny("llama")


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    """A directory with a model and a tokenizer of words."""
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 97)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="w96"
    )
    path = tmp_path / "tiny"
    make_tiny("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny_text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 96, (40, 30), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{n}" for n in row) for row in numbers))
    return path


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
