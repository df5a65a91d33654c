"""Pruned checkpoints on disk: what stock `from_pretrained` loads, complete or absent."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.files import MARKER
from simdiff.models import check_same_model
from simdiff.progress import step
from simdiff.selection import PruningPlan
from simdiff.surgery import removed_layers


def write_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PruningPlan,
    directory: Path,
) -> None:
    """Save the model without the plan's layers, its tokenizer and the plan into a directory.

    The model itself is as it was afterwards. Write into `files.new_directory` to have the
    checkpoint appear whole or not at all.

    Raises:
        SimdiffError: the plan was made for another model.
        SurgeryError: stock classes cannot express the cut.
    """
    check_same_model(model, plan.model, "plan")
    with removed_layers(model, plan.removed), step("write the pruned checkpoint"):
        model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    plan.save(directory / MARKER)
