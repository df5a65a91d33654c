"""A model as it is and with a plan applied in memory: `simdiff eval MODEL --plan plan.json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.evaluation import perplexity
from simdiff.files import header
from simdiff.models import load_model
from simdiff.plan_kinds import cut_in_memory, load_any_plan

if TYPE_CHECKING:
    from simdiff.pipeline import TextOptions


def evaluate_plan(
    name: str, path: Path, *, text: TextOptions, part: str, dtype: str, device: str | None
) -> dict[str, Any]:
    """Perplexity of a model, dense and with a plan of layers or of sub-layers applied in memory.

    Args:
        name: of the model that the plan was made for.
        path: of the plan; it says of which kind it is.
        text, part: what is read.
        dtype, device: see `load_model`.

    Returns:
        As `simdiff.pipeline.evaluate`: one entry for the model, one for the model with the plan.

    Raises:
        SimdiffError: no such plan, one for another model, or one that the model cannot express.
    """
    plan = load_any_plan(path)
    model, tokenizer = load_model(name, dtype=dtype, device=device)
    windows = text.windows(tokenizer, part)
    identity = windows.identity.to_dict()
    with cut_in_memory(model, plan):  # refused before anything is read
        pruned = perplexity(model, windows.tokens, description=f"perplexity, {path}")
    dense = perplexity(model, windows.tokens, description=f"perplexity, {name}")
    return {
        **header("simdiff.evaluation", 1),
        "models": {
            name: asdict(dense) | {"evaluation": identity},
            f"{name}, {path}": asdict(pruned) | {"evaluation": identity},
        },
        "removed": [str(unit) for unit in plan.removed],
    }
