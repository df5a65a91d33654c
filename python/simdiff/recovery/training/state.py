"""The state with which an interrupted training resumes, bitwise as without the interruption."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.io.json_files import check_key
from simdiff.io.outputs import held_directory, write_bytes

STATE = "training.pt"
START = "start.safetensors"
"""File of the weights from which training started, if they are not those of the plain cut."""
SCHEMA_VERSION = 2


@dataclass
class TrainingState:
    """Everything on which the next step depends, and the best weights so far.

    The position in the data follows from `step`, the learning rate from `step` and `num_steps`.
    """

    num_steps: int
    """Number of steps in total; fixed once, so that a resumed run keeps the schedule."""
    evaluate_every: int
    """Number of steps between evaluations on the examples set apart; fixed with `num_steps`."""
    step: int = 0
    tokens: int = 0
    """Number of tokens read so far."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last evaluation."""
    waited: int = -1
    """Number of evaluations since the best one."""
    seconds: float = 0.0
    """Seconds spent in training, over all calls."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Of what is trained."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    """States of torch's generators, see `random_states`."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float = float("inf")
    curve: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each evaluation."""
    stopped: str | None = None
    """Says why training ended; None while it goes on."""

    def save(self, directory: Path, key: Mapping[str, Any]) -> None:
        """Write the state; at any moment the directory holds it or the previous one, complete."""
        buffer = io.BytesIO()
        torch.save(
            {"version": SCHEMA_VERSION, "key": json.loads(json.dumps(key)), "state": asdict(self)},
            buffer,
        )
        write_bytes(directory / STATE, buffer.getvalue())

    @classmethod
    def load(cls, directory: Path, key: Mapping[str, Any]) -> TrainingState | None:
        """Read the state of an earlier call; None if there is none.

        Raises:
            SimdiffError: the state is of another run, or is damaged.
        """
        path = directory / STATE
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            version, found, state = content["version"], content["key"], content["state"]
            if version != SCHEMA_VERSION:
                raise ValueError(f"version {version}")
            result = cls(**state)
        except Exception as error:  # torch's reader raises what the damage leads it to
            raise SimdiffError(
                f"{path}: must hold the state of a training run, but is damaged or of another "
                f"version ({type(error).__name__}): remove {directory} to start again"
            ) from None
        check_key(path, found, key)
        return result


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators that training uses."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Set torch's generators to the states that `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextlib.contextmanager
def training_directory(directory: Path) -> Iterator[None]:
    """Lock a training directory (`held_directory`) and remove partial files of killed runs."""
    with held_directory(directory, "training run"):
        for leftover in directory.glob(".*"):
            if leftover.name.startswith((f".{STATE}.", f".{START}.")):
                leftover.unlink()
        yield


def remove_state(directory: Path) -> None:
    """Remove the directory of a training run.

    Raises:
        SimdiffError: the directory holds files that a training does not write.
    """
    if directory.is_dir():
        names = [entry.name for entry in directory.iterdir()]
        others = [name for name in names if STATE not in name and START not in name]
        if others:
            raise SimdiffError(
                f"{directory} holds other files than training leaves ({others[0]}): not removed"
            )
        shutil.rmtree(directory)
