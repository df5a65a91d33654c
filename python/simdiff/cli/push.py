"""`simdiff push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser
from simdiff.errors import number_of

TEXT = "Upload a pruned model with its card to a model hub."
INTERRUPTED = "the repository may hold a part; --update completes it"


def add(sub: CommandParser) -> None:
    """The options of `simdiff push`."""
    sub.add_argument(
        "directory",
        type=Path,
        metavar="DIRECTORY",
        help="directory that `simdiff prune`, `recover` or `run` wrote",
    )
    sub.add_argument("name", metavar="NAME", help="repository: OWNER/NAME, or NAME for your own")
    group = sub.group("upload")
    group.add_argument("--dry-run", action="store_true", help="show what would go; send nothing")
    group.add_argument("--private", action="store_true", help="a repository that only you see")
    group.add_argument(
        "--update",
        action="store_true",
        help="a new commit in a repository that exists, in place of its files",
    )


def needs_torch(arguments: argparse.Namespace) -> bool:
    """Files are sent as they are."""
    return False


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff push`."""
    from simdiff.provenance.push import prepared, push

    found = prepared(arguments.directory, arguments.name)
    if not arguments.dry_run:
        found = push(found, private=arguments.private, update=arguments.update)
    width = max(map(len, found.files))
    verb = "would go" if arguments.dry_run else "went"
    size = f"{number_of(len(found.files), 'file')}, {sum(found.files.values()) / 1e6:.1f} MB"
    show(
        arguments,
        found.to_dict(),
        *(f"{name:<{width}}  {count / 1e6:10.3f} MB" for name, count in found.files.items()),
        *(f"Added to the card: {line}" for line in found.added),
        f"{size}, {verb} to {found.url or found.repository}",
    )
