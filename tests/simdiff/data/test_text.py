"""The two halves of a text: what calibrates is not what is held out, nor tells of it."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from simdiff.data import text as calibration_text
from simdiff.data.related import num_shared, runs_of
from simdiff.data.text import (
    read_documents,
    split_groups,
    split_text,
    text_tokens,
    without_duplicates,
)
from simdiff.errors import SimdiffError


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
    assert split_text(documents[:1], 0) == (documents[:1], [])


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
        assert num_shared(runs_of(" ".join(other)), runs_of(" ".join(seen))) == 8 - changed
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


def test_a_calibration_half_looks_for_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes all runs of words of the whole text; only what is held out needs them."""
    tokenizer = SimpleNamespace(bos_token_id=None)
    monkeypatch.setattr(calibration_text, "_tokenize", lambda _, documents, enough: documents)
    monkeypatch.setattr(calibration_text, "runs_of", lambda _: pytest.fail("looked for"))
    documents = [paragraph("d", number) for number in range(6)]
    found, count = text_tokens(documents, tokenizer, part="calibration")  # type: ignore[arg-type]
    assert (sorted(found), count) == (documents[:3], 3)
    with pytest.raises(pytest.fail.Exception, match="looked for"):
        text_tokens(documents, tokenizer, part="held-out")  # type: ignore[arg-type]
    with pytest.raises(SimdiffError, match="calibration, held-out or all, got 'test'"):
        text_tokens(documents, tokenizer, part="test")  # type: ignore[arg-type]


@pytest.mark.model
def test_halves_of_the_demo_text_have_nothing_in_common() -> None:
    calibration, held_out = split_text("demo", random.Random(5).randrange(100))
    assert len(calibration) + len(held_out) > 2900
    known = set[int]().union(*(runs_of(document).tolist() for document in calibration))
    assert not any(known & set(runs_of(document).tolist()) for document in held_out)


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert read_documents(str(path)) == ["one", "two"]
