"""The command `simdiff`: one module for each subcommand, with `TEXT`, `add` and `run`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from simdiff.cli import (
    bench,
    compare,
    doctor,
    evaluate,
    export,
    info,
    plan,
    plot,
    profile,
    prune,
    push,
    recover,
    report,
    reproduce,
    rerun,
    run,
    score,
    verify,
)
from simdiff.cli.checks import check
from simdiff.cli.config import apply_config, config_path
from simdiff.cli.examples import epilog
from simdiff.cli.parsing import CommandParser, CommandsFormatter, RootParser
from simdiff.errors import Note, SimdiffError
from simdiff.io import ranks
from simdiff_kernels import __version__

# Commands import what they need in `run`: `simdiff --help` must not wait for torch.
COMMANDS = {
    "run": run,
    "score": score,
    "plan": plan,
    "prune": prune,
    "recover": recover,
    "verify": verify,
    "export": export,
    "eval": evaluate,
    "compare": compare,
    "bench": bench,
    "reproduce": reproduce,
    "rerun": rerun,
    "report": report,
    "plot": plot,
    "push": push,
    "profile": profile,
    "info": info,
    "doctor": doctor,
}

_DESCRIPTION = """\
Make a language model smaller by removing whole decoder layers.

Every layer is scored from the hidden states that enter and leave it while the model reads some
calibration text: how much it turns them (cosine distance) and how much it moves them (squared and
absolute difference). The layers that matter least are removed, and the result is written as an
ordinary checkpoint that transformers loads."""

_EPILOG = """\
examples:
  simdiff run demo --output out                     the whole way on the built-in demo model
  simdiff run ./my-model --text corpus.txt --ratio 0.25 --output out
  simdiff score ./my-model --text corpus.txt --output scores.json      the slow part, once ...
  simdiff plan scores.json --num-layers 8                              shown, as often as liked
  simdiff plan scores.json --num-layers 8 --output plan.json           and kept
  simdiff prune ./my-model --plan plan.json --output ./my-model-small
  simdiff recover ./my-model --plan plan.json --text corpus.txt --output ./my-model-repaired
  simdiff eval ./my-model ./my-model-small --text other.txt
  simdiff bench ./my-model ./my-model-small --batch-sizes 1,8          how much faster it is
  simdiff compare ./my-model --text corpus.txt --num-layers 2,4,8 --output comparison
  simdiff report out --evaluation eval.json --bench bench.json -o report.html       one page

simdiff help COMMAND, or simdiff COMMAND --help, explains a command; --help-all shows all options.
Every option can stand in a YAML file: --config run.yaml. What a command writes into a directory is
repeated by the config.yaml in it.

