"""Cut text into token windows, in disjoint parts for calibration and held-out evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simdiff.data.demo import DEMO, demo_documents
from simdiff.data.related import num_shared, related_groups, runs_of
from simdiff.errors import SimdiffError

# In characters: about a window of text.
PIECE = 2048

IN_MEMORY = "documents in memory"

Text: TypeAlias = str | Path | Sequence[str]
"""A source of documents: "demo", a file, or the documents themselves; see `read_documents`."""


@dataclass(frozen=True)
class TextIdentity:
    """Where token windows came from; equal identities mean equal tokens."""

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
        """The first `num_windows` windows, as `token_windows` would give them for that number."""
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
    """The name of a text source in result files; documents in memory are named by their hash."""
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


def split_text(source: Text, seed: int) -> tuple[list[str], list[str]]:
    """The documents to calibrate on and those held out, in the order in which they are read.

    The user's text is divided by position, so that no article is on both sides: the text before the
    middle calibrates, the text after it is held out, and the seed shuffles each half. Consecutive
    paragraphs of a plain file stay together in pieces of `PIECE` characters or more. The order of
    the demo's passages means nothing, so the seed assigns whole groups of related passages
    (`simdiff.data.related`) to the halves.

    A held-out document is dropped if more than half of its runs of 8 words occur in the other half.

    Args:
        source: see `read_documents`.
        seed: seed of the shuffles.
    """
    calibration, held_out = _halves(source, seed)
    return calibration, without_duplicates(held_out, calibration)


def _halves(source: Text, seed: int) -> tuple[list[str], list[str]]:
    """The two halves before near-duplicates are removed, which takes longer than all the rest."""
    if source == DEMO:
        return split_groups(_demo_groups(), seed)
    halves = _by_position(_pieces(source))
    for number, half in enumerate(halves):
        random.Random(2 * seed + number).shuffle(half)
    return halves


def split_groups(groups: Sequence[Sequence[str]], seed: int) -> tuple[list[str], list[str]]:
    """Divide groups into two shuffled halves of about equal length; no group is divided."""
    order = list(groups)
    random.Random(seed).shuffle(order)
    halves: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for group in order:
        shorter = sizes.index(min(sizes))
        halves[shorter].extend(group)
        sizes[shorter] += sum(map(len, group))
    for half in halves:
        random.Random(seed).shuffle(half)
    return halves


def without_duplicates(documents: Sequence[str], others: Sequence[str]) -> list[str]:
    """The documents of which at most half of the runs of 8 words occur in `others`."""
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *map(runs_of, others)]))
    kept = []
    for document in documents:
        runs = runs_of(document)
        if 2 * num_shared(runs, known) <= len(runs):
            kept.append(document)
    return kept


@cache
def _demo_groups() -> tuple[tuple[str, ...], ...]:
    documents = demo_documents()
    groups: dict[int, list[str]] = {}
    for document, group in zip(documents, related_groups(documents), strict=True):
        groups.setdefault(group, []).append(document)
    return tuple(map(tuple, groups.values()))


def _pieces(source: Text) -> list[str]:
    documents = read_documents(source)
    if not isinstance(source, (str, Path)) or Path(source).suffix == ".jsonl":
        return documents
    if len(documents) == 1:  # no blank lines: divide at the ends of lines, else between words
        (whole,) = documents
        lines = whole.split("\n")
        documents = lines if len(lines) > 1 else whole.split(" ")
        joint = "\n" if len(lines) > 1 else " "
    else:
        joint = "\n\n"
    pieces, current, size = [], [], 0
    most = min(PIECE, sum(map(len, documents)) // 16)
    for document in documents:
        current.append(document)
        size += len(document)
        if size >= most:
            pieces.append(joint.join(current))
            current, size = [], 0
    return pieces + ([joint.join(current)] if current else [])


def _by_position(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a list between two documents, nearest to half of the characters; neither is empty."""
    total, size, count = sum(map(len, documents)), 0, 0
    while count < len(documents) and 2 * size + len(documents[count]) <= total:
        size += len(documents[count])
        count += 1
    count = min(max(count, 1), max(len(documents) - 1, 1))
    return list(documents[:count]), list(documents[count:])


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

    Documents are divided into two halves, shuffled (`split_text`), joined by blank lines and cut
    without overlap. If the tokenizer puts a BOS token before a text, every window starts with one.

    Args:
        source: see `read_documents`.
        part: "calibration" or "held-out" (disjoint for one source and seed), or "all", which is the
            whole text in its own order.
        num_windows, window_length: how much text; the length includes the BOS token.
        seed: seed of the shuffle.

    Raises:
        SimdiffError: the text is shorter than one window, or a number is out of range.
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
    """Tokenize one part of a text; return the tokens, without BOS, and the number of documents.

    Args:
        source, part, seed: see `token_windows`.
        enough: stop at the end of the document in which this many tokens are reached; None reads
            the whole part.
    """
    if part == "all":
        documents = read_documents(source)
    elif part == "calibration":
        documents, _ = _halves(source, seed)
    elif part == "held-out":
        _, documents = split_text(source, seed)
    else:
        raise SimdiffError(f"part of a text must be calibration, held-out or all, got {part!r}")
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
