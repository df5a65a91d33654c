"""Training examples for a pruned model: windows of text, or instructions with answers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simdiff.data.documents import Text, json_records
from simdiff.data.text import token_windows
from simdiff.errors import SimdiffError

_ALL = 2**40

# Prompts of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), on which LLM-Pruner,
# Shortened LLaMA and the paper train.
_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
_WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
{instruction}

### Response:
"""


@dataclass(frozen=True)
class Examples:
    """Training examples of equal length, with masks of padding and of predicted tokens."""

    tokens: Tensor
    """Token ids, `(num_examples, length)`, int64."""
    mask: Tensor
    """Mask of the same shape, bool: False for padding, which is at the end."""
    counted: Tensor
    """Mask of the same shape, bool: tokens whose prediction counts, never the first one."""
    identity: dict[str, Any]
    """Identity of the source, for the record."""

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.mask.sum())

    def take(self, indices: Tensor | slice) -> Examples:
        """Some of the examples, without columns that are padding in all of these."""
        mask = self.mask[indices]
        length = int(mask.sum(dim=1).max())
        return Examples(
            self.tokens[indices, :length],
            mask[:, :length],
            self.counted[indices, :length],
            self.identity,
        )

    def set_apart(self, count: int) -> tuple[Examples, Examples]:
        """Divide the examples into all but the last `count`, and the last `count`.

        Raises:
            SimdiffError: too few examples would be left to train on.
        """
        if not 0 < count < len(self):
            raise SimdiffError(
                f"examples set apart must number 1 to {len(self) - 1} of {len(self)} in this text, "
                f"got {count}"
            )
        return self.take(slice(None, -count)), self.take(slice(-count, None))

    def digest(self) -> str:
        """SHA-256 over all tokens and over the mask of those that count."""
        digest = hashlib.sha256()
        for tensor in (self.tokens, self.mask, self.counted):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def cut_windows(windows: Tensor, length: int, identity: Mapping[str, Any]) -> Examples:
    """Make examples of up to `length` tokens from token windows `(num_windows, window_length)`."""
    length = min(length, windows.shape[1])
    pieces = windows.shape[1] // length
    tokens = windows[:, : pieces * length].reshape(-1, length)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    counted = mask.clone()
    counted[:, 0] = False
    return Examples(tokens, mask, counted, {"kind": "windows", "length": length, **identity})


def training_examples(
    source: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 512,
    seed: int = 0,
    num_examples: int | None = None,
    train_on_prompts: bool = False,
) -> Examples:
    """Make training examples from a source.

    A .json or .jsonl file of objects with "instruction", "output" and optionally "input" gives one
    example for each, shuffled; its prompt is not predicted. Any other source is text and gives the
    windows of its calibration half, so that the other half stays unseen.

    Args:
        source: a source for `simdiff.data.documents.read_documents`, or a file of instructions.
        tokenizer: tokenizer of the model.
        length: number of tokens in a window; longer examples are truncated to it.
        seed: seed of the division of the text, or of the shuffle.
        num_examples: upper limit of the number of examples; None takes all.
        train_on_prompts: predict the instructions too.

    Raises:
        SimdiffError: the file does not exist or is empty, or the text is shorter than one window.
    """
    if num_examples is not None and num_examples < 1:
        raise SimdiffError(f"training examples must number at least 1, got {num_examples}")
    records = read_instructions(source)
    if records is None:
        windows = token_windows(
            source, tokenizer, num_windows=num_examples or _ALL, window_length=length, seed=seed
        )
        return cut_windows(windows.tokens, length, windows.identity.to_dict())
    random.Random(seed).shuffle(records)
    examples = _instruction_examples(records[:num_examples], tokenizer, length, train_on_prompts)
    examples.identity.update(source=source, seed=seed)
    return examples


def read_instructions(source: Text) -> list[dict[str, str]] | None:
    """Read the records of an instruction file; None for a source of another kind.

    Raises:
        SimdiffError: some records are instructions and others are not.
    """
    if not isinstance(source, (str, Path)) or not Path(source).is_file():
        return None
    found = json_records(Path(source))
    if found is None:
        return None
    records = [record for _, record in found]
    instructions = [isinstance(r, dict) and {"instruction", "output"} <= r.keys() for r in records]
    if not any(instructions):
        return None
    if not all(instructions):
        raise SimdiffError(
            f'text {source}: all records must have "instruction" and "output", record '
            f"{instructions.index(False) + 1} has not"
        )
    keys = ("instruction", "input", "output")
    return [{key: str(record.get(key) or "") for key in keys} for record in records]


def _instruction_examples(
    records: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    train_on_prompts: bool,
) -> Examples:
    rows: list[tuple[list[int], int]] = []
    for record in records:
        template = _WITH_INPUT if record["input"] else _WITHOUT_INPUT
        prompt = tokenizer(template.format_map(record)).input_ids
        answer = tokenizer(record["output"], add_special_tokens=False).input_ids
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*prompt, *answer, *end][:length]
        first = 1 if train_on_prompts else max(1, len(prompt))
        if len(ids) > first:  # else the prompt alone fills the length
            rows.append((ids, first))
    if not rows:
        raise SimdiffError(
            f"training examples must have an answer within {length} tokens, got none of "
            f"{len(records)}"
        )
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, counted = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens).bool()
    for row, (ids, first) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
        counted[row, first : len(ids)] = True
    return Examples(
        tokens,
        mask,
        counted,
        {
            "kind": "instructions",
            "num_examples": len(rows),
            "num_left_out": len(records) - len(rows),
            "length": longest,
            "train_on_prompts": train_on_prompts,
        },
    )


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Indices of the examples of a step; the order of every epoch depends only on the seed.

    A batch may extend over the end of an epoch, so that all batches have one size.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // num_examples for position in positions}
    orders = {epoch: _order(num_examples, seed, epoch) for epoch in epochs}
    return torch.tensor([orders[p // num_examples][p % num_examples] for p in positions])


def _order(num_examples: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_examples))
    random.Random(f"epoch {epoch} of seed {seed}").shuffle(order)
    return order
