"""Speed: tokens per second in prefill and in decoding with the KV cache, models interleaved."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.progress import track

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


def measure_speed(
    models: Mapping[str, ModelContext],
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, Speed]:
    """Measure all models in one process, one after the other in every repetition.

    Interleaving lets a drift of the machine's clock or load touch all models alike. A first
    repetition warms up and is not counted.

    Args:
        models: for each name, a context manager that provides the model.
        prompt: token ids `(batch, sequence)`.
        new_tokens: decoded one at a time after the prompt.
        repeats: counted repetitions.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    rounds = [(name, turn) for turn in range(repeats + 1) for name in models]
    for name, turn in track(rounds, "speed"):
        with models[name]() as model:
            elapsed = _time_once(model, prompt, new_tokens)
        if turn:
            times[name].append(elapsed)
    batch, length = prompt.shape
    return {
        name: Speed(
            prefill=batch * length / statistics.median(t[0] for t in elapsed),
            decode=batch * new_tokens / statistics.median(t[1] for t in elapsed),
            prompt_tokens=length,
            new_tokens=new_tokens,
            repeats=repeats,
            num_threads=torch.get_num_threads(),
        )
        for name, elapsed in times.items()
    }


@torch.inference_mode()
def _time_once(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens after it."""
    device = model.get_input_embeddings().weight.device
    ids = prompt.to(device)
    start = _now(device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    middle = _now(device)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
