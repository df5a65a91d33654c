"""The two halves of a text: what calibrates is not what is held out, nor tells of it."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from simdiff.data import halves
from simdiff.data.halves import split_groups, split_text, unrepeated, without_duplicates
from simdiff.data.related import runs_of


def paragraph(article: str, number: int, words: int = 100) -> str:
    """So many words of 10 characters with the blank, none of which another paragraph has."""
    return " ".join(f"{article}{number:03d}x{word:04d}" for word in range(words))


def test_a_file_is_divided_by_position(tmp_path: Path) -> None:
    """Three articles of 20 paragraphs: A before the middle, C behind it, whatever the seed."""
    names = [(article, number) for article in "abc" for number in range(20)]
    paragraphs = [paragraph(*name) for name in names]
    path = tmp_path / "three.txt"
    path.write_text("\n\n".join(paragraphs))
    found = [split_text(path, seed) for seed in (0, 1)]
    for calibration, held_out in found:
        # 900 to 1000 characters each: three make a piece of 2048, and 30 of 60 are the middle.
        assert sorted("\n\n".join(calibration).split("\n\n")) == sorted(paragraphs[:30])
        assert sorted("\n\n".join(held_out).split("\n\n")) == sorted(paragraphs[30:])
        assert {len(piece.split("\n\n")) for piece in calibration + held_out} == {3}
        for piece in calibration:
            numbers = [paragraphs.index(part) for part in piece.split("\n\n")]
            assert numbers == [*range(numbers[0], numbers[0] + 3)]
    assert found[0] == split_text(path, 0)
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_documents_of_their_own_stay_whole(tmp_path: Path) -> None:
    documents = [paragraph("d", number, 10 + number) for number in range(9)]
    calibration, held_out = split_text(documents, 0)
    # 10 ... 18 words; 10 + ... + 14 = 60 of 126 are below half, 75 would be above.
    assert sorted(calibration) == documents[:5]
    assert sorted(held_out) == documents[5:]
    lines = [f'{{"text": "{document}"}}' for document in documents]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    assert split_text(tmp_path / "text.jsonl", 0) == (calibration, held_out)
    assert [*map(len, split_text(documents[:2], 0))] == [1, 1]


def test_a_document_in_the_middle_is_cut_where_a_side_would_be_short(tmp_path: Path) -> None:
    """There is a held-out half wherever there is text for it, whatever the text is made of."""
    long = paragraph("d", 0, 700)
    for documents in ([long], ["a title", long], ["a title", long, "the end"]):
        calibration, held_out = split_text(documents, 0)
        sizes = [len(" ".join(half)) for half in (calibration, held_out)]
        assert abs(sizes[0] - sizes[1]) < 40
        found = " ".join(sorted(calibration, key=len) + sorted(held_out, key=len, reverse=True))
        assert sorted(found.split()) == sorted(" ".join(documents).split())  # no word is cut
        path = tmp_path / "plain.txt"
        path.write_text("\n\n".join(documents))
        calibration, held_out = split_text(path, 0)
        assert len(calibration) > 4 < len(held_out)
        assert sorted(" ".join(calibration + held_out).split()) == sorted(found.split())
    for text in ("x" * 70_000, "字" * 70_000, "l" * 40_000 + "\n" + "m" * 30_000):
        path.write_text(text)
        calibration, held_out = split_text(path, 0)
        assert abs(len("".join(calibration)) - 35_000) < 2_100
        assert abs(len("".join(held_out)) - 35_000) < 2_100
    assert split_text(["x"], 0) == (["x"], [])
    assert [*map(len, split_text(["one two", "three four"], 0))] == [1, 1]


@pytest.mark.parametrize("joint", ["\n", " "])
def test_text_without_blank_lines(tmp_path: Path, joint: str) -> None:
    path = tmp_path / "book.txt"
    words = paragraph("b", 0, 4000).split()
    path.write_text(joint.join(words))
    calibration, held_out = split_text(path, 3)
    first = sorted(joint.join(calibration).split(joint))
    assert first == words[: len(first)]
    assert sorted(joint.join(held_out).split(joint)) == words[len(first) :]
    # A piece ends with its 228th word of 9 characters; the middle lies within half a piece.
    assert len(first) % 228 == 0
    assert abs(len(first) - 2000) <= 114


def test_near_duplicates_are_not_held_out() -> None:
    """Of 15 words the runs of 8 are 8: after the first four others, four are the same."""
    seen = [f"s{n}" for n in range(15)]
    for changed, wanted in ((3, []), (4, [0])):
        other = [f"o{n}" for n in range(changed)] + seen[changed:]
        runs = [runs_of(" ".join(words)) for words in (other, seen)]
        assert len(np.intersect1d(*runs)) == 8 - changed
        kept = without_duplicates([" ".join(other)], [" ".join(seen), "x y"])
        assert kept == [" ".join(other)] * len(wanted)
    assert without_duplicates(["a b c"], ["a b c"]) == ["a b c"]  # too short to tell


def test_looking_for_near_duplicates_takes_memory_as_the_text_does() -> None:
    """A set of integers takes some 90 bytes a word, 15 times the text."""
    random_words = random.Random(0)
    documents = [
        " ".join(str(random_words.randrange(10**6)) for _ in range(500)) for _ in range(400)
    ]
    size = sum(map(len, documents))
    tracemalloc.start()
    try:
        assert without_duplicates(documents[:200], documents[200:]) == documents[:200]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * size / 2  # of the half that is known


def test_no_more_is_compared_than_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is taken at a time, what is kept is the same; what is not taken is not looked at."""
    others = [paragraph("o", number) for number in range(9)]
    documents = [paragraph("d", number) for number in range(12)]
    documents[3] = others[5]
    documents[8] = others[2]
    wanted = without_duplicates(documents, others)
    assert len(wanted) == 10
    for characters in (1, 1500, 4000, 10**6):
        assert [*unrepeated(documents, others, characters)] == wanted
    looked_at: list[str] = []
    monkeypatch.setattr(halves, "runs_of", lambda text: looked_at.append(text) or runs_of(text))
    assert next(unrepeated(documents, others, 1500)) == documents[0]
    assert looked_at == [*documents[:2], *others]


def test_groups_are_not_divided() -> None:
    groups = [
        [f"{name}{n} " * 10 for n in range(size)]
        for name, size in zip("abcdefgh", (1, 5, 2, 7, 3, 3, 4, 1), strict=True)
    ]
    for seed in range(5):
        halves = split_groups(groups, seed)
        sides = [{document in halves[0] for document in group} for group in groups]
        assert all(len(side) == 1 for side in sides)
        assert sorted(halves[0] + halves[1]) == sorted(d for group in groups for d in group)
        assert abs(len(halves[0]) - len(halves[1])) <= 7
    assert split_groups(groups, 0) != split_groups(groups, 1)


@pytest.mark.model
def test_halves_of_the_demo_text_have_nothing_in_common() -> None:
    calibration, held_out = split_text("demo", random.Random(5).randrange(100))
    assert len(calibration) + len(held_out) > 2900
    known = set[int]().union(*(runs_of(document).tolist() for document in calibration))
    assert not any(known & set(runs_of(document).tolist()) for document in held_out)
