"""The parser of one command: options in named groups; the first help shows the common ones.

Built on argparse. `--help` shows what most calls need, `--help-all` everything; `--config FILE`
reads options from a YAML file, see `simdiff.cli.config`.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from simdiff.errors import SimdiffError, nearest
from simdiff.planning.layer_lists import parse_layers


class _Brief(argparse.ArgumentParser):
    """A parser whose errors stand alone, without a page of usage, and name what may be meant."""

    def error(self, message: str) -> NoReturn:
        """Exit with one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        meant = nearest(str(value), known)
        one_of = "" if meant and len(known) > _MANY else f"must be one of {', '.join(known)}, "
        raise argparse.ArgumentError(action, f"{one_of}got {str(value)!r}{meant}")


# More choices than this are not listed beside the one that may be meant.
_MANY = 6


class RootParser(_Brief):
    """The parser of all commands."""

    def check_first(self, words: Sequence[str], commands: Collection[str]) -> None:
        """Exit if an option that is none of this parser stands in the place of a command."""
        first = words[0]
        known = [flag for action in self._actions for flag in action.option_strings]
        if first.startswith("-") and first not in known:
            behind = any(word in commands for word in words)
            self.error(
                f"{first} must stand behind the command"
                if behind
                else f"there is no option {first}"
            )


class CommandParser(_Brief):
    """A parser whose options stand in named groups."""

    def __init__(self, **settings: Any) -> None:
        """Options may not be abbreviated: an abbreviation would change its meaning with time."""
        usual: dict[str, Any] = {
            "add_help": False,
            "allow_abbrev": False,
            "formatter_class": _Formatter,
        }
        super().__init__(**usual | settings)
        self._by_title: dict[str, argparse._ArgumentGroup] = {}

    def group(self, title: str, text: str | None = None) -> argparse._ArgumentGroup:
        """The group of this title, made when it is first asked for."""
        if title not in self._by_title:
            self._by_title[title] = self.add_argument_group(title, text)
        return self._by_title[title]

    def check_names(self, words: Sequence[str]) -> None:
        """Exit if a word looks like an option and is none; tell what may have been meant."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in words:
            name = word.partition("=")[0]
            if name == "--":
                return
            if name.startswith("--") and name not in known:
                meant = nearest(name[2:], [flag[2:] for flag in known], "--")
                self.error(f"there is no option {name}{meant}")

    def given(self, words: Sequence[str]) -> set[str]:
        """Which options stand on the command line, by their names as attributes."""
        flags = {word.partition("=")[0] for word in words}
        return {action.dest for action in self._actions if flags & {*action.option_strings}}

    def add_general(self) -> None:
        """The options that every command has; called last, so that help shows them last."""
        general = self.group("general")
        general.add_argument("--json", action="store_true", help="print JSON on standard output")
        general.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="YAML file with options by name, such as the config.yaml of an earlier run; what "
            "the command line says goes before",
        )
        loud = general.add_mutually_exclusive_group()
        loud.add_argument(
            "--quiet",
            action="store_true",
            help="print the result alone: no progress, and no notes beside it",
        )
        rare(
            loud,
            "--verbose",
            action="store_true",
            help="also print what libraries log, and where an error came from",
        )
        general.add_argument("-h", "--help", action="help", help="show the common options")
        general.add_argument("--help-all", action=_HelpAll, help="show all options")
        self.usage = _usage(self)


class _HelpAll(argparse.Action):
    """Prints the help with every option, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Tells a default where there is one to tell; breaks no name at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        silent = default is None or default is False or default in ((), argparse.SUPPRESS)
        if text is None or silent or action.required or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class CommandsFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves room for the longest name of a command, which argparse forgets to indent."""

    def add_argument(self, action: argparse.Action) -> None:
        """Count a command's name with its indentation."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment


def rare(container: Any, *flags: str, help: str, **options: Any) -> argparse.Action:
    """Add an option that only `--help-all` shows."""
    action: argparse.Action = container.add_argument(*flags, help=argparse.SUPPRESS, **options)
    action.full_help = help  # type: ignore[attr-defined]
    return action


def _usage(parser: argparse.ArgumentParser) -> str:
    """What must be given, and that there are options."""
    words = ["%(prog)s"]
    for action in parser._actions:
        name = str(action.metavar or action.dest.upper().replace("_", "-"))
        if not action.option_strings:
            several = f"{name} [{name} ...]" if action.nargs == "+" else name
            words.append(f"[{name}]" if action.nargs == "?" else several)
        elif action.required:
            words.append(f"{action.option_strings[0]} {name}")
    return " ".join([*words, "[options]"])


def layer_list(text: str) -> tuple[int, ...]:
    """Numbers such as 0,1,28-29."""
    try:
        return parse_layers(text)
    except SimdiffError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Several(argparse.Action):
    """Takes one value as it is, and several as a list, which puts aside that of a file."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add a value to those that the command line gave before."""
        before = getattr(namespace, self.dest, None)
        if before is self.default:
            setattr(namespace, self.dest, values)
        else:
            earlier = before if isinstance(before, list) else [before]
            setattr(namespace, self.dest, [*earlier, values])


def weights(text: str) -> tuple[float, ...]:
    """Numbers above 0 between commas."""
    try:
        found = tuple(float(number) for number in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < number < float("inf") for number in found):
        raise argparse.ArgumentTypeError(f"must be numbers above 0 such as 2,1, got {text!r}")
    return found


def names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
