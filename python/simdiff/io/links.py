"""Files of a directory that somebody else made: links and names must not lead out of it.

A checkpoint may come from an archive or a stranger. A link to a private file would be copied into
an output that is published, and a name with .. would be read from anywhere. The cache of the
Hugging Face hub is the one exception: its snapshots are links to the blobs beside them.
"""

from __future__ import annotations

from pathlib import Path

from simdiff.errors import SimdiffError


def leads_out(path: Path, directory: Path) -> bool:
    """Whether a path, links followed, lies outside a directory and its blobs in the hub's cache."""
    target, root = path.resolve(), directory.resolve()
    if target.is_relative_to(root):
        return False
    repository = target.parent.parent
    return not (target.parent.name == "blobs" and repository.name.startswith("models--"))


def check_inside(path: Path, directory: Path) -> None:
    """Refuse a path that leads out of a directory.

    Raises:
        SimdiffError: names the path and where it leads.
    """
    if not leads_out(path, directory):
        return
    link = "is a link" if path.is_symlink() else "leads"
    raise SimdiffError(
        f"{path}: must lie in {directory}, but {link} to {path.resolve()}: a file outside of the "
        "checkpoint's directory is not read; copy it there if it belongs to the model"
    )


def named_file(directory: Path, name: str) -> Path | None:
    """The file or folder of a directory that a text names, relative to it; None if there is none.

    Raises:
        SimdiffError: the text names something that exists outside of the directory.
    """
    if not name or len(name) > 255 or not name.isprintable() or name.strip("./") == "":
        return None
    path = directory / name
    try:
        exists = path.exists()
    except OSError:  # such as a part that is too long
        return None
    if not exists:
        return None
    if ".." in Path(name).parts or Path(name).is_absolute():
        if leads_out(path, directory):
            raise SimdiffError(
                f"{directory}: a file names {name!r}, which leads out of the directory to "
                f"{path.resolve()}: remove that entry"
            )
        return None
    return Path(name)
