"""Criteria and selections of other packages, which name them in their pyproject.toml:

    [project.entry-points."simdiff.criteria"]
    my-criterion = "my_package:CRITERION"

    [project.entry-points."simdiff.selections"]
    my-selection = "my_package:select"

A criterion is a `simdiff.Criterion`. A selection is a function of the scores, the importance of
every layer, the number of layers to remove and those that stay, and gives the layers to remove. The
names here stand; one that this package has itself means this package's own. A package is imported
when its name is used, so that `--help` need not wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeAlias

from simdiff.errors import SimdiffError
from simdiff.planning.names import ALL_CRITERIA, SELECTIONS

if TYPE_CHECKING:
    from simdiff.scoring.scores import LayerScores

CRITERIA_GROUP, SELECTIONS_GROUP = "simdiff.criteria", "simdiff.selections"
Selection: TypeAlias = (
    "Callable[[LayerScores, tuple[float, ...], int, frozenset[int]], Iterable[int]]"
)
# Names become names of files.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@cache
def _named(group: str) -> dict[str, EntryPoint]:
    own = ALL_CRITERIA if group == CRITERIA_GROUP else SELECTIONS
    found = sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value))
    return {e.name: e for e in reversed(found) if _NAME.fullmatch(e.name) and e.name not in own}


def foreign_criteria() -> tuple[str, ...]:
    """The names of criteria that other packages have."""
    return tuple(sorted(_named(CRITERIA_GROUP)))


def foreign_selections() -> tuple[str, ...]:
    """The names of selections that other packages have."""
    return tuple(sorted(_named(SELECTIONS_GROUP)))


def known_criteria() -> tuple[str, ...]:
    """The names of all criteria, those of other packages last."""
    return (*ALL_CRITERIA, *foreign_criteria())


def known_selections() -> tuple[str, ...]:
    """The names of all selections, those of other packages last."""
    return (*SELECTIONS, *foreign_selections())


@cache
def loaded(group: str, name: str, kind: type | None = None) -> Any:
    """What an entry point names.

    Args:
        group, name: of the entry point, which is there.
        kind: class that it must be of; None takes whatever can be called.

    Raises:
        SimdiffError: it cannot be imported, or is something else.
    """
    entry = _named(group)[name]
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "another package"
    where = f"{name} of {package} ({group}: {entry.value})"
    try:
        found = entry.load()
    except Exception as error:  # whatever the package does when it is imported
        raise SimdiffError(
            f"{where} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    fits = callable(found) if kind is None else isinstance(found, kind)
    if not fits:
        wanted = "a function" if kind is None else f"a {kind.__module__}.{kind.__name__}"
        raise SimdiffError(f"{where} must be {wanted}, got {type(found).__name__}")
    return found


def selected(
    name: str,
    scores: LayerScores,
    importance: tuple[float, ...],
    num_remove: int,
    protect: Collection[int],
) -> tuple[int, ...]:
    """The layers that a selection of another package removes.

    Raises:
        SimdiffError: the selection cannot be imported, or gives other than `num_remove` layers that
            are there and not protected.
    """
    select: Selection = loaded(SELECTIONS_GROUP, name)
    removed = tuple(select(scores, importance, num_remove, frozenset(protect)))
    free = set(range(scores.num_layers)) - set(protect)
    if len(removed) != num_remove or len(set(removed)) != num_remove or not set(removed) <= free:
        raise SimdiffError(
            f"selection {name}: must give {num_remove} different layers of {scores.num_layers} "
            f"that are not protected, got {removed}"
        )
    return tuple(int(layer) for layer in removed)
