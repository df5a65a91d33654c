"""Token windows compared with the model that is to read them, before it runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.errors import Note, SimdiffError
from simdiff.models.structure import decoder_body, text_config

_POSITIONS = re.compile(r"(^|\.)(wpe|[a-z_]*position[a-z_]*|pos_e[a-z_]*)$")
"""Names of modules and buffers that hold one row for every position."""

_TABLE_OF_CONFIG = {"mpt": "max_seq_len"}
"""Models that make a table in each forward and keep none, with the entry of its length."""


def check_windows(
    model: PreTrainedModel, windows: Iterable[Tensor], function: str, *, length: int | None = None
) -> None:
    """Refuse windows that a model cannot read; note where they exceed what it was made for.

    Args:
        model: that is to read them.
        windows: token ids, of any shape.
        function: for messages.
        length: tokens that the model reads at once; None is the last dimension of the windows.

    Raises:
        SimdiffError: a token id beyond the embedding, or more tokens than learned positions.
    """
    windows = [ids for ids in windows if ids.numel()]
    if not windows:
        return
    rows = _rows(model)
    largest = max(int(ids.max()) for ids in windows)
    smallest = min(int(ids.min()) for ids in windows)
    if largest >= rows or smallest < 0:
        wrong = largest if largest >= rows else smallest
        raise SimdiffError(
            f"{function}: token ids must be 0 to {rows - 1}, the rows of the model's embedding, "
            f"got {wrong}: the tokenizer is of another model, or has tokens that were added "
            "without model.resize_token_embeddings"
        )
    longest = length or max(ids.shape[-1] for ids in windows)
    limit, learned = positions(model)
    if limit is None or longest <= limit:
        return
    name = type(model).__name__
    if learned:
        raise SimdiffError(
            f"{function}: a window must have at most {limit} tokens, as many as {name} has "
            f"positions, got {longest}: give window_length={limit}"
        )
    warnings.warn(
        f"windows of {longest} tokens are longer than the {limit} for which this {name} was made "
        "(max_position_embeddings): what is measured on them is of a model out of its range",
        Note,
        stacklevel=3,
    )


def positions(model: PreTrainedModel) -> tuple[int | None, bool]:
    """How many tokens a model reads at once, and whether it cannot read more.

    The second is true of models with a table of positions, learned or made once. Rotary models were
    made for a number of tokens, and others have none.
    """
    config = text_config(model)
    stated = getattr(config, "max_position_embeddings", None)
    stated = stated if isinstance(stated, int) and stated > 0 else None
    body = decoder_body(model)
    tables = [
        _table_length(module)
        for name, module in body.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name)
    ]
    if tables:
        return min(tables), True
    buffers = {name: buffer for name, buffer in body.named_buffers() if buffer.dim() == 2}
    fixed = [len(buffer) for name, buffer in buffers.items() if _POSITIONS.search(name)]
    if fixed:
        return min(fixed), True
    if config.model_type in _TABLE_OF_CONFIG:
        return int(getattr(config, _TABLE_OF_CONFIG[config.model_type])), True
    rotary = any("inv_freq" in name for name, _ in body.named_buffers())
    return (stated, False) if rotary else (None, False)


def _table_length(table: nn.Embedding) -> int:
    """Positions in a table, without the rows before the first one."""
    before = getattr(table, "offset", 0)
    if not before and table.padding_idx is not None:
        before = table.padding_idx + 1
    return table.num_embeddings - int(before)


def _rows(model: PreTrainedModel) -> int:
    """The number of token ids that the embedding has rows for."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])
