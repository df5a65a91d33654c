"""A plan applied to a model by name: its files where they can be cut, else the model in memory."""

from __future__ import annotations

from pathlib import Path

from simdiff.checkpoints.cut import (
    DEFAULT_SHARD_SIZE,
    check_output,
    cut_checkpoint,
    write_cut,
)
from simdiff.checkpoints.from_memory import check_saveable, write_pruned
from simdiff.io.kinds import Kind
from simdiff.io.outputs import new_directory, write_config
from simdiff.models.files import check_kind
from simdiff.models.loading import load_model, source_directory
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.card import write_card


def prune_checkpoint(
    name: str,
    plan: PruningPlan,
    output: Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    config: str | None = None,
) -> tuple[str, ...]:
    """Write a model without the plan's layers; arguments as in `prune`.

    `config` is the content of the config.yaml that repeats this, where a command asks for one.

    Returns:
        What was changed beside the layers or left behind, for people.
    """
    source = source_directory(name)
    check_kind(source)
    check_output(source, output)
    if dtype == "auto":
        cut = cut_checkpoint(source, plan, max_shard_size=max_shard_size)
        with new_directory(output, overwrite, Kind.MODEL) as scratch:
            write_cut(cut, scratch)
            write_card(scratch, plan, name)
            write_config(scratch, config)
        return cut.notes
    model, tokenizer = load_model(str(source), dtype=dtype, device=device)
    check_saveable(model)
    with new_directory(output, overwrite, Kind.MODEL) as scratch:
        write_pruned(model, tokenizer, plan, scratch, source=source, max_shard_size=max_shard_size)
        write_card(scratch, plan, name)
        write_config(scratch, config)
    return ()
