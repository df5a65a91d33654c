"""Links and names that lead out of a directory, and those of the hub's cache, which may."""

from __future__ import annotations

from pathlib import Path

import pytest

from simdiff.errors import SimdiffError
from simdiff.io.links import check_inside, named_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "blobs").mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "own").write_text("own")
    return folder


def test_links_within_the_directory_and_to_blobs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "models--org--tiny" / "blobs" / "1f").write_text("weights")
    (model / "inner").symlink_to("own")
    (model / "weights").symlink_to("../../blobs/1f")
    (tmp_path / "alias").symlink_to(model)
    for folder in (model, tmp_path / "alias"):
        for name in ("own", "inner", "weights"):
            check_inside(folder / name, folder)


OUT = ("../../../secret", "{root}/secret", "/etc/passwd", "../../blobs")


@pytest.mark.parametrize("target", OUT)
def test_links_that_lead_out(target: str, model: Path, tmp_path: Path) -> None:
    (model / "link").symlink_to(target.format(root=tmp_path))
    with pytest.raises(SimdiffError, match=r"link: must lie in .*, but is a link to .*copy it"):
        check_inside(model / "link", model)


def test_names_in_files(model: Path, tmp_path: Path) -> None:
    (model / "1_Pooling").mkdir()
    assert named_file(model, "1_Pooling") == Path("1_Pooling")
    assert named_file(model, "1_Pooling/") == Path("1_Pooling")
    for name in ("", ".", "..", "./", "absent", "../absent", "own\nown", "x" * 300, "a\0b"):
        assert named_file(model, name) is None, name
    assert named_file(model, "1_Pooling/../own") is None
    for name in ("../../../secret", str(tmp_path / "secret"), "1_Pooling/../../../../secret"):
        with pytest.raises(SimdiffError, match="leads out of the directory"):
            named_file(model, name)
