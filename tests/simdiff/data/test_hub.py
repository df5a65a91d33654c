"""Data sets by name: read from folders by the real library, and found on a hub that is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simdiff.data import hub
from simdiff.data.documents import TextFile, TextMix, check_text, read_documents, source_name
from simdiff.data.hub import read_hub_text
from simdiff.errors import SimdiffError

datasets = pytest.importorskip("datasets")
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _forgetful() -> None:
    read_hub_text.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a data set: two configs; the first has two splits and a column of its own."""
    path = tmp_path_factory.mktemp("hub") / "set"
    path.mkdir()
    for name, rows in {
        "wide-train": [{"body": f" train {n} ", "id": n} for n in range(9)],
        "wide-test": [{"body": f"test {n}", "id": n} for n in range(3)],
        "chat": [
            {
                "messages": [
                    {"role": "user", "content": f"w{n}"},
                    {"role": "assistant", "content": "w5"},
                ]
            }
            for n in range(4)
        ],
    }.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: wide\n  data_files:\n"
        "  - split: train\n    path: wide-train.jsonl\n  - split: test\n    path: wide-test.jsonl\n"
        "- config_name: chat\n  data_files: chat.jsonl\n---\n"
    )
    return path


@pytest.fixture
def on_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same as a repository: the library's one look-up by name gives the folder's builder."""
    real = datasets.load_dataset_builder

    def found(name: str, config: str | None, revision: str | None = None) -> Any:
        assert name == "org/set"
        builder = real(str(folder), config)
        builder.hash = SHA
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", found)
    return "org/set"


def test_split_column_and_number_of_rows(folder: Path) -> None:
    text = TextFile(f"hf:{folder}:wide:train", "body")
    assert read_documents(text) == [f"train {n}" for n in range(9)]
    assert read_documents(TextFile(f"hf:{folder}:wide[:2]", "body")) == ["train 0", "train 1"]
    assert read_documents(TextFile(f"hf:{folder}:wide:test", "body"))[-1] == "test 2"


def test_the_name_of_what_was_read_reads_it_again(on_hub: str) -> None:
    text = TextFile(f"hf:{on_hub}:wide", "body")
    name = source_name(text)
    assert name == f"hf:org/set@{SHA}:wide:train[:9]"
    assert source_name(TextFile(name, "body")) == name
    assert read_documents(TextFile(name, "body")) == read_documents(text)
    assert read_hub_text(name, "body")[0].to_dict() == {
        "source": name,
        "dataset": "org/set",
        "revision": SHA,
        "config": "wide",
        "split": "train",
        "rows": 9,
    }


def test_no_more_is_read_than_is_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MOST_CHARACTERS", 20)
    text = TextFile(f"hf:{folder}:wide", "body")
    assert len(read_documents(text)) == 3  # of 9 characters each
    assert source_name(text).endswith("[:3]")


def test_other_columns_are_not_decoded(tmp_path: Path) -> None:
    """Bytes that are no picture stand beside the text."""
    rows = {"text": ["one", "two"], "image": [{"bytes": b"none", "path": None}] * 2}
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    assert read_documents(f"hf:{tmp_path}") == ["one", "two"]


def test_messages_are_a_conversation(folder: Path) -> None:
    found = read_documents(f"hf:{folder}:chat")
    assert found[1] == "user: w1\n\nassistant: w5"
    assert found[1].messages[0] == {"role": "user", "content": "w1"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("tail", "column", "wanted"),
    [
        ("", "body", "chat.*wide"),
        (":none", "body", "'none' not found. Available: .*'wide', 'chat'"),
        (":wide:validation", "body", "one of train, test, got 'validation'"),
        (":wide:trian", "body", "did you mean train"),
        (":wide:train", "text", 'row 1 must have the column "text", got "body", "id": .*--text-c'),
        (":wide:test[:5]", "body", "must have 5 rows, got 3"),
        (":wide:train:9", "body", "must be of the form hf:NAME"),
    ],
)
def test_what_is_not_there(folder: Path, tail: str, column: str, wanted: str) -> None:
    with pytest.raises(SimdiffError, match=wanted) as error:
        check_text(TextFile(f"hf:{folder}{tail}", column))
    assert "\n" not in str(error.value)


def test_another_revision_than_the_cache_has(on_hub: str) -> None:
    other = SHA.replace("0", "f")
    with pytest.raises(SimdiffError, match=f"of revision {other}, and the cache has {SHA}"):
        read_hub_text(f"hf:org/set@{other}:wide:train", "body")
    assert read_hub_text("hf:org/set@main:wide:train", "body")[0].revision == SHA


def test_the_cache_answers_without_a_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `load_dataset` leaves a data set of the hub, whose revision is the name of a folder."""
    cache = tmp_path / "cache"
    file = str(folder / "wide-test.jsonl")
    made = datasets.load_dataset("json", data_files=file, cache_dir=str(cache))
    arrow = Path(made["train"].cache_files[0]["filename"])
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    kept = cache / "org___set" / "wide" / "0.0.0" / SHA
    kept.mkdir(parents=True)
    arrow.rename(kept / "set-train.arrow")
    changed = info | {"dataset_name": "set", "config_name": "wide"}
    (kept / "dataset_info.json").write_text(json.dumps(changed))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    text = TextFile("hf:org/set:wide", "body")
    assert read_documents(text) == ["test 0", "test 1", "test 2"]
    assert source_name(text) == f"hf:org/set@{SHA}:wide:train[:3]"
    assert read_documents(TextFile(source_name(text), "body"))[2] == "test 2"
    with pytest.raises(SimdiffError, match="Available configs in the cache: .*wide"):
        check_text(TextFile("hf:org/set:narrow", "body"))


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SimdiffError, match="org/none.* cannot be reached .*a folder"):
        check_text("hf:org/none")


def test_a_login_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        response = SimpleNamespace(status_code=401, headers={}, request=None)
        raise GatedRepoError("401", response=response)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.load, "_raise_if_offline_mode_is_enabled", lambda: None)
    monkeypatch.setattr(HfApi, "hf_hub_download", refuse)
    with pytest.raises(SimdiffError, match="gated data ?set.*`hf auth login`"):
        check_text("hf:org/gated")


def test_the_library_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SimdiffError, match=r"pip install \"simdiff-kernels\[datasets\]\""):
        check_text("hf:org/set")


def test_in_a_mix(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "local_x"}) for _ in range(50)))
    mix = TextMix((str(tmp_path / "a.jsonl"), TextFile(f"hf:{folder}:wide", "body")), (2.0, 1.0))
    found = read_documents(mix)
    assert found.count("local_x") == 19
    assert found[:3] == ["local_x", "train 0", "local_x"]
    assert source_name(mix).startswith(f"2 x {tmp_path}/a.jsonl + 1 x hf:{folder}:wide:train[:9]")
