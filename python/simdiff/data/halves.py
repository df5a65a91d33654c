"""The two halves of a text: what calibrates, and what is held out and must not tell of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from simdiff.data.conversations import Conversation
from simdiff.data.demo import DEMO, demo_documents
from simdiff.data.documents import Text, TextFile, TextMix, read_runs
from simdiff.data.mixes import mixed
from simdiff.data.related import related_groups, runs_of

# In characters: about a window of text.
PIECE = 2048
# A line or a word that is longer is divided further, where its document is divided at all.
_LONGEST = 16 * PIECE


def split_text(source: Text, seed: int) -> tuple[list[str], list[str]]:
    """The documents to calibrate on and those held out, in the order in which they are read.

    The user's text is divided by position, so that no article is on both sides: the text before the
    middle calibrates, the text after it is held out, and the seed shuffles each half. Consecutive
    paragraphs of a plain file stay together in pieces of `PIECE` characters or more. A document of
    more than half of a plain text is divided too, at the ends of lines or between words; one of any
    text is cut in two where less than a third would be left on one side. The order of the demo's
    passages means nothing, so the seed assigns whole groups of related passages
    (`simdiff.data.related`) to the halves.

    A held-out document is dropped if more than half of its runs of 8 words occur in the other half.

    Args:
        source: see `simdiff.data.documents.read_documents`.
        seed: seed of the shuffles.
    """
    calibration, held_out = whole_halves(source, seed)
    return calibration, without_duplicates(held_out, calibration)


def whole_halves(source: Text, seed: int) -> tuple[list[str], list[str]]:
    """The two halves before near-duplicates are removed, which takes longer than all the rest."""
    if source in (DEMO, TextFile(DEMO)):
        return split_groups(_demo_groups(), seed)
    if isinstance(source, TextMix):
        pairs = [whole_halves(part, seed) for part in source.sources]
        return mixed([p[0] for p in pairs], source.weights), mixed(
            [p[1] for p in pairs], source.weights
        )
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
    """The documents of which at most half of the runs of 8 words occur in `others`.

    The runs of `documents` are in memory, 8 bytes a word; those of `others` pass by.
    """
    runs = [runs_of(document) for document in documents]
    asked = np.unique(np.concatenate([np.empty(0, np.uint64), *runs]))
    if not len(asked):
        return list(documents)
    found = np.zeros(len(asked), np.bool_)
    for other in others:
        passing = runs_of(other)
        places = np.minimum(np.searchsorted(asked, passing), len(asked) - 1)
        found[places[asked[places] == passing]] = True
    shared = [int(found[np.searchsorted(asked, own)].sum()) for own in runs]
    return [
        document
        for document, own, count in zip(documents, runs, shared, strict=True)
        if 2 * count <= len(own)
    ]


def unrepeated(documents: Sequence[str], others: Sequence[str], characters: int) -> Iterator[str]:
    """Yield what `without_duplicates` keeps, looking at no more of `documents` than is taken.

    Args:
        documents, others: see `without_duplicates`.
        characters: about as many will be taken; where it is more, twice as many are looked at next.
    """
    start = 0
    while start < len(documents):
        stop, size = start, 0
        while stop < len(documents) and size < characters:
            size += len(documents[stop])
            stop += 1
        stop = max(stop, start + 1)
        yield from without_duplicates(documents[start:stop], others)
        start, characters = stop, 2 * characters


@cache
def _demo_groups() -> tuple[tuple[str, ...], ...]:
    documents = demo_documents()
    groups: dict[int, list[str]] = {}
    for document, group in zip(documents, related_groups(documents), strict=True):
        groups.setdefault(group, []).append(document)
    return tuple(map(tuple, groups.values()))


def _pieces(source: Text) -> list[str]:
    """The documents, consecutive paragraphs of plain text joined."""
    runs = read_runs(source)
    total = sum(len(document) for run in runs for document in run.documents)
    pieces: list[str] = []
    for run in runs:
        pieces += _joined(run.documents, total) if run.plain else run.documents
    return pieces


def _joined(documents: Sequence[str], total: int) -> Iterator[str]:
    """Pieces of `PIECE` characters or more of paragraphs, or a sixteenth of a short text."""
    divided = {d: _separator(d) for d in documents if 2 * len(d) > total}
    total -= sum(document.count(joint) for document, joint in divided.items() if joint)
    most = min(PIECE, total // 16)
    current: list[str] = []
    size = 0
    for document in documents:
        units = _units(document) if document in divided else [("", document)]
        for number, (joint, unit) in enumerate(units):
            if current:
                current.append(joint if number else "\n\n")
            current.append(unit)
            size += len(unit)
            if size >= most:
                yield "".join(current)
                current, size = [], 0
    if current:
        yield "".join(current)


def _separator(document: str) -> str:
    """What divides a document: ends of lines, blanks where it is one line, else nothing."""
    return next((joint for joint in ("\n", " ") if joint in document), "")


def _units(document: str) -> Iterator[tuple[str, str]]:
    """Lines of a document, or words of one line, or parts of one word, each after its joint."""
    joint = _separator(document)
    if not joint:
        for start in range(0, len(document), PIECE):
            yield "", document[start : start + PIECE]
        return
    start = 0
    while start <= len(document):
        stop = document.find(joint, start)
        stop = len(document) if stop < 0 else stop
        if stop - start <= _LONGEST:
            yield joint, document[start:stop]
        else:
            for number, (inner, unit) in enumerate(_units(document[start:stop])):
                yield inner if number else joint, unit
        start = stop + 1


def _by_position(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a list between two documents, nearest to half of the characters.

    Where less than a third would be on one side, the document in the middle is cut in two.
    """
    total, size, count = sum(map(len, documents)), 0, 0
    while count < len(documents) and 2 * size + len(documents[count]) <= total:
        size += len(documents[count])
        count += 1
    if 3 * min(size, total - size) < total:
        start = index = 0
        while 2 * (start + len(documents[index])) <= total:
            start += len(documents[index])
            index += 1
        if isinstance(documents[index], Conversation):  # its template takes all of it
            return list(documents[:count]), list(documents[count:])
        first, second = _cut(documents[index], max(total // 2 - start, 1))
        before, after = [*documents[:index], first], [second, *documents[index + 1 :]]
        return [d for d in before if d], [d for d in after if d]
    return list(documents[:count]), list(documents[count:])


def _cut(document: str, middle: int) -> tuple[str, str]:
    """Cut a document at the end of a line or between words, if one is near, else at `middle`."""
    near = max(len(document) // 20, 1)
    for joint in ("\n", " "):
        before = document.rfind(joint, max(middle - near, 0), middle + 1)
        after = document.find(joint, middle, middle + near)
        found = [place for place in (before, after) if place > 0]
        if found:
            middle = min(found, key=lambda place: abs(place - middle))
            break
    return document[:middle].strip(), document[middle:].strip()
