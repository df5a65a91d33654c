"""Models and texts as the Python functions take them: objects, or what the commands take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.data.demo import DEMO
from simdiff.data.documents import Text
from simdiff.data.text_options import TextOptions
from simdiff.errors import SimdiffError
from simdiff.models.given import given_model
from simdiff.models.loading import load_model, load_tokenizer
from simdiff.models.streamed import StreamOptions, chosen_stream

Model: TypeAlias = PreTrainedModel | nn.Module | str | Path
"""A causal or vision-language model of transformers, compiled or parallel too; or its name: a
directory, a hub name, or "demo"."""


def resolve(
    function: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | bool | None = False,
) -> tuple[PreTrainedModel, str, PreTrainedTokenizerBase | None]:
    """A model as an object, its name, and its tokenizer where one was given or loaded with it.

    Raises:
        SimdiffError: see `given_model` for objects and `load_model` for names.
    """
    if not isinstance(model, (str, Path)):
        found = given_model(model, function)
        return found, found.name_or_path, tokenizer
    options = chosen_stream(stream)
    loaded, its_tokenizer = load_model(str(model), dtype=dtype, device=device, stream=options)
    return loaded, str(model), tokenizer or its_tokenizer


def check_batch_size(function: str, batch_size: int) -> None:
    """Refuse batches of no window.

    Raises:
        SimdiffError: names the function.
    """
    if batch_size < 1:
        raise SimdiffError(f"{function}: batch_size must be at least 1, got {batch_size}")


def is_demo(model: Model) -> bool:
    """Whether a model is the built-in one, by its name."""
    return isinstance(model, (str, Path)) and str(model) == DEMO


def text_of(
    function: str,
    model: Model,
    text: Text | TextOptions | None,
    amount: Mapping[str, int],
    *,
    num_windows: int = 32,
) -> TextOptions:
    """Which text a function reads, and how much of it.

    Args:
        function: its name, for messages.
        model: the model "demo" has a text of its own; every other needs one.
        text: a text, or with its options; None takes the demo's.
        amount: num_windows, window_length and seed as plain arguments.
        num_windows: what the function takes where none is given.

    Raises:
        SimdiffError: no text, or an option both in the object and as an argument.
    """
    usual = TextOptions(DEMO, num_windows)
    if isinstance(text, TextOptions):
        return one_way(function, text, usual, amount)
    if text is None and not is_demo(model):
        raise SimdiffError(
            f"{function}: text must be given for a model of your own: a text file, a .jsonl file, "
            'a list of documents, or "demo" for the passages that come with the demo model'
        )
    return replace(usual, source=DEMO if text is None else text, **amount)


Options = TypeVar("Options")


def one_way(
    function: str, options: Options | None, usual: Options, plain: Mapping[str, Any]
) -> Options:
    """Options as an object, or the plain arguments as one.

    Args:
        function: its name, for messages.
        options: None takes `plain`.
        usual: the object of the function's defaults.
        plain: arguments of the function by the names of the object's fields.

    Raises:
        SimdiffError: an object of another class, or an option that is given in both ways.
    """
    if options is None:
        return replace(usual, **plain)  # type: ignore[type-var]
    if not isinstance(options, type(usual)):
        raise SimdiffError(
            f"{function}: options must be {type(usual).__name__}, got {type(options).__name__}"
        )
    both = list(_differing(plain, vars(usual)))
    if both:
        raise SimdiffError(
            f"{function}: {', '.join(both)} must stand in the {type(usual).__name__} or be plain "
            "arguments, got both"
        )
    return options


def _differing(plain: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    """The names of arguments that are not the defaults, those within an object too."""
    for name, value in plain.items():
        if is_dataclass(value):
            yield from _differing(vars(value), vars(usual[name]))
        elif value != usual[name]:
            yield name


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
            return load_tokenizer(where, Path(where), "the model")
        reason = "the model was not loaded from anywhere"
    except SimdiffError as error:
        reason = str(error)
    if not required:
        return None
    raise SimdiffError(
        f"a text needs the model's tokenizer: give tokenizer=, or token ids (num_windows, "
        f"window_length) instead of text; none was found at {where!r}: {reason}"
    )
