"""All blocks of layers from the states of one batch: checked, then timed beside a read of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import timing
import torch
from torch import Tensor

from gpu.steps import LeftOutError, Result, Settings, Step
from simdiff_kernels import RunningBlockScores
from simdiff_kernels.testing import check_token_blocks, joined_state

# A LLaMA-3.1-8B and one batch of its calibration.
NUM_STATES, TOKENS, HIDDEN_SIZE = 33, (8, 2048), 4096
# Real models begin with short embeddings; random ones hardly change their states, so that nearly
# every pair is far from orthogonal and many need sums in float64.
VARIANTS = {
    "a walk of steps of 0.2": (0.2, 1.0),
    "first state 100 times shorter, steps of 0.01": (0.01, 0.01),
}


def steps(settings: Settings) -> list[Step]:
    """One for each kind of states."""
    return [
        Step("blocks", name, 0 if settings.quick else 12, partial(_measure, settings, *variant))
        for name, variant in VARIANTS.items()
    ]


def states_of(
    num_states: int, shape: tuple[int, ...], step: float, first: float, device: str
) -> Tensor:
    """bfloat16 states, each a random step from the one before; the first is then shortened."""
    generator = torch.Generator(device).manual_seed(1)
    states = torch.empty(num_states, *shape, device=device, dtype=torch.bfloat16)
    states[0].normal_(generator=generator)
    for before, after in pairwise(states):
        after.normal_(generator=generator).mul_(step).add_(before)
    states[0].mul_(first)
    return states


def wrong_blocks(states: Tensor, backend: str) -> str | None:
    """What is wrong with the metrics of the first, a middle and the last token, if anything is."""
    rows = states.flatten(1, -2)
    for token in sorted({0, rows.shape[1] // 2, rows.shape[1] - 1}):
        scores = RunningBlockScores(len(states) - 1, backend=backend)
        mask = torch.zeros(rows.shape[1], dtype=torch.bool, device=states.device)
        mask[token] = True
        scores.update(list(rows), mask)
        try:
            moments = joined_state(scores)["moments"]
            token_states = [row[token] for row in rows]
            check_token_blocks(moments, token_states, short_sums=True, absolute=False)
        except AssertionError as error:
            return f"{backend}, token {token}: {error}"
    return None


def _measure(settings: Settings, step: float, first: float, left: object) -> Iterator[Result]:
    backend, device = settings.backends[0], settings.device
    if device == "cuda" and backend != "cuda":
        raise LeftOutError("blocks run on the backend cuda, which is not available here")
    sizes = (4, (2, 9), 40) if settings.quick else (NUM_STATES, TOKENS, HIDDEN_SIZE)
    num_states, tokens, hidden_size = sizes
    states = states_of(num_states, (*tokens, hidden_size), step, first, device)
    result = {"backend": backend, "num_states": num_states, "tokens": tokens}
    result |= {"hidden_size": hidden_size, "bytes": states.nbytes}
    wrong = wrong_blocks(states, backend)
    if wrong is not None:
        yield result | {"wrong": wrong}
        return
    halves = states.flatten().split(states.numel() // 2)[:2]
    _, read = timing.pure_read([halves], device)
    scores, separate = RunningBlockScores(num_states - 1, backend=backend), list(states)
    seconds = timing.device_seconds(lambda x, y: scores.update(separate), [halves], device)
    yield result | {"read_seconds": read, "seconds": seconds, "share": read / seconds}
