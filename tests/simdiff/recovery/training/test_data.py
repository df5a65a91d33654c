"""What is trained on: which tokens count, what is padding, and the order of examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from simdiff.data.text import token_windows
from simdiff.errors import SimdiffError
from simdiff.recovery.training.data import batch_indices, cut_windows, training_examples

RECORDS = [
    {"instruction": "w5 w6", "input": "w7", "output": "w8 w9"},
    {"instruction": "w10", "input": "", "output": "w11 w12 w13"},
    {"instruction": "w1 " * 200, "output": "w2"},
]


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> object:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_of_instructions_only_answers_count(kind: str, tokenizer: object, tmp_path: Path) -> None:
    path = tmp_path / f"alpaca.{kind}"
    lines = [json.dumps(record) for record in RECORDS]
    path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    examples = training_examples(str(path), tokenizer, length=100)
    assert examples.identity["num_left_out"] == 1, "the third one's answer lies beyond the length"
    answers = {
        tuple(tokens[counted].tolist())
        for tokens, counted in zip(examples.tokens, examples.counted, strict=True)
    }
    end = tokenizer.eos_token_id
    assert answers == {(8, 9, end), (11, 12, 13, end)}
    for tokens, mask, counted in zip(examples.tokens, examples.mask, examples.counted, strict=True):
        length = int(mask.sum())
        assert mask[:length].all(), "padding stands at the end"
        assert counted[:length].nonzero().max() == length - 1
        assert not counted[length:].any()
        assert "Response" not in tokenizer.decode(tokens[counted])
    both = training_examples(str(path), tokenizer, length=100, train_on_prompts=True)
    assert torch.equal(both.counted.sum(1), both.mask.sum(1) - 1)


def test_some_records_are_no_instructions(tokenizer: object, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + '\n{"text": "w1"}\n')
    with pytest.raises(SimdiffError, match='"instruction" and "output", record 2'):
        training_examples(str(path), tokenizer)


def test_text_gives_its_calibration_half(tokenizer: object, tiny_text: Path) -> None:
    examples = training_examples(str(tiny_text), tokenizer, length=16, seed=3)
    half = token_windows(str(tiny_text), tokenizer, num_windows=10**6, window_length=16, seed=3)
    assert torch.equal(examples.tokens, half.tokens)
    assert not examples.counted[:, 0].any()
    assert examples.counted[:, 1:].all()
    train, apart = examples.set_apart(5)
    assert torch.equal(torch.cat([train.tokens, apart.tokens]), half.tokens)
    number = len(half.tokens)
    assert len(examples.set_apart(number - 1)[0]) == 1
    for count in (0, number, -1):
        told = f"must number 1 to {number - 1} of {number} in this text, got {count}$"
        with pytest.raises(SimdiffError, match=told):
            examples.set_apart(count)


def test_windows_are_cut(tokenizer: object) -> None:
    windows = torch.arange(64).view(2, 32)
    assert torch.equal(cut_windows(windows, 16, {}).tokens, torch.arange(64).view(4, 16))
    assert cut_windows(windows, 20, {}).tokens.shape == (2, 20)
    assert cut_windows(windows, 99, {}).tokens.shape == (2, 32)


def test_every_epoch_reads_each_example_once_in_an_order_of_its_own() -> None:
    steps = [batch_indices(7, 3, step, seed=1) for step in range(14)]
    assert {len(step) for step in steps} == {3}
    epochs = torch.cat(steps).view(6, 7)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(7))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 6
    assert torch.equal(batch_indices(7, 3, 5, seed=1), steps[5])
    assert any(not torch.equal(batch_indices(7, 3, step, seed=2), steps[step]) for step in range(3))
