"""What a training run must remember to go on after an interruption, bit for bit as without it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.files import write_bytes
from simdiff.journal import check_key

STATE = "training.pt"
START = "start.safetensors"
"""Weights that training started from, where they are not those of the plain cut."""
SCHEMA_VERSION = 1


@dataclass
class TrainingState:
    """Everything that the next step depends on, and the best that there was.

    The data's position follows from `step`, the learning rate from `step` and `num_steps`.
    """

    num_steps: int
    """In all; settled once, so that a resumed run keeps the schedule."""
    evaluate_every: int
    """Steps between evaluations on what is set apart; settled with `num_steps`."""
    step: int = 0
    tokens: int = 0
    """Read so far."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last evaluation."""
    waited: int = -1
    """Evaluations since the best one."""
    seconds: float = 0.0
    """Spent in training, over all calls."""
    adapters: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    """States of torch's generators, see `random_states`."""
    best_adapters: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float = float("inf")
    curve: list[dict[str, Any]] = field(default_factory=list)
    """A point for each evaluation."""
    stopped: str | None = None
    """Why training is over; None while it is not."""

    def save(self, directory: Path, key: Mapping[str, Any]) -> None:
        """Write the state; at any moment the directory holds this one or the one before, whole."""
        buffer = io.BytesIO()
        torch.save(
            {"version": SCHEMA_VERSION, "key": json.loads(json.dumps(key)), "state": asdict(self)},
            buffer,
        )
        write_bytes(directory / STATE, buffer.getvalue())

    @classmethod
    def load(cls, directory: Path, key: Mapping[str, Any]) -> TrainingState | None:
        """The state that an earlier call left, or None.

        Raises:
            SimdiffError: it belongs to another run, or is damaged.
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
        except (
            EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError,
            pickle.UnpicklingError, zipfile.BadZipFile,
        ) as error:  # fmt: skip
            raise SimdiffError(
                f"{path}: must hold the state of a training run, but is damaged or of another "
                f"version ({type(error).__name__}): remove {directory} to start again"
            ) from None
        check_key(path, found, key)
        return result


def random_states(device: torch.device) -> dict[str, Any]:
    """Of torch's generators that training draws from."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Go on drawing where `random_states` was called."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextlib.contextmanager
def held_directory(directory: Path) -> Iterator[None]:
    """Make a directory and keep other processes out; the lock ends with this one.

    Raises:
        SimdiffError: another process holds it, or it cannot be made.
    """
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise SimdiffError(
            f"{directory} must be a directory for the state of training: {error.strerror}"
        ) from None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SimdiffError(
                f"{directory} must be used by one training run at a time, and another one runs"
            ) from None
        for leftover in directory.glob(".*"):  # of a run killed while it wrote
            if leftover.name.startswith((f".{STATE}.", f".{START}.")):
                leftover.unlink()
        yield
    finally:
        os.close(descriptor)


def remove_state(directory: Path) -> None:
    """Forget what a training run left; only what one writes is removed.

    Raises:
        SimdiffError: it holds other files.
    """
    if directory.is_dir():
        names = [entry.name for entry in directory.iterdir()]
        others = [name for name in names if STATE not in name and START not in name]
        if others:
            raise SimdiffError(
                f"{directory} holds other files than training leaves ({others[0]}): not removed"
            )
        shutil.rmtree(directory)
