"""All blocks of layers in one pass on a GPU: checked, timed, compared with a forward.

Part of `make gpu-check`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simdiff_kernels import RunningBlockScores
from simdiff_kernels.ops import has_implementation
from simdiff_kernels.testing import check_token_blocks


def random_states(shape: dict[str, Any], tokens: tuple[int, int], device: str) -> list[Tensor]:
    """bfloat16 states of a model of this shape that change a little from layer to layer."""
    generator = torch.Generator(device).manual_seed(1)
    size = (*tokens, shape["hidden_size"])
    states = [torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)]
    for _ in range(shape["num_hidden_layers"]):
        noise = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
        states.append(states[-1] + 0.2 * noise)
    return states


def wrong_blocks(states: list[Tensor], backend: str) -> str | None:
    """What is wrong with the metrics of the first and the last token, if anything is."""
    rows = [state.flatten(0, 1) for state in states]
    for token in (0, rows[0].shape[0] - 1):
        scores = RunningBlockScores(len(states) - 1, backend=backend, absolute_difference=True)
        single = [row[token : token + 1] for row in rows]
        scores.update(single)
        try:
            moments = scores.state_dict()["moments"]
            check_token_blocks(moments, [row[0] for row in single], short_sums=True)
        except AssertionError as error:
            return f"{backend}, all blocks: {error}"
    return None


def measure_blocks(
    forward: dict[str, Any], repeats: int, device: str, seconds_of: Callable[[Any, str], float]
) -> dict[str, Any] | None:
    """Seconds of an update by one batch beside the bare forward; None without the operator."""
    backend = forward["backend"]
    if not has_implementation("accumulate_blocks", backend, torch.device(device)):
        return None
    states = random_states(forward["shape"], tuple(forward["tokens"]), device)
    found = {"backend": backend, "num_states": len(states), "tokens": forward["tokens"]}
    wrong = wrong_blocks(states, backend)
    if wrong is not None:
        return found | {"wrong": wrong}
    scores = RunningBlockScores(len(states) - 1, backend=backend)
    times = [seconds_of(lambda: scores.update(states), device) for _ in range(repeats + 1)][1:]
    seconds = statistics.median(times)
    states_bytes = sum(state.numel() * state.element_size() for state in states)
    return found | {
        "seconds": seconds,
        "gb_per_second": states_bytes / seconds / 1e9,
        "share": seconds / forward["bare_seconds"],
    }


def block_lines(blocks: list[dict[str, Any]]) -> list[str]:
    """The table that people read."""
    lines = [
        "| all blocks | backend | s | GB/s | share of the bare forward |",
        "|---|---|---|---|---|",
    ]
    for row in blocks:
        what = f"{row['num_states']} states, {row['tokens']} tokens"
        if "wrong" in row:
            lines.append(f"| {what} | {row['backend']} | WRONG, not timed: {row['wrong']} | | |")
        else:
            lines.append(f"| {what} | {row['backend']} | {row['seconds']:.4f} "
                         f"| {row['gb_per_second']:.0f} | {row['share']:.2%} |")  # fmt: skip
    return lines
