"""Models and texts as the Python functions take them: objects, or what the commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias, overload

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from simdiff.data.text import Text, TokenWindows, token_windows
from simdiff.errors import SimdiffError
from simdiff.models.loading import load_model

Model: TypeAlias = PreTrainedModel | str | Path
"""A causal language model of transformers, a directory, a hub name, or "demo"."""


def resolve(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    dtype: str = "auto",
    device: str | None = None,
) -> tuple[PreTrainedModel, str, PreTrainedTokenizerBase | None]:
    """A model as an object, its name, and its tokenizer where one was given or loaded with it."""
    if isinstance(model, PreTrainedModel):
        return model, model.name_or_path, tokenizer
    loaded, its_tokenizer = load_model(str(model), dtype=dtype, device=device)
    return loaded, str(model), tokenizer or its_tokenizer


def windows_of(
    text: Text, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> TokenWindows:
    """Token windows of a text, by the tokenizer given or the one saved beside the model."""
    return token_windows(text, tokenizer or saved_tokenizer(model), **options)


@overload
def saved_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase: ...


@overload
def saved_tokenizer(
    model: PreTrainedModel, *, required: bool
) -> PreTrainedTokenizerBase | None: ...


def saved_tokenizer(
    model: PreTrainedModel, *, required: bool = True
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies where a model was loaded from.

    Raises:
        SimdiffError: there is none, and one is required.
    """
    where = model.name_or_path
    try:
        if where:
            return AutoTokenizer.from_pretrained(where)
        reason = "the model was not loaded from anywhere"
    except (OSError, ValueError, KeyError) as error:
        reason = str(error)
    if not required:
        return None
    raise SimdiffError(
        f"a text needs the model's tokenizer: give tokenizer=, or token ids (num_windows, "
        f"window_length) instead of text; none was found at {where!r}: {reason}"
    )
