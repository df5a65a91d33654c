"""Cut text into token windows, in disjoint parts for calibration and held-out evaluation."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simdiff.data.documents import COLUMN, Text, TextFile, read_documents, source_name
from simdiff.data.halves import unrepeated, whole_halves
from simdiff.errors import SimdiffError

# Most characters that are tokenised at a time: the tokenizer takes some 270 bytes for each.
_AT_ONCE = 2**18
# Characters that a token is taken to stand for where only part of a text is looked at; about 4 do.
_OF_A_TOKEN = 6


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
    column: str = COLUMN
    """Of the documents in a file that has columns."""
    tokens_sha256: str = ""
    """Of all token ids as little-endian int64, BOS included."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, the column only where it is another than the usual one."""
        content = asdict(self)
        return content if content.pop("column") == COLUMN else content | {"column": self.column}


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
            tokens,
            replace(
                self.identity,
                num_windows=len(tokens),
                num_tokens=tokens.numel(),
                tokens_sha256=_digest(tokens),
            ),
        )


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
    bos = adds_bos(tokenizer)
    step = window_length - int(bos)
    found = text_tokens(source, tokenizer, part=part, seed=seed, enough=step * num_windows)
    count = min(num_windows, len(found.tokens) // step)
    if count == 0:
        raise too_short(source, part, window_length, found)
    windows = torch.tensor(found.tokens[: count * step]).view(count, step)
    if bos:
        column = torch.full((count, 1), tokenizer.bos_token_id)
        windows = torch.cat([column, windows], dim=1)
    return TokenWindows(
        windows,
        TextIdentity(
            source_name(source),
            part,
            seed,
            found.num_documents,
            count,
            window_length,
            windows.numel(),
            bos,
            column_of(source),
            _digest(windows),
        ),
    )


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()


def column_of(source: Text) -> str:
    """The column of a source's documents, where its files have columns."""
    return source.column if isinstance(source, TextFile) else COLUMN


@dataclass(frozen=True)
class PartTokens:
    """Tokens of one part of a text."""

    tokens: list[int]
    """Without BOS."""
    num_documents: int
    """Documents in the part, near-duplicates included."""
    all_repeated: bool
    """Whether every document of the part repeats one of the calibration half."""


def text_tokens(
    source: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    part: str = "calibration",
    seed: int = 0,
    enough: int | None = None,
) -> PartTokens:
    """Tokenize one part of a text.

    Args:
        source, part, seed: see `token_windows`.
        enough: stop soon after so many tokens are reached, and look for near-duplicates no further;
            None reads the whole part.
    """
    if part == "all":
        documents = read_documents(source)
        return PartTokens(_tokenize(tokenizer, documents, enough), len(documents), False)
    if part not in ("calibration", "held-out"):
        raise SimdiffError(f"part of a text must be calibration, held-out or all, got {part!r}")
    calibration, held_out = whole_halves(source, seed)
    if part == "calibration":
        return PartTokens(_tokenize(tokenizer, calibration, enough), len(calibration), False)
    characters = sum(map(len, held_out))
    if enough is not None:
        characters = max(_OF_A_TOKEN * enough, _AT_ONCE)
    kept = unrepeated(held_out, calibration, characters)
    tokens = _tokenize(tokenizer, kept, enough)
    return PartTokens(tokens, len(held_out), bool(held_out) and not tokens)


def too_short(source: Text, part: str, window_length: int, found: PartTokens) -> SimdiffError:
    """The error for a part of a text that fills no window: why, and what can be done."""
    what = "the text" if part == "all" else f"its {part} half"
    if found.all_repeated:
        return SimdiffError(
            f"text {source_name(source)}: {what} must fill one window of {window_length} tokens, "
            "but more than half of every document in it stands in the calibration half too, and "
            "what has been seen is not held out: evaluate on another text (held_out=...), or on "
            "all of this one (`simdiff eval --part all`)"
        )
    ways = "give more text or shorter windows (window_length=...)"
    if part != "all":
        ways = (
            "a text is cut in two by its length, the first half calibrates, the second is held "
            f"out: {ways}"
        )
        if part == "held-out":
            ways += ", or another text to evaluate on (held_out=...; `simdiff eval --part all`)"
    return SimdiffError(
        f"text {source_name(source)}: {what} must fill one window of {window_length} tokens, "
        f"got {len(found.tokens)} tokens in {found.num_documents} documents; {ways}"
    )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS token before a text."""
    first = tokenizer("a").input_ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], enough: int | None
) -> list[int]:
    tokens: list[int] = []
    for text in _texts(documents):
        # verbose=False: no warning that a long text exceeds the model's context; it is cut here.
        tokens += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if enough is not None and len(tokens) >= enough:
            break
    return tokens


def _texts(documents: Iterable[str]) -> Iterator[str]:
    """Documents joined by blank lines, 64 at a time, in parts of at most `_AT_ONCE` characters."""
    waiting = iter(documents)
    while (document := next(waiting, None)) is not None:
        text = ""
        for one in itertools.chain([document], itertools.islice(waiting, 63)):
            # Half of a surrogate pair, which JSON can hold, is no character.
            text += one.encode("utf-8", "replace").decode() + "\n\n"
            start = 0
            while len(text) - start > _AT_ONCE:
                stop = _boundary(text, start)
                yield text[start:stop]
                start = stop
            text = text[start:]
        yield text


def _boundary(text: str, start: int) -> int:
    """Where a part of a text ends: before the last blank behind a word, which splits no token."""
    stop = start + _AT_ONCE
    while (stop := text.rfind(" ", start + _AT_ONCE // 2, stop)) > 0:
        if not text[stop - 1].isspace():
            return stop
    return start + _AT_ONCE
