"""Outputs that appear whole or not at all, and the JSON files that the toolkit exchanges."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simdiff.errors import SimdiffError

# Every directory that the toolkit writes holds one of these; only such a directory is overwritten.
MARKER = "plan.json"
COMPARISON_MARKER = "compare.json"


def check_new_path(path: Path, overwrite: bool) -> None:
    """Refuse an output that exists or cannot be made, before any work is done for it.

    Raises:
        SimdiffError: it exists and may not, or is not ours to, be replaced; it is a symbolic link;
            no such parent, or one that may not be written to.
    """
    if not path.parent.is_dir():
        raise SimdiffError(
            f"output {path}: its parent directory must exist, {path.parent} does not"
        )
    effective = os.access in os.supports_effective_ids
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise SimdiffError(
            f"output {path}: its parent directory must be writable, {path.parent} is not "
            f"(for user id {os.geteuid()}): give another path or change its permissions"
        )
    if path.is_symlink():
        raise SimdiffError(
            f"output {path} must not be a symbolic link (to {path.readlink()}): "
            "give the path itself"
        )
    if not path.exists():
        return
    if not overwrite:
        raise SimdiffError(f"output {path} must not exist yet; give another path or --overwrite")
    markers = (MARKER, COMPARISON_MARKER)
    ours = path.is_dir() and any((path / marker).is_file() for marker in markers)
    if path.is_dir() and any(path.iterdir()) and not ours:
        raise SimdiffError(
            f"output {path} exists and holds no {' or '.join(markers)}, so simdiff did not write "
            "it: it is not overwritten"
        )


def check_apart(source: Path, output: Path) -> None:
    """Refuse an output that would lie in the input, or replace it.

    Raises:
        SimdiffError: they are the same directory, or one lies in the other.
    """
    inside, outside = output.resolve(), source.resolve()
    if inside == outside:
        raise SimdiffError(f"output {output} must not be the input itself: give another path")
    if inside.is_relative_to(outside):
        raise SimdiffError(
            f"output {output} must not lie inside the input {source}: give a path beside it"
        )
    if outside.is_relative_to(inside):
        raise SimdiffError(
            f"output {output} must not contain the input {source}, which it would replace: give "
            "another path"
        )


def check_new_file(path: Path, overwrite: bool) -> None:
    """`check_new_path` for an output that is one file.

    Raises:
        SimdiffError: also when a directory has that name.
    """
    if path.is_dir():
        raise SimdiffError(f"output {path} must be a file, but is a directory")
    check_new_path(path, overwrite)


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path` that takes its name once the body has succeeded.

    Everything in it is on the disk before it gets the name, in one atomic rename or, where it
    replaces an earlier output, exchange. Killed at any moment, it leaves at `path` what was there
    before, or the whole; what may remain beside it, under a name of its own, is removed by the next
    run for the same path.

    Raises:
        SimdiffError: see `check_new_path`.
    """
    path = path.absolute()
    check_new_path(path, overwrite)
    remove_leftovers(path)
    scratch, lock = _locked_directory(path)
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _sync_tree(scratch)
        _replace_directory(scratch, path, overwrite)
        _sync(path.parent)
    finally:
        _discard(scratch)
        os.close(lock)


def remove_leftovers(path: Path) -> list[Path]:
    """Remove what killed runs for this output left beside it; returns what that was.

    A running process holds a lock on its directory, which ends with it, however it ends.
    """
    pattern = re.compile(re.escape(f".{path.name}.") + "(partial|old)-[a-z0-9_]{8}")
    removed = []
    for leftover in path.parent.iterdir():
        if not pattern.fullmatch(leftover.name) or leftover.is_symlink() or not leftover.is_dir():
            continue
        lock = _try_lock(leftover)
        if lock is not None:
            if (leftover / path.name).exists() and not path.exists():  # see _replace_directory
                (leftover / path.name).rename(path)
            _discard(leftover)
            os.close(lock)
            removed.append(leftover)
    return removed


def _locked_directory(path: Path, kind: str = "partial") -> tuple[Path, int]:
    """A new directory beside `path` and the descriptor that holds its lock."""
    while True:
        try:
            scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.{kind}-", dir=path.parent))
        except OSError as error:
            raise SimdiffError(
                f"output {path}: {path.parent} must let a directory be made: {error.strerror}"
            ) from None
        lock = _try_lock(scratch)
        if lock is not None and scratch.exists():
            return scratch, lock
        if lock is not None:  # another run took it for a leftover before it was locked
            os.close(lock)


def _try_lock(directory: Path) -> int | None:
    """A descriptor that locks the directory, or None if another process holds the lock."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks: what is there may be in use
        if any(directory.iterdir()):
            os.close(descriptor)
            return None
    return descriptor


def _discard(directory: Path) -> None:
    """Remove a directory, beginning with what would make a part of it look like a model."""
    if not directory.is_dir():
        directory.unlink(missing_ok=True)
        return
    for config in directory.rglob("config.json"):
        config.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace_directory(scratch: Path, path: Path, overwrite: bool) -> None:
    check_new_path(path, overwrite)  # somebody may have made it in the meantime
    if not path.exists():
        scratch.rename(path)
    elif not _exchange(scratch, path):
        # Without an atomic exchange: killed between the renames, the earlier output lies in
        # `retired`, whole, and the next run puts it back.
        retired, lock = _locked_directory(path, "old")
        path.rename(retired / path.name)
        scratch.rename(path)
        _discard(retired)
        os.close(lock)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    status = rename(
        at_working_directory, os.fsencode(first), at_working_directory, os.fsencode(second),
        ctypes.c_uint(exchange),
    )  # fmt: skip
    return bool(status == 0)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is either complete or absent."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    write_bytes(Path(path), (text + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either complete or absent."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def read_json(path: str | Path, schema: str, schema_version: int) -> dict[str, Any]:
    """Read a file written with `header(schema, schema_version)`.

    Raises:
        SimdiffError: no such file, not JSON, another kind of file, or a newer version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SimdiffError(f"{path}: must be a readable {schema} file: {error.strerror}") from None
    except ValueError as error:
        raise SimdiffError(f"{path}: must be a {schema} file, but is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != schema:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise SimdiffError(f"{path}: must be a {schema} file, got schema {found!r}")
    found = content.get("schema_version")
    if not isinstance(found, int) or not 1 <= found <= schema_version:
        raise SimdiffError(
            f"{path}: must have schema_version 1 to {schema_version}, got {found!r}"
            + ("; a newer simdiff wrote it" if isinstance(found, int) and found > 0 else "")
        )
    return content


def header(schema: str, schema_version: int) -> dict[str, Any]:
    """What every file of ours starts with: its kind, version, and what wrote it."""
    return {
        "schema": schema,
        "schema_version": schema_version,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "simdiff-kernels": version("simdiff-kernels"),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    }
