"""Pages of the site that are no files of docs/: mkdocs calls the functions `on_...` as it builds.

- CONTRIBUTING.md and CHANGELOG.md become pages.
- Other files of the repository that a page links to are copied beside the pages.
- The mark `<!-- every command -->` of commands.md becomes the options of every command, read from
  the parsers of `simdiff.cli`; torch is not imported for that.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COMMANDS = "<!-- every command -->"
# The target of a link, without its anchor; not one of another host.
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)")


def site_path(target: Path) -> str:
    """Where the site has a file of the repository, relative to the site's root."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix()
    return PAGES.get(name, f"files/{name}")


def linked_files() -> set[Path]:
    """Files outside docs/ to which a page links, other pages apart."""
    sources = [*DOCS.glob("*.md"), *(ROOT / name for name in PAGES)]
    targets = {
        (source.parent / link).resolve()
        for source in sources
        for link in LINK.findall(source.read_text())
    }
    return {path for path in targets if path.is_file() and site_path(path).startswith("files/")}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    from mkdocs.structure.files import File

    outside = {ROOT / name for name in PAGES} | linked_files()
    for path in sorted(outside):
        files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the command reference in, and lead links to where the site has their targets."""
    source = Path(str(page.file.abs_src_path))
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_reference())
    return LINK.sub(lambda link: site_path((source.parent / link[1]).resolve()), markdown)


def command_reference() -> str:
    """Markdown: a section for each command, a table for each group of its options."""
    parts: list[str] = []
    for name, parser in command_parsers().items():
        parts += [f"### simdiff {name}", parser.description or ""]
        parts.append(f"```text\n{parser.format_usage().removeprefix('usage: ')}```")
        for title, actions in _groups(parser):
            rows = "\n".join(_row(parser, action) for action in actions)
            parts.append(f"**{title}**\n\n| | default | meaning |\n|---|---|---|\n{rows}")
    return "\n\n".join(part for part in parts if part)


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command by its name."""
    sys.path.insert(0, str(ROOT / "python"))
    try:
        from simdiff.cli import parser
    finally:
        sys.path.pop(0)
    (commands,) = (
        action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def _groups(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if not action.dest.startswith("help") and _help(action) != argparse.SUPPRESS
        ]
        if actions:
            yield group.title or "options", actions


def _help(action: argparse.Action) -> str:
    """What an option means; one that `--help` leaves out keeps it in `full_help`."""
    return getattr(action, "full_help", action.help) or ""


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    name = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{value}`"
    if action.option_strings and action.nargs != 0:
        name += f" {value}" if action.choices is None else ""
    text = _help(action) % {**vars(action), "prog": parser.prog}
    if action.choices is not None:
        text += f"; one of {', '.join(f'`{choice}`' for choice in action.choices)}"
    return f"| {name} | {_default(action.default)} | {text.replace('|', chr(92) + '|')} |"


def _default(value: Any) -> str:
    if value is None or value is False or value == () or value == argparse.SUPPRESS:
        return ""
    if isinstance(value, tuple):
        return "all"
    return f"`{value}`"
