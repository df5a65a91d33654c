"""Conversations are read as the model's chat template writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from simdiff.data.documents import TextFile, read_documents
from simdiff.data.halves import split_text
from simdiff.data.text import token_windows
from simdiff.errors import SimdiffError

TEMPLATE = (
    "{% for m in messages %}w90 {{ m['role'] == 'user' and 'w1' or 'w2' }} {{ m['content'] }} w91 "
    "{% endfor %}"
)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    turns = [[("user", f"w{n}"), ("assistant", f"w{n + 40} w{n}")] for n in range(3, 40)]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_models_own_template(chats: Path, tiny_checkpoint_files: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint_files)
    with pytest.raises(SimdiffError, match="no chat template.*--text-column"):
        token_windows(str(chats), tokenizer, num_windows=2, window_length=9)
    tokenizer.chat_template = TEMPLATE
    found = token_windows(str(chats), tokenizer, part="all", num_windows=2, window_length=9)
    assert found.tokens.tolist()[1] == [90, 1, 4, 91, 90, 2, 44, 4, 91]
    halves = [
        token_windows(str(chats), tokenizer, part=part, num_windows=3, window_length=9).tokens
        for part in ("calibration", "held-out")
    ]
    assert not {*halves[0][:, 2].tolist()} & {*halves[1][:, 2].tolist()}
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SimdiffError, match="refuses a conversation .*user, assistant.*alternate"):
        token_windows(str(chats), tokenizer, num_windows=2, window_length=9)


def test_other_names_of_the_same(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.jsonl"
    turn = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "you"}]
    path.write_text(json.dumps({"talk": turn, "id": 1}))
    found = read_documents(TextFile(str(path), "talk"))[0]
    assert found == "user: hello\n\nassistant: you"
    rows = [[{"role": "user", "content": "hello"}]]
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "b.parquet")
    assert read_documents(tmp_path / "b.parquet") == ["user: hello"]
    path.write_text(json.dumps({"messages": ["hello"]}))
    with pytest.raises(SimdiffError, match='"text", got "messages"'):
        read_documents(path)


def test_none_is_cut_in_two(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [[{"role": "user", "content": "w1 " * count}] for count in (5, 900, 5)]
    path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    halves = split_text(str(path), 0)
    assert sorted(len(document.messages[0]["content"]) for half in halves for document in half) == [
        15,
        15,
        2700,
    ]
