"""Output files and directories that appear whole or not at all, and locks on directories.

Of several processes that share a job (`simdiff.io.ranks`) process 0 alone checks, locks and writes;
what it refuses is refused in all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from simdiff.errors import SimdiffError
from simdiff.io import ranks
from simdiff.io.kinds import CONFIG, Kind, check_replaceable, list_files


@ranks.by_first
def check_new_path(path: Path, overwrite: bool, kind: Kind | None = None) -> None:
    """Refuse an output that exists or cannot be made, before any work is done for it.

    Args:
        path: of the output.
        overwrite: whether an earlier output of the same kind may be replaced.
        kind: what will be written; see `simdiff.io.kinds`.

    Raises:
        SimdiffError: the output exists and may not be replaced, or is of another kind; it is a
            symbolic link; its parent does not exist or may not be written to.
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
        raise SimdiffError(
            f"output {path} must not exist yet; give another path, or overwrite=True"
        )
    check_replaceable(path, kind)


def check_not_input(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input of the same command, or contains one.

    Raises:
        SimdiffError: see there; the input would be replaced.
    """
    if not output.exists():
        return
    whole = output.resolve()
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(whole):
            itself = path.resolve() == whole
            what = "be the input itself" if itself else f"contain the input {path}"
            raise SimdiffError(
                f"output {output} must not {what}, which it would replace: give another path"
            )


def check_apart(source: Path, output: Path) -> None:
    """Refuse an output directory that is the input directory, contains it, or lies in it.

    Raises:
        SimdiffError: the two are the same directory, or one lies in the other.
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


@ranks.by_first
def check_new_file(path: Path, overwrite: bool, kind: Kind | None = None) -> None:
    """Refuse an output file that exists or cannot be made, as `check_new_path` a directory.

    Raises:
        SimdiffError: see `check_new_path`; also when a directory has that name.
    """
    if path.is_dir():
        raise SimdiffError(f"output {path} must be a file, but is a directory")
    if path.exists() and not path.is_file():
        raise SimdiffError(f"output {path} must be a regular file; - is standard output")
    check_new_path(path, overwrite, kind)


@ranks.entered_by_first
@contextlib.contextmanager
def new_directory(
    path: Path, overwrite: bool = False, kind: Kind | None = None, *, finished: bool = False
) -> Iterator[Path]:
    """Yield an empty directory next to `path` that is renamed to `path` when the body succeeds.

    Its files are synced to the disk before the rename, which is atomic; an earlier output is
    exchanged for it, atomically too. A process that is killed at any moment leaves at `path` either
    what was there before or the complete output. Its files get the usual mode, whatever library
    wrote them. A leftover directory with a temporary name may remain; the next run for the same
    path removes it. With `finished` the work is done already: where the path was taken meanwhile,
    the result is kept beside it, as the error tells.

    Raises:
        SimdiffError: see `check_new_path`.
    """
    path = path.absolute()
    if not finished:
        check_new_path(path, overwrite, kind)
    remove_leftovers(path)
    scratch, lock = _locked_directory(path)
    try:
        yield scratch
        list_files(scratch, kind)
        _finish_tree(scratch)
        _replace_directory(scratch, path, overwrite, kind)
        _sync(path.parent)
    finally:
        _discard(scratch)
        os.close(lock)


def remove_leftovers(path: Path) -> list[Path]:
    """Remove the temporary directories that killed runs left next to an output; return their paths.

    A running process holds a lock on its directory. The system releases the lock when the process
    ends, however it ends, so an unlocked directory is a leftover.
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
    """Make a directory next to `path`; return it and the file descriptor that holds its lock."""
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
        if lock is not None:  # else another run took it for a leftover before it was locked
            os.close(lock)


def _try_lock(directory: Path) -> int | None:
    """Lock a directory; return the descriptor, or None if another process holds the lock."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks: the directory may be in use
        if any(directory.iterdir()):
            os.close(descriptor)
            return None
    return descriptor


def _discard(directory: Path) -> None:
    """Remove a directory; files that make a partial copy look like a model are removed first."""
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


def _finish_tree(directory: Path) -> None:
    """Give everything the mode that a new file or directory has, and sync it."""
    mask = _umask()  # mkdtemp and safetensors' save_file make what they write private
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            path.chmod(0o666 & ~mask)
            _sync(path)
        os.chmod(folder, 0o777 & ~mask)
        _sync(Path(folder))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _kept_elsewhere(scratch: Path, path: Path) -> Iterator[None]:
    """Keep a finished result beside its path, where that was taken while the result was made."""
    try:
        yield
    except SimdiffError as error:
        names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
        other = next(name for name in names if not name.exists())
        scratch.rename(other)
        raise SimdiffError(f"{error}; this result is kept as {other}") from None


def _replace_directory(scratch: Path, path: Path, overwrite: bool, kind: Kind | None) -> None:
    with _kept_elsewhere(scratch, path):
        check_new_path(path, overwrite, kind)  # somebody may have made it in the meantime
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
    """Exchange two paths in one atomic operation; return False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    status = rename(
        at_working_directory,
        os.fsencode(first),
        at_working_directory,
        os.fsencode(second),
        ctypes.c_uint(exchange),
    )
    return bool(status == 0)


@contextlib.contextmanager
def new_file(
    path: Path, overwrite: bool = False, kind: Kind | None = None, *, finished: bool = False
) -> Iterator[Path]:
    """Yield the path of an empty file next to `path`, renamed to `path` when the body succeeds.

    What another command has written to `path` in the meantime stays, and this result is kept beside
    it, as the error tells; with `finished` that holds for the time before the call too.

    Its content is synced to the disk before the rename. A process that is killed at any moment
    leaves at `path` either what was there before or the complete file.

    Raises:
        SimdiffError: see `check_new_file`; or the file cannot be written.
    """
    path = path.absolute()
    if not finished:
        check_new_file(path, overwrite, kind)
    scratch = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        os.close(handle)
        scratch = Path(name)
        yield scratch
        _sync(scratch)
        scratch.chmod(0o666 & ~_umask())  # mkstemp makes it private
        _replace_file(scratch, path, overwrite, kind)
    except OSError as error:
        raise SimdiffError(f"output {path}: cannot be written: {error.strerror}") from None
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
    _sync(path.parent)


def _replace_file(scratch: Path, path: Path, overwrite: bool, kind: Kind | None) -> None:
    with _kept_elsewhere(scratch, path):
        check_new_file(path, overwrite, kind)  # somebody may have made it in the meantime
        if overwrite:
            os.replace(scratch, path)
            return
        try:
            os.link(scratch, path)  # unlike a rename, refused where there is a file by now
        except FileExistsError:
            check_new_file(path, overwrite, kind)
            raise
        except OSError:  # a file system without hard links
            os.replace(scratch, path)


@ranks.entered_by_first
@contextlib.contextmanager
def held_directory(directory: Path, purpose: str) -> Iterator[None]:
    """Make a directory and lock it against other processes; the lock ends with this process.

    Args:
        directory: the path; its parent must exist.
        purpose: what the run does, for messages, such as "comparison".

    Raises:
        SimdiffError: another process holds the lock, or the directory cannot be made.
    """
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise SimdiffError(
            f"{directory} must be a directory for the state of a {purpose}: {error.strerror}"
        ) from None
    lock = _try_lock(directory)
    if lock is None:
        raise SimdiffError(
            f"{directory} must be used by one {purpose} at a time, and another one runs (or the "
            "file system has no locks, and earlier work is there)"
        )
    try:
        yield
    finally:
        os.close(lock)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either complete or absent.

    Raises:
        SimdiffError: it cannot be written, such as on a full disk.
    """
    if not ranks.writes():
        return
    scratch = None
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, path)
    except BaseException as error:
        if scratch is not None:
            os.unlink(scratch)
        if isinstance(error, OSError):
            raise SimdiffError(f"output {path}: cannot be written: {error.strerror}") from None
        raise


def write_new(path: Path, content: bytes, overwrite: bool, kind: Kind) -> None:
    """Write a finished output of a command, see `new_file`; of several processes the first does."""

    def write() -> None:
        with new_file(path, overwrite, kind, finished=True) as scratch:
            scratch.write_bytes(content)

    ranks.first(write)


def write_config(directory: Path, config: str | None) -> None:
    """Put the file that repeats a command into its output; None writes none."""
    if config is not None:
        write_bytes(directory / CONFIG, config.encode())
