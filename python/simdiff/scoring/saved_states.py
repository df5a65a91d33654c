"""Scores from hidden states that others saved: one safetensors file for each prompt.

A file holds `hidden_states` `(tokens, L + 1, hidden_size)` and `token_ids` `(tokens,)`. Entry k of
the second axis is the state that enters layer k, entry L the one that leaves the last layer, before
the final norm: what the hooks of `simdiff.scoring.hooks` see. vLLM writes such files with its
method `extract_hidden_states`, whose layer ids are then 0 ... L.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.io.progress import track
from simdiff.scoring.calibration_pass import DEFAULT_GROUPS, scores_of, shared_batches
from simdiff.scoring.running_groups import RunningGroups
from simdiff.scoring.scores import LayerScores
from simdiff_kernels import default_backend

STATES, TOKENS = "hidden_states", "token_ids"


@dataclass(frozen=True)
class SavedStates:
    """A file of states whose header is that of the model."""

    path: Path
    dtype: str
    """As safetensors names it."""
    token_ids: Tensor
    """`(tokens,)`, int64."""

    def read(self) -> list[Tensor]:
        """h_0 ... h_L, `(1, tokens, hidden_size)` each.

        Raises:
            SimdiffError: a state holds NaN or Inf, or the file has changed.
        """
        with _opened(self.path) as file:
            states = file.get_tensor(STATES)
        if len(states) != len(self.token_ids):
            raise SimdiffError(f"{self.path}: has changed while states were scored")
        if not bool(states.isfinite().all()):
            token, state, _ = (~states.isfinite()).nonzero()[0].tolist()
            raise SimdiffError(
                f"{self.path}: hidden states must be finite, got NaN or Inf in state {state} of "
                f"token {token}"
            )
        return [state[None] for state in states.unbind(1)]


def find_states(directory: Path, num_layers: int, hidden_size: int) -> list[SavedStates]:
    """The files of states in a directory, by their names; all headers are read.

    Raises:
        SimdiffError: there are none, or one is not of such a model, is damaged, is still written,
            or has another dtype than the first.
    """
    if not directory.is_dir():
        raise SimdiffError(f"states {directory} must be a directory of .safetensors files")
    paths = sorted(path for path in directory.iterdir() if path.suffix == ".safetensors")
    if not paths:
        other = sorted(path.name for path in directory.iterdir())
        raise SimdiffError(
            f"states {directory} must hold a .safetensors file for each prompt, got "
            f"{f'{other[0]} and the like' if other else 'an empty directory'}"
        )
    found = [_checked(path, num_layers, hidden_size) for path in paths]
    for one in found:
        if one.dtype != found[0].dtype:
            raise SimdiffError(
                f"{one.path}: {STATES} must be of one dtype in all files, got {one.dtype} and "
                f"{found[0].dtype} in {found[0].path.name}"
            )
    return found


def _checked(path: Path, num_layers: int, hidden_size: int) -> SavedStates:
    _check_complete(path)
    with _opened(path) as file:
        names = set(file.keys())
        missing = [name for name in (STATES, TOKENS) if name not in names]
        if missing:
            raise SimdiffError(
                f"{path}: must hold {STATES} and {TOKENS}, got {', '.join(sorted(names)) or 'none'}"
            )
        header = file.get_slice(STATES)
        shape, dtype = tuple(header.get_shape()), str(header.get_dtype())
        token_ids = file.get_tensor(TOKENS)
    wanted = f"(tokens, {num_layers + 1}, {hidden_size})"
    if len(shape) != 3 or shape[1:] != (num_layers + 1, hidden_size):
        states = (
            f": the states that enter layers 0 to {num_layers - 1}, and the one that leaves the "
            f"last (layer ids 0 to {num_layers} in vLLM)"
            if len(shape) == 3 and shape[1] != num_layers + 1
            else ""
        )
        raise SimdiffError(f"{path}: {STATES} must have shape {wanted}, got {shape}{states}")
    if dtype not in ("F32", "BF16", "F16", "F64"):
        raise SimdiffError(f"{path}: {STATES} must be floating-point numbers, got {dtype}")
    if tuple(token_ids.shape) != shape[:1] or token_ids.is_floating_point():
        raise SimdiffError(
            f"{path}: {TOKENS} must be {shape[0]} integers, one for each token of {STATES}, got "
            f"{token_ids.dtype} of shape {tuple(token_ids.shape)}"
        )
    if not shape[0]:
        raise SimdiffError(f"{path}: must hold at least one token, got none")
    return SavedStates(path, dtype, token_ids.long())


def _check_complete(path: Path) -> None:
    """Refuse a file that vLLM still writes: then it holds a lock on the file of that name."""
    lock = path.with_name(path.name + ".lock")
    if not lock.is_file():
        return
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SimdiffError(f"{path}: must be complete, and is still being written") from None
        except OSError:  # a file system without locks
            return


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SimdiffError(
            f"{path}: must be a complete safetensors file: {' '.join(str(error).split())}"
        ) from None


@torch.no_grad()
def score_saved_states(
    files: Sequence[SavedStates],
    model: Mapping[str, Any],
    *,
    calibration: Mapping[str, Any] | None = None,
    device: str = "cpu",
    backend: str | None = None,
    blocks: bool = True,
    groups: int = DEFAULT_GROUPS,
    skip_leading: int = 0,
    progress: bool = True,
) -> LayerScores:
    """Score every layer and block of layers from saved states, one file in memory at a time.

    The scores are bitwise those that hooks give for the same states, each file one sequence.

    Args:
        files: of `find_states`.
        model: identity of the model, see `simdiff.models.identity.model_identity`.
        calibration: identity of the text, for the record.
        device: where scores are computed.
        backend, blocks, groups, skip_leading, progress: see `simdiff.scoring.calibration_pass`.

    Raises:
        SimdiffError: NaN or Inf in a file, or no token after the first `skip_leading`.
    """
    ids = [file.token_ids[None] for file in files]
    if max(len(file.token_ids) for file in files) <= skip_leading:
        raise SimdiffError(
            f"score: skip_leading must be below the number of tokens of some file, got "
            f"{skip_leading}"
        )
    num_layers, group_size = int(model["num_layers"]), -(-len(files) // groups)
    running = RunningGroups(
        num_layers,
        -(-len(files) // group_size),
        blocks=blocks,
        group_size=group_size,
        skip_leading=skip_leading,
        backend=backend,
    )
    digest = hashlib.sha256(torch.cat(ids, 1).numpy().astype("<i8").tobytes()).hexdigest()
    ranks.agree("the states that are scored", {"files": len(files), "tokens": digest})
    mine = shared_batches([1] * len(files), 0, group_size)

    def run() -> dict[str, Any]:
        own = files[mine.start : mine.stop]
        for file in files[: mine.start]:
            running.skip(torch.ones(1, len(file.token_ids)))
        for file in track(own, "score") if progress else own:
            _feed(running, file, device)
        for file in files[mine.stop :]:
            running.skip(torch.ones(1, len(file.token_ids)))
        return running.part(mine) if len(own) < len(files) else {}

    done = ranks.all_of(run)
    if ranks.size() > 1:
        running.put([part for part in done if part])
    return scores_of(
        running,
        ids,
        model=dict(model),
        calibration={**(calibration or {}), "tokens_sha256": digest}
        | ({"skip_leading": skip_leading} if skip_leading else {}),
        provenance={
            "backend": backend or default_backend(torch.device(device).type),
            "device": torch.device(device).type,
        },
    )


def _feed(running: RunningGroups, file: SavedStates, device: str) -> None:
    """Add the tokens of a file."""
    states = [state.to(device) for state in file.read()]
    counted = running.begin(torch.ones(1, len(file.token_ids)))
    mask = None if bool(counted.all()) else counted.to(device)
    for layer in range(running.num_layers):
        running.update(layer, states[layer], states[layer + 1], mask)
    if running.blocks is not None:
        running.blocks.update(states, mask)
    running.end()
