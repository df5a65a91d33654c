"""Whether a model knows the language and the kind of text that it reads, by what a byte costs it.

The measure is bits per byte, which no tokenizer changes, over the entropy of the text's bytes taken
one by one, which is what the same text costs without any knowledge of it. Measured on 300 tokens
each with SmolLM2-135M, Gemma 3 270M and Qwen2.5-Coder 0.5B: text that a model knows (English, code
of three languages, tables, mathematics; other languages where it was trained on them) gives 0.16 to
0.36; a language that it does not know, or words in random order, 0.41 to 0.76; random letters, 1.1.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.evaluation.losses import window_losses
from simdiff.io.progress import tell
from simdiff.models.streamed import stream_of

_KNOWN = 0.4
# In shorter windows most tokens lack the context by which they would be known.
_LEAST_LENGTH = 64


def share_of_bytes(nll: float, tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
    """Bits per byte of a model over the entropy of single bytes; 0 for a text without any.

    Args:
        nll: mean loss in nats per token.
        tokens: token ids of the text, of any shape.
        tokenizer: of the model.
    """
    content = tokenizer.decode(tokens.flatten(), skip_special_tokens=True).encode()
    shares = [count / len(content) for count in Counter(content).values()]
    entropy = -sum(share * math.log2(share) for share in shares)
    if entropy == 0:
        return 0.0
    return nll / math.log(2) * tokens.numel() / len(content) / entropy


def unknown_text(
    nll: float, tokens: Tensor, length: int, tokenizer: PreTrainedTokenizerBase, name: str
) -> str | None:
    """A sentence on a text that a model does not know; None if it does, or nothing can be said.

    Args:
        nll, tokens, tokenizer: see `share_of_bytes`.
        length: tokens that the model reads at once.
        name: of the model.
    """
    share = 0.0 if length < _LEAST_LENGTH else share_of_bytes(nll, tokens, tokenizer)
    if share <= _KNOWN:
        return None
    return (
        f"{name} does not know this text: its perplexity of {math.exp(min(nll, 99)):,.0f} is "
        f"{100 * share:.0f}% of the bits that the bytes cost one by one, where language or code "
        f"that a model knows takes 15% to 36%. Is it another language, or no text? What is "
        "measured or planned on it says little of other text"
    )


def tell_of_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, name: str
) -> None:
    """Say before a long job whether its text is what the model knows, by one window.

    A streamed model is not asked, since it would be read once more. One with a chat template is
    told of where the text is plain.

    Args:
        model, tokenizer, name: the dense model.
        windows: token ids `(num_windows, window_length)` that calibrate it.
    """
    length = windows.shape[1]
    if stream_of(model) is None and length >= _LEAST_LENGTH:
        (nll,) = window_losses(model, windows[:1], description=None)
        finite = math.isfinite(nll)
        note = unknown_text(nll, windows[:1], length, tokenizer, name) if finite else None
        if note is not None:
            tell(f"Warning: {note}.")
    if getattr(tokenizer, "chat_template", None) and _is_plain(windows, tokenizer):
        tell(
            f"Note: {name} has a chat template, and the text is plain: what its layers do is read "
            f"on {length} tokens of running text at a time. Where it will read conversations, or "
            "much longer texts, calibrate on such."
        )


def _is_plain(windows: Tensor, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether windows hold no special token behind a BOS; every chat template writes some."""
    added = tokenizer.added_tokens_decoder.items()
    special = torch.tensor(sorted(index for index, token in added if token.special))
    begun = bool((windows[:, 0] == tokenizer.bos_token_id).all())
    return not bool(torch.isin(windows[:, int(begun) :], special).any())
