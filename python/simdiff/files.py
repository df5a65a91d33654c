"""Outputs that appear whole or not at all, and the JSON files that the toolkit exchanges."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
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
    """Refuse an output that exists, before any work is done for it.

    Raises:
        SimdiffError: it exists and may not, or is not ours to, be replaced; no such parent.
    """
    if not path.parent.is_dir():
        raise SimdiffError(
            f"output {path}: its parent directory must exist, {path.parent} does not"
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
    """Yield an empty directory beside `path` that takes its name once the body has succeeded."""
    path = path.absolute()
    check_new_path(path, overwrite)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _replace_directory(scratch, path, overwrite)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace_directory(scratch: Path, path: Path, overwrite: bool) -> None:
    check_new_path(path, overwrite)  # somebody may have made it in the meantime
    if not path.exists():
        scratch.rename(path)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    path.rename(retired / path.name)
    scratch.rename(path)
    shutil.rmtree(retired)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is either complete or absent."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


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


def read_json(path: Path, schema: str, schema_version: int) -> dict[str, Any]:
    """Read a file written with `header(schema, schema_version)`.

    Raises:
        SimdiffError: no such file, not JSON, another kind of file, or a newer version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
