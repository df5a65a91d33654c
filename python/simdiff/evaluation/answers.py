"""How long the answers that a model writes may be, and the chat template by which it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from simdiff.errors import SimdiffError

# The names by which task files say it, the first given counts; and lm_eval's number without any.
_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT = 256


def answer_length(task: Any, most: int | None) -> int | None:
    """The number of tokens that an answer of a task of lm_eval may have.

    Args:
        task: one of lm_eval's.
        most: what all tasks are limited to; None limits none.

    Returns:
        At most so many; None for a task whose answers are not written.
    """
    if task.OUTPUT_TYPE != "generate_until":
        return None
    return _length(task.config.generation_kwargs or {}, most)


def bounded(requests: Iterable[Any], most: int | None) -> None:
    """Set in lm_eval's requests for written answers how many tokens each may have."""
    for request in requests:
        context, settings = request.args
        request.arguments = (context, {**settings, _NAMES[0]: _length(settings, most)})


def _length(settings: Mapping[str, Any], most: int | None) -> int:
    given = (settings[name] for name in _NAMES if settings.get(name) is not None)
    own = int(next(given, _DEFAULT))
    return own if most is None else min(own, most)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that has no chat template.

    Raises:
        SimdiffError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SimdiffError(
            f"{name}: the model's tokenizer has no chat template: leave out --chat-template "
            "(chat_template in TaskOptions)"
        )
