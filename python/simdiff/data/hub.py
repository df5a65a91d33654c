"""Text of data sets by name: `hf:NAME[@REVISION][:CONFIG[:SPLIT]][[:ROWS]]`.

The library `datasets` streams the rows: only the files that hold the first rows are read, and its
cache answers where no hub does. NAME may be a folder with a copy of a data set. The name of what
was read gives the revision, the config, the split and the number of rows, and reads the same again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from simdiff.data.conversations import is_conversation
from simdiff.errors import SimdiffError, nearest

PREFIX = "hf:"
FORM = "hf:NAME[@REVISION][:CONFIG[:SPLIT]][[:ROWS]]"
# Where no number of rows is given: about eight million tokens.
MOST_CHARACTERS = 2**25
_NAME = re.compile(
    r"hf:(?P<name>[^:@\[\]]+)(@(?P<revision>[^:@\[\]]+))?"
    r"(:(?P<config>[^:\[\]]*)(:(?P<split>[^:\[\]]+))?)?(\[:(?P<rows>\d+)\])?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubText:
    """The rows that were read of one split of a data set."""

    dataset: str
    revision: str | None
    """The commit; None for a folder."""
    config: str
    split: str
    rows: int

    @property
    def source(self) -> str:
        """The name under which the same rows are read again."""
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{self.dataset}{revision}:{self.config}:{self.split}[:{self.rows}]"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"source": self.source, **asdict(self)}


def is_hub_text(name: str) -> bool:
    """Whether the name of a text is that of a data set; a file of such a name has a `./` before."""
    return name.startswith(PREFIX)


@cache
def read_hub_text(name: str, column: str) -> tuple[HubText, list[tuple[str, Any]]]:
    """What was read, and the values of a column, each with its place in words; once in a process.

    Args:
        name: of the form above. The usual config and split are the data set's only ones, or
            "default" and "train"; without a number of rows, as many as hold 32 MiB of characters.
        column: "text" stands for "messages" where a data set has no column "text".

    Raises:
        SimdiffError: no such data set, config, split or column; no network, or no permission.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise SimdiffError(f"text {name}: must be of the form {FORM}")
    try:
        import datasets
    except ImportError:
        raise SimdiffError(
            f"text {name}: data sets by name are read with datasets, which is not installed: "
            'pip install "simdiff-kernels[datasets]", or give the text as a file'
        ) from None
    wanted = found["revision"]
    try:
        builder = datasets.load_dataset_builder(
            found["name"], found["config"] or None, revision=wanted
        )
        splits = builder.as_streaming_dataset()
    except Exception as error:  # of the library, of the hub's client and of the network
        raise _unreadable(name, error) from None
    split = _split(name, found["split"], list(splits))
    revision = str(builder.hash) if _COMMIT.fullmatch(str(builder.hash)) else None
    if wanted is not None and _COMMIT.fullmatch(wanted) and revision not in (wanted, None):
        raise SimdiffError(
            f"text {name}: must be of revision {wanted}, and the cache has {revision} alone"
        )
    most = None if found["rows"] is None else int(found["rows"])
    rows = list(_values(name, splits[split], column, most))
    if most is not None and len(rows) < most:
        raise SimdiffError(f"text {name}: must have {most} rows, got {len(rows)}")
    read = HubText(found["name"], revision, str(builder.config.name), split, len(rows))
    return read, rows


def _split(name: str, wanted: str | None, known: list[str]) -> str:
    split = wanted or ("train" if "train" in known else known[0] if len(known) == 1 else "")
    if split not in known:
        got = f"{split!r}{nearest(split, known)}" if split else "none"
        raise SimdiffError(
            f"text {name}: the split must be one of {', '.join(known)}, got {got} ({FORM})"
        )
    return split


def _values(name: str, rows: Any, column: str, most: int | None) -> Iterator[tuple[str, Any]]:
    # Pictures and sounds beside the text are not decoded.
    known = [each for each in (column, "messages") if each in (rows.column_names or ())]
    waiting = iter(rows.select_columns(known) if known else rows)
    size = number = 0
    while number != most and (most is not None or size < MOST_CHARACTERS):
        try:
            row = next(waiting, None)
        except Exception as error:
            raise _unreadable(name, error) from None
        if row is None:
            return
        number += 1
        where = f"text {name}: row {number}"
        key = column_in(row, column)
        if key is None:
            raise no_column(f"{where} must have the column", column, row)
        yield where, row[key]
        size += len(str(row[key]))


def column_in(names: Any, column: str) -> str | None:
    """The column of that name, "messages" where "text" is asked for and is not there, else None."""
    return column if column in names else "messages" if _chat(names, column) else None


def _chat(names: Any, column: str) -> bool:
    if column != "text" or "messages" not in names:
        return False
    return not isinstance(names, dict) or is_conversation(names["messages"])


def no_column(what: str, column: str, names: Any) -> SimdiffError:
    """The error for a column that is not there; says which are."""
    found = ", ".join(f'"{name}"' for name in list(names)[:20]) or "nothing"
    return SimdiffError(
        f'{what} "{column}", got {found}: name the column of the text with '
        "--text-column (in Python, simdiff.TextFile(path, column))"
    )


def _unreadable(name: str, error: Exception) -> SimdiffError:
    """What a library raises, in one sentence, and what can be done about it."""
    said = " ".join(str(error).split()) or type(error).__name__
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    if "GatedRepoError" in kinds or "gated" in said:
        advice = "ask for access on its page and log in (`hf auth login`)"
    elif kinds & {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException"}:
        advice = (
            "the hub cannot be reached (HF_HUB_OFFLINE asks none) and its cache does not have it: "
            "give a file, or hf: and a folder with a copy of the data set"
        )
    elif "DatasetNotFoundError" in kinds:
        advice = "is the name right? A private data set needs `hf auth login`"
    else:
        advice = f"the form is {FORM}"
    return SimdiffError(f"text {name}: cannot be read: {said.rstrip('.')}; {advice}")