exit codes: 0 success, 1 unexpected error (verify, doctor: a check failed), 2 input that cannot be
used, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in ([], ["help"]):  # help, help COMMAND
        words = [*words[1:], "--help"]
    _open_streams()
    command = words[0] if words and words[0] in COMMANDS else None
    arguments = None
    try:
        arguments, given = _parsed(command, words)
        arguments.command_line = shlex.join(["simdiff", *words])
        module = COMMANDS[arguments.command]
        with _loudness(arguments):
            if not _checked(module, arguments, given):
                return 2
            if hasattr(module, "repeat"):  # gives another command again
                return int(module.repeat(arguments, main))
            if not getattr(module, "needs_torch", lambda given: True)(arguments):
                if ranks.announced()[0]:
                    return 0  # the first process does it
                with _notes_shown(arguments.quiet):
                    return module.run(arguments) or 0
            _load_libraries()
            _set_threads(getattr(arguments, "threads", None))
            with _notes_shown(arguments.quiet), ranks.processes():
                try:
                    return _shared(module, arguments)
                except (SimdiffError, ValueError, ranks.ElsewhereError) as error:
                    if ranks.tells(error):
                        raise
                    return 2
    except ranks.ElsewhereError as error:
        print(f"simdiff {command}: error: {error}", file=sys.stderr)
        return 1
    except (SimdiffError, ValueError) as error:
        # ValueError: the scorers' own errors, such as NonFiniteError; others are bugs.
        if not isinstance(error, SimdiffError) and not _is_for_users(error):
            raise
        if "--verbose" in words:
            traceback.print_exc()
        said = in_flags(str(error)).removeprefix(f"{command}: ")  # functions begin with their name
        print(f"simdiff {command}: error: {said}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        module = COMMANDS[command or "run"]
        consequence = getattr(module, "INTERRUPTED", "nothing was written")
        if arguments is not None and hasattr(module, "interrupted"):
            consequence = module.interrupted(arguments)
        print(f"simdiff {command}: interrupted, {consequence}", file=sys.stderr)
        return 130


def _checked(module: Any, arguments: argparse.Namespace, given: set[str]) -> bool:
    """Whether everything can be; of several processes the first one tells what cannot.

    Raises:
        SimdiffError: says what is wrong.
    """
    try:
        check(arguments, given)
        getattr(module, "check", lambda given: None)(arguments)
    except SimdiffError:
        if not ranks.announced()[0]:
            raise
        return False
    return True


def _shared(module: Any, arguments: argparse.Namespace) -> int:
    """Run a command in all processes that were started, or in the first where it shares nothing."""
    given = {
        f"--{name.replace('_', '-')}": repr(value)
        for name, value in vars(arguments).items()
        if name not in ("parser", "command_line")
    }
    ranks.agree("options", given)
    if getattr(module, "SHARED", False):
        return module.run(arguments) or 0
    if ranks.size() > 1:
        warnings.warn(
            Note(f"simdiff {arguments.command} runs in one process: the others wait"), stacklevel=2
        )
    return ranks.first(lambda: module.run(arguments)) or 0


def _parsed(command: str | None, words: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """What the command line says, and for what it does not say the file of `--config`.

    Returns:
        The arguments, and the names of those that the user gave.
    """
    root, commands = _parsers()
    if command is None:
        root.check_first(words, COMMANDS)
        root.parse_args(words)  # --version, --help, or no command
    of_command = commands[str(command)]
    of_command.check_names(words[1:])
    path = config_path(words)
    given = of_command.given(words)
    if path is not None:
        given |= apply_config(of_command, path, words)
    arguments, rest = root.parse_known_args(words)
    if rest:
        of_command.error(f"there must be no more arguments, got {' '.join(rest)}")
    return arguments, given


def in_flags(message: str) -> str:
    """An error of Python's functions in the words of the command line.

    `overwrite=True` is `--overwrite` there, and `window_length=64` is `--window-length 64`.
    """
    known = {action.dest for sub in _parsers()[1].values() for action in sub._actions}

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip("'")
        if name not in known:
            return match[0]
        words = [f"--{name.replace('_', '-')}", *([] if value in ("True", "...") else [value])]
        return " ".join(words)

    return re.sub(r"\b([a-z_]+)=(True|\.\.\.|'[^']*'|[\w./-]*\w)", flag, message)


@contextlib.contextmanager
def _loudness(arguments: argparse.Namespace) -> Iterator[None]:
    """What `--quiet` and `--verbose` ask for."""
    if not (arguments.quiet or arguments.verbose):
        yield
        return
    from simdiff.io import progress

    with progress.silent() if arguments.quiet else progress.talkative():
        yield


def _open_streams() -> None:
    """A process may be started with its streams closed (`>&-`): what is printed is then lost."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as it runs


def _load_libraries() -> None:
    """Say what the first seconds are spent on."""
    from simdiff.io.progress import silent, step

    with silent() if ranks.announced()[0] else step("load torch and transformers"):
        try:
            import simdiff.jobs.run  # noqa: F401
        except ValueError as error:
            if not str(error).startswith("SIMDIFF_"):  # an environment variable of ours
                raise
            raise SimdiffError(str(error)) from None


@contextlib.contextmanager
def _notes_shown(quiet: bool) -> Iterator[None]:
    """Print every note once, in a line of standard error; other warnings as Python shows them."""
    usual, told = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, Note):
            usual(message, category, *where, **more)
        elif ranks.prints() and str(message) not in told:
            told.add(str(message))
            if quiet:
                return
            print(f"Note: {message}.", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        warnings.showwarning = show
        yield


def _set_threads(count: int | None) -> None:
    if count is None:
        return
    import torch

    torch.set_num_threads(count)


def _is_for_users(error: ValueError) -> bool:
    scorers = sys.modules.get("simdiff_kernels.summaries")  # not imported for this alone
    return scorers is not None and isinstance(error, scorers.NonFiniteError)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return _parsers()[0]


def _parsers() -> tuple[RootParser, dict[str, CommandParser]]:
    """The parser of all commands, and that of each."""
    result = RootParser(
        prog="simdiff",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=CommandsFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = result.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    parsers: dict[str, CommandParser] = {}
    for name, module in COMMANDS.items():
        parsers[name] = sub = commands.add_parser(name, help=module.TEXT, description=module.TEXT)
        module.add(sub)
        sub.add_general()
        sub.epilog = epilog(name, sub.epilog)
        sub.set_defaults(parser=sub)
    return result, parsers
