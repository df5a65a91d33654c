"""Text on the command line: standard input, columns, and what is known before a model is loaded."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from simdiff.data import documents
from support.commands import SMALL, simdiff


@pytest.fixture
def fresh_input() -> Iterator[None]:
    documents._read_once.cache_clear()
    yield
    documents._read_once.cache_clear()


@pytest.mark.usefixtures("fresh_input")
def test_standard_input_and_columns(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same text gives the same scores; a plan says that a pipe cannot be read again."""
    content = tiny_text.read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), closed=False))
    rows = [{"body": text} for text in content.decode().split("\n\n")]
    lines = tmp_path / "rows.JSONL"
    lines.write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for name, text in (
        ("file", (tiny_text,)),
        ("pipe", ("-",)),
        ("rows", (lines, "--text-column", "body")),
    ):
        out = tmp_path / f"{name}.json"
        assert simdiff("score", tiny_checkpoint, "--text", *text, *SMALL, "-o", out) == 0
        found[name] = json.loads(out.read_text())
    assert found["pipe"]["metrics"] == found["file"]["metrics"]
    assert found["rows"]["calibration"]["column"] == "body"
    plan = ("--model", tiny_checkpoint, "--num-layers", 2)
    assert simdiff("plan", tmp_path / "rows.json", *plan, "-o", tmp_path / "plan.json") == 0
    capsys.readouterr()
    assert simdiff("plan", tmp_path / "pipe.json", *plan, "-o", tmp_path / "other.json") == 2
    assert "cannot be read again" in capsys.readouterr().err
    tiny_text.write_text(tiny_text.read_text()[:-3000])
    assert simdiff("plan", tmp_path / "file.json", *plan, "-o", tmp_path / "other.json") == 2
    assert "has changed (other tokens sha256)" in capsys.readouterr().err


def test_what_the_end_needs_is_known_before_the_model_runs(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A text that is not there, before it is loaded; held-out windows and disk, before it runs."""
    out = ("-o", tmp_path / "out")
    absent = ("--text", tmp_path / "texd.txt", *SMALL)
    commands = {
        "run": (),
        "score": (),
        "profile": (),
        "compare": (),
        "recover": ("--remove", "2"),
        "eval": (),
    }
    for command, options in commands.items():
        assert simdiff(command, tiny_checkpoint, *absent, *options, *out) == 2
        told = capsys.readouterr().err
        assert f"did you mean {tiny_text}?" in told, command
        assert "load torch" not in told, command
        assert f"load {tiny_checkpoint}" not in told, command
    held = ("--text", tiny_text, "--held-out", tmp_path / "none.txt", *SMALL)
    for command in ("run", "compare", "recover"):
        assert simdiff(command, tiny_checkpoint, *held, *commands[command], *out) == 2
        assert f"load {tiny_checkpoint}" not in capsys.readouterr().err, command
    short = tmp_path / "short.txt"
    short.write_text(" ".join(["w1"] * 17))
    for options, wanted in (
        (("--held-out", short, "--windows", 4, "--window-length", 20), "must fill one window"),
        ((*SMALL,), "bytes free"),
    ):
        if wanted == "bytes free":
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        for command in ("run", "recover"):
            words = (command, tiny_checkpoint, "--text", tiny_text, *options, *commands[command])
            assert simdiff(*words, *out) == 2
            told = capsys.readouterr().err
            assert wanted in told
            assert "score:" not in told
            assert "perplexity" not in told
    assert not (tmp_path / "out").exists()
