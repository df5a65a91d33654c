"""Protocols of a benchmark: batch sizes, lengths, repetitions, presets, memory and time limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from simdiff.errors import SimdiffError
from simdiff.models.config import text_part
from simdiff.speed.ideal import ModelSize, cache_bytes


@dataclass(frozen=True)
class Setting:
    """One setting of a benchmark: a batch size with a prompt length."""

    batch_size: int
    prompt_length: int
    new_tokens: int
    """Number of new tokens; the first is from the prefill, each other from a step."""

    def __str__(self) -> str:
        """The setting in words."""
        return f"batch {self.batch_size}, prompt {self.prompt_length}, {self.new_tokens} new tokens"


@dataclass(frozen=True)
class Protocol:
    """Settings of a benchmark; every batch size is measured with every prompt length."""

    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (128,)
    new_tokens: int = 64
    repeats: int = 7
    """Number of counted rounds, each with a generation of both models."""
    warm_up: int = 2
    """Number of rounds before them, which are not counted."""
    max_seconds: float | None = None
    """Time limit of the whole benchmark; if a probe expects more, fewer tokens are generated."""
    compiled: bool = False
    graphs: bool = True
    seed: int = 0
    """Seed of the prompts, which are random tokens: their text does not matter for speed."""

    def settings(self) -> list[Setting]:
        """All settings, in the order in which they are measured."""
        return [
            Setting(batch, length, self.new_tokens)
            for batch in self.batch_sizes
            for length in self.prompt_lengths
        ]

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse settings that cannot be measured.

        Args:
            config: of the model.

        Raises:
            SimdiffError: a number is out of range, or there are more tokens than positions.
        """
        least = {
            "batch sizes": (self.batch_sizes, 1),
            "prompt lengths": (self.prompt_lengths, 1),
            "new tokens": ((self.new_tokens,), 2),
            "repeats": ((self.repeats,), 1),
            "warm-up": ((self.warm_up,), 0),
        }
        for name, (values, lowest) in least.items():
            if not values or min(values) < lowest:
                got = ",".join(map(str, values)) or "none"
                raise SimdiffError(f"{name} must be at least {lowest}, got {got}")
        if self.max_seconds is not None and not 0 < self.max_seconds < math.inf:
            raise SimdiffError(f"max seconds must be above 0, got {self.max_seconds:g}")
        positions = getattr(text_part(config), "max_position_embeddings", None)
        longest = max(self.prompt_lengths) + self.new_tokens
        if positions is not None and longest > positions:
            raise SimdiffError(
                f"prompt and new tokens must be at most the {positions} positions of the model "
                f"together, got {max(self.prompt_lengths)} + {self.new_tokens} = {longest}"
            )


PRESETS = {
    # arXiv 2604.19520, Section 4: batch 16, prompt 4, 2048 generated tokens.
    "paper": Protocol((16,), (4,), 2048, repeats=3, warm_up=1, max_seconds=600.0),
}


def memory_needed(size: ModelSize, setting: Setting) -> int:
    """Bytes needed in addition to the weights: KV cache, a copy of one layer's, activations.

    The dynamic cache makes a longer copy of a layer's keys and values in every step. The
    activations of prefill are those of one layer, about 12 hidden states, and the last logits.
    """
    cache = cache_bytes(size, setting.batch_size, setting.prompt_length + setting.new_tokens)
    states = 12 * setting.prompt_length * size.hidden_size + size.vocab_size
    copy = cache // size.num_layers
    return cache + copy + setting.batch_size * states * size.bytes_per_entry


def check_memory(sizes: Mapping[str, ModelSize], setting: Setting, available: int | None) -> None:
    """Refuse a setting that does not fit into memory; models run by turns, so the larger counts.

    Raises:
        SimdiffError: the setting needs more memory than is available.
    """
    needed = max(memory_needed(size, setting) for size in sizes.values())
    if available is not None and needed > available:
        raise SimdiffError(
            f"{setting}: must fit into memory, but takes {needed / 1e9:.1f} GB beside the weights, "
            f"mostly KV cache, of {available / 1e9:.1f} GB available: lower the batch size or the "
            "number of tokens"
        )


def tokens_within(
    setting: Setting,
    seconds: float,
    rounds: int,
    first_steps: float,
    last_steps: float,
    prefills: float,
) -> int:
    """The number of new tokens that fit into a time, at most that of the setting.

    The time of a step is assumed to grow linearly with its context from the first to the last step
    of the setting, so that n of `steps` steps take n·first + (last − first)·n²/(2·steps).

    Args:
        setting: the wanted setting.
        seconds: time for all rounds.
        rounds: number of rounds, each with a generation of every model.
        first_steps, last_steps: seconds of a step at the shortest and the longest context, summed
            over the models.
        prefills: seconds of the prefill, summed over the models.
    """
    steps = setting.new_tokens - 1
    slope = max(last_steps - first_steps, 0.0) / (2 * steps)

    def fits(count: int) -> bool:
        return rounds * (prefills + count * first_steps + slope * count**2) <= seconds

    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low + 1
