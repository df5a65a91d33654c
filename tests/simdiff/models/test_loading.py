"""Where the name of a model leads."""

from __future__ import annotations

from pathlib import Path

import pytest

from simdiff.data.demo import demo_model
from simdiff.errors import SimdiffError
from simdiff.models.loading import source_directory


def test_where_a_name_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache as it lies on disk: names of commits, links to blobs."""
    assert source_directory(str(tmp_path)) == tmp_path
    assert source_directory("demo") == demo_model()
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert source_directory("someone/tiny") == snapshot
    for name in ("someone/else", str(tmp_path / "none"), "a b"):
        with pytest.raises(SimdiffError, match="must be a directory or a hub name"):
            source_directory(name)
