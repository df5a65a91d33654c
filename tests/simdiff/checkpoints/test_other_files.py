"""What goes along because a copied file names it, and what would lead out of the directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simdiff.checkpoints.other_files import sort_other_files
from simdiff.errors import SimdiffError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An embedder of sentence-transformers, with things that nobody names beside it."""
    folder = tmp_path / "source"
    files = {
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense/"}]),
        "1_Pooling/config.json": "{}",
        "2_Dense/config.json": json.dumps({"extra": "tables/rows.dat"}),
        "2_Dense/model.safetensors": "weights",
        "3_Other/config.json": "{}",
        "tables/rows.dat": "rows",
        "tables/columns.dat": "columns",
        "sounds.npz": "sounds",
        "processor_config.json": json.dumps({"banks": [{"file": "./sounds.npz"}], "x": "model"}),
        "broken.json": "{",
        "notes.odt": "notes",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_what_a_copied_file_names(source: Path) -> None:
    found = sort_other_files(source, ())
    assert sorted(map(str, found.copied)) == [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "broken.json",
        "modules.json",
        "processor_config.json",
        "sounds.npz",
        "tables/rows.dat",
    ]
    assert found.left_behind == {
        "3_Other": "a folder of unknown purpose",
        "notes.odt": "of unknown purpose",
        "tables": "a folder of unknown purpose",
    }


@pytest.mark.parametrize("how", ["file", "folder", "inside", "name"])
def test_what_leads_out_is_refused(how: str, source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    if how == "file":
        (source / "tokenizer.json").symlink_to(secret / "config.json")
    elif how == "folder":
        (source / "1_Pooling" / "config.json").unlink()
        (source / "1_Pooling").rmdir()
        (source / "1_Pooling").symlink_to(secret)
    elif how == "inside":
        (source / "2_Dense" / "vocab.txt").symlink_to("../../secret/config.json")
    else:
        (source / "modules.json").write_text(json.dumps([{"path": "../secret"}]))
    with pytest.raises(SimdiffError, match=r"(must lie in|leads out of) .*secret"):
        sort_other_files(source, ())
