"""Chat data: rows of messages as documents, written by the chat template of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the form "from" and "value" (ShareGPT); other roles stay.
_ROLES = {"human": "user", "gpt": "assistant"}


class Conversation(str):
    """A document whose text is that of the messages, for who looks for what repeats.

    A model reads what its chat template makes of `messages`.
    """

    messages: list[dict[str, Any]]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """The document of a list of messages, see `is_conversation`."""
        found = [
            {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
            if "from" in message
            else {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        said = cls("\n\n".join(f"{m['role']}: {m.get('content', '')}" for m in found))
        said.messages = found
        return said


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages: of "role" and "content", or of "from" and "value"."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and ("role" in m or {"from", "value"} <= {*m}) for m in value)
    )


def written(document: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document as a model reads it: with a blank line behind, or by the chat template.

    Raises:
        SimdiffError: the tokenizer has no chat template, or it refuses the messages.
    """
    if not isinstance(document, Conversation):
        return document + "\n\n"
    if not getattr(tokenizer, "chat_template", None):
        raise SimdiffError(
            "text: holds conversations, and the model's tokenizer has no chat template: give plain "
            "text, or the column of it (--text-column)"
        )
    try:
        said: str = tokenizer.apply_chat_template(document.messages, tokenize=False)
    except Exception as error:  # a template is a program, which raises what it likes
        raise SimdiffError(
            f"text: the chat template refuses a conversation of the roles "
            f"{', '.join(str(message['role']) for message in document.messages)[:200]}: {error}"
        ) from None
    return said
