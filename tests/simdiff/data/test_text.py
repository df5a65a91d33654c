"""Parts of a text as tokens: only what is needed, and why there are none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simdiff.data import halves, text
from simdiff.data.documents import TextFile
from simdiff.data.text import text_tokens, token_windows
from simdiff.data.text_options import TextOptions, held_out_windows
from simdiff.errors import SimdiffError


class Letters:
    """A token for each character; keeps what it was asked for."""

    bos_token_id = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str, **options: object) -> Any:
        self.asked.append(text)
        return SimpleNamespace(input_ids=[*map(ord, text)])


@pytest.fixture
def letters() -> Any:
    return Letters()


def paragraph(number: int, words: int = 100) -> str:
    return " ".join(f"{number:03d}x{word:04d}" for word in range(words))


def test_only_what_is_held_out_looks_for_duplicates(
    monkeypatch: pytest.MonkeyPatch, letters: Any
) -> None:
    monkeypatch.setattr(halves, "runs_of", lambda _: pytest.fail("looked for"))
    documents = [paragraph(number) for number in range(6)]
    found = text_tokens(documents, letters, part="calibration")
    assert found.num_documents == 3
    assert len(found.tokens) == 3 * (899 + 2)
    with pytest.raises(pytest.fail.Exception, match="looked for"):
        text_tokens(documents, letters, part="held-out")
    with pytest.raises(SimdiffError, match="calibration, held-out or all, got 'test'"):
        text_tokens(documents, letters, part="test")


@pytest.mark.parametrize("part", ["calibration", "held-out", "all"])
def test_no_more_is_tokenised_than_is_needed(
    monkeypatch: pytest.MonkeyPatch, letters: Any, part: str
) -> None:
    """Of one document as of many, and the parts together are the text: none splits a word."""
    monkeypatch.setattr(text, "_AT_ONCE", 1000)
    whole = paragraph(0, 5000)
    found = text_tokens([whole], letters, part=part, enough=1500)
    assert 1500 <= len(found.tokens) <= 2000
    assert all(len(asked) <= 1000 for asked in letters.asked)
    letters.asked.clear()
    every = text_tokens([whole], letters, part=part).tokens
    assert "".join(map(chr, every)).strip() in whole
    assert all(asked[0] == " " for asked in letters.asked[1:])
    letters.asked.clear()
    text_tokens(["x" * 5000], letters, part="all")
    assert [*map(len, letters.asked)] == [1000] * 5 + [2]


def test_half_of_a_surrogate_pair_is_no_character(letters: Any) -> None:
    assert chr(text_tokens(["a\ud800b" * 9], letters, part="all").tokens[1]) == "?"


def test_a_part_that_fills_no_window(tmp_path: Path, letters: Any) -> None:
    """The message says how a text is divided, and every way out."""
    path = tmp_path / "short.txt"
    path.write_text("a short text of one line only")
    for part, wanted in (
        ("calibration", "its calibration half .* cut in two by its length.*window_length="),
        ("held-out", "its held-out half .* cut in two by its length.*held_out=.*; .*--part all"),
        ("all", "the text must fill one window of 64 tokens, got 31 tokens in 1 documents; give"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            token_windows(path, letters, part=part, window_length=64)
    path.write_text("\n".join(["the same line of eight words again and again"] * 40))
    with pytest.raises(SimdiffError, match="every document in it stands in the calibration half"):
        token_windows(path, letters, part="held-out", window_length=64)


def test_fewer_windows_than_asked_for_are_told(
    tmp_path: Path, letters: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(map(paragraph, range(20))))
    TextOptions(str(path), 4, 100).windows(letters, "calibration")
    assert capsys.readouterr().err == ""
    TextOptions(str(path), 400, 100).windows(letters, "calibration")
    told = " ".join(capsys.readouterr().err.split())
    assert told.endswith("text.txt fills 90 windows, and 400 were asked for")


def test_a_column_of_another_name(tmp_path: Path, letters: Any) -> None:
    """It is in the record, and holds for another text to evaluate on too."""
    rows = "".join(f'{{"content": "{paragraph(number)}", "text": "no"}}\n' for number in range(4))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(rows)
    options = TextOptions(TextFile(str(tmp_path / "a.jsonl"), "content"), 4, 100)
    identity = options.windows(letters, "calibration").identity.to_dict()
    assert identity["column"] == "content"
    assert identity["source"] == str(tmp_path / "a.jsonl")
    other = held_out_windows(options, letters, str(tmp_path / "b.jsonl"))
    assert other.identity.column == "content"
    usual = TextOptions(str(tmp_path / "a.jsonl"), 1, 4).windows(letters, "all")
    assert "column" not in usual.identity.to_dict()
