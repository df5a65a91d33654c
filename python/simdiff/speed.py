"""Speed of a run's two models: tokens per second in prefill and in decoding, interleaved."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.decoding import Decoder, Generation
from simdiff.progress import track
from simdiff.speed_model import ModelSize, model_size, plain_ideal
from simdiff.speed_statistics import paired_ratio

ModelContext = Callable[[], contextlib.AbstractContextManager[PreTrainedModel]]


@dataclass(frozen=True)
class Speed:
    """Medians over the repetitions, in tokens per second."""

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int
    repeats: int
    num_threads: int
    ideal: dict[str, float] | None = None
    """How many times faster than the first model each phase can be, see `simdiff.speed_model`:
    prefill by flops, decode by bytes; None for the first model itself."""
    share_of_ideal: dict[str, float] | None = None
    """Median over repetitions of the measured ratio, by `ideal`."""


def measure_speed(
    models: Mapping[str, ModelContext],
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, Speed]:
    """Measure all models in one process, one after the other in every repetition.

    Interleaving lets a drift of the machine's clock or load touch all models alike; every second
    repetition goes through them backwards. A first one warms up and is not counted.

    Args:
        models: for each name, a context manager that provides the model; others are compared with
            the first.
        prompt: token ids `(batch, sequence)`.
        new_tokens: decoded one at a time after the prompt and the token that it gives.
        repeats: counted repetitions.
    """
    runs: dict[str, list[Generation]] = {name: [] for name in models}
    sizes: dict[str, ModelSize] = {}
    rounds = [
        (name, turn)
        for turn in range(repeats + 1)
        for name in (list(models) if turn % 2 == 0 else list(models)[::-1])
    ]
    for name, turn in track(rounds, "speed"):
        with models[name]() as model:
            sizes.setdefault(name, model_size(model))
            generation = Decoder(model).generate(prompt, new_tokens + 1)
        if turn:
            runs[name].append(generation)
    first = next(iter(models))
    return {
        name: _speed(prompt, new_tokens, runs[name])
        if name == first
        else _compared(prompt, new_tokens, runs, sizes, first, name)
        for name in models
    }


def _speed(
    prompt: Tensor,
    new_tokens: int,
    runs: list[Generation],
    ideal: dict[str, float] | None = None,
    share: dict[str, float] | None = None,
) -> Speed:
    batch, length = prompt.shape
    return Speed(
        prefill=batch * length / statistics.median(g.prefill_seconds for g in runs),
        decode=batch * new_tokens / statistics.median(g.decode_seconds for g in runs),
        prompt_tokens=length,
        new_tokens=new_tokens,
        repeats=len(runs),
        num_threads=torch.get_num_threads(),
        ideal=ideal,
        share_of_ideal=share,
    )


def _compared(
    prompt: Tensor,
    new_tokens: int,
    runs: Mapping[str, list[Generation]],
    sizes: Mapping[str, ModelSize],
    first: str,
    name: str,
) -> Speed:
    batch, length = prompt.shape
    ideal = plain_ideal(
        sizes[first], sizes[name], batch_size=batch, prompt_length=length, steps=new_tokens
    )
    seconds = {
        "prefill": lambda g: g.prefill_seconds,
        "decode": lambda g: g.decode_seconds,
    }
    share = {
        phase: paired_ratio([*map(of, runs[first])], [*map(of, runs[name])]).median / ideal[phase]
        for phase, of in seconds.items()
    }
    return _speed(prompt, new_tokens, runs[name], ideal, share)
