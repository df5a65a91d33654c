"""Text into token windows: disjoint parts for calibration and for held-out evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simdiff.demo import DEMO, demo_documents
from simdiff.errors import SimdiffError

IN_MEMORY = "documents in memory"

Text: TypeAlias = str | Path | Sequence[str]
"""Where documents come from: see `read_documents`."""


@dataclass(frozen=True)
class TextIdentity:
    """Where token windows came from; two equal ones hold the same tokens."""

    source: str
    part: str
    seed: int
    num_documents: int
    num_windows: int
    window_length: int
    num_tokens: int
    bos: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class TokenWindows:
    """Token ids `(num_windows, window_length)`, int64, and where they came from."""

    tokens: Tensor
    identity: TextIdentity

    def batches(self, batch_size: int) -> list[Tensor]:
        """Consecutive windows, `batch_size` at a time."""
        return list(self.tokens.split(batch_size))

    def first(self, num_windows: int) -> TokenWindows:
        """The first windows: what `token_windows` gives for so many."""
        tokens = self.tokens[:num_windows]
        return TokenWindows(
            tokens, replace(self.identity, num_windows=len(tokens), num_tokens=tokens.numel())
        )


def read_documents(source: Text) -> list[str]:
    """The documents of a text source.

    Args:
        source: "demo"; a .jsonl file whose lines have a "text"; any other file as UTF-8 text,
            where blank lines separate documents; or the documents themselves.

    Raises:
        SimdiffError: no such file, or no text in it.
    """
    if not isinstance(source, (str, Path)):
        return _given_documents(source)
    if source == DEMO:
        return demo_documents()
    path = Path(source)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SimdiffError(f"text {source}: must be 'demo' or a UTF-8 text file: {error}") from None
    if path.suffix == ".jsonl":
        documents = [_json_text(path, n, line) for n, line in enumerate(content.splitlines(), 1)]
    else:
        documents = content.split("\n\n")
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise SimdiffError(f"text {source}: must hold text, got {len(content)} characters of none")
    return documents


def source_name(source: Text) -> str:
    """What files call a text source; of documents in memory it tells whether they are the same."""
    if isinstance(source, (str, Path)):
        return str(source)
    digest = hashlib.sha256("\0".join(_given_documents(source)).encode("utf-8", "surrogatepass"))
    return f"{IN_MEMORY}, sha256 {digest.hexdigest()[:16]}"


def _given_documents(documents: Sequence[str]) -> list[str]:
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise SimdiffError(
                f"text: documents must be strings, got {type(document).__name__} at {index}"
            )
    given = [document.strip() for document in documents if document.strip()]
    if not given:
        raise SimdiffError(f"text: must hold text, got {len(documents)} documents of none")
    return given


def _json_text(source: Path, number: int, line: str) -> str:
    if not line.strip():
        return ""
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise SimdiffError(
            f'text {source}: line {number} must be a JSON object with "text"'
        ) from None


def split_documents(documents: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Shuffle and divide into two disjoint halves: calibration and held-out."""
    shuffled = documents.copy()
    random.Random(seed).shuffle(shuffled)
    middle = (len(shuffled) + 1) // 2
    return shuffled[:middle], shuffled[middle:]


def token_windows(
    source: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    part: str = "calibration",
    num_windows: int = 32,
    window_length: int = 512,
    seed: int = 0,
) -> TokenWindows:
    """Cut one part of a text into windows of equal length.

    Documents are shuffled, divided into two halves, joined by blank lines and cut without
    overlap. Where the tokenizer puts a BOS token before a text, every window starts with one.

    Args:
        source: see `read_documents`.
        part: "calibration" or "held-out" (disjoint for one source and seed), or "all".
        num_windows, window_length: how much text; length counts the BOS token.
        seed: of the shuffle.

    Raises:
        SimdiffError: the text is shorter than one window; bad numbers.
    """
    if num_windows < 1 or window_length < 2:
        raise SimdiffError(
            f"windows must number at least 1 and be at least 2 tokens long, "
            f"got {num_windows} of {window_length}"
        )
    name = source_name(source)
    bos = adds_bos(tokenizer)
    step = window_length - int(bos)
    tokens, num_documents = text_tokens(
        source, tokenizer, part=part, seed=seed, enough=step * num_windows
    )
    count = min(num_windows, len(tokens) // step)
    if count == 0:
        raise SimdiffError(
            f"text {name}: its {part} part must fill one window of {window_length} tokens, "
            f"got {len(tokens)} tokens in {num_documents} documents"
        )
    windows = torch.tensor(tokens[: count * step]).view(count, step)
    if bos:
        column = torch.full((count, 1), tokenizer.bos_token_id)
        windows = torch.cat([column, windows], dim=1)
    return TokenWindows(
        windows,
        TextIdentity(name, part, seed, num_documents, count, window_length, windows.numel(), bos),
    )


def text_tokens(
    source: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    part: str = "calibration",
    seed: int = 0,
    enough: int | None = None,
) -> tuple[list[int], int]:
    """One part of a text as tokens, without BOS, and the number of documents in the part.

    Args:
        source, part, seed: see `token_windows`.
        enough: stop after so many tokens, at the end of some document; None reads all.
    """
    documents = read_documents(source)
    if part != "all":
        halves = split_documents(documents, seed)
        documents = halves[("calibration", "held-out").index(part)]
    return _tokenize(tokenizer, documents, enough), len(documents)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS token before a text."""
    first = tokenizer("a").input_ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], enough: int | None
) -> list[int]:
    tokens: list[int] = []
    for first in range(0, len(documents), 64):
        text = "\n\n".join(documents[first : first + 64]) + "\n\n"
        # verbose=False: no warning that a long text exceeds the model's context; it is cut here.
        tokens += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if enough is not None and len(tokens) >= enough:
            break
    return tokens
