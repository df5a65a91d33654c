"""Text of others in Markdown: names, notes and commands in which nothing acts as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence


def plain(text: object) -> str:
    """Text on one line, without unprintable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def code(text: object) -> str:
    """Text as inline code, in which nothing acts as Markdown, HTML or the border of a table."""
    shown = plain(text).replace("|", "¦")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}" if shown else "(no name)"


def code_block(lines: Sequence[str], language: str) -> str:
    """A fenced code block with a fence that its content cannot close."""
    content = "\n".join(lines)
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}\n"
