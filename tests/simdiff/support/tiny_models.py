"""A tiny model with random weights, alone or in a directory with a tokenizer, and a text for it.

The fixtures are those of each `conftest.py` that imports them.
"""

from __future__ import annotations

import shutil
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

SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}


def tiny_config(family: str) -> object:
    rope = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48}
    if family == "llama":
        return LlamaConfig(**rope)
    if family == "qwen2":  # layers 3 to 5 use a sliding window, told by layer_types
        return Qwen2Config(**rope, use_sliding_window=True, sliding_window=4, max_window_layers=3)
    return GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4)


def make_tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(tiny_config(family)).eval()


@pytest.fixture(scope="session")
def tiny_checkpoint_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tiny_checkpoint` copies; it is made once."""
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 97)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="w96"
    )
    path = tmp_path_factory.mktemp("files") / "tiny"
    make_tiny("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny_checkpoint(tiny_checkpoint_files: Path, tmp_path: Path) -> Path:
    """A directory with a model and a tokenizer of words, w1 to w96, for the test to change."""
    torch.manual_seed(7)  # whatever was made before
    return shutil.copytree(tiny_checkpoint_files, tmp_path / "tiny")


@pytest.fixture
def tiny_text(tmp_path: Path) -> Path:
    """A file of 40 documents of 30 words of that tokenizer."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 96, (40, 30), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{n}" for n in row) for row in numbers))
    return path
