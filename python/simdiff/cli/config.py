"""Options from a YAML file, and the file that repeats a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simdiff.cli.parsing import Several
from simdiff.errors import SimdiffError, nearest, nearest_path
from simdiff_kernels import __version__

# Where the result goes is said anew each time; the others do not change it.
_NOT_WRITTEN = (
    *("config", "help", "help_all", "json", "log", "quiet", "verbose"),
    *("output", "overwrite", "restart"),
)


def config_path(words: Sequence[str]) -> Path | None:
    """The file that `--config` names, if any."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path)
    try:
        found: Path | None = finder.parse_known_args(words)[0].config
    except argparse.ArgumentError:  # the parser of the command says what is wrong
        return None
    return found


def apply_config(parser: argparse.ArgumentParser, path: Path, words: Sequence[str]) -> set[str]:
    """Make the values of a file the defaults of a command's parser.

    Args:
        parser: of the command.
        path: a YAML file: a mapping from names of options, with dashes or underscores, to values.
        words: of the command line, which go before: an option there also puts aside those of the
            file that exclude it.

    Returns:
        The options to which the file gives other values than their defaults.

    Raises:
        SimdiffError: no such file, no mapping, a name that is no option, a value that cannot be.
    """
    content = _read(path)
    command = content.pop("command", None)
    name = str(parser.prog).split()[-1]
    if command not in (None, name):
        raise SimdiffError(f"{path}: is for `simdiff {command}`, not for `simdiff {name}`")
    actions = {
        known: action
        for action in parser._actions
        if action.dest not in ("config", "help", "help_all")
        for known in (action.dest, *(flag.lstrip("-") for flag in action.option_strings))
    }
    excluded = _excluded(parser, words)
    changed = set()
    for key, raw in content.items():
        action = actions.get(str(key).replace("-", "_")) or actions.get(str(key).replace("_", "-"))
        if action is None:
            known = sorted({action.dest for action in actions.values()})
            raise SimdiffError(
                f"{path}: `simdiff {name}` has no option {key!r}"
                f"{nearest(str(key).replace('-', '_'), known)}"
            )
        if raw is None or action.dest in excluded:
            continue
        # A positional argument, too, need not be given any more.
        value = _value(action, raw, f"{path}: {key}")
        if value != action.default:
            changed.add(action.dest)
        action.default, action.required = value, False
    return changed


def _read(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SimdiffError(
            f"{path}: must be a readable YAML file: {error.strerror}{nearest_path(path)}"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise SimdiffError(f"{path}: must be a YAML file, but is not: {error}") from None
    if not isinstance(content, dict):
        raise SimdiffError(
            f"{path}: must be a mapping from options to values, got {type(content).__name__}"
        )
    return content


def _excluded(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """What exclusive options of the command line put aside, themselves included."""
    given = {word.partition("=")[0] for word in words}
    return {
        action.dest
        for group in parser._mutually_exclusive_groups
        if any(given & {*action.option_strings} for action in group._group_actions)
        for action in group._group_actions
    }


def _value(action: argparse.Action, raw: Any, where: str) -> Any:
    """A value of the file as the command line would make it."""
    if action.nargs == 0:
        if not isinstance(raw, bool):
            raise SimdiffError(f"{where}: must be true or false, got {raw!r}")
        return raw
    if isinstance(raw, (bool, dict)):
        raise SimdiffError(
            f"{where}: must be a number, a text or a list, got {raw!r}; a text is quoted"
        )
    if action.nargs in ("+", "*") or (isinstance(action, Several) and isinstance(raw, list)):
        return [_converted(action, entry, where) for entry in _as_list(raw)]
    text = ",".join(map(str, raw)) if isinstance(raw, list) else raw
    return _converted(action, text, where)


def _as_list(raw: Any) -> list[Any]:
    return raw if isinstance(raw, list) else [raw]


def _converted(action: argparse.Action, raw: Any, where: str) -> Any:
    kind: Any = action.type or str
    try:
        value = kind(str(raw))
    except argparse.ArgumentTypeError as error:
        raise SimdiffError(f"{where}: {error}") from None
    except (TypeError, ValueError):
        raise SimdiffError(f"{where}: must be of type {kind.__name__}, got {raw!r}") from None
    if action.choices is not None and value not in action.choices:
        raise SimdiffError(
            f"{where}: must be one of {', '.join(map(str, action.choices))}, got {raw!r}"
        )
    return value


def config_text(arguments: argparse.Namespace) -> str:
    """The YAML file that repeats a run: every option that has a value, at today's default too."""
    import yaml

    written = yaml.safe_dump(
        given_options(arguments), sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    return (
        f"# Written by simdiff-kernels {__version__}; this repeats the run:\n"
        f"#   simdiff {arguments.command} --config config.yaml --output NEW\n"
        "# Relative paths are seen from the directory in which the command was given.\n" + written
    )


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command and every option that has a value, as YAML holds them."""
    values = {"command": arguments.command}
    for action in arguments.parser._actions:
        value = getattr(arguments, action.dest, None)
        if action.dest in _NOT_WRITTEN or value is None or value is False or value == ():
            continue
        if isinstance(value, (tuple, list)):
            value = [entry if isinstance(entry, (int, float)) else str(entry) for entry in value]
        values[action.dest] = value if isinstance(value, (bool, int, float, list)) else str(value)
    return values
