"""Scores of a model from hidden states that others saved: `simdiff score MODEL --states DIR`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.devices import own_device
from simdiff.models.identity import model_identity
from simdiff.models.loading import find_model, load_config, meta_model
from simdiff.scoring.calibration_pass import DEFAULT_GROUPS
from simdiff.scoring.saved_states import find_states, score_saved_states
from simdiff.scoring.scores import LayerScores

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def score_states(
    model: PreTrainedModel | str | Path,
    directory: str | Path,
    *,
    device: str | None = None,
    backend: str | None = None,
    groups: int = DEFAULT_GROUPS,
    skip_leading: int = 0,
    progress: bool = True,
) -> LayerScores:
    """Score every layer, and every block of layers, from hidden states in files.

    Of the model only its config is read. Every `.safetensors` file of the directory is a prompt:
    `hidden_states` `(tokens, L + 1, hidden_size)`, the states that enter layers 0 ... L - 1 and the
    one that leaves the last, before the final norm; and `token_ids` `(tokens,)`. They are read one
    after the other in the order of their names. vLLM writes such files (docs/engines.md).

    Args:
        model: an object, a directory, a hub name, or "demo".
        directory: of the files.
        device: where scores are computed; None takes the GPU if there is one.
        backend: of simdiff_kernels; None takes the fastest.
        groups: number of groups of files whose statistics are kept apart for the bootstrap.
        skip_leading: so many first tokens of each file are kept apart.
        progress: show a bar.

    Raises:
        SimdiffError: no such model, no files, or a file that is damaged, of another model, of
            another dtype than the first, or that holds NaN or Inf.
    """
    if groups < 1 or skip_leading < 0:
        raise SimdiffError(
            f"score_states: groups must be at least 1 and skip_leading at least 0, got {groups} "
            f"and {skip_leading}"
        )
    name = "" if isinstance(model, PreTrainedModel) else str(model)
    if not isinstance(model, PreTrainedModel):
        model = meta_model(load_config(find_model(name)[1]))
    identity = model_identity(model, name or model.name_or_path)
    directory = Path(directory)
    files = find_states(directory, identity["num_layers"], identity["hidden_size"])
    return score_saved_states(
        files,
        {**identity, "dtype": _DTYPES[files[0].dtype]},
        calibration={
            "states": str(directory),
            "num_windows": len(files),
            "num_tokens": sum(len(file.token_ids) for file in files),
        },
        device=own_device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        backend=backend,
        groups=groups,
        skip_leading=skip_leading,
        progress=progress,
    )
