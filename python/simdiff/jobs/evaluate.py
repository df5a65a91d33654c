"""A model as it is and with a plan applied in memory: `simdiff eval MODEL --plan plan.json`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from simdiff.evaluation.quality import Loaded, Subject
from simdiff.models.loading import load_model
from simdiff.sublayers.any_plan import cut_in_memory, load_any_plan


def with_plan(
    name: str, path: Path, *, dtype: str = "auto", device: str | None = None
) -> tuple[list[Subject], list[str]]:
    """Two subjects on one copy of the weights: a model, and the same with a plan applied.

    Args:
        name: of the model that the plan was made for.
        path: of the plan, of layers or of sub-layers.
        dtype, device: see `load_model`.

    Returns:
        The subjects for `evaluate_models`, and what the plan removes.

    Raises:
        SimdiffError: no such plan, one for another model, or one that the model cannot express.
    """
    plan = load_any_plan(path)
    model, tokenizer = load_model(name, dtype=dtype, device=device)
    with cut_in_memory(model, plan):  # refused before anything is read
        pass

    @contextlib.contextmanager
    def cut() -> Iterator[Loaded]:
        with cut_in_memory(model, plan):
            yield model, tokenizer

    subjects = [Subject.given(model, tokenizer, name), Subject(f"{name}, {path}", cut)]
    return subjects, [str(unit) for unit in plan.removed]
