"""Documents of files as they are: suffixes, marks, line ends, columns, folders, standard input."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from simdiff.data import documents
from simdiff.data.documents import TextFile, check_text, read_documents, read_runs, source_name
from simdiff.errors import SimdiffError

RECORDS = [{"text": "one"}, {"text": "two\u2028\x85 of\x0b it", "id": 2}]
TEXTS = ["one", "two\u2028\x85 of\x0b it"]
LINES = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("b.JSONL", ("\ufeff" + LINES.replace("\n", "\r\n") + "\r\n").encode()),
        ("c.ndjson", ("\ufeff" + LINES.replace("\n", "\n\ufeff")).encode()),
        ("d.jsonl", LINES.encode("utf-16")),
        ("e.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("f.Jsonl.BZ2", bz2.compress(LINES.encode())),
        ("g.json", json.dumps(RECORDS).encode()),
        ("h.json", json.dumps(TEXTS).encode("utf-16")),
        ("i.json", LINES.encode()),
        ("j.txt", "\ufeffone\n \t\u200b\n\x0c\xa0\n\n two\u2028\x85 of\x0b it \n".encode()),
        ("k", "one\r\n\r\ntwo\u2028\x85 of\x0b it\r\n".encode()),
        ("l.raw", " one \n \n\ufefftwo\u2028\x85 of\x0b it".encode("utf-16")),
    ],
)
def test_every_kind_of_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_documents(tmp_path / name) == TEXTS
    assert read_documents(str(tmp_path / name)) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}', 'line 2: "text" must be a string, got a number'),
        ("a.jsonl", b'{"text": null}', 'line 1: "text" must be a string, got null'),
        ("a.jsonl", b'{"text": ["x"]}', "must be a string, got a list"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}',
            'got "body", "id": .*--text-column',
        ),
        ("a.jsonl", b'["x"]', 'line 1 must be a JSON object with "text", got a list'),
        ("a.jsonl", b'\n{"text": "x"', "line 2 must be JSON, and is not"),
        ("a.json", b'[{"text": "x"}, 7]', "record 2 must be a JSON object"),
        ("a.txt", b"caf\xe9 noir", "byte 0xe9 .*iconv"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt", b" \n\t\n", "must hold text"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "`git lfs pull` it"),
        ("a.parquet", b"PAR1 and no more", "cannot be read"),
        ("a.arrow", b"ARROW1 and no more", "cannot be read"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: bytes, wanted: str) -> None:
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SimdiffError, match=wanted) as raised:
        check_text(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(SimdiffError, match=r"No such file .*did you mean .*corpus\.txt"):
        check_text(tmp_path / "corpus.tx")
    with pytest.raises(SimdiffError, match="'demo': No such file"):
        check_text(tmp_path / "no" / "corpus.txt")


def test_tables(tmp_path: Path) -> None:
    """Parquet, and both forms of Arrow; other columns by name."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": TEXTS * 600, "body": ["b"] * 1200, "id": range(1200)})
    parquet.write_table(table, tmp_path / "a.Parquet", row_group_size=500)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=500)
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("a.Parquet", "b.arrow", "c.arrow"):
        path = str(tmp_path / name)
        assert read_documents(path) == TEXTS * 600
        assert read_documents(TextFile(path, "body")) == ["b"] * 1200
        with pytest.raises(SimdiffError, match='"id" must be a string, got a number'):
            check_text(TextFile(path, "id"))
        with pytest.raises(
            SimdiffError, match='must have the column "none", got "text", "body", "id"'
        ):
            check_text(TextFile(path, "none"))


def test_tables_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SimdiffError, match="pip install pyarrow, or give the text as JSON Lines"):
        check_text(tmp_path / "a.parquet")


def test_a_folder(tmp_path: Path) -> None:
    """All files of known suffixes, by name; paragraphs of plain text stay apart from documents."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("five")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}')
    (tmp_path / "a.TXT").write_text("one\n\ntwo")
    for name in (".hidden.txt", "dataset_info.json", "README.md", "picture.png"):
        (tmp_path / name).write_text("{}")
    runs = read_runs(str(tmp_path))
    assert [(run.documents, run.plain) for run in runs] == [
        (["one", "two"], True),
        (["three", "four"], False),
        (["five"], True),
    ]
    with pytest.raises(SimdiffError, match="a.TXT: plain text has no columns, got .*'body'"):
        check_text(TextFile(str(tmp_path), "body"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SimdiffError, match="the folder must hold text files .*.parquet.*got none"):
        check_text(tmp_path / "empty")


@pytest.fixture
def fresh_input() -> Iterator[None]:
    documents._read_once.cache_clear()
    yield
    documents._read_once.cache_clear()


@pytest.mark.usefixtures("fresh_input")
@pytest.mark.parametrize(
    "content", [LINES.encode(), b"\xef\xbb\xbf" + LINES.encode(), "\n\n".join(TEXTS).encode()]
)
def test_standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """It is read once and serves again, in this process; another one is told so."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), closed=False))
    assert read_documents("-") == read_documents("-") == TEXTS
    name = source_name("-")
    assert name.startswith("standard input, sha256 ")
    assert read_documents(name) == TEXTS
    with pytest.raises(SimdiffError, match="cannot be read again: give the text as a file"):
        read_documents("standard input, sha256 0123")


@pytest.mark.usefixtures("fresh_input")
def test_a_pipe_serves_again(tmp_path: Path) -> None:
    """Such as a shell makes of <(zcat corpus.jsonl.gz)."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(LINES.encode()))
    writer.start()
    assert read_documents(pipe) == read_documents(str(pipe)) == TEXTS
    writer.join()


def test_plain_text_that_begins_like_json() -> None:
    assert documents._kind_of_content(b'{"a": 1} and words') == "plain"
    assert documents._kind_of_content(b"{not json\n") == "plain"
    assert documents._kind_of_content(b'\n {"a": 1}\n{') == "json lines"


def test_documents_in_memory() -> None:
    assert read_documents([" one ", "", "two"]) == ["one", "two"]
    with pytest.raises(SimdiffError, match="must be strings, got int at 1"):
        read_documents(["one", 2])  # type: ignore[list-item]
